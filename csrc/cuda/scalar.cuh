// A 0-D tensor of float32 or float64 on the device, to be read there.
#pragma once

#include "device.cuh"

namespace erasediff::cuda {

struct Scalar {
  const void* data = nullptr;
  bool wide = false;

  Scalar() = default;
  explicit Scalar(const Tensor& tensor) : data(tensor.data_ptr()), wide(tensor.scalar_type() == ScalarType::Double) {}

  __device__ double read() const {
    return wide ? *static_cast<const double*>(data) : double(*static_cast<const float*>(data));
  }
};

}  // namespace erasediff::cuda

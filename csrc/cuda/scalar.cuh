// Numbers of float32 or float64 on the device, to be read there.
#pragma once

#include "device.cuh"

namespace erasediff::cuda {

struct Scalar {
  const void* data = nullptr;
  bool wide = false;

  Scalar() = default;
  explicit Scalar(const Tensor& tensor) : data(tensor.data_ptr()), wide(tensor.scalar_type() == ScalarType::Double) {}

  __device__ double read(int index = 0) const {
    return wide ? static_cast<const double*>(data)[index] : double(static_cast<const float*>(data)[index]);
  }
};

// Those of the two gradients: a multiplier of the forget gradient alone (0-D), or both, retain first ([2]).
struct Coefficients {
  Scalar values;
  bool both;

  explicit Coefficients(const Tensor& tensor) : values(tensor), both(tensor.dim() == 1) {}

  __device__ double retain() const { return both ? values.read(0) : 1.0; }
  __device__ double forget() const { return values.read(both ? 1 : 0); }
};

}  // namespace erasediff::cuda

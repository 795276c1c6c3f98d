// A new 0-D tensor on the device of another.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace erasediff::cpu {

template <class T>
torch::stable::Tensor scalar(const torch::stable::Tensor& like, torch::headeronly::ScalarType dtype, T value) {
  torch::stable::Tensor result = torch::stable::new_empty(like, {}, dtype);
  *static_cast<T*>(result.data_ptr()) = value;
  return result;
}

}  // namespace erasediff::cpu

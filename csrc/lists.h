// Checks of lists of tensors: all that the kernels rely on, in nanoseconds per tensor. `ops/_lists.py` and
// `ops/_update.py` check the same in Python, to say what is wrong and for the backends that are not compiled; they run
// where a list was not accepted here. `tests/kernels/test_list_checks.py` holds both to the same verdict.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "shared/moment_codes.h"

namespace erasediff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_data(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// Type and index of a tensor's device.
struct Device {
  int32_t type, index;

  explicit Device(const Tensor& tensor) : index(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  }
  bool is_that_of(const Tensor& tensor) const {
    const Device other(tensor);
    return other.type == type && other.index == index;
  }
};

// Shape and strides of a tensor, borrowed from it.
struct Layout {
  int64_t dim;
  int64_t *sizes, *strides;

  explicit Layout(const Tensor& tensor) : dim(tensor.dim()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  }

  // The same shape, and the same order of elements in memory.
  bool operator==(const Layout& other) const {
    if (dim != other.dim) return false;
    bool same = true, empty = false;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != other.sizes[d]) return false;
      same = same && (strides[d] == other.strides[d] || sizes[d] == 1);
      empty = empty || sizes[d] == 0;
    }
    return same || empty;
  }

  // Dense: the elements fill one block of memory without gaps or overlaps, in whatever order.
  bool is_dense() const {
    int64_t left = 1;
    for (int64_t d = 0; d < dim; ++d) left *= sizes[d];
    if (left == 0) return true;
    int64_t expected = 1;
    while (expected != left) {
      int64_t d = 0;
      while (d < dim && (strides[d] != expected || sizes[d] == 1)) ++d;
      if (d == dim) return false;
      expected *= sizes[d];
    }
    return true;
  }
};

using TensorList = std::vector<Tensor>;

// Lists that go along with one that sets shapes, layouts and device. Each check returns false for a list that it
// rejects.
class Columns {
 public:
  explicit Columns(const TensorList& first) : first_(first) {
    layouts_.reserve(first.size());
    for (const Tensor& tensor : first) layouts_.emplace_back(tensor);
    if (!first.empty()) device_.emplace(first[0]);
  }

  // The first list itself: dense tensors of data types on one device.
  bool are_valid() const {
    for (size_t i = 0; i < layouts_.size(); ++i) {
      if (!layouts_[i].is_dense() || !is_data(first_[i].scalar_type()) || !device_->is_that_of(first_[i])) return false;
    }
    return true;
  }

  // One tensor for each of the first list, of a type for which `accepts(index, dtype)`.
  template <class Accepts>
  bool match(const TensorList& list, const Accepts& accepts) const {
    if (list.size() != layouts_.size()) return false;
    for (size_t i = 0; i < list.size(); ++i) {
      if (!accepts(i, list[i].scalar_type()) || !device_->is_that_of(list[i]) || !(Layout(list[i]) == layouts_[i]))
        return false;
    }
    return true;
  }
  bool match(const TensorList& list) const {
    return match(list, [](size_t, ScalarType dtype) { return is_data(dtype); });
  }
  bool match_or_absent(const TensorList& list) const { return list.empty() || match(list); }

  // Vectors of `dtype`, one for each tensor, with an element for every `share` of the tensor's, rounded up.
  bool have(const TensorList& list, ScalarType dtype, int64_t share) const {
    if (list.size() != layouts_.size()) return false;
    for (size_t i = 0; i < list.size(); ++i) {
      int64_t numel = 1;
      for (int64_t d = 0; d < layouts_[i].dim; ++d) numel *= layouts_[i].sizes[d];
      const Tensor& vector = list[i];
      if (vector.scalar_type() != dtype || vector.dim() != 1 || vector.numel() != (numel + share - 1) / share ||
          !vector.is_contiguous() || !device_->is_that_of(vector))
        return false;
    }
    return true;
  }
  bool have_masks_or_none(const TensorList& masks) const { return masks.empty() || have(masks, ScalarType::Byte, 8); }

 private:
  const TensorList& first_;
  std::vector<Layout> layouts_;
  std::optional<Device> device_;
};

// Arguments of every update besides its states.
struct UpdateArguments {
  const TensorList &params, &retain, &forget, &ema, &copies, &masks;
  const Tensor &multiplier, &clip_scale, &finite, &lr, &step;
  const std::optional<Tensor>& rounding_key;

  // `states` are lists of moments; where `absmaxes` are there, of codes.
  bool are_valid(const std::vector<const TensorList*>& states,
                      const std::vector<const TensorList*>& absmaxes = {}) const {
    const Columns columns(params);
    const Device device(finite);
    const auto is_scalar = [&](const Tensor& scalar) {
      return scalar.dim() == 0 && device.is_that_of(scalar) &&
             (scalar.scalar_type() == ScalarType::Float || scalar.scalar_type() == ScalarType::Double);
    };
    const auto are_coefficients = [&](const Tensor& both) {
      return both.dim() == 1 && both.numel() == 2 && both.is_contiguous() && device.is_that_of(both) &&
             (both.scalar_type() == ScalarType::Float || both.scalar_type() == ScalarType::Double);
    };
    if (!is_scalar(multiplier) && !are_coefficients(multiplier)) return false;
    if (!is_scalar(clip_scale) || !is_scalar(lr)) return false;
    if (finite.dim() != 0 || finite.scalar_type() != ScalarType::Bool) return false;
    if (step.dim() != 0 || step.scalar_type() != ScalarType::Float || !device.is_that_of(step)) return false;
    if (rounding_key && (rounding_key->scalar_type() != ScalarType::Long || rounding_key->dim() != 1 ||
                         rounding_key->numel() != 2 || !device.is_that_of(*rounding_key)))
      return false;
    if (params.empty()) return retain.empty() && forget.empty();
    if (!device.is_that_of(params[0]) || !columns.are_valid()) return false;

    const auto type_of_param = [&](size_t i) { return params[i].scalar_type(); };
    bool coded = false;
    for (const TensorList* list : absmaxes) coded = coded || !list->empty();
    for (size_t state = 0; state < states.size(); ++state) {
      const ScalarType code = state == 0 ? ScalarType::Char : ScalarType::Byte;
      const bool matches = columns.match(*states[state], [&](size_t i, ScalarType dtype) {
        if (coded) return dtype == code && type_of_param(i) != ScalarType::Double;
        return dtype == ScalarType::Float || (is_data(dtype) && dtype == type_of_param(i));
      });
      if (!matches || (coded && !columns.have(*absmaxes[state], ScalarType::Float, kMomentBlock))) return false;
    }
    return columns.match(retain) && columns.match_or_absent(forget) && columns.match_or_absent(ema) &&
           columns.match_or_absent(copies) && columns.have_masks_or_none(masks);
  }
};

// Arguments of the Gram values.
inline bool gram_lists_are_valid(const TensorList& retain, const TensorList& forget, const TensorList& masks) {
  const Columns columns(retain);
  return !retain.empty() && columns.are_valid() && columns.match_or_absent(forget) && columns.have_masks_or_none(masks);
}

}  // namespace erasediff

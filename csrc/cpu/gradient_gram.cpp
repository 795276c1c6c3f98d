// (rr, rf, ff) in one read of both gradients. Products are exact in fp64 for every type but fp64 itself, and are added
// up in fp64: per lane, then per chunk, then over the chunks in order.
#include <torch/csrc/stable/library.h>

#include "../lists.h"
#include "capability.h"
#include "chunks.h"
#include "products.h"
#include "tile.h"

namespace erasediff::cpu {
namespace {

struct Gram {
  double rr = 0.0, rf = 0.0, ff = 0.0;
};

struct Item {
  Flat retain, forget;
  const uint8_t* mask = nullptr;
};

// Zeros where the mask has a 0, whatever was there.
template <class T>
ERASEDIFF_FN const T* masked(const T* values, const uint8_t* keep, int64_t n, T* buffer) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) buffer[i] = select(keep[i], values[i], T(0));
  return buffer;
}

// Tile by tile: with a mask, or where the two types differ.
template <class T>
void add_tiles(const Item& item, int64_t first, int64_t size, Products& products) {
  for (const int64_t end = first + size; first < end; first += kTile) {
    const int64_t n = std::min(kTile, end - first);
    T retain_buffer[kTile], forget_buffer[kTile];
    const T *retain, *forget;
    with_capability([&]() ERASEDIFF_INLINE {
      retain = load(item.retain, first, n, retain_buffer);
      forget = item.forget.data ? load(item.forget, first, n, forget_buffer) : retain;
      if (item.mask) {
        uint8_t keep[kTile];
        unpack_mask(item.mask, first, n, keep);
        forget = masked(forget, keep, n, forget_buffer);
        retain = masked(retain, keep, n, retain_buffer);
      }
    });
    add_products(retain, forget, n, products);
  }
}

template <class Stored>
void add_chunk(const Item& item, int64_t first, int64_t size, Products& products) {
  const Stored* retain = item.retain.at<Stored>(first);
  add_products(retain, item.forget.data ? item.forget.at<Stored>(first) : retain, size, products);
}

Gram gram_of_chunk(const Item& item, int64_t first, int64_t size) {
  Products products;
  const auto both = [&](ScalarType dtype) {
    return !item.mask && item.retain.dtype == dtype && (!item.forget.data || item.forget.dtype == dtype);
  };
  if (both(ScalarType::Float)) {
    add_chunk<float>(item, first, size, products);
  } else if (both(ScalarType::BFloat16)) {
    add_chunk<bf16>(item, first, size, products);
  } else if (both(ScalarType::Half)) {
    add_chunk<fp16>(item, first, size, products);
  } else if (item.retain.dtype == ScalarType::Double || item.forget.dtype == ScalarType::Double) {
    add_tiles<double>(item, first, size, products);
  } else {
    add_tiles<float>(item, first, size, products);
  }
  Gram gram;
  gram.rr = Products::sum(products.xx);
  if (!item.forget.data) return gram;
  gram.rf = Products::sum(products.xy);
  gram.ff = Products::sum(products.yy);
  return gram;
}

std::optional<Tensor> gradient_gram(const TensorList& retain, const TensorList& forget, const TensorList& masks) {
  if (!gram_lists_are_valid(retain, forget, masks)) return std::nullopt;
  std::vector<Item> items(retain.size());
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].retain = Flat(retain[i]);
    if (!forget.empty()) items[i].forget = Flat(forget[i]);
    if (!masks.empty()) items[i].mask = static_cast<const uint8_t*>(masks[i].data_ptr());
  }
  const Chunks chunks(items.size(), [&](int64_t i) { return retain[i].numel(); });
  std::vector<Gram> grams(chunks.count());
  chunks.for_each([&](int64_t chunk, int64_t tensor, int64_t first, int64_t size) {
    grams[chunk] = gram_of_chunk(items[tensor], first, size);
  });
  Gram total;
  for (const Gram& gram : grams) {
    total.rr += gram.rr;
    total.rf += gram.rf;
    total.ff += gram.ff;
  }
  Tensor result = torch::stable::new_empty(retain[0], {3}, ScalarType::Double);
  std::memcpy(result.data_ptr(), &total, sizeof total);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("gradient_gram", TORCH_BOX(&gradient_gram)); }

}  // namespace erasediff::cpu

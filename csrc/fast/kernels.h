// Which instruction set's kernels run, and rows of any dtype as rows of float. Not for files that
// are compiled once for each instruction set: the linker would keep one copy of what is inline here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "halves.h"
#include "products.h"

namespace scalabl {

const Kernels &kernels();

inline void widen_row(const bfloat16 *in, float *out, int64_t n) {
    kernels().widen_bfloat16(&in->bits, out, n);
}
inline void widen_row(const float16 *in, float *out, int64_t n) {
    kernels().widen_float16(&in->bits, out, n);
}
inline void narrow_row(const float *in, bfloat16 *out, int64_t n) {
    kernels().narrow_bfloat16(in, &out->bits, n);
}
inline void narrow_row(const float *in, float16 *out, int64_t n) {
    kernels().narrow_float16(in, &out->bits, n);
}

template <typename T>
using Buffer = std::unique_ptr<T[]>;

// new T[n] without initial values. Throws std::bad_alloc.
template <typename T>
Buffer<T> buffer(int64_t n) {
    return Buffer<T>(new T[static_cast<size_t>(std::max<int64_t>(n, 1))]);
}

}  // namespace scalabl

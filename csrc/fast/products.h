// The kernels: the three skinny matrix products of the update and what else runs on vectors. There is
// one table of them for each instruction set.
#pragma once

#include <stdint.h>

#include "elementwise.h"

namespace scalabl {

constexpr int TILE_ROWS = 3;  // rows of a kernel's tile; a remaining row goes alone, more slowly

// Ask for memory that will be read 8 KB after this place: the processor's own prefetch ends with the
// page. Nothing is read, so the address may lie beyond the end.
static inline void ask_ahead(const void *place) {
    __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(place) + 8192));
}

// Row-major operands; a stride is the distance of two rows in elements. T is float or double.
template <typename T>
struct Products {
    // h (rows, rank) += x (rows, n) m^T,  m (rank, n); h is contiguous
    void (*dots)(const T *x, int64_t x_stride, const T *m, int64_t m_stride, int64_t rows,
                 int64_t n, int64_t rank, T *h);
    // y (rows, n) += u (rows, rank) m,  m (rank, n); u is contiguous
    void (*add)(T *y, int64_t y_stride, const T *m, int64_t m_stride, int64_t rows, int64_t n,
                int64_t rank, const T *u);
    // g (rank, n) += u^T x,  u (rows, rank) contiguous, x (rows, n)
    void (*outer)(T *g, int64_t g_stride, const T *x, int64_t x_stride, int64_t rows, int64_t n,
                  int64_t rank, const T *u);
};

struct Kernels {
    const char *name;
    Products<float> single;
    Products<double> twice;
    // single.dots, where x is read once, from memory
    void (*streamed_dots)(const float *x, int64_t x_stride, const float *m, int64_t m_stride,
                          int64_t rows, int64_t n, int64_t rank, float *h);
    // n bfloat16 or float16 values as bits to float, and back (to nearest, ties to even)
    void (*widen_bfloat16)(const uint16_t *in, float *out, int64_t n);
    void (*narrow_bfloat16)(const float *in, uint16_t *out, int64_t n);
    void (*widen_float16)(const uint16_t *in, float *out, int64_t n);
    void (*narrow_float16)(const float *in, uint16_t *out, int64_t n);
    const Elementwise *elementwise;
};

extern const Kernels BASELINE, AVX2, AVX512;  // the last two on x86-64 alone

}  // namespace scalabl

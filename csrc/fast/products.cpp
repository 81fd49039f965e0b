// The three skinny products, on vectors of SCALABL_BYTES bytes. Compiled once for each instruction
// set; SCALABL_KERNELS is the name of its table. Only in this file may a multiplication and an
// addition fuse, because nothing here makes noise.
//
// Each product walks its matrices in tiles that fit the registers. A tile keeps 12 accumulators, so
// that the latency of fused multiply-add (4 cycles, two a cycle) is hidden, and needs at most 7
// loads for 12 of them. No inline function of the standard library may be used here: the linker
// would keep one copy for all instruction sets.
#include "products.h"

#include "halves.h"

namespace scalabl {
namespace {

template <typename T, int BYTES>
struct Vector {
    typedef T type __attribute__((vector_size(BYTES)));
};

// The sum of a vector's lanes, by halves.
template <typename T, int BYTES>
T sum_lanes(typename Vector<T, BYTES>::type v) {
    if constexpr (BYTES > 16) {
        typename Vector<T, BYTES / 2>::type half[2];
        memcpy(half, &v, sizeof v);
        return sum_lanes<T, BYTES / 2>(half[0] + half[1]);
    } else {
        T lane[BYTES / sizeof(T)];
        memcpy(lane, &v, sizeof v);
        if constexpr (sizeof(T) == 8) return lane[0] + lane[1];
        else return (lane[0] + lane[2]) + (lane[1] + lane[3]);
    }
}

template <typename T>
struct Simd {
    static constexpr int LANES = SCALABL_BYTES / sizeof(T);
    typedef typename Vector<T, SCALABL_BYTES>::type type;

    static type load(const T *p) {
        type v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(T *p, type v) { memcpy(p, &v, sizeof v); }
    static T sum(type v) { return sum_lanes<T, SCALABL_BYTES>(v); }
};

// --- h += x m^T -------------------------------------------------------------------------------

// AHEAD: x is read once, from memory.
template <typename T, bool AHEAD, int ROWS, int RANKS>
void dots_tile(const T *x, int64_t x_stride, const T *m, int64_t m_stride, int64_t n, int64_t rank,
               T *h) {
    typedef Simd<T> S;
    typename S::type total[ROWS][RANKS] = {};
    int64_t j = 0;
    for (; j + S::LANES <= n; j += S::LANES) {
        typename S::type row[ROWS];
        for (int i = 0; i < ROWS; ++i) {
            const T *place = x + i * x_stride + j;
            if constexpr (AHEAD) ask_ahead(place);
            row[i] = S::load(place);
        }
        for (int k = 0; k < RANKS; ++k) {
            const typename S::type column = S::load(m + k * m_stride + j);
            for (int i = 0; i < ROWS; ++i) total[i][k] += row[i] * column;
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int k = 0; k < RANKS; ++k) {
            T sum = S::sum(total[i][k]);
            for (int64_t t = j; t < n; ++t) sum += x[i * x_stride + t] * m[k * m_stride + t];
            h[i * rank + k] += sum;
        }
    }
}

template <typename T, bool AHEAD, int ROWS>
void dots_rows(const T *x, int64_t x_stride, const T *m, int64_t m_stride, int64_t n, int64_t rank,
               T *h) {
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) {
        dots_tile<T, AHEAD, ROWS, 4>(x, x_stride, m + k * m_stride, m_stride, n, rank, h + k);
    }
    for (; k < rank; ++k) {
        dots_tile<T, AHEAD, ROWS, 1>(x, x_stride, m + k * m_stride, m_stride, n, rank, h + k);
    }
}

template <typename T, bool AHEAD>
void dots(const T *x, int64_t x_stride, const T *m, int64_t m_stride, int64_t rows, int64_t n,
          int64_t rank, T *h) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS) {
        dots_rows<T, AHEAD, TILE_ROWS>(x + i * x_stride, x_stride, m, m_stride, n, rank, h + i * rank);
    }
    for (; i < rows; ++i) {
        dots_rows<T, AHEAD, 1>(x + i * x_stride, x_stride, m, m_stride, n, rank, h + i * rank);
    }
}

// --- y += u m ---------------------------------------------------------------------------------

// The sum over the rank is complete before it is added to y, which is then rounded once.
template <typename T, int ROWS, int VECTORS>
void add_tile(T *y, int64_t y_stride, const T *m, int64_t m_stride, int64_t rank, const T *u) {
    typedef Simd<T> S;
    typename S::type total[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < rank; ++k) {
        typename S::type row[VECTORS];
        for (int c = 0; c < VECTORS; ++c) row[c] = S::load(m + k * m_stride + c * S::LANES);
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < VECTORS; ++c) total[i][c] += u[i * rank + k] * row[c];
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int c = 0; c < VECTORS; ++c) {
            T *place = y + i * y_stride + c * S::LANES;
            S::store(place, S::load(place) + total[i][c]);
        }
    }
}

template <typename T, int ROWS>
void add_rows(T *y, int64_t y_stride, const T *m, int64_t m_stride, int64_t n, int64_t rank,
              const T *u) {
    constexpr int64_t LANES = Simd<T>::LANES;
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) {
        add_tile<T, ROWS, 4>(y + j, y_stride, m + j, m_stride, rank, u);
    }
    for (; j + LANES <= n; j += LANES) {
        add_tile<T, ROWS, 1>(y + j, y_stride, m + j, m_stride, rank, u);
    }
    for (; j < n; ++j) {
        for (int i = 0; i < ROWS; ++i) {
            T total = 0;
            for (int64_t k = 0; k < rank; ++k) total += u[i * rank + k] * m[k * m_stride + j];
            y[i * y_stride + j] += total;
        }
    }
}

template <typename T>
void add(T *y, int64_t y_stride, const T *m, int64_t m_stride, int64_t rows, int64_t n,
         int64_t rank, const T *u) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS) {
        add_rows<T, TILE_ROWS>(y + i * y_stride, y_stride, m, m_stride, n, rank, u + i * rank);
    }
    for (; i < rows; ++i) {
        add_rows<T, 1>(y + i * y_stride, y_stride, m, m_stride, n, rank, u + i * rank);
    }
}

// --- g += u^T x -------------------------------------------------------------------------------

template <typename T, int RANKS, int VECTORS>
void outer_tile(T *g, int64_t g_stride, const T *x, int64_t x_stride, int64_t rows, int64_t rank,
                const T *u) {
    typedef Simd<T> S;
    typename S::type total[RANKS][VECTORS] = {};
    for (int64_t i = 0; i < rows; ++i) {
        typename S::type row[VECTORS];
        for (int c = 0; c < VECTORS; ++c) row[c] = S::load(x + i * x_stride + c * S::LANES);
        for (int k = 0; k < RANKS; ++k) {
            for (int c = 0; c < VECTORS; ++c) total[k][c] += u[i * rank + k] * row[c];
        }
    }
    for (int k = 0; k < RANKS; ++k) {
        for (int c = 0; c < VECTORS; ++c) {
            T *place = g + k * g_stride + c * S::LANES;
            S::store(place, S::load(place) + total[k][c]);
        }
    }
}

template <typename T, int RANKS>
void outer_ranks(T *g, int64_t g_stride, const T *x, int64_t x_stride, int64_t rows, int64_t n,
                 int64_t rank, const T *u) {
    constexpr int64_t LANES = Simd<T>::LANES;
    int64_t j = 0;
    for (; j + 3 * LANES <= n; j += 3 * LANES) {
        outer_tile<T, RANKS, 3>(g + j, g_stride, x + j, x_stride, rows, rank, u);
    }
    for (; j + LANES <= n; j += LANES) {
        outer_tile<T, RANKS, 1>(g + j, g_stride, x + j, x_stride, rows, rank, u);
    }
    for (; j < n; ++j) {
        for (int k = 0; k < RANKS; ++k) {
            T total = 0;
            for (int64_t i = 0; i < rows; ++i) total += u[i * rank + k] * x[i * x_stride + j];
            g[k * g_stride + j] += total;
        }
    }
}

template <typename T>
void outer(T *g, int64_t g_stride, const T *x, int64_t x_stride, int64_t rows, int64_t n,
           int64_t rank, const T *u) {
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) {
        outer_ranks<T, 4>(g + k * g_stride, g_stride, x, x_stride, rows, n, rank, u + k);
    }
    for (; k < rank; ++k) {
        outer_ranks<T, 1>(g + k * g_stride, g_stride, x, x_stride, rows, n, rank, u + k);
    }
}

// --- Half precision ---------------------------------------------------------------------------

template <typename Half>
void widen_all(const uint16_t *in, float *out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(Half{in[i]});
}

template <typename Half>
void narrow_all(const float *in, uint16_t *out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        Half half;
        narrow(in[i], half);
        out[i] = half.bits;
    }
}

}  // namespace

const Kernels SCALABL_KERNELS = {
    SCALABL_NAME,
    {dots<float, false>, add<float>, outer<float>},
    {dots<double, false>, add<double>, outer<double>},
    dots<float, true>,
    widen_all<bfloat16>,
    narrow_all<bfloat16>,
    widen_all<float16>,
    narrow_all<float16>,
    &SCALABL_ELEMENTWISE,
};

}  // namespace scalabl

// The update and its gradients on the CPU: blocks that fit into caches, and threads. Formulas are in
// subspace_lora.h, products in products.cpp, the interface in api.cpp.
#include "cpu.h"

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "subspace_lora.h"

namespace scalabl {
namespace {

// A thread works on one block of rows at a time, small enough to stay in its L2 cache. Products
// walk it by columns, so that m (rank 8, 768 columns, 24 kB) stays in the L1 cache.
constexpr int64_t BLOCK = 1 << 16;  // about so many elements of x or y in a block
constexpr int64_t FEWEST_ROWS = 8 * TILE_ROWS, MOST_ROWS = 32 * TILE_ROWS;
constexpr int64_t COLUMNS = 768;
constexpr int64_t SCRATCH = FEWEST_ROWS * COLUMNS;    // half-precision values widened at a time
constexpr int64_t HIDDEN = FEWEST_ROWS * MAX_RANK;    // values of h, at most

// Rounded down, so that no remaining row goes alone.
int64_t whole_tiles(int64_t rows) { return rows / TILE_ROWS * TILE_ROWS; }

int64_t block_rows(const scalabl_update &op) {
    const int64_t widest = std::max<int64_t>(1, std::max(op.d_in, op.d_out));
    const int64_t rows = std::clamp(BLOCK / widest, FEWEST_ROWS, MOST_ROWS);
    return whole_tiles(std::min(rows, HIDDEN / op.rank));
}

// With fewer multiplications than this another thread costs more than it saves.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

template <typename T>
const Products<T> &products();
template <>
const Products<float> &products<float>() {
    return kernels().single;
}
template <>
const Products<double> &products<double>() {
    return kernels().twice;
}

// --- Rows of any dtype as rows of float or double ---------------------------------------------

// Where row `i` begins; null if the matrix is null: it has no elements, or is not wanted.
template <typename S>
S *row_of(S *matrix, int64_t i, int64_t stride) {
    return matrix ? matrix + i * stride : nullptr;
}

// A block of a matrix as T: the matrix itself where it is of T, else a widened copy in `scratch`,
// which `write` copies back.
template <typename S, typename T>
struct BlockView {
    T *data;
    int64_t stride;

    BlockView(S *from, int64_t from_stride, int64_t rows, int64_t n, T *scratch)
        : data(scratch), stride(n) {
        for (int64_t i = 0; i < rows; ++i) widen_row(from + i * from_stride, scratch + i * n, n);
    }
    void write(S *to, int64_t to_stride, int64_t rows, int64_t n) const {
        for (int64_t i = 0; i < rows; ++i) narrow_row(data + i * stride, to + i * to_stride, n);
    }
};

template <typename T>
struct BlockView<T, T> {
    T *data;
    int64_t stride;

    BlockView(T *from, int64_t from_stride, int64_t, int64_t, T *)
        : data(from), stride(from_stride) {}
    void write(T *, int64_t, int64_t, int64_t) const {}
};

// For reading only: the kernels take const T *, which undoes the cast at once.
template <typename S, typename T>
BlockView<S, T> read_block(const S *from, int64_t stride, int64_t rows, int64_t n, T *scratch) {
    return BlockView<S, T>(const_cast<S *>(from), stride, rows, n, scratch);
}

// Calls fn(first column, number of columns) for stretches of about equal size. If S is not T, a
// stretch of all the rows fits into the scratch.
template <typename S, typename T, typename Fn>
void over_columns(int64_t rows, int64_t n, const Fn &fn) {
    const int64_t most = std::is_same_v<S, T> ? COLUMNS : SCRATCH / rows / 32 * 32;
    const int64_t blocks = (n + most - 1) / most;
    const int64_t size = blocks ? ((n + blocks - 1) / blocks + 31) / 32 * 32 : 0;
    for (int64_t j = 0; j < n; j += size) fn(j, std::min(size, n - j));
}

// --- Small operands, read once a call ---------------------------------------------------------

template <typename P, typename T>
T value_of(const void *from, int64_t i) {
    return static_cast<T>(widen(static_cast<const P *>(from)[i]));
}

// A (rank, d_in) as T: itself if it is of T, else a copy.
template <typename P, typename T>
struct Rows {
    Buffer<T> copy;
    const T *data;
    int64_t stride;

    Rows(const void *from, int64_t from_stride, int64_t rows, int64_t n) {
        const P *p = static_cast<const P *>(from);
        if constexpr (std::is_same_v<P, T>) {
            data = p;
            stride = from_stride;
        } else {
            copy = buffer<T>(rows * n);
            for (int64_t k = 0; k < rows; ++k) {
                for (int64_t j = 0; j < n; ++j) copy[k * n + j] = widen(p[k * from_stride + j]);
            }
            data = copy.get();
            stride = n;
        }
    }
};

// B (d_out, rank) as its transpose, (rank, d_out) of T: then all products run along rows.
template <typename P, typename T>
Buffer<T> transposed(const scalabl_update &op) {
    const P *B = static_cast<const P *>(op.B);
    Buffer<T> out = buffer<T>(op.rank * op.d_out);
    for (int64_t i = 0; i < op.d_out; ++i) {
        for (int64_t k = 0; k < op.rank; ++k) out[k * op.d_out + i] = widen(B[i * op.B_stride + k]);
    }
    return out;
}

// scaling * (s + sigma eps) and eps of every group.
template <typename P, typename T>
struct Scales {
    int64_t rank, rows_per_group;
    Buffer<T> factors;   // (groups, rank)
    Buffer<float> noise;  // (groups, rank); null for the mean model

    explicit Scales(const scalabl_update &op)
        : rank(op.rank),
          rows_per_group(op.noisy ? op.rows_per_group : std::max<int64_t>(op.rows, 1)) {
        const int64_t groups = count_groups(op.rows, rows_per_group);
        factors = buffer<T>(groups * rank);
        if (op.noisy) noise = buffer<float>(groups * rank);
        const T scaling = static_cast<T>(op.scaling);
        for (int64_t g = 0; g < groups; ++g) {
            if (op.noisy && g > 0 && coordinates(op, g) == coordinates(op, g - 1)) {
                std::copy_n(&noise[(g - 1) * rank], rank, &noise[g * rank]);
                std::copy_n(&factors[(g - 1) * rank], rank, &factors[g * rank]);
                continue;
            }
            if (op.noisy) normal_row(coordinates(op, g), rank, &noise[g * rank]);
            for (int64_t k = 0; k < rank; ++k) {
                const T eps = op.noisy ? static_cast<T>(noise[g * rank + k]) : T(0);
                const T s = value_of<P, T>(op.s, k), sigma = value_of<P, T>(op.sigma, k);
                factors[g * rank + k] = factor(scaling, s, sigma, eps);
            }
        }
    }
    const T *of_row(int64_t row) const { return &factors[row / rows_per_group * rank]; }
    T eps(int64_t row, int64_t k) const {
        return noise ? static_cast<T>(noise[row / rows_per_group * rank + k]) : T(0);
    }
};

int threads_for(const scalabl_update &op) {
    const int64_t work = op.rows * (op.d_in + op.d_out) * op.rank;
    return static_cast<int>(std::min<int64_t>(op.threads, 1 + work / WORTH_A_THREAD));
}

// h (rows, rank) = x m^T for the rows of one block, x of any dtype.
template <typename S, typename T>
void block_dots(const S *x, int64_t x_stride, const T *m, int64_t m_stride, int64_t rows, int64_t n,
                int64_t rank, T *scratch, T *h) {
    std::fill(h, h + rows * rank, T(0));
    over_columns<S, T>(rows, n, [&](int64_t j, int64_t columns) {
        const auto block = read_block<S, T>(x + j, x_stride, rows, columns, scratch);
        products<T>().dots(block.data, block.stride, m + j, m_stride, rows, columns, rank, h);
    });
}

// y (rows, n) += u m for the rows of one block, y of any dtype.
template <typename S, typename T>
void block_add(S *y, int64_t y_stride, const T *m, int64_t m_stride, int64_t rows, int64_t n,
               int64_t rank, T *scratch, const T *u) {
    over_columns<S, T>(rows, n, [&](int64_t j, int64_t columns) {
        const BlockView<S, T> block(y + j, y_stride, rows, columns, scratch);
        products<T>().add(block.data, block.stride, m + j, m_stride, rows, columns, rank, u);
        block.write(y + j, y_stride, rows, columns);
    });
}

// --- Forward ----------------------------------------------------------------------------------

// Types: S of x and y, P of the adapter, T of the computation.
template <typename S, typename P>
void forward_pass(const scalabl_update &op, void *y_out, int64_t y_stride, void *h_out) {
    typedef typename Wide<S>::type T;
    const int64_t rank = op.rank;
    const Rows<P, T> A(op.A, op.A_stride, rank, op.d_in);
    const Buffer<T> B = transposed<P, T>(op);
    const Scales<P, T> scales(op);
    const S *x = static_cast<const S *>(op.x);
    S *y = static_cast<S *>(y_out);
    T *h_all = static_cast<T *>(h_out);

    const int64_t most = block_rows(op), blocks = (op.rows + most - 1) / most;
    parallel(blocks, threads_for(op), [&](int64_t block) {
        T scratch[std::is_same_v<S, T> ? 1 : SCRATCH];
        T h[HIDDEN];
        const int64_t first = block * most, rows = std::min(most, op.rows - first);
        block_dots(row_of(x, first, op.x_stride), op.x_stride, A.data, A.stride, rows, op.d_in,
                   rank, scratch, h);
        if (h_all) std::copy(h, h + rows * rank, h_all + first * rank);
        T *const u = h;  // u takes h's place, which is in the L1 cache
        for (int64_t i = 0; i < rows; ++i) {
            const T *factors = scales.of_row(first + i);
            for (int64_t k = 0; k < rank; ++k) u[i * rank + k] = factors[k] * h[i * rank + k];
        }
        block_add(row_of(y, first, y_stride), y_stride, B.get(), op.d_out, rows, op.d_out, rank,
                  scratch, u);
    });
}

// --- Backward ---------------------------------------------------------------------------------

// Rows are divided into segments. Each segment has its own sums over its rows, which are added in
// the order of the segments. Their number depends on the sizes alone, so that the result does not
// depend on the threads; all their sums together are no larger than x and grad_y.
constexpr int64_t SEGMENT = 128, MOST_SEGMENTS = 32;

int64_t segments_of(const scalabl_update &op) {
    const int64_t rows = std::max(SEGMENT, op.rank);
    return std::clamp<int64_t>(op.rows / rows, 1, MOST_SEGMENTS);
}

// g (rank, n) += u^T x for the rows of one block, x of any dtype.
template <typename S, typename T>
void block_outer(T *g, const S *x, int64_t x_stride, int64_t rows, int64_t n, int64_t rank,
                 T *scratch, const T *u) {
    over_columns<S, T>(rows, n, [&](int64_t j, int64_t columns) {
        const auto block = read_block<S, T>(x + j, x_stride, rows, columns, scratch);
        products<T>().outer(g + j, n, block.data, block.stride, rows, columns, rank, u);
    });
}

// Sums over the rows of one segment; A and B null where not wanted.
template <typename T>
struct SegmentSums {
    T *A, *B;           // (rank, d_in), (rank, d_out)
    double *s, *sigma;  // (rank,) each

    void clear(const scalabl_update &op) const {
        if (A) std::fill(A, A + op.rank * op.d_in, T(0));
        if (B) std::fill(B, B + op.rank * op.d_out, T(0));
        std::fill(s, s + op.rank, 0.0);
        std::fill(sigma, sigma + op.rank, 0.0);
    }
};

// The sums of all segments.
template <typename T>
struct Sums {
    Buffer<T> A, B;      // (segments, rank, d_in), (segments, rank, d_out)
    Buffer<double> own;  // (segments, 2, rank): of s and of sigma

    Sums(const scalabl_update &op, const Gradients &out, int64_t segments) {
        if (out.A) A = buffer<T>(segments * op.rank * op.d_in);
        if (out.B) B = buffer<T>(segments * op.rank * op.d_out);
        own = buffer<double>(segments * 2 * op.rank);
    }
    SegmentSums<T> of(const scalabl_update &op, int64_t segment) const {
        SegmentSums<T> one;
        one.A = A ? &A[segment * op.rank * op.d_in] : nullptr;
        one.B = B ? &B[segment * op.rank * op.d_out] : nullptr;
        one.s = &own[segment * 2 * op.rank];
        one.sigma = one.s + op.rank;
        return one;
    }
};

// The inputs and outputs of all segments.
template <typename S, typename P>
struct Backward {
    typedef typename Wide<S>::type T;
    const scalabl_update &op;
    const Gradients &out;
    const S *grad_y;
    int64_t grad_y_stride;
    const T *h;  // null: computed again
    const Rows<P, T> A;
    const Buffer<T> B;  // transposed
    const Scales<P, T> scales;

    Backward(const scalabl_update &op_, const void *grad_y_, int64_t stride, const void *h_,
             const Gradients &out_)
        : op(op_),
          out(out_),
          grad_y(static_cast<const S *>(grad_y_)),
          grad_y_stride(stride),
          h(static_cast<const T *>(h_)),
          A(op.A, op.A_stride, op.rank, op.d_in),
          B(transposed<P, T>(op)),
          scales(op) {}

    void segment(int64_t first, int64_t last, const SegmentSums<T> &sums) const;

    // h of the rows [first, first + rows), or zeros if no gradient needs it.
    void hidden(int64_t first, int64_t rows, T *scratch, T *to) const {
        const S *x = row_of(static_cast<const S *>(op.x), first, op.x_stride);
        if (h) {
            std::copy(h + first * op.rank, h + (first + rows) * op.rank, to);
        } else if (out.B || out.s || out.sigma) {
            block_dots(x, op.x_stride, A.data, A.stride, rows, op.d_in, op.rank, scratch, to);
        } else {
            std::fill(to, to + rows * op.rank, T(0));
        }
    }
};

// One segment: rows [first, last) of everything.
template <typename S, typename P>
void Backward<S, P>::segment(int64_t first, int64_t last, const SegmentSums<T> &sums) const {
    const int64_t rank = op.rank;
    const T scaling = static_cast<T>(op.scaling);
    T scratch[std::is_same_v<S, T> ? 1 : SCRATCH];
    T h_block[HIDDEN], d[HIDDEN];
    T *const u = h_block, *const dh = d;  // u overwrites h, and dh overwrites d
    sums.clear(op);

    // Blocks of about equal size.
    const int64_t most = block_rows(op), all = last - first;
    const int64_t blocks = std::max<int64_t>(1, (all + most - 1) / most);
    const int64_t even = whole_tiles((all + blocks - 1) / blocks + TILE_ROWS - 1);
    for (int64_t start = first; start < last; start += even) {
        const int64_t rows = std::min(even, last - start);
        const S *x_rows = row_of(static_cast<const S *>(op.x), start, op.x_stride);
        const S *g_rows = row_of(grad_y, start, grad_y_stride);
        block_dots(g_rows, grad_y_stride, B.get(), op.d_out, rows, op.d_out, rank, scratch, d);
        hidden(start, rows, scratch, h_block);
        for (int64_t i = 0; i < rows; ++i) {
            const T *factors = scales.of_row(start + i);
            for (int64_t k = 0; k < rank; ++k) {
                const int64_t at = i * rank + k;
                T to_h, ds;
                scalabl::backward(factors[k], scaling, h_block[at], d[at], to_h, ds);
                sums.s[k] += ds;
                sums.sigma[k] += static_cast<double>(ds) * scales.eps(start + i, k);
                u[at] = factors[k] * h_block[at];
                dh[at] = to_h;
            }
        }
        if (sums.B) block_outer(sums.B, g_rows, grad_y_stride, rows, op.d_out, rank, scratch, u);
        if (sums.A) block_outer(sums.A, x_rows, op.x_stride, rows, op.d_in, rank, scratch, dh);
        if (out.x) {
            S *x_out = static_cast<S *>(out.x) + start * out.x_stride;
            block_add(x_out, out.x_stride, A.data, A.stride, rows, op.d_in, rank, scratch, dh);
        }
    }
}

// out[at(i)] = the sum over segments of part (segments, size), in their order; i in [0, size).
template <typename P, typename T, typename At>
void add_up(const T *part, int64_t segments, int64_t size, int threads, void *out, const At &at) {
    constexpr int64_t PANEL = 4096;
    if (!out) return;
    parallel((size + PANEL - 1) / PANEL, threads, [&](int64_t panel) {
        const int64_t first = panel * PANEL, last = std::min(first + PANEL, size);
        T total[PANEL];
        std::copy(part + first, part + last, total);
        for (int64_t segment = 1; segment < segments; ++segment) {
            const T *more = part + segment * size + first;
            for (int64_t i = 0; i < last - first; ++i) total[i] += more[i];
        }
        for (int64_t i = first; i < last; ++i) {
            narrow(static_cast<typename Wide<P>::type>(total[i - first]),
                   static_cast<P *>(out)[at(i)]);
        }
    });
}

template <typename S, typename P>
void backward_pass(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride,
                   const void *h, const Gradients &out) {
    typedef typename Wide<S>::type T;
    const int64_t rank = op.rank, segments = segments_of(op);
    const Backward<S, P> pass(op, grad_y, grad_y_stride, h, out);
    const Sums<T> sums(op, out, segments);
    const int threads = threads_for(op);

    parallel(segments, threads, [&](int64_t segment) {
        pass.segment(op.rows * segment / segments, op.rows * (segment + 1) / segments,
                     sums.of(op, segment));
    });
    const auto same = [](int64_t i) { return i; };
    const auto turned = [&](int64_t i) { return i % op.d_out * rank + i / op.d_out; };
    add_up<P>(sums.A.get(), segments, rank * op.d_in, threads, out.A, same);
    add_up<P>(sums.B.get(), segments, rank * op.d_out, threads, out.B, turned);
    const Buffer<double> both = buffer<double>(2 * rank);
    add_up<double>(sums.own.get(), segments, 2 * rank, 1, both.get(), same);
    for (int64_t k = 0; k < rank; ++k) {
        typedef typename Wide<P>::type W;
        if (out.s) narrow(static_cast<W>(both[k]), static_cast<P *>(out.s)[k]);
        if (out.sigma) narrow(static_cast<W>(both[rank + k]), static_cast<P *>(out.sigma)[k]);
    }
}

}  // namespace

// --- Functions of cpu.h -------------------------------------------------------------------------

namespace cpu {

void forward(const scalabl_update &op, void *y, int64_t y_stride, void *h) {
    by_dtypes(op, [&](auto row, auto adapter) {
        forward_pass<decltype(row), decltype(adapter)>(op, y, y_stride, h);
    });
}

void backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride, const void *h,
              const Gradients &out) {
    by_dtypes(op, [&](auto row, auto adapter) {
        backward_pass<decltype(row), decltype(adapter)>(op, grad_y, grad_y_stride, h, out);
    });
}

}  // namespace cpu
}  // namespace scalabl

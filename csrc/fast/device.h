// The update and its gradients as kernels for a GPU, written once: cuda.cu launches them, and
// tests/test_device.cpp walks the same bodies thread by thread on the host.
//
// A kernel is a struct: steps() says how many steps its threads take, with a barrier after each,
// and step(number, place, shared) is the work of one thread in one of them. The plan at the end
// says which kernels run, in which order, on which grid; its Launcher is CUDA's or the host's.
// Every sum is of a number of parts that depends on the sizes alone, added in a fixed order: no
// atomics, the same result on every run, and nothing that CUDA graphs cannot capture.
#pragma once

#include "subspace_lora.h"

namespace scalabl {
namespace device {

constexpr int THREADS = 256, LANES = 32, WARPS = THREADS / LANES;
constexpr int TILE = 16;                          // rows of x or y that a block takes
constexpr int RANKS = 8;                          // ranks that a thread sums at a time
constexpr int64_t SPLIT = 512, MOST_SPLITS = 32;  // columns of one part of a dot product
constexpr int64_t SEGMENT = 128, MOST_SEGMENTS = 64;  // rows of one part of a sum over rows

SCALABL_BOTH int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
SCALABL_BOTH int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a thread stands: its number in its block, and the block's place in the grid.
struct Place {
    int thread;
    int64_t x, y;

    SCALABL_MEMBER int64_t flat() const { return x * THREADS + thread; }
};

struct Nothing {};

// A matrix that is only read: element (i, j) is data[i * row + j * column].
template <typename S>
struct View {
    const S *data;
    int64_t row, column;

    template <typename T>
    SCALABL_MEMBER T at(int64_t i, int64_t j) const {
        return static_cast<T>(widen(data[i * row + j * column]));
    }
};

// --- h = x m^T, in parts ----------------------------------------------------------------------

// part (splits, rows, rank): x (rows, n) times m (rank, n), each over its share of the columns.
// Grid: tiles of rows by splits. A warp takes two rows, and its lanes divide the columns.
template <typename S, typename P, typename T>
struct Dots {
    View<S> x;
    View<P> m;
    int64_t rows, n, rank, splits;
    T *part;

    struct Shared {
        T sum[TILE][RANKS][LANES + 1];  // one column more: no two lanes share a bank
    };

    // RANKS ranks at a time: the lanes' sums, then their sum.
    SCALABL_MEMBER int64_t steps() const { return 2 * ceil_divide(rank, RANKS); }
    SCALABL_MEMBER void step(int64_t number, const Place &place, Shared &shared) const {
        if (number % 2 == 0) sum_lanes(place, number / 2 * RANKS, shared);
        else add_lanes(place, number / 2 * RANKS, shared);
    }
    SCALABL_MEMBER void sum_lanes(const Place &place, int64_t first_rank, Shared &shared) const {
        const int lane = place.thread % LANES;
        const int64_t width = ceil_divide(n, splits), first = place.y * width;
        const int64_t last = at_most(n, first + width), ranks = at_most(RANKS, rank - first_rank);
        for (int i = place.thread / LANES; i < TILE; i += WARPS) {
            const int64_t row = place.x * TILE + i;
            T sum[RANKS] = {};
            for (int64_t j = first + lane; row < rows && j < last; j += LANES) {
                const T value = x.template at<T>(row, j);
                for (int k = 0; k < RANKS; ++k) {
                    if (k < ranks) sum[k] += value * m.template at<T>(first_rank + k, j);
                }
            }
            for (int k = 0; k < RANKS; ++k) shared.sum[i][k][lane] = sum[k];
        }
    }
    SCALABL_MEMBER void add_lanes(const Place &place, int64_t first_rank, Shared &shared) const {
        for (int pair = place.thread; pair < TILE * RANKS; pair += THREADS) {
            const int i = pair / RANKS, k = pair % RANKS;
            const int64_t row = place.x * TILE + i, component = first_rank + k;
            if (row >= rows || component >= rank) continue;
            T total = 0;
            for (int lane = 0; lane < LANES; ++lane) total += shared.sum[i][k][lane];
            part[(place.y * rows + row) * rank + component] = total;
        }
    }
};

// --- Between the products ---------------------------------------------------------------------

// Sums of the parts; noise; the formulas of subspace_lora.h. A thread takes four components of a
// row, because a Philox block gives four.
template <typename P, typename T>
struct Mix {
    scalabl_update op;
    // (splits, rows, rank); null where h is given, or no d wanted
    const T *h_parts = nullptr, *d_parts = nullptr;
    int64_t h_splits = 0, d_splits = 0;
    const T *h_given = nullptr;  // null: summed from h_parts
    // (rows, rank) each; null if not wanted
    T *h = nullptr, *u = nullptr, *dh = nullptr, *ds = nullptr, *dsigma = nullptr;

    explicit Mix(const scalabl_update &op_) : op(op_) {}

    typedef Nothing Shared;
    SCALABL_MEMBER int64_t steps() const { return 1; }
    SCALABL_MEMBER void step(int64_t, const Place &place, Shared &) const {
        const int64_t blocks = ceil_divide(op.rank, 4);
        const int64_t row = place.flat() / blocks, block = place.flat() % blocks;
        if (row >= op.rows) return;
        float eps[4] = {};
        if (op.noisy) {
            const Coordinates at = coordinates(op, row / op.rows_per_group);
            normal4(at, static_cast<uint32_t>(block), eps);
        }
        for (int i = 0; i < 4 && 4 * block + i < op.rank; ++i) {
            one(row, 4 * block + i, static_cast<T>(eps[i]));
        }
    }
    SCALABL_MEMBER void one(int64_t row, int64_t k, T eps) const {
        const int64_t at = row * op.rank + k;
        const T scaling = static_cast<T>(op.scaling);
        const T s = static_cast<T>(widen(static_cast<const P *>(op.s)[k]));
        const T sigma = static_cast<T>(widen(static_cast<const P *>(op.sigma)[k]));
        const T f = factor(scaling, s, sigma, eps);
        const T hidden = h_given ? h_given[at] : h_parts ? sum(h_parts, h_splits, at) : T(0);
        if (h) h[at] = hidden;
        if (u) u[at] = f * hidden;
        if (!d_parts) return;
        T to_h, to_s;
        backward(f, scaling, hidden, sum(d_parts, d_splits, at), to_h, to_s);
        dh[at] = to_h;
        if (ds) ds[at] = to_s;
        if (dsigma) dsigma[at] = to_s * eps;
    }
    SCALABL_MEMBER T sum(const T *parts, int64_t splits, int64_t at) const {
        T total = 0;
        for (int64_t split = 0; split < splits; ++split) {
            total += parts[split * op.rows * op.rank + at];
        }
        return total;
    }
};

// --- y += u m ---------------------------------------------------------------------------------

// y (rows, n) += u (rows, rank) times m (rank, n). Grid: tiles of rows by tiles of columns. A
// thread takes one column; the sum over the rank is complete before it is added to y.
template <typename S, typename P, typename T>
struct Add {
    S *y;
    int64_t y_stride;
    View<P> m;
    const T *u;
    int64_t rows, n, rank;

    typedef Nothing Shared;
    SCALABL_MEMBER int64_t steps() const { return 1; }
    SCALABL_MEMBER void step(int64_t, const Place &place, Shared &) const {
        const int64_t j = place.y * THREADS + place.thread, first = place.x * TILE;
        if (j >= n) return;
        T total[TILE] = {};
        for (int64_t k = 0; k < rank; ++k) {
            const T value = m.template at<T>(k, j);
            for (int i = 0; i < TILE; ++i) {
                if (first + i < rows) total[i] += u[(first + i) * rank + k] * value;
            }
        }
        for (int i = 0; i < TILE; ++i) {
            if (first + i >= rows) break;
            S &out = y[(first + i) * y_stride + j];
            narrow(static_cast<T>(widen(out)) + total[i], out);
        }
    }
};

// --- Sums over rows, in parts -----------------------------------------------------------------

// part (segments, rank, n): u^T x, each over its share of the rows; u (rows, rank), x (rows, n).
// Grid: tiles of columns by segments. A thread takes one column.
template <typename S, typename T>
struct Outer {
    View<S> x;
    const T *u;
    int64_t rows, n, rank, segments;
    T *part;

    typedef Nothing Shared;
    SCALABL_MEMBER int64_t steps() const { return 1; }
    SCALABL_MEMBER void step(int64_t, const Place &place, Shared &) const {
        const int64_t j = place.flat();
        const int64_t first = rows * place.y / segments, last = rows * (place.y + 1) / segments;
        if (j >= n) return;
        for (int64_t first_rank = 0; first_rank < rank; first_rank += RANKS) {
            const int64_t ranks = at_most(RANKS, rank - first_rank);
            T total[RANKS] = {};
            for (int64_t i = first; i < last; ++i) {
                const T value = x.template at<T>(i, j);
                for (int k = 0; k < RANKS; ++k) {
                    if (k < ranks) total[k] += u[i * rank + first_rank + k] * value;
                }
            }
            for (int k = 0; k < RANKS; ++k) {
                if (k < ranks) part[(place.y * rank + first_rank + k) * n + j] = total[k];
            }
        }
    }
};

// out: the sum of the parts (segments, rank, n), as (rank, n), or if turned as (n, rank).
template <typename P, typename T>
struct AddUp {
    const T *part;
    int64_t segments, rank, n;
    bool turned;
    P *out;

    typedef Nothing Shared;
    SCALABL_MEMBER int64_t steps() const { return 1; }
    SCALABL_MEMBER void step(int64_t, const Place &place, Shared &) const {
        const int64_t at = place.flat();
        if (at >= rank * n) return;
        T total = 0;
        for (int64_t segment = 0; segment < segments; ++segment) {
            total += part[segment * rank * n + at];
        }
        P &to = out[turned ? at % n * rank + at / n : at];
        narrow(static_cast<typename Wide<P>::type>(total), to);
    }
};

// out (rank,): the sum of terms (rows, rank) over the rows, in double. One block for each
// component: its threads divide the rows.
template <typename P, typename T>
struct RowSum {
    const T *terms;
    int64_t rows, rank;
    P *out;

    struct Shared {
        double sum[THREADS];
    };
    SCALABL_MEMBER int64_t steps() const { return 2; }
    SCALABL_MEMBER void step(int64_t number, const Place &place, Shared &shared) const {
        if (number == 0) {
            double sum = 0;
            for (int64_t i = place.thread; i < rows; i += THREADS) sum += terms[i * rank + place.x];
            shared.sum[place.thread] = sum;
        } else if (place.thread == 0) {
            double total = 0;
            for (int i = 0; i < THREADS; ++i) total += shared.sum[i];
            narrow(static_cast<typename Wide<P>::type>(total), out[place.x]);
        }
    }
};

// --- The plan ---------------------------------------------------------------------------------

inline int64_t parts(int64_t size, int64_t each, int64_t most) {
    const int64_t count = ceil_divide(size, each);
    return count < 1 ? 1 : count > most ? most : count;
}
inline int64_t splits_of(int64_t n) { return parts(n, SPLIT, MOST_SPLITS); }
inline int64_t segments_of(int64_t rows) { return parts(rows, SEGMENT, MOST_SEGMENTS); }

// Gives out pieces of the scratch space; with base null it only counts their bytes.
struct Scratch {
    char *base;
    int64_t used;

    template <typename T>
    T *take(int64_t count) {
        T *piece = base ? reinterpret_cast<T *>(base + used) : nullptr;
        used += ceil_divide(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
        return piece;
    }
};

// The kernels of one (S rows, P adapter) pair, launched one after the other on Launcher's stream.
// launcher(kernel, x, y) runs `kernel` on a grid of x by y blocks of THREADS threads; with
// scratch.base null nothing is launched, and scratch.used is the size needed.
template <typename S, typename P, typename Launcher>
struct Plan {
    typedef typename Wide<S>::type T;
    const scalabl_update &op;
    Scratch &scratch;
    const Launcher &launcher;

    View<S> x() const { return {static_cast<const S *>(op.x), op.x_stride, 1}; }
    View<P> A() const { return {static_cast<const P *>(op.A), op.A_stride, 1}; }
    View<P> Bt() const { return {static_cast<const P *>(op.B), 1, op.B_stride}; }
    int64_t tiles() const { return ceil_divide(op.rows, TILE); }

    template <typename Kernel>
    void run(const Kernel &kernel, int64_t grid_x, int64_t grid_y = 1) const {
        if (scratch.base && grid_x > 0 && grid_y > 0) launcher(kernel, grid_x, grid_y);
    }

    // Parts of v m^T, v (rows, n).
    T *dots(const View<S> &v, const View<P> &m, int64_t n) const {
        const int64_t splits = splits_of(n);
        T *part = scratch.template take<T>(splits * op.rows * op.rank);
        run(Dots<S, P, T>{v, m, op.rows, n, op.rank, splits, part}, tiles(), splits);
        return part;
    }
    void mix(const Mix<P, T> &kernel) const {
        run(kernel, ceil_divide(op.rows * ceil_divide(op.rank, 4), THREADS));
    }
    void add(S *y, int64_t y_stride, const View<P> &m, int64_t n, const T *u) const {
        run(Add<S, P, T>{y, y_stride, m, u, op.rows, n, op.rank}, tiles(), ceil_divide(n, THREADS));
    }
    void outer(const View<S> &v, const T *u, int64_t n, bool turned, void *out) const {
        const int64_t segments = segments_of(op.rows);
        T *part = scratch.template take<T>(segments * op.rank * n);
        run(Outer<S, T>{v, u, op.rows, n, op.rank, segments, part}, ceil_divide(n, THREADS),
            segments);
        run(AddUp<P, T>{part, segments, op.rank, n, turned, static_cast<P *>(out)},
            ceil_divide(op.rank * n, THREADS));
    }
    void row_sum(const T *terms, void *out) const {
        if (out) run(RowSum<P, T>{terms, op.rows, op.rank, static_cast<P *>(out)}, op.rank);
    }

    void forward(void *y, int64_t y_stride, void *h) const {
        const int64_t size = op.rows * op.rank;
        Mix<P, T> kernel(op);
        kernel.h_parts = dots(x(), A(), op.d_in);
        kernel.h_splits = splits_of(op.d_in);
        kernel.h = static_cast<T *>(h);
        kernel.u = scratch.template take<T>(size);
        mix(kernel);
        add(static_cast<S *>(y), y_stride, Bt(), op.d_out, kernel.u);
    }

    void backward(const void *grad_y, int64_t grad_y_stride, const void *h,
                  const Gradients &out) const {
        const int64_t size = op.rows * op.rank;
        const View<S> g = {static_cast<const S *>(grad_y), grad_y_stride, 1};
        const bool needs_h = out.B || out.s || out.sigma;
        Mix<P, T> kernel(op);
        kernel.h_given = static_cast<const T *>(h);
        if (!h && needs_h) kernel.h_parts = dots(x(), A(), op.d_in);
        kernel.h_splits = splits_of(op.d_in);
        kernel.d_parts = dots(g, Bt(), op.d_out);
        kernel.d_splits = splits_of(op.d_out);
        if (out.B) kernel.u = scratch.template take<T>(size);
        kernel.dh = scratch.template take<T>(size);
        if (out.s) kernel.ds = scratch.template take<T>(size);
        if (out.sigma) kernel.dsigma = scratch.template take<T>(size);
        mix(kernel);
        if (out.x) add(static_cast<S *>(out.x), out.x_stride, A(), op.d_in, kernel.dh);
        if (out.A) outer(x(), kernel.dh, op.d_in, false, out.A);
        if (out.B) outer(g, kernel.u, op.d_out, true, out.B);
        row_sum(kernel.ds, out.s);
        row_sum(kernel.dsigma, out.sigma);
    }
};

// Both return the bytes of scratch space that are needed; with `base` null they do nothing else.
template <typename Launcher>
int64_t forward(const scalabl_update &op, void *y, int64_t y_stride, void *h, void *base,
                const Launcher &launcher) {
    Scratch scratch = {static_cast<char *>(base), 0};
    by_dtypes(op, [&](auto row, auto adapter) {
        const Plan<decltype(row), decltype(adapter), Launcher> plan = {op, scratch, launcher};
        plan.forward(y, y_stride, h);
    });
    return scratch.used;
}

template <typename Launcher>
int64_t backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride, const void *h,
                 const Gradients &out, void *base, const Launcher &launcher) {
    Scratch scratch = {static_cast<char *>(base), 0};
    by_dtypes(op, [&](auto row, auto adapter) {
        const Plan<decltype(row), decltype(adapter), Launcher> plan = {op, scratch, launcher};
        plan.backward(grad_y, grad_y_stride, h, out);
    });
    return scratch.used;
}

}  // namespace device
}  // namespace scalabl

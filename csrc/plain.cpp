// The method in loops: equations (1a) to (1e) of docs/method.md, a loop nest for each. Numbers are
// read as doubles, sums are of doubles, a result is rounded where it is stored. Everything fast is
// compared with this file. i counts rows, j columns of x, o columns of y, k components.
#include "plain.h"

#include <vector>

namespace scalabl::plain {

typedef std::vector<double> Row;
typedef std::vector<Row> Matrix;

template <typename Fn>  // fn(i, j) for all i < rows and j < columns
static void each(int64_t rows, int64_t columns, const Fn &fn) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) fn(i, j);
    }
}

// From memory of any dtype, and back. Null is read as zeros, and nothing is written to it.
static Matrix read(const void *from, int dtype, int64_t rows, int64_t columns, int64_t stride) {
    Matrix m(rows, Row(columns));
    by_dtype(dtype, [&](auto element) {
        const auto *at = static_cast<const decltype(element) *>(from);
        if (at) each(rows, columns, [&](auto i, auto j) { m[i][j] = widen(at[i * stride + j]); });
    });
    return m;
}
static void write(const Matrix &m, void *to, int dtype, int64_t stride) {
    by_dtype(dtype, [&](auto element) {
        auto *at = static_cast<decltype(element) *>(to);
        if (at) each(m.size(), m.empty() ? 0 : m[0].size(), [&](auto i, auto j) {
            narrow(typename Wide<decltype(element)>::type(m[i][j]), at[i * stride + j]);
        });
    });
}

// The operands, and for every row eps, f = c (s + sigma eps) and h = A x.
struct Operands {
    Matrix x, A, B, s, sigma, eps, f, h;

    explicit Operands(const scalabl_update &op)
        : x(read(op.x, op.dtype, op.rows, op.d_in, op.x_stride)),
          A(read(op.A, op.adapter_dtype, op.rank, op.d_in, op.A_stride)),
          B(read(op.B, op.adapter_dtype, op.d_out, op.rank, op.B_stride)),
          s(read(op.s, op.adapter_dtype, 1, op.rank, 0)),
          sigma(read(op.sigma, op.adapter_dtype, 1, op.rank, 0)),
          eps(op.rows, Row(op.rank)), f(eps), h(eps) {
        each(op.rows, op.rank, [&](int64_t i, int64_t k) {
            float z[4] = {};
            if (op.noisy) normal4(coordinates(op, i / op.rows_per_group), k / 4, z);
            eps[i][k] = z[k % 4];
            f[i][k] = op.scaling * (s[0][k] + sigma[0][k] * eps[i][k]);
            for (int64_t j = 0; j < op.d_in; ++j) h[i][k] += A[k][j] * x[i][j];
        });
    }
};

void forward(const scalabl_update &op, void *to_y, int64_t y_stride, void *to_h) {
    const Operands t(op);
    Matrix y = read(to_y, op.dtype, op.rows, op.d_out, y_stride);
    each(op.rows, op.d_out, [&](auto i, auto o) {  // (1a) y += B u, u = f h
        for (int64_t k = 0; k < op.rank; ++k) y[i][o] += t.B[o][k] * t.f[i][k] * t.h[i][k];
    });
    write(y, to_y, op.dtype, y_stride);
    write(t.h, to_h, op.dtype == SCALABL_FLOAT64 ? SCALABL_FLOAT64 : SCALABL_FLOAT32, op.rank);
}

void backward(const scalabl_update &op, const void *grad_y, int64_t stride, const Gradients &out) {
    const Operands t(op);
    const Matrix g = read(grad_y, op.dtype, op.rows, op.d_out, stride);
    Matrix grad_x = read(out.x, op.dtype, op.rows, op.d_in, out.x_stride);
    Matrix grad_A(op.rank, Row(op.d_in)), grad_B(op.d_out, Row(op.rank));
    Matrix grad_s(1, Row(op.rank)), grad_sigma(grad_s), dh(op.rows, Row(op.rank)), ds(dh);
    each(op.rows, op.rank, [&](auto i, auto k) {  // (1b) d = B^T g, dh = f d, ds = c h d
        double d = 0;
        for (int64_t o = 0; o < op.d_out; ++o) d += t.B[o][k] * g[i][o];
        dh[i][k] = t.f[i][k] * d;
        ds[i][k] = op.scaling * t.h[i][k] * d;
    });
    each(op.rows, op.d_in, [&](auto i, auto j) {  // (1c) grad x += A^T dh
        for (int64_t k = 0; k < op.rank; ++k) grad_x[i][j] += t.A[k][j] * dh[i][k];
    });
    each(op.rank, op.d_in, [&](auto k, auto j) {  // (1d) grad A = sum dh x^T
        for (int64_t i = 0; i < op.rows; ++i) grad_A[k][j] += dh[i][k] * t.x[i][j];
    });
    each(op.d_out, op.rank, [&](auto o, auto k) {  // (1d) grad B = sum g u^T
        for (int64_t i = 0; i < op.rows; ++i) grad_B[o][k] += g[i][o] * t.f[i][k] * t.h[i][k];
    });
    // (1e) grad s = sum ds, grad sigma = sum ds eps
    each(op.rows, op.rank, [&](auto i, auto k) { grad_s[0][k] += ds[i][k]; });
    each(op.rows, op.rank, [&](auto i, auto k) { grad_sigma[0][k] += ds[i][k] * t.eps[i][k]; });
    write(grad_x, out.x, op.dtype, out.x_stride);
    write(grad_A, out.A, op.adapter_dtype, op.d_in);
    write(grad_B, out.B, op.adapter_dtype, op.rank);
    write(grad_s, out.s, op.adapter_dtype, 0);
    write(grad_sigma, out.sigma, op.adapter_dtype, 0);
}

}  // namespace scalabl::plain

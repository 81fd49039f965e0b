// Problems for the update, and plain.cpp's results.
#pragma once

#include "matrix.h"
#include "subspace_lora.h"

namespace {

// A copy of a matrix in float64, which holds every number of every dtype; fn changes each.
template <typename Fn>
Matrix doubles(const Matrix &from, const Fn &fn) {
    Matrix out(SCALABL_FLOAT64, from.rows, from.columns);
    for (int64_t i = 0; i < from.rows; ++i) {
        for (int64_t j = 0; j < from.columns; ++j) out.set(i, j, fn(from.at(i, j)));
    }
    return out;
}

struct Problem {
    scalabl_update op;
    Matrix x, A, B, s, sigma, y, grad_y, grad_x;
    std::vector<int64_t> groups, draws;

    Problem(int32_t dtype, int32_t own, int64_t rows, int64_t d_in, int64_t d_out, int64_t rank,
            int64_t gap, int64_t per_group)
        : x(dtype, rows, d_in, gap),
          A(own, rank, d_in, gap),
          B(own, d_out, rank, gap),
          s(own, 1, rank),
          sigma(own, 1, rank),
          y(dtype, rows, d_out, gap),
          grad_y(dtype, rows, d_out, gap),
          grad_x(dtype, rows, d_in, gap) {
        for (int64_t g = 0; g * per_group < rows; ++g) {
            groups.push_back((g / 2 * 7919) % 100003);  // in pairs, most of one draw
            draws.push_back(g / 2 % 5 + (g % 7 == 3));
        }
        op = {};
        op.rows = rows;
        op.d_in = d_in;
        op.d_out = d_out;
        op.rank = rank;
        op.scaling = 0.75;
        op.noisy = 1;
        op.draw = 3;
        op.layer = 5;
        op.seed = 0xfedcba9876543210u;
        op.groups = groups.data();
        op.draws = draws.data();
        op.rows_per_group = per_group;
        op.threads = 2;
        use_own_matrices();
    }
    // The same problem in float64, with every number changed by fn. Groups stay those of `from`.
    template <typename Fn>
    Problem(const Problem &from, const Fn &fn)
        : op(from.op), x(doubles(from.x, fn)), A(doubles(from.A, fn)), B(doubles(from.B, fn)),
          s(doubles(from.s, fn)), sigma(doubles(from.sigma, fn)), y(doubles(from.y, fn)),
          grad_y(doubles(from.grad_y, fn)), grad_x(doubles(from.grad_x, fn)) {
        use_own_matrices();
    }
    Problem(const Problem &) = delete;  // op points into it

    void use_own_matrices() {
        op.dtype = x.dtype;
        op.adapter_dtype = A.dtype;
        op.x = x.data();
        op.x_stride = x.stride;
        op.A = A.data();
        op.A_stride = A.stride;
        op.B = B.data();
        op.B_stride = B.stride;
        op.s = s.data();
        op.sigma = sigma.data();
    }
    std::vector<float> eps(int64_t row) const {
        std::vector<float> out(static_cast<size_t>(op.rank));
        if (op.noisy) {
            const int64_t index = row / op.rows_per_group;
            const int64_t id = op.groups ? op.groups[index] : index;
            const int64_t *draw = op.draws ? op.draws + index : nullptr;
            CHECK(scalabl_normals(op.seed, op.draw, op.layer, &id, draw, 1, op.rank,
                                  out.data()) == SCALABL_OK);
        }
        return out;
    }
};

// Everything that the two passes give.
struct Results {
    Matrix h, y, grad_x, A, B, s, sigma;

    explicit Results(const Problem &p)
        : h(p.op.dtype == SCALABL_FLOAT64 ? SCALABL_FLOAT64 : SCALABL_FLOAT32, p.op.rows,
            p.op.rank),
          y(p.y), grad_x(p.grad_x), A(p.A.dtype, p.op.rank, p.op.d_in),
          B(p.A.dtype, p.op.d_out, p.op.rank), s(p.A.dtype, 1, p.op.rank),
          sigma(p.A.dtype, 1, p.op.rank) {}
};

// plain.cpp's results.
Results plain(const Problem &p) {
    Results out(p);
    CHECK(scalabl_plain_forward(&p.op, out.y.data(), out.y.stride, out.h.data()) == SCALABL_OK);
    CHECK(scalabl_plain_backward(&p.op, p.grad_y.data(), p.grad_y.stride, out.grad_x.data(),
                                 out.grad_x.stride, out.A.data(), out.B.data(), out.s.data(),
                                 out.sigma.data()) == SCALABL_OK);
    return out;
}

const int32_t PAIRS[][2] = {
    {SCALABL_FLOAT32, SCALABL_FLOAT32},   {SCALABL_FLOAT64, SCALABL_FLOAT64},
    {SCALABL_FLOAT64, SCALABL_FLOAT32},   {SCALABL_BFLOAT16, SCALABL_FLOAT32},
    {SCALABL_BFLOAT16, SCALABL_BFLOAT16}, {SCALABL_FLOAT16, SCALABL_FLOAT32},
    {SCALABL_FLOAT16, SCALABL_FLOAT16}};

// fn(problem) for all dtypes and many shapes, with groups and draws and without.
template <typename Fn>
void for_all(const Fn &fn) {
    struct Shape {
        int64_t rows, d_in, d_out, rank, gap, per_group;
    };
    const Shape shapes[] = {{1, 1, 1, 1, 0, 1},    {5, 17, 3, 2, 3, 2},   {7, 33, 65, 5, 1, 7},
                            {29, 40, 24, 8, 0, 4}, {3, 130, 70, 13, 2, 1}, {50, 5, 900, 4, 5, 13},
                            {26, 801, 2, 3, 1, 9}, {2, 3, 4, 256, 1, 1},   {4, 0, 3, 2, 1, 1},
                            {4, 3, 0, 2, 1, 1},    {0, 3, 4, 2, 1, 1}};
    for (const auto &pair : PAIRS) {
        for (const Shape &c : shapes) {
            Problem p(pair[0], pair[1], c.rows, c.d_in, c.d_out, c.rank, c.gap, c.per_group);
            fn(p);
            p.op.groups = nullptr;
            fn(p);
            p.op.draws = nullptr;
            fn(p);
            p.op.noisy = 0;
            fn(p);
        }
    }
}

}  // namespace

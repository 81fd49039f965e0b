// The comparison of a fast body with plain.cpp, within the bounds of rounding.
#pragma once

#include <algorithm>
#include <functional>
#include <string>

#include "problem.h"

namespace {

// Unit roundoff of a dtype.
double half_ulp(int32_t dtype) {
    const double eps[] = {0x1p-24, 0x1p-53, 0x1p-8, 0x1p-11};
    return eps[dtype];
}

// to += more, each column times its weight.
template <typename Weight>
void add(Matrix &to, const Matrix &more, const Weight &weight) {
    for (int64_t i = 0; i < to.rows; ++i) {
        for (int64_t j = 0; j < to.columns; ++j) {
            to.set(i, j, to.at(i, j) + weight(j) * more.at(i, j));
        }
    }
}

// The sums of the magnitudes behind each result: the results of the mean model on the magnitudes of
// all numbers. A group's s is |s| + |sigma eps| there, rather than the magnitude of their sum: what
// cancels in it was rounded before. Hence a call for each group.
Results sizes(const Problem &p) {
    const auto magnitude = [](double value) { return std::fabs(value); };
    const auto one = [](int64_t) { return 1.0; };
    Problem all(p, magnitude);
    Results total(all);
    for (Matrix *sum : {&total.A, &total.B, &total.s, &total.sigma}) {
        *sum = doubles(*sum, [](double) { return 0.0; });
    }
    const int64_t each = p.op.rows_per_group;
    for (int64_t first = 0; first < p.op.rows; first += each) {
        const std::vector<float> eps = p.eps(first);
        scalabl_update op = all.op;
        Results part(all);
        Matrix s = all.s;
        for (int64_t k = 0; k < op.rank; ++k) {
            s.set(0, k, s.at(0, k) + std::fabs(p.sigma.at(0, k) * eps[k]));
        }
        op.noisy = 0;
        op.s = s.data();
        op.rows = std::min(each, op.rows - first);
        op.x = all.x.row(first);
        CHECK(scalabl_plain_forward(&op, total.y.row(first), total.y.stride,
                                    total.h.row(first)) == SCALABL_OK);
        CHECK(scalabl_plain_backward(&op, all.grad_y.row(first),
                                     all.grad_y.stride,
                                     total.grad_x.row(first),
                                     total.grad_x.stride, part.A.data(), part.B.data(),
                                     part.s.data(), nullptr) == SCALABL_OK);
        add(total.A, part.A, one);
        add(total.B, part.B, one);
        add(total.s, part.s, one);
        add(total.sigma, part.s, [&](int64_t k) { return std::fabs(eps[k]); });
    }
    return total;
}

std::string in_words(const scalabl_update &op) {
    char words[160];
    std::snprintf(words, sizeof words, "dtypes %d and %d, %lld rows, %lld to %lld, rank %lld%s",
                  op.dtype, op.adapter_dtype, static_cast<long long>(op.rows),
                  static_cast<long long>(op.d_in), static_cast<long long>(op.d_out),
                  static_cast<long long>(op.rank), op.noisy ? ", noise" : "");
    return words;
}

// Each number beside the one that it is to be. `size`: the sum of the magnitudes behind it.
void near(const scalabl_update &op, const Matrix &got, const Matrix &expected, const Matrix &size,
          double roundoff, const char *what) {
    for (int64_t i = 0; i < got.rows; ++i) {
        for (int64_t j = 0; j < got.columns; ++j) {
            const double value = got.at(i, j), want = expected.at(i, j);
            const bool good = std::fabs(value - want) <= roundoff * size.at(i, j);
            if (!good) {
                std::printf("%s, %s\n  %s(%d, %d): %.9g, expected %.9g\n", scalabl_isa(),
                            in_words(op).c_str(), what, static_cast<int>(i), static_cast<int>(j),
                            value, want);
            }
            CHECK(good);
        }
    }
}

// How to run the two passes: the C interface's, or the device's plan walked on the host.
typedef std::function<scalabl_status(const scalabl_update &, void *y, int64_t y_stride, void *h)>
    Forward;
typedef std::function<scalabl_status(const scalabl_update &, const void *grad_y, int64_t,
                                     const void *h, void *grad_x, int64_t, void *grad_A,
                                     void *grad_B, void *grad_s, void *grad_sigma)>
    Backward;

// tolerance: 1 for the bounds of rounding, 0 where all numbers are whole and every sum is exact.
void compare(const Problem &p, const Forward &forward, const Backward &backward,
             double tolerance = 1) {
    const scalabl_update &op = p.op;
    // Sums are of float at least; a store in the rows' or the adapter's dtype rounds once more.
    const double wide = tolerance * (op.dtype == SCALABL_FLOAT64 ? 0x1p-53 : 0x1p-24);
    const double sum = wide * static_cast<double>(op.d_in + op.d_out + op.rows + op.rank + 8);
    const double row = sum + 2 * tolerance * half_ulp(op.dtype);
    const double own = sum + tolerance * half_ulp(op.adapter_dtype);
    const Results expected = plain(Problem(p, [](double value) { return value; }));
    const Results size = tolerance > 0 ? sizes(p) : expected;  // times 0: any will do

    Results kept(p);
    CHECK(forward(op, kept.y.data(), kept.y.stride, kept.h.data()) == SCALABL_OK);
    near(op, kept.h, expected.h, size.h, sum, "h");
    near(op, kept.y, expected.y, size.y, row, "y");
    for (const bool saved : {true, false}) {
        const void *h = saved ? kept.h.data() : nullptr;
        Results got(p);
        CHECK(backward(op, p.grad_y.data(), p.grad_y.stride, h, got.grad_x.data(),
                       got.grad_x.stride, got.A.data(), got.B.data(), got.s.data(),
                       got.sigma.data()) == SCALABL_OK);
        near(op, got.grad_x, expected.grad_x, size.grad_x, row, "grad_x");
        near(op, got.A, expected.A, size.A, own, "grad_A");
        near(op, got.B, expected.B, size.B, own, "grad_B");
        near(op, got.s, expected.s, size.s, own, "grad_s");
        near(op, got.sigma, expected.sigma, size.sigma, own, "grad_sigma");
    }
}

void compare_all(const Forward &forward, const Backward &backward) {
    for_all([&](const Problem &p) { compare(p, forward, backward); });
}

// fn(problem) with noise, in two dtypes, for rows of which the segments, blocks, tiles and groups
// get unequal numbers.
template <typename Fn>
void for_uneven_rows(int64_t d_in, int64_t d_out, int64_t rank, const Fn &fn) {
    for (const int32_t dtype : {SCALABL_FLOAT32, SCALABL_BFLOAT16}) {
        for (const int64_t rows : {257, 301, 701}) {
            Problem p(dtype, SCALABL_FLOAT32, rows, d_in, d_out, rank, 3, 13);
            fn(p);
        }
    }
}

void compare_uneven_rows(const Forward &forward, const Backward &backward) {
    for_uneven_rows(131, 97, 13, [&](const Problem &p) { compare(p, forward, backward); });
}

// Many rows, columns and ranks of numbers out of -1, 0, 1 without noise: a term left out, or taken
// twice, cannot hide behind rounding.
void compare_whole_numbers(const Forward &forward, const Backward &backward) {
    // Of the largest rank, a block of the CPU has 24 rows, and 240 are ten of them.
    const int64_t sizes[][4] = {
        {1, 1100, 300, 11}, {257, 1100, 300, 11}, {701, 1100, 300, 11}, {240, 40, 30, 256}};
    for (const auto &[rows, d_in, d_out, rank] : sizes) {
        Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, rows, d_in, d_out, rank, 1, 3);
        for (Matrix *m : {&p.x, &p.A, &p.B, &p.y, &p.grad_y, &p.grad_x, &p.s}) {
            for (int64_t i = 0; i < m->rows; ++i) {
                for (int64_t j = 0; j < m->columns; ++j) {
                    m->set(i, j, static_cast<double>(engine() % 3) - 1);
                }
            }
        }
        p.op.scaling = 1;
        p.op.noisy = 0;
        compare(p, forward, backward, 0);
    }
}

}  // namespace

// plain.cpp against numbers worked out by hand and against the noise of docs/conformance.md. Then
// against itself: a number does not depend on how it is stored, a row not on the others.
#include <cstring>

#include "problem.h"

namespace {

Matrix numbers(int64_t rows, int64_t columns, std::initializer_list<double> values) {
    Matrix out(SCALABL_FLOAT64, rows, columns);
    for (int64_t i = 0; i < rows * columns; ++i) out.put(i, values.begin()[i]);
    return out;
}

bool equal(const Matrix &a, const Matrix &b) {
    bool same = a.rows == b.rows && a.columns == b.columns;
    for (int64_t i = 0; same && i < a.rows; ++i) {
        for (int64_t j = 0; j < a.columns; ++j) same = same && a.at(i, j) == b.at(i, j);
    }
    return same;
}

// Two rows, rank 1, c = 1.5, s = 2, without noise: f = 3, h = A x = (17, 39), u = (51, 117);
// d = B^T g = (7, 8), dh = (21, 24), ds = 1.5 h d = (178.5, 468).
void test_by_hand() {
    Problem p(SCALABL_FLOAT64, SCALABL_FLOAT64, 2, 2, 2, 1, 0, 1);
    p.x = numbers(2, 2, {1, 2, 3, 4});
    p.A = numbers(1, 2, {5, 6});
    p.B = numbers(2, 1, {7, 8});
    p.s = numbers(1, 1, {2});
    p.y = numbers(2, 2, {100, 200, 300, 400});
    p.grad_y = numbers(2, 2, {1, 0, 0, 1});
    p.grad_x = numbers(2, 2, {1000, 2000, 3000, 4000});
    p.use_own_matrices();
    p.op.scaling = 1.5;
    p.op.noisy = 0;
    const Results got = plain(p);
    CHECK(equal(got.h, numbers(2, 1, {17, 39})));
    CHECK(equal(got.y, numbers(2, 2, {100 + 7 * 51, 200 + 8 * 51, 300 + 7 * 117, 400 + 8 * 117})));
    CHECK(equal(got.grad_x,
                numbers(2, 2, {1000 + 5 * 21, 2000 + 6 * 21, 3000 + 5 * 24, 4000 + 6 * 24})));
    CHECK(equal(got.A, numbers(1, 2, {21 * 1 + 24 * 3, 21 * 2 + 24 * 4})));
    CHECK(equal(got.B, numbers(2, 1, {51, 117})));
    CHECK(equal(got.s, numbers(1, 1, {178.5 + 468})));
    CHECK(equal(got.sigma, numbers(1, 1, {0})));
}

// B = 1, A x = 1, s = 0, sigma = 2, c = 1: y becomes 2 eps, and grad sigma eps for g = 1. Row 1 is
// the worked example of docs/conformance.md, group 41 of draw 1 + 2.
void test_the_worked_example_of_the_noise() {
    const uint32_t bits[] = {0xbfc454e4, 0x3f50a7f3, 0x3d625abd, 0xbf443cdd,
                             0x3f20344c, 0x3ff650c9, 0xbee7633e, 0x3f8d48dc};
    Problem p(SCALABL_FLOAT64, SCALABL_FLOAT64, 2, 1, 8, 8, 0, 1);
    p.x = numbers(2, 1, {1, 1});
    p.A = numbers(8, 1, {1, 1, 1, 1, 1, 1, 1, 1});
    p.s = numbers(1, 8, {0, 0, 0, 0, 0, 0, 0, 0});
    p.sigma = numbers(1, 8, {2, 2, 2, 2, 2, 2, 2, 2});
    for (int64_t i = 0; i < 8; ++i) {
        for (int64_t k = 0; k < 8; ++k) p.B.set(i, k, i == k);
        for (int64_t row = 0; row < 2; ++row) {
            p.y.set(row, i, 0);
            p.grad_y.set(row, i, static_cast<double>(row));
        }
    }
    p.use_own_matrices();
    const int64_t groups[] = {5, 41}, draws[] = {0, 2};
    p.op.seed = 20250706123456789u;
    p.op.draw = 1;
    p.op.layer = 9;
    p.op.groups = groups;
    p.op.draws = draws;
    p.op.scaling = 1;
    const Results got = plain(p);
    for (int64_t k = 0; k < 8; ++k) {
        float eps;
        std::memcpy(&eps, &bits[k], sizeof eps);
        CHECK(got.y.at(1, k) == 2 * eps && got.sigma.at(0, k) == eps && got.s.at(0, k) == 1);
        CHECK(got.y.at(0, k) != 2 * eps);
    }
}

// A row alone is that row of all, with the id and the draw that the lists give it.
void test_every_row_by_itself() {
    for_all([](const Problem &p) {
        const Results all = plain(p);
        for (int64_t i = 0; i < p.op.rows; ++i) {
            const int64_t g = i / p.op.rows_per_group, group = p.op.groups ? p.op.groups[g] : g;
            scalabl_update op = p.op;
            op.rows = 1;
            op.groups = &group;
            op.draws = nullptr;
            op.draw += static_cast<uint32_t>(p.op.draws ? p.op.draws[g] : 0);
            op.x = p.x.row(i);
            Matrix y = p.y;
            CHECK(scalabl_plain_forward(&op, y.row(i), 1, nullptr) == SCALABL_OK);
            for (int64_t j = 0; j < op.d_out; ++j) CHECK(y.at(i, j) == all.y.at(i, j));
        }
    });
}

// Strides and dtypes do not matter until a result is stored: it is the double's, rounded once.
void test_results_are_rounded_once() {
    for_all([](const Problem &p) {
        const Results got = plain(p), wide = plain(Problem(p, [](double value) { return value; }));
        const auto rounded = [](const Matrix &narrow, const Matrix &from) {
            Matrix out = narrow;
            for (int64_t i = 0; i < out.rows; ++i) {
                for (int64_t j = 0; j < out.columns; ++j) out.set(i, j, from.at(i, j));
            }
            return out;
        };
        const Matrix *pairs[][2] = {{&got.h, &wide.h}, {&got.y, &wide.y},
                                    {&got.grad_x, &wide.grad_x}, {&got.A, &wide.A},
                                    {&got.B, &wide.B}, {&got.s, &wide.s},
                                    {&got.sigma, &wide.sigma}};
        for (const auto &pair : pairs) CHECK(equal(*pair[0], rounded(*pair[0], *pair[1])));
    });
}

// Checked as everywhere, and x may be null where nothing asks for it.
void test_arguments() {
    Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, 2, 3, 4, 2, 0, 1);
    scalabl_update op = p.op;
    op.rank = 0;
    CHECK(scalabl_plain_forward(&op, p.y.data(), 4, nullptr) == SCALABL_RANK);
    CHECK(scalabl_plain_forward(&p.op, p.y.data(), 3, nullptr) == SCALABL_STRIDE);
    op = p.op;
    op.x = nullptr;
    const Results all = plain(p);
    const auto backward = [&](const scalabl_update &by, void *to_x, void *to_s) {
        return scalabl_plain_backward(&by, p.grad_y.data(), 4, to_x, 3, nullptr, nullptr, to_s,
                                      nullptr);
    };
    CHECK(backward(op, nullptr, p.s.data()) == SCALABL_NULL);
    CHECK(backward(op, p.grad_x.data(), nullptr) == SCALABL_OK);
    CHECK(equal(p.grad_x, all.grad_x));
    CHECK(backward(p.op, nullptr, nullptr) == SCALABL_OK);
}

}  // namespace

int main() {
    test_by_hand();
    test_the_worked_example_of_the_noise();
    test_every_row_by_itself();
    test_results_are_rounded_once();
    test_arguments();
    return end_of_checks();
}

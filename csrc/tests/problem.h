// Problems for the update, and what it must come to: loops in double. Buffers have their exact sizes,
// so that the sanitizers see a read or a write past the end.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "check.h"
#include "scalabl.h"
#include "subspace_lora.h"

namespace {

std::mt19937_64 engine(1);

double random_value() { return std::normal_distribution<double>()(engine); }

int64_t width(int32_t dtype) {
    return dtype == SCALABL_FLOAT64 ? 8 : dtype == SCALABL_FLOAT32 ? 4 : 2;
}

// Unit roundoff of a dtype.
double half_ulp(int32_t dtype) {
    const double eps[] = {0x1p-24, 0x1p-53, 0x1p-8, 0x1p-11};
    return eps[dtype];
}

// A strided matrix of one dtype in bytes of its own; the gaps hold NaN, which must not be read.
struct Matrix {
    int32_t dtype;
    int64_t rows, columns, stride;
    std::vector<char> bytes;

    Matrix(int32_t dtype_, int64_t rows_, int64_t columns_, int64_t gap = 0)
        : dtype(dtype_), rows(rows_), columns(columns_), stride(columns_ + gap) {
        const int64_t size = rows ? (rows - 1) * stride + columns : 0;
        bytes.resize(static_cast<size_t>(size * width(dtype)));
        for (int64_t i = 0; i < size; ++i) put(i, NAN);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) set(i, j, random_value());
        }
    }
    void *data() { return bytes.empty() ? nullptr : bytes.data(); }
    const void *data() const { return bytes.empty() ? nullptr : bytes.data(); }

    template <typename T>
    T &as(int64_t i) {
        return reinterpret_cast<T *>(bytes.data())[i];
    }
    template <typename T>
    const T &as(int64_t i) const {
        return reinterpret_cast<const T *>(bytes.data())[i];
    }
    void put(int64_t i, double value) {
        switch (dtype) {
            case SCALABL_FLOAT32: as<float>(i) = static_cast<float>(value); break;
            case SCALABL_FLOAT64: as<double>(i) = value; break;
            case SCALABL_BFLOAT16:
                scalabl::narrow(static_cast<float>(value), as<scalabl::bfloat16>(i));
                break;
            default: scalabl::narrow(static_cast<float>(value), as<scalabl::float16>(i));
        }
    }
    double value(int64_t i) const {
        switch (dtype) {
            case SCALABL_FLOAT32: return as<float>(i);
            case SCALABL_FLOAT64: return as<double>(i);
            case SCALABL_BFLOAT16: return scalabl::widen(as<scalabl::bfloat16>(i));
            default: return scalabl::widen(as<scalabl::float16>(i));
        }
    }
    void set(int64_t i, int64_t j, double value) { put(i * stride + j, value); }
    double at(int64_t i, int64_t j) const { return value(i * stride + j); }
};

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
        op.dtype = dtype;
        op.adapter_dtype = own;
        op.rows = rows;
        op.d_in = d_in;
        op.d_out = d_out;
        op.rank = rank;
        op.x = x.data();
        op.x_stride = x.stride;
        op.A = A.data();
        op.A_stride = A.stride;
        op.B = B.data();
        op.B_stride = B.stride;
        op.s = s.data();
        op.sigma = sigma.data();
        op.scaling = 0.75;
        op.noisy = 1;
        op.draw = 3;
        op.layer = 5;
        op.seed = 0xfedcba9876543210u;
        op.groups = groups.data();
        op.draws = draws.data();
        op.rows_per_group = per_group;
        op.threads = 2;
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

// One number beside what it is to be: `size` is the sum of the magnitudes behind it.
void near(double value, double expected, double size, double roundoff, const char *what) {
    const bool good = std::fabs(value - expected) <= roundoff * size;
    if (!good) std::printf("%s: %.9g, expected %.9g\n", what, value, expected);
    CHECK(good);
}

// How to run the two passes: the C interface's, or the device's plan walked on the host.
typedef std::function<scalabl_status(const scalabl_update &, void *y, int64_t y_stride, void *h)>
    Forward;
typedef std::function<scalabl_status(const scalabl_update &, const void *grad_y, int64_t, const void *h,
                                     void *grad_x, int64_t, void *grad_A, void *grad_B,
                                     void *grad_s, void *grad_sigma)>
    Backward;

// tolerance: 1 for the bounds of rounding, 0 where all numbers are whole and every sum is exact.
void compare(Problem &p, const Forward &forward, const Backward &backward, double tolerance = 1) {
    const scalabl_update &op = p.op;
    const int64_t n = op.rows, r = op.rank;
    // Sums are of float at least; a store in the rows' or the adapter's dtype rounds once more.
    const double wide = tolerance * (op.dtype == SCALABL_FLOAT64 ? 0x1p-53 : 0x1p-24);
    const double sum = wide * static_cast<double>(op.d_in + op.d_out + n + r + 8);
    const double row = sum + 2 * tolerance * half_ulp(op.dtype);
    const double own = sum + tolerance * half_ulp(op.adapter_dtype);

    std::vector<double> h(n * r), hs(n * r), d(n * r), ds(n * r), f(n * r), e(n * r);
    for (int64_t i = 0; i < n; ++i) {
        const std::vector<float> eps = p.eps(i);
        for (int64_t k = 0; k < r; ++k) {
            const int64_t at = i * r + k;
            e[at] = eps[k];
            f[at] = op.scaling * (p.s.at(0, k) + p.sigma.at(0, k) * e[at]);
            for (int64_t j = 0; j < op.d_in; ++j) {
                h[at] += p.A.at(k, j) * p.x.at(i, j);
                hs[at] += std::fabs(p.A.at(k, j) * p.x.at(i, j));
            }
            for (int64_t j = 0; j < op.d_out; ++j) {
                d[at] += p.B.at(j, k) * p.grad_y.at(i, j);
                ds[at] += std::fabs(p.B.at(j, k) * p.grad_y.at(i, j));
            }
        }
    }
    // |s| + |sigma eps| rather than their sum: what cancels there was rounded before.
    const auto factor_size = [&](int64_t i, int64_t k) {
        return op.scaling *
               (std::fabs(p.s.at(0, k)) + std::fabs(p.sigma.at(0, k) * e[i * r + k]));
    };

    Matrix y = p.y, kept(op.dtype == SCALABL_FLOAT64 ? SCALABL_FLOAT64 : SCALABL_FLOAT32, n, r);
    CHECK(forward(op, y.data(), y.stride, kept.data()) == SCALABL_OK);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < r; ++k) near(kept.at(i, k), h[i * r + k], hs[i * r + k], sum, "h");
        for (int64_t j = 0; j < op.d_out; ++j) {
            double expected = p.y.at(i, j), size = std::fabs(expected);
            for (int64_t k = 0; k < r; ++k) {
                expected += p.B.at(j, k) * f[i * r + k] * h[i * r + k];
                size += std::fabs(p.B.at(j, k)) * factor_size(i, k) * hs[i * r + k];
            }
            near(y.at(i, j), expected, size, row, "y");
        }
    }

    for (const bool saved : {true, false}) {
        Matrix grad_x = p.grad_x, grad_A(op.adapter_dtype, r, op.d_in);
        Matrix grad_B(op.adapter_dtype, op.d_out, r), grad_s(op.adapter_dtype, 1, r);
        Matrix grad_sigma(op.adapter_dtype, 1, r);
        CHECK(backward(op, p.grad_y.data(), p.grad_y.stride, saved ? kept.data() : nullptr,
                       grad_x.data(), grad_x.stride, grad_A.data(), grad_B.data(), grad_s.data(),
                       grad_sigma.data()) == SCALABL_OK);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < op.d_in; ++j) {
                double expected = p.grad_x.at(i, j), size = std::fabs(expected);
                for (int64_t k = 0; k < r; ++k) {
                    expected += p.A.at(k, j) * f[i * r + k] * d[i * r + k];
                    size += std::fabs(p.A.at(k, j)) * factor_size(i, k) * ds[i * r + k];
                }
                near(grad_x.at(i, j), expected, size, row, "grad_x");
            }
        }
        for (int64_t k = 0; k < r; ++k) {
            for (int64_t j = 0; j < op.d_in; ++j) {
                double expected = 0, size = 0;
                for (int64_t i = 0; i < n; ++i) {
                    expected += f[i * r + k] * d[i * r + k] * p.x.at(i, j);
                    size += factor_size(i, k) * ds[i * r + k] * std::fabs(p.x.at(i, j));
                }
                near(grad_A.at(k, j), expected, size, own, "grad_A");
            }
            for (int64_t j = 0; j < op.d_out; ++j) {
                double expected = 0, size = 0;
                for (int64_t i = 0; i < n; ++i) {
                    expected += p.grad_y.at(i, j) * f[i * r + k] * h[i * r + k];
                    size += std::fabs(p.grad_y.at(i, j)) * factor_size(i, k) * hs[i * r + k];
                }
                near(grad_B.at(j, k), expected, size, own, "grad_B");
            }
            double s = 0, sigma = 0, size = 0, sigma_size = 0;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t at = i * r + k;
                s += op.scaling * h[at] * d[at];
                size += op.scaling * hs[at] * ds[at];
                sigma += op.scaling * h[at] * d[at] * e[at];
                sigma_size += op.scaling * hs[at] * ds[at] * std::fabs(e[at]);
            }
            near(grad_s.at(0, k), s, size, own, "grad_s");
            near(grad_sigma.at(0, k), sigma, sigma_size, own, "grad_sigma");
        }
    }
}

const int32_t PAIRS[][2] = {
    {SCALABL_FLOAT32, SCALABL_FLOAT32},   {SCALABL_FLOAT64, SCALABL_FLOAT64},
    {SCALABL_FLOAT64, SCALABL_FLOAT32},   {SCALABL_BFLOAT16, SCALABL_FLOAT32},
    {SCALABL_BFLOAT16, SCALABL_BFLOAT16}, {SCALABL_FLOAT16, SCALABL_FLOAT32},
    {SCALABL_FLOAT16, SCALABL_FLOAT16}};

void compare_all(const Forward &forward, const Backward &backward) {
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
            compare(p, forward, backward);
            p.op.groups = nullptr;
            compare(p, forward, backward);
            p.op.draws = nullptr;
            compare(p, forward, backward);
            p.op.noisy = 0;
            compare(p, forward, backward);
        }
    }
}

// Many rows, columns and ranks of numbers out of -1, 0, 1 without noise: a term left out, or taken
// twice, cannot hide behind rounding.
void compare_whole_numbers(const Forward &forward, const Backward &backward) {
    for (const int64_t rows : {int64_t{1}, int64_t{300}, int64_t{700}}) {
        Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, rows, 1100, 300, 11, 1, 3);
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

// RMSNorm, RoPE, SwiGLU, products of few rows and weights out of codes through the C interface,
// against loops over doubles: dtypes, sizes that nothing divides, threads, instruction sets and bad
// arguments.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "matrix.h"

namespace {

// Of values of about 1: some float32 roundings, and one of the dtype.
double allowed(int32_t dtype, double size) {
    const double stored = dtype == SCALABL_FLOAT32 ? 0 : dtype == SCALABL_BFLOAT16 ? 0x1p-8 : 0x1p-11;
    return (stored + 128 * 0x1p-23) * size + 0x1p-24;
}

bool near(const Matrix &got, const Matrix &expected, const Matrix &sizes) {
    for (int64_t i = 0; i < got.rows; ++i) {
        for (int64_t j = 0; j < got.columns; ++j) {
            const double bound = allowed(got.dtype, sizes.at(i, j));
            if (!(std::abs(got.at(i, j) - expected.at(i, j)) <= bound)) {
                std::printf("dtype %d, element %d, %d: %g for %g\n", got.dtype, static_cast<int>(i),
                            static_cast<int>(j), got.at(i, j), expected.at(i, j));
                return false;
            }
        }
    }
    return true;
}

void test_norm(int32_t dtype, int64_t rows, int64_t n, int32_t threads) {
    const Matrix x(dtype, rows, n), weight(dtype, 1, n), g(dtype, rows, n);
    Matrix y(dtype, rows, n), grad_x(dtype, rows, n), scale(SCALABL_FLOAT32, 1, rows);
    const scalabl_norm op = {dtype, rows, n, x.data(), weight.data(), 1e-5f, threads};
    float *const factors = static_cast<float *>(scale.data());
    CHECK(scalabl_rms_norm(&op, y.data(), factors) == SCALABL_OK);
    CHECK(scalabl_rms_norm_backward(&op, g.data(), factors, grad_x.data()) == SCALABL_OK);
    Matrix right(SCALABL_FLOAT64, rows, n), size(right), right_x(right), size_x(right);
    for (int64_t i = 0; i < rows; ++i) {
        double squares = 0, inner = 0;
        for (int64_t j = 0; j < n; ++j) {
            squares += x.at(i, j) * x.at(i, j) / n;
            inner += weight.at(0, j) * g.at(i, j) * x.at(i, j) / n;
        }
        const double a = 1 / std::sqrt(squares + 1e-5f);
        for (int64_t j = 0; j < n; ++j) {
            right.set(i, j, a * x.at(i, j) * weight.at(0, j));
            size.set(i, j, std::abs(right.at(i, j)));
            const double first = a * weight.at(0, j) * g.at(i, j);
            const double second = a * a * a * inner * x.at(i, j);
            right_x.set(i, j, first - second);
            size_x.set(i, j, std::abs(first) + std::abs(a * x.at(i, j)) * a * 4);
        }
    }
    CHECK(near(y, right, size));
    CHECK(near(grad_x, right_x, size_x));
    Matrix alone(dtype, rows, n);
    CHECK(scalabl_rms_norm(&op, alone.data(), nullptr) == SCALABL_OK);
    CHECK(alone.bytes == y.bytes);
}

void test_rotation(int32_t dtype, int64_t rows, int64_t heads, int64_t n, int32_t threads) {
    const int64_t angles = rows % 3 == 0 ? rows / 3 : rows;
    const Matrix x(dtype, rows, heads * n), cos(dtype, angles, n), sin(dtype, angles, n);
    std::vector<int64_t> places(rows);
    for (int64_t i = 0; i < rows; ++i) places[i] = 2 * (rows - 1 - i);
    Matrix y(dtype, 2 * rows, heads * n), back(dtype, rows, heads * n);
    scalabl_rotation op = {dtype,      rows,       heads,         n, angles,
                           cos.data(), sin.data(), places.data(), 0, threads};
    CHECK(scalabl_rotate(&op, x.data(), y.data()) == SCALABL_OK);
    op.back = 1;
    CHECK(scalabl_rotate(&op, y.data(), back.data()) == SCALABL_OK);
    Matrix got(dtype, rows, heads * n), right(SCALABL_FLOAT64, rows, heads * n), size(right);
    Matrix right_back(right), size_back(right);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < heads * n; ++j) {
            const int64_t k = j % n, h = n / 2, angle = i % angles;
            const int64_t other = k < h ? j + h : j - h, place = 2 * (rows - 1 - i);
            const int64_t turned = k < h ? k + h : k - h;
            got.set(i, j, y.at(place, j));
            const double c = cos.at(angle, k), s = sin.at(angle, k), t = sin.at(angle, turned);
            right.set(i, j, x.at(i, j) * c + (k < h ? -1 : 1) * x.at(i, other) * s);
            size.set(i, j, std::abs(x.at(i, j) * c) + std::abs(x.at(i, other) * s));
            const double here = y.at(place, j) * c, there = y.at(place, other) * t;
            right_back.set(i, j, here + (k < h ? 1 : -1) * there);
            size_back.set(i, j, std::abs(here) + std::abs(there));
        }
    }
    CHECK(near(got, right, size));
    CHECK(near(back, right_back, size_back));
    op.places = nullptr;
    op.back = 0;
    Matrix in_place(dtype, rows, heads * n);
    CHECK(scalabl_rotate(&op, x.data(), in_place.data()) == SCALABL_OK);
    CHECK(in_place.bytes == got.bytes);
}

void test_swiglu(int32_t dtype, int64_t n, int32_t threads) {
    const Matrix gate(dtype, 1, n), up(dtype, 1, n), g(dtype, 1, n);
    Matrix y(dtype, 1, n), to_gate(dtype, 1, n), to_up(dtype, 1, n);
    CHECK(scalabl_swiglu(dtype, n, gate.data(), up.data(), y.data(), threads) == SCALABL_OK);
    CHECK(scalabl_swiglu_backward(dtype, n, g.data(), gate.data(), up.data(), to_gate.data(),
                                  to_up.data(), threads) == SCALABL_OK);
    Matrix right(SCALABL_FLOAT64, 1, n), right_gate(right), right_up(right), size(right);
    Matrix size_gate(right), size_up(right);
    for (int64_t j = 0; j < n; ++j) {
        const double a = gate.at(0, j), b = up.at(0, j), p = 1 / (1 + std::exp(-a));
        right.set(0, j, a * p * b);
        right_gate.set(0, j, g.at(0, j) * b * p * (1 + a * (1 - p)));
        right_up.set(0, j, g.at(0, j) * a * p);
        size.set(0, j, std::abs(a * p * b));
        size_gate.set(0, j, std::abs(g.at(0, j) * b) * p * (1 + std::abs(a)));
        size_up.set(0, j, std::abs(right_up.at(0, j)));
    }
    CHECK(near(y, right, size));
    CHECK(near(to_gate, right_gate, size_gate));
    CHECK(near(to_up, right_up, size_up));
}

void test_few_rows(int32_t dtype, int64_t rows, int64_t d_in, int64_t d_out, int32_t threads) {
    const Matrix x(dtype, rows, d_in), weight(dtype, d_out, d_in), bias(dtype, 1, d_out);
    for (const bool with_bias : {false, true}) {
        Matrix y(dtype, rows, d_out), right(SCALABL_FLOAT64, rows, d_out), size(right);
        const scalabl_product op = {dtype,  rows, d_in, d_out, x.data(), weight.data(),
                                    with_bias ? bias.data() : nullptr, threads};
        CHECK(scalabl_few_rows(&op, y.data()) == SCALABL_OK);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t k = 0; k < d_out; ++k) {
                double sum = with_bias ? bias.at(0, k) : 0, sizes = std::abs(sum);
                for (int64_t j = 0; j < d_in; ++j) {
                    sum += x.at(i, j) * weight.at(k, j);
                    sizes += std::abs(x.at(i, j) * weight.at(k, j));
                }
                right.set(i, k, sum);
                size.set(i, k, dtype == SCALABL_FLOAT32 ? sizes : std::abs(sum) + sizes * 0x1p-10);
            }
        }
        CHECK(near(y, right, size));
    }
}

// Rounded once, so the bits must be those of the rounded product.
void test_codes(int32_t dtype, int64_t rows, int64_t n, bool with_levels, int32_t threads) {
    const int64_t groups = with_levels ? (n + 63) / 64 : 1, width = with_levels ? 32 * groups : n;
    const int64_t size = width + 3;
    std::vector<uint8_t> codes(static_cast<size_t>(rows ? rows * size - 3 : 0));
    for (uint8_t &code : codes) code = static_cast<uint8_t>(engine());
    const Matrix levels(SCALABL_FLOAT32, 1, 16), scale(dtype, rows, groups, 2);
    const scalabl_codes op = {dtype, rows, n, codes.data(), size, scale.data(), scale.stride,
                              nullptr, threads};
    scalabl_codes leveled = op;
    leveled.levels = static_cast<const float *>(levels.data());
    Matrix got(dtype, rows, n), right(dtype, rows, n);
    CHECK(scalabl_dequantize(with_levels ? &leveled : &op, got.data()) == SCALABL_OK);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            if (with_levels) {
                const uint8_t byte = codes[i * size + j / 2];
                const double level = levels.at(0, j % 2 ? byte >> 4 : byte & 15);
                right.set(i, j, static_cast<float>(level * scale.at(i, j / 64)));
            } else {
                right.set(i, j, static_cast<int8_t>(codes[i * size + j]) * scale.at(i, 0));
            }
        }
    }
    CHECK(got.bytes == right.bytes);
}

void test_all(int32_t dtype, int32_t threads) {
    for (const bool with_levels : {false, true}) {
        for (const int64_t n : {1, 2, 63, 64, 65, 1023, 1024, 1025, 2181}) {
            test_codes(dtype, 5, n, with_levels, threads);
        }
        test_codes(dtype, 301, 520, with_levels, threads);
        test_codes(dtype, 0, 64, with_levels, threads);
        test_codes(dtype, 3, 0, with_levels, threads);
    }
    for (const int64_t rows : {1, 2, 3, 4, 7, 16}) {
        test_few_rows(dtype, rows, 70, 301, threads);
    }
    for (const int64_t n : {1, 15, 256, 257, 1025, 2101}) test_few_rows(dtype, 5, n, 37, threads);
    for (const int64_t n : {1, 2, 3, 4}) test_few_rows(dtype, 1, 577, n, threads);
    test_few_rows(dtype, 0, 8, 8, threads);
    test_few_rows(dtype, 2, 0, 8, threads);
    test_few_rows(dtype, 2, 8, 0, threads);
    for (const int64_t n : {1, 2, 31, 70, 1026, 2100}) {
        test_norm(dtype, 5, n, threads);
        test_swiglu(dtype, 7 * n, threads);
    }
    test_norm(dtype, 301, 520, threads);
    test_swiglu(dtype, 100001, threads);
    test_rotation(dtype, 5, 3, 10, threads);
    test_rotation(dtype, 9, 1, 1024, threads);
    test_rotation(dtype, 303, 9, 64, threads);
    test_norm(dtype, 0, 8, threads);
    test_norm(dtype, 8, 0, threads);
    test_rotation(dtype, 0, 2, 8, threads);
    test_swiglu(dtype, 0, threads);
}

void test_every_instruction_set() {
    const std::string best = scalabl_isa();
    for (const char *name : {"baseline", "avx2", "avx512"}) {
        if (scalabl_use_isa(name) != SCALABL_OK) continue;
        for (const int32_t dtype : {SCALABL_FLOAT32, SCALABL_BFLOAT16, SCALABL_FLOAT16}) {
            test_all(dtype, 1);
            test_all(dtype, 3);
        }
    }
    CHECK(scalabl_use_isa(best.c_str()) == SCALABL_OK);
}

void test_bad_codes() {
    float v[8] = {};
    const scalabl_codes good = {SCALABL_FLOAT32, 2, 4, v, 4, v, 1, nullptr, 1};
    CHECK(scalabl_dequantize(nullptr, v) == SCALABL_NULL);
    CHECK(scalabl_dequantize(&good, nullptr) == SCALABL_NULL);
    const auto changed = [&](const auto &change) {
        scalabl_codes bad = good;
        change(bad);
        return scalabl_dequantize(&bad, v);
    };
    CHECK(changed([](auto &op) { op.codes = nullptr; }) == SCALABL_NULL);
    CHECK(changed([](auto &op) { op.scale = nullptr; }) == SCALABL_NULL);
    CHECK(changed([](auto &op) { op.dtype = SCALABL_FLOAT64; }) == SCALABL_DTYPE);
    CHECK(changed([](auto &op) { op.threads = 0; }) == SCALABL_THREADS);
    for (const int64_t n : {INT64_MIN, int64_t(-1), INT64_MAX / 4, INT64_MAX}) {
        CHECK(changed([n](auto &op) { op.n = n; }) == SCALABL_SIZE);
    }
    CHECK(changed([](auto &op) { op.codes_stride = INT64_MAX; }) == SCALABL_SIZE);
    CHECK(changed([](auto &op) { op.scale_stride = INT64_MIN / 2; }) == SCALABL_SIZE);
}

void test_bad_products() {
    float v[8] = {};
    const scalabl_product good = {SCALABL_FLOAT32, 1, 2, 4, v, v, v, 1};
    CHECK(scalabl_few_rows(nullptr, v) == SCALABL_NULL);
    CHECK(scalabl_few_rows(&good, nullptr) == SCALABL_NULL);
    const auto changed = [&](const auto &change) {
        scalabl_product bad = good;
        change(bad);
        return scalabl_few_rows(&bad, v);
    };
    CHECK(changed([](auto &op) { op.x = nullptr; }) == SCALABL_NULL);
    CHECK(changed([](auto &op) { op.weight = nullptr; }) == SCALABL_NULL);
    scalabl_product empty = good;
    empty.d_in = 0;
    CHECK(scalabl_few_rows(&empty, nullptr) == SCALABL_NULL);
    CHECK(changed([](auto &op) { op.dtype = SCALABL_FLOAT64; }) == SCALABL_DTYPE);
    CHECK(changed([](auto &op) { op.threads = 0; }) == SCALABL_THREADS);
    for (const int64_t rows : {INT64_MIN, int64_t(-1), int64_t(17), INT64_MAX}) {
        CHECK(changed([rows](auto &op) { op.rows = rows; }) == SCALABL_SIZE);
    }
    for (const int64_t n : {INT64_MIN, int64_t(-1), INT64_MAX / 2, INT64_MAX}) {
        CHECK(changed([n](auto &op) { op.d_in = n; }) == SCALABL_SIZE);
        CHECK(changed([n](auto &op) { op.d_out = n; }) == SCALABL_SIZE);
    }
}

void test_bad_arguments() {
    float v[8] = {};
    scalabl_norm norm = {SCALABL_FLOAT32, 2, 4, v, v, 1e-5f, 1};
    CHECK(scalabl_rms_norm(nullptr, v, v) == SCALABL_NULL);
    CHECK(scalabl_rms_norm(&norm, nullptr, v) == SCALABL_NULL);
    CHECK(scalabl_rms_norm_backward(&norm, v, nullptr, v) == SCALABL_NULL);
    CHECK(scalabl_rms_norm_backward(&norm, nullptr, v, v) == SCALABL_NULL);
    CHECK(scalabl_rms_norm_backward(&norm, v, v, nullptr) == SCALABL_NULL);
    for (const int32_t dtype : {-1, 1, 4}) {
        norm.dtype = dtype;
        CHECK(scalabl_rms_norm(&norm, v, v) == SCALABL_DTYPE);
        CHECK(scalabl_swiglu(dtype, 8, v, v, v, 1) == SCALABL_DTYPE);
    }
    norm = {SCALABL_FLOAT32, 2, 4, nullptr, v, 1e-5f, 1};
    CHECK(scalabl_rms_norm(&norm, v, v) == SCALABL_NULL);
    norm = {SCALABL_FLOAT32, 2, 4, v, nullptr, 1e-5f, 1};
    CHECK(scalabl_rms_norm(&norm, v, v) == SCALABL_NULL);
    norm = {SCALABL_FLOAT32, -2, 4, v, v, 1e-5f, 1};
    CHECK(scalabl_rms_norm(&norm, v, v) == SCALABL_SIZE);
    norm = {SCALABL_FLOAT32, 2, INT64_MAX, v, v, 1e-5f, 1};
    CHECK(scalabl_rms_norm(&norm, v, v) == SCALABL_SIZE);
    norm = {SCALABL_FLOAT32, 2, 4, v, v, 1e-5f, 0};
    CHECK(scalabl_rms_norm(&norm, v, v) == SCALABL_THREADS);
    CHECK(scalabl_swiglu(SCALABL_FLOAT32, -1, v, v, v, 1) == SCALABL_SIZE);
    CHECK(scalabl_swiglu(SCALABL_FLOAT32, 8, v, v, v, 0) == SCALABL_THREADS);
    CHECK(scalabl_swiglu(SCALABL_FLOAT32, 8, v, nullptr, v, 1) == SCALABL_NULL);
    CHECK(scalabl_swiglu_backward(SCALABL_FLOAT32, 8, v, v, v, v, nullptr, 1) == SCALABL_NULL);
    const scalabl_rotation good = {SCALABL_FLOAT32, 1, 2, 4, 1, v, v, nullptr, 0, 1};
    CHECK(scalabl_rotate(nullptr, v, v) == SCALABL_NULL);
    CHECK(scalabl_rotate(&good, nullptr, v) == SCALABL_NULL);
    scalabl_rotation bad = good;
    bad.n = 3;
    CHECK(scalabl_rotate(&bad, v, v) == SCALABL_SIZE);
    bad.n = 1026;
    CHECK(scalabl_rotate(&bad, v, v) == SCALABL_SIZE);
    bad.n = -2;
    CHECK(scalabl_rotate(&bad, v, v) == SCALABL_SIZE);
    bad = good;
    bad.angles = 0;
    CHECK(scalabl_rotate(&bad, v, v) == SCALABL_SIZE);
    bad = good;
    bad.heads = INT64_MAX;
    CHECK(scalabl_rotate(&bad, v, v) == SCALABL_SIZE);
    bad = good;
    bad.sin = nullptr;
    CHECK(scalabl_rotate(&bad, v, v) == SCALABL_NULL);
    test_bad_codes();
    test_bad_products();
}

}  // namespace

int main() {
    test_every_instruction_set();
    test_bad_arguments();
    return end_of_checks();
}

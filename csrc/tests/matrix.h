// Matrices of any dtype for the tests, filled with normals. Buffers have their exact sizes, so that
// the sanitizers see a read or a write past the end.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "halves.h"
#include "scalabl.h"

namespace {

std::mt19937_64 engine(1);

double random_value() { return std::normal_distribution<double>()(engine); }

int64_t width(int32_t dtype) {
    return dtype == SCALABL_FLOAT64 ? 8 : dtype == SCALABL_FLOAT32 ? 4 : 2;
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
    void *row(int64_t i) { return bytes.data() + i * stride * width(dtype); }
    const void *row(int64_t i) const { return bytes.data() + i * stride * width(dtype); }
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

}  // namespace

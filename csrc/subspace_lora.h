// The formulas of the subspace-sampled low-rank update, once for host and device.
//
//     forward   h = A x                              (rank,) per row
//               u = scaling * (s + sigma eps) * h
//               y += B u
//     backward  d = B^T grad_y
//               grad_u's way back to h, s, sigma:   dh     = scaling * (s + sigma eps) * d
//                                                   ds     = scaling * h * d
//                                                   dsigma = ds * eps
//               grad_x += A^T dh,   grad_A = sum dh x^T,   grad_B = sum grad_y u^T,
//               grad_s = sum ds,    grad_sigma = sum dsigma          (sums over rows)
//
// docs/method.md derives them. What is left to cpu.cpp and cuda.cu is how to walk the rows.
#pragma once

#include "halves.h"
#include "normal.h"
#include "scalabl.h"

namespace scalabl {

constexpr int MAX_RANK = 256;

// Where the gradients go; null where one is not wanted.
struct Gradients {
    void *x;  // added to
    int64_t x_stride;
    void *A, *B, *s, *sigma;  // overwritten
};

// How many groups there are of so many rows each; no sum that could overflow.
SCALABL_BOTH int64_t count_groups(int64_t rows, int64_t rows_per_group) {
    return rows / rows_per_group + (rows % rows_per_group != 0);
}

// Where the eps of the rows i with i / rows_per_group == g lies, if the update is noisy.
SCALABL_BOTH Coordinates coordinates(const scalabl_update &op, int64_t g) {
    return coordinates(op.seed, op.draw, op.layer, op.groups, op.draws, g);
}

// scaling * (s + sigma * eps), the factor between h and u.
template <typename T>
SCALABL_BOTH T factor(T scaling, T s, T sigma, T eps) {
    return scaling * (s + sigma * eps);
}

// What one component of d contributes: dh, and ds (dsigma is ds * eps).
template <typename T>
SCALABL_BOTH void backward(T factor, T scaling, T h, T d, T &dh, T &ds) {
    dh = factor * d;
    ds = scaling * h * d;
}

// What products of T are summed in.
template <typename T>
struct Wide {
    typedef float type;
};
template <>
struct Wide<double> {
    typedef double type;
};

// fn(S()), S the type that a dtype names.
template <typename Fn>
void by_dtype(int32_t dtype, const Fn &fn) {
    switch (dtype) {
        case SCALABL_FLOAT64: return fn(double());
        case SCALABL_BFLOAT16: return fn(bfloat16());
        case SCALABL_FLOAT16: return fn(float16());
        default: return fn(float());
    }
}

// fn(S(), P()): S the type of the rows, P that of the adapter.
template <typename Fn>
void by_dtypes(const scalabl_update &op, const Fn &fn) {
    by_dtype(op.dtype, [&](auto row) {
        return op.adapter_dtype == SCALABL_FLOAT32 ? fn(row, float()) : fn(row, row);
    });
}

}  // namespace scalabl

// The formulas of the subspace-sampled low-rank update, once for host and device.
//
//     (1a)  y += B u,   u = f * h,   h = A x,   f = c (s + sigma * eps)      per row
//     (1b)  d = B^T g,   dh = f * d,   ds = c h * d                          g: the gradient of y
//     (1c)  grad x += A^T dh
//     (1d)  grad A = sum dh x^T,   grad B = sum g u^T                        over the rows
//     (1e)  grad s = sum ds,   grad sigma = sum ds * eps
//
// docs/method.md derives them. plain.cpp has all of them as loops. This file has the lines
// of (1a) and (1b) between the matrix products, which fast/ uses.
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

// The number of groups of rows_per_group rows each, without a sum that could overflow.
SCALABL_BOTH int64_t count_groups(int64_t rows, int64_t rows_per_group) {
    return rows / rows_per_group + (rows % rows_per_group != 0);
}

// The coordinates of the eps of the rows i with i / rows_per_group == g, if the update is noisy.
SCALABL_BOTH Coordinates coordinates(const scalabl_update &op, int64_t g) {
    return coordinates(op.seed, op.draw, op.layer, op.groups, op.draws, g);
}

// (1a) f = c (s + sigma * eps), the factor between h and u.
template <typename T>
SCALABL_BOTH T factor(T scaling, T s, T sigma, T eps) {
    return scaling * (s + sigma * eps);
}

// (1b) dh = f d, ds = c h d of one component.
template <typename T>
SCALABL_BOTH void backward(T factor, T scaling, T h, T d, T &dh, T &ds) {
    dh = factor * d;
    ds = scaling * h * d;
}

}  // namespace scalabl

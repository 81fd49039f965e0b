// The loops over single rows of the model's blocks, one table of them for each instruction set.
#pragma once

#include <stdint.h>

namespace scalabl {

// Rows of n floats. Outputs may not overlap inputs.
struct Elementwise {
    // The sum of x^2, and of w g x.
    float (*squares)(const float *x, int64_t n);
    float (*inner)(const float *w, const float *g, const float *x, int64_t n);
    // y = (a x) w
    void (*scaled)(const float *x, const float *w, float a, float *y, int64_t n);
    // y = a w g - b x
    void (*scaled_gradient)(const float *x, const float *w, const float *g, float a, float b,
                            float *y, int64_t n);
    // y = silu(gate) up, and the gradients of both
    void (*swiglu)(const float *gate, const float *up, float *y, int64_t n);
    void (*swiglu_gradients)(const float *g, const float *gate, const float *up, float *grad_gate,
                             float *grad_up, int64_t n);
    // RoPE of the pairs (i, i + n / 2), and its transpose; cos and sin have n elements
    void (*rotate)(const float *x, const float *cos, const float *sin, float *y, int64_t n);
    void (*rotate_back)(const float *x, const float *cos, const float *sin, float *y, int64_t n);
    // y = scale code; and of n / 2 bytes, y_(2j) and y_(2j + 1) = scale pairs[byte j] for an even n
    void (*codes)(const int8_t *code, float scale, float *y, int64_t n);
    void (*pairs)(const uint8_t *bytes, const float (*pairs)[2], float scale, float *y, int64_t n);
};

extern const Elementwise ELEMENTWISE_BASELINE, ELEMENTWISE_AVX2, ELEMENTWISE_AVX512;

}  // namespace scalabl

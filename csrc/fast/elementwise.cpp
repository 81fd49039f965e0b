// The loops of elementwise.h, which the compiler turns into vectors. Compiled once for each
// instruction set, as products.cpp is; no inline function of the standard library may be used here.
#include "elementwise.h"

#include "halves.h"

namespace scalabl {
namespace {

constexpr int64_t LANES = 32;  // partial sums, so that additions need not wait for each other

// The sum of term(0) .. term(n - 1).
template <typename Term>
float sum(int64_t n, const Term &term) {
    float part[LANES] = {};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int64_t lane = 0; lane < LANES; ++lane) part[lane] += term(j + lane);
    }
    for (int64_t lane = 0; j + lane < n; ++lane) part[lane] += term(j + lane);
    for (int64_t half = LANES / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    }
    return part[0];
}

// exp(x) for |x| <= 87, and that of the nearer end beyond: 2^n e^r with |r| <= ln(2) / 2 and the
// Taylor polynomial of degree 7, whose error is below 1e-8. NaN stays NaN.
inline float exponential(float x) {
    constexpr float LARGEST = 87.0f, SHIFT = 0x1.8p23f;  // x + SHIFT has no bits after the point
    constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;  // their sum is ln(2)
    x = x > LARGEST ? LARGEST : x;
    x = x < -LARGEST ? -LARGEST : x;
    const float shifted = x * 1.44269504f + SHIFT, n = shifted - SHIFT;
    const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

float squares(const float *x, int64_t n) {
    return sum(n, [=](int64_t j) { return x[j] * x[j]; });
}

float inner(const float *w, const float *g, const float *x, int64_t n) {
    return sum(n, [=](int64_t j) { return w[j] * g[j] * x[j]; });
}

void scaled(const float *x, const float *w, float a, float *__restrict y, int64_t n) {
    for (int64_t j = 0; j < n; ++j) y[j] = (a * x[j]) * w[j];
}

void scaled_gradient(const float *x, const float *w, const float *g, float a, float b,
                     float *__restrict y, int64_t n) {
    for (int64_t j = 0; j < n; ++j) y[j] = a * (w[j] * g[j]) - b * x[j];
}

void swiglu(const float *gate, const float *up, float *__restrict y, int64_t n) {
    for (int64_t j = 0; j < n; ++j) y[j] = gate[j] * sigmoid(gate[j]) * up[j];
}

void swiglu_gradients(const float *g, const float *gate, const float *up,
                      float *__restrict grad_gate, float *__restrict grad_up, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
        const float p = sigmoid(gate[j]);
        grad_gate[j] = g[j] * up[j] * p * (1.0f + gate[j] * (1.0f - p));
        grad_up[j] = g[j] * gate[j] * p;
    }
}

void rotate(const float *x, const float *cos, const float *sin, float *__restrict y, int64_t n) {
    const int64_t h = n / 2;
    for (int64_t j = 0; j < h; ++j) y[j] = x[j] * cos[j] - x[j + h] * sin[j];
    for (int64_t j = 0; j < h; ++j) y[j + h] = x[j + h] * cos[j + h] + x[j] * sin[j + h];
}

void rotate_back(const float *x, const float *cos, const float *sin, float *__restrict y,
                 int64_t n) {
    const int64_t h = n / 2;
    for (int64_t j = 0; j < h; ++j) y[j] = x[j] * cos[j] + x[j + h] * sin[j + h];
    for (int64_t j = 0; j < h; ++j) y[j + h] = x[j + h] * cos[j + h] - x[j] * sin[j];
}

void codes(const int8_t *code, float scale, float *__restrict y, int64_t n) {
    for (int64_t j = 0; j < n; ++j) y[j] = static_cast<float>(code[j]) * scale;
}

void pairs(const uint8_t *bytes, const float (*pairs)[2], float scale, float *__restrict y,
           int64_t n) {
    for (int64_t j = 0; j < n / 2; ++j) memcpy(y + 2 * j, pairs[bytes[j]], sizeof *pairs);
    for (int64_t j = 0; j < n; ++j) y[j] *= scale;
}

}  // namespace

extern const Elementwise SCALABL_ELEMENTWISE = {
    squares, inner,       scaled, scaled_gradient, swiglu, swiglu_gradients,
    rotate,  rotate_back, codes,  pairs,
};

}  // namespace scalabl

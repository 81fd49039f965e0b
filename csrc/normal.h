// Four Philox words to four standard normals: Box-Muller in double precision, rounded once. The
// steps are those of docs/conformance.md, which derives the error: (1/2 + 2^-25) ulp.
//
// ln, sin and cos are written out in + - * / and sqrt, each of which IEEE 754 rounds correctly, in
// the order of scalabl_ref/core/philox.py. Every bit is therefore the same as there. The compiler
// must not contract a product and a sum (-ffp-contract=off).
#pragma once

#include <math.h>
#include <stdint.h>

#include "philox.h"

namespace scalabl {

constexpr double SQRT_HALF = 0x1.6a09e667f3bcdp-1;
constexpr double LN_2 = 0x1.62e42fefa39efp-1;
constexpr double TURN = 0x1.921fb54442d18p-30;  // 2 pi / 2^32

// sum_k c[k] z^k by Horner's rule, highest power first.
template <int N>
SCALABL_BOTH double polynomial(const double (&c)[N], double z) {
    double value = c[N - 1];
    for (int k = N - 2; k >= 0; --k) value = value * z + c[k];
    return value;
}

// Step 2: ln u of u = m 2^e with m in [sqrt 1/2, sqrt 2): e ln 2 + 2 atanh((m - 1) / (m + 1)).
SCALABL_BOTH double ln(double u) {
    // atanh(f) / f = sum f^2k / (2k + 1)
    constexpr double ATANH[] = {1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,
                                1.0 / 9.0,  1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0,
                                1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0};
    int e;
    double m = frexp(u, &e);
    if (m < SQRT_HALF) {
        m = m + m;
        e = e - 1;
    }
    const double f = (m - 1.0) / (m + 1.0);
    return e * LN_2 + (f + f) * polynomial(ATANH, f * f);
}

// Steps 3 and 4: cos and sin of 2 pi word / 2^32. Whole quarter turns are subtracted exactly,
// as integers.
SCALABL_BOTH void cos_sin(uint32_t word, double &cos, double &sin) {
    // sin(x) / x = sum (-x^2)^k / (2k + 1)!;  cos(x) = sum (-x^2)^k / (2k)!
    constexpr double SIN[] = {1.0,                -1.0 / 6.0,        1.0 / 120.0,
                              -1.0 / 5040.0,      1.0 / 362880.0,    -1.0 / 39916800.0,
                              1.0 / 6227020800.0, -1.0 / 1307674368000.0,
                              1.0 / 355687428096000.0};
    constexpr double COS[] = {1.0,               -1.0 / 2.0,     1.0 / 24.0,
                              -1.0 / 720.0,      1.0 / 40320.0,  -1.0 / 3628800.0,
                              1.0 / 479001600.0, -1.0 / 87178291200.0,
                              1.0 / 20922789888000.0};
    const int64_t quarter = (static_cast<int64_t>(word) + (1 << 29)) >> 30;  // step 3: 0 to 4
    const double x = static_cast<double>(word - (quarter << 30)) * TURN;
    const double c = polynomial(COS, x * x), s = x * polynomial(SIN, x * x);  // step 4
    const bool odd = quarter & 1, upper = quarter & 2;
    cos = odd ? -s : c;
    sin = odd ? c : s;
    if (upper) {
        cos = -cos;
        sin = -sin;
    }
}

// radius = sqrt(-2 ln((a + 1/2) / 2^32)), angle = 2 pi b / 2^32; z = (radius cos, radius sin), as
// doubles or rounded to float.
template <typename T>
SCALABL_BOTH void box_muller(uint32_t a, uint32_t b, T *z) {
    const double radius = sqrt(-2.0 * ln((a + 0.5) * 0x1p-32));  // step 2
    double cos, sin;
    cos_sin(b, cos, sin);                 // steps 3 and 4
    z[0] = static_cast<T>(radius * cos);  // step 5
    z[1] = static_cast<T>(radius * sin);
}

// The coordinates of one group's eps in the noise.
struct Coordinates {
    uint64_t seed;
    uint32_t draw, layer, group;

    SCALABL_MEMBER bool operator==(const Coordinates &at) const {
        return seed == at.seed && draw == at.draw && layer == at.layer && group == at.group;
    }
};

// The coordinates of entry g of a list: group groups[g] (g if groups is null), draw
// draw + draws[g] (draw if draws is null). Both are taken modulo 2^32.
SCALABL_BOTH Coordinates coordinates(uint64_t seed, uint32_t draw, uint32_t layer,
                                     const int64_t *groups, const int64_t *draws, int64_t g) {
    return {seed, draw + (draws ? static_cast<uint32_t>(draws[g]) : 0u), layer,
            static_cast<uint32_t>(groups ? groups[g] : g)};
}

// Components 4 * block .. 4 * block + 3 of eps.
SCALABL_BOTH void normal4(const Coordinates &at, uint32_t block, float *z) {
    const Block counter = {{block, at.group, at.layer, at.draw}};  // step 1
    const Block w = philox4x32(counter, static_cast<uint32_t>(at.seed),
                               static_cast<uint32_t>(at.seed >> 32), 10);
    box_muller(w.word[0], w.word[1], z);
    box_muller(w.word[2], w.word[3], z + 2);
}

// The first `rank` components of eps; of the last block perhaps only a part.
SCALABL_BOTH void normal_row(const Coordinates &at, int64_t rank, float *row) {
    float z[4];
    for (int64_t k = 0; k < rank; ++k) {
        if (k % 4 == 0) normal4(at, static_cast<uint32_t>(k / 4), z);
        row[k] = z[k % 4];
    }
}

}  // namespace scalabl

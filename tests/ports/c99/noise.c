#include "noise.h"

#include <float.h>
#include <math.h>

#if FLT_EVAL_METHOD != 0
#error "doubles are computed wider than 64 bits here (x87?): the last bits of the noise would differ"
#endif

/* The file must be compiled without fused multiply-add: -ffp-contract=off. */

static uint32_t high_word(uint64_t p)
{
    return (uint32_t)(p >> 32);
}

static uint32_t low_word(uint64_t p)
{
    return (uint32_t)(p & 0xFFFFFFFF);
}

void philox4x32(const uint32_t counter[4], const uint32_t key[2], size_t rounds, uint32_t words[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    size_t i;

    for (i = 0; i < rounds; i++) {
        uint64_t p = (uint64_t)0xD2511F53 * c0;
        uint64_t q = (uint64_t)0xCD9E8D57 * c2;
        c0 = high_word(q) ^ c1 ^ k0;
        c1 = low_word(q);
        c2 = high_word(p) ^ c3 ^ k1;
        c3 = low_word(p);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

static void block(uint64_t seed, const uint32_t counter[4], uint32_t words[4])
{
    uint32_t key[2];

    key[0] = low_word(seed);
    key[1] = high_word(seed);
    philox4x32(counter, key, 10, words);
}

/* Step 2. */
static double radius_of(uint32_t a)
{
    static const double L[11] = {
        1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21
    };
    double u = ((double)a + 0.5) * 0x1p-32;
    int e, k;
    double m = frexp(u, &e);
    double f, t, p, l;

    if (m < 0x1.6a09e667f3bcdp-1) {
        m = m + m;
        e = e - 1;
    }
    f = (m - 1) / (m + 1);
    t = f * f;
    p = L[10];
    for (k = 9; k >= 0; k--) {
        p = p * t + L[k];
    }
    l = e * 0x1.62e42fefa39efp-1 + (f + f) * p;
    return sqrt(-2 * l);
}

/* C[k] and S[k] of step 4: one division each, of an integer that a double holds exactly. */
static double polynomial(const double coefficients[9], double t)
{
    double p = coefficients[8];
    int k;

    for (k = 7; k >= 0; k--) {
        p = p * t + coefficients[k];
    }
    return p;
}

/* Steps 3 and 4. */
static void angle_of(uint32_t b, double *cosine, double *sine)
{
    static const double C[9] = {
        1.0, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600,
        -1.0 / 87178291200.0, 1.0 / 20922789888000.0
    };
    static const double S[9] = {
        1.0, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800.0,
        -1.0 / 1307674368000.0, 1.0 / 355687428096000.0
    };
    int64_t quarter = (int64_t)(((uint64_t)b + 0x20000000) >> 30);
    double x = (double)((int64_t)b - quarter * 0x40000000) * 0x1.921fb54442d18p-30;
    double t = x * x;
    double c = polynomial(C, t);
    double s = x * polynomial(S, t);

    switch (quarter % 4) {
    case 0:
        *cosine = c;
        *sine = s;
        break;
    case 1:
        *cosine = -s;
        *sine = c;
        break;
    case 2:
        *cosine = -c;
        *sine = -s;
        break;
    default:
        *cosine = s;
        *sine = -c;
    }
}

/* Step 5, without its rounding. */
void box_muller(uint32_t a, uint32_t b, double *even, double *odd)
{
    double radius = radius_of(a);
    double cosine, sine;

    angle_of(b, &cosine, &sine);
    *even = radius * cosine;
    *odd = radius * sine;
}

void noise_normal(const struct noise *noise, uint32_t layer, uint32_t group, size_t rank, double *eps)
{
    uint32_t counter[4], words[4];
    double four[4];
    size_t k;

    for (k = 0; k < rank; k++) {
        if (k % 4 == 0) {
            counter[0] = (uint32_t)(k / 4);
            counter[1] = group;
            counter[2] = layer;
            counter[3] = noise->draw;
            block(noise->seed, counter, words);
            box_muller(words[0], words[1], &four[0], &four[1]);
            box_muller(words[2], words[3], &four[2], &four[3]);
        }
        eps[k] = (double)(float)four[k % 4];
    }
}

uint32_t stream_word(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t counter[4], words[4];

    counter[0] = (uint32_t)(index / 4);
    counter[1] = low_word(stream);
    counter[2] = 0xFFFFFFFF;
    counter[3] = high_word(stream);
    block(seed, counter, words);
    return words[index % 4];
}

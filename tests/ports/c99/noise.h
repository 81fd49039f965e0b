/* Noise, version 1: docs/conformance.md, "Noise, version 1", steps 1 to 5. */
#ifndef NOISE_H
#define NOISE_H

#include <stddef.h>
#include <stdint.h>

struct noise {
    uint64_t seed;
    uint32_t draw;
};

/* Step 1, with 10 rounds (7 for the known answers). */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], size_t rounds, uint32_t words[4]);

/* Steps 2 to 5, before the rounding to float32. */
void box_muller(uint32_t a, uint32_t b, double *even, double *odd);

/* eps[0 .. rank - 1] of one group, each rounded to float32 (a double holds that exactly). */
void noise_normal(const struct noise *noise, uint32_t layer, uint32_t group, size_t rank, double *eps);

/* "Other random numbers": word `index` of a stream; index < 2^34. */
uint32_t stream_word(uint64_t seed, uint64_t stream, uint64_t index);

#endif

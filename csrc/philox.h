// Philox 4x32: a bijection of 128-bit counters under a 64-bit key, good enough to serve as a random
// function (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11).
// It has no state: the counter and the key alone determine the words, in any order of calls.
#pragma once

#include <stdint.h>

#include "both.h"

namespace scalabl {

struct Block {
    uint32_t word[4];
};

// The 64-bit product of two words, as a high and a low word.
SCALABL_BOTH void multiply(uint32_t a, uint32_t b, uint32_t &high, uint32_t &low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
}

// Step 1 of docs/conformance.md: a counter to four words, in `rounds` rounds under the key
// (k0, k1). Sums of words wrap at 2^32.
SCALABL_BOTH Block philox4x32(Block counter, uint32_t k0, uint32_t k1, int rounds) {
    uint32_t *c = counter.word;
    for (int round = 0; round < rounds; ++round) {
        uint32_t hi0, lo0, hi1, lo1;
        multiply(0xD2511F53u, c[0], hi0, lo0);
        multiply(0xCD9E8D57u, c[2], hi1, lo1);
        const Block next = {{hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0}};
        counter = next;
        k0 += 0x9E3779B9u;  // golden ratio
        k1 += 0xBB67AE85u;  // sqrt(3) - 1
    }
    return counter;
}

}  // namespace scalabl

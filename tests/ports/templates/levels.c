/*
 * A port to C99 begins here: reads the cases, computes the level philox, and stores the results.
 *
 *     cc -std=c99 -O2 -ffp-contract=off -I../c99 -o port levels.c \
 *         ../c99/port.c ../c99/case.c ../c99/json.c ../c99/support.c ../c99/tensors.c -lm
 *     ./port VECTORS_DIR RESULTS.safetensors
 *
 * The files of ../c99 read and write, and loop over the cases. case.h has the functions that give
 * parameters and inputs, and store outputs. Add a function for each level to `levels`.
 */
#include "levels.h"

#include <string.h>

/* Step 1 of docs/conformance.md. */
static void philox4x32(const uint32_t counter[4], const uint32_t key[2], size_t rounds, uint32_t c[4])
{
    uint32_t k0 = key[0], k1 = key[1];

    memcpy(c, counter, 4 * sizeof *c);
    while (rounds-- > 0) {
        uint64_t p = (uint64_t)0xD2511F53 * c[0], q = (uint64_t)0xCD9E8D57 * c[2];
        c[0] = (uint32_t)(q >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)q;
        c[2] = (uint32_t)(p >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)p;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

static void run_philox(const struct kit_case *c)
{
    const struct tensor *counter = shaped(c, "counter", 2);
    size_t n = counter->shape[0], i, j;
    const uint32_t *counters = words_of(c, "counter", product(4, n));
    const uint32_t *keys = words_of(c, "key", product(2, n));
    int64_t *result = pool_take(c->pool, product(4, n), sizeof *result);

    for (i = 0; i < n; i++) {
        uint32_t words[4];
        philox4x32(counters + 4 * i, keys + 2 * i, whole(c, "rounds", 1), words);
        for (j = 0; j < 4; j++) {
            result[4 * i + j] = words[j];
        }
    }
    store_integers(c, "words", 2, counter->shape, result);
}

/* 0 for a level that is not computed yet. */
int run_case(const struct kit_case *c)
{
    static const struct {
        const char *level;
        void (*run)(const struct kit_case *c);
    } levels[] = {
        {"philox", run_philox},
    };
    size_t i;

    for (i = 0; i < sizeof levels / sizeof levels[0]; i++) {
        if (strcmp(c->level, levels[i].level) == 0) {
            levels[i].run(c);
            return 1;
        }
    }
    return 0;
}

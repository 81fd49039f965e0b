/* The native core as a plain C interface: for Python (bindings.cpp), and for C, JAX or anything
 * else that can call C. No exception leaves it; every function says with a status how it went. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    SCALABL_OK = 0,
    SCALABL_NULL = 1,   /* a pointer is null */
    SCALABL_ROUNDS = 2, /* rounds outside 1 .. 16 */
    SCALABL_LAYER = 3,  /* layer id 2^32 - 1 */
    SCALABL_COUNT = 4,  /* a negative number of groups, or more than 2^32 */
    SCALABL_GROUP = 5,  /* a group id outside [0, 2^32) */
    SCALABL_RANK = 6    /* rank outside 1 .. 2^34 */
} scalabl_status;

/* One sentence on a status; "unknown status" for a number that is none. Never null, never freed. */
const char *scalabl_message(int status);

/* The Philox 4x32 block function: counter (4 words), key (2 words) -> out (4 words). */
scalabl_status scalabl_philox4x32(const uint32_t *counter, const uint32_t *key, int rounds,
                                  uint32_t *out);

/* Two words to two standard normals before they are rounded: out (2 doubles). For whoever compares
 * a port with this one, since rounding to float hides nearly every difference. */
scalabl_status scalabl_box_muller(uint32_t a, uint32_t b, double *out);

/* eps of `count` groups of one layer, row-major (count, rank), version 1 of docs/conformance.md.
 * groups: `count` ids in [0, 2^32). On a bad argument nothing is written. */
scalabl_status scalabl_normals(uint64_t seed, uint32_t draw, uint32_t layer, const int64_t *groups,
                               int64_t count, int64_t rank, float *out);

/* What this binary was built from (sha256, see CMakeLists.txt) and by which compiler. */
const char *scalabl_digest(void);
const char *scalabl_compiler(void);

#ifdef __cplusplus
}
#endif

// The C interface on the CPU.
#include "scalabl.h"

#include <algorithm>

#include "normal.h"

namespace {

constexpr int64_t WORDS = int64_t{1} << 32;

scalabl_status check_normals(uint32_t layer, const int64_t *groups, int64_t count, int64_t rank,
                             const float *out) {
    if (layer == UINT32_MAX) return SCALABL_LAYER;
    if (count < 0 || count > WORDS) return SCALABL_COUNT;
    if (rank < 1 || rank > 4 * WORDS) return SCALABL_RANK;
    if (count > 0 && (!groups || !out)) return SCALABL_NULL;
    const auto in_range = [](int64_t id) { return 0 <= id && id < WORDS; };
    return std::all_of(groups, groups + count, in_range) ? SCALABL_OK : SCALABL_GROUP;
}

// The first `rank` components of one group; the last block may be needed in part only.
void normal_row(const scalabl::Coordinates &at, uint32_t group, int64_t rank, float *row) {
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) {
        scalabl::normal4(at, group, static_cast<uint32_t>(k / 4), row + k);
    }
    if (k < rank) {
        float last[4];
        scalabl::normal4(at, group, static_cast<uint32_t>(k / 4), last);
        std::copy(last, last + (rank - k), row + k);
    }
}

}  // namespace

const char *scalabl_message(int status) {
    switch (status) {
        case SCALABL_OK: return "no error";
        case SCALABL_NULL: return "a pointer is null";
        case SCALABL_ROUNDS: return "rounds must be in [1, 16]";
        case SCALABL_LAYER: return "layer must be in [0, 2^32 - 1)";
        case SCALABL_COUNT: return "the number of groups must be in [0, 2^32]";
        case SCALABL_GROUP: return "group id must be in [0, 2^32)";
        case SCALABL_RANK: return "rank must be in [1, 2^34]";
    }
    return "unknown status";
}

scalabl_status scalabl_philox4x32(const uint32_t *counter, const uint32_t *key, int rounds,
                                  uint32_t *out) {
    if (!counter || !key || !out) return SCALABL_NULL;
    if (rounds < 1 || rounds > 16) return SCALABL_ROUNDS;
    const scalabl::Block block = {{counter[0], counter[1], counter[2], counter[3]}};
    const scalabl::Block words = scalabl::philox4x32(block, key[0], key[1], rounds);
    std::copy(words.word, words.word + 4, out);
    return SCALABL_OK;
}

scalabl_status scalabl_box_muller(uint32_t a, uint32_t b, double *out) {
    if (!out) return SCALABL_NULL;
    scalabl::box_muller(a, b, out);
    return SCALABL_OK;
}

scalabl_status scalabl_normals(uint64_t seed, uint32_t draw, uint32_t layer, const int64_t *groups,
                               int64_t count, int64_t rank, float *out) {
    const scalabl_status status = check_normals(layer, groups, count, rank, out);
    if (status != SCALABL_OK) return status;
    const scalabl::Coordinates at = {seed, draw, layer};
    for (int64_t g = 0; g < count; ++g) {
        normal_row(at, static_cast<uint32_t>(groups[g]), rank, out + g * rank);
    }
    return SCALABL_OK;
}

const char *scalabl_digest(void) { return SCALABL_DIGEST; }

const char *scalabl_compiler(void) { return SCALABL_COMPILER; }

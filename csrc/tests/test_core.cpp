// The noise through the C interface, without Python: known answers and bad arguments.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "known_answers.h"
#include "scalabl.h"

static void test_known_answers() {
    for (const KnownAnswer &known : KNOWN) {
        uint32_t out[4];
        CHECK(scalabl_philox4x32(known.counter, known.key, known.rounds, out) == SCALABL_OK);
        CHECK(std::memcmp(out, known.answer, sizeof out) == 0);
    }
}

static void test_philox_bad_arguments() {
    const uint32_t counter[4] = {}, key[2] = {};
    uint32_t out[4];
    CHECK(scalabl_philox4x32(nullptr, key, 10, out) == SCALABL_NULL);
    CHECK(scalabl_philox4x32(counter, nullptr, 10, out) == SCALABL_NULL);
    CHECK(scalabl_philox4x32(counter, key, 10, nullptr) == SCALABL_NULL);
    CHECK(scalabl_philox4x32(counter, key, 0, out) == SCALABL_ROUNDS);
    CHECK(scalabl_philox4x32(counter, key, 17, out) == SCALABL_ROUNDS);
}

// Before rounding: the worked example of docs/conformance.md, and three pairs of words whose last
// bits a fused multiply-add changes (one pair in ten is such).
static void test_box_muller() {
    const uint32_t words[][2] = {{0x38a35434, 0x6c19612b}, {0xbe898f2d, 0xc2eea5ae},
                                 {0x210b1ead, 0x33308b2b}, {0x7db2cd8d, 0x4fd56383},
                                 {0x8b0c4216, 0xa289127d}, {0x5a16239c, 0x1bfaea4b},
                                 {0x93124e3c, 0xa364d46b}};
    const double normals[][2] = {{-0x1.88a9c8e85fbc4p+0, 0x1.a14fe5065a0d6p-1},
                                 {0x1.c4b57984ed2f3p-5, -0x1.8879ba3089ad7p-1},
                                 {0x1.4068970ff0afcp-1, 0x1.eca1921c8aba3p+0},
                                 {-0x1.cec67c700f47dp-2, 0x1.1a91b7b9e17c5p+0},
                                 {-0x1.765a3ed2434c4p-1, -0x1.a81a9a723465bp-1},
                                 {0x1.1e1ed820b6ba7p+0, 0x1.d528cbd42cc26p-1},
                                 {-0x1.5c23edf2bc3a5p-1, -0x1.9b91c652d0eccp-1}};
    for (int i = 0; i < 7; ++i) {
        double z[2];
        CHECK(scalabl_box_muller(words[i][0], words[i][1], z) == SCALABL_OK);
        CHECK(z[0] == normals[i][0] && z[1] == normals[i][1]);
    }
    CHECK(scalabl_box_muller(0, 0, nullptr) == SCALABL_NULL);
}

// Every rank's rows are prefixes of the longest rank's, wherever the group stands in the list; the
// exact sizes let the sanitizers see a write past the end.
static void test_rows_do_not_depend_on_rank_or_place() {
    const int64_t groups[] = {int64_t{F}, 0, 5, 0};
    const int64_t longest = 9;
    std::vector<float> all(4 * longest);
    CHECK(scalabl_normals(1, 2, 3, groups, nullptr, 4, longest, all.data()) == SCALABL_OK);
    CHECK(std::memcmp(&all[longest], &all[3 * longest], longest * sizeof(float)) == 0);
    CHECK(std::memcmp(&all[0], &all[longest], longest * sizeof(float)) != 0);
    for (int64_t rank = 1; rank < longest; ++rank) {
        std::vector<float> rows(4 * rank);
        CHECK(scalabl_normals(1, 2, 3, groups, nullptr, 4, rank, rows.data()) == SCALABL_OK);
        for (int64_t g = 0; g < 4; ++g) {
            CHECK(std::memcmp(&rows[g * rank], &all[g * longest], rank * sizeof(float)) == 0);
        }
    }
}

// Entry g of draws counts from `draw`; a repeated pair of group and draw is the same row.
static void test_later_draws() {
    const int64_t groups[] = {5, 5, 5, 5, 6}, draws[] = {0, 3, 3, 0, 0};
    std::vector<float> all(5 * 6), now(6), then(6), other(6);
    CHECK(scalabl_normals(1, 2, 3, groups, draws, 5, 6, all.data()) == SCALABL_OK);
    CHECK(scalabl_normals(1, 2, 3, groups, nullptr, 1, 6, now.data()) == SCALABL_OK);
    CHECK(scalabl_normals(1, 5, 3, groups, nullptr, 1, 6, then.data()) == SCALABL_OK);
    CHECK(scalabl_normals(1, 2, 3, groups + 4, nullptr, 1, 6, other.data()) == SCALABL_OK);
    const std::vector<float> *expected[] = {&now, &then, &then, &now, &other};
    for (int64_t g = 0; g < 5; ++g) {
        CHECK(std::memcmp(&all[g * 6], expected[g]->data(), 6 * sizeof(float)) == 0);
    }
}

static void test_normals_bad_arguments() {
    const int64_t good[] = {0}, low[] = {-1}, high[] = {int64_t{1} << 32}, one[] = {1};
    float out[1] = {7.0f};
    const auto normals = [&](uint32_t draw, uint32_t layer, const int64_t *groups,
                             const int64_t *draws, int64_t count, int64_t rank) {
        return scalabl_normals(0, draw, layer, groups, draws, count, rank, out);
    };
    CHECK(normals(0, F, good, nullptr, 1, 1) == SCALABL_LAYER);
    CHECK(normals(0, 0, good, nullptr, -1, 1) == SCALABL_COUNT);
    CHECK(normals(0, 0, good, nullptr, (int64_t{1} << 32) + 1, 1) == SCALABL_COUNT);
    CHECK(normals(0, 0, good, nullptr, 1, 0) == SCALABL_RANK);
    CHECK(normals(0, 0, good, nullptr, 1, (int64_t{1} << 34) + 1) == SCALABL_RANK);
    CHECK(normals(0, 0, low, nullptr, 1, 1) == SCALABL_GROUP);
    CHECK(normals(0, 0, high, nullptr, 1, 1) == SCALABL_GROUP);
    CHECK(normals(0, 0, good, low, 1, 1) == SCALABL_DRAW);
    CHECK(normals(0, 0, good, high, 1, 1) == SCALABL_DRAW);
    CHECK(normals(F, 0, good, one, 1, 1) == SCALABL_DRAW);
    CHECK(normals(0, 0, nullptr, nullptr, 1, 1) == SCALABL_NULL);
    CHECK(scalabl_normals(0, 0, 0, good, nullptr, 1, 1, nullptr) == SCALABL_NULL);
    CHECK(out[0] == 7.0f);
    CHECK(normals(F, 0, good, good, 1, 1) == SCALABL_OK);  // the last draw that there is
    CHECK(scalabl_normals(0, 0, 0, nullptr, nullptr, 0, 1, nullptr) == SCALABL_OK);
}

static void test_messages() {
    for (int status = SCALABL_OK; status <= SCALABL_DRAW; ++status) {
        CHECK(std::strcmp(scalabl_message(status), "unknown status") != 0);
    }
    CHECK(std::strcmp(scalabl_message(-1), "unknown status") == 0);
    CHECK(std::strlen(scalabl_digest()) == 64);
}

int main() {
    test_known_answers();
    test_philox_bad_arguments();
    test_box_muller();
    test_rows_do_not_depend_on_rank_or_place();
    test_later_draws();
    test_normals_bad_arguments();
    test_messages();
    std::printf("%d failures\n", failures);
    return failures != 0;
}

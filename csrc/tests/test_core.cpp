// The noise through the C interface, without Python: known answers and bad arguments.
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "known_answers.h"
#include "scalabl.h"

static void test_known_answers() {
    const KnownAnswers known = known_answers();
    CHECK(known.philox.size() == 6);
    for (const PhiloxAnswer &answer : known.philox) {
        uint32_t out[4];
        CHECK(scalabl_philox4x32(answer.counter, answer.key, answer.rounds, out) == SCALABL_OK);
        CHECK(std::memcmp(out, answer.words, sizeof out) == 0);
    }
    CHECK(known.box_muller.size() == 7);
    for (const BoxMullerAnswer &answer : known.box_muller) {
        double z[2];
        CHECK(scalabl_box_muller(answer.words[0], answer.words[1], z) == SCALABL_OK);
        CHECK(z[0] == answer.normals[0] && z[1] == answer.normals[1]);
    }
    CHECK(scalabl_box_muller(0, 0, nullptr) == SCALABL_NULL);
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
    test_rows_do_not_depend_on_rank_or_place();
    test_later_draws();
    test_normals_bad_arguments();
    test_messages();
    return end_of_checks();
}

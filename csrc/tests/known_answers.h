// Known answers of the noise, read from the file that the Python tests read too.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <vector>

constexpr uint32_t F = 0xffffffff;

// Philox4x32: the words of a counter and a key.
struct PhiloxAnswer {
    int rounds;
    uint32_t counter[4], key[2], words[4];
};

// Box-Muller: two normals of two words, before the last rounding.
struct BoxMullerAnswer {
    uint32_t words[2];
    double normals[2];
};

struct KnownAnswers {
    std::vector<PhiloxAnswer> philox;
    std::vector<BoxMullerAnswer> box_muller;
};

// Empty lists if the file cannot be read: the tests ask how many answers there are.
inline KnownAnswers known_answers() {
    KnownAnswers all;
    std::FILE *file = std::fopen(SCALABL_KNOWN_ANSWERS, "r");
    char line[256];
    while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
        PhiloxAnswer p;
        uint32_t *c = p.counter, *k = p.key, *w = p.words;
        if (std::sscanf(line,
                        "philox4x32 %d %" SCNx32 " %" SCNx32 " %" SCNx32 " %" SCNx32 " %" SCNx32
                        " %" SCNx32 " %" SCNx32 " %" SCNx32 " %" SCNx32 " %" SCNx32,
                        &p.rounds, c, c + 1, c + 2, c + 3, k, k + 1, w, w + 1, w + 2, w + 3) == 11) {
            all.philox.push_back(p);
        }
        BoxMullerAnswer b;
        if (std::sscanf(line, "box_muller %" SCNx32 " %" SCNx32 " %la %la", b.words, b.words + 1,
                        b.normals, b.normals + 1) == 4) {
            all.box_muller.push_back(b);
        }
    }
    if (file != nullptr) std::fclose(file);
    return all;
}

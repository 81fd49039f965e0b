// No test framework: each check that fails prints its line, and the program ends with status 1 after
// a hundred of them, or at its end if there was one.
#pragma once

#include <cstdio>
#include <cstdlib>

static int failures = 0;

#define CHECK(condition)                                                \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            if (++failures == 100) std::exit(1);                        \
        }                                                               \
    } while (0)

// What main returns.
static inline int end_of_checks() {
    std::printf("%d failures\n", failures);
    return failures != 0;
}

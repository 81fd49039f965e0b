// No test framework: each check that fails prints its line, and the number of failures is the exit
// status.
#pragma once

#include <cstdio>

static int failures = 0;

#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition)) {                                                \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            ++failures;                                                    \
        }                                                                  \
    } while (0)

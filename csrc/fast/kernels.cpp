// The choice of the instruction set, made when the library is loaded.
#include "kernels.h"

#include <cstring>

#include "cpu.h"

namespace scalabl {
namespace {

const Kernels *best_kernels() {
#ifdef SCALABL_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return &AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &AVX2;
#endif
    return &BASELINE;
}

const Kernels *chosen = best_kernels();

}  // namespace

const Kernels &kernels() { return *chosen; }

namespace cpu {

const char *isa() { return chosen->name; }

bool use_isa(const char *name) {
    const Kernels *known[] = {
#ifdef SCALABL_X86
        &AVX512, &AVX2,
#endif
        &BASELINE};
    bool reachable = false;  // the table is ordered: the machine's best and all after it can run
    for (const Kernels *candidate : known) {
        reachable = reachable || candidate == best_kernels();
        if (reachable && std::strcmp(candidate->name, name) == 0) {
            chosen = candidate;
            return true;
        }
    }
    return false;
}

}  // namespace cpu
}  // namespace scalabl

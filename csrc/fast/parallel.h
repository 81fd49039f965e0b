// Threads: OpenMP's pool where it was found (PyTorch's own, if that was imported first, since both
// then resolve to the same libgomp), else one std::thread per worker.
#pragma once

#include <atomic>
#include <cstdint>

#ifndef _OPENMP
#include <thread>
#include <vector>
#endif

namespace scalabl {

// work(0) .. work(count - 1), each once, by at most `threads` threads, in no particular order. The
// items must not touch each other's output; then the result does not depend on `threads`.
// `work` must not throw.
template <typename Work>
void parallel(int64_t count, int threads, const Work &work) {
    const int team = static_cast<int>(count < threads ? count : threads);
    if (team <= 1) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) work(i);
#else
    std::atomic<int64_t> next{0};
    const auto worker = [&] {
        for (int64_t i = next++; i < count; i = next++) work(i);
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(team - 1));
    try {
        while (static_cast<int>(others.size()) < team - 1) others.emplace_back(worker);
    } catch (...) {  // no more threads available: the existing ones do all work
    }
    worker();
    for (std::thread &other : others) other.join();
#endif
}

}  // namespace scalabl

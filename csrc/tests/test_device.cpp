// The kernels of device.h on the host, against plain.cpp: a grid walked block by block, step by
// step, thread by thread. cuda.cu runs the same indices, tails, strides, scratch space and noise.
#include <cstring>
#include <memory>

#include "compare.h"
#include "fast/device.h"
#include "known_answers.h"

namespace {

using scalabl::device::Place;
using scalabl::device::THREADS;

// Threads run backwards in every other block, so that an order that matters would show.
struct OnHost {
    template <typename Kernel>
    void operator()(const Kernel &kernel, int64_t x, int64_t y) const {
        for (int64_t b = 0; b < x * y; ++b) {
            const auto shared = std::make_unique<typename Kernel::Shared>();
            const int64_t steps = kernel.steps();
            for (int64_t step = 0; step < steps; ++step) {
                for (int i = 0; i < THREADS; ++i) {
                    const int thread = b % 2 ? THREADS - 1 - i : i;
                    kernel.step(step, Place{thread, b % x, b / x}, *shared);
                }
            }
        }
    }
};

// The scratch space has exactly the bytes that were asked for.
template <typename Run>
scalabl_status with_scratch(const Run &run) {
    const int64_t bytes = run(nullptr);
    const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(bytes)]);
    std::memset(scratch.get(), 0xff, static_cast<size_t>(bytes));  // NaN, if it is read unwritten
    CHECK(run(scratch.get()) == bytes);
    return SCALABL_OK;
}

scalabl_status forward(const scalabl_update &op, void *y, int64_t y_stride, void *h) {
    return with_scratch([&](void *scratch) {
        return scalabl::device::forward(op, y, y_stride, h, scratch, OnHost());
    });
}

scalabl_status backward(const scalabl_update &op, const void *grad_y, int64_t grad_y_stride,
                        const void *h, void *grad_x, int64_t grad_x_stride, void *grad_A,
                        void *grad_B, void *grad_s, void *grad_sigma) {
    const scalabl::Gradients out = {grad_x, grad_x_stride, grad_A, grad_B, grad_s, grad_sigma};
    return with_scratch([&](void *scratch) {
        return scalabl::device::backward(op, grad_y, grad_y_stride, h, out, scratch, OnHost());
    });
}

// The headers as the kernels include them: Random123's answers, and the noise of the C interface.
void test_noise() {
    const KnownAnswers known = known_answers();
    CHECK(known.philox.size() == 6);
    for (const PhiloxAnswer &answer : known.philox) {
        const uint32_t *c = answer.counter;
        const scalabl::Block words = scalabl::philox4x32({{c[0], c[1], c[2], c[3]}}, answer.key[0],
                                                         answer.key[1], answer.rounds);
        CHECK(std::memcmp(words.word, answer.words, sizeof answer.words) == 0);
    }
    for (uint32_t group = 0; group < 1000; ++group) {
        const int64_t id = int64_t{group} * 4294967;
        float z[4], expected[4];
        scalabl::normal4({~uint64_t{group}, group, 7, static_cast<uint32_t>(id)}, 0, z);
        CHECK(scalabl_normals(~uint64_t{group}, group, 7, &id, nullptr, 1, 4, expected) == 0);
        CHECK(std::memcmp(z, expected, sizeof z) == 0);
    }
}

// Every subset of the gradients, and the forward pass without h.
void test_absent_outputs() {
    Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, 21, 30, 19, 5, 2, 4);
    Matrix h(SCALABL_FLOAT32, 21, 5), y = p.y, other = p.y;
    CHECK(forward(p.op, y.data(), y.stride, h.data()) == SCALABL_OK);
    CHECK(forward(p.op, other.data(), other.stride, nullptr) == SCALABL_OK);
    CHECK(std::memcmp(y.data(), other.data(), y.bytes.size()) == 0);
    std::vector<std::vector<char>> whole;
    for (int wanted = 31; wanted > 0; --wanted) {
        Matrix g[] = {p.grad_x, Matrix(SCALABL_FLOAT32, 5, 30), Matrix(SCALABL_FLOAT32, 19, 5),
                      Matrix(SCALABL_FLOAT32, 1, 5), Matrix(SCALABL_FLOAT32, 1, 5)};
        void *to[5];
        for (int i = 0; i < 5; ++i) to[i] = wanted >> i & 1 ? g[i].data() : nullptr;
        CHECK(backward(p.op, p.grad_y.data(), p.grad_y.stride, h.data(), to[0], g[0].stride, to[1],
                       to[2], to[3], to[4]) == SCALABL_OK);
        for (int i = 0; i < 5; ++i) {
            if (wanted == 31) whole.push_back(g[i].bytes);
            else if (to[i]) CHECK(g[i].bytes == whole[i]);
        }
    }
}

}  // namespace

int main() {
    test_noise();
    compare_all(forward, backward);
    compare_uneven_rows(forward, backward);
    test_absent_outputs();
    compare_whole_numbers(forward, backward);
    return end_of_checks();
}

// The update on the CPU through the C interface, against plain.cpp: dtypes, strides, ranks,
// threads, instruction sets, absent outputs and bad arguments.
#include <cstring>
#include <string>

#include "compare.h"

namespace {

void test_every_instruction_set() {
    const std::string best = scalabl_isa();
    for (const char *name : {"baseline", "avx2", "avx512"}) {
        if (scalabl_use_isa(name) != SCALABL_OK) {
            std::printf("skipped: this machine has no %s\n", name);
            continue;
        }
        CHECK(std::strcmp(scalabl_isa(), name) == 0);
        const auto forward = [](const scalabl_update &op, auto... rest) {
            return scalabl_update_forward(&op, rest...);
        };
        const auto backward = [](const scalabl_update &op, auto... rest) {
            return scalabl_update_backward(&op, rest...);
        };
        compare_all(forward, backward);
        compare_uneven_rows(forward, backward);
        compare_whole_numbers(forward, backward);
    }
    CHECK(scalabl_use_isa("abacus") == SCALABL_ISA && scalabl_use_isa(nullptr) == SCALABL_NULL);
    CHECK(scalabl_use_isa(best.c_str()) == SCALABL_OK);
}

// Bit for bit, and under the thread sanitizer without a race. Two panels of the sums for A and B.
void test_threads_do_not_change_the_result() {
    for_uneven_rows(601, 523, 8, [](Problem &p) {
        std::vector<std::vector<char>> first;
        for (const int threads : {1, 2, 5, 16}) {
            p.op.threads = threads;
            Results got(p);
            CHECK(scalabl_update_forward(&p.op, got.y.data(), got.y.stride, got.h.data()) ==
                  SCALABL_OK);
            CHECK(scalabl_update_backward(&p.op, p.grad_y.data(), p.grad_y.stride, got.h.data(),
                                          got.grad_x.data(), got.grad_x.stride, got.A.data(),
                                          got.B.data(), got.s.data(),
                                          got.sigma.data()) == SCALABL_OK);
            const std::vector<std::vector<char>> all = {got.y.bytes,      got.h.bytes,
                                                        got.grad_x.bytes, got.A.bytes,
                                                        got.B.bytes,      got.s.bytes,
                                                        got.sigma.bytes};
            if (first.empty()) first = all;
            if (all != first) std::printf("%d threads, %s\n", threads, in_words(p.op).c_str());
            CHECK(all == first);
        }
    });
}

// Rows may be read backwards or over and over.
void test_unusual_strides_of_what_is_read() {
    Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, 4, 6, 5, 2, 0, 1);
    Matrix turned = p.x, y = p.y, other = p.y;
    for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 6; ++j) turned.set(3 - i, j, p.x.at(i, j));
    }
    CHECK(scalabl_update_forward(&p.op, y.data(), y.stride, nullptr) == SCALABL_OK);
    p.op.x = &turned.as<float>(3 * 6);
    p.op.x_stride = -6;
    CHECK(scalabl_update_forward(&p.op, other.data(), other.stride, nullptr) == SCALABL_OK);
    CHECK(y.bytes == other.bytes);
    p.op.x_stride = 0;
    CHECK(scalabl_update_forward(&p.op, other.data(), other.stride, nullptr) == SCALABL_OK);
}

// One group for all rows, however many rows a group could have.
void test_the_largest_group() {
    Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, 4, 6, 5, 2, 0, 4);
    Matrix y = p.y, other = p.y;
    CHECK(scalabl_update_forward(&p.op, y.data(), y.stride, nullptr) == SCALABL_OK);
    p.op.rows_per_group = INT64_MAX;
    CHECK(scalabl_update_forward(&p.op, other.data(), other.stride, nullptr) == SCALABL_OK);
    CHECK(y.bytes == other.bytes);
}

// The stride of a single row is not used, and that of an absent grad_x neither.
void test_strides_that_do_not_matter() {
    Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, 1, 6, 1, 1, 0, 1);
    Matrix y = p.y, other = p.y, grad_A(SCALABL_FLOAT32, 1, 6), other_A = grad_A;
    const auto both = [&](Matrix &to_y, Matrix &to_A, int64_t stride, void *grad_x) {
        CHECK(scalabl_update_forward(&p.op, to_y.data(), stride, nullptr) == SCALABL_OK);
        CHECK(scalabl_update_backward(&p.op, p.grad_y.data(), stride, nullptr, grad_x, stride,
                                      to_A.data(), nullptr, nullptr, nullptr) == SCALABL_OK);
    };
    both(y, grad_A, 6, nullptr);
    for (const int64_t stride : {INT64_MAX, INT64_MIN, int64_t{0}}) {
        p.op.x_stride = p.op.A_stride = p.op.B_stride = stride;
        other = p.y;
        both(other, other_A, stride, p.grad_x.data());
        CHECK(other.bytes == y.bytes && other_A.bytes == grad_A.bytes);
    }
    Problem more(SCALABL_FLOAT32, SCALABL_FLOAT32, 3, 6, 5, 2, 0, 1);
    Matrix to_A(SCALABL_FLOAT32, 2, 6);
    CHECK(scalabl_update_backward(&more.op, more.grad_y.data(), 5, nullptr, nullptr, INT64_MAX,
                                  to_A.data(), nullptr, nullptr, nullptr) == SCALABL_OK);
}

// A matrix without columns may be null, and so may x where nothing asks for it, however many the
// rows: no address is made of null.
void test_absent_matrices_of_many_rows() {
    Problem p(SCALABL_FLOAT32, SCALABL_FLOAT32, 400, 0, 5, 2, 3, 1);
    p.op.x = p.op.A = nullptr;
    Matrix y = p.y, grad_B(SCALABL_FLOAT32, 5, 2);
    CHECK(scalabl_update_forward(&p.op, y.data(), y.stride, nullptr) == SCALABL_OK);
    CHECK(y.bytes == p.y.bytes);
    CHECK(scalabl_update_backward(&p.op, p.grad_y.data(), p.grad_y.stride, nullptr, nullptr, 0,
                                  nullptr, grad_B.data(), nullptr, nullptr) == SCALABL_OK);
    Problem q(SCALABL_FLOAT32, SCALABL_FLOAT32, 400, 5, 0, 2, 3, 1);
    q.op.x = q.op.B = nullptr;
    Matrix grad_x = q.grad_x;
    CHECK(scalabl_update_backward(&q.op, nullptr, 3, nullptr, grad_x.data(), grad_x.stride,
                                  nullptr, nullptr, nullptr, nullptr) == SCALABL_OK);
    q.op.x = q.x.data();
    CHECK(scalabl_update_forward(&q.op, nullptr, 3, nullptr) == SCALABL_OK);
}

void test_bad_arguments() {
    const Problem good(SCALABL_FLOAT32, SCALABL_FLOAT32, 4, 6, 5, 2, 0, 1);
    Matrix y = good.y, grad_x = good.grad_x;
    const std::vector<char> before = y.bytes;
    const auto forward = [&](void (*spoil)(scalabl_update &)) {
        scalabl_update op = good.op;
        spoil(op);
        const scalabl_status status = scalabl_update_forward(&op, y.data(), 5, nullptr);
        Matrix grad_A(SCALABL_FLOAT32, 2, 6);
        CHECK(scalabl_update_backward(&op, good.grad_y.data(), 5, nullptr, grad_x.data(), 6,
                                      grad_A.data(), nullptr, nullptr, nullptr) == status);
        return status;
    };
    typedef scalabl_update Op;
    CHECK(forward([](Op &op) { op.dtype = 4; }) == SCALABL_DTYPE);
    CHECK(forward([](Op &op) { op.dtype = -1; }) == SCALABL_DTYPE);
    CHECK(forward([](Op &op) { op.adapter_dtype = SCALABL_FLOAT64; }) == SCALABL_DTYPE);
    CHECK(forward([](Op &op) { op.rank = 0; }) == SCALABL_RANK);
    CHECK(forward([](Op &op) { op.rank = 257; }) == SCALABL_RANK);
    CHECK(forward([](Op &op) { op.rows = -1; }) == SCALABL_SIZE);
    CHECK(forward([](Op &op) { op.d_in = -1; }) == SCALABL_SIZE);
    CHECK(forward([](Op &op) { op.d_out = -1; }) == SCALABL_SIZE);
    CHECK(forward([](Op &op) { op.d_out = INT64_MAX; }) == SCALABL_SIZE);
    CHECK(forward([](Op &op) { op.x_stride = INT64_MAX / 2; }) == SCALABL_SIZE);
    CHECK(forward([](Op &op) { op.threads = 0; }) == SCALABL_THREADS);
    CHECK(forward([](Op &op) { op.layer = UINT32_MAX; }) == SCALABL_LAYER);
    CHECK(forward([](Op &op) { op.rows_per_group = 0; }) == SCALABL_COUNT);
    CHECK(forward([](Op &op) { op.A = nullptr; }) == SCALABL_NULL);
    CHECK(forward([](Op &op) { op.B = nullptr; }) == SCALABL_NULL);
    CHECK(forward([](Op &op) { op.s = nullptr; }) == SCALABL_NULL);
    CHECK(forward([](Op &op) { op.sigma = nullptr; }) == SCALABL_NULL);
    CHECK(forward([](Op &op) { op.x = nullptr; }) == SCALABL_NULL);
    static const int64_t outside[] = {0, 1, -1, 2};
    CHECK(forward([](Op &op) { op.groups = outside; }) == SCALABL_GROUP);
    CHECK(forward([](Op &op) { op.draws = outside; }) == SCALABL_DRAW);
    static const int64_t further[] = {0, 1, 0, 0};
    CHECK(forward([](Op &op) { op.draws = further, op.draw = UINT32_MAX; }) == SCALABL_DRAW);
    CHECK(scalabl_update_forward(nullptr, y.data(), 5, nullptr) == SCALABL_NULL);
    CHECK(scalabl_update_forward(&good.op, nullptr, 5, nullptr) == SCALABL_NULL);
    CHECK(scalabl_update_forward(&good.op, y.data(), 4, nullptr) == SCALABL_STRIDE);
    CHECK(scalabl_update_backward(&good.op, nullptr, 5, nullptr, grad_x.data(), 6, nullptr,
                                  nullptr, nullptr, nullptr) == SCALABL_NULL);
    CHECK(scalabl_update_backward(&good.op, good.grad_y.data(), 5, nullptr, grad_x.data(), 3,
                                  nullptr, nullptr, nullptr, nullptr) == SCALABL_STRIDE);
    CHECK(y.bytes == before && grad_x.bytes == good.grad_x.bytes);
}

// Every float16 and bfloat16 goes to float and back; ties go to even; large goes to infinity.
void test_half_precision() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const uint16_t half = static_cast<uint16_t>(bits);
        scalabl::float16 f = {0};
        scalabl::bfloat16 b = {0};
        const float from_f = scalabl::widen(scalabl::float16{half});
        const float from_b = scalabl::widen(scalabl::bfloat16{half});
        scalabl::narrow(from_f, f);
        scalabl::narrow(from_b, b);
        CHECK(std::isnan(from_f) ? (f.bits & 0x7fffu) > 0x7c00u : f.bits == half);
        CHECK(std::isnan(from_b) ? (b.bits & 0x7fffu) > 0x7f80u : b.bits == half);
        const int exponent = half >> 10 & 31;
        if (exponent < 31) {
            const double size = exponent ? std::ldexp(1024 + (half & 1023), exponent - 25)
                                         : std::ldexp(half & 1023, -24);
            CHECK(from_f == static_cast<float>(half & 0x8000u ? -size : size));
        } else {
            CHECK((half & 1023) ? std::isnan(from_f) : std::isinf(from_f));
            CHECK(std::signbit(from_f) == (half >> 15 != 0));
        }
        const uint32_t bits_of_b = bits << 16;
        CHECK(std::memcmp(&from_b, &bits_of_b, sizeof from_b) == 0);
    }
    const struct {
        float value;
        uint16_t half;
    } cases[] = {{1.0f + 0x1p-11f, 0x3c00},     {1.0f + 0x1.8p-10f, 0x3c02}, {65519.996f, 0x7bff},
                 {65520.0f, 0x7c00},            {-1e30f, 0xfc00},            {0x1p-25f, 0x0000},
                 {0x1.000002p-25f, 0x0001},     {0x1.8p-24f, 0x0002},        {-0.0f, 0x8000},
                 {0x1.ff8p-15f, 0x03ff},        {0x1.ffep-15f, 0x0400}};
    for (const auto &c : cases) {
        scalabl::float16 f;
        scalabl::narrow(c.value, f);
        CHECK(f.bits == c.half);
    }
    scalabl::bfloat16 b;
    scalabl::narrow(1.0f + 0x1p-8f, b);
    CHECK(b.bits == 0x3f80);
    scalabl::narrow(1.0f + 0x1.8p-7f, b);
    CHECK(b.bits == 0x3f82);
    scalabl::narrow(3.4e38f, b);
    CHECK(b.bits == 0x7f80);
}

}  // namespace

int main() {
    test_half_precision();
    test_every_instruction_set();
    test_threads_do_not_change_the_result();
    test_unusual_strides_of_what_is_read();
    test_the_largest_group();
    test_strides_that_do_not_matter();
    test_absent_matrices_of_many_rows();
    test_bad_arguments();
    return end_of_checks();
}

// libFuzzer: arbitrary arguments of the update's C interface. What a call may touch is worked out
// here from scalabl.h alone, not from the core's own checks, and each array has exactly that many
// bytes, so that the address sanitizer sees anything beyond. A call with a wrong argument gets
// arrays of one byte: it must be refused before it reads or writes anything.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "scalabl.h"

namespace {

typedef __int128 Wide;

void require(bool condition, const char *what) {
    if (condition) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

// The input, as choices; zeros when it is used up.
struct Choices {
    const uint8_t *next, *end;

    uint8_t byte() { return next < end ? *next++ : 0; }
    uint32_t word() {
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) value = value << 8 | byte();
        return value;
    }
    bool rarely() { return byte() >= 248; }

    // A number that is nobody's idea of a size.
    int64_t strange() {
        static const int64_t numbers[] = {
            0, -1, 1, 2, 255, 256, 257, INT32_MAX, int64_t{INT32_MAX} + 1, int64_t{1} << 32,
            (int64_t{1} << 32) + 1, int64_t{1} << 34, int64_t{1} << 53, INT64_MAX / 64,
            INT64_MAX / 64 + 1, INT64_MAX / 16, INT64_MAX / 2, INT64_MAX, INT64_MIN, INT64_MIN / 2,
            INT64_MIN / 64, INT32_MIN, -2, -256};
        const uint8_t choice = byte();
        const int64_t all = static_cast<int64_t>(uint64_t{word()} << 32 | word());
        return choice >= 224 ? all : numbers[choice % (sizeof numbers / sizeof *numbers)];
    }
    int64_t size() {
        const uint8_t choice = byte();
        if (choice < 160) return choice % 40;
        if (choice < 248) return 2 * byte() + choice % 2;
        return strange();
    }
    int64_t stride(int64_t columns) {
        const uint8_t choice = byte();
        if (choice < 128) return columns;
        if (choice >= 248) return strange();
        const Wide wide = (choice % 2 ? -1 : 1) * (Wide{columns} + choice % 8 - 2);
        return wide == static_cast<int64_t>(wide) ? static_cast<int64_t>(wide) : 0;
    }
};

int64_t width(int32_t dtype) {
    return dtype == SCALABL_FLOAT64 ? 8 : dtype == SCALABL_FLOAT32 ? 4 : 2;
}

// The bytes of an array that the arguments claim: (rows, columns) elements, at `before` bytes past
// the start of which row 0 begins. `reach`: the same where rows are empty, but apart.
struct Extent {
    int64_t rows, columns, stride, element;
    Wide before = 0, bytes = 0, reach = 0;

    Extent(int64_t rows_, int64_t columns_, int64_t stride_, int64_t element_)
        : rows(rows_), columns(columns_), stride(stride_), element(element_) {
        if (rows < 1) return;
        Wide last = Wide{rows - 1} * stride;
        const Wide beyond = Wide{1} << 100;  // of every address, and 8 times that is no overflow
        last = std::min(std::max(last, -beyond), beyond);
        reach = ((last < 0 ? -last : last) + columns) * element;
        if (columns < 1) return;
        before = last < 0 ? -last * element : 0;
        bytes = reach;
    }
    bool overlaps() const {
        return rows > 1 && columns > 0 && stride < columns && Wide{stride} > -Wide{columns};
    }
    bool exists() const { return reach <= INT64_MAX; }
};

// An array of so many bytes, or of one byte; absent: null.
struct Array {
    std::unique_ptr<char[]> bytes;
    size_t count = 0;
    char *data = nullptr;
    Extent extent;

    Array(const Extent &claimed, bool given, bool whole) : extent(claimed) {
        if (!given) return;
        count = whole ? static_cast<size_t>(claimed.bytes) : 0;
        bytes.reset(new char[count]);
        // Finite in every dtype: sign and exponent 0x3c or 0xbc, any mantissa.
        uint32_t state = 1;
        for (size_t i = 0; i < count; ++i) {
            state = state * 1664525u + 1013904223u;
            const uint8_t noise = static_cast<uint8_t>(state >> 24);
            bytes[i] = static_cast<char>(i % 2 ? 0x3c | (noise & 0x80) : noise);
        }
        data = bytes.get() + (whole ? static_cast<int64_t>(claimed.before) : 0);
    }
    std::vector<char> copy() const { return std::vector<char>(bytes.get(), bytes.get() + count); }
    void restore(const std::vector<char> &from) {
        if (count) std::memcpy(bytes.get(), from.data(), count);
    }
    // That bytes between the rows are those of `from`.
    void require_gaps(const std::vector<char> &from) const {
        if (!count) return;
        std::vector<char> now = copy();
        for (int64_t i = 0; i < extent.rows; ++i) {
            const int64_t start = data - bytes.get() + i * extent.stride * extent.element;
            std::memcpy(&now[static_cast<size_t>(start)], &from[static_cast<size_t>(start)],
                        static_cast<size_t>(extent.columns * extent.element));
        }
        require(now == from, "something was written between the rows");
    }
};

enum Verdict { GOOD, BAD, TOO_LARGE };

// More than this is not tried: bytes of an array, and multiplications.
constexpr int64_t MOST_BYTES = 1 << 18, MOST_WORK = 1 << 19;

struct Call {
    scalabl_update op;
    bool backward;
    bool x, A, B, s, sigma, rows_given, with_groups, with_draws;  // which pointers are given
    bool h, grad_x, grad_A, grad_B, grad_s, grad_sigma;
    int64_t rows_stride, grad_x_stride;  // of y or grad_y, and of grad_x
    std::vector<int64_t> ids, further;  // of groups, of draws

    explicit Call(Choices &in) {
        std::memset(&op, 0, sizeof op);
        backward = in.byte() % 2;
        op.dtype = in.rarely() ? static_cast<int32_t>(in.word()) : in.byte() % 4;
        op.adapter_dtype = in.byte() % 2 ? op.dtype : SCALABL_FLOAT32;
        if (in.rarely()) op.adapter_dtype = static_cast<int32_t>(in.word());
        op.rows = in.size();
        op.d_in = in.size();
        op.d_out = in.size();
        op.rank = in.rarely() ? in.strange() : in.byte() < 224 ? 1 + in.byte() % 16
                                                               : 1 + in.byte();
        op.x_stride = in.stride(op.d_in);
        op.A_stride = in.stride(op.d_in);
        op.B_stride = in.stride(op.rank);
        rows_stride = in.stride(op.d_out);
        grad_x_stride = in.stride(op.d_in);
        op.scaling = in.byte() / 16.0;
        op.noisy = in.byte() % 4;
        op.draw = in.word();
        op.layer = in.rarely() ? UINT32_MAX : in.byte();
        op.seed = in.word();
        op.rows_per_group = in.byte() >= 224 ? in.strange() : 1 + in.byte() % 64;
        op.threads = in.rarely() ? static_cast<int32_t>(in.word()) : 1 + in.byte() % 4;
        const uint32_t outputs = in.byte();
        h = outputs & 1;
        grad_x = backward && outputs & 2;
        grad_A = backward && outputs & 4;
        grad_B = backward && outputs & 8;
        grad_s = backward && outputs & 16;
        grad_sigma = backward && outputs & 32;
        with_groups = outputs & 64;
        with_draws = outputs & 128;
        x = !in.rarely();
        A = !in.rarely();
        B = !in.rarely();
        s = !in.rarely();
        sigma = !in.rarely();
        rows_given = !in.rarely();
        if (with_groups) choose(in, ids);
        if (with_draws) choose(in, further);
    }

    // A number for each group, unless there are very many.
    void choose(Choices &in, std::vector<int64_t> &out) const {
        if (groups() > 4096) return;
        for (int64_t g = 0; g < static_cast<int64_t>(groups()); ++g) {
            out.push_back(in.rarely() && in.rarely() ? in.strange() : in.byte());
        }
    }

    Wide groups() const {
        if (op.rows < 1 || op.rows_per_group < 1) return 0;
        return (Wide{op.rows} + op.rows_per_group - 1) / op.rows_per_group;
    }
    Extent rows_of(int64_t columns, int64_t stride) const {
        return Extent(op.rows, columns, stride, width(op.dtype));
    }
    Extent own(int64_t rows, int64_t columns, int64_t stride) const {
        return Extent(rows, columns, stride, width(op.adapter_dtype));
    }
    Extent hidden() const {
        return Extent(op.rows, op.rank, op.rank, op.dtype == SCALABL_FLOAT64 ? 8 : 4);
    }

    bool reads_x() const {
        return !backward || grad_A || (!h && (grad_B || grad_s || grad_sigma));
    }

    bool wrong_number() const {
        if (op.dtype < 0 || op.dtype > 3) return true;
        if (op.adapter_dtype != SCALABL_FLOAT32 && op.adapter_dtype != op.dtype) return true;
        if (op.rank < 1 || op.rank > 256 || op.threads < 1) return true;
        return op.rows < 0 || op.d_in < 0 || op.d_out < 0;
    }
    bool missing_pointer() const {
        if (!s || !sigma || (op.d_in > 0 && !A) || (op.d_out > 0 && !B)) return true;
        return op.rows > 0 &&
               ((op.d_in > 0 && reads_x() && !x) || (op.d_out > 0 && !rows_given));
    }
    bool wrong_noise() const {
        if (!op.noisy) return false;
        if (op.layer == UINT32_MAX || op.rows_per_group < 1) return true;
        if (groups() > Wide{1} << 32) return true;
        const Wide words = Wide{1} << 32;
        for (const int64_t id : ids) {
            if (id < 0 || id >= words) return true;
        }
        for (const int64_t count : further) {
            if (count < 0 || op.draw + Wide{count} >= words) return true;
        }
        return false;
    }

    Verdict verdict() const {
        // Groups that are not here cannot be shown to the core, whatever else is wrong.
        if (op.noisy && (with_groups || with_draws) && groups() > 4096) return TOO_LARGE;
        if (wrong_number() || missing_pointer() || wrong_noise()) return BAD;
        const Extent y = rows_of(op.d_out, rows_stride), to_x = rows_of(op.d_in, grad_x_stride);
        if (backward ? grad_x && to_x.overlaps() : y.overlaps()) return BAD;
        const Extent all[] = {rows_of(op.d_in, op.x_stride), own(op.rank, op.d_in, op.A_stride),
                              own(op.d_out, op.rank, op.B_stride), y, hidden(),
                              own(op.rank, op.d_in, op.d_in), own(op.d_out, op.rank, op.rank),
                              backward && grad_x ? to_x : rows_of(0, 0)};
        const Wide widths = Wide{op.d_in} + op.d_out + 1;
        bool large = op.rows >= MOST_WORK || widths * (op.rows + 1) * op.rank > MOST_WORK;
        for (const Extent &extent : all) {
            if (!extent.exists()) return BAD;
            large = large || extent.reach > MOST_BYTES;
        }
        return large ? TOO_LARGE : GOOD;
    }

    void run(bool good) {
        const Array x_(rows_of(op.d_in, op.x_stride), x, good);
        const Array A_(own(op.rank, op.d_in, op.A_stride), A, good);
        const Array B_(own(op.d_out, op.rank, op.B_stride), B, good);
        const Array s_(own(1, op.rank, op.rank), s, good);
        const Array sigma_(own(1, op.rank, op.rank), sigma, good);
        Array rows(rows_of(op.d_out, rows_stride), rows_given, good);
        Array h_(hidden(), h, good), to_x(rows_of(op.d_in, grad_x_stride), grad_x, good);
        Array to_A(own(op.rank, op.d_in, op.d_in), grad_A, good);
        Array to_B(own(op.d_out, op.rank, op.rank), grad_B, good);
        Array to_s(own(1, op.rank, op.rank), grad_s, good);
        Array to_sigma(own(1, op.rank, op.rank), grad_sigma, good);
        const auto exact = [](const std::vector<int64_t> &from) {
            std::unique_ptr<int64_t[]> copy(new int64_t[from.size()]);
            std::copy(from.begin(), from.end(), copy.get());
            return copy;
        };
        const auto groups_ = exact(ids), draws_ = exact(further);
        op.x = x_.data;
        op.A = A_.data;
        op.B = B_.data;
        op.s = s_.data;
        op.sigma = sigma_.data;
        op.groups = with_groups ? groups_.get() : nullptr;
        op.draws = with_draws ? draws_.get() : nullptr;
        const auto call = [&] {
            return backward ? scalabl_update_backward(&op, rows.data, rows_stride, h_.data,
                                                      to_x.data, grad_x_stride, to_A.data,
                                                      to_B.data, to_s.data, to_sigma.data)
                            : scalabl_update_forward(&op, rows.data, rows_stride, h_.data);
        };
        const std::vector<char> rows_before = rows.copy(), to_x_before = to_x.copy();
        const scalabl_status status = call();
        if (!good) return require(status != SCALABL_OK, "a wrong argument was accepted");
        require(status == SCALABL_OK, scalabl_message(status));
        rows.require_gaps(rows_before);
        to_x.require_gaps(to_x_before);
        if (backward) require(rows.copy() == rows_before, "grad_y was written to");

        if (op.threads == 1) return;
        Array *const written[] = {&rows, &h_, &to_x, &to_A, &to_B, &to_s, &to_sigma};
        std::vector<std::vector<char>> first;
        for (const Array *array : written) first.push_back(array->copy());
        rows.restore(rows_before);
        to_x.restore(to_x_before);
        op.threads = 1;
        require(call() == SCALABL_OK, "one thread fails where several do not");
        for (size_t i = 0; i < first.size(); ++i) {
            require(written[i]->copy() == first[i], "the result depends on the threads");
        }
    }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const isas[] = {"baseline", "avx2", "avx512"};
    Choices in = {data, data + size};
    scalabl_use_isa(isas[in.byte() % 3]);  // one that the machine has not leaves it as it is
    Call call(in);
    const Verdict verdict = call.verdict();
    if (verdict != TOO_LARGE) call.run(verdict == GOOD);
    return 0;
}

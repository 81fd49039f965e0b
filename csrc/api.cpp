// The C interface: every argument is checked here, once, for all devices.
#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <new>

#include "fast/cpu.h"
#include "fast/cuda.h"
#include "plain.h"
#include "scalabl.h"
#include "subspace_lora.h"

namespace {

constexpr int64_t WORDS = int64_t{1} << 32;

// Whether `count` numbers, if given, lie in [0, end).
bool in_range(const int64_t *numbers, int64_t count, int64_t end) {
    return !numbers || std::all_of(numbers, numbers + count,
                                   [end](int64_t number) { return 0 <= number && number < end; });
}

scalabl_status check_groups(const int64_t *groups, const int64_t *draws, int64_t count,
                            uint32_t draw) {
    if (!in_range(groups, count, WORDS)) return SCALABL_GROUP;
    return in_range(draws, count, WORDS - draw) ? SCALABL_OK : SCALABL_DRAW;
}

scalabl_status check_normals(uint32_t draw, uint32_t layer, const int64_t *groups,
                             const int64_t *draws, int64_t count, int64_t rank, const float *out) {
    if (layer == UINT32_MAX) return SCALABL_LAYER;
    if (count < 0 || count > WORDS) return SCALABL_COUNT;
    if (rank < 1 || rank > 4 * WORDS) return SCALABL_RANK;
    if (count > 0 && (!groups || !out)) return SCALABL_NULL;
    return check_groups(groups, draws, count, draw);
}

// Whether every offset (row * stride + column) * size fits into int64.
bool addressable(int64_t rows, int64_t columns, int64_t stride) {
    constexpr int64_t LIMIT = INT64_MAX / 64;  // room for the size of an element, and for more
    int64_t last = 0;  // the stride of a single row is not used
    if (rows > 1 && __builtin_mul_overflow(rows, stride, &last)) return false;
    return -LIMIT <= last && last <= LIMIT && columns <= LIMIT;
}

// Whether no two rows that are written share an element.
bool apart(int64_t rows, int64_t columns, int64_t stride) {
    return rows <= 1 || columns == 0 || stride >= columns || stride <= -columns;
}

bool known_dtypes(const scalabl_update &op) {
    const bool known = op.dtype >= SCALABL_FLOAT32 && op.dtype <= SCALABL_FLOAT16;
    return known && (op.adapter_dtype == SCALABL_FLOAT32 || op.adapter_dtype == op.dtype);
}

enum class Memory { HOST, DEVICE };  // groups and draws on a device cannot be read here

scalabl_status check_noise(const scalabl_update &op, Memory memory) {
    if (!op.noisy) return SCALABL_OK;
    if (op.layer == UINT32_MAX) return SCALABL_LAYER;
    if (op.rows_per_group < 1) return SCALABL_COUNT;
    const int64_t groups = scalabl::count_groups(op.rows, op.rows_per_group);
    if (groups > WORDS) return SCALABL_COUNT;
    if (memory == Memory::DEVICE) return SCALABL_OK;
    return check_groups(op.groups, op.draws, groups, op.draw);
}

// Checks everything but x: whether x is needed depends on the call.
scalabl_status check_update(const scalabl_update *op, Memory memory) {
    if (!op) return SCALABL_NULL;
    if (!known_dtypes(*op)) return SCALABL_DTYPE;
    if (op->rank < 1 || op->rank > scalabl::MAX_RANK) return SCALABL_RANK;
    if (op->rows < 0 || op->d_in < 0 || op->d_out < 0) return SCALABL_SIZE;
    if (memory == Memory::HOST && op->threads < 1) return SCALABL_THREADS;
    if (!addressable(op->rows, op->d_in, op->x_stride) ||
        !addressable(op->rank, op->d_in, op->A_stride) ||
        !addressable(op->d_out, op->rank, op->B_stride) ||
        !addressable(op->rows, op->rank * 16, op->rank * 16) ||
        !addressable(op->rank, op->d_in, op->d_in) ||
        !addressable(op->rank, op->d_out, op->d_out)) {
        return SCALABL_SIZE;
    }
    if ((op->d_in > 0 && !op->A) || (op->d_out > 0 && !op->B) || !op->s || !op->sigma) {
        return SCALABL_NULL;
    }
    return check_noise(*op, memory);
}

scalabl_status check_forward(const scalabl_update *op, Memory memory, const void *y,
                             int64_t y_stride) {
    const scalabl_status status = check_update(op, memory);
    if (status != SCALABL_OK || op->rows == 0) return status;
    if ((op->d_in > 0 && !op->x) || (op->d_out > 0 && !y)) return SCALABL_NULL;
    if (!addressable(op->rows, op->d_out, y_stride)) return SCALABL_SIZE;
    return apart(op->rows, op->d_out, y_stride) ? SCALABL_OK : SCALABL_STRIDE;
}

scalabl_status check_backward(const scalabl_update *op, Memory memory, const void *grad_y,
                              int64_t grad_y_stride, const void *h,
                              const scalabl::Gradients &out) {
    const scalabl_status status = check_update(op, memory);
    if (status != SCALABL_OK || op->rows == 0) return status;
    const bool needs_x = out.A || (!h && (out.B || out.s || out.sigma));
    if ((op->d_in > 0 && needs_x && !op->x) || (op->d_out > 0 && !grad_y)) return SCALABL_NULL;
    if (!addressable(op->rows, op->d_out, grad_y_stride) ||
        (out.x && !addressable(op->rows, op->d_in, out.x_stride))) {
        return SCALABL_SIZE;
    }
    return !out.x || apart(op->rows, op->d_in, out.x_stride) ? SCALABL_OK : SCALABL_STRIDE;
}

// Of functions on (rows, n) values that are all given.
scalabl_status check_values(int32_t dtype, std::array<int64_t, 2> sizes, int32_t threads,
                            std::initializer_list<const void *> values) {
    if (dtype < SCALABL_FLOAT32 || dtype > SCALABL_FLOAT16 || dtype == SCALABL_FLOAT64) {
        return SCALABL_DTYPE;
    }
    const auto [rows, n] = sizes;
    if (rows < 0 || n < 0 || !addressable(rows, n, n)) return SCALABL_SIZE;
    if (threads < 1) return SCALABL_THREADS;
    const bool empty = rows == 0 || n == 0;
    return empty || std::all_of(values.begin(), values.end(), [](const void *p) { return p; })
               ? SCALABL_OK
               : SCALABL_NULL;
}

scalabl_status check_norm(const scalabl_norm *op, std::initializer_list<const void *> values) {
    if (!op) return SCALABL_NULL;
    const bool empty = op->rows <= 0 || op->n <= 0;
    if (!empty && (!op->x || !op->weight)) return SCALABL_NULL;
    return check_values(op->dtype, {op->rows, op->n}, op->threads, values);
}

// Calls fn() and turns its exception into a status.
template <typename Fn>
scalabl_status guarded(const Fn &fn) {
    try {
        fn();
        return SCALABL_OK;
    } catch (const std::bad_alloc &) {
        return SCALABL_MEMORY;
    }
}

}  // namespace

const char *scalabl_message(int status) {
    switch (status) {
        case SCALABL_OK: return "no error";
        case SCALABL_NULL: return "a pointer is null";
        case SCALABL_ROUNDS: return "rounds must be in [1, 16]";
        case SCALABL_LAYER: return "layer must be in [0, 2^32 - 1)";
        case SCALABL_COUNT: return "the number of groups must be in [0, 2^32]";
        case SCALABL_GROUP: return "group id must be in [0, 2^32)";
        case SCALABL_RANK: return "rank must be in [1, 2^34], or [1, 256] in a layer";
        case SCALABL_DTYPE: return "unknown dtype, or an adapter neither float32 nor of x's dtype";
        case SCALABL_SIZE: return "a size is negative, or too large";
        case SCALABL_STRIDE: return "rows to be written overlap";
        case SCALABL_MEMORY: return "no memory for the scratch space";
        case SCALABL_THREADS: return "threads must be at least 1";
        case SCALABL_ISA: return "instruction set unknown, or not on this machine";
        case SCALABL_DEVICE: return "CUDA reported an error, or was not compiled in";
        case SCALABL_DRAW: return "draws must be at least 0, and draw + draws[g] below 2^32";
    }
    return "unknown status";
}

scalabl_status scalabl_philox4x32(const uint32_t *counter, const uint32_t *key, int rounds,
                                  uint32_t *out) {
    if (!counter || !key || !out) return SCALABL_NULL;
    if (rounds < 1 || rounds > 16) return SCALABL_ROUNDS;
    const scalabl::Block block = {{counter[0], counter[1], counter[2], counter[3]}};
    const scalabl::Block words = scalabl::philox4x32(block, key[0], key[1], rounds);
    std::copy(words.word, words.word + 4, out);
    return SCALABL_OK;
}

scalabl_status scalabl_box_muller(uint32_t a, uint32_t b, double *out) {
    if (!out) return SCALABL_NULL;
    scalabl::box_muller(a, b, out);
    return SCALABL_OK;
}

scalabl_status scalabl_normals(uint64_t seed, uint32_t draw, uint32_t layer, const int64_t *groups,
                               const int64_t *draws, int64_t count, int64_t rank, float *out) {
    const scalabl_status status = check_normals(draw, layer, groups, draws, count, rank, out);
    if (status != SCALABL_OK) return status;
    const auto at = [&](int64_t g) {
        return scalabl::coordinates(seed, draw, layer, groups, draws, g);
    };
    for (int64_t g = 0; g < count; ++g) {
        float *row = out + g * rank;
        if (g > 0 && at(g) == at(g - 1)) {
            std::copy(row - rank, row, row);
        } else {
            scalabl::normal_row(at(g), rank, row);
        }
    }
    return SCALABL_OK;
}

scalabl_status scalabl_update_forward(const scalabl_update *op, void *y, int64_t y_stride,
                                      void *h) {
    const scalabl_status status = check_forward(op, Memory::HOST, y, y_stride);
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::forward(*op, y, y_stride, h); });
}

scalabl_status scalabl_update_backward(const scalabl_update *op, const void *grad_y,
                                       int64_t grad_y_stride, const void *h, void *grad_x,
                                       int64_t grad_x_stride, void *grad_A, void *grad_B,
                                       void *grad_s, void *grad_sigma) {
    const scalabl::Gradients out = {grad_x, grad_x_stride, grad_A, grad_B, grad_s, grad_sigma};
    const scalabl_status status =
        check_backward(op, Memory::HOST, grad_y, grad_y_stride, h, out);
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::backward(*op, grad_y, grad_y_stride, h, out); });
}

scalabl_status scalabl_plain_forward(const scalabl_update *op, void *y, int64_t y_stride, void *h) {
    const scalabl_status status = check_forward(op, Memory::HOST, y, y_stride);
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::plain::forward(*op, y, y_stride, h); });
}

scalabl_status scalabl_plain_backward(const scalabl_update *op, const void *grad_y,
                                      int64_t grad_y_stride, void *grad_x, int64_t grad_x_stride,
                                      void *grad_A, void *grad_B, void *grad_s, void *grad_sigma) {
    const scalabl::Gradients out = {grad_x, grad_x_stride, grad_A, grad_B, grad_s, grad_sigma};
    const scalabl_status status =
        check_backward(op, Memory::HOST, grad_y, grad_y_stride, nullptr, out);
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::plain::backward(*op, grad_y, grad_y_stride, out); });
}

#ifdef SCALABL_CUDA

// Calls run with the scratch space if it is large enough; without any, reports the size needed.
template <typename Run>
static scalabl_status on_device(void *scratch, int64_t *scratch_bytes, const Run &run) {
    if (!scratch_bytes) return SCALABL_NULL;
    int64_t needed = 0;
    run(nullptr, needed);
    if (!scratch) {
        *scratch_bytes = needed;
        return SCALABL_OK;
    }
    if (*scratch_bytes < needed) return SCALABL_MEMORY;
    return run(scratch, needed) ? SCALABL_OK : SCALABL_DEVICE;
}

scalabl_status scalabl_cuda_update_forward(const scalabl_update *op, void *y, int64_t y_stride,
                                           void *h, void *scratch, int64_t *scratch_bytes,
                                           void *stream) {
    const scalabl_status status = check_forward(op, Memory::DEVICE, y, y_stride);
    if (status != SCALABL_OK) return status;
    return on_device(scratch, scratch_bytes, [&](void *space, int64_t &bytes) {
        return scalabl::cuda::forward(*op, y, y_stride, h, space, bytes, stream);
    });
}

scalabl_status scalabl_cuda_update_backward(const scalabl_update *op, const void *grad_y,
                                            int64_t grad_y_stride, const void *h, void *grad_x,
                                            int64_t grad_x_stride, void *grad_A, void *grad_B,
                                            void *grad_s, void *grad_sigma, void *scratch,
                                            int64_t *scratch_bytes, void *stream) {
    const scalabl::Gradients out = {grad_x, grad_x_stride, grad_A, grad_B, grad_s, grad_sigma};
    const scalabl_status status =
        check_backward(op, Memory::DEVICE, grad_y, grad_y_stride, h, out);
    if (status != SCALABL_OK) return status;
    return on_device(scratch, scratch_bytes, [&](void *space, int64_t &bytes) {
        return scalabl::cuda::backward(*op, grad_y, grad_y_stride, h, out, space, bytes, stream);
    });
}

const char *scalabl_cuda(void) { return SCALABL_CUDA; }

#else

scalabl_status scalabl_cuda_update_forward(const scalabl_update *, void *, int64_t, void *, void *,
                                           int64_t *, void *) {
    return SCALABL_DEVICE;
}

scalabl_status scalabl_cuda_update_backward(const scalabl_update *, const void *, int64_t,
                                            const void *, void *, int64_t, void *, void *, void *,
                                            void *, void *, int64_t *, void *) {
    return SCALABL_DEVICE;
}

const char *scalabl_cuda(void) { return ""; }

#endif

scalabl_status scalabl_rms_norm(const scalabl_norm *op, void *y, float *scale) {
    const scalabl_status status = check_norm(op, {y});
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::rms_norm(*op, y, scale); });
}

scalabl_status scalabl_rms_norm_backward(const scalabl_norm *op, const void *grad_y,
                                         const float *scale, void *grad_x) {
    const scalabl_status status = check_norm(op, {grad_y, scale, grad_x});
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::rms_norm_backward(*op, grad_y, scale, grad_x); });
}

scalabl_status scalabl_rotate(const scalabl_rotation *op, const void *x, void *y) {
    if (!op) return SCALABL_NULL;
    int64_t size = 0;
    if (op->heads < 0 || op->n < 0 || op->n > SCALABL_MOST_HEAD_DIM || op->n % 2 != 0 ||
        __builtin_mul_overflow(op->heads, op->n, &size) || op->angles < (op->rows > 0)) {
        return SCALABL_SIZE;
    }
    const scalabl_status status = check_values(op->dtype, {op->rows, size}, op->threads,
                                               {op->cos, op->sin, x, y});
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::rotate(*op, x, y); });
}

scalabl_status scalabl_swiglu(int32_t dtype, int64_t n, const void *gate, const void *up, void *y,
                              int32_t threads) {
    const scalabl_status status = check_values(dtype, {1, n}, threads, {gate, up, y});
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::swiglu(dtype, n, gate, up, y, threads); });
}

scalabl_status scalabl_swiglu_backward(int32_t dtype, int64_t n, const void *grad_y,
                                       const void *gate, const void *up, void *grad_gate,
                                       void *grad_up, int32_t threads) {
    const scalabl_status status =
        check_values(dtype, {1, n}, threads, {grad_y, gate, up, grad_gate, grad_up});
    if (status != SCALABL_OK) return status;
    return guarded([&] {
        scalabl::cpu::swiglu_backward(dtype, n, grad_y, gate, up, grad_gate, grad_up, threads);
    });
}

scalabl_status scalabl_few_rows(const scalabl_product *op, void *y) {
    if (!op) return SCALABL_NULL;
    if (op->rows > SCALABL_MOST_FEW_ROWS || op->rows < 0) return SCALABL_SIZE;
    const int64_t d_out = op->rows ? op->d_out : 0;  // no rows need no pointers
    scalabl_status status =
        check_values(op->dtype, {d_out, op->d_in}, op->threads, {op->x, op->weight, y});
    if (status == SCALABL_OK && d_out && !y) status = SCALABL_NULL;
    if (status != SCALABL_OK) return status;
    return guarded([&] { scalabl::cpu::few_rows(*op, y); });
}

scalabl_status scalabl_dequantize(const scalabl_codes *op, void *weight) {
    if (!op) return SCALABL_NULL;
    const scalabl_status status = check_values(op->dtype, {op->rows, op->n}, op->threads,
                                               {op->codes, op->scale, weight});
    if (status != SCALABL_OK) return status;
    const int64_t groups = (op->n + SCALABL_CODE_GROUP - 1) / SCALABL_CODE_GROUP;
    const int64_t width = op->levels ? groups * (SCALABL_CODE_GROUP / 2) : op->n;
    if (!addressable(op->rows, width, op->codes_stride) ||
        !addressable(op->rows, groups, op->scale_stride)) {
        return SCALABL_SIZE;
    }
    return guarded([&] { scalabl::cpu::dequantize(*op, weight); });
}

const char *scalabl_isa(void) { return scalabl::cpu::isa(); }

scalabl_status scalabl_use_isa(const char *name) {
    if (!name) return SCALABL_NULL;
    return scalabl::cpu::use_isa(name) ? SCALABL_OK : SCALABL_ISA;
}

const char *scalabl_digest(void) { return SCALABL_DIGEST; }

const char *scalabl_compiler(void) { return SCALABL_COMPILER; }

// RMSNorm, RoPE and SwiGLU of the model's blocks, forward and backward, products of few rows, and
// weights out of codes, over rows of float or of a half precision, which is widened in pieces. Each
// value is computed in float and rounded once.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace scalabl {
namespace {

constexpr int64_t PIECE = 1024;                // values of half precision widened at a time
constexpr int64_t WORTH_A_THREAD = 1 << 15;    // fewer values cost less than waking another thread
constexpr size_t LINE = 64;                    // bytes of a cache line
static_assert(PIECE >= SCALABL_MOST_HEAD_DIM, "a head is widened as a whole");

// `n` values of S as floats: themselves if they are floats, else a copy.
template <typename S>
struct Floats {
    Buffer<float> copy;
    const float *data;

    Floats(const void *from, int64_t n) {
        if constexpr (std::is_same_v<S, float>) {
            data = static_cast<const float *>(from);
        } else {
            copy = buffer<float>(n);
            if (n > 0) widen_row(static_cast<const S *>(from), copy.get(), n);
            data = copy.get();
        }
    }
};

// A piece of at most PIECE values that are read; of float, a piece may have any length.
template <typename S>
struct In {
    float copy[PIECE];
    const float *read(const S *from, int64_t n) {
        widen_row(from, copy, n);
        return copy;
    }
};
template <>
struct In<float> {
    const float *read(const float *from, int64_t) { return from; }
};

// A piece that is written: to `at`, then `done`.
template <typename S>
struct Out {
    float copy[PIECE];
    float *at(S *) { return copy; }
    void done(S *to, int64_t n) { narrow_row(copy, to, n); }
};
template <>
struct Out<float> {
    float *at(float *to) { return to; }
    void done(float *, int64_t) {}
};

// Calls fn(first, count) for pieces of [0, n).
template <typename S, typename Fn>
void over_pieces(int64_t n, const Fn &fn) {
    const int64_t most = std::is_same_v<S, float> ? std::max<int64_t>(n, 1) : PIECE;
    for (int64_t j = 0; j < n; j += most) fn(j, std::min(most, n - j));
}

// Calls fn(i) for every i in [0, count), of `size` values each.
template <typename Fn>
void over_rows(int64_t count, int64_t size, int threads, const Fn &fn) {
    const int64_t most = 1 + count * size / WORTH_A_THREAD;
    const int64_t team = std::max<int64_t>(1, std::min<int64_t>({threads, most, count}));
    parallel(team, static_cast<int>(team), [&](int64_t part) {
        for (int64_t i = count * part / team; i < count * (part + 1) / team; ++i) fn(i);
    });
}

template <typename S>
void norm(const scalabl_norm &op, S *y, float *scale) {
    const Elementwise &loops = *kernels().elementwise;
    const Floats<S> weight(op.weight, op.n);
    over_rows(op.rows, op.n, op.threads, [&](int64_t i) {
        const S *x = static_cast<const S *>(op.x) + i * op.n;
        In<S> in;
        Out<S> out;
        float total = 0;
        over_pieces<S>(op.n, [&](int64_t j, int64_t n) {
            total += loops.squares(in.read(x + j, n), n);
        });
        const float a = 1.0f / std::sqrt(total / static_cast<float>(op.n) + op.eps);
        if (scale) scale[i] = a;
        over_pieces<S>(op.n, [&](int64_t j, int64_t n) {
            S *to = y + i * op.n + j;
            loops.scaled(in.read(x + j, n), weight.data + j, a, out.at(to), n);
            out.done(to, n);
        });
    });
}

template <typename S>
void norm_gradient(const scalabl_norm &op, const S *grad_y, const float *scale, S *grad_x) {
    const Elementwise &loops = *kernels().elementwise;
    const Floats<S> weight(op.weight, op.n);
    over_rows(op.rows, op.n, op.threads, [&](int64_t i) {
        const S *x = static_cast<const S *>(op.x) + i * op.n, *g = grad_y + i * op.n;
        In<S> of_x, of_g;
        Out<S> out;
        float total = 0;
        over_pieces<S>(op.n, [&](int64_t j, int64_t n) {
            total += loops.inner(weight.data + j, of_g.read(g + j, n), of_x.read(x + j, n), n);
        });
        const float a = scale[i], b = a * a * a * (total / static_cast<float>(op.n));
        over_pieces<S>(op.n, [&](int64_t j, int64_t n) {
            S *to = grad_x + i * op.n + j;
            loops.scaled_gradient(of_x.read(x + j, n), weight.data + j, of_g.read(g + j, n), a, b,
                                  out.at(to), n);
            out.done(to, n);
        });
    });
}

template <typename S>
void rotated(const scalabl_rotation &op, const S *x, S *y) {
    const Elementwise &loops = *kernels().elementwise;
    const Floats<S> cos(op.cos, op.angles * op.n), sin(op.sin, op.angles * op.n);
    const auto turn = op.back ? loops.rotate_back : loops.rotate;
    const int64_t size = op.heads * op.n;
    over_rows(op.rows, size, op.threads, [&](int64_t i) {
        const int64_t place = op.places ? op.places[i] : i, angle = i % op.angles * op.n;
        const S *from = x + (op.back ? place : i) * size;
        S *to = y + (op.back ? i : place) * size;
        In<S> in;
        Out<S> out;
        for (int64_t j = 0; j < size; j += op.n) {
            turn(in.read(from + j, op.n), cos.data + angle, sin.data + angle, out.at(to + j), op.n);
            out.done(to + j, op.n);
        }
    });
}

template <typename S>
void swiglu(int64_t n, const S *gate, const S *up, S *y, int threads) {
    const Elementwise &loops = *kernels().elementwise;
    over_rows((n + PIECE - 1) / PIECE, PIECE, threads, [&](int64_t i) {
        const int64_t j = i * PIECE, count = std::min(PIECE, n - j);
        In<S> of_gate, of_up;
        Out<S> out;
        loops.swiglu(of_gate.read(gate + j, count), of_up.read(up + j, count), out.at(y + j),
                     count);
        out.done(y + j, count);
    });
}

template <typename S>
void swiglu_gradients(int64_t n, const S *grad_y, const S *gate, const S *up, S *grad_gate,
                      S *grad_up, int threads) {
    const Elementwise &loops = *kernels().elementwise;
    over_rows((n + PIECE - 1) / PIECE, PIECE, threads, [&](int64_t i) {
        const int64_t j = i * PIECE, count = std::min(PIECE, n - j);
        In<S> of_g, of_gate, of_up;
        Out<S> to_gate, to_up;
        loops.swiglu_gradients(of_g.read(grad_y + j, count), of_gate.read(gate + j, count),
                               of_up.read(up + j, count), to_gate.at(grad_gate + j),
                               to_up.at(grad_up + j), count);
        to_gate.done(grad_gate + j, count);
        to_up.done(grad_up + j, count);
    });
}

void store(const float *from, float *to, int64_t n) { std::memcpy(to, from, n * sizeof *to); }
template <typename S>
void store(const float *from, S *to, int64_t n) {
    narrow_row(from, to, n);
}

// Columns [j, j + n) of `count` rows of a weight as floats, each row `stride` after the one before.
template <typename S>
struct Weights {
    static constexpr int64_t MOST = 256;  // columns: the floats of a tile stay in the first cache
    const int64_t stride = MOST;
    float copy[TILE_ROWS * MOST];

    explicit Weights(int64_t) {}
    const float *read(const S *from, int64_t d_in, int64_t count, int64_t n) {
        for (int64_t k = 0; k < count; ++k) {
            const S *row = from + k * d_in;
            for (int64_t j = 0; j < n; j += LINE / sizeof(S)) ask_ahead(row + j);
            widen_row(row, copy + k * MOST, n);
        }
        return copy;
    }
};
template <>
struct Weights<float> {
    static constexpr int64_t MOST = INT64_MAX;
    const int64_t stride;

    explicit Weights(int64_t d_in) : stride(d_in) {}
    const float *read(const float *from, int64_t, int64_t, int64_t) { return from; }
};

// y (rows, d_out), by tiles of rows of the weight: h = weight x^T is the product whose rows are long.
template <typename S>
void few_rows(const scalabl_product &op, S *y) {
    const Kernels &loops = kernels();
    const Floats<S> x(op.x, op.rows * op.d_in);
    const S *bias = static_cast<const S *>(op.bias);
    const int64_t tiles = (op.d_out + TILE_ROWS - 1) / TILE_ROWS;
    over_rows(tiles, TILE_ROWS * op.d_in, op.threads, [&](int64_t tile) {
        const int64_t first = tile * TILE_ROWS, count = std::min<int64_t>(TILE_ROWS, op.d_out - first);
        const S *rows = static_cast<const S *>(op.weight) + first * op.d_in;
        float h[TILE_ROWS * SCALABL_MOST_FEW_ROWS];
        for (int64_t k = 0; k < count; ++k) {
            const float start = bias ? widen(bias[first + k]) : 0.0f;
            std::fill_n(h + k * op.rows, op.rows, start);
        }
        Weights<S> weights(op.d_in);
        for (int64_t j = 0, n; j < op.d_in; j += n) {
            n = std::min(weights.MOST, op.d_in - j);
            const float *tile_rows = weights.read(rows + j, op.d_in, count, n);
            loops.streamed_dots(tile_rows, weights.stride, x.data + j, op.d_in, count, n, op.rows, h);
        }
        for (int64_t i = 0; i < op.rows; ++i) {
            for (int64_t k = 0; k < count; ++k) {
                store(h + k * op.rows + i, y + i * op.d_out + first + k, 1);
            }
        }
    });
}

// The 16 levels by bytes: the level of the low half, then that of the high half.
struct Pairs {
    float of[256][2];

    explicit Pairs(const float *levels) {
        for (int byte = 0; levels && byte < 256; ++byte) {
            of[byte][0] = levels[byte % 16];
            of[byte][1] = levels[byte / 16];
        }
    }
};

template <typename S>
void dequantized(const scalabl_codes &op, S *weight) {
    constexpr int64_t GROUP = SCALABL_CODE_GROUP;
    static_assert(PIECE % GROUP == 0, "a piece has whole groups");
    const Elementwise &loops = *kernels().elementwise;
    const Pairs pairs(op.levels);
    over_rows(op.rows, op.n, op.threads, [&](int64_t i) {
        const S *scale = static_cast<const S *>(op.scale) + i * op.scale_stride;
        const auto *codes = static_cast<const int8_t *>(op.codes) + i * op.codes_stride;
        const auto *bytes = static_cast<const uint8_t *>(op.codes) + i * op.codes_stride;
        float piece[PIECE];
        for (int64_t j = 0; j < op.n; j += PIECE) {
            const int64_t count = std::min(PIECE, op.n - j);
            if (!op.levels) loops.codes(codes + j, widen(*scale), piece, count);
            for (int64_t k = 0; op.levels && k < count; k += GROUP) {
                loops.pairs(bytes + (j + k) / 2, pairs.of, widen(scale[(j + k) / GROUP]), piece + k,
                            GROUP);
            }
            store(piece, weight + i * op.n + j, count);
        }
    });
}

// Calls fn(S()) for a dtype of this file.
template <typename Fn>
void by_row_dtype(int32_t dtype, const Fn &fn) {
    switch (dtype) {
        case SCALABL_BFLOAT16: return fn(bfloat16());
        case SCALABL_FLOAT16: return fn(float16());
        default: return fn(float());
    }
}

template <typename S>
S *as(void *p, S) {
    return static_cast<S *>(p);
}
template <typename S>
const S *as(const void *p, S) {
    return static_cast<const S *>(p);
}

}  // namespace

namespace cpu {

void rms_norm(const scalabl_norm &op, void *y, float *scale) {
    by_row_dtype(op.dtype, [&](auto s) { norm(op, as(y, s), scale); });
}

void rms_norm_backward(const scalabl_norm &op, const void *grad_y, const float *scale, void *grad_x) {
    by_row_dtype(op.dtype,
                 [&](auto s) { norm_gradient(op, as(grad_y, s), scale, as(grad_x, s)); });
}

void rotate(const scalabl_rotation &op, const void *x, void *y) {
    by_row_dtype(op.dtype, [&](auto s) { rotated(op, as(x, s), as(y, s)); });
}

void swiglu(int32_t dtype, int64_t n, const void *gate, const void *up, void *y, int32_t threads) {
    by_row_dtype(dtype, [&](auto s) {
        scalabl::swiglu(n, as(gate, s), as(up, s), as(y, s), threads);
    });
}

void swiglu_backward(int32_t dtype, int64_t n, const void *grad_y, const void *gate,
                     const void *up, void *grad_gate, void *grad_up, int32_t threads) {
    by_row_dtype(dtype, [&](auto s) {
        swiglu_gradients(n, as(grad_y, s), as(gate, s), as(up, s), as(grad_gate, s),
                         as(grad_up, s), threads);
    });
}

void few_rows(const scalabl_product &op, void *y) {
    by_row_dtype(op.dtype, [&](auto s) { scalabl::few_rows(op, as(y, s)); });
}

void dequantize(const scalabl_codes &op, void *weight) {
    by_row_dtype(op.dtype, [&](auto s) { dequantized(op, as(weight, s)); });
}

}  // namespace cpu
}  // namespace scalabl

/* The native core as a plain C interface: for Python (bindings.cpp), and for C, JAX or anything
 * else that can call C. No exception leaves it; every function that can fail returns a
 * status, and writes nothing if an argument is bad. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    SCALABL_OK = 0,
    SCALABL_NULL = 1,    /* a pointer is null */
    SCALABL_ROUNDS = 2,  /* rounds outside 1 .. 16 */
    SCALABL_LAYER = 3,   /* layer id 2^32 - 1 */
    SCALABL_COUNT = 4,   /* a negative number of groups, or more than 2^32 */
    SCALABL_GROUP = 5,   /* a group id outside 0 .. 2^32 - 1 */
    SCALABL_RANK = 6,    /* rank outside 1 .. 2^34 (noise) or 1 .. 256 (the layer) */
    SCALABL_DTYPE = 7,   /* an unknown dtype, or adapters neither float32 nor of the rows' dtype */
    SCALABL_SIZE = 8,    /* a size is negative, or a product of sizes overflows */
    SCALABL_STRIDE = 9,  /* rows that are written overlap */
    SCALABL_MEMORY = 10, /* no memory for the scratch space */
    SCALABL_THREADS = 11, /* fewer than one thread */
    SCALABL_ISA = 12,    /* an instruction set that is unknown, or that this machine lacks */
    SCALABL_DEVICE = 13, /* CUDA reported an error, or was not compiled in */
    SCALABL_DRAW = 14    /* an entry of draws is negative, or draw + entry is 2^32 or more */
} scalabl_status;

/* One sentence on a status; "unknown status" for any other number. Never null; do not free. */
const char *scalabl_message(int status);

/* --- Noise --------------------------------------------------------------------------------- */

/* The Philox 4x32 block function: counter (4 words), key (2 words) -> out (4 words). */
scalabl_status scalabl_philox4x32(const uint32_t *counter, const uint32_t *key, int rounds,
                                  uint32_t *out);

/* Two words to two standard normals before they are rounded: out (2 doubles). For comparing
 * a port with this one: rounding to float hides nearly every difference. */
scalabl_status scalabl_box_muller(uint32_t a, uint32_t b, double *out);

/* eps of `count` groups of one layer, row-major (count, rank), version 1 of docs/conformance.md.
 * groups: `count` ids in [0, 2^32). draws: null, then all rows have draw `draw`; or `count`
 * numbers, then row g has draw + draws[g], which must be in [draw, 2^32). */
scalabl_status scalabl_normals(uint64_t seed, uint32_t draw, uint32_t layer, const int64_t *groups,
                               const int64_t *draws, int64_t count, int64_t rank, float *out);

/* --- The subspace-sampled low-rank update --------------------------------------------------- */

typedef enum {
    SCALABL_FLOAT32 = 0,
    SCALABL_FLOAT64 = 1,
    SCALABL_BFLOAT16 = 2,
    SCALABL_FLOAT16 = 3
} scalabl_dtype;

/* The arguments of
 *
 *     y += scaling * B ((A x) * (s + sigma * eps))        row by row,
 *
 * where eps of row i is the draw (seed, draw, layer, group of i). Matrices are row-major with unit
 * column stride; a row stride counts elements, may be zero or negative where rows are only read,
 * and for a single row is not used. */
typedef struct {
    int32_t dtype;         /* scalabl_dtype of x, y and their gradients ("rows") */
    int32_t adapter_dtype; /* of A, B, s, sigma and their gradients: SCALABL_FLOAT32 or `dtype` */
    int64_t rows, d_in, d_out, rank; /* rank 1 .. 256; the others may be zero */
    const void *x;         /* (rows, d_in) */
    int64_t x_stride;
    const void *A;         /* (rank, d_in) */
    int64_t A_stride;
    const void *B;         /* (d_out, rank) */
    int64_t B_stride;
    const void *s;         /* (rank,) contiguous */
    const void *sigma;     /* (rank,) contiguous */
    double scaling;
    int32_t noisy;         /* 0: the mean model, eps = 0; fields from here to rows_per_group are
                              then not read */
    uint32_t draw, layer;  /* layer below 2^32 - 1 */
    uint64_t seed;
    const int64_t *groups; /* rows i with the same g = i / rows_per_group share the eps of group
                              groups[g], an id in [0, 2^32); null: of group g */
    const int64_t *draws;  /* and of draw + draws[g], as in scalabl_normals; null: of draw */
    int64_t rows_per_group; /* at least 1 */
    int32_t threads;       /* at most; the result does not depend on it */
} scalabl_update;

/* y (rows, d_out) += the update. h: null, or (rows, rank) contiguous to receive A x, in float64 if
 * dtype is SCALABL_FLOAT64, else in float32, for the backward pass. */
scalabl_status scalabl_update_forward(const scalabl_update *op, void *y, int64_t y_stride, void *h);

/* The gradients, given grad_y (rows, d_out) and h of the forward pass (null: computed again, where
 * x is given). Each of the following may be null if it is not wanted:
 * grad_x (rows, d_in): the update's part is added to its values (the base layer's grad_y W);
 * grad_A (rank, d_in), grad_B (d_out, rank), grad_s (rank,), grad_sigma (rank,): contiguous,
 * overwritten. op->x may be null if neither grad_A nor h asks for it. The noise is drawn again. */
scalabl_status scalabl_update_backward(const scalabl_update *op, const void *grad_y,
                                       int64_t grad_y_stride, const void *h, void *grad_x,
                                       int64_t grad_x_stride, void *grad_A, void *grad_B,
                                       void *grad_s, void *grad_sigma);

/* Both as plain loops over doubles, for comparison (plain.cpp): slow, and `threads` is not used.
 * h of the forward pass is always computed again. */
scalabl_status scalabl_plain_forward(const scalabl_update *op, void *y, int64_t y_stride, void *h);
scalabl_status scalabl_plain_backward(const scalabl_update *op, const void *grad_y,
                                      int64_t grad_y_stride, void *grad_x, int64_t grad_x_stride,
                                      void *grad_A, void *grad_B, void *grad_s, void *grad_sigma);

/* Both for memory on a GPU, enqueued on a cudaStream_t: all pointers of op and of the arguments are
 * then of that device, groups and draws are taken modulo 2^32, `threads` is not used, and no call
 * waits for the GPU.
 * scratch: *scratch_bytes bytes of device memory that nothing else uses until the stream is done.
 * With scratch null, *scratch_bytes receives the number needed and nothing else happens. */
scalabl_status scalabl_cuda_update_forward(const scalabl_update *op, void *y, int64_t y_stride,
                                           void *h, void *scratch, int64_t *scratch_bytes,
                                           void *stream);
scalabl_status scalabl_cuda_update_backward(const scalabl_update *op, const void *grad_y,
                                            int64_t grad_y_stride, const void *h, void *grad_x,
                                            int64_t grad_x_stride, void *grad_A, void *grad_B,
                                            void *grad_s, void *grad_sigma, void *scratch,
                                            int64_t *scratch_bytes, void *stream);

/* --- RMSNorm, RoPE and SwiGLU of the model's blocks, on the CPU ------------------------------ */

/* dtype below is a scalabl_dtype other than SCALABL_FLOAT64. Matrices are contiguous, outputs do not
 * overlap inputs, and `threads` does not change a result. Each value is computed in float32 and
 * rounded once. */
#define SCALABL_MOST_HEAD_DIM 1024

typedef struct {
    int32_t dtype;
    int64_t rows, n;
    const void *x;      /* (rows, n) */
    const void *weight; /* (n,) */
    float eps;
    int32_t threads;
} scalabl_norm;

/* y (rows, n) = x scale * weight, scale = 1 / sqrt(mean(x^2) + eps); scale: null, or (rows,). */
scalabl_status scalabl_rms_norm(const scalabl_norm *op, void *y, float *scale);

/* grad_x (rows, n) = scale weight g - scale^3 mean(weight g x) x, of scale above and g = grad_y. */
scalabl_status scalabl_rms_norm_backward(const scalabl_norm *op, const void *grad_y,
                                         const float *scale, void *grad_x);

typedef struct {
    int32_t dtype;
    int64_t rows, heads, n; /* n: size of a head, even, at most SCALABL_MOST_HEAD_DIM */
    int64_t angles;         /* row i has the angles of row i % angles of cos and sin */
    const void *cos, *sin;  /* (angles, n) */
    const int64_t *places;  /* (rows,) or null: row i of x becomes row places[i] of y */
    int32_t back;           /* not 0: the transpose; row places[i] of x becomes row i of y */
    int32_t threads;
} scalabl_rotation;

/* Rows (heads, n): y_j = x_j cos_j - x_(j + n/2) sin_j for j < n/2, and
 * y_j = x_j cos_j + x_(j - n/2) sin_j above. The caller vouches for `places`. */
scalabl_status scalabl_rotate(const scalabl_rotation *op, const void *x, void *y);

/* y (n,) = gate / (1 + exp(-gate)) * up, and the gradients of gate and up. */
scalabl_status scalabl_swiglu(int32_t dtype, int64_t n, const void *gate, const void *up, void *y,
                              int32_t threads);
scalabl_status scalabl_swiglu_backward(int32_t dtype, int64_t n, const void *grad_y,
                                       const void *gate, const void *up, void *grad_gate,
                                       void *grad_up, int32_t threads);

/* --- A product of few rows, on the CPU --------------------------------------------------------- */

#define SCALABL_MOST_FEW_ROWS 16

typedef struct {
    int32_t dtype;              /* of all of them, not SCALABL_FLOAT64 */
    int64_t rows, d_in, d_out;  /* rows: at most SCALABL_MOST_FEW_ROWS */
    const void *x, *weight;     /* (rows, d_in), (d_out, d_in) */
    const void *bias;           /* null, or (d_out,) */
    int32_t threads;
} scalabl_product;

/* y (rows, d_out) = x weight^T + bias, with sums in float. It reads the weight once, and is for
 * products that this limits. */
scalabl_status scalabl_few_rows(const scalabl_product *op, void *y);

/* --- Frozen weights in 8 or 4 bits, on the CPU ------------------------------------------------ */

#define SCALABL_CODE_GROUP 64

typedef struct {
    int32_t dtype;         /* of scale and of the weight, not SCALABL_FLOAT64 */
    int64_t rows, n;
    const void *codes;     /* (rows, n) int8; or, with levels, (rows, 32 groups) bytes, each with
                              the codes of two weights, the first in its low half */
    int64_t codes_stride;  /* bytes from row to row */
    const void *scale;     /* (rows, 1); or, with levels, (rows, groups), groups = ceil(n / 64) */
    int64_t scale_stride;  /* values from row to row */
    const float *levels;   /* null, or 16 values: then code c stands for levels[c] */
    int32_t threads;
} scalabl_codes;

/* weight (rows, n) = its code or level times the scale of its row, or of its group of 64. */
scalabl_status scalabl_dequantize(const scalabl_codes *op, void *weight);

/* --- The build ------------------------------------------------------------------------------ */

/* The instruction set whose kernels run: "baseline", "avx2" or "avx512"; the widest that the
 * machine has, unless scalabl_use_isa names another (for tests and measurements; not
 * thread-safe). */
const char *scalabl_isa(void);
scalabl_status scalabl_use_isa(const char *name);

/* The CUDA architectures compiled in, such as "80 90", or "" without CUDA. */
const char *scalabl_cuda(void);

/* What this binary was built from (sha256, see CMakeLists.txt) and by which compiler. */
const char *scalabl_digest(void);
const char *scalabl_compiler(void);

#ifdef __cplusplus
}
#endif

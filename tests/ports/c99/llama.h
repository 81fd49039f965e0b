/* The Llama model, forward and backward (docs/conformance.md, "llama"). */
#ifndef LLAMA_H
#define LLAMA_H

#include <stddef.h>

#include "method.h"
#include "support.h"

/* ---- pieces ---- */

/* y = x / sqrt(mean(x^2) + eps) * weight, of every row of n. */
void rmsnorm(size_t rows, size_t n, const double *x, const double *weight, double eps, double *y);

/* Adds its derivative by x. */
void rmsnorm_backward(size_t rows, size_t n, const double *x, const double *weight, double eps,
                      const double *grad_y, double *grad_x);

enum rope_kind { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3 };

struct rope {
    enum rope_kind kind;
    double theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings;
};

/* f_0 .. f_(head_dim / 2 - 1), not rounded to float32. */
void inverse_frequencies(const struct rope *rope, size_t head_dim, double *frequencies);

/* ---- layers: the weights first, then what the forward pass keeps for the backward pass ---- */

/* A linear layer, adapted where op.r > 0; its gradients are those wanted of its parameters. */
struct linear {
    struct op op;
    struct op_gradients gradients;
};

struct attention {
    size_t batch, length, heads, kv_heads, head_dim;
    double eps;
    const double *frequencies;
    const double *q_norm, *k_norm;           /* NULL where heads are not normed */
    struct linear q_proj, k_proj, v_proj, o_proj;

    double *q_projected, *k_projected;       /* before norm and rotation */
    double *q, *k, *v;                       /* (batch, length, heads or kv_heads, head_dim) */
    double *probs;                           /* (batch, heads, length, length) */
};

/* x (batch * length, width) to what is returned, in the same shape. */
double *attention_forward(struct pool *pool, struct attention *attention, const double *x);
void attention_backward(struct pool *pool, struct attention *attention, const double *grad_y,
                        double *grad_x);

struct mlp {
    struct linear gate_proj, up_proj, down_proj;

    double *gate, *up;
};

double *mlp_forward(struct pool *pool, struct mlp *mlp, size_t rows, const double *x);
void mlp_backward(struct pool *pool, struct mlp *mlp, const double *grad_y, double *grad_x);

struct block {
    const double *attn_norm, *mlp_norm;
    struct attention attn;
    struct mlp mlp;

    const double *x;                         /* what came in */
    double *middle;                          /* after the attention */
};

struct model {
    size_t batch, length, width, layers;
    double eps;
    const double *embed_tokens;              /* (vocabulary, width) */
    const double *norm;
    struct block *blocks;
    struct linear lm_head;
};

/* What leaves the last block, (batch * length, width), before the last norm. */
double *model_forward(struct pool *pool, struct model *model, const size_t *tokens);
void model_backward(struct pool *pool, struct model *model, const double *grad_hidden);

/* lm_head of the norm of rows of the above. */
double *head_forward(struct pool *pool, struct model *model, size_t rows, const double *hidden);
void head_backward(struct pool *pool, struct model *model, const double *hidden, const double *grad_logits,
                   double *grad_hidden);

#endif

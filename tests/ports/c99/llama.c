#include "llama.h"

#include <math.h>
#include <string.h>

/* ---- pieces ---- */

static double root_mean_square(size_t n, const double *x, double eps)
{
    double sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    return sqrt(sum / (double)n + eps);
}

void rmsnorm(size_t rows, size_t n, const double *x, const double *weight, double eps, double *y)
{
    size_t row, i;

    for (row = 0; row < rows; row++) {
        double root = root_mean_square(n, x + row * n, eps);
        for (i = 0; i < n; i++) {
            y[row * n + i] = x[row * n + i] / root * weight[i];
        }
    }
}

/* With R the root: dx_i = w_i g_i / R - x_i (sum_j w_j g_j x_j) / (n R^3). */
static void rmsnorm_backward_row(size_t n, const double *x, const double *weight, double eps,
                                 const double *g, double *grad_x)
{
    double root = root_mean_square(n, x, eps), sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        sum += weight[i] * g[i] * x[i];
    }
    for (i = 0; i < n; i++) {
        grad_x[i] += weight[i] * g[i] / root - x[i] * sum / ((double)n * root * root * root);
    }
}

void rmsnorm_backward(size_t rows, size_t n, const double *x, const double *weight, double eps,
                      const double *grad_y, double *grad_x)
{
    size_t row;

    for (row = 0; row < rows; row++) {
        rmsnorm_backward_row(n, x + row * n, weight, eps, grad_y + row * n, grad_x + row * n);
    }
}

/* Llama 3.1: slow components are slowed further, fast ones are kept, between them a ramp. */
static double llama3_frequency(const struct rope *rope, double f)
{
    const double pi = 3.141592653589793;
    double turns = rope->original_max_position_embeddings * f / (2 * pi);
    double keep = (turns - rope->low_freq_factor) / (rope->high_freq_factor - rope->low_freq_factor);

    keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
    return keep * f + (1 - keep) * f / rope->factor;
}

void inverse_frequencies(const struct rope *rope, size_t head_dim, double *frequencies)
{
    size_t i;

    for (i = 0; i < head_dim / 2; i++) {
        double f = pow(rope->theta, -2.0 * (double)i / (double)head_dim);
        switch (rope->kind) {
        case ROPE_LINEAR:
            f = f / rope->factor;
            break;
        case ROPE_LLAMA3:
            f = llama3_frequency(rope, f);
            break;
        case ROPE_DEFAULT:
            break;
        }
        frequencies[i] = f;
    }
}

/* Turns the pairs (x_i, x_(i + h/2)) of one head by the angle direction * position * f_i. */
static void rotate(size_t head_dim, const double *frequencies, double position, double direction, double *x)
{
    size_t half = head_dim / 2, i;

    for (i = 0; i < half; i++) {
        double angle = position * frequencies[i];
        double c = cos(angle), s = direction * sin(angle);
        double first = x[i], second = x[i + half];
        x[i] = first * c - second * s;
        x[i + half] = second * c + first * s;
    }
}

/* ---- linear layers ---- */

static double *linear_forward(struct pool *pool, struct linear *linear, size_t rows, const double *x)
{
    double *y = pool_doubles(pool, product(rows, linear->op.d_out));

    linear->op.rows = rows;
    linear->op.x = x;
    linear->op.h = pool_doubles(pool, product(rows, linear->op.r));
    op_forward(&linear->op, y);
    return y;
}

/* Adds to the gradients of the layer's parameters and to grad_x. */
static void linear_backward(struct linear *linear, const double *grad_y, double *grad_x)
{
    linear->gradients.x = grad_x;
    op_backward(&linear->op, grad_y, &linear->gradients);
}

/* ---- attention ---- */

/* One head at one position of a tensor (batch, length, heads, head_dim). */
static double *head_at(const struct attention *a, double *x, size_t heads, size_t b, size_t t, size_t head)
{
    return x + ((b * a->length + t) * heads + head) * a->head_dim;
}

static double *probs_at(const struct attention *a, size_t b, size_t head, size_t t)
{
    return a->probs + ((b * a->heads + head) * a->length + t) * a->length;
}

static size_t kv_head_of(const struct attention *a, size_t head)
{
    return head * a->kv_heads / a->heads;
}

static void rotate_heads(const struct attention *a, size_t heads, double direction, double *x)
{
    size_t b, t, head;

    for (b = 0; b < a->batch; b++) {
        for (t = 0; t < a->length; t++) {
            for (head = 0; head < heads; head++) {
                rotate(a->head_dim, a->frequencies, (double)t, direction, head_at(a, x, heads, b, t, head));
            }
        }
    }
}

/* The norm of every head, if there is one, then the rotation. */
static double *place_heads(struct pool *pool, const struct attention *a, size_t heads, const double *norm,
                           const double *projected)
{
    size_t vectors = a->batch * a->length * heads;
    double *placed = pool_copy(pool, projected, product(vectors, a->head_dim));

    if (norm != NULL) {
        rmsnorm(vectors, a->head_dim, projected, norm, a->eps, placed);
    }
    rotate_heads(a, heads, 1, placed);
    return placed;
}

/* Its derivative; grad_placed is used up. */
static double *place_heads_backward(struct pool *pool, const struct attention *a, size_t heads,
                                    const double *norm, const double *projected, double *grad_placed)
{
    size_t vectors = a->batch * a->length * heads;
    double *grad;

    rotate_heads(a, heads, -1, grad_placed);
    if (norm == NULL) {
        return grad_placed;
    }
    grad = pool_doubles(pool, product(vectors, a->head_dim));
    rmsnorm_backward(vectors, a->head_dim, projected, norm, a->eps, grad_placed, grad);
    return grad;
}

/* softmax of q.k / sqrt(h) over the positions up to t, and the sum of v with it, into `mixed`. */
static void attend(const struct attention *a, size_t b, size_t head, size_t t, double *mixed)
{
    size_t kv = kv_head_of(a, head), j, i;
    const double *q = head_at(a, a->q, a->heads, b, t, head);
    double *probs = probs_at(a, b, head, t);

    for (j = 0; j <= t; j++) {
        const double *k = head_at(a, a->k, a->kv_heads, b, j, kv);
        double score = 0;
        for (i = 0; i < a->head_dim; i++) {
            score += q[i] * k[i];
        }
        probs[j] = score / sqrt((double)a->head_dim);
    }
    softmax(t + 1, probs, probs);
    for (j = 0; j <= t; j++) {
        const double *v = head_at(a, a->v, a->kv_heads, b, j, kv);
        for (i = 0; i < a->head_dim; i++) {
            mixed[i] += probs[j] * v[i];
        }
    }
}

double *attention_forward(struct pool *pool, struct attention *a, const double *x)
{
    size_t rows = a->batch * a->length, b, head, t;
    double *mixed = pool_doubles(pool, product(rows, a->heads * a->head_dim));

    a->q_projected = linear_forward(pool, &a->q_proj, rows, x);
    a->k_projected = linear_forward(pool, &a->k_proj, rows, x);
    a->v = linear_forward(pool, &a->v_proj, rows, x);
    a->q = place_heads(pool, a, a->heads, a->q_norm, a->q_projected);
    a->k = place_heads(pool, a, a->kv_heads, a->k_norm, a->k_projected);
    a->probs = pool_doubles(pool, product(rows * a->heads, a->length));
    for (b = 0; b < a->batch; b++) {
        for (head = 0; head < a->heads; head++) {
            for (t = 0; t < a->length; t++) {
                attend(a, b, head, t, head_at(a, mixed, a->heads, b, t, head));
            }
        }
    }
    return linear_forward(pool, &a->o_proj, rows, mixed);
}

struct attention_gradients {
    double *q, *k, *v;
};

/* With P the softmax and dP_j = g.v_j: dv_j = P_j g, dscore_j = P_j (dP_j - sum_l P_l dP_l). */
static void attend_backward(const struct attention *a, size_t b, size_t head, size_t t, const double *g,
                            const struct attention_gradients *gradients, double *grad_probs)
{
    size_t kv = kv_head_of(a, head), j, i;
    const double *q = head_at(a, a->q, a->heads, b, t, head);
    const double *probs = probs_at(a, b, head, t);
    double *grad_q = head_at(a, gradients->q, a->heads, b, t, head);
    double mean = 0;

    for (j = 0; j <= t; j++) {
        const double *v = head_at(a, a->v, a->kv_heads, b, j, kv);
        double *grad_v = head_at(a, gradients->v, a->kv_heads, b, j, kv);
        grad_probs[j] = 0;
        for (i = 0; i < a->head_dim; i++) {
            grad_probs[j] += g[i] * v[i];
            grad_v[i] += probs[j] * g[i];
        }
        mean += probs[j] * grad_probs[j];
    }
    for (j = 0; j <= t; j++) {
        const double *k = head_at(a, a->k, a->kv_heads, b, j, kv);
        double *grad_k = head_at(a, gradients->k, a->kv_heads, b, j, kv);
        double grad_score = probs[j] * (grad_probs[j] - mean) / sqrt((double)a->head_dim);
        for (i = 0; i < a->head_dim; i++) {
            grad_q[i] += grad_score * k[i];
            grad_k[i] += grad_score * q[i];
        }
    }
}

static void project_backward(struct pool *pool, struct attention *a, struct attention_gradients *gradients,
                             double *grad_x)
{
    double *grad_q = place_heads_backward(pool, a, a->heads, a->q_norm, a->q_projected, gradients->q);
    double *grad_k = place_heads_backward(pool, a, a->kv_heads, a->k_norm, a->k_projected, gradients->k);

    linear_backward(&a->q_proj, grad_q, grad_x);
    linear_backward(&a->k_proj, grad_k, grad_x);
    linear_backward(&a->v_proj, gradients->v, grad_x);
}

void attention_backward(struct pool *pool, struct attention *a, const double *grad_y, double *grad_x)
{
    size_t rows = a->batch * a->length, b, head, t;
    double *grad_mixed = pool_doubles(pool, product(rows, a->heads * a->head_dim));
    double *grad_probs = pool_doubles(pool, a->length);
    struct attention_gradients gradients;

    gradients.q = pool_doubles(pool, product(rows, a->heads * a->head_dim));
    gradients.k = pool_doubles(pool, product(rows, a->kv_heads * a->head_dim));
    gradients.v = pool_doubles(pool, product(rows, a->kv_heads * a->head_dim));
    linear_backward(&a->o_proj, grad_y, grad_mixed);
    for (b = 0; b < a->batch; b++) {
        for (head = 0; head < a->heads; head++) {
            for (t = 0; t < a->length; t++) {
                attend_backward(a, b, head, t, head_at(a, grad_mixed, a->heads, b, t, head), &gradients,
                                grad_probs);
            }
        }
    }
    project_backward(pool, a, &gradients, grad_x);
}

/* ---- SwiGLU ---- */

static double sigmoid(double z)
{
    return 1 / (1 + exp(-z));
}

double *mlp_forward(struct pool *pool, struct mlp *mlp, size_t rows, const double *x)
{
    size_t count = product(rows, mlp->gate_proj.op.d_out), i;
    double *inner = pool_doubles(pool, count);

    mlp->gate = linear_forward(pool, &mlp->gate_proj, rows, x);
    mlp->up = linear_forward(pool, &mlp->up_proj, rows, x);
    for (i = 0; i < count; i++) {
        double z = mlp->gate[i];
        inner[i] = z / (1 + exp(-z)) * mlp->up[i];
    }
    return linear_forward(pool, &mlp->down_proj, rows, inner);
}

/* silu(z) = z p with p = sigmoid(z); its derivative is p + z p (1 - p). */
void mlp_backward(struct pool *pool, struct mlp *mlp, const double *grad_y, double *grad_x)
{
    size_t count = mlp->gate_proj.op.rows * mlp->gate_proj.op.d_out, i;
    double *grad_inner = pool_doubles(pool, count);
    double *grad_gate = pool_doubles(pool, count);
    double *grad_up = pool_doubles(pool, count);

    linear_backward(&mlp->down_proj, grad_y, grad_inner);
    for (i = 0; i < count; i++) {
        double z = mlp->gate[i], p = sigmoid(z);
        grad_up[i] = grad_inner[i] * z * p;
        grad_gate[i] = grad_inner[i] * mlp->up[i] * (p + z * p * (1 - p));
    }
    linear_backward(&mlp->gate_proj, grad_gate, grad_x);
    linear_backward(&mlp->up_proj, grad_up, grad_x);
}

/* ---- the model ---- */

/* a + b, into a. */
static double *add(size_t count, double *a, const double *b)
{
    size_t i;

    for (i = 0; i < count; i++) {
        a[i] += b[i];
    }
    return a;
}

/* x + attn(norm(x)), then that + mlp(norm(that)). */
static double *block_forward(struct pool *pool, const struct model *model, struct block *block,
                             const double *x)
{
    size_t rows = model->batch * model->length, count = rows * model->width;
    double *normed = pool_doubles(pool, count);
    double *normed_middle = pool_doubles(pool, count);

    block->x = x;
    rmsnorm(rows, model->width, x, block->attn_norm, model->eps, normed);
    block->middle = add(count, attention_forward(pool, &block->attn, normed), x);
    rmsnorm(rows, model->width, block->middle, block->mlp_norm, model->eps, normed_middle);
    return add(count, mlp_forward(pool, &block->mlp, rows, normed_middle), block->middle);
}

static double *block_backward(struct pool *pool, const struct model *model, struct block *block,
                              const double *grad_y)
{
    size_t rows = model->batch * model->length, count = rows * model->width;
    double *grad_normed_middle = pool_doubles(pool, count);
    double *grad_middle = pool_copy(pool, grad_y, count);
    double *grad_normed = pool_doubles(pool, count);
    double *grad_x;

    mlp_backward(pool, &block->mlp, grad_y, grad_normed_middle);
    rmsnorm_backward(rows, model->width, block->middle, block->mlp_norm, model->eps, grad_normed_middle,
                     grad_middle);
    grad_x = pool_copy(pool, grad_middle, count);
    attention_backward(pool, &block->attn, grad_middle, grad_normed);
    rmsnorm_backward(rows, model->width, block->x, block->attn_norm, model->eps, grad_normed, grad_x);
    return grad_x;
}

double *model_forward(struct pool *pool, struct model *model, const size_t *tokens)
{
    size_t rows = model->batch * model->length, i;
    double *x = pool_doubles(pool, product(rows, model->width));

    for (i = 0; i < rows; i++) {
        memcpy(x + i * model->width, model->embed_tokens + tokens[i] * model->width,
               model->width * sizeof *x);
    }
    for (i = 0; i < model->layers; i++) {
        x = block_forward(pool, model, &model->blocks[i], x);
    }
    return x;
}

void model_backward(struct pool *pool, struct model *model, const double *grad_hidden)
{
    size_t i;

    for (i = model->layers; i > 0; i--) {
        grad_hidden = block_backward(pool, model, &model->blocks[i - 1], grad_hidden);
    }
}

double *head_forward(struct pool *pool, struct model *model, size_t rows, const double *hidden)
{
    double *normed = pool_doubles(pool, product(rows, model->width));

    rmsnorm(rows, model->width, hidden, model->norm, model->eps, normed);
    return linear_forward(pool, &model->lm_head, rows, normed);
}

void head_backward(struct pool *pool, struct model *model, const double *hidden, const double *grad_logits,
                   double *grad_hidden)
{
    size_t rows = model->lm_head.op.rows;
    double *grad_normed = pool_doubles(pool, rows * model->width);

    linear_backward(&model->lm_head, grad_logits, grad_normed);
    rmsnorm_backward(rows, model->width, hidden, model->norm, model->eps, grad_normed, grad_hidden);
}

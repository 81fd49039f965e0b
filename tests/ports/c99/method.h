/* The method itself. Equations are numbered as in docs/method.md; matrices are row-major, (out, in). */
#ifndef METHOD_H
#define METHOD_H

#include <stddef.h>
#include <stdint.h>

#include "noise.h"

/* ---- the op, equations (1) and (1a) to (1e) ---- */

enum sampling { SAMPLING_BATCH, SAMPLING_EXAMPLE, SAMPLING_TOKEN };

/* The group of a row; `per_example` rows belong to one first index, `groups` may be NULL. */
uint32_t row_group(enum sampling sampling, const uint32_t *groups, size_t row, size_t per_example);

/* A linear layer with its adapter; r = 0 is a linear layer without one. */
struct op {
    size_t rows, d_in, d_out, r;
    const double *x;         /* (rows, d_in) */
    const double *weight;    /* (d_out, d_in) */
    const double *bias;      /* (d_out), or NULL */
    const double *A;         /* (r, d_in) */
    const double *B;         /* (d_out, r) */
    const double *s;         /* (r) */
    const double *sigma;     /* (r) */
    double scaling;
    const double *eps;       /* (rows, r), or NULL: the mean model */
    double *h;               /* (rows, r), room for A x, kept from the forward to the backward pass */
};

/* Each may be NULL: not wanted. What is wanted is added to what is there. */
struct op_gradients {
    double *x, *weight, *bias, *A, *B, *s, *sigma;
};

void op_forward(const struct op *op, double *y);
void op_backward(const struct op *op, const double *grad_y, const struct op_gradients *gradients);

/* ---- the objective, equations (4) to (6) ---- */

enum direction { KL_FORWARD, KL_OFFICIAL };

double complexity(enum direction direction, size_t r, const double *s, const double *sigma,
                     double prior_std);

/* The derivatives by log s_k and log sigma_k, times `factor`, added. */
void kl_gradient(enum direction direction, size_t r, const double *s, const double *sigma,
                 double prior_std, double factor, double *grad_log_s, double *grad_log_sigma);

void softmax(size_t n, const double *logits, double *probs);

/* The mean over rows of -log softmax(logits)_label. */
double mean_nll(size_t rows, size_t classes, const double *logits, const size_t *labels);

/* Its derivative by the logits. */
void mean_nll_gradient(size_t rows, size_t classes, const double *logits, const size_t *labels,
                       double *grad_logits);

/* ---- the start ---- */

void kaiming(uint64_t seed, uint32_t layer, size_t r, size_t d_in, double *matrix);

/* Leaves V^T in the matrix (r, d_in), r <= d_in; singular values in any order. */
void thin_svd(size_t r, size_t d_in, double *matrix, double *singular);
void initial_log_sigma(uint64_t seed, uint32_t layer, size_t r, size_t d_in, double init_sigma,
                       double *log_sigma);

/* ---- schedules, equation (7) ---- */

double warmup_factor(double warmup, double steps, double step);
uint64_t kl_period(double num_examples, double batch);
double kl_weight(uint64_t period, uint64_t step);

/* ---- AdamW ---- */

struct adamw {
    double beta1, beta2, eps, weight_decay;
};

/* One step of n numbers; t counts from 1. */
void adamw_step(const struct adamw *adamw, double rate, double t, size_t n, const double *gradient,
                double *p, double *m, double *v);

/* ---- prediction, equations (8) and (9) ---- */

double entropy(size_t n, const double *p);
void predictive(size_t draws, size_t rows, size_t classes, const double *logits, double *probs,
                double *entropies, double *expected, double *mutual);

/* ---- metrics ---- */

double expected_calibration_error(size_t n, size_t classes, const double *probs, const size_t *labels,
                                  size_t bins);
double accuracy(size_t n, size_t classes, const double *probs, const size_t *labels);
double probability_nll(size_t n, size_t classes, const double *probs, const size_t *labels);
double brier(size_t n, size_t classes, const double *probs, const size_t *labels);
double auroc(size_t n, const double *scores, const size_t *positive);

#endif

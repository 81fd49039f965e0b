/* One training step of a model whose layers are adapted (docs/conformance.md, "training step"). */
#ifndef TRAIN_H
#define TRAIN_H

#include <stddef.h>
#include <stdint.h>

#include "llama.h"

/* A trained tensor, its gradient and AdamW's moments. */
struct parameter {
    size_t count;
    double *value, *gradient, *m, *v;
};

enum { A_MATRIX, B_MATRIX, LOG_S, LOG_SIGMA, PARAMETERS };

struct adapter {
    struct linear *linear;
    uint32_t layer;                          /* its id in the noise */
    struct parameter parameters[PARAMETERS];
    double *s, *sigma;                       /* (r), filled by the step */
};

enum objective { OBJECTIVE_ELBO, OBJECTIVE_OFFICIAL };

struct training {
    struct model *model;
    size_t rank, adapter_count;
    struct adapter *adapters;

    enum objective objective;
    enum direction kl_direction;
    double scaling, prior_std, beta, num_examples;
    struct noise noise;
    int without_noise;                       /* the mean model */
    uint64_t step;
    double steps, warmup, lr, variational_lr, kl_lr;
    struct adamw adamw;

    /* the batch; lengths and ids (batch), tokens (batch, length) padded on the right */
    const size_t *tokens, *lengths, *labels;
    const uint32_t *ids;

    /* results; the trained tensors, their gradients and moments are changed in place */
    double nll, kl, loss;
};

/* One step. The next one begins where it ends: step and draw are one larger. */
void training_step(struct pool *pool, struct training *training);

/* The class logits (batch, C) under the noise of `training`. */
double *class_logits(struct pool *pool, struct training *training);

#endif

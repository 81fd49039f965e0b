#include "train.h"

#include <math.h>
#include <string.h>

/* exp(log_s) or exp(log_sigma), (2). */
static double *exponentials(struct pool *pool, const struct parameter *parameter)
{
    double *values = pool_doubles(pool, parameter->count);
    size_t k;

    for (k = 0; k < parameter->count; k++) {
        values[k] = exp(parameter->value[k]);
    }
    return values;
}

/* eps of every row of a layer whose rows per_example belong to one example, (rows, r). */
static double *draw_eps(struct pool *pool, const struct training *training, uint32_t layer,
                        size_t per_example)
{
    size_t rows = training->model->batch * per_example, row;
    double *eps = pool_doubles(pool, product(rows, training->rank));

    for (row = 0; row < rows; row++) {
        uint32_t group = row_group(SAMPLING_EXAMPLE, training->ids, row, per_example);
        noise_normal(&training->noise, layer, group, training->rank, eps + row * training->rank);
    }
    return eps;
}

/* Makes the layer compute the op with this adapter; lm_head sees one row of each example. */
static void attach(struct pool *pool, const struct training *training, struct adapter *adapter)
{
    struct op *op = &adapter->linear->op;
    struct op_gradients *gradients = &adapter->linear->gradients;
    int is_head = adapter->linear == &training->model->lm_head;

    adapter->s = exponentials(pool, &adapter->parameters[LOG_S]);
    adapter->sigma = exponentials(pool, &adapter->parameters[LOG_SIGMA]);
    op->r = training->rank;
    op->scaling = training->scaling;
    op->A = adapter->parameters[A_MATRIX].value;
    op->B = adapter->parameters[B_MATRIX].value;
    op->s = adapter->s;
    op->sigma = adapter->sigma;
    op->eps = training->without_noise
        ? NULL
        : draw_eps(pool, training, adapter->layer, is_head ? 1 : training->model->length);
    gradients->A = adapter->parameters[A_MATRIX].gradient;
    gradients->B = adapter->parameters[B_MATRIX].gradient;
    gradients->s = adapter->parameters[LOG_S].gradient;
    gradients->sigma = adapter->parameters[LOG_SIGMA].gradient;
}

/* Copies the row of every example's last real token from or to (batch, length, width). */
static void last_rows(const struct training *training, double *last, double *all, int gather)
{
    size_t width = training->model->width, b;

    for (b = 0; b < training->model->batch; b++) {
        double *row = all + (b * training->model->length + training->lengths[b] - 1) * width;
        if (gather) {
            memcpy(last + b * width, row, width * sizeof *row);
        } else {
            memcpy(row, last + b * width, width * sizeof *row);
        }
    }
}

/* The NLL, and its derivative by every parameter (by s and sigma still, not by their logarithms). */
static void nll_and_gradients(struct pool *pool, struct training *training)
{
    struct model *model = training->model;
    size_t classes = model->lm_head.op.d_out, count = model->batch * model->width;
    double *hidden = model_forward(pool, model, training->tokens);
    double *grad_hidden = pool_doubles(pool, product(count, model->length));
    double *last = pool_doubles(pool, count), *grad_last = pool_doubles(pool, count);
    double *grad_logits = pool_doubles(pool, product(model->batch, classes));
    double *logits;

    last_rows(training, last, hidden, 1);
    logits = head_forward(pool, model, model->batch, last);
    training->nll = mean_nll(model->batch, classes, logits, training->labels);
    mean_nll_gradient(model->batch, classes, logits, training->labels, grad_logits);
    head_backward(pool, model, last, grad_logits, grad_last);
    last_rows(training, grad_last, grad_hidden, 0);
    model_backward(pool, model, grad_hidden);
}

/* From the gradients by s and sigma to those by their logarithms: s = exp(log_s). */
static void through_exp(struct adapter *adapter)
{
    size_t k;

    for (k = 0; k < adapter->parameters[LOG_S].count; k++) {
        adapter->parameters[LOG_S].gradient[k] *= adapter->s[k];
        adapter->parameters[LOG_SIGMA].gradient[k] *= adapter->sigma[k];
    }
}

/* (4): the KL of every layer, and for the ELBO its share of loss and gradients. */
static void add_kl(struct training *training)
{
    double factor = training->beta / training->num_examples;
    size_t i;

    training->kl = 0;
    for (i = 0; i < training->adapter_count; i++) {
        struct adapter *adapter = &training->adapters[i];
        training->kl += complexity(training->kl_direction, training->rank, adapter->s, adapter->sigma,
                                      training->prior_std);
        if (training->objective == OBJECTIVE_ELBO) {
            kl_gradient(training->kl_direction, training->rank, adapter->s, adapter->sigma,
                        training->prior_std, factor, adapter->parameters[LOG_S].gradient,
                        adapter->parameters[LOG_SIGMA].gradient);
        }
    }
    training->loss = training->nll;
    if (training->objective == OBJECTIVE_ELBO) {
        training->loss += factor * training->kl;
    }
}

static void adamw_steps(struct training *training, struct adapter *adapter, double warmup)
{
    double t = (double)training->step + 1;
    size_t i;

    for (i = 0; i < PARAMETERS; i++) {
        struct parameter *p = &adapter->parameters[i];
        double rate = i == LOG_S || i == LOG_SIGMA ? training->variational_lr : training->lr;
        adamw_step(&training->adamw, rate * warmup, t, p->count, p->gradient, p->value, p->m, p->v);
    }
}

/* Objective "official": an SGD step on the summed KL at the new values, (7). */
static void kl_step(struct pool *pool, struct training *training, struct adapter *adapter, double warmup)
{
    struct parameter *log_s = &adapter->parameters[LOG_S];
    struct parameter *log_sigma = &adapter->parameters[LOG_SIGMA];
    uint64_t period = kl_period(training->num_examples, (double)training->model->batch);
    double rate = training->kl_lr * warmup * kl_weight(period, training->step);
    double *s = exponentials(pool, log_s), *sigma = exponentials(pool, log_sigma);

    kl_gradient(training->kl_direction, training->rank, s, sigma, training->prior_std, -rate,
                log_s->value, log_sigma->value);
}

static void keep_above(struct parameter *parameter, double lowest)
{
    size_t k;

    for (k = 0; k < parameter->count; k++) {
        if (parameter->value[k] < lowest) {
            parameter->value[k] = lowest;
        }
    }
}

/* Gradients are added up, so they begin at 0. */
static void begin(struct pool *pool, struct training *training)
{
    size_t i, j;

    for (i = 0; i < training->adapter_count; i++) {
        struct adapter *adapter = &training->adapters[i];
        for (j = 0; j < PARAMETERS; j++) {
            adapter->parameters[j].gradient = pool_doubles(pool, adapter->parameters[j].count);
        }
        attach(pool, training, adapter);
    }
}

double *class_logits(struct pool *pool, struct training *training)
{
    struct model *model = training->model;
    double *last = pool_doubles(pool, product(model->batch, model->width));

    begin(pool, training);
    last_rows(training, last, model_forward(pool, model, training->tokens), 1);
    return head_forward(pool, model, model->batch, last);
}

void training_step(struct pool *pool, struct training *training)
{
    double warmup = warmup_factor(training->warmup, training->steps, (double)training->step);
    size_t i;

    begin(pool, training);
    nll_and_gradients(pool, training);
    for (i = 0; i < training->adapter_count; i++) {
        through_exp(&training->adapters[i]);
    }
    add_kl(training);
    for (i = 0; i < training->adapter_count; i++) {
        adamw_steps(training, &training->adapters[i], warmup);
        if (training->objective == OBJECTIVE_OFFICIAL) {
            kl_step(pool, training, &training->adapters[i], warmup);
        }
        keep_above(&training->adapters[i].parameters[LOG_SIGMA], -20);
    }
    training->step++;
    training->noise.draw++;
}

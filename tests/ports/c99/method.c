#include "method.h"

#include <math.h>

static double square(double x)
{
    return x * x;
}

static double dot(size_t n, const double *a, const double *b)
{
    double sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* y = y + a x; nothing where y is not wanted. */
static void add_scaled(size_t n, double a, const double *x, double *y)
{
    size_t i;

    for (i = 0; y != NULL && i < n; i++) {
        y[i] += a * x[i];
    }
}

/* Row i of a matrix, or NULL of one that is not wanted. */
static double *row_of(double *matrix, size_t i, size_t width)
{
    return matrix == NULL ? NULL : matrix + i * width;
}

/* ---- the op ---- */

uint32_t row_group(enum sampling sampling, const uint32_t *groups, size_t row, size_t per_example)
{
    size_t example = row / per_example;

    if (sampling == SAMPLING_BATCH) {
        return 0;
    }
    if (groups != NULL) {
        return groups[example];
    }
    return (uint32_t)(sampling == SAMPLING_TOKEN ? row : example);
}

static double eps_of(const struct op *op, size_t row, size_t k)
{
    return op->eps == NULL ? 0.0 : op->eps[row * op->r + k];
}

/* f = c (s + sigma eps) of a row's component. */
static double factor_of(const struct op *op, size_t row, size_t k)
{
    return op->scaling * (op->s[k] + op->sigma[k] * eps_of(op, row, k));
}

/* (1a) y = W x + bias + B u, u = f * h, h = A x. */
static void op_forward_row(const struct op *op, size_t row, double *y)
{
    const double *x = op->x + row * op->d_in;
    size_t i, k;

    for (i = 0; i < op->d_out; i++) {
        y[i] = dot(op->d_in, op->weight + i * op->d_in, x) + (op->bias == NULL ? 0.0 : op->bias[i]);
    }
    for (k = 0; k < op->r; k++) {
        double h = dot(op->d_in, op->A + k * op->d_in, x);
        double u = factor_of(op, row, k) * h;
        op->h[row * op->r + k] = h;
        for (i = 0; i < op->d_out; i++) {
            y[i] += op->B[i * op->r + k] * u;
        }
    }
}

void op_forward(const struct op *op, double *y)
{
    size_t row;

    for (row = 0; row < op->rows; row++) {
        op_forward_row(op, row, y + row * op->d_out);
    }
}

/* The share of W and bias: W^T g in (1c), g x^T and g in (1d). */
static void op_backward_base(const struct op *op, const double *x, const double *g,
                             const struct op_gradients *gradients, double *grad_x)
{
    size_t i;

    for (i = 0; i < op->d_out; i++) {
        add_scaled(op->d_in, g[i], op->weight + i * op->d_in, grad_x);
        add_scaled(op->d_in, g[i], x, row_of(gradients->weight, i, op->d_in));
        if (gradients->bias != NULL) {
            gradients->bias[i] += g[i];
        }
    }
}

/* The share of component k of one row: (1b), and what it adds to (1c), (1d) and (1e). */
static void op_backward_component(const struct op *op, size_t row, size_t k, const double *x,
                                  const double *g, const struct op_gradients *gradients, double *grad_x)
{
    double f = factor_of(op, row, k);
    double h = op->h[row * op->r + k];
    double d = 0, dh, ds;
    size_t i;

    for (i = 0; i < op->d_out; i++) {
        d += op->B[i * op->r + k] * g[i];
        if (gradients->B != NULL) {
            gradients->B[i * op->r + k] += g[i] * (f * h);
        }
    }
    dh = f * d;
    ds = op->scaling * h * d;
    add_scaled(op->d_in, dh, op->A + k * op->d_in, grad_x);
    add_scaled(op->d_in, dh, x, row_of(gradients->A, k, op->d_in));
    if (gradients->s != NULL) {
        gradients->s[k] += ds;
    }
    if (gradients->sigma != NULL) {
        gradients->sigma[k] += ds * eps_of(op, row, k);
    }
}

void op_backward(const struct op *op, const double *grad_y, const struct op_gradients *gradients)
{
    size_t row, k;

    for (row = 0; row < op->rows; row++) {
        const double *x = op->x + row * op->d_in;
        const double *g = grad_y + row * op->d_out;
        double *grad_x = row_of(gradients->x, row, op->d_in);
        op_backward_base(op, x, g, gradients, grad_x);
        for (k = 0; k < op->r; k++) {
            op_backward_component(op, row, k, x, g, gradients, grad_x);
        }
    }
}

/* ---- the objective ---- */

double complexity(enum direction direction, size_t r, const double *s, const double *sigma,
                     double prior_std)
{
    double sum = 0;
    size_t k;

    for (k = 0; k < r; k++) {
        if (direction == KL_FORWARD) {       /* (5) */
            sum += log(prior_std / sigma[k])
                + (square(sigma[k]) + square(s[k])) / (2 * square(prior_std)) - 0.5;
        } else {                             /* (6) */
            sum += log(sigma[k] / prior_std)
                + (square(prior_std) + square(s[k])) / (2 * square(sigma[k])) - 0.5;
        }
    }
    return sum;
}

/* (5) and (6) derived by log s and log sigma: d/d log z = z d/dz. */
void kl_gradient(enum direction direction, size_t r, const double *s, const double *sigma,
                 double prior_std, double factor, double *grad_log_s, double *grad_log_sigma)
{
    size_t k;

    for (k = 0; k < r; k++) {
        if (direction == KL_FORWARD) {
            grad_log_s[k] += factor * square(s[k] / prior_std);
            grad_log_sigma[k] += factor * (square(sigma[k] / prior_std) - 1);
        } else {
            grad_log_s[k] += factor * square(s[k] / sigma[k]);
            grad_log_sigma[k] += factor * (1 - (square(prior_std) + square(s[k])) / square(sigma[k]));
        }
    }
}

static double largest(size_t n, const double *x)
{
    double most = x[0];
    size_t i;

    for (i = 1; i < n; i++) {
        if (x[i] > most) {
            most = x[i];
        }
    }
    return most;
}

/* log sum exp x_i, which does not overflow. */
static double log_sum_exp(size_t n, const double *x)
{
    double most = largest(n, x), sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        sum += exp(x[i] - most);
    }
    return most + log(sum);
}

void softmax(size_t n, const double *logits, double *probs)
{
    double most = largest(n, logits), sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        probs[i] = exp(logits[i] - most);
        sum += probs[i];
    }
    for (i = 0; i < n; i++) {
        probs[i] /= sum;
    }
}

double mean_nll(size_t rows, size_t classes, const double *logits, const size_t *labels)
{
    double sum = 0;
    size_t i;

    for (i = 0; i < rows; i++) {
        const double *row = logits + i * classes;
        sum += log_sum_exp(classes, row) - row[labels[i]];
    }
    return sum / (double)rows;
}

void mean_nll_gradient(size_t rows, size_t classes, const double *logits, const size_t *labels,
                       double *grad_logits)
{
    size_t i, c;

    for (i = 0; i < rows; i++) {
        double *row = grad_logits + i * classes;
        softmax(classes, logits + i * classes, row);
        row[labels[i]] -= 1;
        for (c = 0; c < classes; c++) {
            row[c] /= (double)rows;
        }
    }
}

/* ---- the start ---- */

/* u_i of stream 2^62 + layer, in (0, 1). */
static double start_uniform(uint64_t seed, uint32_t layer, uint64_t index)
{
    uint64_t stream = ((uint64_t)1 << 62) + layer;

    return ((double)stream_word(seed, stream, index) + 0.5) * 0x1p-32;
}

void kaiming(uint64_t seed, uint32_t layer, size_t r, size_t d_in, double *matrix)
{
    size_t i;

    for (i = 0; i < r * d_in; i++) {
        matrix[i] = (2 * start_uniform(seed, layer, i) - 1) / sqrt((double)d_in);
    }
}

/* sigma uniform in [init_sigma / sqrt 2, init_sigma]. */
void initial_log_sigma(uint64_t seed, uint32_t layer, size_t r, size_t d_in, double init_sigma,
                       double *log_sigma)
{
    double low = init_sigma / sqrt(2);
    size_t k;

    for (k = 0; k < r; k++) {
        log_sigma[k] = log(low + (init_sigma - low) * start_uniform(seed, layer, r * d_in + k));
    }
}

/* Turns the rows p and q in their plane until they are orthogonal; returns how far they were from it. */
static double orthogonal(size_t n, double *p, double *q)
{
    double pp = dot(n, p, p), qq = dot(n, q, q), pq = dot(n, p, q), ratio, t, cosine, sine;
    size_t j;

    if (pq == 0) {
        return 0;
    }
    ratio = (qq - pp) / (2 * pq);
    t = (ratio < 0 ? -1 : 1) / (fabs(ratio) + sqrt(1 + square(ratio)));
    cosine = 1 / sqrt(1 + square(t));
    sine = cosine * t;
    for (j = 0; j < n; j++) {
        double a = p[j], b = q[j];
        p[j] = cosine * a - sine * b;
        q[j] = sine * a + cosine * b;
    }
    return fabs(pq) / sqrt(pp * qq);
}

/* Hestenes: orthogonal rows U^T M = diag(S) V^T, so that their lengths are S. */
void thin_svd(size_t r, size_t d_in, double *matrix, double *singular)
{
    double worst = 1;
    size_t i, k, j, sweep;

    for (sweep = 0; sweep < 60 && worst > 1e-16; sweep++) {
        worst = 0;
        for (i = 0; i < r; i++) {
            for (k = i + 1; k < r; k++) {
                worst = fmax(worst, orthogonal(d_in, matrix + i * d_in, matrix + k * d_in));
            }
        }
    }
    for (k = 0; k < r; k++) {
        double *row = matrix + k * d_in;
        singular[k] = sqrt(dot(d_in, row, row));
        for (j = 0; j < d_in; j++) {
            row[j] /= singular[k];
        }
    }
}

/* ---- schedules ---- */

double warmup_factor(double warmup, double steps, double step)
{
    double rise = floor(warmup * steps);

    return step < rise ? step / rise : (steps - step) / (steps - rise);
}

/* (7) M */
uint64_t kl_period(double num_examples, double batch)
{
    const double pi = 3.141592653589793;

    return (uint64_t)fmax(1, floor(100 * pow(num_examples, pi / 8) / batch));
}

/* (7) pi_i = 2^i / (2^(M+1) - 1), both divided by 2^(M+1), which overflows; M from 1. */
double kl_weight(uint64_t period, uint64_t step)
{
    int i = (int)(step % period) + 1;
    int M = (int)period;

    return ldexp(1, i - M - 1) / (1 - ldexp(1, -M - 1));
}

/* ---- AdamW ---- */

void adamw_step(const struct adamw *adamw, double rate, double t, size_t n, const double *gradient,
                double *p, double *m, double *v)
{
    double correction1 = 1 - pow(adamw->beta1, t);
    double correction2 = 1 - pow(adamw->beta2, t);
    size_t i;

    for (i = 0; i < n; i++) {
        double g = gradient[i];
        p[i] *= 1 - rate * adamw->weight_decay;
        m[i] = adamw->beta1 * m[i] + (1 - adamw->beta1) * g;
        v[i] = adamw->beta2 * v[i] + (1 - adamw->beta2) * g * g;
        p[i] -= rate * (m[i] / correction1) / (sqrt(v[i] / correction2) + adamw->eps);
    }
}

/* ---- prediction ---- */

double entropy(size_t n, const double *p)
{
    double sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        sum -= p[i] > 0 ? p[i] * log(p[i]) : 0.0;
    }
    return sum;
}

/* (8) and (9) of one row, whose draws lie `stride` apart; probs is first the softmax of a draw. */
static void predictive_row(size_t draws, size_t stride, size_t classes, const double *logits,
                           double *probs, double *expected)
{
    size_t draw, c;

    *expected = 0;
    for (draw = 0; draw < draws; draw++) {
        const double *row = logits + draw * stride;
        double normaliser = log_sum_exp(classes, row);
        for (c = 0; c < classes; c++) {
            double p = exp(row[c] - normaliser);
            probs[c] += p / (double)draws;
            *expected -= p * (row[c] - normaliser) / (double)draws;
        }
    }
}

/* probs must be zero on entry. */
void predictive(size_t draws, size_t rows, size_t classes, const double *logits, double *probs,
                double *entropies, double *expected, double *mutual)
{
    size_t i;

    for (i = 0; i < rows; i++) {
        double *row = probs + i * classes;
        predictive_row(draws, rows * classes, classes, logits + i * classes, row, &expected[i]);
        entropies[i] = entropy(classes, row);
        mutual[i] = entropies[i] > expected[i] ? entropies[i] - expected[i] : 0.0;
    }
}

/* ---- metrics ---- */

/* The answer of a row: the first of its largest probabilities. */
static size_t answer(size_t classes, const double *p)
{
    size_t c, best = 0;

    for (c = 1; c < classes; c++) {
        if (p[c] > p[best]) {
            best = c;
        }
    }
    return best;
}

static size_t bin_of(double confidence, size_t bins)
{
    double bin = floor(confidence * (double)bins);

    return bin < (double)bins - 1 ? (size_t)bin : bins - 1;
}

/* (rows / N) |accuracy - mean confidence| of a bin = |answers right - sum of confidences| / N. */
double expected_calibration_error(size_t n, size_t classes, const double *probs, const size_t *labels,
                                  size_t bins)
{
    double sum = 0;
    size_t bin, i;

    for (bin = 0; bin < bins; bin++) {
        double gap = 0;
        for (i = 0; i < n; i++) {
            const double *p = probs + i * classes;
            size_t best = answer(classes, p);
            if (bin_of(p[best], bins) == bin) {
                gap += (best == labels[i] ? 1.0 : 0.0) - p[best];
            }
        }
        sum += fabs(gap);
    }
    return sum / (double)n;
}

double accuracy(size_t n, size_t classes, const double *probs, const size_t *labels)
{
    size_t i, right = 0;

    for (i = 0; i < n; i++) {
        right += answer(classes, probs + i * classes) == labels[i];
    }
    return (double)right / (double)n;
}

double probability_nll(size_t n, size_t classes, const double *probs, const size_t *labels)
{
    double sum = 0;
    size_t i;

    for (i = 0; i < n; i++) {
        sum -= log(probs[i * classes + labels[i]]);
    }
    return sum / (double)n;
}

double brier(size_t n, size_t classes, const double *probs, const size_t *labels)
{
    double sum = 0;
    size_t i, c;

    for (i = 0; i < n; i++) {
        for (c = 0; c < classes; c++) {
            sum += square(probs[i * classes + c] - (c == labels[i] ? 1.0 : 0.0));
        }
    }
    return sum / (double)n;
}

double auroc(size_t n, const double *scores, const size_t *positive)
{
    double won = 0, pairs = 0;
    size_t i, j;

    for (i = 0; i < n; i++) {
        for (j = 0; j < n; j++) {
            if (positive[i] == 1 && positive[j] == 0) {
                pairs += 1;
                won += scores[i] > scores[j] ? 1.0 : scores[i] == scores[j] ? 0.5 : 0.0;
            }
        }
    }
    return won / pairs;
}

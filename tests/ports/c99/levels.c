#include "levels.h"

#include <math.h>
#include <string.h>

#include "method.h"

static void run_philox(const struct kit_case *c)
{
    const struct tensor *counter = shaped(c, "counter", 2);
    size_t n = counter->shape[0], rounds = whole(c, "rounds", 1), i, j;
    const uint32_t *counters = words_of(c, "counter", product(4, n));
    const uint32_t *keys = words_of(c, "key", product(2, n));
    int64_t *result = pool_take(c->pool, product(4, n), sizeof *result);

    for (i = 0; i < n; i++) {
        uint32_t words[4];
        philox4x32(counters + 4 * i, keys + 2 * i, rounds, words);
        for (j = 0; j < 4; j++) {
            result[4 * i + j] = words[j];
        }
    }
    store_integers(c, "words", 2, counter->shape, result);
}

static void run_box_muller(const struct kit_case *c)
{
    size_t n = shaped(c, "words", 2)->shape[0], i;
    const uint32_t *words = words_of(c, "words", product(2, n));
    double *normals = pool_doubles(c->pool, 2 * n);

    for (i = 0; i < n; i++) {
        box_muller(words[2 * i], words[2 * i + 1], &normals[2 * i], &normals[2 * i + 1]);
    }
    store2(c, "normals", n, 2, normals);
}

static struct noise noise_of(const struct kit_case *c)
{
    struct noise noise;

    noise.seed = seed_of(c);
    noise.draw = word(c, "draw");
    return noise;
}

static void run_normals(const struct kit_case *c)
{
    struct noise noise, own;
    size_t n, rank, i;
    const uint32_t *groups, *draws;
    double *eps;

    if (has_output(c, "normals")) {
        run_box_muller(c);
        return;
    }
    noise = noise_of(c);
    n = shaped(c, "groups", 1)->count;
    rank = whole(c, "rank", 1);
    groups = words_of(c, "groups", n);
    draws = has_input(c, "draws") ? words_of(c, "draws", n) : NULL;
    eps = pool_doubles(c->pool, product(n, rank));
    for (i = 0; i < n; i++) {
        own = noise;
        own.draw += draws == NULL ? 0 : draws[i];
        noise_normal(&own, word(c, "layer"), groups[i], rank, eps + i * rank);
    }
    store2(c, "eps", n, rank, eps);
}

/* ---- the op ---- */

static const double *op_eps(const struct kit_case *c, size_t rows, size_t examples, size_t r)
{
    static const char *const names[] = {"batch", "example", "token"};
    enum sampling sampling = (enum sampling)choice(c, "sampling", names, 3);
    const uint32_t *groups = has_input(c, "groups") ? words_of(c, "groups", examples) : NULL;
    struct noise noise;
    double *eps;
    size_t row;

    if (is_null(c, "seed")) {
        return NULL;
    }
    noise = noise_of(c);
    eps = pool_doubles(c->pool, product(rows, r));
    for (row = 0; row < rows; row++) {
        uint32_t group = row_group(sampling, groups, row, rows / examples);
        noise_normal(&noise, word(c, "layer"), group, r, eps + row * r);
    }
    return eps;
}

static struct op op_of(const struct kit_case *c)
{
    struct op op = {0};
    const struct tensor *x = shaped(c, "x", 0);

    if (x->dimensions < 2) {
        fail("%s: x has one dimension", c->id);
    }
    op.d_in = x->shape[x->dimensions - 1];
    op.rows = x->count / op.d_in;
    op.d_out = shaped(c, "weight", 2)->shape[0];
    op.r = shaped(c, "s", 1)->count;
    op.x = reals(c, "x", x->count);
    op.weight = reals(c, "weight", product(op.d_out, op.d_in));
    op.bias = has_input(c, "bias") ? reals(c, "bias", op.d_out) : NULL;
    op.A = reals(c, "A", product(op.r, op.d_in));
    op.B = reals(c, "B", product(op.d_out, op.r));
    op.s = reals(c, "s", op.r);
    op.sigma = reals(c, "sigma", op.r);
    op.scaling = number(c, "scaling");
    op.eps = op_eps(c, op.rows, x->shape[0], op.r);
    op.h = pool_doubles(c->pool, product(op.rows, op.r));
    return op;
}

static double *forward_of(const struct kit_case *c, const struct op *op)
{
    double *y = pool_doubles(c->pool, product(op->rows, op->d_out));

    op_forward(op, y);
    return y;
}

static void run_op_forward(const struct kit_case *c)
{
    struct op op = op_of(c);
    struct tensor y = *shaped(c, "x", 0);

    y.shape[y.dimensions - 1] = op.d_out;
    store(c, "y", y.dimensions, y.shape, forward_of(c, &op));
}

/* A gradient has the shape of what it is the gradient of. */
static void store_like_input(const struct kit_case *c, const char *name, const double *values)
{
    const struct tensor *like = shaped(c, name, 0);

    store(c, name, like->dimensions, like->shape, values);
}

static void run_op_backward(const struct kit_case *c)
{
    struct op op = op_of(c);
    struct op_gradients gradients;

    gradients.x = pool_doubles(c->pool, product(op.rows, op.d_in));
    gradients.weight = pool_doubles(c->pool, product(op.d_out, op.d_in));
    gradients.bias = op.bias == NULL ? NULL : pool_doubles(c->pool, op.d_out);
    gradients.A = pool_doubles(c->pool, product(op.r, op.d_in));
    gradients.B = pool_doubles(c->pool, product(op.d_out, op.r));
    gradients.s = pool_doubles(c->pool, op.r);
    gradients.sigma = pool_doubles(c->pool, op.r);
    forward_of(c, &op);
    op_backward(&op, reals(c, "grad_y", product(op.rows, op.d_out)), &gradients);
    store_like_input(c, "x", gradients.x);
    store_like_input(c, "weight", gradients.weight);
    if (op.bias != NULL) {
        store_like_input(c, "bias", gradients.bias);
    }
    store_like_input(c, "A", gradients.A);
    store_like_input(c, "B", gradients.B);
    store_like_input(c, "s", gradients.s);
    store_like_input(c, "sigma", gradients.sigma);
}

/* ---- the objective ---- */

static double kl_of(const struct kit_case *c)
{
    static const char *const names[] = {"forward", "official"};
    size_t count = shaped(c, "s", 0)->count;     /* (layers, r): the sum over both */

    return complexity((enum direction)choice(c, "kl", names, 2), count, reals(c, "s", count),
                         reals(c, "sigma", count), number(c, "prior_std"));
}

static void run_kl(const struct kit_case *c)
{
    store_scalar(c, "kl", kl_of(c));
}

static void run_elbo(const struct kit_case *c)
{
    const struct tensor *logits = shaped(c, "logits", 2);
    size_t rows = logits->shape[0], classes = logits->shape[1];
    const size_t *labels = indices(c, "labels", rows, 0, classes - 1);
    double nll = mean_nll(rows, classes, reals(c, "logits", logits->count), labels);
    double kl = kl_of(c);

    store_scalar(c, "nll", nll);
    store_scalar(c, "kl", kl);
    store_scalar(c, "loss", nll + number(c, "beta") * kl / number(c, "num_examples"));    /* (4) */
}

/* A A^T and A^T diag(s)^2 A of the matrix's own SVD. */
static void run_svd(const struct kit_case *c)
{
    const struct tensor *matrix = shaped(c, "kaiming", 2);
    size_t r = matrix->shape[0], n = matrix->shape[1], i, j, k;
    double *A = pool_copy(c->pool, reals(c, "kaiming", matrix->count), matrix->count);
    double *singular = pool_doubles(c->pool, r);
    double *identity = pool_doubles(c->pool, product(r, r)), *gram = pool_doubles(c->pool, product(n, n));

    thin_svd(r, n, A, singular);
    for (k = 0; k < r; k++) {
        for (i = 0; i < n; i++) {
            for (j = 0; j < r; j++) {
                identity[k * r + j] += A[k * n + i] * A[j * n + i];
            }
            for (j = 0; j < n; j++) {
                gram[i * n + j] += A[k * n + i] * singular[k] * singular[k] * A[k * n + j];
            }
        }
    }
    store2(c, "identity", r, r, identity);
    store2(c, "gram", n, n, gram);
}

static void run_initialisation(const struct kit_case *c)
{
    size_t r = whole(c, "rank", 1), d_in = whole(c, "d_in", 1), d_out = whole(c, "d_out", 1), k;
    uint64_t seed = seed_of(c);
    uint32_t layer = word(c, "layer");
    double *matrix = pool_doubles(c->pool, product(r, d_in));
    double *log_s = pool_doubles(c->pool, r), *log_sigma = pool_doubles(c->pool, r);
    const double *singular = reals(c, "singular", r);

    kaiming(seed, layer, r, d_in, matrix);
    initial_log_sigma(seed, layer, r, d_in, number(c, "init_sigma"), log_sigma);
    for (k = 0; k < r; k++) {
        log_s[k] = log(singular[k]);
    }
    store2(c, "kaiming", r, d_in, matrix);
    store2(c, "A", r, d_in, reals(c, "Vh", product(r, d_in)));
    store2(c, "B", d_out, r, pool_doubles(c->pool, product(d_out, r)));
    store1(c, "log_s", r, log_s);
    store1(c, "log_sigma", r, log_sigma);
}

static void run_start(const struct kit_case *c)
{
    if (has_output(c, "gram")) {
        run_svd(c);
    } else {
        run_initialisation(c);
    }
}

/* ---- schedules ---- */

static void run_warmup(const struct kit_case *c)
{
    size_t n = shaped(c, "step", 1)->count, steps = whole(c, "steps", 1), i;
    const size_t *step = indices(c, "step", n, 0, steps - 1);
    double *factor = pool_doubles(c->pool, n);

    for (i = 0; i < n; i++) {
        factor[i] = warmup_factor(number(c, "warmup"), (double)steps, (double)step[i]);
    }
    store1(c, "factor", n, factor);
}

static void run_kl_weight(const struct kit_case *c)
{
    size_t n = shaped(c, "step", 1)->count, i;
    uint64_t period = kl_period((double)whole(c, "num_examples", 1), (double)whole(c, "batch", 1));
    int64_t stored = (int64_t)period;
    const size_t *step = indices(c, "step", n, 0, SIZE_MAX);
    double *weight = pool_doubles(c->pool, n);

    for (i = 0; i < n; i++) {
        weight[i] = kl_weight(period, step[i]);
    }
    store_integers(c, "period", 0, NULL, &stored);
    store1(c, "weight", n, weight);
}

static void run_schedules(const struct kit_case *c)
{
    if (has_output(c, "factor")) {
        run_warmup(c);
    } else {
        run_kl_weight(c);
    }
}

/* ---- prediction and metrics ---- */

void store_predictive(const struct kit_case *c, size_t draws, size_t rows, size_t classes,
                      const double *logits)
{
    double *probs = pool_doubles(c->pool, product(rows, classes));
    double *entropies = pool_doubles(c->pool, rows), *expected = pool_doubles(c->pool, rows);
    double *mutual = pool_doubles(c->pool, rows);

    predictive(draws, rows, classes, logits, probs, entropies, expected, mutual);
    store2(c, "probs", rows, classes, probs);
    store1(c, "entropy", rows, entropies);
    store1(c, "expected_entropy", rows, expected);
    store1(c, "mutual_information", rows, mutual);
}

static void run_predictive(const struct kit_case *c)
{
    const struct tensor *logits = shaped(c, "logits", 3);

    store_predictive(c, logits->shape[0], logits->shape[1], logits->shape[2], reals(c, "logits", logits->count));
}

static void run_auroc(const struct kit_case *c)
{
    size_t n = shaped(c, "scores", 1)->count;

    store_scalar(c, "auroc", auroc(n, reals(c, "scores", n), indices(c, "positive", n, 0, 1)));
}

static void run_metrics(const struct kit_case *c)
{
    const struct tensor *tensor;
    size_t n, classes;
    const double *probs;
    const size_t *labels;

    if (has_output(c, "auroc")) {
        run_auroc(c);
        return;
    }
    tensor = shaped(c, "probs", 2);
    n = tensor->shape[0];
    classes = tensor->shape[1];
    probs = reals(c, "probs", tensor->count);
    labels = indices(c, "labels", n, 0, classes - 1);
    if (has_output(c, "ece")) {
        store_scalar(c, "ece", expected_calibration_error(n, classes, probs, labels, whole(c, "bins", 1)));
        return;
    }
    store_scalar(c, "acc", accuracy(n, classes, probs, labels));
    store_scalar(c, "nll", probability_nll(n, classes, probs, labels));
    store_scalar(c, "brier", brier(n, classes, probs, labels));
}

int run_case(const struct kit_case *c)
{
    static const struct {
        const char *level;
        void (*run)(const struct kit_case *c);
    } levels[] = {
        {"philox", run_philox},
        {"normals", run_normals},
        {"op forward", run_op_forward},
        {"op backward", run_op_backward},
        {"KL", run_kl},
        {"ELBO", run_elbo},
        {"initialisation", run_start},
        {"schedules", run_schedules},
        {"predictive", run_predictive},
        {"metrics", run_metrics},
        {"llama", run_llama},
        {"training step", run_training_step},
        {"prediction", run_prediction},
    };
    size_t i;

    for (i = 0; i < sizeof levels / sizeof levels[0]; i++) {
        if (strcmp(c->level, levels[i].level) == 0) {
            levels[i].run(c);
            return 1;
        }
    }
    return 0;
}

/* The update called from C, and compared with plain loops:
 *
 *     y += c B ((A x) * (s + sigma * eps))        row by row,
 *
 * then one of its gradients with a central difference. It needs nothing but scalabl.h and the
 * library (and, to link that, C++'s). The exit status is 0 only if everything agrees. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "scalabl.h"

enum { ROWS = 4, D_IN = 5, D_OUT = 3, RANK = 2, ROWS_PER_GROUP = 2, GROUPS = 2 };

static const int64_t groups[GROUPS] = {7, 40}; /* rows 0 and 1 share a draw, rows 2 and 3 another */

static double x[ROWS][D_IN], A[RANK][D_IN], B[D_OUT][RANK], s[RANK], sigma[RANK];
static double y[ROWS][D_OUT], grad_y[ROWS][D_OUT];

/* Numbers in [-1, 1), the same at each run. */
static void fill(double *out, int count) {
    static uint32_t state = 1;
    int i;
    for (i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        out[i] = state / 2147483648.0 - 1.0;
    }
}

static scalabl_update update(void) {
    scalabl_update op = {0};
    op.dtype = op.adapter_dtype = SCALABL_FLOAT64;
    op.rows = ROWS;
    op.d_in = D_IN;
    op.d_out = D_OUT;
    op.rank = RANK;
    op.x = x;
    op.x_stride = D_IN;
    op.A = A;
    op.A_stride = D_IN;
    op.B = B;
    op.B_stride = RANK;
    op.s = s;
    op.sigma = sigma;
    op.scaling = 0.5;
    op.noisy = 1;
    op.seed = 20250706123456789u;
    op.draw = 3;
    op.layer = 9;
    op.groups = groups;
    op.rows_per_group = ROWS_PER_GROUP;
    op.threads = 1;
    return op;
}

/* Ends the program with a sentence if a call did not go well. */
static void need(scalabl_status status, const char *call) {
    if (status == SCALABL_OK) return;
    printf("%s: %s\n", call, scalabl_message(status));
    exit(EXIT_FAILURE);
}

/* Prints one comparison; 1 if it failed. NaN fails. */
static int differs(const char *what, double value, double expected, double tolerance) {
    const int good = fabs(value - expected) <= tolerance;
    printf("%-28s % .12f  expected % .12f  %s\n", what, value, expected, good ? "ok" : "WRONG");
    return !good;
}

/* sum of grad_y * y after the update, whose derivatives are the gradients. */
static double loss(const scalabl_update *op) {
    double out[ROWS][D_OUT] = {{0}}, total = 0;
    int i, j;
    need(scalabl_update_forward(op, out, D_OUT, NULL), "scalabl_update_forward");
    for (i = 0; i < ROWS; ++i) {
        for (j = 0; j < D_OUT; ++j) total += grad_y[i][j] * out[i][j];
    }
    return total;
}

int main(void) {
    const scalabl_update op = update();
    float eps[GROUPS][RANK];
    double expected[ROWS][D_OUT], h[ROWS][RANK], grad_sigma[RANK];
    double worst = 0;
    int i, j, k, wrong = 0;

    fill(&x[0][0], ROWS * D_IN);
    fill(&A[0][0], RANK * D_IN);
    fill(&B[0][0], D_OUT * RANK);
    fill(s, RANK);
    fill(sigma, RANK);
    fill(&y[0][0], ROWS * D_OUT);
    fill(&grad_y[0][0], ROWS * D_OUT);

    /* Forward, in loops and in the library. */
    need(scalabl_normals(op.seed, op.draw, op.layer, groups, NULL, GROUPS, RANK, &eps[0][0]),
         "scalabl_normals");
    for (i = 0; i < ROWS; ++i) {
        for (j = 0; j < D_OUT; ++j) expected[i][j] = y[i][j];
        for (k = 0; k < RANK; ++k) {
            double ax = 0;
            for (j = 0; j < D_IN; ++j) ax += A[k][j] * x[i][j];
            ax *= op.scaling * (s[k] + sigma[k] * eps[i / ROWS_PER_GROUP][k]);
            for (j = 0; j < D_OUT; ++j) expected[i][j] += B[j][k] * ax;
        }
    }
    need(scalabl_update_forward(&op, y, D_OUT, h), "scalabl_update_forward");
    for (i = 0; i < ROWS; ++i) {
        for (j = 0; j < D_OUT; ++j) {
            const double error = fabs(y[i][j] - expected[i][j]);
            if (error > worst || isnan(error)) worst = error; /* and nothing is worse than NaN */
        }
    }
    printf("y[0] = (% .6f, % .6f, % .6f)\n", y[0][0], y[0][1], y[0][2]);
    wrong += differs("largest error of y", worst, 0, 1e-14);

    /* The gradients of sigma, given h: the loss is linear in sigma, so that a central difference
     * has no error but rounding. */
    need(scalabl_update_backward(&op, grad_y, D_OUT, h, NULL, 0, NULL, NULL, NULL, grad_sigma),
         "scalabl_update_backward");
    for (k = 0; k < RANK; ++k) {
        const double step = 0.0625, middle = sigma[k];
        double above, below;
        sigma[k] = middle + step;
        above = loss(&op);
        sigma[k] = middle - step;
        below = loss(&op);
        sigma[k] = middle;
        wrong += differs(k ? "gradient of sigma[1]" : "gradient of sigma[0]", grad_sigma[k],
                         (above - below) / (2 * step), 1e-13);
    }

    printf("%s kernels: %s\n", scalabl_isa(), wrong ? "the core is WRONG" : "all agree");
    return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* The levels of the kit, in the order of docs/conformance.md. */
#ifndef LEVELS_H
#define LEVELS_H

#include "case.h"

/* Computes the case's outputs; 0 if its level is not known here. */
int run_case(const struct kit_case *c);

/* Of a model: in levels_model.c. */
void run_llama(const struct kit_case *c);
/* (8) and (9) of logits (draws, rows, classes). */
void store_predictive(const struct kit_case *c, size_t draws, size_t rows, size_t classes,
                      const double *logits);

void run_training_step(const struct kit_case *c);
void run_prediction(const struct kit_case *c);

#endif

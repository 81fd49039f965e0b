/* The levels of the kit, in the order of docs/conformance.md. */
#ifndef LEVELS_H
#define LEVELS_H

#include "case.h"

/* Computes the case's outputs; 0 if its level is not known here. */
int run_case(const struct kit_case *c);

/* Of a model: in levels_model.c. */
void run_llama(const struct kit_case *c);
void run_training_step(const struct kit_case *c);

#endif

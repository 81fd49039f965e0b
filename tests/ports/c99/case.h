/* One case of the kit: its parameters and inputs, checked, and where its outputs go. */
#ifndef CASE_H
#define CASE_H

#include <stddef.h>
#include <stdint.h>

#include "json.h"
#include "support.h"
#include "tensors.h"

struct kit_case {
    struct pool *pool;                       /* emptied after the case */
    const char *id;
    const char *level;
    const struct json *parameters, *inputs, *outputs;
    const struct tensors *vectors;
    struct pool *results_pool;
    struct tensors *results;
};

/* Parameters. One that is missing or of the wrong kind is an error. */
double number(const struct kit_case *c, const char *name);
size_t whole(const struct kit_case *c, const char *name, size_t least);
uint32_t word(const struct kit_case *c, const char *name);
uint64_t seed_of(const struct kit_case *c);
int flag(const struct kit_case *c, const char *name);
int is_null(const struct kit_case *c, const char *name);

/* The index of the parameter's string among `count` words. */
size_t choice(const struct kit_case *c, const char *name, const char *const words[], size_t count);

/* Inputs. What is missing, of another count or out of range is an error. */
int has_input(const struct kit_case *c, const char *name);
const struct tensor *shaped(const struct kit_case *c, const char *name, size_t dimensions);
double *reals(const struct kit_case *c, const char *name, size_t count);
uint32_t *words_of(const struct kit_case *c, const char *name, size_t count);

/* Integers from least to most. */
size_t *indices(const struct kit_case *c, const char *name, size_t count, size_t least, size_t most);

/* Outputs. */
int has_output(const struct kit_case *c, const char *name);
void store(const struct kit_case *c, const char *name, size_t dimensions, const size_t shape[],
           const double *values);
void store1(const struct kit_case *c, const char *name, size_t n, const double *values);
void store2(const struct kit_case *c, const char *name, size_t n, size_t m, const double *values);
void store_scalar(const struct kit_case *c, const char *name, double value);
void store_integers(const struct kit_case *c, const char *name, size_t dimensions, const size_t shape[],
                    const int64_t *values);

#endif

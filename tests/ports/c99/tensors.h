/* safetensors: 8 bytes with the header's length, the header (JSON), the numbers, all little-endian. */
#ifndef TENSORS_H
#define TENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "support.h"

enum { MOST_DIMENSIONS = 8 };

/* Floating-point numbers are in `real`, integers in `integer`; the other one is NULL. */
struct tensor {
    const char *name;
    size_t dimensions;       /* 0 for a scalar */
    size_t shape[MOST_DIMENSIONS];
    size_t count;            /* of numbers: the product of the shape */
    double *real;
    int64_t *integer;
};

struct tensors {
    size_t count;
    size_t room;
    struct tensor *items;
};

/* The tensors of a file, of dtype F64, F32 or I64. */
struct tensors tensors_read(struct pool *pool, const char *path);

/* The tensor of that name, or NULL. */
const struct tensor *tensors_find(const struct tensors *tensors, const char *name);

/* Adds one; a name that is there already is an error. */
void tensors_add(struct tensors *tensors, struct pool *pool, const struct tensor *tensor);

/* As F64 and I64. */
void tensors_write(const struct tensors *tensors, const char *path);

#endif

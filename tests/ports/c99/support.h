/* Errors, memory and files: what every other file here needs. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include <stddef.h>

/* Bad input: the message to stderr, exit code 2. Does not return. */
void fail(const char *format, ...);

/* Memory that is given back all at once. Start with {NULL}; what is taken is zero. */
struct pool {
    struct pool_block *first;
};

void *pool_take(struct pool *pool, size_t count, size_t size);
double *pool_doubles(struct pool *pool, size_t count);
double *pool_copy(struct pool *pool, const double *from, size_t count);
void pool_empty(struct pool *pool);

/* a * b, or an error where that overflows. */
size_t product(size_t a, size_t b);

/* The whole file, followed by a zero byte that *length does not count. */
char *read_file(struct pool *pool, const char *path, size_t *length);

#endif

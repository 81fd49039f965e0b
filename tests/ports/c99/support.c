#include "support.h"

#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct pool_block {
    struct pool_block *next;
    void *memory;
};

void fail(const char *format, ...)
{
    va_list arguments;

    fputs("port: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

size_t product(size_t a, size_t b)
{
    if (b != 0 && a > SIZE_MAX / b) {
        fail("a size does not fit this machine");
    }
    return a * b;
}

void *pool_take(struct pool *pool, size_t count, size_t size)
{
    struct pool_block *block = malloc(sizeof *block);

    if (block == NULL) {
        fail("out of memory");
        return NULL;
    }
    block->memory = calloc(count == 0 ? 1 : count, size);
    if (block->memory == NULL) {
        free(block);
        fail("out of memory");
        return NULL;
    }
    block->next = pool->first;
    pool->first = block;
    return block->memory;
}

double *pool_doubles(struct pool *pool, size_t count)
{
    return pool_take(pool, count, sizeof(double));
}

double *pool_copy(struct pool *pool, const double *from, size_t count)
{
    double *copy = pool_doubles(pool, count);

    memcpy(copy, from, count * sizeof *copy);
    return copy;
}

void pool_empty(struct pool *pool)
{
    while (pool->first != NULL) {
        struct pool_block *block = pool->first;
        pool->first = block->next;
        free(block->memory);
        free(block);
    }
}

static long file_length(FILE *file, const char *path)
{
    long length = -1;

    if (fseek(file, 0, SEEK_END) == 0) {
        length = ftell(file);
    }
    if (length < 0 || length == LONG_MAX || fseek(file, 0, SEEK_SET) != 0) {
        fclose(file);
        fail("%s: cannot be read", path);
    }
    return length;
}

char *read_file(struct pool *pool, const char *path, size_t *length)
{
    FILE *file = fopen(path, "rb");
    char *bytes;
    size_t got;

    if (file == NULL) {
        fail("%s: cannot be opened", path);
        return NULL;
    }
    *length = (size_t)file_length(file, path);
    bytes = pool_take(pool, *length + 1, 1);
    got = fread(bytes, 1, *length, file);
    fclose(file);
    if (got != *length) {
        fail("%s: cannot be read", path);
    }
    return bytes;
}

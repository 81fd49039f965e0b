#include "case.h"

#include <string.h>

/* ---- parameters ---- */

static const struct json *parameter(const struct kit_case *c, const char *name)
{
    const struct json *value = json_find(c->parameters, name);

    if (value == NULL) {
        fail("%s: parameter %s is missing", c->id, name);
    }
    return value;
}

static const struct json *parameter_of_kind(const struct kit_case *c, const char *name, enum json_kind kind)
{
    const struct json *value = parameter(c, name);

    if (value->kind != kind) {
        fail("%s: parameter %s is of the wrong kind", c->id, name);
    }
    return value;
}

double number(const struct kit_case *c, const char *name)
{
    return parameter_of_kind(c, name, JSON_NUMBER)->number;
}

size_t whole(const struct kit_case *c, const char *name, size_t least)
{
    size_t value = json_size(parameter_of_kind(c, name, JSON_NUMBER), name);

    if (value < least) {
        fail("%s: parameter %s is too small", c->id, name);
    }
    return value;
}

uint32_t word(const struct kit_case *c, const char *name)
{
    uint64_t value = whole(c, name, 0);

    if (value > UINT32_MAX) {
        fail("%s: parameter %s has more than 32 bits", c->id, name);
    }
    return (uint32_t)value;
}

uint64_t seed_of(const struct kit_case *c)
{
    const char *text = parameter_of_kind(c, "seed", JSON_STRING)->string;
    size_t digits = strspn(text, "0123456789"), i;
    uint64_t seed = 0;

    if (digits == 0 || text[digits] != '\0') {
        fail("%s: the seed is not a decimal number", c->id);
    }
    for (i = 0; i < digits; i++) {
        uint64_t digit = (uint64_t)(text[i] - '0');
        if (seed > (UINT64_MAX - digit) / 10) {
            fail("%s: the seed has more than 64 bits", c->id);
        }
        seed = 10 * seed + digit;
    }
    return seed;
}

int flag(const struct kit_case *c, const char *name)
{
    const struct json *value = parameter(c, name);

    if (value->kind != JSON_TRUE && value->kind != JSON_FALSE) {
        fail("%s: parameter %s is neither true nor false", c->id, name);
    }
    return value->kind == JSON_TRUE;
}

int is_null(const struct kit_case *c, const char *name)
{
    return parameter(c, name)->kind == JSON_NULL;
}

size_t choice(const struct kit_case *c, const char *name, const char *const words[], size_t count)
{
    const char *text = parameter_of_kind(c, name, JSON_STRING)->string;
    size_t i;

    for (i = 0; i < count; i++) {
        if (strcmp(text, words[i]) == 0) {
            return i;
        }
    }
    fail("%s: parameter %s: \"%s\" is not known here", c->id, name, text);
    return 0;
}

/* ---- inputs ---- */

int has_input(const struct kit_case *c, const char *name)
{
    return json_find(c->inputs, name) != NULL;
}

static const struct tensor *input(const struct kit_case *c, const char *name)
{
    const struct json *stored = json_find(c->inputs, name);
    const struct tensor *tensor;

    if (stored == NULL || stored->kind != JSON_STRING) {
        fail("%s: input %s is missing", c->id, name);
        return NULL;
    }
    tensor = tensors_find(c->vectors, stored->string);
    if (tensor == NULL) {
        fail("%s: tensor %s is missing", c->id, stored->string);
    }
    return tensor;
}

/* With at least one number in it; dimensions 0 means any number of them from 1. */
const struct tensor *shaped(const struct kit_case *c, const char *name, size_t dimensions)
{
    const struct tensor *tensor = input(c, name);

    if (tensor->dimensions < 1 || tensor->count == 0
        || (dimensions != 0 && tensor->dimensions != dimensions)) {
        fail("%s: input %s has a shape it should not have", c->id, name);
    }
    return tensor;
}

static const struct tensor *counted(const struct kit_case *c, const char *name, size_t count)
{
    const struct tensor *tensor = input(c, name);

    if (tensor->count != count) {
        fail("%s: input %s has %lu numbers, not %lu", c->id, name, (unsigned long)tensor->count,
             (unsigned long)count);
    }
    return tensor;
}

double *reals(const struct kit_case *c, const char *name, size_t count)
{
    const struct tensor *tensor = counted(c, name, count);

    if (tensor->real == NULL) {
        fail("%s: input %s has integers where it should not", c->id, name);
    }
    return tensor->real;
}

static const int64_t *integers(const struct kit_case *c, const char *name, size_t count, uint64_t least,
                               uint64_t most)
{
    const int64_t *values = counted(c, name, count)->integer;
    size_t i;

    if (values == NULL) {
        fail("%s: input %s should be integers", c->id, name);
        return NULL;
    }
    for (i = 0; i < count; i++) {
        if (values[i] < 0 || (uint64_t)values[i] < least || (uint64_t)values[i] > most) {
            fail("%s: input %s: an integer out of range", c->id, name);
        }
    }
    return values;
}

uint32_t *words_of(const struct kit_case *c, const char *name, size_t count)
{
    const int64_t *values = integers(c, name, count, 0, UINT32_MAX);
    uint32_t *words = pool_take(c->pool, count, sizeof *words);
    size_t i;

    for (i = 0; i < count; i++) {
        words[i] = (uint32_t)values[i];
    }
    return words;
}

size_t *indices(const struct kit_case *c, const char *name, size_t count, size_t least, size_t most)
{
    const int64_t *values = integers(c, name, count, least, most);
    size_t *result = pool_take(c->pool, count, sizeof *result);
    size_t i;

    for (i = 0; i < count; i++) {
        result[i] = (size_t)values[i];
    }
    return result;
}

/* ---- outputs ---- */

int has_output(const struct kit_case *c, const char *name)
{
    return json_find(c->outputs, name) != NULL;
}

static struct tensor output(const struct kit_case *c, const char *name, size_t dimensions,
                            const size_t shape[])
{
    struct tensor tensor = {0};
    const struct json *entry = json_find(c->outputs, name);
    size_t i;

    if (entry == NULL) {
        fail("%s: the case has no output %s", c->id, name);
        return tensor;
    }
    tensor.name = json_get(entry, "tensor", JSON_STRING)->string;
    tensor.dimensions = dimensions;
    tensor.count = 1;
    for (i = 0; i < dimensions; i++) {
        tensor.shape[i] = shape[i];
        tensor.count = product(tensor.count, shape[i]);
    }
    return tensor;
}

void store(const struct kit_case *c, const char *name, size_t dimensions, const size_t shape[],
           const double *values)
{
    struct tensor tensor = output(c, name, dimensions, shape);

    tensor.real = pool_copy(c->results_pool, values, tensor.count);
    tensors_add(c->results, c->results_pool, &tensor);
}

void store1(const struct kit_case *c, const char *name, size_t n, const double *values)
{
    store(c, name, 1, &n, values);
}

void store2(const struct kit_case *c, const char *name, size_t n, size_t m, const double *values)
{
    size_t shape[2];

    shape[0] = n;
    shape[1] = m;
    store(c, name, 2, shape, values);
}

void store_scalar(const struct kit_case *c, const char *name, double value)
{
    store(c, name, 0, NULL, &value);
}

void store_integers(const struct kit_case *c, const char *name, size_t dimensions, const size_t shape[],
                    const int64_t *values)
{
    struct tensor tensor = output(c, name, dimensions, shape);

    tensor.integer = pool_take(c->results_pool, tensor.count, sizeof *tensor.integer);
    memcpy(tensor.integer, values, tensor.count * sizeof *values);
    tensors_add(c->results, c->results_pool, &tensor);
}

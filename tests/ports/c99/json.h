/* A small JSON reader (RFC 8259): enough for manifest.json and the header of a safetensors file. */
#ifndef JSON_H
#define JSON_H

#include <stddef.h>

#include "support.h"

enum json_kind {
    JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT
};

struct json {
    enum json_kind kind;
    double number;
    char *string;            /* UTF-8 */
    size_t count;            /* of the items of an array or an object */
    struct json *items;
    char **keys;             /* of an object, one for each item */
};

/* The text's one value; a text that is not JSON is an error that names `what` and the byte. */
struct json *json_parse(struct pool *pool, const char *text, size_t length, const char *what);

/* The member of an object, or NULL where there is none. */
const struct json *json_find(const struct json *object, const char *key);

/* The same, but where there is none, or it is of another kind, that is an error. */
const struct json *json_get(const struct json *object, const char *key, enum json_kind kind);

/* An integer from 0 to 2^53. */
size_t json_size(const struct json *value, const char *what);

#endif

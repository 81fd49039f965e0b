#include "json.h"

#include <ctype.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DEEPEST = 64 };

struct reader {
    struct pool *pool;
    const char *what;
    const char *start;
    const char *at;
    const char *end;         /* where a zero byte stands */
    int depth;
};

static void bad(const struct reader *reader, const char *problem)
{
    fail("%s: byte %lu: %s", reader->what, (unsigned long)(reader->at - reader->start), problem);
}

static void skip_space(struct reader *reader)
{
    while (reader->at < reader->end && *reader->at != '\0' && strchr(" \t\r\n", *reader->at) != NULL) {
        reader->at++;
    }
}

static int accept(struct reader *reader, char expected)
{
    skip_space(reader);
    if (reader->at < reader->end && *reader->at == expected) {
        reader->at++;
        return 1;
    }
    return 0;
}

static void read_word(struct reader *reader, const char *word)
{
    size_t length = strlen(word);

    if ((size_t)(reader->end - reader->at) < length || memcmp(reader->at, word, length) != 0) {
        bad(reader, "not a JSON value");
    }
    reader->at += length;
}

static void read_digits(struct reader *reader)
{
    if (!isdigit((unsigned char)*reader->at)) {
        bad(reader, "a digit is missing");
    }
    while (isdigit((unsigned char)*reader->at)) {
        reader->at++;
    }
}

/* The zero byte at the end stops every loop over digits. */
static double read_number(struct reader *reader)
{
    const char *first = reader->at;

    reader->at += *reader->at == '-';
    if (*reader->at == '0') {
        reader->at++;
    } else {
        read_digits(reader);
    }
    if (*reader->at == '.') {
        reader->at++;
        read_digits(reader);
    }
    if (*reader->at == 'e' || *reader->at == 'E') {
        reader->at++;
        reader->at += *reader->at == '+' || *reader->at == '-';
        read_digits(reader);
    }
    return strtod(first, NULL);
}

static uint32_t read_hex4(struct reader *reader)
{
    uint32_t code = 0;
    int i;

    for (i = 0; i < 4; i++) {
        const char *digits = "0123456789abcdef";
        const char *found = *reader->at == '\0' ? NULL : strchr(digits, tolower((unsigned char)*reader->at));
        if (found == NULL) {
            bad(reader, "\\u needs four hexadecimal digits");
            return 0;
        }
        code = code * 16 + (uint32_t)(found - digits);
        reader->at++;
    }
    return code;
}

/* What follows \u, with the second half of a surrogate pair. */
static uint32_t read_code_point(struct reader *reader)
{
    uint32_t high = read_hex4(reader), low;

    if (high == 0) {
        bad(reader, "a zero character in a string");
    }
    if (high < 0xD800 || high > 0xDFFF) {
        return high;
    }
    if (high > 0xDBFF || reader->at[0] != '\\' || reader->at[1] != 'u') {
        bad(reader, "half a surrogate pair");
    }
    reader->at += 2;
    low = read_hex4(reader);
    if (low < 0xDC00 || low > 0xDFFF) {
        bad(reader, "half a surrogate pair");
    }
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
}

static char *put_utf8(char *to, uint32_t code)
{
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xC0 | code >> 6);
        *to++ = (char)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        *to++ = (char)(0xE0 | code >> 12);
        *to++ = (char)(0x80 | (code >> 6 & 0x3F));
        *to++ = (char)(0x80 | (code & 0x3F));
    } else {
        *to++ = (char)(0xF0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 0x3F));
        *to++ = (char)(0x80 | (code >> 6 & 0x3F));
        *to++ = (char)(0x80 | (code & 0x3F));
    }
    return to;
}

static char *read_escape(struct reader *reader, char *to)
{
    const char *names = "\"\\/bfnrt", *values = "\"\\/\b\f\n\r\t";
    const char *found;

    reader->at++;
    if (*reader->at == 'u') {
        reader->at++;
        return put_utf8(to, read_code_point(reader));
    }
    found = *reader->at == '\0' ? NULL : strchr(names, *reader->at);
    if (found == NULL) {
        bad(reader, "no such escape");
        return to;
    }
    reader->at++;
    *to++ = values[found - names];
    return to;
}

/* The end of the string that begins at reader->at: its closing quote. */
static const char *string_end(const struct reader *reader)
{
    const char *at = reader->at;

    while (at < reader->end && *at != '"') {
        at += *at == '\\' ? 2 : 1;
    }
    if (at >= reader->end) {
        bad(reader, "a string does not end");
    }
    return at;
}

static char *read_string(struct reader *reader)
{
    char *string, *to;

    if (!accept(reader, '"')) {
        bad(reader, "a string is missing");
    }
    string = to = pool_take(reader->pool, (size_t)(string_end(reader) - reader->at) + 1, 1);
    while (*reader->at != '"') {
        if (*reader->at == '\\') {
            to = read_escape(reader, to);
        } else if ((unsigned char)*reader->at < 0x20) {
            bad(reader, "a control character in a string");
        } else {
            *to++ = *reader->at++;
        }
    }
    reader->at++;
    return string;
}

/* Room for one more item: the arrays double at powers of two. */
static void grow(struct reader *reader, struct json *value)
{
    size_t count = value->count, room = count == 0 ? 1 : product(2, count);
    struct json *items;
    char **keys;

    if ((count & (count - 1)) != 0) {
        return;
    }
    items = pool_take(reader->pool, room, sizeof *items);
    keys = pool_take(reader->pool, room, sizeof *keys);
    if (count > 0) {
        memcpy(items, value->items, count * sizeof *items);
        memcpy(keys, value->keys, count * sizeof *keys);
    }
    value->items = items;
    value->keys = keys;
}

static void read_value(struct reader *reader, struct json *value);

static void read_member(struct reader *reader, struct json *object)
{
    char *key = read_string(reader);

    if (json_find(object, key) != NULL) {
        bad(reader, "a key stands twice");
    }
    if (!accept(reader, ':')) {
        bad(reader, "':' is missing");
    }
    grow(reader, object);
    object->keys[object->count] = key;
    read_value(reader, &object->items[object->count]);
    object->count++;
}

static void read_item(struct reader *reader, struct json *array)
{
    grow(reader, array);
    read_value(reader, &array->items[array->count]);
    array->count++;
}

static void read_items(struct reader *reader, struct json *value, char last)
{
    reader->at++;
    if (++reader->depth > DEEPEST) {
        bad(reader, "nested too deeply");
    }
    if (!accept(reader, last)) {
        do {
            if (value->kind == JSON_OBJECT) {
                read_member(reader, value);
            } else {
                read_item(reader, value);
            }
        } while (accept(reader, ','));
        if (!accept(reader, last)) {
            bad(reader, "',' or a closing bracket is missing");
        }
    }
    reader->depth--;
}

static void read_value(struct reader *reader, struct json *value)
{
    skip_space(reader);
    switch (*reader->at) {
    case '{':
        value->kind = JSON_OBJECT;
        read_items(reader, value, '}');
        break;
    case '[':
        value->kind = JSON_ARRAY;
        read_items(reader, value, ']');
        break;
    case '"':
        value->kind = JSON_STRING;
        value->string = read_string(reader);
        break;
    case 't':
        value->kind = JSON_TRUE;
        read_word(reader, "true");
        break;
    case 'f':
        value->kind = JSON_FALSE;
        read_word(reader, "false");
        break;
    case 'n':
        value->kind = JSON_NULL;
        read_word(reader, "null");
        break;
    default:
        value->kind = JSON_NUMBER;
        value->number = read_number(reader);
    }
}

struct json *json_parse(struct pool *pool, const char *text, size_t length, const char *what)
{
    struct reader reader;
    struct json *value = pool_take(pool, 1, sizeof *value);
    char *copy = pool_take(pool, length + 1, 1);

    memcpy(copy, text, length);
    reader.pool = pool;
    reader.what = what;
    reader.start = reader.at = copy;
    reader.end = copy + length;
    reader.depth = 0;
    read_value(&reader, value);
    skip_space(&reader);
    if (reader.at != reader.end) {
        bad(&reader, "text after the value");
    }
    return value;
}

const struct json *json_find(const struct json *object, const char *key)
{
    size_t i;

    for (i = 0; i < object->count; i++) {
        if (strcmp(object->keys[i], key) == 0) {
            return &object->items[i];
        }
    }
    return NULL;
}

const struct json *json_get(const struct json *object, const char *key, enum json_kind kind)
{
    const struct json *value = object->kind == JSON_OBJECT ? json_find(object, key) : NULL;

    if (value == NULL || value->kind != kind) {
        fail("\"%s\" is missing or of the wrong kind", key);
    }
    return value;
}

size_t json_size(const struct json *value, const char *what)
{
    double number = value->number;

    if (value->kind != JSON_NUMBER || !(number >= 0 && number <= 9007199254740992.0)
        || number != (double)(uint64_t)number || number > (double)SIZE_MAX) {
        fail("%s: not a whole number from 0", what);
    }
    return (size_t)number;
}

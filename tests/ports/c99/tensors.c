#include "tensors.h"

#include <stdio.h>
#include <string.h>

#include "json.h"

/* Numbers are put together byte by byte, so that the machine's own order of bytes does not matter. */
static uint64_t little_endian(const unsigned char *bytes, size_t width)
{
    uint64_t value = 0;

    while (width-- > 0) {
        value = value << 8 | bytes[width];
    }
    return value;
}

static double double_of(uint64_t bits)
{
    double value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static float float_of(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static int64_t signed_of(uint64_t bits)
{
    int64_t value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static void read_numbers(struct pool *pool, struct tensor *tensor, const char *dtype,
                         const unsigned char *data)
{
    size_t i;

    if (strcmp(dtype, "I64") == 0) {
        tensor->integer = pool_take(pool, tensor->count, sizeof *tensor->integer);
        for (i = 0; i < tensor->count; i++) {
            tensor->integer[i] = signed_of(little_endian(data + 8 * i, 8));
        }
        return;
    }
    tensor->real = pool_doubles(pool, tensor->count);
    for (i = 0; i < tensor->count; i++) {
        tensor->real[i] = strcmp(dtype, "F64") == 0
            ? double_of(little_endian(data + 8 * i, 8))
            : (double)float_of((uint32_t)little_endian(data + 4 * i, 4));
    }
}

static size_t width_of(const char *dtype, const char *name)
{
    if (strcmp(dtype, "F64") == 0 || strcmp(dtype, "I64") == 0) {
        return 8;
    }
    if (strcmp(dtype, "F32") != 0) {
        fail("%s: dtype %s is not known here", name, dtype);
    }
    return 4;
}

static void read_shape(struct tensor *tensor, const struct json *shape)
{
    size_t i;

    if (shape->count > MOST_DIMENSIONS) {
        fail("%s: too many dimensions", tensor->name);
    }
    tensor->dimensions = shape->count;
    tensor->count = 1;
    for (i = 0; i < shape->count; i++) {
        tensor->shape[i] = json_size(&shape->items[i], tensor->name);
        tensor->count = product(tensor->count, tensor->shape[i]);
    }
}

static void read_tensor(struct pool *pool, struct tensor *tensor, const struct json *entry,
                        const unsigned char *data, size_t length)
{
    const char *dtype = json_get(entry, "dtype", JSON_STRING)->string;
    const struct json *offsets = json_get(entry, "data_offsets", JSON_ARRAY);
    size_t width = width_of(dtype, tensor->name), from, to;

    read_shape(tensor, json_get(entry, "shape", JSON_ARRAY));
    if (offsets->count != 2) {
        fail("%s: data_offsets are not two", tensor->name);
    }
    from = json_size(&offsets->items[0], tensor->name);
    to = json_size(&offsets->items[1], tensor->name);
    if (from > to || to > length || to - from != product(tensor->count, width)) {
        fail("%s: its data_offsets do not fit its shape and the file", tensor->name);
    }
    read_numbers(pool, tensor, dtype, data + from);
}

struct tensors tensors_read(struct pool *pool, const char *path)
{
    struct tensors tensors = {0, 0, NULL};
    size_t length, i;
    const char *bytes = read_file(pool, path, &length);
    uint64_t header_length = length < 8 ? 0 : little_endian((const unsigned char *)bytes, 8);
    const struct json *header;

    if (length < 8 || header_length > length - 8) {
        fail("%s: cut off, or not a safetensors file", path);
    }
    header = json_parse(pool, bytes + 8, (size_t)header_length, path);
    if (header->kind != JSON_OBJECT) {
        fail("%s: the header is not an object", path);
    }
    for (i = 0; i < header->count; i++) {
        struct tensor tensor = {0};
        if (strcmp(header->keys[i], "__metadata__") == 0) {
            continue;
        }
        tensor.name = header->keys[i];
        read_tensor(pool, &tensor, &header->items[i], (const unsigned char *)bytes + 8 + header_length,
                    length - 8 - (size_t)header_length);
        tensors_add(&tensors, pool, &tensor);
    }
    return tensors;
}

const struct tensor *tensors_find(const struct tensors *tensors, const char *name)
{
    size_t i;

    for (i = 0; i < tensors->count; i++) {
        if (strcmp(tensors->items[i].name, name) == 0) {
            return &tensors->items[i];
        }
    }
    return NULL;
}

void tensors_add(struct tensors *tensors, struct pool *pool, const struct tensor *tensor)
{
    if (tensors_find(tensors, tensor->name) != NULL) {
        fail("%s: stands twice", tensor->name);
    }
    if (tensors->count == tensors->room) {
        size_t room = tensors->room == 0 ? 64 : product(2, tensors->room);
        struct tensor *items = pool_take(pool, room, sizeof *items);
        if (tensors->count > 0) {
            memcpy(items, tensors->items, tensors->count * sizeof *items);
        }
        tensors->items = items;
        tensors->room = room;
    }
    tensors->items[tensors->count++] = *tensor;
}

static void write_string(FILE *file, const char *string)
{
    fputc('"', file);
    for (; *string != '\0'; string++) {
        if (*string == '"' || *string == '\\') {
            fputc('\\', file);
        }
        if ((unsigned char)*string < 0x20) {
            fprintf(file, "\\u%04x", (unsigned)(unsigned char)*string);
        } else {
            fputc(*string, file);
        }
    }
    fputc('"', file);
}

static void write_entry(FILE *file, const struct tensor *tensor, size_t offset)
{
    size_t i;

    write_string(file, tensor->name);
    fprintf(file, ":{\"dtype\":\"%s\",\"shape\":[", tensor->integer != NULL ? "I64" : "F64");
    for (i = 0; i < tensor->dimensions; i++) {
        fprintf(file, "%s%lu", i == 0 ? "" : ",", (unsigned long)tensor->shape[i]);
    }
    fprintf(file, "],\"data_offsets\":[%lu,%lu]}", (unsigned long)offset,
            (unsigned long)(offset + 8 * tensor->count));
}

static void write_word(FILE *file, uint64_t bits)
{
    int i;

    for (i = 0; i < 8; i++) {
        fputc((int)(bits >> 8 * i & 0xFF), file);
    }
}

static void write_numbers(FILE *file, const struct tensor *tensor)
{
    size_t i;
    uint64_t bits;

    for (i = 0; i < tensor->count; i++) {
        if (tensor->integer != NULL) {
            bits = (uint64_t)tensor->integer[i];
        } else {
            memcpy(&bits, &tensor->real[i], sizeof bits);
        }
        write_word(file, bits);
    }
}

/* The header, with spaces up to a multiple of 8; its length is written when it is known. */
static void write_header(FILE *file, const struct tensors *tensors)
{
    size_t i, offset = 0;
    long length;

    write_word(file, 0);
    fputc('{', file);
    for (i = 0; i < tensors->count; i++) {
        if (i > 0) {
            fputc(',', file);
        }
        write_entry(file, &tensors->items[i], offset);
        offset += 8 * tensors->items[i].count;
    }
    fputc('}', file);
    for (length = ftell(file); length > 0 && length % 8 != 0; length++) {
        fputc(' ', file);
    }
    if (length < 8 || fseek(file, 0, SEEK_SET) != 0) {
        return;
    }
    write_word(file, (uint64_t)length - 8);
    fseek(file, 0, SEEK_END);
}

void tensors_write(const struct tensors *tensors, const char *path)
{
    FILE *file = fopen(path, "wb");
    size_t i;
    int bad;

    if (file == NULL) {
        fail("%s: cannot be written", path);
        return;
    }
    write_header(file, tensors);
    for (i = 0; i < tensors->count; i++) {
        write_numbers(file, &tensors->items[i]);
    }
    bad = ferror(file);
    if (fclose(file) != 0 || bad) {
        fail("%s: cannot be written", path);
    }
}

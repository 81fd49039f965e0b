/*
 * ScalaBL in plain C99: computes the cases of docs/conformance.md and stores the results for
 * `scalabl conformance check VECTORS_DIR OUTPUT.safetensors --precision float64`.
 *
 *     cc -std=c99 -O2 -Wall -Wextra -Wpedantic -Werror -ffp-contract=off -o port *.c -lm
 *     ./port VECTORS_DIR OUTPUT.safetensors
 *
 * Everything is computed in double. Bad input ends with a message and exit code 2.
 */
#include <stdio.h>
#include <string.h>

#include "levels.h"

static const char *path_in(struct pool *pool, const char *directory, const char *name)
{
    char *path = pool_take(pool, strlen(directory) + strlen(name) + 2, 1);

    strcpy(path, directory);
    strcat(path, "/");
    strcat(path, name);
    return path;
}

static const struct json *read_manifest(struct pool *pool, const char *path)
{
    size_t length;
    const char *text = read_file(pool, path, &length);
    const struct json *manifest = json_parse(pool, text, length, path);

    if (strcmp(json_get(manifest, "format", JSON_STRING)->string, "scalabl-conformance") != 0
        || json_get(manifest, "version", JSON_NUMBER)->number != 1
        || json_get(manifest, "noise_version", JSON_NUMBER)->number != 1) {
        fail("%s: not version 1 of the kit with noise version 1", path);
    }
    return manifest;
}

static void run(const struct json *entry, const struct tensors *vectors, struct pool *results_pool,
                struct tensors *results)
{
    struct pool pool = {NULL};
    struct kit_case c;

    c.pool = &pool;
    c.id = json_get(entry, "id", JSON_STRING)->string;
    c.level = json_get(entry, "level", JSON_STRING)->string;
    c.parameters = json_get(entry, "parameters", JSON_OBJECT);
    c.inputs = json_get(entry, "inputs", JSON_OBJECT);
    c.outputs = json_get(entry, "outputs", JSON_OBJECT);
    c.vectors = vectors;
    c.results_pool = results_pool;
    c.results = results;
    if (!run_case(&c)) {
        fprintf(stderr, "port: %s: level \"%s\" is not known here, passed over\n", c.id, c.level);
    }
    pool_empty(&pool);
}

int main(int argc, char **argv)
{
    struct pool pool = {NULL};
    struct tensors vectors, results = {0, 0, NULL};
    const struct json *cases;
    size_t i;

    if (argc != 3) {
        fail("usage: port VECTORS_DIR OUTPUT.safetensors");
    }
    cases = json_get(read_manifest(&pool, path_in(&pool, argv[1], "manifest.json")), "cases", JSON_ARRAY);
    vectors = tensors_read(&pool, path_in(&pool, argv[1], "vectors.safetensors"));
    for (i = 0; i < cases->count; i++) {
        run(&cases->items[i], &vectors, &pool, &results);
    }
    tensors_write(&results, argv[2]);
    printf("%lu cases, %lu tensors\n", (unsigned long)cases->count, (unsigned long)results.count);
    pool_empty(&pool);
    return 0;
}

#include <stdio.h>
#include <string.h>

#include "levels.h"
#include "train.h"

enum { LONGEST_NAME = 128 };

/* first + second, which is a tensor's name. */
static const char *joined(const struct kit_case *c, const char *first, const char *second)
{
    char *name = pool_take(c->pool, strlen(first) + strlen(second) + 1, 1);

    strcpy(name, first);
    strcat(name, second);
    return name;
}

/* ---- the weights ---- */

static struct linear linear_of(const struct kit_case *c, const char *name, size_t d_out, size_t d_in)
{
    struct linear linear = {{0}, {0}};
    const char *bias = joined(c, name, ".bias");

    linear.op.d_in = d_in;
    linear.op.d_out = d_out;
    linear.op.weight = reals(c, joined(c, name, ".weight"), product(d_out, d_in));
    linear.op.bias = has_input(c, bias) ? reals(c, bias, d_out) : NULL;
    return linear;
}

struct heads {
    size_t heads, kv_heads, head_dim;
};

static struct heads heads_of(const struct kit_case *c, const char *heads, const char *kv_heads)
{
    struct heads result;

    result.heads = whole(c, heads, 1);
    result.kv_heads = whole(c, kv_heads, 1);
    result.head_dim = whole(c, "head_dim", 2);
    if (result.head_dim % 2 != 0 || result.heads % result.kv_heads != 0) {
        fail("%s: an odd head_dim, or heads that the kv heads do not divide", c->id);
    }
    return result;
}

/* prefix is "" or "layers.0.attn." */
static struct attention attention_of(const struct kit_case *c, const char *prefix, struct heads heads,
                                     size_t batch, size_t length, size_t width)
{
    struct attention a = {0};
    size_t all = product(heads.heads, heads.head_dim), kv = product(heads.kv_heads, heads.head_dim);

    a.batch = batch;
    a.length = length;
    a.heads = heads.heads;
    a.kv_heads = heads.kv_heads;
    a.head_dim = heads.head_dim;
    a.frequencies = reals(c, "inverse_frequencies", heads.head_dim / 2);
    a.q_proj = linear_of(c, joined(c, prefix, "q_proj"), all, width);
    a.k_proj = linear_of(c, joined(c, prefix, "k_proj"), kv, width);
    a.v_proj = linear_of(c, joined(c, prefix, "v_proj"), kv, width);
    a.o_proj = linear_of(c, joined(c, prefix, "o_proj"), width, all);
    return a;
}

static struct mlp mlp_of(const struct kit_case *c, const char *prefix, size_t width, size_t inner)
{
    struct mlp mlp = {{{0}, {0}}, {{0}, {0}}, {{0}, {0}}, NULL, NULL};

    mlp.gate_proj = linear_of(c, joined(c, prefix, "gate_proj"), inner, width);
    mlp.up_proj = linear_of(c, joined(c, prefix, "up_proj"), inner, width);
    mlp.down_proj = linear_of(c, joined(c, prefix, "down_proj"), width, inner);
    return mlp;
}

static void fill_block(const struct kit_case *c, const struct model *model, size_t index, struct block *block)
{
    struct heads heads = heads_of(c, "num_attention_heads", "num_key_value_heads");
    size_t inner = whole(c, "intermediate_size", 1);
    char layer[LONGEST_NAME];
    const char *attn;

    sprintf(layer, "layers.%lu.", (unsigned long)index);
    attn = joined(c, layer, "attn.");
    block->attn_norm = reals(c, joined(c, layer, "attn_norm.weight"), model->width);
    block->mlp_norm = reals(c, joined(c, layer, "mlp_norm.weight"), model->width);
    block->attn = attention_of(c, attn, heads, model->batch, model->length, model->width);
    block->mlp = mlp_of(c, joined(c, layer, "mlp."), model->width, inner);
    if (flag(c, "qk_norm")) {
        block->attn.eps = model->eps;
        block->attn.q_norm = reals(c, joined(c, attn, "q_norm.weight"), heads.head_dim);
        block->attn.k_norm = reals(c, joined(c, attn, "k_norm.weight"), heads.head_dim);
    }
}

static struct linear head_of(const struct kit_case *c, size_t width)
{
    const char *name = flag(c, "tie_word_embeddings") ? "embed_tokens" : "lm_head";

    return linear_of(c, name, shaped(c, joined(c, name, ".weight"), 2)->shape[0], width);
}

static struct model model_of(const struct kit_case *c)
{
    struct model model = {0};
    const struct tensor *tokens = shaped(c, "tokens", 2);
    size_t i;

    model.batch = tokens->shape[0];
    model.length = tokens->shape[1];
    model.width = whole(c, "hidden_size", 1);
    model.layers = whole(c, "num_hidden_layers", 1);
    model.eps = number(c, "rms_norm_eps");
    model.embed_tokens = reals(c, "embed_tokens.weight", product(whole(c, "vocab_size", 1), model.width));
    model.norm = reals(c, "norm.weight", model.width);
    model.lm_head = head_of(c, model.width);
    model.blocks = pool_take(c->pool, model.layers, sizeof *model.blocks);
    for (i = 0; i < model.layers; i++) {
        fill_block(c, &model, i, &model.blocks[i]);
    }
    return model;
}

static size_t *tokens_of(const struct kit_case *c, const struct model *model)
{
    return indices(c, "tokens", product(model->batch, model->length), 0, whole(c, "vocab_size", 1) - 1);
}

/* ---- level llama ---- */

static void run_rmsnorm(const struct kit_case *c)
{
    const struct tensor *x = shaped(c, "x", 0);
    size_t width = x->shape[x->dimensions - 1];
    double *y = pool_doubles(c->pool, x->count);

    rmsnorm(x->count / width, width, reals(c, "x", x->count), reals(c, "weight", width), number(c, "eps"), y);
    store(c, "y", x->dimensions, x->shape, y);
}

static void run_rope(const struct kit_case *c)
{
    static const char *const kinds[] = {"default", "linear", "llama3"};
    size_t head_dim = whole(c, "head_dim", 2);
    double *frequencies = pool_doubles(c->pool, head_dim / 2);
    struct rope rope;

    rope.kind = (enum rope_kind)choice(c, "kind", kinds, 3);
    rope.theta = number(c, "theta");
    rope.factor = number(c, "factor");
    rope.low_freq_factor = number(c, "low_freq_factor");
    rope.high_freq_factor = number(c, "high_freq_factor");
    rope.original_max_position_embeddings = number(c, "original_max_position_embeddings");
    inverse_frequencies(&rope, head_dim, frequencies);
    store1(c, "inverse_frequencies", head_dim / 2, frequencies);
}

static void run_attention(const struct kit_case *c)
{
    const struct tensor *x = shaped(c, "x", 3);
    struct heads heads = heads_of(c, "heads", "kv_heads");
    struct attention a = attention_of(c, "", heads, x->shape[0], x->shape[1], x->shape[2]);

    store(c, "y", 3, x->shape, attention_forward(c->pool, &a, reals(c, "x", x->count)));
}

static void run_swiglu(const struct kit_case *c)
{
    const struct tensor *x = shaped(c, "x", 0);
    size_t width = x->shape[x->dimensions - 1];
    struct mlp mlp = mlp_of(c, "", width, shaped(c, "gate_proj.weight", 2)->shape[0]);
    const double *y = mlp_forward(c->pool, &mlp, x->count / width, reals(c, "x", x->count));

    store(c, "y", x->dimensions, x->shape, y);
}

static void run_model(const struct kit_case *c)
{
    struct model model = model_of(c);
    const double *hidden = model_forward(c->pool, &model, tokens_of(c, &model));
    size_t shape[3];

    shape[0] = model.batch;
    shape[1] = model.length;
    shape[2] = model.lm_head.op.d_out;
    store(c, "logits", 3, shape, head_forward(c->pool, &model, model.batch * model.length, hidden));
}

void run_llama(const struct kit_case *c)
{
    static const struct {
        const char *prefix;
        void (*run)(const struct kit_case *c);
    } kinds[] = {
        {"rmsnorm", run_rmsnorm}, {"rope-", run_rope}, {"attention-", run_attention},
        {"swiglu", run_swiglu}, {"model-", run_model},
    };
    size_t i;

    for (i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (strncmp(c->id, kinds[i].prefix, strlen(kinds[i].prefix)) == 0) {
            kinds[i].run(c);
            return;
        }
    }
    fail("%s: no such case of level llama is known here", c->id);
}

/* ---- level training step ---- */

static const char *const PARAMETER_NAMES[PARAMETERS] = {".A", ".B", ".log_s", ".log_sigma"};

/* The layer of that name in the model: "layers.0.attn.q_proj" or "lm_head". */
static struct linear *find_linear(const struct kit_case *c, struct model *model, const char *name)
{
    char candidate[LONGEST_NAME];
    size_t i, j;

    for (i = 0; i < model->layers; i++) {
        struct block *block = &model->blocks[i];
        const struct {
            const char *name;
            struct linear *linear;
        } inside[] = {
            {"attn.q_proj", &block->attn.q_proj}, {"attn.k_proj", &block->attn.k_proj},
            {"attn.v_proj", &block->attn.v_proj}, {"attn.o_proj", &block->attn.o_proj},
            {"mlp.gate_proj", &block->mlp.gate_proj}, {"mlp.up_proj", &block->mlp.up_proj},
            {"mlp.down_proj", &block->mlp.down_proj},
        };
        for (j = 0; j < sizeof inside / sizeof inside[0]; j++) {
            sprintf(candidate, "layers.%lu.%s", (unsigned long)i, inside[j].name);
            if (strcmp(candidate, name) == 0) {
                return inside[j].linear;
            }
        }
    }
    if (strcmp(name, "lm_head") != 0) {
        fail("%s: the model has no layer %s", c->id, name);
    }
    return &model->lm_head;
}

static struct parameter parameter_of(const struct kit_case *c, const char *name, size_t count)
{
    struct parameter p;

    p.count = count;
    p.value = pool_copy(c->pool, reals(c, name, count), count);
    p.gradient = p.m = p.v = NULL;
    if (has_input(c, joined(c, "exp_avg.", name))) {
        p.m = pool_copy(c->pool, reals(c, joined(c, "exp_avg.", name), count), count);
        p.v = pool_copy(c->pool, reals(c, joined(c, "exp_avg_sq.", name), count), count);
    }
    return p;
}

static struct adapter adapter_of(const struct kit_case *c, struct model *model, const char *name,
                                 uint32_t layer, size_t rank)
{
    struct adapter adapter = {0};
    size_t counts[PARAMETERS], i;

    adapter.linear = find_linear(c, model, name);
    adapter.layer = layer;
    counts[A_MATRIX] = product(rank, adapter.linear->op.d_in);
    counts[B_MATRIX] = product(adapter.linear->op.d_out, rank);
    counts[LOG_S] = counts[LOG_SIGMA] = rank;
    for (i = 0; i < PARAMETERS; i++) {
        adapter.parameters[i] = parameter_of(c, joined(c, name, PARAMETER_NAMES[i]), counts[i]);
    }
    return adapter;
}

static void fill_adapters(const struct kit_case *c, struct training *training)
{
    const struct json *layers = json_get(c->parameters, "layers", JSON_OBJECT);
    size_t i;

    training->rank = whole(c, "rank", 1);
    training->scaling = number(c, "scaling");
    training->adapter_count = layers->count;
    training->adapters = pool_take(c->pool, layers->count, sizeof *training->adapters);
    for (i = 0; i < layers->count; i++) {
        size_t id = json_size(&layers->items[i], layers->keys[i]);
        if (id >= UINT32_MAX) {
            fail("%s: the id of %s is too large", c->id, layers->keys[i]);
        }
        training->adapters[i] = adapter_of(c, training->model, layers->keys[i], (uint32_t)id, training->rank);
    }
}

static void fill_settings(const struct kit_case *c, struct training *training)
{
    static const char *const objectives[] = {"elbo", "official"};
    static const char *const directions[] = {"forward", "official"};

    training->objective = (enum objective)choice(c, "objective", objectives, 2);
    training->kl_direction = (enum direction)choice(c, "kl", directions, 2);
    training->prior_std = number(c, "prior_std");
    training->beta = number(c, "beta");
    training->num_examples = (double)whole(c, "num_examples", 1);
    training->noise.seed = seed_of(c);
    training->noise.draw = word(c, "draw");
    training->step = whole(c, "step", 0);
    training->steps = (double)whole(c, "steps", 1);
    training->warmup = number(c, "warmup");
    training->lr = number(c, "lr");
    training->variational_lr = number(c, "variational_lr");
    training->kl_lr = number(c, "kl_lr");
    training->adamw.beta1 = number(c, "beta1");
    training->adamw.beta2 = number(c, "beta2");
    training->adamw.eps = number(c, "adam_eps");
    training->adamw.weight_decay = number(c, "weight_decay");
}

static void fill_batch(const struct kit_case *c, struct training *training)
{
    const struct model *model = training->model;

    training->tokens = tokens_of(c, model);
    training->lengths = indices(c, "lengths", model->batch, 1, model->length);
    training->ids = words_of(c, "ids", model->batch);
}

/* gradient.NAME.A, after.NAME.A, its moments and so on of every adapted layer. */
static void store_trained(const struct kit_case *c, const struct adapter *adapter, const char *name)
{
    size_t i;

    for (i = 0; i < PARAMETERS; i++) {
        const char *parameter = joined(c, name, PARAMETER_NAMES[i]);
        const struct tensor *like = shaped(c, parameter, 0);
        const struct parameter *p = &adapter->parameters[i];
        store(c, joined(c, "gradient.", parameter), like->dimensions, like->shape, p->gradient);
        store(c, joined(c, "after.", parameter), like->dimensions, like->shape, p->value);
        store(c, joined(c, "after.exp_avg.", parameter), like->dimensions, like->shape, p->m);
        store(c, joined(c, "after.exp_avg_sq.", parameter), like->dimensions, like->shape, p->v);
    }
}

void run_training_step(const struct kit_case *c)
{
    struct model model = model_of(c);
    struct training training = {0};
    size_t repeat = whole(c, "repeat", 1), i;

    training.model = &model;
    fill_adapters(c, &training);
    fill_settings(c, &training);
    fill_batch(c, &training);
    training.labels = indices(c, "labels", model.batch, 0, model.lm_head.op.d_out - 1);
    for (i = 0; i < repeat; i++) {
        training_step(c->pool, &training);
    }
    store_scalar(c, "nll", training.nll);
    store_scalar(c, "kl", training.kl);
    store_scalar(c, "loss", training.loss);
    for (i = 0; i < training.adapter_count; i++) {
        store_trained(c, &training.adapters[i], json_find(c->parameters, "layers")->keys[i]);
    }
}

/* ---- level prediction ---- */

/* Draws 0 to S - 1 through the model; for S = 0 the mean model. */
void run_prediction(const struct kit_case *c)
{
    struct model model = model_of(c);
    struct training training = {0};
    size_t samples = whole(c, "samples", 0), draws = samples > 0 ? samples : 1, i, shape[3];
    size_t rows = model.batch, classes = model.lm_head.op.d_out;
    double *logits = pool_doubles(c->pool, product(draws, product(rows, classes)));

    training.model = &model;
    fill_adapters(c, &training);
    fill_batch(c, &training);
    training.noise.seed = seed_of(c);
    training.without_noise = samples == 0;
    for (i = 0; i < draws; i++) {
        training.noise.draw = (uint32_t)i;
        memcpy(logits + i * rows * classes, class_logits(c->pool, &training), rows * classes * sizeof *logits);
    }
    shape[0] = draws;
    shape[1] = rows;
    shape[2] = classes;
    store(c, "logits", 3, shape, logits);
    store_predictive(c, draws, rows, classes, logits);
}

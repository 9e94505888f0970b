/*
 * model.c - from bpo.bin, a mapped safetensors file, to a config and weights, every number checked.
 */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "model.h"

/* A tensor that must be there, with a shape [rows][cols], or [cols] when rows is 1: a norm's
 * gain. */
static int model_weight(struct weight *w, const struct bpo_model *m, const char *name, size_t rows,
                        size_t cols, struct bpo_error *err) {
    struct tensor t;
    int failed = safetensors_find(&t, m->file, name, err);
    if (failed) {
        return failed;
    }
    size_t found_rows = t.n_dims == 2 ? t.shape[0] : 1, found_cols = t.shape[t.n_dims - 1];
    if (!t.is_f16 || t.n_dims != (rows == 1 ? 1 : 2) || found_rows != rows || found_cols != cols) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "tensor %s is %s [%zu][%zu]; expected F16 [%zu][%zu]", name,
                        t.is_f16 ? "F16" : "U8", found_rows, found_cols, rows, cols);
    }
    *w = (struct weight){
        .data = t.data, .dtype = DTYPE_F16, .rows = rows, .cols = cols, .row_bytes = 2 * cols};
    return 0;
}

static int model_layer(struct layer_weights *layer, const struct bpo_model *m, int32_t l,
                       struct bpo_error *err) {
    const struct bpo_model_info *c = &m->info;
    size_t d = (size_t)c->dim, f = (size_t)c->ffn_dim, hd = (size_t)c->head_dim;
    size_t q = (size_t)c->n_heads * hd, kv = (size_t)c->n_kv_heads * hd;
    const struct {
        struct weight *weight;
        const char *name;
        size_t rows, cols;
    } table[] = {
        {&layer->attention_norm, "input_layernorm", 1, d},
        {&layer->qkv, "self_attn.qkv_proj", q + 2 * kv, d},
        {&layer->o, "self_attn.o_proj", d, q},
        {&layer->ffn_norm, "post_attention_layernorm", 1, d},
        {&layer->gate_up, "mlp.gate_up_proj", 2 * f, d},
        {&layer->down, "mlp.down_proj", d, f},
    };
    int failed = 0;
    for (size_t i = 0; !failed && i < sizeof table / sizeof table[0]; i++) {
        char name[96];
        (void)snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, table[i].name);
        failed = model_weight(table[i].weight, m, name, table[i].rows, table[i].cols, err);
    }
    return failed;
}

/* Finds every tensor that the config calls for, and refuses any other. */
static int model_weights(struct bpo_model *m, struct bpo_error *err) {
    const struct bpo_model_info *c = &m->info;
    struct weights *w = &m->weights;
    size_t v = (size_t)c->vocab_size, d = (size_t)c->dim, n_layers = (size_t)c->n_layers;
    size_t n_expected = 3 + WEIGHTS_PER_LAYER * n_layers + (c->tie_embeddings ? 0 : 1);
    if (!(w->layers = calloc(n_layers, sizeof *w->layers))) {
        return out_of_memory(err, "the list of layers", n_layers * sizeof *w->layers);
    }
    int failed = model_weight(&w->embedding, m, "model.embed_tokens.weight", v, d, err);
    for (int32_t l = 0; !failed && l < c->n_layers; l++) {
        failed = model_layer(&w->layers[l], m, l, err);
    }
    failed = failed ? failed : model_weight(&w->norm, m, "model.norm.weight", 1, d, err);
    w->lm_head = w->embedding;
    if (!failed && !c->tie_embeddings) {
        failed = model_weight(&w->lm_head, m, "lm_head.weight", v, d, err);
    }
    if (!failed && safetensors_count(m->file) != n_expected) {
        failed = bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                          "the file has %zu tensors; its config calls for %zu",
                          safetensors_count(m->file), n_expected);
    }
    return failed;
}

static int model_settings(struct bpo_mode_settings *s, const struct safetensors *file,
                          const char *mode, struct bpo_error *err) {
    double value[5] = {0};
    const struct {
        const char *key;
        double min, max;
    } table[] = {{"temperature", 0, 100},
                 {"top_p", 0, 1},
                 {"top_k", 0, MAX_DIM},
                 {"max_new_tokens", 1, MAX_POSITIONS},
                 {"samples", 1, 10000}};
    int failed = 0;
    for (size_t i = 0; !failed && i < sizeof table / sizeof table[0]; i++) {
        char key[64];
        (void)snprintf(key, sizeof key, "%s.%s", mode, table[i].key);
        failed = safetensors_number(&value[i], file, key, table[i].min, table[i].max, err);
    }
    *s = (struct bpo_mode_settings){.temperature = (float)value[0],
                                    .top_p = (float)value[1],
                                    .top_k = (int32_t)value[2],
                                    .max_new_tokens = (int32_t)value[3],
                                    .n_samples = (int32_t)value[4]};
    return failed;
}

/* Reads the config, and checks each of its numbers alone. */
static int model_config(struct bpo_model *m, struct bpo_error *err) {
    struct bpo_model_info *c = &m->info;
    const struct {
        int32_t *value;
        const char *key;
        int32_t min, max;
    } integers[] = {
        {&c->dim, "dim", 1, MAX_DIM},
        {&c->ffn_dim, "ffn_dim", 1, MAX_DIM / 2},
        {&c->n_layers, "n_layers", 1, MAX_LAYERS},
        {&c->n_heads, "n_heads", 1, MAX_HEADS},
        {&c->n_kv_heads, "n_kv_heads", 1, MAX_HEADS},
        {&c->head_dim, "head_dim", 2, MAX_HEAD_DIM},
        {&c->vocab_size, "vocab_size", 1, MAX_DIM},
        {&c->max_positions, "max_positions", 2, MAX_POSITIONS},
        {&c->bos_id, "bos_id", 0, MAX_DIM},
        {&c->eos_id, "eos_id", 0, MAX_DIM},
        {&c->pad_id, "pad_id", -1, MAX_DIM},
        {&c->newline_id, "newline_id", -1, MAX_DIM},
        {&c->trained_length, "trained_length", 1, MAX_POSITIONS},
    };
    int failed = 0;
    for (size_t i = 0; !failed && i < sizeof integers / sizeof integers[0]; i++) {
        failed = safetensors_integer(integers[i].value, m->file, integers[i].key, integers[i].min,
                                     integers[i].max, err);
    }
    const char *tied = "";
    failed =
        failed ? failed : safetensors_number(&c->rms_norm_eps, m->file, "rms_norm_eps", 0, 1, err);
    failed =
        failed ? failed : safetensors_number(&c->rope_theta, m->file, "rope_theta", 1, 1e12, err);
    failed = failed ? failed : safetensors_string(&tied, m->file, "tie_embeddings", err);
    failed = failed ? failed : safetensors_string(&c->source, m->file, "source", err);
    failed = failed ? failed : safetensors_string(&c->prompt_template, m->file, "template", err);
    failed = failed ? failed : model_settings(&c->settings[BPO_STABLE], m->file, "stable", err);
    failed =
        failed ? failed : model_settings(&c->settings[BPO_AGGRESSIVE], m->file, "aggressive", err);
    c->tie_embeddings = strcmp(tied, "true") == 0;
    if (!failed && !c->tie_embeddings && strcmp(tied, "false") != 0) {
        failed = bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                          "the header's \"tie_embeddings\" is \"%.16s\"", tied);
    }
    return failed;
}

/* Checks what the config's numbers say of each other. */
static int model_config_check(struct bpo_model *m, struct bpo_error *err) {
    const struct bpo_model_info *c = &m->info;
    const char *head = strstr(c->prompt_template, "{prompt}");
    const int32_t ids[] = {c->bos_id, c->eos_id, c->pad_id, c->newline_id};
    if (c->n_heads % c->n_kv_heads != 0 || c->head_dim % 2 != 0 ||
        (c->n_heads + 2 * c->n_kv_heads) * c->head_dim > MAX_DIM) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "no model has %d heads, %d key/value heads and a head size of %d",
                        c->n_heads, c->n_kv_heads, c->head_dim);
    }
    for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
        if (ids[i] >= c->vocab_size) {
            return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                            "the header names the special id %d, of a vocabulary of %d", ids[i],
                            c->vocab_size);
        }
    }
    if (!head || strstr(head + 1, "{prompt}")) {
        return bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                        "the header's prompt template needs exactly one {prompt}");
    }
    m->template_head = (size_t)(head - c->prompt_template);
    return 0;
}

/* Is it ours, and of a version that we read? */
static int model_format(const struct bpo_model *m, struct bpo_error *err) {
    const char *format;
    int32_t version = 0;
    if (safetensors_string(&format, m->file, "format", err) || strcmp(format, "bpo") != 0) {
        return bpo_fail(
            err, BPO_ERR_MODEL,
            "a Hugging Face checkpoint becomes one with: export_weights.py HF_DIR -o bpo.bin",
            "a safetensors file, but not one that export_weights.py wrote");
    }
    int failed = safetensors_integer(&version, m->file, "format_version", 1, MAX_DIM, err);
    if (!failed && version != 1) {
        failed =
            bpo_fail(err, BPO_ERR_MODEL,
                     "use a newer bpo, or export the model again with this one's export_weights.py",
                     "the file has format version %d; this program reads version 1", version);
    }
    return failed;
}

static int model_tokenizer(struct bpo_model *m, struct bpo_error *err) {
    struct tensor t;
    int failed = safetensors_find(&t, m->file, "tokenizer.model", err);
    if (!failed && (t.is_f16 || t.n_dims != 1)) {
        failed = bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                          "tensor tokenizer.model is not a row of bytes (U8)");
    }
    if (!failed && !(m->tokenizer = tokenizer_open(t.data, t.n_bytes, err))) {
        failed = BPO_ERR_MODEL;
    }
    int32_t n_pieces = failed ? 0 : tokenizer_count(m->tokenizer);
    if (!failed && (n_pieces > m->info.vocab_size ||
                    m->info.newline_id != tokenizer_byte_id(m->tokenizer, '\n'))) {
        failed = bpo_fail(err, BPO_ERR_MODEL, MODEL_FILE_HINT,
                          "another model's tokenizer: %d pieces, %d rows of the embedding; newline "
                          "id %d, the header's %d",
                          n_pieces, m->info.vocab_size, tokenizer_byte_id(m->tokenizer, '\n'),
                          m->info.newline_id);
    }
    m->info.n_pieces = n_pieces;
    return failed;
}

struct bpo_model *model_load(const char *path, struct bpo_error *err) {
    struct bpo_model *m = calloc(1, sizeof *m);
    if (!m) {
        (void)out_of_memory(err, "the model", sizeof *m);
        return NULL;
    }
    m->file = safetensors_open(path, err);
    int failed = m->file ? model_format(m, err) : BPO_ERR_MODEL;
    failed = failed ? failed : model_config(m, err);
    failed = failed ? failed : model_config_check(m, err);
    failed = failed ? failed : model_weights(m, err);
    failed = failed ? failed : model_tokenizer(m, err);
    if (failed) {
        bpo_model_close(m);
        return NULL;
    }
    struct bpo_model_info *c = &m->info;
    uint64_t d = (uint64_t)c->dim, f = (uint64_t)c->ffn_dim, hd = (uint64_t)c->head_dim;
    uint64_t heads = 2 * (uint64_t)c->n_heads + 2 * (uint64_t)c->n_kv_heads;
    const uint8_t *bytes = safetensors_bytes(m->file, &m->n_file);
    uint64_t n_header; /* a safetensors file begins with it */
    memcpy(&n_header, bytes, sizeof n_header);
    m->header_hash = XXH3_64bits(bytes, sizeof n_header + (size_t)n_header);
    c->hash = m->header_hash;
    c->file_bytes = m->n_file;
    c->n_parameters = (c->tie_embeddings ? 1 : 2) * (uint64_t)c->vocab_size * d + d +
                      (uint64_t)c->n_layers * (heads * hd * d + 3 * f * d + 2 * d);
    return m;
}

void bpo_model_close(struct bpo_model *m) {
    if (!m) {
        return;
    }
    for (size_t i = 0; i < N_BANNED; i++) {
        free(m->banned[i].id);
    }
    free(m->prefix.id);
    tokenizer_close(m->tokenizer);
    free(m->weights.layers);
    safetensors_close(m->file);
    free(m);
}

void bpo_model_get_info(const struct bpo_model *model, struct bpo_model_info *info) {
    *info = model->info;
}

int bpo_model_verify(const struct bpo_model *m,
                     void (*progress)(void *user, uint64_t done, uint64_t total), void *user,
                     struct bpo_error *err) {
    return safetensors_verify(m->file, progress, user, err);
}

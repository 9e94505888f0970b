/*
 * tiny_model.h - writes tiny bpo.bin files for the C tests: random weights, the tokenizer of
 * tests/data/tiny.model, and a header that a test may spoil before it is written.
 */
#ifndef BPO_TINY_MODEL_H
#define BPO_TINY_MODEL_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    TINY_DIM = 24,
    TINY_FFN = 40,
    TINY_LAYERS = 2,
    TINY_HEADS = 3,
    TINY_KV_HEADS = 1,
    TINY_HEAD_DIM = 10,
    TINY_VOCAB = 404
};

#define TINY_TOKENIZER "tests/data/tiny.model"

/* A file before it is written: the header as JSON, and the bytes that follow it. */
struct tiny {
    json_t *header;
    uint8_t *data;
    size_t n_data;
    uint32_t random;
};

/* A random fp16, below 2^(exponent + 1) in size. */
static inline uint16_t tiny_half(struct tiny *t, int exponent) {
    t->random = t->random * 1664525U + 1013904223U;
    uint32_t r = t->random >> 8;
    int e = exponent - (int)(r % 3U); /* magnitudes spread over three octaves */
    return (uint16_t)((r >> 4 & 1U) << 15 | (uint32_t)(e + 14) << 10 | (r >> 5 & 1023U));
}

static inline void tiny_add(struct tiny *t, const char *name, const char *dtype, size_t rows,
                            size_t cols, size_t n_bytes) {
    json_t *shape = rows == 0 ? json_pack("[I]", (json_int_t)cols)
                              : json_pack("[I, I]", (json_int_t)rows, (json_int_t)cols);
    json_object_set_new(t->header, name,
                        json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype, "shape", shape,
                                  "data_offsets", (json_int_t)t->n_data,
                                  (json_int_t)(t->n_data + n_bytes)));
    t->data = realloc(t->data, t->n_data + n_bytes + 64);
    memset(t->data + t->n_data, 0, n_bytes + 64);
    t->n_data += n_bytes;
}

/* Fills the gap to the next multiple of 64 bytes. */
static inline void tiny_pad(struct tiny *t) {
    char name[32];
    if (t->n_data % 64 != 0) {
        (void)snprintf(name, sizeof name, "pad.%zu", t->n_data);
        tiny_add(t, name, "U8", 0, 64 - t->n_data % 64, 64 - t->n_data % 64);
    }
}

static inline void tiny_weight(struct tiny *t, const char *name, size_t rows, size_t cols,
                               int exponent) {
    size_t n = (rows == 0 ? 1 : rows) * cols, at = t->n_data;
    tiny_add(t, name, "F16", rows, cols, 2 * n);
    for (size_t i = 0; i < n; i++) {
        uint16_t half = tiny_half(t, exponent);
        half = rows == 0 ? half & 0x7FFFU : half; /* norms' gains are positive */
        memcpy(t->data + at + 2 * i, &half, 2);
    }
    tiny_pad(t);
}

static inline json_t *tiny_metadata(void) {
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, "
        "s:s, s:s, s:s,"
        " s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s}",
        "xxh3.header", "0000000000000000", "format", "bpo", "format_version", "1", "source", "tiny",
        "dim", "24", "ffn_dim", "40", "n_layers", "2", "n_heads", "3", "n_kv_heads", "1",
        "head_dim", "10", "vocab_size", "404", "max_positions", "512", "rms_norm_eps", "1e-05",
        "rope_theta", "10000.0", "tie_embeddings", "false", "bos_id", "1", "eos_id", "2", "pad_id",
        "-1", "newline_id", "13", "template", "[INST] Improve:\n{prompt} [/INST]", "trained_length",
        "64", "stable.temperature", "0.6", "stable.top_k", "50", "stable.top_p", "0.9",
        "stable.max_new_tokens", "40", "stable.samples", "1", "aggressive.temperature", "0.9",
        "aggressive.top_k", "50", "aggressive.top_p", "0.9", "aggressive.samples", "5");
}

/* A whole tiny model in memory, always the same. */
static inline struct tiny tiny_model(void) {
    struct tiny t = {.header = json_object(), .random = 7};
    char name[96];
    size_t d = TINY_DIM, f = TINY_FFN, hd = TINY_HEAD_DIM;
    json_t *metadata = tiny_metadata();
    json_object_set_new(metadata, "aggressive.max_new_tokens", json_string("40"));
    json_object_set_new(t.header, "__metadata__", metadata);
    tiny_weight(&t, "model.embed_tokens.weight", TINY_VOCAB, d, 0);
    for (int l = 0; l < TINY_LAYERS; l++) {
        const struct {
            const char *name;
            size_t rows, cols;
            int exponent;
        } table[] = {
            {"input_layernorm", 0, d, 0},
            {"self_attn.qkv_proj", (TINY_HEADS + 2 * TINY_KV_HEADS) * hd, d, 0},
            {"self_attn.o_proj", d, TINY_HEADS * hd, 0},
            {"post_attention_layernorm", 0, d, 0},
            {"mlp.gate_up_proj", 2 * f, d, 0},
            {"mlp.down_proj", d, f, 0},
        };
        for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
            (void)snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, table[i].name);
            tiny_weight(&t, name, table[i].rows, table[i].cols, table[i].exponent);
        }
    }
    tiny_weight(&t, "model.norm.weight", 0, d, 0);
    tiny_weight(&t, "lm_head.weight", TINY_VOCAB, d, 0);
    FILE *file = fopen(TINY_TOKENIZER, "rb");
    if (!file) {
        (void)fprintf(stderr, "cannot open %s: run the tests from the project's folder\n",
                      TINY_TOKENIZER);
        exit(1);
    }
    static uint8_t tokenizer[1 << 20];
    size_t n = fread(tokenizer, 1, sizeof tokenizer, file);
    (void)fclose(file);
    tiny_add(&t, "tokenizer.model", "U8", 0, n, n);
    memcpy(t.data + t.n_data - n, tokenizer, n);
    return t;
}

/* The bytes of a tensor. */
static inline uint8_t *tiny_data(const struct tiny *t, const char *name) {
    const json_t *offsets = json_object_get(json_object_get(t->header, name), "data_offsets");
    return t->data + json_integer_value(json_array_get(offsets, 0));
}

static inline void tiny_meta(struct tiny *t, const char *key, const char *value) {
    json_object_set_new(json_object_get(t->header, "__metadata__"), key, json_string(value));
}

static inline void tiny_free(struct tiny *t) {
    json_decref(t->header);
    free(t->data);
}

/* Writes the file. header, if not NULL, replaces the JSON's text, which is padded to a multiple of
 * 64 bytes. */
static inline void tiny_write(const struct tiny *t, const char *path, const char *header,
                              size_t n_header) {
    char *own = header ? NULL : json_dumps(t->header, JSON_COMPACT);
    char *padded = calloc(1, 1 << 20);
    if (own) {
        size_t n = strlen(own);
        n_header = (8 + n + 63) / 64 * 64 - 8;
        memset(padded, ' ', n_header);
        memcpy(padded, own, n);
    } else {
        memcpy(padded, header, n_header);
    }
    uint64_t length = n_header;
    FILE *file = fopen(path, "wb");
    bool fine = file && fwrite(&length, 8, 1, file) == 1 &&
                fwrite(padded, 1, n_header, file) == n_header &&
                fwrite(t->data, 1, t->n_data, file) == t->n_data && fclose(file) == 0;
    free(padded);
    free(own);
    if (!fine) {
        (void)fprintf(stderr, "cannot write %s\n", path);
        exit(1);
    }
}

#endif

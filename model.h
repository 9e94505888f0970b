/*
 * model.h - the types that bpo.c and engine/ share, and what model.c and bpo.c offer: a model from
 * its file, the forward pass, the sampler, and the rules of BPO. Private: bpo.h is the API. Shape
 * letters as in kernels.h.
 */
#ifndef BPO_MODEL_H
#define BPO_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/safetensors.h"
#include "bpo.h"
#include "kernels.h"
#include "tokenizer.h"

enum {
    CHUNK_ROWS = 64,   /* rows of a prompt that are computed together: see chunk_end */
    MAX_DIM = 1 << 20, /* of any matrix; far above every model, and products of two still fit */
    MAX_LAYERS = 1 << 12,
    MAX_HEADS = 1 << 12,
    MAX_HEAD_DIM = 1 << 12,
    MAX_POSITIONS = 1 << 30,
    N_BANNED = 4, /* aggressive mode's banned sequences */
    MAX_FORBIDDEN = 2 + N_BANNED,
};

struct ids {
    int32_t *id;
    size_t n;
};

/* ---- a model: model.c ---- */

/* W_q, W_k and W_v are stored as one matrix, and so are W_gate and W_up. */
struct layer_weights {
    struct weight attention_norm; /* [D] */
    struct weight qkv;            /* [(H + 2 HK) hd][D]: queries, keys, values */
    struct weight o;              /* [D][H hd] */
    struct weight ffn_norm;       /* [D] */
    struct weight gate_up;        /* [2F][D]: gate, up */
    struct weight down;           /* [D][F] */
};
enum { WEIGHTS_PER_LAYER = 6 };
_Static_assert(sizeof(struct layer_weights) == WEIGHTS_PER_LAYER * sizeof(struct weight),
               "a layer is WEIGHTS_PER_LAYER weights and nothing else");

struct weights {
    struct weight embedding;      /* [V][D] */
    struct layer_weights *layers; /* [L] */
    struct weight norm;           /* [D] */
    struct weight lm_head;        /* [V][D]; the embedding itself when they are tied */
};

/* A model file, mapped. Immutable once open, so that sessions in several threads can share it. */
struct bpo_model {
    struct safetensors *file;
    size_t n_file;
    uint64_t header_hash; /* XXH3-64; the header holds a hash of every tensor */
    struct bpo_model_info info;
    struct weights weights; /* data points into the mapped file */
    struct tokenizer *tokenizer;
    size_t template_head;        /* bytes of the template before "{prompt}" */
    struct ids prefix;           /* BOS and the ids that every templated prompt begins with */
    struct ids banned[N_BANNED]; /* sequences that aggressive mode forbids */
};

/* Maps a model file and checks it. prefix and banned are left empty: bpo_model_open fills them.
 * NULL with *err filled on failure. bpo_model_close closes it. */
struct bpo_model *model_load(const char *path, struct bpo_error *err);

/* ---- the forward pass: bpo.c ---- */

/* What the layers read and write, in backend memory. */
struct activations {
    float *x;                    /* [R][D] the residual stream */
    float *normed;               /* [R][D] */
    float *qkv;                  /* [R][(H + 2 HK) hd] */
    float *mixed;                /* [R][H hd] attention's result */
    float *gate_up;              /* [R][2F] */
    float *hidden;               /* [R][F] */
    float *angles;               /* [R][hd/2][2] */
    float *last;                 /* [wanted][D] the rows whose logits are wanted */
    float *logits;               /* [wanted][V] */
    float *inv_freq;             /* [hd/2] */
    int32_t *token, *slot, *pos; /* [R] */
    int32_t *wanted;             /* [wanted] which rows */
};
enum { N_ACTIVATIONS = 14 };

/* One buffer: where its pointer is kept, its size, and whether it is host or backend memory. */
struct buffer {
    void *at; /* of some pointer type: read and written by memcpy */
    size_t n_bytes;
    bool on_host;
};

/* The sizes of the activations of at most max_rows rows, of which max_wanted want their logits. */
void activation_buffers(struct buffer table[N_ACTIVATIONS], struct activations *a,
                        const struct bpo_model_info *c, size_t max_rows, size_t max_wanted);

/* All that a forward pass works on. */
struct llama {
    const struct bpo_model_info *config;
    const struct kernels *ops;
    struct backend *backend;
    struct weights weights; /* data points to backend memory */
    struct activations act;
    struct kv_cache kv;
    bool (*after_layer)(void *user, int32_t layer); /* false: stop here. NULL: never */
    void *user;
};

/* Computes the rows, puts their keys and values into the cache, and the logits of the rows
 * act.wanted [n_wanted] into act.logits. */
void forward(const struct llama *m, const struct rows *rows, int32_t n_wanted);

/* Lays out a KV cache; *n_bytes: the memory that it needs. */
int kv_layout(struct kv_cache *kv, const struct bpo_model_info *c, int32_t n_slots,
              int32_t n_positions, size_t *n_bytes, struct bpo_error *err);

/* ---- the sampler: bpo.c ---- */

/* An id that may be drawn. */
struct candidate {
    float score; /* logit / temperature */
    int32_t id;
    double mass; /* exp(score - the best score) */
};

enum { DRAW_ALL_FORBIDDEN = -1, DRAW_NOT_FINITE = -2 };

/* Draws an id from logits [V]; scratch [V]. Or DRAW_ALL_FORBIDDEN, DRAW_NOT_FINITE. */
int32_t sampler_draw(struct candidate *scratch, const float *logits, size_t vocab,
                     const struct sample_params *p);

/* Its second half: draws from n >= 1 candidates, which are reordered. They may be fewer than all,
 * as long as no missing one would be kept. total: the mass of all, used when top-k is off. */
int32_t candidates_draw(struct candidate *c, size_t n, double total, const struct sample_params *p);

bool is_forbidden(const struct sample_params *p, int32_t id);

/* The uniform random number in [0, 1) for a position of a sample; a pure function. */
double uniform(uint64_t seed, uint32_t sample, uint32_t position);

/* ---- BPO's rules: bpo.c ---- */

int tokenize(const struct bpo_model *m, const char *text, size_t n_text, struct ids *out,
             struct bpo_error *err);

/* BOS and the ids of the template with the text in it. */
int tokenize_templated(const struct bpo_model *m, const char *text, size_t n_text, struct ids *out,
                       struct bpo_error *err);

/* True if a prompt begins with the template's constant ids, and goes on. */
bool has_prefix(const struct bpo_model *m, const struct ids *prompt);

/* Where the chunk that begins at position `from` of a prompt ends. */
int32_t chunk_end(const struct bpo_model *m, const struct ids *prompt, int32_t from);

/* An answer as it grows: what the rules of a mode look at. */
struct answer {
    enum bpo_mode mode;
    const struct ids *prompt; /* the templated prompt */
    const int32_t *tokens;    /* [n_tokens] new ids so far */
    int32_t n_tokens;
    int32_t min_new; /* the answer may not end before it has this many */
};

/* Aggressive mode's min_new for a prompt whose bare text has n_bare ids; stable mode's is 0. */
int32_t min_new_tokens(enum bpo_mode mode, size_t n_bare);

/* Fills forbidden [MAX_FORBIDDEN] with the ids that may not come next, and returns their number. */
int32_t forbidden_ids(const struct bpo_model *m, const struct answer *a, int32_t *forbidden);

/* Does this id, the answer's last, end it? */
bool ends_answer(const struct bpo_model *m, enum bpo_mode mode, int32_t id, enum bpo_stop *stop);

/* The length of a generated text up to the first marker that cuts it off. may_grow: without what
 * may yet turn out to be the beginning of a marker. */
size_t cut_length(enum bpo_mode mode, const char *text, size_t n, bool may_grow);

#endif

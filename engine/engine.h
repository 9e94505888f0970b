/*
 * engine.h - the engine's types, and what its files offer each other: bpo.c (the engine; it uses
 * the other two), model.c (from a file to a checked model), session.c (a backend, its memory and
 * the weights there). Private: bpo.h is the API.
 *
 * Shape letters, the same in every file:
 *
 *     D model width    F feed-forward width    H query heads    HK key/value heads    hd head size
 *     L layers         V vocabulary            S positions that fit a slot            R rows in this call
 */
#ifndef BPO_ENGINE_H
#define BPO_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bpo.h"
#include "base/error.h"
#include "kernels.h"
#include "engine/lookup.h"
#include "base/safetensors.h"
#include "base/text.h"
#include "tokenizer.h"

enum {
    CHUNK_ROWS = 64, /* rows of a prompt that are computed together; see chunk_end */
    STEP_ROWS = 256, /* prompt rows in one forward call, at most */
    /* of any matrix; far above every model, low enough that products of two fit */
    MAX_DIM = 1 << 20,
    MAX_LAYERS = 1 << 12,
    MAX_HEADS = 1 << 12,
    MAX_HEAD_DIM = 1 << 12,
    MAX_POSITIONS = 1 << 30,
    SMALL_MODEL = 48 << 20, /* bytes of a model file that stays in the CPU's caches, about */
    N_BANNED = 4,           /* aggressive mode's banned sequences */
    MOST_FORBIDDEN = 2 + N_BANNED,
};

struct ids {
    int32_t *id;
    size_t n;
};

/* The matrices of one layer. W_q, W_k, W_v are stored as one, and so are W_gate, W_up. */
struct layer {
    struct weight attention_norm; /* [D] */
    struct weight qkv;            /* [(H + 2 HK) hd][D]: queries, keys, values */
    struct weight o;              /* [D][H hd] */
    struct weight ffn_norm;       /* [D] */
    struct weight gate_up;        /* [2F][D]: gate, up */
    struct weight down;           /* [D][F] */
};

struct weights {
    struct weight embedding; /* [V][D] */
    struct layer *layers;    /* [L] */
    struct weight norm;      /* [D] */
    struct weight lm_head;   /* [V][D]; the embedding itself when they are tied */
};

/* One model file, mapped. Immutable once open, so that sessions in several threads can share it. */
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

enum request_state { REQUEST_WAITING, REQUEST_PREFILL, REQUEST_READY };

/* One prompt and the samples that are drawn for it. */
struct request {
    int64_t number;
    struct bpo_request options; /* text, ids and forced ids: our copies */
    enum request_state state;
    bool cancelled;
    char *text; /* the prompt, without white space at its ends; NULL for ids */
    size_t n_text;
    struct ids prompt; /* the templated text's ids, P of them */
    struct ids forced; /* what the draws are replaced by */
    struct ids
        source; /* the bare text's, N without BOS: an answer that copies it has them, so lookup drafts from them */
    bool has_prefix; /* the prompt begins with the template's prefix, and goes on */
    int32_t n_kept;  /* its ids whose keys and values were at hand */
    int32_t min_new; /* new ids before which the text may not end */
    /* [V] of the prompt's last position: where each sample's first id is drawn from */
    float *logits;
    int32_t n_started, n_done;
    double begun, ready; /* times: first row computed, prompt complete */
    struct request *next;
};

/* One sample's text as it grows. */
struct sequence {
    struct request *request;
    int32_t sample, slot;
    int32_t n_kv; /* of the prompt's positions, those that are in the KV cache */
    /* [V] where the first id is to be drawn from in this step; NULL: nowhere */
    const float *logits;
    /* [1 + draft.n_rows] the next ids, drawn (negative: see enum no_draw); NULL: none yet */
    const int32_t *drawn;
    struct draft draft; /* what lookup expects them to be */
    int32_t *tokens;    /* [max_new_tokens] */
    int32_t n_tokens;
    int32_t n_passes, n_drafted, n_accepted;
    struct decoder decoder;
    struct text raw; /* the decoded text, before it is stripped and cut */
    /* raw[begin, shown) has been handed out; begin: behind the leading white space */
    size_t begin, shown;
    struct bpo_error error;
    struct sequence *next; /* in the list of finished ones */
};

struct slot {
    struct sequence *sequence; /* NULL: free */
    /* the request whose prompt's keys and values lie in the first positions, or -1 */
    int64_t prompt_of;
    bool has_prefix;   /* those of the template's prefix do */
    int32_t n_touched; /* positions ever written: memory that is committed */
};

/* Host copies of the rows of the next call. */
struct row_list {
    int32_t *token, *slot, *pos;  /* [max_rows] */
    int32_t *wanted;              /* [max_wanted] rows whose logits are wanted */
    struct sequence **wanted_by;  /* [max_wanted] */
    struct sample_params *params; /* [max_wanted] how to draw from them */
    int32_t *forbidden;           /* [max_wanted][MOST_FORBIDDEN] */
    int32_t *drawn;               /* [max_wanted] what was drawn */
    struct span *spans;           /* [max_rows] */
    int32_t n, n_wanted, n_spans;
};

enum { SAMPLER_BLOCK = 64 };
struct sampler {
    float *block_max; /* [V / SAMPLER_BLOCK] the largest logit of each block of ids */
    float *scaled;    /* [V] logits / temperature */
    int32_t *heap;    /* [V] ids, the best at the root */
    int32_t *ranked;  /* [V] ids in rank order, as far as they were needed */
    double *mass;     /* [V] their unnormalised probabilities */
};

/* Everything that one forward call works on, in backend memory. */
struct activations {
    float *x;                             /* [R][D] the residual stream */
    float *normed;                        /* [R][D] */
    float *qkv;                           /* [R][(H + 2 HK) hd] */
    float *mixed;                         /* [R][H hd] attention's result */
    float *gate_up;                       /* [R][2F] */
    float *hidden;                        /* [R][F] */
    float *angles;                        /* [R][hd/2][2] */
    float *last;                          /* [wanted][D] */
    float *logits;                        /* [wanted][V] */
    float *inv_freq;                      /* [hd/2] */
    int32_t *token, *slot, *pos, *wanted; /* [R], [wanted] */
};

/* The template prefix in the cache folder: not used; to be looked for; not there, to be written;
 * done with. */
enum prefix_file { PREFIX_FILE_OFF, PREFIX_FILE_UNREAD, PREFIX_FILE_MISSING, PREFIX_FILE_DONE };

struct bpo_session {
    const struct bpo_model *model;
    struct bpo_session_info info;
    char numerics[160]; /* struct backend_info's */
    enum prefix_file prefix_file;
    int32_t n_lookup; /* the option: -1, 0 or a number */
    struct lookup lookup;
    struct draft **drafts; /* [n_slots] those of one step */
    const struct kernels *kernels;
    struct backend *backend;
    struct weights weights; /* data points to backend memory */
    struct activations act;
    struct kv_cache kv;
    size_t kv_bytes;
    int32_t max_rows, max_wanted;
    struct row_list rows;
    /* of thread 0; those of the backend's other threads lie behind it: sampler_of */
    struct sampler sampler;
    /* [max_wanted][V], downloaded; unused where the host can read backend memory */
    float *host_logits;
    struct slot *slots;           /* [n_slots] */
    struct shared_prefix *shared; /* [n_slots] of one step */
    struct request *requests;     /* in the order of their numbers */
    int64_t next_number;
    struct sequence *finished; /* kept until the next step: events point into them */
    struct bpo_event *events;
    size_t n_events, max_events;
    struct text warnings; /* texts of WARNING events, NUL-separated */
    bool events_lost, handed_out;
    atomic_int interrupted;
};

/* ---- model.c ---- */

/* Maps a model file and checks it; what comes of the template (prefix and banned ids) is left to
 * the caller. NULL with *err. bpo_model_close closes it. */
struct bpo_model *model_load(const char *path, struct bpo_error *err);

/* ---- session.c ---- */

/* Whether the options are in range. */
int session_options_check(const struct bpo_session_options *options, const struct bpo_model_info *c,
                          struct bpo_error *err);

/* The parts of opening a session, in their order: the backend of an op table; the buffers
 * (s->max_rows and the like are set); the weights, where the backend has them; the constants of
 * RoPE. */
int session_backend(struct bpo_session *s, const struct bpo_session_options *options,
                    const struct kernels *kernels, struct bpo_error *err);
int session_memory(struct bpo_session *s, struct bpo_error *err);
int session_weights(struct bpo_session *s, struct bpo_error *err);
int session_rope(struct bpo_session *s, struct bpo_error *err);

/* Frees what these four made, and the KV cache; also after one of them failed. They may then be
 * called again. */
void session_release(struct bpo_session *s);

/* Whether n_bytes more of anonymous memory can be had: better an error now than a killed process
 * later. */
int check_memory(size_t n_bytes, const char *what, struct bpo_error *err);

#endif

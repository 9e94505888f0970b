/*
 * bpo.h - rewrite prompts with a BPO model (Black-box Prompt Optimization; Cheng et al. 2023): the
 * engine's public C API.
 *
 *     struct bpo_error err;
 *     struct bpo_model *model = bpo_model_open("bpo.bin", &err);
 *     struct bpo_session *session = bpo_session_open(model, NULL, &err);
 *     struct bpo_request request;
 *     bpo_request_init(&request, model, BPO_STABLE);
 *     request.text = "Tell me about Harry Potter", request.n_text = strlen(request.text);
 *     char *better = bpo_rewrite(session, &request, &err);  // free it at the end
 *
 * Underneath is a step engine: submit requests, as many as you like, and call bpo_step until it
 * returns 0; each call is one forward pass for all of them and hands out what happened as events.
 * bpo_rewrite is a short loop over it.
 *
 * Functions that can fail return NULL or a negative enum bpo_code and fill the caller's struct
 * bpo_error (which may be NULL). Nothing here prints or exits, and there is no global state: a
 * model may serve several sessions, in several threads; a session belongs to one thread at a time.
 */
#ifndef BPO_H
#define BPO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bpo_error.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BPO_MAX_SEED ((UINT64_C(1) << 53) - 1) /* seeds survive a trip through JSON's doubles */

struct bpo_model;
struct bpo_session;

/* STABLE: one careful rewrite, as in the model card. AGGRESSIVE: several freer ones, as in the
 * authors' other script. */
enum bpo_mode { BPO_STABLE, BPO_AGGRESSIVE };
enum { BPO_N_MODES = 2 };

/* ---- the model file ---- */

/* How a mode samples by default. */
struct bpo_mode_settings {
    float temperature, top_p;
    int32_t top_k, max_new_tokens, n_samples;
};

struct bpo_model_info {
    const char *source;          /* where the weights came from; lives as long as the model */
    const char *prompt_template; /* with exactly one "{prompt}" */
    int32_t dim, ffn_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_positions;
    int32_t bos_id, eos_id, pad_id, newline_id; /* -1: none */
    int32_t trained_length;                     /* ids; training saw no longer prompts */
    int32_t n_pieces;                           /* the tokenizer's; vocab_size may be padded */
    double rms_norm_eps, rope_theta;
    bool tie_embeddings;
    uint64_t n_parameters, file_bytes;
    /* Of the file's header, which holds every tensor's hash, so it identifies the model. */
    uint64_t hash;
    struct bpo_mode_settings settings[BPO_N_MODES];
};

/* Maps a bpo.bin and checks every number of its header, but not the weights' hashes, so that
 * opening takes the same time whatever its size. BPO_ERR_MODEL if it is not a valid model file. */
struct bpo_model *bpo_model_open(const char *path, struct bpo_error *err);
void bpo_model_close(struct bpo_model *model); /* after its sessions */
void bpo_model_get_info(const struct bpo_model *model, struct bpo_model_info *info);

/* Reads the whole file and compares every hash; progress (may be NULL) is called with bytes done
 * and in all. BPO_ERR_MODEL names the first tensor that differs. */
int bpo_model_verify(const struct bpo_model *model,
                     void (*progress)(void *user, uint64_t done, uint64_t total), void *user,
                     struct bpo_error *err);

/* The token ids of a text: in the model's template and with BOS (templated), or of the text alone.
 * *ids is malloc'ed; the caller frees it. */
int bpo_tokenize(const struct bpo_model *model, const char *text, size_t n_text, bool templated,
                 int32_t **ids, size_t *n_ids, struct bpo_error *err);

/* ---- a session: a backend, its KV cache, and the requests it is working on ---- */

/* AUTO: a GPU if there is one with room for the model and the KV cache, else the CPU. */
enum bpo_device { BPO_DEVICE_AUTO, BPO_DEVICE_CPU, BPO_DEVICE_CUDA };
/* What multiplies prompt rows on the CPU. */
enum bpo_matmul { BPO_MATMUL_AUTO, BPO_MATMUL_OWN, BPO_MATMUL_OPENBLAS };

struct bpo_session_options {
    size_t size; /* sizeof(struct bpo_session_options), set by bpo_session_options_init */
    enum bpo_device device;
    enum bpo_matmul matmul;
    int32_t n_threads;   /* 0: the physical cores that the process may use */
    int32_t n_slots;     /* sequences decoded together; default 1 */
    int32_t n_positions; /* ids per sequence, prompt and answer; 0: the model's maximum */
    /* Ids drafted per sequence and step: 0 (off) to 15. -1, the default: as many as pay. */
    int32_t lookup;
    /* Neither read nor write the template prefix in the user's cache folder. */
    bool no_cache;
    /* Called with the bytes of weights uploaded to a GPU so far; or NULL. */
    void (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
};
void bpo_session_options_init(struct bpo_session_options *options);

struct bpo_session_info {
    const char *device, *simd; /* "cpu", "cuda"; "avx2", "sm_90", ...: the instructions used */
    char blas[128];            /* OpenBLAS's version and core name, or cuBLAS's version */
    /* What to do if OpenBLAS's kernels do not use instructions that the CPU has; or "". */
    char blas_hint[160];
    enum bpo_matmul matmul; /* OWN or OPENBLAS: what AUTO became */
    int32_t n_threads, n_slots, n_positions;
    size_t buffer_bytes;      /* activations */
    size_t kv_position_bytes; /* KV cache of one position of one sequence */
};

/* options may be NULL. BPO_ERR_RESOURCE: not enough memory, no such device. */
struct bpo_session *bpo_session_open(const struct bpo_model *model,
                                     const struct bpo_session_options *options,
                                     struct bpo_error *err);
void bpo_session_close(struct bpo_session *session);
void bpo_session_get_info(const struct bpo_session *session, struct bpo_session_info *info);

/* What a session on the CPU would use: sets device, simd, blas and matmul. BPO_ERR_USAGE: $BPO_SIMD
 * names a level that this CPU does not have. */
int bpo_cpu_info(struct bpo_session_info *info, struct bpo_error *err);

/* ---- requests ---- */

struct bpo_request {
    size_t size; /* sizeof(struct bpo_request), set by bpo_request_init */
    enum bpo_mode mode;
    const char *text; /* the prompt, n_text bytes; copied */
    size_t n_text;
    /* Or, if not NULL: n_ids ids as the whole input, without the template; stable mode only. */
    const int32_t *ids;
    size_t n_ids;
    /* How many rewrites of the prompt, 1 or more; sample s is the same text for any number. */
    int32_t n_samples;
    float temperature, top_p; /* temperature 0: greedy; top_p >= 1: off */
    int32_t top_k;            /* 0: off */
    int32_t max_new_tokens;
    /* 0 .. BPO_MAX_SEED. The same model, prompt, options and seed give the same text. */
    uint64_t seed;
    void *user; /* comes back in the events */

    /* For benchmarks that replay a known text: after each draw the id is replaced by the next of
     * these n_forced ids (copied; the same for every sample). After the last one the sample ends,
     * with BPO_STOP_LENGTH if that id does not end it. Every pass and every draw still runs. The
     * command line takes them from the environment: BPO_FORCE_TOKENS="1,518,...". */
    const int32_t *forced;
    size_t n_forced;
};

/* The model's defaults for a mode; seed 0. */
void bpo_request_init(struct bpo_request *request, const struct bpo_model *model,
                      enum bpo_mode mode);

/* Accepts a request and returns its number, >= 0; or BPO_ERR_INPUT (no prompt, or too long for the
 * context), BPO_ERR_USAGE (an option out of range), BPO_ERR_RESOURCE (not enough memory for its KV
 * cache). */
int64_t bpo_submit(struct bpo_session *session, const struct bpo_request *request,
                   struct bpo_error *err);

enum bpo_stop {
    BPO_STOP_EOS,         /* the model ended the text */
    BPO_STOP_NEWLINE,     /* a newline did (aggressive mode) */
    BPO_STOP_LENGTH,      /* max_new_tokens */
    BPO_STOP_CONTEXT,     /* the sequence's positions are used up */
    BPO_STOP_INTERRUPTED, /* bpo_interrupt or bpo_cancel */
    BPO_STOP_ERROR,       /* see the event's error */
};
const char *bpo_stop_name(enum bpo_stop stop); /* "eos", "newline", ... */

enum bpo_event_kind {
    BPO_EVENT_WARNING, /* text: a remark for the user, one line; request -1: about the session */
    BPO_EVENT_TOKEN,   /* token: the id that was drawn, EOS included */
    BPO_EVENT_TEXT,    /* text: the next piece; all pieces of a sample add up to its final text */
    BPO_EVENT_DONE,    /* a sample is complete: everything below is set; text is all of it */
};

/* Pointers are valid until the next call on the session. */
struct bpo_event {
    enum bpo_event_kind kind;
    int64_t request;
    void *user;
    int32_t sample, token;
    const char *text; /* n_text bytes of UTF-8, NUL-terminated only in WARNING and DONE */
    size_t n_text;
    enum bpo_stop stop;
    const struct bpo_error *error; /* BPO_STOP_ERROR only */
    const int32_t *tokens;         /* the new_tokens ids */
    int32_t prompt_tokens, new_tokens;
    bool unchanged; /* the rewrite is the prompt, apart from white space at its ends */
    /* Until the first token could be drawn, and from there to the end. */
    double prefill_s, decode_s;
    /* Of the prompt's ids, those whose keys and values were already there: the template's
     * prefix. */
    int32_t kept_tokens;
    /* Forward passes for new tokens; the first token comes from the prompt's own. */
    int32_t passes;
    /* Ids that lookup guessed and the passes checked; those of them that were in fact drawn. */
    int32_t drafted, accepted;
};

/* Makes one forward pass for all requests. Returns 1 while there is more to do, 0 when nothing is
 * left, or a negative code if the backend failed: then the session can only be closed. *events
 * belong to the session. */
int bpo_step(struct bpo_session *session, const struct bpo_event **events, size_t *n_events,
             struct bpo_error *err);

/* Ends a request, or all of them: the next bpo_step reports their samples as done, with the text
 * that they have. bpo_interrupt may be called from a signal handler or another thread, and takes
 * effect within the time of one layer. */
void bpo_cancel(struct bpo_session *session, int64_t request);
void bpo_interrupt(struct bpo_session *session);

/* Submits a request of one sample, waits for it and returns its text, NUL-terminated and malloc'ed;
 * NULL with *err on failure. */
char *bpo_rewrite(struct bpo_session *session, const struct bpo_request *request,
                  struct bpo_error *err);

/* The logits [n_ids][vocab_size], fp32, of a whole input of ids, computed as a prompt is. For
 * comparisons; the session must have no requests. */
int bpo_logits(struct bpo_session *session, const int32_t *ids, size_t n_ids, float *logits,
               struct bpo_error *err);

/* "0.1.0" */
const char *bpo_version(void);

#ifdef __cplusplus
}
#endif

#endif

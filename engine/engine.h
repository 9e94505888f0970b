/*
 * engine.h - many requests at once: the types of engine.c (the step loop and the API), session.c (a
 * backend, its memory and the weights there) and top_k.c (the sampler's prefilter), and what they
 * offer each other. Private: bpo.h is the API.
 */
#ifndef BPO_ENGINE_H
#define BPO_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/text.h"
#include "engine/lookup.h"
#include "engine/top_k.h"
#include "model.h"

enum {
    STEP_ROWS = 256,        /* prompt rows in one forward call, at most */
    SMALL_MODEL = 48 << 20, /* bytes of a model file that stays in the CPU's caches, about */
};

enum request_state { REQUEST_WAITING, REQUEST_PREFILL, REQUEST_READY };

/* One prompt and the samples that are drawn for it. */
struct request {
    int64_t number;
    struct bpo_request options; /* text, ids and forced are NULL: what they gave is below */
    enum request_state state;
    bool cancelled;
    char *text; /* the prompt, stripped; NULL if it was given as ids */
    size_t n_text;
    struct ids prompt; /* the templated text's ids */
    struct ids forced; /* they replace what is drawn */
    struct ids
        source;       /* the bare text's ids: an answer that copies it has them, so drafts do too */
    bool has_prefix;  /* the prompt begins with the template's prefix, and goes on */
    int32_t n_cached; /* of the prompt's ids, those whose keys and values were already there */
    int32_t min_new;  /* see struct answer */
    float *logits;    /* [V] after the prompt: each sample's first id is drawn from them */
    int32_t n_started, n_done;
    double begun, ready; /* times: first row computed, prompt complete */
    struct request *next;
};

/* One sample of a request, while its answer grows. */
struct sequence {
    struct request *request;
    int32_t sample, slot;
    int32_t n_kv;         /* of the prompt's positions, those that are in the KV cache */
    const float *logits;  /* [V] to draw the first id from in this step; NULL: nothing to draw */
    const int32_t *drawn; /* [1 + draft.n_rows] the next ids, already drawn; NULL: none */
    struct draft draft;
    int32_t *tokens; /* [max_new_tokens] the answer; the room after it holds the draft */
    int32_t n_tokens;
    int32_t n_passes, n_drafted, n_accepted;
    struct decoder decoder;
    struct text raw;     /* the decoded text, before it is cut and stripped */
    size_t begin, shown; /* raw[begin, shown) has been reported; begin: after the leading space */
    struct bpo_error error;
    struct sequence *next; /* in the list of finished ones */
};

struct slot {
    struct sequence *sequence; /* NULL: free */
    int64_t prompt_of; /* the request whose prompt is in the first positions of the cache, or -1 */
    bool holds_prefix; /* the template's prefix is */
    int32_t n_touched; /* positions ever written: memory that is committed */
};

/* The rows of the next forward call, as the host chooses them; the decoding rows come first. */
struct batch {
    int32_t *token, *slot, *pos;  /* [max_rows] */
    int32_t *wanted;              /* [max_wanted] rows whose logits are wanted */
    struct sequence **wanted_by;  /* [max_wanted] */
    struct sample_params *params; /* [max_wanted] how to draw from them */
    int32_t *forbidden;           /* [max_wanted][MAX_FORBIDDEN] */
    int32_t *drawn;               /* [max_wanted] what was drawn */
    struct span *spans;           /* [max_rows] */
    int32_t n, n_wanted, n_spans;
};

/* Whether the template's prefix is kept in the cache folder: not at all; not looked for yet; not
 * there, so that it is to be written; settled. */
enum prefix_cache_state {
    PREFIX_CACHE_OFF,
    PREFIX_CACHE_UNREAD,
    PREFIX_CACHE_MISSING,
    PREFIX_CACHE_DONE
};

struct bpo_session {
    const struct bpo_model *model;
    struct bpo_session_info info;
    char numerics[160]; /* the backend's */
    enum prefix_cache_state prefix_cache;
    int32_t n_lookup; /* the option: -1, 0 or a number */
    struct lookup lookup;
    struct draft **drafts; /* [n_slots] those of one step */
    struct llama llama;    /* what a forward pass works on */
    size_t kv_bytes;
    int32_t max_rows, max_wanted;
    struct batch batch;
    struct prefilter prefilter;   /* thread 0's; those of the backend's other threads follow it */
    float *host_logits;           /* [max_wanted][V], downloaded; unused if the host sees them */
    struct slot *slots;           /* [n_slots] */
    struct shared_prefix *shared; /* [n_slots] of one step */
    struct request *requests;     /* in the order of their numbers */
    int64_t next_number;
    struct sequence *finished; /* kept until the next step: events point into them */
    struct bpo_event *events;
    size_t n_events, max_events;
    struct text warnings; /* texts of WARNING events, NUL-separated */
    bool events_lost, events_reported;
    atomic_int interrupted;
};

/* ---- session.c ---- */

/* Are the options in range? */
int session_options_check(const struct bpo_session_options *options, const struct bpo_model_info *c,
                          struct bpo_error *err);

/* Opens the session on the backend of an op table: its memory, the KV cache, the weights there.
 * session_release frees all of it, also after a failure; then it may be called again. */
int session_open_on(struct bpo_session *s, const struct bpo_session_options *options,
                    const struct kernels *kernels, struct bpo_error *err);
void session_release(struct bpo_session *s);

/* Fails if n_bytes more of anonymous memory are not available: better an error now than a killed
 * process later. */
int check_memory(size_t n_bytes, const char *what, struct bpo_error *err);

#endif

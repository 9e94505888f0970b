/*
 * engine.c - many requests at once, over the forward pass of bpo.c. Read it from top to bottom;
 * engine.h has the types.
 *
 *     sequences         one answer as it grows, and the events that report it
 *     admission         which requests are being worked on, and in which slots
 *     prefix            the template's beginning, computed once
 *     the batch         which rows go into the next forward call, drafts among them
 *     one forward call  from the batch to ids that are drawn
 *     the step          all of the above, once
 *     the API           bpo.h
 *
 * One idea carries the design. A forward call takes R rows, and a row is (token, slot, position).
 * Prefill is many rows of one slot; decoding is one row per slot, or a few where a draft is
 * checked; a batch is rows of many slots. Everything that the engine does is a choice of rows.
 *
 * The other rule: the same seed gives the same text. No number that is computed for a row depends
 * on which other rows, or how many threads, shared the call, and the random number of a draw is a
 * function of (seed, sample, position) alone. So an answer here is byte for byte the one that
 * bpo.c's plain loop gives.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/memory.h"
#include "engine/cuda_library.h"
#include "engine/engine.h"
#include "engine/prefix_cache.h"

#ifndef BPO_VERSION
#define BPO_VERSION "0.0.0"
#endif

/* ---------------------------------------------------------------- sequences */

static struct bpo_event *event_add(struct bpo_session *s, enum bpo_event_kind kind,
                                   const struct request *r, int32_t sample) {
    if (s->n_events == s->max_events) {
        size_t more = 2 * s->max_events + 64;
        struct bpo_event *grown = realloc(s->events, more * sizeof *grown);
        if (!grown) {
            s->events_lost = true;
            return NULL;
        }
        s->events = grown;
        s->max_events = more;
    }
    struct bpo_event *e = &s->events[s->n_events++];
    *e = (struct bpo_event){.kind = kind, .request = -1, .text = "", .sample = sample};
    if (r) {
        e->request = r->number;
        e->user = r->options.user;
        e->prompt_tokens = (int32_t)r->prompt.n;
    }
    return e;
}

/* A remark for the user, reported by the next step. Until then its text is an offset, because the
 * buffer may move. */
static int warn(struct bpo_session *s, const struct request *r, const char *text,
                struct bpo_error *err) {
    size_t at = s->warnings.n;
    int failed = text_append(&s->warnings, text, strlen(text) + 1, err);
    struct bpo_event *e = failed ? NULL : event_add(s, BPO_EVENT_WARNING, r, 0);
    if (e) {
        e->n_text = at;
    }
    return failed;
}

static void sequence_free(struct sequence *q) {
    if (q) {
        free(q->tokens);
        free(q->raw.data);
        free(q);
    }
}

static void request_free(struct request *r) {
    if (r) {
        free(r->text);
        free(r->prompt.id);
        free(r->forced.id);
        free(r->source.id);
        free(r->logits);
        free(r);
    }
}

/* Frees a sequence's slot and reports the sequence as done. */
static void sequence_release(struct bpo_session *s, struct sequence *q, enum bpo_stop stop) {
    struct request *r = q->request;
    double now = seconds_now();
    if (q->slot >= 0) {
        s->slots[q->slot].sequence = NULL;
    }
    q->next = s->finished;
    s->finished = q;
    r->n_done++;
    if (q->n_tokens > 0 && stop != BPO_STOP_ERROR) {
        lookup_remember(&s->lookup, q->tokens, (size_t)q->n_tokens);
    }
    struct bpo_event *e = event_add(s, BPO_EVENT_DONE, r, q->sample);
    if (!e) {
        return;
    }
    e->stop = stop;
    e->error = &q->error;
    e->tokens = q->tokens;
    e->new_tokens = q->n_tokens;
    e->n_text = q->shown - q->begin;
    if (e->n_text > 0) {
        q->raw.data[q->shown] = '\0'; /* what follows was cut or stripped */
        e->text = q->raw.data + q->begin;
    }
    e->unchanged = r->text && e->n_text == r->n_text && memcmp(e->text, r->text, r->n_text) == 0;
    e->kept_tokens = r->n_cached;
    e->passes = q->n_passes;
    e->drafted = q->n_drafted;
    e->accepted = q->n_accepted;
    e->prefill_s = r->begun > 0 ? (r->ready > 0 ? r->ready : now) - r->begun : 0;
    e->decode_s = r->ready > 0 ? now - r->ready : 0;
}

/* Reports what is new of the text and can no longer be cut or stripped. */
static void sequence_show(struct bpo_session *s, struct sequence *q, bool may_grow) {
    if (!q->raw.data) {
        return;
    }
    enum bpo_mode mode = q->request->options.mode;
    size_t begin, end; /* what was reported holds no marker, nor the beginning of one */
    size_t n = q->shown + cut_length(mode, q->raw.data + q->shown, q->raw.n - q->shown, may_grow);
    text_strip(q->raw.data, n, &begin, &end);
    if (q->shown == q->begin) {
        q->begin = q->shown =
            begin; /* nothing reported yet: the text begins after its white space */
    }
    if (end > q->shown) {
        struct bpo_event *e = event_add(s, BPO_EVENT_TEXT, q->request, q->sample);
        if (e) {
            e->text = q->raw.data + q->shown;
            e->n_text = end - q->shown;
        }
        q->shown = end;
    }
}

/* Ends a sequence with the text that it has. */
static void sequence_end(struct bpo_session *s, struct sequence *q, enum bpo_stop stop) {
    if (stop != BPO_STOP_ERROR && decoder_flush(&q->decoder, &q->raw, &q->error)) {
        stop = BPO_STOP_ERROR;
    }
    sequence_show(s, q, false);
    sequence_release(s, q, stop);
}

/* Appends the next id to a sequence, decodes it, and returns true if the sequence ends with it. */
static bool sequence_append(struct bpo_session *s, struct sequence *q, int32_t id) {
    const struct request *r = q->request;
    enum bpo_stop stop;
    q->tokens[q->n_tokens++] = id;
    struct bpo_event *e = event_add(s, BPO_EVENT_TOKEN, r, q->sample);
    if (e) {
        e->token = id;
    }
    if (decoder_push(&q->decoder, s->model->tokenizer, id, &q->raw, &q->error)) {
        sequence_end(s, q, BPO_STOP_ERROR);
    } else if (ends_answer(s->model, r->options.mode, id, &stop)) {
        sequence_end(s, q, stop);
    } else if (q->n_tokens == r->options.max_new_tokens) {
        sequence_end(s, q, BPO_STOP_LENGTH);
    } else if ((int32_t)r->prompt.n + q->n_tokens == s->info.n_positions) {
        sequence_end(s, q, BPO_STOP_CONTEXT);
    } else {
        return false;
    }
    return true;
}

/* The sampling parameters for the token after a sequence's first n_tokens ones, which may reach
 * into its draft. Fills forbidden [MAX_FORBIDDEN], which the result points to. */
static struct sample_params sequence_params(const struct bpo_model *m, const struct sequence *q,
                                            int32_t n_tokens, int32_t *forbidden) {
    const struct request *r = q->request;
    const struct answer answer = {r->options.mode, &r->prompt, q->tokens, n_tokens, r->min_new};
    return (struct sample_params){
        .temperature = r->options.temperature,
        .top_p = r->options.top_p,
        .top_k = r->options.top_k,
        .forbidden = forbidden,
        .n_forbidden = forbidden_ids(m, &answer, forbidden),
        .u = uniform(r->options.seed, (uint32_t)q->sample, (uint32_t)n_tokens),
    };
}

/* Starts a request's next sample. slot -1: only to report it as done. NULL: out of memory. */
static struct sequence *sequence_start(struct bpo_session *s, struct request *r, int32_t slot) {
    struct sequence *q = calloc(1, sizeof *q);
    size_t n_bytes = (size_t)r->options.max_new_tokens * sizeof *q->tokens;
    if (!q || (slot >= 0 && !(q->tokens = malloc(n_bytes)))) {
        free(q);
        return NULL;
    }
    q->request = r;
    q->sample = r->n_started++;
    q->slot = slot;
    if (slot >= 0) {
        s->slots[slot].sequence = q;
    }
    return q;
}

/* ---------------------------------------------------------------- admission */

/* Forgets the last step's events, once they have been reported, and all that they point to. */
static void events_reset(struct bpo_session *s) {
    if (!s->events_reported) {
        return;
    }
    while (s->finished) {
        struct sequence *q = s->finished;
        s->finished = q->next;
        sequence_free(q);
    }
    s->n_events = 0;
    s->warnings.n = 0;
    s->events_reported = false;
}

/* Ends a request: the samples in work with the text that they have, those that were never started
 * with none. why: the error, or NULL. */
static int request_end(struct bpo_session *s, struct request *r, enum bpo_stop stop,
                       const struct bpo_error *why, struct bpo_error *err) {
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        struct sequence *q = s->slots[i].sequence;
        if (q && q->request == r) {
            q->error = why ? *why : q->error;
            sequence_end(s, q, stop);
        }
    }
    while (r->n_started < r->options.n_samples) {
        struct sequence *q = sequence_start(s, r, -1);
        if (!q) {
            return out_of_memory(err, "a sample", sizeof *q);
        }
        q->error = why ? *why : q->error;
        sequence_release(s, q, stop);
    }
    return 0;
}

/* Ends what was interrupted or cancelled. */
static int end_unwanted(struct bpo_session *s, struct bpo_error *err) {
    bool all = atomic_exchange(&s->interrupted, 0) != 0;
    int failed = 0;
    for (struct request *r = s->requests; r && !failed; r = r->next) {
        failed = all || r->cancelled ? request_end(s, r, BPO_STOP_INTERRUPTED, NULL, err) : 0;
    }
    return failed;
}

static void drop_complete_requests(struct bpo_session *s) {
    for (struct request **at = &s->requests; *at;) {
        struct request *r = *at;
        if (r->n_done == r->options.n_samples) {
            *at = r->next;
            request_free(r);
        } else {
            at = &r->next;
        }
    }
}

/* The request that gets a free slot: the one whose prompt is in it, if that has more samples to
 * start (the prompt is then never computed twice); else the oldest that has. */
static struct request *next_request(const struct bpo_session *s, const struct slot *slot) {
    struct request *oldest = NULL;
    for (struct request *r = s->requests; r; r = r->next) {
        if (r->state != REQUEST_PREFILL && r->n_started < r->options.n_samples) {
            if (r->number == slot->prompt_of) {
                return r;
            }
            oldest = oldest ? oldest : r;
        }
    }
    return oldest;
}

/* A slot that holds a request's prompt. */
static int32_t slot_of_prompt(const struct bpo_session *s, int64_t request) {
    int32_t i = 0;
    while (i < s->info.n_slots && s->slots[i].prompt_of != request) {
        i++;
    }
    return i;
}

/* Copies the first n positions of one slot to another. */
static int slot_copy(struct bpo_session *s, int32_t to, int32_t from, int32_t n,
                     struct bpo_error *err) {
    struct slot *slot = &s->slots[to];
    struct llama *m = &s->llama;
    slot->n_touched = slot->n_touched > n ? slot->n_touched : n;
    return m->ops->kv_copy(m->backend, &m->kv, to, from, n, err);
}

/* Gives free slots to waiting requests: to a first sample for its prefill, to a further one with a
 * copy of the prompt. */
static int admit(struct bpo_session *s, struct bpo_error *err) {
    int failed = 0;
    for (int32_t i = 0; i < s->info.n_slots && !failed; i++) {
        struct slot *slot = &s->slots[i];
        struct request *r = slot->sequence ? NULL : next_request(s, slot);
        if (!r) {
            continue;
        }
        struct sequence *q = sequence_start(s, r, i);
        if (!q) {
            size_t n_bytes = (size_t)r->options.max_new_tokens * sizeof *q->tokens;
            return out_of_memory(err, "a sequence", n_bytes);
        }
        int32_t n_prompt = (int32_t)r->prompt.n;
        if (r->state == REQUEST_WAITING) {
            r->state = REQUEST_PREFILL;
            r->begun = seconds_now();
        } else {
            if (slot->prompt_of != r->number) {
                failed = slot_copy(s, i, slot_of_prompt(s, r->number), n_prompt, err);
            }
            q->n_kv = n_prompt;
            q->logits = r->logits;
        }
        slot->prompt_of = r->number;
        slot->holds_prefix = r->has_prefix && (slot->holds_prefix || q->n_kv > 0);
    }
    return failed;
}

/* ---------------------------------------------------------------- prefix */

/*
 * The template's prefix, most of a short prompt, is never computed twice: a slot that holds it
 * lends it to the others, and a file in the cache folder to the next process. What is lent is what
 * was computed, bit for bit, because the prefix's chunks end where it does.
 */

/* A file is worth it where computing the prefix takes more than some 5 ms: two operations per
 * weight and id, at 1e11 a second. */
static bool prefix_wants_file(const struct bpo_model *m, const char *numerics) {
    const struct bpo_model_info *c = &m->info;
    double tables = (c->tie_embeddings ? 1.0 : 2.0) * c->vocab_size * c->dim;
    return numerics[0] != '\0' &&
           2.0 * (double)m->prefix.n * ((double)c->n_parameters - tables) > 5e8;
}

static struct prefix_key prefix_key(const struct bpo_session *s) {
    const struct bpo_model *m = s->model;
    return (struct prefix_key){m->header_hash, m->n_file, s->numerics, m->prefix.id, m->prefix.n};
}

/* Reads the prefix from the cache folder into a slot. Without memory for it, there is no cache. */
static int prefix_load(struct bpo_session *s, int32_t slot, struct bpo_error *err) {
    const struct prefix_key key = prefix_key(s);
    const struct llama *m = &s->llama;
    size_t n_bytes = key.n_ids * s->info.kv_position_bytes;
    char note[256];
    void *data = malloc(n_bytes);
    s->prefix_cache = PREFIX_CACHE_DONE;
    if (!data) {
        return 0;
    }
    int failed = 0;
    switch (prefix_cache_read(data, n_bytes, &key, note, sizeof note)) {
    case PREFIX_FOUND:
        failed = m->ops->kv_import(m->backend, &m->kv, data, slot, (int32_t)key.n_ids, err);
        s->slots[slot].holds_prefix = !failed;
        break;
    case PREFIX_BAD:
        failed = warn(s, NULL, note, err);
        s->prefix_cache = PREFIX_CACHE_MISSING;
        break;
    default:
        s->prefix_cache = PREFIX_CACHE_MISSING;
    }
    free(data);
    return failed;
}

/* Writes the prefix from a slot into the cache folder. */
static int prefix_save(struct bpo_session *s, int32_t slot, struct bpo_error *err) {
    const struct prefix_key key = prefix_key(s);
    const struct llama *m = &s->llama;
    size_t n_bytes = key.n_ids * s->info.kv_position_bytes;
    void *data = malloc(n_bytes);
    s->prefix_cache = PREFIX_CACHE_DONE;
    if (!data) {
        return 0;
    }
    int failed = m->ops->kv_export(m->backend, data, &m->kv, slot, (int32_t)key.n_ids, err);
    if (!failed) {
        prefix_cache_write(data, n_bytes, &key);
    }
    free(data);
    return failed;
}

/* Lends the prefix to the prompts that are about to begin with it, if a slot or a file has it. */
static int lend_prefix(struct bpo_session *s, struct bpo_error *err) {
    int32_t n = (int32_t)s->model->prefix.n, from = 0;
    int failed = 0;
    while (from < s->info.n_slots && !s->slots[from].holds_prefix) {
        from++;
    }
    for (int32_t i = 0; i < s->info.n_slots && n > 0 && !failed; i++) {
        struct slot *slot = &s->slots[i];
        struct sequence *q = slot->sequence;
        if (!q || q->request->state != REQUEST_PREFILL || !q->request->has_prefix || q->n_kv > 0) {
            continue;
        }
        if (!slot->holds_prefix && from < s->info.n_slots) {
            failed = slot_copy(s, i, from, n, err);
            slot->holds_prefix = !failed;
        } else if (!slot->holds_prefix && s->prefix_cache == PREFIX_CACHE_UNREAD) {
            failed = prefix_load(s, i, err);
            from = slot->holds_prefix ? i : from;
        }
        q->n_kv = slot->holds_prefix ? n : 0;
        q->request->n_cached = q->n_kv;
    }
    return failed;
}

/* ---------------------------------------------------------------- the batch */

static void batch_clear(struct batch *b) {
    b->n = b->n_wanted = b->n_spans = 0;
}

static void batch_add(struct batch *b, int32_t token, int32_t slot, int32_t pos) {
    b->token[b->n] = token;
    b->slot[b->n] = slot;
    b->pos[b->n] = pos;
    b->n++;
}

/* Wants the logits of the row that was added last. */
static void batch_want(struct batch *b, struct sequence *by) {
    b->wanted[b->n_wanted] = b->n - 1;
    b->wanted_by[b->n_wanted++] = by;
}

static void batch_add_chunk(struct batch *b, const struct ids *prompt, int32_t slot, int32_t from,
                            int32_t end) {
    b->spans[b->n_spans++] = (struct span){.first = b->n, .n = end - from, .kind = ROWS_PROMPT};
    for (int32_t pos = from; pos < end; pos++) {
        batch_add(b, prompt->id[pos], slot, pos);
    }
}

/* True if every row is a generated or drafted token: a step that a backend may record, and draw ids
 * from itself. */
static bool batch_decodes_only(const struct batch *b) {
    return b->n_spans == 1 && b->spans[0].kind == ROWS_DECODE;
}

static bool decodes(const struct sequence *q) {
    return q && q->n_tokens > 0;
}

/* Makes a draft for each sequence that decodes, and decides how much of it is worth checking.
 * Beside a prompt's rows, which are bound by arithmetic, a draft would cost more than it saves. */
static void make_drafts(struct bpo_session *s) {
    size_t n = 0;
    bool wanted = s->n_lookup != 0, always = s->n_lookup > 0;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        struct sequence *q = s->slots[i].sequence;
        wanted = wanted && !(q && q->request->state == REQUEST_PREFILL);
        if (decodes(q)) {
            q->draft.n = q->draft.n_rows = 0;
            s->drafts[n++] = &q->draft;
        }
    }
    size_t max_rows = (size_t)s->max_wanted;
    float min_chance = wanted ? lookup_min_chance(&s->lookup, n, max_rows, always) : 1.0F;
    for (int32_t i = 0; i < s->info.n_slots && min_chance < 1.0F; i++) {
        struct sequence *q = s->slots[i].sequence;
        if (decodes(q)) {
            const struct ids *source = &q->request->source;
            int32_t max =
                q->request->options.max_new_tokens - q->n_tokens - 1; /* one more is drawn */
            max = always && s->n_lookup < max ? s->n_lookup : max;
            lookup_draft(&q->draft, &s->lookup, source->id, source->n, q->tokens,
                         (size_t)q->n_tokens, max, min_chance);
        }
    }
    lookup_share(s->drafts, n, &s->lookup, max_rows, always);
}

/* The last id of each sequence that decodes, and its draft. */
static void collect_decoding(struct bpo_session *s) {
    struct batch *b = &s->batch;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        struct sequence *q = s->slots[i].sequence;
        if (!decodes(q)) {
            continue;
        }
        int32_t *tokens = q->tokens + q->n_tokens - 1; /* the last id; after it, the draft */
        int32_t pos = (int32_t)q->request->prompt.n + q->n_tokens - 1;
        for (int32_t j = 0; j <= q->draft.n_rows; j++) {
            if (j > 0) {
                tokens[j] = q->draft.id[j - 1];
            }
            batch_add(b, tokens[j], i, pos + j);
            batch_want(b, q);
        }
    }
    if (b->n > 0) {
        b->spans[b->n_spans++] = (struct span){.first = 0, .n = b->n, .kind = ROWS_DECODE};
    }
}

/* Whole chunks of prompts while they fit. Only one prompt computes the template's prefix; the
 * others wait to have it lent. */
static void collect_prompts(struct bpo_session *s) {
    struct batch *b = &s->batch;
    int32_t room = STEP_ROWS;
    bool prefix_taken = false;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        struct sequence *q = s->slots[i].sequence;
        if (!q || q->request->state != REQUEST_PREFILL) {
            continue;
        }
        if (q->request->has_prefix && q->n_kv < (int32_t)s->model->prefix.n) {
            if (prefix_taken) {
                continue;
            }
            prefix_taken = true;
        }
        const struct ids *prompt = &q->request->prompt;
        int32_t at = q->n_kv, n = (int32_t)prompt->n;
        for (int32_t end; at < n && (end = chunk_end(s->model, prompt, at)) - at <= room;
             at = end) {
            batch_add_chunk(b, prompt, i, at, end);
            room -= end - at;
        }
        if (at == n && at > q->n_kv) {
            batch_want(b, q);
        }
    }
}

/* ---------------------------------------------------------------- one forward call */

/* The batch's rows, as the ops take them. */
static struct rows backend_rows(const struct bpo_session *s) {
    const struct activations *a = &s->llama.act;
    const struct batch *b = &s->batch;
    return (struct rows){.n = b->n,
                         .token = a->token,
                         .slot = a->slot,
                         .pos = a->pos,
                         .spans = b->spans,
                         .n_spans = b->n_spans,
                         .shared = s->shared};
}

/* Pads a decoding step with inert rows to one of the few numbers of rows that the backend records.
 * They are not counted in the batch; returns the number of rows with them. */
static int32_t batch_pad(const struct bpo_session *s, struct batch *b) {
    const struct kernels *k = s->llama.ops;
    int32_t n = k->padded && batch_decodes_only(b) ? k->padded(s->llama.backend, b->n) : b->n;
    for (int32_t i = b->n; i < n; i++) {
        b->token[i] = b->pos[i] = 0;
        b->slot[i] = -1;
        b->wanted[i] = i;
    }
    return n;
}

/* Finds for each slot an earlier one that begins with the same keys and values: with the prompt,
 * where they are samples of one, or with the template's prefix. The prompt of a single sample is in
 * one slot only, so nothing is searched for, and thousands of slots cost one pass over them. */
static void find_shared(struct bpo_session *s) {
    int32_t with_prefix = -1;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        const struct slot *slot = &s->slots[i];
        bool one_of_many = slot->sequence && slot->sequence->request->options.n_samples > 1;
        int32_t with_prompt = one_of_many ? slot_of_prompt(s, slot->prompt_of) : i;
        s->shared[i] = (struct shared_prefix){.slot = i};
        if (with_prompt < i) {
            s->shared[i] = (struct shared_prefix){.slot = with_prompt, .n = slot->sequence->n_kv};
        } else if (slot->holds_prefix && with_prefix >= 0) {
            s->shared[i] =
                (struct shared_prefix){.slot = with_prefix, .n = (int32_t)s->model->prefix.n};
        }
        with_prefix = slot->holds_prefix && with_prefix < 0 ? i : with_prefix;
    }
}

static int batch_upload(struct bpo_session *s, int32_t n, int32_t n_wanted, struct bpo_error *err) {
    const struct activations *a = &s->llama.act;
    const struct batch *b = &s->batch;
    const struct {
        int32_t *to;
        const int32_t *from;
        int32_t n;
    } table[] = {{a->token, b->token, n},
                 {a->slot, b->slot, n},
                 {a->pos, b->pos, n},
                 {a->wanted, b->wanted, n_wanted}};
    int failed = 0;
    for (size_t i = 0; i < sizeof table / sizeof table[0] && !failed; i++) {
        failed = s->llama.ops->upload(s->llama.backend, table[i].to, table[i].from,
                                      (size_t)table[i].n * sizeof(int32_t), err);
    }
    return failed;
}

/* Lets bpo_interrupt take effect within a layer's time. A recorded step must be whole. */
static bool goes_on(void *session, int32_t layer) {
    struct bpo_session *s = session;
    (void)layer;
    return s->llama.ops->padded || !atomic_load_explicit(&s->interrupted, memory_order_relaxed);
}

/* Runs the forward pass over the batch. */
static int batch_compute(struct bpo_session *s, struct bpo_error *err) {
    const struct kernels *k = s->llama.ops;
    struct batch *b = &s->batch;
    const int32_t n = batch_pad(s, b), n_wanted = b->n_wanted + n - b->n;
    const struct span decoding = {.first = 0, .n = n, .kind = ROWS_DECODE};
    struct rows rows = backend_rows(s);
    uint64_t shape = 0;
    if (batch_decodes_only(b)) {
        shape = (uint64_t)n; /* all are wanted */
        rows.n = n;
        rows.spans = &decoding;
    }
    find_shared(s);
    for (int32_t i = 0; i < b->n; i++) {
        struct slot *slot = &s->slots[b->slot[i]];
        slot->n_touched = slot->n_touched > b->pos[i] ? slot->n_touched : b->pos[i] + 1;
    }
    int failed = batch_upload(s, n, n_wanted, err);
    if (failed) {
        return failed;
    }
    if (k->step_begin(s->llama.backend, shape)) {
        s->llama.after_layer = goes_on;
        s->llama.user = s;
        forward(&s->llama, &rows, n_wanted);
    }
    return k->step_end(s->llama.backend, err);
}

/* The same, and lookup learns what a call of that many rows costs. */
static int batch_compute_timed(struct bpo_session *s, struct bpo_error *err) {
    double begun = seconds_now();
    int failed = batch_compute(s, err);
    if (!failed && s->batch.n == s->batch.n_wanted) { /* no prompt's rows among them */
        lookup_learn_cost(&s->lookup, s->batch.n, seconds_now() - begun);
    }
    return failed;
}

/* Downloads the wanted logits to `to` [n_wanted][V]. */
static int download_logits(const struct bpo_session *s, float *to, struct bpo_error *err) {
    const struct llama *m = &s->llama;
    size_t n = (size_t)s->batch.n_wanted * (size_t)m->config->vocab_size;
    return n > 0 ? m->ops->download(m->backend, to, m->act.logits, n * sizeof(float), err) : 0;
}

/* Brings the wanted logits to where the host can read them. */
static int host_logits(const struct bpo_session *s, const float **logits, struct bpo_error *err) {
    bool there = s->llama.ops->host_memory;
    *logits = there ? s->llama.act.logits : s->host_logits;
    return there ? 0 : download_logits(s, s->host_logits, err);
}

/* Which layer's result is not finite? */
struct search {
    const struct llama *llama;
    int32_t n_rows, layer;
    int failed;
    struct bpo_error *err;
};

static bool layer_is_finite(void *user, int32_t layer) {
    struct search *search = user;
    const struct llama *m = search->llama;
    int32_t bad_row = -1;
    search->failed = m->ops->first_nonfinite(m->backend, &bad_row, m->act.x, search->n_rows,
                                             (size_t)m->config->dim, search->err);
    if (!search->failed && bad_row < 0) {
        return true;
    }
    search->layer = layer;
    return false;
}

/* Repeats the last call, layer by layer, to name the first one whose result is not finite. */
static int explain_nonfinite(struct bpo_session *s, struct bpo_error *err) {
    const struct rows rows = backend_rows(s);
    struct llama llama = s->llama;
    struct search search = {
        .llama = &s->llama, .n_rows = rows.n, .layer = llama.config->n_layers, .err = err};
    char where[32] = "the logits";
    llama.after_layer = layer_is_finite;
    llama.user = &search;
    if (llama.ops->step_begin(llama.backend, 0)) {
        forward(&llama, &rows, s->batch.n_wanted);
    }
    int failed = llama.ops->step_end(llama.backend, search.failed ? NULL : err);
    if (search.failed || failed) {
        return search.failed ? search.failed : failed;
    }
    if (search.layer < llama.config->n_layers) {
        (void)snprintf(where, sizeof where, "layer %d", search.layer);
    }
    return bpo_fail(
        err, BPO_ERR_RUN,
        "check the model file with bpo_model_verify, and the checkpoint that it came from",
        "the model computed a number that is not finite, first in %s", where);
}

/* One draw per item of the backend's loop. */
struct draw_op {
    const struct bpo_session *s;
    const float *logits; /* [rows][V] */
};

/* The scratch memory that a thread draws with. */
static struct prefilter prefilter_of(const struct bpo_session *s, size_t thread) {
    size_t vocab = (size_t)s->model->info.vocab_size, n_blocks = vocab / PREFILTER_BLOCK + 1;
    return (struct prefilter){.block_max = s->prefilter.block_max + thread * n_blocks,
                              .scratch = s->prefilter.scratch + thread * vocab,
                              .candidates = s->prefilter.candidates + thread * vocab};
}

static void draw_row(const void *arg, size_t i, size_t thread) {
    const struct draw_op *op = arg;
    const struct batch *b = &op->s->batch;
    const struct prefilter f = prefilter_of(op->s, thread);
    size_t vocab = (size_t)op->s->model->info.vocab_size;
    b->drawn[i] = top_k_draw(&f, op->logits + i * vocab, vocab, &b->params[i]);
}

/* The sampling parameters of all rows that decode, which are the batch's first; returns their
 * number. What is forbidden, and the random number, depend on the ids before: after a draft's row
 * they are the draft's. If another id is drawn there, the rest is ignored. */
static int32_t batch_params(struct bpo_session *s) {
    struct batch *b = &s->batch;
    int32_t n = 0;
    while (n < b->n_wanted && decodes(b->wanted_by[n])) {
        struct sequence *q = b->wanted_by[n];
        q->drawn = b->drawn + n;
        for (int32_t j = 0; j <= q->draft.n_rows; j++, n++) {
            int32_t *forbidden = b->forbidden + (size_t)n * MAX_FORBIDDEN;
            b->params[n] = sequence_params(s->model, q, q->n_tokens + j, forbidden);
        }
    }
    return n;
}

/* Draws the next ids of the sequences that decode: from logits, or (NULL) on the backend. */
static int batch_draw(struct bpo_session *s, const float *logits, struct bpo_error *err) {
    const struct llama *m = &s->llama;
    struct batch *b = &s->batch;
    int32_t n = batch_params(s);
    if (!logits) {
        return m->ops->sample(m->backend, b->drawn, m->act.logits, b->params, n,
                              (size_t)m->config->vocab_size, err);
    }
    const struct draw_op op = {s, logits};
    if (m->ops->for_each) {
        m->ops->for_each(m->backend, draw_row, &op, (size_t)n);
    }
    for (int32_t i = 0; i < n && !m->ops->for_each; i++) {
        draw_row(&op, (size_t)i, 0);
    }
    return 0;
}

/* Records how far the prompts were computed, and keeps the template's prefix if it was. */
static int advance_prompts(struct bpo_session *s, struct bpo_error *err) {
    const struct batch *b = &s->batch;
    int failed = 0;
    for (int32_t i = 0; i < b->n && !failed; i++) {
        struct slot *slot = &s->slots[b->slot[i]];
        struct sequence *q = slot->sequence;
        if (q->request->state != REQUEST_PREFILL) {
            continue;
        }
        q->n_kv = b->pos[i] + 1;
        if (q->request->has_prefix && q->n_kv == (int32_t)s->model->prefix.n) {
            slot->holds_prefix = true;
            failed = s->prefix_cache == PREFIX_CACHE_MISSING ? prefix_save(s, b->slot[i], err) : 0;
        }
    }
    return failed;
}

/* A prompt that is complete keeps its logits, for the first id of each sample. */
static void finish_prompts(struct bpo_session *s, const float *logits) {
    const struct batch *b = &s->batch;
    size_t vocab = (size_t)s->model->info.vocab_size;
    for (int32_t i = 0; i < b->n_wanted; i++) {
        struct sequence *q = b->wanted_by[i];
        struct request *r = q->request;
        if (r->state == REQUEST_PREFILL) {
            memcpy(r->logits, logits + (size_t)i * vocab, vocab * sizeof *logits);
            q->logits = r->logits;
            r->state = REQUEST_READY;
            r->ready = seconds_now();
        }
    }
}

/* ---------------------------------------------------------------- the step */

/* Ends a sequence for which no id can be drawn; if it is the first id, the whole request, because
 * then every sample would fail. */
static int end_undrawable(struct bpo_session *s, struct sequence *q, int32_t why,
                          struct bpo_error *err) {
    struct bpo_error error = {0};
    if (why == DRAW_NOT_FINITE) {
        (void)explain_nonfinite(s, &error);
    } else {
        (void)bpo_fail(&error, BPO_ERR_RUN, "is this a BPO model? bpo_model_get_info describes it",
                       "every token is forbidden");
    }
    if (q->n_tokens == 0) {
        return request_end(s, q->request, BPO_STOP_ERROR, &error, err);
    }
    q->error = error;
    sequence_end(s, q, BPO_STOP_ERROR);
    return 0;
}

/* The i-th of a sequence's next ids: drawn with the batch, or now if it is the first of all. Or
 * DRAW_ALL_FORBIDDEN, DRAW_NOT_FINITE. */
static int32_t next_id(const struct bpo_session *s, const struct sequence *q, int32_t i) {
    const struct ids *forced = &q->request->forced;
    int32_t forbidden[MAX_FORBIDDEN], id;
    if (q->drawn) {
        id = q->drawn[i];
    } else {
        const struct sample_params params = sequence_params(s->model, q, q->n_tokens, forbidden);
        id = top_k_draw(&s->prefilter, q->logits, (size_t)s->model->info.vocab_size, &params);
    }
    return id >= 0 && forced->n > 0 ? forced->id[q->n_tokens] : id;
}

/*
 * Appends a sequence's next ids. After the first one come those whose row was a drafted id that was
 * in fact drawn, so each is drawn from the same logits, with the same random number, as without a
 * draft. Keys and values of ids that were not drawn are at positions that nothing reads before it
 * writes them.
 */
static int sequence_advance(struct bpo_session *s, struct sequence *q, struct bpo_error *err) {
    const struct draft *d = &q->draft;
    int32_t n_before = q->n_tokens, n_rows = d->n_rows;
    bool confirmed = true, ended = false;
    q->n_passes += n_before > 0;
    q->n_drafted += n_rows;
    for (int32_t i = 0; i <= n_rows && confirmed; i++) {
        int32_t id = next_id(s, q, i);
        if (id < 0) {
            return end_undrawable(s, q, id, err);
        }
        q->n_accepted += i > 0;
        ended = sequence_append(s, q, id);
        confirmed = !ended && i < n_rows && id == d->id[i];
    }
    q->logits = NULL;
    q->drawn = NULL;
    if (!ended) {
        sequence_show(s, q, true); /* once a step: the event's text must not move */
    }
    lookup_learn(&s->lookup, d, q->tokens + n_before, q->n_tokens - n_before);
    return 0;
}

/* Chooses rows, computes them, draws ids, and moves the prompts on. */
static int step_rows(struct bpo_session *s, struct bpo_error *err) {
    struct batch *b = &s->batch;
    batch_clear(b);
    make_drafts(s);
    collect_decoding(s);
    collect_prompts(s);
    if (b->n == 0) {
        return 0;
    }
    int failed = batch_compute_timed(s, err);
    if (failed || atomic_load(&s->interrupted)) {
        return failed;
    }
    const float *logits = NULL;
    bool on_backend = s->llama.ops->sample && batch_decodes_only(b);
    failed = on_backend ? 0 : host_logits(s, &logits, err);
    failed = failed ? failed : batch_draw(s, logits, err);
    failed = failed ? failed : advance_prompts(s, err);
    if (!failed) {
        finish_prompts(s, logits);
    }
    return failed ? failed
                  : admit(s, err); /* the further samples of a prompt that is complete now */
}

static int step(struct bpo_session *s, struct bpo_error *err) {
    int failed = end_unwanted(s, err);
    drop_complete_requests(s);
    failed = failed ? failed : admit(s, err);
    failed = failed ? failed : lend_prefix(s, err);
    failed = failed ? failed : step_rows(s, err);
    if (failed || atomic_load(&s->interrupted)) {
        return failed; /* an interrupted pass is dropped; the next step ends everything */
    }
    for (int32_t i = 0; i < s->info.n_slots && !failed; i++) {
        struct sequence *q = s->slots[i].sequence;
        failed = q && (q->logits || q->drawn) ? sequence_advance(s, q, err) : 0;
    }
    drop_complete_requests(s);
    return failed;
}

/* ---------------------------------------------------------------- the API: the session */

const char *bpo_version(void) {
    return BPO_VERSION;
}

const char *bpo_stop_name(enum bpo_stop stop) {
    static const char *const names[] = {"eos",     "newline",     "length",
                                        "context", "interrupted", "error"};
    return names[stop];
}

int bpo_tokenize(const struct bpo_model *m, const char *text, size_t n_text, bool templated,
                 int32_t **ids, size_t *n_ids, struct bpo_error *err) {
    struct ids out;
    int failed = templated ? tokenize_templated(m, text, n_text, &out, err)
                           : tokenize(m, text, n_text, &out, err);
    if (failed) {
        free(out.id);
        out = (struct ids){0};
    }
    *ids = out.id;
    *n_ids = out.n;
    return failed;
}

/* Opens the session on the device that the options name. AUTO takes a GPU that has room for
 * everything. A machine without a GPU is the usual case and needs no remark; a GPU that cannot be
 * used is reported. */
static int session_open_device(struct bpo_session *s, const struct bpo_session_options *o,
                               struct bpo_error *err) {
    struct bpo_error why = {0};
    bool found = false;
    const struct kernels *cuda = o->device == BPO_DEVICE_CPU ? NULL : backend_cuda(&found, &why);
    if (cuda && session_open_on(s, o, cuda, &why) == 0) {
        /* On a GPU drafts change the number of rows, and with it the bits: off unless asked for. */
        s->n_lookup = o->lookup < 0 ? 0 : o->lookup;
        return 0;
    }
    if (o->device == BPO_DEVICE_CUDA) {
        return bpo_fail(err, BPO_ERR_RESOURCE, why.hint, "%s", why.message);
    }
    bool no_device = cuda && !s->llama.backend; /* or no driver */
    session_release(s);
    int failed = session_open_on(s, o, kernels_cpu(), err);
    if (!failed && found && !no_device) {
        char line[sizeof why.message + 64];
        (void)snprintf(line, sizeof line, "using the CPU: %s", why.message);
        failed = warn(s, NULL, line, err);
    }
    return failed;
}

struct bpo_session *bpo_session_open(const struct bpo_model *m,
                                     const struct bpo_session_options *options,
                                     struct bpo_error *err) {
    struct bpo_session_options o;
    bpo_session_options_init(&o);
    o = options ? *options : o;
    if (session_options_check(&o, &m->info, err)) {
        return NULL;
    }
    struct bpo_session *s = calloc(1, sizeof *s);
    if (!s) {
        (void)out_of_memory(err, "the session", sizeof *s);
        return NULL;
    }
    s->model = m;
    s->n_lookup = o.lookup;
    lookup_init(&s->lookup, m->n_file < SMALL_MODEL);
    s->info.n_slots = o.n_slots;
    s->info.n_positions = o.n_positions ? o.n_positions : m->info.max_positions;
    s->max_rows = o.n_slots + STEP_ROWS;
    s->max_wanted = o.n_slots > LOOKUP_MAX_ROWS ? o.n_slots : LOOKUP_MAX_ROWS;
    atomic_init(&s->interrupted, 0);
    int failed = session_open_device(s, &o, err);
    bool cached = !o.no_cache && prefix_wants_file(m, s->numerics);
    s->prefix_cache = cached ? PREFIX_CACHE_UNREAD : PREFIX_CACHE_OFF;
    if (!failed && s->llama.ops->host_memory && m->n_file > memory_total()) {
        failed = warn(s, NULL,
                      "the model is larger than this machine's memory: every pass will read it from"
                      " disk again",
                      err);
    }
    if (failed) {
        bpo_session_close(s);
        return NULL;
    }
    return s;
}

void bpo_session_close(struct bpo_session *s) {
    if (!s) {
        return;
    }
    for (int32_t i = 0; s->slots && i < s->info.n_slots; i++) {
        sequence_free(s->slots[i].sequence);
    }
    s->events_reported = true;
    events_reset(s);
    while (s->requests) {
        struct request *r = s->requests;
        s->requests = r->next;
        request_free(r);
    }
    session_release(s);
    free(s->events);
    free(s->warnings.data);
    free(s);
}

void bpo_session_get_info(const struct bpo_session *session, struct bpo_session_info *info) {
    *info = session->info;
}

/* ---------------------------------------------------------------- the API: requests */

void bpo_request_init(struct bpo_request *request, const struct bpo_model *model,
                      enum bpo_mode mode) {
    const struct bpo_mode_settings *d = &model->info.settings[mode];
    *request = (struct bpo_request){.size = sizeof *request,
                                    .mode = mode,
                                    .n_samples = d->n_samples,
                                    .temperature = d->temperature,
                                    .top_p = d->top_p,
                                    .top_k = d->top_k,
                                    .max_new_tokens = d->max_new_tokens};
}

static int ids_check(const int32_t *ids, size_t n, const struct bpo_model_info *c,
                     struct bpo_error *err) {
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= c->vocab_size) {
            return bpo_fail(err, BPO_ERR_INPUT, "bpo_tokenize gives the ids of a text",
                            "token id %d; this model has 0 to %d", ids[i], c->vocab_size - 1);
        }
    }
    return 0;
}

/* Are the options in range? */
static int request_check_options(const struct bpo_request *o, struct bpo_error *err) {
    const char *hint = "struct bpo_request in bpo.h has the ranges";
    if (o->size != sizeof *o) {
        return bpo_fail(err, BPO_ERR_USAGE, "fill it with bpo_request_init",
                        "a request of another version");
    }
    if (o->mode != BPO_STABLE && o->mode != BPO_AGGRESSIVE) {
        return bpo_fail(err, BPO_ERR_USAGE, hint, "mode %d; expected stable or aggressive",
                        (int)o->mode);
    }
    if (o->n_samples < 1 || o->n_samples > 10000) {
        return bpo_fail(err, BPO_ERR_USAGE, hint, "%d samples; expected 1 to 10000", o->n_samples);
    }
    if (!(o->temperature >= 0 && o->temperature <= 100)) {
        return bpo_fail(err, BPO_ERR_USAGE, hint, "a temperature of %g; expected 0 (greedy) to 100",
                        (double)o->temperature);
    }
    if (!(o->top_p >= 0 && o->top_p <= 1)) {
        return bpo_fail(err, BPO_ERR_USAGE, hint, "a top-p of %g; expected 0 to 1 (off)",
                        (double)o->top_p);
    }
    if (o->top_k < 0 || o->max_new_tokens < 1 || o->max_new_tokens > MAX_POSITIONS ||
        o->seed > BPO_MAX_SEED) {
        return bpo_fail(err, BPO_ERR_USAGE, hint,
                        "top-k %d (0: off), %d new tokens (1 or more), seed %llu (below 2^53)",
                        o->top_k, o->max_new_tokens, (unsigned long long)o->seed);
    }
    return 0;
}

/* Is there a prompt, in a form that the mode can take? */
static int request_check_prompt(const struct bpo_request *o, const struct bpo_model_info *c,
                                struct bpo_error *err) {
    if (o->ids && o->mode != BPO_STABLE) {
        return bpo_fail(err, BPO_ERR_USAGE, "use stable mode, or give the prompt as text",
                        "token ids as input work in stable mode only: the rules of aggressive mode"
                        " need the prompt's text");
    }
    if (o->ids ? o->n_ids == 0 : !o->text) {
        return bpo_fail(err, BPO_ERR_INPUT, "give the prompt as text or ids", "there is no prompt");
    }
    if (o->ids && ids_check(o->ids, o->n_ids, c, err)) {
        return BPO_ERR_INPUT;
    }
    return o->forced ? ids_check(o->forced, o->n_forced, c, err) : 0;
}

static int copy_ids(struct ids *to, const int32_t *ids, size_t n, const char *what,
                    struct bpo_error *err) {
    *to = (struct ids){.id = malloc(n * sizeof *ids), .n = n};
    if (!to->id) {
        return out_of_memory(err, what, n * sizeof *ids);
    }
    memcpy(to->id, ids, n * sizeof *ids);
    return 0;
}

/* The ids of a prompt that is given as text, and the text itself, to tell whether it changed. */
static int request_encode(struct request *r, const struct bpo_model *m, const char *text,
                          size_t n_text, struct bpo_error *err) {
    size_t begin, end;
    text_strip(text, n_text, &begin, &end);
    if (begin == end) {
        return bpo_fail(err, BPO_ERR_INPUT, "give some text",
                        "the prompt is empty, or all white space");
    }
    if (!(r->text = malloc(end - begin))) {
        return out_of_memory(err, "the prompt", end - begin);
    }
    r->n_text = end - begin;
    memcpy(r->text, text + begin, r->n_text);
    int failed = tokenize_templated(m, text, n_text, &r->prompt, err);
    failed = failed ? failed : tokenize(m, text, n_text, &r->source, err);
    r->min_new = min_new_tokens(r->options.mode, r->source.n);
    return failed;
}

/* Takes copies of all that the caller's pointers give. */
static int request_copy(struct request *r, const struct bpo_model *m, const struct bpo_request *o,
                        struct bpo_error *err) {
    int failed = 0;
    r->options = *o;
    r->options.text = NULL;
    r->options.ids = r->options.forced = NULL;
    if (o->forced && o->n_forced > 0) {
        failed = copy_ids(&r->forced, o->forced, o->n_forced, "the forced ids", err);
    }
    if (failed || !o->ids) {
        return failed ? failed : request_encode(r, m, o->text, o->n_text, err);
    }
    failed = copy_ids(&r->source, o->ids, o->n_ids, "the prompt", err);
    return failed ? failed : copy_ids(&r->prompt, o->ids, o->n_ids, "the prompt", err);
}

/* Is the context long enough, and, where a KV cache is committed on first touch, the memory large
 * enough? */
static int request_fits(const struct bpo_session *s, const struct request *r,
                        struct bpo_error *err) {
    size_t n_prompt = r->prompt.n, n_positions = (size_t)s->info.n_positions;
    size_t n_new = (size_t)r->options.max_new_tokens;
    if (n_prompt >= n_positions) {
        return bpo_fail(err, BPO_ERR_INPUT,
                        "shorten the prompt, or raise n_positions if the model allows",
                        "the prompt is %zu tokens long with its template; the context has %zu, and"
                        " an answer needs at least one",
                        n_prompt, n_positions);
    }
    if (!s->llama.ops->host_memory) {
        return 0;
    }
    size_t n_longest = n_prompt + n_new < n_positions ? n_prompt + n_new : n_positions;
    size_t n_parallel = (size_t)r->options.n_samples, n_slots = (size_t)s->info.n_slots;
    size_t n_touched = 0;
    for (const struct request *other = s->requests; other; other = other->next) {
        n_parallel += (size_t)other->options.n_samples;
    }
    n_parallel = n_parallel < n_slots ? n_parallel : n_slots;
    for (size_t i = 0; i < n_slots; i++) {
        n_touched += (size_t)s->slots[i].n_touched;
    }
    size_t n_more = n_parallel * n_longest > n_touched ? n_parallel * n_longest - n_touched : 0;
    size_t position = s->info.kv_position_bytes;
    return check_memory(n_more < SIZE_MAX / position ? n_more * position : SIZE_MAX, "the KV cache",
                        err);
}

static int request_warnings(struct bpo_session *s, const struct request *r, const char *text,
                            size_t n_text, struct bpo_error *err) {
    char line[256];
    int failed = 0;
    size_t valid = text ? utf8_valid_prefix(text, n_text) : 0;
    if (text && valid < n_text) {
        (void)snprintf(line, sizeof line,
                       "the prompt is not valid UTF-8 at byte %zu; such bytes are read as U+FFFD",
                       valid);
        failed = warn(s, r, line, err);
    }
    if (!failed && r->prompt.n > (size_t)s->model->info.trained_length) {
        (void)snprintf(line, sizeof line,
                       "the prompt has %zu tokens, more than the %d that the model was trained on",
                       r->prompt.n, s->model->info.trained_length);
        failed = warn(s, r, line, err);
    }
    return failed;
}

/* Limits max_new_tokens to what the context and the forced ids allow, and allocates the logits. One
 * id more than the context holds: so that the stop is "context", not "length". */
static int request_prepare(struct request *r, const struct bpo_session *s, struct bpo_error *err) {
    size_t n_bytes = (size_t)s->model->info.vocab_size * sizeof *r->logits;
    int32_t max = s->info.n_positions - (int32_t)r->prompt.n + 1;
    int32_t *max_new = &r->options.max_new_tokens;
    *max_new = *max_new < max ? *max_new : max;
    if (r->forced.n > 0 && r->forced.n < (size_t)*max_new) {
        *max_new = (int32_t)r->forced.n;
    }
    r->number = s->next_number;
    r->has_prefix = has_prefix(s->model, &r->prompt);
    r->logits = malloc(n_bytes);
    return r->logits ? 0 : out_of_memory(err, "a request's logits", n_bytes);
}

int64_t bpo_submit(struct bpo_session *s, const struct bpo_request *request,
                   struct bpo_error *err) {
    events_reset(s);
    int failed = request_check_options(request, err);
    failed = failed ? failed : request_check_prompt(request, &s->model->info, err);
    if (failed) {
        return failed;
    }
    struct request *r = calloc(1, sizeof *r);
    if (!r) {
        return out_of_memory(err, "a request", sizeof *r);
    }
    const char *text = request->ids ? NULL : request->text;
    failed = request_copy(r, s->model, request, err);
    failed = failed ? failed : request_fits(s, r, err);
    failed = failed ? failed : request_prepare(r, s, err);
    failed = failed ? failed : request_warnings(s, r, text, request->n_text, err);
    if (failed) {
        request_free(r);
        return failed;
    }
    struct request **end = &s->requests;
    while (*end) {
        end = &(*end)->next;
    }
    *end = r;
    return s->next_number++;
}

int bpo_step(struct bpo_session *s, const struct bpo_event **events, size_t *n_events,
             struct bpo_error *err) {
    events_reset(s);
    int failed = step(s, err);
    if (!failed && s->events_lost) {
        failed = out_of_memory(err, "events", (2 * s->max_events + 64) * sizeof *s->events);
    }
    for (size_t i = 0; i < s->n_events; i++) {
        struct bpo_event *e = &s->events[i];
        if (e->kind == BPO_EVENT_WARNING) {
            e->text = s->warnings.data + e->n_text;
            e->n_text = strlen(e->text);
        }
    }
    *events = s->events;
    *n_events = s->n_events;
    s->events_reported = true;
    return failed ? failed : s->requests != NULL;
}

void bpo_cancel(struct bpo_session *s, int64_t request) {
    for (struct request *r = s->requests; r; r = r->next) {
        r->cancelled = r->cancelled || r->number == request;
    }
}

void bpo_interrupt(struct bpo_session *s) {
    atomic_store(&s->interrupted, 1);
}

/* A copy of a finished sample's text, or NULL. */
static char *result_text(const struct bpo_event *e, struct bpo_error *err) {
    if (e->stop == BPO_STOP_ERROR || e->stop == BPO_STOP_INTERRUPTED) {
        bool failed = e->stop == BPO_STOP_ERROR;
        (void)bpo_fail(err, BPO_ERR_RUN, e->error->hint, "%s",
                       failed ? e->error->message : "the rewrite was interrupted");
        return NULL;
    }
    char *text = malloc(e->n_text + 1);
    if (!text) {
        (void)out_of_memory(err, "the rewrite", e->n_text + 1);
        return NULL;
    }
    memcpy(text, e->text, e->n_text + 1);
    return text;
}

char *bpo_rewrite(struct bpo_session *s, const struct bpo_request *request, struct bpo_error *err) {
    struct bpo_request one = *request;
    one.n_samples = 1;
    int64_t number = bpo_submit(s, &one, err);
    for (int more = number < 0 ? -1 : 1; more > 0;) {
        const struct bpo_event *events;
        size_t n;
        more = bpo_step(s, &events, &n, err);
        for (size_t i = 0; more >= 0 && i < n; i++) {
            if (events[i].kind == BPO_EVENT_DONE && events[i].request == number) {
                return result_text(&events[i], err);
            }
        }
    }
    return NULL;
}

/* Computes one chunk of ids and copies all of its logits to `to` [end - from][V]. */
static int chunk_logits(struct bpo_session *s, const struct ids *input, int32_t from, int32_t end,
                        float *to, struct bpo_error *err) {
    struct batch *b = &s->batch;
    size_t vocab = (size_t)s->model->info.vocab_size;
    batch_clear(b);
    batch_add_chunk(b, input, 0, from, end);
    for (int32_t i = 0; i < b->n; i++) {
        b->wanted[i] = i;
    }
    b->n_wanted = b->n;
    int failed = batch_compute(s, err);
    if (atomic_exchange(&s->interrupted, 0)) {
        failed = bpo_fail(err, BPO_ERR_RUN, NULL, "interrupted");
    }
    failed = failed ? failed : download_logits(s, to, err);
    for (int32_t i = 0; i < b->n && !failed; i++) {
        bool finite = block_maxima(s->prefilter.block_max, to + (size_t)i * vocab, vocab);
        failed = finite ? 0 : explain_nonfinite(s, err);
    }
    return failed;
}

int bpo_logits(struct bpo_session *s, const int32_t *ids, size_t n_ids, float *logits,
               struct bpo_error *err) {
    const struct bpo_model_info *c = &s->model->info;
    const struct ids input = {.id = (int32_t *)ids, .n = n_ids};
    _Static_assert((int)LOOKUP_MAX_ROWS >= (int)CHUNK_ROWS, "a chunk's rows may all want logits");
    if (s->requests || n_ids == 0 || n_ids > (size_t)s->info.n_positions) {
        return bpo_fail(
            err, BPO_ERR_INPUT, "shorten the input, or raise n_positions if the model allows",
            "logits need an idle session and 1 to %d ids, not %zu", s->info.n_positions, n_ids);
    }
    if (ids_check(ids, n_ids, c, err)) {
        return BPO_ERR_INPUT;
    }
    s->slots[0].prompt_of = -1;
    s->slots[0].holds_prefix = false;
    int failed = 0;
    for (int32_t from = 0, end; from < (int32_t)n_ids && !failed; from = end) {
        end = chunk_end(s->model, &input, from);
        failed =
            chunk_logits(s, &input, from, end, logits + (size_t)from * (size_t)c->vocab_size, err);
    }
    return failed;
}

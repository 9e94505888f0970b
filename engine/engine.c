/*
 * bpo.c - THE ENGINE: a Llama-2 (Touvron et al. 2023) that rewrites prompts, in one file.
 *
 * Read it from top to bottom; every function stands before its use. What a model, a slot, a request
 * and a session are stands in engine.h; model.c opens the model file, session.c finds the memory.
 *
 *     KV cache          where a position's keys and values lie
 *     FORWARD           the transformer, once for everything, in the words of kernels.h
 *     sampler           temperature, top-k, top-p and one draw
 *     BPO               the prompt template, the two modes, what is cut from an answer
 *     sequences         one answer as it grows
 *     admission         which requests are in work, and in which slots
 *     prefix            the template's beginning, computed once
 *     the step loop     which rows go into the next forward pass, drafts among them; what comes of it
 *     public functions  bpo.h
 *
 * Shape letters, the same in every file:
 *
 *     D model width    F feed-forward width    H query heads    HK key/value heads    hd head size
 *     L layers         V vocabulary            S positions that fit a slot            R rows in this call
 *
 * One idea carries the design. A call of the forward pass takes R rows, and a row is (token, slot,
 * position), where a slot is one sequence's KV cache. Prefill is R rows of one slot; decoding is
 * one row per slot; a batch is rows of many slots. Everything the engine does is a choice of rows.
 *
 * The other rule: the same seed gives the same text. No number that is computed for a row depends
 * on which other rows, or how many threads, shared the call, and the random number of a draw is a
 * function of (seed, sample, position) alone.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cuda_library.h"
#include "base/clock.h"
#include "base/numbers.h"
#include "engine/engine.h"
#include "base/memory.h"
#include "engine/prefix_cache.h"

#ifndef BPO_VERSION
#define BPO_VERSION "0.0.0"
#endif

/* ---------------------------------------------------------------- KV cache */

/*
 * fp16 [slot][L][2: K, V][HK][S][hd]: head-major, so that attention reads a head's positions in one
 * stream. A head's stride is an odd multiple of 64 bytes: heads then do not fall on the same sets
 * of the CPU's caches when S hd is a power of two. S is the most that a sequence can have; memory
 * is committed position by position, as it is used.
 */
static int kv_layout(struct kv_cache *kv, const struct bpo_model_info *c, int32_t n_slots,
                     int32_t n_positions, size_t *n_bytes, struct bpo_error *err) {
    *kv =
        (struct kv_cache){.n_slots = n_slots, .n_layers = c->n_layers, .n_kv_heads = c->n_kv_heads};
    kv->head_dim = c->head_dim;
    kv->n_positions = n_positions;
    kv->pos_bytes = 2 * (size_t)c->head_dim;
    kv->head_bytes = (((size_t)n_positions * kv->pos_bytes + 63) / 64 | 1) * 64;
    size_t per_slot = 2 * (size_t)c->n_layers * (size_t)c->n_kv_heads;
    if (kv->head_bytes > SIZE_MAX / 4 / per_slot / (size_t)n_slots) {
        return out_of_memory(err, "the KV cache", SIZE_MAX);
    }
    kv->plane_bytes = (size_t)c->n_kv_heads * kv->head_bytes;
    kv->layer_bytes = 2 * kv->plane_bytes;
    kv->slot_bytes = ((size_t)c->n_layers * kv->layer_bytes + 4095) / 4096 * 4096;
    *n_bytes = (size_t)n_slots * kv->slot_bytes;
    return 0;
}

/* On a GPU nothing is committed by use: what does not fit is told now, before any work, and so is
 * what would. The weights and some scratch memory are still to come. */
static int kv_room(const struct bpo_session *s, struct bpo_error *err) {
    const size_t spare = (size_t)64 << 20, others = s->model->n_file + spare;
    size_t available = 0, total = 0;
    int failed = s->kernels->memory ? s->kernels->memory(s->backend, &available, &total, err) : 0;
    if (failed || !s->kernels->memory ||
        (others <= available && s->kv_bytes <= available - others)) {
        return failed;
    }
    size_t room = others < available ? available - others : 0;
    size_t n_fit = s->kv.slot_bytes > 0 ? room / s->kv.slot_bytes : 0;
    return bpo_fail(
        err, BPO_ERR_RESOURCE,
        n_fit > 0 ? "lower --parallel (or -n), or --context"
                  : "lower --context, free the GPU, or use --device cpu",
        "the GPU has no room: %.1f MiB of weights and scratch memory, and %.1f MiB for the keys "
        "and values of %d"
        " sequences of %d positions; %.1f of %.1f MiB are free: room for %zu such sequences",
        (double)others / 1048576.0, (double)s->kv_bytes / 1048576.0, s->kv.n_slots,
        s->kv.n_positions, (double)available / 1048576.0, (double)total / 1048576.0, n_fit);
}

static int session_kv(struct bpo_session *s, struct bpo_error *err) {
    const struct bpo_model_info *c = &s->model->info;
    int failed = kv_layout(&s->kv, c, s->info.n_slots, s->info.n_positions, &s->kv_bytes, err);
    failed = failed ? failed : kv_room(s, err);
    if (!failed) {
        s->kv.data = s->kernels->alloc(s->backend, s->kv_bytes, MEMORY_LAZY, err);
        failed = s->kv.data ? 0 : BPO_ERR_RESOURCE;
    }
    s->info.kv_position_bytes = 2 * (size_t)c->n_layers * (size_t)c->n_kv_heads * s->kv.pos_bytes;
    return failed;
}

/* ---------------------------------------------------------------- FORWARD */

/*
 * The transformer, for R rows. Each sublayer reads the normalised residual stream x and adds its
 * result to it:
 *
 *     x = x + W_o attention(rope(W_qkv rmsnorm(x)))            tokens look at earlier tokens of their sequence
 *     x = x + W_down swiglu(W_gate_up rmsnorm(x))              each token thinks for itself
 *
 * and the wanted rows' last x, normalised, times lm_head are the logits: a score for each token of
 * the vocabulary.
 *
 * shape is what step_begin wants to know. bad_layer (or NULL) asks, at the price of speed, for the
 * first layer whose result is not finite: its number, or L for the logits; -1 when there is none.
 */
static int forward(struct bpo_session *s, const struct rows *rows, int32_t n_wanted, uint64_t shape,
                   int32_t *bad_layer, struct bpo_error *err) {
    const struct bpo_model_info *c = &s->model->info;
    const struct kernels *k = s->kernels;
    struct backend *b = s->backend;
    const struct activations *a = &s->act;
    const struct rows wanted = {.n = n_wanted}; /* no spans: always our own kernels */
    const float eps = (float)c->rms_norm_eps;
    int32_t bad_row = -1;

    if (k->step_begin(b, shape)) {
        k->embed(b, a->x, &s->weights.embedding, rows);
        k->rope_angles(b, a->angles, a->inv_freq, rows, c->head_dim);
        for (int32_t l = 0; l < c->n_layers; l++) {
            const struct layer *w = &s->weights.layers[l];

            k->rmsnorm(b, a->normed, a->x, &w->attention_norm, rows->n, eps);
            k->matmul(b, a->qkv, a->normed, &w->qkv, rows, MATMUL_STORE);
            k->rope_kv(b, a->qkv, &s->kv, a->angles, rows, l, c->n_heads);
            k->attention(b, a->mixed, a->qkv, &s->kv, rows, l, c->n_heads);
            k->matmul(b, a->x, a->mixed, &w->o, rows, MATMUL_ADD);

            k->rmsnorm(b, a->normed, a->x, &w->ffn_norm, rows->n, eps);
            k->matmul(b, a->gate_up, a->normed, &w->gate_up, rows, MATMUL_STORE);
            k->swiglu(b, a->hidden, a->gate_up, rows->n, c->ffn_dim);
            k->matmul(b, a->x, a->hidden, &w->down, rows, MATMUL_ADD);

            if (bad_layer) {
                *bad_layer = l;
                int failed = k->first_nonfinite(b, &bad_row, a->x, rows->n, (size_t)c->dim, err);
                if (failed || bad_row >= 0) {
                    return failed ? failed : k->step_end(b, err);
                }
            }
            if (!k->padded && atomic_load_explicit(&s->interrupted, memory_order_relaxed)) {
                break; /* the results will not be looked at; but what is recorded must be whole */
            }
        }
        k->gather(b, a->last, a->x, a->wanted, n_wanted, c->dim);
        k->rmsnorm(b, a->normed, a->last, &s->weights.norm, n_wanted, eps);
        k->matmul(b, a->logits, a->normed, &s->weights.lm_head, &wanted, MATMUL_STORE);
    }
    if (bad_layer) {
        *bad_layer = c->n_layers;
    }
    return k->step_end(b, err);
}

/* ---------------------------------------------------------------- sampler */

/*
 * The uniform number u(seed, sample, position) in [0, 1): Philox4x32-10 (Salmon et al. 2011), a
 * block cipher in counter mode. A pure function: no generator's state has to be carried along, so a
 * text does not depend on what else was drawn.
 */
static double uniform(uint64_t seed, uint32_t sample, uint32_t position) {
    uint32_t x[4] = {position, sample, 0, 0};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53U * x[0], b = (uint64_t)0xCD9E8D57U * x[2];
        x[0] = (uint32_t)(b >> 32) ^ x[1] ^ key[0];
        x[2] = (uint32_t)(a >> 32) ^ x[3] ^ key[1];
        x[1] = (uint32_t)b;
        x[3] = (uint32_t)a;
        key[0] += 0x9E3779B9U;
        key[1] += 0xBB67AE85U;
    }
    return (double)((uint64_t)x[0] << 21 | x[1] >> 11) * 0x1p-53;
}

/* Rank is by logit; equal logits by lower id. */
static bool ranks_above(const float *logits, int32_t a, int32_t b) {
    return logits[a] > logits[b] || (a < b && logits[a] == logits[b]);
}

static void heap_sift(int32_t *heap, size_t n, size_t i, const float *logits) {
    int32_t id = heap[i];
    for (size_t child = 2 * i + 1; child < n; i = child, child = 2 * i + 1) {
        child += child + 1 < n && ranks_above(logits, heap[child + 1], heap[child]);
        if (!ranks_above(logits, heap[child], id)) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = id;
}

static int32_t heap_pop(int32_t *heap, size_t *n, const float *logits) {
    int32_t best = heap[0];
    heap[0] = heap[--*n];
    heap_sift(heap, *n, 0, logits);
    return best;
}

static inline float larger(float a, float b) {
    return a > b ? a : b;
}

/* Fills block_max with the largest logit of each whole block of ids; false if any logit is not
 * finite. x - x is 0 for a finite x, else NaN. The lanes are independent of each other, so that
 * compilers make vectors of them. */
static bool block_maxima(float *block_max, const float *x, size_t n) {
    enum { N = SAMPLER_BLOCK / 4 };
    float bad[N] = {0}, most[N];
    size_t n_blocks = n / SAMPLER_BLOCK;
    for (size_t block = 0; block < n_blocks; block++) {
        const float *a = x + block * SAMPLER_BLOCK, *b = a + N, *c = b + N, *d = c + N;
        for (size_t i = 0; i < N; i++) {
            most[i] = larger(larger(a[i], b[i]), larger(c[i], d[i]));
            bad[i] += (a[i] - a[i]) + (b[i] - b[i]) + ((c[i] - c[i]) + (d[i] - d[i]));
        }
        for (size_t i = 0; i < N / 4; i++) {
            most[i] = larger(larger(most[i], most[i + 4]), larger(most[i + 8], most[i + 12]));
        }
        block_max[block] = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    }
    for (size_t i = n_blocks * SAMPLER_BLOCK; i < n; i++) {
        bad[0] += x[i] - x[i];
    }
    for (size_t i = 1; i < N; i++) {
        bad[0] += bad[i];
    }
    return bad[0] == 0.0F;
}

static bool is_forbidden(const struct sample_params *p, int32_t id) {
    for (int32_t i = 0; i < p->n_forbidden; i++) {
        if (p->forbidden[i] == id) {
            return true;
        }
    }
    return false;
}

static void heap_build(int32_t *heap, size_t n, const float *scores) {
    for (size_t i = n / 2; i-- > 0;) {
        heap_sift(heap, n, i, scores);
    }
}

/*
 * Puts into the heap the ids that can be among the k best of those that are not forbidden, and
 * their ties; returns how many, at least k. The maxima of the best k + n_forbidden blocks belong to
 * as many ids, so k allowed ids are no worse than the last of them: whatever is below it is out,
 * and so, unseen, are the blocks whose maximum is. 0: look at all ids.
 */
static size_t heap_of_best(struct sampler *s, const float *logits, size_t vocab, size_t k,
                           float temperature, const struct sample_params *p) {
    size_t n_blocks = vocab / SAMPLER_BLOCK, n_left = n_blocks,
           n_taken = k + (size_t)p->n_forbidden, n = 0;
    int32_t *blocks = s->ranked; /* a heap of [n_left] blocks, then those that were taken off it */
    if (k == 0 || n_taken > n_blocks) {
        return 0;
    }
    for (size_t i = 0; i < n_blocks; i++) {
        blocks[i] = (int32_t)i;
    }
    heap_build(blocks, n_blocks, s->block_max);
    /* a logit, and what it is divided by the temperature: there ids are ranked */
    float most = 0.0F, bound = 0.0F;
    while (n_left > 0 &&
           (n_left > n_blocks - n_taken || s->block_max[blocks[0]] / temperature >= bound)) {
        int32_t block = heap_pop(blocks, &n_left, s->block_max);
        blocks[n_left] = block;
        if (n_left >= n_blocks - n_taken) {
            most = s->block_max[block];
            bound = most / temperature;
        }
    }
    if (!(bound > -INFINITY)) {
        return 0;
    }
    /* below it no quotient is rounded up to the bound */
    float least = most - fabsf(most) * 1e-6F - 1e-30F;
    for (size_t i = n_left; i <= n_blocks; i++) {
        size_t begin = i < n_blocks ? (size_t)blocks[i] * SAMPLER_BLOCK
                                    : n_blocks * SAMPLER_BLOCK; /* the ids behind all */
        size_t end = begin + SAMPLER_BLOCK < vocab ? begin + SAMPLER_BLOCK : vocab;
        for (size_t id = begin; id < end; id++) {
            if (logits[id] >= least && logits[id] / temperature >= bound &&
                !is_forbidden(p, (int32_t)id)) {
                s->scaled[id] = logits[id] / temperature;
                s->heap[n++] = (int32_t)id;
            }
        }
    }
    heap_build(s->heap, n, s->scaled);
    return n;
}

/* Puts all ids that are not forbidden into the heap; returns how many. */
static size_t heap_of_all(struct sampler *s, const float *logits, size_t vocab, float temperature,
                          const struct sample_params *p) {
    size_t n = 0;
    for (size_t i = 0; i < vocab; i++) {
        s->scaled[i] = logits[i] / temperature;
    }
    for (int32_t i = 0; i < p->n_forbidden; i++) {
        s->scaled[p->forbidden[i]] = -INFINITY;
    }
    for (size_t i = 0; i < vocab; i++) {
        if (s->scaled[i] > -INFINITY) {
            s->heap[n++] = (int32_t)i;
        }
    }
    heap_build(s->heap, n, s->scaled);
    return n;
}

/*
 * Draws an id: forbidden ids first, then temperature, then top-k, then top-p (nucleus sampling:
 * Holtzman et al. 2020), then one draw that walks the kept ids in rank order. top-k keeps every tie
 * of the k-th. top-p keeps an id if the mass ranked above it, within what top-k left, is below p;
 * the first is always kept. A heap gives the ids in rank order, and only as many as are needed:
 * there is no sort of the vocabulary. Negative: see enum no_draw.
 *                                                                                                            logits [V]
 */
enum no_draw { DRAW_ALL_FORBIDDEN = -1, DRAW_NOT_FINITE = -2 };
static int32_t sampler_draw(struct sampler *s, const float *logits, size_t vocab,
                            const struct sample_params *p) {
    float temperature = p->temperature > 0 ? p->temperature : 1.0F;
    size_t k = p->temperature > 0 ? (size_t)p->top_k : 1;
    const float *x = s->scaled;
    if (!block_maxima(s->block_max, logits, vocab)) {
        return DRAW_NOT_FINITE;
    }
    size_t n = heap_of_best(s, logits, vocab, k, temperature, p);
    bool best_only = n > 0;
    n = best_only ? n : heap_of_all(s, logits, vocab, temperature, p);
    if (n == 0) {
        return DRAW_ALL_FORBIDDEN;
    }
    int32_t best = s->heap[0];
    if (!(p->temperature > 0)) {
        return best; /* greedy */
    }

    size_t n_ranked = 0; /* ids taken off the heap, with their masses */
    double total = 0.0;  /* mass that top-k leaves */
    if (p->top_k > 0 && (best_only || (size_t)p->top_k < n)) {
        while (n > 0 &&
               (n_ranked < (size_t)p->top_k || x[s->heap[0]] == x[s->ranked[n_ranked - 1]])) {
            int32_t id = heap_pop(s->heap, &n, x);
            s->mass[n_ranked] = canonical_exp(x[id] - x[best]);
            total += s->mass[n_ranked];
            s->ranked[n_ranked++] = id;
        }
        n = 0;
    } else {
        for (size_t i = 0; i < vocab; i++) {
            total += x[i] > -INFINITY ? (double)canonical_exp(x[i] - x[best]) : 0.0;
        }
    }

    double kept = 0.0; /* mass of the ids ranked so far */
    size_t n_kept = 0;
    double limit = p->top_p < 1.0F ? (double)p->top_p * total : INFINITY;
    while (n_kept == 0 || (kept < limit && (n_kept < n_ranked || n > 0))) {
        if (n_kept == n_ranked) {
            int32_t id = heap_pop(s->heap, &n, x);
            s->mass[n_ranked] = canonical_exp(x[id] - x[best]);
            s->ranked[n_ranked++] = id;
        }
        kept += s->mass[n_kept++];
    }

    double target = p->u * kept, walked = 0.0;
    size_t drawn = 0;
    for (size_t i = 0; i < n_kept; i++) {
        walked += s->mass[i];
        /* rounding may leave the walk short: then the last that has any mass */
        drawn = s->mass[i] > 0 ? i : drawn;
        if (walked > target) {
            break;
        }
    }
    return s->ranked[drawn];
}

/* ---------------------------------------------------------------- BPO: template, modes, cuts */

/* What ends a text although the model went on: the template's own end (stable); and, in the
 * authors' script (aggressive), the markers of the training data. The text is cut at the first of
 * them. */
static const char *const STABLE_CUTS[] = {"[/INST]", NULL};
static const char *const AGGRESSIVE_CUTS[] = {"[/INST]", "[KE", "[INS", "[PRO", NULL};

static const char *const *mode_cuts(enum bpo_mode mode) {
    return mode == BPO_AGGRESSIVE ? AGGRESSIVE_CUTS : STABLE_CUTS;
}

/* Markers that aggressive mode must not generate: the last id of each is forbidden when its other
 * ids are the last ones so far. */
static const char *const BANNED[N_BANNED] = {"[PROTECT]", "\n\n[PROTECT]", "[KEEP",
                                             "[INSTRUCTION]"};

/* The bytes of a generated text that are sure to be shown: up to the first cut, and while it may
 * grow, without what may yet turn out to be the start of one. */
static size_t cut(const char *text, size_t n, const char *const *cuts, bool may_grow) {
    for (size_t i = 0; i < n; i++) {
        for (size_t c = 0; cuts[c]; c++) {
            size_t n_cut = strlen(cuts[c]), n_left = n - i;
            if (memcmp(text + i, cuts[c], n_left < n_cut ? n_left : n_cut) == 0 &&
                (n_left >= n_cut || may_grow)) {
                return i;
            }
        }
    }
    return n;
}

static int tokenize(const struct bpo_model *m, const char *text, size_t n_text, struct ids *out,
                    struct bpo_error *err) {
    out->id = NULL;
    out->n = 0;
    return tokenizer_encode(m->tokenizer, text, n_text, &out->id, &out->n, err);
}

/* BOS and the ids of the template around the text, encoded whole: SentencePiece may merge across
 * the seams. */
static int tokenize_templated(const struct bpo_model *m, const char *text, size_t n_text,
                              struct ids *out, struct bpo_error *err) {
    const char *template = m->info.prompt_template,
               *tail = template + m->template_head + strlen("{prompt}");
    struct text whole = {0};
    struct ids bare = {0};
    int failed = text_append(&whole, template, m->template_head, err);
    failed = failed ? failed : text_append(&whole, text, n_text, err);
    failed = failed ? failed : text_append(&whole, tail, strlen(tail), err);
    failed = failed ? failed : tokenize(m, whole.data, whole.n, &bare, err);
    int32_t *ids = failed ? NULL : malloc((bare.n + 1) * sizeof *ids);
    if (ids) {
        ids[0] = m->info.bos_id;
        if (bare.n > 0) {
            memcpy(ids + 1, bare.id, bare.n * sizeof *ids);
        }
    } else if (!failed) {
        failed = out_of_memory(err, "the prompt's ids", (bare.n + 1) * sizeof *ids);
    }
    *out = (struct ids){.id = ids, .n = ids ? bare.n + 1 : 0};
    free(bare.id);
    free(whole.data);
    return failed;
}

/* The ids that every templated prompt begins with: what two unlike prompts share. */
static int model_template(struct bpo_model *m, struct bpo_error *err) {
    struct ids other = {0};
    int failed = tokenize_templated(m, "a", 1, &m->prefix, err);
    failed = failed ? failed : tokenize_templated(m, "1", 1, &other, err);
    for (size_t n = 0; !failed; n++) {
        if (n == m->prefix.n || n == other.n || m->prefix.id[n] != other.id[n]) {
            m->prefix.n = n;
            break;
        }
    }
    free(other.id);
    for (size_t i = 0; !failed && i < N_BANNED; i++) {
        failed = tokenize(m, BANNED[i], strlen(BANNED[i]), &m->banned[i], err);
    }
    return failed;
}

/* True if the request's ids so far, prompt and answer, end with the n ids. */
static bool ends_with(const struct sequence *q, const int32_t *ids, size_t n) {
    const struct ids *prompt = &q->request->prompt;
    size_t n_tokens = (size_t)q->n_tokens, n_all = prompt->n + n_tokens;
    for (size_t i = 0; i < n && n <= n_all; i++) {
        size_t at = n_all - n + i;
        if ((at < prompt->n ? prompt->id[at] : q->tokens[at - prompt->n]) != ids[i]) {
            return false;
        }
    }
    return n <= n_all;
}

/* Fills forbidden [MOST_FORBIDDEN] with the ids that may not come next, and returns their
 * number. */
static int32_t forbidden_ids(const struct bpo_model *m, const struct sequence *q,
                             int32_t *forbidden) {
    int32_t n = 0;
    if (q->request->options.mode != BPO_AGGRESSIVE) {
        return 0;
    }
    if (q->n_tokens < q->request->min_new) {
        forbidden[n++] = m->info.eos_id;
        if (m->info.newline_id >= 0) {
            forbidden[n++] = m->info.newline_id;
        }
    }
    for (size_t i = 0; i < N_BANNED; i++) {
        const struct ids *banned = &m->banned[i];
        if (banned->n > 0 && ends_with(q, banned->id, banned->n - 1)) {
            forbidden[n++] = banned->id[banned->n - 1];
        }
    }
    return n;
}

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

/* A remark for the user, handed out by the next step. Its text is an offset until then: the buffer
 * may move. */
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
        free((void *)r->options.text);
        free(r->text);
        free(r->prompt.id);
        free(r->forced.id);
        free(r->source.id);
        free(r->logits);
        free(r);
    }
}

/* Takes a sequence out of work: its slot is free, its request may be complete. */
static void sequence_done(struct bpo_session *s, struct sequence *q, enum bpo_stop stop) {
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
    e->kept_tokens = r->n_kept;
    e->passes = q->n_passes;
    e->drafted = q->n_drafted;
    e->accepted = q->n_accepted;
    e->prefill_s = r->begun > 0 ? (r->ready > 0 ? r->ready : now) - r->begun : 0;
    e->decode_s = r->ready > 0 ? now - r->ready : 0;
}

/* Hands out what is new of the text and sure to stay. */
static void sequence_show(struct bpo_session *s, struct sequence *q, bool may_grow) {
    if (!q->raw.data) {
        return;
    }
    size_t begin, end; /* what was shown holds no cut, nor the start of one */
    size_t n = q->shown + cut(q->raw.data + q->shown, q->raw.n - q->shown,
                              mode_cuts(q->request->options.mode), may_grow);
    text_strip(q->raw.data, n, &begin, &end);
    if (q->shown == q->begin) {
        /* nothing shown so far: the text begins behind its leading white space */
        q->begin = q->shown = begin;
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

/* Ends a sequence with what there is. */
static void sequence_end(struct bpo_session *s, struct sequence *q, enum bpo_stop stop) {
    if (stop != BPO_STOP_ERROR && decoder_flush(&q->decoder, &q->raw, &q->error)) {
        stop = BPO_STOP_ERROR;
    }
    sequence_show(s, q, false);
    sequence_done(s, q, stop);
}

/* Takes the next id of a sequence: records it, decodes it, and says whether it is the last one. */
static bool sequence_take(struct bpo_session *s, struct sequence *q, int32_t id) {
    const struct bpo_model_info *c = &s->model->info;
    const struct request *r = q->request;
    q->tokens[q->n_tokens++] = id;
    struct bpo_event *e = event_add(s, BPO_EVENT_TOKEN, r, q->sample);
    if (e) {
        e->token = id;
    }
    if (decoder_push(&q->decoder, s->model->tokenizer, id, &q->raw, &q->error)) {
        sequence_end(s, q, BPO_STOP_ERROR);
    } else if (id == c->eos_id) {
        sequence_end(s, q, BPO_STOP_EOS);
    } else if (r->options.mode == BPO_AGGRESSIVE && id == c->newline_id) {
        sequence_end(s, q, BPO_STOP_NEWLINE);
    } else if (q->n_tokens == r->options.max_new_tokens) {
        sequence_end(s, q, BPO_STOP_LENGTH);
    } else if ((int32_t)r->prompt.n + q->n_tokens == s->info.n_positions) {
        sequence_end(s, q, BPO_STOP_CONTEXT);
    } else {
        return false;
    }
    return true;
}

/* How the id behind those of a sequence is to be drawn. Fills forbidden [MOST_FORBIDDEN], which the
 * result points to. */
static struct sample_params sequence_params(const struct bpo_model *m, const struct sequence *q,
                                            int32_t *forbidden) {
    const struct bpo_request *options = &q->request->options;
    return (struct sample_params){
        .temperature = options->temperature,
        .top_p = options->top_p,
        .top_k = options->top_k,
        .forbidden = forbidden,
        .n_forbidden = forbidden_ids(m, q, forbidden),
        .u = uniform(options->seed, (uint32_t)q->sample, (uint32_t)q->n_tokens),
    };
}

/* The next id of a sequence: the i-th of those that were drawn, or, if it is the first of all,
 * drawn now; negative: see enum no_draw. */
static int32_t sequence_draw(struct bpo_session *s, const struct sequence *q, int32_t i) {
    const struct ids *forced = &q->request->forced;
    int32_t forbidden[MOST_FORBIDDEN], id;
    if (q->drawn) {
        id = q->drawn[i];
    } else {
        const struct sample_params params = sequence_params(s->model, q, forbidden);
        id = sampler_draw(&s->sampler, q->logits, (size_t)s->model->info.vocab_size, &params);
    }
    return id >= 0 && forced->n > 0 ? forced->id[q->n_tokens] : id;
}

/* Starts a request's next sample; slot -1: only to say that it is done. NULL when there is no
 * memory. */
static struct sequence *sequence_start(struct bpo_session *s, struct request *r, int32_t slot) {
    struct sequence *q = calloc(1, sizeof *q);
    if (!q || (slot >= 0 &&
               !(q->tokens = malloc((size_t)r->options.max_new_tokens * sizeof *q->tokens)))) {
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

/* Forgets the last step's events, once they have been handed out, with all that they point to. */
static void events_reset(struct bpo_session *s) {
    if (!s->handed_out) {
        return;
    }
    while (s->finished) {
        struct sequence *q = s->finished;
        s->finished = q->next;
        sequence_free(q);
    }
    s->n_events = 0;
    s->warnings.n = 0;
    s->handed_out = false;
}

/* Ends a request: its samples in work with what they have, and those that never began with nothing.
 * why (or NULL): the error. */
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
        sequence_done(s, q, stop);
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

/*
 * Who gets a free slot: first the request whose prompt lies in it, if it has more samples to start
 * (the prompt is then never computed twice); else the oldest request that has.
 */
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

/* Gives a slot the first n positions of another. */
static int slot_copy(struct bpo_session *s, int32_t to, int32_t from, int32_t n,
                     struct bpo_error *err) {
    struct slot *slot = &s->slots[to];
    slot->n_touched = slot->n_touched > n ? slot->n_touched : n;
    return s->kernels->kv_copy(s->backend, &s->kv, to, from, n, err);
}

/* Gives free slots to the requests that wait: to a first sample for its prefill, to a further one
 * with a copy of the prompt. */
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
            return out_of_memory(err, "a sequence",
                                 (size_t)r->options.max_new_tokens * sizeof *q->tokens);
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
        slot->has_prefix = r->has_prefix && (slot->has_prefix || q->n_kv > 0);
    }
    return failed;
}

/* Does the prompt begin with the template's constant ids, and go on? */
static bool has_prefix(const struct bpo_model *m, const struct ids *prompt) {
    size_t n = m->prefix.n;
    return prompt->n > n && memcmp(prompt->id, m->prefix.id, n * sizeof *prompt->id) == 0;
}

/*
 * Where the chunk that begins at a position of a prompt ends. Chunks are cut at fixed positions: in
 * CHUNK_ROWS from the end of the template's constant prefix on (and, within that, from 0 on),
 * whatever the load. A matmul whose rounding depends on the number of its rows (OpenBLAS) then
 * gives each row the same bits in any company.
 */
static int32_t chunk_end(const struct bpo_model *m, const struct ids *prompt, int32_t from) {
    int32_t n = (int32_t)prompt->n, n_prefix = has_prefix(m, prompt) ? (int32_t)m->prefix.n : 0;
    int32_t first = from >= n_prefix ? n_prefix : 0, most = from < n_prefix ? n_prefix : n;
    int32_t end = from + CHUNK_ROWS - (from - first) % CHUNK_ROWS;
    return end < most ? end : most;
}

/* ---------------------------------------------------------------- prefix */

/*
 * The template's prefix, most of a short prompt, is never computed twice: a slot that holds it
 * lends it to the others, and a file in the cache folder to the next process. What is at hand is
 * what was computed, bit for bit, because its chunks are cut at its end.
 */

/* A file is worth its while where computing takes more than some 5 ms: two operations a weight and
 * id, at 1e11 a second. */
static bool prefix_wants_file(const struct bpo_model *m, const char *numerics) {
    const struct bpo_model_info *c = &m->info;
    double tables = (c->tie_embeddings ? 1.0 : 2.0) * c->vocab_size * c->dim;
    return numerics[0] != '\0' &&
           2.0 * (double)m->prefix.n * ((double)c->n_parameters - tables) > 5e8;
}

/* Reads the file into a slot, or writes it from there. */
static int prefix_file(struct bpo_session *s, int32_t slot, bool write, struct bpo_error *err) {
    const struct bpo_model *m = s->model;
    const struct prefix_key key = {m->header_hash, m->n_file, s->numerics, m->prefix.id,
                                   m->prefix.n};
    int32_t n = (int32_t)m->prefix.n;
    size_t n_bytes = m->prefix.n * s->info.kv_position_bytes;
    char note[256];
    int failed = 0;
    void *data = malloc(n_bytes);
    s->prefix_file = PREFIX_FILE_DONE;
    if (!data) {
        return 0; /* as if there were no cache */
    }
    if (write) {
        failed = s->kernels->kv_export(s->backend, data, &s->kv, slot, n, err);
        if (!failed) {
            prefix_cache_write(data, n_bytes, &key);
        }
    } else {
        enum prefix_found found = prefix_cache_read(data, n_bytes, &key, note, sizeof note);
        s->prefix_file = found == PREFIX_FOUND ? PREFIX_FILE_DONE : PREFIX_FILE_MISSING;
        failed = found == PREFIX_FOUND
                     ? s->kernels->kv_import(s->backend, &s->kv, data, slot, n, err)
                     : 0;
        failed = found == PREFIX_BAD ? warn(s, NULL, note, err) : failed;
        s->slots[slot].has_prefix = found == PREFIX_FOUND && !failed;
    }
    free(data);
    return failed;
}

/* Lends the prefix to the prompts that are about to begin with it, if it is at hand. */
static int lend_prefix(struct bpo_session *s, struct bpo_error *err) {
    int32_t n = (int32_t)s->model->prefix.n, from = 0;
    int failed = 0;
    while (from < s->info.n_slots && !s->slots[from].has_prefix) {
        from++;
    }
    for (int32_t i = 0; i < s->info.n_slots && n > 0 && !failed; i++) {
        struct slot *slot = &s->slots[i];
        struct sequence *q = slot->sequence;
        if (!q || q->request->state != REQUEST_PREFILL || !q->request->has_prefix || q->n_kv > 0) {
            continue;
        }
        if (!slot->has_prefix && from < s->info.n_slots) {
            failed = slot_copy(s, i, from, n, err);
            slot->has_prefix = !failed;
        } else if (!slot->has_prefix && s->prefix_file == PREFIX_FILE_UNREAD) {
            failed = prefix_file(s, i, false, err);
            from = slot->has_prefix ? i : from;
        }
        q->n_kv = slot->has_prefix ? n : 0;
        q->request->n_kept = q->n_kv;
    }
    return failed;
}

/* A prompt's prefix has been computed in this slot. */
static int keep_prefix(struct bpo_session *s, int32_t slot, struct bpo_error *err) {
    s->slots[slot].has_prefix = true;
    return s->prefix_file == PREFIX_FILE_MISSING ? prefix_file(s, slot, true, err) : 0;
}

/* ---------------------------------------------------------------- the step loop */

static void rows_clear(struct row_list *rows) {
    rows->n = rows->n_wanted = rows->n_spans = 0;
}

static void rows_add(struct row_list *rows, int32_t token, int32_t slot, int32_t pos) {
    rows->token[rows->n] = token;
    rows->slot[rows->n] = slot;
    rows->pos[rows->n] = pos;
    rows->n++;
}

/* Asks for the logits of the row that was added last. */
static void rows_want(struct row_list *rows, struct sequence *by) {
    rows->wanted[rows->n_wanted] = rows->n - 1;
    rows->wanted_by[rows->n_wanted++] = by;
}

static void rows_add_chunk(struct row_list *rows, const struct ids *prompt, int32_t slot,
                           int32_t from, int32_t end) {
    rows->spans[rows->n_spans++] =
        (struct span){.first = rows->n, .n = end - from, .kind = ROWS_PROMPT};
    for (int32_t pos = from; pos < end; pos++) {
        rows_add(rows, prompt->id[pos], slot, pos);
    }
}

/* Makes a draft for each sequence that decodes, and decides how much of it is worth checking.
 * Beside a prompt's rows, which are bound by arithmetic, a draft would cost more than it brings. */
static void draft(struct bpo_session *s) {
    size_t n = 0;
    bool wanted = s->n_lookup != 0;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        struct sequence *q = s->slots[i].sequence;
        wanted = wanted && !(q && q->request->state == REQUEST_PREFILL);
        if (q && q->n_tokens > 0) {
            q->draft.n = q->draft.n_rows = 0;
            s->drafts[n++] = &q->draft;
        }
    }
    bool always = s->n_lookup > 0;
    float least = wanted ? lookup_least_chance(&s->lookup, n, (size_t)s->max_wanted, always) : 1.0F;
    for (int32_t i = 0; i < s->info.n_slots && least < 1.0F; i++) {
        struct sequence *q = s->slots[i].sequence;
        if (q && q->n_tokens > 0) {
            const struct ids *source = &q->request->source;
            /* one more is drawn behind them */
            int32_t most = q->request->options.max_new_tokens - q->n_tokens - 1;
            most = always && s->n_lookup < most ? s->n_lookup : most;
            lookup_draft(&q->draft, &s->lookup, source->id, source->n, q->tokens,
                         (size_t)q->n_tokens, most, least);
        }
    }
    lookup_share(s->drafts, n, &s->lookup, (size_t)s->max_wanted, always);
}

/* Chooses the rows of the next call: the last id of each sequence that decodes and its draft, then
 * whole chunks of prompts while they fit. Only one prompt computes the template's prefix; the
 * others wait to have it lent. */
static void collect_rows(struct bpo_session *s) {
    struct row_list *rows = &s->rows;
    rows_clear(rows);
    draft(s);
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        struct sequence *q = s->slots[i].sequence;
        if (q && q->n_tokens > 0) {
            int32_t pos = (int32_t)q->request->prompt.n + q->n_tokens - 1;
            for (int32_t j = 0; j <= q->draft.n_rows; j++) {
                rows_add(rows, j == 0 ? q->tokens[q->n_tokens - 1] : q->draft.id[j - 1], i,
                         pos + j);
                rows_want(rows, q);
            }
        }
    }
    if (rows->n > 0) {
        rows->spans[rows->n_spans++] = (struct span){.first = 0, .n = rows->n, .kind = ROWS_DECODE};
    }
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
            rows_add_chunk(rows, prompt, i, at, end);
            room -= end - at;
        }
        if (at == n && at > q->n_kv) {
            rows_want(rows, q);
        }
    }
}

/* The chosen rows, as the ops want them. */
static struct rows backend_rows(const struct bpo_session *s) {
    const struct activations *a = &s->act;
    const struct row_list *list = &s->rows;
    return (struct rows){list->n, a->token, a->slot, a->pos, list->spans, list->n_spans, s->shared};
}

/* Whether every row is a generated or drafted token: a step that a backend may record, and draw
 * from. */
static bool decodes_only(const struct row_list *rows) {
    return rows->n_spans == 1 && rows->spans[0].kind == ROWS_DECODE;
}

/* Fills a step that only decodes up with inert rows, to one of the few numbers of rows that the
 * backend records. They are not counted in the list; returns how many rows there are with them. */
static int32_t rows_pad(const struct bpo_session *s, struct row_list *rows) {
    int32_t n = s->kernels->padded && decodes_only(rows) ? s->kernels->padded(s->backend, rows->n)
                                                         : rows->n;
    for (int32_t i = rows->n; i < n; i++) {
        rows->token[i] = rows->pos[i] = 0;
        rows->slot[i] = -1;
        rows->wanted[i] = i;
    }
    return n;
}

/* Finds for each slot one before it that holds the same: the prompt, where they are samples of one,
 * or the template's prefix. A prompt of one sample lies in one slot: nothing is looked for, so
 * thousands of slots cost no more than one pass over them. */
static void find_shared(struct bpo_session *s) {
    int32_t with_prefix = -1;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        const struct slot *slot = &s->slots[i];
        bool one_of_many = slot->sequence && slot->sequence->request->options.n_samples > 1;
        int32_t with_prompt = one_of_many ? slot_of_prompt(s, slot->prompt_of) : i;
        s->shared[i] = (struct shared_prefix){.slot = i};
        if (with_prompt < i) {
            s->shared[i] = (struct shared_prefix){.slot = with_prompt, .n = slot->sequence->n_kv};
        } else if (slot->has_prefix && with_prefix >= 0) {
            s->shared[i] =
                (struct shared_prefix){.slot = with_prefix, .n = (int32_t)s->model->prefix.n};
        }
        with_prefix = slot->has_prefix && with_prefix < 0 ? i : with_prefix;
    }
}

/* Runs the forward pass over the chosen rows. */
static int run_rows(struct bpo_session *s, struct bpo_error *err) {
    const struct kernels *k = s->kernels;
    struct backend *b = s->backend;
    struct row_list *list = &s->rows;
    const struct activations *a = &s->act;
    const int32_t n = rows_pad(s, list), n_wanted = list->n_wanted + n - list->n;
    const struct span decode = {.first = 0, .n = n, .kind = ROWS_DECODE};
    struct rows rows = backend_rows(s);
    uint64_t shape = 0;
    if (decodes_only(list)) {
        shape = (uint64_t)n; /* all are wanted */
        rows.n = n;
        rows.spans = &decode;
    }
    size_t n_bytes = (size_t)n * sizeof(int32_t), wanted = (size_t)n_wanted;
    find_shared(s);
    for (int32_t i = 0; i < list->n; i++) {
        struct slot *slot = &s->slots[list->slot[i]];
        slot->n_touched = slot->n_touched > list->pos[i] ? slot->n_touched : list->pos[i] + 1;
    }
    int failed = k->upload(b, a->token, list->token, n_bytes, err);
    failed = failed ? failed : k->upload(b, a->slot, list->slot, n_bytes, err);
    failed = failed ? failed : k->upload(b, a->pos, list->pos, n_bytes, err);
    failed = failed ? failed : k->upload(b, a->wanted, list->wanted, wanted * sizeof(int32_t), err);
    return failed ? failed : forward(s, &rows, n_wanted, shape, NULL, err);
}

/* The wanted logits [n_wanted][V] come to host memory: to `to`, or (NULL) to where *logits then
 * says. */
static int fetch_logits(struct bpo_session *s, const float **logits, float *to,
                        struct bpo_error *err) {
    size_t n = (size_t)s->rows.n_wanted * (size_t)s->model->info.vocab_size;
    *logits = to ? to : s->host_logits;
    if (!to && s->kernels->host_memory) {
        *logits = s->act.logits; /* they are there */
        return 0;
    }
    return n > 0 ? s->kernels->download(s->backend, to ? to : s->host_logits, s->act.logits,
                                        n * sizeof(float), err)
                 : 0;
}

/* Names the layer in which the last call's numbers left the finite ones: repeats the pass, layer by
 * layer. */
static int explain_nonfinite(struct bpo_session *s, struct bpo_error *err) {
    const struct rows rows = backend_rows(s);
    int32_t layer = -1;
    int failed = forward(s, &rows, s->rows.n_wanted, 0, &layer, err);
    if (!failed) {
        char where[32] = "the logits";
        if (layer >= 0 && layer < s->model->info.n_layers) {
            (void)snprintf(where, sizeof where, "layer %d", layer);
        }
        failed =
            bpo_fail(err, BPO_ERR_RUN,
                     "check the model file with --verify, and the checkpoint that it came from",
                     "the model computed a number that is not finite, first in %s", where);
    }
    return failed;
}

/* Draws from the rows of a step, one an item of the backend's loop. */
struct draw_op {
    struct bpo_session *s;
    const float *logits; /* [rows][V] */
};

/* The sampler that a thread works with. */
static struct sampler sampler_of(const struct bpo_session *s, size_t thread) {
    size_t vocab = (size_t)s->model->info.vocab_size, from = thread * vocab;
    const struct sampler *first = &s->sampler;
    return (struct sampler){.block_max = first->block_max + thread * (vocab / SAMPLER_BLOCK + 1),
                            .scaled = first->scaled + from,
                            .heap = first->heap + from,
                            .ranked = first->ranked + from,
                            .mass = first->mass + from};
}

static void draw_row(const void *arg, size_t i, size_t thread) {
    const struct draw_op *op = arg;
    const struct row_list *rows = &op->s->rows;
    size_t vocab = (size_t)op->s->model->info.vocab_size;
    struct sampler sampler = sampler_of(op->s, thread);
    rows->drawn[i] = sampler_draw(&sampler, op->logits + i * vocab, vocab, &rows->params[i]);
}

/*
 * Draws the next ids of the sequences that decode, whose rows are the first ones: from logits, or
 * (NULL) from those that the backend has and draws from itself. What is forbidden, and the random
 * number, depend on the ids before: behind a draft's row they are the draft's. If another one is
 * drawn there, the rest is not looked at.
 */
static int draw_rows(struct bpo_session *s, const float *logits, struct bpo_error *err) {
    const struct kernels *k = s->kernels;
    struct row_list *rows = &s->rows;
    int32_t n = 0;
    while (n < rows->n_wanted && rows->wanted_by[n]->n_tokens > 0) {
        struct sequence *q = rows->wanted_by[n];
        const int32_t n_tokens = q->n_tokens;
        q->drawn = rows->drawn + n;
        for (int32_t j = 0; j <= q->draft.n_rows; j++, n++) {
            if (j > 0) {
                q->tokens[q->n_tokens++] = q->draft.id[j - 1];
            }
            rows->params[n] =
                sequence_params(s->model, q, rows->forbidden + (size_t)n * MOST_FORBIDDEN);
        }
        q->n_tokens = n_tokens;
    }
    if (!logits) {
        return k->sample(s->backend, rows->drawn, s->act.logits, rows->params, n,
                         (size_t)s->model->info.vocab_size, err);
    }
    const struct draw_op op = {s, logits};
    if (k->for_each) {
        k->for_each(s->backend, draw_row, &op, (size_t)n);
    }
    for (int32_t i = 0; i < n && !k->for_each; i++) {
        draw_row(&op, (size_t)i, 0);
    }
    return 0;
}

/* Draws from the logits, and moves the prompts on by the rows that were computed: a complete one
 * keeps its logits. */
static int use_logits(struct bpo_session *s, struct bpo_error *err) {
    const struct row_list *rows = &s->rows;
    size_t vocab = (size_t)s->model->info.vocab_size;
    int32_t n_prefix = (int32_t)s->model->prefix.n;
    const float *logits = NULL;
    bool stay = s->kernels->sample && decodes_only(rows);
    int failed = stay ? 0 : fetch_logits(s, &logits, NULL, err);
    failed = failed ? failed : draw_rows(s, logits, err);
    for (int32_t i = 0; i < rows->n && !failed; i++) {
        struct sequence *q = s->slots[rows->slot[i]].sequence;
        if (q->request->state == REQUEST_PREFILL) {
            q->n_kv = rows->pos[i] + 1;
            failed = q->request->has_prefix && q->n_kv == n_prefix
                         ? keep_prefix(s, rows->slot[i], err)
                         : 0;
        }
    }
    for (int32_t i = 0; i < rows->n_wanted && !failed; i++) {
        struct sequence *q = rows->wanted_by[i];
        struct request *r = q->request;
        if (r->state == REQUEST_PREFILL) {
            memcpy(r->logits, logits + (size_t)i * vocab, vocab * sizeof *logits);
            q->logits = r->logits;
            r->state = REQUEST_READY;
            r->ready = seconds_now();
        }
    }
    return failed;
}

/* Ends a sequence that no id can be drawn for; with its first id the whole request: the prompt is
 * to blame. */
static int no_draw(struct bpo_session *s, struct sequence *q, int32_t why, struct bpo_error *err) {
    struct bpo_error error = {0};
    if (why == DRAW_NOT_FINITE) {
        (void)explain_nonfinite(s, &error);
    } else {
        (void)bpo_fail(&error, BPO_ERR_RUN, "is this a BPO model? --info describes it",
                       "every token is forbidden");
    }
    if (q->n_tokens == 0) {
        return request_end(s, q->request, BPO_STOP_ERROR, &error, err);
    }
    q->error = error;
    sequence_end(s, q, BPO_STOP_ERROR);
    return 0;
}

/*
 * Draws the next ids of a sequence. Behind the first one come those whose row was a drafted id that
 * was drawn indeed, so each is drawn from the same logits, with the same random number, as without
 * a draft. Keys and values of ids that were not drawn lie at positions that nothing reads before it
 * writes them.
 */
static int sequence_advance(struct bpo_session *s, struct sequence *q, struct bpo_error *err) {
    const struct draft *d = &q->draft;
    int32_t n_before = q->n_tokens, n_rows = d->n_rows;
    bool checked = true, ended = false;
    q->n_passes += n_before > 0;
    q->n_drafted += n_rows;
    for (int32_t i = 0; i <= n_rows && checked; i++) {
        int32_t id = sequence_draw(s, q, i);
        if (id < 0) {
            return no_draw(s, q, id, err);
        }
        q->n_accepted += i > 0;
        ended = sequence_take(s, q, id);
        checked = !ended && i < n_rows && id == d->id[i];
    }
    q->logits = NULL;
    q->drawn = NULL;
    if (!ended) {
        sequence_show(s, q, true); /* once a step: the event's text must not move */
    }
    lookup_learn(&s->lookup, d, q->tokens + n_before, q->n_tokens - n_before);
    return 0;
}

/* Runs the chosen rows, and tells lookup what a call of so many costs. */
static int run_step(struct bpo_session *s, struct bpo_error *err) {
    double begun = seconds_now();
    int failed = run_rows(s, err);
    if (!failed && s->rows.n == s->rows.n_wanted) { /* no prompt's rows among them */
        lookup_learn_cost(&s->lookup, s->rows.n, seconds_now() - begun);
    }
    return failed;
}

static int step(struct bpo_session *s, struct bpo_error *err) {
    int failed = end_unwanted(s, err);
    drop_complete_requests(s);
    failed = failed ? failed : admit(s, err);
    failed = failed ? failed : lend_prefix(s, err);
    if (failed) {
        return failed;
    }
    collect_rows(s);
    if (s->rows.n > 0) {
        failed = run_step(s, err);
        if (failed || atomic_load(&s->interrupted)) {
            return failed; /* an interrupted pass is dropped; the next step ends everything */
        }
        failed = use_logits(s, err);
        /* the further samples of a prompt that is now complete */
        failed = failed ? failed : admit(s, err);
    }
    for (int32_t i = 0; i < s->info.n_slots && !failed; i++) {
        struct sequence *q = s->slots[i].sequence;
        failed = q && (q->logits || q->drawn) ? sequence_advance(s, q, err) : 0;
    }
    drop_complete_requests(s);
    return failed;
}

/* ---------------------------------------------------------------- public functions: the model */

const char *bpo_version(void) {
    return BPO_VERSION;
}

const char *bpo_stop_name(enum bpo_stop stop) {
    static const char *const names[] = {"eos",     "newline",     "length",
                                        "context", "interrupted", "error"};
    return names[stop];
}

struct bpo_model *bpo_model_open(const char *path, struct bpo_error *err) {
    struct bpo_model *m = model_load(path, err);
    if (m && model_template(m, err)) {
        bpo_model_close(m);
        m = NULL;
    }
    return m;
}

int bpo_tokenize(const struct bpo_model *m, const char *text, size_t n_text, bool templated,
                 int32_t **ids, size_t *n_ids, struct bpo_error *err) {
    struct ids out;
    int failed = templated ? tokenize_templated(m, text, n_text, &out, err)
                           : tokenize(m, text, n_text, &out, err);
    *ids = failed ? NULL : out.id;
    *n_ids = failed ? 0 : out.n;
    return failed;
}

/* ---------------------------------------------------------------- public functions: the session */

static int session_open_on(struct bpo_session *s, const struct bpo_session_options *o,
                           const struct kernels *kernels, struct bpo_error *err) {
    int failed = session_backend(s, o, kernels, err);
    failed = failed ? failed : session_memory(s, err);
    failed =
        failed
            ? failed
            : session_kv(
                  s, err); /* before the weights: what does not fit is known before they travel */
    failed = failed ? failed : session_weights(s, err);
    failed = failed ? failed : session_rope(s, err);
    return failed;
}

/* Opens the session on the device that is asked for. AUTO takes a GPU that has room for all; a
 * machine without one is the usual case, which needs no word, but a GPU that cannot be used is
 * told. */
static int session_open_device(struct bpo_session *s, const struct bpo_session_options *o,
                               struct bpo_error *err) {
    struct bpo_error why = {0};
    bool found = false;
    const struct kernels *cuda = o->device == BPO_DEVICE_CPU ? NULL : backend_cuda(&found, &why);
    if (cuda && session_open_on(s, o, cuda, &why) == 0) {
        /* what pays is timed; drafts change the rows, and they the bits */
        s->n_lookup = o->lookup < 0 ? 0 : o->lookup;
        return 0;
    }
    if (o->device == BPO_DEVICE_CUDA) {
        return bpo_fail(err, BPO_ERR_RESOURCE, why.hint, "%s", why.message);
    }
    bool told = found && !(cuda && !s->backend); /* no device, no driver: not worth a word */
    session_release(s);
    int failed = session_open_on(s, o, kernels_cpu(), err);
    if (!failed && told) {
        char line[sizeof why.message + 64];
        (void)snprintf(line, sizeof line, "the CPU is used: %s", why.message);
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
    /* CHUNK_ROWS at least: bpo_logits */
    s->max_wanted = o.n_slots > LOOKUP_MOST_ROWS ? o.n_slots : LOOKUP_MOST_ROWS;
    atomic_init(&s->interrupted, 0);
    int failed = session_open_device(s, &o, err);
    s->prefix_file =
        !o.no_cache && prefix_wants_file(m, s->numerics) ? PREFIX_FILE_UNREAD : PREFIX_FILE_OFF;
    if (!failed && s->kernels->host_memory && m->n_file > memory_total()) {
        failed = warn(s, NULL,
                      "the model is larger than this machine's memory: it will be read from disk "
                      "again and again",
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
    s->handed_out = true;
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

/* ---------------------------------------------------------------- public functions: requests */

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
            return bpo_fail(err, BPO_ERR_INPUT, "bpo --tokenize prints a text's ids",
                            "token id %d; this model has 0 to %d", ids[i], c->vocab_size - 1);
        }
    }
    return 0;
}

static int request_check(const struct bpo_request *o, const struct bpo_model_info *c,
                         struct bpo_error *err) {
    const char *hint = "see bpo --help for the options' ranges";
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
    if (o->ids && o->mode != BPO_STABLE) {
        return bpo_fail(err, BPO_ERR_USAGE, "leave --mode out, or give the prompt as text",
                        "token ids as input work in stable mode only: the rules of aggressive mode "
                        "need the prompt's text");
    }
    if (o->ids ? o->n_ids == 0 : !o->text) {
        return bpo_fail(err, BPO_ERR_INPUT, "give the prompt with -p, -f or on standard input",
                        "there is no prompt");
    }
    int failed = o->ids ? ids_check(o->ids, o->n_ids, c, err) : 0;
    return failed || !o->forced ? failed : ids_check(o->forced, o->n_forced, c, err);
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

/* The prompt's ids, and copies of what the caller's pointers give. */
static int request_prompt(struct request *r, const struct bpo_model *m, struct bpo_error *err) {
    const struct bpo_request o = r->options;
    r->options.text = NULL;
    r->options.ids = r->options.forced = NULL;
    int failed = o.forced && o.n_forced > 0
                     ? copy_ids(&r->forced, o.forced, o.n_forced, "the forced ids", err)
                     : 0;
    if (o.ids) {
        failed = failed ? failed : copy_ids(&r->source, o.ids, o.n_ids, "the prompt", err);
        return failed ? failed : copy_ids(&r->prompt, o.ids, o.n_ids, "the prompt", err);
    }
    size_t begin, end;
    text_strip(o.text, o.n_text, &begin, &end);
    if (begin == end) {
        return bpo_fail(err, BPO_ERR_INPUT, "give some text with -p, -f or on standard input",
                        "the prompt is empty, or all white space");
    }
    if (!(r->text = malloc(end - begin))) {
        return out_of_memory(err, "the prompt", end - begin);
    }
    r->n_text = end - begin;
    memcpy(r->text, o.text + begin, r->n_text);
    failed = failed ? failed : tokenize_templated(m, o.text, o.n_text, &r->prompt, err);
    failed = failed ? failed : tokenize(m, o.text, o.n_text, &r->source, err);
    if (o.mode == BPO_AGGRESSIVE) {
        r->min_new = (int32_t)r->source.n + 1 + 5; /* P + t < P + N + 5, where N counts BOS */
    }
    return failed;
}

/* Whether the context is long enough, and, where a KV cache is committed by use, the memory. */
static int request_fits(const struct bpo_session *s, const struct request *r,
                        struct bpo_error *err) {
    size_t n_prompt = r->prompt.n, n_positions = (size_t)s->info.n_positions,
           n_new = (size_t)r->options.max_new_tokens;
    if (n_prompt >= n_positions) {
        return bpo_fail(err, BPO_ERR_INPUT,
                        "shorten the prompt, or raise --context if the model allows",
                        "the prompt is %zu tokens long with its template; the context has %zu, and "
                        "an answer needs at least one",
                        n_prompt, n_positions);
    }
    if (!s->kernels->host_memory) {
        return 0;
    }
    size_t n_longest = n_prompt + n_new < n_positions ? n_prompt + n_new : n_positions;
    size_t n_parallel = 0, touched = 0;
    for (const struct request *other = s->requests; other; other = other->next) {
        n_parallel += (size_t)other->options.n_samples;
    }
    n_parallel += (size_t)r->options.n_samples;
    n_parallel = n_parallel < (size_t)s->info.n_slots ? n_parallel : (size_t)s->info.n_slots;
    for (int32_t i = 0; i < s->info.n_slots; i++) {
        touched += (size_t)s->slots[i].n_touched;
    }
    size_t n_more = n_parallel * n_longest > touched ? n_parallel * n_longest - touched : 0;
    size_t n_most = SIZE_MAX / s->info.kv_position_bytes;
    return check_memory(n_more < n_most ? n_more * s->info.kv_position_bytes : SIZE_MAX,
                        "the KV cache", err);
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

int64_t bpo_submit(struct bpo_session *s, const struct bpo_request *request,
                   struct bpo_error *err) {
    events_reset(s);
    int failed = request_check(request, &s->model->info, err);
    if (failed) {
        return failed;
    }
    struct request *r = calloc(1, sizeof *r);
    if (!r) {
        return out_of_memory(err, "a request", sizeof *r);
    }
    r->options = *request;
    failed = request_prompt(r, s->model, err);
    r->has_prefix = !failed && has_prefix(s->model, &r->prompt);
    failed = failed ? failed : request_fits(s, r, err);
    if (!failed) {
        /* at that many new ids the stop is "context" */
        int32_t room = s->info.n_positions - (int32_t)r->prompt.n;
        int32_t *n_most = &r->options.max_new_tokens;
        *n_most = *n_most < room + 1 ? *n_most : room + 1;
        *n_most = r->forced.n > 0 && r->forced.n < (size_t)*n_most ? (int32_t)r->forced.n : *n_most;
        r->number = s->next_number;
        r->logits = malloc((size_t)s->model->info.vocab_size * sizeof *r->logits);
        failed = r->logits ? 0
                           : out_of_memory(err, "a request's logits",
                                           (size_t)s->model->info.vocab_size * sizeof *r->logits);
    }
    failed =
        failed ? failed
               : request_warnings(s, r, request->ids ? NULL : request->text, request->n_text, err);
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
    s->handed_out = true;
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
        (void)bpo_fail(err, BPO_ERR_RUN, e->error->hint, "%s",
                       e->stop == BPO_STOP_ERROR ? e->error->message
                                                 : "the rewrite was interrupted");
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

int bpo_logits(struct bpo_session *s, const int32_t *ids, size_t n_ids, float *logits,
               struct bpo_error *err) {
    const struct bpo_model_info *c = &s->model->info;
    size_t vocab = (size_t)c->vocab_size;
    struct ids input = {.id = (int32_t *)ids, .n = n_ids};
    if (s->requests || n_ids == 0 || n_ids > (size_t)s->info.n_positions) {
        return bpo_fail(
            err, BPO_ERR_INPUT, "shorten the input, or raise --context if the model allows",
            "logits need an idle session and 1 to %d ids, not %zu", s->info.n_positions, n_ids);
    }
    if (ids_check(ids, n_ids, c, err)) {
        return BPO_ERR_INPUT;
    }
    s->slots[0].prompt_of = -1;
    s->slots[0].has_prefix = false;
    int failed = 0;
    for (int32_t at = 0, end; at < (int32_t)n_ids && !failed; at = end) {
        end = chunk_end(s->model, &input, at);
        rows_clear(&s->rows);
        rows_add_chunk(&s->rows, &input, 0, at, end);
        for (int32_t i = 0; i < s->rows.n; i++) {
            s->rows.wanted[i] = i;
        }
        s->rows.n_wanted = s->rows.n;
        const float *there;
        failed = run_rows(s, err);
        if (atomic_exchange(&s->interrupted, 0)) {
            failed = bpo_fail(err, BPO_ERR_RUN, NULL, "interrupted");
        }
        failed = failed ? failed : fetch_logits(s, &there, logits + (size_t)at * vocab, err);
        for (int32_t i = at; i < end && !failed; i++) {
            bool finite = block_maxima(s->sampler.block_max, logits + (size_t)i * vocab, vocab);
            failed = finite ? 0 : explain_nonfinite(s, err);
        }
    }
    return failed;
}

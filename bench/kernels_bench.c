/*
 * kernels_bench.c - how close the CPU kernels come to the limits of the machine: make bench-kernels
 * SHAPE=1b
 *
 * It measures, in turn, in one process, for several rounds:
 *
 *   read bandwidth    the weights' own bytes, and a copy of them in huge pages, read in several
 *                     patterns
 *   FMA peak          fp32 multiply-adds between registers, on all threads
 *   steps             the ops of a forward pass over a model's layers, called as forward() calls
 *                     them and timed one by one: for one row up to 64 (as drafts are checked: rows
 *                     of one slot) and for prompts
 *   short ops         on all threads, without a pause and after a sleep
 *
 * Only figures of the same round are compared, because the speed of a shared machine changes from
 * second to second. The results are medians over the rounds, with quartiles.
 *
 * The weights are random. They are large enough to come from memory where the real ones do (up to
 * MAX_LAYER_BYTES of whole layers), and are in the page cache like those of a mapped bpo.bin.
 */
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "kernels.h"
#include "peaks.h"
#include "base/threads.h"

#define MAX_LAYER_BYTES ((size_t)2 << 30)
#define CHUNK_ROWS 64    /* rows of a chunk of a prompt, as in model.h */
#define N_POSITIONS 2048 /* S */
#define MAX_ROUNDS 99
#define MAX_CASES 40
#define MAX_BACKENDS 4

/* ---------------------------------------------------------------- utilities */

struct shape {
    const char *name;
    int32_t dim, n_layers, n_heads, n_kv_heads, ffn_dim, vocab; /* D, L, H, HK, F, V */
};

static const struct shape SHAPES[] = {
    {"tiny", 64, 2, 4, 2, 176, 512},        {"15m", 288, 6, 6, 6, 768, 32000},
    {"110m", 768, 12, 12, 12, 2048, 32000}, {"1b", 2048, 22, 32, 4, 5632, 32000},
    {"7b", 4096, 32, 32, 32, 11008, 32000},
};
enum { N_SHAPES = sizeof SHAPES / sizeof SHAPES[0] };

static _Noreturn void fail(const char *what) {
    (void)fprintf(stderr, "kernels_bench: %s\n", what);
    exit(1);
}

static void check(int failed, const struct bpo_error *err) {
    if (failed) {
        fail(err->message);
    }
}

/* One figure, measured once a round. */
struct series {
    double value[MAX_ROUNDS];
    int n;
};

static void add(struct series *s, double value) {
    if (s->n < MAX_ROUNDS) {
        s->value[s->n++] = value;
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The q-quantile over the rounds, interpolated. */
static double quantile(const struct series *s, double q) {
    double sorted[MAX_ROUNDS];
    if (s->n == 0) {
        return NAN;
    }
    memcpy(sorted, s->value, (size_t)s->n * sizeof *sorted);
    qsort(sorted, (size_t)s->n, sizeof *sorted, compare);
    double at = q * (s->n - 1);
    int low = (int)at, high = low + 1 < s->n ? low + 1 : low;
    return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
}

static double median(const struct series *s) {
    return quantile(s, 0.5);
}

/* a / b, round by round. */
static struct series ratio(const struct series *a, const struct series *b) {
    struct series s = {.n = 0};
    for (int i = 0; i < a->n && i < b->n; i++) {
        add(&s, a->value[i] / b->value[i]);
    }
    return s;
}

static json_t *series_json(const struct series *s) {
    return json_pack("{s:f, s:f, s:f, s:i}", "median", median(s), "low", quantile(s, 0.25), "high",
                     quantile(s, 0.75), "n", s->n);
}

/* ---------------------------------------------------------------- memory */

enum pages { PAGES_CACHE, PAGES_HUGE };

/* PAGES_CACHE: pages of a file in memory, as the page cache holds a model. */
static void *map_memory(size_t n_bytes, enum pages pages) {
    void *data = MAP_FAILED;
#ifdef __linux__
    if (pages == PAGES_CACHE) {
        int fd = memfd_create("weights", 0);
        if (fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0) {
            data = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        }
        if (fd >= 0) {
            (void)close(fd);
        }
    }
#endif
    if (data == MAP_FAILED) {
        data = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    }
    if (data == MAP_FAILED) {
        fail("not enough memory for the weights");
    }
#ifdef MADV_HUGEPAGE
    if (pages == PAGES_HUGE) {
        (void)madvise(data, n_bytes, MADV_HUGEPAGE); /* if it fails, these are ordinary pages */
    }
#endif
    return data;
}

/* fp16 values of both signs between 2^-7 and 2^-6. */
static void fill_weights(uint16_t *w, size_t n) {
    uint64_t state = 0x9e3779b97f4a7c15;
    for (size_t i = 0; i < n; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        w[i] = (uint16_t)((state >> 48 & 0x83ff) | 8 << 10);
    }
}

/* ---------------------------------------------------------------- steps */

enum op {
    OP_EMBED,
    OP_ANGLES,
    OP_NORM,
    OP_QKV,
    OP_ROPE,
    OP_ATTENTION,
    OP_O,
    OP_GATE_UP,
    OP_SWIGLU,
    OP_DOWN,
    OP_HEAD,
    N_OPS
};
static const char *const OP_NAMES[N_OPS] = {"embed",  "angles",    "rmsnorm", "qkv",
                                            "rope",   "attention", "o",       "gate_up",
                                            "swiglu", "down",      "lm_head"};

/* Steps of n rows at positions pos .. pos + n - 1 of one slot. A prompt wants the logits of its
 * last row only. */
struct step_case {
    const char *simd; /* NULL: the best */
    enum bpo_matmul matmul;
    enum span_kind kind;
    int32_t n, pos;
    int backend;
    struct series op[N_OPS]; /* seconds for all layers of the shape */
    struct series step, matmul_s;
    /* if n > 1: the widest level's peak right before and after */
    struct series fma;
};

struct bench {
    const struct shape *shape;
    int n_threads, n_rounds, n_layers; /* layers in memory */
    double flop_budget;                /* of measuring one step, roughly */
    int next_layer;
    struct threads *pool;
    char *weights;
    size_t weights_bytes, layer_bytes, head_bytes;
    struct peaks *peaks;
    struct series read[PEAK_PATTERNS], fma[PEAK_LEVELS], round_trip, short_op_at_once,
        short_op_after_sleep;
    const struct kernels *kernels;
    struct backend *backend[MAX_BACKENDS];
    struct kv_cache kv;
    size_t kv_bytes;
    float *x, *normed, *qkv, *mixed, *gate_up, *hidden, *angles, *inv_freq, *logits;
    uint16_t *gain;
    int32_t *token, *slot, *pos, *index;
    struct step_case cases[MAX_CASES];
    int n_cases, max_rows;
};

static int32_t head_dim(const struct shape *s) {
    return s->dim / s->n_heads;
}

static size_t qkv_rows(const struct shape *s) {
    return (size_t)(s->n_heads + 2 * s->n_kv_heads) * (size_t)head_dim(s);
}

static struct weight matrix(const char *data, size_t rows, size_t cols) {
    return (struct weight){data, DTYPE_F16, rows, cols, cols * sizeof(uint16_t), NULL};
}

/* The four matrices of a layer, in the order of bpo.bin. lm_head, which is the embedding too, comes
 * before all layers. */
static struct weight layer_weight(const struct bench *b, int layer, enum op op) {
    const struct shape *s = b->shape;
    const char *at = b->weights + b->head_bytes + (size_t)layer * b->layer_bytes;
    size_t d = (size_t)s->dim, f = (size_t)s->ffn_dim;
    switch (op) {
    case OP_QKV:
        return matrix(at, qkv_rows(s), d);
    case OP_O:
        return matrix(at + 2 * qkv_rows(s) * d, d, d);
    case OP_GATE_UP:
        return matrix(at + 2 * (qkv_rows(s) + d) * d, 2 * f, d);
    case OP_DOWN:
        return matrix(at + 2 * (qkv_rows(s) + d + 2 * f) * d, d, f);
    default:
        return matrix(b->weights, (size_t)s->vocab, d);
    }
}

static double lap(double *since) {
    double now = seconds_now(), passed = now - *since;
    *since = now;
    return passed;
}

/* One layer, as in forward(). Adds the seconds of each op to s. */
static void run_layer(struct bench *b, struct backend *to, const struct rows *rows, int layer,
                      double s[N_OPS]) {
    const struct kernels *k = b->kernels;
    const struct shape *shape = b->shape;
    const struct weight gain = matrix((const char *)b->gain, 1, (size_t)shape->dim);
    const struct weight qkv = layer_weight(b, layer, OP_QKV), o = layer_weight(b, layer, OP_O),
                        gate_up = layer_weight(b, layer, OP_GATE_UP),
                        down = layer_weight(b, layer, OP_DOWN);
    double t = seconds_now();
    k->rmsnorm(to, b->normed, b->x, &gain, rows->n, 1e-5f);
    s[OP_NORM] += lap(&t);
    k->matmul(to, b->qkv, b->normed, &qkv, rows, MATMUL_STORE);
    s[OP_QKV] += lap(&t);
    k->rope_kv(to, b->qkv, &b->kv, b->angles, rows, layer, shape->n_heads);
    s[OP_ROPE] += lap(&t);
    k->attention(to, b->mixed, b->qkv, &b->kv, rows, layer, shape->n_heads);
    s[OP_ATTENTION] += lap(&t);
    k->matmul(to, b->x, b->mixed, &o, rows, MATMUL_ADD);
    s[OP_O] += lap(&t);
    k->rmsnorm(to, b->normed, b->x, &gain, rows->n, 1e-5f);
    s[OP_NORM] += lap(&t);
    k->matmul(to, b->gate_up, b->normed, &gate_up, rows, MATMUL_STORE);
    s[OP_GATE_UP] += lap(&t);
    k->swiglu(to, b->hidden, b->gate_up, rows->n, shape->ffn_dim);
    s[OP_SWIGLU] += lap(&t);
    k->matmul(to, b->x, b->hidden, &down, rows, MATMUL_ADD);
    s[OP_DOWN] += lap(&t);
}

/* The number of layers to measure: all of them, unless that takes too long. Each step then runs the
 * next layers, so that none is found in the cache that would not be there in a full pass. */
static int layers_of_step(const struct bench *b, int32_t n_rows) {
    double flop = (double)b->layer_bytes * n_rows, fit = b->flop_budget / flop;
    int min = (int)(PEAK_WINDOW_BYTES / 2 / b->layer_bytes) + 1;
    int n = fit > b->n_layers ? b->n_layers : (int)fit;
    n = n > min ? n : min;
    return n < b->n_layers ? n : b->n_layers;
}

/* The rows of a case; spans has room for 64. */
static struct rows case_rows(struct bench *b, const struct step_case *c, struct span *spans) {
    struct rows rows = {
        .n = c->n, .token = b->token, .slot = b->slot, .pos = b->pos, .spans = spans};
    for (int32_t i = 0; i < c->n; i++) {
        b->pos[i] = c->pos + i;
    }
    for (int32_t at = 0; c->kind == ROWS_PROMPT && at < c->n; at += CHUNK_ROWS) {
        spans[rows.n_spans++] =
            (struct span){at, c->n - at < CHUNK_ROWS ? c->n - at : CHUNK_ROWS, ROWS_PROMPT};
    }
    return rows;
}

/* One step. Adds the seconds of each op to s, scaled to all layers of the shape. */
static void run_step(struct bench *b, const struct step_case *c, double s[N_OPS]) {
    const struct kernels *k = b->kernels;
    struct backend *to = b->backend[c->backend];
    struct span spans[64];
    const struct rows rows = case_rows(b, c, spans),
                      wanted = {.n = c->kind == ROWS_PROMPT ? 1 : c->n};
    const struct weight head = layer_weight(b, 0, OP_HEAD),
                        gain = matrix((const char *)b->gain, 1, head.cols);
    double layers[N_OPS] = {0};
    struct bpo_error err;
    int n_layers = layers_of_step(b, c->n);
    (void)k->step_begin(to, (uint64_t)c->n);
    double t = seconds_now();
    k->embed(to, b->x, &head, &rows);
    s[OP_EMBED] += lap(&t);
    k->rope_angles(to, b->angles, b->inv_freq, &rows, head_dim(b->shape));
    s[OP_ANGLES] += lap(&t);
    for (int l = 0; l < n_layers; l++) {
        run_layer(b, to, &rows, b->next_layer, layers);
        b->next_layer = (b->next_layer + 1) % b->n_layers;
    }
    t = seconds_now();
    k->rmsnorm(to, b->normed, b->x, &gain, wanted.n, 1e-5f);
    s[OP_NORM] += lap(&t);
    k->matmul(to, b->logits, b->normed, &head, &wanted, MATMUL_STORE);
    s[OP_HEAD] += lap(&t);
    check(k->step_end(to, &err), &err);
    for (int op = 0; op < N_OPS; op++) {
        s[op] += layers[op] / n_layers * b->shape->n_layers;
    }
}

#define RESIDENT_S 0.02 /* for measuring a case of a model that fits in the caches, roughly */

/* The first step brings a small model's weights into the cache, where they stay from step to step:
 * such a model is measured after it. */
static void measure_case(struct bench *b, struct step_case *c) {
    double s[N_OPS] = {0}, step = 0, matmul = 0, begin = seconds_now();
    int n = 1;
    run_step(b, c, s);
    if (b->weights_bytes < PEAK_WINDOW_BYTES) {
        double fit = RESIDENT_S / (seconds_now() - begin);
        n = fit < 1 ? 1 : fit > 100 ? 100 : (int)fit;
        memset(s, 0, sizeof s);
        for (int i = 0; i < n; i++) {
            run_step(b, c, s);
        }
    }
    for (int op = 0; op < N_OPS; op++) {
        s[op] /= n;
        add(&c->op[op], s[op]);
        step += s[op];
        matmul += op == OP_QKV || op == OP_O || op == OP_GATE_UP || op == OP_DOWN || op == OP_HEAD
                      ? s[op]
                      : 0;
    }
    add(&c->step, step);
    add(&c->matmul_s, matmul);
}

/* ---------------------------------------------------------------- measurements */

/* About a microsecond of work. */
static void short_op(void *arg, int i, int n) {
    (void)arg, (void)i, (void)n;
    for (volatile int k = 0; k < 5000; k++) {
    }
}

/* The mean time of the ops of 26 steps of a small model. A step is 90 short ops, and some 30 us in
 * which only the caller works, as it does while it samples. */
static double short_ops(struct bench *b) {
    enum { STEPS = 26, OPS = 90 };
    double begin = seconds_now();
    for (int step = 0; step < STEPS; step++) {
        for (int i = 0; i < OPS; i++) {
            threads_run(b->pool, short_op, NULL);
        }
        for (int i = 0; i < 20; i++) {
            short_op(NULL, 0, 1);
        }
    }
    return (seconds_now() - begin) / (STEPS * OPS);
}

/* Right after such steps, and after a sleep, as when a session gets its next prompt. If the system
 * then wakes two threads on one processor, they are slow for a long time. */
static void measure_short_ops(struct bench *b) {
    const struct timespec idle = {.tv_nsec = 100000000};
    (void)short_ops(b);
    add(&b->short_op_at_once, short_ops(b));
    for (int i = 0; i < 5; i++) {
        (void)nanosleep(&idle, NULL);
        add(&b->short_op_after_sleep, short_ops(b));
    }
}

/* The peaks before and after the one-row cases are averaged, and that is what these cases are
 * compared with. All other cases have FMA peaks right before and after them, because under load the
 * clock changes within seconds. */
static void measure_round(struct bench *b) {
    double before[PEAK_PATTERNS], after[PEAK_PATTERNS], fma_before[PEAK_LEVELS],
        fma_after[PEAK_LEVELS];
    peaks_read(b->peaks, before);
    for (int i = 0; i < b->n_cases; i++) {
        if (b->cases[i].n == 1) {
            measure_case(b, &b->cases[i]);
        }
    }
    peaks_read(b->peaks, after);
    add(&b->round_trip, peaks_round_trip(b->peaks));
    peaks_fma(b->peaks, fma_before);
    for (int i = 0; i < peaks_n_levels(b->peaks); i++) {
        add(&b->fma[i], fma_before[i]);
    }
    for (int i = 0; i < b->n_cases; i++) {
        if (b->cases[i].n > 1) {
            measure_case(b, &b->cases[i]);
            peaks_fma(b->peaks, fma_after);
            add(&b->cases[i].fma, (fma_before[0] + fma_after[0]) / 2);
            memcpy(fma_before, fma_after, sizeof fma_after);
        }
    }
    for (int i = 0; i < PEAK_PATTERNS; i++) {
        add(&b->read[i], (before[i] + after[i]) / 2);
    }
    measure_short_ops(b);
}

static void forget(struct bench *b) {
    for (int i = 0; i < PEAK_PATTERNS; i++) {
        b->read[i].n = 0;
    }
    for (int i = 0; i < PEAK_LEVELS; i++) {
        b->fma[i].n = 0;
    }
    for (int i = 0; i < b->n_cases; i++) {
        b->cases[i].step.n = b->cases[i].matmul_s.n = b->cases[i].fma.n = 0;
        for (int op = 0; op < N_OPS; op++) {
            b->cases[i].op[op].n = 0;
        }
    }
    b->round_trip.n = b->short_op_after_sleep.n = b->short_op_at_once.n = 0;
}

/* ---------------------------------------------------------------- set-up */

static void *zeros(size_t n_bytes) {
    size_t rounded = (n_bytes + 63) / 64 * 64;
    void *data = aligned_alloc(64, rounded);
    if (!data) {
        fail("not enough memory for the activations");
    }
    memset(data, 0, rounded);
    return data;
}

static void make_weights(struct bench *b, enum pages pages) {
    const struct shape *s = b->shape;
    size_t d = (size_t)s->dim, f = (size_t)s->ffn_dim;
    b->layer_bytes = 2 * (qkv_rows(s) * d + d * d + 3 * f * d);
    b->head_bytes = 2 * (size_t)s->vocab * d;
    size_t fit = MAX_LAYER_BYTES / b->layer_bytes;
    b->n_layers = fit < (size_t)s->n_layers ? (int)fit : s->n_layers;
    b->weights_bytes = b->head_bytes + (size_t)b->n_layers * b->layer_bytes;
    b->weights = map_memory(b->weights_bytes, pages);
    fill_weights((uint16_t *)(void *)b->weights, b->weights_bytes / 2);
    b->peaks = peaks_create(b->pool, b->weights, b->weights_bytes, 2 * d);
    if (!b->peaks) {
        fail("not enough memory for the read patterns");
    }
}

static void make_activations(struct bench *b) {
    const struct shape *s = b->shape;
    size_t r = (size_t)b->max_rows, d = (size_t)s->dim, f = (size_t)s->ffn_dim,
           n = r * sizeof(float);
    size_t n_logits = r < CHUNK_ROWS ? r : CHUNK_ROWS;
    b->x = zeros(n * d);
    b->normed = zeros(n * d);
    b->qkv = zeros(n * qkv_rows(s));
    b->mixed = zeros(n * d);
    b->gate_up = zeros(n * 2 * f);
    b->hidden = zeros(n * f);
    b->angles = zeros(n * (size_t)head_dim(s));
    b->inv_freq = zeros((size_t)head_dim(s) * sizeof(float));
    b->logits = zeros(n_logits * (size_t)s->vocab * sizeof(float));
    b->gain = zeros(d * sizeof *b->gain);
    b->token = zeros(n);
    b->slot = zeros(n);
    b->pos = zeros(n);
    rope_inv_freq(b->inv_freq, head_dim(s), 10000.0f);
    for (size_t i = 0; i < d; i++) {
        b->gain[i] = 0x3c00; /* 1 */
    }
    for (size_t i = 0; i < r; i++) {
        b->token[i] = (int32_t)(i * 7919 % (size_t)s->vocab);
    }
}

/* Laid out like the cache of a model. It is filled, so that attention does not read the page of
 * zeros. */
static void make_kv(struct bench *b) {
    const struct shape *s = b->shape;
    struct kv_cache *kv = &b->kv;
    *kv = (struct kv_cache){.n_slots = 1,
                            .n_layers = b->n_layers,
                            .n_kv_heads = s->n_kv_heads,
                            .head_dim = head_dim(s)};
    kv->n_positions = N_POSITIONS;
    kv->pos_bytes = 2 * (size_t)kv->head_dim;
    kv->head_bytes = ((N_POSITIONS * kv->pos_bytes + 63) / 64 | 1) * 64;
    kv->plane_bytes = (size_t)s->n_kv_heads * kv->head_bytes;
    kv->layer_bytes = 2 * kv->plane_bytes;
    kv->slot_bytes = ((size_t)b->n_layers * kv->layer_bytes + 4095) / 4096 * 4096;
    b->kv_bytes = kv->slot_bytes;
    struct bpo_error err;
    kv->data = b->kernels->alloc(b->backend[0], b->kv_bytes, MEMORY_LAZY, &err);
    check(!kv->data, &err);
    fill_weights(kv->data, b->kv_bytes / 2);
}

static void add_case(struct bench *b, int backend, enum bpo_matmul matmul, const char *simd,
                     enum span_kind kind, int32_t n, int32_t pos) {
    if (b->n_cases == MAX_CASES) {
        fail("too many cases");
    }
    b->cases[b->n_cases++] = (struct step_case){
        .simd = simd, .matmul = matmul, .kind = kind, .n = n, .pos = pos, .backend = backend};
    b->max_rows = n > b->max_rows ? n : b->max_rows;
}

/* A backend with its cases; false if this CPU does not have the level. */
static bool add_backend(struct bench *b, int at, const char *simd, enum bpo_matmul matmul,
                        bool prompts_only) {
    static const int32_t rows[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64},
                         prompts[] = {48, 96, 512};
    struct backend_options options = {.n_threads = b->n_threads, .matmul = matmul};
    struct backend_info info;
    struct bpo_error err = {0};
    if (simd) {
        (void)setenv("BPO_SIMD", simd, 1);
    }
    b->backend[at] = b->kernels->create(&options, &err);
    if (!b->backend[at]) {
        (void)fprintf(stderr, "kernels_bench: skipping %s: %s\n", simd ? simd : "the backend",
                      err.message);
        return false;
    }
    b->kernels->info(b->backend[at], &info);
    for (size_t i = 0; !prompts_only && i < sizeof rows / sizeof *rows; i++) {
        add_case(b, at, info.matmul, info.simd, ROWS_DECODE, rows[i], 64);
    }
    for (int32_t pos = 999; at == 0 && pos <= 1999; pos += 1000) {
        add_case(b, at, info.matmul, info.simd, ROWS_DECODE, 1, pos);
    }
    for (size_t i = 0; i < sizeof prompts / sizeof *prompts; i++) {
        add_case(b, at, info.matmul, info.simd, ROWS_PROMPT, prompts[i], 0);
    }
    return true;
}

/* ---------------------------------------------------------------- results */

static const char *case_name(const struct step_case *c) {
    return c->matmul == BPO_MATMUL_OPENBLAS && c->kind == ROWS_PROMPT ? "openblas" : c->simd;
}

/* Bytes of weights that the matmuls of a step read, for all layers of the shape. */
static double step_bytes(const struct bench *b) {
    return (double)b->layer_bytes * b->shape->n_layers + (double)b->head_bytes;
}

static double step_flop(const struct bench *b, const struct step_case *c) {
    return (double)b->layer_bytes * b->shape->n_layers * c->n +
           (double)b->head_bytes * (c->kind == ROWS_PROMPT ? 1 : c->n);
}

static int best_of(const struct series *series, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        best = median(&series[i]) > median(&series[best]) ? i : best;
    }
    return best;
}

/* what / seconds / 10^9, round by round. */
static struct series speed(double what, const struct series *seconds) {
    struct series s = {.n = 0};
    for (int i = 0; i < seconds->n; i++) {
        add(&s, what / seconds->value[i] * 1e-9);
    }
    return s;
}

/* The one-row case of the same level, at the same position. */
static const struct step_case *one_row(const struct bench *b, const struct step_case *c) {
    for (int i = 0; i < b->n_cases; i++) {
        const struct step_case *other = &b->cases[i];
        if (other->n == 1 && other->pos == 64 && other->backend == c->backend) {
            return other;
        }
    }
    return NULL;
}

/* Figures of a case that are derived from its times. */
struct figures {
    struct series gb_s, bandwidth_share, gflop_s, fma_share, step_fma_share, cost, step_cost;
};

static struct figures figures_of(const struct bench *b, const struct step_case *c) {
    const struct step_case *one = one_row(b, c);
    struct figures f = {.gb_s = speed(step_bytes(b), &c->matmul_s),
                        .gflop_s = speed(step_flop(b, c), &c->matmul_s)};
    struct series whole = speed(step_flop(b, c), &c->step);
    f.bandwidth_share = ratio(&f.gb_s, &b->read[best_of(b->read, PEAK_PATTERNS)]);
    f.fma_share = ratio(&f.gflop_s, c->n > 1 ? &c->fma : &b->fma[0]);
    f.step_fma_share = ratio(&whole, c->n > 1 ? &c->fma : &b->fma[0]);
    if (one) {
        f.cost = ratio(&c->matmul_s, &one->matmul_s);
        f.step_cost = ratio(&c->step, &one->step);
    }
    return f;
}

static void print_peaks(const struct bench *b) {
    int best = best_of(b->read, PEAK_PATTERNS);
    (void)printf("shape %s: D %d L %d H %d HK %d F %d V %d; %.2f GB of weights a pass, %d layers "
                 "in memory; %d "
                 "threads, %d rounds\n\n",
                 b->shape->name, b->shape->dim, b->shape->n_layers, b->shape->n_heads,
                 b->shape->n_kv_heads, b->shape->ffn_dim, b->shape->vocab, step_bytes(b) * 1e-9,
                 b->n_layers, b->n_threads, b->n_rounds);
    (void)printf("%-32s %8s  %s\n", "reading", "GB/s", "quartiles");
    for (int i = 0; i < PEAK_PATTERNS; i++) {
        (void)printf("  %-30s %8.1f  %.1f to %.1f%s\n", peaks_pattern_name(i), median(&b->read[i]),
                     quantile(&b->read[i], 0.25), quantile(&b->read[i], 0.75),
                     i == best ? "   <- the limit below" : "");
    }
    (void)printf("%-32s %8s\n", "fp32 multiply-adds", "GFLOP/s");
    for (int i = 0; i < peaks_n_levels(b->peaks); i++) {
        (void)printf("  %-30s %8.1f  %.1f to %.1f\n", peaks_level_name(b->peaks, i),
                     median(&b->fma[i]), quantile(&b->fma[i], 0.25), quantile(&b->fma[i], 0.75));
    }
    (void)printf("%-32s %8s\n", "a number between two threads", "ns");
    (void)printf("  %-30s %8.0f  %.0f to %.0f\n", "there and back", median(&b->round_trip),
                 quantile(&b->round_trip, 0.25), quantile(&b->round_trip, 0.75));
    (void)printf("%-32s %8s\n", "an op of 1 us on all threads", "us");
    (void)printf("  %-30s %8.2f  at worst %.2f\n", "at once", 1e6 * median(&b->short_op_at_once),
                 1e6 * quantile(&b->short_op_at_once, 1));
    (void)printf("  %-30s %8.2f  at worst %.2f\n\n", "after 0.1 s of sleep",
                 1e6 * median(&b->short_op_after_sleep),
                 1e6 * quantile(&b->short_op_after_sleep, 1));
}

static void print_cases(const struct bench *b) {
    (void)printf("%-10s %-7s %5s %5s | %9s %7s %6s %8s %6s %6s %7s | %9s %6s %6s\n", "kernels",
                 "rows", "n", "at", "matmuls ms", "GB/s", "of BW", "GFLOP/s", "of FMA", "x 1row",
                 "spread", "step ms", "of FMA", "x 1row");
    for (int i = 0; i < b->n_cases; i++) {
        const struct step_case *c = &b->cases[i];
        struct figures f = figures_of(b, c);
        (void)printf("%-10s %-7s %5d %5d | %10.3f %7.1f %6.2f %8.1f %6.2f %6.2f %6.0f%% | %9.3f "
                     "%6.2f %6.2f\n",
                     case_name(c), c->kind == ROWS_PROMPT ? "prompt" : "decode", c->n, c->pos,
                     1e3 * median(&c->matmul_s), median(&f.gb_s), median(&f.bandwidth_share),
                     median(&f.gflop_s), median(&f.fma_share), median(&f.cost),
                     100 * (quantile(&c->matmul_s, 0.75) - quantile(&c->matmul_s, 0.25)) /
                         median(&c->matmul_s),
                     1e3 * median(&c->step), median(&f.step_fma_share), median(&f.step_cost));
    }
}

static void print_profiles(const struct bench *b) {
    (void)printf("\n%-10s %-7s %5s %5s |", "share of", "rows", "n", "at");
    for (int op = 0; op < N_OPS; op++) {
        (void)printf(" %9s", OP_NAMES[op]);
    }
    (void)printf("  (%% of the step)\n");
    for (int i = 0; i < b->n_cases; i++) {
        const struct step_case *c = &b->cases[i];
        if (c->n != 1 && c->n != 4 && c->n != 8 && c->kind == ROWS_DECODE) {
            continue;
        }
        (void)printf("%-10s %-7s %5d %5d |", case_name(c),
                     c->kind == ROWS_PROMPT ? "prompt" : "decode", c->n, c->pos);
        for (int op = 0; op < N_OPS; op++) {
            (void)printf(" %9.2f", 100 * median(&c->op[op]) / median(&c->step));
        }
        (void)printf("\n");
    }
    (void)printf("\nof BW: of the best reading pattern, in the same round. "
                 "of FMA: of the widest level's peak beside it.\n"
                 "x 1row: time over that of one row.\n");
}

static json_t *case_json(const struct bench *b, const struct step_case *c) {
    struct figures f = figures_of(b, c);
    json_t *ops = json_object();
    for (int op = 0; op < N_OPS; op++) {
        json_object_set_new(ops, OP_NAMES[op], series_json(&c->op[op]));
    }
    json_t *json = json_pack(
        "{s:s, s:s, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "kernels", case_name(c),
        "kind", c->kind == ROWS_PROMPT ? "prompt" : "decode", "rows", (int)c->n, "position",
        (int)c->pos, "matmul_s", series_json(&c->matmul_s), "step_s", series_json(&c->step), "gb_s",
        series_json(&f.gb_s), "bandwidth_share", series_json(&f.bandwidth_share), "gflop_s",
        series_json(&f.gflop_s), "fma_share", series_json(&f.fma_share), "step_fma_share",
        series_json(&f.step_fma_share), "op_s", ops);
    if (f.cost.n > 0) {
        json_object_set_new(json, "cost", series_json(&f.cost));
        json_object_set_new(json, "step_cost", series_json(&f.step_cost));
    }
    return json;
}

static void print_json(const struct bench *b) {
    json_t *reads = json_object(), *fma = json_object(), *cases = json_array();
    for (int i = 0; i < PEAK_PATTERNS; i++) {
        json_object_set_new(reads, peaks_pattern_name(i), series_json(&b->read[i]));
    }
    for (int i = 0; i < peaks_n_levels(b->peaks); i++) {
        json_object_set_new(fma, peaks_level_name(b->peaks, i), series_json(&b->fma[i]));
    }
    for (int i = 0; i < b->n_cases; i++) {
        json_array_append_new(cases, case_json(b, &b->cases[i]));
    }
    json_t *json =
        json_pack("{s:s, s:i, s:i, s:i, s:f, s:s, s:o, s:o, s:o, s:o, s:o, s:o}", "shape",
                  b->shape->name, "threads", b->n_threads, "rounds", b->n_rounds,
                  "layers_in_memory", b->n_layers, "pass_bytes", step_bytes(b), "best_read",
                  peaks_pattern_name(best_of(b->read, PEAK_PATTERNS)), "read_gb_s", reads,
                  "fma_gflop_s", fma, "round_trip_ns", series_json(&b->round_trip), "short_op_s",
                  series_json(&b->short_op_at_once), "short_op_after_sleep_s",
                  series_json(&b->short_op_after_sleep), "steps", cases);
    if (!json || json_dumpf(json, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) != 0) {
        fail("cannot write the JSON");
    }
    (void)printf("\n");
    json_decref(json);
}

/* ---------------------------------------------------------------- main */

static const char *const USAGE =
    "usage: kernels_bench [--shape tiny|15m|110m|1b|7b] [--threads N] [--rounds N] "
    "[--simd LEVEL,...] [--no-openblas] [--huge]\n"
    "                     [--json]\n"
    "  --simd      levels to compare, as BPO_SIMD names them (default: the best one)\n"
    "  --huge      weights in huge pages instead of the page cache\n";

struct arguments {
    const char *shape;
    char *simd;
    int n_threads, n_rounds;
    bool json, huge, openblas;
};

/* An integer from 1 to 1000; 0 if text is not one. */
static int count_of(const char *text) {
    char *end;
    long n = strtol(text, &end, 10);
    return end == text || *end != '\0' || n < 1 || n > 1000 ? 0 : (int)n;
}

static struct arguments parse(int argc, char **argv) {
    static const struct option options[] = {
        {"shape", required_argument, NULL, 's'},
        {"threads", required_argument, NULL, 't'},
        {"rounds", required_argument, NULL, 'r'},
        {"simd", required_argument, NULL, 'l'},
        {"no-openblas", no_argument, NULL, 'b'},
        {"huge", no_argument, NULL, 'g'},
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    struct arguments a = {
        .shape = "1b", .n_threads = threads_default(), .n_rounds = 7, .openblas = true};
    for (int code; (code = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (code) {
        case 's':
            a.shape = optarg;
            break;
        case 't':
            a.n_threads = count_of(optarg);
            break;
        case 'r':
            a.n_rounds = count_of(optarg);
            break;
        case 'l':
            a.simd = optarg;
            break;
        case 'b':
            a.openblas = false;
            break;
        case 'g':
            a.huge = true;
            break;
        case 'j':
            a.json = true;
            break;
        default:
            (void)fputs(USAGE, code == 'h' ? stdout : stderr);
            exit(code == 'h' ? 0 : 2);
        }
    }
    if (optind < argc || a.n_threads < 1 || a.n_rounds < 1 || a.n_rounds > MAX_ROUNDS) {
        (void)fputs(USAGE, stderr);
        exit(2);
    }
    return a;
}

static void make_backends(struct bench *b, struct arguments *a) {
    int n = 0;
    if (!a->simd) {
        n += add_backend(b, n, NULL, BPO_MATMUL_OWN, false);
    }
    for (char *rest = a->simd, *name;
         rest && n < MAX_BACKENDS - 1 && (name = strtok_r(rest, ",", &rest));) {
        n += add_backend(b, n, name, BPO_MATMUL_OWN, false);
    }
    if (n == 0) {
        fail("nothing to measure");
    }
    if (a->openblas) {
        (void)add_backend(b, n, NULL, BPO_MATMUL_OPENBLAS, true);
    }
}

int main(int argc, char **argv) {
    struct arguments a = parse(argc, argv);
    struct bench *b = calloc(1, sizeof *b);
    if (!b) {
        fail("not enough memory");
    }
    for (int i = 0; i < N_SHAPES; i++) {
        b->shape = strcmp(a.shape, SHAPES[i].name) == 0 ? &SHAPES[i] : b->shape;
    }
    if (!b->shape) {
        fail("no such shape: tiny, 15m, 110m, 1b or 7b");
    }
    b->n_threads = a.n_threads;
    b->n_rounds = a.n_rounds;
    b->flop_budget = 5e10;
    b->pool = threads_create(b->n_threads);
    if (!b->pool) {
        fail("cannot start the threads");
    }
    b->kernels = kernels_cpu();
    make_backends(b, &a);
    make_weights(b, a.huge ? PAGES_HUGE : PAGES_CACHE);
    make_activations(b);
    make_kv(b);
    measure_round(b); /* to warm up */
    forget(b);
    for (int round = 0; round < b->n_rounds; round++) {
        measure_round(b);
    }
    if (a.json) {
        print_json(b);
    } else {
        print_peaks(b);
        print_cases(b);
        print_profiles(b);
    }
    return 0; /* the system frees the memory */
}

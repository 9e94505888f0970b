/*
 * gpu_bench.c - measures how fast the GPU backend decodes and prefills a model of random weights,
 * and what the GPU's memory and its cuBLAS can do at best. Usage: gpu_bench [tiny]; JSON on stdout.
 * make gpu-check runs it with the shape of Llama-2-7b, which takes 15 GB.
 *
 * All work goes through the op table, in the order of forward() in bpo.c, and steps are recorded
 * and replayed as in the engine.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cuda_library.h"
#include "base/clock.h"

struct shape {
    size_t dim, ffn_dim, vocab;
    int32_t n_layers, n_heads, n_kv_heads, head_dim, n_positions, n_prompt;
    size_t copy_bytes;
};
static const struct shape LLAMA_7B = {4096, 11008, 32000, 32,  32,
                                      32,   128,   2048,  512, (size_t)1 << 30};
static const struct shape TINY = {64, 96, 400, 2, 4, 2, 16, 128, 40, 1 << 16};

enum { MAX_ROWS = 256, SLOTS = 32 };

struct model {
    struct shape shape;
    struct weight embedding, norm, lm_head;
    struct weight *layers; /* [L][4]: qkv, o, gate_up, down */
    size_t weight_bytes;   /* read by each step */
    float *x, *normed, *qkv, *mixed, *gate_up, *hidden, *angles, *inv_freq, *logits;
    int32_t *token, *slot, *pos;
    struct kv_cache kv;
};

static const struct kernels *k;
static struct backend *b;
static struct bpo_error err;

/* Ends the program if a call has failed. */
static void check(int failed) {
    if (failed) {
        (void)fprintf(stderr, "gpu_bench: %s\ngpu_bench: hint: %s\n", err.message, err.hint);
        exit(1);
    }
}

static void *device_alloc(size_t n_bytes) {
    void *data = k->alloc(b, n_bytes, MEMORY_BUFFER, &err);
    check(!data);
    return data;
}

/* Random fp16 numbers of about 2^-6: one block of them, repeated. */
static struct weight random_weight(struct model *m, size_t rows, size_t cols) {
    enum { N_RANDOM = 1 << 22 };
    static uint16_t block[N_RANDOM];
    static uint32_t random = 1;
    for (size_t i = 0; i < N_RANDOM && block[N_RANDOM - 1] == 0; i++) {
        random = random * 1664525U + 1013904223U;
        block[i] = (uint16_t)((random >> 16 & 0x83ff) | 0x2400);
    }
    size_t n_bytes = 2 * rows * cols;
    char *data = device_alloc(n_bytes);
    for (size_t at = 0; at < n_bytes; at += sizeof block) {
        check(k->upload(b, data + at, block,
                        n_bytes - at < sizeof block ? n_bytes - at : sizeof block, &err));
    }
    m->weight_bytes += n_bytes;
    return (struct weight){
        .data = data, .dtype = DTYPE_F16, .rows = rows, .cols = cols, .row_bytes = 2 * cols};
}

static void model_make(struct model *m, const struct shape *s) {
    size_t q = (size_t)s->n_heads * (size_t)s->head_dim,
           kv = (size_t)s->n_kv_heads * (size_t)s->head_dim, d = s->dim;
    const size_t max_rows = MAX_ROWS;
    *m = (struct model){.shape = *s};
    m->embedding = random_weight(m, s->vocab, d);
    m->weight_bytes = 0; /* not counted: a step reads a few rows only */
    m->norm = random_weight(m, 1, d);
    m->lm_head = random_weight(m, s->vocab, d);
    m->layers = calloc(4 * (size_t)s->n_layers, sizeof *m->layers);
    check(!m->layers);
    for (int32_t l = 0; l < s->n_layers; l++) {
        struct weight *w = m->layers + (ptrdiff_t)(4 * l);
        w[0] = random_weight(m, q + 2 * kv, d);
        w[1] = random_weight(m, d, q);
        w[2] = random_weight(m, 2 * s->ffn_dim, d);
        w[3] = random_weight(m, d, s->ffn_dim);
    }
    m->x = device_alloc(4 * max_rows * d);
    m->normed = device_alloc(4 * max_rows * d);
    m->qkv = device_alloc(4 * max_rows * (q + 2 * kv));
    m->mixed = device_alloc(4 * max_rows * q);
    m->gate_up = device_alloc(4 * max_rows * 2 * s->ffn_dim);
    m->hidden = device_alloc(4 * max_rows * s->ffn_dim);
    m->angles = device_alloc(4 * max_rows * (size_t)s->head_dim);
    m->logits = device_alloc(4 * (size_t)SLOTS * s->vocab);
    m->token = device_alloc(4 * max_rows);
    m->slot = device_alloc(4 * max_rows);
    m->pos = device_alloc(4 * max_rows);
    float inv_freq[512];
    rope_inv_freq(inv_freq, s->head_dim, 10000.0f);
    m->inv_freq = device_alloc(sizeof inv_freq);
    check(k->upload(b, m->inv_freq, inv_freq, sizeof inv_freq, &err));
    struct kv_cache *c = &m->kv;
    *c = (struct kv_cache){.n_slots = SLOTS,
                           .n_layers = s->n_layers,
                           .n_kv_heads = s->n_kv_heads,
                           .head_dim = s->head_dim};
    c->n_positions = s->n_positions;
    c->pos_bytes = 2 * (size_t)s->head_dim;
    c->head_bytes = (size_t)s->n_positions * c->pos_bytes + 64;
    c->plane_bytes = (size_t)s->n_kv_heads * c->head_bytes;
    c->layer_bytes = 2 * c->plane_bytes;
    c->slot_bytes = (size_t)s->n_layers * c->layer_bytes;
}

/* One forward pass over the rows; only_matmuls: without all other ops. */
static void forward(const struct model *m, const struct rows *rows, uint64_t shape,
                    int32_t n_wanted, bool only_matmuls) {
    const struct shape *s = &m->shape;
    const struct rows wanted = {.n = n_wanted};
    const int32_t n = rows->n;
    if (k->step_begin(b, shape)) {
        k->embed(b, m->x, &m->embedding, rows);
        k->rope_angles(b, m->angles, m->inv_freq, rows, s->head_dim);
        for (int32_t l = 0; l < s->n_layers; l++) {
            const struct weight *w = m->layers + (ptrdiff_t)(4 * l);
            if (only_matmuls) {
                k->matmul(b, m->qkv, m->normed, &w[0], rows, MATMUL_STORE);
                k->matmul(b, m->x, m->mixed, &w[1], rows, MATMUL_STORE);
                k->matmul(b, m->gate_up, m->normed, &w[2], rows, MATMUL_STORE);
                k->matmul(b, m->x, m->hidden, &w[3], rows, MATMUL_STORE);
                continue;
            }
            k->rmsnorm(b, m->normed, m->x, &m->norm, n, 1e-5f);
            k->matmul(b, m->qkv, m->normed, &w[0], rows, MATMUL_STORE);
            k->rope_kv(b, m->qkv, &m->kv, m->angles, rows, l, s->n_heads);
            k->attention(b, m->mixed, m->qkv, &m->kv, rows, l, s->n_heads);
            k->matmul(b, m->x, m->mixed, &w[1], rows, MATMUL_ADD);
            k->rmsnorm(b, m->normed, m->x, &m->norm, n, 1e-5f);
            k->matmul(b, m->gate_up, m->normed, &w[2], rows, MATMUL_STORE);
            k->swiglu(b, m->hidden, m->gate_up, n, (int32_t)s->ffn_dim);
            k->matmul(b, m->x, m->hidden, &w[3], rows, MATMUL_ADD);
        }
        k->rmsnorm(b, m->normed, m->x, &m->norm, n, 1e-5f);
        k->matmul(b, m->logits, m->normed, &m->lm_head, &wanted, MATMUL_STORE);
    }
    check(k->step_end(b, &err));
}

static void wait_for_gpu(const struct model *m) {
    float value;
    check(k->download(b, &value, m->logits, sizeof value, &err));
}

/* Seconds per step of n rows, one per slot, all at position `at`. */
static double decode_seconds(const struct model *m, int32_t n, int32_t at, int repeats) {
    int32_t token[MAX_ROWS], slot[MAX_ROWS], pos[MAX_ROWS];
    for (int32_t i = 0; i < n; i++) {
        token[i] = 7 * i + 1;
        slot[i] = i;
        pos[i] = at;
    }
    check(k->upload(b, m->token, token, (size_t)n * 4, &err));
    check(k->upload(b, m->slot, slot, (size_t)n * 4, &err));
    check(k->upload(b, m->pos, pos, (size_t)n * 4, &err));
    const struct rows rows = {n, m->token, m->slot, m->pos, NULL, 0, NULL};
    double begun = 0;
    /* Three steps warm up: one runs as it is, one is recorded, one is replayed. */
    for (int i = -3; i < repeats; i++) {
        if (i == 0) {
            wait_for_gpu(m);
            begun = seconds_now();
        }
        forward(m, &rows, (uint64_t)n, n, false);
    }
    wait_for_gpu(m);
    return (seconds_now() - begun) / repeats;
}

/* Seconds per prompt, in calls of up to MAX_ROWS rows, as the engine makes them. */
static double prompt_seconds(const struct model *m, bool only_matmuls, int repeats) {
    int32_t token[MAX_ROWS], slot[MAX_ROWS] = {0}, pos[MAX_ROWS];
    double begun = 0;
    for (int i = -2; i < repeats; i++) {
        if (i == 0) {
            wait_for_gpu(m);
            begun = seconds_now();
        }
        for (int32_t at = 0, n; at < m->shape.n_prompt; at += n) {
            n = m->shape.n_prompt - at < MAX_ROWS ? m->shape.n_prompt - at : MAX_ROWS;
            for (int32_t r = 0; r < n; r++) {
                token[r] = (at + r) % 400;
                pos[r] = at + r;
            }
            check(k->upload(b, m->token, token, (size_t)n * 4, &err));
            check(k->upload(b, m->slot, slot, (size_t)n * 4, &err));
            check(k->upload(b, m->pos, pos, (size_t)n * 4, &err));
            const struct span span = {0, n, ROWS_PROMPT};
            const struct rows rows = {n, m->token, m->slot, m->pos, &span, 1, NULL};
            forward(m, &rows, 0, 1, only_matmuls);
        }
    }
    wait_for_gpu(m);
    return (seconds_now() - begun) / repeats;
}

/* Bytes per second that a plain copy within the GPU's memory reads and writes: the attainable
 * rate. */
static double copy_bandwidth(const struct model *m, int repeats) {
    struct kv_cache c = {.n_slots = 2, .n_layers = 1, .n_kv_heads = 1, .head_dim = 512};
    c.pos_bytes = 1024;
    c.n_positions = (int32_t)(m->shape.copy_bytes / c.pos_bytes);
    c.head_bytes = c.plane_bytes = m->shape.copy_bytes;
    c.layer_bytes = c.slot_bytes = 2 * c.plane_bytes;
    c.data = device_alloc(2 * c.slot_bytes);
    double begun = 0;
    for (int i = -2; i < repeats; i++) {
        if (i == 0) {
            wait_for_gpu(m);
            begun = seconds_now();
        }
        check(k->kv_copy(b, &c, 1, 0, c.n_positions, &err));
    }
    wait_for_gpu(m);
    double seconds = (seconds_now() - begun) / repeats;
    k->free(b, c.data, 2 * c.slot_bytes);
    return 2.0 * 2.0 * (double)m->shape.copy_bytes / seconds;
}

int main(int argc, char **argv) {
    const bool tiny = argc > 1 && strcmp(argv[1], "tiny") == 0;
    const int repeats = tiny ? 1 : 30;
    struct model m;
    struct backend_info info;
    bool found;
    k = backend_cuda(&found, &err);
    check(!k);
    b = k->create(&(struct backend_options){.n_threads = 1}, &err);
    check(!b);
    k->info(b, &info);
    model_make(&m, tiny ? &TINY : &LLAMA_7B);
    const double bandwidth = copy_bandwidth(&m, tiny ? 1 : 10);
    m.kv.data = device_alloc(SLOTS * m.kv.slot_bytes);
    printf("{\"shape\": \"%s\", \"arch\": \"%s\", \"blas\": \"%s\", \"weight_bytes\": %zu, "
           "\"copy_gb_s\": %.1f,\n "
           "\"decode\": [",
           tiny ? "tiny" : "llama-2-7b", info.simd, info.blas, m.weight_bytes, bandwidth * 1e-9);
    (void)prompt_seconds(&m, false, 1); /* fills the KV cache with finite numbers */
    const char *comma = "";
    const int32_t positions[] = {32, m.shape.n_positions - 1};
    for (size_t p = 0; p < sizeof positions / sizeof positions[0]; p++) {
        for (int32_t n = 1; n <= SLOTS; n *= 2) {
            double seconds = decode_seconds(&m, n, positions[p], repeats);
            double kv_bytes = (double)n * (double)(positions[p] + 1) * 2.0 *
                              (double)m.shape.n_layers * (double)m.shape.n_kv_heads *
                              (double)m.kv.pos_bytes;
            double rate = ((double)m.weight_bytes + kv_bytes) / seconds;
            printf("%s\n  {\"rows\": %d, \"position\": %d, \"ms\": %.4f, \"tokens_s\": %.1f, "
                   "\"gb_s\": %.1f, "
                   "\"percent\": %.1f}",
                   comma, n, positions[p], seconds * 1e3, (double)n / seconds, rate * 1e-9,
                   100 * rate / bandwidth);
            comma = ",";
        }
    }
    double whole = prompt_seconds(&m, false, repeats), matmuls = prompt_seconds(&m, true, repeats);
    printf("],\n \"prefill\": {\"tokens\": %d, \"ms\": %.3f, \"tokens_s\": %.1f, \"matmuls_ms\": "
           "%.3f, "
           "\"percent_of_matmuls\": %.1f}}\n",
           m.shape.n_prompt, whole * 1e3, (double)m.shape.n_prompt / whole, matmuls * 1e3,
           100 * matmuls / whole);
    free(m.layers);
    k->destroy(b);
    return 0;
}

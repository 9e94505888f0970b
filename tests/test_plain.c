/*
 * test_plain.c - the plain ops of bpo.c against those of the CPU backend, bit for bit: every op, at
 * every SIMD level and on one and three threads, over odd sizes; then whole forward passes of a
 * tiny model. Mutants, plain ops that are wrong on purpose, must be seen.
 */
#include "../bpo.c"

#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

#include "op_inputs.h"
#include "tiny_session.h"

enum { MAX_COLUMNS = 2100, MAX_CPUS = 8 };

/* A CPU backend: a SIMD level, and a number of threads. */
struct cpu {
    const char *simd;
    int32_t n_threads;
    struct backend *backend;
};
static struct cpu own_cpus[MAX_CPUS], openblas_cpus[MAX_CPUS]; /* who multiplies prompts */
static size_t n_cpus;                                          /* of each */

static const struct kernels *plain; /* kernels_plain(), or a mutant of it */
static struct backend plain_backend;

/* The results of a comparison. */
static size_t n_compared, n_different;
static char first_difference[256];

/* Compares what a CPU backend has computed with the plain result, bit by bit. format and its
 * arguments name the result. */
__attribute__((format(printf, 5, 6))) static void compare(const void *expected, const void *got,
                                                          size_t n_bytes, const struct cpu *cpu,
                                                          const char *format, ...) {
    n_compared++;
    if (memcmp(expected, got, n_bytes) == 0 || n_different++ > 0) {
        return;
    }
    char what[160];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    (void)snprintf(first_difference, sizeof first_difference, "%s: %s, %d threads", what, cpu->simd,
                   cpu->n_threads);
}

static void run_comparison(void (*comparison)(void), const struct kernels *table) {
    plain = table;
    n_compared = n_different = 0;
    random_state = 1;
    comparison();
    assert_true(n_compared >= n_cpus);
}

static void expect_equal(void (*comparison)(void)) {
    run_comparison(comparison, kernels_plain());
    if (n_different > 0) {
        fail_msg("%zu of %zu results differ; the first: %s", n_different, n_compared,
                 first_difference);
    }
}

/* A copy of n floats, to be freed by the caller. */
static float *copy_of(const float *x, size_t n) {
    float *copy = must_alloc(n * sizeof *copy);
    memcpy(copy, x, n * sizeof *copy);
    return copy;
}

/* ---------------------------------------------------------------- the backends */

static struct backend *cpu_create(const char *simd, int32_t n_threads, enum bpo_matmul matmul) {
    struct bpo_error err = {0};
    const struct backend_options options = {.n_threads = n_threads, .matmul = matmul};
    (void)setenv("BPO_SIMD", simd, 1);
    struct backend *b = kernels_cpu()->create(&options, &err);
    (void)unsetenv("BPO_SIMD");
    return b;
}

/* Creates the backends: for each SIMD level of this CPU with each number of threads. */
static int create_backends(void **state) {
    static const char *const levels[] = {"scalar", "avx2", "avx512", "neon"};
    (void)state;
    for (size_t i = 0; i < 2 * COUNT(levels); i++) {
        const struct cpu cpu = {.simd = levels[i / 2], .n_threads = i % 2 ? 3 : 1};
        struct backend *own = cpu_create(cpu.simd, cpu.n_threads, BPO_MATMUL_OWN);
        if (!own) { /* this CPU lacks the level */
            continue;
        }
        own_cpus[n_cpus] = openblas_cpus[n_cpus] = cpu;
        own_cpus[n_cpus].backend = own;
        openblas_cpus[n_cpus++].backend = cpu_create(cpu.simd, cpu.n_threads, BPO_MATMUL_OPENBLAS);
    }
    plain_backend.widened = must_alloc((size_t)OPENBLAS_PANEL * MAX_COLUMNS * sizeof(float));
    for (size_t c = 0; c < n_cpus; c++) {
        assert_non_null(openblas_cpus[c].backend);
        assert_int_equal(kernels_cpu()->step_begin(own_cpus[c].backend, 0), 1);
        assert_int_equal(kernels_cpu()->step_begin(openblas_cpus[c].backend, 0), 1);
    }
    return n_cpus >= 2 ? 0 : -1; /* every CPU has the scalar level */
}

static int destroy_backends(void **state) {
    struct bpo_error err = {0};
    (void)state;
    for (size_t c = 0; c < 2 * n_cpus; c++) {
        struct backend *b = (c % 2 ? openblas_cpus : own_cpus)[c / 2].backend;
        assert_int_equal(kernels_cpu()->step_end(b, &err), 0);
        kernels_cpu()->destroy(b);
    }
    free(plain_backend.widened);
    return 0;
}

/* ---------------------------------------------------------------- row by row */

static void compare_embed(void) {
    enum { V = 37, R = 33 };
    int32_t token[R];
    for (size_t i = 0; i < R; i++) {
        token[i] = (int32_t)(random_bits() % V);
    }
    const struct rows rows = {.n = R, .token = token};
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t dim = odd_sizes[s], n = R * dim;
        uint16_t *data = random_f16(V, dim, dim + 3, 1);
        float *expected = must_alloc(n * 4), *got = must_alloc(n * 4);
        const struct weight table = weight_of(data, V, dim, dim + 3);
        plain->embed(&plain_backend, expected, &table, &rows);
        for (size_t c = 0; c < n_cpus; c++) {
            kernels_cpu()->embed(own_cpus[c].backend, got, &table, &rows);
            compare(expected, got, n * 4, &own_cpus[c], "embed of %zu", dim);
        }
        free(data);
        free(expected);
        free(got);
    }
}

static void compare_rmsnorm(void) {
    enum { R = 9 };
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t dim = odd_sizes[s], n = R * dim;
        float *x = random_floats(n, 3), *expected = must_alloc(n * 4), *got = must_alloc(n * 4);
        uint16_t *data = random_f16(1, dim, dim, 1);
        memset(x, 0, dim * 4); /* a row of zeros stays zeros */
        const struct weight gain = weight_of(data, 1, dim, dim);
        plain->rmsnorm(&plain_backend, expected, x, &gain, R, 1e-5f);
        for (size_t c = 0; c < n_cpus; c++) {
            kernels_cpu()->rmsnorm(own_cpus[c].backend, got, x, &gain, R, 1e-5f);
            compare(expected, got, n * 4, &own_cpus[c], "rmsnorm of %zu", dim);
        }
        free(x);
        free(expected);
        free(got);
        free(data);
    }
}

static void compare_swiglu(void) {
    enum { R = 5 };
    const float special[] = {0.0f,   -0.0f, 1e-30f, -1e-30f, 88.0f,  -86.9f,
                             -87.1f, 1e4f,  -1e4f,  3e38f,   -3e38f, -1.0f};
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t dim = odd_sizes[s], n = R * dim;
        float *x = random_floats(2 * n, 6), *expected = must_alloc(n * 4), *got = must_alloc(n * 4);
        for (size_t i = 0; i < dim && i < COUNT(special); i++) {
            x[i] = special[i];
        }
        plain->swiglu(&plain_backend, expected, x, R, (int32_t)dim);
        for (size_t c = 0; c < n_cpus; c++) {
            kernels_cpu()->swiglu(own_cpus[c].backend, got, x, R, (int32_t)dim);
            compare(expected, got, n * 4, &own_cpus[c], "swiglu of %zu", dim);
        }
        free(x);
        free(expected);
        free(got);
    }
}

static void compare_gather(void) {
    enum { R = 9 };
    static const int32_t index[] = {8, 0, 3, 3, 7};
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t dim = odd_sizes[s], n = COUNT(index) * dim;
        float *x = random_floats(R * dim, 1), *expected = must_alloc(n * 4),
              *got = must_alloc(n * 4);
        plain->gather(&plain_backend, expected, x, index, COUNT(index), (int32_t)dim);
        for (size_t c = 0; c < n_cpus; c++) {
            kernels_cpu()->gather(own_cpus[c].backend, got, x, index, COUNT(index), (int32_t)dim);
            compare(expected, got, n * 4, &own_cpus[c], "gather of %zu", dim);
        }
        free(x);
        free(expected);
        free(got);
    }
}

/* ---------------------------------------------------------------- matmul */

struct matmul_case {
    int32_t n_rows;
    size_t n, k, stride; /* rows and columns of the weight; elements from one row to the next */
    float scale;         /* of x */
};

/* kind ROWS_PROMPT: the rows are one chunk of a prompt. */
static void compare_matmul_case(const struct matmul_case *m, const struct cpu *cpus,
                                enum span_kind kind) {
    const struct span span = {.first = 0, .n = m->n_rows, .kind = kind};
    const struct rows rows = {.n = m->n_rows, .spans = &span, .n_spans = 1};
    size_t n_rows = (size_t)m->n_rows, n = n_rows * m->n;
    float *x = random_floats(n_rows * m->k, m->scale), *start = random_floats(n, 1);
    uint16_t *data = random_f16(m->n, m->k, m->stride, 0.1f);
    const struct weight w = weight_of(data, m->n, m->k, m->stride);
    plain_backend.openblas = cpus == openblas_cpus;
    for (int mode = MATMUL_STORE; mode <= MATMUL_ADD; mode++) {
        float *expected = copy_of(start, n);
        plain->matmul(&plain_backend, expected, x, &w, &rows, (enum matmul_mode)mode);
        for (size_t c = 0; c < n_cpus; c++) {
            float *got = copy_of(start, n);
            kernels_cpu()->matmul(cpus[c].backend, got, x, &w, &rows, (enum matmul_mode)mode);
            compare(expected, got, n * 4, &cpus[c], "matmul, %s, %d rows, weight %zu x %zu",
                    mode == MATMUL_ADD ? "add" : "store", m->n_rows, m->n, m->k);
            free(got);
        }
        free(expected);
    }
    free(x);
    free(start);
    free(data);
}

static void compare_matmul(void) {
    for (size_t i = 0; i < COUNT(row_counts); i++) {
        const struct matmul_case cases[] = {
            {row_counts[i], 30, 100, 100, 1},   {row_counts[i], 33, 65, 72, 1},
            {row_counts[i], 1, 1, 1, 1},        {row_counts[i], 67, 24, 24, 1},
            {row_counts[i], 5, 37, 37, 1e-38f}, /* subnormal products */
        };
        for (size_t j = 0; j < COUNT(cases); j++) {
            compare_matmul_case(&cases[j], own_cpus, j % 2 ? ROWS_PROMPT : ROWS_DECODE);
        }
    }
    for (size_t i = 0; i < COUNT(odd_sizes); i++) {
        size_t k = odd_sizes[i];
        compare_matmul_case(&(struct matmul_case){1 + (int32_t)i % 4, 7, k, k + 1, 1}, own_cpus,
                            ROWS_DECODE);
        compare_matmul_case(&(struct matmul_case){7, 5, k, k, 1}, own_cpus, ROWS_PROMPT);
    }
    /* larger than a block of columns, and than a pass of rows */
    compare_matmul_case(&(struct matmul_case){9, 9, MAX_COLUMNS, MAX_COLUMNS, 1}, own_cpus,
                        ROWS_DECODE);
    compare_matmul_case(&(struct matmul_case){1, 200, MAX_COLUMNS, MAX_COLUMNS, 1}, own_cpus,
                        ROWS_DECODE);
    compare_matmul_case(&(struct matmul_case){97, 21, 40, 40, 1}, own_cpus, ROWS_PROMPT);
}

/* One chunk of a prompt through OpenBLAS; decoding rows never go there. */
static void compare_matmul_openblas(void) {
    static const int32_t chunks[] = {1, 2, 5, 17, 31, 63, CHUNK_ROWS};
    for (size_t i = 0; i < COUNT(chunks); i++) {
        const struct matmul_case cases[] = {{chunks[i], 300, 136, 136, 1},
                                            {chunks[i], 129, 65, 67, 1},
                                            {chunks[i], 7, 1027, 1027, 1}};
        for (size_t j = 0; j < COUNT(cases); j++) {
            compare_matmul_case(&cases[j], openblas_cpus, ROWS_PROMPT);
            compare_matmul_case(&cases[j], openblas_cpus, ROWS_DECODE);
        }
    }
}

/* ---------------------------------------------------------------- RoPE and attention */

/* Grouped-query and multi-head attention. */
static const struct heads shapes[] = {{6, 2, 24},  {3, 1, 6},  {4, 4, 40},  {8, 2, 80}, {20, 2, 2},
                                      {2, 1, 128}, {5, 5, 64}, {16, 8, 80}, {7, 7, 10}};

enum { SLOTS = 2, LAYERS = 2, LAYER = 1, POSITIONS = 301 };

/* A KV cache full of NaNs: every byte is 0x7e. The caller frees its data. */
static struct kv_cache kv_make(const struct heads *s, size_t *n_bytes) {
    const struct bpo_model_info info = {
        .n_layers = LAYERS, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    struct kv_cache kv;
    assert_int_equal(kv_layout(&kv, &info, SLOTS, POSITIONS, n_bytes, NULL), 0);
    kv.data = must_alloc(*n_bytes);
    memset(kv.data, 0x7e, *n_bytes);
    return kv;
}

static const int32_t positions[] = {0, 1, 2, 15, 16, 17, 127, 128, 129, 300, 0, 3, 64};
static const int32_t slots[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1};
enum { N_ROWS = COUNT(positions) };
static const struct rows kv_rows = {.n = N_ROWS, .slot = slots, .pos = positions};

static void compare_rope_angles(void) {
    static const int32_t pos[] = {0, 1, 2, 127, 128, 1000, 4095, 4096, 100000, 1 << 23};
    const struct rows rows = {.n = COUNT(pos), .pos = pos};
    for (size_t s = 0; s < COUNT(shapes); s++) {
        float inv_freq[64], expected[COUNT(pos) * 128], got[COUNT(pos) * 128];
        int32_t hd = shapes[s].head_dim;
        size_t n_bytes = COUNT(pos) * (size_t)hd * 4;
        rope_inv_freq(inv_freq, hd, 10000.0f);
        plain->rope_angles(&plain_backend, expected, inv_freq, &rows, hd);
        for (size_t c = 0; c < n_cpus; c++) {
            kernels_cpu()->rope_angles(own_cpus[c].backend, got, inv_freq, &rows, hd);
            compare(expected, got, n_bytes, &own_cpus[c], "rope_angles, head size %d", hd);
        }
    }
}

/* Compares the queries, and every byte of the cache. */
static void compare_rope_kv(void) {
    for (size_t s = 0; s < COUNT(shapes); s++) {
        const struct heads *shape = &shapes[s];
        size_t hd = (size_t)shape->head_dim, q = (size_t)shape->n_heads * hd, n_kv;
        size_t width = q + 2 * (size_t)shape->n_kv_heads * hd;
        float *qkv = random_floats(N_ROWS * width, 2), *expected = copy_of(qkv, N_ROWS * width);
        float inv_freq[64], angles[N_ROWS * 128];
        struct kv_cache kv = kv_make(shape, &n_kv);
        rope_inv_freq(inv_freq, shape->head_dim, 10000.0f);
        rope_angles(&plain_backend, angles, inv_freq, &kv_rows, shape->head_dim);
        plain->rope_kv(&plain_backend, expected, &kv, angles, &kv_rows, LAYER, shape->n_heads);
        for (size_t c = 0; c < n_cpus; c++) {
            struct kv_cache got_kv = kv_make(shape, &n_kv);
            float *got = copy_of(qkv, N_ROWS * width);
            kernels_cpu()->rope_kv(own_cpus[c].backend, got, &got_kv, angles, &kv_rows, LAYER,
                                   shape->n_heads);
            for (size_t r = 0; r < N_ROWS; r++) {
                compare(expected + r * width, got + r * width, q * 4, &own_cpus[c],
                        "rope_kv's queries, head size %zu, position %d", hd, positions[r]);
            }
            compare(kv.data, got_kv.data, n_kv, &own_cpus[c], "rope_kv's cache, head size %zu", hd);
            free(got);
            free(got_kv.data);
        }
        free(qkv);
        free(expected);
        free(kv.data);
    }
}

/* scale is that of the queries: the larger, the sharper the softmax. */
static void compare_attention_case(const struct heads *shape, float scale) {
    size_t hd = (size_t)shape->head_dim, q = (size_t)shape->n_heads * hd, n_kv;
    size_t width = q + 2 * (size_t)shape->n_kv_heads * hd;
    float *qkv = random_floats(N_ROWS * width, scale);
    float *expected = must_alloc(N_ROWS * q * 4), *got = must_alloc(N_ROWS * q * 4);
    struct kv_cache kv = kv_make(shape, &n_kv);
    for (size_t r = 0; r < N_ROWS; r++) { /* only the positions that a row may read */
        for (int32_t i = 0; i < 2 * shape->n_kv_heads * (positions[r] + 1); i++) {
            int32_t head = i % (2 * shape->n_kv_heads), pos = i / (2 * shape->n_kv_heads);
            uint16_t *to = kv_at(&kv, slots[r], LAYER, head % 2, head / 2, pos);
            for (size_t d = 0; d < hd && to[d] == 0x7e7e; d++) {
                to[d] = narrow_f16(random_normal());
            }
        }
    }
    plain->attention(&plain_backend, expected, qkv, &kv, &kv_rows, LAYER, shape->n_heads);
    for (size_t c = 0; c < n_cpus; c++) {
        kernels_cpu()->attention(own_cpus[c].backend, got, qkv, &kv, &kv_rows, LAYER,
                                 shape->n_heads);
        for (size_t r = 0; r < N_ROWS; r++) {
            compare(expected + r * q, got + r * q, q * 4, &own_cpus[c],
                    "attention, %d heads on %d of size %zu, position %d", shape->n_heads,
                    shape->n_kv_heads, hd, positions[r]);
        }
    }
    for (size_t i = 0; i < N_ROWS * q; i++) {
        assert_true(isfinite(expected[i]));
    }
    free(qkv);
    free(expected);
    free(got);
    free(kv.data);
}

static void compare_attention(void) {
    for (size_t s = 0; s < COUNT(shapes); s++) {
        compare_attention_case(&shapes[s], 1);
    }
    compare_attention_case(&shapes[0], 8);
    compare_attention_case(&shapes[0], 1e-3f);
}

/* ---------------------------------------------------------------- the forward pass */

static struct bpo_model *model;

static int open_model(void **state) {
    char path[TEMPORARY_PATH];
    struct bpo_error err = {0};
    (void)state;
    temporary_path(path, "plain.bin");
    tiny_create(path, NULL);
    model = bpo_model_open(path, &err);
    (void)unlink(path); /* the model stays mapped */
    return model ? 0 : -1;
}

static int close_model(void **state) {
    (void)state;
    bpo_model_close(model);
    return 0;
}

/* One call of forward(): n rows of a slot, from a position on. */
struct step {
    int32_t n, slot, pos;
    enum span_kind kind;
};
static const struct step steps[] = {
    {CHUNK_ROWS, 0, 0, ROWS_PROMPT}, {CHUNK_ROWS, 0, 64, ROWS_PROMPT}, {9, 0, 128, ROWS_PROMPT},
    {17, 1, 0, ROWS_PROMPT},         {1, 0, 137, ROWS_DECODE},         {1, 1, 17, ROWS_DECODE},
    {5, 0, 138, ROWS_DECODE}, /* checks drafts */
    {1, 0, 143, ROWS_DECODE},
};
enum { MAX_ROWS = CHUNK_ROWS, MAX_WANTED = 3 };

/* Allocates all that forward() needs; every backend here reads host memory. */
static void llama_make(struct llama *m, const struct kernels *ops, struct backend *b, size_t *n_kv,
                       struct buffer table[N_ACTIVATIONS]) {
    *m = (struct llama){&model->info, ops, b, .weights = model->weights};
    assert_int_equal(kv_layout(&m->kv, &model->info, SLOTS, POSITIONS, n_kv, NULL), 0);
    m->kv.data = must_alloc(*n_kv);
    memset(m->kv.data, 0x7e, *n_kv);
    activation_buffers(table, &m->act, &model->info, MAX_ROWS, MAX_WANTED);
    for (size_t i = 0; i < N_ACTIVATIONS; i++) {
        void *data = must_alloc(table[i].n_bytes);
        memset(data, 0x7e, table[i].n_bytes);
        memcpy(table[i].at, &data, sizeof data);
    }
    rope_inv_freq(m->act.inv_freq, model->info.head_dim, (float)model->info.rope_theta);
}

static void llama_free(struct llama *m, const struct buffer table[N_ACTIVATIONS]) {
    for (size_t i = 0; i < N_ACTIVATIONS; i++) {
        void *data;
        memcpy(&data, table[i].at, sizeof data);
        free(data);
    }
    free(m->kv.data);
}

/* Runs a step, and wants the logits of its last rows. Returns their number. */
static int32_t llama_step(struct llama *m, const struct step *s) {
    struct activations *a = &m->act;
    const struct span span = {.first = 0, .n = s->n, .kind = s->kind};
    const struct rows rows = {
        .n = s->n, .token = a->token, .slot = a->slot, .pos = a->pos, .spans = &span, .n_spans = 1};
    int32_t n_wanted = s->n < MAX_WANTED ? s->n : MAX_WANTED;
    for (int32_t i = 0; i < s->n; i++) {
        a->token[i] = (s->pos + i) * 7 % TINY_VOCAB;
        a->slot[i] = s->slot;
        a->pos[i] = s->pos + i;
    }
    for (int32_t i = 0; i < n_wanted; i++) {
        a->wanted[i] = s->n - n_wanted + i;
    }
    forward(m, &rows, n_wanted);
    return n_wanted;
}

static void compare_forward_on(const struct cpu *cpus) {
    plain_backend.openblas = cpus == openblas_cpus;
    for (size_t c = 0; c < n_cpus; c++) {
        struct llama expected, got;
        struct buffer expected_table[N_ACTIVATIONS], got_table[N_ACTIVATIONS];
        size_t n_kv, x_bytes;
        llama_make(&expected, plain, &plain_backend, &n_kv, expected_table);
        llama_make(&got, kernels_cpu(), cpus[c].backend, &n_kv, got_table);
        for (size_t s = 0; s < COUNT(steps); s++) {
            int32_t n_wanted = llama_step(&expected, &steps[s]);
            assert_int_equal(llama_step(&got, &steps[s]), n_wanted);
            x_bytes = (size_t)steps[s].n * TINY_DIM * 4;
            compare(expected.act.logits, got.act.logits, (size_t)n_wanted * TINY_VOCAB * 4,
                    &cpus[c], "step %zu's logits", s);
            compare(expected.act.x, got.act.x, x_bytes, &cpus[c], "step %zu's residual stream", s);
            compare(expected.kv.data, got.kv.data, n_kv, &cpus[c], "step %zu's KV cache", s);
        }
        for (size_t i = 0; i < TINY_VOCAB; i++) {
            assert_true(isfinite(expected.act.logits[i]));
        }
        llama_free(&expected, expected_table);
        llama_free(&got, got_table);
    }
}

static void compare_forward(void) {
    compare_forward_on(own_cpus);
}

static void compare_forward_openblas(void) {
    compare_forward_on(openblas_cpus);
}

/* One call with decoding rows of two sequences, and a chunk of the second one's prompt. */
static void compare_forward_mixed(void) {
    static const struct span spans[] = {{0, 2, ROWS_DECODE}, {2, 7, ROWS_PROMPT}};
    static const int32_t token[] = {5, 6, 10, 11, 12, 13, 14, 15, 16};
    static const int32_t slot[] = {0, 1, 1, 1, 1, 1, 1, 1, 1}, pos[] = {9, 0, 1, 2, 3, 4, 5, 6, 7};
    static const int32_t wanted[MAX_WANTED] = {0, 1, 8};
    enum { R = COUNT(token) };
    plain_backend.openblas = false;
    for (size_t c = 0; c < n_cpus; c++) {
        struct llama both[2];
        struct buffer tables[2][N_ACTIVATIONS];
        size_t n_kv;
        llama_make(&both[0], plain, &plain_backend, &n_kv, tables[0]);
        llama_make(&both[1], kernels_cpu(), own_cpus[c].backend, &n_kv, tables[1]);
        for (size_t i = 0; i < 2; i++) {
            const struct rows rows = {
                .n = R, .token = token, .slot = slot, .pos = pos, .spans = spans, .n_spans = 2};
            (void)llama_step(&both[i], &(struct step){9, 0, 0, ROWS_PROMPT});
            memcpy(both[i].act.wanted, wanted, sizeof wanted);
            forward(&both[i], &rows, MAX_WANTED);
        }
        compare(both[0].act.logits, both[1].act.logits, (size_t)MAX_WANTED * TINY_VOCAB * 4,
                &own_cpus[c], "the mixed call's logits");
        compare(both[0].kv.data, both[1].kv.data, n_kv, &own_cpus[c], "the mixed call's KV cache");
        llama_free(&both[0], tables[0]);
        llama_free(&both[1], tables[1]);
    }
}

/* ---------------------------------------------------------------- mutants */

/* The last bit of the last value is wrong. */
static void mutant_embed(struct backend *b, float *x, const struct weight *table,
                         const struct rows *rows) {
    float *last = x + (size_t)rows->n * table->cols - 1;
    embed(b, x, table, rows);
    *last = float_of(bits_of(*last) ^ 1);
}

/* The gain is multiplied in before the normalised value is rounded. */
static void mutant_rmsnorm(struct backend *b, float *y, const float *x, const struct weight *gain,
                           int32_t n, float eps) {
    const uint16_t *g = weight_row(gain, 0);
    (void)b;
    for (int32_t r = 0; r < n; r++, x += gain->cols, y += gain->cols) {
        float lane[LANES] = {0};
        for (size_t i = 0; i < gain->cols; i++) {
            lane[i % LANES] = fmaf(x[i], x[i], lane[i % LANES]);
        }
        float factor = 1.0f / sqrtf(add_lanes(lane) / (float)gain->cols + eps);
        for (size_t i = 0; i < gain->cols; i++) {
            y[i] = widen_f16(g[i]) * x[i] * factor;
        }
    }
}

/* The lanes of a dot product are added one after another. */
static void mutant_matmul(struct backend *b, float *y, const float *x, const struct weight *w,
                          const struct rows *rows, enum matmul_mode mode) {
    for (size_t i = 0; i < w->rows; i++) {
        widen(b->widened, weight_row(w, i), w->cols);
        for (size_t r = 0; r < (size_t)rows->n; r++) {
            float lane[LANES] = {0}, sum = 0, *to = &y[r * w->rows + i];
            for (size_t k = 0; k < w->cols; k++) {
                lane[k % LANES] = fmaf(b->widened[k], x[r * w->cols + k], lane[k % LANES]);
            }
            for (size_t l = 0; l < LANES; l++) {
                sum += lane[l];
            }
            *to = mode == MATMUL_ADD ? *to + sum : sum;
        }
    }
}

/* Prompts do not go through OpenBLAS. */
static void mutant_matmul_openblas(struct backend *b, float *y, const float *x,
                                   const struct weight *w, const struct rows *rows,
                                   enum matmul_mode mode) {
    struct backend own = {.widened = b->widened, .openblas = false};
    matmul(&own, y, x, w, rows, mode);
}

/* Positions are counted from 1. */
static void mutant_rope_angles(struct backend *b, float *angles, const float *inv_freq,
                               const struct rows *rows, int32_t head_dim) {
    for (int32_t r = 0; r < rows->n; r++, angles += head_dim) {
        const int32_t pos = rows->pos[r] + 1;
        rope_angles(b, angles, inv_freq, &(struct rows){.n = 1, .pos = &pos}, head_dim);
    }
}

/* Moves the neighbours 2i, 2i + 1 of n heads to where rotate() finds a pair, or back. */
static void move_neighbours(float *x, size_t n, size_t hd, bool back) {
    float moved[MAX_HEAD_DIM];
    for (; n > 0; n--, x += hd) {
        for (size_t i = 0; i < hd; i++) {
            size_t at = i % 2 * (hd / 2) + i / 2;
            moved[back ? i : at] = x[back ? at : i];
        }
        memcpy(x, moved, hd * sizeof *x);
    }
}

/* The queries are rotated in the pairs of Meta's weights. */
static void mutant_pairing(struct backend *b, float *qkv, const struct kv_cache *kv,
                           const float *angles, const struct rows *rows, int32_t layer,
                           int32_t n_heads) {
    size_t hd = (size_t)kv->head_dim, q = (size_t)n_heads;
    size_t width = (q + 2 * (size_t)kv->n_kv_heads) * hd;
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        move_neighbours(qkv + r * width, q, hd, false);
    }
    rope_kv(b, qkv, kv, angles, rows, layer, n_heads);
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        move_neighbours(qkv + r * width, q, hd, true);
    }
}

/* Keys and values are cached one position too far. */
static void mutant_cache(struct backend *b, float *qkv, const struct kv_cache *kv,
                         const float *angles, const struct rows *rows, int32_t layer,
                         int32_t n_heads) {
    struct kv_cache shifted = *kv;
    shifted.data = (char *)kv->data + kv->pos_bytes;
    rope_kv(b, qkv, &shifted, angles, rows, layer, n_heads);
}

/* A row does not read its own position. */
static void mutant_attention(struct backend *b, float *y, const float *qkv,
                             const struct kv_cache *kv, const struct rows *rows, int32_t layer,
                             int32_t n_heads) {
    int32_t earlier[MAX_ROWS];
    struct rows mutant = *rows;
    for (int32_t r = 0; r < rows->n; r++) {
        earlier[r] = rows->pos[r] > 0 ? rows->pos[r] - 1 : 0;
    }
    mutant.pos = earlier;
    attention(b, y, qkv, kv, &mutant, layer, n_heads);
}

/* Divides before it multiplies, which rounds differently. */
static void mutant_swiglu(struct backend *b, float *y, const float *gate_up, int32_t n,
                          int32_t ffn_dim) {
    (void)b;
    for (int32_t r = 0; r < n; r++, y += ffn_dim, gate_up += 2 * (size_t)ffn_dim) {
        for (int32_t i = 0; i < ffn_dim; i++) {
            float z = gate_up[i], up = gate_up[ffn_dim + i], e = canonical_exp(-fabsf(z));
            y[i] = z * ((z < 0 ? e : 1.0f) / (1.0f + e)) * up;
        }
    }
}

/* Ignores the index. */
static void mutant_gather(struct backend *b, float *y, const float *x, const int32_t *index,
                          int32_t n, int32_t dim) {
    (void)index;
    gather(b, y, x, (const int32_t[]){0, 1, 2, 3, 4}, n, dim);
}

static void test_mutants(void **state) {
    (void)state;
    const struct {
        const char *name;
        void (*comparison)(void);
        struct kernels table;
    } mutants[] = {
        {"embed", compare_embed, {.embed = mutant_embed}},
        {"rmsnorm", compare_rmsnorm, {.rmsnorm = mutant_rmsnorm}},
        {"matmul", compare_matmul, {.matmul = mutant_matmul}},
        {"OpenBLAS", compare_matmul_openblas, {.matmul = mutant_matmul_openblas}},
        {"rope_angles", compare_rope_angles, {.rope_angles = mutant_rope_angles}},
        {"the pairing in rope_kv", compare_rope_kv, {.rope_kv = mutant_pairing}},
        {"the cache in rope_kv", compare_rope_kv, {.rope_kv = mutant_cache}},
        {"attention", compare_attention, {.attention = mutant_attention}},
        {"swiglu", compare_swiglu, {.swiglu = mutant_swiglu}},
        {"gather", compare_gather, {.gather = mutant_gather}},
    };
    for (size_t i = 0; i < COUNT(mutants); i++) {
        run_comparison(mutants[i].comparison, &mutants[i].table);
        if (n_different == 0) {
            fail_msg("%s: the mutant was not seen", mutants[i].name);
        }
    }
    struct kernels table = *kernels_plain();
    table.rope_kv = mutant_pairing;
    run_comparison(compare_forward, &table);
    assert_true(n_different > 0);
    table = *kernels_plain();
    table.matmul = mutant_matmul;
    run_comparison(compare_forward, &table);
    assert_true(n_different > 0);
}

/* ---------------------------------------------------------------- the tests */

#define EQUALITY_TEST(name)                                                                        \
    static void test_##name(void **state) {                                                        \
        (void)state;                                                                               \
        expect_equal(compare_##name);                                                              \
    }

EQUALITY_TEST(embed)
EQUALITY_TEST(rmsnorm)
EQUALITY_TEST(swiglu)
EQUALITY_TEST(gather)
EQUALITY_TEST(matmul)
EQUALITY_TEST(matmul_openblas)
EQUALITY_TEST(rope_angles)
EQUALITY_TEST(rope_kv)
EQUALITY_TEST(attention)
EQUALITY_TEST(forward)
EQUALITY_TEST(forward_openblas)
EQUALITY_TEST(forward_mixed)

static int open_all(void **state) {
    return create_backends(state) || open_model(state) ? -1 : 0;
}

static int close_all(void **state) {
    return close_model(state) || destroy_backends(state) ? -1 : 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_gather),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_matmul_openblas),
        cmocka_unit_test(test_rope_angles),
        cmocka_unit_test(test_rope_kv),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_forward_openblas),
        cmocka_unit_test(test_forward_mixed),
        cmocka_unit_test(test_mutants),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

/*
 * test_cuda.c - compares the GPU's op table with the CPU's, over odd sizes; records and replays
 * steps; makes every API call fail once. Where there is no GPU, tests/cuda_on_cpu executes the
 * kernels, with the threads in three different orders, which must give the same bits.
 */
#include "kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cuda_library.h"
#include "op_inputs.h"
#include "cpu/cpu.h"

static const struct kernels *gpu, *cpu;
static struct backend *on_gpu, *on_cpu;
static struct cuda_on_cpu knobs;
static uint64_t hash; /* of every byte that the tests have downloaded */

/* ---------------------------------------------------------------- utilities */

enum { GUARD = 64 }; /* bytes after each buffer on the GPU that must not be written */

/* A copy of host memory on the GPU. */
static void *up(const void *data, size_t n_bytes) {
    struct bpo_error err = {0};
    uint8_t guard[GUARD];
    memset(guard, 0x5a, sizeof guard);
    void *at = gpu->alloc(on_gpu, n_bytes + GUARD, MEMORY_BUFFER, &err);
    assert_ok(at ? 0 : 1, &err);
    assert_ok(gpu->upload(on_gpu, at, data, n_bytes, &err), &err);
    assert_ok(gpu->upload(on_gpu, (char *)at + n_bytes, guard, GUARD, &err), &err);
    return at;
}

static void down_into(void *to, void *at, size_t n_bytes) {
    struct bpo_error err = {0};
    assert_ok(gpu->download(on_gpu, to, at, n_bytes, &err), &err);
    for (size_t i = 0; i < n_bytes; i++) {
        hash = (hash ^ ((uint8_t *)to)[i]) * 0x100000001b3ULL;
    }
}

/* Frees a buffer, after a look at its guard. */
static void drop(void *at, size_t n_bytes) {
    struct bpo_error err = {0};
    uint8_t guard[GUARD];
    assert_ok(gpu->download(on_gpu, guard, (char *)at + n_bytes, GUARD, &err), &err);
    for (size_t i = 0; i < GUARD; i++) {
        assert_int_equal(guard[i], 0x5a);
    }
    gpu->free(on_gpu, at, n_bytes + GUARD);
}

/* Downloads a buffer's contents, and frees it. */
static void *down(void *at, size_t n_bytes) {
    void *data = must_alloc(n_bytes);
    down_into(data, at, n_bytes);
    drop(at, n_bytes);
    return data;
}

static void begin(void) {
    assert_int_equal(gpu->step_begin(on_gpu, 0), 1);
    assert_int_equal(cpu->step_begin(on_cpu, 0), 1);
}

static void end(void) {
    struct bpo_error err = {0};
    assert_ok(gpu->step_end(on_gpu, &err), &err);
    assert_ok(cpu->step_end(on_cpu, &err), &err);
}

/* No difference may exceed `part` of the expected values' root mean square. */
static void assert_near(const float *got, const float *expected, size_t n, double part) {
    double square = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)got[i] - expected[i]);
        square += (double)expected[i] * expected[i];
        largest = difference > largest || isnan(difference) ? difference : largest;
    }
    if (!(largest <= part * sqrt(square / (double)n) + 1e-30)) {
        fail_msg("a difference of %g between values of root mean square %g", largest,
                 sqrt(square / (double)n));
    }
}

/* ---------------------------------------------------------------- row by row */

static void test_embed_and_gather(void **state) {
    (void)state;
    enum { V = 37, R = 33 };
    int32_t token[R];
    const int32_t index[] = {32, 0, 3, 3};
    for (size_t i = 0; i < R; i++) {
        token[i] = (int32_t)(random_bits() % V);
    }
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t dim = odd_sizes[s], stride = dim + 3;
        uint16_t *data = random_f16(V, dim, stride, 1);
        float *x = random_floats(R * dim, 1), *y = must_alloc(COUNT(index) * dim * sizeof *y);
        void *d_data = up(data, V * stride * 2), *d_token = up(token, sizeof token),
             *d_index = up(index, sizeof index);
        void *d_x = up(x, R * dim * 4), *d_y = up(x, COUNT(index) * dim * 4);
        const struct weight table = weight_of(data, V, dim, stride),
                            d_table = weight_of(d_data, V, dim, stride);
        begin();
        cpu->embed(on_cpu, x, &table, &(struct rows){.n = R, .token = token});
        cpu->gather(on_cpu, y, x, index, (int32_t)COUNT(index), (int32_t)dim);
        gpu->embed(on_gpu, d_x, &d_table, &(struct rows){.n = R, .token = d_token});
        gpu->gather(on_gpu, d_y, d_x, d_index, (int32_t)COUNT(index), (int32_t)dim);
        end();
        float *got_x = down(d_x, R * dim * 4), *got_y = down(d_y, COUNT(index) * dim * 4);
        assert_memory_equal(got_x, x, R * dim * 4);
        assert_memory_equal(got_y, y, COUNT(index) * dim * 4);
        drop(d_data, V * stride * 2);
        drop(d_token, sizeof token);
        drop(d_index, sizeof index);
        free(data);
        free(x);
        free(y);
        free(got_x);
        free(got_y);
    }
}

static void test_rmsnorm(void **state) {
    (void)state;
    enum { R = 9 };
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t n = odd_sizes[s];
        float *x = random_floats(R * n, 3), *y = must_alloc(R * n * sizeof *y);
        uint16_t *gain = random_f16(1, n, n, 1);
        memset(x, 0, n * sizeof *x); /* a row of zeros stays zeros */
        void *d_x = up(x, R * n * 4), *d_y = up(x, R * n * 4), *d_gain = up(gain, n * 2);
        const struct weight w = weight_of(gain, 1, n, n), d_w = weight_of(d_gain, 1, n, n);
        begin();
        cpu->rmsnorm(on_cpu, y, x, &w, R, 1e-5f);
        gpu->rmsnorm(on_gpu, d_y, d_x, &d_w, R, 1e-5f);
        end();
        float *got = down(d_y, R * n * 4);
        for (size_t i = 0; i < R * n; i++) {
            assert_near(&got[i], &y[i], 1, 2e-6); /* value by value: nothing cancels */
        }
        drop(d_x, R * n * 4);
        drop(d_gain, n * 2);
        free(x);
        free(y);
        free(gain);
        free(got);
    }
}

static void test_swiglu(void **state) {
    (void)state;
    enum { R = 3 };
    const float special[] = {0.0f, -0.0f, 88.0f, -80.0f, -200.0f, 1e4f, -1e4f, -1.0f};
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t n = odd_sizes[s];
        float *x = random_floats(R * 2 * n, 6), *y = must_alloc(R * n * sizeof *y);
        for (size_t i = 0; i < n && i < COUNT(special); i++) {
            x[i] = special[i];
        }
        void *d_x = up(x, R * 2 * n * 4), *d_y = up(x, R * n * 4);
        begin();
        cpu->swiglu(on_cpu, y, x, R, (int32_t)n);
        gpu->swiglu(on_gpu, d_y, d_x, R, (int32_t)n);
        end();
        float *got = down(d_y, R * n * 4);
        for (size_t i = 0; i < R * n; i++) {
            assert_true(fabsf(got[i] - y[i]) <= 2e-6f * fabsf(y[i]) + 1e-30f);
        }
        drop(d_x, R * 2 * n * 4);
        free(x);
        free(y);
        free(got);
    }
}

/* ---------------------------------------------------------------- matmul */

/* Multiplies twice: first the result of rmsnorm, whose half copy matmul reads if there are more
 * than 8 rows; then an x that has no half copy, so that matmul makes its own. */
static void check_matmul(int32_t n_rows, size_t n, size_t k, size_t stride, enum matmul_mode mode) {
    size_t r = (size_t)n_rows, n_y = r * n;
    float *x = random_floats(r * k, 1), *normed = must_alloc(r * k * 4),
          *start = random_floats(n_y, 1), *y = must_alloc(n_y * 4);
    uint16_t *data = random_f16(n, k, stride, 1), *gain = random_f16(1, k, k, 1);
    void *d_x = up(x, r * k * 4), *d_normed = up(x, r * k * 4), *d_data = up(data, n * stride * 2),
         *d_gain = up(gain, k * 2);
    const struct weight w = weight_of(data, n, k, stride), d_w = weight_of(d_data, n, k, stride);
    const struct weight g = weight_of(gain, 1, k, k), d_g = weight_of(d_gain, 1, k, k);
    const struct rows rows = {.n = n_rows};
    const double part = n_rows <= 8 ? 3e-6 : 4e-3;
    for (int own_half_copy = 0; own_half_copy < 2; own_half_copy++) {
        void *d_y = up(start, n_y * 4);
        memcpy(y, start, n_y * 4);
        begin();
        if (own_half_copy) {
            cpu->matmul(on_cpu, y, x, &w, &rows, mode);
            gpu->matmul(on_gpu, d_y, d_x, &d_w, &rows, mode);
        } else {
            cpu->rmsnorm(on_cpu, normed, x, &g, n_rows, 1e-5f);
            cpu->matmul(on_cpu, y, normed, &w, &rows, mode);
            gpu->rmsnorm(on_gpu, d_normed, d_x, &d_g, n_rows, 1e-5f);
            gpu->matmul(on_gpu, d_y, d_normed, &d_w, &rows, mode);
        }
        end();
        float *got = down(d_y, n_y * 4);
        assert_near(got, y, n_y, part * (k > 1 ? 1 : 2));
        free(got);
    }
    drop(d_x, r * k * 4);
    drop(d_normed, r * k * 4);
    drop(d_data, n * stride * 2);
    drop(d_gain, k * 2);
    free(x);
    free(normed);
    free(start);
    free(y);
    free(data);
    free(gain);
}

static void test_matmul(void **state) {
    (void)state;
    static const struct {
        size_t n, k, stride;
    } sizes[] = {{1, 1, 1},      {5, 7, 9},      {33, 64, 64},
                 {37, 261, 264}, {70, 264, 272}, {64, 1027, 1027}};
    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t r = 0; r < COUNT(row_counts); r++) {
            check_matmul(row_counts[r], sizes[s].n, sizes[s].k, sizes[s].stride,
                         r % 2 ? MATMUL_ADD : MATMUL_STORE);
        }
    }
}

/* Up to 8 rows, a row's result does not depend on how many rows are multiplied with it. */
static void test_matmul_rows_alike(void **state) {
    (void)state;
    enum { N = 33, K = 328 };
    float *x = random_floats(8 * K, 1), *first = NULL;
    uint16_t *data = random_f16(N, K, K, 1);
    void *d_x = up(x, 8 * K * 4), *d_data = up(data, N * K * 2);
    const struct weight d_w = weight_of(d_data, N, K, K);
    for (int32_t n = 8; n >= 1; n--) {
        void *d_y = up(x, (size_t)n * N * 4);
        begin();
        gpu->matmul(on_gpu, d_y, d_x, &d_w, &(struct rows){.n = n}, MATMUL_STORE);
        end();
        float *got = down(d_y, (size_t)n * N * 4);
        first = first ? first : got;
        assert_memory_equal(got, first, (size_t)n * N * 4);
        if (got != first) {
            free(got);
        }
    }
    drop(d_x, 8 * K * 4);
    drop(d_data, N * K * 2);
    free(first);
    free(x);
    free(data);
}

/* ---------------------------------------------------------------- KV and attention */

static const struct heads kv_shapes[] = {{3, 3, 22}, {6, 2, 12},  {4, 4, 16},  {8, 1, 64},
                                         {5, 1, 80}, {2, 1, 128}, {1, 1, 256}, {2, 2, 2}};

enum { SLOTS = 3, LAYERS = 2, POSITIONS = 200 };

/* A cache in host memory, filled with NaN. */
static struct kv_cache kv_make(const struct heads *s, size_t *n_bytes) {
    struct kv_cache kv = {
        .n_slots = SLOTS, .n_layers = LAYERS, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    kv.n_positions = POSITIONS;
    kv.pos_bytes = 2 * (size_t)s->head_dim;
    kv.head_bytes = (((size_t)POSITIONS * kv.pos_bytes + 63) / 64 | 1) * 64;
    kv.plane_bytes = (size_t)s->n_kv_heads * kv.head_bytes;
    kv.layer_bytes = 2 * kv.plane_bytes;
    kv.slot_bytes = LAYERS * kv.layer_bytes + 64;
    *n_bytes = SLOTS * kv.slot_bytes;
    kv.data = must_alloc(*n_bytes);
    memset(kv.data, 0x7e, *n_bytes);
    return kv;
}

/* Random keys and values for the positions 0 .. last of a slot. */
static void kv_fill(const struct kv_cache *kv, int32_t slot, int32_t last) {
    for (size_t i = 0; i < (size_t)(LAYERS * 2 * kv->n_kv_heads); i++) {
        char *head = (char *)kv->data + (size_t)slot * kv->slot_bytes + i * kv->head_bytes;
        for (size_t at = 0; at < (size_t)(last + 1) * (size_t)kv->head_dim; at++) {
            uint16_t value = narrow_f16(random_normal());
            memcpy(head + 2 * at, &value, 2);
        }
    }
}

static void test_rope(void **state) {
    (void)state;
    const int32_t slot[] = {2, -1, 0, 1, 2, 2, 2, 2, 2},
                  pos[] = {0, 0, 1, 63, 1, 2, 3, POSITIONS - 2, POSITIONS - 1};
    enum { R = COUNT(slot) };
    for (size_t s = 0; s < COUNT(kv_shapes); s++) {
        const struct heads *shape = &kv_shapes[s];
        size_t n_kv, hd = (size_t)shape->head_dim,
                     width = hd * (size_t)(shape->n_heads + 2 * shape->n_kv_heads);
        struct kv_cache kv = kv_make(shape, &n_kv), d_kv = kv;
        float *qkv = random_floats(R * width, 2), angles[R * 256], inv_freq[128];
        rope_inv_freq(inv_freq, shape->head_dim, 10000.0f);
        d_kv.data = up(kv.data, n_kv);
        void *d_qkv = up(qkv, R * width * 4), *d_angles = up(angles, R * hd * 4),
             *d_inv_freq = up(inv_freq, hd / 2 * 4);
        void *d_slot = up(slot, sizeof slot), *d_pos = up(pos, sizeof pos);
        const struct rows d_rows = {.n = R, .slot = d_slot, .pos = d_pos};
        begin();
        gpu->rope_angles(on_gpu, d_angles, d_inv_freq, &d_rows, shape->head_dim);
        gpu->rope_kv(on_gpu, d_qkv, &d_kv, d_angles, &d_rows, 1, shape->n_heads);
        for (int32_t r = 0; r < R; r++) { /* row by row: the CPU has no inert rows */
            const struct rows row = {.n = 1, .slot = &slot[r], .pos = &pos[r]};
            cpu->rope_angles(on_cpu, angles + (size_t)r * hd, inv_freq, &row, shape->head_dim);
            if (slot[r] >= 0) {
                cpu->rope_kv(on_cpu, qkv + (size_t)r * width, &kv, angles + (size_t)r * hd, &row, 1,
                             shape->n_heads);
            }
        }
        end();
        float *got_qkv = down(d_qkv, R * width * 4), *got_angles = down(d_angles, R * hd * 4);
        uint16_t *got_kv = down(d_kv.data, n_kv), *expected_kv = kv.data;
        for (size_t i = 0; i < R * hd; i++) {
            assert_true(fabsf(got_angles[i] - angles[i]) <= 2e-7f);
        }
        for (size_t r = 0; r < R; r++) {
            if (slot[r] >= 0) {
                assert_near(got_qkv + r * width, qkv + r * width, hd * (size_t)shape->n_heads,
                            2e-6);
            }
        }
        for (size_t i = 0; i < n_kv / 2;
             i++) { /* fp32 results that differ may round to neighbours */
            assert_true(abs(got_kv[i] - expected_kv[i]) <= 1);
        }
        drop(d_inv_freq, hd / 2 * 4);
        drop(d_slot, sizeof slot);
        drop(d_pos, sizeof pos);
        free(qkv);
        free(got_qkv);
        free(got_angles);
        free(got_kv);
        free(kv.data);
    }
}

/* One call with decoding rows, several of them of the same slot, and two chunks of a prompt. inert:
 * the first row is. */
static void check_attention(const struct heads *shape, int32_t n_decode, int32_t n_prompt,
                            int32_t prompt_pos, bool inert) {
    size_t n_kv, hd = (size_t)shape->head_dim, r = (size_t)(n_decode + n_prompt);
    size_t width = hd * (size_t)(shape->n_heads + 2 * shape->n_kv_heads),
           n_y = r * hd * (size_t)shape->n_heads;
    static const int32_t decode_pos[] = {0, 1, 63, 64, 65, 127, 128, POSITIONS - 1};
    struct kv_cache kv = kv_make(shape, &n_kv), d_kv = kv;
    int32_t *slot = must_alloc(r * 4), *pos = must_alloc(r * 4);
    float *qkv = random_floats(r * width, 1), *y = must_alloc(n_y * 4);
    for (int32_t i = 0; i < (int32_t)r; i++) {
        slot[i] = i < n_decode ? i % 2 : 2;
        pos[i] =
            i < n_decode ? decode_pos[(size_t)i % COUNT(decode_pos)] : prompt_pos + i - n_decode;
    }
    kv_fill(&kv, 0, POSITIONS - 1);
    kv_fill(&kv, 1, POSITIONS - 1);
    kv_fill(&kv, 2, prompt_pos + n_prompt - 1); /* the rest is NaN: it must not be read */
    d_kv.data = up(kv.data, n_kv);
    const int32_t none = -1;
    void *d_qkv = up(qkv, r * width * 4), *d_y = up(qkv, n_y * 4), *d_slot = up(slot, r * 4),
         *d_pos = up(pos, r * 4);
    struct bpo_error err = {0};
    if (inert) {
        assert_ok(gpu->upload(on_gpu, d_slot, &none, sizeof none, &err), &err);
    }
    const struct span spans[] = {{0, n_decode, ROWS_DECODE},
                                 {n_decode, n_prompt / 2, ROWS_PROMPT},
                                 {n_decode + n_prompt / 2, n_prompt - n_prompt / 2, ROWS_PROMPT}};
    const int32_t n_spans = n_prompt > 0 ? 3 : 0;
    begin();
    cpu->attention(on_cpu, y, qkv, &kv,
                   &(struct rows){(int32_t)r, NULL, slot, pos, spans, n_spans, NULL}, 1,
                   shape->n_heads);
    gpu->attention(on_gpu, d_y, d_qkv, &d_kv,
                   &(struct rows){(int32_t)r, NULL, d_slot, d_pos, spans, n_spans, NULL}, 1,
                   shape->n_heads);
    end();
    float *got = down(d_y, n_y * 4);
    for (size_t i = 0; i < (size_t)shape->n_heads * hd && inert; i++) {
        assert_true(got[i] == 0);
        got[i] = y[i];
    }
    for (size_t i = 0; i < r * (size_t)shape->n_heads; i++) {
        assert_near(got + i * hd, y + i * hd, hd, 1e-5);
    }
    drop(d_kv.data, n_kv);
    drop(d_qkv, r * width * 4);
    drop(d_slot, r * 4);
    drop(d_pos, r * 4);
    free(kv.data);
    free(qkv);
    free(slot);
    free(pos);
    free(y);
    free(got);
}

static void test_attention(void **state) {
    (void)state;
    for (size_t s = 0; s < COUNT(kv_shapes); s++) {
        check_attention(&kv_shapes[s], 8, 0, 0, false);
        check_attention(&kv_shapes[s], 1, 0, 0, true);
        check_attention(&kv_shapes[s], 3, 2, 0, true);
        check_attention(&kv_shapes[s], 0, 65, 0, false);
        check_attention(&kv_shapes[s], 2, 9, 31, false);
    }
    check_attention(&kv_shapes[0], 0, 1, POSITIONS - 1, false);
    check_attention(&kv_shapes[1], 33, 64, 64, false); /* one split for each row */
}

static void test_kv_copies(void **state) {
    (void)state;
    struct bpo_error err = {0};
    for (size_t s = 0; s < COUNT(kv_shapes); s++) {
        size_t n_kv,
            n_packed =
                (size_t)(LAYERS * 2 * kv_shapes[s].n_kv_heads * 65 * kv_shapes[s].head_dim) * 2;
        struct kv_cache kv = kv_make(&kv_shapes[s], &n_kv), d_kv = kv;
        kv_fill(&kv, 1, 100);
        d_kv.data = up(kv.data, n_kv);
        uint8_t *packed = must_alloc(n_packed), *d_packed = must_alloc(n_packed);
        assert_ok(cpu->kv_copy(on_cpu, &kv, 0, 1, 64, &err), &err);
        assert_ok(cpu->kv_export(on_cpu, packed, &kv, 1, 65, &err), &err);
        assert_ok(cpu->kv_import(on_cpu, &kv, packed, 2, 65, &err), &err);
        assert_ok(gpu->kv_copy(on_gpu, &d_kv, 0, 1, 64, &err), &err);
        assert_ok(gpu->kv_copy(on_gpu, &d_kv, 0, 0, 64, &err), &err);
        assert_ok(gpu->kv_copy(on_gpu, &d_kv, 2, 1, 0, &err), &err);
        assert_ok(gpu->kv_export(on_gpu, d_packed, &d_kv, 1, 65, &err), &err);
        assert_memory_equal(packed, d_packed, n_packed);
        assert_ok(gpu->kv_import(on_gpu, &d_kv, d_packed, 2, 65, &err), &err);
        memset(d_packed, 0, n_packed); /* the import no longer needs it */
        uint8_t *got = down(d_kv.data, n_kv);
        assert_memory_equal(got, kv.data, n_kv);
        assert_int_equal(gpu->kv_copy(on_gpu, &d_kv, SLOTS, 0, 1, &err), BPO_ERR_RUN);
        assert_int_equal(gpu->kv_export(on_gpu, packed, &d_kv, 0, POSITIONS + 1, &err),
                         BPO_ERR_RUN);
        free(got);
        free(packed);
        free(d_packed);
        free(kv.data);
    }
}

static void test_first_nonfinite(void **state) {
    (void)state;
    enum { R = 33 };
    struct bpo_error err = {0};
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t n = odd_sizes[s];
        float *x = random_floats(R * n, 1e30f);
        int32_t found;
        for (int bad = 0; bad < 3; bad++) {
            if (bad) {
                x[(bad == 1 ? 20 : 7) * n + n - 1] = bad == 1 ? NAN : -INFINITY;
            }
            void *d_x = up(x, R * n * 4);
            assert_ok(gpu->first_nonfinite(on_gpu, &found, d_x, R, n, &err), &err);
            assert_int_equal(found, bad == 0 ? -1 : bad == 1 ? 20 : 7);
            drop(d_x, R * n * 4);
        }
        free(x);
    }
}

/* What is larger than the pinned memory is copied in pieces. */
static void test_large_copies(void **state) {
    (void)state;
    size_t n = ((size_t)20 << 20) + 12345;
    struct bpo_error err = {0};
    uint8_t *data = must_alloc(n), *back = must_alloc(n);
    for (size_t i = 0; i < n; i += 8) {
        uint64_t bits = random_bits();
        memcpy(data + i, &bits, n - i < 8 ? n - i : 8);
    }
    void *at = up(data, n);
    assert_ok(gpu->upload(on_gpu, (char *)at + 77, data, 1000, &err), &err);
    memcpy(data + 77, memcpy(back, data, 1000), 1000);
    memset(back, 0, n);
    assert_ok(gpu->download(on_gpu, back, at, n, &err), &err);
    assert_memory_equal(back, data, n);
    drop(at, n);
    free(data);
    free(back);
}

/* ---------------------------------------------------------------- steps */

/* The buffers of a small model of one layer. */
enum { D = 40, F = 56, H = 4, HK = 2, HD = 8, V = 50, MAX_ROWS = 40 };

struct mini {
    struct weight table, norm, qkv, o, gate_up, down;
    float *x, *normed, *qkv_rows, *mixed, *gate_rows, *hidden, *angles, *inv_freq, *logits;
    int32_t *token, *slot, *pos;
    struct kv_cache kv;
};

static struct mini mini;
static void *mini_memory[32];
static size_t n_mini_memory;

static void *mini_alloc(size_t n_bytes, const void *contents, struct bpo_error *err) {
    void *at = gpu->alloc(on_gpu, n_bytes, MEMORY_BUFFER, err);
    if (at) {
        mini_memory[n_mini_memory++] = at;
        if (contents && gpu->upload(on_gpu, at, contents, n_bytes, err)) {
            return NULL;
        }
    }
    return at;
}

static void mini_free(void) {
    while (n_mini_memory > 0) {
        gpu->free(on_gpu, mini_memory[--n_mini_memory], 0);
    }
}

static int mini_make(struct bpo_error *err) {
    struct mini *m = &mini;
    *m = (struct mini){0};
    random_state = 5;
    const struct {
        struct weight *weight;
        size_t rows, cols;
    } weights[] = {{&m->table, V, D},  {&m->norm, 1, D},        {&m->qkv, (H + 2 * HK) * HD, D},
                   {&m->o, D, H * HD}, {&m->gate_up, 2 * F, D}, {&m->down, D, F}};
    for (size_t i = 0; i < COUNT(weights); i++) {
        uint16_t *data = random_f16(weights[i].rows, weights[i].cols, weights[i].cols, 0.3f);
        void *at = mini_alloc(weights[i].rows * weights[i].cols * 2, data, err);
        free(data);
        if (!at) {
            return err->code;
        }
        *weights[i].weight = weight_of(at, weights[i].rows, weights[i].cols, weights[i].cols);
    }
    float inv_freq[HD / 2];
    rope_inv_freq(inv_freq, HD, 10000.0f);
    const struct {
        void *at;
        size_t n_floats;
    } buffers[] = {{&m->x, MAX_ROWS * D},
                   {&m->normed, MAX_ROWS * D},
                   {&m->qkv_rows, (size_t)MAX_ROWS * (H + 2 * HK) * HD},
                   {&m->mixed, MAX_ROWS * H * HD},
                   {&m->gate_rows, (size_t)MAX_ROWS * 2 * F},
                   {&m->hidden, MAX_ROWS * F},
                   {&m->angles, MAX_ROWS * HD},
                   {&m->logits, MAX_ROWS * V},
                   {&m->token, MAX_ROWS},
                   {&m->slot, MAX_ROWS},
                   {&m->pos, MAX_ROWS}};
    for (size_t i = 0; i < COUNT(buffers); i++) {
        void *at = mini_alloc(buffers[i].n_floats * 4, NULL, err);
        if (!at) {
            return err->code;
        }
        memcpy(buffers[i].at, &at, sizeof at);
    }
    if (!(m->inv_freq = mini_alloc(sizeof inv_freq, inv_freq, err))) {
        return err->code;
    }
    m->kv = (struct kv_cache){NULL, 0, 0, 0, 0, 2 * HD, MAX_ROWS, 1, HK, HD, 64};
    m->kv.head_bytes = 64 * 2 * HD;
    m->kv.plane_bytes = HK * m->kv.head_bytes;
    m->kv.layer_bytes = m->kv.slot_bytes = 2 * m->kv.plane_bytes;
    return (m->kv.data = mini_alloc(MAX_ROWS * m->kv.slot_bytes, NULL, err)) ? 0 : err->code;
}

/* One step of n rows; downloads logits [n][V]. */
static int mini_step(uint64_t shape, const int32_t *token, const int32_t *slot, const int32_t *pos,
                     int32_t n, bool prompt, float *logits, struct bpo_error *err) {
    const struct mini *m = &mini;
    const struct span span = {0, n, ROWS_PROMPT};
    const struct rows rows = {n, m->token, m->slot, m->pos, prompt ? &span : NULL, prompt, NULL};
    int failed = gpu->upload(on_gpu, m->token, token, (size_t)n * 4, err);
    failed = failed ? failed : gpu->upload(on_gpu, m->slot, slot, (size_t)n * 4, err);
    failed = failed ? failed : gpu->upload(on_gpu, m->pos, pos, (size_t)n * 4, err);
    if (failed) {
        return failed;
    }
    if (gpu->step_begin(on_gpu, shape)) {
        gpu->embed(on_gpu, m->x, &m->table, &rows);
        gpu->rope_angles(on_gpu, m->angles, m->inv_freq, &rows, HD);
        gpu->rmsnorm(on_gpu, m->normed, m->x, &m->norm, n, 1e-5f);
        gpu->matmul(on_gpu, m->qkv_rows, m->normed, &m->qkv, &rows, MATMUL_STORE);
        gpu->rope_kv(on_gpu, m->qkv_rows, &m->kv, m->angles, &rows, 0, H);
        gpu->attention(on_gpu, m->mixed, m->qkv_rows, &m->kv, &rows, 0, H);
        gpu->matmul(on_gpu, m->x, m->mixed, &m->o, &rows, MATMUL_ADD);
        gpu->rmsnorm(on_gpu, m->normed, m->x, &m->norm, n, 1e-5f);
        gpu->matmul(on_gpu, m->gate_rows, m->normed, &m->gate_up, &rows, MATMUL_STORE);
        gpu->swiglu(on_gpu, m->hidden, m->gate_rows, n, F);
        gpu->matmul(on_gpu, m->x, m->hidden, &m->down, &rows, MATMUL_ADD);
        gpu->rmsnorm(on_gpu, m->normed, m->x, &m->norm, n, 1e-5f);
        gpu->matmul(on_gpu, m->logits, m->normed, &m->table, &rows, MATMUL_STORE);
    }
    failed = gpu->step_end(on_gpu, err);
    return failed ? failed : gpu->download(on_gpu, logits, m->logits, (size_t)n * V * 4, err);
}

/* Steps at the positions 0, 1, 2 ...; each has n rows, one per slot, of which the last n_inert are
 * inert. logits [n_steps][n][V]. */
static int mini_run(uint64_t shape, int32_t n, int32_t n_inert, int32_t n_steps, float *logits,
                    struct bpo_error *err) {
    int32_t token[MAX_ROWS], slot[MAX_ROWS], pos[MAX_ROWS];
    int failed = 0;
    for (int32_t step = 0; step < n_steps && !failed; step++) {
        for (int32_t i = 0; i < n; i++) {
            token[i] = (7 * i + 3 * step) % V;
            slot[i] = i < n - n_inert ? i : -1;
            pos[i] = i < n - n_inert ? step : 0;
        }
        failed = mini_step(shape, token, slot, pos, n, false, logits + (size_t)step * (size_t)n * V,
                           err);
    }
    return failed;
}

static void test_replayed_steps(void **state) {
    (void)state;
    enum { STEPS = 4 };
    struct bpo_error err = {0};
    /* A new backend: its scratch memory still has to grow, which invalidates what was recorded. */
    struct backend *kept = on_gpu;
    on_gpu = gpu->create(&(struct backend_options){.n_threads = 1}, &err);
    assert_ok(on_gpu ? 0 : 1, &err);
    assert_ok(mini_make(&err), &err);
    static const int32_t counts[] = {1, 2, 4, 8, 16, 32};
    /* In the second round the graphs exist, except those that were dropped when scratch grew. */
    for (int round = 0; round < 2; round++) {
        for (size_t c = 0; c < COUNT(counts); c += round ? 5 : 1) {
            int32_t n = counts[c], n_inert = n > 2 ? 1 : 0;
            size_t n_logits = (size_t)(STEPS * n * V);
            float *plain = must_alloc(n_logits * 4), *replayed = must_alloc(n_logits * 4);
            assert_int_equal(gpu->padded(on_gpu, n), n);
            assert_ok(mini_run(0, n, n_inert, STEPS, plain, &err), &err);
            assert_ok(mini_run((uint64_t)n, n, n_inert, STEPS, replayed, &err), &err);
            for (size_t i = 0; i < (size_t)(STEPS * n); i++) {
                if ((int32_t)i % n < n - n_inert) {
                    assert_memory_equal(plain + i * V, replayed + i * V, V * 4);
                    assert_true(isfinite(plain[i * V]));
                }
            }
            free(plain);
            free(replayed);
        }
    }
    assert_int_equal(gpu->step_begin(on_gpu, 32), 0); /* by now it is replayed */
    assert_ok(gpu->step_end(on_gpu, &err), &err);
    assert_int_equal(gpu->padded(on_gpu, 3), 4);
    assert_int_equal(gpu->padded(on_gpu, 17), 32);
    assert_int_equal(gpu->padded(on_gpu, 33), 33);
    mini_free();
    gpu->destroy(on_gpu);
    on_gpu = kept;
}

/* A prompt's positions give nearly the same logits together, as one prompt, and one after
 * another. */
static void test_prompt_and_decoding_agree(void **state) {
    (void)state;
    enum { N = 37 };
    struct bpo_error err = {0};
    int32_t token[N], slot[N], pos[N];
    float *together = must_alloc((size_t)N * V * 4), alone[V];
    assert_ok(mini_make(&err), &err);
    for (int32_t i = 0; i < N; i++) {
        token[i] = 11 * i % V;
        slot[i] = 3;
        pos[i] = i;
    }
    assert_ok(mini_step(0, token, slot, pos, N, true, together, &err), &err);
    for (int32_t i = 0; i < N; i++) {
        slot[0] = 5;
        assert_ok(mini_step(77, &token[i], slot, &pos[i], 1, false, alone, &err), &err);
        assert_near(alone, together + (size_t)i * V, V, 2e-2);
    }
    free(together);
    mini_free();
}

/* ---------------------------------------------------------------- errors */

/* Uses every op once, in a new backend. */
static int use_all(struct bpo_error *err) {
    const struct backend_options options = {.n_threads = 1};
    float logits[8 * 4 * V], row[V];
    int32_t ids[4], found;
    uint8_t packed[2 * HK * 2 * HD * 2];
    const struct sample_params draws[4] = {{.temperature = 1, .top_p = 0.9f, .top_k = 5, .u = 0.5},
                                           {.temperature = 0}};
    const int32_t token[MAX_ROWS] = {1, 2, 3}, slot[MAX_ROWS] = {0}, pos[MAX_ROWS] = {0, 1, 2};
    if (!(on_gpu = gpu->create(&options, err))) {
        return err->code;
    }
    uint16_t host[4096] = {0};
    int failed = gpu->load_weights(on_gpu, host, sizeof host, err) ? 0 : err->code;
    failed = failed ? failed : mini_make(err);
    failed = failed ? failed : mini_step(0, token, slot, pos, 3, true, logits, err);
    failed = failed ? failed : mini_run(4, 4, 1, 4, logits, err);
    failed = failed ? failed : gpu->sample(on_gpu, ids, mini.logits, draws, 2, V, err);
    failed = failed ? failed : gpu->first_nonfinite(on_gpu, &found, mini.logits, 1, V, err);
    failed = failed ? failed : gpu->kv_copy(on_gpu, &mini.kv, 1, 0, 2, err);
    failed = failed ? failed : gpu->kv_export(on_gpu, packed, &mini.kv, 0, 2, err);
    failed = failed ? failed : gpu->kv_import(on_gpu, &mini.kv, packed, 2, 2, err);
    failed = failed ? failed : mini_step(0, token, slot, pos, 16, true, logits, err);
    failed = failed ? failed : gpu->download(on_gpu, row, mini.logits, sizeof row, err);
    mini_free();
    gpu->destroy(on_gpu);
    return failed;
}

/* Makes every call of CUDA and cuBLAS fail once: each time there must be an error with a message
 * and a hint, and nothing may stay allocated. */
static void test_every_call_fails(void **state) {
    (void)state;
    if (!knobs.fail_call) {
        print_message("skipped: on a GPU calls cannot be made to fail\n");
        skip();
    }
    struct backend *kept = on_gpu;
    long live = knobs.live(), before = knobs.calls();
    struct bpo_error err = {0};
    assert_ok(use_all(&err), &err);
    assert_int_equal(knobs.live(), live);
    long n_calls = knobs.calls() - before, n_harmless = 0;
    assert_true(n_calls > 200);
    for (long n = 1; n <= n_calls; n++) {
        err = (struct bpo_error){0};
        knobs.fail_call(n);
        int code = use_all(&err);
        knobs.fail_call(0);
        assert_int_equal(knobs.live(), live);
        if (code == 0) {
            n_harmless++; /* a call that frees something, or only improves a message */
        } else {
            assert_int_equal(code, err.code);
            assert_true(strlen(err.message) > 10 && strlen(err.hint) > 10);
        }
    }
    printf(
        "    %ld calls failed, one at a time; %ld of them free something or make no difference\n",
        n_calls, n_harmless);
    /* The calls that free something: if there is one more, some error is dropped. */
    assert_true(n_harmless <= 54);
    on_gpu = kept;
}

/* A backend's graphs are destroyed with it, even if no buffer was ever freed. */
static void test_recorded_steps_end_with_their_backend(void **state) {
    (void)state;
    struct bpo_error err = {0};
    const struct backend_options options = {.n_threads = 1};
    long live = knobs.live ? knobs.live() : 0;
    struct backend *b = gpu->create(&options, &err);
    assert_ok(b ? 0 : 1, &err);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(gpu->step_begin(b, 9), i < 2);
        assert_ok(gpu->step_end(b, &err), &err);
    }
    gpu->destroy(b);
    assert_true(!knobs.live || knobs.live() == live);
}

/* After a kernel has crashed, all later calls fail: the error is reported, and everything can still
 * be closed. */
static void test_every_kernel_crashes(void **state) {
    (void)state;
    if (!knobs.crash_kernel) {
        print_message("skipped: on a GPU kernels cannot be made to crash\n");
        skip();
    }
    struct backend *kept = on_gpu;
    long live = knobs.live(), n = 0;
    for (int code = 1; code; n++) {
        struct bpo_error err = {0};
        knobs.crash_kernel(n + 1);
        code = use_all(&err);
        assert_int_equal(knobs.live(), live);
        assert_true(code == 0 || strstr(err.message, "illegal memory access"));
        knobs.crash_kernel(0);
    }
    assert_true(n > 60);
    on_gpu = kept;
}

static void test_clear_errors(void **state) {
    (void)state;
    struct bpo_error err = {0};
    size_t available = 0, total = 0;
    assert_ok(gpu->memory(on_gpu, &available, &total, &err), &err);
    assert_true(available > 0 && available <= total);
    assert_null(gpu->alloc(on_gpu, total + 1, MEMORY_LAZY, &err));
    assert_int_equal(err.code, BPO_ERR_RESOURCE);
    assert_non_null(strstr(err.message, "out of GPU memory"));
    const uint8_t byte = 0;
    assert_null(gpu->load_weights(on_gpu, &byte, total + 1, &err));
    assert_non_null(strstr(err.message, "do not fit"));
    struct kv_cache kv = {.n_slots = 1, .n_kv_heads = 1, .head_dim = 258, .n_positions = 4};
    assert_int_equal(gpu->step_begin(on_gpu, 0), 1);
    gpu->attention(on_gpu, NULL, NULL, &kv, &(struct rows){.n = 1}, 0, 1);
    assert_int_equal(gpu->step_end(on_gpu, &err), BPO_ERR_RESOURCE);
    assert_non_null(strstr(err.message, "258"));
    gpu->step_begin(on_gpu, 0);
    const struct weight odd = {.data = &byte, .dtype = (enum dtype)0, .rows = 1, .cols = 1};
    gpu->matmul(on_gpu, NULL, NULL, &odd, &(struct rows){.n = 1}, MATMUL_STORE);
    assert_int_equal(gpu->step_end(on_gpu, &err), BPO_ERR_MODEL);
    assert_int_equal(gpu->step_begin(on_gpu, 0), 1); /* the next step is not affected */
    assert_ok(gpu->step_end(on_gpu, &err), &err);
    struct backend_info info;
    gpu->info(on_gpu, &info);
    assert_string_equal(info.device, "cuda");
    assert_non_null(strstr(info.simd, "sm_"));
    assert_non_null(strstr(info.blas, "cuBLAS"));
}

/* ---------------------------------------------------------------- determinism */

static const struct CMUnitTest numeric[] = {
    cmocka_unit_test(test_embed_and_gather),
    cmocka_unit_test(test_rmsnorm),
    cmocka_unit_test(test_swiglu),
    cmocka_unit_test(test_matmul),
    cmocka_unit_test(test_matmul_rows_alike),
    cmocka_unit_test(test_rope),
    cmocka_unit_test(test_attention),
    cmocka_unit_test(test_replayed_steps),
};

static uint64_t hash_of_all(void) {
    hash = 0xcbf29ce484222325ULL;
    random_state = 1;
    for (size_t i = 0; i < COUNT(numeric); i++) {
        void *state = NULL;
        numeric[i].test_func(&state);
    }
    return hash;
}

/* The order of threads and blocks does not matter; on a GPU, ten runs give the same bits. */
static void test_same_bits_in_any_order(void **state) {
    (void)state;
    uint64_t first = hash_of_all();
    if (!knobs.order) {
        for (int i = 1; i < 10; i++) {
            assert_true(hash_of_all() == first);
        }
        return;
    }
    knobs.order(ORDER_REVERSE, 0);
    uint64_t reverse = hash_of_all();
    knobs.order(ORDER_RANDOM, 1);
    uint64_t random = hash_of_all();
    knobs.order(ORDER_FORWARD, 0);
    assert_true(first == reverse && first == random);
}

static int set_up(void **state) {
    struct bpo_error err = {0};
    const struct backend_options options = {.n_threads = 1, .matmul = BPO_MATMUL_OWN};
    (void)state;
    (void)setenv("BPO_SIMD", "scalar", 1); /* the plainest of the CPU's ops */
    on_cpu = cpu->create(&options, &err);
    on_gpu = gpu->create(&options, &err);
    if (!on_gpu) {
        (void)fprintf(stderr, "%s (%s)\n", err.message, err.hint);
    }
    return on_cpu && on_gpu ? 0 : -1;
}

static int tear_down(void **state) {
    (void)state;
    gpu->destroy(on_gpu);
    cpu->destroy(on_cpu);
    return knobs.live && knobs.live() != 0; /* nothing may stay allocated */
}

int main(void) {
    const struct CMUnitTest others[] = {
        cmocka_unit_test(test_same_bits_in_any_order),
        cmocka_unit_test(test_kv_copies),
        cmocka_unit_test(test_first_nonfinite),
        cmocka_unit_test(test_large_copies),
        cmocka_unit_test(test_prompt_and_decoding_agree),
        cmocka_unit_test(test_clear_errors),
        cmocka_unit_test(test_recorded_steps_end_with_their_backend),
        cmocka_unit_test(test_every_call_fails),
        cmocka_unit_test(test_every_kernel_crashes),
    };
    struct CMUnitTest tests[COUNT(numeric) + COUNT(others)];
    memcpy(tests, numeric, sizeof numeric);
    memcpy(tests + COUNT(numeric), others, sizeof others);
    cpu = kernels_cpu();
    gpu = cuda_library(&knobs, COUNT(tests));
    return gpu ? cmocka_run_group_tests(tests, set_up, tear_down) : 0;
}

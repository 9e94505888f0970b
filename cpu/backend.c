/*
 * backend.c - the op table of the CPU: life, memory, the KV cache's copies, and the ops that take
 * one row after another. What the ops compute is defined in kernels.h.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/error.h"
#include "base/numbers.h"
#include "cpu/cpu.h"

/* ---------------------------------------------------------------- life and memory */

/* A list of the MEMORY_LAZY allocations, by which cpu_free tells them from others. */
struct mapping {
    struct mapping *next;
    void *data;
};

static void cpu_destroy(struct backend *b) {
    if (b) {
        work_end(b);
        free(b);
    }
}

static struct backend *cpu_create(const struct backend_options *options, struct bpo_error *err) {
    if (options->n_threads < 1) {
        (void)bpo_fail(err, BPO_ERR_USAGE, NULL, "%d threads: at least 1 is needed",
                       options->n_threads);
        return NULL;
    }
    const struct cpu_level *level = cpu_level_choose(err);
    if (!level) {
        return NULL;
    }
    struct backend *b = calloc(1, sizeof *b);
    if (!b) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, MEMORY_HINT, "not enough memory for the CPU backend");
        return NULL;
    }
    b->level = level;
    b->matmul = options->matmul;
    if (b->matmul == BPO_MATMUL_AUTO) {
        b->matmul = level == &cpu_level_scalar ? BPO_MATMUL_OPENBLAS : BPO_MATMUL_OWN;
    }
    if (b->matmul == BPO_MATMUL_OPENBLAS) {
        openblas_prepare();
    }
    if (work_begin(b, options->n_threads, err)) {
        cpu_destroy(b);
        return NULL;
    }
    return b;
}

static void cpu_info(const struct backend *b, struct backend_info *info) {
    *info = (struct backend_info){.device = "cpu",
                                  .simd = b->level->name,
                                  .matmul = b->matmul,
                                  .n_threads = threads_count(b->threads)};
    openblas_info(info);
    (void)snprintf(info->numerics, sizeof info->numerics, "cpu %d%s%s", NUMERICS_VERSION,
                   b->matmul == BPO_MATMUL_OPENBLAS ? ", " : "",
                   b->matmul == BPO_MATMUL_OPENBLAS ? info->blas : "");
}

/* What is allocated for n_bytes: whole cache lines, at least one. */
static size_t allocated_bytes(size_t n_bytes) {
    return n_bytes == 0 ? 64 : (n_bytes + 63) / 64 * 64;
}

static void *fail_alloc(struct bpo_error *err, size_t n_bytes) {
    (void)bpo_fail(err, BPO_ERR_RESOURCE, MEMORY_HINT, "cannot allocate %zu bytes (%.1f MiB)",
                   n_bytes, (double)n_bytes / 1048576.0);
    return NULL;
}

/* Pages that are committed on first touch. Huge pages are turned off, because one would commit 2
 * MiB for the first position of a head. */
static void *alloc_lazy(struct backend *b, size_t n_bytes) {
    struct mapping *mapping = malloc(sizeof *mapping);
    if (!mapping) {
        return NULL;
    }
    int flags = MAP_PRIVATE | MAP_ANON;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void *data = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data == MAP_FAILED) {
        free(mapping);
        return NULL;
    }
#ifdef MADV_NOHUGEPAGE
    /* fails where the system has no huge pages, which is as good */
    (void)madvise(data, n_bytes, MADV_NOHUGEPAGE);
#endif
    *mapping = (struct mapping){.next = b->mappings, .data = data};
    b->mappings = mapping;
    return data;
}

static void *cpu_alloc(struct backend *b, size_t n_bytes, enum memory_kind kind,
                       struct bpo_error *err) {
    if (n_bytes > SIZE_MAX / 2 - 64) {
        return fail_alloc(err, n_bytes);
    }
    size_t rounded = allocated_bytes(n_bytes);
    void *data = kind == MEMORY_LAZY ? alloc_lazy(b, rounded) : aligned_alloc(64, rounded);
    return data ? data : fail_alloc(err, n_bytes);
}

static void cpu_free(struct backend *b, void *data, size_t n_bytes) {
    for (struct mapping **at = &b->mappings; *at; at = &(*at)->next) {
        struct mapping *mapping = *at;
        if (mapping->data == data) {
            (void)munmap(data, allocated_bytes(n_bytes));
            *at = mapping->next;
            free(mapping);
            return;
        }
    }
    free(data);
}

/* Backend memory is host memory here. */
static int cpu_copy(struct backend *b, void *to, const void *from, size_t n_bytes,
                    struct bpo_error *err) {
    (void)b;
    (void)err;
    if (n_bytes > 0) {
        memcpy(to, from, n_bytes);
    }
    return 0;
}

static const void *cpu_load_weights(struct backend *b, const void *host, size_t n_bytes,
                                    struct bpo_error *err) {
    (void)b;
    (void)n_bytes;
    (void)err;
    return host;
}

static int cpu_step_begin(struct backend *b, uint64_t shape) {
    (void)shape;
    b->error.code = BPO_OK;
    return 1;
}

static int cpu_step_end(struct backend *b, struct bpo_error *err) {
    int code = b->error.code;
    if (code && err) {
        *err = b->error;
    }
    b->error.code = BPO_OK;
    return code;
}

/* ---------------------------------------------------------------- a step: one row after another */

static void cpu_embed(struct backend *b, float *x, const struct weight *table,
                      const struct rows *rows) {
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        b->level->widen(x + r * table->cols, weight_row(table, (size_t)rows->token[r]),
                        table->cols);
    }
}

static void cpu_gather(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                       int32_t dim) {
    (void)b;
    for (size_t i = 0; i < (size_t)n; i++) {
        memcpy(y + i * (size_t)dim, x + (size_t)index[i] * (size_t)dim, (size_t)dim * sizeof *y);
    }
}

struct rmsnorm_op {
    const struct cpu_level *level;
    float *y;
    const float *x;
    const uint16_t *gain;
    size_t dim;
    float eps;
};

static void rmsnorm_item(const void *arg, size_t r, size_t thread) {
    const struct rmsnorm_op *op = arg;
    (void)thread;
    op->level->rmsnorm(op->y + r * op->dim, op->x + r * op->dim, op->gain, op->dim, op->eps);
}

static void cpu_rmsnorm(struct backend *b, float *y, const float *x, const struct weight *gain,
                        int32_t n, float eps) {
    const struct rmsnorm_op op = {b->level, y, x, weight_row(gain, 0), gain->cols, eps};
    for_each(b, rmsnorm_item, &op, (size_t)n, (size_t)n * gain->cols * 2); /* square, then scale */
}

struct swiglu_op {
    const struct cpu_level *level;
    float *y;
    const float *gate_up;
    size_t ffn_dim;
};

static void swiglu_item(const void *arg, size_t r, size_t thread) {
    const struct swiglu_op *op = arg;
    const float *gate = op->gate_up + r * 2 * op->ffn_dim;
    (void)thread;
    op->level->swiglu(op->y + r * op->ffn_dim, gate, gate + op->ffn_dim, op->ffn_dim);
}

static void cpu_swiglu(struct backend *b, float *y, const float *gate_up, int32_t n,
                       int32_t ffn_dim) {
    const struct swiglu_op op = {b->level, y, gate_up, (size_t)ffn_dim};
    for_each(b, swiglu_item, &op, (size_t)n, (size_t)n * (size_t)ffn_dim * 4);
}

/* ---------------------------------------------------------------- RoPE */

static void cpu_rope_angles(struct backend *b, float *angles, const float *inv_freq,
                            const struct rows *rows, int32_t head_dim) {
    size_t half = (size_t)head_dim / 2;
    (void)b;
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        for (size_t i = 0; i < half; i++) {
            float *angle = angles + (r * half + i) * 2;
            sin_cos((float)rows->pos[r] * inv_freq[i], &angle[1], &angle[0]);
        }
    }
}

struct rope_op {
    const struct cpu_level *level;
    float *qkv;
    const struct kv_cache *kv;
    const float *angles;
    const struct rows *rows;
    int32_t layer, n_heads;
};

static void rope_item(const void *arg, size_t r, size_t thread) {
    const struct rope_op *op = arg;
    const struct kv_cache *kv = op->kv;
    size_t hd = (size_t)kv->head_dim;
    const float *angles = op->angles + r * hd;
    float *q = op->qkv + r * hd * (size_t)(op->n_heads + 2 * kv->n_kv_heads);
    float *k = q + hd * (size_t)op->n_heads, *v = k + hd * (size_t)kv->n_kv_heads;
    (void)thread;
    for (size_t h = 0; h < (size_t)op->n_heads; h++) {
        op->level->rotate(q + h * hd, angles, hd / 2);
    }
    for (int32_t h = 0; h < kv->n_kv_heads; h++) {
        op->level->rotate(k + (size_t)h * hd, angles, hd / 2);
        op->level->narrow(kv_at(kv, op->rows->slot[r], op->layer, 0, h, op->rows->pos[r]),
                          k + (size_t)h * hd, hd);
        op->level->narrow(kv_at(kv, op->rows->slot[r], op->layer, 1, h, op->rows->pos[r]),
                          v + (size_t)h * hd, hd);
    }
}

static void cpu_rope_kv(struct backend *b, float *qkv, const struct kv_cache *kv,
                        const float *angles, const struct rows *rows, int32_t layer,
                        int32_t n_heads) {
    const struct rope_op op = {b->level, qkv, kv, angles, rows, layer, n_heads};
    size_t row_size = (size_t)kv->head_dim * (size_t)(n_heads + 2 * kv->n_kv_heads);
    for_each(b, rope_item, &op, (size_t)rows->n, (size_t)rows->n * row_size);
}

/* ---------------------------------------------------------------- outside a step */

static int cpu_first_nonfinite(struct backend *b, int32_t *found, const float *x, int32_t n,
                               size_t cols, struct bpo_error *err) {
    (void)b;
    (void)err;
    *found = -1;
    for (int32_t r = 0; r < n && *found < 0; r++) {
        const float *row = x + (size_t)r * cols;
        uint32_t largest = 0;
        for (size_t i = 0; i < cols; i++) {
            uint32_t size = bits_of(row[i]) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        *found = largest >= 0x7f800000 ? r : -1; /* the bits of an infinity or a NaN */
    }
    return 0;
}

static void cpu_for_each(struct backend *b, void (*fn)(const void *arg, size_t item, size_t thread),
                         const void *arg, size_t n_items) {
    for_each(b, fn, arg, n_items, SIZE_MAX);
}

/* Copies the first n positions of every layer, plane and head from one slot to another. If
 * packed_to or packed_from is not NULL, it replaces that slot. */
static void kv_move(const struct kv_cache *kv, uint16_t *packed_to, const uint16_t *packed_from,
                    int32_t to_slot, int32_t from_slot, int32_t n) {
    /* of a head, whose positions are contiguous */
    size_t n_values = (size_t)n * (size_t)kv->head_dim, at = 0;
    for (int32_t l = 0; l < kv->n_layers; l++) {
        for (int32_t plane = 0; plane < 2; plane++) {
            for (int32_t h = 0; h < kv->n_kv_heads; h++, at += n_values) {
                memcpy(packed_to ? packed_to + at : kv_at(kv, to_slot, l, plane, h, 0),
                       packed_from ? packed_from + at : kv_at(kv, from_slot, l, plane, h, 0),
                       n_values * sizeof(uint16_t));
            }
        }
    }
}

static int cpu_kv_copy(struct backend *b, const struct kv_cache *kv, int32_t to_slot,
                       int32_t from_slot, int32_t n, struct bpo_error *err) {
    (void)b;
    int failed = kv_check(kv, to_slot, n, err);
    failed = failed ? failed : kv_check(kv, from_slot, n, err);
    if (!failed && to_slot != from_slot) {
        kv_move(kv, NULL, NULL, to_slot, from_slot, n);
    }
    return failed;
}

static int cpu_kv_export(struct backend *b, void *to_host, const struct kv_cache *kv, int32_t slot,
                         int32_t n, struct bpo_error *err) {
    (void)b;
    int failed = kv_check(kv, slot, n, err);
    if (!failed) {
        kv_move(kv, to_host, NULL, 0, slot, n);
    }
    return failed;
}

static int cpu_kv_import(struct backend *b, const struct kv_cache *kv, const void *from_host,
                         int32_t slot, int32_t n, struct bpo_error *err) {
    (void)b;
    int failed = kv_check(kv, slot, n, err);
    if (!failed) {
        kv_move(kv, NULL, from_host, slot, 0, n);
    }
    return failed;
}

const struct kernels *kernels_cpu(void) {
    static const struct kernels table = {
        .abi = KERNELS_ABI,
        .name = "cpu",
        .host_memory = true,
        .create = cpu_create,
        .destroy = cpu_destroy,
        .info = cpu_info,
        .alloc = cpu_alloc,
        .free = cpu_free,
        .upload = cpu_copy,
        .download = cpu_copy,
        .load_weights = cpu_load_weights,
        .step_begin = cpu_step_begin,
        .step_end = cpu_step_end,
        .embed = cpu_embed,
        .rmsnorm = cpu_rmsnorm,
        .matmul = cpu_matmul,
        .rope_angles = cpu_rope_angles,
        .rope_kv = cpu_rope_kv,
        .attention = cpu_attention,
        .swiglu = cpu_swiglu,
        .gather = cpu_gather,
        .first_nonfinite = cpu_first_nonfinite,
        .sample = NULL,
        .for_each = cpu_for_each,
        .kv_copy = cpu_kv_copy,
        .kv_export = cpu_kv_export,
        .kv_import = cpu_kv_import,
    };
    return &table;
}

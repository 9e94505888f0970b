/*
 * kernels.h - the op table: the vocabulary that the forward pass is written in, and what the ops of
 * a CPU compute, to the bit.
 *
 *   D model width    F feed-forward width    H query heads    HK key/value heads    hd head size
 *   L layers         V vocabulary            S positions of a slot                R rows of a call
 *
 * A row is (token, slot, position), where a slot is one sequence's KV cache. Prefill is R rows of
 * one slot; decoding is one row per slot; checking k drafted tokens is k + 1 rows of one slot; a
 * batch is rows of many slots.
 *
 * A backend fills one struct kernels. There are three:
 *
 *   bpo.c         plain scalar C, one row after another: the ops that forward() calls, to be read,
 *                 and to check the others against
 *   cpu/          the same bits, fast: threads, AVX-512, AVX2, NEON, OpenBLAS
 *   kernels.cu    NVIDIA GPUs: CUDA and cuBLAS, in a library of its own that engine/ opens
 *
 * Arguments come in the order: context, outputs, inputs, sizes, scalars. Unless a comment says
 * otherwise, pointers are to backend memory, and activations are fp32, row-major and dense.
 */
#ifndef BPO_KERNELS_H
#define BPO_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "bpo.h" /* enum bpo_matmul */

#define KERNELS_ABI 4

/*
 * THE CANONICAL ARITHMETIC. Every CPU computes the same bits, because each value is made by the
 * same operations in the same order, whatever is computed beside it:
 *
 *   a sum over k     has 16 lanes: lane k % 16 takes element k, in ascending order, starting from
 *                    +0; a last part shorter than 16 is filled up with zeros. At the end lane i
 *                    takes lane i + 8, then i + 4, i + 2, i + 1.
 *   a dot product    is such a sum, whose lanes take their elements by fused multiply-add
 *   attention        takes positions in blocks of 128, each with a softmax of its own
 *   exp, sin, cos    are those of base/numbers.h
 *   all else         is one IEEE operation after another, as bpo.c writes them; nothing is fused
 *                    that is not written so
 */
enum {
    NUMERICS_VERSION = 1, /* raise it when a change gives other bits: keys and values are cached */
    LANES = 16,
    ATTENTION_BLOCK = 128, /* positions */
    OPENBLAS_PANEL =
        128, /* weight rows of one sgemm call: its rounding depends on a call's sizes */
};

struct backend; /* one backend's state: threads or streams, scratch memory */

enum dtype { DTYPE_F16 = 1 };

/* A matrix [rows][cols] of weights in backend memory; a row starts every row_bytes. scales is NULL
 * for F16. */
struct weight {
    const void *data;
    enum dtype dtype;
    size_t rows, cols, row_bytes;
    const float *scales;
};

/* Consecutive rows of one kind. ROWS_PROMPT: one chunk of one prompt; chunks always begin and end
 * at the same positions, so that a matmul whose rounding depends on the number of rows (OpenBLAS)
 * gives a prompt the same bits in any company. ROWS_DECODE: generated tokens, which are multiplied
 * by kernels whose bits do not depend on the number of rows. */
enum span_kind { ROWS_DECODE, ROWS_PROMPT };
struct span {
    int32_t first, n;
    enum span_kind kind;
};

/* The first n positions of a slot hold the same keys and values as those of another slot, and may
 * be read there. */
struct shared_prefix {
    int32_t slot, n;
};

/* The rows of one forward call. token, slot and pos [n] are backend memory. spans is host memory
 * and covers the rows in order (n_spans 0: all rows are ROWS_DECODE); shared is host memory,
 * [slots] (NULL: nothing is known to be shared). */
struct rows {
    int32_t n;
    const int32_t *token, *slot, *pos;
    const struct span *spans;
    int32_t n_spans;
    const struct shared_prefix *shared;
};

/* The KV cache: fp16 [slot][L][2: K, V][HK][S][hd]. Head-major, so that attention reads a head's
 * positions in one stream. The strides are in bytes; a head's is skewed, so that heads do not alias
 * in the CPU's caches. */
struct kv_cache {
    void *data;
    size_t slot_bytes, layer_bytes, plane_bytes, head_bytes, pos_bytes;
    int32_t n_slots, n_layers, n_kv_heads, head_dim, n_positions;
};

#ifdef __CUDACC__
#define KERNELS_INLINE static inline __host__ __device__
#else
#define KERNELS_INLINE static inline
#endif

/* A row of weights, as the bits of fp16. */
KERNELS_INLINE const uint16_t *weight_row(const struct weight *w, size_t row) {
    return (const uint16_t *)((const char *)w->data + row * w->row_bytes);
}

/* The hd values of a position, as the bits of fp16: of K (plane 0) or V (plane 1). */
KERNELS_INLINE uint16_t *kv_at(const struct kv_cache *kv, int32_t slot, int32_t layer,
                               int32_t plane, int32_t head, int32_t pos) {
    return (uint16_t *)((char *)kv->data + (size_t)slot * kv->slot_bytes +
                        (size_t)layer * kv->layer_bytes + (size_t)plane * kv->plane_bytes +
                        (size_t)head * kv->head_bytes + (size_t)pos * kv->pos_bytes);
}

/* Does the cache have this slot, with n positions? Of the copies' arguments. */
static inline int kv_check(const struct kv_cache *kv, int32_t slot, int32_t n,
                           struct bpo_error *err) {
    if (slot >= 0 && slot < kv->n_slots && n >= 0 && n <= kv->n_positions) {
        return 0;
    }
    return bpo_fail(err, BPO_ERR_RUN, NULL,
                    "the KV cache has %d slots of %d positions; asked for %d positions of slot %d",
                    kv->n_slots, kv->n_positions, n, slot);
}

enum matmul_mode { MATMUL_STORE, MATMUL_ADD };

/* What the sample op needs to know of one row; sampler_draw in bpo.c is the reference. */
struct sample_params {
    float temperature, top_p;
    int32_t top_k;
    const int32_t *forbidden; /* host memory */
    int32_t n_forbidden;
    double u; /* the uniform random number of this draw, in [0, 1) */
};

struct backend_options {
    int32_t n_threads; /* >= 1 */
    /* Who multiplies prompt rows on the CPU. AUTO: OWN where cpu/ has SIMD kernels for this CPU,
     * else OPENBLAS. */
    enum bpo_matmul matmul;
    /* Called with the bytes of weights uploaded so far; or NULL. */
    void (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
};

struct backend_info {
    const char *device;     /* "cpu" */
    const char *simd;       /* "scalar", "avx2", ...: the level in use */
    enum bpo_matmul matmul; /* OWN or OPENBLAS */
    char blas[128];         /* OpenBLAS's version and core name, or "" */
    char blas_hint[160];    /* what to do if that core lacks instructions that the CPU has; or "" */
    /* Backends with the same numerics give a prompt the same bits; "": not even this one does. */
    char numerics[160];
    int32_t n_threads;
};

enum memory_kind {
    MEMORY_BUFFER, /* activations: written soon, in full */
    MEMORY_LAZY,   /* a KV cache: large, zero pages that are committed on first touch */
};

/* Ops return nothing: an error sticks to the backend, later ops of the step do nothing, and
 * step_end reports it. */
struct kernels {
    int abi; /* KERNELS_ABI */
    const char *name;
    bool host_memory; /* backend memory is host memory: results can be read without a download */

    /* ---- life and memory ---- */

    struct backend *(*create)(const struct backend_options *options, struct bpo_error *err);
    void (*destroy)(struct backend *b);
    void (*info)(const struct backend *b, struct backend_info *info);

    /* 64-byte aligned. */
    void *(*alloc)(struct backend *b, size_t n_bytes, enum memory_kind kind, struct bpo_error *err);
    void (*free)(struct backend *b, void *data, size_t n_bytes);

    int (*upload)(struct backend *b, void *to, const void *from_host, size_t n_bytes,
                  struct bpo_error *err);
    int (*download)(struct backend *b, void *to_host, const void *from, size_t n_bytes,
                    struct bpo_error *err);

    /* Bytes that alloc can still give, and the device's total. NULL: backend memory is the host's,
     * and a KV cache is committed on first touch; with this op it is allocated in full at once. */
    int (*memory)(struct backend *b, size_t *available, size_t *total, struct bpo_error *err);

    /* Uploads weights, which stay mapped in host memory while the backend lives. The CPU reads them
     * where they are. */
    const void *(*load_weights)(struct backend *b, const void *host, size_t n_bytes,
                                struct bpo_error *err);

    /* ---- a step ---- */

    /* step_begin returns 1 if the caller must issue the ops, 0 if the backend replays a recorded
     * step (a CUDA graph): then call only step_end. shape identifies the recording: equal shapes
     * make equal calls, with equal pointers, of decoding rows only, all of which want logits; 0: do
     * not record. */
    int (*step_begin)(struct backend *b, uint64_t shape);
    int (*step_end)(struct backend *b, struct bpo_error *err);

    /* The number of rows to pad a decoding step of n rows to, so that few shapes occur. The padding
     * rows are inert: token 0, slot -1, position 0; they write nothing to the cache, and their
     * results mean nothing. NULL: no padding. */
    int32_t (*padded)(const struct backend *b, int32_t n);

    /* x[r] = table[token[r]]
     *
     *     x [R][D], table [V][D] */
    void (*embed)(struct backend *b, float *x, const struct weight *table, const struct rows *rows);

    /* y = x / sqrt(mean(x^2) + eps) * gain           RMSNorm: Zhang and Sennrich 2019
     *
     *     y, x [n][D], gain [1][D] */
    void (*rmsnorm)(struct backend *b, float *y, const float *x, const struct weight *gain,
                    int32_t n, float eps);

    /* y = x w^T, or y += x w^T. Of the rows only n and the spans count.
     *
     *     y [R][w.rows], x [R][w.cols] */
    void (*matmul)(struct backend *b, float *y, const float *x, const struct weight *w,
                   const struct rows *rows, enum matmul_mode mode);

    /* angles[r][i] = {cos, sin}(pos[r] * inv_freq[i]), the product rounded to fp32
     *
     *     angles [R][hd/2][2], inv_freq [hd/2] */
    void (*rope_angles)(struct backend *b, float *angles, const float *inv_freq,
                        const struct rows *rows, int32_t head_dim);

    /* Rotates each query head (in place) and key head by its row's angles, pairing (i, i + hd/2),
     * and writes K and V to the row's place in the cache, rounded to fp16. RoPE: Su et al. 2021
     *
     *     qkv [R][(H + 2 HK) hd], angles [R][hd/2][2] */
    void (*rope_kv)(struct backend *b, float *qkv, const struct kv_cache *kv, const float *angles,
                    const struct rows *rows, int32_t layer, int32_t n_heads);

    /* y[r][h] = softmax(q[r][h] K^T / sqrt(hd)) V over the positions 0 .. pos[r] of the row's slot.
     * Query head h reads key/value head h / (H / HK) (GQA: Ainslie et al. 2023). q is the first
     * H hd values of a row of qkv.
     *
     *     y [R][H hd] */
    void (*attention)(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                      const struct rows *rows, int32_t layer, int32_t n_heads);

    /* y = silu(gate) * up, silu(z) = z / (1 + exp(-z))           SwiGLU: Shazeer 2020
     *
     *     y [n][F], gate_up [n][2F]: gate, then up */
    void (*swiglu)(struct backend *b, float *y, const float *gate_up, int32_t n, int32_t ffn_dim);

    /* y[i] = x[index[i]]
     *
     *     y [n][D], x [R][D], index [n] */
    void (*gather)(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                   int32_t dim);

    /* ---- around a step ---- */

    /* *found = the first of n rows that holds a NaN or an infinity, or -1; found is host memory.
     * Outside a step, or within one that is not recorded. */
    int (*first_nonfinite)(struct backend *b, int32_t *found, const float *x, int32_t n,
                           size_t cols, struct bpo_error *err);

    /* Draws one id per row of logits [n][V] on the backend; ids and params are host memory. -1:
     * every id is forbidden; -2: the row holds a NaN or an infinity. NULL: the engine downloads the
     * logits and draws itself, on the threads of for_each. */
    int (*sample)(struct backend *b, int32_t *ids, const float *logits,
                  const struct sample_params *params, int32_t n, size_t vocab,
                  struct bpo_error *err);

    /* Calls fn(arg, item, thread) for each item < n_items, in any order, on the backend's host
     * threads; thread < n_threads of its info. NULL: it has none to lend. */
    void (*for_each)(struct backend *b, void (*fn)(const void *arg, size_t item, size_t thread),
                     const void *arg, size_t n_items);

    /* The first n positions of every layer and head: from one slot to another, and from and to host
     * memory, packed there as fp16 [L][2][HK][n][hd]. Outside a step. */
    int (*kv_copy)(struct backend *b, const struct kv_cache *kv, int32_t to_slot, int32_t from_slot,
                   int32_t n, struct bpo_error *err);
    int (*kv_export)(struct backend *b, void *to_host, const struct kv_cache *kv, int32_t slot,
                     int32_t n, struct bpo_error *err);
    int (*kv_import)(struct backend *b, const struct kv_cache *kv, const void *from_host,
                     int32_t slot, int32_t n, struct bpo_error *err);
};

/* bpo.c: embed, rmsnorm, matmul, rope_angles, rope_kv, attention, swiglu and gather in plain scalar
 * C, and nothing else of the table. They take bpo.c's own struct backend, so bpo.c alone (and a
 * test that includes it) can call them. */
const struct kernels *kernels_plain(void);

/* cpu/: BPO_SIMD=scalar|avx2|avx512|neon in the environment forces a level other than the best. */
const struct kernels *kernels_cpu(void);

/* inv_freq[i] = 1 / theta^(2i / hd), i < hd/2; exponent, power and quotient are each rounded to
 * fp32, as the reference does. The same bits on every machine; host memory. In bpo.c. */
void rope_inv_freq(float *inv_freq, int32_t head_dim, float theta);

#endif

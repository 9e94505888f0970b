/*
 * kernels.h - the op table: the vocabulary that the forward pass is written in.
 *
 * A backend (kernels.c: any CPU; a GPU library) offers one struct kernels. Arguments come in the
 * order: context, outputs, inputs, sizes, scalars. Unless a comment says otherwise pointers are to
 * backend memory, and activations are fp32, row-major and dense.
 *
 *   D model width    F feed-forward width    H query heads    HK key/value heads    hd head size
 *   L layers         V vocabulary            S positions that fit a slot            R rows in this call
 *
 * A row is (token, slot, position); a slot is one sequence's KV cache. Prefill is R rows of one
 * slot, decoding one row per slot, checking k drafted tokens k + 1 rows of one slot, a batch rows
 * of many slots.
 *
 * Ops return nothing: an error sticks to the backend, later ops of the step do nothing, and
 * step_end reports it.
 */
#ifndef BPO_KERNELS_H
#define BPO_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bpo_error.h"

#define KERNELS_ABI 3

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

/* A run of rows that belong together. ROWS_PROMPT: one chunk of one prompt, always cut at the same
 * positions, so that a matmul whose rounding depends on the number of rows (OpenBLAS) gives a
 * prompt the same bits in any company. ROWS_DECODE: generated tokens, computed by kernels whose
 * bits do not depend on the number of rows. */
enum span_kind { ROWS_DECODE, ROWS_PROMPT };
struct span {
    int32_t first, n;
    enum span_kind kind;
};

/* The first n positions of a slot hold the same as those of another slot: they may be read
 * there. */
struct twin {
    int32_t slot, n;
};

/* The rows of one forward call. The arrays of n are backend memory, the spans are host memory and
 * cover the rows in order (n_spans 0: all rows are ROWS_DECODE); twins is host memory, [slots]
 * (NULL: none is known). */
struct rows {
    int32_t n;
    const int32_t *token, *slot, *pos;
    const struct span *spans;
    int32_t n_spans;
    const struct twin *twins;
};

/* The KV cache: fp16 [slot][L][2: K, V][HK][S][hd], head-major, so that attention reads each head's
 * positions in one stream. The strides are bytes; a head's is skewed so that heads do not alias in
 * the CPU's caches. */
struct kv_cache {
    void *data;
    size_t slot_bytes, layer_bytes, plane_bytes, head_bytes, pos_bytes;
    int32_t n_slots, n_layers, n_kv_heads, head_dim, n_positions;
};

enum matmul_mode { MATMUL_STORE, MATMUL_ADD };

/* Who multiplies prompt rows on the CPU. AUTO is resolved when the backend is made: OWN where there
 * is a SIMD level for the CPU, else OPENBLAS. */
enum matmul_choice { MATMUL_AUTO, MATMUL_OWN, MATMUL_OPENBLAS };

/* What the sample op needs to know of one row; see sampler_draw in bpo.c, the reference. */
struct sample_params {
    float temperature, top_p;
    int32_t top_k;
    const int32_t *forbidden; /* host memory */
    int32_t n_forbidden;
    double u; /* the uniform number of this draw, in [0, 1) */
};

struct backend_options {
    int32_t n_threads; /* >= 1 */
    enum matmul_choice matmul;
    /* bytes of weights that were brought over; or NULL */
    void (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
};

struct backend_info {
    const char *device;        /* "cpu" */
    const char *simd;          /* "scalar", "avx2", ...: the level that runs */
    enum matmul_choice matmul; /* OWN or OPENBLAS */
    char blas[128];            /* OpenBLAS's version and core name, or "" */
    /* what to do when that core lacks instructions that the CPU has; or "" */
    char blas_hint[160];
    char numerics
        [160]; /* two backends of the same numerics give a prompt the same bits; "": not even promised of one */
    int32_t n_threads;
};

enum memory_kind {
    MEMORY_BUFFER, /* activations: written soon, in full */
    MEMORY_LAZY,   /* a KV cache: large, zero pages that are committed by use, never huge pages */
};

struct kernels {
    int abi; /* KERNELS_ABI */
    const char *name;
    bool host_memory; /* backend memory is host memory: what is to be read needs no download */

    /* life and memory */
    struct backend *(*create)(const struct backend_options *options, struct bpo_error *err);
    void (*destroy)(struct backend *b);
    void (*info)(const struct backend *b, struct backend_info *info);
    /* 64-byte aligned */
    void *(*alloc)(struct backend *b, size_t n_bytes, enum memory_kind kind, struct bpo_error *err);
    void (*free)(struct backend *b, void *data, size_t n_bytes);
    int (*upload)(struct backend *b, void *to, const void *from_host, size_t n_bytes,
                  struct bpo_error *err);
    int (*download)(struct backend *b, void *to_host, const void *from, size_t n_bytes,
                    struct bpo_error *err);
    /* Bytes that alloc can still give, and the device's in all. NULL: backend memory is the host's,
     * and a KV cache is committed by use; with this op it is not lazy: all of it is taken at
     * once. */
    int (*memory)(struct backend *b, size_t *available, size_t *total, struct bpo_error *err);
    /* Brings weights, mapped in host memory for as long as the backend lives, to the backend: the
     * CPU reads them where they are. */
    const void *(*load_weights)(struct backend *b, const void *host, size_t n_bytes,
                                struct bpo_error *err);

    /* A step. step_begin says whether the ops are to be called (1), or the step is a replay of a
     * recorded one and only step_end is (0). shape names what was recorded: equal shapes make equal
     * calls, with equal pointers, of decoding rows only, and all of them; 0: not to be recorded. */
    int (*step_begin)(struct backend *b, uint64_t shape);
    int (*step_end)(struct backend *b, struct bpo_error *err);

    /* How many rows a step of n rows, all decoding, is to be made of so that few shapes occur: the
     * further ones are inert, token 0 of slot -1 at position 0: nothing is written to the cache,
     * their results mean nothing. NULL: n. */
    int32_t (*padded)(const struct backend *b, int32_t n);

    /* x[r] = table[token[r]]                                                                x [R][D], table
     * [V][D] */
    void (*embed)(struct backend *b, float *x, const struct weight *table, const struct rows *rows);

    /* y = x / sqrt(mean(x^2) + eps) * gain            (RMSNorm: Zhang and Sennrich 2019)    x, y [n][D], gain
     * [1][D] */
    void (*rmsnorm)(struct backend *b, float *y, const float *x, const struct weight *gain,
                    int32_t n, float eps);

    /* y = x w^T, or y += x w^T                          y [R][w.rows], x [R][w.cols]; of rows only n and spans
     * count */
    void (*matmul)(struct backend *b, float *y, const float *x, const struct weight *w,
                   const struct rows *rows, enum matmul_mode mode);

    /* angles[r][i] = {cos, sin}(pos[r] * inv_freq[i]), the product rounded to fp32
     *                                                                           angles [R][hd/2][2], inv_freq
     * [hd/2] */
    void (*rope_angles)(struct backend *b, float *angles, const float *inv_freq,
                        const struct rows *rows, int32_t head_dim);

    /* Rotates each query head (in place) and key head by its row's angles, pair (i, i + hd/2), and
     * writes K and V to the row's place in the cache, rounded to fp16 (RoPE: Su et al. 2021).
     *                                                                    qkv [R][(H + 2 HK) hd], angles
     * [R][hd/2][2] */
    void (*rope_kv)(struct backend *b, float *qkv, const struct kv_cache *kv, const float *angles,
                    const struct rows *rows, int32_t layer, int32_t n_heads);

    /* y[r][h] = softmax(q[r][h] K^T / sqrt(hd)) V over the positions 0 .. pos[r] of the row's slot;
     * query head h reads key/value head h / (H / HK) (GQA: Ainslie et al. 2023). q is the first H
     * hd values of a row of qkv.
     *                                                                                                    y [R][H
     * hd] */
    void (*attention)(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                      const struct rows *rows, int32_t layer, int32_t n_heads);

    /* y = silu(gate) * up, silu(z) = z / (1 + exp(-z))  (SwiGLU: Shazeer 2020)
     *                                                                     y [n][F], gate_up [n][2F]: gate, then
     * up */
    void (*swiglu)(struct backend *b, float *y, const float *gate_up, int32_t n, int32_t ffn_dim);

    /* y[i] = x[index[i]]                                                            y [n][D], x [R][D], index
     * [n] */
    void (*gather)(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                   int32_t dim);

    /* *found = the first of n rows that holds a NaN or an infinity, or -1; found is host memory.
     * Outside a step, or as its last op on a backend that does not record. */
    int (*first_nonfinite)(struct backend *b, int32_t *found, const float *x, int32_t n,
                           size_t cols, struct bpo_error *err);

    /* Draws one id per row of logits [n][V] on the backend; ids and params are host memory. -1:
     * every id is forbidden;
     * -2: the row holds a NaN or an infinity. NULL: the engine downloads the logits and draws itself, on the threads of
     * for_each. */
    int (*sample)(struct backend *b, int32_t *ids, const float *logits,
                  const struct sample_params *params, int32_t n, size_t vocab,
                  struct bpo_error *err);

    /* Calls fn(arg, item, thread) for each item < n_items, in any order, on the backend's host
     * threads: thread < n_threads of its info. NULL: it has none to lend. */
    void (*for_each)(struct backend *b, void (*fn)(const void *arg, size_t item, size_t thread),
                     const void *arg, size_t n_items);

    /* The first n positions of every layer and head: from one slot to another, and from and to host
     * memory, there packed fp16 [L][2][HK][n][hd]. Outside a step. */
    int (*kv_copy)(struct backend *b, const struct kv_cache *kv, int32_t to_slot, int32_t from_slot,
                   int32_t n, struct bpo_error *err);
    int (*kv_export)(struct backend *b, void *to_host, const struct kv_cache *kv, int32_t slot,
                     int32_t n, struct bpo_error *err);
    int (*kv_import)(struct backend *b, const struct kv_cache *kv, const void *from_host,
                     int32_t slot, int32_t n, struct bpo_error *err);
};

/* The CPU's op table. BPO_SIMD=scalar|avx2|avx512|neon in the environment forces a level other than
 * the CPU's best. */
const struct kernels *kernels_cpu(void);

/* The canonical exp for x <= 0 (0 below about -87): the same bits on every machine; the sampler's
 * too. */
float kernels_exp(float x);

/* inv_freq[i] = 1 / theta^(2i / hd), i < hd/2, rounded as the reference does: exponent, power and
 * quotient each to fp32; the same bits on every machine. host memory */
void kernels_inv_freq(float *inv_freq, int32_t head_dim, float theta);

#endif

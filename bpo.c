/*
 * bpo.c - THE MODEL: Llama-2 (Touvron et al. 2023) and BPO, whole, in plain scalar C.
 *
 * A BPO model rewrites a prompt into one that gets a more helpful answer from any LLM. This file is
 * all that such a rewrite needs, except text to ids and back (tokenizer.c) and reading the weights
 * (model.c). Read it from top to bottom; nothing is used before it is defined.
 *
 *     ids = encode(the template around the prompt)
 *     for each chunk of ids:              prefill: many rows in one call
 *         forward(chunk)
 *     repeat:                             decode: one row a call
 *         id = draw(logits)               temperature, top-k, top-p, one random number
 *         append id to the answer; stop if it ends it
 *         forward(id)
 *     print decode(answer), cut and stripped
 *
 *     forward(rows):                      a row is one token at one position
 *         x = embedding[token]
 *         for each layer:
 *             x += W_o attention(rope(W_qkv rmsnorm(x)))        tokens look at earlier tokens
 *             x += W_down swiglu(W_gate_up rmsnorm(x))          each token on its own
 *         logits = W_lm_head rmsnorm(x)   a score for each token that may come next
 *
 * It is also a program: `make plain` builds ./bpo-plain from this file. ./bpo, which serves many
 * prompts at once (engine/), calls this same forward() with faster ops, of cpu/ or kernels.cu. On a
 * CPU it must give the same bytes: tests compare the two.
 *
 *   D model width    F feed-forward width    H query heads    HK key/value heads    hd head size
 *   L layers         V vocabulary            S positions of a slot                R rows of a call
 */
#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/numbers.h"
#include "base/text.h"
#include "kernels.h"
#include "model.h"

/* ---------------------------------------------------------------- the ops */

/* In the order in which a token meets them. Weights and the KV cache are fp16, widened when they
 * are used; everything else is fp32. Every sum has the order that kernels.h defines, so that faster
 * code can give the same bits. */

/* The plain ops' only state: room for weights while they are used, and who multiplies prompts. */
struct backend {
    float *widened; /* [OPENBLAS_PANEL][columns of any matrix] */
    bool openblas;
};

static void widen(float *to, const uint16_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        to[i] = widen_f16(from[i]);
    }
}

/* x[r] = table[token[r]]: the model's vector for each token.
 *
 *     x [R][D], table [V][D] */
static void embed(struct backend *b, float *x, const struct weight *table,
                  const struct rows *rows) {
    (void)b;
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        widen(x + r * table->cols, weight_row(table, (size_t)rows->token[r]), table->cols);
    }
}

/* The end of a canonical sum: 16 lanes become one number. */
static float add_lanes(float lane[LANES]) {
    for (size_t half = LANES / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; i++) {
            lane[i] += lane[i + half];
        }
    }
    return lane[0];
}

/* RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * gain. It keeps the size of the
 * numbers that enter a sublayer the same, whatever the residual stream has grown to. As in the
 * reference, the normalised value is rounded before it is multiplied by the gain.
 *
 *     y, x [n][D], gain [D] */
static void rmsnorm(struct backend *b, float *y, const float *x, const struct weight *gain,
                    int32_t n, float eps) {
    size_t dim = gain->cols;
    const uint16_t *g = weight_row(gain, 0);
    (void)b;
    for (int32_t r = 0; r < n; r++, x += dim, y += dim) {
        float lane[LANES] = {0};
        for (size_t i = 0; i < dim; i++) {
            lane[i % LANES] = fmaf(x[i], x[i], lane[i % LANES]);
        }
        float factor = 1.0f / sqrtf(add_lanes(lane) / (float)dim + eps);
        for (size_t i = 0; i < dim; i++) {
            y[i] = widen_f16(g[i]) * (x[i] * factor);
        }
    }
}

/* w . x: the one dot product of all matmuls and attention scores. fmaf rounds once. */
static float dot(const float *w, const float *x, size_t n) {
    float lane[LANES] = {0};
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        for (size_t i = 0; i < LANES; i++) {
            lane[i] = fmaf(w[k + i], x[k + i], lane[i]);
        }
    }
    for (size_t i = 0; k < n && i < LANES; i++) { /* the last part, filled up with zeros */
        lane[i] = k + i < n ? fmaf(w[k + i], x[k + i], lane[i]) : fmaf(0, 0, lane[i]);
    }
    return add_lanes(lane);
}

/* OpenBLAS multiplies the rows of prompts, if asked to: weights are widened panel by panel for
 * sgemm. Its rounding depends on the sizes of a call, so those are fixed: one chunk of a prompt,
 * one panel of weights. */
static void matmul_openblas(float *panel, float *y, const float *x, const struct weight *w,
                            int32_t n_rows, enum matmul_mode mode) {
    size_t n_out = w->rows, n_in = w->cols;
    for (size_t first = 0; first < n_out; first += OPENBLAS_PANEL) {
        size_t n = n_out - first < OPENBLAS_PANEL ? n_out - first : OPENBLAS_PANEL;
        for (size_t i = 0; i < n; i++) {
            widen(panel + i * n_in, weight_row(w, first + i), n_in);
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n_rows, (int)n, (int)n_in, 1.0f, x,
                    (int)n_in, panel, (int)n_in, mode == MATMUL_ADD ? 1.0f : 0.0f, y + first,
                    (int)n_out);
    }
}

/* y = x w^T, or y += x w^T. Nearly all of the time goes here. Generated tokens, one row at a time,
 * never go through OpenBLAS: writing widened weights and reading them back would triple the memory
 * traffic of a step that is nothing but memory traffic.
 *
 *     y [R][w.rows], x [R][w.cols] */
static void matmul(struct backend *b, float *y, const float *x, const struct weight *w,
                   const struct rows *rows, enum matmul_mode mode) {
    if (b->openblas && rows->n_spans > 0 && rows->spans[0].kind == ROWS_PROMPT) {
        matmul_openblas(b->widened, y, x, w, rows->n, mode);
        return;
    }
    for (size_t i = 0; i < w->rows; i++) {
        widen(b->widened, weight_row(w, i), w->cols);
        for (size_t r = 0; r < (size_t)rows->n; r++) {
            float *to = &y[r * w->rows + i], sum = dot(b->widened, x + r * w->cols, w->cols);
            *to = mode == MATMUL_ADD ? *to + sum : sum;
        }
    }
}

void rope_inv_freq(float *inv_freq, int32_t head_dim, float theta) {
    for (int32_t i = 0; i < head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)head_dim;
        inv_freq[i] = 1.0f / (float)power(theta, exponent);
    }
}

/* The angles by which RoPE rotates at each row's position: pos * inv_freq[i], as cos and sin.
 *
 *     angles [R][hd/2][2], inv_freq [hd/2] */
static void rope_angles(struct backend *b, float *angles, const float *inv_freq,
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

/*
 * RoPE (Su et al. 2021) tells attention about positions by rotating pairs of a head's values,
 *
 *     x[i]         = x[i] cos a_i         - x[i + hd/2] sin a_i
 *     x[i + hd/2]  = x[i + hd/2] cos a_i  + x[i] sin a_i                 i < hd/2
 *
 * so that q . k depends on how far apart the two positions are, and on nothing else about them.
 *
 * THE CLASSIC BUG. There are two conventions for which values form a pair. The paper, and Meta's
 * own Llama weights, pair neighbours: (2i, 2i + 1). Hugging Face checkpoints pair (i, i + hd/2),
 * and the rows of their W_q and W_k are ordered for that. bpo.bin keeps the checkpoint's order, so
 * this pairing is the only right one here. With the other one everything runs, the first position
 * is even exact (its angles are 0), the first words look good, and then, as positions move apart,
 * the text turns to gibberish, after about 20 tokens.
 */
static void rotate(float *x, const float *angles, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], cosine = angles[2 * i], sine = angles[2 * i + 1];
        x[i] = a * cosine - b * sine;
        x[i + half] = b * cosine + a * sine;
    }
}

/* Rotates each row's query heads (in place) and key heads, and puts its keys and values into the KV
 * cache, where the later tokens of its sequence find them.
 *
 *     qkv [R][(H + 2 HK) hd], angles [R][hd/2][2] */
static void rope_kv(struct backend *b, float *qkv, const struct kv_cache *kv, const float *angles,
                    const struct rows *rows, int32_t layer, int32_t n_heads) {
    size_t hd = (size_t)kv->head_dim;
    (void)b;
    for (int32_t r = 0; r < rows->n; r++, angles += hd) {
        for (int32_t h = 0; h < n_heads; h++, qkv += hd) {
            rotate(qkv, angles, hd / 2);
        }
        for (int32_t plane = 0; plane < 2; plane++) { /* the row's keys, then its values */
            for (int32_t h = 0; h < kv->n_kv_heads; h++, qkv += hd) {
                uint16_t *to = kv_at(kv, rows->slot[r], layer, plane, h, rows->pos[r]);
                if (plane == 0) {
                    rotate(qkv, angles, hd / 2);
                }
                for (size_t d = 0; d < hd; d++) {
                    to[d] = narrow_f16(qkv[d]);
                }
            }
        }
    }
}

/*
 * One query head of one row: y = sum over p of softmax(s)[p] v_p, s[p] = q . k_p / sqrt(hd), over
 * the n positions of its sequence up to its own.
 *
 * Online softmax (Milakov and Gimelshein 2018): the positions are taken in blocks, so that no more
 * than a block's scores are ever kept. A block gives, relative to its own maximum m', the sum l' of
 * exp(s - m') and the vector y' = sum of exp(s - m') v. They join what earlier blocks gave,
 * relative to the maximum m so far, by
 *
 *     M = max(m, m')    l = l exp(m - M) + l' exp(m' - M)    y = y exp(m - M) + y' exp(m' - M)
 *
 * and y / l is the result. Subtracting a maximum changes no quotient, and keeps exp from
 * overflowing.
 */
static void attend(float *y, const float *q, const uint16_t *k, const uint16_t *v, size_t stride,
                   size_t n, size_t hd) {
    float scale = 1.0f / sqrtf((float)hd), max = -INFINITY, sum = 0, k_p[MAX_HEAD_DIM];
    memset(y, 0, hd * sizeof *y);
    for (size_t first = 0; first < n; first += ATTENTION_BLOCK) {
        size_t n_block = n - first < ATTENTION_BLOCK ? n - first : ATTENTION_BLOCK;
        float s[ATTENTION_BLOCK], block_max = -INFINITY, lane[LANES] = {0};
        for (size_t p = 0; p < n_block; p++) {
            widen(k_p, k + (first + p) * stride, hd);
            s[p] = dot(k_p, q, hd) * scale;
            block_max = p == 0 || s[p] > block_max ? s[p] : block_max;
        }
        for (size_t p = 0; p < n_block; p++) {
            s[p] = canonical_exp(s[p] - block_max);
            lane[p % LANES] += s[p];
        }
        float new_max = block_max > max ? block_max : max;
        float before = canonical_exp(max - new_max), now = canonical_exp(block_max - new_max);
        sum = sum * before + add_lanes(lane) * now;
        for (size_t d = 0; d < hd; d++) {
            float part = 0;
            for (size_t p = 0; p < n_block; p++) {
                part = fmaf(s[p], widen_f16(v[(first + p) * stride + d]), part);
            }
            y[d] = y[d] * before + part * now;
        }
        max = new_max;
    }
    for (size_t d = 0; d < hd; d++) {
        y[d] /= sum;
    }
}

/* Each query head of each row looks at the positions 0 .. pos of the row's sequence: which of them
 * matter (q . k) and what they have to say (v). Several query heads share a key/value head
 * (grouped-query attention: Ainslie et al. 2023).
 *
 *     y [R][H hd], qkv [R][(H + 2 HK) hd], of which q is the first H hd */
static void attention(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                      const struct rows *rows, int32_t layer, int32_t n_heads) {
    size_t hd = (size_t)kv->head_dim, stride = kv->pos_bytes / sizeof(uint16_t);
    int32_t group = n_heads / kv->n_kv_heads, width = n_heads + 2 * kv->n_kv_heads;
    (void)b;
    for (int32_t r = 0; r < rows->n; r++, qkv += (size_t)width * hd) {
        for (int32_t h = 0; h < n_heads; h++, y += hd) {
            const uint16_t *k = kv_at(kv, rows->slot[r], layer, 0, h / group, 0);
            const uint16_t *v = kv_at(kv, rows->slot[r], layer, 1, h / group, 0);
            attend(y, qkv + (size_t)h * hd, k, v, stride, (size_t)rows->pos[r] + 1, hd);
        }
    }
}

/* SwiGLU (Shazeer 2020): y = silu(gate) * up, silu(z) = z / (1 + exp(-z)). With e = exp(-|z|),
 * which cannot overflow, silu is z / (1 + e) for z >= 0 and z e / (1 + e) for z < 0.
 *
 *     y [n][F], gate_up [n][2F]: gate, then up */
static void swiglu(struct backend *b, float *y, const float *gate_up, int32_t n, int32_t ffn_dim) {
    (void)b;
    for (int32_t r = 0; r < n; r++, y += ffn_dim, gate_up += 2 * (size_t)ffn_dim) {
        for (int32_t i = 0; i < ffn_dim; i++) {
            float z = gate_up[i], up = gate_up[ffn_dim + i], e = canonical_exp(-fabsf(z));
            y[i] = (z < 0 ? z * e : z) / (1.0f + e) * up;
        }
    }
}

/* y[i] = x[index[i]]: the rows whose logits are wanted.
 *
 *     y [n][D], x [R][D], index [n] */
static void gather(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                   int32_t dim) {
    size_t width = (size_t)dim;
    (void)b;
    for (size_t i = 0; i < (size_t)n; i++) {
        memcpy(y + i * width, x + (size_t)index[i] * width, width * sizeof *y);
    }
}

const struct kernels *kernels_plain(void) {
    static const struct kernels table = {
        .abi = KERNELS_ABI,
        .name = "plain",
        .host_memory = true,
        .embed = embed,
        .rmsnorm = rmsnorm,
        .matmul = matmul,
        .rope_angles = rope_angles,
        .rope_kv = rope_kv,
        .attention = attention,
        .swiglu = swiglu,
        .gather = gather,
    };
    return &table;
}

/* ---------------------------------------------------------------- KV cache */

/*
 * fp16 [slot][L][2: K, V][HK][S][hd]. Without it every new token would have to compute the keys and
 * values of all tokens before it once more. Head-major, so that attention reads a head's positions
 * in one stream. A head's stride is an odd multiple of 64 bytes: heads would otherwise compete for
 * the same sets of the CPU's caches when S hd is a power of two. S is the most positions that a
 * sequence can have; memory is committed for those that are used.
 */
int kv_layout(struct kv_cache *kv, const struct bpo_model_info *c, int32_t n_slots,
              int32_t n_positions, size_t *n_bytes, struct bpo_error *err) {
    *kv = (struct kv_cache){
        .n_slots = n_slots,
        .n_layers = c->n_layers,
        .n_kv_heads = c->n_kv_heads,
        .head_dim = c->head_dim,
        .n_positions = n_positions,
        .pos_bytes = 2 * (size_t)c->head_dim,
    };
    kv->head_bytes = (((size_t)n_positions * kv->pos_bytes + 63) / 64 | 1) * 64;
    size_t heads_per_slot = 2 * (size_t)c->n_layers * (size_t)c->n_kv_heads;
    if (kv->head_bytes > SIZE_MAX / 4 / heads_per_slot / (size_t)n_slots) {
        return out_of_memory(err, "the KV cache", SIZE_MAX);
    }
    kv->plane_bytes = (size_t)c->n_kv_heads * kv->head_bytes;
    kv->layer_bytes = 2 * kv->plane_bytes;
    kv->slot_bytes = ((size_t)c->n_layers * kv->layer_bytes + 4095) / 4096 * 4096;
    *n_bytes = (size_t)n_slots * kv->slot_bytes;
    return 0;
}

/* ---------------------------------------------------------------- FORWARD */

void activation_buffers(struct buffer table[N_ACTIVATIONS], struct activations *a,
                        const struct bpo_model_info *c, size_t max_rows, size_t max_wanted) {
    size_t R = max_rows, W = max_wanted, D = (size_t)c->dim, F = (size_t)c->ffn_dim;
    size_t V = (size_t)c->vocab_size, hd = (size_t)c->head_dim;
    size_t H = (size_t)c->n_heads, HK = (size_t)c->n_kv_heads;
    const struct buffer sizes[] = {
        {&a->x, 4 * R * D, false},
        {&a->normed, 4 * (R > W ? R : W) * D, false},
        {&a->qkv, 4 * R * (H + 2 * HK) * hd, false},
        {&a->mixed, 4 * R * H * hd, false},
        {&a->gate_up, 4 * R * 2 * F, false},
        {&a->hidden, 4 * R * F, false},
        {&a->angles, 4 * R * hd, false},
        {&a->last, 4 * W * D, false},
        {&a->logits, 4 * W * V, false},
        {&a->inv_freq, 4 * (hd / 2), false},
        {&a->token, 4 * R, false},
        {&a->slot, 4 * R, false},
        {&a->pos, 4 * R, false},
        {&a->wanted, 4 * W, false},
    };
    _Static_assert(sizeof sizes / sizeof sizes[0] == N_ACTIVATIONS, "one line per buffer");
    memcpy(table, sizes, sizeof sizes);
}

/* The transformer's block. x, the residual stream, passes through; each half reads it, normalised,
 * and adds its own result. */
static void layer(const struct llama *m, const struct rows *rows, int32_t l) {
    const struct kernels *op = m->ops;
    const struct activations *a = &m->act;
    const struct layer_weights *w = &m->weights.layers[l];
    const int32_t n = rows->n, n_heads = m->config->n_heads, ffn_dim = m->config->ffn_dim;
    const float eps = (float)m->config->rms_norm_eps;
    struct backend *b = m->backend;

    op->rmsnorm(b, a->normed, a->x, &w->attention_norm, n, eps);   /* [R][D] */
    op->matmul(b, a->qkv, a->normed, &w->qkv, rows, MATMUL_STORE); /* [R][(H + 2 HK) hd] */
    op->rope_kv(b, a->qkv, &m->kv, a->angles, rows, l, n_heads);   /* K, V [R][HK][hd] cached */
    op->attention(b, a->mixed, a->qkv, &m->kv, rows, l, n_heads);  /* [R][H hd] */
    op->matmul(b, a->x, a->mixed, &w->o, rows, MATMUL_ADD);        /* [R][D] */

    op->rmsnorm(b, a->normed, a->x, &w->ffn_norm, n, eps);                 /* [R][D] */
    op->matmul(b, a->gate_up, a->normed, &w->gate_up, rows, MATMUL_STORE); /* [R][2F] */
    op->swiglu(b, a->hidden, a->gate_up, n, ffn_dim);                      /* [R][F] */
    op->matmul(b, a->x, a->hidden, &w->down, rows, MATMUL_ADD);            /* [R][D] */
}

/* Written once, for every backend, for prefill and decode, for one sequence and for many: all of it
 * is a choice of rows. */
void forward(const struct llama *m, const struct rows *rows, int32_t n_wanted) {
    const struct kernels *op = m->ops;
    const struct activations *a = &m->act;
    const struct weights *w = &m->weights;
    const struct rows wanted = {.n = n_wanted}; /* no spans: never through OpenBLAS */
    struct backend *b = m->backend;

    op->embed(b, a->x, &w->embedding, rows);                               /* [R][D] */
    op->rope_angles(b, a->angles, a->inv_freq, rows, m->config->head_dim); /* [R][hd/2][2] */
    for (int32_t l = 0; l < m->config->n_layers; l++) {
        layer(m, rows, l);
        if (m->after_layer && !m->after_layer(m->user, l)) {
            return;
        }
    }
    op->gather(b, a->last, a->x, a->wanted, n_wanted, m->config->dim); /* [wanted][D] */
    op->rmsnorm(b, a->normed, a->last, &w->norm, n_wanted, (float)m->config->rms_norm_eps);
    op->matmul(b, a->logits, a->normed, &w->lm_head, &wanted, MATMUL_STORE); /* [wanted][V] */
}

/* ---------------------------------------------------------------- the sampler */

bool is_forbidden(const struct sample_params *p, int32_t id) {
    for (int32_t i = 0; i < p->n_forbidden; i++) {
        if (p->forbidden[i] == id) {
            return true;
        }
    }
    return false;
}

/* The order of ranks: by score; equal scores by lower id. */
static int by_rank(const void *left, const void *right) {
    const struct candidate *a = left, *b = right;
    return a->score != b->score ? (a->score < b->score) - (a->score > b->score)
                                : (a->id > b->id) - (a->id < b->id);
}

/* Draws an id: first the forbidden ids go, then scores are divided by the temperature; the rest is
 * candidates_draw's. Temperature 0 is greedy: the best id.
 *
 *     logits [V], c: scratch [V] */
int32_t sampler_draw(struct candidate *c, const float *logits, size_t vocab,
                     const struct sample_params *p) {
    float temperature = p->temperature > 0 ? p->temperature : 1.0f, best = -INFINITY;
    size_t n = 0;
    for (size_t id = 0; id < vocab; id++) {
        float score = logits[id] / temperature;
        if (!isfinite(logits[id])) {
            return DRAW_NOT_FINITE;
        }
        if (score > -INFINITY && !is_forbidden(p, (int32_t)id)) {
            c[n++] = (struct candidate){.score = score, .id = (int32_t)id};
            best = score > best ? score : best;
        }
    }
    double total = 0;
    for (size_t i = 0; i < n; i++) {
        total += (double)canonical_exp(c[i].score - best);
    }
    return n > 0 ? candidates_draw(c, n, total, p) : DRAW_ALL_FORBIDDEN;
}

/* Top-k keeps the k best candidates, and every one that ties with the k-th. Top-p, nucleus sampling
 * (Holtzman et al. 2020), then keeps a candidate if the mass ranked above it, within what top-k
 * left, is below p; the first is always kept. One draw walks the kept ones in rank order. */
int32_t candidates_draw(struct candidate *c, size_t n, double total,
                        const struct sample_params *p) {
    qsort(c, n, sizeof *c, by_rank);
    if (!(p->temperature > 0)) {
        return c[0].id;
    }
    if (p->top_k > 0) {
        size_t k = (size_t)p->top_k < n ? (size_t)p->top_k : n;
        while (k < n && c[k].score == c[k - 1].score) {
            k++;
        }
        n = k;
    }
    double mass_left = 0;
    for (size_t i = 0; i < n; i++) {
        c[i].mass = (double)canonical_exp(c[i].score - c[0].score);
        mass_left += c[i].mass;
    }
    total = p->top_k > 0 ? mass_left : total;

    double limit = p->top_p < 1.0f ? (double)p->top_p * total : INFINITY, kept = 0;
    size_t n_kept = 0;
    while (n_kept < n && (n_kept == 0 || kept < limit)) {
        kept += c[n_kept++].mass;
    }

    double target = p->u * kept, walked = 0;
    size_t drawn = 0;
    for (size_t i = 0; i < n_kept; i++) {
        walked += c[i].mass;
        drawn = c[i].mass > 0 ? i : drawn; /* rounding may end the walk short: then the last one */
        if (walked > target) {
            break;
        }
    }
    return c[drawn].id;
}

/* Philox4x32-10 (Salmon et al. 2011), a block cipher in counter mode, gives u(seed, sample,
 * position). No generator's state has to be carried along, so a text does not depend on what else
 * was drawn. */
double uniform(uint64_t seed, uint32_t sample, uint32_t position) {
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

/* ---------------------------------------------------------------- BPO: the template */

int tokenize(const struct bpo_model *m, const char *text, size_t n_text, struct ids *out,
             struct bpo_error *err) {
    *out = (struct ids){0};
    return tokenizer_encode(m->tokenizer, text, n_text, &out->id, &out->n, err);
}

/* The whole text is encoded at once, because SentencePiece may merge across the seams. */
int tokenize_templated(const struct bpo_model *m, const char *text, size_t n_text, struct ids *out,
                       struct bpo_error *err) {
    const char *head = m->info.prompt_template;
    const char *tail = head + m->template_head + strlen("{prompt}");
    struct text whole = {0};
    *out = (struct ids){0};
    int failed = text_append(&whole, head, m->template_head, err);
    failed = failed ? failed : text_append(&whole, text, n_text, err);
    failed = failed ? failed : text_append(&whole, tail, strlen(tail), err);
    failed = failed ? failed : tokenize(m, whole.data, whole.n, out, err);
    int32_t *ids = failed ? NULL : realloc(out->id, (out->n + 1) * sizeof *ids);
    if (ids) {
        memmove(ids + 1, ids, out->n * sizeof *ids);
        ids[0] = m->info.bos_id;
        *out = (struct ids){.id = ids, .n = out->n + 1};
    } else if (!failed) {
        failed = out_of_memory(err, "the prompt's ids", (out->n + 1) * sizeof *ids);
    }
    free(whole.data);
    return failed;
}

/* Markers of the training data that aggressive mode must not generate: the last id of each is
 * forbidden when its other ids are the last ones so far. */
static const char *const BANNED[N_BANNED] = {"[PROTECT]", "\n\n[PROTECT]", "[KEEP",
                                             "[INSTRUCTION]"};

/* Fills in what follows from the template: its ids that do not depend on the prompt, which are
 * those that two unlike prompts have in common; and the ids of the banned markers. */
static int model_template(struct bpo_model *m, struct bpo_error *err) {
    struct ids other = {0};
    int failed = tokenize_templated(m, "a", 1, &m->prefix, err);
    failed = failed ? failed : tokenize_templated(m, "1", 1, &other, err);
    size_t n = 0;
    while (!failed && n < m->prefix.n && n < other.n && m->prefix.id[n] == other.id[n]) {
        n++;
    }
    m->prefix.n = n;
    free(other.id);
    for (size_t i = 0; !failed && i < N_BANNED; i++) {
        failed = tokenize(m, BANNED[i], strlen(BANNED[i]), &m->banned[i], err);
    }
    return failed;
}

struct bpo_model *bpo_model_open(const char *path, struct bpo_error *err) {
    struct bpo_model *m = model_load(path, err);
    if (m && model_template(m, err)) {
        bpo_model_close(m);
        return NULL;
    }
    return m;
}

bool has_prefix(const struct bpo_model *m, const struct ids *prompt) {
    size_t n = m->prefix.n;
    return prompt->n > n && memcmp(prompt->id, m->prefix.id, n * sizeof *prompt->id) == 0;
}

/* A prompt is computed in chunks of CHUNK_ROWS from the end of the template's prefix on (and,
 * within the prefix, from 0 on), whatever else is going on. A matmul whose rounding depends on the
 * number of its rows (OpenBLAS) then gives each row the same bits in any company, and the prefix
 * can be taken from a cache. */
int32_t chunk_end(const struct bpo_model *m, const struct ids *prompt, int32_t from) {
    int32_t n = (int32_t)prompt->n, n_prefix = has_prefix(m, prompt) ? (int32_t)m->prefix.n : 0;
    int32_t first = from >= n_prefix ? n_prefix : 0, limit = from < n_prefix ? n_prefix : n;
    int32_t end = from + CHUNK_ROWS - (from - first) % CHUNK_ROWS;
    return end < limit ? end : limit;
}

/* ---------------------------------------------------------------- BPO: the two modes */

/* Stable mode is the model card's: one careful rewrite, whatever the model says until EOS.
 * Aggressive mode follows the authors' infer_example.py (thu-coai/BPO): several freer rewrites of
 * one line each, not shorter than the prompt, without the training data's markers. */

int32_t min_new_tokens(enum bpo_mode mode, size_t n_bare) {
    return mode == BPO_AGGRESSIVE ? (int32_t)n_bare + 1 + 5 : 0; /* 1: the script counts BOS */
}

/* True if the ids so far, prompt and answer, end with these n. */
static bool ends_with(const struct answer *a, const int32_t *ids, size_t n) {
    size_t n_prompt = a->prompt->n, n_all = n_prompt + (size_t)a->n_tokens;
    for (size_t i = 0; i < n && n <= n_all; i++) {
        size_t at = n_all - n + i;
        if ((at < n_prompt ? a->prompt->id[at] : a->tokens[at - n_prompt]) != ids[i]) {
            return false;
        }
    }
    return n <= n_all;
}

int32_t forbidden_ids(const struct bpo_model *m, const struct answer *a, int32_t *forbidden) {
    int32_t n = 0;
    if (a->mode != BPO_AGGRESSIVE) {
        return 0;
    }
    if (a->n_tokens < a->min_new) {
        forbidden[n++] = m->info.eos_id;
        if (m->info.newline_id >= 0) {
            forbidden[n++] = m->info.newline_id;
        }
    }
    for (size_t i = 0; i < N_BANNED; i++) {
        const struct ids *banned = &m->banned[i];
        if (banned->n > 0 && ends_with(a, banned->id, banned->n - 1)) {
            forbidden[n++] = banned->id[banned->n - 1];
        }
    }
    return n;
}

bool ends_answer(const struct bpo_model *m, enum bpo_mode mode, int32_t id, enum bpo_stop *stop) {
    *stop = id == m->info.eos_id ? BPO_STOP_EOS : BPO_STOP_NEWLINE;
    return id == m->info.eos_id || (mode == BPO_AGGRESSIVE && id == m->info.newline_id);
}

size_t cut_length(enum bpo_mode mode, const char *text, size_t n, bool may_grow) {
    static const char *const stable[] = {"[/INST]", NULL};
    static const char *const aggressive[] = {"[/INST]", "[KE", "[INS", "[PRO", NULL};
    const char *const *cuts = mode == BPO_AGGRESSIVE ? aggressive : stable;
    for (size_t i = 0; i < n; i++) {
        for (size_t c = 0; cuts[c]; c++) {
            size_t n_cut = strlen(cuts[c]), n_left = n - i;
            bool whole = n_left >= n_cut;
            if ((whole || may_grow) && memcmp(text + i, cuts[c], whole ? n_cut : n_left) == 0) {
                return i;
            }
        }
    }
    return n;
}

/* ---------------------------------------------------------------- one whole rewrite, plainly */

#ifdef BPO_PLAIN /* what makes a program of this file */

/* A model, and memory for one sequence of it, which lasts until the program ends. */
struct plain {
    struct bpo_model *model;
    struct backend backend;
    struct llama llama;
    float *prompt_logits;      /* [V] after the prompt: each sample's first id is drawn from them */
    struct candidate *scratch; /* [V] */
    int32_t *tokens;           /* [S] the answer */
};

/* Allocates what a sequence of n_positions needs. */
static int plain_allocate(struct plain *p, int32_t n_positions, struct bpo_error *err) {
    const struct bpo_model_info *c = &p->model->info;
    struct llama *m = &p->llama;
    size_t vocab = (size_t)c->vocab_size, q = (size_t)c->n_heads * (size_t)c->head_dim, n_kv;
    size_t n_columns = q + (size_t)c->dim + (size_t)c->ffn_dim; /* no matrix has more */
    *m = (struct llama){c, kernels_plain(), &p->backend, .weights = p->model->weights};
    int failed = kv_layout(&m->kv, c, 1, n_positions, &n_kv, err);
    struct buffer table[N_ACTIVATIONS + 5] = {
        {&m->kv.data, n_kv, true},
        {&p->backend.widened, 4 * n_columns * OPENBLAS_PANEL, true},
        {&p->prompt_logits, 4 * vocab, true},
        {&p->scratch, vocab * sizeof *p->scratch, true},
        {&p->tokens, 4 * (size_t)n_positions, true}};
    activation_buffers(table + 5, &m->act, c, CHUNK_ROWS, 1);
    for (size_t i = 0; i < N_ACTIVATIONS + 5 && !failed; i++) {
        void *data = calloc(1, table[i].n_bytes);
        memcpy(table[i].at, &data, sizeof data);
        failed = data ? 0 : out_of_memory(err, "the model's buffers", table[i].n_bytes);
    }
    if (!failed) {
        rope_inv_freq(m->act.inv_freq, c->head_dim, (float)c->rope_theta);
    }
    return failed;
}

/* Computes n ids at the positions from pos on. wants: act.logits then has those after the last. */
static void compute(struct plain *p, const int32_t *ids, int32_t n, int32_t pos,
                    enum span_kind kind, bool wants) {
    struct activations *a = &p->llama.act;
    const struct span span = {.first = 0, .n = n, .kind = kind};
    const struct rows rows = {
        .n = n, .token = a->token, .slot = a->slot, .pos = a->pos, .spans = &span, .n_spans = 1};
    for (int32_t i = 0; i < n; i++) {
        a->token[i] = ids[i];
        a->slot[i] = 0;
        a->pos[i] = pos + i;
    }
    a->wanted[0] = n - 1;
    forward(&p->llama, &rows, wants ? 1 : 0);
}

/* Draws one answer to the prompt that is in the KV cache, id by id, and decodes it into text. */
static int generate(struct plain *p, struct answer *a, const struct bpo_request *o, uint32_t sample,
                    struct text *text, struct bpo_error *err) {
    const struct bpo_model *m = p->model;
    struct decoder decoder = {0};
    const float *logits = p->prompt_logits;
    enum bpo_stop stop;
    int failed = 0;
    for (bool more = true; more && !failed;) {
        int32_t forbidden[MAX_FORBIDDEN];
        const struct sample_params params = {
            .temperature = o->temperature,
            .top_p = o->top_p,
            .top_k = o->top_k,
            .forbidden = forbidden,
            .n_forbidden = forbidden_ids(m, a, forbidden),
            .u = uniform(o->seed, sample, (uint32_t)a->n_tokens),
        };
        int32_t id = sampler_draw(p->scratch, logits, (size_t)m->info.vocab_size, &params);
        if (id < 0) {
            return bpo_fail(err, BPO_ERR_RUN, "is this a BPO model, and whole?", "%s",
                            id == DRAW_NOT_FINITE ? "logits are not finite"
                                                  : "every token is forbidden");
        }
        int32_t pos = (int32_t)a->prompt->n + a->n_tokens;
        p->tokens[a->n_tokens++] = id;
        failed = decoder_push(&decoder, m->tokenizer, id, text, err);
        more = !ends_answer(m, a->mode, id, &stop) && a->n_tokens < o->max_new_tokens &&
               pos + 1 < m->info.max_positions;
        if (more && !failed) {
            compute(p, &id, 1, pos, ROWS_DECODE, true);
            logits = p->llama.act.logits;
        }
    }
    return failed ? failed : decoder_flush(&decoder, text, err);
}

/* The prompt is prefilled once; then each sample is generated and printed. */
static int plain_rewrite(struct plain *p, const struct ids *prompt, int32_t min_new,
                         const struct bpo_request *o, struct bpo_error *err) {
    int failed = 0;
    for (int32_t from = 0, end, n = (int32_t)prompt->n; from < n; from = end) {
        end = chunk_end(p->model, prompt, from);
        compute(p, prompt->id + from, end - from, from, ROWS_PROMPT, end == n);
    }
    memcpy(p->prompt_logits, p->llama.act.logits, 4 * (size_t)p->model->info.vocab_size);
    for (int32_t sample = 0; sample < o->n_samples && !failed; sample++) {
        struct answer a = {o->mode, prompt, p->tokens, 0, min_new};
        struct text text = {0};
        size_t begin, end;
        failed = generate(p, &a, o, (uint32_t)sample, &text, err);
        if (!failed) {
            const char *raw = text.data ? text.data : "";
            text_strip(raw, cut_length(o->mode, raw, text.n, false), &begin, &end);
            (void)fputs(sample > 0 ? "\n" : "", stdout); /* an empty line between samples */
            (void)fwrite(raw + begin, 1, end - begin, stdout);
            (void)putchar('\n');
        }
        free(text.data);
    }
    return failed;
}

/* Encodes the prompt, checks that it fits, and rewrites it. */
static int plain_run(struct plain *p, const struct bpo_request *o, struct bpo_error *err) {
    struct ids prompt = {0}, bare = {0};
    size_t begin, end, limit = (size_t)p->model->info.max_positions;
    text_strip(o->text, o->n_text, &begin, &end);
    int failed = tokenize_templated(p->model, o->text, o->n_text, &prompt, err);
    failed = failed ? failed : tokenize(p->model, o->text, o->n_text, &bare, err);
    if (!failed && (begin == end || prompt.n >= limit)) {
        failed = bpo_fail(err, BPO_ERR_INPUT, "give a prompt that is neither empty nor too long",
                          "the prompt has %zu bytes of text, and %zu tokens with its template; "
                          "the model has %zu positions",
                          end - begin, prompt.n, limit);
    }
    size_t n = prompt.n + (size_t)o->max_new_tokens;
    failed = failed ? failed : plain_allocate(p, (int32_t)(n < limit ? n : limit), err);
    failed = failed ? failed : plain_rewrite(p, &prompt, min_new_tokens(o->mode, bare.n), o, err);
    free(prompt.id);
    free(bare.id);
    return failed;
}

/* The options of ./bpo that matter here; all take a value but the last two. */
enum { MODEL, PROMPT, MODE, SEED, SAMPLES, MAX_NEW, MATMUL, GREEDY, QUIET, N_OPTIONS };
static const char *const OPTIONS[N_OPTIONS] = {
    "-m", "-p", "--mode", "--seed", "-n", "--max-new-tokens", "--matmul", "--greedy", "-q"};

static bool parse(const char *value[N_OPTIONS], int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int option = 0;
        while (option < N_OPTIONS && strcmp(argv[i], OPTIONS[option]) != 0) {
            option++;
        }
        if (option == N_OPTIONS || (option < GREEDY && ++i == argc)) {
            return false;
        }
        value[option] = argv[i];
    }
    return value[MODEL] && value[PROMPT];
}

/* Leaves *number as it is if there is no text; false if the text is no integer in [min, max]. */
static bool parse_number(int64_t *number, const char *text, int64_t min, int64_t max) {
    char *end = NULL;
    *number = text ? strtoll(text, &end, 10) : *number;
    return !text || (end != text && *end == '\0' && *number >= min && *number <= max);
}

/* 0 if there is no text or it is the first word, 1 if it is the second, else -1. */
static int parse_choice(const char *text, const char *first, const char *second) {
    return !text || strcmp(text, first) == 0 ? 0 : strcmp(text, second) == 0 ? 1 : -1;
}

int main(int argc, char **argv) {
    static struct plain p;
    const char *value[N_OPTIONS] = {0};
    struct bpo_error err = {0};
    int64_t seed = 0, n_samples = 0, max_new = 0; /* 0: the mode's own */
    int mode = 0, openblas = 0;
    if (!parse(value, argc, argv) ||
        (mode = parse_choice(value[MODE], "stable", "aggressive")) < 0 ||
        (openblas = parse_choice(value[MATMUL], "own", "openblas")) < 0 ||
        !parse_number(&seed, value[SEED], 0, (int64_t)BPO_MAX_SEED) ||
        !parse_number(&n_samples, value[SAMPLES], 1, 10000) ||
        !parse_number(&max_new, value[MAX_NEW], 1, MAX_POSITIONS)) {
        (void)fputs(
            "usage: bpo-plain -m MODEL -p TEXT [--seed N] [--mode stable|aggressive] [-n N]\n"
            "       [--greedy] [--max-new-tokens N] [--matmul own|openblas] [-q]\n",
            stderr);
        return -BPO_ERR_USAGE;
    }
    if ((p.model = bpo_model_open(value[MODEL], &err))) {
        const struct bpo_mode_settings *d = &p.model->info.settings[mode];
        const struct bpo_request request = {
            .mode = (enum bpo_mode)mode,
            .text = value[PROMPT],
            .n_text = strlen(value[PROMPT]),
            .n_samples = n_samples ? (int32_t)n_samples : d->n_samples,
            .temperature = value[GREEDY] ? 0 : d->temperature,
            .top_p = d->top_p,
            .top_k = d->top_k,
            .max_new_tokens = max_new ? (int32_t)max_new : d->max_new_tokens,
            .seed = (uint64_t)seed,
        };
        p.backend.openblas = openblas;
        openblas_set_num_threads(1);
        (void)plain_run(&p, &request, &err);
    }
    if (!err.code && (fflush(stdout) != 0 || ferror(stdout))) {
        (void)bpo_fail(&err, BPO_ERR_RUN, "is the disk full?", "cannot write to standard output");
    }
    if (err.code) {
        (void)fprintf(stderr, "bpo-plain: error: %s\nbpo-plain: hint: %s\n", err.message, err.hint);
    }
    return -err.code;
}

#endif

/*
 * kernels_cpu.h - what kernels.c (the ops, and the arithmetic in scalar C) and kernels_simd.c with
 * kernels_lanes.h (the same arithmetic in vector instructions) share. Private to these files and
 * their tests.
 *
 * THE CANONICAL ARITHMETIC. Every level gives the same bits as scalar C, because each output value
 * is computed by the same operations in the same order, whatever is computed beside it:
 *
 *   a sum over k       16 lanes: lane k % 16 takes element k, k ascending, from +0; a last part shorter than 16 is filled up
 *                      with zeros; at the end lane i takes lane i + 8, then i + 4, i + 2, i + 1
 *   a dot product      such a sum whose lanes take their element by fused multiply-add
 *   exp                the polynomial of kernels_exp
 *   all else           one IEEE operation after another, as kernels.c writes them; nothing is fused that is not written so
 */
#ifndef BPO_KERNELS_CPU_H
#define BPO_KERNELS_CPU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline, unused))

/* raise it when a change gives other bits: keys and values are kept in files */
#define NUMERICS_VERSION 1
#define LANES 16                  /* of a canonical sum */
#define ATTENTION_CHUNK 128       /* positions whose softmax is taken together */
#define MATMUL_MAX_ROWS 96        /* rows of activations that one pass over the weights serves */
#define MATMUL_BLOCK_BYTES 131072 /* of weights that a thread takes at a time, about */
/* of activations: reading the weights takes longer than multiplying */
#define FEW_ROWS 4
#define STREAM_BYTES 4194304 /* of weights that a thread takes at a time then */

/* One level of vector instructions: the inner functions of the ops. All values are in host memory,
 * fp16 as its bits; strides are in elements. kernels.c gives the equations, with the scalar
 * versions. */
struct cpu_level {
    const char *name;

    void (*widen)(float *to, const uint16_t *from, size_t n);
    void (*narrow)(uint16_t *to, const float *from, size_t n);

    /* y[r][i] = w_i . x_r, or is added to    y [n_x][n_w], x [n_x][k], w [n_w][k]
     * The weight rows that are multiplied side by side are neighbours (n_streams 0), or as far
     * apart as they can be: for one row of x n_streams of them, 2, 4 or 8 (6 where registers are
     * few). */
    void (*dots)(float *y, size_t y_stride, const float *x, size_t x_stride, size_t n_x,
                 const uint16_t *w, size_t w_stride, size_t n_w, size_t k, enum matmul_mode mode,
                 size_t n_streams);

    /* The same where it pays to bring x into the order in which it is used, once for all weights.
     * pack NULL: there is no such version. n_streams: 0, 2 or 4, for one row 2, 4 or 8. pack_min:
     * the least n_x to use it for; most_rows(k): the most that it serves well in one pass over the
     * weights, at most MATMUL_MAX_ROWS. Packing is done in pack_parts(n_x) parts; packed has n_x
     * rows of k, rounded up to LANES, values, scratch, one for each thread, packed_scratch values;
     * both are 64-byte aligned. */
    size_t pack_min, packed_scratch;
    size_t (*most_rows)(size_t k);
    size_t (*pack_parts)(size_t n_x);
    void (*pack)(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k, size_t part);
    void (*dots_packed)(float *y, size_t y_stride, const float *packed, size_t n_x,
                        const uint16_t *w, size_t w_stride, size_t n_w, size_t k,
                        enum matmul_mode mode, size_t n_streams, float *scratch);

    /* y = gain * (x * (1 / sqrt(mean(x^2) + eps)))    [n] */
    void (*rmsnorm)(float *y, const float *x, const uint16_t *gain, size_t n, float eps);

    /* y = gate * sigmoid(gate) * up    [n] */
    void (*swiglu)(float *y, const float *gate, const float *up, size_t n);

    /* s[p] = exp(scale s[p] - m), m = max(scale s); *max = m; returns the sum.    n >= 1 */
    float (*softmax)(float *s, size_t n, float scale, float *max);

    /* y[h][d] = sum of e[h][p] v[p][d] over p, ascending; go_on: of further positions, so the sum
     * begins with y, not with 0
     *                                                       y [n_h][n_d], e [n_h][n_p], v
     * [n_p][n_d] */
    void (*weighted_sum)(float *y, size_t y_stride, const float *e, size_t e_stride, size_t n_h,
                         const uint16_t *v, size_t v_stride, size_t n_p, size_t n_d, bool go_on);

    /* Rotates one head by the angles of its position: see scalar_rotate.    x [2 half], angles
     * [half][2] */
    void (*rotate)(float *x, const float *angles, size_t half);
};

extern const struct cpu_level cpu_level_scalar;

/* The levels in vector instructions that this CPU has, i = 0 the best; NULL behind the last. */
const struct cpu_level *cpu_level_simd(size_t i);

static inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* fp16 is sign, 5 bits of exponent (bias 15), 10 bits of fraction. Widening is exact. */
static inline float widen_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 0) { /* subnormal, or zero: fraction 2^-24 */
        return float_of(sign | bits_of((float)fraction * 0x1p-24f));
    }
    if (exponent == 31) { /* infinity, or NaN, which is made a quiet one */
        return float_of(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    }
    return float_of(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

/* Rounds to nearest, to even where two are equally near; too large becomes infinity; a NaN keeps
 * its upper bits, quiet. */
static inline uint16_t narrow_f16(float f) {
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    }
    /* subnormal: next to 0.5 the distance of floats is 2^-24, that of fp16 subnormals */
    if (rest < (127 - 14) << 23) {
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    }
    /* carries into the 11th bit of the fraction, and on into the exponent */
    rest += 0xfff + (rest >> 13 & 1);
    rest = (rest >> 13) - ((127 - 15) << 10);
    return (uint16_t)(sign | (rest < 0x7c00 ? rest : 0x7c00));
}

/*
 * exp(x) for x <= 0 (a little above is harmless): x = n ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^n
 * exp(r), and exp(r) = 1 + r + r^2 (c0 + c1 r + .. + c4 r^4), a least-maximum fit of relative error
 * 1.1e-8. Below -87 the result would soon be subnormal; it is 0. Over every float the result is at
 * most 0.976 units in the last place from the exact one.
 */
#define EXP_LOG2E 0x1.715476p+0f
/* t + this - this rounds t to a whole number, and the sum's low bits are that number */
#define EXP_ROUND 0x1.8p23f
#define EXP_LN2_HIGH 0x1.62e430p-1f
#define EXP_LN2_LOW (-0x1.05c610p-29f)
#define EXP_C0 0x1p-1f
#define EXP_C1 0x1.5554dcp-3f
#define EXP_C2 0x1.55551ap-5f
#define EXP_C3 0x1.120b6ep-7f
#define EXP_C4 0x1.6d110ap-10f
#define EXP_LEAST (-87.0f)

#endif

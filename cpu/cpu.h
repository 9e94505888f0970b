/*
 * kernels_cpu.h - what kernels.c (the ops, and the arithmetic in scalar C) and kernels_simd.c with
 * kernels_lanes.h (the same arithmetic in vector instructions) share. Private to these files and
 * their tests.
 */
#ifndef BPO_KERNELS_CPU_H
#define BPO_KERNELS_CPU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/numbers.h"
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline, unused))

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

#endif

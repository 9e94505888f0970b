/*
 * levels.h - the inner functions of the CPU's ops, one table for each SIMD level.
 *
 * lanes.h has these functions, written once for vectors of any width. scalar.c, avx2.c, avx512.c
 * and neon.c each define vectors of one width and include it. All levels give the same bits: the
 * canonical arithmetic of kernels.h fixes the operations that make a value, and a level chooses
 * only which values it computes side by side.
 *
 * Pointers are to host memory; fp16 values are given as their bits; strides are in elements.
 */
#ifndef BPO_CPU_LEVELS_H
#define BPO_CPU_LEVELS_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/numbers.h"
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline, unused))

/* Bounds that matmul.c and the levels agree on. */
enum {
    MATMUL_MAX_ROWS = 96, /* rows of x that one pass over the weights serves */
    FEW_ROWS = 4,         /* up to here, reading the weights takes longer than multiplying them */
    WEIGHT_ROWS = 12,     /* blocks of weight rows are multiples of this: so every tile is full */
};

/* k, rounded up to whole sets of lanes. */
INLINE size_t round_up_lanes(size_t k) {
    return (k + LANES - 1) / LANES * LANES;
}

struct cpu_level {
    const char *name;

    void (*widen)(float *to, const uint16_t *from, size_t n);
    void (*narrow)(uint16_t *to, const float *from, size_t n);

    /* y[r][i] = w_i . x_r, stored or added
     *
     *     y [n_x][n_w], x [n_x][k], w [n_w][k]
     *
     * n_streams suggests how to read the weights. 0: the weight rows that are multiplied side by
     * side are adjacent. 2 or 4 (or 8, for one row of x): they are n_w / n_streams rows apart, so
     * that each starts a stream; a level with few registers may take fewer streams than that. */
    void (*dots)(float *y, size_t y_stride, const float *x, size_t x_stride, size_t n_x,
                 const uint16_t *w, size_t w_stride, size_t n_w, size_t k, enum matmul_mode mode,
                 size_t n_streams);

    /* The same for x that was packed into the order in which it is used, which pays off when many
     * weight rows are multiplied by it. pack is NULL if the level has no such version.
     *
     * pack_min is the smallest n_x worth packing, max_rows(k) the largest that one pass over the
     * weights serves well (at most MATMUL_MAX_ROWS). pack is called for every part <
     * pack_parts(n_x). packed has n_x * round_up_lanes(k) values; scratch has scratch_floats values
     * for each thread; both are 64-byte aligned. */
    size_t pack_min, scratch_floats;
    size_t (*max_rows)(size_t k);
    size_t (*pack_parts)(size_t n_x);
    void (*pack)(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k, size_t part);
    void (*dots_packed)(float *y, size_t y_stride, const float *packed, size_t n_x,
                        const uint16_t *w, size_t w_stride, size_t n_w, size_t k,
                        enum matmul_mode mode, size_t n_streams, float *scratch);

    /* y = gain * (x * (1 / sqrt(mean(x^2) + eps)))
     *
     *     y, x, gain [n] */
    void (*rmsnorm)(float *y, const float *x, const uint16_t *gain, size_t n, float eps);

    /* y = silu(gate) * up
     *
     *     y, gate, up [n] */
    void (*swiglu)(float *y, const float *gate, const float *up, size_t n);

    /* s[p] = exp(scale s[p] - m) with m = max(scale s). Stores m in *max and returns the sum of s.
     *
     *     s [n], n >= 1 */
    float (*softmax)(float *s, size_t n, float scale, float *max);

    /* y[h][d] = sum over p, ascending, of e[h][p] v[p][d]. The sum starts from y if accumulate is
     * set, else from 0.
     *
     *     y [n_h][n_d], e [n_h][n_p], v [n_p][n_d] */
    void (*weighted_sum)(float *y, size_t y_stride, const float *e, size_t e_stride, size_t n_h,
                         const uint16_t *v, size_t v_stride, size_t n_p, size_t n_d,
                         bool accumulate);

    /* Rotates one head by the angles of its position (RoPE), in place.
     *
     *     x [2 half], angles [half][2]: cos, sin */
    void (*rotate)(float *x, const float *angles, size_t half);
};

/* Defined only where the compiler's target may have them. */
extern const struct cpu_level cpu_level_scalar, cpu_level_avx2, cpu_level_avx512, cpu_level_neon;

/* The SIMD levels that this CPU supports, the best first; NULL after the last. */
const struct cpu_level *cpu_level_simd(size_t i);

/* The level to run: the best, or the one named by BPO_SIMD in the environment. NULL: error. */
const struct cpu_level *cpu_level_choose(struct bpo_error *err);

#endif

/*
 * scalar.c - the scalar level, for any CPU: a vector is one float.
 */
#include "cpu/levels.h"

#define WIDTH 1
#define PARTS 16

typedef float vec;
typedef struct {
    float f[4];
} quad;

INLINE vec vec_zero(void) {
    return 0;
}
INLINE vec vec_splat(float f) {
    return f;
}
INLINE vec vec_load(const float *p) {
    return *p;
}
INLINE void vec_store(float *p, vec a) {
    *p = a;
}
INLINE vec vec_widen(const uint16_t *p) {
    return widen_f16(*p);
}
INLINE void vec_narrow(uint16_t *p, vec a) {
    *p = narrow_f16(a);
}
INLINE vec vec_add(vec a, vec b) {
    return a + b;
}
INLINE vec vec_sub(vec a, vec b) {
    return a - b;
}
INLINE vec vec_mul(vec a, vec b) {
    return a * b;
}
INLINE vec vec_div(vec a, vec b) {
    return a / b;
}
INLINE vec vec_fma(vec a, vec b, vec c) {
    return fmaf(a, b, c);
}
INLINE vec vec_fnma(vec a, vec b, vec c) {
    return fmaf(-a, b, c);
}
INLINE vec vec_max(vec a, vec b) {
    return a > b ? a : b;
}
INLINE vec vec_if_less(vec a, vec b, vec yes, vec no) {
    return a < b ? yes : no;
}
INLINE vec vec_minus_abs(vec x) {
    return -fabsf(x);
}
INLINE vec vec_power_of_2(vec t) {
    return float_of((bits_of(t) + 127) << 23);
}
INLINE quad quad_load(const float *p) {
    return (quad){{p[0], p[1], p[2], p[3]}};
}
INLINE void quad_store(float *p, quad a) {
    memcpy(p, a.f, sizeof a.f);
}
INLINE quad quad_add(quad a, quad b) {
    return (quad){{a.f[0] + b.f[0], a.f[1] + b.f[1], a.f[2] + b.f[2], a.f[3] + b.f[3]}};
}
/* The end of a canonical sum. */
INLINE float add_lanes(const vec sum[PARTS]) {
    float lane[LANES];
    memcpy(lane, sum, sizeof lane);
    for (size_t half = LANES / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; i++) {
            lane[i] += lane[i + half];
        }
    }
    return lane[0];
}
INLINE quad vec_sum_4(const vec *a, const vec *b, const vec *c, const vec *d) {
    return (quad){{add_lanes(a), add_lanes(b), add_lanes(c), add_lanes(d)}};
}

/* Without FMA instructions fmaf is a call, across which no register is kept. So accumulators are in
 * memory anyway, tiles only save widening, and unrolling gains nothing. */
#define UNROLL
#define FENCE (void)0
#define TILE_W(n_x) 4
#define WIDE_TILE_W 4
#define TILE_X 4
#define TILE_V(n_h) 8
#include "cpu/lanes.h"

const struct cpu_level cpu_level_scalar = {
    .name = "scalar",
    LANES_FUNCTIONS,
};

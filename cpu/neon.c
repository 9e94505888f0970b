/*
 * neon.c - the NEON level: 128-bit vectors, which every 64-bit ARM CPU has.
 */
#include "cpu/levels.h"

#ifdef __aarch64__

#include <arm_neon.h>

#define WIDTH 4
#define PARTS 4

typedef float32x4_t vec;
typedef float32x4_t quad;

INLINE vec vec_zero(void) {
    return vdupq_n_f32(0);
}
INLINE vec vec_splat(float f) {
    return vdupq_n_f32(f);
}
INLINE vec vec_load(const float *p) {
    return vld1q_f32(p);
}
INLINE void vec_store(float *p, vec a) {
    vst1q_f32(p, a);
}
INLINE vec vec_widen(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
INLINE void vec_narrow(uint16_t *p, vec a) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}
INLINE vec vec_add(vec a, vec b) {
    return vaddq_f32(a, b);
}
INLINE vec vec_sub(vec a, vec b) {
    return vsubq_f32(a, b);
}
INLINE vec vec_mul(vec a, vec b) {
    return vmulq_f32(a, b);
}
INLINE vec vec_div(vec a, vec b) {
    return vdivq_f32(a, b);
}
INLINE vec vec_fma(vec a, vec b, vec c) {
    return vfmaq_f32(c, a, b);
}
INLINE vec vec_fnma(vec a, vec b, vec c) {
    return vfmsq_f32(c, a, b);
}
INLINE vec vec_max(vec a, vec b) { /* vmaxq would return a NaN in a */
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
INLINE vec vec_if_less(vec a, vec b, vec yes, vec no) {
    return vbslq_f32(vcltq_f32(a, b), yes, no);
}
INLINE vec vec_minus_abs(vec x) {
    return vnegq_f32(vabsq_f32(x));
}
INLINE vec vec_power_of_2(vec t) {
    return vreinterpretq_f32_s32(
        vshlq_n_s32(vaddq_s32(vreinterpretq_s32_f32(t), vdupq_n_s32(127)), 23));
}
INLINE quad quad_load(const float *p) {
    return vld1q_f32(p);
}
INLINE void quad_store(float *p, quad a) {
    vst1q_f32(p, a);
}
INLINE quad quad_add(quad a, quad b) {
    return vaddq_f32(a, b);
}
INLINE vec four_lanes(const vec a[4]) { /* adds lanes that are 8, then 4 apart */
    return vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
}
/* {a0 + a2, a1 + a3, b0 + b2, b1 + b3} */
INLINE vec two_lanes_each(vec a, vec b) {
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                     vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
}
INLINE quad vec_sum_4(const vec *a, const vec *b, const vec *c, const vec *d) {
    vec ab = two_lanes_each(four_lanes(a), four_lanes(b));
    vec cd = two_lanes_each(four_lanes(c), four_lanes(d));
    return vaddq_f32(vuzp1q_f32(ab, cd), vuzp2q_f32(ab, cd));
}

/* There are 32 registers, so a tile has at most 24 accumulators, 4 to a canonical sum. */
#define FENCE __asm__ volatile("" ::: "memory")
#define TILE_W(n_x) ((n_x) == 2 ? 3 : (n_x) == 3 ? 2 : 1)
#define WIDE_TILE_W 6
#define TILE_X 3
#define TILE_V(n_h) ((n_h) == 1 ? 8 : 4)
#define PANEL_X 4
#define PANEL_W 6
#include "cpu/lanes.h"

_Static_assert(1 + PANEL_X + PANEL_X * PANEL_W <= 32, "a tile of a panel fits in the registers");

const struct cpu_level cpu_level_neon = {
    .name = "neon",
    LANES_FUNCTIONS,
    .pack_min = 5,
    .scratch_floats = PANEL_SCRATCH,
    .max_rows = max_rows,
    .pack_parts = pack_parts,
    .pack = pack,
    .dots_packed = dots_packed,
};

#endif

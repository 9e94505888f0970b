/*
 * avx2.c - the AVX2 level: 256-bit vectors, with FMA and F16C.
 */
#include "cpu/levels.h"

#ifdef __x86_64__

#include <immintrin.h>

/* The functions of a level are compiled for its instructions, whatever the target of the rest. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define WIDTH 8
#define PARTS 2

typedef __m256 vec;
typedef __m128 quad;

INLINE vec vec_zero(void) {
    return _mm256_setzero_ps();
}
INLINE vec vec_splat(float f) {
    return _mm256_set1_ps(f);
}
INLINE vec vec_load(const float *p) {
    return _mm256_loadu_ps(p);
}
INLINE void vec_store(float *p, vec a) {
    _mm256_storeu_ps(p, a);
}
INLINE vec vec_widen(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
INLINE void vec_narrow(uint16_t *p, vec a) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vec vec_add(vec a, vec b) {
    return _mm256_add_ps(a, b);
}
INLINE vec vec_sub(vec a, vec b) {
    return _mm256_sub_ps(a, b);
}
INLINE vec vec_mul(vec a, vec b) {
    return _mm256_mul_ps(a, b);
}
INLINE vec vec_div(vec a, vec b) {
    return _mm256_div_ps(a, b);
}
INLINE vec vec_fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vec vec_fnma(vec a, vec b, vec c) {
    return _mm256_fnmadd_ps(a, b, c);
}
INLINE vec vec_max(vec a, vec b) {
    return _mm256_max_ps(a, b);
}
INLINE vec vec_if_less(vec a, vec b, vec yes, vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
INLINE vec vec_minus_abs(vec x) {
    return _mm256_or_ps(x, _mm256_set1_ps(-0.0f));
}
INLINE vec vec_power_of_2(vec t) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127)), 23));
}
INLINE quad quad_load(const float *p) {
    return _mm_loadu_ps(p);
}
INLINE void quad_store(float *p, quad a) {
    _mm_storeu_ps(p, a);
}
INLINE quad quad_add(quad a, quad b) {
    return _mm_add_ps(a, b);
}
INLINE quad vec_sum_4(const vec *a, const vec *b, const vec *c, const vec *d) {
    vec a8 = _mm256_add_ps(a[0], a[1]), b8 = _mm256_add_ps(b[0], b[1]); /* lanes i and i + 8 */
    vec c8 = _mm256_add_ps(c[0], c[1]), d8 = _mm256_add_ps(d[0], d[1]);
    /* lanes i and i + 4 */
    vec ab =
        _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
    vec cd =
        _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
    /* lanes i and i + 2: {a0 a1 c0 c1, b0 b1 d0 d1} */
    vec acbd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    /* lanes i and i + 1: {a c a c, b d b d} */
    acbd = _mm256_add_ps(_mm256_shuffle_ps(acbd, acbd, 0x88), _mm256_shuffle_ps(acbd, acbd, 0xdd));
    return _mm_unpacklo_ps(_mm256_castps256_ps128(acbd), _mm256_extractf128_ps(acbd, 1));
}

/* There are 16 registers, so a tile has at most 12 accumulators. Only the widest tile has 16; it is
 * one of the choices that matmul.c tries out. */
#define FENCE (void)0
#define TILE_W(n_x) ((n_x) == 2 ? 3 : (n_x) == 3 ? 2 : 1)
#define WIDE_TILE_W 8
#define TILE_X 3
#define TILE_V(n_h) ((n_h) == 1 ? 8 : (n_h) == 2 ? 4 : 2)
#define PANEL_X 3
#define PANEL_W 4
#include "cpu/lanes.h"

_Static_assert(1 + PANEL_X + PANEL_X * PANEL_W <= 16, "a tile of a panel fits in the registers");

const struct cpu_level cpu_level_avx2 = {
    .name = "avx2",
    LANES_FUNCTIONS,
    .pack_min = 5,
    .scratch_floats = PANEL_SCRATCH,
    .max_rows = max_rows,
    .pack_parts = pack_parts,
    .pack = pack,
    .dots_packed = dots_packed,
};

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

/*
 * avx512.c - the AVX-512 level: 512-bit vectors, which hold all 16 lanes of a canonical sum.
 */
#include "cpu/levels.h"

#ifdef __x86_64__

#include <immintrin.h>

/* The functions of a level are compiled for its instructions, whatever the target of the rest. */
#ifdef __clang__
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))),                   \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define WIDTH 16
#define PARTS 1

typedef __m512 vec;
typedef __m128 quad;

INLINE vec vec_zero(void) {
    return _mm512_setzero_ps();
}
INLINE vec vec_splat(float f) {
    return _mm512_set1_ps(f);
}
INLINE vec vec_load(const float *p) {
    return _mm512_loadu_ps(p);
}
INLINE void vec_store(float *p, vec a) {
    _mm512_storeu_ps(p, a);
}
INLINE vec vec_widen(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
INLINE void vec_narrow(uint16_t *p, vec a) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vec vec_add(vec a, vec b) {
    return _mm512_add_ps(a, b);
}
INLINE vec vec_sub(vec a, vec b) {
    return _mm512_sub_ps(a, b);
}
INLINE vec vec_mul(vec a, vec b) {
    return _mm512_mul_ps(a, b);
}
INLINE vec vec_div(vec a, vec b) {
    return _mm512_div_ps(a, b);
}
INLINE vec vec_fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vec vec_fnma(vec a, vec b, vec c) {
    return _mm512_fnmadd_ps(a, b, c);
}
INLINE vec vec_max(vec a, vec b) {
    return _mm512_max_ps(a, b);
}
INLINE vec vec_if_less(vec a, vec b, vec yes, vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
INLINE vec vec_minus_abs(vec x) {
    return _mm512_or_ps(x, _mm512_set1_ps(-0.0f));
}
INLINE vec vec_power_of_2(vec t) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(127)), 23));
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

/* The reduction tree of the canonical sum, for several sums at once. The steps add the lanes that
 * are 8, 4, 2 and 1 apart, and each packs the results of two registers into one. */
INLINE vec add_8_apart(vec a, vec b) { /* a: 8 lanes, b: 8 lanes */
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
INLINE vec add_4_apart(vec ab, vec cd) { /* 4 lanes each of a, b, c, d */
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
INLINE vec add_2_apart(vec a, vec b) { /* in each 128 bits: 2 lanes of a's, 2 of b's */
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
INLINE vec add_1_apart(vec ab, vec cd) { /* in each 128 bits: a's, b's, c's and d's sum */
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
}
INLINE vec four_lanes_each(vec a, vec b, vec c, vec d) {
    return add_4_apart(add_8_apart(a, b), add_8_apart(c, d));
}
INLINE quad vec_sum_4(const vec a[1], const vec b[1], const vec c[1], const vec d[1]) {
    vec sums = four_lanes_each(a[0], b[0], c[0], d[0]);
    sums = add_2_apart(sums, sums);
    sums = add_1_apart(sums, sums); /* each 128 bits: one sum, four times */
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), sums));
}

#define FENCE (void)0 /* loads are operands of multiply-adds, so they occupy no registers */
#define TILE_W(n_x) ((n_x) == 2 ? 8 : (n_x) == 3 ? 6 : 4)
#define WIDE_TILE_W 8
#define TILE_X 4
#define TILE_V(n_h) ((n_h) > 2 ? 4 : 8)
#include "cpu/lanes.h"

/* ---------------------------------------------------------------- dots_packed */

/* Products of tile indices are all below 1,000. */
// NOLINTBEGIN(bugprone-implicit-widening-of-multiplication-result)

/*
 * The packed matmul. A register holds all 16 lanes of a canonical sum, so that this level needs no
 * panels as lanes.h has them.
 *
 * A tile of four rows of x by six weight rows has 24 accumulators in the 32 registers, and needs 10
 * loads for 24 multiply-adds. The weights are widened as they are loaded, which is free, because
 * other units of the CPU do it. x is packed in the order of use,
 *
 *     [group of 4 rows][k / 16][row of group][16]
 *
 * one stream, without the cache conflicts of rows that are a power of two apart. Six weight rows
 * stay in the caches while they are multiplied by all groups of x. The last groups prefetch the
 * next six, late enough that they are still in the first-level cache when they are used.
 *
 * Up to four rows of x are one group, whose multiply-adds take less time than reading the weights.
 * Then the weight rows of a tile may be the heads of streams that are far apart. The CPU itself
 * reads ahead in each stream, because it runs through adjacent rows; prefetching a KiB or two ahead
 * helps further.
 */
enum {
    GROUP_X = 4,
    GROUP_W = 6,
    STREAM_PREFETCH = 3584, /* weights ahead, for all streams together */
    PACKED_BYTES = 655360,  /* of x in one pass: most of a second-level cache of 1 MiB */
};

_Static_assert(1 + GROUP_X + GROUP_X * GROUP_W <= 32, "a tile fits in the registers");
_Static_assert(GROUP_X <= TILE_MAX_X && GROUP_W <= TILE_MAX_W, "and in the arrays");
_Static_assert(GROUP_X == 4, "group_tile_any has a tile for each size of a group");
_Static_assert((int)FEW_ROWS <= (int)GROUP_X, "few rows are one group");
_Static_assert(GROUP_W == 6, "dots_near divides the prefetch into shares of 6, 3, 2 or 1 rows");
_Static_assert(WEIGHT_ROWS % GROUP_W == 0, "every tile of a block of weight rows is full");
_Static_assert(2 * GROUP_X <= MATMUL_MAX_ROWS, "max_rows is at least two groups");

static size_t max_rows(size_t k) {
    size_t n = PACKED_BYTES / (round_up_lanes(k) * sizeof(float)) / GROUP_X * GROUP_X;
    return n < 2 * GROUP_X ? 2 * GROUP_X : n > MATMUL_MAX_ROWS ? MATMUL_MAX_ROWS : n;
}

static size_t pack_parts(size_t n_x) {
    return (n_x + GROUP_X - 1) / GROUP_X;
}

static void pack(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k,
                 size_t part) {
    size_t n_groups = pack_parts(n_x), first = part * n_x / n_groups,
           n = (part + 1) * n_x / n_groups - first;
    x += first * x_stride;
    packed += first * round_up_lanes(k);
    for (size_t at = 0; at < k; at += LANES) {
        __mmask16 there = (__mmask16)(k - at < LANES ? (1U << (k - at)) - 1 : 0xffff);
        for (size_t r = 0; r < n; r++, packed += LANES) {
            _mm512_store_ps(packed, _mm512_maskz_loadu_ps(there, x + r * x_stride + at));
        }
    }
}

struct tile {
    float *y;
    size_t y_stride, y_step;
    const float *x;
    const uint16_t *w, *next; /* next: the first of the weight rows to prefetch */
    size_t w_stride, k;
    enum matmul_mode mode;
};

INLINE void group_step(vec sum[GROUP_X][TILE_MAX_W], const float *x, int n_x, const uint16_t *w,
                       size_t w_stride, int n_w, __mmask16 there) {
    vec value[GROUP_X];
    UNROLL for (int r = 0; r < n_x; r++) {
        value[r] = _mm512_load_ps(x + r * LANES);
    }
    UNROLL for (int i = 0; i < n_w; i++) {
        const uint16_t *at = w + (size_t)i * w_stride;
        vec weight =
            there == 0xffff ? vec_widen(at) : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, at));
        UNROLL for (int r = 0; r < n_x; r++) {
            sum[r][i] = _mm512_fmadd_ps(weight, value[r], sum[r][i]);
        }
    }
}

/* Four rows by six: 16 sums fill one register, 8 half of another. */
INLINE void store_4_by_6(const struct tile *t, vec sum[GROUP_X][TILE_MAX_W]) {
    vec column[GROUP_W]; /* in 128 bits r: 4 lanes of sum[r][i] */
    UNROLL for (int i = 0; i < GROUP_W; i++) {
        column[i] = four_lanes_each(sum[0][i], sum[1][i], sum[2][i], sum[3][i]);
    }
    vec four = add_1_apart(add_2_apart(column[0], column[1]), add_2_apart(column[2], column[3]));
    vec two = add_2_apart(column[4], column[5]);
    float sums[2][GROUP_X * 4];
    _mm512_storeu_ps(sums[0], four);
    _mm512_storeu_ps(sums[1], add_1_apart(two, two));
    UNROLL for (size_t r = 0; r < GROUP_X; r++) {
        float *y = t->y + r * t->y_stride;
        quad a = _mm_loadu_ps(sums[0] + 4 * r), b = _mm_loadu_ps(sums[1] + 4 * r);
        if (t->mode == MATMUL_ADD) {
            a = _mm_add_ps(_mm_loadu_ps(y), a);
            /* the upper two are ignored */
            b = _mm_add_ps(_mm_loadl_pi(b, (const __m64 *)(const void *)(y + 4)), b);
        }
        _mm_storeu_ps(y, a);
        _mm_storel_pi((__m64 *)(void *)(y + 4), b);
    }
}

/* Multiplies n_x rows of x by n_w weight rows, and prefetches n_next weight rows meanwhile. */
INLINE void group_tile(const struct tile *t, int n_x, int n_w, int n_next) {
    vec sum[GROUP_X][TILE_MAX_W];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            sum[r][i] = _mm512_setzero_ps();
        }
    }
    const float *x = t->x;
    const uint16_t *w = t->w, *next = t->next;
    size_t at = 0;
    for (; at + 2 * LANES <= t->k; at += 2 * LANES) { /* 2 x 16 weights are a cache line */
        group_step(sum, x, n_x, w + at, t->w_stride, n_w, 0xffff);
        UNROLL for (int i = 0; i < n_next; i++) {
            _mm_prefetch((const char *)(next + at + (size_t)i * t->w_stride), _MM_HINT_T0);
        }
        group_step(sum, x + n_x * LANES, n_x, w + at + LANES, t->w_stride, n_w, 0xffff);
        x += 2 * n_x * LANES;
    }
    for (; at < t->k; at += LANES, x += n_x * LANES) {
        __mmask16 there = (__mmask16)(t->k - at < LANES ? (1U << (t->k - at)) - 1 : 0xffff);
        group_step(sum, x, n_x, w + at, t->w_stride, n_w, there);
    }
    if (n_x == GROUP_X && n_w == GROUP_W) {
        store_4_by_6(t, sum);
        return;
    }
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i += 4) {
            int n = n_w - i < 4 ? n_w - i : 4;
            quad sums = vec_sum_4(&sum[r][i], &sum[r][n > 1 ? i + 1 : i],
                                  &sum[r][n > 2 ? i + 2 : i], &sum[r][n > 3 ? i + 3 : i]);
            store_sums(t->y + (size_t)r * t->y_stride + (size_t)i * t->y_step, t->y_step, sums, n,
                       t->mode);
        }
    }
}

INLINE void group_tile_any(const struct tile *t, size_t n_x, int n_w, int n_next) {
    if (n_x == 4) {
        group_tile(t, 4, n_w, n_next);
    } else if (n_x == 3) {
        group_tile(t, 3, n_w, n_next);
    } else if (n_x == 2) {
        group_tile(t, 2, n_w, n_next);
    } else {
        group_tile(t, 1, n_w, n_next);
    }
}

/* One group of rows. The weight rows of a tile are the heads of n_streams streams. Returns the
 * number of weight rows done. */
static size_t dots_far(struct tile t, size_t n_x, size_t n_w, size_t n_streams) {
    size_t apart = n_w / n_streams, w_stride = t.w_stride;
    t.y_step = apart;
    t.w_stride *= apart;
    for (size_t i = 0; i < apart; i++, t.y++, t.w += w_stride) {
        t.next = t.w + STREAM_PREFETCH / n_streams;
        if (n_streams == 2) {
            group_tile_any(&t, n_x, 2, 2);
        } else if (n_streams == 8) {
            group_tile(&t, 1, 8, 8);
        } else {
            group_tile_any(&t, n_x, 4, 4);
        }
    }
    return apart * n_streams;
}

/* Multiplies all groups by six adjacent weight rows, then by the next six, which the last groups
 * prefetch in shares. Returns the number of weight rows done. */
static size_t dots_near(struct tile t, const float *packed, size_t n_x, size_t n_w) {
    size_t n_groups = pack_parts(n_x), padded = round_up_lanes(t.k), i = 0;
    size_t share = n_groups >= 6 ? 1 : n_groups >= 3 ? 2 : n_groups == 2 ? 3 : 6;
    size_t n_quiet = n_groups - GROUP_W / share; /* groups that prefetch nothing */
    for (; i + GROUP_W <= n_w; i += GROUP_W, t.w += GROUP_W * t.w_stride) {
        for (size_t g = 0; g < n_groups; g++) {
            size_t first = g * n_x / n_groups, n = (g + 1) * n_x / n_groups - first;
            struct tile tile = t;
            tile.y += first * t.y_stride + i;
            tile.x = packed + first * padded;
            if (g < n_quiet) {
                group_tile_any(&tile, n, GROUP_W, 0);
                continue;
            }
            tile.next = t.w + (GROUP_W + (g - n_quiet) * share) * t.w_stride;
            if (share == 6) {
                group_tile_any(&tile, n, GROUP_W, 6);
            } else if (share == 3) {
                group_tile_any(&tile, n, GROUP_W, 3);
            } else if (share == 2) {
                group_tile_any(&tile, n, GROUP_W, 2);
            } else {
                group_tile_any(&tile, n, GROUP_W, 1);
            }
        }
    }
    return i;
}

static void dots_packed(float *y, size_t y_stride, const float *packed, size_t n_x,
                        const uint16_t *w, size_t w_stride, size_t n_w, size_t k,
                        enum matmul_mode mode, size_t n_streams, float *scratch) {
    struct tile t = {.y = y,
                     .y_stride = y_stride,
                     .y_step = 1,
                     .x = packed,
                     .w = w,
                     .w_stride = w_stride,
                     .k = k,
                     .mode = mode};
    size_t n_groups = pack_parts(n_x);
    bool far = n_groups == 1 && n_streams > 0;
    size_t done = far ? dots_far(t, n_x, n_w, n_streams) : dots_near(t, packed, n_x, n_w);
    (void)scratch;
    for (; done < n_w; done++) { /* the last few rows, one by one */
        for (size_t g = 0; g < n_groups; g++) {
            size_t first = g * n_x / n_groups;
            t.y = y + first * y_stride + done;
            t.x = packed + first * round_up_lanes(k);
            t.w = w + done * w_stride;
            group_tile_any(&t, (g + 1) * n_x / n_groups - first, 1, 0);
        }
    }
}

// NOLINTEND(bugprone-implicit-widening-of-multiplication-result)

const struct cpu_level cpu_level_avx512 = {
    .name = "avx512",
    LANES_FUNCTIONS,
    .pack_min = 1,
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

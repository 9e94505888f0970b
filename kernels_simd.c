/*
 * kernels_simd.c - the inner functions of kernels_cpu.h in vector instructions, chosen when the program runs. kernels.c has
 * the same functions in scalar C, with the equations; both give the same bits. What is fast here changes which values are
 * computed side by side, never the operations that make one of them.
 */
// NOLINTBEGIN(bugprone-implicit-widening-of-multiplication-result): products of tile indices, all below 1,000
#include "kernels_cpu.h"

#ifndef __x86_64__

const struct cpu_level *cpu_level_avx2(void) {
    return NULL;
}

#else

#include <cpuid.h>
#include <immintrin.h>

/*
 * AVX2, FMA and F16C: vectors of 8 floats, 16 registers. The 16 lanes of a canonical sum are two registers, lo (lanes 0 to 7)
 * and hi (8 to 15). Functions marked AVX2 are compiled for that CPU whatever the rest of the program is compiled for; an INLINE
 * one is written once for all tile sizes, and its loops over constants are unrolled, so that its arrays are registers.
 */
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) AVX2
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE __m256 load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

/* Ends four canonical sums whose lanes i and i + 8 are added already: {a, b, c, d}. */
INLINE __m128 sum_4(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)); /* i and i + 4 */
    __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
    __m256 even = _mm256_shuffle_ps(ab, cd, 0x44), odd = _mm256_shuffle_ps(ab, cd, 0xee);
    __m256 acbd = _mm256_add_ps(even, odd); /* i and i + 2: {a0 a1 c0 c1, b0 b1 d0 d1} */
    acbd = _mm256_add_ps(_mm256_shuffle_ps(acbd, acbd, 0x88),
                         _mm256_shuffle_ps(acbd, acbd, 0xdd)); /* {a c a c, b d b d} */
    return _mm_unpacklo_ps(_mm256_castps256_ps128(acbd), _mm256_extractf128_ps(acbd, 1));
}

INLINE float sum_1(__m256 lo, __m256 hi) {
    __m256 a = _mm256_add_ps(lo, hi);
    return _mm_cvtss_f32(sum_4(a, a, a, a));
}

/* ------------------------------------------------------------------------------------------------------ dots, as they lie */

#define TILE_X 4 /* rows of x in a tile, at most */
#define TILE_W 4 /* weight rows */

/* y[i * step] takes the canonical sum of sum[i]. */
INLINE void store_sums(float *y, size_t step, const __m256 *sum, int n_w, enum matmul_mode mode) {
    __m128 sums = sum_4(sum[0], sum[n_w > 1 ? 1 : 0], sum[n_w > 2 ? 2 : 0], sum[n_w > 3 ? 3 : 0]);
    if (n_w == 4 && step == 1) {
        _mm_storeu_ps(y, mode == MATMUL_ADD ? _mm_add_ps(_mm_loadu_ps(y), sums) : sums);
        return;
    }
    float s[4];
    _mm_storeu_ps(s, sums);
    for (size_t i = 0; i < (size_t)n_w; i++) {
        y[i * step] = mode == MATMUL_ADD ? y[i * step] + s[i] : s[i];
    }
}

/* One step of 16 k: each weight is widened once for all rows of x. */
INLINE void tile_step(__m256 lo[TILE_X][TILE_W], __m256 hi[TILE_X][TILE_W], const float *x, size_t x_stride, int n_x,
                      const uint16_t *w, size_t w_stride, int n_w) {
    UNROLL for (int i = 0; i < n_w; i++) {
        __m256 widened = load_f16(w + (size_t)i * w_stride);
        UNROLL for (int r = 0; r < n_x; r++) {
            lo[r][i] = _mm256_fmadd_ps(widened, _mm256_loadu_ps(x + (size_t)r * x_stride), lo[r][i]);
        }
    }
    UNROLL for (int i = 0; i < n_w; i++) {
        __m256 widened = load_f16(w + (size_t)i * w_stride + 8);
        UNROLL for (int r = 0; r < n_x; r++) {
            hi[r][i] = _mm256_fmadd_ps(widened, _mm256_loadu_ps(x + (size_t)r * x_stride + 8), hi[r][i]);
        }
    }
}

INLINE void dots_tile(float *y, size_t y_stride, size_t y_step, const float *x, size_t x_stride, int n_x,
                      const uint16_t *w, size_t w_stride, int n_w, size_t k, enum matmul_mode mode) {
    __m256 lo[TILE_X][TILE_W], hi[TILE_X][TILE_W];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            lo[r][i] = hi[r][i] = _mm256_setzero_ps();
        }
    }
    size_t at = 0;
    for (; at + LANES <= k; at += LANES) {
        tile_step(lo, hi, x + at, x_stride, n_x, w + at, w_stride, n_w);
    }
    if (at < k) {
        float x_rest[TILE_X * LANES] = {0};
        uint16_t w_rest[TILE_W * LANES] = {0};
        for (int r = 0; r < n_x; r++) {
            memcpy(x_rest + r * LANES, x + (size_t)r * x_stride + at, (k - at) * sizeof *x);
        }
        for (int i = 0; i < n_w; i++) {
            memcpy(w_rest + i * LANES, w + (size_t)i * w_stride + at, (k - at) * sizeof *w);
        }
        tile_step(lo, hi, x_rest, LANES, n_x, w_rest, LANES, n_w);
    }
    UNROLL for (int r = 0; r < n_x; r++) {
        __m256 sum[TILE_W];
        UNROLL for (int i = 0; i < n_w; i++) {
            sum[i] = _mm256_add_ps(lo[r][i], hi[r][i]);
        }
        store_sums(y + (size_t)r * y_stride, y_step, sum, n_w, mode);
    }
}

/* All weight rows for n_x rows of x. The full_w rows of a tile are not neighbours but n_w / full_w apart, so that the CPU sees as
 * many long streams, each through adjacent rows, which it reads ahead better than short ones beside each other: measured
 * 0.86 of the read bandwidth instead of 0.65. */
INLINE void dots_rows(float *y, size_t y_stride, const float *x, size_t x_stride, int n_x, const uint16_t *w,
                      size_t w_stride, size_t n_w, int full_w, size_t k, enum matmul_mode mode) {
    size_t apart = n_w / (size_t)full_w;
    for (size_t i = 0; i < apart; i++) {
        dots_tile(y + i, y_stride, apart, x, x_stride, n_x, w + i * w_stride, apart * w_stride, full_w, k, mode);
    }
    for (size_t i = apart * (size_t)full_w; i < n_w; i++) {
        dots_tile(y + i, y_stride, 1, x, x_stride, n_x, w + i * w_stride, w_stride, 1, k, mode);
    }
}

AVX2 static void avx2_dots(float *y, size_t y_stride, const float *x, size_t x_stride, size_t n_x, const uint16_t *w,
                           size_t w_stride, size_t n_w, size_t k, enum matmul_mode mode) {
    while (n_x > 0) {
        size_t n = n_x > 4 ? 3 : n_x; /* accumulators 2 x n x (weight rows): at most 12 of the 16 registers */
        switch (n) {
        case 1:
            dots_rows(y, y_stride, x, x_stride, 1, w, w_stride, n_w, 4, k, mode);
            break;
        case 2:
            dots_rows(y, y_stride, x, x_stride, 2, w, w_stride, n_w, 3, k, mode);
            break;
        case 3:
            dots_rows(y, y_stride, x, x_stride, 3, w, w_stride, n_w, 2, k, mode);
            break;
        default:
            dots_rows(y, y_stride, x, x_stride, 4, w, w_stride, n_w, 1, k, mode);
            break;
        }
        n_x -= n;
        x += n * x_stride;
        y += n * y_stride;
    }
}

/* -------------------------------------------------------------------------------------------------- dots of many rows, packed */

/*
 * Three rows of x by four weight rows, and only half of the lanes, are 12 accumulators; with 3 values of x and one of w that
 * fills the 16 registers, and 12 multiply-adds need 7 loads. So x and the weights, widened, are packed in the order of use,
 * the halves apart:
 *
 *     x         [group of rows][block of k][half][k / 16][row of group][8]
 *     panel            four weight rows, one block of k:   [half][k / 16][row][8]
 *
 * A panel (16 KiB) stays in the first-level cache while all groups of x pass by. The accumulators wait in memory from one
 * block of k to the next.
 */
#define PACK_K 1024
#define PACK_W 4
#define PACK_X 3
#define PACK_GROUPS ((MATMUL_MAX_ROWS + PACK_X - 1) / PACK_X)
#define ACC_FLOATS (2 * PACK_X * PACK_W * 8) /* of one group: [half][x][w][8] */

static size_t round_up_16(size_t k) {
    return (k + 15) / 16 * 16;
}

static size_t avx2_pack_floats(size_t n_x, size_t k) {
    return n_x * round_up_16(k);
}

/* Groups of 3, or where that does not divide, some of 2: never a single row beside others. */
static size_t avx2_pack_parts(size_t n_x) {
    return (n_x + PACK_X - 1) / PACK_X;
}

AVX2 static void avx2_pack(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k, size_t part) {
    size_t n_groups = avx2_pack_parts(n_x), first = part * n_x / n_groups, n = (part + 1) * n_x / n_groups - first;
    size_t padded = round_up_16(k);
    x += first * x_stride;
    packed += first * padded;
    for (size_t block = 0; block < padded; block += PACK_K) {
        size_t end = padded - block < PACK_K ? padded : block + PACK_K;
        for (size_t half = 0; half < LANES; half += 8) {
            for (size_t at = block + half; at < end; at += LANES) {
                for (size_t r = 0; r < n; r++, packed += 8) {
                    const float *from = x + r * x_stride + at;
                    __m256 value;
                    if (at + 8 <= k) {
                        value = _mm256_loadu_ps(from);
                    } else {
                        float rest[8] = {0};
                        if (at < k) {
                            memcpy(rest, from, (k - at) * sizeof *rest);
                        }
                        value = _mm256_loadu_ps(rest);
                    }
                    _mm256_store_ps(packed, value);
                }
            }
        }
    }
}

/* Widens up to four weight rows' block of k, rows that are not there and the k past the end as zeros. */
AVX2 static void pack_panel(float *panel, const uint16_t *w, size_t w_stride, size_t n_w, size_t n_k) {
    size_t padded = round_up_16(n_k), half_floats = padded / 2 * PACK_W;
    for (size_t i = 0; i < PACK_W; i++) {
        const uint16_t *row = w + i * w_stride;
        float *to = panel + i * 8;
        size_t at = 0;
        if (i < n_w) {
            for (; at + LANES <= n_k; at += LANES, to += PACK_W * 8) {
                _mm256_store_ps(to, load_f16(row + at));
                _mm256_store_ps(to + half_floats, load_f16(row + at + 8));
            }
        }
        for (; at < padded; at += LANES, to += PACK_W * 8) {
            uint16_t rest[LANES] = {0};
            if (i < n_w) {
                memcpy(rest, row + at, (n_k - at) * sizeof *rest);
            }
            _mm256_store_ps(to, load_f16(rest));
            _mm256_store_ps(to + half_floats, load_f16(rest + 8));
        }
    }
}

/* What the tiles of one panel bring to the second-level cache meanwhile: the weights of the next panel, line by line. */
struct read_ahead {
    const char *from;
    size_t row_bytes, n_lines, line, per_part;
};

#define PART_STEPS 16 /* of a tile, after which it reads some lines ahead */

/* One half of the lanes of n_x rows by four weight rows, over one block of k. begin: the first block; end: the last one, second
 * half, which gives y; otherwise the accumulators are kept in acc. */
INLINE void packed_tile(float *y, size_t y_stride, float *acc, const float *x, int n_x, const float *panel, size_t n_w,
                        size_t n_steps, bool begin, bool end, enum matmul_mode mode, struct read_ahead *ahead) {
    __m256 sum[PACK_X][PACK_W];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < PACK_W; i++) {
            sum[r][i] = begin ? _mm256_setzero_ps() : _mm256_load_ps(acc + (r * PACK_W + i) * 8);
        }
    }
    for (size_t part = 0; part < n_steps; part += PART_STEPS) {
        size_t part_end = n_steps - part < PART_STEPS ? n_steps : part + PART_STEPS;
        for (size_t i = 0; i < ahead->per_part && ahead->line < ahead->n_lines; i++, ahead->line++) {
            _mm_prefetch(ahead->from + ahead->line % PACK_W * ahead->row_bytes + ahead->line / PACK_W * 64,
                         _MM_HINT_T1);
        }
        for (size_t step = part; step < part_end; step++, x += n_x * 8, panel += PACK_W * 8) {
            __m256 value[PACK_X];
            UNROLL for (int r = 0; r < n_x; r++) {
                value[r] = _mm256_load_ps(x + r * 8);
            }
            UNROLL for (int i = 0; i < PACK_W; i++) {
                __m256 weight = _mm256_load_ps(panel + i * 8);
                UNROLL for (int r = 0; r < n_x; r++) {
                    sum[r][i] = _mm256_fmadd_ps(weight, value[r], sum[r][i]);
                }
            }
        }
    }
    if (!end) {
        UNROLL for (int r = 0; r < n_x; r++) {
            UNROLL for (int i = 0; i < PACK_W; i++) {
                _mm256_store_ps(acc + (r * PACK_W + i) * 8, sum[r][i]);
            }
        }
        return;
    }
    const float *lo = acc - ACC_FLOATS / 2;
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < PACK_W; i++) {
            sum[r][i] = _mm256_add_ps(_mm256_load_ps(lo + (r * PACK_W + i) * 8), sum[r][i]);
        }
        if (n_w == PACK_W) {
            store_sums(y + (size_t)r * y_stride, 1, sum[r], PACK_W, mode);
        } else {
            store_sums(y + (size_t)r * y_stride, 1, sum[r], (int)n_w, mode);
        }
    }
}

AVX2 static void avx2_dots_packed(float *y, size_t y_stride, const float *packed, size_t n_x, const uint16_t *w,
                                  size_t w_stride, size_t n_w, size_t k, enum matmul_mode mode, float *scratch) {
    size_t n_groups = avx2_pack_parts(n_x), padded = round_up_16(k);
    float *panel = scratch, *accs = scratch + PACK_W * PACK_K;
    for (size_t i = 0; i < n_w; i += PACK_W) {
        size_t n = n_w - i < PACK_W ? n_w - i : PACK_W;
        for (size_t block = 0; block < padded; block += PACK_K) {
            size_t n_k = k - block < PACK_K ? k - block : PACK_K, n_steps = round_up_16(n_k) / LANES;
            size_t next = block + PACK_K < padded ? block + PACK_K : 0, next_k = k - next < PACK_K ? k - next : PACK_K;
            struct read_ahead ahead = {.from = (const char *)(w + (next ? i : i + PACK_W) * w_stride + next),
                                       .row_bytes = w_stride * sizeof *w,
                                       .n_lines = (next_k * sizeof *w + 63) / 64 * PACK_W};
            size_t n_parts = 2 * n_groups * ((n_steps + PART_STEPS - 1) / PART_STEPS);
            ahead.per_part = (ahead.n_lines + n_parts - 1) / n_parts;
            pack_panel(panel, w + i * w_stride + block, w_stride, n, n_k);
            for (size_t half = 0; half < 2; half++) {
                bool begin = block == 0, end = half == 1 && block + PACK_K >= padded;
                const float *half_panel = panel + half * n_steps * PACK_W * 8;
                for (size_t g = 0; g < n_groups; g++) {
                    size_t first = g * n_x / n_groups, n_r = (g + 1) * n_x / n_groups - first;
                    const float *x = packed + first * padded + n_r * (block + half * n_steps * 8);
                    float *to = y + first * y_stride + i, *acc = accs + g * ACC_FLOATS + half * (ACC_FLOATS / 2);
                    if (n_r == 3) {
                        packed_tile(to, y_stride, acc, x, 3, half_panel, n, n_steps, begin, end, mode, &ahead);
                    } else if (n_r == 2) {
                        packed_tile(to, y_stride, acc, x, 2, half_panel, n, n_steps, begin, end, mode, &ahead);
                    } else {
                        packed_tile(to, y_stride, acc, x, 1, half_panel, n, n_steps, begin, end, mode, &ahead);
                    }
                }
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- the others */

AVX2 static void avx2_widen(float *to, const uint16_t *from, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, load_f16(from + i));
    }
    for (; i < n; i++) {
        to[i] = widen_f16(from[i]);
    }
}

AVX2 static void avx2_narrow(uint16_t *to, const float *from, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i narrowed = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(to + i), narrowed);
    }
    for (; i < n; i++) {
        to[i] = narrow_f16(from[i]);
    }
}

AVX2 static void avx2_rmsnorm(float *y, const float *x, const uint16_t *gain, size_t n, float eps) {
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        lo = _mm256_fmadd_ps(a, a, lo);
        hi = _mm256_fmadd_ps(b, b, hi);
    }
    if (i < n) {
        float rest[LANES] = {0};
        memcpy(rest, x + i, (n - i) * sizeof *rest);
        __m256 a = _mm256_loadu_ps(rest), b = _mm256_loadu_ps(rest + 8);
        lo = _mm256_fmadd_ps(a, a, lo);
        hi = _mm256_fmadd_ps(b, b, hi);
    }
    float factor = 1.0f / sqrtf(sum_1(lo, hi) / (float)n + eps);
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 normed = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(factor));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(load_f16(gain + i), normed));
    }
    for (; i < n; i++) {
        y[i] = widen_f16(gain[i]) * (x[i] * factor);
    }
}

INLINE __m256 exp_8(__m256 x) {
    __m256 round = _mm256_set1_ps(EXP_ROUND), one = _mm256_set1_ps(1.0f);
    __m256 t = _mm256_fmadd_ps(x, _mm256_set1_ps(EXP_LOG2E), round), n = _mm256_sub_ps(t, round);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(EXP_LN2_HIGH), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(EXP_LN2_LOW), r);
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(EXP_C4), r, _mm256_set1_ps(EXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C0));
    p = _mm256_fmadd_ps(_mm256_fmadd_ps(p, r, one), r, one);
    __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127)), 23);
    __m256 too_small = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_LEAST), _CMP_LT_OQ);
    return _mm256_andnot_ps(too_small, _mm256_mul_ps(p, _mm256_castsi256_ps(scale)));
}

INLINE void swiglu_8(float *y, const float *gate, const float *up) {
    __m256 z = _mm256_loadu_ps(gate), e = exp_8(_mm256_or_ps(z, _mm256_set1_ps(-0.0f)));
    __m256 negative = _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_LT_OQ);
    __m256 numerator = _mm256_blendv_ps(z, _mm256_mul_ps(z, e), negative);
    __m256 silu = _mm256_div_ps(numerator, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
    _mm256_storeu_ps(y, _mm256_mul_ps(silu, _mm256_loadu_ps(up)));
}

AVX2 static void avx2_swiglu(float *y, const float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        swiglu_8(y + i, gate + i, up + i);
    }
    if (i < n) {
        float rest[3][8] = {{0}};
        memcpy(rest[0], gate + i, (n - i) * sizeof *gate);
        memcpy(rest[1], up + i, (n - i) * sizeof *up);
        swiglu_8(rest[2], rest[0], rest[1]);
        memcpy(y + i, rest[2], (n - i) * sizeof *y);
    }
}

AVX2 static float avx2_softmax(float *s, size_t n, float scale, float *max) {
    float most[8], m = s[0] * scale;
    __m256 m_8 = _mm256_set1_ps(m), factor = _mm256_set1_ps(scale);
    size_t p = 0;
    for (; p + 8 <= n; p += 8) {
        __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(s + p), factor);
        _mm256_storeu_ps(s + p, scaled);
        m_8 = _mm256_max_ps(scaled, m_8);
    }
    _mm256_storeu_ps(most, m_8);
    for (size_t i = 0; i < 8; i++) {
        m = most[i] > m ? most[i] : m;
    }
    for (; p < n; p++) {
        s[p] *= scale;
        m = s[p] > m ? s[p] : m;
    }
    m_8 = _mm256_set1_ps(m);
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    for (p = 0; p + LANES <= n; p += LANES) {
        __m256 a = exp_8(_mm256_sub_ps(_mm256_loadu_ps(s + p), m_8));
        __m256 b = exp_8(_mm256_sub_ps(_mm256_loadu_ps(s + p + 8), m_8));
        _mm256_storeu_ps(s + p, a);
        _mm256_storeu_ps(s + p + 8, b);
        lo = _mm256_add_ps(lo, a);
        hi = _mm256_add_ps(hi, b);
    }
    if (p < n) {
        float rest[LANES];
        for (size_t i = 0; i < LANES; i++) {
            rest[i] = p + i < n ? s[p + i] : -INFINITY; /* whose exp is 0 */
        }
        __m256 a = exp_8(_mm256_sub_ps(_mm256_loadu_ps(rest), m_8));
        __m256 b = exp_8(_mm256_sub_ps(_mm256_loadu_ps(rest + 8), m_8));
        _mm256_storeu_ps(rest, a);
        _mm256_storeu_ps(rest + 8, b);
        memcpy(s + p, rest, (n - p) * sizeof *s);
        lo = _mm256_add_ps(lo, a);
        hi = _mm256_add_ps(hi, b);
    }
    *max = m;
    return sum_1(lo, hi);
}

/* n_h heads by 8 n_v values of d: each value of V is widened once for all heads. */
INLINE void weighted_tile(float *y, size_t y_stride, const float *e, size_t e_stride, int n_h, const uint16_t *v,
                          size_t v_stride, size_t n_p, int n_v) {
    __m256 sum[4][8];
    UNROLL for (int h = 0; h < n_h; h++) {
        UNROLL for (int i = 0; i < n_v; i++) {
            sum[h][i] = _mm256_setzero_ps();
        }
    }
    for (size_t p = 0; p < n_p; p++, v += v_stride) {
        UNROLL for (int i = 0; i < n_v; i++) {
            __m256 value = load_f16(v + i * 8);
            UNROLL for (int h = 0; h < n_h; h++) {
                sum[h][i] = _mm256_fmadd_ps(_mm256_broadcast_ss(e + (size_t)h * e_stride + p), value, sum[h][i]);
            }
        }
    }
    UNROLL for (int h = 0; h < n_h; h++) {
        UNROLL for (int i = 0; i < n_v; i++) {
            _mm256_storeu_ps(y + (size_t)h * y_stride + i * 8, sum[h][i]);
        }
    }
}

/* All values of d for n_h heads: 8 full_v at a time, then 8, then singly. */
INLINE void weighted_heads(float *y, size_t y_stride, const float *e, size_t e_stride, int n_h, const uint16_t *v,
                           size_t v_stride, size_t n_p, size_t n_d, int full_v) {
    size_t d = 0;
    for (; d + 8 * (size_t)full_v <= n_d; d += 8 * (size_t)full_v) {
        weighted_tile(y + d, y_stride, e, e_stride, n_h, v + d, v_stride, n_p, full_v);
    }
    for (; d + 8 <= n_d; d += 8) {
        weighted_tile(y + d, y_stride, e, e_stride, n_h, v + d, v_stride, n_p, 1);
    }
    for (; d < n_d; d++) {
        for (int h = 0; h < n_h; h++) {
            float sum = 0;
            for (size_t p = 0; p < n_p; p++) {
                sum = fmaf(e[(size_t)h * e_stride + p], widen_f16(v[p * v_stride + d]), sum);
            }
            y[(size_t)h * y_stride + d] = sum;
        }
    }
}

AVX2 static void avx2_weighted_sum(float *y, size_t y_stride, const float *e, size_t e_stride, size_t n_h,
                                   const uint16_t *v, size_t v_stride, size_t n_p, size_t n_d) {
    while (n_h > 0) {
        size_t n = n_h < 4 ? n_h : 4;
        if (n == 4) {
            weighted_heads(y, y_stride, e, e_stride, 4, v, v_stride, n_p, n_d, 2);
        } else if (n == 3) {
            weighted_heads(y, y_stride, e, e_stride, 3, v, v_stride, n_p, n_d, 2);
        } else if (n == 2) {
            weighted_heads(y, y_stride, e, e_stride, 2, v, v_stride, n_p, n_d, 4);
        } else {
            weighted_heads(y, y_stride, e, e_stride, 1, v, v_stride, n_p, n_d, 8);
        }
        n_h -= n;
        y += n * y_stride;
        e += n * e_stride;
    }
}

const struct cpu_level *cpu_level_avx2(void) {
    static const struct cpu_level level = {
        .name = "avx2",
        .widen = avx2_widen,
        .narrow = avx2_narrow,
        .dots = avx2_dots,
        .pack_min = 5,
        .packed_scratch = PACK_W * PACK_K + PACK_GROUPS * ACC_FLOATS,
        .pack_floats = avx2_pack_floats,
        .pack_parts = avx2_pack_parts,
        .pack = avx2_pack,
        .dots_packed = avx2_dots_packed,
        .rmsnorm = avx2_rmsnorm,
        .swiglu = avx2_swiglu,
        .softmax = avx2_softmax,
        .weighted_sum = avx2_weighted_sum,
    };
    unsigned a, b, c = 0, d; /* some compilers' __builtin_cpu_supports does not know f16c */
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &level : NULL;
}

#endif
// NOLINTEND(bugprone-implicit-widening-of-multiplication-result)

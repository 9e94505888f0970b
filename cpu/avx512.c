/*
 * kernels_simd.c - the inner functions of kernels_cpu.h in vector instructions, chosen when the
 * program runs: AVX-512, AVX2, NEON. kernels.c has the same functions in scalar C, with the
 * equations; all give the same bits. What is fast here changes which values are computed side by
 * side, never the operations that make one of them.
 *
 * Each level is a vocabulary of a few words, one instruction each for the most part;
 * kernels_lanes.h has the functions in these words. Only the matmul of many rows is written apart
 * for AVX-512, whose registers hold all 16 lanes of a canonical sum.
 *
 * The functions of a level are compiled for its instructions, whatever the rest of the program is
 * compiled for: hence the target pragmas.
 */
// NOLINTBEGIN(bugprone-implicit-widening-of-multiplication-result): products of tile indices, all below 1,000
#include "cpu/cpu.h"

#define PASTE(a, b) a##_##b
#define JOIN(a, b) PASTE(a, b)
#define NAME(word) JOIN(LEVEL, word)

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__) || defined(__aarch64__)

static size_t round_up_16(size_t k) {
    return (k + 15) / 16 * 16;
}

/* Lines of weights that the tiles of a block bring to the second-level cache meanwhile: those of
 * the next block, row by row. */
struct read_ahead {
    const char *from;
    size_t row_bytes, n_rows, n_lines, line, per_turn;
};

#define AHEAD_STEPS 16 /* of 16 k, after which a tile reads some lines ahead */

INLINE struct read_ahead read_ahead_of(const uint16_t *w, size_t w_stride, size_t n_rows, size_t k,
                                       size_t n_steps) {
    size_t n_turns = (n_steps + AHEAD_STEPS - 1) / AHEAD_STEPS,
           n_lines = (k * sizeof *w + 63) / 64 * n_rows;
    return (struct read_ahead){.from = (const char *)w,
                               .row_bytes = w_stride * sizeof *w,
                               .n_rows = n_rows,
                               .n_lines = n_lines,
                               .per_turn = (n_lines + n_turns - 1) / n_turns};
}

INLINE void read_ahead_some(struct read_ahead *ahead) {
    for (size_t i = 0; i < ahead->per_turn && ahead->line < ahead->n_lines; i++, ahead->line++) {
        __builtin_prefetch(ahead->from + ahead->line % ahead->n_rows * ahead->row_bytes +
                               ahead->line / ahead->n_rows * 64,
                           0, 2);
    }
}

#endif

#ifdef __x86_64__

#include <cpuid.h>
#include <immintrin.h>

/* ================================================================ AVX-512 */

#ifdef __clang__
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))),                   \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define FENCE (void)0 /* loads are operands of multiply-adds: none wait */
#define LEVEL avx512
#define WIDTH 16
#define PARTS 1

typedef __m512 avx512_vec;
typedef __m128 avx512_quad;

INLINE __m512 avx512_zero(void) {
    return _mm512_setzero_ps();
}
INLINE __m512 avx512_all(float f) {
    return _mm512_set1_ps(f);
}
INLINE __m512 avx512_load(const float *p) {
    return _mm512_loadu_ps(p);
}
INLINE void avx512_store(float *p, __m512 a) {
    _mm512_storeu_ps(p, a);
}
INLINE __m512 avx512_widen(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
INLINE void avx512_narrow(uint16_t *p, __m512 a) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m512 avx512_add(__m512 a, __m512 b) {
    return _mm512_add_ps(a, b);
}
INLINE __m512 avx512_sub(__m512 a, __m512 b) {
    return _mm512_sub_ps(a, b);
}
INLINE __m512 avx512_mul(__m512 a, __m512 b) {
    return _mm512_mul_ps(a, b);
}
INLINE __m512 avx512_div(__m512 a, __m512 b) {
    return _mm512_div_ps(a, b);
}
INLINE __m512 avx512_fma(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
}
INLINE __m512 avx512_fms(__m512 a, __m512 b, __m512 c) {
    return _mm512_fnmadd_ps(a, b, c);
}
INLINE __m512 avx512_larger(__m512 a, __m512 b) {
    return _mm512_max_ps(a, b);
}
INLINE __m512 avx512_if_less(__m512 a, __m512 b, __m512 yes, __m512 no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
INLINE __m512 avx512_minus_size(__m512 x) {
    return _mm512_or_ps(x, _mm512_set1_ps(-0.0f));
}
INLINE __m512 avx512_power_of_2(__m512 t) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(127)), 23));
}
INLINE __m128 avx512_quad_load(const float *p) {
    return _mm_loadu_ps(p);
}
INLINE void avx512_quad_store(float *p, __m128 a) {
    _mm_storeu_ps(p, a);
}
INLINE __m128 avx512_quad_add(__m128 a, __m128 b) {
    return _mm_add_ps(a, b);
}

/* The reduction tree of the canonical sum, for several sums at once: each step adds the lanes that
 * are 8, 4, 2 and 1 apart and lays the results of two registers into one. */
INLINE __m512 add_8_apart(__m512 a, __m512 b) { /* a: 8 lanes, b: 8 lanes */
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
INLINE __m512 add_4_apart(__m512 ab, __m512 cd) { /* 4 lanes each of a, b, c, d */
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
INLINE __m512 add_2_apart(__m512 a, __m512 b) { /* in each 128 bits: 2 lanes of a's, 2 of b's */
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
INLINE __m512 add_1_apart(__m512 ab, __m512 cd) { /* in each 128 bits: a's, b's, c's and d's sum */
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
}
INLINE __m512 four_lanes_each(__m512 a, __m512 b, __m512 c, __m512 d) {
    return add_4_apart(add_8_apart(a, b), add_8_apart(c, d));
}
INLINE __m128 avx512_sum_4(const __m512 a[1], const __m512 b[1], const __m512 c[1],
                           const __m512 d[1]) {
    __m512 sums = four_lanes_each(a[0], b[0], c[0], d[0]);
    sums = add_2_apart(sums, sums);
    sums = add_1_apart(sums, sums); /* each 128 bits: one sum, four times */
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), sums));
}

#define TILE_W(n_x) ((n_x) == 2 ? 8 : (n_x) == 3 ? 6 : 4)
#define WIDE_W 8
#define MANY_X 4
#define VALUES(n_h) ((n_h) > 2 ? 4 : 8)
#include "cpu/lanes.h"

/* ---------------------------------------------------------------- dots, packed */

/*
 * Four rows of x by six weight rows are 24 accumulators of the 32 registers, and 24 multiply-adds
 * need 10 loads; the weights are widened as they are loaded, which costs nothing, because other
 * units do it. x is packed in the order of use,
 *
 *     [group of 4 rows][k / 16][row of group][16]
 *
 * a stream without the cache conflicts of rows that are a power of two apart. Six weight rows stay
 * in the caches while all groups of x pass by, and the last groups in turn ask for the next six: so
 * late that these are still in the first-level cache when they are used.
 *
 * Up to four rows are one group, whose multiply-adds take less time than reading the weights does.
 * Then the weight rows of a tile may be streams far apart, each through adjacent rows, which the
 * CPU reads ahead by itself; further requests a KiB or two ahead help it.
 */
#define GROUP_X 4
#define GROUP_W 6
#define FAR_AHEAD 3584      /* weights, of all streams together */
#define PACKED_BYTES 655360 /* of x in one pass: most of a second-level cache of 1 MiB */

static size_t avx512_most_rows(size_t k) {
    size_t n = PACKED_BYTES / (round_up_16(k) * sizeof(float)) / GROUP_X * GROUP_X;
    return n < 2 * GROUP_X ? 2 * GROUP_X : n > MATMUL_MAX_ROWS ? MATMUL_MAX_ROWS : n;
}

static size_t avx512_pack_parts(size_t n_x) {
    return (n_x + GROUP_X - 1) / GROUP_X;
}

static void avx512_pack(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k,
                        size_t part) {
    size_t n_groups = avx512_pack_parts(n_x), first = part * n_x / n_groups,
           n = (part + 1) * n_x / n_groups - first;
    x += first * x_stride;
    packed += first * round_up_16(k);
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
    const uint16_t *w, *ahead; /* ahead: the first of the weight rows to ask for */
    size_t w_stride, k;
    enum matmul_mode mode;
};

INLINE void group_step(__m512 sum[GROUP_X][TILE_MOST], const float *x, int n_x, const uint16_t *w,
                       size_t w_stride, int n_w, __mmask16 there) {
    __m512 value[GROUP_X];
    UNROLL for (int r = 0; r < n_x; r++) {
        value[r] = _mm512_load_ps(x + r * LANES);
    }
    UNROLL for (int i = 0; i < n_w; i++) {
        const uint16_t *at = w + (size_t)i * w_stride;
        __m512 weight = there == 0xffff ? avx512_widen(at)
                                        : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, at));
        UNROLL for (int r = 0; r < n_x; r++) {
            sum[r][i] = _mm512_fmadd_ps(weight, value[r], sum[r][i]);
        }
    }
}

/* Four rows by six: 16 sums in one register, 8 in half of another. */
INLINE void store_4_by_6(const struct tile *t, __m512 sum[GROUP_X][TILE_MOST]) {
    __m512 column[GROUP_W]; /* in 128 bits r: 4 lanes of sum[r][i] */
    UNROLL for (int i = 0; i < GROUP_W; i++) {
        column[i] = four_lanes_each(sum[0][i], sum[1][i], sum[2][i], sum[3][i]);
    }
    __m512 four = add_1_apart(add_2_apart(column[0], column[1]), add_2_apart(column[2], column[3]));
    __m512 two = add_2_apart(column[4], column[5]);
    float sums[2][GROUP_X * 4];
    _mm512_storeu_ps(sums[0], four);
    _mm512_storeu_ps(sums[1], add_1_apart(two, two));
    UNROLL for (size_t r = 0; r < GROUP_X; r++) {
        float *y = t->y + r * t->y_stride;
        __m128 a = _mm_loadu_ps(sums[0] + 4 * r), b = _mm_loadu_ps(sums[1] + 4 * r);
        if (t->mode == MATMUL_ADD) {
            a = _mm_add_ps(_mm_loadu_ps(y), a);
            /* the upper two do not count */
            b = _mm_add_ps(_mm_loadl_pi(b, (const __m64 *)(const void *)(y + 4)), b);
        }
        _mm_storeu_ps(y, a);
        _mm_storel_pi((__m64 *)(void *)(y + 4), b);
    }
}

/* n_x rows of x by n_w weight rows; meanwhile n_ahead rows are asked for. */
INLINE void group_tile(const struct tile *t, int n_x, int n_w, int n_ahead) {
    __m512 sum[GROUP_X][TILE_MOST];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            sum[r][i] = _mm512_setzero_ps();
        }
    }
    const float *x = t->x;
    const uint16_t *w = t->w, *ahead = t->ahead;
    size_t at = 0;
    for (; at + 2 * LANES <= t->k; at += 2 * LANES) { /* 2 x 16 weights are a line of the cache */
        group_step(sum, x, n_x, w + at, t->w_stride, n_w, 0xffff);
        UNROLL for (int i = 0; i < n_ahead; i++) {
            _mm_prefetch((const char *)(ahead + at + (size_t)i * t->w_stride), _MM_HINT_T0);
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
            __m128 sums = avx512_sum_4(&sum[r][i], &sum[r][n > 1 ? i + 1 : i],
                                       &sum[r][n > 2 ? i + 2 : i], &sum[r][n > 3 ? i + 3 : i]);
            avx512_store_sums(t->y + (size_t)r * t->y_stride + (size_t)i * t->y_step, t->y_step,
                              sums, n, t->mode);
        }
    }
}

INLINE void group_tile_any(const struct tile *t, size_t n_x, int n_w, int n_ahead) {
    if (n_x == 4) {
        group_tile(t, 4, n_w, n_ahead);
    } else if (n_x == 3) {
        group_tile(t, 3, n_w, n_ahead);
    } else if (n_x == 2) {
        group_tile(t, 2, n_w, n_ahead);
    } else {
        group_tile(t, 1, n_w, n_ahead);
    }
}

/* One group of rows: the weight rows of a tile are n_streams far apart. Returns how many weight
 * rows are done. */
static size_t avx512_dots_far(struct tile t, size_t n_x, size_t n_w, size_t n_streams) {
    size_t apart = n_w / n_streams, w_stride = t.w_stride;
    t.y_step = apart;
    t.w_stride *= apart;
    for (size_t i = 0; i < apart; i++, t.y++, t.w += w_stride) {
        t.ahead = t.w + FAR_AHEAD / n_streams;
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

/* All groups for six neighbouring weight rows, then for the next six, which the last groups ask for
 * in shares. */
static size_t avx512_dots_near(struct tile t, const float *packed, size_t n_x, size_t n_w) {
    size_t n_groups = avx512_pack_parts(n_x), padded = round_up_16(t.k), i = 0;
    size_t share = n_groups == 1   ? 6
                   : n_groups == 2 ? 3
                   : n_groups < 6  ? 2
                                   : 1,
           n_quiet = n_groups - GROUP_W / share;
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
            tile.ahead = t.w + (GROUP_W + (g - n_quiet) * share) * t.w_stride;
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

static void avx512_dots_packed(float *y, size_t y_stride, const float *packed, size_t n_x,
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
    size_t n_groups = avx512_pack_parts(n_x);
    bool far = n_groups == 1 && n_streams > 0;
    size_t done =
        far ? avx512_dots_far(t, n_x, n_w, n_streams) : avx512_dots_near(t, packed, n_x, n_w);
    (void)scratch;
    for (; done < n_w; done++) { /* the last few rows, one by one */
        for (size_t g = 0; g < n_groups; g++) {
            size_t first = g * n_x / n_groups;
            t.y = y + first * y_stride + done;
            t.x = packed + first * round_up_16(k);
            t.w = w + done * w_stride;
            group_tile_any(&t, (g + 1) * n_x / n_groups - first, 1, 0);
        }
    }
}

static const struct cpu_level avx512_level = {
    .name = "avx512",
    .widen = avx512_widen_row,
    .narrow = avx512_narrow_row,
    .dots = avx512_dots,
    .pack_min = 1,
    .most_rows = avx512_most_rows,
    .pack_parts = avx512_pack_parts,
    .pack = avx512_pack,
    .dots_packed = avx512_dots_packed,
    .rmsnorm = avx512_rmsnorm,
    .swiglu = avx512_swiglu,
    .softmax = avx512_softmax,
    .weighted_sum = avx512_weighted_sum,
    .rotate = avx512_rotate,
};

#undef LEVEL
#undef WIDTH
#undef PARTS
#undef TILE_W
#undef WIDE_W
#undef MANY_X
#undef VALUES
#undef FENCE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* ================================================================ AVX2 */

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define FENCE (void)0
#define LEVEL avx2
#define WIDTH 8
#define PARTS 2

typedef __m256 avx2_vec;
typedef __m128 avx2_quad;

INLINE __m256 avx2_zero(void) {
    return _mm256_setzero_ps();
}
INLINE __m256 avx2_all(float f) {
    return _mm256_set1_ps(f);
}
INLINE __m256 avx2_load(const float *p) {
    return _mm256_loadu_ps(p);
}
INLINE void avx2_store(float *p, __m256 a) {
    _mm256_storeu_ps(p, a);
}
INLINE __m256 avx2_widen(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
INLINE void avx2_narrow(uint16_t *p, __m256 a) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256 avx2_add(__m256 a, __m256 b) {
    return _mm256_add_ps(a, b);
}
INLINE __m256 avx2_sub(__m256 a, __m256 b) {
    return _mm256_sub_ps(a, b);
}
INLINE __m256 avx2_mul(__m256 a, __m256 b) {
    return _mm256_mul_ps(a, b);
}
INLINE __m256 avx2_div(__m256 a, __m256 b) {
    return _mm256_div_ps(a, b);
}
INLINE __m256 avx2_fma(__m256 a, __m256 b, __m256 c) {
    return _mm256_fmadd_ps(a, b, c);
}
INLINE __m256 avx2_fms(__m256 a, __m256 b, __m256 c) {
    return _mm256_fnmadd_ps(a, b, c);
}
INLINE __m256 avx2_larger(__m256 a, __m256 b) {
    return _mm256_max_ps(a, b);
}
INLINE __m256 avx2_if_less(__m256 a, __m256 b, __m256 yes, __m256 no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
INLINE __m256 avx2_minus_size(__m256 x) {
    return _mm256_or_ps(x, _mm256_set1_ps(-0.0f));
}
INLINE __m256 avx2_power_of_2(__m256 t) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127)), 23));
}
INLINE __m128 avx2_quad_load(const float *p) {
    return _mm_loadu_ps(p);
}
INLINE void avx2_quad_store(float *p, __m128 a) {
    _mm_storeu_ps(p, a);
}
INLINE __m128 avx2_quad_add(__m128 a, __m128 b) {
    return _mm_add_ps(a, b);
}
INLINE __m128 avx2_sum_4(const __m256 *a, const __m256 *b, const __m256 *c, const __m256 *d) {
    __m256 a8 = _mm256_add_ps(a[0], a[1]), b8 = _mm256_add_ps(b[0], b[1]); /* lanes i and i + 8 */
    __m256 c8 = _mm256_add_ps(c[0], c[1]), d8 = _mm256_add_ps(d[0], d[1]);
    /* i + 4 */
    __m256 ab =
        _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
    __m256 cd =
        _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
    __m256 acbd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44),
                                /* i + 2: {a0 a1 c0 c1, b0 b1 d0 d1} */
                                _mm256_shuffle_ps(ab, cd, 0xee));
    acbd = _mm256_add_ps(_mm256_shuffle_ps(acbd, acbd, 0x88),
                         _mm256_shuffle_ps(acbd, acbd, 0xdd)); /* {a c a c, b d b d} */
    return _mm_unpacklo_ps(_mm256_castps256_ps128(acbd), _mm256_extractf128_ps(acbd, 1));
}

/* 16 registers: at most 12 accumulators; only the widest tile, which is tried, has 16 */
#define TILE_W(n_x) ((n_x) == 2 ? 3 : (n_x) == 3 ? 2 : 1)
#define WIDE_W 8
#define MANY_X 3
#define VALUES(n_h) ((n_h) == 1 ? 8 : (n_h) == 2 ? 4 : 2)
#define PANEL_X 3
#define PANEL_W 4
#include "cpu/lanes.h"

static const struct cpu_level avx2_level = {
    .name = "avx2",
    .widen = avx2_widen_row,
    .narrow = avx2_narrow_row,
    .dots = avx2_dots,
    .pack_min = 5,
    .most_rows = avx2_most_rows,
    .packed_scratch = PANEL_SCRATCH,
    .pack_parts = avx2_pack_parts,
    .pack = avx2_pack,
    .dots_packed = avx2_dots_packed,
    .rmsnorm = avx2_rmsnorm,
    .swiglu = avx2_swiglu,
    .softmax = avx2_softmax,
    .weighted_sum = avx2_weighted_sum,
    .rotate = avx2_rotate,
};

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct cpu_level *cpu_level_simd(size_t i) {
    unsigned a, b, c = 0, d; /* some compilers' __builtin_cpu_supports does not know f16c */
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const struct cpu_level *const found[] = {avx512 ? &avx512_level : &avx2_level, &avx2_level};
    size_t n = avx512 ? 2 : avx2 ? 1 : 0;
    return i < n ? found[i] : NULL;
}

#elif defined(__aarch64__)

#include <arm_neon.h>

/* ================================================================ NEON */

#define LEVEL neon
#define WIDTH 4
#define PARTS 4

typedef float32x4_t neon_vec;
typedef float32x4_t neon_quad;

INLINE float32x4_t neon_zero(void) {
    return vdupq_n_f32(0);
}
INLINE float32x4_t neon_all(float f) {
    return vdupq_n_f32(f);
}
INLINE float32x4_t neon_load(const float *p) {
    return vld1q_f32(p);
}
INLINE void neon_store(float *p, float32x4_t a) {
    vst1q_f32(p, a);
}
INLINE float32x4_t neon_widen(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
INLINE void neon_narrow(uint16_t *p, float32x4_t a) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}
INLINE float32x4_t neon_add(float32x4_t a, float32x4_t b) {
    return vaddq_f32(a, b);
}
INLINE float32x4_t neon_sub(float32x4_t a, float32x4_t b) {
    return vsubq_f32(a, b);
}
INLINE float32x4_t neon_mul(float32x4_t a, float32x4_t b) {
    return vmulq_f32(a, b);
}
INLINE float32x4_t neon_div(float32x4_t a, float32x4_t b) {
    return vdivq_f32(a, b);
}
INLINE float32x4_t neon_fma(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmaq_f32(c, a, b);
}
INLINE float32x4_t neon_fms(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmsq_f32(c, a, b);
}
INLINE float32x4_t neon_larger(float32x4_t a, float32x4_t b) { /* vmaxq would hand on a NaN */
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
INLINE float32x4_t neon_if_less(float32x4_t a, float32x4_t b, float32x4_t yes, float32x4_t no) {
    return vbslq_f32(vcltq_f32(a, b), yes, no);
}
INLINE float32x4_t neon_minus_size(float32x4_t x) {
    return vnegq_f32(vabsq_f32(x));
}
INLINE float32x4_t neon_power_of_2(float32x4_t t) {
    return vreinterpretq_f32_s32(
        vshlq_n_s32(vaddq_s32(vreinterpretq_s32_f32(t), vdupq_n_s32(127)), 23));
}
INLINE float32x4_t neon_quad_load(const float *p) {
    return vld1q_f32(p);
}
INLINE void neon_quad_store(float *p, float32x4_t a) {
    vst1q_f32(p, a);
}
INLINE float32x4_t neon_quad_add(float32x4_t a, float32x4_t b) {
    return vaddq_f32(a, b);
}
INLINE float32x4_t neon_four_lanes(const float32x4_t a[4]) { /* lanes 8, then 4 apart */
    return vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
}
/* {a0 + a2, a1 + a3, b0 + b2, b1 + b3} */
INLINE float32x4_t neon_two_lanes_each(float32x4_t a, float32x4_t b) {
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                     vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
}
INLINE float32x4_t neon_sum_4(const float32x4_t *a, const float32x4_t *b, const float32x4_t *c,
                              const float32x4_t *d) {
    float32x4_t ab = neon_two_lanes_each(neon_four_lanes(a), neon_four_lanes(b));
    float32x4_t cd = neon_two_lanes_each(neon_four_lanes(c), neon_four_lanes(d));
    return vaddq_f32(vuzp1q_f32(ab, cd), vuzp2q_f32(ab, cd));
}

/* 32 registers: at most 24 accumulators, 4 to a canonical sum */
#define FENCE __asm__ volatile("" ::: "memory")
#define TILE_W(n_x) ((n_x) == 2 ? 3 : (n_x) == 3 ? 2 : 1)
#define WIDE_W 6
#define MANY_X 3
#define VALUES(n_h) ((n_h) == 1 ? 8 : 4)
#define PANEL_X 4
#define PANEL_W 6
#include "cpu/lanes.h"

static const struct cpu_level neon_level = {
    .name = "neon",
    .widen = neon_widen_row,
    .narrow = neon_narrow_row,
    .dots = neon_dots,
    .pack_min = 5,
    .most_rows = neon_most_rows,
    .packed_scratch = PANEL_SCRATCH,
    .pack_parts = neon_pack_parts,
    .pack = neon_pack,
    .dots_packed = neon_dots_packed,
    .rmsnorm = neon_rmsnorm,
    .swiglu = neon_swiglu,
    .softmax = neon_softmax,
    .weighted_sum = neon_weighted_sum,
    .rotate = neon_rotate,
};

const struct cpu_level *cpu_level_simd(size_t i) {
    return i == 0 ? &neon_level : NULL; /* every 64-bit ARM CPU has it */
}

#else

const struct cpu_level *cpu_level_simd(size_t i) {
    (void)i;
    return NULL;
}

#endif
// NOLINTEND(bugprone-implicit-widening-of-multiplication-result)

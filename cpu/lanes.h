/*
 * lanes.h - the inner functions of levels.h, written once for vectors of any width. Each of
 * scalar.c, avx2.c, avx512.c and neon.c includes this file, after it has defined the following
 * vocabulary, in which a word is mostly one instruction:
 *
 *   vec, WIDTH, PARTS          a register of WIDTH floats; the 16 lanes of a canonical sum are
 *                              PARTS = 16 / WIDTH of them
 *   quad                       four floats
 *   vec_zero vec_splat         all lanes 0, or one value
 *   vec_load vec_store         from and to fp32; vec_widen and vec_narrow: from and to fp16
 *   vec_add _sub _mul _div     one rounding each
 *   vec_fma(a, b, c)           a b + c, rounded once; vec_fnma(a, b, c): c - a b
 *   vec_max(a, b)              a > b ? a : b, so a NaN in a is ignored
 *   vec_if_less(a, b, yes, no) a < b ? yes : no
 *   vec_minus_abs(x)           -|x|
 *   vec_power_of_2(t)          2^n, where n is the integer in the low bits of t: see canonical_exp
 *   vec_sum_4(a, b, c, d)      the ends of four canonical sums, each of PARTS vectors, as a quad
 *   quad_load _store _add
 *
 * and the tile sizes that suit its registers:
 *
 *   TILE_W(n_x)                weight rows of a tile of dots with n_x = 2, 3 or 4 rows of x
 *   WIDE_TILE_W                weight rows of the widest tile with one row of x
 *   TILE_X                     rows of x of a tile when there are more than 4
 *   TILE_V(n_h)                vectors of d in a tile of weighted_sum with n_h heads
 *   PANEL_X, PANEL_W           optional: the tile of the packed matmul below
 *
 * FENCE marks where loads must not be moved up across multiply-adds: the loaded values would push
 * accumulators out of the registers.
 *
 * INLINE functions take tile sizes as arguments but are always called with constants. Their loops
 * over tiles are then unrolled completely, and their arrays become registers.
 */

/* Products of tile indices are all below 1,000. */
// NOLINTBEGIN(bugprone-implicit-widening-of-multiplication-result)

#ifndef UNROLL
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#endif

/* The sizes of the register arrays. */
#define TILE_MAX_X 4 /* rows of x, or heads */
#define TILE_MAX_W 8 /* weight rows */
#define TILE_MAX_V 8 /* vectors of d */

_Static_assert(LANES / PARTS == WIDTH && LANES % PARTS == 0,
               "PARTS vectors are the lanes of a canonical sum");
_Static_assert(TILE_X <= TILE_MAX_X && FEW_ROWS <= TILE_MAX_X, "all rows of x have accumulators");
_Static_assert(WIDE_TILE_W <= TILE_MAX_W, "all weight rows have accumulators");
#define CHECK_TILE_W(n_x) _Static_assert(TILE_W(n_x) <= TILE_MAX_W, "the same, with n_x rows of x")
CHECK_TILE_W(2);
CHECK_TILE_W(3);
CHECK_TILE_W(4);
/* weighted_heads also runs tiles of half the size. */
#define CHECK_TILE_V(n_h)                                                                          \
    _Static_assert(TILE_V(n_h) / 2 >= 1 && TILE_V(n_h) <= TILE_MAX_V, "a tile of n_h heads")
CHECK_TILE_V(1);
CHECK_TILE_V(2);
CHECK_TILE_V(3);
CHECK_TILE_V(4);

/* Stores the first n_w of sums to y, step elements apart, or adds them to it. */
INLINE void store_sums(float *y, size_t step, quad sums, int n_w, enum matmul_mode mode) {
    if (n_w == 4 && step == 1) {
        quad_store(y, mode == MATMUL_ADD ? quad_add(quad_load(y), sums) : sums);
        return;
    }
    float s[4];
    quad_store(s, sums);
    for (size_t i = 0; i < (size_t)n_w; i++) {
        y[i * step] = mode == MATMUL_ADD ? y[i * step] + s[i] : s[i];
    }
}

/* ---------------------------------------------------------------- dots */

/* One step of LANES values of k. Each weight is widened once for all rows of x. */
INLINE void tile_step(vec sum[TILE_MAX_X][TILE_MAX_W][PARTS], const float *x, size_t x_stride,
                      int n_x, const uint16_t *w, size_t w_stride, int n_w) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            vec weight = vec_widen(w + (size_t)i * w_stride + (size_t)p * WIDTH);
            UNROLL for (int r = 0; r < n_x; r++) {
                sum[r][i][p] = vec_fma(
                    weight, vec_load(x + (size_t)r * x_stride + (size_t)p * WIDTH), sum[r][i][p]);
            }
        }
        FENCE;
    }
}

INLINE void dots_tile(float *y, size_t y_stride, size_t y_step, const float *x, size_t x_stride,
                      int n_x, const uint16_t *w, size_t w_stride, int n_w, size_t k,
                      enum matmul_mode mode) {
    vec sum[TILE_MAX_X][TILE_MAX_W][PARTS];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            UNROLL for (int p = 0; p < PARTS; p++) {
                sum[r][i][p] = vec_zero();
            }
        }
    }
    size_t at = 0;
    for (; at + LANES <= k; at += LANES) {
        tile_step(sum, x + at, x_stride, n_x, w + at, w_stride, n_w);
    }
    if (at < k) {
        float x_rest[TILE_MAX_X * LANES] = {0};
        uint16_t w_rest[TILE_MAX_W * LANES] = {0};
        for (int r = 0; r < n_x; r++) {
            memcpy(x_rest + r * LANES, x + (size_t)r * x_stride + at, (k - at) * sizeof *x);
        }
        for (int i = 0; i < n_w; i++) {
            memcpy(w_rest + i * LANES, w + (size_t)i * w_stride + at, (k - at) * sizeof *w);
        }
        tile_step(sum, x_rest, LANES, n_x, w_rest, LANES, n_w);
    }
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i += 4) {
            int n = n_w - i < 4 ? n_w - i : 4;
            quad sums = vec_sum_4(sum[r][i], sum[r][n > 1 ? i + 1 : i], sum[r][n > 2 ? i + 2 : i],
                                  sum[r][n > 3 ? i + 3 : i]);
            store_sums(y + (size_t)r * y_stride + (size_t)i * y_step, y_step, sums, n, mode);
        }
    }
}

/* Multiplies all weight rows by n_x rows of x, in tiles of full_w weight rows that are adjacent or,
 * if far, n_w / full_w rows apart. The weight rows left over are done one by one. */
INLINE void dots_rows(float *y, size_t y_stride, const float *x, size_t x_stride, int n_x,
                      const uint16_t *w, size_t w_stride, size_t n_w, int full_w, bool far,
                      size_t k, enum matmul_mode mode) {
    size_t n_tiles = n_w / (size_t)full_w, apart = far ? n_tiles : 1,
           next = far ? 1 : (size_t)full_w;
    for (size_t i = 0; i < n_tiles; i++) {
        dots_tile(y + i * next, y_stride, apart, x, x_stride, n_x, w + i * next * w_stride,
                  apart * w_stride, full_w, k, mode);
    }
    for (size_t i = n_tiles * (size_t)full_w; i < n_w; i++) {
        dots_tile(y + i, y_stride, 1, x, x_stride, n_x, w + i * w_stride, w_stride, 1, k, mode);
    }
}

static void dots(float *y, size_t y_stride, const float *x, size_t x_stride, size_t n_x,
                 const uint16_t *w, size_t w_stride, size_t n_w, size_t k, enum matmul_mode mode,
                 size_t n_streams) {
    bool far = n_streams > 0;
    while (n_x > 0) {
        size_t n = n_x > 4 ? TILE_X : n_x;
        if (n == 1 && n_streams == 2) {
            dots_rows(y, y_stride, x, x_stride, 1, w, w_stride, n_w, 2, true, k, mode);
        } else if (n == 1 && n_streams == 8) {
            dots_rows(y, y_stride, x, x_stride, 1, w, w_stride, n_w, WIDE_TILE_W, true, k, mode);
        } else if (n == 1) {
            dots_rows(y, y_stride, x, x_stride, 1, w, w_stride, n_w, 4, far, k, mode);
        } else if (n == 2) {
            dots_rows(y, y_stride, x, x_stride, 2, w, w_stride, n_w, TILE_W(2), far, k, mode);
        } else if (n == 3) {
            dots_rows(y, y_stride, x, x_stride, 3, w, w_stride, n_w, TILE_W(3), far, k, mode);
        } else {
            dots_rows(y, y_stride, x, x_stride, 4, w, w_stride, n_w, TILE_W(4), far, k, mode);
        }
        n_x -= n;
        x += n * x_stride;
        y += n * y_stride;
    }
}

/* ---------------------------------------------------------------- widen, narrow */

static void widen_row(float *to, const uint16_t *from, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        vec_store(to + i, vec_widen(from + i));
    }
    for (; i < n; i++) {
        to[i] = widen_f16(from[i]);
    }
}

static void narrow_row(uint16_t *to, const float *from, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        vec_narrow(to + i, vec_load(from + i));
    }
    for (; i < n; i++) {
        to[i] = narrow_f16(from[i]);
    }
}

/* ---------------------------------------------------------------- rmsnorm */

INLINE float sum_1(const vec sum[PARTS]) {
    float s[4];
    quad_store(s, vec_sum_4(sum, sum, sum, sum));
    return s[0];
}

INLINE void square_step(vec sum[PARTS], const float *x) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        vec a = vec_load(x + (size_t)p * WIDTH);
        sum[p] = vec_fma(a, a, sum[p]);
    }
}

/* As in the reference, the normalised value is rounded before it is multiplied by the gain. */
static void rmsnorm_row(float *y, const float *x, const uint16_t *gain, size_t n, float eps) {
    vec sum[PARTS];
    UNROLL for (int p = 0; p < PARTS; p++) {
        sum[p] = vec_zero();
    }
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        square_step(sum, x + i);
    }
    if (i < n) {
        float rest[LANES] = {0};
        memcpy(rest, x + i, (n - i) * sizeof *rest);
        square_step(sum, rest);
    }
    float factor = 1.0f / sqrtf(sum_1(sum) / (float)n + eps);
    for (i = 0; i + WIDTH <= n; i += WIDTH) {
        vec normed = vec_mul(vec_load(x + i), vec_splat(factor));
        vec_store(y + i, vec_mul(vec_widen(gain + i), normed));
    }
    for (; i < n; i++) {
        y[i] = widen_f16(gain[i]) * (x[i] * factor);
    }
}

/* ---------------------------------------------------------------- swiglu, softmax */

/* canonical_exp in vectors: the same operations in the same order. */
INLINE vec vec_exp(vec x) {
    vec round = vec_splat(EXP_ROUND), one = vec_splat(1.0f);
    vec t = vec_fma(x, vec_splat(EXP_LOG2E), round), n = vec_sub(t, round);
    vec r = vec_fnma(n, vec_splat(EXP_LN2_LOW), vec_fnma(n, vec_splat(EXP_LN2_HIGH), x));
    vec c = vec_fma(vec_splat(EXP_C4), r, vec_splat(EXP_C3));
    c = vec_fma(c, r, vec_splat(EXP_C2));
    c = vec_fma(c, r, vec_splat(EXP_C1));
    c = vec_fma(c, r, vec_splat(EXP_C0));
    vec p = vec_fma(vec_fma(c, r, one), r, one);
    return vec_if_less(x, vec_splat(EXP_MIN), vec_zero(), vec_mul(p, vec_power_of_2(t)));
}

/* With e = exp(-|z|), which cannot overflow, silu(z) = z / (1 + exp(-z)) is z / (1 + e) for z >= 0
 * and z e / (1 + e) for z < 0. */
INLINE void swiglu_vec(float *y, const float *gate, const float *up) {
    vec z = vec_load(gate), e = vec_exp(vec_minus_abs(z));
    vec numerator = vec_if_less(z, vec_zero(), vec_mul(z, e), z);
    vec silu = vec_div(numerator, vec_add(vec_splat(1.0f), e));
    vec_store(y, vec_mul(silu, vec_load(up)));
}

static void swiglu_row(float *y, const float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        swiglu_vec(y + i, gate + i, up + i);
    }
    if (i < n) {
        float rest[3][WIDTH] = {{0}};
        memcpy(rest[0], gate + i, (n - i) * sizeof *gate);
        memcpy(rest[1], up + i, (n - i) * sizeof *up);
        swiglu_vec(rest[2], rest[0], rest[1]);
        memcpy(y + i, rest[2], (n - i) * sizeof *y);
    }
}

/* s = exp(s - max), which is added to the lanes of the sum. */
INLINE void softmax_step(vec sum[PARTS], float *s, vec max) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        vec e = vec_exp(vec_sub(vec_load(s + (size_t)p * WIDTH), max));
        vec_store(s + (size_t)p * WIDTH, e);
        sum[p] = vec_add(sum[p], e);
    }
}

/* Subtracting the maximum changes no quotient of the softmax and keeps exp from overflowing. */
static float softmax(float *s, size_t n, float scale, float *max) {
    float lane_max[WIDTH], m = s[0] * scale;
    vec m_all = vec_splat(m), factor = vec_splat(scale), sum[PARTS];
    size_t p = 0;
    for (; p + WIDTH <= n; p += WIDTH) {
        vec scaled = vec_mul(vec_load(s + p), factor);
        vec_store(s + p, scaled);
        m_all = vec_max(scaled, m_all);
    }
    vec_store(lane_max, m_all);
    for (size_t i = 0; i < WIDTH; i++) {
        m = lane_max[i] > m ? lane_max[i] : m;
    }
    for (; p < n; p++) {
        s[p] *= scale;
        m = s[p] > m ? s[p] : m;
    }
    m_all = vec_splat(m);
    UNROLL for (int i = 0; i < PARTS; i++) {
        sum[i] = vec_zero();
    }
    for (p = 0; p + LANES <= n; p += LANES) {
        softmax_step(sum, s + p, m_all);
    }
    if (p < n) {
        float rest[LANES];
        for (size_t i = 0; i < LANES; i++) {
            rest[i] = p + i < n ? s[p + i] : -INFINITY; /* whose exp is 0 */
        }
        softmax_step(sum, rest, m_all);
        memcpy(s + p, rest, (n - p) * sizeof *s);
    }
    *max = m;
    return sum_1(sum);
}

/* ---------------------------------------------------------------- weighted_sum */

/* A tile of n_h heads by n_v vectors of d. Each value of V is widened once for all heads. There are
 * enough values of d to compute side by side, so a sum has no lanes: one multiply-add follows
 * another, in the order of the positions. */
INLINE void weighted_tile(float *y, size_t y_stride, const float *e, size_t e_stride, int n_h,
                          const uint16_t *v, size_t v_stride, size_t n_p, int n_v,
                          bool accumulate) {
    vec sum[TILE_MAX_X][TILE_MAX_V];
    UNROLL for (int h = 0; h < n_h; h++) {
        UNROLL for (int i = 0; i < n_v; i++) {
            sum[h][i] =
                accumulate ? vec_load(y + (size_t)h * y_stride + (size_t)i * WIDTH) : vec_zero();
        }
    }
    for (size_t p = 0; p < n_p; p++, v += v_stride) {
        UNROLL for (int i = 0; i < n_v; i++) {
            vec value = vec_widen(v + (size_t)i * WIDTH);
            UNROLL for (int h = 0; h < n_h; h++) {
                sum[h][i] = vec_fma(vec_splat(e[(size_t)h * e_stride + p]), value, sum[h][i]);
            }
        }
    }
    UNROLL for (int h = 0; h < n_h; h++) {
        UNROLL for (int i = 0; i < n_v; i++) {
            vec_store(y + (size_t)h * y_stride + (size_t)i * WIDTH, sum[h][i]);
        }
    }
}

/* As many tiles of n_v vectors as fit between *d and n_d; advances *d past them. */
INLINE void weighted_tiles(size_t *d, float *y, size_t y_stride, const float *e, size_t e_stride,
                           int n_h, const uint16_t *v, size_t v_stride, size_t n_p, size_t n_d,
                           int n_v, bool accumulate) {
    for (; *d + WIDTH * (size_t)n_v <= n_d; *d += WIDTH * (size_t)n_v) {
        weighted_tile(y + *d, y_stride, e, e_stride, n_h, v + *d, v_stride, n_p, n_v, accumulate);
    }
}

INLINE void weighted_heads(float *y, size_t y_stride, const float *e, size_t e_stride, int n_h,
                           const uint16_t *v, size_t v_stride, size_t n_p, size_t n_d, int full_v,
                           bool accumulate) {
    size_t d = 0;
    weighted_tiles(&d, y, y_stride, e, e_stride, n_h, v, v_stride, n_p, n_d, full_v, accumulate);
    weighted_tiles(&d, y, y_stride, e, e_stride, n_h, v, v_stride, n_p, n_d, full_v / 2,
                   accumulate);
    weighted_tiles(&d, y, y_stride, e, e_stride, n_h, v, v_stride, n_p, n_d, 1, accumulate);
    for (; d < n_d; d++) {
        for (size_t h = 0; h < (size_t)n_h; h++) {
            float sum = accumulate ? y[h * y_stride + d] : 0;
            for (size_t p = 0; p < n_p; p++) {
                sum = fmaf(e[h * e_stride + p], widen_f16(v[p * v_stride + d]), sum);
            }
            y[h * y_stride + d] = sum;
        }
    }
}

static void weighted_sum(float *y, size_t y_stride, const float *e, size_t e_stride, size_t n_h,
                         const uint16_t *v, size_t v_stride, size_t n_p, size_t n_d,
                         bool accumulate) {
    while (n_h > 0) {
        size_t n = n_h < 4 ? n_h : 4;
        if (n == 4) {
            weighted_heads(y, y_stride, e, e_stride, 4, v, v_stride, n_p, n_d, TILE_V(4),
                           accumulate);
        } else if (n == 3) {
            weighted_heads(y, y_stride, e, e_stride, 3, v, v_stride, n_p, n_d, TILE_V(3),
                           accumulate);
        } else if (n == 2) {
            weighted_heads(y, y_stride, e, e_stride, 2, v, v_stride, n_p, n_d, TILE_V(2),
                           accumulate);
        } else {
            weighted_heads(y, y_stride, e, e_stride, 1, v, v_stride, n_p, n_d, TILE_V(1),
                           accumulate);
        }
        n_h -= n;
        y += n * y_stride;
        e += n * e_stride;
    }
}

/* ---------------------------------------------------------------- rotate */

/*
 * x[i]        = x[i] cos a_i        - x[i + half] sin a_i
 * x[i + half] = x[i + half] cos a_i + x[i] sin a_i            i < half
 *
 * The pairs are (i, i + half), as in Hugging Face checkpoints, and not (2i, 2i + 1) as in the
 * paper. This is plain C, which the compiler vectorises for the level's instructions.
 */
static void rotate(float *x, const float *angles, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], cosine = angles[2 * i], sine = angles[2 * i + 1];
        x[i] = a * cosine - b * sine;
        x[i + half] = b * cosine + a * sine;
    }
}

/* These functions, for a level's table. */
#define LANES_FUNCTIONS                                                                            \
    .widen = widen_row, .narrow = narrow_row, .dots = dots, .rmsnorm = rmsnorm_row,                \
    .swiglu = swiglu_row, .softmax = softmax, .weighted_sum = weighted_sum, .rotate = rotate

#ifdef PANEL_W

/* ---------------------------------------------------------------- dots_packed */

/*
 * The packed matmul for vectors shorter than the 16 lanes of a canonical sum.
 *
 * The accumulators of a tile of PANEL_X rows of x by PANEL_W weight rows fit in the registers only
 * if the tile takes one part of the lanes at a time. Then they leave room for PANEL_X vectors of x
 * and one of weights, and the tile needs few loads for its multiply-adds. So x and the widened
 * weights are packed in the order of use, with the parts apart:
 *
 *     x         [group of PANEL_X rows][block of k][part][k / 16][row of group][WIDTH]
 *     panel     PANEL_W weight rows, one block of k:   [part][k / 16][row][WIDTH]
 *
 * A panel stays in the first-level cache while it is multiplied by all groups of x. Between two
 * blocks of k the accumulators wait in memory.
 */
#define PANEL_K 1024
#define PANEL_GROUPS ((MATMUL_MAX_ROWS + PANEL_X - 1) / PANEL_X)
/* The accumulators of one group and part: [x][w][WIDTH]. */
#define PART_FLOATS (PANEL_X * PANEL_W * WIDTH)
#define GROUP_FLOATS (PARTS * PART_FLOATS)
#define PANEL_SCRATCH (PANEL_W * PANEL_K + PANEL_GROUPS * GROUP_FLOATS)

_Static_assert(PANEL_X >= 2 && PANEL_X <= 4, "dots_packed has a tile for each size of a group");
_Static_assert(PANEL_K % LANES == 0, "a block of k is whole sets of lanes");
_Static_assert(WEIGHT_ROWS % PANEL_W == 0, "every panel of a block of weight rows is full");

#define PREFETCH_STEPS 16 /* of LANES values of k, after which a tile prefetches some lines */

/* The cache lines of the next panel's weights, line by line across its rows. While this panel is
 * multiplied, its tiles prefetch them into the second-level cache, a few at a time. */
struct prefetch {
    const char *from;
    size_t row_bytes, n_rows, n_lines, line, per_turn;
};

INLINE struct prefetch prefetch_begin(const uint16_t *w, size_t w_stride, size_t n_rows, size_t k,
                                      size_t n_steps) {
    size_t n_turns = (n_steps + PREFETCH_STEPS - 1) / PREFETCH_STEPS,
           n_lines = (k * sizeof *w + 63) / 64 * n_rows;
    return (struct prefetch){.from = (const char *)w,
                             .row_bytes = w_stride * sizeof *w,
                             .n_rows = n_rows,
                             .n_lines = n_lines,
                             .per_turn = (n_lines + n_turns - 1) / n_turns};
}

INLINE void prefetch_some(struct prefetch *next) {
    for (size_t i = 0; i < next->per_turn && next->line < next->n_lines; i++, next->line++) {
        __builtin_prefetch(next->from + next->line % next->n_rows * next->row_bytes +
                               next->line / next->n_rows * 64,
                           0, 2);
    }
}

static size_t max_rows(size_t k) {
    (void)k;
    return MATMUL_MAX_ROWS;
}

/* Groups of PANEL_X rows, or some of them smaller where PANEL_X does not divide n_x. They are as
 * equal as can be, so a single row is never left over. */
static size_t pack_parts(size_t n_x) {
    return (n_x + PANEL_X - 1) / PANEL_X;
}

static void pack(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k,
                 size_t part) {
    size_t n_groups = pack_parts(n_x), first = part * n_x / n_groups,
           n = (part + 1) * n_x / n_groups - first;
    size_t padded = round_up_lanes(k);
    x += first * x_stride;
    packed += first * padded;
    for (size_t block = 0; block < padded; block += PANEL_K) {
        size_t end = padded - block < PANEL_K ? padded : block + PANEL_K;
        for (size_t lane = 0; lane < LANES; lane += WIDTH) {
            for (size_t at = block + lane; at < end; at += LANES) {
                for (size_t r = 0; r < n; r++, packed += WIDTH) {
                    const float *from = x + r * x_stride + at;
                    float rest[WIDTH] = {0};
                    if (at + WIDTH > k && at < k) {
                        memcpy(rest, from, (k - at) * sizeof *rest);
                    }
                    vec_store(packed, vec_load(at + WIDTH <= k ? from : rest));
                }
            }
        }
    }
}

/* Widens one block of k of n_w <= PANEL_W weight rows. The rows from n_w on and the values past the
 * end of k become zeros. */
static void pack_panel(float *panel, const uint16_t *w, size_t w_stride, size_t n_w, size_t n_k) {
    size_t padded = round_up_lanes(n_k), part_floats = padded / PARTS * PANEL_W;
    for (size_t i = 0; i < PANEL_W; i++) {
        const uint16_t *row = w + i * w_stride;
        float *to = panel + i * WIDTH;
        for (size_t at = 0; at < padded; at += LANES, to += PANEL_W * WIDTH) {
            uint16_t rest[LANES] = {0};
            const uint16_t *from = row + at;
            if (i >= n_w || at + LANES > n_k) {
                if (i < n_w) {
                    memcpy(rest, from, (n_k - at) * sizeof *rest);
                }
                from = rest;
            }
            UNROLL for (size_t part = 0; part < PARTS; part++) {
                vec_store(to + part * part_floats, vec_widen(from + part * WIDTH));
            }
        }
    }
}

/* One part of the lanes of n_x rows by PANEL_W weight rows, over one block of k. begin: this is the
 * first block; end: this is the last part of the last block, so y can be written. The accumulators
 * are kept in acc, because sum must not be indexed by a variable if it is to stay in registers. */
INLINE void panel_tile(float *y, size_t y_stride, float *acc, const float *x, int n_x,
                       const float *panel, size_t n_w, size_t n_steps, bool begin, bool end,
                       enum matmul_mode mode, struct prefetch *next) {
    vec sum[PANEL_X][PANEL_W];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < PANEL_W; i++) {
            sum[r][i] = begin ? vec_zero() : vec_load(acc + (r * PANEL_W + i) * WIDTH);
        }
    }
    for (size_t from = 0; from < n_steps; from += PREFETCH_STEPS) {
        size_t to = n_steps - from < PREFETCH_STEPS ? n_steps : from + PREFETCH_STEPS;
        prefetch_some(next);
        for (size_t step = from; step < to; step++, x += n_x * WIDTH, panel += PANEL_W * WIDTH) {
            vec value[PANEL_X];
            UNROLL for (int r = 0; r < n_x; r++) {
                value[r] = vec_load(x + r * WIDTH);
            }
            UNROLL for (int i = 0; i < PANEL_W; i++) {
                vec weight = vec_load(panel + i * WIDTH);
                UNROLL for (int r = 0; r < n_x; r++) {
                    sum[r][i] = vec_fma(weight, value[r], sum[r][i]);
                }
                if (i % 2 == 1) { /* one instruction may load two vectors */
                    FENCE;
                }
            }
        }
    }
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < PANEL_W; i++) {
            vec_store(acc + (r * PANEL_W + i) * WIDTH, sum[r][i]);
        }
    }
    if (!end) {
        return;
    }
    for (int r = 0; r < n_x; r++) {
        for (size_t i = 0; i < n_w; i += 4) {
            int n = n_w - i < 4 ? (int)(n_w - i) : 4;
            vec lanes[4][PARTS];
            for (int j = 0; j < 4; j++) {
                size_t column = i + (size_t)(j < n ? j : 0);
                UNROLL for (int p = 0; p < PARTS; p++) {
                    lanes[j][p] = vec_load(acc - (PARTS - 1 - p) * PART_FLOATS +
                                           ((size_t)r * PANEL_W + column) * WIDTH);
                }
            }
            store_sums(y + (size_t)r * y_stride + i, 1,
                       vec_sum_4(lanes[0], lanes[1], lanes[2], lanes[3]), n, mode);
        }
    }
}

static void dots_packed(float *y, size_t y_stride, const float *packed, size_t n_x,
                        const uint16_t *w, size_t w_stride, size_t n_w, size_t k,
                        enum matmul_mode mode, size_t n_streams, float *scratch) {
    (void)n_streams; /* the next panel is prefetched instead */
    size_t n_groups = pack_parts(n_x), padded = round_up_lanes(k);
    float *panel = scratch, *accs = scratch + PANEL_W * PANEL_K;
    for (size_t i = 0; i < n_w; i += PANEL_W) {
        size_t n = n_w - i < PANEL_W ? n_w - i : PANEL_W;
        for (size_t block = 0; block < padded; block += PANEL_K) {
            size_t n_k = k - block < PANEL_K ? k - block : PANEL_K,
                   n_steps = round_up_lanes(n_k) / LANES;
            size_t next_k = block + PANEL_K < padded ? block + PANEL_K : 0;
            struct prefetch next = prefetch_begin(
                w + (next_k ? i : i + PANEL_W) * w_stride + next_k, w_stride, PANEL_W,
                k - next_k < PANEL_K ? k - next_k : PANEL_K, PARTS * n_groups * n_steps);
            pack_panel(panel, w + i * w_stride + block, w_stride, n, n_k);
            for (size_t part = 0; part < PARTS; part++) {
                bool begin = block == 0, end = part == PARTS - 1 && block + PANEL_K >= padded;
                const float *lanes = panel + part * n_steps * PANEL_W * WIDTH;
                for (size_t g = 0; g < n_groups; g++) {
                    size_t first = g * n_x / n_groups, n_r = (g + 1) * n_x / n_groups - first;
                    const float *x =
                        packed + first * padded + n_r * (block + part * n_steps * WIDTH);
                    float *to = y + first * y_stride + i,
                          *acc = accs + g * GROUP_FLOATS + part * PART_FLOATS;
                    if (n_r == PANEL_X) {
                        panel_tile(to, y_stride, acc, x, PANEL_X, lanes, n, n_steps, begin, end,
                                   mode, &next);
                    } else if (n_r == PANEL_X - 1) {
                        panel_tile(to, y_stride, acc, x, PANEL_X - 1, lanes, n, n_steps, begin, end,
                                   mode, &next);
                    } else if (n_r == 2) {
                        panel_tile(to, y_stride, acc, x, 2, lanes, n, n_steps, begin, end, mode,
                                   &next);
                    } else {
                        panel_tile(to, y_stride, acc, x, 1, lanes, n, n_steps, begin, end, mode,
                                   &next);
                    }
                }
            }
        }
    }
}

#endif

// NOLINTEND(bugprone-implicit-widening-of-multiplication-result)

/*
 * kernels_lanes.h - the inner functions of kernels_cpu.h, written once for vectors of any width.
 * kernels_simd.c includes this file once for each level, after it has defined a vocabulary, all of
 * it with the level's name in front (NAME(add) is avx2_add):
 *
 *   vec, WIDTH, PARTS          a register of WIDTH floats; the 16 lanes of a canonical sum are PARTS = 16 / WIDTH of them
 *   quad                       four floats
 *   zero all load store        ... widen narrow: load and store as fp16
 *   add sub mul div            fma(a, b, c) = a b + c, fms(a, b, c) = c - a b, both rounded once
 *   larger(a, b)               a > b ? a : b
 *   if_less(a, b, yes, no)     a < b ? yes : no
 *   minus_size(x)              -|x|
 *   power_of_2(t)              2^n, where n is the whole number in the low bits of t: see canonical_exp
 *   sum_4(a, b, c, d)          ends four canonical sums, each of PARTS vectors
 *   quad_load quad_store quad_add
 *
 * and the sizes that suit its registers: TILE_W(n_x), the weight rows of a tile of dots with n_x <=
 * 4 rows of x, WIDE_W, those of the widest tile with one row of x, MANY_X, the rows of x of a tile
 * when there are more, VALUES(n_h), the vectors of a tile of weighted_sum with n_h heads. FENCE
 * stands where loads must not be moved up over multiply-adds, because the values that wait would
 * push accumulators out of the registers.
 *
 * An INLINE function is written for any tile size and used with constant ones: its loops over them
 * are unrolled, and its arrays are registers.
 */

/* The n_w floats of sums go to y, step apart, or are added to it. */
INLINE void NAME(store_sums)(float *y, size_t step, NAME(quad) sums, int n_w,
                             enum matmul_mode mode) {
    if (n_w == 4 && step == 1) {
        NAME(quad_store)(y, mode == MATMUL_ADD ? NAME(quad_add)(NAME(quad_load)(y), sums) : sums);
        return;
    }
    float s[4];
    NAME(quad_store)(s, sums);
    for (size_t i = 0; i < (size_t)n_w; i++) {
        y[i * step] = mode == MATMUL_ADD ? y[i * step] + s[i] : s[i];
    }
}

/* ---------------------------------------------------------------- dots, as they lie */

#ifndef TILE_MOST
#define TILE_MOST 8 /* weight rows of a tile, at most; rows of x: 4 */
#endif

/* One step of 16 k: each weight is widened once for all rows of x. */
INLINE void NAME(tile_step)(NAME(vec) sum[4][TILE_MOST][PARTS], const float *x, size_t x_stride,
                            int n_x, const uint16_t *w, size_t w_stride, int n_w) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            NAME(vec) weight = NAME(widen)(w + (size_t)i * w_stride + (size_t)p * WIDTH);
            UNROLL for (int r = 0; r < n_x; r++) {
                sum[r][i][p] = NAME(fma)(
                    weight, NAME(load)(x + (size_t)r * x_stride + (size_t)p * WIDTH), sum[r][i][p]);
            }
        }
        FENCE;
    }
}

INLINE void NAME(dots_tile)(float *y, size_t y_stride, size_t y_step, const float *x,
                            size_t x_stride, int n_x, const uint16_t *w, size_t w_stride, int n_w,
                            size_t k, enum matmul_mode mode) {
    NAME(vec) sum[4][TILE_MOST][PARTS];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i++) {
            UNROLL for (int p = 0; p < PARTS; p++) {
                sum[r][i][p] = NAME(zero)();
            }
        }
    }
    size_t at = 0;
    for (; at + LANES <= k; at += LANES) {
        NAME(tile_step)(sum, x + at, x_stride, n_x, w + at, w_stride, n_w);
    }
    if (at < k) {
        float x_rest[4 * LANES] = {0};
        uint16_t w_rest[TILE_MOST * LANES] = {0};
        for (int r = 0; r < n_x; r++) {
            memcpy(x_rest + r * LANES, x + (size_t)r * x_stride + at, (k - at) * sizeof *x);
        }
        for (int i = 0; i < n_w; i++) {
            memcpy(w_rest + i * LANES, w + (size_t)i * w_stride + at, (k - at) * sizeof *w);
        }
        NAME(tile_step)(sum, x_rest, LANES, n_x, w_rest, LANES, n_w);
    }
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < n_w; i += 4) {
            int n = n_w - i < 4 ? n_w - i : 4;
            NAME(quad)
            sums = NAME(sum_4)(sum[r][i], sum[r][n > 1 ? i + 1 : i], sum[r][n > 2 ? i + 2 : i],
                               sum[r][n > 3 ? i + 3 : i]);
            NAME(store_sums)(y + (size_t)r * y_stride + (size_t)i * y_step, y_step, sums, n, mode);
        }
    }
}

/* All weight rows for n_x rows of x, in tiles of full_w: neighbours, or, far, n_w / full_w
 * apart. */
INLINE void NAME(dots_rows)(float *y, size_t y_stride, const float *x, size_t x_stride, int n_x,
                            const uint16_t *w, size_t w_stride, size_t n_w, int full_w, bool far,
                            size_t k, enum matmul_mode mode) {
    size_t n_tiles = n_w / (size_t)full_w, apart = far ? n_tiles : 1,
           next = far ? 1 : (size_t)full_w;
    for (size_t i = 0; i < n_tiles; i++) {
        NAME(dots_tile)
        (y + i * next, y_stride, apart, x, x_stride, n_x, w + i * next * w_stride, apart * w_stride,
         full_w, k, mode);
    }
    for (size_t i = n_tiles * (size_t)full_w; i < n_w; i++) {
        NAME(dots_tile)
        (y + i, y_stride, 1, x, x_stride, n_x, w + i * w_stride, w_stride, 1, k, mode);
    }
}

static void NAME(dots)(float *y, size_t y_stride, const float *x, size_t x_stride, size_t n_x,
                       const uint16_t *w, size_t w_stride, size_t n_w, size_t k,
                       enum matmul_mode mode, size_t n_streams) {
    bool far = n_streams > 0;
    while (n_x > 0) {
        size_t n = n_x > 4 ? MANY_X : n_x;
        if (n == 1 && n_streams == 2) {
            NAME(dots_rows)(y, y_stride, x, x_stride, 1, w, w_stride, n_w, 2, true, k, mode);
        } else if (n == 1 && n_streams == 8) {
            NAME(dots_rows)(y, y_stride, x, x_stride, 1, w, w_stride, n_w, WIDE_W, true, k, mode);
        } else if (n == 1) {
            NAME(dots_rows)(y, y_stride, x, x_stride, 1, w, w_stride, n_w, 4, far, k, mode);
        } else if (n == 2) {
            NAME(dots_rows)(y, y_stride, x, x_stride, 2, w, w_stride, n_w, TILE_W(2), far, k, mode);
        } else if (n == 3) {
            NAME(dots_rows)(y, y_stride, x, x_stride, 3, w, w_stride, n_w, TILE_W(3), far, k, mode);
        } else {
            NAME(dots_rows)(y, y_stride, x, x_stride, 4, w, w_stride, n_w, TILE_W(4), far, k, mode);
        }
        n_x -= n;
        x += n * x_stride;
        y += n * y_stride;
    }
}

/* ---------------------------------------------------------------- the others */

static void NAME(widen_row)(float *to, const uint16_t *from, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        NAME(store)(to + i, NAME(widen)(from + i));
    }
    for (; i < n; i++) {
        to[i] = widen_f16(from[i]);
    }
}

static void NAME(narrow_row)(uint16_t *to, const float *from, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        NAME(narrow)(to + i, NAME(load)(from + i));
    }
    for (; i < n; i++) {
        to[i] = narrow_f16(from[i]);
    }
}

INLINE float NAME(sum_1)(const NAME(vec) sum[PARTS]) {
    float s[4];
    NAME(quad_store)(s, NAME(sum_4)(sum, sum, sum, sum));
    return s[0];
}

INLINE void NAME(square_step)(NAME(vec) sum[PARTS], const float *x) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        NAME(vec) a = NAME(load)(x + (size_t)p * WIDTH);
        sum[p] = NAME(fma)(a, a, sum[p]);
    }
}

static void NAME(rmsnorm)(float *y, const float *x, const uint16_t *gain, size_t n, float eps) {
    NAME(vec) sum[PARTS];
    UNROLL for (int p = 0; p < PARTS; p++) {
        sum[p] = NAME(zero)();
    }
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        NAME(square_step)(sum, x + i);
    }
    if (i < n) {
        float rest[LANES] = {0};
        memcpy(rest, x + i, (n - i) * sizeof *rest);
        NAME(square_step)(sum, rest);
    }
    float factor = 1.0f / sqrtf(NAME(sum_1)(sum) / (float)n + eps);
    for (i = 0; i + WIDTH <= n; i += WIDTH) {
        NAME(vec) normed = NAME(mul)(NAME(load)(x + i), NAME(all)(factor));
        NAME(store)(y + i, NAME(mul)(NAME(widen)(gain + i), normed));
    }
    for (; i < n; i++) {
        y[i] = widen_f16(gain[i]) * (x[i] * factor);
    }
}

INLINE NAME(vec) NAME(exp)(NAME(vec) x) {
    NAME(vec) round = NAME(all)(EXP_ROUND), one = NAME(all)(1.0f);
    NAME(vec) t = NAME(fma)(x, NAME(all)(EXP_LOG2E), round), n = NAME(sub)(t, round);
    NAME(vec) r = NAME(fms)(n, NAME(all)(EXP_LN2_LOW), NAME(fms)(n, NAME(all)(EXP_LN2_HIGH), x));
    NAME(vec) c = NAME(fma)(NAME(all)(EXP_C4), r, NAME(all)(EXP_C3));
    c = NAME(fma)(c, r, NAME(all)(EXP_C2));
    c = NAME(fma)(c, r, NAME(all)(EXP_C1));
    c = NAME(fma)(c, r, NAME(all)(EXP_C0));
    NAME(vec) p = NAME(fma)(NAME(fma)(c, r, one), r, one);
    return NAME(if_less)(x, NAME(all)(EXP_LEAST), NAME(zero)(), NAME(mul)(p, NAME(power_of_2)(t)));
}

INLINE void NAME(swiglu_vec)(float *y, const float *gate, const float *up) {
    NAME(vec) z = NAME(load)(gate), e = NAME(exp)(NAME(minus_size)(z));
    NAME(vec) numerator = NAME(if_less)(z, NAME(zero)(), NAME(mul)(z, e), z);
    NAME(vec) silu = NAME(div)(numerator, NAME(add)(NAME(all)(1.0f), e));
    NAME(store)(y, NAME(mul)(silu, NAME(load)(up)));
}

static void NAME(swiglu)(float *y, const float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        NAME(swiglu_vec)(y + i, gate + i, up + i);
    }
    if (i < n) {
        float rest[3][WIDTH] = {{0}};
        memcpy(rest[0], gate + i, (n - i) * sizeof *gate);
        memcpy(rest[1], up + i, (n - i) * sizeof *up);
        NAME(swiglu_vec)(rest[2], rest[0], rest[1]);
        memcpy(y + i, rest[2], (n - i) * sizeof *y);
    }
}

/* s = exp(s - max), and the lanes of their sum */
INLINE void NAME(softmax_step)(NAME(vec) sum[PARTS], float *s, NAME(vec) max) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        NAME(vec) e = NAME(exp)(NAME(sub)(NAME(load)(s + (size_t)p * WIDTH), max));
        NAME(store)(s + (size_t)p * WIDTH, e);
        sum[p] = NAME(add)(sum[p], e);
    }
}

static float NAME(softmax)(float *s, size_t n, float scale, float *max) {
    float most[WIDTH], m = s[0] * scale;
    NAME(vec) m_all = NAME(all)(m), factor = NAME(all)(scale), sum[PARTS];
    size_t p = 0;
    for (; p + WIDTH <= n; p += WIDTH) {
        NAME(vec) scaled = NAME(mul)(NAME(load)(s + p), factor);
        NAME(store)(s + p, scaled);
        m_all = NAME(larger)(scaled, m_all);
    }
    NAME(store)(most, m_all);
    for (size_t i = 0; i < WIDTH; i++) {
        m = most[i] > m ? most[i] : m;
    }
    for (; p < n; p++) {
        s[p] *= scale;
        m = s[p] > m ? s[p] : m;
    }
    m_all = NAME(all)(m);
    UNROLL for (int i = 0; i < PARTS; i++) {
        sum[i] = NAME(zero)();
    }
    for (p = 0; p + LANES <= n; p += LANES) {
        NAME(softmax_step)(sum, s + p, m_all);
    }
    if (p < n) {
        float rest[LANES];
        for (size_t i = 0; i < LANES; i++) {
            rest[i] = p + i < n ? s[p + i] : -INFINITY; /* whose exp is 0 */
        }
        NAME(softmax_step)(sum, rest, m_all);
        memcpy(s + p, rest, (n - p) * sizeof *s);
    }
    *max = m;
    return NAME(sum_1)(sum);
}

/* n_h heads by n_v vectors of d: each value of V is widened once for all heads. */
INLINE void NAME(weighted_tile)(float *y, size_t y_stride, const float *e, size_t e_stride, int n_h,
                                const uint16_t *v, size_t v_stride, size_t n_p, int n_v,
                                bool go_on) {
    NAME(vec) sum[4][8];
    UNROLL for (int h = 0; h < n_h; h++) {
        UNROLL for (int i = 0; i < n_v; i++) {
            sum[h][i] =
                go_on ? NAME(load)(y + (size_t)h * y_stride + (size_t)i * WIDTH) : NAME(zero)();
        }
    }
    for (size_t p = 0; p < n_p; p++, v += v_stride) {
        UNROLL for (int i = 0; i < n_v; i++) {
            NAME(vec) value = NAME(widen)(v + (size_t)i * WIDTH);
            UNROLL for (int h = 0; h < n_h; h++) {
                sum[h][i] = NAME(fma)(NAME(all)(e[(size_t)h * e_stride + p]), value, sum[h][i]);
            }
        }
    }
    UNROLL for (int h = 0; h < n_h; h++) {
        UNROLL for (int i = 0; i < n_v; i++) {
            NAME(store)(y + (size_t)h * y_stride + (size_t)i * WIDTH, sum[h][i]);
        }
    }
}

/* The values of d from *d on for n_h heads, n_v vectors at a time, as far as they go. */
INLINE void NAME(weighted_tiles)(size_t *d, float *y, size_t y_stride, const float *e,
                                 size_t e_stride, int n_h, const uint16_t *v, size_t v_stride,
                                 size_t n_p, size_t n_d, int n_v, bool go_on) {
    for (; *d + WIDTH * (size_t)n_v <= n_d; *d += WIDTH * (size_t)n_v) {
        NAME(weighted_tile)(y + *d, y_stride, e, e_stride, n_h, v + *d, v_stride, n_p, n_v, go_on);
    }
}

INLINE void NAME(weighted_heads)(float *y, size_t y_stride, const float *e, size_t e_stride,
                                 int n_h, const uint16_t *v, size_t v_stride, size_t n_p,
                                 size_t n_d, int full_v, bool go_on) {
    size_t d = 0;
    NAME(weighted_tiles)(&d, y, y_stride, e, e_stride, n_h, v, v_stride, n_p, n_d, full_v, go_on);
    NAME(weighted_tiles)
    (&d, y, y_stride, e, e_stride, n_h, v, v_stride, n_p, n_d, full_v / 2, go_on);
    NAME(weighted_tiles)(&d, y, y_stride, e, e_stride, n_h, v, v_stride, n_p, n_d, 1, go_on);
    for (; d < n_d; d++) {
        for (size_t h = 0; h < (size_t)n_h; h++) {
            float sum = go_on ? y[h * y_stride + d] : 0;
            for (size_t p = 0; p < n_p; p++) {
                sum = fmaf(e[h * e_stride + p], widen_f16(v[p * v_stride + d]), sum);
            }
            y[h * y_stride + d] = sum;
        }
    }
}

static void NAME(weighted_sum)(float *y, size_t y_stride, const float *e, size_t e_stride,
                               size_t n_h, const uint16_t *v, size_t v_stride, size_t n_p,
                               size_t n_d, bool go_on) {
    while (n_h > 0) {
        size_t n = n_h < 4 ? n_h : 4;
        if (n == 4) {
            NAME(weighted_heads)
            (y, y_stride, e, e_stride, 4, v, v_stride, n_p, n_d, VALUES(4), go_on);
        } else if (n == 3) {
            NAME(weighted_heads)
            (y, y_stride, e, e_stride, 3, v, v_stride, n_p, n_d, VALUES(3), go_on);
        } else if (n == 2) {
            NAME(weighted_heads)
            (y, y_stride, e, e_stride, 2, v, v_stride, n_p, n_d, VALUES(2), go_on);
        } else {
            NAME(weighted_heads)
            (y, y_stride, e, e_stride, 1, v, v_stride, n_p, n_d, VALUES(1), go_on);
        }
        n_h -= n;
        y += n * y_stride;
        e += n * e_stride;
    }
}

/* Plain C: compiled here, for the level's instructions, the compiler vectorises it. */
static void NAME(rotate)(float *x, const float *angles, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], cosine = angles[2 * i], sine = angles[2 * i + 1];
        x[i] = a * cosine - b * sine;
        x[i + half] = b * cosine + a * sine;
    }
}

#ifdef PANEL_W

/* ---------------------------------------------------------------- dots of many rows, packed */

/*
 * For vectors shorter than 16 lanes. PANEL_X rows of x by PANEL_W weight rows, and only one part of
 * the lanes, are as many accumulators as the registers hold beside PANEL_X values of x and one of
 * w, and need few loads for their multiply-adds. So x and the weights, widened, are packed in the
 * order of use, the parts apart:
 *
 *     x         [group of rows][block of k][part][k / 16][row of group][WIDTH]
 *     panel     PANEL_W weight rows, one block of k:   [part][k / 16][row][WIDTH]
 *
 * A panel stays in the first-level cache while all groups of x pass by. The accumulators wait in
 * memory from one block of k to the next.
 */
#define PANEL_K 1024
#define PANEL_GROUPS ((MATMUL_MAX_ROWS + PANEL_X - 1) / PANEL_X)
/* accumulators of one group and part: [x][w][WIDTH] */
#define PART_FLOATS (PANEL_X * PANEL_W * WIDTH)
#define GROUP_FLOATS (PARTS * PART_FLOATS)
#define PANEL_SCRATCH (PANEL_W * PANEL_K + PANEL_GROUPS * GROUP_FLOATS)

static size_t NAME(most_rows)(size_t k) {
    (void)k;
    return MATMUL_MAX_ROWS;
}

/* Groups of PANEL_X, or where that does not divide, some of one less: never a single row beside
 * others. */
static size_t NAME(pack_parts)(size_t n_x) {
    return (n_x + PANEL_X - 1) / PANEL_X;
}

static void NAME(pack)(float *packed, const float *x, size_t x_stride, size_t n_x, size_t k,
                       size_t part) {
    size_t n_groups = NAME(pack_parts)(n_x), first = part * n_x / n_groups,
           n = (part + 1) * n_x / n_groups - first;
    size_t padded = round_up_16(k);
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
                    NAME(store)(packed, NAME(load)(at + WIDTH <= k ? from : rest));
                }
            }
        }
    }
}

/* Widens up to PANEL_W weight rows' block of k, rows that are not there and the k past the end as
 * zeros. */
static void NAME(pack_panel)(float *panel, const uint16_t *w, size_t w_stride, size_t n_w,
                             size_t n_k) {
    size_t padded = round_up_16(n_k), part_floats = padded / PARTS * PANEL_W;
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
                NAME(store)(to + part * part_floats, NAME(widen)(from + part * WIDTH));
            }
        }
    }
}

/* One part of the lanes of n_x rows by PANEL_W weight rows, over one block of k. begin: the first
 * block; end: the last one, last part, which gives y. The accumulators are kept in acc: sum itself
 * is never indexed by a variable, so it stays in registers. */
INLINE void NAME(panel_tile)(float *y, size_t y_stride, float *acc, const float *x, int n_x,
                             const float *panel, size_t n_w, size_t n_steps, bool begin, bool end,
                             enum matmul_mode mode, struct read_ahead *ahead) {
    NAME(vec) sum[PANEL_X][PANEL_W];
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < PANEL_W; i++) {
            sum[r][i] = begin ? NAME(zero)() : NAME(load)(acc + (r * PANEL_W + i) * WIDTH);
        }
    }
    for (size_t from = 0; from < n_steps; from += AHEAD_STEPS) {
        size_t to = n_steps - from < AHEAD_STEPS ? n_steps : from + AHEAD_STEPS;
        read_ahead_some(ahead);
        for (size_t step = from; step < to; step++, x += n_x * WIDTH, panel += PANEL_W * WIDTH) {
            NAME(vec) value[PANEL_X];
            UNROLL for (int r = 0; r < n_x; r++) {
                value[r] = NAME(load)(x + r * WIDTH);
            }
            UNROLL for (int i = 0; i < PANEL_W; i++) {
                NAME(vec) weight = NAME(load)(panel + i * WIDTH);
                UNROLL for (int r = 0; r < n_x; r++) {
                    sum[r][i] = NAME(fma)(weight, value[r], sum[r][i]);
                }
                if (i % 2 == 1) { /* two vectors may be one load */
                    FENCE;
                }
            }
        }
    }
    UNROLL for (int r = 0; r < n_x; r++) {
        UNROLL for (int i = 0; i < PANEL_W; i++) {
            NAME(store)(acc + (r * PANEL_W + i) * WIDTH, sum[r][i]);
        }
    }
    if (!end) {
        return;
    }
    for (int r = 0; r < n_x; r++) {
        for (size_t i = 0; i < n_w; i += 4) {
            int n = n_w - i < 4 ? (int)(n_w - i) : 4;
            NAME(vec) lanes[4][PARTS];
            for (int j = 0; j < 4; j++) {
                size_t column = i + (size_t)(j < n ? j : 0);
                UNROLL for (int p = 0; p < PARTS; p++) {
                    lanes[j][p] = NAME(load)(acc - (PARTS - 1 - p) * PART_FLOATS +
                                             ((size_t)r * PANEL_W + column) * WIDTH);
                }
            }
            NAME(store_sums)
            (y + (size_t)r * y_stride + i, 1, NAME(sum_4)(lanes[0], lanes[1], lanes[2], lanes[3]),
             n, mode);
        }
    }
}

static void NAME(dots_packed)(float *y, size_t y_stride, const float *packed, size_t n_x,
                              const uint16_t *w, size_t w_stride, size_t n_w, size_t k,
                              enum matmul_mode mode, size_t n_streams, float *scratch) {
    (void)n_streams; /* the panel is read ahead */
    size_t n_groups = NAME(pack_parts)(n_x), padded = round_up_16(k);
    float *panel = scratch, *accs = scratch + PANEL_W * PANEL_K;
    for (size_t i = 0; i < n_w; i += PANEL_W) {
        size_t n = n_w - i < PANEL_W ? n_w - i : PANEL_W;
        for (size_t block = 0; block < padded; block += PANEL_K) {
            size_t n_k = k - block < PANEL_K ? k - block : PANEL_K,
                   n_steps = round_up_16(n_k) / LANES;
            size_t next = block + PANEL_K < padded ? block + PANEL_K : 0;
            struct read_ahead ahead =
                read_ahead_of(w + (next ? i : i + PANEL_W) * w_stride + next, w_stride, PANEL_W,
                              k - next < PANEL_K ? k - next : PANEL_K, PARTS * n_groups * n_steps);
            NAME(pack_panel)(panel, w + i * w_stride + block, w_stride, n, n_k);
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
                        NAME(panel_tile)
                        (to, y_stride, acc, x, PANEL_X, lanes, n, n_steps, begin, end, mode,
                         &ahead);
                    } else if (n_r == PANEL_X - 1) {
                        NAME(panel_tile)
                        (to, y_stride, acc, x, PANEL_X - 1, lanes, n, n_steps, begin, end, mode,
                         &ahead);
                    } else if (n_r == 2) {
                        NAME(panel_tile)
                        (to, y_stride, acc, x, 2, lanes, n, n_steps, begin, end, mode, &ahead);
                    } else {
                        NAME(panel_tile)
                        (to, y_stride, acc, x, 1, lanes, n, n_steps, begin, end, mode, &ahead);
                    }
                }
            }
        }
    }
}

#endif

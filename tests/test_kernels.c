/*
 * test_kernels.c - the CPU's op table. Every op is compared with a reference in double precision,
 * written here independently from the equations, within error bounds that follow from the number of
 * roundings. SIMD levels are compared with scalar C, many rows with single ones, and many threads
 * with one, bit by bit. Mutants, references that are wrong on purpose, must exceed the error
 * bounds. test_plain.c compares with the plain ops of bpo.c.
 */
#include "kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cpu/levels.h"
#include "op_inputs.h"

#define U 0x1p-24 /* the largest relative error of one rounding to fp32 */

static const struct kernels *ops;

/* ---------------------------------------------------------------- utilities */

/* fp16 to double, from the definition of the format, not as base/numbers.h does it. */
static double f16_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 0x3ff;
    double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                  : exponent == 0 ? ldexp(fraction, -24)
                                  : ldexp(1024 + fraction, exponent - 25);
    return h & 0x8000 ? -size : size;
}

/* The fp16 nearest to x >= 0, ties to even, by bisection. */
static uint16_t f16_nearest(double x) {
    uint16_t low = 0, high = 0x7c00; /* values ascend with the bits */
    if (x >= 65520) {                /* halfway between 65504, the largest, and 65536 */
        return 0x7c00;
    }
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        if (f16_value(middle) <= x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    double below = x - f16_value(low), above = (high == 0x7c00 ? 65536 : f16_value(high)) - x;
    return below < above || (below == above && low % 2 == 0) ? low : high;
}

static struct backend *backend_make(const char *simd, int n_threads, enum bpo_matmul matmul) {
    struct bpo_error err = {0};
    const struct backend_options options = {.n_threads = n_threads, .matmul = matmul};
    (void)setenv("BPO_SIMD", simd, 1);
    struct backend *b = ops->create(&options, &err);
    (void)unsetenv("BPO_SIMD");
    if (!b) {
        fail_msg("%s", err.message);
    }
    assert_int_equal(ops->step_begin(b, 0), 1);
    return b;
}

static void backend_end(struct backend *b) {
    struct bpo_error err = {0};
    assert_int_equal(ops->step_end(b, &err), 0);
    ops->destroy(b);
}

/* The levels of this CPU by their names in BPO_SIMD: scalar first, the best last. */
static const char *levels[4];
static size_t n_levels;

/* Each level with several thread counts: all must give the bits of the first. */
static struct {
    const char *simd;
    int n_threads;
} variants[12];
static size_t n_variants;

static void find_levels(void) {
    size_t n_simd = 0;
    while (cpu_level_simd(n_simd)) {
        n_simd++;
    }
    levels[n_levels++] = "scalar";
    while (n_simd-- > 0) {
        levels[n_levels++] = cpu_level_simd(n_simd)->name;
    }
    for (size_t i = 0; i < n_levels; i++) {
        for (int n_threads = 1; n_threads <= 3; n_threads++) {
            variants[n_variants].simd = levels[i];
            variants[n_variants++].n_threads = n_threads;
        }
    }
}

/* The worst error in a comparison with a reference, as a multiple of its bound: at most 1 if the
 * result is right. */
struct worst {
    double ratio;
};

static void compare(struct worst *worst, double got, double expected, double bound) {
    double ratio = fabs(got - expected) / bound;
    if (!(ratio <= worst->ratio)) { /* a NaN is wrong */
        worst->ratio = isnan(ratio) ? INFINITY : ratio;
    }
}

/* ---------------------------------------------------------------- numbers */

static void test_f16_widen(void **state) {
    (void)state;
    uint16_t *all = must_alloc(65536 * sizeof *all);
    float *wide = must_alloc(65536 * sizeof *wide), *other = must_alloc(65536 * sizeof *other);
    for (size_t i = 0; i < 65536; i++) {
        all[i] = (uint16_t)i;
    }
    cpu_level_scalar.widen(wide, all, 65536);
    for (size_t i = 0; i < 65536; i++) {
        double expected = f16_value(all[i]);
        if (isnan(expected)) {
            assert_true(isnan(wide[i]) && bits_of(wide[i]) & 0x400000);
        } else {
            assert_true(wide[i] == expected && !signbit(wide[i]) == !(i & 0x8000));
        }
    }
    for (size_t l = 0; cpu_level_simd(l); l++) {
        cpu_level_simd(l)->widen(other, all, 65536);
        assert_memory_equal(wide, other, 65536 * sizeof *wide);
        cpu_level_simd(l)->widen(other, all + 65529, 7);
        assert_memory_equal(wide + 65529, other, 7 * sizeof *wide);
    }
    free(all);
    free(wide);
    free(other);
}

static void test_f16_narrow(void **state) {
    (void)state;
    /* each fp16, the midpoint between it and the next, and the floats on both sides of these */
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double here = f16_value((uint16_t)h),
               next = h + 1 == 0x7c00 ? 65536 : f16_value((uint16_t)(h + 1));
        const float points[] = {(float)here, (float)((here + next) / 2)};
        for (size_t i = 0; i < 2; i++) {
            const float near[] = {nextafterf(points[i], 0), points[i],
                                  nextafterf(points[i], INFINITY)};
            for (size_t j = 0; j < 3; j++) {
                uint16_t expected = f16_nearest(near[j]);
                assert_int_equal(narrow_f16(near[j]), expected);
                assert_int_equal(narrow_f16(-near[j]), expected | 0x8000);
            }
        }
    }
    assert_int_equal(narrow_f16(INFINITY), 0x7c00);
    assert_int_equal(narrow_f16(-1e30f), 0xfc00);
    assert_int_equal(narrow_f16(1e-30f), 0);
    assert_int_equal(narrow_f16(NAN) & 0x7e00, 0x7e00);
    /* every 211th of all floats, NaNs included */
    for (size_t l = 0; cpu_level_simd(l); l++) {
        enum { N = 1 << 12 };
        float from[N];
        uint16_t a[N], b[N];
        for (uint64_t u = 0; u < (uint64_t)1 << 32;) {
            for (size_t i = 0; i < N; i++, u += 211) {
                from[i] = float_of((uint32_t)u);
            }
            cpu_level_scalar.narrow(a, from, N);
            cpu_level_simd(l)->narrow(b, from, N);
            assert_memory_equal(a, b, sizeof a);
        }
        cpu_level_simd(l)->narrow(b, from, 13);
        assert_memory_equal(a, b, 13 * sizeof *a);
    }
}

static void test_exp(void **state) {
    (void)state;
    double worst = 0;
    const uint32_t first = bits_of(-0.0f), last = bits_of(-87.0f);
    for (uint32_t u = first; u <= last; u += 733) {
        double expected = exp(float_of(u));
        float got = canonical_exp(float_of(u));
        int exponent;
        (void)frexp(expected, &exponent);
        double error = fabs(got - expected) / ldexp(1, exponent - 24);
        worst = error > worst ? error : worst;
    }
    printf("    exp: largest error %.3f ulp\n", worst);
    assert_true(worst <= 1.0);
    assert_true(canonical_exp(0.0f) == 1.0f && canonical_exp(-0.0f) == 1.0f);
    assert_true(canonical_exp(-87.00001f) == 0.0f && canonical_exp(-INFINITY) == 0.0f);
    assert_true(isnan(canonical_exp(NAN)));
    /* through softmax, with a maximum of 0, and minus infinity among the other values */
    for (size_t l = 0; cpu_level_simd(l); l++) {
        float a[128], b[128], max;
        for (uint32_t u = first; u <= bits_of(-INFINITY); u += 127 * 61) {
            a[0] = 0;
            for (uint32_t i = 1; i < 128; i++) {
                uint32_t v = u + i * 61;
                a[i] = float_of(v < bits_of(-INFINITY) ? v : bits_of(-INFINITY));
            }
            memcpy(b, a, sizeof b);
            (void)cpu_level_simd(l)->softmax(b, 128, 1.0f, &max);
            for (size_t i = 0; i < 128; i += 9) {
                assert_int_equal(bits_of(canonical_exp(a[i])), bits_of(b[i]));
            }
        }
    }
}

/* A NaN after the first score is ignored by the maximum: every level finds the maximum of the other
 * scores, and a sum that is NaN. */
static void test_softmax_nan(void **state) {
    (void)state;
    enum { N = 37 };
    for (size_t bad = 1; bad < N; bad++) {
        float s[N], expected[N], found, max;
        for (size_t i = 0; i < N; i++) {
            expected[i] = random_normal();
        }
        expected[bad] = NAN;
        memcpy(s, expected, sizeof s);
        assert_true(isnan(cpu_level_scalar.softmax(expected, N, 0.5f, &max)));
        assert_true(!isnan(max));
        for (size_t l = 0; cpu_level_simd(l); l++) {
            float e[N];
            memcpy(e, s, sizeof e);
            assert_true(isnan(cpu_level_simd(l)->softmax(e, N, 0.5f, &found)));
            assert_int_equal(bits_of(found), bits_of(max));
            for (size_t i = 0; i < N; i++) {
                assert_true(i == bad ? isnan(e[i]) : bits_of(e[i]) == bits_of(expected[i]));
            }
        }
    }
}

static void test_inv_freq(void **state) {
    (void)state;
    const int32_t dims[] = {2, 6, 24, 40, 64, 80, 96, 128, 256};
    const float thetas[] = {1.0f, 2.0f, 10000.0f, 500000.0f, 1e6f, 5e6f};
    float inv_freq[128];
    for (size_t t = 0; t < COUNT(thetas); t++) {
        for (size_t d = 0; d < COUNT(dims); d++) {
            rope_inv_freq(inv_freq, dims[d], thetas[t]);
            for (int32_t i = 0; i < dims[d] / 2; i++) {
                float exponent = (float)(2 * i) / (float)dims[d];
                float expected = 1.0f / (float)pow((double)thetas[t], (double)exponent);
                assert_true(inv_freq[i] == expected);
            }
        }
    }
}

/* ---------------------------------------------------------------- embed, gather, row ops */

static void test_embed_and_gather(void **state) {
    (void)state;
    enum { V = 37, R = 65 };
    const size_t dims[] = {8, 15, 24, 200};
    int32_t token[R], index[] = {64, 0, 3, 3};
    for (size_t i = 0; i < R; i++) {
        token[i] = (int32_t)(random_bits() % V);
    }
    for (size_t d = 0; d < COUNT(dims); d++) {
        size_t dim = dims[d], stride = dim + 3;
        uint16_t *data = random_f16(V, dim, stride, 1);
        const struct weight table = weight_of(data, V, dim, stride);
        float *x = must_alloc(R * dim * sizeof *x), *y = must_alloc(COUNT(index) * dim * sizeof *y);
        for (size_t level = 0; level < n_levels; level++) {
            struct backend *b = backend_make(levels[level], 2, BPO_MATMUL_AUTO);
            ops->embed(b, x, &table, &(struct rows){.n = R, .token = token});
            ops->gather(b, y, x, index, (int32_t)COUNT(index), (int32_t)dim);
            for (size_t r = 0; r < R; r++) {
                for (size_t i = 0; i < dim; i++) {
                    assert_true(x[r * dim + i] == f16_value(data[(size_t)token[r] * stride + i]));
                }
            }
            for (size_t r = 0; r < COUNT(index); r++) {
                assert_memory_equal(y + r * dim, x + (size_t)index[r] * dim, dim * sizeof *y);
            }
            backend_end(b);
        }
        free(data);
        free(x);
        free(y);
    }
}

static void test_rmsnorm(void **state) {
    (void)state;
    enum { R = 33 };
    const float eps = 1e-5f;
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t n = odd_sizes[s];
        float *x = random_floats(R * n, 3), *y = must_alloc(R * n * sizeof *y),
              *first = must_alloc(R * n * sizeof *y);
        uint16_t *gain = random_f16(1, n, n, 1);
        memset(x, 0, n * sizeof *x); /* a row of zeros stays zeros */
        const struct weight w = weight_of(gain, 1, n, n);
        struct worst worst = {0}, mutant = {0};
        for (size_t v = 0; v < n_variants; v++) {
            struct backend *b =
                backend_make(variants[v].simd, variants[v].n_threads, BPO_MATMUL_OWN);
            ops->rmsnorm(b, y, x, &w, R, eps);
            if (v == 0) {
                memcpy(first, y, R * n * sizeof *y);
            }
            assert_memory_equal(first, y, R * n * sizeof *y);
            ops->rmsnorm(b, y, x + n, &w, 1, eps);
            assert_memory_equal(first + n, y, n * sizeof *y);
            backend_end(b);
        }
        for (size_t r = 0; r < R; r++) {
            double sum = 0;
            for (size_t i = 0; i < n; i++) {
                sum += (double)x[r * n + i] * x[r * n + i];
            }
            for (size_t i = 0; i < n; i++) {
                double expected = x[r * n + i] / sqrt(sum / (double)n + eps) * f16_value(gain[i]);
                double wrong_eps = x[r * n + i] / sqrt(sum / (double)n + 1e-2) * f16_value(gain[i]);
                double bound = ((double)n / LANES + 24) / 2 * U * fabs(expected) + 1e-40;
                compare(&worst, first[r * n + i], expected, bound);
                compare(&mutant, first[r * n + i], wrong_eps, bound);
            }
        }
        assert_true(worst.ratio <= 1);
        assert_true(mutant.ratio > 20);
        free(x);
        free(y);
        free(first);
        free(gain);
    }
}

static void test_swiglu(void **state) {
    (void)state;
    enum { R = 9 };
    const float special[] = {0.0f,   -0.0f, 1e-30f, -1e-30f, 88.0f,  -86.9f,
                             -87.1f, 1e4f,  -1e4f,  3e38f,   -3e38f, -1.0f};
    for (size_t s = 0; s < COUNT(odd_sizes); s++) {
        size_t n = odd_sizes[s];
        float *x = random_floats(R * 2 * n, 6), *y = must_alloc(R * n * sizeof *y),
              *first = must_alloc(R * n * sizeof *y);
        for (size_t i = 0; i < n && i < COUNT(special); i++) {
            x[i] = special[i];
            x[n + i] = 0.5f;
        }
        struct worst worst = {0}, mutant = {0};
        for (size_t v = 0; v < n_variants; v++) {
            struct backend *b =
                backend_make(variants[v].simd, variants[v].n_threads, BPO_MATMUL_OWN);
            ops->swiglu(b, y, x, R, (int32_t)n);
            if (v == 0) {
                memcpy(first, y, R * n * sizeof *y);
            }
            assert_memory_equal(first, y, R * n * sizeof *y);
            backend_end(b);
        }
        for (size_t r = 0; r < R; r++) {
            for (size_t i = 0; i < n; i++) {
                double z = x[r * 2 * n + i], up = x[r * 2 * n + n + i],
                       expected = z / (1 + exp(-z)) * up;
                /* below -87, silu is 0 instead of z exp(z) */
                double bound = 8 * U * fabs(expected) + 1e-34 * fabs(up) + 1e-44;
                compare(&worst, first[r * n + i], expected, bound);
                /* gate and up exchanged */
                compare(&mutant, first[r * n + i], up / (1 + exp(-up)) * z, bound);
            }
        }
        assert_true(worst.ratio <= 1);
        assert_true(mutant.ratio > 100);
        free(x);
        free(y);
        free(first);
    }
}

/* ---------------------------------------------------------------- matmul */

struct matmul_case {
    int32_t n_rows;
    size_t n, k, stride; /* weight rows, cols, elements from one row to the next */
};

static void check_matmul(const struct matmul_case *c) {
    size_t n_rows = (size_t)c->n_rows, n_y = n_rows * c->n;
    float *x = random_floats(n_rows * c->k, 1), *start = random_floats(n_y, 1),
          *y = must_alloc(n_y * sizeof *y);
    float *stored = must_alloc(n_y * sizeof *y), *added = must_alloc(n_y * sizeof *y);
    uint16_t *data = random_f16(c->n, c->k, c->stride, 0.1f);
    const struct weight w = weight_of(data, c->n, c->k, c->stride);
    const struct rows rows = {.n = c->n_rows};
    for (size_t v = 0; v < n_variants; v++) {
        struct backend *b = backend_make(variants[v].simd, variants[v].n_threads, BPO_MATMUL_OWN);
        for (int mode = MATMUL_STORE; mode <= MATMUL_ADD; mode++) {
            float *first = mode == MATMUL_ADD ? added : stored;
            memcpy(y, start, n_y * sizeof *y);
            ops->matmul(b, y, x, &w, &rows, (enum matmul_mode)mode);
            if (v == 0) {
                memcpy(first, y, n_y * sizeof *y);
            }
            assert_memory_equal(first, y, n_y * sizeof *y);
        }
        if (variants[v].n_threads == 2 || v == 0) { /* row by row */
            memcpy(y, start, n_y * sizeof *y);
            for (size_t r = 0; r < n_rows; r++) {
                ops->matmul(b, y + r * c->n, x + r * c->k, &w, &(struct rows){.n = 1}, MATMUL_ADD);
            }
            assert_memory_equal(added, y, n_y * sizeof *y);
        }
        backend_end(b);
    }
    struct worst worst = {0}, mutant = {0};
    size_t flipped = c->k / 2;
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t i = 0; i < c->n; i++) {
            double sum = 0, size = 0,
                   change = 2 * f16_value(data[i * c->stride + flipped]) * x[r * c->k + flipped];
            for (size_t k = 0; k < c->k; k++) {
                double product = f16_value(data[i * c->stride + k]) * x[r * c->k + k];
                sum += product;
                size += fabs(product);
            }
            double bound = ((double)((c->k + LANES - 1) / LANES) + 4) * U * size + 1e-40;
            compare(&worst, stored[r * c->n + i], sum, bound);
            compare(&worst, added[r * c->n + i], start[r * c->n + i] + sum,
                    bound + 2 * U * (fabs(start[r * c->n + i]) + size));
            /* the sign of one weight wrong */
            compare(&mutant, stored[r * c->n + i], sum - change, bound);
        }
    }
    assert_true(worst.ratio <= 1);
    assert_true(mutant.ratio > 100);
    free(x);
    free(start);
    free(y);
    free(stored);
    free(added);
    free(data);
}

static void test_matmul(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(row_counts); i++) {
        check_matmul(&(struct matmul_case){row_counts[i], 30, 100, 100});
    }
    for (size_t i = 0; i < COUNT(odd_sizes); i++) { /* many k, then many weight rows */
        check_matmul(&(struct matmul_case){1 + (int32_t)i % 4, 7, odd_sizes[i], odd_sizes[i] + 1});
        check_matmul(&(struct matmul_case){7, 5, odd_sizes[i], odd_sizes[i] + 8});
        check_matmul(&(struct matmul_case){1 + 5 * ((int32_t)i % 2), odd_sizes[i], 24, 24});
    }
    /* more k than one packed block: 1024 + 1024 + 52 */
    check_matmul(&(struct matmul_case){8, 9, 2100, 2100});
    check_matmul(&(struct matmul_case){1, 200, 2100, 2100});
    check_matmul(&(struct matmul_case){97, 21, 40, 40}); /* more rows than one pass: 96 + 1 */
    check_matmul(&(struct matmul_case){197, 6, 32, 40});
}

/* Subnormal products, infinities and NaN: the same on all levels, and a row with a NaN does not
 * affect the others. */
static void test_matmul_special(void **state) {
    (void)state;
    enum { R = 6, N = 5, K = 41 };
    float *x = random_floats(R * K, 1e-38f);
    uint16_t *data = random_f16(N, K, K, 1e-5f);
    float y[COUNT(levels)][R * N], clean[R * N];
    const struct weight w = weight_of(data, N, K, K);
    for (size_t level = 0; level < n_levels; level++) {
        struct backend *b = backend_make(levels[level], 1, BPO_MATMUL_OWN);
        ops->matmul(b, y[level], x, &w, &(struct rows){.n = R}, MATMUL_STORE);
        backend_end(b);
    }
    for (size_t level = 1; level < n_levels; level++) {
        assert_memory_equal(y[0], y[level], sizeof y[0]);
    }
    memcpy(clean, y[0], sizeof clean);
    x[3 * K + 40] = NAN;
    x[4 * K] = INFINITY;
    for (size_t level = 0; level < n_levels; level++) {
        struct backend *b = backend_make(levels[level], 2, BPO_MATMUL_OWN);
        int32_t found;
        ops->matmul(b, y[0], x, &w, &(struct rows){.n = R}, MATMUL_STORE);
        assert_memory_equal(clean, y[0], 3 * N * sizeof(float));
        assert_memory_equal(clean + 5 * N, y[0] + 5 * N, N * sizeof(float));
        for (size_t i = 0; i < N; i++) {
            assert_true(isnan(y[0][3 * N + i]));
            assert_true(!isfinite(y[0][4 * N + i]));
        }
        assert_int_equal(ops->first_nonfinite(b, &found, y[0], R, N, NULL), 0);
        assert_int_equal(found, 3);
        assert_int_equal(ops->first_nonfinite(b, &found, y[0] + 4 * N, 2, N, NULL), 0);
        assert_int_equal(found, 0);
        assert_int_equal(ops->first_nonfinite(b, &found, y[0], 3, N, NULL), 0);
        assert_int_equal(found, -1);
        backend_end(b);
    }
    free(x);
    free(data);
}

/* OpenBLAS: a span of prompt rows has the same bits alone and beside other spans, with any number
 * of threads. The decode rows equal those of cpu/'s own kernels. */
static void test_matmul_openblas(void **state) {
    (void)state;
    enum { N = 300, K = 136, R = 64 + 1 + 64 + 3 + 17 };
    const struct span spans[] = {{0, 64, ROWS_PROMPT},
                                 {64, 1, ROWS_DECODE},
                                 {65, 64, ROWS_PROMPT},
                                 {129, 3, ROWS_DECODE},
                                 {132, 17, ROWS_PROMPT}};
    float *x = random_floats(R * K, 1), *start = random_floats(R * N, 1);
    float *y = must_alloc(R * N * sizeof *y), *first = must_alloc(R * N * sizeof *y),
          *own = must_alloc(R * N * sizeof *y);
    uint16_t *data = random_f16(N, K, K, 0.1f);
    const struct weight w = weight_of(data, N, K, K);
    for (int mode = MATMUL_STORE; mode <= MATMUL_ADD; mode++) {
        struct backend *b = backend_make("scalar", 1, BPO_MATMUL_OWN);
        memcpy(own, start, R * N * sizeof *y);
        ops->matmul(b, own, x, &w, &(struct rows){.n = R, .spans = spans, .n_spans = COUNT(spans)},
                    (enum matmul_mode)mode);
        backend_end(b);
        for (int n_threads = 1; n_threads <= 3; n_threads++) {
            b = backend_make(levels[n_levels - 1], n_threads, BPO_MATMUL_OPENBLAS);
            memcpy(y, start, R * N * sizeof *y);
            ops->matmul(b, y, x, &w,
                        &(struct rows){.n = R, .spans = spans, .n_spans = COUNT(spans)},
                        (enum matmul_mode)mode);
            if (n_threads == 1) {
                memcpy(first, y, R * N * sizeof *y);
            }
            assert_memory_equal(first, y, R * N * sizeof *y);
            for (size_t s = 0; s < COUNT(spans); s++) { /* alone */
                const struct span alone = {0, spans[s].n, spans[s].kind};
                size_t at = (size_t)spans[s].first, n_y = (size_t)spans[s].n * N * sizeof *y;
                memcpy(y, start + at * N, n_y);
                ops->matmul(b, y, x + at * K, &w,
                            &(struct rows){.n = alone.n, .spans = &alone, .n_spans = 1},
                            (enum matmul_mode)mode);
                assert_memory_equal(first + at * N, y, n_y);
                if (spans[s].kind == ROWS_DECODE) {
                    assert_memory_equal(own + at * N, y, n_y);
                }
            }
            backend_end(b);
        }
        struct worst worst = {0};
        for (size_t r = 0; r < R; r++) {
            for (size_t i = 0; i < N; i++) {
                double sum = mode == MATMUL_ADD ? start[r * N + i] : 0, size = fabs(sum);
                for (size_t k = 0; k < K; k++) {
                    double product = f16_value(data[i * K + k]) * x[r * K + k];
                    sum += product;
                    size += fabs(product);
                }
                /* any order of summation */
                compare(&worst, first[r * N + i], sum, (K + 4) * U * size);
            }
        }
        assert_true(worst.ratio <= 1);
    }
    free(x);
    free(start);
    free(y);
    free(first);
    free(own);
    free(data);
}

/* ---------------------------------------------------------------- RoPE and attention */

/* The last two have enough keys and values for the CPU backend to prefetch them, unless there is
 * only one row. */
static const struct heads shapes[] = {{6, 2, 24},  {3, 1, 6},  {4, 4, 40},   {8, 2, 80}, {20, 2, 2},
                                      {2, 1, 128}, {5, 5, 64}, {10, 10, 64}, {16, 8, 80}};

/* A cache of 2 layers, with strides larger than necessary; a head's is not a power of two. */
static void cache_make(struct kv_cache *kv, struct backend *b, const struct heads *s,
                       int32_t n_slots, int32_t n_positions) {
    struct bpo_error err = {0};
    *kv = (struct kv_cache){
        .n_slots = n_slots, .n_layers = 2, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim};
    kv->n_positions = n_positions;
    kv->pos_bytes = 2 * (size_t)s->head_dim;
    kv->head_bytes = ((size_t)n_positions * kv->pos_bytes + 63) / 64 * 64 + 64;
    kv->plane_bytes = (size_t)s->n_kv_heads * kv->head_bytes + 128;
    kv->layer_bytes = 2 * kv->plane_bytes;
    kv->slot_bytes = 2 * kv->layer_bytes + 64;
    kv->data = ops->alloc(b, (size_t)n_slots * kv->slot_bytes, MEMORY_LAZY, &err);
    assert_non_null(kv->data);
}

static void cache_free(struct kv_cache *kv, struct backend *b) {
    ops->free(b, kv->data, (size_t)kv->n_slots * kv->slot_bytes);
}

/* Elements of one slot's first n positions, packed as kv_export packs them: [L][2][HK][n][hd]. */
static size_t packed_size(const struct kv_cache *kv, int32_t n) {
    return (size_t)kv->n_layers * 2 * (size_t)kv->n_kv_heads * (size_t)n * (size_t)kv->head_dim;
}

/* A slot's first n positions, of normal values. */
static uint16_t *random_packed(const struct kv_cache *kv, int32_t n) {
    size_t size = packed_size(kv, n);
    return random_f16(1, size, size, 1);
}

static void test_rope_angles(void **state) {
    (void)state;
    enum { HD = 80 };
    const int32_t pos[] = {0, 1, 2, 127, 128, 1000, 4095, 4096, 100000};
    float inv_freq[HD / 2], angles[COUNT(pos) * HD];
    struct backend *b = backend_make("scalar", 1, BPO_MATMUL_OWN);
    rope_inv_freq(inv_freq, HD, 10000.0f);
    ops->rope_angles(b, angles, inv_freq, &(struct rows){.n = COUNT(pos), .pos = pos}, HD);
    for (size_t r = 0; r < COUNT(pos); r++) {
        for (size_t i = 0; i < HD / 2; i++) {
            float angle = (float)pos[r] * inv_freq[i];
            const float *got = angles + r * HD + 2 * i;
            assert_true(fabs(got[0] - cos(angle)) <= 1.001 * U * fabs(cos(angle)));
            assert_true(fabs(got[1] - sin(angle)) <= 1.001 * U * fabs(sin(angle)));
        }
    }
    for (float a = 0; a < 5000; a += 0.37f) { /* all quadrants, and close to multiples of pi/2 */
        const int32_t one = 1;
        const float near = (float)(floor(a) * 1.5707963267948966);
        const float two[] = {a, near};
        ops->rope_angles(b, angles, two, &(struct rows){.n = 1, .pos = &one}, 4);
        for (size_t i = 0; i < 2; i++) {
            assert_true(fabs(angles[2 * i] - cos(two[i])) <= 1.001 * U * fabs(cos(two[i])));
            assert_true(fabs(angles[2 * i + 1] - sin(two[i])) <= 1.001 * U * fabs(sin(two[i])));
        }
    }
    backend_end(b);
}

/* The pairing of Hugging Face, and that of Meta, which the kernels must not use. */
enum pairing { PAIR_HALVES, PAIR_NEIGHBOURS };

static void reference_rotate(double *y, const float *x, int32_t hd, int32_t pos, float theta,
                             enum pairing pairing) {
    for (int32_t i = 0; i < hd / 2; i++) {
        double angle = pos * pow(theta, -2.0 * i / hd);
        int32_t a = pairing == PAIR_HALVES ? i : 2 * i,
                b = pairing == PAIR_HALVES ? i + hd / 2 : 2 * i + 1;
        y[a] = x[a] * cos(angle) - x[b] * sin(angle);
        y[b] = x[a] * sin(angle) + x[b] * cos(angle);
    }
}

static void check_rope(const struct heads *s) {
    enum { R = 9, S = 40, SLOTS = 2 };
    const int32_t pos[R] = {0, 1, 2, 3, S - 1, 0, 7, 8, 20}, slot[R] = {0, 0, 0, 0, 0, 1, 1, 1, 1};
    size_t hd = (size_t)s->head_dim, width = (size_t)(s->n_heads + 2 * s->n_kv_heads) * hd;
    float *qkv = random_floats(R * width, 2), *y = must_alloc(R * width * sizeof *y),
          *angles = must_alloc(R * hd * sizeof *y);
    float *first = must_alloc(R * (size_t)s->n_heads * hd * sizeof *y),
          *inv_freq = must_alloc(hd * sizeof *y);
    double *q = must_alloc(hd * sizeof *q);
    const struct rows rows = {.n = R, .slot = slot, .pos = pos};
    uint16_t *packed = NULL, *first_packed = NULL;
    struct kv_cache kv;
    size_t n_packed = 0;
    rope_inv_freq(inv_freq, s->head_dim, 10000.0f);
    for (size_t v = 0; v < n_variants; v++) {
        struct backend *b = backend_make(variants[v].simd, variants[v].n_threads, BPO_MATMUL_OWN);
        cache_make(&kv, b, s, SLOTS, S);
        n_packed = packed_size(&kv, S);
        packed = must_alloc(SLOTS * n_packed * sizeof *packed);
        memcpy(y, qkv, R * width * sizeof *y);
        ops->rope_angles(b, angles, inv_freq, &rows, s->head_dim);
        ops->rope_kv(b, y, &kv, angles, &rows, 1, s->n_heads);
        for (size_t i = 0; i < SLOTS; i++) {
            assert_int_equal(ops->kv_export(b, packed + i * n_packed, &kv, (int32_t)i, S, NULL), 0);
        }
        for (size_t r = 0; r < R; r++) { /* the query heads */
            float *kept = first + r * (size_t)s->n_heads * hd, *now = y + r * width;
            if (v == 0) {
                memcpy(kept, now, (size_t)s->n_heads * hd * sizeof *now);
            }
            assert_memory_equal(kept, now, (size_t)s->n_heads * hd * sizeof *now);
        }
        if (v == 0) {
            first_packed = must_alloc(SLOTS * n_packed * sizeof *packed);
            memcpy(first_packed, packed, SLOTS * n_packed * sizeof *packed);
        }
        assert_memory_equal(first_packed, packed, SLOTS * n_packed * sizeof *packed);
        free(packed);
        cache_free(&kv, b);
        backend_end(b);
    }
    struct worst worst = {0}, mutant = {0};
    for (size_t r = 0; r < R; r++) {
        /* of the angle itself, which is rounded to fp32 */
        double angle_error = 4 * U * (pos[r] + 1.0);
        for (size_t h = 0; h < (size_t)(s->n_heads + s->n_kv_heads); h++) {
            for (int pairing = PAIR_HALVES; pairing <= PAIR_NEIGHBOURS; pairing++) {
                reference_rotate(q, qkv + r * width + h * hd, s->head_dim, pos[r], 10000.0f,
                                 (enum pairing)pairing);
                struct worst *w = pairing == PAIR_HALVES ? &worst : &mutant;
                for (size_t i = 0; i < hd; i++) {
                    double size = 14 * (angle_error + 4 * U); /* no |x| is above 12 + 2 */
                    if (h < (size_t)s->n_heads) {
                        compare(w, first[(r * (size_t)s->n_heads + h) * hd + i], q[i], size);
                    } else { /* key head, in layer 1, plane 0 */
                        size_t at = ((2 * (size_t)s->n_kv_heads + h - (size_t)s->n_heads) * S +
                                     (size_t)pos[r]) *
                                        hd +
                                    i;
                        double k = f16_value(first_packed[(size_t)slot[r] * n_packed + at]);
                        compare(&worst, pairing == PAIR_HALVES ? k : q[i], q[i],
                                size + fabs(q[i]) * 0x1p-11 + 0x1p-25);
                    }
                }
            }
        }
        /* value heads: plane 1, only rounded */
        for (size_t h = 0; h < (size_t)s->n_kv_heads; h++) {
            for (size_t i = 0; i < hd; i++) {
                float value =
                    qkv[r * width + (size_t)(s->n_heads + s->n_kv_heads) * hd + h * hd + i];
                size_t at = ((3 * (size_t)s->n_kv_heads + h) * S + (size_t)pos[r]) * hd + i;
                uint16_t expected =
                    (uint16_t)(f16_nearest(fabsf(value)) | (signbit(value) ? 0x8000 : 0));
                assert_int_equal(first_packed[(size_t)slot[r] * n_packed + at], expected);
            }
        }
    }
    size_t layer_0 = 2 * (size_t)s->n_kv_heads * S * hd; /* no row wrote to it */
    for (size_t i = 0; i < layer_0; i++) {
        assert_int_equal(first_packed[i], 0);
    }
    assert_true(worst.ratio <= 1);
    assert_true(s->head_dim == 2 || mutant.ratio > 100); /* a single pair is the same in both */
    free(qkv);
    free(y);
    free(angles);
    free(first);
    free(inv_freq);
    free(q);
    free(first_packed);
}

static void test_rope_kv(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(shapes); i++) {
        check_rope(&shapes[i]);
    }
}

/* One head's attention in double over n positions. Returns a bound on the rounding error of each
 * value. */
static double reference_attention(double *y, const float *q, const uint16_t *k, const uint16_t *v,
                                  size_t n, size_t hd) {
    double *s = must_alloc(n * sizeof *s), max = -INFINITY, sum = 0, score_error = 0, largest = 0;
    for (size_t p = 0; p < n; p++) {
        double size = 0;
        s[p] = 0;
        for (size_t d = 0; d < hd; d++) {
            s[p] += q[d] * f16_value(k[p * hd + d]) / sqrt((double)hd);
            size += fabs(q[d] * f16_value(k[p * hd + d])) / sqrt((double)hd);
        }
        score_error = fmax(score_error, ((double)hd / LANES + 10) * U * size);
        max = fmax(max, s[p]);
    }
    memset(y, 0, hd * sizeof *y);
    for (size_t p = 0; p < n; p++) {
        s[p] = exp(s[p] - max);
        sum += s[p];
    }
    for (size_t p = 0; p < n; p++) {
        for (size_t d = 0; d < hd; d++) {
            y[d] += s[p] / sum * f16_value(v[p * hd + d]);
            largest = fmax(largest, fabs(f16_value(v[p * hd + d])));
        }
    }
    free(s);
    return largest * (2 * score_error + (128 + 20 + (double)n / 16) * U);
}

/* Mutants of the attention reference. */
enum mutant {
    MUTANT_NONE,
    MUTANT_POSITION_MISSING,
    MUTANT_POSITION_MORE,
    MUTANT_KV_HEAD,
    MUTANT_KEYS_AS_VALUES,
    N_MUTANTS
};

static void check_attention(const struct heads *s, float query_scale) {
    enum { S = 300, SLOTS = 2 };
    const int32_t pos[] = {0, 1, 2, 15, 16, 126, 127, 128, 129, 255, 256, 298};
    const size_t n_rows = COUNT(pos), hd = (size_t)s->head_dim, n_kv = (size_t)s->n_kv_heads,
                 n_heads = (size_t)s->n_heads;
    int32_t slot[COUNT(pos)];
    for (size_t r = 0; r < n_rows; r++) {
        slot[r] = (int32_t)(r % SLOTS);
    }
    size_t width = (n_heads + 2 * n_kv) * hd, n_y = n_rows * n_heads * hd,
           slot_size = 4 * n_kv * S * hd;
    float *qkv = random_floats(n_rows * width, query_scale), *y = must_alloc(n_y * sizeof *y);
    float *first = must_alloc(n_y * sizeof *y);
    uint16_t *packed = random_f16(SLOTS, slot_size, slot_size, 1);
    const struct rows rows = {.n = (int32_t)n_rows, .slot = slot, .pos = pos};
    for (size_t v = 0; v < n_variants; v++) {
        struct backend *b = backend_make(variants[v].simd, variants[v].n_threads, BPO_MATMUL_OWN);
        struct kv_cache kv;
        cache_make(&kv, b, s, SLOTS, S);
        for (size_t i = 0; i < SLOTS; i++) {
            assert_int_equal(ops->kv_import(b, &kv, packed + i * slot_size, (int32_t)i, S, NULL),
                             0);
        }
        ops->attention(b, y, qkv, &kv, &rows, 1, s->n_heads);
        if (v == 0) {
            memcpy(first, y, n_y * sizeof *y);
        }
        assert_memory_equal(first, y, n_y * sizeof *y);
        for (size_t r = 0; r < n_rows; r++) { /* row by row */
            const struct rows one = {.n = 1, .slot = slot + r, .pos = pos + r};
            ops->attention(b, y, qkv + r * width, &kv, &one, 1, s->n_heads);
            assert_memory_equal(first + r * n_heads * hd, y, n_heads * hd * sizeof *y);
        }
        cache_free(&kv, b);
        backend_end(b);
    }
    double *expected = must_alloc(hd * sizeof *expected);
    for (int mutant = MUTANT_NONE; mutant < N_MUTANTS; mutant++) {
        struct worst worst = {0};
        for (size_t r = 0; r < n_rows; r++) {
            for (size_t h = 0; h < n_heads; h++) {
                size_t kv_head = mutant == MUTANT_KV_HEAD ? h % n_kv : h / (n_heads / n_kv),
                       n = (size_t)pos[r] + 1;
                n -= mutant == MUTANT_POSITION_MISSING && n > 1;
                n += mutant == MUTANT_POSITION_MORE;
                /* layer 1 */
                const uint16_t *k =
                    packed + (size_t)slot[r] * slot_size + (2 * n_kv + kv_head) * S * hd;
                const uint16_t *v = mutant == MUTANT_KEYS_AS_VALUES ? k : k + n_kv * S * hd;
                double bound = reference_attention(expected, qkv + r * width + h * hd, k, v, n, hd);
                for (size_t d = 0; d < hd; d++) {
                    compare(&worst, first[(r * n_heads + h) * hd + d], expected[d], bound);
                }
            }
        }
        if (mutant == MUTANT_NONE) {
            assert_true(worst.ratio <= 1);
        } else if (mutant != MUTANT_KV_HEAD || (n_kv > 1 && n_heads > n_kv)) {
            assert_true(worst.ratio > 100);
        }
    }
    free(expected);
    free(qkv);
    free(y);
    free(first);
    free(packed);
}

static void test_attention(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(shapes); i++) {
        check_attention(&shapes[i], 1);
    }
    check_attention(&shapes[0], 8); /* far from uniform */
    check_attention(&shapes[0], 1e-3f);
}

/* A shared prefix is read from the slot that shared_prefix names, so the slot's own copy may hold
 * anything. */
static void check_shared(const struct heads *s) {
    enum { S = 300, SLOTS = 5 };
    const struct shared_prefix shared[SLOTS] = {{.slot = 0},
                                                {.slot = 0, .n = 29},
                                                {.slot = 0, .n = 129},
                                                {.slot = 3},
                                                {.slot = 3, .n = 128}};
    const int32_t slot[] = {0, 1, 1, 2, 2, 2, 3, 4, 4, 4, 0},
                  pos[] = {298, 3, 170, 28, 128, 129, 0, 126, 127, 255, 5};
    const size_t n_rows = COUNT(pos), hd = (size_t)s->head_dim, n_heads = (size_t)s->n_heads;
    const size_t width = (n_heads + 2 * (size_t)s->n_kv_heads) * hd, n_y = n_rows * n_heads * hd;
    float *qkv = random_floats(n_rows * width, 1), *y = must_alloc(n_y * sizeof *y);
    float *expected = must_alloc(n_y * sizeof *y);
    for (size_t v = 0; v < n_variants; v++) {
        struct backend *b = backend_make(variants[v].simd, variants[v].n_threads, BPO_MATMUL_OWN);
        struct kv_cache kv;
        struct rows rows = {.n = (int32_t)n_rows, .slot = slot, .pos = pos};
        cache_make(&kv, b, s, SLOTS, S);
        for (int32_t i = 0; i < SLOTS; i++) {
            uint16_t *packed = random_packed(&kv, S);
            assert_int_equal(ops->kv_import(b, &kv, packed, i, S, NULL), 0);
            assert_int_equal(ops->kv_copy(b, &kv, i, shared[i].slot, shared[i].n, NULL), 0);
            free(packed);
        }
        ops->attention(b, expected, qkv, &kv, &rows, 1, s->n_heads);
        rows.shared = shared;
        ops->attention(b, y, qkv, &kv, &rows, 1, s->n_heads);
        assert_memory_equal(expected, y, n_y * sizeof *y);
        /* overwriting the copies changes nothing; a prefix one position shorter does */
        for (int32_t i = 0; i < SLOTS; i++) {
            uint16_t *packed = random_packed(&kv, shared[i].n);
            assert_int_equal(ops->kv_import(b, &kv, packed, i, shared[i].n, NULL), 0);
            free(packed);
        }
        ops->attention(b, y, qkv, &kv, &rows, 1, s->n_heads);
        assert_memory_equal(expected, y, n_y * sizeof *y);
        const struct shared_prefix short_shared[SLOTS] = {{.slot = 0},
                                                          {.slot = 0, .n = 28},
                                                          {.slot = 0, .n = 128},
                                                          {.slot = 3},
                                                          {.slot = 3, .n = 127}};
        rows.shared = short_shared;
        ops->attention(b, y, qkv, &kv, &rows, 1, s->n_heads);
        for (size_t r = 0; r < n_rows; r++) {
            bool loses = pos[r] >= short_shared[slot[r]].n && short_shared[slot[r]].n > 0;
            size_t at = r * n_heads * hd;
            assert_int_equal(memcmp(expected + at, y + at, n_heads * hd * sizeof *y) != 0, loses);
        }
        cache_free(&kv, b);
        backend_end(b);
    }
    free(qkv);
    free(y);
    free(expected);
}

static void test_attention_shared(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(shapes); i++) {
        check_shared(&shapes[i]);
    }
}

/* A key that is not finite makes the rows that read it not finite, and no other row. */
static void test_attention_nonfinite(void **state) {
    (void)state;
    enum { S = 140, BAD = 131 };
    const struct heads *s = &shapes[0];
    const size_t hd = (size_t)s->head_dim, n_kv = (size_t)s->n_kv_heads,
                 n_heads = (size_t)s->n_heads;
    const int32_t pos[] = {BAD - 1, BAD}, slot[] = {0, 0};
    float *qkv = random_floats(2 * (n_heads + 2 * n_kv) * hd, 1),
          *y = must_alloc(2 * n_heads * hd * sizeof *y);
    uint16_t *packed = random_f16(4 * n_kv, S * hd, S * hd, 1);
    for (size_t h = 0; h < n_kv; h++) {
        packed[(h * S + BAD) * hd + 5] = 0x7e00; /* layer 0, K */
    }
    for (size_t level = 0; level < n_levels; level++) {
        struct backend *b = backend_make(levels[level], 2, BPO_MATMUL_OWN);
        struct kv_cache kv;
        int32_t found;
        cache_make(&kv, b, s, 1, S);
        assert_int_equal(ops->kv_import(b, &kv, packed, 0, S, NULL), 0);
        ops->attention(b, y, qkv, &kv, &(struct rows){.n = 2, .slot = slot, .pos = pos}, 0,
                       s->n_heads);
        assert_int_equal(ops->first_nonfinite(b, &found, y, 2, n_heads * hd, NULL), 0);
        assert_int_equal(found, 1);
        cache_free(&kv, b);
        backend_end(b);
    }
    free(qkv);
    free(y);
    free(packed);
}

enum { MANY = 1000 };
struct calls {
    atomic_int n[MANY];    /* how often an item was done */
    atomic_int bad_thread; /* calls with a thread out of range */
    size_t n_threads;
};

static void count_call(const void *arg, size_t item, size_t thread) {
    struct calls *calls = *(struct calls *const *)arg;
    (void)atomic_fetch_add(&calls->n[item], 1);
    (void)atomic_fetch_add(&calls->bad_thread, thread >= calls->n_threads);
}

static void test_for_each(void **state) {
    (void)state;
    static struct calls calls;
    struct calls *arg = &calls;
    for (size_t n_threads = 1; n_threads <= 3; n_threads++) {
        struct backend *b = backend_make("scalar", (int)n_threads, BPO_MATMUL_OWN);
        memset(&calls, 0, sizeof calls);
        calls.n_threads = n_threads;
        ops->for_each(b, count_call, &arg, 0);
        ops->for_each(b, count_call, &arg, 1);
        ops->for_each(b, count_call, &arg, MANY);
        for (size_t i = 0; i < MANY; i++) {
            assert_int_equal(atomic_load(&calls.n[i]), i == 0 ? 2 : 1);
        }
        assert_int_equal(atomic_load(&calls.bad_thread), 0);
        backend_end(b);
    }
}

static void test_kv_copy(void **state) {
    (void)state;
    enum { S = 20, N = 13 };
    struct bpo_error err = {0};
    for (size_t i = 0; i < COUNT(shapes); i++) {
        struct backend *b = backend_make("scalar", 1, BPO_MATMUL_OWN);
        struct kv_cache kv;
        cache_make(&kv, b, &shapes[i], 3, S);
        size_t n_all = packed_size(&kv, S), n_part = packed_size(&kv, N),
               run = (size_t)shapes[i].head_dim;
        uint16_t *all = random_packed(&kv, S), *back = must_alloc(n_all * sizeof *back),
                 *part = must_alloc(n_part * 2);
        assert_int_equal(ops->kv_import(b, &kv, all, 1, S, &err), 0);
        assert_int_equal(ops->kv_export(b, back, &kv, 1, S, &err), 0);
        assert_memory_equal(all, back, n_all * sizeof *back);
        assert_int_equal(ops->kv_copy(b, &kv, 2, 1, N, &err), 0);
        assert_int_equal(ops->kv_export(b, part, &kv, 2, N, &err), 0);
        assert_int_equal(ops->kv_export(b, back, &kv, 2, S, &err), 0);
        for (size_t plane = 0; plane < n_all / run / S; plane++) { /* layer, K or V, head */
            assert_memory_equal(part + plane * N * run, all + plane * S * run,
                                N * run * sizeof *part);
            for (size_t j = N * run; j < S * run; j++) { /* the rest of the slot stays untouched */
                assert_int_equal(back[plane * S * run + j], 0);
            }
        }
        assert_int_equal(ops->kv_export(b, back, &kv, 0, S, &err), 0);
        for (size_t j = 0; j < n_all; j++) { /* and so do other slots */
            assert_int_equal(back[j], 0);
        }
        assert_int_equal(ops->kv_copy(b, &kv, 3, 1, N, &err), BPO_ERR_RUN);
        assert_int_equal(ops->kv_copy(b, &kv, 2, -1, N, &err), BPO_ERR_RUN);
        assert_int_equal(ops->kv_import(b, &kv, all, 0, S + 1, &err), BPO_ERR_RUN);
        assert_int_equal(ops->kv_export(b, back, &kv, 0, -1, &err), BPO_ERR_RUN);
        assert_int_equal(ops->kv_copy(b, &kv, 2, 1, 0, &err), 0);
        free(all);
        free(back);
        free(part);
        cache_free(&kv, b);
        backend_end(b);
    }
}

/* ---------------------------------------------------------------- backend, memory */

static void test_memory(void **state) {
    (void)state;
    struct backend *b = backend_make("scalar", 1, BPO_MATMUL_OWN);
    struct bpo_error err = {0};
    const size_t sizes[] = {0, 1, 63, 64, 65, 100000};
    void *held[2][COUNT(sizes)];
    for (int kind = MEMORY_BUFFER; kind <= MEMORY_LAZY; kind++) {
        for (size_t i = 0; i < COUNT(sizes); i++) {
            uint8_t *data = held[kind][i] = ops->alloc(b, sizes[i], (enum memory_kind)kind, &err);
            assert_non_null(data);
            assert_int_equal((uintptr_t)data % 64, 0);
            memset(data, 1, sizes[i]);
        }
        const size_t impossible[] = {SIZE_MAX, SIZE_MAX / 2,
                                     /* a sanitizer's malloc would abort on this one */
                                     SIZE_MAX / 4};
        for (size_t i = 0; i < (kind == MEMORY_LAZY ? 3 : 2); i++) {
            err = (struct bpo_error){0};
            assert_null(ops->alloc(b, impossible[i], (enum memory_kind)kind, &err));
            assert_int_equal(err.code, BPO_ERR_RESOURCE);
            assert_non_null(strstr(err.message, "bytes"));
            assert_true(err.hint[0] != '\0');
        }
    }
    for (int kind = MEMORY_BUFFER; kind <= MEMORY_LAZY; kind++) {
        for (size_t i = 0; i < COUNT(sizes); i++) {
            ops->free(b, held[kind][i], sizes[i]);
        }
    }
    ops->free(b, NULL, 0);
    const char text[] = "text";
    char copy[sizeof text], back[sizeof text];
    assert_int_equal(ops->upload(b, copy, text, sizeof text, &err), 0);
    assert_int_equal(ops->download(b, back, copy, sizeof text, &err), 0);
    assert_memory_equal(text, back, sizeof text);
    assert_ptr_equal(ops->load_weights(b, text, sizeof text, &err), text);
    backend_end(b);
}

/* An op that fails makes the step fail, once. */
static void test_step_error(void **state) {
    (void)state;
    struct backend *b = backend_make("scalar", 1, BPO_MATMUL_OWN);
    struct bpo_error err = {0};
    float x[4] = {0}, y[1];
    uint16_t data[4] = {0};
    struct weight w = weight_of(data, 1, 4, 4);
    w.dtype = (enum dtype)99;
    ops->matmul(b, y, x, &w, &(struct rows){.n = 1}, MATMUL_STORE);
    assert_int_equal(ops->step_end(b, &err), BPO_ERR_MODEL);
    assert_non_null(strstr(err.message, "99"));
    assert_int_equal(ops->step_begin(b, 1), 1);
    backend_end(b);
}

static void test_no_rows(void **state) {
    (void)state;
    for (size_t level = 0; level < n_levels; level++) {
        struct backend *b = backend_make(levels[level], 2, BPO_MATMUL_AUTO);
        struct kv_cache kv;
        uint16_t data[16] = {0};
        float x[16] = {0};
        const struct weight w = weight_of(data, 4, 4, 4);
        const struct rows none = {.n = 0};
        cache_make(&kv, b, &shapes[0], 1, 4);
        ops->embed(b, x, &w, &none);
        ops->rmsnorm(b, x, x, &w, 0, 1e-5f);
        ops->matmul(b, x, x, &w, &none, MATMUL_STORE);
        ops->rope_angles(b, x, x, &none, 4);
        ops->rope_kv(b, x, &kv, x, &none, 0, 6);
        ops->attention(b, x, x, &kv, &none, 0, 6);
        ops->swiglu(b, x, x, 0, 4);
        ops->gather(b, x, x, NULL, 0, 4);
        cache_free(&kv, b);
        backend_end(b);
    }
}

static void test_create(void **state) {
    (void)state;
    struct bpo_error err = {0};
    struct backend_info info;
    struct backend_options options = {.n_threads = 0, .matmul = BPO_MATMUL_AUTO};
    assert_null(ops->create(&options, &err));
    assert_int_equal(err.code, BPO_ERR_USAGE);
    options.n_threads = 2;
    (void)setenv("BPO_SIMD", "avx9", 1);
    err = (struct bpo_error){0};
    assert_null(ops->create(&options, &err));
    assert_int_equal(err.code, BPO_ERR_USAGE);
    assert_non_null(strstr(err.message, "avx9"));
    const char *const foreign[] = {"avx512", "avx2", "neon"}; /* no CPU has all of them */
    size_t n_refused = 0;
    for (size_t i = 0; i < COUNT(foreign); i++) {
        (void)setenv("BPO_SIMD", foreign[i], 1);
        struct backend *b = ops->create(&options, &err);
        if (b) {
            ops->info(b, &info);
            assert_string_equal(info.simd, foreign[i]);
            ops->destroy(b);
        } else {
            assert_int_equal(err.code, BPO_ERR_USAGE);
            assert_non_null(strstr(err.message, foreign[i]));
            n_refused++;
        }
    }
    assert_int_equal(n_refused, COUNT(foreign) - (n_levels - 1));
    (void)unsetenv("BPO_SIMD");

    struct backend *b = ops->create(&options, &err);
    assert_non_null(b);
    ops->info(b, &info);
    assert_string_equal(info.device, "cpu");
    assert_string_equal(info.simd, levels[n_levels - 1]);
    assert_int_equal(info.matmul, n_levels > 1 ? BPO_MATMUL_OWN : BPO_MATMUL_OPENBLAS);
    assert_int_equal(info.n_threads, 2);
    assert_non_null(strstr(info.blas, "OpenBLAS"));
    /* there is a hint if and only if OpenBLAS runs kernels for another kind of core */
    if (strcmp(info.simd, "avx512") == 0) {
        bool other = strstr(info.blas, "SkylakeX") == NULL &&
                     strstr(info.blas, "Cooperlake") == NULL &&
                     strstr(info.blas, "SapphireRapids") == NULL;
        assert_int_equal(other, strstr(info.blas_hint, "OPENBLAS_CORETYPE=SkylakeX") != NULL);
    }
    ops->destroy(b);
    b = backend_make("scalar", 1, BPO_MATMUL_AUTO);
    ops->info(b, &info);
    assert_string_equal(info.simd, "scalar");
    assert_int_equal(info.matmul, BPO_MATMUL_OPENBLAS);
    backend_end(b);
    ops->destroy(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f16_widen),
        cmocka_unit_test(test_f16_narrow),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_softmax_nan),
        cmocka_unit_test(test_inv_freq),
        cmocka_unit_test(test_embed_and_gather),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_matmul_special),
        cmocka_unit_test(test_matmul_openblas),
        cmocka_unit_test(test_rope_angles),
        cmocka_unit_test(test_rope_kv),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_shared),
        cmocka_unit_test(test_attention_nonfinite),
        cmocka_unit_test(test_for_each),
        cmocka_unit_test(test_kv_copy),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_step_error),
        cmocka_unit_test(test_no_rows),
        cmocka_unit_test(test_create),
    };
    ops = kernels_cpu();
    if (ops->abi != KERNELS_ABI) {
        return 1;
    }
    find_levels();
    return cmocka_run_group_tests(tests, NULL, NULL);
}

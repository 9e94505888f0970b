/*
 * top_k.c - see top_k.h.
 */
#include "engine/top_k.h"

#include <math.h>
#include <string.h>

#include "base/numbers.h"

static inline float larger(float a, float b) {
    return a > b ? a : b;
}

/* x - x is 0 for a finite x, else NaN. The lanes do not depend on each other, so that compilers
 * make vectors of them. */
bool block_maxima(float *block_max, const float *x, size_t n) {
    enum { WIDTH = PREFILTER_BLOCK / 4 };
    float bad[WIDTH] = {0}, max[WIDTH];
    size_t n_blocks = n / PREFILTER_BLOCK;
    for (size_t block = 0; block < n_blocks; block++) {
        const float *a = x + block * PREFILTER_BLOCK, *b = a + WIDTH, *c = b + WIDTH,
                    *d = c + WIDTH;
        for (size_t i = 0; i < WIDTH; i++) {
            max[i] = larger(larger(a[i], b[i]), larger(c[i], d[i]));
            bad[i] += (a[i] - a[i]) + (b[i] - b[i]) + ((c[i] - c[i]) + (d[i] - d[i]));
        }
        for (size_t i = 0; i < WIDTH / 4; i++) {
            max[i] = larger(larger(max[i], max[i + 4]), larger(max[i + 8], max[i + 12]));
        }
        block_max[block] = larger(larger(max[0], max[1]), larger(max[2], max[3]));
    }
    for (size_t i = n_blocks * PREFILTER_BLOCK; i < n; i++) {
        bad[0] += x[i] - x[i];
    }
    for (size_t i = 1; i < WIDTH; i++) {
        bad[0] += bad[i];
    }
    return bad[0] == 0.0F;
}

/* The k-th largest of x [n], which is reordered. Quickselect (Hoare 1961); 1 <= k <= n */
static float kth_largest(float *x, size_t n, size_t k) {
    ptrdiff_t begin = 0, end = (ptrdiff_t)n - 1, at = (ptrdiff_t)k - 1;
    while (begin < end) {
        float pivot = x[begin + (end - begin) / 2];
        ptrdiff_t i = begin, j = end;
        while (i <= j) {
            while (x[i] > pivot) {
                i++;
            }
            while (x[j] < pivot) {
                j--;
            }
            if (i <= j) {
                float swapped = x[i];
                x[i++] = x[j];
                x[j--] = swapped;
            }
        }
        /* Up to j all are at least the pivot, from i on at most the pivot. */
        if (at > j && at < i) {
            break;
        }
        begin = at >= i ? i : begin;
        end = at <= j ? j : end;
    }
    return x[at];
}

/* ---------------------------------------------------------------- candidates */

/* What the candidates of a row are chosen from. */
struct choice {
    const float *logits;
    size_t vocab;
    const struct sample_params *params;
    float temperature;
    float min_score, min_logit; /* an id below either is not a candidate */
};

/* Appends the ids [begin, end) that are not forbidden and score enough. */
static size_t append(struct candidate *candidates, size_t n, const struct choice *c, size_t begin,
                     size_t end) {
    for (size_t id = begin; id < end; id++) {
        if (c->logits[id] >= c->min_logit) {
            float score = c->logits[id] / c->temperature;
            if (score >= c->min_score && score > -INFINITY &&
                !is_forbidden(c->params, (int32_t)id)) {
                candidates[n++] = (struct candidate){.score = score, .id = (int32_t)id};
            }
        }
    }
    return n;
}

/* Drops the candidates that are worse than the k-th best. */
static size_t keep_best(const struct prefilter *f, size_t n, size_t k) {
    struct candidate *c = f->candidates;
    size_t n_kept = 0;
    if (n <= k) {
        return n;
    }
    for (size_t i = 0; i < n; i++) {
        f->scratch[i] = c[i].score;
    }
    float min_score = kth_largest(f->scratch, n, k);
    for (size_t i = 0; i < n; i++) {
        if (c[i].score >= min_score) {
            c[n_kept++] = c[i];
        }
    }
    return n_kept;
}

/*
 * Finds the k best ids of those that are not forbidden, and their ties; returns their number. The
 * largest k + n_forbidden block maxima belong to as many ids, so at least k allowed ids are no
 * worse than the smallest of these maxima. Whatever is below it is out, and so, unseen, is every
 * block whose maximum is. 0: k is too large for that.
 */
static size_t best_ids(const struct prefilter *f, struct choice *c, size_t k) {
    size_t n_blocks = c->vocab / PREFILTER_BLOCK, n = 0;
    size_t n_best = k + (size_t)c->params->n_forbidden;
    if (k == 0 || n_best > n_blocks) {
        return 0;
    }
    memcpy(f->scratch, f->block_max, n_blocks * sizeof *f->scratch);
    float max = kth_largest(f->scratch, n_blocks, n_best);
    c->min_score = max / c->temperature;
    if (!(c->min_score > -INFINITY)) {
        return 0;
    }
    /* Spares most ids the division: a logit below this has no quotient that is rounded up to the
     * smallest score. */
    c->min_logit = max - fabsf(max) * 1e-6F - 1e-30F;
    for (size_t block = 0; block < n_blocks; block++) {
        if (f->block_max[block] >= c->min_logit) {
            size_t begin = block * PREFILTER_BLOCK;
            n = append(f->candidates, n, c, begin, begin + PREFILTER_BLOCK);
        }
    }
    return keep_best(f, append(f->candidates, n, c, n_blocks * PREFILTER_BLOCK, c->vocab), k);
}

enum { N_BUCKETS = 256 };

static size_t bucket_of(float score, float best) {
    float distance = (best - score) * 4.0F;
    return distance < N_BUCKETS - 1 ? (size_t)distance : N_BUCKETS - 1;
}

/*
 * Without top-k, top-p alone decides. Sums the mass of the n candidates by how far they are below
 * the best, and drops those that are farther than what holds p of it. The threshold is a little
 * above p: the sum that decides in the end is added up in another order. Returns how many are left.
 */
static size_t drop_unlikely(struct candidate *c, size_t n, double total, float best, double p) {
    double mass[N_BUCKETS] = {0}, sum = 0;
    size_t n_left = 0, last = 0;
    for (size_t i = 0; i < n; i++) {
        mass[bucket_of(c[i].score, best)] += c[i].mass;
    }
    while (last < N_BUCKETS - 1 && (sum += mass[last]) < p * (1 + 1e-9) * total) {
        last++;
    }
    for (size_t i = 0; i < n; i++) {
        if (bucket_of(c[i].score, best) <= last) {
            c[n_left++] = c[i];
        }
    }
    return n_left;
}

/* All ids, or, where top-p alone decides, those that it can keep. *total: see candidates_draw. */
static size_t all_ids(const struct prefilter *f, struct choice *c, double *total) {
    const struct sample_params *p = c->params;
    struct candidate *all = f->candidates;
    float best = -INFINITY;
    c->min_score = c->min_logit = -INFINITY;
    size_t n = append(all, 0, c, 0, c->vocab);
    if (p->top_k > 0) {
        return keep_best(f, n, (size_t)p->top_k);
    }
    for (size_t i = 0; i < n; i++) {
        best = larger(best, all[i].score);
    }
    for (size_t i = 0; i < n; i++) {
        all[i].mass = (double)canonical_exp(all[i].score - best);
        *total += all[i].mass;
    }
    return p->top_p < 1.0F ? drop_unlikely(all, n, *total, best, (double)p->top_p) : n;
}

int32_t top_k_draw(const struct prefilter *f, const float *logits, size_t vocab,
                   const struct sample_params *p) {
    struct choice c = {
        .logits = logits,
        .vocab = vocab,
        .params = p,
        .temperature = p->temperature > 0 ? p->temperature : 1.0F,
    };
    double total = 0;
    if (!block_maxima(f->block_max, logits, vocab)) {
        return DRAW_NOT_FINITE;
    }
    size_t n = best_ids(f, &c, p->temperature > 0 ? (size_t)p->top_k : 1);
    n = n > 0 ? n : all_ids(f, &c, &total);
    return n > 0 ? candidates_draw(f->candidates, n, total, p) : DRAW_ALL_FORBIDDEN;
}

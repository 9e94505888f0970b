/*
 * top_k.c - see top_k.h.
 */
#include "engine/top_k.h"

#include <math.h>

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

/* ---------------------------------------------------------------- a heap of blocks */

static void heap_sift(int32_t *heap, size_t n, size_t i, const float *max) {
    int32_t block = heap[i];
    for (size_t child = 2 * i + 1; child < n; i = child, child = 2 * i + 1) {
        child += child + 1 < n && max[heap[child + 1]] > max[heap[child]];
        if (!(max[heap[child]] > max[block])) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = block;
}

static void heap_build(int32_t *heap, size_t n, const float *max) {
    for (size_t i = 0; i < n; i++) {
        heap[i] = (int32_t)i;
    }
    for (size_t i = n / 2; i-- > 0;) {
        heap_sift(heap, n, i, max);
    }
}

static int32_t heap_pop(int32_t *heap, size_t *n, const float *max) {
    int32_t best = heap[0];
    heap[0] = heap[--*n];
    heap_sift(heap, *n, 0, max);
    return best;
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

/*
 * Finds all ids that can be among the k best of those that are not forbidden, and their ties;
 * returns their number, at least k. The maxima of the best k + n_forbidden blocks belong to as many
 * ids, so at least k allowed ids are no worse than the smallest of these maxima. Whatever is below
 * it is out, and so, unseen, is every block whose maximum is. 0: k is too large for that.
 */
static size_t best_ids(const struct prefilter *f, struct choice *c, size_t k) {
    size_t n_blocks = c->vocab / PREFILTER_BLOCK, n_left = n_blocks, n = 0;
    size_t n_best = k + (size_t)c->params->n_forbidden;
    int32_t *blocks = f->blocks; /* a heap of the n_left blocks that were not taken; then those */
    if (k == 0 || n_best > n_blocks) {
        return 0;
    }
    heap_build(blocks, n_blocks, f->block_max);
    while (n_left > 0) {
        float max = f->block_max[blocks[0]], score = max / c->temperature;
        bool among_best = n_left > n_blocks - n_best;
        if (!among_best && score < c->min_score) {
            break;
        }
        int32_t block = heap_pop(blocks, &n_left, f->block_max);
        blocks[n_left] = block;
        if (among_best) {
            c->min_score = score;
            /* Spares most ids the division: a logit below this has no quotient that is rounded up
             * to the smallest score. */
            c->min_logit = max - fabsf(max) * 1e-6F - 1e-30F;
        }
    }
    if (!(c->min_score > -INFINITY)) {
        return 0;
    }
    for (size_t i = n_left; i < n_blocks; i++) {
        size_t begin = (size_t)blocks[i] * PREFILTER_BLOCK;
        n = append(f->candidates, n, c, begin, begin + PREFILTER_BLOCK);
    }
    return append(f->candidates, n, c, n_blocks * PREFILTER_BLOCK, c->vocab);
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

int32_t top_k_draw(const struct prefilter *f, const float *logits, size_t vocab,
                   const struct sample_params *p) {
    struct choice c = {logits,    vocab,    p, p->temperature > 0 ? p->temperature : 1.0F,
                       -INFINITY, -INFINITY};
    if (!block_maxima(f->block_max, logits, vocab)) {
        return DRAW_NOT_FINITE;
    }
    size_t n = best_ids(f, &c, p->temperature > 0 ? (size_t)p->top_k : 1);
    double total = 0;
    if (n == 0) {
        struct candidate *all = f->candidates;
        c.min_score = c.min_logit = -INFINITY;
        n = append(all, 0, &c, 0, vocab);
        float best = -INFINITY;
        for (size_t i = 0; i < n; i++) {
            best = larger(best, all[i].score);
        }
        for (size_t i = 0; i < n && p->top_k == 0; i++) {
            all[i].mass = (double)canonical_exp(all[i].score - best);
            total += all[i].mass;
        }
        if (p->top_k == 0 && p->top_p < 1.0F) {
            n = drop_unlikely(all, n, total, best, (double)p->top_p);
        }
    }
    return n > 0 ? candidates_draw(f->candidates, n, total, p) : DRAW_ALL_FORBIDDEN;
}

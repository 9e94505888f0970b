/*
 * attention.c - the attention op: blocks of positions, prefetch, and the division among threads.
 */
#include <math.h>
#include <stdbool.h>

#include "cpu/cpu.h"

enum {
    MAX_HEADS = 8,           /* query heads of one item, which read a key/value head together */
    PREFETCH_POSITIONS = 16, /* positions that are done between two rounds of prefetching */
    LINE_VALUES = 64 / sizeof(uint16_t), /* fp16 values of a cache line */
};

/* The smallest amount of keys and values in a step for which prefetching pays: so much comes from
 * memory, not from a cache. */
#define PREFETCH_MIN_BYTES ((size_t)4 << 20)

_Static_assert(ATTENTION_BLOCK % PREFETCH_POSITIONS == 0, "a block is whole prefetch rounds");

struct attention_op {
    const struct cpu_level *level;
    float *y;
    const float *qkv;
    const struct kv_cache *kv;
    const struct rows *rows;
    int32_t layer;
    size_t n_heads, group; /* H; H / HK: query heads that share a key/value head */
    size_t item_heads;     /* query heads of one item, except for the last of a group */
    size_t n_sets;         /* items of a group: group / item_heads, rounded up */
    size_t stride, plane;  /* values from one position to the next, and from K to V */
    bool prefetches;
    float scale;    /* 1 / sqrt(hd) */
    float *scratch; /* [thread][MAX_HEADS][ATTENTION_BLOCK + hd] */
};

/* The keys and values that an item reads: positions [0, n_shared) in a slot that other items read
 * too, positions [n_shared, n) in the row's own slot. */
struct kv_view {
    const uint16_t *shared, *own; /* K of position 0; V is one plane further */
    size_t n_shared, n;
};

/* Positions [first, first + n) of a view, as attend() takes them. Meanwhile the positions that are
 * lead further on are prefetched: those of this view, then those of the next item's. */
struct block {
    struct kv_view view, next;
    size_t lead, first, n;
};

/* Returns K of position p, and limits *n to the positions from p on that are contiguous. */
static const uint16_t *view_at(const struct attention_op *op, const struct kv_view *view, size_t p,
                               size_t *n) {
    bool shared = p < view->n_shared;
    size_t limit = (shared ? view->n_shared : view->n) - p;
    *n = *n < limit ? *n : limit;
    return (shared ? view->shared : view->own) + p * op->stride;
}

/* Prefetches K and V of positions [p, end), counted through the view and on into the next one.
 * Sequences are short, so keys and values are many short streams, each of which ends before the CPU
 * starts to read ahead by itself. */
INLINE void prefetch(const struct attention_op *op, const struct block *b, size_t p, size_t end) {
    size_t n_view = b->view.n, n_all = n_view + b->next.n;
    for (size_t n; p < end && p < n_all; p += n) {
        n = end - p;
        const uint16_t *k =
            p < n_view ? view_at(op, &b->view, p, &n) : view_at(op, &b->next, p - n_view, &n);
        for (size_t i = 0; i < n * op->stride; i += LINE_VALUES) {
            __builtin_prefetch(k + i);
            __builtin_prefetch(k + i + op->plane);
        }
    }
}

/* Returns K or V (plane 0 or 1) of the block's position p; sets *n to the positions from p on to do
 * at once, before the next call. */
INLINE const uint16_t *block_at(const struct attention_op *op, const struct block *b, size_t plane,
                                size_t p, size_t *n) {
    bool prefetches = op->prefetches && b->lead < b->view.n + b->next.n;
    *n = prefetches && b->n - p > PREFETCH_POSITIONS ? PREFETCH_POSITIONS : b->n - p;
    const uint16_t *k = view_at(op, &b->view, b->first + p, n);
    if (prefetches) { /* a block passes twice, so K and V prefetch half of what lies ahead each */
        size_t from = b->first + b->lead, done = plane * b->n + p;
        prefetch(op, b, from + done / 2, from + (done + *n) / 2);
    }
    return k + plane * op->plane;
}

/*
 * y_h = sum over p of softmax(s_h)[p] v_p, s_h[p] = scale q_h . k_p, for n_h query heads of one
 * key/value head and all positions of the view.
 *
 * The positions are taken in blocks. A block yields, for its own maximum m', the sum l' of
 * exp(s - m') and the vector y' = sum of exp(s - m') v. What earlier blocks yielded for their
 * maximum m is merged with it (online softmax: Milakov and Gimelshein 2018):
 *
 *     M = max(m, m')    l = l exp(m - M) + l' exp(m' - M)    y = y exp(m - M) + y' exp(m' - M)
 *
 * At the end y / l is the result. Blocks always begin at the same positions, so a row's bits depend
 * on nothing but its own positions.
 */
static void attend(const struct attention_op *op, float *y, const float *q, size_t n_h,
                   struct block b, float *scratch) {
    const size_t hd = (size_t)op->kv->head_dim;
    float *scores = scratch, *part = scratch + (size_t)MAX_HEADS * ATTENTION_BLOCK;
    float max[MAX_HEADS] = {0}, sum[MAX_HEADS] = {0};
    for (; b.first < b.view.n; b.first += b.n) {
        float block_max[MAX_HEADS], block_sum[MAX_HEADS], *block_y = b.first == 0 ? y : part;
        b.n = b.view.n - b.first < ATTENTION_BLOCK ? b.view.n - b.first : ATTENTION_BLOCK;
        for (size_t p = 0, n; p < b.n; p += n) {
            const uint16_t *k = block_at(op, &b, 0, p, &n);
            op->level->dots(scores + p, ATTENTION_BLOCK, q, hd, n_h, k, op->stride, n, hd,
                            MATMUL_STORE, 0);
        }
        for (size_t h = 0; h < n_h; h++) {
            block_sum[h] =
                op->level->softmax(scores + h * ATTENTION_BLOCK, b.n, op->scale, &block_max[h]);
        }
        for (size_t p = 0, n; p < b.n; p += n) {
            const uint16_t *v = block_at(op, &b, 1, p, &n);
            op->level->weighted_sum(block_y, hd, scores + p, ATTENTION_BLOCK, n_h, v, op->stride, n,
                                    hd, p > 0);
        }
        for (size_t h = 0; h < n_h; h++) {
            if (b.first == 0) {
                max[h] = block_max[h];
                sum[h] = block_sum[h];
                continue;
            }
            float m = block_max[h] > max[h] ? block_max[h] : max[h];
            float before = canonical_exp(max[h] - m), now = canonical_exp(block_max[h] - m);
            max[h] = m;
            sum[h] = sum[h] * before + block_sum[h] * now;
            for (size_t d = 0; d < hd; d++) {
                y[h * hd + d] = y[h * hd + d] * before + part[h * hd + d] * now;
            }
        }
    }
    for (size_t h = 0; h < n_h; h++) {
        for (size_t d = 0; d < hd; d++) {
            y[h * hd + d] /= sum[h];
        }
    }
}

/* What a row reads of a key/value head. */
static struct kv_view row_view(const struct attention_op *op, size_t r, size_t kv_head) {
    const struct rows *rows = op->rows;
    int32_t slot = rows->slot[r], head = (int32_t)kv_head;
    struct kv_view view = {.own = kv_at(op->kv, slot, op->layer, 0, head, 0),
                           .n = (size_t)rows->pos[r] + 1};
    if (rows->shared) {
        const struct shared_prefix *prefix = &rows->shared[slot];
        view.shared = kv_at(op->kv, prefix->slot, op->layer, 0, head, 0);
        view.n_shared = (size_t)prefix->n < view.n ? (size_t)prefix->n : view.n;
    }
    return view;
}

/* An item is (key/value head, row, set of the group's query heads). The head is outermost, so that
 * the rows of one slot find it in the cache. */
static void attention_item(const void *arg, size_t item, size_t thread) {
    const struct attention_op *op = arg;
    const int32_t *slot = op->rows->slot;
    size_t hd = (size_t)op->kv->head_dim, n_rows = (size_t)op->rows->n,
           n_kv_heads = (size_t)op->kv->n_kv_heads;
    size_t set = item % op->n_sets, r = item / op->n_sets % n_rows,
           kv_head = item / op->n_sets / n_rows;
    size_t in_group = set * op->item_heads,
           n_h = op->group - in_group < op->item_heads ? op->group - in_group : op->item_heads;
    size_t head = kv_head * op->group + in_group;
    struct block b = {.view = row_view(op, r, kv_head)};
    bool last_row = r + 1 == n_rows, last_head = kv_head + 1 == n_kv_heads;
    /* The first of the items that read these keys and values prefetches them, one block ahead. The
     * last one prefetches what the next item reads. */
    bool first = set == 0 && (r == 0 || slot[r - 1] != slot[r]);
    bool last = set + 1 == op->n_sets && (last_row || slot[r + 1] != slot[r]);
    b.lead = first && b.view.n > ATTENTION_BLOCK ? ATTENTION_BLOCK : b.view.n;
    if (last && !(last_row && last_head)) {
        b.next = last_row ? row_view(op, 0, kv_head + 1) : row_view(op, r + 1, kv_head);
    }
    attend(op, op->y + (r * op->n_heads + head) * hd,
           op->qkv + (r * (op->n_heads + 2 * n_kv_heads) + head) * hd, n_h, b,
           op->scratch + thread * MAX_HEADS * (ATTENTION_BLOCK + hd));
}

void cpu_attention(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                   const struct rows *rows, int32_t layer, int32_t n_heads) {
    size_t hd = (size_t)kv->head_dim, n_rows = (size_t)rows->n,
           n_threads = (size_t)threads_count(b->threads);
    size_t group = (size_t)n_heads / (size_t)kv->n_kv_heads, item_heads = group, work = 0;
    float *scratch =
        scratch_get(b, n_threads * MAX_HEADS * (ATTENTION_BLOCK + hd) * sizeof *scratch);
    if (b->error.code || !scratch) {
        return;
    }
    if (n_rows * (size_t)kv->n_kv_heads < 2 * n_threads) {
        /* few rows: sharing the reads of K and V matters less than having work for all threads */
        item_heads = 1;
    } else if (item_heads > MAX_HEADS) {
        item_heads = MAX_HEADS;
    }
    for (size_t r = 0; r < n_rows; r++) {
        work += 2 * ((size_t)rows->pos[r] + 1) * hd * (size_t)n_heads;
    }
    size_t kv_bytes = work / group * sizeof(uint16_t) * (size_t)kv->n_layers; /* of the step */
    const struct attention_op op = {.level = b->level,
                                    .y = y,
                                    .qkv = qkv,
                                    .kv = kv,
                                    .rows = rows,
                                    .layer = layer,
                                    .n_heads = (size_t)n_heads,
                                    .group = group,
                                    .item_heads = item_heads,
                                    .n_sets = (group + item_heads - 1) / item_heads,
                                    .stride = kv->pos_bytes / sizeof(uint16_t),
                                    .plane = kv->plane_bytes / sizeof(uint16_t),
                                    .prefetches = kv_bytes > PREFETCH_MIN_BYTES,
                                    .scale = 1.0f / sqrtf((float)hd),
                                    .scratch = scratch};
    for_each(b, attention_item, &op, (size_t)kv->n_kv_heads * n_rows * op.n_sets, work);
}

/*
 * work.c - the division of an op's work among the threads, and the op's scratch memory.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "base/error.h"
#include "cpu/cpu.h"

/* A thread's part of the items of an op, in a cache line of its own. */
struct share {
    _Alignas(64) atomic_size_t next;
    size_t end;
};

_Static_assert(sizeof(struct share) == 64, "shares are in different cache lines");

struct loop {
    item_fn *fn;
    const void *op;
    struct share *shares; /* [threads] */
};

int work_begin(struct backend *b, int32_t n_threads, struct bpo_error *err) {
    b->shares = aligned_alloc(_Alignof(struct share), (size_t)n_threads * sizeof *b->shares);
    b->threads = b->shares ? threads_create(n_threads) : NULL;
    if (!b->threads) {
        return bpo_fail(err, BPO_ERR_RESOURCE, "lower n_threads", "cannot start %d threads",
                        n_threads);
    }
    return 0;
}

void work_end(struct backend *b) {
    threads_destroy(b->threads);
    free(b->shares);
    free(b->scratch);
}

/* Thread i of n first does its own share, then helps the others with theirs. */
static void loop_thread(void *arg, int i, int n) {
    const struct loop *loop = arg;
    for (int s = 0; s < n; s++) {
        struct share *share = &loop->shares[(i + s) % n];
        size_t item;
        while ((item = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed)) <
               share->end) {
            loop->fn(loop->op, item, (size_t)i);
        }
    }
}

/* About the number of multiply-adds that are done before a second thread would have woken up. */
#define SMALL_WORK 16384

/* A share is adjacent items, done in order, because the matmul prefetches what follows an item. */
void for_each(struct backend *b, item_fn *fn, const void *op, size_t n_items, size_t work) {
    size_t n_threads = (size_t)threads_count(b->threads);
    if (n_items <= 1 || work <= SMALL_WORK || n_threads == 1) {
        for (size_t item = 0; item < n_items; item++) {
            fn(op, item, 0);
        }
        return;
    }
    struct loop loop = {.fn = fn, .op = op, .shares = b->shares};
    for (size_t i = 0; i < n_threads; i++) {
        atomic_init(&b->shares[i].next, n_items * i / n_threads);
        b->shares[i].end = n_items * (i + 1) / n_threads;
    }
    threads_run(b->threads, loop_thread, &loop);
}

void *scratch_get(struct backend *b, size_t n_bytes) {
    if (n_bytes > b->scratch_bytes) {
        free(b->scratch);
        b->scratch = aligned_alloc(64, (n_bytes + 63) / 64 * 64);
        b->scratch_bytes = b->scratch ? n_bytes : 0;
        if (!b->scratch) {
            (void)bpo_fail(&b->error, BPO_ERR_RESOURCE, MEMORY_HINT,
                           "cannot allocate %zu bytes (%.1f MiB) of scratch memory", n_bytes,
                           (double)n_bytes / 1048576.0);
        }
    }
    return b->scratch;
}

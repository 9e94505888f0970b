/*
 * cpu.h - the state of the CPU backend, and what the files of cpu/ share. From top to bottom, each
 * calls only those below it:
 *
 *   backend.c                  the op table: life, memory, the KV cache's copies, and the ops that
 *                              take one row after another
 *   attention.c, matmul.c      the two ops that take the time
 *   work.c                     division of work among threads, scratch memory
 *   levels.c, lanes.h, ...     the inner functions: see levels.h
 */
#ifndef BPO_CPU_H
#define BPO_CPU_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/threads.h"
#include "cpu/levels.h"
#include "kernels.h"

#define MEMORY_HINT                                                                                \
    "close other programs, or ask for less: fewer samples, a shorter prompt, fewer new tokens"

/* The trial of matmul.c that finds out how to read the weights. */
enum { N_STREAM_CHOICES = 3, N_TRIALS = 11, N_SIZE_CLASSES = 3 };
struct stream_trial {
    size_t n_done, choice;
    float speed[N_STREAM_CHOICES][N_TRIALS]; /* bytes per second */
};

struct backend {
    const struct cpu_level *level;
    struct threads *threads;
    struct share *shares;   /* [threads], of work.c */
    enum bpo_matmul matmul; /* OWN or OPENBLAS */
    struct mapping *mappings;
    struct stream_trial trials[FEW_ROWS][N_SIZE_CLASSES]; /* [n_rows - 1] */
    void *scratch;                                        /* see scratch_get */
    size_t scratch_bytes;
    struct bpo_error error; /* the first of this step; code 0: none */
};

/* ---------------------------------------------------------------- work.c */

typedef void item_fn(const void *op, size_t item, size_t thread);

/* Starts the threads. 0, or an error. */
int work_begin(struct backend *b, int32_t n_threads, struct bpo_error *err);
void work_end(struct backend *b);

/* Calls fn(op, item, thread) for each item < n_items. Which thread does an item makes no difference
 * to any bit. work is the number of multiply-adds of all items, roughly: so little work that it is
 * done before another thread would have woken up stays on the caller's. */
void for_each(struct backend *b, item_fn *fn, const void *op, size_t n_items, size_t work);

/* Memory for the op that is running, 64-byte aligned; the next op overwrites it. NULL: the step has
 * failed. */
void *scratch_get(struct backend *b, size_t n_bytes);

/* ---------------------------------------------------------------- attention.c, matmul.c */

void cpu_attention(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                   const struct rows *rows, int32_t layer, int32_t n_heads);
void cpu_matmul(struct backend *b, float *y, const float *x, const struct weight *w,
                const struct rows *rows, enum matmul_mode mode);

/* Call once before the first matmul through OpenBLAS. */
void openblas_prepare(void);

/* Fills in blas and blas_hint. */
void openblas_info(struct backend_info *info);

#endif

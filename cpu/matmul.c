/*
 * matmul.c - the matmul op: our own kernels, and prompt rows through OpenBLAS.
 */
#include <cblas.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/clock.h"
#include "base/error.h"
#include "cpu/cpu.h"

enum {
    BLOCK_BYTES = 131072,   /* of weights that a thread takes at a time, about */
    STREAM_BYTES = 4194304, /* the same with few rows of x */
    MAX_STREAMS = 8,
    MAX_SEPARATE_PACKS = 2, /* up to this many threads, each packs all of x for itself */
};

_Static_assert(MATMUL_MAX_ROWS % 4 == 0, "a pass is whole groups of four rows");

struct matmul_op {
    const struct cpu_level *level;
    float *y;       /* [n_rows][w.rows] */
    const float *x; /* [n_rows][w.cols] */
    const struct weight *w;
    size_t n_rows;
    enum matmul_mode mode;
    size_t n_items, multiple; /* blocks of weight rows; their bounds are multiples of this */
    size_t n_streams;         /* see levels.h */
    float *packed;            /* x as packed by the level; NULL: not packed */
    size_t packed_floats;     /* from one thread's copy to the next; 0: all threads share one */
    bool *is_packed;          /* [threads]: the thread's copy is complete */
    float *scratch;
    size_t scratch_floats;   /* of one thread */
    const struct rows *rows; /* OpenBLAS: the spans */
};

static void matmul_pack(const void *arg, size_t part, size_t thread) {
    const struct matmul_op *op = arg;
    float *packed = op->packed + thread * op->packed_floats;
    op->level->pack(packed, op->x, op->w->cols, op->n_rows, op->w->cols, part);
}

/* The first weight row of an item. The items are as equal as can be, because every thread waits for
 * the last one. */
static size_t item_begin(const struct matmul_op *op, size_t item) {
    return item == op->n_items ? op->w->rows
                               : op->w->rows * item / op->n_items / op->multiple * op->multiple;
}

static void matmul_block(const void *arg, size_t item, size_t thread) {
    const struct matmul_op *op = arg;
    const struct weight *w = op->w;
    size_t first = item_begin(op, item), n = item_begin(op, item + 1) - first;
    const uint16_t *data = weight_row(w, first);
    size_t stride = w->row_bytes / sizeof *data;
    if (!op->packed) {
        op->level->dots(op->y + first, w->rows, op->x, w->cols, op->n_rows, data, stride, n,
                        w->cols, op->mode, op->n_streams);
        return;
    }
    if (!op->is_packed[thread]) {
        for (size_t part = 0; part < op->level->pack_parts(op->n_rows); part++) {
            matmul_pack(op, part, thread);
        }
        op->is_packed[thread] = true;
    }
    op->level->dots_packed(op->y + first, w->rows, op->packed + thread * op->packed_floats,
                           op->n_rows, data, stride, n, w->cols, op->mode, op->n_streams,
                           op->scratch + thread * op->scratch_floats);
}

/* Divides the weight rows into items. With few rows of x, items are long streams, because the start
 * and the end of a stream cost time. With many rows, they are small blocks, so that the others can
 * do the items of a thread that is held up. */
static void matmul_divide(struct matmul_op *op, size_t n_threads) {
    bool few = op->n_rows <= FEW_ROWS;
    size_t n_bytes = op->w->rows * op->w->row_bytes;
    size_t per_thread =
        few ? n_bytes / STREAM_BYTES / n_threads + 1 : n_bytes / BLOCK_BYTES / n_threads + 4;
    op->multiple = few ? MAX_STREAMS : WEIGHT_ROWS;
    size_t limit = (op->w->rows + op->multiple - 1) / op->multiple;
    op->n_items = per_thread * n_threads < limit ? per_thread * n_threads : limit;
}

/* ---------------------------------------------------------------- streams of weights */

/*
 * With few rows of x, a thread may read any number of weight rows side by side, adjacent ones or
 * the heads of streams far apart. The bits are the same, but the speed differs by up to a third.
 * Which choice is best depends on the CPU (for one row: 2 streams on Zen 5, 4 on Zen 1), on whether
 * the weights come from memory or from a cache, and on who else uses the memory. So the first
 * matmuls of each kind try the choices in turn, and the one with the best median is kept.
 */

/* The trial for a matrix of n_bytes: matrices of one size class behave alike. */
static struct stream_trial *trial_of(struct backend *b, size_t n_rows, size_t n_bytes) {
    return &b->trials[n_rows - 1][n_bytes < (size_t)1 << 20   ? 0
                                  : n_bytes < (size_t)6 << 20 ? 1
                                                              : 2];
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Records the speed of the current choice, and makes the next one. */
static void trial_record(struct stream_trial *trial, double bytes_per_s) {
    trial->speed[trial->choice][trial->n_done++ / N_STREAM_CHOICES] = (float)bytes_per_s;
    trial->choice = trial->n_done % N_STREAM_CHOICES;
    if (trial->n_done == (size_t)N_TRIALS * N_STREAM_CHOICES) {
        for (size_t i = 0; i < N_STREAM_CHOICES; i++) {
            qsort(trial->speed[i], N_TRIALS, sizeof trial->speed[i][0], compare_floats);
            trial->choice =
                trial->speed[i][N_TRIALS / 2] > trial->speed[trial->choice][N_TRIALS / 2]
                    ? i
                    : trial->choice;
        }
    }
}

static void matmul_blocks(struct backend *b, const struct matmul_op *op) {
    for_each(b, matmul_block, op, op->n_items, op->w->rows * op->w->cols * op->n_rows);
}

/* Few rows of x by all weights: the matmul of a decode step, which takes as long as reading the
 * weights does. */
static void matmul_few_rows(struct backend *b, struct matmul_op *op) {
    static const size_t one_row[N_STREAM_CHOICES] = {2, 4, 8},
                        more_rows[N_STREAM_CHOICES] = {0, 2, 4};
    size_t n_bytes = op->w->rows * op->w->row_bytes;
    struct stream_trial *trial = trial_of(b, op->n_rows, n_bytes);
    bool on_trial = trial->n_done < (size_t)N_TRIALS * N_STREAM_CHOICES;
    double begin = on_trial ? seconds_now() : 0;
    op->n_streams = (op->n_rows == 1 ? one_row : more_rows)[trial->choice];
    matmul_blocks(b, op);
    if (on_trial) {
        trial_record(trial, (double)n_bytes / (seconds_now() - begin + 1e-9));
    }
}

/* ---------------------------------------------------------------- our own kernels */

/* Packs x for dots_packed. Three threads or more pack a part each. Of two threads, each packs all
 * of x for itself before its first block: if they shared the work, a core would write to cache
 * lines that the other one read in the matmul before, and where the two cores are far apart that
 * takes longer than the packing itself. */
static bool matmul_pack_all(struct backend *b, struct matmul_op *op) {
    size_t n_threads = (size_t)threads_count(b->threads), k = op->w->cols;
    bool separate = n_threads <= MAX_SEPARATE_PACKS;
    size_t n_packed = op->n_rows * round_up_lanes(k),
           n_all = separate ? n_threads * n_packed : n_packed;
    op->packed_floats = separate ? n_packed : 0;
    op->scratch_floats = round_up_lanes(b->level->scratch_floats);
    op->packed = scratch_get(b, (n_all + n_threads * op->scratch_floats) * sizeof(float) +
                                    n_threads * sizeof(bool));
    if (!op->packed) {
        return false;
    }
    op->scratch = op->packed + n_all;
    op->is_packed =
        memset(op->scratch + n_threads * op->scratch_floats, !separate, n_threads * sizeof(bool));
    if (!separate) {
        for_each(b, matmul_pack, op, b->level->pack_parts(op->n_rows), 2 * op->n_rows * k);
    }
    return true;
}

/* Every y[r][i] is a canonical dot product w_i . x_r. A thread multiplies a block of weight rows by
 * all rows of x, so the weights come from memory once for as many rows of x as the caches hold. */
static void matmul_own(struct backend *b, float *y, const float *x, const struct weight *w,
                       size_t n_rows, enum matmul_mode mode) {
    const struct cpu_level *level = b->level;
    size_t limit = level->pack ? level->max_rows(w->cols) : MATMUL_MAX_ROWS,
           n_passes = (n_rows + limit - 1) / limit;
    /* passes of about the same size, which is whole groups of four rows */
    size_t per_pass = n_passes > 1 ? ((n_rows + n_passes - 1) / n_passes + 3) / 4 * 4 : n_rows;
    for (size_t first = 0, n; first < n_rows; first += n) {
        n = n_rows - first < per_pass ? n_rows - first : per_pass;
        struct matmul_op op = {.level = level,
                               .y = y + first * w->rows,
                               .x = x + first * w->cols,
                               .w = w,
                               .n_rows = n,
                               .mode = mode};
        matmul_divide(&op, (size_t)threads_count(b->threads));
        if (level->pack && n >= level->pack_min && !matmul_pack_all(b, &op)) {
            return;
        }
        if (n <= FEW_ROWS) {
            matmul_few_rows(b, &op);
        } else {
            matmul_blocks(b, &op);
        }
    }
}

/* ---------------------------------------------------------------- OpenBLAS */

/* Widens a panel of weights and multiplies every span of prompt rows by it. Each span has its own
 * call of sgemm, so that its bits do not depend on the other spans. */
static void blas_panel(const void *arg, size_t item, size_t thread) {
    const struct matmul_op *op = arg;
    const struct weight *w = op->w;
    size_t first = item * OPENBLAS_PANEL,
           n = w->rows - first < OPENBLAS_PANEL ? w->rows - first : OPENBLAS_PANEL;
    float *panel = op->scratch + thread * op->scratch_floats;
    for (size_t i = 0; i < n; i++) {
        op->level->widen(panel + i * w->cols, weight_row(w, first + i), w->cols);
    }
    for (int32_t s = 0; s < op->rows->n_spans; s++) {
        const struct span *span = &op->rows->spans[s];
        if (span->kind == ROWS_PROMPT && span->n > 0) {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, span->n, (int)n, (int)w->cols,
                        1.0f, op->x + (size_t)span->first * w->cols, (int)w->cols, panel,
                        (int)w->cols, op->mode == MATMUL_ADD ? 1.0f : 0.0f,
                        op->y + (size_t)span->first * w->rows + first, (int)w->rows);
        }
    }
}

static void matmul_openblas(struct backend *b, float *y, const float *x, const struct weight *w,
                            const struct rows *rows, enum matmul_mode mode) {
    struct matmul_op op = {.level = b->level, .y = y, .x = x, .w = w, .mode = mode, .rows = rows};
    op.scratch_floats = OPENBLAS_PANEL * w->cols;
    op.scratch =
        scratch_get(b, (size_t)threads_count(b->threads) * op.scratch_floats * sizeof(float));
    if (op.scratch) {
        for_each(b, blas_panel, &op, (w->rows + OPENBLAS_PANEL - 1) / OPENBLAS_PANEL, SIZE_MAX);
    }
}

/* Otherwise OpenBLAS would start threads inside each of ours. Debian's build has one thread count
 * for the whole process. */
static void single_threaded(void) {
    openblas_set_num_threads(1);
}

void openblas_prepare(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, single_threaded);
}

static bool is_one_of(const char *name, const char *const *names) {
    for (size_t i = 0; names[i]; i++) {
        if (strcasecmp(name, names[i]) == 0) {
            return true;
        }
    }
    return false;
}

/* OpenBLAS mistakes a CPU that is newer than itself for an old one, and runs that one's kernels. */
static void blas_hint(char *hint, size_t size) {
    static const char *const avx512[] = {"SkylakeX", "Cooperlake", "SapphireRapids", NULL};
    static const char *const avx2[] = {"Haswell", "Zen", "Excavator", NULL};
    const struct cpu_level *best = cpu_level_simd(0);
    const char *core = openblas_get_corename();
    bool has_avx512 = best && strcmp(best->name, "avx512") == 0;
    bool has_avx2 = has_avx512 || (best && strcmp(best->name, "avx2") == 0);
    hint[0] = '\0';
    if (has_avx512 && !is_one_of(core, avx512)) {
        (void)snprintf(hint, size,
                       "OpenBLAS's %s kernels do not use this CPU's AVX-512; to try others: "
                       "OPENBLAS_CORETYPE=SkylakeX",
                       core);
    } else if (has_avx2 && !is_one_of(core, avx512) && !is_one_of(core, avx2)) {
        (void)snprintf(hint, size,
                       "OpenBLAS's %s kernels do not use this CPU's AVX2; to try others: "
                       "OPENBLAS_CORETYPE=Haswell",
                       core);
    }
}

void openblas_info(struct backend_info *info) {
    (void)snprintf(info->blas, sizeof info->blas, "%s, core %s", openblas_get_config(),
                   openblas_get_corename());
    blas_hint(info->blas_hint, sizeof info->blas_hint);
}

/* ---------------------------------------------------------------- the op */

void cpu_matmul(struct backend *b, float *y, const float *x, const struct weight *w,
                const struct rows *rows, enum matmul_mode mode) {
    if (w->dtype != DTYPE_F16 && !b->error.code) {
        (void)bpo_fail(&b->error, BPO_ERR_MODEL, NULL,
                       "the CPU kernels cannot read weights of type %d", (int)w->dtype);
    }
    if (b->error.code) {
        return;
    }
    if (b->matmul == BPO_MATMUL_OWN || rows->n_spans == 0) {
        matmul_own(b, y, x, w, (size_t)rows->n, mode);
        return;
    }
    bool any_prompt = false;
    for (int32_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        any_prompt = any_prompt || span->kind == ROWS_PROMPT;
        if (span->kind == ROWS_DECODE) {
            matmul_own(b, y + (size_t)span->first * w->rows, x + (size_t)span->first * w->cols, w,
                       (size_t)span->n, mode);
        }
    }
    if (any_prompt && !b->error.code) {
        matmul_openblas(b, y, x, w, rows, mode);
    }
}

/*
 * kernels.c - the ops of kernels.h for any CPU: the arithmetic in plain scalar C, how it is divided
 * among threads, and the matmul through OpenBLAS. kernels_simd.c has the same inner functions in
 * vector instructions, with the same results in every bit; kernels_cpu.h says what makes that
 * possible.
 *
 * To be read in order: numbers (exp, sin, cos, powers), inner functions (dot product, softmax,
 * ...), the backend and its memory, then the ops. Shape letters as in kernels.h: D model width, F
 * feed-forward width, H query heads, HK key/value heads, hd head size, R rows.
 */
#include "kernels.h"

#include <cblas.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/numbers.h"
#include "cpu/levels.h"
#include "base/threads.h"

void rope_inv_freq(float *inv_freq, int32_t head_dim, float theta) {
    for (int32_t i = 0; i < head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)head_dim;
        inv_freq[i] = 1.0f / (float)power(theta, exponent);
    }
}

/* ---------------------------------------------------------------- backend and memory */

/* A large mapping, so that free can tell it from an ordinary allocation. */
struct mapping {
    struct mapping *next;
    void *data;
};

/*
 * Which weight rows a thread reads side by side, neighbours or streams far apart, and how many,
 * makes no difference to any bit when there are few rows of x, but up to a third to the speed; and
 * which is best depends on the CPU (one row: 2 streams on Zen 5, 4 on Zen 1), on whether the
 * weights come from memory or from a cache, and on who else uses the memory. So the first matmuls
 * of each kind try the choices in turn; then the one with the best median stays.
 */
enum { N_STREAM_CHOICES = 3, N_TRIALS = 11, N_SIZE_CLASSES = 3 };
struct stream_trial {
    size_t n_done, choice;
    float speed[N_STREAM_CHOICES][N_TRIALS]; /* bytes per second */
};

/* A thread's part of the items of an op. */
struct share {
    _Alignas(64) atomic_size_t next;
    size_t end;
};

struct backend {
    const struct cpu_level *level;
    struct threads *threads;
    struct share *shares;   /* [threads] */
    enum bpo_matmul matmul; /* OWN or OPENBLAS */
    struct mapping *mappings;
    struct stream_trial trials[FEW_ROWS][N_SIZE_CLASSES]; /* [n_rows - 1] */
    /* of the op that is running: see scratch_get */
    void *scratch;
    size_t scratch_bytes;
    struct bpo_error error; /* the first of this step; code 0: none */
};

#define MEMORY_HINT                                                                                \
    "close other programs, or ask for less: fewer samples, a shorter prompt, fewer new tokens"

/* OpenBLAS would start its own threads inside each of ours. Debian's build has one thread count for
 * the whole process. */
static void blas_single_threaded(void) {
    openblas_set_num_threads(1);
}

static void cpu_destroy(struct backend *b);

static struct backend *cpu_create(const struct backend_options *options, struct bpo_error *err) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (options->n_threads < 1) {
        (void)bpo_fail(err, BPO_ERR_USAGE, NULL, "%d threads: at least 1 is needed",
                       options->n_threads);
        return NULL;
    }
    const struct cpu_level *level = cpu_level_choose(err);
    if (!level) {
        return NULL;
    }
    struct backend *b = calloc(1, sizeof *b);
    if (!b) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, MEMORY_HINT, "not enough memory for the CPU backend");
        return NULL;
    }
    b->level = level;
    b->matmul = options->matmul;
    if (b->matmul == BPO_MATMUL_AUTO) {
        b->matmul = level == &cpu_level_scalar ? BPO_MATMUL_OPENBLAS : BPO_MATMUL_OWN;
    }
    if (b->matmul == BPO_MATMUL_OPENBLAS) {
        (void)pthread_once(&once, blas_single_threaded);
    }
    b->shares =
        aligned_alloc(_Alignof(struct share), (size_t)options->n_threads * sizeof *b->shares);
    b->threads = b->shares ? threads_create(options->n_threads) : NULL;
    if (!b->threads) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, "use fewer threads (-t)", "cannot start %d threads",
                       options->n_threads);
        cpu_destroy(b);
        return NULL;
    }
    return b;
}

static void cpu_destroy(struct backend *b) {
    if (b) {
        threads_destroy(b->threads);
        free(b->shares);
        free(b->scratch);
        free(b);
    }
}

static bool is_one_of(const char *name, const char *const *names) {
    for (size_t i = 0; names[i]; i++) {
        if (strcasecmp(name, names[i]) == 0) {
            return true;
        }
    }
    return false;
}

/* OpenBLAS takes a CPU that is newer than itself for an old one, and runs the kernels of that. */
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
                       "OpenBLAS's %s kernels do without this CPU's AVX-512; to try others: "
                       "OPENBLAS_CORETYPE=SkylakeX",
                       core);
    } else if (has_avx2 && !is_one_of(core, avx512) && !is_one_of(core, avx2)) {
        (void)snprintf(hint, size,
                       "OpenBLAS's %s kernels do without this CPU's AVX2; to try others: "
                       "OPENBLAS_CORETYPE=Haswell",
                       core);
    }
}

static void cpu_info(const struct backend *b, struct backend_info *info) {
    *info = (struct backend_info){.device = "cpu",
                                  .simd = b->level->name,
                                  .matmul = b->matmul,
                                  .n_threads = threads_count(b->threads)};
    (void)snprintf(info->blas, sizeof info->blas, "%s, core %s", openblas_get_config(),
                   openblas_get_corename());
    blas_hint(info->blas_hint, sizeof info->blas_hint);
    (void)snprintf(info->numerics, sizeof info->numerics, "cpu %d%s%s", NUMERICS_VERSION,
                   b->matmul == BPO_MATMUL_OPENBLAS ? ", " : "",
                   b->matmul == BPO_MATMUL_OPENBLAS ? info->blas : "");
}

static void *fail_alloc(struct bpo_error *err, size_t n_bytes) {
    (void)bpo_fail(err, BPO_ERR_RESOURCE, MEMORY_HINT, "cannot allocate %zu bytes (%.1f MiB)",
                   n_bytes, (double)n_bytes / 1048576.0);
    return NULL;
}

/* Pages that exist once they are written. Huge ones would commit 2 MiB for the first of a head's
 * positions. */
static void *alloc_lazy(struct backend *b, size_t n_bytes) {
    struct mapping *mapping = malloc(sizeof *mapping);
    if (!mapping) {
        return NULL;
    }
    int flags = MAP_PRIVATE | MAP_ANON;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void *data = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data == MAP_FAILED) {
        free(mapping);
        return NULL;
    }
#ifdef MADV_NOHUGEPAGE
    /* fails where the system has no huge pages: just as well */
    (void)madvise(data, n_bytes, MADV_NOHUGEPAGE);
#endif
    *mapping = (struct mapping){.next = b->mappings, .data = data};
    b->mappings = mapping;
    return data;
}

static void *cpu_alloc(struct backend *b, size_t n_bytes, enum memory_kind kind,
                       struct bpo_error *err) {
    if (n_bytes > SIZE_MAX / 2 - 64) {
        return fail_alloc(err, n_bytes);
    }
    size_t rounded = (n_bytes + 63) / 64 * 64 + (n_bytes == 0 ? 64 : 0);
    void *data = kind == MEMORY_LAZY ? alloc_lazy(b, rounded) : aligned_alloc(64, rounded);
    return data ? data : fail_alloc(err, n_bytes);
}

static void cpu_free(struct backend *b, void *data, size_t n_bytes) {
    for (struct mapping **at = &b->mappings; *at; at = &(*at)->next) {
        struct mapping *mapping = *at;
        if (mapping->data == data) {
            (void)munmap(data, (n_bytes + 63) / 64 * 64 + (n_bytes == 0 ? 64 : 0));
            *at = mapping->next;
            free(mapping);
            return;
        }
    }
    free(data);
}

/* Backend memory is host memory here. */
static int cpu_copy(struct backend *b, void *to, const void *from, size_t n_bytes,
                    struct bpo_error *err) {
    (void)b;
    (void)err;
    if (n_bytes > 0) {
        memcpy(to, from, n_bytes);
    }
    return 0;
}

static const void *cpu_load_weights(struct backend *b, const void *host, size_t n_bytes,
                                    struct bpo_error *err) {
    (void)b;
    (void)n_bytes;
    (void)err;
    return host;
}

static int cpu_step_begin(struct backend *b, uint64_t shape) {
    (void)shape;
    b->error.code = BPO_OK;
    return 1;
}

static int cpu_step_end(struct backend *b, struct bpo_error *err) {
    int code = b->error.code;
    if (code && err) {
        *err = b->error;
    }
    b->error.code = BPO_OK;
    return code;
}

/* Memory for the op that is running, 64-byte aligned; the next op's overwrites it. NULL: the step
 * has failed. */
static void *scratch_get(struct backend *b, size_t n_bytes) {
    if (n_bytes > b->scratch_bytes) {
        free(b->scratch);
        b->scratch_bytes = 0;
        b->scratch = cpu_alloc(b, n_bytes, MEMORY_BUFFER, &b->error);
        b->scratch_bytes = b->scratch ? n_bytes : 0;
    }
    return b->scratch;
}

/* ---------------------------------------------------------------- division of work */

typedef void item_fn(const void *op, size_t item, size_t thread);

struct loop {
    item_fn *fn;
    const void *op;
    struct share *shares; /* one for each thread */
};

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

/* multiply-adds, or so, that are done before a second thread would have woken up */
#define MATMUL_BLOCK_BYTES 131072
#define STREAM_BYTES 4194304
#define SMALL_WORK 16384

/* Calls fn(op, item, thread) for each item. A thread does the items of its share one after another,
 * neighbours, because the matmul asks memory for what lies behind an item; then it helps others
 * with theirs. Which thread does an item makes no difference to any bit. work: multiply-adds in
 * all. */
static void for_each(struct backend *b, item_fn *fn, const void *op, size_t n_items, size_t work) {
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

/* ---------------------------------------------------------------- ops: one row after another */

static const uint16_t *weight_row(const struct weight *w, size_t row) {
    return (const uint16_t *)((const char *)w->data + row * w->row_bytes);
}

static void cpu_embed(struct backend *b, float *x, const struct weight *table,
                      const struct rows *rows) {
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        b->level->widen(x + r * table->cols, weight_row(table, (size_t)rows->token[r]),
                        table->cols);
    }
}

static void cpu_gather(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                       int32_t dim) {
    (void)b;
    for (size_t i = 0; i < (size_t)n; i++) {
        memcpy(y + i * (size_t)dim, x + (size_t)index[i] * (size_t)dim, (size_t)dim * sizeof *y);
    }
}

struct rmsnorm_op {
    const struct cpu_level *level;
    float *y;
    const float *x;
    const uint16_t *gain;
    size_t dim;
    float eps;
};

static void rmsnorm_row(const void *arg, size_t r, size_t thread) {
    const struct rmsnorm_op *op = arg;
    (void)thread;
    op->level->rmsnorm(op->y + r * op->dim, op->x + r * op->dim, op->gain, op->dim, op->eps);
}

static void cpu_rmsnorm(struct backend *b, float *y, const float *x, const struct weight *gain,
                        int32_t n, float eps) {
    const struct rmsnorm_op op = {b->level, y, x, weight_row(gain, 0), gain->cols, eps};
    /* each value is squared, then scaled */
    for_each(b, rmsnorm_row, &op, (size_t)n, (size_t)n * gain->cols * 2);
}

struct swiglu_op {
    const struct cpu_level *level;
    float *y;
    const float *gate_up;
    size_t ffn_dim;
};

static void swiglu_row(const void *arg, size_t r, size_t thread) {
    const struct swiglu_op *op = arg;
    const float *gate = op->gate_up + r * 2 * op->ffn_dim;
    (void)thread;
    op->level->swiglu(op->y + r * op->ffn_dim, gate, gate + op->ffn_dim, op->ffn_dim);
}

static void cpu_swiglu(struct backend *b, float *y, const float *gate_up, int32_t n,
                       int32_t ffn_dim) {
    const struct swiglu_op op = {b->level, y, gate_up, (size_t)ffn_dim};
    for_each(b, swiglu_row, &op, (size_t)n, (size_t)n * (size_t)ffn_dim * 4);
}

/* ---------------------------------------------------------------- RoPE */

static void cpu_rope_angles(struct backend *b, float *angles, const float *inv_freq,
                            const struct rows *rows, int32_t head_dim) {
    size_t half = (size_t)head_dim / 2;
    (void)b;
    for (size_t r = 0; r < (size_t)rows->n; r++) {
        for (size_t i = 0; i < half; i++) {
            float *angle = angles + (r * half + i) * 2;
            sin_cos((float)rows->pos[r] * inv_freq[i], &angle[1], &angle[0]);
        }
    }
}

struct rope_op {
    const struct cpu_level *level;
    float *qkv;
    const struct kv_cache *kv;
    const float *angles;
    const struct rows *rows;
    int32_t layer, n_heads;
};

static void rope_row(const void *arg, size_t r, size_t thread) {
    const struct rope_op *op = arg;
    const struct kv_cache *kv = op->kv;
    size_t hd = (size_t)kv->head_dim;
    const float *angles = op->angles + r * hd;
    float *q = op->qkv + r * hd * (size_t)(op->n_heads + 2 * kv->n_kv_heads);
    float *k = q + hd * (size_t)op->n_heads, *v = k + hd * (size_t)kv->n_kv_heads;
    (void)thread;
    for (size_t h = 0; h < (size_t)op->n_heads; h++) {
        op->level->rotate(q + h * hd, angles, hd / 2);
    }
    for (int32_t h = 0; h < kv->n_kv_heads; h++) {
        op->level->rotate(k + (size_t)h * hd, angles, hd / 2);
        op->level->narrow(kv_at(kv, op->rows->slot[r], op->layer, 0, h, op->rows->pos[r]),
                          k + (size_t)h * hd, hd);
        op->level->narrow(kv_at(kv, op->rows->slot[r], op->layer, 1, h, op->rows->pos[r]),
                          v + (size_t)h * hd, hd);
    }
}

static void cpu_rope_kv(struct backend *b, float *qkv, const struct kv_cache *kv,
                        const float *angles, const struct rows *rows, int32_t layer,
                        int32_t n_heads) {
    const struct rope_op op = {b->level, qkv, kv, angles, rows, layer, n_heads};
    size_t row_size = (size_t)kv->head_dim * (size_t)(n_heads + 2 * kv->n_kv_heads);
    for_each(b, rope_row, &op, (size_t)rows->n, (size_t)rows->n * row_size);
}

/* ---------------------------------------------------------------- attention */

/* query heads that read a key/value head together, at most */
#define ATTENTION_HEADS 8
/* of keys and values in a step: so many come from memory, not from a cache */
#define ASK_BYTES ((size_t)4 << 20)
#define ASK_EACH 16                      /* positions that are done between two times of asking */
#define ASK_LINE (64 / sizeof(uint16_t)) /* values in a line of the cache */

struct attention_op {
    const struct cpu_level *level;
    float *y;
    const float *qkv;
    const struct kv_cache *kv;
    const struct rows *rows;
    int32_t layer;
    size_t n_heads, group;   /* H; H / HK: query heads that share a key/value head */
    size_t together, n_sets; /* heads of an item, at most; items in a group */
    size_t stride, plane;    /* values from a position to the next, and from K to V */
    bool asks;               /* memory for what comes next */
    float scale;             /* 1 / sqrt(hd) */
    float *scratch;          /* [thread][ATTENTION_HEADS][ATTENTION_BLOCK + hd] */
};

/* The positions that an item reads: the first n_shared in a slot that other items read too, the
 * rest in its own. */
struct seen {
    const uint16_t *shared, *own; /* K of position 0; V is a plane behind */
    size_t n_shared, n;
};

/* Positions [first, first + n) of those that an item sees; what it sees lead positions on, and the
 * next item, is asked for meanwhile. */
struct chunk {
    struct seen seen, next;
    size_t lead, first, n;
};

/* K of position p, and in *n how many, of the *n from there on, lie side by side. */
static const uint16_t *seen_at(const struct attention_op *op, const struct seen *seen, size_t p,
                               size_t *n) {
    bool shared = p < seen->n_shared;
    size_t most = (shared ? seen->n_shared : seen->n) - p;
    *n = *n < most ? *n : most;
    return (shared ? seen->shared : seen->own) + p * op->stride;
}

/*
 * Asks memory for the positions from p on, before end, of what an item and then the next one see.
 * Sequences are short, so their keys and values are many short streams, each of which is over
 * before the CPU reads ahead by itself.
 */
INLINE void ask_for(const struct attention_op *op, const struct chunk *c, size_t p, size_t end) {
    size_t n_seen = c->seen.n, n_all = n_seen + c->next.n;
    for (size_t n; p < end && p < n_all; p += n) {
        n = end - p;
        const uint16_t *k =
            p < n_seen ? seen_at(op, &c->seen, p, &n) : seen_at(op, &c->next, p - n_seen, &n);
        for (size_t i = 0; i < n * op->stride; i += ASK_LINE) {
            __builtin_prefetch(k + i);
            __builtin_prefetch(k + i + op->plane);
        }
    }
}

/* K or V (plane 0, 1) of the chunk's position p, and in *n how many, from there on, are to be done
 * at once. */
INLINE const uint16_t *chunk_at(const struct attention_op *op, const struct chunk *c, size_t plane,
                                size_t p, size_t *n) {
    bool asks = op->asks && c->lead < c->seen.n + c->next.n;
    *n = asks && c->n - p > ASK_EACH ? ASK_EACH : c->n - p;
    const uint16_t *k = seen_at(op, &c->seen, c->first + p, n);
    if (asks) { /* half of what is asked for in a chunk's time with K, half with V */
        size_t from = c->first + c->lead, done = plane * c->n + p;
        ask_for(op, c, from + done / 2, from + (done + *n) / 2);
    }
    return k + plane * op->plane;
}

/*
 * y_h = sum over p of softmax(s_h)[p] v_p, s_h[p] = scale q_h . k_p, for n_h query heads of one
 * key/value head and the positions seen.
 *
 * The positions are taken in chunks of 128. A chunk gives, for its own maximum m', the sum l' of
 * exp(s - m') and the vector y' = sum of exp(s - m') v. What earlier chunks gave for their maximum
 * m is brought together with it (online softmax: Milakov and Gimelshein 2018) by
 *
 *     M = max(m, m')    l = l exp(m - M) + l' exp(m' - M)    y = y exp(m - M) + y' exp(m' - M)
 *
 * and y / l is the result. The chunks are always the same, so a row's bits depend on nothing but
 * its own positions.
 */
static void attend(const struct attention_op *op, float *y, const float *q, size_t n_h,
                   struct chunk c, float *scratch) {
    const size_t hd = (size_t)op->kv->head_dim;
    float *scores = scratch, *part = scratch + (size_t)ATTENTION_HEADS * ATTENTION_BLOCK;
    float max[ATTENTION_HEADS] = {0}, sum[ATTENTION_HEADS] = {0};
    for (; c.first < c.seen.n; c.first += c.n) {
        float chunk_max[ATTENTION_HEADS], chunk_sum[ATTENTION_HEADS],
            *chunk_y = c.first == 0 ? y : part;
        c.n = c.seen.n - c.first < ATTENTION_BLOCK ? c.seen.n - c.first : ATTENTION_BLOCK;
        for (size_t p = 0, n; p < c.n; p += n) {
            const uint16_t *k = chunk_at(op, &c, 0, p, &n);
            op->level->dots(scores + p, ATTENTION_BLOCK, q, hd, n_h, k, op->stride, n, hd,
                            MATMUL_STORE, 0);
        }
        for (size_t h = 0; h < n_h; h++) {
            chunk_sum[h] =
                op->level->softmax(scores + h * ATTENTION_BLOCK, c.n, op->scale, &chunk_max[h]);
        }
        for (size_t p = 0, n; p < c.n; p += n) {
            const uint16_t *v = chunk_at(op, &c, 1, p, &n);
            op->level->weighted_sum(chunk_y, hd, scores + p, ATTENTION_BLOCK, n_h, v, op->stride, n,
                                    hd, p > 0);
        }
        for (size_t h = 0; h < n_h; h++) {
            if (c.first == 0) {
                max[h] = chunk_max[h];
                sum[h] = chunk_sum[h];
                continue;
            }
            float m = chunk_max[h] > max[h] ? chunk_max[h] : max[h];
            float before = canonical_exp(max[h] - m), now = canonical_exp(chunk_max[h] - m);
            max[h] = m;
            sum[h] = sum[h] * before + chunk_sum[h] * now;
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

/* What a row sees of a key/value head. */
static struct seen row_seen(const struct attention_op *op, size_t r, size_t kv_head) {
    const struct rows *rows = op->rows;
    int32_t slot = rows->slot[r], head = (int32_t)kv_head;
    struct seen seen = {.own = kv_at(op->kv, slot, op->layer, 0, head, 0),
                        .n = (size_t)rows->pos[r] + 1};
    if (rows->shared) {
        const struct shared_prefix *prefix = &rows->shared[slot];
        seen.shared = kv_at(op->kv, prefix->slot, op->layer, 0, head, 0);
        seen.n_shared = (size_t)prefix->n < seen.n ? (size_t)prefix->n : seen.n;
    }
    return seen;
}

/* Item: (key/value head, row, set of the group's query heads), the head outermost, so that rows of
 * one slot find it in the cache. */
static void attention_item(const void *arg, size_t item, size_t thread) {
    const struct attention_op *op = arg;
    const int32_t *slot = op->rows->slot;
    size_t hd = (size_t)op->kv->head_dim, n_rows = (size_t)op->rows->n,
           n_kv_heads = (size_t)op->kv->n_kv_heads;
    size_t set = item % op->n_sets, r = item / op->n_sets % n_rows,
           kv_head = item / op->n_sets / n_rows;
    size_t in_group = set * op->together,
           n_h = op->group - in_group < op->together ? op->group - in_group : op->together;
    size_t head = kv_head * op->group + in_group;
    struct chunk c = {.seen = row_seen(op, r, kv_head)};
    bool last_row = r + 1 == n_rows, last_head = kv_head + 1 == n_kv_heads;
    /* of those that read these keys and values, */
    bool first = set == 0 && (r == 0 || slot[r - 1] != slot[r]);
    bool last = set + 1 == op->n_sets && (last_row || slot[r + 1] != slot[r]);
    c.lead = first && c.seen.n > ATTENTION_BLOCK ? ATTENTION_BLOCK : c.seen.n;
    if (last && !(last_row && last_head)) {
        c.next = last_row ? row_seen(op, 0, kv_head + 1) : row_seen(op, r + 1, kv_head);
    }
    attend(op, op->y + (r * op->n_heads + head) * hd,
           op->qkv + (r * (op->n_heads + 2 * n_kv_heads) + head) * hd, n_h, c,
           op->scratch + thread * ATTENTION_HEADS * (ATTENTION_BLOCK + hd));
}

static void cpu_attention(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                          const struct rows *rows, int32_t layer, int32_t n_heads) {
    size_t hd = (size_t)kv->head_dim, n_rows = (size_t)rows->n,
           n_threads = (size_t)threads_count(b->threads);
    size_t group = (size_t)n_heads / (size_t)kv->n_kv_heads, together = group, work = 0;
    float *scratch =
        scratch_get(b, n_threads * ATTENTION_HEADS * (ATTENTION_BLOCK + hd) * sizeof *scratch);
    if (b->error.code || !scratch) {
        return;
    }
    if (n_rows * (size_t)kv->n_kv_heads < 2 * n_threads) {
        /* few rows: sharing the reads of K and V matters less than having work for all threads */
        together = 1;
    } else if (together > ATTENTION_HEADS) {
        together = ATTENTION_HEADS;
    }
    for (size_t r = 0; r < n_rows; r++) {
        work += 2 * ((size_t)rows->pos[r] + 1) * hd * (size_t)n_heads;
    }
    const struct attention_op op = {.level = b->level,
                                    .y = y,
                                    .qkv = qkv,
                                    .kv = kv,
                                    .rows = rows,
                                    .layer = layer,
                                    .n_heads = (size_t)n_heads,
                                    .group = group,
                                    .together = together,
                                    .n_sets = (group + together - 1) / together,
                                    .stride = kv->pos_bytes / sizeof(uint16_t),
                                    .plane = kv->plane_bytes / sizeof(uint16_t),
                                    .asks = work / group * sizeof(uint16_t) * (size_t)kv->n_layers >
                                            ASK_BYTES,
                                    .scale = 1.0f / sqrtf((float)hd),
                                    .scratch = scratch};
    for_each(b, attention_item, &op, (size_t)kv->n_kv_heads * n_rows * op.n_sets, work);
}

/* ---------------------------------------------------------------- matmul */

struct matmul_op {
    const struct cpu_level *level;
    float *y;       /* [n_rows][w.rows] */
    const float *x; /* [n_rows][w.cols] */
    const struct weight *w;
    size_t n_rows;
    enum matmul_mode mode;
    size_t n_items, multiple; /* blocks of weight rows, and what their bounds are multiples of */
    size_t n_streams;
    float *packed;        /* x as dots_packed wants it; NULL: dots is used */
    size_t packed_floats; /* from a thread's to the next one's; 0: all threads share one */
    bool *is_packed;      /* [threads]: the thread's is there */
    float *scratch;
    size_t scratch_floats; /* of one thread */
    const struct rows *rows;
};

static void matmul_pack(const void *arg, size_t part, size_t thread) {
    const struct matmul_op *op = arg;
    float *packed = op->packed + thread * op->packed_floats;
    op->level->pack(packed, op->x, op->w->cols, op->n_rows, op->w->cols, part);
}

/* Where an item begins. The items are as equal as can be, because the last ones are waited for. */
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

/* Weight rows for a thread to take at a time. Few rows of x: long streams, because their starts and
 * ends cost time. Many: small blocks, so that a thread that is held up is not waited for. */
static void matmul_divide(struct matmul_op *op, size_t n_threads) {
    bool few = op->n_rows <= FEW_ROWS;
    size_t n_bytes = op->w->rows * op->w->row_bytes;
    size_t each =
        few ? n_bytes / STREAM_BYTES / n_threads + 1 : n_bytes / MATMUL_BLOCK_BYTES / n_threads + 4;
    op->multiple = few ? 8 : 12; /* of every number of streams, or of every tile's rows */
    size_t most = (op->w->rows + op->multiple - 1) / op->multiple;
    op->n_items = each * n_threads < most ? each * n_threads : most;
}

/* The trial of a matmul of this many weights' bytes: matrices of a size class behave alike. */
static struct stream_trial *trial_of(struct backend *b, size_t n_rows, size_t n_bytes) {
    return &b->trials[n_rows - 1][n_bytes < (size_t)1 << 20   ? 0
                                  : n_bytes < (size_t)6 << 20 ? 1
                                                              : 2];
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Notes how fast the choice was, and makes the next one. */
static void trial_note(struct stream_trial *trial, double bytes_per_s) {
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

/* Few rows of x by all weights: the matmul of a decode step, which takes the time of reading the
 * weights. */
static void matmul_few_rows(struct backend *b, struct matmul_op *op) {
    static const size_t one_row[N_STREAM_CHOICES] = {2, 4, 8},
                        more_rows[N_STREAM_CHOICES] = {0, 2, 4};
    size_t n_bytes = op->w->rows * op->w->row_bytes;
    struct stream_trial *trial = trial_of(b, op->n_rows, n_bytes);
    bool trying = trial->n_done < (size_t)N_TRIALS * N_STREAM_CHOICES;
    double begun = trying ? seconds_now() : 0;
    op->n_streams = (op->n_rows == 1 ? one_row : more_rows)[trial->choice];
    matmul_blocks(b, op);
    if (trying) {
        trial_note(trial, (double)n_bytes / (seconds_now() - begun + 1e-9));
    }
}

#define PACK_ALONE 2 /* threads, at most, each of which packs all of x for itself */

/*
 * Brings the rows of x into the order of dots_packed. Three threads or more do a part each. Of two,
 * each does all of it before its first block: sharing it, a core would write to lines that the
 * other one read in the matmul before, which takes longer than the packing where the two are far
 * apart.
 */
static bool matmul_packed(struct backend *b, struct matmul_op *op) {
    size_t n_threads = (size_t)threads_count(b->threads), k = op->w->cols;
    bool alone = n_threads <= PACK_ALONE;
    size_t n_packed = op->n_rows * ((k + LANES - 1) / LANES * LANES),
           n_all = alone ? n_threads * n_packed : n_packed;
    op->packed_floats = alone ? n_packed : 0;
    op->scratch_floats = (b->level->scratch_floats + 15) / 16 * 16;
    op->packed = scratch_get(b, (n_all + n_threads * op->scratch_floats) * sizeof(float) +
                                    n_threads * sizeof(bool));
    if (!op->packed) {
        return false;
    }
    op->scratch = op->packed + n_all;
    op->is_packed =
        memset(op->scratch + n_threads * op->scratch_floats, !alone, n_threads * sizeof(bool));
    if (!alone) {
        for_each(b, matmul_pack, op, b->level->pack_parts(op->n_rows), 2 * op->n_rows * k);
    }
    return true;
}

/* Our own kernels: y[r][i] = w_i . x_r by the canonical dot product, one after another as far as
 * the bits are concerned. Each thread takes a block of weight rows for all activation rows, so the
 * weights come from memory once for as many rows as the caches hold. */
static void matmul_own(struct backend *b, float *y, const float *x, const struct weight *w,
                       size_t n_rows, enum matmul_mode mode) {
    const struct cpu_level *level = b->level;
    size_t most = level->pack ? level->max_rows(w->cols) : MATMUL_MAX_ROWS,
           n_passes = (n_rows + most - 1) / most;
    size_t each = n_passes > 1 ? ((n_rows + n_passes - 1) / n_passes + 3) / 4 * 4 : n_rows;
    for (size_t first = 0, n; first < n_rows; first += n) {
        n = n_rows - first < each ? n_rows - first : each;
        struct matmul_op op = {.level = level,
                               .y = y + first * w->rows,
                               .x = x + first * w->cols,
                               .w = w,
                               .n_rows = n,
                               .mode = mode};
        matmul_divide(&op, (size_t)threads_count(b->threads));
        if (level->pack && n >= level->pack_min && !matmul_packed(b, &op)) {
            return;
        }
        if (n <= FEW_ROWS) {
            matmul_few_rows(b, &op);
        } else {
            matmul_blocks(b, &op);
        }
    }
}

/* Widens a panel of weights and multiplies every span of prompt rows by it, each by its own call of
 * sgemm. */
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

static void cpu_matmul(struct backend *b, float *y, const float *x, const struct weight *w,
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

/* ---------------------------------------------------------------- outside a step */

static int cpu_first_nonfinite(struct backend *b, int32_t *found, const float *x, int32_t n,
                               size_t cols, struct bpo_error *err) {
    (void)b;
    (void)err;
    *found = -1;
    for (int32_t r = 0; r < n && *found < 0; r++) {
        const float *row = x + (size_t)r * cols;
        uint32_t largest = 0;
        for (size_t i = 0; i < cols; i++) {
            uint32_t size = bits_of(row[i]) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        *found = largest >= 0x7f800000 ? r : -1; /* the bits of an infinity or a NaN */
    }
    return 0;
}

static void cpu_for_each(struct backend *b, void (*fn)(const void *arg, size_t item, size_t thread),
                         const void *arg, size_t n_items) {
    for_each(b, fn, arg, n_items, SIZE_MAX);
}

static int kv_check(const struct kv_cache *kv, int32_t slot, int32_t n, struct bpo_error *err) {
    if (slot < 0 || slot >= kv->n_slots || n < 0 || n > kv->n_positions) {
        return bpo_fail(
            err, BPO_ERR_RUN, NULL,
            "the KV cache has %d slots of %d positions; asked for %d positions of slot %d",
            kv->n_slots, kv->n_positions, n, slot);
    }
    return 0;
}

/* Copies the first n positions of every layer, plane and head between slots, or, where packed is
 * given, to or from there. */
static void kv_move(const struct kv_cache *kv, uint16_t *packed_to, const uint16_t *packed_from,
                    int32_t to_slot, int32_t from_slot, int32_t n) {
    /* of a head: its positions lie side by side */
    size_t n_values = (size_t)n * (size_t)kv->head_dim, at = 0;
    for (int32_t l = 0; l < kv->n_layers; l++) {
        for (int32_t plane = 0; plane < 2; plane++) {
            for (int32_t h = 0; h < kv->n_kv_heads; h++, at += n_values) {
                memcpy(packed_to ? packed_to + at : kv_at(kv, to_slot, l, plane, h, 0),
                       packed_from ? packed_from + at : kv_at(kv, from_slot, l, plane, h, 0),
                       n_values * sizeof(uint16_t));
            }
        }
    }
}

static int cpu_kv_copy(struct backend *b, const struct kv_cache *kv, int32_t to_slot,
                       int32_t from_slot, int32_t n, struct bpo_error *err) {
    (void)b;
    int failed = kv_check(kv, to_slot, n, err);
    failed = failed ? failed : kv_check(kv, from_slot, n, err);
    if (!failed && to_slot != from_slot) {
        kv_move(kv, NULL, NULL, to_slot, from_slot, n);
    }
    return failed;
}

static int cpu_kv_export(struct backend *b, void *to_host, const struct kv_cache *kv, int32_t slot,
                         int32_t n, struct bpo_error *err) {
    (void)b;
    int failed = kv_check(kv, slot, n, err);
    if (!failed) {
        kv_move(kv, to_host, NULL, 0, slot, n);
    }
    return failed;
}

static int cpu_kv_import(struct backend *b, const struct kv_cache *kv, const void *from_host,
                         int32_t slot, int32_t n, struct bpo_error *err) {
    (void)b;
    int failed = kv_check(kv, slot, n, err);
    if (!failed) {
        kv_move(kv, NULL, from_host, slot, 0, n);
    }
    return failed;
}

const struct kernels *kernels_cpu(void) {
    static const struct kernels table = {
        .abi = KERNELS_ABI,
        .name = "cpu",
        .host_memory = true,
        .create = cpu_create,
        .destroy = cpu_destroy,
        .info = cpu_info,
        .alloc = cpu_alloc,
        .free = cpu_free,
        .upload = cpu_copy,
        .download = cpu_copy,
        .load_weights = cpu_load_weights,
        .step_begin = cpu_step_begin,
        .step_end = cpu_step_end,
        .embed = cpu_embed,
        .rmsnorm = cpu_rmsnorm,
        .matmul = cpu_matmul,
        .rope_angles = cpu_rope_angles,
        .rope_kv = cpu_rope_kv,
        .attention = cpu_attention,
        .swiglu = cpu_swiglu,
        .gather = cpu_gather,
        .first_nonfinite = cpu_first_nonfinite,
        .sample = NULL,
        .for_each = cpu_for_each,
        .kv_copy = cpu_kv_copy,
        .kv_export = cpu_kv_export,
        .kv_import = cpu_kv_import,
    };
    return &table;
}

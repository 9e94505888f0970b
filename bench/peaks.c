/*
 * peaks.c - see peaks.h. A reading pattern is the number of streams that a thread reads side by
 * side, and their distance. Each is measured with the widest vectors of this CPU, with and without
 * prefetch, over the weights and over a copy in huge pages. Which one is fastest differs from
 * machine to machine, and between a model that fits in the caches and one that does not.
 */
#include "peaks.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "base/clock.h"

#define PIECE_BYTES ((size_t)2 << 20) /* what a thread reads at a time */

/* ---------------------------------------------------------------- one thread, by level */

/* Reads n_streams parts of a region side by side, one cache line of each at a time. ahead is the
 * distance of the prefetch in bytes, 0 for none. Returns a sum, so that the compiler cannot omit
 * the reading. */
typedef uint64_t read_fn(const char *region, size_t stream_bytes, int n_streams, size_t ahead);

/* n rounds of N_CHAINS independent multiply-adds of one vector each. */
typedef float fma_fn(size_t n);

struct peak_level {
    const char *name;
    read_fn *read;
    fma_fn *fma;
    double flop; /* of a round */
};

#define N_CHAINS 12

#define STREAMS_SWITCH(FN)                                                                         \
    switch (n_streams) {                                                                           \
    case 1:                                                                                        \
        return ahead ? FN(region, stream_bytes, 1, ahead) : FN(region, stream_bytes, 1, 0);        \
    case 2:                                                                                        \
        return ahead ? FN(region, stream_bytes, 2, ahead) : FN(region, stream_bytes, 2, 0);        \
    case 4:                                                                                        \
        return ahead ? FN(region, stream_bytes, 4, ahead) : FN(region, stream_bytes, 4, 0);        \
    case 6:                                                                                        \
        return ahead ? FN(region, stream_bytes, 6, ahead) : FN(region, stream_bytes, 6, 0);        \
    default:                                                                                       \
        return ahead ? FN(region, stream_bytes, 8, ahead) : FN(region, stream_bytes, 8, 0);        \
    }

#ifdef __x86_64__
#define AVX512 __attribute__((target("avx512f")))
#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE AVX512 uint64_t read_512(const char *region, size_t stream_bytes, int n_streams,
                                size_t ahead) {
    __m512i sum[8];
    UNROLL for (int s = 0; s < 8; s++) {
        sum[s] = _mm512_setzero_si512();
    }
    size_t at = 0;
    for (; at + 128 <= stream_bytes; at += 128) {
        UNROLL for (int s = 0; s < n_streams; s++) {
            const char *p = region + (size_t)s * stream_bytes + at;
            if (ahead) {
                _mm_prefetch(p + ahead, _MM_HINT_T0);
                _mm_prefetch(p + ahead + 64, _MM_HINT_T0);
            }
            sum[s] = _mm512_add_epi64(sum[s], _mm512_loadu_si512(p));
            sum[(s + 4) % 8] = _mm512_add_epi64(sum[(s + 4) % 8], _mm512_loadu_si512(p + 64));
        }
    }
    UNROLL for (int s = 1; s < 8; s++) {
        sum[0] = _mm512_add_epi64(sum[0], sum[s]);
    }
    return (uint64_t)_mm512_reduce_add_epi64(sum[0]);
}

AVX512 static uint64_t read_avx512(const char *region, size_t stream_bytes, int n_streams,
                                   size_t ahead){STREAMS_SWITCH(read_512)}

AVX512 static float fma_avx512(size_t n) {
    __m512 sum[N_CHAINS], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
    UNROLL for (int i = 0; i < N_CHAINS; i++) {
        sum[i] = _mm512_set1_ps((float)i);
    }
    for (size_t k = 0; k < n; k++) {
        UNROLL for (int i = 0; i < N_CHAINS; i++) {
            sum[i] = _mm512_fmadd_ps(sum[i], a, b);
        }
    }
    UNROLL for (int i = 1; i < N_CHAINS; i++) {
        sum[0] = _mm512_add_ps(sum[0], sum[i]);
    }
    return _mm512_reduce_add_ps(sum[0]);
}

INLINE AVX2 uint64_t read_256(const char *region, size_t stream_bytes, int n_streams,
                              size_t ahead) {
    __m256i sum[8];
    UNROLL for (int s = 0; s < 8; s++) {
        sum[s] = _mm256_setzero_si256();
    }
    for (size_t at = 0; at + 64 <= stream_bytes; at += 64) {
        UNROLL for (int s = 0; s < n_streams; s++) {
            const char *p = region + (size_t)s * stream_bytes + at;
            if (ahead) {
                _mm_prefetch(p + ahead, _MM_HINT_T0);
            }
            sum[s] = _mm256_add_epi64(sum[s], _mm256_loadu_si256((const __m256i *)(const void *)p));
            sum[(s + 4) % 8] = _mm256_add_epi64(
                sum[(s + 4) % 8], _mm256_loadu_si256((const __m256i *)(const void *)(p + 32)));
        }
    }
    UNROLL for (int s = 1; s < 8; s++) {
        sum[0] = _mm256_add_epi64(sum[0], sum[s]);
    }
    uint64_t lane[4];
    _mm256_storeu_si256((__m256i *)(void *)lane, sum[0]);
    return lane[0] + lane[1] + lane[2] + lane[3];
}

AVX2 static uint64_t read_avx2(const char *region, size_t stream_bytes, int n_streams,
                               size_t ahead){STREAMS_SWITCH(read_256)}

AVX2 static float fma_avx2(size_t n) {
    __m256 sum[N_CHAINS], a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
    UNROLL for (int i = 0; i < N_CHAINS; i++) {
        sum[i] = _mm256_set1_ps((float)i);
    }
    for (size_t k = 0; k < n; k++) {
        UNROLL for (int i = 0; i < N_CHAINS; i++) {
            sum[i] = _mm256_fmadd_ps(sum[i], a, b);
        }
    }
    UNROLL for (int i = 1; i < N_CHAINS; i++) {
        sum[0] = _mm256_add_ps(sum[0], sum[i]);
    }
    float lane[8];
    _mm256_storeu_ps(lane, sum[0]);
    return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
}
#endif

static inline uint64_t read_plain(const char *region, size_t stream_bytes, int n_streams,
                                  size_t ahead) {
    uint64_t sum[8] = {0};
    for (size_t at = 0; at + 64 <= stream_bytes; at += 64) {
        for (int s = 0; s < n_streams; s++) {
            const char *p = region + (size_t)s * stream_bytes + at;
            uint64_t line[8];
            if (ahead) {
                __builtin_prefetch(p + ahead);
            }
            memcpy(line, p, sizeof line);
            for (int i = 0; i < 8; i++) {
                sum[i] += line[i];
            }
        }
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static uint64_t read_c(const char *region, size_t stream_bytes, int n_streams, size_t ahead) {
    STREAMS_SWITCH(read_plain)
}

#ifdef FP_FAST_FMAF
#define MULTIPLY_ADD(a, b, c) fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c)) /* fmaf would be a call */
#endif

static float fma_c(size_t n) {
    float sum[N_CHAINS][4];
    for (int i = 0; i < N_CHAINS; i++) {
        for (int j = 0; j < 4; j++) {
            sum[i][j] = (float)i;
        }
    }
    for (size_t k = 0; k < n; k++) {
        for (int i = 0; i < N_CHAINS; i++) {
            for (int j = 0; j < 4; j++) {
                sum[i][j] = MULTIPLY_ADD(sum[i][j], 0.999f, 0.001f);
            }
        }
    }
    for (int i = 1; i < N_CHAINS; i++) {
        sum[0][0] += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
    }
    return sum[0][0];
}

/* Fills in the levels of this CPU, the widest first, and returns their number. */
static int peak_levels(struct peak_level level[3]) {
    int n = 0;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) {
        level[n++] = (struct peak_level){"avx512", read_avx512, fma_avx512, 2.0 * 16 * N_CHAINS};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        level[n++] = (struct peak_level){"avx2", read_avx2, fma_avx2, 2.0 * 8 * N_CHAINS};
    }
#endif
    level[n++] = (struct peak_level){"c", read_c, fma_c, 2.0 * 4 * N_CHAINS};
    return n;
}

/* ---------------------------------------------------------------- the peaks */

struct peaks {
    struct threads *pool;
    const char *data;
    char *huge;
    size_t n_bytes, huge_bytes, row_bytes, window_at;
    struct peak_level level[PEAK_LEVELS];
    int n_levels;
};

/* A way to read a buffer: region after region, each in n_streams streams side by side. */
struct pattern {
    const char *name;
    size_t region_bytes; /* 0: n_streams rows of a matrix */
    int n_streams;
    size_t ahead;
    bool huge; /* pages */
};

static const struct pattern PATTERNS[PEAK_PATTERNS] = {
    {"1 linear stream", PIECE_BYTES, 1, 0, false},
    {"1 linear stream, prefetch", PIECE_BYTES, 1, 2048, false},
    {"4 adjacent rows", 0, 4, 0, false},
    {"8 adjacent rows", 0, 8, 0, false},
    {"4 streams in 256 KiB", 262144, 4, 0, false},
    {"8 streams in 256 KiB", 262144, 8, 0, false},
    {"4 far streams", PIECE_BYTES, 4, 0, false},
    {"4 far streams, prefetch", PIECE_BYTES, 4, 1024, false},
    {"8 far streams", PIECE_BYTES, 8, 0, false},
    {"huge pages, 1 linear stream", PIECE_BYTES, 1, 0, true},
    {"huge pages, 4 far streams", PIECE_BYTES, 4, 0, true},
    {"huge pages, 8 far streams", PIECE_BYTES, 8, 0, true},
};

/* What the threads share while they read or multiply. */
struct peak_job {
    const struct peak_level *level;
    const struct pattern *pattern;
    const char *data;
    size_t n_bytes, piece_bytes, row_bytes, n_fma;
    atomic_size_t next;
    atomic_uint_fast64_t sum;
};

static void read_part(void *arg, int i, int n) {
    struct peak_job *job = arg;
    uint64_t sum = 0;
    (void)i;
    (void)n;
    for (size_t first; (first = atomic_fetch_add(&job->next, job->piece_bytes)) < job->n_bytes;) {
        const struct pattern *p = job->pattern;
        size_t left = job->n_bytes - first,
               piece = left < job->piece_bytes ? left : job->piece_bytes,
               streams = (size_t)p->n_streams;
        size_t region = p->region_bytes ? p->region_bytes : streams * job->row_bytes;
        for (size_t at = 0; at < piece; at += region) {
            size_t bytes = piece - at < region ? piece - at : region;
            sum += job->level->read(job->data + first + at, bytes / streams / 128 * 128,
                                    p->n_streams, p->ahead);
        }
    }
    atomic_fetch_add(&job->sum, sum);
}

#define FMA_PIECE 100000 /* rounds, what a thread takes at a time */

static void fma_part(void *arg, int i, int n) {
    struct peak_job *job = arg;
    float sum = 0;
    (void)i;
    (void)n;
    while (atomic_fetch_add(&job->next, FMA_PIECE) < job->n_fma) {
        sum += job->level->fma(FMA_PIECE);
    }
    atomic_fetch_add(&job->sum, (uint64_t)sum);
}

void peaks_read(struct peaks *p, double gb_s[PEAK_PATTERNS]) {
    for (int i = 0; i < PEAK_PATTERNS; i++) {
        const struct pattern *pattern = &PATTERNS[i];
        const char *data = pattern->huge ? p->huge : p->data;
        size_t n = pattern->huge ? p->huge_bytes : p->n_bytes;
        /* the next window, so that its bytes are not in the cache yet */
        if (!pattern->huge && n > PEAK_WINDOW_BYTES) {
            data += p->window_at;
            p->window_at =
                p->window_at + 2 * PEAK_WINDOW_BYTES <= n ? p->window_at + PEAK_WINDOW_BYTES : 0;
            n = PEAK_WINDOW_BYTES;
        }
        struct peak_job job = {.level = p->level,
                               .pattern = pattern,
                               .data = data,
                               .n_bytes = n,
                               .row_bytes = p->row_bytes};
        size_t share = n / (4 * (size_t)threads_count(p->pool)) / 4096 * 4096;
        job.piece_bytes = share < 4096 ? 4096 : share < PIECE_BYTES ? share : PIECE_BYTES;
        int n_times = (int)(PEAK_WINDOW_BYTES / 2 / n) + 1;
        double begin = seconds_now();
        for (int time = 0; time < n_times; time++) {
            atomic_store(&job.next, 0);
            threads_run(p->pool, read_part, &job);
        }
        gb_s[i] = (double)n * n_times / (seconds_now() - begin) * 1e-9;
    }
}

void peaks_fma(struct peaks *p, double gflop_s[PEAK_LEVELS]) {
    for (int i = 0; i < p->n_levels; i++) {
        struct peak_job job = {.level = &p->level[i],
                               .n_fma = (size_t)(100 * threads_count(p->pool)) * FMA_PIECE};
        double begin = seconds_now();
        threads_run(p->pool, fma_part, &job);
        gflop_s[i] = p->level[i].flop * (double)job.n_fma / (seconds_now() - begin) * 1e-9;
    }
}

#define N_TRIPS 20000

static void trip_part(void *arg, int i, int n) {
    atomic_uint *number = arg;
    (void)n;
    for (unsigned trip = 0; i < 2 && trip < N_TRIPS; trip++) {
        unsigned mine = 2 * trip + (unsigned)i;
        for (int spins = 0; atomic_load(number) != mine; spins++) {
            if (spins > 1000) { /* both run on one processor */
                (void)sched_yield();
            }
        }
        atomic_store(number, mine + 1);
    }
}

double peaks_round_trip(struct peaks *p) {
    if (threads_count(p->pool) < 2) {
        return 0;
    }
    atomic_uint number;
    atomic_init(&number, 0);
    double begin = seconds_now();
    threads_run(p->pool, trip_part, &number);
    return (seconds_now() - begin) / N_TRIPS * 1e9;
}

const char *peaks_pattern_name(int i) {
    return PATTERNS[i].name;
}

int peaks_n_levels(const struct peaks *p) {
    return p->n_levels;
}

const char *peaks_level_name(const struct peaks *p, int i) {
    return p->level[i].name;
}

struct peaks *peaks_create(struct threads *pool, const void *data, size_t n_bytes,
                           size_t row_bytes) {
    struct peaks *p = calloc(1, sizeof *p);
    if (!p) {
        return NULL;
    }
    *p = (struct peaks){.pool = pool, .data = data, .n_bytes = n_bytes, .row_bytes = row_bytes};
    p->n_levels = peak_levels(p->level);
    p->huge_bytes = n_bytes < PEAK_WINDOW_BYTES ? n_bytes : PEAK_WINDOW_BYTES;
    p->huge = mmap(NULL, p->huge_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (p->huge == MAP_FAILED) {
        free(p);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    /* if it fails, these are ordinary pages */
    (void)madvise(p->huge, p->huge_bytes, MADV_HUGEPAGE);
#endif
    memcpy(p->huge, data, p->huge_bytes);
    return p;
}

void peaks_destroy(struct peaks *p) {
    if (p) {
        (void)munmap(p->huge, p->huge_bytes);
        free(p);
    }
}

/*
 * threads.c - see threads.h. A run of the pool works like this: the caller stores the function and
 * increments the run's number. The workers watch that number, and call the function. The last one
 * to finish decrements the count of unfinished workers to 0, which the caller watches.
 *
 * Both sides watch by spinning, a worker for longer than sampling takes between two steps. Then
 * they sleep until the number changes: in Linux's futex, elsewhere on a condition variable (glibc's
 * loses wake-ups before version 2.41, https://sourceware.org/bugzilla/show_bug.cgi?id=25847). If
 * there are more threads than processors, spinning would take the processor from the very thread
 * that is being waited for, so no thread spins.
 *
 * Linux tends to wake a thread on the processor of the one that wakes it, and may leave both there
 * for many milliseconds while another processor is idle (perhaps more so in a virtual machine,
 * where an idle processor may look busy). So every thread records where it runs, and a worker that
 * finds another thread of the pool on its processor moves away. The caller must not go to sleep
 * before that: the worker would wake it on the worker's new processor, and so on with every run. It
 * yields the shared processor instead. (bench/kernels_bench.c times the runs after a sleep.)
 */
#include "base/threads.h"

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "base/cgroup.h"

/* about 100 to 400 us: a pause instruction takes 30 to 140 cycles */
#define WORKER_SPINS 10000
#define CALLER_SPINS 2000
#define CALLER_YIELDS 1000 /* some 300 us more, if there is no thread to yield to */

struct worker {
    struct threads *pool;
    pthread_t thread;
    int index;                         /* 1 .. n - 1 */
    _Alignas(64) atomic_int processor; /* where it ran last */
};

struct threads {
    threads_fn *fn; /* of this run; NULL: end */
    void *arg;
    int n;
    bool spins;
    /* In different cache lines, so that watching one does not slow down writing another. */
    _Alignas(64) atomic_uint run; /* the number of this run */
    _Alignas(64) atomic_uint unfinished;
    _Alignas(64) atomic_int sleepers; /* workers asleep or about to be */
    atomic_int processor;             /* where the caller runs */
    atomic_bool caller_sleeps;
#ifndef __linux__
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* one of the numbers */
#endif
    struct worker workers[];
};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

#ifdef __linux__

/* Sleeps as long as the number has this value; may wake up early. */
static void sleep_while(struct threads *pool, atomic_uint *number, unsigned value) {
    (void)pool;
    (void)syscall(SYS_futex, number, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

/* Wakes all threads that sleep on a number, which the caller has changed before. */
static void wake_sleepers(struct threads *pool, atomic_uint *number) {
    (void)pool;
    (void)syscall(SYS_futex, number, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static bool begin_sleeping(struct threads *pool) {
    (void)pool;
    return true;
}

static void end_sleeping(struct threads *pool) {
    (void)pool;
}

static int processor_now(void) {
    return sched_getcpu();
}

/* Moves a worker to a processor on which no other thread of the pool ran last, if there is one. Its
 * affinity is restricted only for a moment: where it runs later is up to the system again. */
static void move_away(struct worker *worker) {
    struct threads *pool = worker->pool;
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all)) {
        return; /* more processors than a cpu_set_t holds: then two threads rarely meet */
    }
    others = all;
    CPU_CLR((size_t)atomic_load_explicit(&pool->processor, memory_order_relaxed), &others);
    for (int i = 0; i < pool->n - 1; i++) {
        int processor = atomic_load_explicit(&pool->workers[i].processor, memory_order_relaxed);
        if (&pool->workers[i] != worker && processor >= 0) {
            CPU_CLR((size_t)processor, &others);
        }
    }
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
        (void)sched_setaffinity(0, sizeof all, &all);
    }
}

/* Keeps the caller and the workers on different processors. If two workers meet, the later one
 * moves. */
static void spread(struct worker *worker) {
    struct threads *pool = worker->pool;
    int here = processor_now();
    bool met = here == atomic_load_explicit(&pool->processor, memory_order_relaxed);
    for (int i = 0; i < worker->index - 1 && !met; i++) {
        met = here == atomic_load_explicit(&pool->workers[i].processor, memory_order_relaxed);
    }
    if (met) {
        move_away(worker);
        here = processor_now();
    }
    atomic_store_explicit(&worker->processor, here, memory_order_relaxed);
}

#else

/* The mutex is held from the last check of the number until the sleep, so no wake-up is missed. */
static void sleep_while(struct threads *pool, atomic_uint *number, unsigned value) {
    (void)pthread_mutex_lock(&pool->mutex);
    if (atomic_load(number) == value) {
        (void)pthread_cond_wait(&pool->changed, &pool->mutex);
    }
    (void)pthread_mutex_unlock(&pool->mutex);
}

static void wake_sleepers(struct threads *pool, atomic_uint *number) {
    (void)number;
    (void)pthread_mutex_lock(&pool->mutex);
    (void)pthread_cond_broadcast(&pool->changed);
    (void)pthread_mutex_unlock(&pool->mutex);
}

static bool begin_sleeping(struct threads *pool) {
    if (pthread_mutex_init(&pool->mutex, NULL)) {
        return false;
    }
    if (pthread_cond_init(&pool->changed, NULL)) {
        (void)pthread_mutex_destroy(&pool->mutex);
        return false;
    }
    return true;
}

static void end_sleeping(struct threads *pool) {
    (void)pthread_cond_destroy(&pool->changed);
    (void)pthread_mutex_destroy(&pool->mutex);
}

static int processor_now(void) {
    return -1;
}

static void spread(struct worker *worker) {
    (void)worker;
}

#endif

/* Waits for a run other than last, and returns its number.
 *
 * Why no wake-up is missed: the sleeper first announces that it sleeps, then checks the number (for
 * the last time in sleep_while). The waker first changes the number, then checks for sleepers. All
 * of this is sequentially consistent, so at least one of them sees what the other did. */
static unsigned wait_for_run(struct threads *pool, unsigned last) {
    unsigned run;
    for (int i = 0; pool->spins && i < WORKER_SPINS; i++) {
        run = atomic_load(&pool->run);
        if (run != last) {
            return run;
        }
        pause_briefly();
    }
    (void)atomic_fetch_add(&pool->sleepers, 1);
    while ((run = atomic_load(&pool->run)) == last) {
        sleep_while(pool, &pool->run, last);
    }
    (void)atomic_fetch_sub(&pool->sleepers, 1);
    return run;
}

static void *worker_main(void *arg) {
    struct worker *worker = arg;
    struct threads *pool = worker->pool;
    unsigned run = 0;
    for (;;) {
        run = wait_for_run(pool, run);
        if (!pool->fn) {
            return NULL;
        }
        if (pool->spins) {
            spread(worker);
        }
        pool->fn(pool->arg, worker->index, pool->n);
        if (atomic_fetch_sub(&pool->unfinished, 1) == 1 && atomic_load(&pool->caller_sleeps)) {
            wake_sleepers(pool, &pool->unfinished);
        }
    }
}

static void start_run(struct threads *pool, threads_fn *fn, void *arg) {
    pool->fn = fn;
    pool->arg = arg;
    atomic_store_explicit(&pool->processor, processor_now(), memory_order_relaxed);
    atomic_store(&pool->unfinished, (unsigned)(pool->n - 1));
    (void)atomic_fetch_add(&pool->run, 1);
    if (atomic_load(&pool->sleepers) > 0) {
        wake_sleepers(pool, &pool->run);
    }
}

static void finish_run(struct threads *pool) {
    for (int i = 0; pool->spins && i < CALLER_SPINS + CALLER_YIELDS; i++) {
        if (atomic_load(&pool->unfinished) == 0) {
            return;
        }
        if (i < CALLER_SPINS) {
            pause_briefly();
        } else {
            (void)sched_yield();
        }
    }
    atomic_store(&pool->caller_sleeps, true);
    unsigned unfinished;
    while ((unfinished = atomic_load(&pool->unfinished)) > 0) {
        sleep_while(pool, &pool->unfinished, unfinished);
    }
    atomic_store(&pool->caller_sleeps, false);
}

void threads_run(struct threads *pool, threads_fn *fn, void *arg) {
    if (pool->n == 1) {
        fn(arg, 0, 1);
        return;
    }
    start_run(pool, fn, arg);
    fn(arg, 0, pool->n);
    finish_run(pool);
}

int threads_count(const struct threads *pool) {
    return pool->n;
}

/* ---------------------------------------------------------------- create and destroy */

/* Ends the n_started workers that run, and frees the pool. */
static void end_workers(struct threads *pool, int n_started) {
    start_run(pool, NULL, NULL);
    for (int i = 0; i < n_started; i++) {
        (void)pthread_join(pool->workers[i].thread, NULL);
    }
    end_sleeping(pool);
    free(pool);
}

static int processors_allowed(void);

struct threads *threads_create(int n) {
    if (n < 1 || (size_t)n > (SIZE_MAX - sizeof(struct threads)) / sizeof(struct worker) - 1) {
        return NULL;
    }
    size_t bytes = sizeof(struct threads) + (size_t)(n - 1) * sizeof(struct worker);
    struct threads *pool = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!pool) {
        return NULL;
    }
    memset(pool, 0, sizeof *pool);
    pool->n = n;
    pool->spins = n <= processors_allowed();
    atomic_init(&pool->run, 0);
    atomic_init(&pool->unfinished, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->caller_sleeps, false);
    atomic_init(&pool->processor, -1);
    if (!begin_sleeping(pool)) {
        free(pool);
        return NULL;
    }
    for (int i = 0; i < n - 1; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].index = i + 1;
        atomic_init(&pool->workers[i].processor, -1);
        if (pthread_create(&pool->workers[i].thread, NULL, worker_main, &pool->workers[i])) {
            end_workers(pool, i);
            return NULL;
        }
    }
    return pool;
}

void threads_destroy(struct threads *pool) {
    if (pool) {
        end_workers(pool, pool->n - 1);
    }
}

/* ---------------------------------------------------------------- how many threads to use */

#ifdef __linux__

/* The integer at the start of a small file; -1 if there is none. */
static long read_number(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) {
        return -1;
    }
    char line[64];
    long number = -1;
    if (fgets(line, sizeof line, file)) {
        char *end;
        number = strtol(line, &end, 10);
        number = end == line ? -1 : number;
    }
    (void)fclose(file);
    return number;
}

/* The number of processors in this process's affinity mask. If cores is set, the hardware threads
 * of one core count once. */
static int count_processors(bool cores) {
    cpu_set_t *allowed = NULL;
    size_t n = 1024, bytes;
    for (;; n *= 2) { /* the mask must be at least as large as the kernel's */
        bytes = CPU_ALLOC_SIZE(n);
        allowed = CPU_ALLOC(n);
        if (!allowed) {
            return 1;
        }
        if (sched_getaffinity(0, bytes, allowed) == 0) {
            break;
        }
        CPU_FREE(allowed);
        if (n >= (size_t)1 << 20) {
            return 1;
        }
    }
    /* A core is identified by the first of its hardware threads, allowed or not: its
     * thread_siblings_list reads "0,64" or "0-1". */
    cpu_set_t *seen = CPU_ALLOC(n);
    int count = seen ? 0 : CPU_COUNT_S(bytes, allowed);
    if (seen) {
        CPU_ZERO_S(bytes, seen);
    }
    for (size_t i = 0; seen && i < n; i++) {
        if (!CPU_ISSET_S(i, bytes, allowed)) {
            continue;
        }
        char path[96];
        (void)snprintf(path, sizeof path,
                       "/sys/devices/system/cpu/cpu%zu/topology/thread_siblings_list", i);
        long first = cores ? read_number(path) : -1;
        size_t core = first < 0 || (size_t)first >= n ? i : (size_t)first;
        count += !CPU_ISSET_S(core, bytes, seen);
        CPU_SET_S(core, bytes, seen);
    }
    CPU_FREE(allowed);
    if (seen) {
        CPU_FREE(seen);
    }
    return count > 0 ? count : 1;
}

static int processors_allowed(void) {
    return count_processors(false);
}

/* The CPU quota of version 2: "quota period" or "max period" in one file. -1: none. */
static void read_quota(const char *path, long *quota, long *period) {
    FILE *file = fopen(path, "r");
    char line[96];
    if (file && fgets(line, sizeof line, file)) {
        char *end, *rest;
        *quota = strtol(line, &end, 10);
        *period = strtol(end, &rest, 10);
        if (end == line || rest == end) { /* "max" is not a number */
            *quota = -1;
        }
    }
    if (file) {
        (void)fclose(file);
    }
}

/* Lowers *limit to a cgroup's CPU quota in processors, rounded up, if it has one. */
static void limit_quota(void *arg, const char *folder, int version) {
    long *limit = arg, quota = -1, period = -1;
    char path[PATH_MAX + 128];
    if (version == 2) {
        (void)snprintf(path, sizeof path, "%s/cpu.max", folder);
        read_quota(path, &quota, &period);
    } else {
        (void)snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
        quota = read_number(path);
        (void)snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        period = read_number(path);
    }
    if (quota > 0 && period > 0) {
        long processors = quota / period + (quota % period != 0);
        *limit = processors < *limit ? processors : *limit;
    }
}

int threads_default(void) {
    long n = count_processors(true);
    cgroup_for_each("cpu", limit_quota, &n);
    return n > 1 ? (int)n : 1;
}

#else /* macOS and others */

static int processors_allowed(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > INT_MAX ? INT_MAX : (int)n;
}

int threads_default(void) {
    return processors_allowed();
}

#endif

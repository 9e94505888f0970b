/*
 * threads.c - see threads.h. One run of the pool is: the caller stores the function and raises the
 * run's number; the workers, who watch that number, call the function; the last one to finish
 * brings the count of unfinished workers to 0, which the caller watches.
 *
 * Both sides watch by spinning, a worker for longer than sampling takes between two steps, then
 * sleep until the number changes: in Linux's futex, elsewhere on a condition variable (glibc's
 * loses wake-ups before version 2.41, https://sourceware.org/bugzilla/show_bug.cgi?id=25847). Where
 * there are more threads than processors, spinning would take the processor from the very thread
 * that is waited for, so nobody spins.
 *
 * Linux likes to wake a thread on the processor of the one that wakes it, and may leave both there
 * for many milliseconds while another processor idles (in a virtual machine, where an idle
 * processor may look busy, perhaps more than elsewhere). So every thread says where it runs, and a
 * worker that meets another there moves away. The caller must not sleep until it did, or the worker
 * would wake it on its own new processor, and so on with every run: it yields the processor that it
 * shares. (bench/kernels_bench.c times the runs after a sleep.)
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

/* about 100 to 400 us, the pause instruction being 30 to 140 cycles long */
#define WORKER_SPINS 10000
#define CALLER_SPINS 2000
#define CALLER_YIELDS 1000 /* some 300 us more, if there is nobody to yield to */

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
    /* Apart from each other, so that watching the one does not slow down writing the other. */
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

/* Sleeps while a number has this value; may wake up early. */
static void sleep_while(struct threads *pool, atomic_uint *number, unsigned value) {
    (void)pool;
    (void)syscall(SYS_futex, number, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

/* Wakes whoever sleeps because of a number, which was changed before. */
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
 * affinity is restricted for a moment only: where it runs later is up to the system again. */
static void move_away(struct worker *worker) {
    struct threads *pool = worker->pool;
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all)) {
        return; /* more processors than a cpu_set_t has: then it is not worth the trouble either */
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

/* Are the caller and each worker on a processor of their own? Of two workers that meet, the later
 * one moves. */
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

/* The mutex is held from the last look at the number to the sleep, so that no wake-up is missed. */
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

/* Why no wake-up is missed: the sleeper first says that it sleeps, then looks at the number (the
 * last time in sleep_while); the waker first changes the number, then looks for sleepers. All of it
 * is sequentially consistent, so at least one of them sees the other's. */
static unsigned wait_for_run(struct threads *pool, unsigned seen) {
    unsigned run;
    for (int i = 0; pool->spins && i < WORKER_SPINS; i++) {
        run = atomic_load(&pool->run);
        if (run != seen) {
            return run;
        }
        pause_briefly();
    }
    (void)atomic_fetch_add(&pool->sleepers, 1);
    while ((run = atomic_load(&pool->run)) == seen) {
        sleep_while(pool, &pool->run, seen);
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

/* ---------------------------------------------------------------- begin and end */

/* Ends and frees a pool of which n_started workers run. */
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

/* The first whole number in a small file; -1 when there is none. */
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

/* The processors in this process's affinity mask; of the threads of one core only the first
 * (cores), or all of them. */
static int count_processors(bool cores) {
    cpu_set_t *allowed = NULL;
    size_t n = 1024, bytes;
    for (;; n *= 2) { /* the mask must be as large as the kernel's */
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
    /* A core is named by the first of its threads, allowed or not: thread_siblings_list reads
     * "0,64" or "0-1". */
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

/* A cgroup's CPU quota in processors, rounded up; LONG_MAX when there is none. Version 2: "quota
 * period" or "max period" in cpu.max; version 1: two files. */
static long cgroup_quota(const char *root, const char *group, bool version2) {
    char path[PATH_MAX + 64];
    long quota = -1, period = -1;
    if (version2) {
        (void)snprintf(path, sizeof path, "%s%s/cpu.max", root, group);
        FILE *file = fopen(path, "r");
        char line[96];
        if (file && fgets(line, sizeof line, file)) {
            char *end, *rest;
            quota = strtol(line, &end, 10);
            period = strtol(end, &rest, 10);
            if (end == line || rest == end) { /* "max" is no number */
                quota = -1;
            }
        }
        if (file) {
            (void)fclose(file);
        }
    } else {
        (void)snprintf(path, sizeof path, "%s%s/cpu.cfs_quota_us", root, group);
        quota = read_number(path);
        (void)snprintf(path, sizeof path, "%s%s/cpu.cfs_period_us", root, group);
        period = read_number(path);
    }
    return quota > 0 && period > 0 ? quota / period + (quota % period != 0) : LONG_MAX;
}

/* Is name one of the comma-separated controllers? */
static bool has_controller(const char *controllers, const char *name) {
    size_t n = strlen(name);
    for (const char *at = controllers; (at = strstr(at, name)); at += n) {
        if ((at == controllers || at[-1] == ',') && (at[n] == ',' || at[n] == '\0')) {
            return true;
        }
    }
    return false;
}

/* The least quota of this process's cgroups and all of their parents. */
static long quota_of_process(void) {
    long least = LONG_MAX;
    FILE *file = fopen("/proc/self/cgroup", "r"); /* lines of hierarchy:controllers:/path */
    if (!file) {
        return least;
    }
    char line[PATH_MAX];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        *group++ = '\0';
        controllers++;
        bool version2 = controllers[0] == '\0';
        if (!version2 && !has_controller(controllers, "cpu")) {
            continue;
        }
        for (;;) {
            long quota =
                cgroup_quota(version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu", group, version2);
            least = quota < least ? quota : least;
            char *slash = strrchr(group, '/');
            if (!slash) {
                break;
            }
            *slash = '\0';
        }
    }
    (void)fclose(file);
    return least;
}

int threads_default(void) {
    long n = count_processors(true), quota = quota_of_process();
    n = quota < n ? quota : n;
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

/*
 * test_threads.c - the thread pool: every part runs exactly once, with and without sleep between
 * runs; pools do not disturb each other; a worker that cannot be started leaves no others running.
 */
#include "base/threads.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <cmocka.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

#define MAX_THREADS 9

struct count {
    long calls[MAX_THREADS]; /* by part; only that part writes it */
    atomic_int wrong;
    int n;
};

static void count_call(void *arg, int i, int n) {
    struct count *count = arg;
    if (n != count->n || i < 0 || i >= n) {
        atomic_fetch_add(&count->wrong, 1);
        return;
    }
    count->calls[i]++;
}

static void sleep_ms(long ms) {
    const struct timespec time = {.tv_nsec = ms * 1000000};
    (void)nanosleep(&time, NULL);
}

static void check_runs(int n, long n_runs, long sleep_every) {
    struct count count = {.n = n};
    struct threads *pool = threads_create(n);
    assert_non_null(pool);
    assert_int_equal(threads_count(pool), n);
    for (long run = 1; run <= n_runs; run++) {
        threads_run(pool, count_call, &count);
        for (int i = 0; i < n; i++) { /* what a part wrote is visible after its run */
            assert_int_equal(count.calls[i], run);
        }
        if (sleep_every && run % sleep_every == 0) {
            sleep_ms(2);
        }
    }
    threads_destroy(pool);
    assert_int_equal(atomic_load(&count.wrong), 0);
}

static void test_every_part_once(void **state) {
    (void)state;
    for (int n = 1; n <= MAX_THREADS; n++) {
        check_runs(n, n <= 2 ? 20000 : 500, 0);
    }
}

static void test_runs_after_sleep(void **state) {
    (void)state;
    check_runs(1, 20, 1);
    check_runs(2, 60, 1);
    check_runs(3, 60, 2);
    check_runs(MAX_THREADS, 30, 1);
}

/* If a part takes long, the caller goes to sleep too. */
static void slow_part(void *arg, int i, int n) {
    if (i == n - 1) {
        sleep_ms(3);
    }
    count_call(arg, i, n);
}

static void test_slow_worker(void **state) {
    (void)state;
    struct count count = {.n = 2};
    struct threads *pool = threads_create(2);
    assert_non_null(pool);
    for (int run = 1; run <= 30; run++) {
        threads_run(pool, slow_part, &count);
        assert_int_equal(count.calls[0], run);
        assert_int_equal(count.calls[1], run);
    }
    threads_destroy(pool);
}

static void test_two_pools(void **state) {
    (void)state;
    struct count a = {.n = 2}, b = {.n = 3};
    struct threads *pool_a = threads_create(2), *pool_b = threads_create(3);
    assert_non_null(pool_a);
    assert_non_null(pool_b);
    for (int run = 1; run <= 200; run++) {
        threads_run(pool_a, count_call, &a);
        threads_run(pool_b, count_call, &b);
        assert_int_equal(a.calls[1], run);
        assert_int_equal(b.calls[2], run);
    }
    threads_destroy(pool_b);
    threads_destroy(pool_a);
}

static void test_create_and_destroy(void **state) {
    (void)state;
    assert_null(threads_create(0));
    assert_null(threads_create(-1));
    threads_destroy(NULL);
    for (int i = 0; i < 100; i++) { /* pools that never run */
        struct threads *pool = threads_create(1 + i % 4);
        assert_non_null(pool);
        threads_destroy(pool);
    }
}

/* With little address space left, there is no room for the stacks of 100 threads. */
static void test_create_fails(void **state) {
    (void)state;
#if defined(SANITIZED) || !defined(__linux__)
    skip();
#else
    struct rlimit before, tight;
    assert_int_equal(getrlimit(RLIMIT_AS, &before), 0);
    tight = before;
    tight.rlim_cur = (rlim_t)200 << 20;
    assert_int_equal(setrlimit(RLIMIT_AS, &tight), 0);
    void *more = mmap(NULL, 2 * tight.rlim_cur, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (more != MAP_FAILED) {
        (void)munmap(more, 2 * tight.rlim_cur);
        (void)setrlimit(RLIMIT_AS, &before);
        print_message("skipped: the limit of the address space has no effect here (qemu-user)\n");
        skip();
    }
    struct threads *pool = threads_create(100);
    (void)setrlimit(RLIMIT_AS, &before);
    assert_null(pool);
    check_runs(2, 10, 0);
#endif
}

static void test_default(void **state) {
    (void)state;
    int n = threads_default();
    assert_in_range(n, 1, 4096);
#ifdef __linux__
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    assert_true(n <= CPU_COUNT(&before));
    size_t first = 0;
    while (!CPU_ISSET(first, &before)) {
        first++;
    }
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    assert_int_equal(threads_default(), 1);
    check_runs(2, 50, 0); /* more threads than processors: none of them spins */
    assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_part_once),
        cmocka_unit_test(test_runs_after_sleep),
        cmocka_unit_test(test_slow_worker),
        cmocka_unit_test(test_two_pools),
        cmocka_unit_test(test_create_and_destroy),
        cmocka_unit_test(test_create_fails),
        cmocka_unit_test(test_default),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/*
 * threads.h - a small thread pool: fork, run the same function on every thread, join.
 *
 * The workers wait by spinning for a short time and then sleeping. So the pool is fast between the
 * ops of a forward pass and costs nothing between two prompts.
 */
#ifndef BPO_BASE_THREADS_H
#define BPO_BASE_THREADS_H

struct threads;

/* Called once on each thread of a run, for part i of n, 0 <= i < n. It divides the work itself. */
typedef void threads_fn(void *arg, int i, int n);

/* A pool of n >= 1 threads: the caller's and n - 1 others, which are started. NULL if that
 * fails. */
struct threads *threads_create(int n);
void threads_destroy(struct threads *pool);
int threads_count(const struct threads *pool);

/* Runs fn(arg, i, n) for i = 0 .. n - 1 in parallel, i = 0 on the calling thread. Returns when all
 * are done. */
void threads_run(struct threads *pool, threads_fn *fn, void *arg);

/* The number of physical cores that this process may use: those of its affinity mask, and at most
 * its cgroups' CPU quota, rounded up. At least 1. */
int threads_default(void);

#endif

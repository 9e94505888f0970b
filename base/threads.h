/*
 * threads.h - a small thread pool: fork, run the same function on every thread, join.
 *
 * The workers wait by spinning briefly and then sleeping, so that the pool is fast between the ops
 * of a forward pass and costs nothing between two prompts.
 */
#ifndef BPO_THREADS_H
#define BPO_THREADS_H

struct threads;

/* Called once on each thread of a run: part i of n, 0 <= i < n. The work is divided by the
 * callee. */
typedef void threads_fn(void *arg, int i, int n);

/* A pool of n >= 1 threads, the caller's own among them (n - 1 are started). NULL when that is
 * impossible. */
struct threads *threads_create(int n);
void threads_destroy(struct threads *pool);
int threads_count(const struct threads *pool);

/* Runs fn(arg, i, n) for i = 0 .. n - 1 in parallel, i = 0 on the calling thread; returns when all
 * are done. */
void threads_run(struct threads *pool, threads_fn *fn, void *arg);

/* The physical cores that this process may use: its affinity mask without the second threads of a
 * core, and at most its cgroup's CPU quota rounded up; at least 1. */
int threads_default(void);

#endif

/*
 * peaks.h - the limits of this machine: how fast it reads memory, how fast it does fp32
 * multiply-adds, and how far apart its cores are. kernels_bench.c and bpo_worker.c measure them
 * beside what they time.
 */
#ifndef BPO_BENCH_PEAKS_H
#define BPO_BENCH_PEAKS_H

#include <stddef.h>

#include "base/threads.h"

enum { PEAK_PATTERNS = 12, PEAK_LEVELS = 3 };

/* What a pattern reads of larger data at a time: several times the size of the caches. */
#define PEAK_WINDOW_BYTES ((size_t)256 << 20)

struct peaks;

/* The bytes to read are weights of n_bytes, whose matrices have rows of row_bytes. Makes a copy of
 * at most PEAK_WINDOW_BYTES in huge pages; NULL if there is not enough memory. The caller owns pool
 * and data, which must outlive the peaks. */
struct peaks *peaks_create(struct threads *pool, const void *data, size_t n_bytes,
                           size_t row_bytes);
void peaks_destroy(struct peaks *p);

/* Reads once in each pattern; GB/s. */
void peaks_read(struct peaks *p, double gb_s[PEAK_PATTERNS]);
const char *peaks_pattern_name(int i);

/* fp32 multiply-adds between registers, on all threads, for each level of this CPU, the widest
 * first; GFLOP/s. */
void peaks_fma(struct peaks *p, double gflop_s[PEAK_LEVELS]);

/* The time for two threads to increment a number in turn, once each; ns, 0 with a single thread.
 * Cores of one complex, which share a cache, take a quarter of the time that others take, and they
 * read memory through one port instead of two. In a virtual machine this may change by the
 * minute. */
double peaks_round_trip(struct peaks *p);

int peaks_n_levels(const struct peaks *p);
const char *peaks_level_name(const struct peaks *p, int i);

#endif

/*
 * peaks.h - what this machine can do: how fast memory is read, and fp32 numbers are multiplied and
 * added; and how far apart its cores are. The limits that kernels_bench.c and bpo_worker.c measure
 * next to what they time.
 */
#ifndef BPO_BENCH_PEAKS_H
#define BPO_BENCH_PEAKS_H

#include <stddef.h>

#include "base/threads.h"

enum { PEAK_PATTERNS = 12, PEAK_LEVELS = 3 };

#define PEAK_WINDOW_BYTES                                                                          \
    ((size_t)256                                                                                   \
     << 20) /* that a pattern reads in one go, of larger data: several times the caches */

struct peaks;

/* Weights of n_bytes whose matrices have rows of row_bytes: their bytes are what is read. NULL: not
 * enough memory (a copy in huge pages, of PEAK_WINDOW_BYTES at most, is made). pool and data are
 * the caller's and must outlive the peaks. */
struct peaks *peaks_create(struct threads *pool, const void *data, size_t n_bytes,
                           size_t row_bytes);
void peaks_destroy(struct peaks *p);

/* Reads in each pattern once; GB/s. */
void peaks_read(struct peaks *p, double gb_s[PEAK_PATTERNS]);
const char *peaks_pattern_name(int i);

/* fp32 multiply-adds between registers on all threads, for each level of this CPU, the widest
 * first; GFLOP/s. */
void peaks_fma(struct peaks *p, double gflop_s[PEAK_LEVELS]);
/* A number that two threads raise in turn, there and back; ns, 0 with one thread. Cores of one
 * complex (that share a cache) take a quarter of the time of others, and read memory through one
 * port instead of two: in a virtual machine it may change by the minute. */
double peaks_round_trip(struct peaks *p);

int peaks_n_levels(const struct peaks *p);
const char *peaks_level_name(const struct peaks *p, int i);

#endif

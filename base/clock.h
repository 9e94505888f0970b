/*
 * clock.h - the time, for measuring.
 */
#ifndef BPO_CLOCK_H
#define BPO_CLOCK_H

#include <time.h>

/* Seconds since some moment in the past, of a clock that nobody sets. */
static inline double seconds_now(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif

/*
 * random_values.h - random numbers for tests, and memory to put them into. The generator starts
 * with the same state in every program, so that a failure repeats; a test that sets random_state
 * repeats its numbers.
 */
#ifndef BPO_RANDOM_VALUES_H
#define BPO_RANDOM_VALUES_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

static uint64_t random_state = 1;

static inline uint64_t random_bits(void) { /* xorshift64*: Vigna 2016 */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1dULL;
}

/* Uniform in [0, 1). */
static inline double random_unit(void) {
    return (double)(random_bits() >> 11) * 0x1p-53;
}

/* Roughly normal, with standard deviation 1: the sum of 12 uniform numbers, less 6. */
static inline float random_normal(void) {
    double sum = -6;
    for (int i = 0; i < 12; i++) {
        sum += random_unit();
    }
    return (float)sum;
}

/* Uniform in 0 .. n - 1. */
static inline size_t random_below(size_t n) {
    return (size_t)(random_bits() >> 11) % n;
}

/* malloc that fails the test instead of returning NULL. */
static inline void *must_alloc(size_t n_bytes) {
    void *data = malloc(n_bytes ? n_bytes : 1);
    assert_non_null(data);
    return data;
}

/* n normal values, times scale; to be freed by the caller. */
static inline float *random_floats(size_t n, float scale) {
    float *x = must_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = scale * random_normal();
    }
    return x;
}

#endif

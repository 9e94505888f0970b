/*
 * failing_alloc.h - makes one allocation fail: include it, and then the .c files whose calls of
 * malloc, calloc and realloc are to fail; `#undef` the three after them. System headers that
 * declare these functions must come before it.
 */
#ifndef BPO_FAILING_ALLOC_H
#define BPO_FAILING_ALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

static long countdown; /* the countdown-th call from here fails; 0: none does */

/* True if the call that asks is the one to fail. */
static bool fault(void) {
    return countdown > 0 && --countdown == 0;
}

static void *failing_malloc(size_t n) {
    return fault() ? NULL : malloc(n);
}

static void *failing_calloc(size_t n, size_t size) {
    return fault() ? NULL : calloc(n, size);
}

static void *failing_realloc(void *data, size_t n) {
    return fault() ? NULL : realloc(data, n);
}

#define malloc failing_malloc
#define calloc failing_calloc
#define realloc failing_realloc

#endif

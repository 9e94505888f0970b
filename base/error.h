/*
 * error.h - how a function fails. The codes and struct bpo_error are public: see bpo_error.h.
 *
 * A function that can fail returns 0 or a negative enum bpo_code (or NULL) and fills the caller's
 * struct bpo_error. Where nothing has to be freed it returns at the first failure. Where something
 * has to be freed, the calls stand one below the other,
 *
 *     int failed = first(err);
 *     failed = failed ? failed : second(err);
 *     failed = failed ? failed : third(err);
 *     free(what);
 *     return failed;
 *
 * so that a call runs only if those above it succeeded, the first failure is the one that is
 * reported, and there is a single way out, which frees everything.
 */
#ifndef BPO_BASE_ERROR_H
#define BPO_BASE_ERROR_H

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include "bpo_error.h"

/* Fills *err (which may be NULL) with a code, a hint (NULL: the usual one for the code, if there is
 * one) and a printf-formatted message. Returns the code. */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static inline int
bpo_fail(struct bpo_error *err, int code, const char *hint, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        (void)vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
        const char *usual =
            code == BPO_ERR_RESOURCE
                ? "close other programs, or ask for less: a shorter prompt, fewer samples"
                : "";
        (void)snprintf(err->hint, sizeof err->hint, "%s", hint ? hint : usual);
        err->code = code;
    }
    return code;
}

/* "out of memory: N bytes for WHAT"; returns BPO_ERR_RESOURCE. */
static inline int out_of_memory(struct bpo_error *err, const char *what, size_t n_bytes) {
    return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory: %zu bytes for %s", n_bytes, what);
}

#endif

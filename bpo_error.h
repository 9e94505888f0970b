/*
 * bpo_error.h - how a function says that it failed.
 *
 * Functions that can fail return 0 or a negative code (or NULL) and fill the caller's struct
 * bpo_error. Nothing below main.c prints or exits. The codes are the negated exit codes of the
 * command line.
 */
#ifndef BPO_ERROR_H
#define BPO_ERROR_H

#include <stdarg.h>
#include <stdio.h>

enum bpo_code {
    BPO_OK = 0,
    /* failed while running: output could not be written, non-finite logits, ... */
    BPO_ERR_RUN = -1,
    BPO_ERR_USAGE = -2,    /* an option or argument is out of range */
    BPO_ERR_MODEL = -3,    /* the model or tokenizer file */
    BPO_ERR_INPUT = -4,    /* the prompt */
    BPO_ERR_RESOURCE = -5, /* not enough memory, no such device */
};

/* What failed, on what, expected and found; and what to do next. Texts are cut at the buffers'
 * ends, never overrun. */
struct bpo_error {
    int code;
    char message[768];
    char hint[512];
};

/* Fills *err (which may be NULL) with a code, a hint (NULL: the usual one, if there is one) and a
 * printf-formatted message; returns the code. */
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

#endif

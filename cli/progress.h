/*
 * progress.h - what the user sees on stderr while a data set is processed.
 */
#ifndef BPO_PROGRESS_H
#define BPO_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct progress {
    bool terminal;       /* stderr is one */
    double begun, shown; /* times, in seconds */
    /* bytes of the input: in all (0: unknown), where this run began, and written so far */
    uint64_t input_bytes, first_offset, offset;
    uint64_t n_resumed, n_written, n_failed, n_tokens;
};

/* Begins to count at an offset of the input. */
void progress_begin(struct progress *p, uint64_t offset);

/* Shows a moving bar on a terminal; elsewhere prints a line after ten seconds and then every
 * minute. */
void progress_show(struct progress *p);

/* Removes the bar from the terminal. */
void progress_clear(const struct progress *p);

/* "5 records in 12 min 05 s: ..." */
void progress_summary(const struct progress *p);

#endif

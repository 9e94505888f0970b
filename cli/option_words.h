/*
 * option_words.h - the library's words for a setting, and the command line's.
 *
 * The library's messages and hints name the fields and functions of bpo.h, because the library
 * knows nothing of a command line: "lower n_positions", "check the file with bpo_model_verify".
 * Before the command line prints such a text, it puts its own words in: "lower --context", "check
 * the file with --verify". The table is in option_words.c.
 */
#ifndef BPO_OPTION_WORDS_H
#define BPO_OPTION_WORDS_H

#include <stddef.h>

#include "bpo_error.h"

/* Replaces the library's words in a text [n_bytes] by the command line's; what no longer fits is
 * cut off. Words that are plain English too (device, ids, ...) stay. Translating a text twice does
 * no harm. */
void option_words(char *text, size_t n_bytes);

/* The same for an error's message and hint. A hint says what to do, so there a plain word means the
 * field, unless it follows an article ("the ids"); a message may say "No space left on device", so
 * there it does not. */
void option_words_in_error(struct bpo_error *err);

#endif

/*
 * option_words.h - the library's words for a setting, and the command line's.
 *
 * The library's messages and hints name the fields and functions of bpo.h, because its callers know
 * nothing of a command line: "lower n_positions", "check the file with bpo_model_verify". Before the
 * command line prints such a text, it puts its own words in: "lower --context", "check the file with
 * --verify". The table is in option_words.c.
 */
#ifndef BPO_OPTION_WORDS_H
#define BPO_OPTION_WORDS_H

#include <stddef.h>

#include "bpo_error.h"

/* Replaces, in a text of fewer than n_bytes bytes, the library's words by the command line's; what
 * no longer fits is cut off. Words that are also plain English (device, ids, ...) stay as they are
 * here: see option_words_in_error. A text that has been translated does not change again. */
void option_words(char *text, size_t n_bytes);

/* The same for an error's message and hint. A hint says what to do, so plain words are taken for
 * fields there; a message may speak of "No space left on device", so they are not. */
void option_words_in_error(struct bpo_error *err);

#endif

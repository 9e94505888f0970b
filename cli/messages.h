/*
 * messages.h - what the command line tells the user on stderr, in its own words: texts of the
 * library are translated on the way (see option_words.h).
 */
#ifndef BPO_MESSAGES_H
#define BPO_MESSAGES_H

#include "bpo_error.h"

void print_note(const char *text);
void print_warning(const char *text);

/* Prints an error and its hint. Returns the exit code. */
int print_error(const struct bpo_error *err);

#endif

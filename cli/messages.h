/*
 * messages.h - what the command line tells the user on stderr, in its own words: texts of the
 * library are translated on the way (see option_words.h).
 */
#ifndef BPO_MESSAGES_H
#define BPO_MESSAGES_H

#include "bpo_error.h"

void report_note(const char *text);
void report_warning(const char *text);

/* Prints an error and its hint. Returns the exit code. */
int report_error(const struct bpo_error *err);

#endif

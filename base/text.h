/*
 * text.h - bytes of text: a growing buffer, UTF-8, white space.
 */
#ifndef BPO_TEXT_H
#define BPO_TEXT_H

#include <stddef.h>

#include "base/error.h"

/* n bytes at data, followed by a NUL. Initialise it with zeros, and free data at the end. */
struct text {
    char *data;
    size_t n, capacity;
};
int text_append(struct text *t, const char *bytes, size_t n, struct bpo_error *err);

/* Finds [*begin, *end), the text without the white space at its ends, like Python's str.strip(). */
void text_strip(const char *text, size_t n, size_t *begin, size_t *end);

/* The length of the character at the start of s[0, n), n >= 1: 1 to 4 bytes; 0 if s may be the
 * beginning of a character that continues after it; -1 if no character begins so. */
int utf8_character(const char *s, size_t n);

/* The offset of the first byte that is not part of well-formed UTF-8, or n. */
size_t utf8_valid_prefix(const char *text, size_t n);

#endif

/*
 * text.h - bytes of text: a text that grows, UTF-8, white space.
 */
#ifndef BPO_TEXT_H
#define BPO_TEXT_H

#include <stddef.h>

#include "base/error.h"

/* n bytes at data (NUL-terminated behind the n), malloc'ed. Zero-initialise it; free data at the
 * end. */
struct text {
    char *data;
    size_t n, capacity;
};
int text_append(struct text *t, const char *bytes, size_t n, struct bpo_error *err);

/* [*begin, *end) of a text without the white space at its ends, as Python's str.strip(). */
void text_strip(const char *text, size_t n, size_t *begin, size_t *end);

/* Bytes of the character at the start of s, 1 to 4; 0 if s may be the beginning of one; -1 if it is
 * none. n >= 1 */
int utf8_character(const char *s, size_t n);

/* The offset of the first byte that is not part of well-formed UTF-8, or n. */
size_t utf8_valid_prefix(const char *text, size_t n);

#endif

/*
 * text.c - see text.h.
 */
#include "base/text.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---- growing text ---- */

int text_append(struct text *t, const char *bytes, size_t n, struct bpo_error *err) {
    if (n >= SIZE_MAX - t->n) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                        "a text of more than %zu bytes does not fit into memory", t->n);
    }
    size_t needed = t->n + n + 1;
    if (needed > t->capacity) {
        size_t capacity = t->capacity > SIZE_MAX / 2 ? needed : 2 * t->capacity;
        if (capacity < needed) {
            capacity = needed < 64 ? 64 : needed;
        }
        char *data = realloc(t->data, capacity);
        if (!data) {
            return bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                            "not enough memory for a text of %zu bytes", needed);
        }
        t->data = data;
        t->capacity = capacity;
    }
    if (n > 0) {
        memcpy(t->data + t->n, bytes, n);
    }
    t->n += n;
    t->data[t->n] = '\0';
    return 0;
}

/* ---- UTF-8: Unicode 15, table 3-7; no overlong forms, no surrogates, nothing above U+10FFFF */

int utf8_character(const char *text, size_t n) {
    const uint8_t *s = (const uint8_t *)text;
    uint8_t lead = s[0];
    if (lead < 0x80) {
        return 1;
    }
    if (lead < 0xC2 || lead > 0xF4) {
        return -1;
    }
    int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    /* Only the second byte's range depends on the first. */
    uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == n) {
            return 0;
        }
        if (s[i] < low || s[i] > high) {
            return -1;
        }
        low = 0x80;
        high = 0xBF;
    }
    return length;
}

size_t utf8_valid_prefix(const char *text, size_t n) {
    size_t i = 0;
    while (i < n) {
        int length = utf8_character(text + i, n - i);
        if (length <= 0) {
            break;
        }
        i += (size_t)length;
    }
    return i;
}

/* ---- white space ---- */

/* The length in bytes of the white space character (as in Python's str.isspace) at s, or 0. */
static size_t space_at(const char *s, size_t n) {
    const unsigned char *b = (const unsigned char *)s;
    if (n >= 1 && ((b[0] >= 9 && b[0] <= 13) || (b[0] >= 28 && b[0] <= 32))) {
        return 1;
    }
    if (n >= 2 && b[0] == 0xC2 && (b[1] == 0x85 || b[1] == 0xA0)) {
        return 2; /* U+0085, U+00A0 */
    }
    if (n < 3) {
        return 0;
    }
    unsigned c = (unsigned)b[0] << 16 | (unsigned)b[1] << 8 | b[2];
    /* U+1680, U+2000-200A, U+2028, U+2029, U+202F, U+205F, U+3000 */
    bool space = c == 0xE19A80 || (c >= 0xE28080 && c <= 0xE2808A) || c == 0xE280A8 ||
                 c == 0xE280A9 || c == 0xE280AF || c == 0xE2819F || c == 0xE38080;
    return space ? 3 : 0;
}

void text_strip(const char *text, size_t n, size_t *begin, size_t *end) {
    size_t space;
    *begin = 0;
    while ((space = space_at(text + *begin, n - *begin)) > 0) {
        *begin += space;
    }
    *end = n;
    for (space = 1; space > 0;) {
        for (space = 3; space > 0; space--) {
            if (*end >= *begin + space && space_at(text + *end - space, space) == space) {
                *end -= space;
                break;
            }
        }
    }
}

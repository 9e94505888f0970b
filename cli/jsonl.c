/*
 * jsonl.c - see jsonl.h.
 */
#include "cli/jsonl.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

enum { READ_BYTES = 1 << 16 }; /* requested from the system at once */

/* ---------------------------------------------------------------- lines */

/* Makes room for the next read. Bytes that were handed out are dropped first. */
static int reader_room(struct reader *r, struct bpo_error *err) {
    if (r->data && r->begin > 0) {
        memmove(r->data, r->data + r->begin, r->end - r->begin);
        r->scanned -= r->begin;
        r->end -= r->begin;
        r->begin = 0;
    }
    if (r->capacity - r->end >= READ_BYTES) {
        return 0;
    }
    size_t capacity = 2 * r->capacity + READ_BYTES;
    char *grown = realloc(r->data, capacity);
    if (!grown) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                        "out of memory: a line of %s has more than %zu bytes", r->name, r->end);
    }
    r->data = grown;
    r->capacity = capacity;
    return 0;
}

/* Reads once. With wait, until something or a signal arrives; otherwise only what is there now. */
static int reader_read(struct reader *r, bool wait, struct bpo_error *err) {
    struct pollfd ready = {.fd = r->fd, .events = POLLIN};
    for (;;) {
        /* Not forever: a signal that arrives just before poll would be noticed only with the next
         * line. */
        int n = poll(&ready, 1, wait ? 1000 : 0);
        if (*r->signalled || (n == 0 && !wait)) {
            return GOT_NOTHING;
        }
        if (n > 0) {
            break;
        }
    }
    int failed = reader_room(r, err);
    if (failed) {
        return failed;
    }
    ssize_t n = read(r->fd, r->data + r->end, READ_BYTES);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        return GOT_NOTHING;
    }
    if (n < 0) {
        return bpo_fail(err, BPO_ERR_INPUT, "is it a readable file?", "cannot read %s: %s", r->name,
                        strerror(errno));
    }
    r->end += (size_t)n;
    r->at_end = n == 0;
    return GOT_LINE;
}

int reader_line(struct reader *r, bool wait, struct line *line, struct bpo_error *err) {
    for (;;) {
        const char *end = NULL;
        if (r->data && r->scanned < r->end) {
            end = memchr(r->data + r->scanned, '\n', r->end - r->scanned);
        }
        r->scanned = r->end;
        if (r->data && (end || (r->at_end && r->end > r->begin))) {
            size_t n = end ? (size_t)(end - r->data) - r->begin : r->end - r->begin;
            *line = (struct line){.text = r->data + r->begin, .n = n, .whole = end != NULL};
            n += line->whole;
            r->begin += n;
            r->offset += n;
            r->scanned = r->begin;
            return GOT_LINE;
        }
        if (r->at_end) {
            return GOT_END;
        }
        int got = reader_read(r, wait, err);
        if (got < 0 || (got == GOT_NOTHING && (!wait || *r->signalled))) {
            return got;
        }
    }
}

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\r';
}

bool line_is_blank(const struct line *line) {
    size_t n = 0;
    while (n < line->n && is_space(line->text[n])) {
        n++;
    }
    return n == line->n;
}

uint64_t line_hash(const char *line, size_t n) {
    return XXH3_64bits(line, n);
}

/* ---------------------------------------------------------------- parsing */

/* When memory is short, jansson's error blames the text ("string expected"), so a failed allocation
 * is noted here. */
static bool json_starved;

static void *json_malloc(size_t n) {
    void *data = malloc(n);
    json_starved = json_starved || !data;
    return data;
}

void json_watch_memory(void) {
    json_set_alloc_funcs(json_malloc, free);
}

bool json_out_of_memory(void) {
    return json_starved;
}

/*
 * jansson rejects numbers that do not fit into a 64-bit integer or a double, but the values of a
 * line's numbers do not matter here. This parses a copy of the line without the digits that make a
 * number too large; the copy is valid JSON if, and only if, the line is.
 */
static json_t *parse_large_numbers(const char *line, size_t n, json_error_t *why) {
    char *copy = malloc(n);
    size_t n_copy = 0, n_digits = 0, max_digits = 15;
    bool in_string = false;
    for (size_t i = 0; copy && i < n; i++) {
        char c = line[i];
        if (!in_string && c >= '0' && c <= '9') {
            if (++n_digits > max_digits) {
                continue;
            }
        } else {
            /* An exponent, which may have a sign, keeps two digits. */
            bool in_exponent = c == 'e' || c == 'E' || (max_digits == 2 && (c == '+' || c == '-'));
            max_digits = in_exponent ? 2 : 15;
            n_digits = 0;
            in_string = in_string != (c == '"');
        }
        copy[n_copy++] = c;
        if (in_string && c == '\\' && i + 1 < n) {
            copy[n_copy++] = line[++i];
        }
    }
    json_t *value = copy ? json_loadb(copy, n_copy, JSON_ALLOW_NUL, why) : NULL;
    json_starved = json_starved || !copy;
    free(copy);
    return value;
}

json_t *json_parse_line(const char *line, size_t n, struct bpo_error *err) {
    const char *hint = "each line of a data set is one JSON object";
    json_error_t why = {.text = ""};
    json_starved = false;
    json_t *value = json_loadb(line, n, JSON_ALLOW_NUL, &why);
    if (!value && json_error_code(&why) == json_error_numeric_overflow) {
        value = parse_large_numbers(line, n, &why);
    }
    if (json_is_object(value)) {
        return value;
    }
    if (value) { /* json_loadb accepts objects and lists */
        (void)bpo_fail(err, BPO_ERR_INPUT, hint, "not a JSON object, but a list");
    } else if (json_starved) {
        (void)no_memory_for(err, "a line's JSON");
    } else if (n == 0) {
        (void)bpo_fail(err, BPO_ERR_INPUT, hint, "not a JSON object: the line is blank");
    } else {
        (void)bpo_fail(err, BPO_ERR_INPUT, hint, "not a JSON object: %s", why.text);
    }
    json_decref(value);
    return NULL;
}

/* ---------------------------------------------------------------- values as written */

/* In valid JSON: the offset after the string, after the white space, after the value that begins at
 * s[i]. */
static size_t string_end(const char *s, size_t i) {
    for (i++; s[i] != '"'; i++) {
        i += s[i] == '\\';
    }
    return i + 1;
}

static size_t space_end(const char *s, size_t i) {
    while (is_space(s[i])) {
        i++;
    }
    return i;
}

static size_t value_end(const char *s, size_t i) {
    size_t depth = 0;
    if (s[i] != '"' && s[i] != '{' && s[i] != '[') { /* a number, true, false, null */
        while (!strchr(",}] \t\r", s[i])) {
            i++;
        }
        return i;
    }
    do {
        if (s[i] == '"') {
            i = string_end(s, i);
        } else {
            depth += s[i] == '{' || s[i] == '[';
            depth -= s[i] == '}' || s[i] == ']';
            i++;
        }
    } while (depth > 0);
    return i;
}

/* Whether a key, as written with its quotes, is this name. */
static bool is_key(const char *key, size_t n, const char *name) {
    if (!memchr(key, '\\', n)) {
        return n == strlen(name) + 2 && memcmp(key + 1, name, n - 2) == 0;
    }
    json_t *decoded = json_loadb(key, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    bool same = json_string_length(decoded) == strlen(name) &&
                strcmp(json_string_value(decoded), name) == 0;
    json_decref(decoded);
    return same;
}

bool json_find_member(const char *line, const char *name, const char **value, size_t *n_value) {
    const char *s = line;
    bool found = false;
    for (size_t i = space_end(s, space_end(s, 0) + 1); s[i] != '}';) {
        size_t key = i, key_end = string_end(s, i);
        size_t begin = space_end(s, space_end(s, key_end) + 1), end = value_end(s, begin);
        if (is_key(s + key, key_end - key, name)) {
            *value = s + begin;
            *n_value = end - begin;
            found = true;
        }
        i = space_end(s, end);
        i = s[i] == ',' ? space_end(s, i + 1) : i;
    }
    return found;
}

/* ---------------------------------------------------------------- writing */

static int append_bytes(const char *bytes, size_t n, void *text) {
    return text_append(text, bytes, n, NULL);
}

int json_append_members(struct text *out, json_t *object, struct bpo_error *err) {
    size_t at = out->n;
    bool fine = object && json_dump_callback(object, append_bytes, out, 0) == 0;
    json_decref(object);
    if (!fine) {
        return no_memory_for(err, "a record");
    }
    memmove(out->data + at, out->data + at + 1, out->n - at - 1); /* its opening brace */
    out->n -= 2;                                                  /* and its closing one */
    return 0;
}

json_t *json_valid_prefix(const char *text) {
    return json_stringn(text, utf8_valid_prefix(text, strlen(text)));
}

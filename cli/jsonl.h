/*
 * jsonl.h - JSON Lines: whole lines from a file or a pipe, each parsed by jansson, and values and
 * new members as bytes, so that what is not ours stays as it was written.
 */
#ifndef BPO_JSONL_H
#define BPO_JSONL_H

#include <jansson.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/text.h"

/* "out of memory for WHAT", where the number of bytes is not known. Returns BPO_ERR_RESOURCE. */
static inline int no_memory_for(struct bpo_error *err, const char *what) {
    return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for %s", what);
}

/* ---- lines ---- */

/* n bytes without the line's end, in the reader's buffer: valid until it reads on. */
struct line {
    const char *text;
    size_t n;
    bool whole; /* the line's end was there: only the last line of a file may lack it */
};

/* Set fd, name and signalled, and the rest to zero; free data at the end. */
struct reader {
    int fd;
    const char *name;                       /* for messages */
    const volatile sig_atomic_t *signalled; /* not 0: stop waiting */
    /* [capacity] bytes that were read: [begin, end) are not yet handed out, and [begin, scanned)
     * have no LF */
    char *data;
    size_t begin, scanned, end, capacity;
    uint64_t offset; /* of data[begin] in the file */
    bool at_end;
};

enum reading { GOT_END, GOT_LINE, GOT_NOTHING };

/* Reads the next line. Returns an enum reading or a negative error code. GOT_NOTHING: the next line
 * has not arrived yet, and wait is false; or a signal arrived. */
int reader_line(struct reader *r, bool wait, struct line *line, struct bpo_error *err);

/* True if the line consists of white space. */
bool line_is_blank(const struct line *line);

/* XXH3-64 of a line's bytes. */
uint64_t line_hash(const char *line, size_t n);

/* ---- JSON ---- */

/* Makes jansson report to this module that memory ran out. Call it once, before the rest. */
void json_watch_memory(void);

/* True if an allocation of jansson's has failed since the last json_parse_line. */
bool json_out_of_memory(void);

/* Parses a line as a JSON object. NULL with BPO_ERR_INPUT and the reason, or with BPO_ERR_RESOURCE,
 * for which the line is not to blame. */
json_t *json_parse_line(const char *line, size_t n, struct bpo_error *err);

/* Finds the value of a member as it is written in a line that is known to be a JSON object. Of
 * several with this name it is the last one, as in jansson. */
bool json_find_member(const char *line, const char *name, const char **value, size_t *n_value);

/* Appends an object's members, without braces around them. Takes over the object, which may be
 * NULL: then memory has run out. */
int json_append_members(struct text *out, json_t *object, struct bpo_error *err);

/* A JSON string of the longest prefix that is UTF-8. */
json_t *json_valid_prefix(const char *text);

#endif

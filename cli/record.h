/*
 * record.h - one line of a data set: its prompt, name and seed; and its line of the output, which
 * is the same bytes with the rewrite spliced in, or an error.
 */
#ifndef BPO_RECORD_H
#define BPO_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/text.h"
#include "bpo.h"

/* What all records of a run have in common. */
struct record_run {
    const char *field, *output_field; /* the members that hold the prompt and the rewrite */
    int32_t n_samples;
    uint64_t seed;
    char id[17]; /* a hash of model, options and seed, in hex; "" until it is known */
};

/* One sample of a record. */
struct rewrite {
    char *text;
    size_t n_text;
    int32_t new_tokens;
    enum bpo_stop stop;
    bool unchanged;
};

struct record {
    char *line; /* NUL-terminated */
    size_t n_line;
    uint64_t number;    /* of the line, from 1 */
    uint64_t input_end; /* the offset in the input after the line */
    bool is_object;     /* the line is a JSON object */
    char *prompt;
    size_t n_prompt;
    uint64_t seed;
    int32_t *forced; /* [n_forced] ids that replace those that are drawn */
    size_t n_forced;
    struct rewrite *rewrites; /* [n_samples] */
    int32_t n_done, prompt_tokens;
    struct bpo_error error; /* its code is not 0 if the record has failed */
    struct text out;        /* the output line, once complete */
    bool submitted, complete;
    struct record *next;
};

/* A record of a copy of a line; NULL if memory has run out. */
struct record *record_new(const char *line, size_t n, struct bpo_error *err);
void record_free(struct record *r, int32_t n_samples);

/* Parses the line. What is wrong with it is r->error: BPO_ERR_INPUT, or BPO_ERR_RESOURCE, for which
 * the line is not to blame. Returns true if the line already has a member that the output would
 * get, as the lines of an output do. */
bool record_parse(struct record *r, const struct record_run *run);

/* The seed of a record with this name; see record.c. */
uint64_t record_seed(uint64_t run_seed, const char *name, size_t n);

/* Keeps the result of one sample that is done, and counts it in r->n_done. */
int record_take_sample(struct record *r, const struct bpo_event *e, struct bpo_error *err);

/* Makes the output line of a record that is done or has failed. */
int record_complete(struct record *r, const struct record_run *run, struct bpo_error *err);

/* Whether an output line was made of an input line: an error by the hash of its input (input_hash),
 * any other, for which input_hash is NULL, byte for byte around what was spliced in. */
bool record_is_of(const char *out, size_t n_out, const char *in, size_t n_in,
                  const char *input_hash);

#endif

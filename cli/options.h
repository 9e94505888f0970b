/*
 * options.h - the command line's options: the table of all of them, parsed and checked.
 */
#ifndef BPO_OPTIONS_H
#define BPO_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bpo.h"

/* What the command line says. A negative number or NULL means that it does not say. */
struct options {
    const char *model, *prompt, *file, *tokens, *dump_logits;
    const char *input, *output, *field, *output_field, *shard; /* of a data set */
    int mode, device, matmul;                                  /* as in bpo.h's enums */
    double temperature, top_p;
    int64_t n_samples, top_k, max_new_tokens, seed, n_threads, context, lookup, parallel;
    bool no_cache, json, stats, quiet, greedy, info, verify, tokenize, raw, help, version;
    bool resume, allow_errors, demo, numbered;
};

/* Parses and checks main's arguments. BPO_ERR_USAGE names the option that is wrong. The strings
 * are argv's. */
int options_parse(struct options *o, int argc, char **argv, struct bpo_error *err);

/* Prints --help. */
void options_print_help(void);

/* Parses "1,518, 25580", with or without brackets (--tokenize prints them), to a malloc'ed array,
 * which the caller frees on failure too. what names the option or variable that holds the text. */
int parse_ids(int32_t **ids, size_t *n_ids, const char *text, const char *what,
              struct bpo_error *err);

/* Parses --shard's "I/N"; NULL is 0 of 1. */
int parse_shard(const char *text, int64_t *shard, int64_t *n_shards, struct bpo_error *err);

/* The request that the options describe, but for its prompt: the model's defaults for the mode, and
 * a random seed unless one is given or the sampling is greedy. */
int options_request(struct bpo_request *request, const struct options *o,
                    const struct bpo_model *model, struct bpo_error *err);

/* The session's options, but for n_slots and progress. */
void options_session(struct bpo_session_options *session, const struct options *o);

#endif

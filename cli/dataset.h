/*
 * dataset.h - a data set: JSON Lines in, the same lines with their rewrites out; resumable,
 * reproducible, many prompts at once. It is part of the command line and uses bpo.h's step engine.
 */
#ifndef BPO_DATASET_H
#define BPO_DATASET_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "bpo.h"

struct dataset;

struct dataset_options {
    const char *input, *output;       /* "-": standard input, standard output */
    const char *field, *output_field; /* the members that hold the prompt and the rewrite */
    /* only the lines whose number, from 1, mod n_shards is shard; 0 of 1: all */
    int64_t shard, n_shards;
    /* Each line begins with its number, from 1, and a tab, for programs that hand out a data set in
     * pieces. */
    bool numbered;
    bool resume, allow_errors, quiet;
    struct bpo_request request; /* how every record is rewritten; its seed is the run's */
    bool seed_given;            /* otherwise a resumed file's seed takes precedence */
    const volatile sig_atomic_t *signalled; /* not 0: write what is done, and stop */
};

/* Opens input and output. BPO_ERR_INPUT: there is no such input. BPO_ERR_USAGE: the output exists
 * (and is not to be resumed), or options exclude each other. BPO_ERR_RUN: the output cannot be
 * written. The caller keeps the options' strings alive. */
struct dataset *dataset_open(const struct dataset_options *options, struct bpo_error *err);

/* Rewrites all that is left, and prints progress and a summary on stderr. If a signal ends it, that
 * is no failure. BPO_ERR_INPUT: some records failed (the output is complete), or the output was
 * made from another input. BPO_ERR_USAGE: it was made with another model or other options.
 * BPO_ERR_RUN, BPO_ERR_RESOURCE: the run ended early; the output holds complete records only. */
int dataset_run(struct dataset *d, const struct bpo_model *model, struct bpo_session *session,
                struct bpo_error *err);

/* Closes everything. Removes the output file if this run made it, failed and wrote no record. */
void dataset_close(struct dataset *d);

/* The default number of sequences to decode together. n_threads 0: the default number of
 * threads. */
int32_t dataset_parallel(const struct bpo_model_info *model, const struct bpo_request *request,
                         int32_t n_positions, int32_t n_threads);

#endif

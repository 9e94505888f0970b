/*
 * dataset.h - a data set: JSON Lines in, the same lines with their rewrites out; resumable,
 * reproducible, many prompts at once. A part of the command line, over the step engine of bpo.h.
 */
#ifndef BPO_DATASET_H
#define BPO_DATASET_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "bpo.h"

struct dataset;

struct dataset_options {
    const char *input, *output;       /* "-": the standard streams */
    const char *field, *output_field; /* the members that hold the prompt and the rewrite */
    /* only lines whose number (from 1) mod n_shards is shard; 0 of 1: all */
    int64_t shard, n_shards;
    bool
        numbered; /* each line begins with its number, from 1, and a tab: for those who hand out a data set in pieces */
    bool resume, allow_errors, quiet;
    /* what every record is rewritten with; its seed is the run's */
    struct bpo_request request;
    bool seed_given;                        /* else a resumed file's seed wins */
    const volatile sig_atomic_t *signalled; /* not 0: write what is done, and stop */
};

/* Opens input and output. BPO_ERR_INPUT: no such input; BPO_ERR_USAGE: the output is there already
 * (and is not to be resumed), or options that exclude each other; BPO_ERR_RUN: it cannot be
 * written. The options' strings stay the caller's. */
struct dataset *dataset_open(const struct dataset_options *options, struct bpo_error *err);

/* Rewrites all that is left, and prints progress and a summary on stderr. 0 also when signalled.
 * BPO_ERR_INPUT: some records failed (the output is complete), or the input is not the one that is
 * to be resumed; BPO_ERR_USAGE: neither are the model or the options; BPO_ERR_RUN,
 * BPO_ERR_RESOURCE: it ended early, what is written is whole. */
int dataset_run(struct dataset *d, const struct bpo_model *model, struct bpo_session *session,
                struct bpo_error *err);

/* Removes an output file that this run made if nothing but a failure came of it. */
void dataset_close(struct dataset *d);

/* How many sequences to decode together by default; n_threads 0: the default number of threads. See
 * dataset.c. */
int32_t dataset_parallel(const struct bpo_model_info *model, const struct bpo_request *request,
                         int32_t n_positions, int32_t n_threads);

#endif

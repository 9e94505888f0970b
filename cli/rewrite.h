/*
 * rewrite.h - one prompt: its rewrites, or its logits, through a session of bpo.h.
 */
#ifndef BPO_REWRITE_H
#define BPO_REWRITE_H

#include "bpo.h"
#include "cli/options.h"

struct prompt_run {
    const struct options *options;
    const struct bpo_model *model;
    struct bpo_session *session;
    struct bpo_request request; /* text or ids, sampling and seed */
    double open_s;              /* how long it took to open the model and the session */
};

/* Rewrites the prompt and prints the results on stdout as --json says, on a terminal while they are
 * generated; --stats on stderr. */
int rewrite_prompt(const struct prompt_run *run, struct bpo_error *err);

/* Writes the logits [rows of the input][vocabulary] to --dump-logits' file. */
int dump_logits(const struct prompt_run *run, struct bpo_error *err);

#endif

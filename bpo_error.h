/*
 * bpo_error.h - how a public function reports what went wrong.
 *
 * Functions that can fail return 0 or a negative code (or NULL) and fill the caller's struct
 * bpo_error. The codes are the negated exit codes of the command line.
 */
#ifndef BPO_ERROR_H
#define BPO_ERROR_H

enum bpo_code {
    BPO_OK = 0,
    BPO_ERR_RUN = -1,      /* failed while running: output not written, non-finite logits, ... */
    BPO_ERR_USAGE = -2,    /* an option or argument is out of range */
    BPO_ERR_MODEL = -3,    /* the model or tokenizer file */
    BPO_ERR_INPUT = -4,    /* the prompt */
    BPO_ERR_RESOURCE = -5, /* not enough memory, no such device */
};

/* What failed, on what, what was expected and what was found; and a hint at what to do next. Both
 * texts are truncated to fit. */
struct bpo_error {
    int code;
    char message[768];
    char hint[512];
};

#endif

/*
 * top_k.h - the sampler, fast: the ids that can be drawn are found without ranking the vocabulary;
 * then bpo.c's candidates_draw draws from them. The same ids as bpo.c's sampler_draw.
 */
#ifndef BPO_TOP_K_H
#define BPO_TOP_K_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "model.h"

enum { PREFILTER_BLOCK = 64 }; /* ids */

/* Scratch memory of one thread. */
struct prefilter {
    float *block_max;             /* [V / PREFILTER_BLOCK + 1] the largest logit of each block */
    float *scratch;               /* [V] */
    struct candidate *candidates; /* [V] */
};

/* Draws an id from logits [V], or returns DRAW_ALL_FORBIDDEN or DRAW_NOT_FINITE. */
int32_t top_k_draw(const struct prefilter *f, const float *logits, size_t vocab,
                   const struct sample_params *p);

/* False if any of n logits is a NaN or an infinity. block_max [n / PREFILTER_BLOCK] is filled with
 * the largest logit of each whole block. */
bool block_maxima(float *block_max, const float *logits, size_t n);

#endif

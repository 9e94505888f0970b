/*
 * lookup.h - drafts: guesses at the next ids, to be checked in one forward call (speculative
 * decoding: Leviathan et al. 2023; drafted by looking up what is known: Saxena 2023). A rewrite
 * copies much of its prompt, so what followed the last ids where they stood before is a good guess
 * at what follows now.
 *
 * Whatever is guessed, the text is the same: each position is drawn as it would be anyway, and a
 * draft is kept only if it is what was drawn. Drafts decide how many forward passes a text takes,
 * nothing else; so this file may learn from what it sees, the clock included. Pure functions over
 * ids; no memory is allocated.
 */
#ifndef BPO_LOOKUP_H
#define BPO_LOOKUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    LOOKUP_MAX = 15,       /* drafted ids of one sequence in one call */
    LOOKUP_HISTORY = 4096, /* ids of earlier rewrites that are remembered */
    LOOKUP_MATCH = 6,      /* longer matches count like this one */
    LOOKUP_SOURCES = 3,    /* the prompt, the answer so far, earlier rewrites */
    LOOKUP_COST_KNOTS = 7, /* rows 1, 2, 4, .. 64 */
    LOOKUP_MAX_ROWS = 1 << (LOOKUP_COST_KNOTS - 1),
};

/* What a session has learned. */
struct lookup {
    int32_t history[LOOKUP_HISTORY]; /* earlier rewrites, each followed by -1 */
    size_t n_history;
    /* of the ids that were drafted from a source after a match of 1 .. LOOKUP_MATCH ids, those that
     * were kept */
    float tried[LOOKUP_SOURCES][LOOKUP_MATCH + 1], kept[LOOKUP_SOURCES][LOOKUP_MATCH + 1];
    float seconds;                 /* of a call of one row; 0: not measured yet */
    float cost[LOOKUP_COST_KNOTS]; /* of calls of 1, 2, 4, .. rows, in calls of one row */
};

/* A guess at a sequence's next n ids, of which n_rows are worth a row of the next call. */
struct draft {
    int32_t n, n_rows, id[LOOKUP_MAX];
    float chance[LOOKUP_MAX]; /* that this id and all before it will be kept */
    uint8_t source[LOOKUP_MAX], match[LOOKUP_MAX];
};

/* small: the weights fit the CPU's caches. Then arithmetic bounds a call, not memory, and rows cost
 * more. */
void lookup_init(struct lookup *l, bool small);

/* Guesses up to max ids that follow answer [n_answer >= 1], which rewrites prompt [n_prompt]; stops
 * after the first whose chance is below min_chance. */
void lookup_draft(struct draft *d, const struct lookup *l, const int32_t *prompt, size_t n_prompt,
                  const int32_t *answer, size_t n_answer, int32_t max, float min_chance);

/* The smallest chance with which an id of n_drafts drafts can get a row from lookup_share:
 * searching for less likely ones is wasted time. 1: none can. */
float lookup_min_chance(const struct lookup *l, size_t n_drafts, size_t max_rows, bool always);

/* Sets n_rows of drafts [n_drafts], one per sequence that decodes, to what is expected to pay: a
 * drafted id costs the call one more row, and saves its share of a call if it is kept. always: to
 * their full length. max_rows limits the drafted rows and one row per sequence together. */
void lookup_share(struct draft *const *drafts, size_t n_drafts, const struct lookup *l,
                  size_t max_rows, bool always);

/* Learns from the ids drawn [n_drawn] where a draft was made; from the time that a call of n_rows
 * took; from a complete rewrite. */
void lookup_learn(struct lookup *l, const struct draft *d, const int32_t *drawn, int32_t n_drawn);
void lookup_learn_cost(struct lookup *l, int32_t n_rows, double seconds);
void lookup_remember(struct lookup *l, const int32_t *answer, size_t n_answer);

/* What a call of n_rows rows costs, in calls of one row. n_rows <= LOOKUP_MAX_ROWS */
float lookup_cost(const struct lookup *l, size_t n_rows);

#endif

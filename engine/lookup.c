/*
 * lookup.c - see lookup.h. bench/drafts.py tries the same rules, and others, on real pairs;
 * bench/LOG.md has its numbers.
 */
#include "engine/lookup.h"

#include <string.h>

/* How often a drafted id was right on BPO's test set, by source and length of the match: what
 * learning starts from. */
static const float CHANCES[LOOKUP_SOURCES][LOOKUP_MATCH + 1] = {
    {0.0F, 0.38F, 0.68F, 0.75F, 0.79F, 0.86F, 0.88F}, /* the prompt */
    {0.0F, 0.16F, 0.37F, 0.40F, 0.50F, 0.50F, 0.55F}, /* the answer itself */
    {0.0F, 0.11F, 0.21F, 0.25F, 0.30F, 0.50F, 0.50F}, /* earlier rewrites */
};
static const float BELIEF = 4.0F;        /* the trials that these count as */
static const float REMEMBERED = 1000.0F; /* trials after which the older ones fade */

/* The cost of calls of 1, 2, 4, .. 64 rows, in calls of one row: what measuring starts from. */
static const float LARGE_COSTS[LOOKUP_COST_KNOTS] = {1.0F, 1.04F, 1.14F, 1.2F, 1.95F, 3.7F, 7.3F};
static const float SMALL_COSTS[LOOKUP_COST_KNOTS] = {1.0F, 1.1F, 1.3F, 2.1F, 3.6F, 7.0F, 14.0F};
static const float SECONDS_RATE = 0.2F, COST_RATE = 0.05F; /* the weights of a new measurement */
/* What an id must bring to be drafted, because the chances of consecutive ids are not
 * independent. */
static const float CAUTION = 1.25F;
static const float WORTH_A_SEARCH = 0.02F; /* the smallest chance that is */

void lookup_init(struct lookup *l, bool small) {
    memset(l, 0, sizeof *l);
    for (size_t s = 0; s < LOOKUP_SOURCES; s++) {
        for (size_t m = 1; m <= LOOKUP_MATCH; m++) {
            l->tried[s][m] = BELIEF;
            l->kept[s][m] = BELIEF * CHANCES[s][m];
        }
    }
    memcpy(l->cost, small ? SMALL_COSTS : LARGE_COSTS, sizeof l->cost);
}

/* ---------------------------------------------------------------- drafting */

/* The length of the longest end of context that also occurs in text, and is followed there by an
 * id: *next. Of equally long ones the first, or the last. */
static size_t longest_match(const int32_t *text, size_t n_text, const int32_t *context,
                            size_t n_context, bool last, int32_t *next) {
    size_t best = 0, max = n_context < LOOKUP_MATCH ? n_context : LOOKUP_MATCH;
    const int32_t *end = context + n_context;
    for (size_t i = 1; i < n_text; i++) {
        if (text[i - 1] != end[-1] || text[i] < 0) {
            continue;
        }
        size_t n = 1;
        while (n < max && n < i && text[i - 1 - n] == *(end - 1 - n)) {
            n++;
        }
        if (n > best || (last && n == best)) {
            best = n;
            *next = text[i];
        }
    }
    return best;
}

void lookup_draft(struct draft *d, const struct lookup *l, const int32_t *prompt, size_t n_prompt,
                  const int32_t *answer, size_t n_answer, int32_t max, float min_chance) {
    const struct {
        const int32_t *ids;
        size_t n;
    } sources[LOOKUP_SOURCES] = {
        {prompt, n_prompt}, {answer, n_answer}, {l->history, l->n_history}};
    /* the last ids of the answer, then the draft */
    int32_t context[LOOKUP_MATCH + LOOKUP_MAX];
    size_t n_context = n_answer < LOOKUP_MATCH ? n_answer : LOOKUP_MATCH;
    float chance = 1.0F;
    memcpy(context, answer + (n_answer - n_context), n_context * sizeof *context);
    d->n = d->n_rows = 0;
    while (d->n < max && d->n < LOOKUP_MAX && chance >= min_chance) {
        float best = 0.0F;
        for (size_t s = 0; s < LOOKUP_SOURCES; s++) {
            int32_t next = -1;
            size_t match =
                longest_match(sources[s].ids, sources[s].n, context, n_context, s > 0, &next);
            float right = match > 0 ? l->kept[s][match] / l->tried[s][match] : 0.0F;
            if (right > best) {
                best = right;
                d->id[d->n] = next;
                d->source[d->n] = (uint8_t)s;
                d->match[d->n] = (uint8_t)match;
            }
        }
        if (!(best > 0.0F)) {
            break;
        }
        chance *= best;
        d->chance[d->n] = chance;
        context[n_context++] = d->id[d->n++];
    }
}

/* The chance that an id must have to be worth a row more. A call of r rows that is expected to
 * yield e ids costs t(r) / e per id; one row more brings `chance` ids for t(r + 1) - t(r). */
static float chance_that_pays(const struct lookup *l, size_t rows, float expected) {
    float cost = lookup_cost(l, rows);
    return CAUTION * expected * (lookup_cost(l, rows + 1) - cost) / cost;
}

/* The limit on a call's rows, drafted ones and one per sequence together; 0: no room for drafts. */
static size_t room_for_drafts(size_t n_drafts, size_t max_rows) {
    max_rows = max_rows < LOOKUP_MAX_ROWS ? max_rows : LOOKUP_MAX_ROWS;
    return n_drafts < max_rows ? max_rows : 0;
}

float lookup_min_chance(const struct lookup *l, size_t n_drafts, size_t max_rows, bool always) {
    max_rows = room_for_drafts(n_drafts, max_rows);
    if (always && max_rows > 0) {
        return 0.0F;
    }
    if (max_rows == 0 || chance_that_pays(l, n_drafts, (float)n_drafts) >= 1.0F) {
        return 1.0F; /* not even a first row */
    }
    float min_chance = 1.0F;
    for (size_t rows = n_drafts; rows < max_rows; rows++) {
        float chance = chance_that_pays(l, rows, (float)n_drafts);
        min_chance = chance < min_chance ? chance : min_chance;
    }
    return min_chance > WORTH_A_SEARCH ? min_chance : WORTH_A_SEARCH;
}

/* As long as it pays, takes the likeliest of the ids that come next in the drafts. */
void lookup_share(struct draft *const *drafts, size_t n_drafts, const struct lookup *l,
                  size_t max_rows, bool always) {
    int32_t taken[LOOKUP_MAX_ROWS] = {0};
    size_t rows = n_drafts;
    float expected = (float)n_drafts;
    max_rows = room_for_drafts(n_drafts, max_rows);
    while (rows < max_rows) {
        size_t best = n_drafts;
        float chance = 0.0F;
        for (size_t i = 0; i < n_drafts; i++) {
            if (taken[i] < drafts[i]->n && drafts[i]->chance[taken[i]] > chance) {
                best = i;
                chance = drafts[i]->chance[taken[i]];
            }
        }
        if (best == n_drafts || (!always && chance < chance_that_pays(l, rows, expected))) {
            break;
        }
        taken[best]++;
        expected += chance;
        rows++;
    }
    for (size_t i = 0; i < n_drafts; i++) {
        drafts[i]->n_rows = max_rows > 0 ? taken[i] : 0;
    }
}

/* ---------------------------------------------------------------- learning */

void lookup_learn(struct lookup *l, const struct draft *d, const int32_t *drawn, int32_t n_drawn) {
    bool right = true;
    /* after the first wrong one nothing was tested */
    for (int32_t i = 0; right && i < d->n && i < n_drawn; i++) {
        float *tried = &l->tried[d->source[i]][d->match[i]],
              *kept = &l->kept[d->source[i]][d->match[i]];
        right = d->id[i] == drawn[i];
        *tried += 1.0F;
        *kept += right ? 1.0F : 0.0F;
        if (*tried > REMEMBERED) {
            *tried *= 0.5F;
            *kept *= 0.5F;
        }
    }
}

void lookup_remember(struct lookup *l, const int32_t *answer, size_t n_answer) {
    size_t n = n_answer < LOOKUP_HISTORY - 1 ? n_answer : LOOKUP_HISTORY - 1;
    if (l->n_history + n + 1 > LOOKUP_HISTORY) { /* the older half, or more, makes room */
        size_t n_kept = LOOKUP_HISTORY / 2 < LOOKUP_HISTORY - n - 1 ? LOOKUP_HISTORY / 2
                                                                    : LOOKUP_HISTORY - n - 1;
        n_kept = n_kept < l->n_history ? n_kept : l->n_history;
        memmove(l->history, l->history + (l->n_history - n_kept), n_kept * sizeof *l->history);
        l->n_history = n_kept;
    }
    for (size_t i = n_answer - n; i < n_answer; i++) {
        l->history[l->n_history++] = answer[i];
    }
    l->history[l->n_history++] = -1;
}

/* The knots between which a number of rows lies, and where: rows = 2^k (1 + part). */
static size_t cost_knot(size_t n_rows, float *part) {
    size_t k = 0;
    while (k + 2 < LOOKUP_COST_KNOTS && (size_t)2 << k <= n_rows) {
        k++;
    }
    *part = (float)n_rows / (float)((size_t)1 << k) - 1.0F;
    return k;
}

float lookup_cost(const struct lookup *l, size_t n_rows) {
    float part;
    size_t k = cost_knot(n_rows, &part);
    return l->cost[k] + part * (l->cost[k + 1] - l->cost[k]);
}

/* Each measurement moves the time of one row and, more slowly, the ratios next to it. A slow start
 * (a file that is still being read, say) so passes from all ratios at once. */
void lookup_learn_cost(struct lookup *l, int32_t n_rows, double seconds) {
    float part, measured = (float)seconds;
    if (n_rows < 1 || n_rows > LOOKUP_MAX_ROWS || !(measured > 0.0F)) {
        return;
    }
    size_t k = cost_knot((size_t)n_rows, &part);
    float cost = lookup_cost(l, (size_t)n_rows);
    if (!(l->seconds > 0.0F)) {
        l->seconds = measured / cost;
        return;
    }
    /* bounded: an interruption is not the rows' cost */
    float off = measured / (cost * l->seconds) - 1.0F;
    off = off > 0.5F ? 0.5F : off < -0.5F ? -0.5F : off;
    l->seconds *= 1.0F + SECONDS_RATE * off;
    l->cost[k] *= k > 0 ? 1.0F + COST_RATE * (1.0F - part) * off : 1.0F;
    l->cost[k + 1] *= 1.0F + COST_RATE * part * off;
}

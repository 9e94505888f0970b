/*
 * test_lookup.c - drafts: where they are found, how many deserve a row, what is learned.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../engine/lookup.h"
#include "random_values.h"

#define IDS(...)                                                                                   \
    (const int32_t[]){__VA_ARGS__}, sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)

static struct lookup l; /* too large for some stacks */

static int init(void **state) {
    (void)state;
    lookup_init(&l, false);
    return 0;
}

static void assert_draft(const struct draft *d, const int32_t *ids, size_t n) {
    assert_int_equal(d->n, n);
    assert_memory_equal(d->id, ids, n * sizeof *ids);
    for (int32_t i = 0; i < d->n; i++) {
        assert_true(d->chance[i] > 0 && d->chance[i] <= (i > 0 ? d->chance[i - 1] : 1));
    }
}

static void drafts_what_followed(void **state) {
    (void)state;
    struct draft d;
    lookup_draft(&d, &l, IDS(10, 11, 12, 13, 14), IDS(11), 15, 0);
    assert_draft(&d, IDS(12, 13, 14));
    lookup_draft(&d, &l, IDS(10, 11, 12, 13, 14), IDS(11), 2, 0);
    assert_draft(&d, IDS(12, 13));
    lookup_draft(&d, &l, IDS(10, 11, 12, 13, 14), IDS(11), 0, 0);
    assert_int_equal(d.n, 0);
    lookup_draft(&d, &l, IDS(10, 11, 12, 13, 14), IDS(14), 15, 0);
    assert_int_equal(d.n, 0); /* nothing follows the last one */
    lookup_draft(&d, &l, IDS(10, 11), IDS(99), 15, 0);
    assert_int_equal(d.n, 0);
    lookup_draft(&d, &l, NULL, 0, IDS(99), 15, 0);
    assert_int_equal(d.n, 0);
}

static void drafts_while_there_is_a_chance(void **state) {
    (void)state;
    struct draft all, likely;
    lookup_draft(&all, &l, IDS(10, 11, 12, 13, 14, 15, 16), IDS(10), 15, 0);
    assert_int_equal(all.n, 6);
    lookup_draft(&likely, &l, IDS(10, 11, 12, 13, 14, 15, 16), IDS(10), 15, all.chance[2]);
    assert_int_equal(likely.n, 4);
    assert_true(likely.chance[3] < all.chance[2]);
}

static void prefers_the_longest_match(void **state) {
    (void)state;
    struct draft d;
    lookup_draft(&d, &l, IDS(1, 2, 50, 7, 1, 2, 60, 61), IDS(7, 1, 2), 2, 0);
    assert_draft(&d, IDS(60, 61));
    /* a tie: the first */
    lookup_draft(&d, &l, IDS(1, 2, 50, 7, 1, 2, 60, 61), IDS(8, 1, 2), 2, 0);
    assert_draft(&d, IDS(50, 7));
    /* the draft so far is context too: 6 follows 3 4 5, although 8 follows 4 5 */
    lookup_draft(&d, &l, IDS(3, 4, 5, 6, 9, 4, 5, 8), IDS(3, 4), 2, 0);
    assert_draft(&d, IDS(5, 6));
    /* the prompt comes before the answer, and the answer before earlier rewrites */
    lookup_remember(&l, IDS(20, 30, 31));
    lookup_draft(&d, &l, IDS(1, 2), IDS(20), 15, 0);
    assert_draft(&d, IDS(30, 31));
    lookup_draft(&d, &l, IDS(1, 2), IDS(20, 40, 41, 20), 1, 0);
    assert_draft(&d, IDS(40));
    lookup_draft(&d, &l, IDS(20, 50), IDS(20, 40, 41, 20), 1, 0);
    assert_draft(&d, IDS(50));
}

static void drafts_never_exceed_their_room(void **state) {
    (void)state;
    enum { N = 300 };
    int32_t same[N];
    struct draft d;
    for (int i = 0; i < N; i++) {
        same[i] = 5;
    }
    for (size_t n = 1; n < N; n++) {
        lookup_draft(&d, &l, same, n, same, n, 1000, 0);
        assert_true(d.n <= LOOKUP_MAX);
    }
    assert_int_equal(d.n, LOOKUP_MAX);
}

/* 40 rewrites of 200 ids do not fit into the history, and neither does one of 10,000. */
static void remembers_the_latest(void **state) {
    (void)state;
    static int32_t ids[10000];
    struct draft d;
    for (int32_t r = 0; r < 40; r++) {
        for (int32_t i = 0; i < 200; i++) {
            ids[i] = 1000 * r + i;
        }
        lookup_remember(&l, ids, 200);
        assert_true(l.n_history <= LOOKUP_HISTORY);
        assert_int_equal(l.history[l.n_history - 1], -1);
    }
    lookup_draft(&d, &l, NULL, 0, IDS(39 * 1000 + 5), 1, 0);
    assert_draft(&d, IDS(39 * 1000 + 6));
    lookup_draft(&d, &l, NULL, 0, IDS(5), 1, 0);
    assert_int_equal(d.n, 0);
    lookup_draft(&d, &l, NULL, 0, IDS(39 * 1000 + 199), 1, 0);
    assert_int_equal(d.n, 0); /* what follows is another rewrite */
    for (int32_t i = 0; i < 10000; i++) {
        ids[i] = i;
    }
    lookup_remember(&l, ids, 10000);
    assert_int_equal(l.n_history, LOOKUP_HISTORY);
    lookup_remember(&l, NULL, 0);
    lookup_draft(&d, &l, NULL, 0, IDS(9000), 1, 0);
    assert_draft(&d, IDS(9001));
}

static struct draft chances(int32_t n, float each) {
    struct draft d = {.n = n};
    float chance = 1.0F;
    for (int32_t i = 0; i < n; i++) {
        d.chance[i] = chance *= each;
    }
    return d;
}

static void shares_rows_by_what_they_bring(void **state) {
    (void)state;
    struct draft sure = chances(15, 0.95F), poor = chances(15, 0.1F), fair = chances(15, 0.6F);
    struct draft *one[] = {&sure}, *two[] = {&poor, &sure}, *three[] = {&poor, &fair, &sure};
    lookup_share(one, 1, &l, 64, false);
    assert_true(sure.n_rows >= 7);
    one[0] = &poor;
    lookup_share(one, 1, &l, 64, false);
    assert_int_equal(poor.n_rows, 1);
    lookup_share(two, 2, &l, 64, false);
    assert_true(poor.n_rows <= 1 && sure.n_rows > 4);
    lookup_share(three, 3, &l, 6,
                 false); /* of 6 rows 3 are taken: the likeliest drafts get the rest */
    assert_int_equal(sure.n_rows, 3);
    assert_int_equal(fair.n_rows + poor.n_rows, 0);
    lookup_share(three, 3, &l, 64, true);
    assert_int_equal(sure.n_rows + fair.n_rows + poor.n_rows, 45);
    lookup_share(three, 3, &l, 20, true);
    assert_int_equal(sure.n_rows + fair.n_rows + poor.n_rows, 17);
    lookup_share(three, 3, &l, 2, true);
    assert_int_equal(sure.n_rows + fair.n_rows + poor.n_rows, 0);
    /* where each row costs as much as the first, nothing is drafted */
    for (size_t i = 1; i < LOOKUP_COST_KNOTS; i++) {
        l.cost[i] = (float)(1 << i);
    }
    lookup_share(three, 3, &l, 64, false);
    assert_int_equal(sure.n_rows + fair.n_rows + poor.n_rows, 0);
}

/* lookup_min_chance excludes only drafts that lookup_share would give no row. */
static void looks_for_what_can_pay(void **state) {
    (void)state;
    for (size_t n = 1; n <= LOOKUP_MAX_ROWS; n++) {
        static struct draft all[LOOKUP_MAX_ROWS];
        struct draft *drafts[LOOKUP_MAX_ROWS];
        float minimum = lookup_min_chance(&l, n, LOOKUP_MAX_ROWS, false);
        for (int above = 0; above < 2; above++) {
            int32_t n_rows = 0;
            for (size_t i = 0; i < n; i++) {
                all[i] = chances(1, above ? 1.0F : 0.999F * minimum);
                drafts[i] = &all[i];
            }
            lookup_share(drafts, n, &l, LOOKUP_MAX_ROWS, false);
            for (size_t i = 0; i < n; i++) {
                n_rows += all[i].n_rows;
            }
            assert_true((n_rows > 0) == (above && n < 16)); /* 16 rows are compute-bound */
        }
    }
    assert_true(lookup_min_chance(&l, 1, LOOKUP_MAX_ROWS, false) < 0.1F);
    assert_true(lookup_min_chance(&l, 32, LOOKUP_MAX_ROWS, false) >= 1.0F);
    assert_true(lookup_min_chance(&l, 32, LOOKUP_MAX_ROWS, true) < 0.02F);
    assert_true(lookup_min_chance(&l, 8, 8, false) >= 1.0F); /* no room */
    assert_true(lookup_min_chance(&l, 8, 8, true) >= 1.0F);
    assert_true(lookup_min_chance(&l, LOOKUP_MAX_ROWS + 1, 1000, true) >= 1.0F);
}

static void shares_nothing_among_too_many(void **state) {
    (void)state;
    enum { N = 2 * LOOKUP_MAX_ROWS };
    static struct draft all[N];
    struct draft *drafts[N];
    for (int i = 0; i < N; i++) {
        all[i] = chances(15, 0.9F);
        drafts[i] = &all[i];
    }
    lookup_share(drafts, N, &l, N, true);
    for (int i = 0; i < N; i++) {
        assert_int_equal(all[i].n_rows, 0);
    }
    lookup_share(drafts, LOOKUP_MAX_ROWS - 1, &l, N, true);
    int32_t n = 0;
    for (int i = 0; i < LOOKUP_MAX_ROWS - 1; i++) {
        n += all[i].n_rows;
    }
    assert_int_equal(n, 1);
}

static void learns_what_is_kept(void **state) {
    (void)state;
    struct draft d;
    for (int i = 0; i < 5000; i++) {
        lookup_draft(&d, &l, IDS(1, 2, 3), IDS(1), 2, 0);
        lookup_learn(&l, &d, IDS(2, 9));
        assert_true(l.tried[0][1] <= 1001);
    }
    lookup_draft(&d, &l, IDS(1, 2, 3), IDS(1), 2, 0);
    assert_true(d.chance[0] > 0.95F && d.chance[1] < 0.05F);
    lookup_init(&l, false);
    lookup_draft(&d, &l, IDS(1, 2, 3), IDS(1), 2, 0);
    lookup_learn(&l, &d, IDS(9, 3)); /* nothing is learned after a wrong id */
    assert_true(l.tried[0][1] > 4 && l.tried[0][2] == 4);
}

/* The costs of calls of 1 to 16 rows, here 0.7 + 0.3 rows, are learned from noisy times, even if
 * the first call is slow. */
static void learns_what_rows_cost(void **state) {
    (void)state;
    for (int slow = 0; slow < 2; slow++) {
        lookup_init(&l, false);
        for (int i = 0; i < 4000; i++) {
            int32_t rows = 1 + (int32_t)random_below(16);
            double noise = 0.9 + 0.2 * random_unit();
            lookup_learn_cost(&l, rows,
                              noise * 1e-3 * (0.7 + 0.3 * rows) * (i == 0 && slow ? 100 : 1));
        }
        for (int32_t rows = 1; rows <= 16; rows++) {
            float expected = 0.7F + 0.3F * (float)rows, found = lookup_cost(&l, (size_t)rows);
            assert_true(found > 0.85F * expected && found < 1.15F * expected);
        }
        assert_true(l.seconds > 0.85e-3F && l.seconds < 1.15e-3F);
    }
    lookup_learn_cost(&l, 0, 1);
    lookup_learn_cost(&l, 65, 1);
    lookup_learn_cost(&l, 1, 0);
    assert_true(l.seconds < 1.15e-3F);
    assert_true(lookup_cost(&l, 64) > lookup_cost(&l, 32));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(drafts_what_followed, init),
        cmocka_unit_test_setup(drafts_while_there_is_a_chance, init),
        cmocka_unit_test_setup(prefers_the_longest_match, init),
        cmocka_unit_test_setup(drafts_never_exceed_their_room, init),
        cmocka_unit_test_setup(remembers_the_latest, init),
        cmocka_unit_test_setup(shares_rows_by_what_they_bring, init),
        cmocka_unit_test_setup(looks_for_what_can_pay, init),
        cmocka_unit_test_setup(shares_nothing_among_too_many, init),
        cmocka_unit_test_setup(learns_what_is_kept, init),
        cmocka_unit_test_setup(learns_what_rows_cost, init),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

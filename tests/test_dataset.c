/*
 * test_dataset.c - data sets from the inside: lines that arrive in pieces, numbers that are too
 * large, values as written, seeds; and failures: the engine lacks memory, a record fails, writes
 * are cut short, every allocation fails once.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "../bpo.h"

static ssize_t piecemeal_write(int fd, const void *data, size_t n);
static int64_t counting_submit(struct bpo_session *s, const struct bpo_request *request,
                               struct bpo_error *err);
static int breaking_step(struct bpo_session *s, const struct bpo_event **events, size_t *n,
                         struct bpo_error *err);

#include "failing_alloc.h"
#define write piecemeal_write
#define bpo_submit counting_submit
#define bpo_step breaking_step
#include "../cli/dataset.c"
#include "../cli/jsonl.c"
#include "../cli/messages.c"
#include "../cli/option_words.c"
#include "../cli/progress.c"
#include "../cli/record.c"
#undef malloc
#undef calloc
#undef realloc
#undef write
#undef bpo_submit
#undef bpo_step

#include <cmocka.h>

#include "tiny_session.h"

static const volatile sig_atomic_t quiet_signal = 0;

/* ---- failures on purpose ---- */

static size_t piece;        /* the most bytes of one write, with EINTRs in between; 0: no limit */
static int32_t max_at_once; /* memory is enough for so many requests; 0: for any number */
static int32_t n_at_once;   /* requests in progress */
static int64_t broken = -1; /* the request whose samples end with an error */
static char begun[2048]; /* the first characters of the prompts, in the order in which they start */

static ssize_t piecemeal_write(int fd, const void *data, size_t n) {
    static int calls;
    if (piece > 0 && calls++ % 3 == 0) {
        errno = EINTR;
        return -1;
    }
    return write(fd, data, piece > 0 && n > piece ? piece : n);
}

static int64_t counting_submit(struct bpo_session *s, const struct bpo_request *request,
                               struct bpo_error *err) {
    if (max_at_once > 0 && n_at_once >= max_at_once) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "no memory, on purpose");
    }
    int64_t number = bpo_submit(s, request, err);
    n_at_once += number >= 0;
    size_t n = strlen(begun);
    if (number >= 0 && n < sizeof begun - 1) {
        begun[n] = request->text[0];
        begun[n + 1] = '\0';
    }
    return number;
}

static int breaking_step(struct bpo_session *s, const struct bpo_event **events, size_t *n,
                         struct bpo_error *err) {
    static const struct bpo_error why = {BPO_ERR_RUN, "broken on purpose", "a test"};
    int more = bpo_step(s, events, n, err);
    for (size_t i = 0; i < *n; i++) {
        struct bpo_event *e = (struct bpo_event *)&(*events)[i];
        if (e->kind == BPO_EVENT_DONE) {
            n_at_once--;
            if (e->request == broken) {
                e->stop = BPO_STOP_ERROR;
                e->error = &why;
            }
        }
    }
    return more;
}

/* ---- a small data set with its model and session ---- */

struct fixture {
    char model_path[TEMPORARY_PATH], in_path[TEMPORARY_PATH], out_path[TEMPORARY_PATH];
    struct opened opened;
    struct dataset_options options;
};

static void write_file(const char *path, const char *text, size_t n) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

static char *read_file(const char *path) {
    static char text[1 << 16];
    FILE *file = fopen(path, "rb");
    size_t n = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file) {
        (void)fclose(file);
    }
    text[n] = '\0';
    return text;
}

static void fixture_open(struct fixture *b, const char *input, int32_t n_slots) {
    struct bpo_session_options options;
    temporary_path(b->model_path, "dataset.bin");
    temporary_path(b->in_path, "dataset.in");
    temporary_path(b->out_path, "dataset.out");
    tiny_create(b->model_path, NULL);
    write_file(b->in_path, input, strlen(input));
    (void)unlink(b->out_path);
    bpo_session_options_init(&options);
    options.n_slots = n_slots;
    options.n_threads = 1;
    b->opened = open_session(b->model_path, &options);
    b->options = (struct dataset_options){.input = b->in_path,
                                          .output = b->out_path,
                                          .field = "prompt",
                                          .output_field = "better",
                                          .n_shards = 1,
                                          .resume = true,
                                          .quiet = true,
                                          .allow_errors = true,
                                          .seed_given = true,
                                          .signalled = &quiet_signal};
    bpo_request_init(&b->options.request, b->opened.model, BPO_STABLE);
    b->options.request.max_new_tokens = 3;
    n_at_once = 0;
}

static int fixture_run(struct fixture *b, struct bpo_error *err) {
    struct dataset *d = dataset_open(&b->options, err);
    int failed = d ? dataset_run(d, b->opened.model, b->opened.session, err) : err->code;
    dataset_close(d);
    return failed;
}

static void fixture_close(struct fixture *b) {
    close_session(&b->opened);
    (void)unlink(b->model_path);
    (void)unlink(b->in_path);
    (void)unlink(b->out_path);
}

static size_t count(const char *text, const char *word) {
    size_t n = 0;
    for (; (text = strstr(text, word)); text++) {
        n++;
    }
    return n;
}

/* ---- lines ---- */

static void lines_arrive_in_pieces(void **state) {
    (void)state;
    const char text[] = "one\n\nthree, which is longer\r\n\nlast";
    static const char *const expected[] = {"one", "", "three, which is longer\r", "", "last"};
    for (size_t step = 1; step < sizeof text; step++) {
        int ends[2];
        struct bpo_error err;
        struct line line;
        assert_int_equal(pipe(ends), 0);
        struct reader r = {.fd = ends[0], .name = "a pipe", .signalled = &quiet_signal};
        size_t n_fed = 0, n_lines = 0;
        for (int got = GOT_NOTHING; got != GOT_END;) {
            got = reader_line(&r, false, &line, &err);
            assert_true(got >= 0);
            if (got == GOT_LINE) {
                assert_int_equal(line.n, strlen(expected[n_lines]));
                assert_memory_equal(line.text, expected[n_lines], line.n);
                assert_int_equal(line.whole, n_lines < 4);
                n_lines++;
            } else if (got == GOT_NOTHING && n_fed < sizeof text - 1) {
                size_t n = sizeof text - 1 - n_fed < step ? sizeof text - 1 - n_fed : step;
                assert_int_equal(write(ends[1], text + n_fed, n), (ssize_t)n);
                n_fed += n;
            } else if (got == GOT_NOTHING) {
                (void)close(ends[1]);
            }
        }
        assert_int_equal(n_lines, 5);
        assert_int_equal(r.offset, sizeof text - 1);
        free(r.data);
        (void)close(ends[0]);
    }
}

/* ---- records ---- */

static void large_numbers_are_neither_mended_nor_broken(void **state) {
    (void)state;
    static const struct {
        const char *line;
        bool valid;
    } table[] = {
        {"{\"a\": 1e999}", true},
        {"{\"a\": -1E+0999, \"b\": 123456789012345678901234567890}", true},
        {"{\"a\": 0.00000000000000000000000001e400, \"s\": \"1e999 \\\" 99999999999999999999\"}",
         true},
        {"{\"a\": [1e999,2e999, 12345678901234567890]}", true},
        {"{\"a\": 1e999, \"b\": 00000000000000000000}", false},
        {"{\"a\": 1e999, \"b\": 1234567890123456789012345.}", false},
        {"{\"a\": 1e999, \"b\": 1e}", false},
        {"{\"a\": 1e999, \"b\": 1e+}", false},
        {"{\"a\": 1e999 9}", false},
        {"{\"a\": 1e999e9}", false},
        {"{\"a\": 1e999, \"b\": --1}", false},
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        struct bpo_error err;
        json_t *object = json_parse_line(table[i].line, strlen(table[i].line), &err);
        if ((object != NULL) != table[i].valid) {
            fail_msg("%s: %s", table[i].line, object ? "was accepted" : err.message);
        }
        json_decref(object);
    }
    struct bpo_error err;
    const char text[] = "{\"a\": 1e999, \"s\": \"\\\\12345678901234567890\\u0041\\\"1e999\"}";
    json_t *object = json_parse_line(text, strlen(text), &err);
    assert_string_equal(json_string_value(json_object_get(object, "s")),
                        "\\12345678901234567890A\"1e999");
    json_decref(object);
}

static void values_are_found_as_written(void **state) {
    (void)state;
    static const struct {
        const char *line, *value;
    } table[] = {
        {"{\"id\":1}", "1"},
        {" { \"id\" : 1.50 } ", "1.50"},
        {"{\"a\":{\"id\":2},\"id\":\"x\\\"}\"}", "\"x\\\"}\""},
        {"{\"id\":[1, {\"id\":\"]\"}]\t,\"b\":3}", "[1, {\"id\":\"]\"}]"},
        {"{\"id\":1,\"id\":{}}", "{}"},
        {"{\"\\u0069d\":true}", "true"},
        {"{\"idx\":1,\"i\":2,\"\":3,\"a\\\"id\":4}", NULL},
        {"{\"a\":\"id\"}", NULL},
        {"{ }", NULL},
        {"{}", NULL},
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        const char *value;
        size_t n;
        bool found = json_find_member(table[i].line, "id", &value, &n);
        assert_int_equal(found, table[i].value != NULL);
        if (found) {
            assert_int_equal(n, strlen(table[i].value));
            assert_memory_equal(value, table[i].value, n);
        }
    }
}

/* Seeds never change, so that files of an older version can be resumed and repeated. */
static void seeds_are_what_they_always_were(void **state) {
    (void)state;
    assert_int_equal(record_seed(1, "heldout-000", 11), 7166307437199946);
    assert_int_equal(record_seed(1, "heldout-001", 11), 335507228281237);
    assert_int_equal(record_seed(0, "", 0), 0x6800538d394c2);
    for (uint64_t i = 0; i < 1000; i++) {
        assert_true(record_seed(i, "x", 1) <= BPO_MAX_SEED);
    }
}

/* ---- the window ---- */

static void long_texts_begin_in_time(void **state) {
    (void)state;
    static const struct {
        const char *lengths; /* of prompt a, b, c, ... as digits */
        int32_t n_slots;
        const char *begun;
    } table[] = {
        {"11111111", 2, "abcdefgh"},   /* none is longer than the others */
        {"11111911", 2, "fabcdegh"},   /* 9 > 16 / 2 */
        {"11111711", 2, "afbcdegh"},   /* 7 = 14 / 2, but 7 > 13 / 2 */
        {"11111119", 1, "abcdefgh"},   /* one slot: the order makes no difference */
        {"123456", 6, "fedcba"},       /* a slot for each: all begin together */
        {"119111711", 4, "cgabdefhi"}, /* 9 > 23 / 4, 7 > 14 / 4 */
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        struct fixture b;
        struct bpo_error err = {0};
        char input[1024] = "";
        for (size_t r = 0, n; table[i].lengths[r]; r++) {
            n = strlen(input);
            (void)snprintf(input + n, sizeof input - n, "{\"prompt\": \"%c%.*s\"}\n",
                           (char)('a' + r), table[i].lengths[r] - '1', "aaaaaaaa");
        }
        fixture_open(&b, input, table[i].n_slots);
        begun[0] = '\0';
        assert_int_equal(fixture_run(&b, &err), 0);
        assert_string_equal(begun, table[i].begun);
        assert_int_equal(count(read_file(b.out_path), "\n"), strlen(table[i].lengths));
        fixture_close(&b);
    }
}

/* Before the end of the input nobody knows how much is still to come. */
static void the_order_is_the_inputs_until_its_end(void **state) {
    (void)state;
    enum { N = WINDOW_RECORDS + 200 };
    struct fixture b;
    struct bpo_error err = {0};
    char *input = calloc(N + 20, 24);
    for (size_t r = 0, n = 0; r < N; r++) {
        n += (size_t)sprintf(input + n, "{\"prompt\": \"%c%0*d\"}\n", r == 1000 ? 'b' : 'a',
                             r == 1000 ? 200 : 0, 0);
    }
    fixture_open(&b, input, 16);
    b.options.request.max_new_tokens = 1;
    begun[0] = '\0';
    assert_int_equal(fixture_run(&b, &err), 0);
    size_t at = (size_t)(strchr(begun, 'b') - begun);
    assert_int_equal(strlen(begun), N);
    assert_in_range(at, 200, 999); /* not first, but earlier than in the input */
    free(input);
    fixture_close(&b);
}

/* ---- what fails ---- */

static const char INPUT[] =
    "{\"prompt\": \"tea\"}\n{\"prompt\": \"a b\", \"id\": 7}\noops\n{\"prompt\": \"b\", \"x\": "
    "1e999}\n"
    "{\"prompt\": \"\", \"id\": [1]}\n{\"prompt\": \"last\", \"\\u0069d\": 3}\n";

static void short_of_memory_means_fewer_at_once(void **state) {
    (void)state;
    struct fixture b;
    struct bpo_error err = {0};
    fixture_open(&b, INPUT, 4);
    assert_int_equal(fixture_run(&b, &err), 0);
    char *whole = strdup(read_file(b.out_path));
    assert_int_equal(count(whole, "\n"), 6);
    assert_int_equal(count(whole, "\"error\""), 2);
    for (max_at_once = 1; max_at_once < 4; max_at_once++) {
        (void)unlink(b.out_path);
        assert_int_equal(fixture_run(&b, &err), 0);
        assert_string_equal(read_file(b.out_path), whole);
    }
    (void)unlink(b.out_path);
    max_at_once = 1;
    n_at_once = 1; /* memory for none at all is an error of the run, not of a record */
    assert_int_equal(fixture_run(&b, &err), BPO_ERR_RESOURCE);
    max_at_once = n_at_once = 0;
    free(whole);
    fixture_close(&b);
}

static void a_broken_record_is_one_error(void **state) {
    (void)state;
    struct fixture b;
    struct bpo_error err = {0};
    fixture_open(&b, INPUT, 2);
    b.options.request.n_samples = 2;
    broken = 1;
    assert_int_equal(fixture_run(&b, &err), 0);
    broken = -1;
    const char *out = read_file(b.out_path);
    assert_int_equal(count(out, "\n"), 6);
    assert_int_equal(count(out, "\"better\": ["), 3);
    assert_non_null(strstr(
        out, "{\"line\": 2, \"id\": 7, \"error\": \"broken on purpose\", \"bpo\": {\"input\": "));
    fixture_close(&b);
}

static void writes_in_pieces_add_up(void **state) {
    (void)state;
    struct fixture b;
    struct bpo_error err = {0};
    fixture_open(&b, INPUT, 2);
    assert_int_equal(fixture_run(&b, &err), 0);
    char *whole = strdup(read_file(b.out_path));
    for (piece = 1; piece < 200; piece += 66) {
        (void)unlink(b.out_path);
        assert_int_equal(fixture_run(&b, &err), 0);
        assert_string_equal(read_file(b.out_path), whole);
    }
    piece = 0;
    free(whole);
    fixture_close(&b);
}

/* For every n, the n-th allocation of the data set or of jansson fails: the run reports an error,
 * the file has whole records only, and resuming it completes it. */
static void fail_every_allocation(int32_t n_samples) {
    struct fixture b;
    struct bpo_error err = {0};
    fixture_open(&b, INPUT, 2);
    b.options.request.n_samples = n_samples;
    assert_int_equal(fixture_run(&b, &err), 0);
    char *whole = strdup(read_file(b.out_path));
    long n = 0;
    for (bool reached = true; reached; n++) {
        (void)unlink(b.out_path);
        err = (struct bpo_error){0};
        countdown = n + 1;
        int code = fixture_run(&b, &err);
        reached = countdown == 0;
        countdown = 0;
        const char *part = read_file(b.out_path);
        size_t n_part = strlen(part);
        bool is_whole =
            strncmp(part, whole, n_part) == 0 && (n_part == 0 || part[n_part - 1] == '\n');
        if (reached ? code != BPO_ERR_RESOURCE || err.message[0] == '\0' || !is_whole : code != 0) {
            fail_msg("allocation %ld: code %d, \"%s\", written: %s", n + 1, code, err.message,
                     part);
        }
        fixture_close(
            &b); /* the session still has requests in progress, so it cannot serve another run */
        fixture_open(&b, INPUT, 2);
        b.options.request.n_samples = n_samples;
        write_file(b.out_path, whole, n_part);
        assert_int_equal(fixture_run(&b, &err), 0);
        assert_string_equal(read_file(b.out_path), whole);
    }
    assert_true(n > 100);
    free(whole);
    fixture_close(&b);
}

static void every_failed_allocation_is_an_error(void **state) {
    (void)state;
    fail_every_allocation(1);
    fail_every_allocation(2);
}

static void parallel_follows_memory(void **state) {
    (void)state;
    struct bpo_model_info info = {
        .n_layers = 32, .n_kv_heads = 32, .head_dim = 128, .trained_length = 512};
    struct bpo_request request = {.max_new_tokens = 1024};
    info.file_bytes = 1;
    info.n_layers = 1;
    assert_int_equal(dataset_parallel(&info, &request, 4096, 1), 16);
    assert_int_equal(dataset_parallel(&info, &request, 4096, 64), 32);
    info.file_bytes = UINT64_MAX; /* larger than memory: one at a time still works */
    assert_int_equal(dataset_parallel(&info, &request, 4096, 64), 1);
    info.file_bytes = 1;
    info.n_layers = 1 << 12;
    request.max_new_tokens = 1 << 30;
    assert_true(dataset_parallel(&info, &request, 1 << 30, 64) == 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_arrive_in_pieces),
        cmocka_unit_test(large_numbers_are_neither_mended_nor_broken),
        cmocka_unit_test(values_are_found_as_written),
        cmocka_unit_test(seeds_are_what_they_always_were),
        cmocka_unit_test(long_texts_begin_in_time),
        cmocka_unit_test(the_order_is_the_inputs_until_its_end),
        cmocka_unit_test(short_of_memory_means_fewer_at_once),
        cmocka_unit_test(a_broken_record_is_one_error),
        cmocka_unit_test(writes_in_pieces_add_up),
        cmocka_unit_test(every_failed_allocation_is_an_error),
        cmocka_unit_test(parallel_follows_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

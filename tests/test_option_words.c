/*
 * test_option_words.c - the library's words become the command line's in messages; no others do.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "../cli/option_words.c"

static void test_texts(void **state) {
    (void)state;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"", ""},
        {"lower n_slots (or n_samples), or n_positions", "lower --parallel (or -n), or --context"},
        {"n_threads is 0; top_k, top_p: max_new_tokens.",
         "-t is 0; --top-k, --top-p: --max-new-tokens."},
        {"check the model file with bpo_model_verify", "check the model file with --verify"},
        /* parts of words, names of files, and what is quoted stay */
        {"n_slots_free my_top_k top_k2 ./top_k top_k.bin dir/n_slots -n_slots \"top_k\" 'top_k'",
         "n_slots_free my_top_k top_k2 ./top_k top_k.bin dir/n_slots -n_slots \"top_k\" 'top_k'"},
        /* plain words stay in a message */
        {"cannot write x: No space left on device", "cannot write x: No space left on device"},
        {"token ids from lookup, \xE2\x96\x81 \xFF", "token ids from lookup, \xE2\x96\x81 \xFF"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[200];
        (void)snprintf(text, sizeof text, "%s", cases[i].text);
        for (int twice = 0; twice < 2; twice++) {
            option_words(text, sizeof text);
            assert_string_equal(text, cases[i].expected);
        }
    }
}

static void test_error(void **state) {
    (void)state;
    struct bpo_error err = {-5, "no such device; n_slots is 3",
                            "leave device at BPO_DEVICE_AUTO, or lookup and ids out"};
    option_words_in_error(&err);
    assert_string_equal(err.message, "no such device; --parallel is 3");
    assert_string_equal(err.hint, "leave --device at auto, or --lookup and --tokens out");
    assert_int_equal(err.code, -5);
    static const struct {
        const char *hint, *expected;
    } cases[] = {
        {"bpo_tokenize gives the ids of a text", "--tokenize gives the ids of a text"},
        {"the device is a device, no device", "the device is a device, no device"},
        {"lookup is off", "--lookup is off"},
        {"give text or ids", "give text or --tokens"},
        {"bathe ids", "bathe --tokens"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        (void)snprintf(err.hint, sizeof err.hint, "%s", cases[i].hint);
        option_words_in_error(&err);
        option_words_in_error(&err);
        assert_string_equal(err.hint, cases[i].expected);
    }
}

static void test_every_word(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof WORDS / sizeof WORDS[0]; i++) {
        struct bpo_error err = {0};
        (void)snprintf(err.hint, sizeof err.hint, "see %s", WORDS[i].word);
        option_words_in_error(&err);
        assert_string_equal(err.hint + 4, WORDS[i].option);
    }
}

/* A text that grows too long is cut, and nothing is written beyond its end. */
static void test_too_long(void **state) {
    (void)state;
    struct bpo_error err = {0};
    for (size_t n = 0; n + 8 < sizeof err.message; n += 8) {
        memcpy(err.message + n, "n_slots ", 8);
    }
    memset(err.hint, 'x', sizeof err.hint - 1);
    option_words_in_error(&err);
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
    assert_memory_equal(err.message, "--parallel --parallel ", 22);
    assert_int_equal(strlen(err.hint), sizeof err.hint - 1);
    char text[12] = "use n_slots";
    option_words(text, sizeof text);
    assert_string_equal(text, "use --paral");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_error),
        cmocka_unit_test(test_every_word),
        cmocka_unit_test(test_too_long),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/*
 * test_tokenizer.c - tokenizer.h compared with golden ids of the sentencepiece package
 * (tests/data/tiny_tokenizer.json, and Llama-2's tokenizer if ../shared or $BPO_SHARED has it) and
 * with SentencePiece's decoder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/sentencepiece_c.h"
#include "random_values.h"
#include "tokenizer.h"

#define TINY_MODEL "tests/data/tiny.model"
#define TINY_GOLDEN "tests/data/tiny_tokenizer.json"

/* ---- helpers ---- */

static void *read_file(const char *path, size_t *n) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        return NULL;
    }
    struct text content = {0};
    char block[65536];
    size_t n_block;
    while ((n_block = fread(block, 1, sizeof block, file)) > 0) {
        assert_int_equal(text_append(&content, block, n_block, NULL), 0);
    }
    (void)fclose(file);
    *n = content.n;
    return content.data;
}

static const char *shared_path(const char *name) {
    static char path[4096];
    const char *folder = getenv("BPO_SHARED");
    (void)snprintf(path, sizeof path, "%s/%s", folder ? folder : "../shared", name);
    return path;
}

static struct tokenizer *open_or_fail(const void *model, size_t n) {
    struct bpo_error err = {0};
    struct tokenizer *t = tokenizer_open(model, n, &err);
    if (!t) {
        fail_msg("%s (%s)", err.message, err.hint);
    }
    return t;
}

/* Opens Llama-2's tokenizer, or skips the test if there is none. */
static struct tokenizer *open_llama(void) {
    size_t n;
    void *model = read_file(shared_path("llama2/tokenizer.model"), &n);
    if (!model) {
        print_message("skipped: no %s (set BPO_SHARED)\n", shared_path("llama2/tokenizer.model"));
        skip();
    }
    struct tokenizer *t = open_or_fail(model, n);
    free(model);
    return t;
}

/* The tiny model with appended protobuf fields, which override its own. */
static unsigned char *tiny_with(const void *append, size_t n_append, size_t *n) {
    unsigned char *model = read_file(TINY_MODEL, n);
    if (!model) {
        fail_msg("%s is missing; the tests run from the repository's root", TINY_MODEL);
    }
    unsigned char *larger = realloc(model, *n + n_append + 1);
    assert_non_null(larger);
    if (n_append > 0) {
        memcpy(larger + *n, append, n_append);
    }
    *n += n_append;
    return larger;
}

static struct tokenizer *open_tiny(void) {
    size_t n;
    unsigned char *model = tiny_with(NULL, 0, &n);
    struct tokenizer *t = open_or_fail(model, n);
    free(model);
    return t;
}

/* "610a" -> "a\n"; malloc'ed */
static char *unhex(const char *hex, size_t *n) {
    *n = strlen(hex) / 2;
    char *bytes = must_alloc(*n + 1);
    for (size_t i = 0; i < *n; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], 0};
        bytes[i] = (char)strtoul(digits, NULL, 16);
    }
    return bytes;
}

static json_t *load_json(const char *path) {
    json_error_t error;
    json_t *root = json_load_file(path, 0, &error);
    if (!root) {
        fail_msg("%s:%d: %s", path, error.line, error.text);
    }
    return root;
}

static int32_t *json_ids(const json_t *array, size_t *n) {
    *n = json_array_size(array);
    int32_t *ids = must_alloc((*n + 1) * sizeof *ids);
    for (size_t i = 0; i < *n; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    }
    return ids;
}

static void check_encode(const struct tokenizer *t, const char *text, size_t n_text,
                         const int32_t *expected, size_t n) {
    int32_t *ids;
    size_t n_ids;
    struct bpo_error err = {0};
    if (tokenizer_encode(t, text, n_text, &ids, &n_ids, &err)) {
        fail_msg("%s", err.message);
    }
    if (n_ids != n || (n > 0 && memcmp(ids, expected, n * sizeof *ids) != 0)) {
        print_error("ids of \"%.*s\" (%zu bytes): found %zu:", (int)n_text, text, n_text, n_ids);
        for (size_t i = 0; i < n_ids; i++) {
            print_error(" %d", ids[i]);
        }
        print_error("; expected %zu:", n);
        for (size_t i = 0; i < n; i++) {
            print_error(" %d", expected[i]);
        }
        print_error("\n");
        fail();
    }
    free(ids);
}

/* Decodes id by id. The text must consist of whole characters after every id. */
static struct text stream(const struct tokenizer *t, const int32_t *ids, size_t n) {
    struct text out = {0};
    struct decoder d = {0};
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(decoder_push(&d, t, ids[i], &out, NULL), 0);
        assert_int_equal(utf8_valid_prefix(out.data, out.n), out.n);
        assert_true(d.n_held < 4);
    }
    assert_int_equal(decoder_flush(&d, &out, NULL), 0);
    assert_int_equal(text_append(&out, "", 0, NULL), 0);
    return out;
}

static void check_stream(const struct tokenizer *t, const int32_t *ids, size_t n,
                         const char *expected, size_t n_text) {
    struct text out = stream(t, ids, n);
    if (out.n != n_text || memcmp(out.data, expected, n_text) != 0) {
        fail_msg("%zu ids from %d: found \"%s\", expected \"%.*s\"", n, n > 0 ? ids[0] : -1,
                 out.data, (int)n_text, expected);
    }
    assert_int_equal(out.data[out.n], 0);
    free(out.data);
}

/* ---- Llama-2's tokenizer ---- */

static void test_llama_golden(void **state) {
    (void)state;
    struct tokenizer *t = open_llama();
    static const struct {
        const char *text;
        size_t n;
        int32_t ids[8];
    } golden[] = {
        {"a", 1, {263}},
        {" a", 2, {29871, 263}},
        {"  a", 2, {259, 263}},
        {"a\nb", 3, {263, 13, 29890}},
        {"\n", 2, {29871, 13}},
        {"\t", 2, {29871, 12}},
        {"\r\n", 2, {6756, 13}},
        {"\xF0\x9F\x98\x80", 5, {29871, 243, 162, 155, 131}},
        {"</s>", 3, {1533, 29879, 29958}},
        {"", 0, {0}},
    };
    for (size_t i = 0; i < sizeof golden / sizeof golden[0]; i++) {
        check_encode(t, golden[i].text, strlen(golden[i].text), golden[i].ids, golden[i].n);
    }
    assert_int_equal(tokenizer_count(t), 32000);
    assert_int_equal(tokenizer_byte_id(t, '\n'), 13);
    assert_int_equal(tokenizer_byte_id(t, 0), 3);
    assert_int_equal(tokenizer_byte_id(t, 255), 258);
    for (int32_t id = 0; id < 3; id++) {
        assert_true(tokenizer_is_control(t, id));
    }
    assert_false(tokenizer_is_control(t, 3));
    tokenizer_close(t);
}

/* 400 real prompts in the template: {"id": ..., "prompt": ...} and {"id": ..., "ids": [1, ...]} */
static void test_llama_templates(void **state) {
    (void)state;
    FILE *golden = fopen(shared_path("prompts/template_ids.jsonl"), "r");
    if (!golden) {
        print_message("skipped: no %s (set BPO_SHARED)\n",
                      shared_path("prompts/template_ids.jsonl"));
        skip();
    }
    FILE *prompts = fopen(shared_path("prompts/bpo_test.jsonl"), "r");
    assert_non_null(prompts);
    struct tokenizer *t = open_llama();
    int n_rows = 0;
    json_t *row;
    while ((row = json_loadf(golden, JSON_DISABLE_EOF_CHECK, NULL))) {
        json_t *record = json_loadf(prompts, JSON_DISABLE_EOF_CHECK, NULL);
        if (!record) {
            (void)fclose(prompts);
            prompts = fopen(shared_path("prompts/dolly.jsonl"), "r");
            assert_non_null(prompts);
            record = json_loadf(prompts, JSON_DISABLE_EOF_CHECK, NULL);
        }
        assert_string_equal(json_string_value(json_object_get(row, "id")),
                            json_string_value(json_object_get(record, "id")));
        struct text text = {0};
        const json_t *prompt = json_object_get(record, "prompt");
        const char *head = "[INST] You are an expert prompt engineer. Please help me improve this "
                           "prompt to get a more "
                           "helpful and harmless response:\n";
        assert_int_equal(text_append(&text, head, strlen(head), NULL), 0);
        assert_int_equal(
            text_append(&text, json_string_value(prompt), json_string_length(prompt), NULL), 0);
        assert_int_equal(text_append(&text, " [/INST]", 8, NULL), 0);
        size_t n;
        int32_t *ids = json_ids(json_object_get(row, "ids"), &n);
        assert_int_equal(ids[0], 1); /* BOS */
        check_encode(t, text.data, text.n, ids + 1, n - 1);
        check_stream(t, ids, n, text.data, text.n);
        free(ids);
        free(text.data);
        json_decref(row);
        json_decref(record);
        n_rows++;
    }
    (void)fclose(golden);
    (void)fclose(prompts);
    assert_int_equal(n_rows, 400);
    tokenizer_close(t);
}

/* ---- the tiny model: golden rows of the sentencepiece package ---- */

static void test_tiny_golden(void **state) {
    (void)state;
    json_t *variants = load_json(TINY_GOLDEN);
    size_t i, k;
    json_t *variant, *row;
    json_array_foreach(variants, i, variant) {
        size_t n_append, n_model;
        char *append = unhex(json_string_value(json_object_get(variant, "append")), &n_append);
        unsigned char *model = tiny_with(append, n_append, &n_model);
        struct tokenizer *t = open_or_fail(model, n_model);
        json_array_foreach(json_object_get(variant, "encode"), k, row) {
            size_t n_text, n_ids;
            char *text = unhex(json_string_value(json_array_get(row, 0)), &n_text);
            int32_t *ids = json_ids(json_array_get(row, 1), &n_ids);
            check_encode(t, text, n_text, ids, n_ids);
            free(text);
            free(ids);
        }
        assert_true(k > 90);
        json_array_foreach(json_object_get(variant, "decode"), k, row) {
            size_t n_text, n_ids;
            int32_t *ids = json_ids(json_array_get(row, 0), &n_ids);
            char *text = unhex(json_string_value(json_array_get(row, 1)), &n_text);
            check_stream(t, ids, n_ids, text, n_text);
            free(text);
            free(ids);
        }
        assert_true(k >= 40);
        tokenizer_close(t);
        free(model);
        free(append);
    }
    json_decref(variants);
}

/* Control pieces, the unknown piece and ids outside the vocabulary leave no trace, not even inside
 * a character. */
static void test_control_dropped(void **state) {
    (void)state;
    struct tokenizer *t = open_tiny();
    const int32_t e2 = tokenizer_byte_id(t, 0xE2), x82 = tokenizer_byte_id(t, 0x82),
                  ac = tokenizer_byte_id(t, 0xAC);
    const int32_t ids[] = {1, e2, 0, x82, 2, 400, -1, INT32_MAX, INT32_MIN, ac, 2};
    check_stream(t, ids, sizeof ids / sizeof ids[0], "\xE2\x82\xAC", 3);
    assert_true(tokenizer_is_control(t, -1));
    assert_true(tokenizer_is_control(t, tokenizer_count(t)));
    assert_false(tokenizer_is_control(t, tokenizer_count(t) - 1));
    tokenizer_close(t);
}

/* ---- the streaming decoder against SentencePiece's ---- */

/* Draws max ids: runs of bytes (whole, cut and broken characters) and other pieces. */
static size_t random_ids(const struct tokenizer *t, int32_t *ids, size_t max) {
    static const char *const samples[] = {
        "\xC3\xA9",     "\xE6\x97\xA5", "\xF0\x9F\x98\x80", "\xED\xA0\x80", "\xC0\x80",
        "\xE2\x96\x81", "\xEF\xBF\xBD", "\xF4\x90\x80\x80", "\n",           " "};
    size_t n = 0;
    while (n < max) {
        size_t kind = random_below(8);
        if (kind < 3) {
            const char *bytes = samples[random_below(sizeof samples / sizeof samples[0])];
            size_t n_bytes = strlen(bytes), cut = random_below(n_bytes + 1);
            for (size_t i = 0; i < (kind == 0 ? cut : n_bytes) && n < max; i++) {
                ids[n++] = tokenizer_byte_id(t, (uint8_t)bytes[i]);
            }
        } else if (kind == 3) {
            ids[n++] = tokenizer_byte_id(t, (uint8_t)random_below(256));
        } else {
            int32_t id = (int32_t)random_below((size_t)tokenizer_count(t));
            if (!tokenizer_is_control(t, id)) {
                ids[n++] = id;
            }
        }
    }
    return n;
}

static void compare_with_sentencepiece(const void *model, size_t n_model) {
    char message[256];
    struct spm *spm;
    assert_int_equal(spm_open(&spm, model, n_model, message, sizeof message), SPM_OK);
    struct tokenizer *t = open_or_fail(model, n_model);
    for (int round = 0; round < 3000; round++) {
        int32_t ids[40];
        size_t n = random_ids(t, ids, 1 + random_below(40));
        char *expected;
        size_t n_expected;
        assert_int_equal(spm_decode(spm, ids, n, &expected, &n_expected), SPM_OK);
        check_stream(t, ids, n, expected, n_expected);
        free(expected);
    }
    tokenizer_close(t);
    spm_close(spm);
}

static void test_stream_equals_decode(void **state) {
    (void)state;
    static const struct {
        const char *append;
        size_t n;
    } variants[] = {
        {"", 0},
        {"\x1A\x02\x18\x00", 4},                 /* add_dummy_prefix: false */
        {"\x1A\x02\x20\x01", 4},                 /* remove_extra_whitespaces: true */
        {"\x1A\x04\x18\x00\x20\x01", 6},         /* both */
        {"\x1A\x06\x18\x00\x20\x00\x28\x00", 8}, /* none, and escape_whitespaces: false */
    };
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        size_t n;
        unsigned char *model = tiny_with(variants[i].append, variants[i].n, &n);
        compare_with_sentencepiece(model, n);
        free(model);
    }
}

static void test_stream_equals_decode_llama(void **state) {
    (void)state;
    tokenizer_close(open_llama()); /* or skip */
    size_t n;
    void *model = read_file(shared_path("llama2/tokenizer.model"), &n);
    compare_with_sentencepiece(model, n);
    free(model);
}

/* Which bytes are held back after each byte, and what a flush makes of them. */
static void test_hold_back(void **state) {
    (void)state;
    struct tokenizer *t = open_tiny();
    static const struct {
        const char *bytes;
        size_t n_out[5]; /* bytes of text after each byte, the last one after the flush */
    } cases[] = {
        {"\xF0\x9F\x98\x80", {0, 0, 0, 4, 4}}, /* a character of four bytes */
        {"\xF0\x9F\x98", {0, 0, 0, 9}},        /* cut: three bytes, three U+FFFD */
        {"\xE2\x82", {0, 0, 6}},
        {"\xC3", {0, 3}},
        {"\xC3\xC3\xA9", {0, 3, 5, 5}}, /* the first cannot continue, the second can */
        {"\x80", {3, 3}},               /* a continuation byte alone */
        {"\xC0\x80", {3, 6, 6}},        /* overlong */
        {"\xE0\x80\x80", {0, 6, 9, 9}}, /* overlong, as the second byte shows */
        {"\xF0\x80\x80\x80", {0, 6, 9, 12, 12}},
        {"\xED\xA0\x80", {0, 6, 9, 9}},          /* a surrogate */
        {"\xF4\x90\x80\x80", {0, 6, 9, 12, 12}}, /* above U+10FFFF */
        {"\xF5\x80", {3, 6, 6}},
        {"\xF0\x9F\x41", {0, 0, 7, 7}}, /* two U+FFFD and an A */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct text out = {0};
        struct decoder d = {0};
        size_t n = strlen(cases[i].bytes);
        for (size_t k = 0; k < n; k++) {
            int32_t id = tokenizer_byte_id(t, (uint8_t)cases[i].bytes[k]);
            assert_int_equal(decoder_push(&d, t, id, &out, NULL), 0);
            assert_int_equal(out.n, cases[i].n_out[k]);
        }
        assert_int_equal(decoder_flush(&d, &out, NULL), 0);
        assert_int_equal(out.n, cases[i].n_out[n]);
        assert_int_equal(d.n_held, 0);
        free(out.data);
    }
    tokenizer_close(t);
}

/* Encoding and then streaming gives the text back, with U+FFFD for each byte that is not UTF-8. */
static void test_round_trip(void **state) {
    (void)state;
    struct tokenizer *t = open_tiny();
    for (int round = 0; round < 2000; round++) {
        char text[64];
        struct text expected = {0};
        size_t n = random_below(sizeof text);
        for (size_t i = 0; i < n; i++) {
            size_t kind = random_below(4);
            text[i] = kind == 0 ? (char)random_below(256) : " \n<aetx\0"[random_below(8)];
        }
        for (size_t i = 0; i < n;) {
            size_t valid = utf8_valid_prefix(text + i, n - i);
            assert_int_equal(text_append(&expected, text + i, valid, NULL), 0);
            i += valid;
            if (i < n) {
                assert_int_equal(text_append(&expected, "\xEF\xBF\xBD", 3, NULL), 0);
                i++;
            }
        }
        int32_t *ids;
        size_t n_ids;
        assert_int_equal(tokenizer_encode(t, text, n, &ids, &n_ids, NULL), 0);
        check_stream(t, ids, n_ids, expected.data ? expected.data : "", expected.n);
        free(ids);
        free(expected.data);
    }
    tokenizer_close(t);
}

/* ---- small things ---- */

static void test_utf8_valid_prefix(void **state) {
    (void)state;
    static const struct {
        const char *text;
        size_t n, valid;
    } cases[] = {
        {"", 0, 0},
        {"abc", 3, 3},
        {"a\0b", 3, 3},
        {"\xC2\x80\xDF\xBF", 4, 4},
        {"\xE0\xA0\x80\xED\x9F\xBF\xEE\x80\x80\xEF\xBF\xBF", 12, 12},
        {"\xF0\x90\x80\x80\xF4\x8F\xBF\xBF", 8, 8},
        {"ab\xC3", 3, 2},
        {"ab\xE2\x82", 4, 2},
        {"ab\xF0\x9F\x98", 5, 2},
        {"a\x80", 2, 1},
        {"a\xC1\xBF", 3, 1},
        {"a\xE0\x9F\xBF", 4, 1},
        {"a\xED\xA0\x80", 4, 1},
        {"a\xF0\x8F\xBF\xBF", 5, 1},
        {"a\xF4\x90\x80\x80", 5, 1},
        {"a\xFF", 2, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(utf8_valid_prefix(cases[i].text, cases[i].n), cases[i].valid);
    }
}

static void test_text_append(void **state) {
    (void)state;
    struct text t = {0};
    for (size_t i = 0; i < 1000; i++) {
        char byte = (char)('a' + i % 26);
        assert_int_equal(text_append(&t, &byte, 1, NULL), 0);
        assert_int_equal(t.n, i + 1);
        assert_true(t.capacity > t.n);
        assert_int_equal(t.data[t.n], 0);
    }
    assert_int_equal(t.data[999], 'a' + 999 % 26);
    struct bpo_error err = {0};
    /* the sum would wrap around */
    assert_int_equal(text_append(&t, "", SIZE_MAX - 10, &err), BPO_ERR_RESOURCE);
    assert_int_equal(err.code, BPO_ERR_RESOURCE);
    assert_int_equal(t.n, 1000);
    free(t.data);
}

static void test_too_long(void **state) {
    (void)state;
    struct tokenizer *t = open_tiny();
    struct bpo_error err = {0};
    int32_t *ids;
    size_t n_ids;
    assert_int_equal(tokenizer_encode(t, "a", (size_t)INT32_MAX, &ids, &n_ids, &err),
                     BPO_ERR_INPUT);
    assert_null(ids);
    tokenizer_close(t);
}

/* ---- broken models ---- */

/* Opens a model and, if that works, uses it. Whatever it contains, nothing may crash. */
static void use(const void *model, size_t n) {
    struct bpo_error err = {0};
    struct tokenizer *t = tokenizer_open(model, n, &err);
    if (!t) {
        assert_int_equal(err.code, BPO_ERR_MODEL);
        assert_true(strlen(err.message) > 0);
        return;
    }
    int32_t *ids;
    size_t n_ids;
    const char *text = " Tell me  about \xF0\x9F\x98\x80 \xFF water 123\n";
    if (tokenizer_encode(t, text, strlen(text), &ids, &n_ids, NULL) == 0) {
        free(stream(t, ids, n_ids).data);
        free(ids);
    }
    for (int32_t id = -2; id < tokenizer_count(t) + 2; id++) {
        struct decoder d = {0};
        struct text out = {0};
        (void)decoder_push(&d, t, id, &out, NULL);
        (void)decoder_flush(&d, &out, NULL);
        free(out.data);
    }
    tokenizer_close(t);
}

static void test_refused(void **state) {
    (void)state;
    static const struct {
        const char *append;
        size_t n;
    } cases[] = {
        {"\x12\x03\xC0\x01\x01", 5}, /* trainer_spec { treat_whitespace_as_suffix: true } */
        {"\x12\x02\x18\x03", 4},     /* trainer_spec { model_type: WORD } */
        {"\x1A\x03\x12\x01\x00", 5}, /* normalizer_spec { precompiled_charsmap: "\0" } */
        {"\x2A\x03\x12\x01\x00", 5}, /* denormalizer_spec { precompiled_charsmap: "\0" } */
        {"\x0A\x00", 2},             /* a piece without text */
        {"\x12\x7F", 2},             /* a field that is longer than the model */
        {"\x12", 1},                 /* a field without a length */
        {"\x80", 1},                 /* half a number */
        {"\x13\x14", 2},             /* a group */
        /* trainer_spec { byte_fallback: false } (field 35), with byte pieces */
        {"\x12\x03\x98\x02\x00", 5},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n;
        unsigned char *model = tiny_with(cases[i].append, cases[i].n, &n);
        struct bpo_error err = {0};
        assert_null(tokenizer_open(model, n, &err));
        assert_int_equal(err.code, BPO_ERR_MODEL);
        free(model);
    }
    struct bpo_error err = {0};
    assert_null(tokenizer_open("", 0, &err));
    assert_int_equal(err.code, BPO_ERR_MODEL);
    assert_null(tokenizer_open("hello, world", 12, &err));
    assert_null(tokenizer_open("", 0, NULL));
    tokenizer_close(NULL);
}

static void test_corrupt(void **state) {
    (void)state;
    /* The library does not print, and neither must SentencePiece. A file captures stderr
     * meanwhile, so that its bytes can be counted. */
    FILE *capture = tmpfile();
    assert_non_null(capture);
    (void)fflush(stderr);
    int saved = dup(STDERR_FILENO);
    assert_true(saved >= 0 && dup2(fileno(capture), STDERR_FILENO) >= 0);

    size_t n;
    unsigned char *model = tiny_with(NULL, 0, &n);
    for (size_t cut = 0; cut < n; cut += cut < 64 || cut + 300 > n ? 1 : 29) {
        /* an allocation of this size, so that the sanitizer sees a read beyond it */
        unsigned char *part = must_alloc(cut + 1);
        memcpy(part, model, cut);
        use(part, cut);
        free(part);
    }
    for (int round = 0; round < 1500; round++) {
        unsigned char *copy = must_alloc(n);
        memcpy(copy, model, n);
        for (size_t flips = 1 + random_below(4); flips > 0; flips--) {
            /* Half of the flips hit the end, where the settings are. */
            size_t at = random_below(2) ? random_below(n) : n - 1 - random_below(60);
            copy[at] = (unsigned char)(copy[at] ^ (1U << random_below(8)));
        }
        use(copy, n);
        free(copy);
    }
    free(model);

    (void)fflush(stderr);
    (void)dup2(saved, STDERR_FILENO);
    (void)close(saved);
    (void)fseek(capture, 0, SEEK_END);
    long printed = ftell(capture);
    (void)fclose(capture);
    assert_int_equal(printed, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_utf8_valid_prefix),
        cmocka_unit_test(test_text_append),
        cmocka_unit_test(test_tiny_golden),
        cmocka_unit_test(test_control_dropped),
        cmocka_unit_test(test_stream_equals_decode),
        cmocka_unit_test(test_hold_back),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_too_long),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_corrupt),
        cmocka_unit_test(test_llama_golden),
        cmocka_unit_test(test_llama_templates),
        cmocka_unit_test(test_stream_equals_decode_llama),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

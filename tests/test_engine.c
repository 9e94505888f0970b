/*
 * test_engine.c - bpo.c and engine/ from the inside: model files that are broken in every way, the
 * sampler against exact distributions, and the step loop: prefill against decoding, samples,
 * drafts, interruption, errors.
 */
#include "../engine/engine.c" /* first: its static functions are tested */
#include "../bpo.c"

#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

#include "tiny_session.h"

static char path[TEMPORARY_PATH];

static int make_path(void **state) {
    (void)state;
    temporary_path(path, "engine.bin");
    return 0;
}

static int remove_path(void **state) {
    (void)state;
    (void)unlink(path);
    return 0;
}

/* ---------------------------------------------------------------- model files */

static json_t *entry(struct tiny *t, const char *name) {
    return json_object_get(t->header, name);
}

static void set(struct tiny *t, const char *name, const char *member, json_t *value) {
    json_object_set_new(entry(t, name), member, value);
}

static void set_offsets(struct tiny *t, const char *name, json_int_t begin, json_int_t end) {
    set(t, name, "data_offsets", json_pack("[I, I]", begin, end));
}

// clang-format off
/* Each spoils one thing. The model must be refused, with a message that contains the word in the
 * table of refuses_broken_headers. */
#define SPOIL(name) static void name(struct tiny *t)
#define NORM "model.norm.weight"
#define HEAD "lm_head.weight"
SPOIL(no_tensor) { json_object_del(t->header, NORM); }
SPOIL(tensor_renamed) {
    json_object_set(t->header, "model.norm.bias", entry(t, NORM));
    json_object_del(t->header, NORM);
}
SPOIL(tensor_extra) { tiny_pad(t); tiny_weight(t, "model.layers.2.mlp.down_proj.weight", 4, 8, 0); }
SPOIL(dtype_f32) { set(t, NORM, "dtype", json_string("F32")); }
SPOIL(dtype_number) { set(t, NORM, "dtype", json_integer(16)); }
SPOIL(dtype_missing) { json_object_del(entry(t, NORM), "dtype"); }
SPOIL(dtype_u8) {
    set(t, NORM, "dtype", json_string("U8"));
    set(t, NORM, "shape", json_pack("[i]", 2 * TINY_DIM));
}
SPOIL(shape_swapped) { set(t, HEAD, "shape", json_pack("[i, i]", TINY_DIM, TINY_VOCAB)); }
SPOIL(shape_flat) { set(t, HEAD, "shape", json_pack("[i]", TINY_DIM * TINY_VOCAB)); }
SPOIL(shape_3d) { set(t, HEAD, "shape", json_pack("[i, i, i]", 1, TINY_VOCAB, TINY_DIM)); }
SPOIL(shape_empty) { set(t, NORM, "shape", json_array()); }
SPOIL(shape_negative) { set(t, NORM, "shape", json_pack("[i]", -TINY_DIM)); }
SPOIL(shape_real) { set(t, NORM, "shape", json_pack("[f]", 24.0)); }
SPOIL(shape_overflow) {
    set(t, HEAD, "shape", json_pack("[I, I]", INT64_C(1) << 62, INT64_C(4)));
}
SPOIL(shape_missing) { json_object_del(entry(t, NORM), "shape"); }
SPOIL(shape_small) { set(t, NORM, "shape", json_pack("[i]", TINY_DIM - 1)); }
SPOIL(offsets_reversed) { set_offsets(t, NORM, 4096, 4048); }
SPOIL(offsets_negative) { set_offsets(t, NORM, -48, 0); }
SPOIL(offsets_past_end) { set_offsets(t, NORM, (json_int_t)t->n_data, (json_int_t)t->n_data + 48); }
SPOIL(offsets_huge) { set_offsets(t, NORM, INT64_MAX - 48, INT64_MAX); }
SPOIL(offsets_one) { set(t, NORM, "data_offsets", json_pack("[i]", 0)); }
SPOIL(offsets_text) { set(t, NORM, "data_offsets", json_pack("[s, s]", "0", "48")); }
SPOIL(overlap) { set_offsets(t, NORM, 0, 48); }
SPOIL(misaligned) {
    const json_t *offsets = json_object_get(entry(t, NORM), "data_offsets");
    json_int_t at = json_integer_value(json_array_get(offsets, 0));
    json_t *pad_x = json_pack("{s:s, s:[i], s:[I, I]}", "dtype", "U8", "shape", 16,
                              "data_offsets", at, at + 16);
    json_object_set_new(t->header, "pad.x", pad_x);
    set_offsets(t, NORM, at + 16, at + 64);
    char pad[32];
    (void)snprintf(pad, sizeof pad, "pad.%lld", (long long)at + 48);
    json_object_del(t->header, pad);
}
SPOIL(trailing_bytes) {
    t->data = realloc(t->data, t->n_data + 8);
    memset(t->data + t->n_data, 0, 8);
    t->n_data += 8;
}
SPOIL(truncated) { t->n_data -= 1; }
SPOIL(truncated_half) { t->n_data /= 2; }
SPOIL(entry_not_object) { json_object_set_new(t->header, "odd", json_integer(1)); }
SPOIL(entry_extra_member) { set(t, NORM, "scale", json_integer(1)); }
SPOIL(no_metadata) { json_object_del(t->header, "__metadata__"); }
SPOIL(metadata_number) { set(t, "__metadata__", "dim", json_integer(24)); }
SPOIL(format_other) { tiny_meta(t, "format", "pt"); }
SPOIL(version_2) { tiny_meta(t, "format_version", "2"); }
SPOIL(dim_word) { tiny_meta(t, "dim", "many"); }
SPOIL(dim_zero) { tiny_meta(t, "dim", "0"); }
SPOIL(dim_real) { tiny_meta(t, "dim", "24.5"); }
SPOIL(dim_huge) { tiny_meta(t, "dim", "99999999999999999999"); }
SPOIL(dim_other) { tiny_meta(t, "dim", "32"); }
SPOIL(heads_not_multiple) { tiny_meta(t, "n_kv_heads", "2"); }
SPOIL(head_dim_odd) { tiny_meta(t, "head_dim", "9"); }
SPOIL(layers_more) { tiny_meta(t, "n_layers", "3"); }
SPOIL(layers_fewer) { tiny_meta(t, "n_layers", "1"); }
SPOIL(layers_negative) { tiny_meta(t, "n_layers", "-1"); }
SPOIL(vocab_other) { tiny_meta(t, "vocab_size", "403"); }
SPOIL(vocab_below_tokenizer) {
    tiny_meta(t, "vocab_size", "300");
    set(t, HEAD, "shape", json_pack("[i, i]", 300, TINY_DIM));
}
SPOIL(eos_outside) { tiny_meta(t, "eos_id", "404"); }
SPOIL(newline_other) { tiny_meta(t, "newline_id", "12"); }
SPOIL(eps_negative) { tiny_meta(t, "rms_norm_eps", "-1e-5"); }
SPOIL(eps_nan) { tiny_meta(t, "rms_norm_eps", "nan"); }
SPOIL(theta_zero) { tiny_meta(t, "rope_theta", "0"); }
SPOIL(tied_maybe) { tiny_meta(t, "tie_embeddings", "maybe"); }
SPOIL(tied_with_head) { tiny_meta(t, "tie_embeddings", "true"); }
SPOIL(template_none) { tiny_meta(t, "template", "[INST] improve [/INST]"); }
SPOIL(template_twice) { tiny_meta(t, "template", "{prompt} {prompt}"); }
SPOIL(settings_top_p) { tiny_meta(t, "stable.top_p", "1.5"); }
SPOIL(settings_missing) { json_object_del(entry(t, "__metadata__"), "aggressive.samples"); }
SPOIL(tokenizer_none) { json_object_del(t->header, "tokenizer.model"); }
SPOIL(tokenizer_damaged) { memset(tiny_data(t, "tokenizer.model"), 0xFF, 64); }
SPOIL(tokenizer_other_dtype) {
    set(t, "tokenizer.model", "dtype", json_string("F16"));
}
// clang-format on

static void refuses_broken_headers(void **state) {
    (void)state;
    static const struct {
        const char *what;
        void (*spoil)(struct tiny *t);
        const char *says;
    } cases[] = {
        {"no tensor", no_tensor, ""},
        {"tensor renamed", tensor_renamed, NORM},
        {"tensor extra", tensor_extra, "calls for"},
        {"dtype F32", dtype_f32, "F32"},
        {"dtype a number", dtype_number, "dtype"},
        {"dtype missing", dtype_missing, "dtype"},
        {"dtype U8", dtype_u8, "U8"},
        {"shape swapped", shape_swapped, "expected F16"},
        {"shape flat", shape_flat, "expected F16"},
        {"shape 3d", shape_3d, "dimensions"},
        {"shape empty", shape_empty, "dimensions"},
        {"shape negative", shape_negative, "larger"},
        {"shape real", shape_real, "larger"},
        {"shape overflow", shape_overflow, "larger"},
        {"shape missing", shape_missing, "shape"},
        {"shape small", shape_small, "span"},
        {"offsets reversed", offsets_reversed, "outside"},
        {"offsets negative", offsets_negative, "outside"},
        {"offsets past end", offsets_past_end, "outside"},
        {"offsets huge", offsets_huge, "outside"},
        {"offsets one", offsets_one, "two data_offsets"},
        {"offsets text", offsets_text, "outside"},
        {"overlap", overlap, "overlap"},
        {"misaligned", misaligned, "64"},
        {"trailing bytes", trailing_bytes, "end at"},
        {"truncated", truncated, "truncated"},
        {"truncated half", truncated_half, "truncated"},
        {"entry no object", entry_not_object, "odd"},
        {"entry extra member", entry_extra_member, "expected"},
        {"no metadata", no_metadata, "export_weights.py"},
        {"metadata number", metadata_number, "dim"},
        {"format other", format_other, "export_weights.py"},
        {"version 2", version_2, "version 2"},
        {"dim word", dim_word, "many"},
        {"dim zero", dim_zero, "dim"},
        {"dim real", dim_real, "integer"},
        {"dim huge", dim_huge, "dim"},
        {"dim other", dim_other, "expected F16"},
        {"heads no multiple", heads_not_multiple, "key/value"},
        {"head dim odd", head_dim_odd, "head size"},
        {"layers more", layers_more, "missing"},
        {"layers fewer", layers_fewer, "calls for"},
        {"layers negative", layers_negative, "n_layers"},
        {"vocab other", vocab_other, "expected F16"},
        {"vocab below tokenizer", vocab_below_tokenizer, ""},
        {"eos outside", eos_outside, "404"},
        {"newline other", newline_other, "newline"},
        {"eps negative", eps_negative, "rms_norm_eps"},
        {"eps nan", eps_nan, "rms_norm_eps"},
        {"theta zero", theta_zero, "rope_theta"},
        {"tied maybe", tied_maybe, "maybe"},
        {"tied with head", tied_with_head, "calls for"},
        {"template none", template_none, "{prompt}"},
        {"template twice", template_twice, "{prompt}"},
        {"settings top p", settings_top_p, "top_p"},
        {"settings missing", settings_missing, "aggressive.samples"},
        {"tokenizer none", tokenizer_none, ""},
        {"tokenizer damaged", tokenizer_damaged, ""},
        {"tokenizer other dtype", tokenizer_other_dtype, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tiny t = tiny_model();
        struct bpo_error err = {0};
        cases[i].spoil(&t);
        tiny_write(&t, path, NULL, 0);
        struct bpo_model *m = bpo_model_open(path, &err);
        if (m || err.code != BPO_ERR_MODEL || !strstr(err.message, cases[i].says)) {
            fail_msg("%s: %s (code %d: %s)", cases[i].what, m ? "was opened" : "other error",
                     err.code, err.message);
        }
        assert_true(err.hint[0] != '\0');
        tiny_free(&t);
    }
}

static void refuses_broken_files(void **state) {
    (void)state;
    static const char *const headers[] = {
        "",
        "{",
        "{}",
        "[]",
        "null",
        "{\"a\":}",
        "{\"a\":{},\"a\":{}}",
        "{\"a\":{\"dtype\":\"F16\"}}",
        "{\"\\u0000\":1}",
        "\xFF\xFE",
        "{\"__metadata__\":[]}",
        "{\"__metadata__\":\"format\"}",
    };
    struct tiny t = tiny_model();
    struct bpo_error err;
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        tiny_write(&t, path, headers[i], strlen(headers[i]));
        assert_null(bpo_model_open(path, &err));
        assert_int_equal(err.code, BPO_ERR_MODEL);
    }
    tiny_write(&t, path, NULL, 0);
    static const uint64_t lengths[] = {
        0, 1, 7, 1 << 20, UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 63};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        FILE *file = fopen(path, "r+b");
        assert_int_equal(fwrite(&lengths[i], 8, 1, file), 1);
        assert_int_equal(fclose(file), 0);
        assert_null(bpo_model_open(path, &err));
        assert_int_equal(err.code, BPO_ERR_MODEL);
    }
    static const char *const files[] = {"/dev/null", "/nowhere/bpo.bin", "/tmp"};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        assert_null(bpo_model_open(files[i], &err));
        assert_int_equal(err.code, BPO_ERR_MODEL);
        assert_non_null(strstr(err.message, files[i]));
    }
    tiny_free(&t);
}

/* Each byte of a header is changed in turn: the file is refused, or still describes a model that
 * runs. */
static void survives_flipped_header_bytes(void **state) {
    (void)state;
    struct tiny t = tiny_model();
    char *header = json_dumps(t.header, JSON_COMPACT);
    size_t n = strlen(header), n_padded = (8 + n + 63) / 64 * 64 - 8;
    char *padded = malloc(n_padded);
    int n_refused = 0;
    memset(padded, ' ', n_padded);
    memcpy(padded, header, n); // NOLINT: the file's header has no NUL
    for (size_t i = 0; i < n; i++) {
        struct bpo_error err;
        padded[i] = (char)(padded[i] ^ (1 << i % 7));
        tiny_write(&t, path, padded, n_padded);
        padded[i] = header[i];
        struct bpo_model *m = bpo_model_open(path, &err);
        struct bpo_session *session = m ? bpo_session_open(m, NULL, &err) : NULL;
        if (session) {
            struct bpo_request r;
            bpo_request_init(&r, m, BPO_AGGRESSIVE);
            r.text = "Hi";
            r.n_text = 2;
            r.max_new_tokens = 2;
            free(bpo_rewrite(session, &r, &err));
        }
        n_refused += !m;
        bpo_session_close(session);
        bpo_model_close(m);
    }
    assert_true(n_refused > (int)n / 2);
    free(padded);
    free(header);
    tiny_free(&t);
}

/* ---------------------------------------------------------------- sampler */

/* Wilson and Hilferty's approximation: is chi2, of df degrees of freedom, below its 99.99 %
 * quantile? */
static bool chi_square_fine(double chi2, int df) {
    double d = df, z = 3.72, term = 1 - 2 / (9 * d) + z * sqrt(2 / (9 * d));
    return chi2 < d * term * term * term;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* Fills p [n] with the exact probabilities: the sampler's rules by a full sort, in double. */
static void exact_distribution(double *p, const float *logits, size_t n,
                               const struct sample_params *s) {
    double scaled[64], sorted[64], total = 0;
    for (size_t i = 0; i < n; i++) {
        scaled[i] = (double)(logits[i] / s->temperature);
    }
    for (int32_t i = 0; i < s->n_forbidden; i++) {
        scaled[s->forbidden[i]] = -INFINITY;
    }
    memcpy(sorted, scaled, n * sizeof *scaled);
    qsort(sorted, n, sizeof *sorted, compare_doubles);
    double threshold = s->top_k > 0 && (size_t)s->top_k < n ? sorted[s->top_k - 1] : -INFINITY;
    for (size_t i = 0; i < n; i++) {
        p[i] = scaled[i] >= threshold && scaled[i] > -INFINITY ? exp(scaled[i] - sorted[0]) : 0;
        total += p[i];
    }
    double kept = 0, mass[64];
    for (size_t i = 0; i < n; i++) { /* the mass ranked above i */
        mass[i] = 0;
        for (size_t j = 0; j < n; j++) {
            mass[i] +=
                scaled[j] > scaled[i] || (j < i && scaled[j] == scaled[i]) ? p[j] / total : 0;
        }
    }
    for (size_t i = 0; i < n; i++) {
        p[i] = s->top_p >= 1 || mass[i] < (double)s->top_p || mass[i] == 0 ? p[i] : 0;
        kept += p[i];
    }
    for (size_t i = 0; i < n; i++) {
        p[i] /= kept;
    }
}

enum { MAX_IDS = 32003 };

/* Draws with both samplers: bpo.c's, which ranks all ids, and the engine's, which first filters
 * them. They must draw the same. */
static int32_t both_draw(const float *logits, size_t vocab, const struct sample_params *p) {
    static float block_max[MAX_IDS / PREFILTER_BLOCK + 1];
    static float more[MAX_IDS];
    static struct candidate candidates[MAX_IDS], scratch[MAX_IDS];
    const struct prefilter f = {.block_max = block_max, .scratch = more, .candidates = candidates};
    int32_t plain = sampler_draw(scratch, logits, vocab, p),
            fast = top_k_draw(&f, logits, vocab, p);
    if (plain != fast) {
        fail_msg("vocabulary %zu, temperature %g, top-k %d, top-p %g, u %g: %d and %d", vocab,
                 (double)p->temperature, p->top_k, (double)p->top_p, p->u, plain, fast);
    }
    return fast;
}

/* Draws 20,000 times; false if an impossible id was drawn or the counts are unlikely. */
static bool draws_like(const float *logits, size_t n, const struct sample_params *drawn,
                       const struct sample_params *exact) {
    enum { N_DRAWS = 20000 };
    struct sample_params params = *drawn;
    int counts[64] = {0}, df = -1;
    double p[64], chi2 = 0, rare_p = 0, rare_count = 0;
    for (uint32_t i = 0; i < N_DRAWS; i++) {
        params.u = uniform(99, i, 3);
        counts[both_draw(logits, n, &params)]++;
    }
    exact_distribution(p, logits, n, exact);
    for (size_t i = 0; i < n; i++) {
        if (p[i] == 0 && counts[i] > 0) {
            return false;
        }
        bool rare = p[i] * N_DRAWS < 10; /* too few for the statistic: together they are one bin */
        rare_p += rare ? p[i] : 0;
        rare_count += rare ? counts[i] : 0;
        if (!rare) {
            double expected = p[i] * N_DRAWS, d = counts[i] - expected;
            chi2 += d * d / expected;
            df++;
        }
    }
    if (rare_p * N_DRAWS >= 10) {
        double expected = rare_p * N_DRAWS, d = rare_count - expected;
        chi2 += d * d / expected;
        df++;
    }
    return df < 1 || chi_square_fine(chi2, df);
}

static const float LOGITS[12] = {1.0F, 2.5F,  -1.0F, 2.5F, 0.0F, 3.0F,
                                 2.5F, -4.0F, 1.0F,  0.5F, 2.0F, 1.5F};

static void draws_the_exact_distribution(void **state) {
    (void)state;
    static const float temperatures[] = {0.25F, 0.6F, 1.0F, 1.7F},
                       top_ps[] = {0.0F, 0.3F, 0.9F, 0.999F, 1.0F};
    static const int32_t top_ks[] = {0, 1, 2, 3, 5, 12, 50};
    static const int32_t forbidden[] = {5, 2};
    for (size_t t = 0; t < 4; t++) {
        for (size_t p = 0; p < 5; p++) {
            for (size_t k = 0; k < 7; k++) {
                for (int32_t f = 0; f <= 2; f++) {
                    struct sample_params params = {.temperature = temperatures[t],
                                                   .top_p = top_ps[p],
                                                   .top_k = top_ks[k],
                                                   .forbidden = forbidden,
                                                   .n_forbidden = f};
                    if (!draws_like(LOGITS, 12, &params, &params)) {
                        fail_msg("temperature %g, top-p %g, top-k %d, %d forbidden",
                                 (double)temperatures[t], (double)top_ps[p], top_ks[k], f);
                    }
                }
            }
        }
    }
}

/* The test above can fail: it notices another temperature, another k and another p. */
static void notices_a_wrong_distribution(void **state) {
    (void)state;
    const struct sample_params right = {.temperature = 1, .top_p = 0.9F, .top_k = 5};
    struct sample_params hot = right, wide = right, full = right, narrow = right;
    hot.temperature = 1.3F;
    wide.top_k = 6;
    wide.top_p = full.top_p = 1;
    narrow.top_p = 0.8F;
    assert_true(draws_like(LOGITS, 12, &right, &right));
    assert_false(draws_like(LOGITS, 12, &right, &hot));
    assert_false(draws_like(LOGITS, 12, &wide, &right));
    assert_false(draws_like(LOGITS, 12, &full, &narrow));
}

static void keeps_ties_and_breaks_them_by_id(void **state) {
    (void)state;
    static const int32_t all[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    bool seen[12] = {false};
    struct sample_params p = {
        .temperature = 1, .top_p = 1, .top_k = 2}; /* the second rank is shared by ids 1, 3 and 6 */
    for (uint32_t i = 0; i < 1000; i++) {
        p.u = i / 1000.0;
        seen[both_draw(LOGITS, 12, &p)] = true;
    }
    assert_true(seen[5] && seen[1] && seen[3] && seen[6] && !seen[10]);
    p.temperature = 0;
    assert_int_equal(both_draw(LOGITS, 12, &p), 5);
    p.forbidden = (const int32_t[]){5};
    p.n_forbidden = 1;
    assert_int_equal(both_draw(LOGITS, 12, &p), 1); /* a tie: the lowest id */
    p.temperature = 1;
    p.top_p = 0;
    p.u = 0.999999;
    assert_int_equal(both_draw(LOGITS, 12, &p), 1); /* p = 0 keeps the first alone */
    p.forbidden = all;
    p.n_forbidden = 12;
    assert_int_equal(both_draw(LOGITS, 12, &p), -1);
    p.n_forbidden = 11;
    assert_int_equal(both_draw(LOGITS, 12, &p), 11);
}

/* Logits of all kinds: normal, steps with many ties, a few peaks, ties of logits / temperature
 * between different logits, extremes. */
static void fill_logits(float *x, size_t n, uint32_t seed, int kind) {
    for (size_t i = 0; i < n; i++) {
        double u = uniform(seed, 1, (uint32_t)i), v = uniform(seed, 2, (uint32_t)i);
        double bell = sqrt(-2 * log(u + 1e-12)) * cos(6.283185307179586 * v);
        x[i] = (float)(kind == 0   ? 4 * bell
                       : kind == 1 ? floor(3 * bell) / 2
                       : kind == 2 ? (u < 0.0005 ? 20 : -20) + v
                       : kind == 3 ? 10 + floor(8 * u) * 0x1p-20
                       : kind == 4 ? -3
                       : kind == 5 ? (double)i * 1e-3
                       : kind == 6 ? 1e30 * bell
                                   : 1e-42 * floor(20 * bell));
    }
}

static void prefilter_draws_what_a_full_sort_draws(void **state) {
    (void)state;
    static float logits[MAX_IDS];
    static const size_t vocabs[] = {MAX_IDS, 32000, 8192, 6463, 404, 127, 64, 63, 1};
    static const float temperatures[] = {0, 0.3F, 0.6F, 0.9F, 1, 1.7F, 100};
    static const float top_ps[] = {0, 0.5F, 0.9F, 1};
    static const int32_t top_ks[] = {50, 1, 2, 49, 64, 0, 240, 250, 5000};
    for (uint32_t seed = 0; seed < 1500; seed++) {
        size_t vocab = vocabs[seed % 9];
        struct sample_params p = {.temperature = temperatures[seed % 7],
                                  .top_p = top_ps[seed / 3 % 4],
                                  .top_k = top_ks[seed / 5 % 9],
                                  .n_forbidden = (int32_t)(seed % 4)};
        int32_t forbidden[3];
        fill_logits(logits, vocab, seed, (int)(seed / 11 % 8));
        for (int32_t i = 0; i < p.n_forbidden; i++) { /* the best ones, one by one */
            p.forbidden = forbidden;
            struct sample_params greedy = {.forbidden = forbidden, .n_forbidden = i};
            int32_t best = both_draw(logits, vocab, &greedy);
            forbidden[i] = best >= 0 ? best : 0;
        }
        for (uint32_t i = 0; i < 3; i++) {
            p.u = i == 0 ? 1 - 0x1p-53 : uniform(seed, 3, i);
            (void)both_draw(logits, vocab, &p);
        }
    }
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    struct sample_params p = {.temperature = 1, .top_p = 1, .top_k = 50};
    for (size_t at = 0; at < MAX_IDS; at += at < 70 || at > MAX_IDS - 70 ? 1 : 997) {
        float kept = logits[at];
        logits[at] = bad[at % 4];
        assert_int_equal(both_draw(logits, MAX_IDS, &p), DRAW_NOT_FINITE);
        logits[at] = kept;
    }
}

/* Logits far below the best have no mass in fp32. They must never be drawn, and a u near 1 must not
 * run off the end. */
static void ends_of_the_walk(void **state) {
    (void)state;
    float logits[64];
    for (int i = 0; i < 64; i++) {
        logits[i] = i == 40 ? 200.0F : i == 41 ? 199.0F : -200.0F;
    }
    struct sample_params p = {.temperature = 1, .top_p = 1, .u = 1 - 0x1p-53};
    assert_int_equal(both_draw(logits, 64, &p), 41);
    p.u = 0;
    assert_int_equal(both_draw(logits, 64, &p), 40);
}

static void uniform_is_philox(void **state) {
    (void)state;
    /* the known answer of Random123 for counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8 */
    double expected =
        (double)((UINT64_C(0x6627e8d5) << 32 | 0xe169c58d) >> 11) / 9007199254740992.0;
    assert_true(uniform(0, 0, 0) == expected);
    double sum = 0;
    int bins[20] = {0};
    for (uint32_t i = 0; i < 100000; i++) {
        double u = uniform(BPO_MAX_SEED - i / 1000, i / 10 % 100, i % 10);
        assert_true(u >= 0 && u < 1);
        sum += u;
        bins[(int)(u * 20)]++;
    }
    double chi2 = 0;
    for (int i = 0; i < 20; i++) {
        chi2 += (bins[i] - 5000.0) * (bins[i] - 5000.0) / 5000.0;
    }
    assert_true(chi_square_fine(chi2, 19));
    assert_true(fabs(sum / 100000 - 0.5) < 0.005);
    assert_true(uniform(1, 2, 3) != uniform(2, 1, 3) && uniform(1, 2, 3) != uniform(1, 3, 2));
}

/* ---------------------------------------------------------------- text */

static void strips_like_python(void **state) {
    (void)state;
    static const struct {
        const char *text, *stripped;
    } cases[] = {
        {"", ""},
        {" \t\n\v\f\r", ""},
        {"a", "a"},
        {"  a b\n", "a b"},
        {"\x1c\x1d\x1e\x1f x \x1c", "x"},
        {"\xc2\xa0x\xc2\x85", "x"},
        {"\xe3\x80\x80x\xe3\x80\x80\xe2\x80\x83", "x"},
        {"\xe2\x80\xafx\xe2\x81\x9f\xe1\x9a\x80", "x"},
        {"\xe2\x80\x8bx\xe2\x80\x8b", "\xe2\x80\x8bx\xe2\x80\x8b"}, /* U+200B is not white space */
        {"\xc3\xa0", "\xc3\xa0"},
        {"\xe4\xb8\x80\xe2\x80\xa8", "\xe4\xb8\x80"},
        {"\x7f", "\x7f"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t begin, end, n = strlen(cases[i].stripped);
        text_strip(cases[i].text, strlen(cases[i].text), &begin, &end);
        assert_int_equal(end - begin, n);
        assert_memory_equal(cases[i].text + begin, cases[i].stripped, n);
    }
}

static void cuts_at_the_first_marker(void **state) {
    (void)state;
    static const struct {
        const char *text;
        enum bpo_mode mode;
        size_t done, growing;
    } cases[] = {
        {"ab [/INST] c", BPO_STABLE, 3, 3},
        {"ab [/INS", BPO_STABLE, 8, 3},
        {"ab [", BPO_STABLE, 4, 3},
        {"ab [KEEP]", BPO_STABLE, 9, 9},
        {"ab [KEEP]", BPO_AGGRESSIVE, 3, 3},
        {"[PRx [K", BPO_AGGRESSIVE, 7, 5},
        {"x[PROy[/INST]", BPO_AGGRESSIVE, 1, 1},
        {"", BPO_STABLE, 0, 0},
        {"[[/INST]", BPO_STABLE, 1, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n = strlen(cases[i].text);
        assert_int_equal(cut_length(cases[i].mode, cases[i].text, n, false), cases[i].done);
        assert_int_equal(cut_length(cases[i].mode, cases[i].text, n, true), cases[i].growing);
    }
}

/* ---------------------------------------------------------------- the engine */

static struct opened open_tiny(void (*spoil)(struct tiny *t), int32_t n_slots, int32_t n_threads,
                               enum bpo_matmul matmul) {
    struct bpo_session_options options;
    tiny_create(path, spoil);
    bpo_session_options_init(&options);
    options.n_slots = n_slots;
    options.n_threads = n_threads;
    options.matmul = matmul;
    return open_session(path, &options);
}

/* The ids of a request: 3, 10, 17, ... */
enum { N_IDS = 150 };
static const int32_t *some_ids(void) {
    static int32_t ids[N_IDS];
    for (int32_t i = 0; i < N_IDS; i++) {
        ids[i] = 3 + 7 * i % 390;
    }
    return ids;
}

static struct bpo_request ids_request(const struct opened *b, size_t n_ids) {
    struct bpo_request r;
    bpo_request_init(&r, b->model, BPO_STABLE);
    r.ids = some_ids();
    r.n_ids = n_ids;
    r.max_new_tokens = 12;
    return r;
}

/* The result of a request: for each sample its ids, its text and why it ended. */
struct outcome {
    int32_t tokens[8][64], n_tokens[8];
    char text[8][512], pieces[8][512]; /* any bytes: random weights generate NUL too */
    size_t n_text[8], n_pieces[8];
    enum bpo_stop stop[8];
    int n_done, n_warnings;
    int32_t n_kept, n_passes, n_drafted, n_accepted;
    struct bpo_error error;
};

static int take(struct outcome *o, const struct bpo_event *events, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const struct bpo_event *e = &events[i];
        if (e->kind == BPO_EVENT_TOKEN) {
            o->tokens[e->sample][o->n_tokens[e->sample]++] = e->token;
        } else if (e->kind == BPO_EVENT_TEXT) {
            memcpy(o->pieces[e->sample] + o->n_pieces[e->sample], e->text, e->n_text);
            o->n_pieces[e->sample] += e->n_text;
        } else if (e->kind == BPO_EVENT_WARNING) {
            o->n_warnings++;
        } else {
            o->n_done++;
            o->stop[e->sample] = e->stop;
            o->error = *e->error;
            o->n_kept = e->kept_tokens;
            o->n_passes += e->passes;
            o->n_drafted += e->drafted;
            o->n_accepted += e->accepted;
            assert_true(e->stop == BPO_STOP_ERROR || e->new_tokens == 0 ||
                        e->passes + e->accepted ==
                            e->new_tokens - 1); /* a pass gives one id more than it accepts */
            assert_int_equal(e->new_tokens, o->n_tokens[e->sample]);
            assert_memory_equal(e->tokens, o->tokens[e->sample],
                                sizeof(int32_t) * (size_t)e->new_tokens);
            assert_int_equal(e->text[e->n_text], '\0');
            memcpy(o->text[e->sample], e->text, e->n_text);
            o->n_text[e->sample] = e->n_text;
            /* the pieces are the text */
            assert_int_equal(o->n_text[e->sample], o->n_pieces[e->sample]);
            assert_memory_equal(o->text[e->sample], o->pieces[e->sample], e->n_text);
        }
    }
    return o->n_done;
}

static void finish(struct outcome *o, struct bpo_session *session) {
    const struct bpo_event *events;
    size_t n;
    int more = 1;
    struct bpo_error err;
    while (more > 0) {
        more = bpo_step(session, &events, &n, &err);
        (void)take(o, events, n);
    }
    assert_int_equal(more, 0);
}

static struct outcome run(const struct opened *b, const struct bpo_request *r) {
    struct outcome o = {0};
    struct bpo_error err = {0};
    if (bpo_submit(b->session, r, &err) < 0) {
        fail_msg("%s", err.message);
    }
    finish(&o, b->session);
    return o;
}

/* Prefill in chunks, decoding row by row, and a prompt that ends anywhere: the same logits, in
 * every bit. */
static void prefill_equals_decoding(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 1, 2, BPO_MATMUL_OWN);
    struct bpo_error err;
    float *all = malloc(sizeof *all * N_IDS * TINY_VOCAB),
          *one = malloc(sizeof *one * N_IDS * TINY_VOCAB);
    assert_int_equal(bpo_logits(b.session, some_ids(), N_IDS, all, &err), 0);
    static const size_t lengths[] = {1, 2, 3, 63, 64, 65, 127, 128, 129, 149};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        assert_int_equal(bpo_logits(b.session, some_ids(), lengths[i], one, &err), 0);
        assert_memory_equal(one, all, lengths[i] * TINY_VOCAB * sizeof *all);
    }
    for (int32_t pos = 0; pos < N_IDS; pos++) { /* one decode row at a time */
        batch_clear(&b.session->batch);
        batch_add(&b.session->batch, some_ids()[pos], 0, pos);
        batch_want(&b.session->batch, NULL);
        assert_int_equal(batch_compute(b.session, &err) || download_logits(b.session, one, &err),
                         0);
        assert_memory_equal(one, all + (size_t)pos * TINY_VOCAB, TINY_VOCAB * sizeof *all);
    }
    batch_clear(&b.session->batch); /* this test can fail: a position off by one is seen */
    batch_add(&b.session->batch, some_ids()[N_IDS - 1], 0, N_IDS);
    batch_want(&b.session->batch, NULL);
    assert_int_equal(batch_compute(b.session, &err) || download_logits(b.session, one, &err), 0);
    assert_memory_not_equal(one, all + (size_t)(N_IDS - 1) * TINY_VOCAB, TINY_VOCAB * sizeof *all);
    free(all);
    free(one);
    close_session(&b);
}

/* Sample s is the same text for any number of samples, slots and threads, alone or beside other
 * requests. */
static void samples_do_not_depend_on_company(void **state) {
    (void)state;
    struct outcome reference = {0};
    for (int matmul = 0; matmul < 2; matmul++) {
        for (int32_t n_slots = 1; n_slots <= 8; n_slots = n_slots * 2 + (n_slots == 2)) {
            for (int32_t n_samples = 1; n_samples <= 6; n_samples += 5) {
                struct opened b = open_tiny(NULL, n_slots, 1 + n_slots % 3,
                                            matmul ? BPO_MATMUL_OPENBLAS : BPO_MATMUL_OWN);
                struct bpo_request r = ids_request(&b, 70);
                struct bpo_error err;
                r.n_samples = n_samples;
                r.temperature = 1.5F;
                r.seed = 5;
                struct outcome o = run(&b, &r);
                if (n_slots == 1 && n_samples == 1) {
                    r.n_samples = 6;
                    reference = run(&b, &r);
                    assert_int_equal(reference.n_done, 6);
                }
                assert_int_equal(o.n_done, n_samples);
                for (int s = 0; s < n_samples; s++) {
                    assert_int_equal(o.n_tokens[s], reference.n_tokens[s]);
                    assert_memory_equal(o.tokens[s], reference.tokens[s], sizeof o.tokens[s]);
                    assert_memory_equal(o.text[s], reference.text[s], sizeof o.text[s]);
                }
                /* now beside two others, one submitted before it and one after */
                struct bpo_request other = ids_request(&b, 131);
                struct outcome beside = {0};
                const struct bpo_event *events;
                size_t n;
                other.n_samples = 2;
                assert_true(bpo_submit(b.session, &other, &err) >= 0);
                int64_t number = bpo_submit(b.session, &r, &err);
                assert_true(bpo_submit(b.session, &other, &err) >= 0);
                for (int more = 1; more > 0;) {
                    more = bpo_step(b.session, &events, &n, &err);
                    for (size_t i = 0; i < n; i++) {
                        (void)(events[i].request == number ? take(&beside, &events[i], 1) : 0);
                    }
                }
                assert_int_equal(beside.n_done, r.n_samples);
                for (int s = 0; s < r.n_samples; s++) {
                    assert_memory_equal(beside.tokens[s], reference.tokens[s],
                                        sizeof reference.tokens[s]);
                }
                close_session(&b);
            }
        }
        assert_memory_not_equal(reference.tokens[0], reference.tokens[1],
                                sizeof reference.tokens[0]);
    }
}

static bool same_outcome(const struct outcome *a, const struct outcome *b) {
    return memcmp(a->tokens, b->tokens, sizeof a->tokens) == 0 &&
           memcmp(a->n_tokens, b->n_tokens, sizeof a->n_tokens) == 0 &&
           memcmp(a->text, b->text, sizeof a->text) == 0 &&
           memcmp(a->stop, b->stop, sizeof a->stop) == 0;
}

/* Runs a request in two sessions, without drafts and with up to n_lookup: the bytes must be the
 * same. Returns the second session's result. */
static struct outcome same_with_drafts(const struct opened *plain, const struct opened *drafting,
                                       const struct bpo_request *r, int32_t n_lookup) {
    plain->session->n_lookup = 0;
    drafting->session->n_lookup = n_lookup;
    struct outcome without = run(plain, r), with = run(drafting, r);
    if (!same_outcome(&without, &with)) {
        fail_msg("seed %d, %d samples, mode %d, lookup %d: the text depends on it", (int)r->seed,
                 r->n_samples, r->mode, n_lookup);
    }
    assert_int_equal(without.n_drafted, 0);
    return with;
}

static int32_t lookup_of(uint64_t seed) {
    static const int32_t choices[] = {-1, 1, 3, 8, 15};
    return choices[seed % 5];
}

/* Drafts change the number of passes, and no byte: over seeds, modes, samples, and temperatures so
 * low that random weights repeat themselves; to EOS, max_new_tokens and the end of the context,
 * wherever in a draft they fall. */
static void drafts_do_not_change_the_text(void **state) {
    (void)state;
    static const float temperatures[] = {0.0F, 0.05F, 0.2F, 0.6F, 1.2F};
    struct outcome total = {0};
    int stops[6] = {0};
    for (int matmul = 0; matmul < 2; matmul++) {
        enum bpo_matmul m = matmul ? BPO_MATMUL_OPENBLAS : BPO_MATMUL_OWN;
        struct opened plain = open_tiny(NULL, 5, 1, m), drafting = open_tiny(NULL, 5, 2, m);
        for (uint64_t seed = 0; seed < 300; seed++) {
            struct bpo_request r;
            bpo_request_init(&r, plain.model, seed % 2 ? BPO_AGGRESSIVE : BPO_STABLE);
            r.text = "Tell me about tea. Tell me about coffee and tea.";
            r.n_text = strlen(r.text);
            r.n_samples = seed % 3 ? 1 : 5;
            r.temperature = temperatures[seed / 7 % 5];
            r.max_new_tokens = 1 + (int32_t)(seed % 60);
            r.seed = seed;
            plain.session->info.n_positions = drafting.session->info.n_positions =
                seed % 11 ? 512 : 100;
            plain.model->info.eos_id = drafting.model->info.eos_id =
                seed % 4 ? 2 : (int32_t)(seed % TINY_VOCAB);
            struct outcome o = same_with_drafts(&plain, &drafting, &r, lookup_of(seed));
            total.n_passes += o.n_passes;
            total.n_drafted += o.n_drafted;
            total.n_accepted += o.n_accepted;
            for (int i = 0; i < o.n_done; i++) {
                stops[o.stop[i]]++;
            }
        }
        close_session(&plain);
        close_session(&drafting);
    }
    /* right drafts and wrong ones */
    assert_true(total.n_accepted > 1000 && total.n_drafted > total.n_accepted);
    assert_true(stops[BPO_STOP_EOS] > 5 && stops[BPO_STOP_LENGTH] > 100 &&
                stops[BPO_STOP_CONTEXT] > 5);
}

/* The same for a replay: the forced ids are the prompt itself, so that drafts are right, with
 * deviations and ends in it. */
static void drafts_follow_a_replay(void **state) {
    (void)state;
    struct opened plain = open_tiny(NULL, 5, 1, BPO_MATMUL_OWN),
                  drafting = open_tiny(NULL, 5, 1, BPO_MATMUL_OWN);
    struct bpo_error err;
    const char *text = "Write a poem about the sea, and a longer one about the mountains and the "
                       "rivers of the north";
    int32_t *ids;
    size_t n_ids;
    assert_int_equal(bpo_tokenize(plain.model, text, strlen(text), false, &ids, &n_ids, &err), 0);
    n_ids = n_ids < 60 ? n_ids : 60;
    for (uint64_t seed = 0; seed < 200; seed++) {
        int32_t forced[60];
        struct bpo_request r;
        bpo_request_init(&r, plain.model, seed % 2 ? BPO_AGGRESSIVE : BPO_STABLE);
        memcpy(forced, ids, n_ids * sizeof *ids);
        /* EOS or a newline, where the draft has the prompt's id */
        forced[seed % n_ids] = seed % 3 ? 2 : 13;
        r.text = text;
        r.n_text = strlen(text);
        r.forced = forced;
        r.n_forced = n_ids - seed % 7;
        r.n_samples = seed % 3 ? 1 : 5;
        r.max_new_tokens = 5 + (int32_t)(seed % 60);
        r.seed = seed;
        (void)same_with_drafts(&plain, &drafting, &r, lookup_of(seed));
        forced[seed % n_ids] = ids[seed % n_ids];
        r.n_forced = n_ids;
        r.max_new_tokens = 60;
        struct outcome o = same_with_drafts(&plain, &drafting, &r, lookup_of(seed));
        /* a plain copy: with 15 drafts, a pass gives 16 ids */
        int32_t n = r.n_samples * ((int32_t)n_ids - 1);
        assert_true(o.n_passes <= (lookup_of(seed) == 15 && r.n_samples == 1 ? n / 16 + 3 : n));
    }
    free(ids);
    close_session(&plain);
    close_session(&drafting);
}

/* A drafted id that makes logits not finite is an error only if it is drawn. */
static void not_finite_token(struct tiny *t) {
    memcpy(tiny_data(t, "model.embed_tokens.weight") + 2 * TINY_DIM * 301, "\x00\x7e", 2);
}

static void wrong_drafts_do_no_harm(void **state) {
    (void)state;
    struct opened plain = open_tiny(not_finite_token, 1, 1, BPO_MATMUL_OWN),
                  drafting = open_tiny(not_finite_token, 1, 1, BPO_MATMUL_OWN);
    struct bpo_request r = ids_request(&plain, 9);
    static const int32_t bad[] = {50, 60, 301, 70}, good[] = {50, 60, 61, 62, 63, 64};
    lookup_remember(&drafting.session->lookup, bad, 4); /* 301 has followed 60 */
    r.forced = good;
    r.n_forced = 6;
    struct outcome o = same_with_drafts(&plain, &drafting, &r, 3);
    assert_true(o.n_drafted > 0);
    assert_int_equal(o.stop[0], BPO_STOP_LENGTH);
    r.forced = bad;
    r.n_forced = 4;
    o = same_with_drafts(&plain, &drafting, &r, 3);
    assert_int_equal(o.stop[0], BPO_STOP_ERROR);
    assert_int_equal(o.n_tokens[0], 3);
    close_session(&plain);
    close_session(&drafting);
}

/* The template's prefix is computed once for all prompts that begin with it, and their texts are
 * the same as alone. */
static void prefix_is_computed_once(void **state) {
    (void)state;
    static const char *const texts[] = {
        "tea", "Write a poem about the sea", "a", "Tell me more", "1 + 1", "x y z"};
    enum { N = 6 };
    struct bpo_error err;
    for (int32_t n_slots = 1; n_slots <= 4; n_slots++) {
        for (int matmul = 0; matmul < 2; matmul++) {
            enum bpo_matmul m = matmul ? BPO_MATMUL_OPENBLAS : BPO_MATMUL_OWN;
            struct opened together = open_tiny(NULL, n_slots, 1, m);
            int32_t n_prefix = (int32_t)together.model->prefix.n;
            static struct outcome o[N + 1];
            struct bpo_request r[N + 1];
            int64_t numbers[N + 1];
            memset(o, 0, sizeof o);
            for (int i = 0; i <= N; i++) {
                bpo_request_init(&r[i], together.model, BPO_STABLE);
                r[i].text = texts[i % N];
                r[i].n_text = strlen(r[i].text);
                r[i].max_new_tokens = 8;
                /* one of them lacks the prefix, and takes a slot that holds it */
                if (i == 3) {
                    r[i] = ids_request(&together, 70);
                }
                numbers[i] = bpo_submit(together.session, &r[i], &err);
                assert_true(numbers[i] >= 0);
            }
            for (int more = 1; more > 0;) {
                const struct bpo_event *events;
                size_t n;
                more = bpo_step(together.session, &events, &n, &err);
                for (size_t e = 0; e < n; e++) {
                    for (int i = 0; i <= N; i++) {
                        (void)(events[e].request == numbers[i] ? take(&o[i], &events[e], 1) : 0);
                    }
                }
            }
            int n_computed = 0;
            for (int i = 0; i <= N; i++) {
                struct opened alone = open_tiny(NULL, 1, 1, m);
                struct outcome expected = run(&alone, &r[i]);
                assert_true(same_outcome(&o[i], &expected));
                assert_int_equal(expected.n_kept, 0);
                assert_true(o[i].n_kept == 0 || o[i].n_kept == n_prefix);
                n_computed += i != 3 && o[i].n_kept == 0;
                close_session(&alone);
            }
            /* the only slot lost the prefix to the prompt without it */
            assert_int_equal(n_computed, n_slots == 1 ? 2 : 1);
            close_session(&together);
        }
    }
}

static void not_finite_0(struct tiny *t) {
    memcpy(tiny_data(t, "model.layers.0.self_attn.o_proj.weight"), "\x00\x7c", 2);
}

static void not_finite_1(struct tiny *t) {
    memcpy(tiny_data(t, "model.layers.1.mlp.down_proj.weight"), "\x00\x7e", 2);
}

static void not_finite_head(struct tiny *t) {
    memcpy(tiny_data(t, "lm_head.weight"), "\x01\x7e", 2);
}

static void names_the_layer_that_is_not_finite(void **state) {
    (void)state;
    static const struct {
        void (*spoil)(struct tiny *t);
        const char *says;
    } cases[] = {
        {not_finite_0, "layer 0"}, {not_finite_1, "layer 1"}, {not_finite_head, "the logits"}};
    for (size_t i = 0; i < 3; i++) {
        struct opened b = open_tiny(cases[i].spoil, 2, 1, BPO_MATMUL_OWN);
        struct bpo_request r = ids_request(&b, 9);
        r.n_samples = 3;
        struct outcome o = run(&b, &r);
        assert_int_equal(o.n_done, 3);
        for (int s = 0; s < 3; s++) {
            assert_int_equal(o.stop[s], BPO_STOP_ERROR);
        }
        assert_int_equal(o.error.code, BPO_ERR_RUN);
        assert_non_null(strstr(o.error.message, cases[i].says));
        close_session(&b);
    }
}

static void stops_for_the_right_reason(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 1, 1, BPO_MATMUL_OWN);
    struct bpo_request r = ids_request(&b, 20);
    r.temperature = 0;
    struct outcome o = run(&b, &r);
    assert_int_equal(o.stop[0], BPO_STOP_LENGTH);
    assert_int_equal(o.n_tokens[0], 12);
    b.model->info.eos_id = o.tokens[0][4]; /* the fifth id now ends the text */
    int32_t n_before = 0;
    while (o.tokens[0][n_before] != o.tokens[0][4]) {
        n_before++;
    }
    o = run(&b, &r);
    assert_int_equal(o.stop[0], BPO_STOP_EOS);
    assert_int_equal(o.n_tokens[0], n_before + 1);
    b.model->info.eos_id = 2;
    close_session(&b);

    struct bpo_session_options options;
    struct bpo_error err;
    b = open_tiny(NULL, 1, 1, BPO_MATMUL_OWN);
    bpo_session_close(b.session);
    bpo_session_options_init(&options);
    options.n_positions = 25;
    b.session = bpo_session_open(b.model, &options, &err);
    o = run(&b, &r);
    assert_int_equal(o.stop[0], BPO_STOP_CONTEXT);
    assert_int_equal(o.n_tokens[0], 5);
    r.n_ids = 24;
    o = run(&b, &r);
    assert_int_equal(o.n_tokens[0], 1);
    r.n_ids = 25;
    assert_int_equal(bpo_submit(b.session, &r, &err), BPO_ERR_INPUT);
    assert_non_null(strstr(err.message, "25"));
    close_session(&b);
}

/* Forced ids replace the drawn ones, which are still drawn, and the text ends after the last. */
static void replays_forced_ids(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 2, 1, BPO_MATMUL_OWN);
    struct bpo_request r = ids_request(&b, 20);
    struct bpo_error err;
    int32_t forced[] = {50, 60, 70, 2};
    r.n_samples = 2;
    r.forced = forced;
    for (r.n_forced = 1; r.n_forced <= 4; r.n_forced++) {
        struct outcome o = run(&b, &r);
        for (int s = 0; s < 2; s++) {
            assert_int_equal(o.stop[s], r.n_forced == 4 ? BPO_STOP_EOS : BPO_STOP_LENGTH);
            assert_int_equal(o.n_tokens[s], r.n_forced);
            assert_memory_equal(o.tokens[s], forced, r.n_forced * sizeof *forced);
        }
    }
    r.n_forced = 4;
    r.max_new_tokens = 2;
    assert_int_equal(run(&b, &r).n_tokens[0], 2);
    forced[3] = TINY_VOCAB;
    assert_int_equal(bpo_submit(b.session, &r, &err), BPO_ERR_INPUT);
    close_session(&b);
}

/* Interrupted or cancelled at any step: every sample is reported once, with its text so far, and
 * the session can go on. */
static void interrupts_cleanly(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 2, 1, BPO_MATMUL_OWN);
    struct bpo_error err;
    b.session->n_lookup = 0; /* so that no sample is complete before */
    for (int after = 0; after < 10; after++) {
        for (int cancel = 0; cancel < 2; cancel++) {
            struct bpo_request r = ids_request(&b, 140);
            struct outcome o = {0};
            const struct bpo_event *events;
            size_t n;
            r.n_samples = 5;
            r.temperature = 0;
            int64_t number = bpo_submit(b.session, &r, &err);
            for (int i = 0; i < after; i++) {
                assert_int_equal(bpo_step(b.session, &events, &n, &err), 1);
                (void)take(&o, events, n);
            }
            if (cancel) {
                bpo_cancel(b.session, number);
            } else {
                bpo_interrupt(b.session);
            }
            finish(&o, b.session);
            assert_int_equal(o.n_done, 5);
            for (int s = 0; s < 5; s++) {
                assert_int_equal(o.stop[s], BPO_STOP_INTERRUPTED);
            }
        }
    }
    struct bpo_request r = ids_request(&b, 20);
    struct outcome o = run(&b, &r);
    assert_int_equal(o.stop[0], BPO_STOP_LENGTH);
    close_session(&b);
}

static void refuses_bad_requests(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 1, 1, BPO_MATMUL_OWN);
    struct bpo_error err;
    const struct bpo_request good = ids_request(&b, 5);
    struct bpo_request r;
    const int32_t bad_ids[][1] = {{-1}, {TINY_VOCAB}, {INT32_MAX}};
#define REFUSED(change, expected)                                                                  \
    r = good;                                                                                      \
    change;                                                                                        \
    assert_int_equal(bpo_submit(b.session, &r, &err), expected);                                   \
    assert_true(err.message[0] != '\0')
    REFUSED(r.size = 8, BPO_ERR_USAGE);
    REFUSED(r.mode = (enum bpo_mode)7, BPO_ERR_USAGE);
    REFUSED(r.mode = BPO_AGGRESSIVE, BPO_ERR_USAGE);
    REFUSED(r.n_samples = 0, BPO_ERR_USAGE);
    REFUSED(r.temperature = -1, BPO_ERR_USAGE);
    REFUSED(r.temperature = NAN, BPO_ERR_USAGE);
    REFUSED(r.top_p = 1.5F, BPO_ERR_USAGE);
    REFUSED(r.top_p = NAN, BPO_ERR_USAGE);
    REFUSED(r.top_k = -1, BPO_ERR_USAGE);
    REFUSED(r.max_new_tokens = 0, BPO_ERR_USAGE);
    REFUSED(r.seed = BPO_MAX_SEED + 1, BPO_ERR_USAGE);
    REFUSED(r.n_ids = 0, BPO_ERR_INPUT);
    REFUSED(r.ids = NULL, BPO_ERR_INPUT);
    REFUSED((r.ids = NULL, r.text = "", r.n_text = 0), BPO_ERR_INPUT);
    REFUSED((r.ids = NULL, r.text = " \n\xc2\xa0", r.n_text = 4), BPO_ERR_INPUT);
    for (size_t i = 0; i < 3; i++) {
        REFUSED((r.ids = bad_ids[i], r.n_ids = 1), BPO_ERR_INPUT);
    }
    REFUSED((r.ids = some_ids(), r.n_ids = N_IDS, b.session->info.n_positions = 100),
            BPO_ERR_INPUT);
    const struct bpo_event *events;
    size_t n;
    assert_int_equal(bpo_step(b.session, &events, &n, &err),
                     0); /* the refused requests left nothing */
    assert_int_equal(n, 0);
    close_session(&b);
}

static void endless(struct tiny *t) {
    tiny_meta(t, "max_positions", "1073741824");
}

/* A KV cache of 2^30 positions takes some 80 GB here: the request is refused before any work,
 * instead of the process being killed in the middle of it. */
static void refuses_what_memory_cannot_hold(void **state) {
    (void)state;
    struct opened b = open_tiny(endless, 1, 1, BPO_MATMUL_OWN);
    struct bpo_error err = {0};
    struct bpo_request r = ids_request(&b, 5);
    r.max_new_tokens = 1 << 30;
    assert_int_equal(bpo_submit(b.session, &r, &err), BPO_ERR_RESOURCE);
    assert_non_null(strstr(err.message, "not enough memory"));
    r.max_new_tokens = 5; /* memory is committed on use: a long context costs nothing */
    struct outcome o = run(&b, &r);
    assert_int_equal(o.stop[0], BPO_STOP_LENGTH);
    close_session(&b);
}

static void rewrites_text(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 3, 2, BPO_MATMUL_AUTO);
    struct bpo_request r;
    struct bpo_error err;
    bpo_request_init(&r, b.model, BPO_STABLE);
    assert_int_equal(r.max_new_tokens, 40);
    r.text = "Tell me about \xff tea";
    r.n_text = strlen(r.text);
    r.seed = 3;
    char *one = bpo_rewrite(b.session, &r, &err), *two = bpo_rewrite(b.session, &r, &err);
    assert_non_null(one);
    assert_string_equal(one, two);
    struct outcome o = run(&b, &r);
    assert_string_equal(o.text[0], one);
    assert_int_equal(o.n_warnings, 1); /* the byte 0xFF is not UTF-8 */
    free(one);
    free(two);
    bpo_request_init(&r, b.model, BPO_AGGRESSIVE);
    r.text = "Tell me about tea";
    r.n_text = strlen(r.text);
    o = run(&b, &r);
    assert_int_equal(o.n_done, 5);
    int32_t *ids;
    size_t n;
    assert_int_equal(bpo_tokenize(b.model, r.text, r.n_text, false, &ids, &n, &err), 0);
    free(ids);
    for (int s = 0; s < 5; s++) {
        for (int32_t i = 0; i < o.n_tokens[s]; i++) {
            bool ends = o.tokens[s][i] == 2 || o.tokens[s][i] == 13;
            assert_true(
                !ends ||
                (i >= (int32_t)n + 1 + 5 &&
                 i + 1 == o.n_tokens[s])); /* never before P + N + 5, and then as the last id */
        }
    }
    close_session(&b);
}

/* The banned sequences of aggressive mode: the last id of each is forbidden if and only if the
 * others are the latest ids. */
static void forbids_banned_sequences(void **state) {
    (void)state;
    struct opened b = open_tiny(NULL, 1, 1, BPO_MATMUL_OWN);
    for (size_t i = 0; i < N_BANNED; i++) {
        const struct ids *banned = &b.model->banned[i];
        /* split anywhere between prompt and answer */
        for (size_t n_prompt = 0; n_prompt < banned->n; n_prompt++) {
            const struct ids prompt = {.id = banned->id, .n = n_prompt};
            struct answer answer = {.mode = BPO_AGGRESSIVE,
                                    .prompt = &prompt,
                                    .tokens = banned->id + n_prompt,
                                    .n_tokens = (int32_t)(banned->n - 1 - n_prompt)};
            int32_t forbidden[MAX_FORBIDDEN];
            int32_t n = forbidden_ids(b.model, &answer, forbidden);
            bool found = false;
            for (int32_t j = 0; j < n; j++) {
                found = found || forbidden[j] == banned->id[banned->n - 1];
            }
            assert_true(found);
            answer.n_tokens -= answer.n_tokens > 0 && banned->n > 1; /* one id fewer: not yet */
            if (!ends_with(&answer, banned->id, banned->n - 1)) {
                assert_int_equal(answer.n_tokens, (int32_t)(banned->n - 1 - n_prompt) - 1);
            }
        }
    }
    close_session(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_broken_headers),
        cmocka_unit_test(refuses_broken_files),
        cmocka_unit_test(survives_flipped_header_bytes),
        cmocka_unit_test(draws_the_exact_distribution),
        cmocka_unit_test(notices_a_wrong_distribution),
        cmocka_unit_test(keeps_ties_and_breaks_them_by_id),
        cmocka_unit_test(prefilter_draws_what_a_full_sort_draws),
        cmocka_unit_test(ends_of_the_walk),
        cmocka_unit_test(uniform_is_philox),
        cmocka_unit_test(strips_like_python),
        cmocka_unit_test(cuts_at_the_first_marker),
        cmocka_unit_test(prefill_equals_decoding),
        cmocka_unit_test(samples_do_not_depend_on_company),
        cmocka_unit_test(drafts_do_not_change_the_text),
        cmocka_unit_test(drafts_follow_a_replay),
        cmocka_unit_test(wrong_drafts_do_no_harm),
        cmocka_unit_test(prefix_is_computed_once),
        cmocka_unit_test(names_the_layer_that_is_not_finite),
        cmocka_unit_test(stops_for_the_right_reason),
        cmocka_unit_test(replays_forced_ids),
        cmocka_unit_test(interrupts_cleanly),
        cmocka_unit_test(refuses_bad_requests),
        cmocka_unit_test(refuses_what_memory_cannot_hold),
        cmocka_unit_test(rewrites_text),
        cmocka_unit_test(forbids_banned_sequences),
    };
    return cmocka_run_group_tests(tests, make_path, remove_path);
}

/*
 * test_cuda_engine.c - the engine on the GPU backend: the GPU draws the same ids as sampler_draw,
 * case by case and in whole texts; a model that computes infinities is reported; every CUDA call of
 * a whole session fails once.
 */
#include "../engine/cuda_library.h"

static const struct kernels *chosen_backend(bool *found, struct bpo_error *err);

#define backend_cuda chosen_backend
#include "../engine/engine.c"
#undef backend_cuda

#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

#include "cuda_library.h"
#include "op_inputs.h"
#include "tiny_session.h"

static const struct kernels *gpu;
static bool host_draws; /* the engine downloads the logits, and draws itself */

static const struct kernels *chosen_backend(bool *found, struct bpo_error *err) {
    static struct kernels table;
    const struct kernels *k = backend_cuda(found, err);
    if (k) {
        table = *k;
        table.sample = host_draws ? NULL : k->sample;
    }
    return k ? &table : NULL;
}

static struct cuda_on_cpu knobs;
static char model_path[TEMPORARY_PATH];

/* ---- the sampler ---- */

enum { MAX_ROWS = 96 };

enum shape { LIVELY, FLAT, TIES, EQUAL, ZEROS, SHAPES };

static void fill_logits(float *x, size_t n, enum shape shape) {
    for (size_t i = 0; i < n; i++) {
        double u = random_unit() + random_unit() + random_unit() + random_unit() - 2;
        x[i] = shape == LIVELY  ? (float)(8 * u)
               : shape == FLAT  ? (float)(0.01 * u)
               : shape == TIES  ? floorf((float)(3 * u))
               : shape == EQUAL ? 1.5f
                                : (i % 3 == 0   ? -0.0f
                                   : i % 3 == 1 ? 0.0f
                                                : -1e-3f);
    }
}

static void check_sampler(struct backend *b, size_t vocab, enum shape shape) {
    static const float temperatures[] = {0.0f, 0.05f, 0.6f, 1.0f},
                       top_ps[] = {0.0f, 0.5f, 0.9f, 1.0f};
    const int32_t top_ks[] = {0, 1, 3, 50, (int32_t)vocab, (int32_t)vocab + 7};
    static struct sample_params params[MAX_ROWS];
    static int32_t forbidden[MAX_ROWS][4], ids[MAX_ROWS];
    struct bpo_error err = {0};
    struct candidate *scratch = calloc(vocab, sizeof *scratch);
    float *logits = calloc(MAX_ROWS * vocab, sizeof *logits);
    assert_true(scratch && logits);
    fill_logits(logits, MAX_ROWS * vocab, shape);
    for (size_t i = 0; i < MAX_ROWS; i++) {
        size_t best = 0;
        for (size_t id = 1; id < vocab; id++) {
            best = logits[i * vocab + id] > logits[i * vocab + best] ? id : best;
        }
        for (size_t f = 0; f < 4; f++) { /* among them the best id, and one id twice */
            forbidden[i][f] = f == 0 ? (int32_t)best : (int32_t)(random_unit() * (double)vocab);
        }
        forbidden[i][3] = forbidden[i][2];
        params[i] = (struct sample_params){.temperature = temperatures[i % 4],
                                           .top_p = top_ps[i / 4 % 4],
                                           .top_k = top_ks[i / 16],
                                           .forbidden = forbidden[i],
                                           .n_forbidden = i % 3 == 0 ? 4 : 0,
                                           .u = i % 7 == 0   ? 0.0
                                                : i % 7 == 1 ? 1 - 0x1p-53
                                                             : random_unit()};
    }
    void *d_logits = gpu->alloc(b, MAX_ROWS * vocab * 4, MEMORY_BUFFER, &err);
    assert_ok(d_logits ? 0 : 1, &err);
    assert_ok(gpu->upload(b, d_logits, logits, MAX_ROWS * vocab * 4, &err), &err);
    assert_ok(gpu->sample(b, ids, d_logits, params, MAX_ROWS, vocab, &err), &err);
    for (size_t i = 0; i < MAX_ROWS; i++) {
        int32_t expected = sampler_draw(scratch, logits + i * vocab, vocab, &params[i]);
        if (ids[i] != expected) {
            fail_msg("vocabulary %zu, shape %d, row %zu: the GPU drew %d, the reference %d", vocab,
                     (int)shape, i, ids[i], expected);
        }
    }
    gpu->free(b, d_logits, MAX_ROWS * vocab * 4);
    free(scratch);
    free(logits);
}

static void test_draws_as_the_reference(void **state) {
    (void)state;
    struct bpo_error err = {0};
    struct backend *b = gpu->create(&(struct backend_options){.n_threads = 1}, &err);
    assert_ok(b ? 0 : 1, &err);
    static const size_t vocabularies[] = {1, 2, 60, 411, 1500};
    for (size_t v = 0; v < COUNT(vocabularies); v++) {
        for (int shape = 0; shape < SHAPES; shape++) {
            check_sampler(b, vocabularies[v], (enum shape)shape);
        }
    }
    gpu->destroy(b);
}

/* Rows whose ids are all forbidden, and rows that are not finite. */
static void test_draws_nothing(void **state) {
    (void)state;
    struct bpo_error err = {0};
    struct backend *b = gpu->create(&(struct backend_options){.n_threads = 1}, &err);
    assert_ok(b ? 0 : 1, &err);
    const float logits[4][3] = {{1, 2, 3}, {1, NAN, 3}, {1, 2, INFINITY}, {-INFINITY, 2, 1}};
    const int32_t all[] = {2, 0, 1};
    const struct sample_params params[4] = {
        {.temperature = 1, .top_p = 1, .forbidden = all, .n_forbidden = 3},
        {.temperature = 0},
        {.temperature = 1, .top_p = 1, .forbidden = all, .n_forbidden = 1},
        {.temperature = 1, .top_p = 1}};
    int32_t ids[4];
    void *d_logits = gpu->alloc(b, sizeof logits, MEMORY_BUFFER, &err);
    assert_ok(d_logits ? 0 : 1, &err);
    assert_ok(gpu->upload(b, d_logits, logits, sizeof logits, &err), &err);
    assert_ok(gpu->sample(b, ids, d_logits, params, 4, 3, &err), &err);
    assert_int_equal(ids[0], -1);
    for (size_t i = 1; i < 4; i++) {
        assert_int_equal(ids[i], -2);
    }
    gpu->free(b, d_logits, sizeof logits);
    gpu->destroy(b);
}

/* ---- whole sessions ---- */

struct result {
    int32_t tokens[8][64];
    int32_t n_tokens[8];
    int n_done;
};

/* Runs one request in a new session. Returns 0, or the code of the first error. */
static int run_request(const char *path, enum bpo_device device, const struct bpo_request *like,
                       int32_t lookup, struct result *result, struct bpo_error *err) {
    struct bpo_session_options options;
    int code = 0;
    *result = (struct result){0};
    struct bpo_model *model = bpo_model_open(path, err);
    bpo_session_options_init(&options);
    options.device = device;
    options.n_slots = 3;
    options.n_threads = 1;
    options.lookup = lookup;
    options.no_cache = true;
    struct bpo_session *session = model ? bpo_session_open(model, &options, err) : NULL;
    if (!session) {
        bpo_model_close(model);
        return err->code;
    }
    struct bpo_request request;
    bpo_request_init(&request, model, like->mode);
    request.text = "Tell me about tea, tea and tea";
    request.n_text = strlen(request.text);
    request.n_samples = like->n_samples;
    request.temperature = like->temperature;
    request.top_k = like->top_k;
    request.max_new_tokens = like->max_new_tokens;
    request.seed = 4;
    int64_t number = bpo_submit(session, &request, err);
    code = number < 0 ? (int)number : 0;
    for (int more = 1; !code && more > 0;) {
        const struct bpo_event *events;
        size_t n_events;
        more = bpo_step(session, &events, &n_events, err);
        code = more < 0 ? more : 0;
        for (size_t i = 0; i < n_events && !code; i++) {
            const struct bpo_event *e = &events[i];
            if (e->kind == BPO_EVENT_DONE) {
                result->n_done++;
                result->n_tokens[e->sample] = e->new_tokens;
                memcpy(result->tokens[e->sample], e->tokens,
                       (size_t)e->new_tokens * sizeof(int32_t));
                if (e->stop == BPO_STOP_ERROR) {
                    *err = *e->error;
                    code = err->code;
                }
            }
        }
    }
    bpo_session_close(session);
    bpo_model_close(model);
    return code;
}

static void assert_same(const struct result *a, const struct result *b, int n) {
    assert_int_equal(a->n_done, n);
    assert_int_equal(b->n_done, n);
    for (int i = 0; i < n; i++) {
        assert_int_equal(a->n_tokens[i], b->n_tokens[i]);
        assert_memory_equal(a->tokens[i], b->tokens[i], (size_t)a->n_tokens[i] * sizeof(int32_t));
    }
}

/* The text is the same whether the GPU draws the ids or the engine draws them from the GPU's
 * logits, with and without drafts: the forbidden ids and the random number belong to each row's
 * position. A second run gives the same again. */
static void test_texts_are_drawn_alike(void **state) {
    (void)state;
    struct bpo_error err = {0};
    struct result by_gpu, by_host, again;
    for (int mode = 0; mode < BPO_N_MODES; mode++) {
        for (int32_t lookup = 0; lookup <= 3; lookup += 3) {
            const struct bpo_request like = {.mode = (enum bpo_mode)mode,
                                             .n_samples = 5,
                                             .temperature = 0.7f,
                                             .top_k = 40,
                                             .max_new_tokens = 14};
            assert_ok(run_request(model_path, BPO_DEVICE_CUDA, &like, lookup, &by_gpu, &err), &err);
            assert_ok(run_request(model_path, BPO_DEVICE_CUDA, &like, lookup > 0 ? lookup : -1,
                                  &again, &err),
                      &err);
            host_draws = true;
            assert_ok(run_request(model_path, BPO_DEVICE_CUDA, &like, lookup, &by_host, &err),
                      &err);
            host_draws = false;
            assert_same(&by_gpu, &by_host, 5);
            assert_same(&by_gpu, &again, 5);
        }
    }
}

static void infinite_weight(struct tiny *t) {
    const uint16_t infinity = 0x7c00;
    memcpy(tiny_data(t, "model.layers.1.mlp.down_proj.weight"), &infinity, 2);
}

static void test_a_model_of_infinities_is_reported(void **state) {
    (void)state;
    struct bpo_error err = {0};
    struct result result;
    char path[TEMPORARY_PATH];
    const struct bpo_request like = {
        .mode = BPO_STABLE, .n_samples = 1, .temperature = 1, .max_new_tokens = 4};
    temporary_path(path, "infinite.bin");
    tiny_create(path, infinite_weight);
    assert_int_equal(run_request(path, BPO_DEVICE_CUDA, &like, 0, &result, &err), BPO_ERR_RUN);
    assert_non_null(strstr(err.message, "layer 1"));
    (void)unlink(path);
}

/* Makes every call of CUDA fail once: each time there must be an error with a message, or, if the
 * call only frees something, the whole text; and nothing may leak. */
static void test_every_call_fails(void **state) {
    (void)state;
    if (!knobs.fail_call) {
        print_message("skipped: on a GPU calls cannot be made to fail\n");
        skip();
    }
    const struct bpo_request like = {
        .mode = BPO_AGGRESSIVE, .n_samples = 3, .temperature = 1, .top_k = 5, .max_new_tokens = 5};
    struct bpo_error err = {0};
    struct result expected, result;
    long before = knobs.calls(), live = knobs.live();
    assert_ok(run_request(model_path, BPO_DEVICE_CUDA, &like, 0, &expected, &err), &err);
    long n_calls = knobs.calls() - before, n_harmless = 0, n_tried = 0;
    for (long n = 1; n <= n_calls; n += n < 60 || n > n_calls - 60 ? 1 : 3) {
        err = (struct bpo_error){0};
        knobs.fail_call(n);
        int code = run_request(model_path, BPO_DEVICE_CUDA, &like, 0, &result, &err);
        knobs.fail_call(0);
        n_tried++;
        assert_int_equal(knobs.live(), live);
        if (code == 0) {
            n_harmless++;
            assert_same(&expected, &result, 3);
        } else {
            assert_true(strlen(err.message) > 10);
        }
    }
    printf("    %ld of %ld calls failed, one at a time; %ld of them free something\n", n_tried,
           n_calls, n_harmless);
    assert_true(n_harmless < 80);
}

/* AUTO falls back to the CPU, and gives the reason if there is a GPU that has too little memory. */
static void test_auto(void **state) {
    (void)state;
    if (!knobs.memory) {
        print_message("skipped: the size of a GPU's memory cannot be set\n");
        skip();
    }
    struct bpo_error err = {0};
    struct bpo_session_options options;
    struct bpo_session_info info;
    const struct bpo_event *events;
    size_t n_events;
    struct bpo_model *model = bpo_model_open(model_path, &err);
    assert_non_null(model);
    bpo_session_options_init(&options);
    for (int room = 0; room < 2; room++) {
        knobs.memory(room ? (size_t)1 << 30 : (size_t)40 << 20);
        struct bpo_session *session = bpo_session_open(model, &options, &err);
        assert_non_null(session);
        bpo_session_get_info(session, &info);
        assert_string_equal(info.device, room ? "cuda" : "cpu");
        assert_int_equal(bpo_step(session, &events, &n_events, &err), 0);
        assert_int_equal(n_events, room ? 0 : 1);
        if (!room) {
            assert_int_equal(events[0].kind, BPO_EVENT_WARNING);
            assert_non_null(strstr(events[0].text, "using the CPU: the GPU has no room"));
        }
        bpo_session_close(session);
    }
    bpo_model_close(model);
}

static int set_up(void **state) {
    (void)state;
    temporary_path(model_path, "cuda.bin");
    tiny_create(model_path, NULL);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    (void)unlink(model_path);
    return knobs.live && knobs.live() != 0; /* nothing may stay allocated */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_draws_as_the_reference),
        cmocka_unit_test(test_draws_nothing),
        cmocka_unit_test(test_texts_are_drawn_alike),
        cmocka_unit_test(test_a_model_of_infinities_is_reported),
        cmocka_unit_test(test_auto),
        cmocka_unit_test(test_every_call_fails),
    };
    gpu = cuda_library(&knobs, COUNT(tests));
    return gpu ? cmocka_run_group_tests(tests, set_up, tear_down) : 0;
}

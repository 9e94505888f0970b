/*
 * test_faults.c - whatever can fail in the engine fails once: the n-th allocation or backend call,
 * for every n. Each time the caller gets an error with a message, and everything can be closed. The
 * address sanitizer finds leaks.
 */
#include "failing_alloc.h"

#include "../kernels.h"

static const struct kernels *faulty_kernels(void);

#define kernels_cpu faulty_kernels
#include "../engine/engine.c"
#include "../bpo.c"
#include "../model.c"
#include "../engine/session.c"
#undef malloc
#undef calloc
#undef realloc
#undef kernels_cpu

#include <setjmp.h>
#include <stdarg.h>
#include <unistd.h>

#include <cmocka.h>

#include "tiny_session.h"

/* ---- a backend whose calls fail ---- */

#define FAIL(err) bpo_fail(err, BPO_ERR_RESOURCE, "a test", "a fault on purpose")

static struct backend *faulty_create(const struct backend_options *options, struct bpo_error *err) {
    return fault() ? (void)FAIL(err), NULL : kernels_cpu()->create(options, err);
}

static void *faulty_alloc(struct backend *b, size_t n_bytes, enum memory_kind kind,
                          struct bpo_error *err) {
    return fault() ? (void)FAIL(err), NULL : kernels_cpu()->alloc(b, n_bytes, kind, err);
}

static int faulty_upload(struct backend *b, void *to, const void *from, size_t n_bytes,
                         struct bpo_error *err) {
    return fault() ? FAIL(err) : kernels_cpu()->upload(b, to, from, n_bytes, err);
}

static int faulty_download(struct backend *b, void *to, const void *from, size_t n_bytes,
                           struct bpo_error *err) {
    return fault() ? FAIL(err) : kernels_cpu()->download(b, to, from, n_bytes, err);
}

static const void *faulty_load_weights(struct backend *b, const void *host, size_t n_bytes,
                                       struct bpo_error *err) {
    return fault() ? (void)FAIL(err), NULL : kernels_cpu()->load_weights(b, host, n_bytes, err);
}

static int faulty_kv_copy(struct backend *b, const struct kv_cache *kv, int32_t to, int32_t from,
                          int32_t n, struct bpo_error *err) {
    return fault() ? FAIL(err) : kernels_cpu()->kv_copy(b, kv, to, from, n, err);
}

static int faulty_step_end(struct backend *b, struct bpo_error *err) {
    int failed = kernels_cpu()->step_end(b, err);
    return fault() ? FAIL(err) : failed;
}

static const struct kernels *faulty_kernels(void) {
    static struct kernels k;
    k = *kernels_cpu();
    k.host_memory = false; /* as a GPU's: logits are downloaded */
    k.create = faulty_create;
    k.alloc = faulty_alloc;
    k.upload = faulty_upload;
    k.download = faulty_download;
    k.load_weights = faulty_load_weights;
    k.kv_copy = faulty_kv_copy;
    k.step_end = faulty_step_end;
    return &k;
}

/* ---- the engine from opening to closing ---- */

/* Opens, submits, steps to the end and closes. Returns 0, or the code of the error in *err. */
static int use(const char *path, enum bpo_mode mode, struct bpo_error *err) {
    struct bpo_session_options options;
    struct bpo_request request;
    const struct bpo_event *events;
    size_t n_events;
    int code = 0, n_done = 0;
    struct bpo_model *model = bpo_model_open(path, err);
    bpo_session_options_init(&options);
    options.n_slots = 2;
    options.n_threads = 1;
    struct bpo_session *session = model ? bpo_session_open(model, &options, err) : NULL;
    if (!session) {
        bpo_model_close(model);
        return err->code;
    }
    bpo_request_init(&request, model, mode);
    request.text = "Tell me about \xff tea";
    request.n_text = 17;
    request.n_samples = 3;
    request.max_new_tokens = 4;
    request.forced = (const int32_t[]){4, 5, 6, 7};
    request.n_forced = mode == BPO_STABLE ? 4 : 0;
    int64_t number = bpo_submit(session, &request, err);
    code = number < 0 ? (int)number : 0;
    for (int more = 1; !code && more > 0;) {
        more = bpo_step(session, &events, &n_events, err);
        code = more < 0 ? more : 0;
        for (size_t i = 0; i < n_events && !code; i++) {
            if (events[i].kind == BPO_EVENT_DONE) {
                n_done++;
                if (events[i].stop == BPO_STOP_ERROR) {
                    *err = *events[i].error;
                    code = err->code;
                }
            }
        }
    }
    if (!code) {
        assert_int_equal(n_done, 3);
        request.n_samples = 1;
        char *text = bpo_rewrite(session, &request, err);
        code = text ? 0 : err->code;
        free(text);
    }
    bpo_session_close(session);
    bpo_model_close(model);
    return code;
}

static void every_fault_is_an_error(void **state) {
    (void)state;
    char path[TEMPORARY_PATH];
    temporary_path(path, "faults.bin");
    tiny_create(path, NULL);
    for (int mode = 0; mode < BPO_N_MODES; mode++) {
        long n = 0;
        for (bool reached = true; reached; n++) {
            struct bpo_error err = {0};
            countdown = n + 1;
            int code = use(path, (enum bpo_mode)mode, &err);
            reached = countdown == 0;
            countdown = 0;
            if (reached ? code != BPO_ERR_RESOURCE || err.message[0] == '\0' : code != 0) {
                fail_msg("fault %ld: code %d, \"%s\"", n + 1, code, err.message);
            }
        }
        assert_true(n > 60); /* there was something to fail */
    }
    (void)unlink(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_fault_is_an_error)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

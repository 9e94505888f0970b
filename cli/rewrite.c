/*
 * rewrite.c - see rewrite.h.
 */
#include "cli/rewrite.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/error.h"
#include "base/text.h"
#include "cli/messages.h"

/* ---------------------------------------------------------------- results */

/* One sample's text as it grows, and at the end its line of JSON. */
struct sample {
    struct text text;
    size_t n_printed;
    bool done, failed;
    char *json;
};

struct results {
    const struct prompt_run *run;
    struct sample *samples; /* [n] */
    int32_t n, current;     /* current: the sample to print next */
    bool printed_any, streaming;
    double prefill_s, decode_s;
    int32_t prompt_tokens, kept_tokens, new_tokens;
    int64_t passes, drafted, accepted; /* of all samples together */
    struct bpo_error error;            /* of the last sample that failed */
};

/* Prints what is new of the current sample's text: all of it once the sample is done, and before
 * that only when streaming. */
static void print_text(struct results *r, struct sample *s) {
    bool is_new = s->text.n > s->n_printed || (s->done && !s->failed && s->n_printed == 0);
    if (is_new && (s->done || r->streaming)) {
        if (r->printed_any && s->n_printed == 0) {
            (void)putchar('\n'); /* an empty line separates samples */
        }
        r->printed_any = true;
        (void)fwrite(s->text.data ? s->text.data + s->n_printed : "", 1, s->text.n - s->n_printed,
                     stdout);
        s->n_printed = s->text.n;
    }
    if (s->done && (s->n_printed > 0 || is_new)) {
        (void)putchar('\n');
    }
}

/* Prints the samples in order, as far as they have come. */
static int print_results(struct results *r, struct bpo_error *err) {
    for (; r->current < r->n; r->current++) {
        struct sample *s = &r->samples[r->current];
        if (!r->run->options->json) {
            print_text(r, s);
        } else if (s->done && s->json) {
            (void)puts(s->json);
        }
        if (!s->done) {
            break;
        }
    }
    if (fflush(stdout) != 0 || ferror(stdout)) {
        return bpo_fail(err, BPO_ERR_RUN, "is the disk full, or was the pipe closed?",
                        "cannot write to standard output: %s", strerror(errno));
    }
    return 0;
}

static char *result_json(const struct prompt_run *run, const struct bpo_event *e) {
    json_t *tokens = json_array();
    for (int32_t i = 0; i < e->new_tokens; i++) {
        (void)json_array_append_new(tokens, json_integer(e->tokens[i]));
    }
    json_t *timings =
        json_pack("{s:f, s:f, s:f, s:i, s:i, s:i, s:i}", "open_s", run->open_s, "prefill_s",
                  e->prefill_s, "decode_s", e->decode_s, "kept", e->kept_tokens, "passes",
                  e->passes, "drafted", e->drafted, "accepted", e->accepted);
    json_t *object =
        json_pack("{s:s%, s:o, s:i, s:I, s:i, s:i, s:s, s:b, s:o}", "text", e->text, e->n_text,
                  "tokens", tokens, "sample", e->sample, "seed", (json_int_t)run->request.seed,
                  "prompt_tokens", e->prompt_tokens, "new_tokens", e->new_tokens, "stop",
                  bpo_stop_name(e->stop), "unchanged", (int)e->unchanged, "timings", timings);
    char *line = object ? json_dumps(object, JSON_REAL_PRECISION(6)) : NULL;
    json_decref(object);
    return line;
}

static int take_done(struct results *r, const struct bpo_event *e, struct bpo_error *err) {
    struct sample *s = &r->samples[e->sample];
    s->done = true;
    s->failed = e->stop == BPO_STOP_ERROR || (e->stop == BPO_STOP_INTERRUPTED && e->n_text == 0);
    r->prompt_tokens = e->prompt_tokens;
    r->kept_tokens = e->kept_tokens;
    r->new_tokens += e->new_tokens;
    r->passes += e->passes;
    r->drafted += e->drafted;
    r->accepted += e->accepted;
    r->prefill_s = e->prefill_s;
    r->decode_s = e->decode_s > r->decode_s ? e->decode_s : r->decode_s;
    if (e->stop == BPO_STOP_ERROR) {
        r->error = *e->error;
        return 0;
    }
    if (r->run->options->json && !(s->json = result_json(r->run, e))) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the result");
    }
    return 0;
}

static int take_event(struct results *r, const struct bpo_event *e, struct bpo_error *err) {
    switch (e->kind) {
    case BPO_EVENT_WARNING:
        if (!r->run->options->quiet) {
            report_warning(e->text);
        }
        return 0;
    case BPO_EVENT_TEXT:
        return text_append(&r->samples[e->sample].text, e->text, e->n_text, err);
    case BPO_EVENT_DONE:
        return take_done(r, e, err);
    case BPO_EVENT_TOKEN:
        break;
    }
    return 0;
}

/* ---------------------------------------------------------------- statistics */

static double rate(int32_t n, double seconds) {
    return n / (seconds > 0 ? seconds : 1);
}

static double peak_memory_mib(void) {
    struct rusage usage;
    (void)getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss / 1048576.0; /* bytes there, KiB elsewhere */
#else
    return (double)usage.ru_maxrss / 1024.0;
#endif
}

static void print_device(const struct bpo_session_info *info) {
    if (info->n_threads == 0) { /* a GPU */
        (void)fprintf(stderr, "on       %s %s, %s\n", info->device, info->simd, info->blas);
    } else {
        (void)fprintf(stderr, "on       %s %s, %d thread%s, matmul %s, OpenBLAS %s\n", info->device,
                      info->simd, info->n_threads, info->n_threads == 1 ? "" : "s",
                      info->matmul == BPO_MATMUL_OPENBLAS ? "openblas" : "own", info->blas);
    }
    if (info->blas_hint[0]) {
        (void)fprintf(stderr, "hint     %s\n", info->blas_hint);
    }
}

static void print_stats(const struct results *r) {
    struct bpo_session_info info;
    bpo_session_get_info(r->run->session, &info);
    /* A sample's first token comes from the prompt's own pass. */
    int32_t n_decoded = r->new_tokens - r->n, n_computed = r->prompt_tokens - r->kept_tokens;
    (void)fprintf(stderr, "load     %8.3f s\n", r->run->open_s);
    (void)fprintf(stderr,
                  "prefill  %8.3f s   %6d tokens   %8.1f tokens/s   (and %d kept from earlier)\n",
                  r->prefill_s, n_computed, rate(n_computed, r->prefill_s), r->kept_tokens);
    (void)fprintf(stderr, "decode   %8.3f s   %6d tokens   %8.1f tokens/s   (%d sample%s)\n",
                  r->decode_s, n_decoded, rate(n_decoded, r->decode_s), r->n, r->n == 1 ? "" : "s");
    (void)fprintf(stderr,
                  "lookup   %8.2f tokens per pass and sample: %lld passes, %lld tokens drafted, "
                  "%lld rows wasted\n",
                  (double)n_decoded / (double)(r->passes > 0 ? r->passes : 1), (long long)r->passes,
                  (long long)r->drafted, (long long)(r->drafted - r->accepted));
    print_device(&info);
    (void)fprintf(stderr,
                  "memory   %.1f MiB peak, model file included; buffers %.1f MiB, KV cache %.1f "
                  "KiB per position\n",
                  peak_memory_mib(), (double)info.buffer_bytes / 1048576.0,
                  (double)info.kv_position_bytes / 1024.0);
}

/* ---------------------------------------------------------------- rewriting */

/* Submits the request and steps the session until nothing is left, printing results on the way. */
static int run_request(struct results *r, const struct bpo_request *request,
                       struct bpo_error *err) {
    const struct prompt_run *run = r->run;
    int64_t number = bpo_submit(run->session, request, err);
    if (number < 0) {
        return (int)number;
    }
    if (run->options->seed < 0 && request->temperature > 0 && !run->options->quiet) {
        (void)fprintf(stderr, "bpo: seed %llu\n", (unsigned long long)request->seed);
    }
    int more = 1;
    while (more > 0) {
        const struct bpo_event *events = NULL;
        size_t n_events = 0;
        more = bpo_step(run->session, &events, &n_events, err);
        int failed = more < 0 ? more : 0;
        for (size_t i = 0; i < n_events && !failed; i++) {
            failed = take_event(r, &events[i], err);
        }
        failed = failed ? failed : print_results(r, err);
        if (failed) {
            return failed;
        }
    }
    if (run->options->stats) {
        print_stats(r);
    }
    if (r->error.code) {
        *err = r->error;
    }
    return r->error.code;
}

int rewrite_prompt(const struct prompt_run *run, struct bpo_error *err) {
    struct bpo_request request = run->request;
    struct results r = {.run = run, .n = request.n_samples};
    /* A hook for benchmarks, not in --help: ids that replace those that are drawn; see bpo.h. */
    const char *replay = getenv("BPO_FORCE_TOKENS");
    int32_t *forced = NULL;
    int failed =
        replay ? parse_ids(&forced, &request.n_forced, replay, "BPO_FORCE_TOKENS", err) : 0;
    request.forced = forced;
    r.streaming = isatty(STDOUT_FILENO) && !run->options->json;
    r.samples = failed ? NULL : calloc((size_t)r.n, sizeof *r.samples);
    if (r.samples) {
        failed = run_request(&r, &request, err);
    } else if (!failed) {
        failed = out_of_memory(err, "the samples", (size_t)r.n * sizeof *r.samples);
    }
    for (int32_t i = 0; r.samples && i < r.n; i++) {
        free(r.samples[i].text.data);
        free(r.samples[i].json);
    }
    free(r.samples);
    free(forced);
    return failed;
}

/* ---------------------------------------------------------------- logits */

/* Writes NumPy's .npy format, version 1.0: a header padded to 128 bytes, then the numbers. */
static int write_npy(const char *path, const float *data, size_t rows, size_t cols,
                     struct bpo_error *err) {
    /* magic and version 1.0 (its second zero ends the string), then the header's length, 118 */
    char header[129] = "\x93NUMPY\x01";
    char shape[96];
    int n = snprintf(shape, sizeof shape,
                     "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }", rows, cols);
    memset(header + 10, ' ', 117);
    header[8] = 118;
    memcpy(header + 10, shape, (size_t)n);
    header[127] = '\n';
    FILE *file = fopen(path, "wb");
    bool fine = file && fwrite(header, 1, 128, file) == 128 &&
                fwrite(data, sizeof *data, rows * cols, file) == rows * cols;
    int why = errno;
    if (file && fclose(file) != 0) {
        why = fine ? errno : why;
        fine = false;
    }
    if (!fine) {
        return bpo_fail(err, BPO_ERR_RUN,
                        "does the folder exist, is it writable, is the disk full?",
                        "cannot write %s: %s", path, strerror(why));
    }
    return 0;
}

int dump_logits(const struct prompt_run *run, struct bpo_error *err) {
    const struct bpo_request *q = &run->request;
    struct bpo_model_info info;
    const int32_t *ids = q->ids;
    size_t n_ids = q->n_ids;
    int32_t *own = NULL;
    int failed = 0;
    bpo_model_get_info(run->model, &info);
    if (!ids) {
        failed = bpo_tokenize(run->model, q->text, q->n_text, true, &own, &n_ids, err);
        ids = own;
    }
    float *logits = failed ? NULL : calloc(n_ids, (size_t)info.vocab_size * sizeof *logits);
    if (!failed && !logits) {
        failed = bpo_fail(err, BPO_ERR_RESOURCE, "give a shorter input",
                          "out of memory for the logits of %zu rows", n_ids);
    }
    failed = failed ? failed : bpo_logits(run->session, ids, n_ids, logits, err);
    failed =
        failed ? failed
               : write_npy(run->options->dump_logits, logits, n_ids, (size_t)info.vocab_size, err);
    free(logits);
    free(own);
    return failed;
}

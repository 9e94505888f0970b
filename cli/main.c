/*
 * main.c - the command line: options in, a rewritten prompt out.
 *
 * stdout carries the result and nothing else; everything else goes to stderr. Exit codes: 0 done,
 * 1 failed while running, 2 usage, 3 model or tokenizer file, 4 input, 5 not enough memory or no
 * such device, 130 interrupted, 143 terminated.
 *
 * The other files of cli/, none of which exits:
 *
 *     options        the table of options, parsed and checked
 *     rewrite        one prompt
 *     dataset        many prompts; on top of jsonl (lines), record (one line's work) and progress
 *     messages       errors, hints and warnings, with option_words (the command line's vocabulary)
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/program.h"
#include "bpo.h"
#include "cli/dataset.h"
#include "cli/messages.h"
#include "cli/options.h"
#include "cli/rewrite.h"

/* A block of bytes that was read. */
struct bytes {
    char *data;
    size_t n;
};

/* ---------------------------------------------------------------- input */

static int read_stream(struct bytes *out, FILE *file, const char *name, struct bpo_error *err) {
    size_t capacity = 0, n_read = 1;
    *out = (struct bytes){0};
    while (n_read > 0) {
        if (out->n == capacity) {
            capacity = 2 * capacity + 4096;
            char *grown = realloc(out->data, capacity);
            if (!grown) {
                return out_of_memory(err, "the prompt", capacity);
            }
            out->data = grown;
        }
        n_read = fread(out->data + out->n, 1, capacity - out->n, file);
        out->n += n_read;
    }
    if (ferror(file)) {
        return bpo_fail(err, BPO_ERR_INPUT, "is it a readable text file?",
                        "cannot read the prompt from %s: %s", name, strerror(errno));
    }
    /* One final LF or CRLF belongs to the file, not to the prompt. */
    if (out->n > 0 && out->data[out->n - 1] == '\n') {
        out->n -= out->n > 1 && out->data[out->n - 2] == '\r' ? 2 : 1;
    }
    return 0;
}

static int read_file(struct bytes *out, const char *path, struct bpo_error *err) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        return bpo_fail(err, BPO_ERR_INPUT,
                        "-f names a text file that is one prompt; a prompt itself follows -p",
                        "cannot open %s: %s", path, strerror(errno));
    }
    int failed = read_stream(out, file, path, err);
    (void)fclose(file);
    return failed;
}

/* Reads the prompt's bytes from -p, -f or standard input. */
static int read_prompt(struct bytes *out, const struct options *o, struct bpo_error *err) {
    if (o->prompt && strcmp(o->prompt, "-") != 0) {
        *out = (struct bytes){.data = strdup(o->prompt), .n = strlen(o->prompt)};
        return out->data ? 0 : out_of_memory(err, "the prompt", out->n + 1);
    }
    if (o->file) {
        return read_file(out, o->file, err);
    }
    if (!o->prompt && isatty(STDIN_FILENO)) {
        return bpo_fail(err, BPO_ERR_USAGE,
                        "bpo -p \"Tell me about Harry Potter\"; bpo --help lists the options",
                        "there is no prompt");
    }
    return read_stream(out, stdin, "standard input", err);
}

/* ---------------------------------------------------------------- the model */

/* Finds the bundled demo model; path has room for PATH_MAX bytes. */
static bool find_demo_model(char *path, const char *argv0) {
    static const char *const places[] = {"demo/bpo-demo.bin", "../share/bpo/bpo-demo.bin"};
    char folder[PATH_MAX];
    bool known = program_folder(folder, sizeof folder, argv0);
    for (size_t i = 0; known && i < sizeof places / sizeof places[0]; i++) {
        int n = snprintf(path, PATH_MAX, "%s/%s", folder, places[i]);
        if (n > 0 && n < PATH_MAX && access(path, F_OK) == 0) {
            return true;
        }
    }
    return false;
}

/* The first that there is of -m, $BPO_MODEL, ./bpo.bin and the bundled demo model; with --demo, the
 * last one. place has room for PATH_MAX bytes. */
static const char *find_model(char *place, const struct options *o, const char *argv0,
                              struct bpo_error *err) {
    const char *named = o->model ? o->model : getenv("BPO_MODEL");
    if (named && *named && !o->demo) {
        return named;
    }
    if (access("bpo.bin", F_OK) == 0 && !o->demo) {
        return "bpo.bin";
    }
    if (o->input && !o->demo) {
        (void)bpo_fail(err, BPO_ERR_USAGE,
                       "name a model with -m FILE or BPO_MODEL; --demo uses the bundled toy",
                       "a data set needs a model: there is no -m, no BPO_MODEL, no ./bpo.bin");
        return NULL;
    }
    if (!find_demo_model(place, argv0)) {
        (void)bpo_fail(err, BPO_ERR_MODEL,
                       "name one with -m FILE or BPO_MODEL; make one with: export_weights.py "
                       "HF_DIR -o bpo.bin",
                       "there is no model: no -m, no BPO_MODEL, no ./bpo.bin, and no demo model "
                       "beside the program");
        return NULL;
    }
    report_note(o->demo ? "using the bundled demo model (a toy)"
                        : "no model given; using the bundled demo model (a toy); -m FILE names a "
                          "real one");
    return place;
}

static void print_info(const struct bpo_model *model, const char *path) {
    struct bpo_model_info c;
    bpo_model_get_info(model, &c);
    (void)printf(
        "file            %s, %.1f MB\nsource          %s\nparameters      %.2f million, fp16%s\n",
        path, (double)c.file_bytes / 1e6, c.source, (double)c.n_parameters / 1e6,
        c.tie_embeddings ? ", tied embeddings" : "");
    (void)printf("layers          %d\nwidth           %d, feed-forward %d\nheads           %d, "
                 "key/value %d, size %d\n",
                 c.n_layers, c.dim, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim);
    (void)printf("vocabulary      %d (tokenizer: %d pieces), bos %d, eos %d, pad %d, newline %d\n",
                 c.vocab_size, c.n_pieces, c.bos_id, c.eos_id, c.pad_id, c.newline_id);
    (void)printf("positions       %d, trained on %d; %.1f KB of KV cache each\n", c.max_positions,
                 c.trained_length, 4.0 * c.n_layers * c.n_kv_heads * c.head_dim / 1e3);
    (void)printf("rms_norm_eps    %g\nrope_theta      %g\n", c.rms_norm_eps, c.rope_theta);
    static const char *const names[] = {"stable", "aggressive"};
    for (int i = 0; i < BPO_N_MODES; i++) {
        const struct bpo_mode_settings *s = &c.settings[i];
        (void)printf("%-15s temperature %g, top-k %d, top-p %g, %d new tokens, %d sample%s\n",
                     names[i], (double)s->temperature, s->top_k, (double)s->top_p,
                     s->max_new_tokens, s->n_samples, s->n_samples == 1 ? "" : "s");
    }
    (void)printf("template        ");
    for (const char *at = c.prompt_template; *at; at++) {
        (void)(*at == '\n' ? fputs("\\n", stdout) : putchar(*at));
    }
    (void)putchar('\n');
}

static void verify_progress(void *user, uint64_t done, uint64_t total) {
    (void)user;
    (void)fprintf(stderr, "\rverified %3.0f %%%s", 100.0 * (double)done / (double)total,
                  done == total ? "\n" : "");
}

/* Shows how much of the weights the GPU has; nothing if there is little to load. */
static void load_progress(void *user, uint64_t done, uint64_t total) {
    (void)user;
    if (total >= (uint64_t)256 << 20) {
        (void)fprintf(stderr, "\rloading %3u %%%s", (unsigned)(done * 100 / total),
                      done < total ? "" : "\r           \r");
    }
}

static bool shows_progress(const struct options *o) {
    return isatty(STDERR_FILENO) && !o->quiet;
}

/* ---------------------------------------------------------------- signals */

/* what a signal interrupts; set while a session is open */
static struct bpo_session *volatile interruptible;
static volatile sig_atomic_t signalled;

static void on_signal(int number) {
    signalled = number;
    bpo_interrupt(interruptible);
}

/* The first Ctrl-C ends the run with the text so far; a second one kills the process. */
static void catch_signals(struct bpo_session *session) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART | (int)SA_RESETHAND;
    interruptible = session;
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
}

static void release_signals(void) {
    (void)signal(SIGINT, SIG_DFL);
    (void)signal(SIGTERM, SIG_DFL);
}

/* ---------------------------------------------------------------- commands */

static int print_version(struct bpo_error *err) {
    struct bpo_session_info info;
    int failed = bpo_cpu_info(&info, err);
    if (!failed) {
        (void)printf("bpo %s\nbackend   %s\nSIMD      %s\nOpenBLAS  %s\n", bpo_version(),
                     info.device, info.simd, info.blas);
    }
    return failed;
}

static int verify(const struct bpo_model *model, const struct options *o, const char *path,
                  struct bpo_error *err) {
    int failed = bpo_model_verify(model, shows_progress(o) ? verify_progress : NULL, NULL, err);
    if (!failed) {
        (void)printf("%s: every hash matches\n", path);
    }
    return failed;
}

static int tokenize(const struct bpo_model *model, const struct options *o,
                    const struct bytes *text, struct bpo_error *err) {
    int32_t *ids;
    size_t n;
    int failed = bpo_tokenize(model, text->data, text->n, !o->raw, &ids, &n, err);
    if (failed) {
        return failed;
    }
    (void)putchar('[');
    for (size_t i = 0; i < n; i++) {
        (void)printf("%s%d", i > 0 ? ", " : "", ids[i]);
    }
    (void)puts("]");
    free(ids);
    return 0;
}

/* Opens the data set before the session, so that a problem with its files is known at once. */
static int run_dataset(const struct bpo_model *model, const struct options *o,
                       struct bpo_error *err) {
    struct dataset_options d = {.input = o->input,
                                .output = o->output ? o->output : "-",
                                .field = o->field ? o->field : "prompt",
                                .output_field =
                                    o->output_field ? o->output_field : "optimized_prompt",
                                .numbered = o->numbered,
                                .resume = o->resume,
                                .allow_errors = o->allow_errors,
                                .quiet = o->quiet,
                                .seed_given = o->seed >= 0,
                                .signalled = &signalled};
    struct bpo_session_options options;
    struct bpo_model_info info;
    int failed = parse_shard(o->shard, &d.shard, &d.n_shards, err);
    failed = failed ? failed : options_request(&d.request, o, model, err);
    struct dataset *dataset = failed ? NULL : dataset_open(&d, err);
    if (!dataset) {
        return err->code;
    }
    options_session(&options, o);
    options.progress = shows_progress(o) ? load_progress : NULL;
    bpo_model_get_info(model, &info);
    int32_t n_positions = o->context > 0 ? (int32_t)o->context : info.max_positions;
    options.n_slots = o->parallel > 0
                          ? (int32_t)o->parallel
                          : dataset_parallel(&info, &d.request, n_positions, options.n_threads);
    struct bpo_session *session = bpo_session_open(model, &options, err);
    if (session) {
        catch_signals(session);
        failed = dataset_run(dataset, model, session, err);
        release_signals();
    } else {
        failed = err->code;
    }
    dataset_close(dataset);
    bpo_session_close(session);
    return failed;
}

/* One prompt, which needs a session: its rewrites, or its logits. begun is when opening the model
 * began. */
static int run_prompt(const struct bpo_model *model, const struct options *o,
                      const struct bytes *text, double begun, struct bpo_error *err) {
    struct prompt_run run = {.options = o, .model = model};
    struct bpo_session_options options;
    int32_t *ids = NULL;
    size_t n_ids = 0;
    int failed = o->tokens ? parse_ids(&ids, &n_ids, o->tokens, "--tokens", err) : 0;
    failed = failed ? failed : options_request(&run.request, o, model, err);
    if (!failed) {
        run.request.text = text->data;
        run.request.n_text = text->n;
        run.request.ids = ids;
        run.request.n_ids = n_ids;
        options_session(&options, o);
        options.progress = shows_progress(o) ? load_progress : NULL;
        int32_t max_slots = o->parallel > 0 ? (int32_t)o->parallel : 32;
        options.n_slots = run.request.n_samples < max_slots ? run.request.n_samples : max_slots;
        run.session = bpo_session_open(model, &options, err);
        failed = run.session ? 0 : err->code;
    }
    if (!failed) {
        run.open_s = seconds_now() - begun;
        catch_signals(run.session);
        failed = o->dump_logits ? dump_logits(&run, err) : rewrite_prompt(&run, err);
        release_signals();
    }
    bpo_session_close(run.session);
    free(ids);
    return failed;
}

/* Everything that needs a model. */
static int with_model(const struct options *o, const char *argv0, struct bpo_error *err) {
    char place[PATH_MAX];
    double begun = seconds_now();
    const char *path = find_model(place, o, argv0, err);
    struct bytes text = {0};
    bool needs_text = !o->info && !o->verify && !o->tokens && !o->input;
    int failed = path ? 0 : err->code;
    if (!failed && needs_text) {
        failed = read_prompt(&text, o, err);
        begun = seconds_now(); /* the time that a user needs to type is not loading time */
    }
    struct bpo_model *model = failed ? NULL : bpo_model_open(path, err);
    if (!failed && !model) {
        failed = err->code;
    } else if (!failed && o->verify) {
        failed = verify(model, o, path, err);
    } else if (!failed && o->info) {
        print_info(model, path);
    } else if (!failed && o->input) {
        failed = run_dataset(model, o, err);
    } else if (!failed && o->tokenize) {
        failed = tokenize(model, o, &text, err);
    } else if (!failed) {
        failed = run_prompt(model, o, &text, begun, err);
    }
    bpo_model_close(model);
    free(text.data);
    return failed;
}

int main(int argc, char **argv) {
    struct options options;
    struct bpo_error err = {0};
    /* If stdin, stdout or stderr is closed, the next file to be opened must not take its number. */
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) {
            return -BPO_ERR_RUN;
        }
    }
    /* A closed pipe or a file at its size limit is then a failed write, with an error message. */
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGXFSZ, SIG_IGN);
    int failed = options_parse(&options, argc, argv, &err);
    if (!failed && options.help) {
        options_print_help();
    } else if (!failed && options.version) {
        failed = print_version(&err);
    } else if (!failed) {
        failed = with_model(&options, argv[0], &err);
    }
    if (!failed && (fflush(stdout) != 0 || ferror(stdout))) {
        failed = bpo_fail(&err, BPO_ERR_RUN, "is the disk full, or was the pipe closed?",
                          "cannot write to standard output: %s", strerror(errno));
    }
    if (failed) {
        return report_error(&err);
    }
    return signalled ? 128 + signalled : 0;
}

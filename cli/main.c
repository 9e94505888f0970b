/*
 * main.c - the command line: options in, a rewritten prompt out.
 *
 * stdout carries the result and nothing else; all else goes to stderr. Exit codes: 0 done, 1 failed
 * while running, 2 usage, 3 model or tokenizer file, 4 input, 5 not enough memory or no such
 * device, 130 interrupted, 143 terminated.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "bpo.h"
#include "base/clock.h"
#include "base/error.h"
#include "cli/dataset.h"

/* What the command line says; a negative number or NULL: nothing. */
struct options {
    const char *model, *prompt, *file, *tokens, *dump_logits;
    const char *input, *output, *field, *output_field, *shard; /* of a data set */
    int mode, device, matmul;                                  /* indices of the words below */
    double temperature, top_p;
    int64_t n_samples, top_k, max_new_tokens, seed, n_threads, context, lookup, parallel;
    bool no_cache, json, stats, quiet, greedy, info, verify, tokenize, raw, help, version;
    bool resume, allow_errors, demo, numbered;
};

static const char *const MODES[] = {"stable", "aggressive", NULL};
static const char *const DEVICES[] = {"auto", "cpu", "cuda", NULL};
static const char *const MATMULS[] = {"auto", "own", "openblas", NULL};

enum setting_kind { FLAG, TEXT, INTEGER, NUMBER, CHOICE };

/* One option: its names, what it takes and where that goes, and its line of --help. */
struct setting {
    char letter; /* 0: none */
    const char *name;
    enum setting_kind kind;
    size_t offset; /* in struct options */
    double least, most;
    const char *const *words; /* of a CHOICE */
    const char *value, *help;
};

#define AT(field) offsetof(struct options, field)

// clang-format off
static const struct setting SETTINGS[] = {
    {'m', "model", TEXT, AT(model), 0, 0, NULL, "FILE", "default: $BPO_MODEL, ./bpo.bin, the bundled demo model"},
    {'p', "prompt", TEXT, AT(prompt), 0, 0, NULL, "TEXT", "the prompt, as it is; - reads standard input"},
    {'f', "file", TEXT, AT(file), 0, 0, NULL, "FILE", "the whole file is one prompt"},
    {'i', "input", TEXT, AT(input), 0, 0, NULL, "FILE", "a data set: one JSON object a line; - reads standard input"},
    {'o', "output", TEXT, AT(output), 0, 0, NULL, "FILE", "the same lines with their rewrites (default: standard output)"},
    {0, "field", TEXT, AT(field), 0, 0, NULL, "NAME", "the member that holds the prompt (prompt)"},
    {0, "output-field", TEXT, AT(output_field), 0, 0, NULL, "NAME", "the member that gets the rewrite (optimized_prompt)"},
    {0, "resume", FLAG, AT(resume), 0, 0, NULL, NULL, "go on where the output ends"},
    {0, "shard", TEXT, AT(shard), 0, 0, NULL, "I/N", "only lines whose number mod N is I"},
    {0, "numbered", FLAG, AT(numbered), 0, 0, NULL, NULL, "each line is its number, a tab and the object: pieces of a data set"},
    {0, "allow-errors", FLAG, AT(allow_errors), 0, 0, NULL, NULL, "exit 0 although some records failed"},
    {0, "demo", FLAG, AT(demo), 0, 0, NULL, NULL, "take the bundled demo model, a toy, for a data set too"},
    {0, "mode", CHOICE, AT(mode), 0, 0, MODES, "MODE", "stable (default): one careful rewrite; aggressive: several freer ones"},
    {'n', "samples", INTEGER, AT(n_samples), 1, 10000, NULL, "N", "N rewrites of the prompt (stable: 1, aggressive: 5)"},
    {0, "temperature", NUMBER, AT(temperature), 0, 100, NULL, "X", "0 = greedy (stable: 0.6, aggressive: 0.9)"},
    {0, "top-p", NUMBER, AT(top_p), 0, 1, NULL, "X", "1 = off (0.9)"},
    {0, "top-k", INTEGER, AT(top_k), 0, INT32_MAX, NULL, "N", "0 = off (50)"},
    {0, "max-new-tokens", INTEGER, AT(max_new_tokens), 1, 1 << 30, NULL, "N", "(1024)"},
    {0, "greedy", FLAG, AT(greedy), 0, 0, NULL, NULL, "always the likeliest token, as with --temperature 0"},
    {0, "seed", INTEGER, AT(seed), 0, (double)BPO_MAX_SEED, NULL, "N", "the same seed gives the same text (default: random, told on stderr)"},
    {'t', "threads", INTEGER, AT(n_threads), 1, 1024, NULL, "N", "default: the physical cores that the process may use"},
    {0, "device", CHOICE, AT(device), 0, 0, DEVICES, "D", "auto, cpu or cuda"},
    {0, "matmul", CHOICE, AT(matmul), 0, 0, MATMULS, "M", "auto, own or openblas: who multiplies prompt rows on the CPU"},
    {0, "parallel", INTEGER, AT(parallel), 1, 4096, NULL, "N", "sequences decoded together (default: by cores and memory)"},
    {0, "context", INTEGER, AT(context), 2, 1 << 30, NULL, "N", "positions per sequence, at most the model's"},
    {0, "lookup", INTEGER, AT(lookup), 0, 15, NULL, "N", "tokens drafted per step, 0 = off (default: what pays; the text is the same)"},
    {0, "no-cache", FLAG, AT(no_cache), 0, 0, NULL, NULL, "do not keep the template's prefix in the user's cache folder"},
    {0, "json", FLAG, AT(json), 0, 0, NULL, NULL, "one JSON object per result and line"},
    {0, "stats", FLAG, AT(stats), 0, 0, NULL, NULL, "timings on stderr"},
    {'q', "quiet", FLAG, AT(quiet), 0, 0, NULL, NULL, "nothing but errors and the demo notice on stderr"},
    {0, "info", FLAG, AT(info), 0, 0, NULL, NULL, "describe the model file"},
    {0, "verify", FLAG, AT(verify), 0, 0, NULL, NULL, "check every hash of the model file"},
    {0, "tokenize", FLAG, AT(tokenize), 0, 0, NULL, NULL, "print the ids of the templated prompt as a JSON list"},
    {0, "raw", FLAG, AT(raw), 0, 0, NULL, NULL, "with --tokenize: of the bare text, without BOS"},
    {0, "tokens", TEXT, AT(tokens), 0, 0, NULL, "IDS", "\"1,518,...\": these ids are the whole input, without the template"},
    {0, "dump-logits", TEXT, AT(dump_logits), 0, 0, NULL, "F.npy", "write the logits [rows, vocabulary] of all the input's rows, then exit"},
    {'h', "help", FLAG, AT(help), 0, 0, NULL, NULL, "this text"},
    {'V', "version", FLAG, AT(version), 0, 0, NULL, NULL, "version, SIMD level, OpenBLAS"},
};
// clang-format on
enum { N_SETTINGS = sizeof SETTINGS / sizeof SETTINGS[0] };

/* A block of bytes that was read. */
struct bytes {
    char *data;
    size_t n;
};

/* ---------------------------------------------------------------- messages */

static void say(const char *kind, const char *colour, const char *text) {
    bool coloured = isatty(STDERR_FILENO) && !getenv("NO_COLOR");
    (void)fprintf(stderr, "bpo: %s%s:%s %s\n", coloured ? colour : "", kind,
                  coloured ? "\033[0m" : "", text);
}

static void say_warning(const char *text) {
    say("warning", "\033[1;33m", text);
}

/* Prints an error and its hint; returns its exit code. */
static int report(const struct bpo_error *err) {
    say("error", "\033[1;31m", err->message);
    if (err->hint[0]) {
        say("hint", "\033[1m", err->hint);
    }
    return -err->code;
}

/* ---------------------------------------------------------------- options */

static const char *const SEE_HELP = "bpo --help lists the options";

static void print_help(void) {
    (void)puts(
        "bpo rewrites a prompt into one that gets a more helpful answer from any LLM.\n"
        "\n"
        "usage: bpo [-m MODEL] -p TEXT     one prompt; '-p -' or piped stdin reads it from stdin\n"
        "       bpo [-m MODEL] -f FILE     the whole file is one prompt\n"
        "       bpo -m MODEL -i IN.jsonl -o OUT.jsonl     a data set\n");
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const struct setting *s = &SETTINGS[i];
        char letter[] = {s->letter ? '-' : ' ', s->letter ? s->letter : ' ', s->letter ? ',' : ' ',
                         '\0'},
             names[40];
        (void)snprintf(names, sizeof names, "%s --%s %s", letter, s->name,
                       s->value ? s->value : "");
        (void)printf("  %-25s %s\n", names, s->help);
    }
}

/* An integer or a number within [least, most], all of the text. */
static int parse_value(const struct setting *s, const char *text, int64_t *integer, double *number,
                       struct bpo_error *err) {
    char *end = NULL;
    errno = 0;
    if (s->kind == INTEGER) {
        *integer = strtoll(text, &end, 10);
        *number = (double)*integer;
    } else {
        *number = strtod(text, &end);
    }
    if (end == text || *end != '\0' || errno != 0 || !(*number >= s->least && *number <= s->most)) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP,
                        "--%s is \"%s\"; expected %s from %.16g to %.16g", s->name, text,
                        s->kind == INTEGER ? "an integer" : "a number", s->least, s->most);
    }
    return 0;
}

static int parse_choice(int *choice, const struct setting *s, const char *text,
                        struct bpo_error *err) {
    for (int i = 0; s->words[i]; i++) {
        if (strcmp(text, s->words[i]) == 0) {
            *choice = i;
            return 0;
        }
    }
    return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP, "--%s is \"%s\"; expected %s%s%s%s%s", s->name,
                    text, s->words[0], s->words[2] ? ", " : " or ", s->words[1],
                    s->words[2] ? " or " : "", s->words[2] ? s->words[2] : "");
}

static int parse_setting(struct options *o, const struct setting *s, const char *text,
                         struct bpo_error *err) {
    char *field = (char *)o + s->offset;
    int64_t integer = 0;
    double number = 0;
    int failed =
        s->kind == INTEGER || s->kind == NUMBER ? parse_value(s, text, &integer, &number, err) : 0;
    if (failed) {
        return failed;
    }
    switch (s->kind) {
    case FLAG:
        memcpy(field, &(bool){true}, sizeof(bool));
        return 0;
    case TEXT:
        memcpy(field, &text, sizeof text);
        return 0;
    case INTEGER:
        memcpy(field, &integer, sizeof integer);
        return 0;
    case NUMBER:
        memcpy(field, &number, sizeof number);
        return 0;
    default: {
        int choice = 0;
        failed = parse_choice(&choice, s, text, err);
        memcpy(field, &choice, sizeof choice);
        return failed;
    }
    }
}

/* Options that only a data set has, and those that it has not. */
static int check_dataset_options(const struct options *o, struct bpo_error *err) {
    const char *hint =
        "a data set: bpo -m MODEL -i IN.jsonl -o OUT.jsonl; bpo --help lists the options";
    bool any = o->output || o->field || o->output_field || o->shard || o->resume ||
               o->allow_errors || o->numbered;
    if (!o->input) {
        return any ? bpo_fail(err, BPO_ERR_USAGE, hint,
                              "-o, --field, --output-field, --shard, --numbered, --resume and "
                              "--allow-errors need -i FILE")
                   : 0;
    }
    if (o->prompt || o->file || o->tokens || o->tokenize || o->info || o->verify ||
        o->dump_logits || o->json || o->stats) {
        return bpo_fail(err, BPO_ERR_USAGE, hint,
                        "-i, a data set, excludes -p, -f, --tokens, --tokenize, --info, --verify, "
                        "--dump-logits, --json "
                        "and --stats");
    }
    return 0;
}

/* Options that exclude each other, and words that belong to none. */
static int check_options(struct options *o, int argc, char **argv, struct bpo_error *err) {
    if (optind < argc) {
        return bpo_fail(err, BPO_ERR_USAGE, "quote the whole prompt: -p \"...\"",
                        "\"%s\" belongs to no option", argv[optind]);
    }
    if ((o->prompt != NULL) + (o->file != NULL) + (o->tokens != NULL) > 1) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP, "-p, -f and --tokens exclude each other");
    }
    if (o->tokenize && o->tokens) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP, "--tokenize wants text, not --tokens");
    }
    if (o->greedy && o->temperature > 0) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP,
                        "--greedy and --temperature %g exclude each other", o->temperature);
    }
    if (o->demo && o->model) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP, "--demo and -m exclude each other");
    }
    o->temperature = o->greedy ? 0 : o->temperature;
    return check_dataset_options(o, err);
}

static int parse_options(struct options *o, int argc, char **argv, struct bpo_error *err) {
    struct option names[N_SETTINGS + 1] = {{NULL, 0, NULL, 0}};
    /* ":": a missing value is told from an unknown option */
    char letters[2 * N_SETTINGS + 2] = ":";
    size_t n_letters = 1;
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const struct setting *s = &SETTINGS[i];
        bool takes_value = s->kind != FLAG;
        names[i] = (struct option){s->name, takes_value ? required_argument : no_argument, NULL,
                                   (int)(1000 + i)};
        if (s->letter) {
            letters[n_letters++] = s->letter;
            letters[n_letters] = ':';
            n_letters += takes_value;
        }
    }
    letters[n_letters] = '\0';
    *o = (struct options){.temperature = -1,
                          .top_p = -1,
                          .n_samples = -1,
                          .top_k = -1,
                          .max_new_tokens = -1,
                          .seed = -1,
                          .lookup = -1};
    opterr = 0;
    for (int at = 1, code; (code = getopt_long(argc, argv, letters, names, NULL)) != -1;
         at = optind) {
        if (code == ':' || code == '?') {
            return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP,
                            code == ':' ? "%s needs a value" : "unknown option %s", argv[at]);
        }
        for (size_t i = 0; i < N_SETTINGS; i++) {
            if ((code == 1000 + (int)i || (code < 1000 && code == SETTINGS[i].letter)) &&
                parse_setting(o, &SETTINGS[i], optarg, err)) {
                return err->code;
            }
        }
    }
    return check_options(o, argc, argv, err);
}

/* ---------------------------------------------------------------- input */

static int read_stream(struct bytes *out, FILE *file, const char *name, struct bpo_error *err) {
    size_t capacity = 0, n_read = 1;
    *out = (struct bytes){0};
    while (n_read > 0) {
        if (out->n == capacity) {
            capacity = 2 * capacity + 4096;
            char *grown = realloc(out->data, capacity);
            if (!grown) {
                return bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                                "out of memory: %zu bytes for the prompt", capacity);
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
    /* one final LF or CRLF belongs to the file, not to the prompt */
    if (out->n > 0 && out->data[out->n - 1] == '\n') {
        out->n -= out->n > 1 && out->data[out->n - 2] == '\r' ? 2 : 1;
    }
    return 0;
}

/* The prompt's bytes, from -p, -f or standard input. */
static int read_prompt(struct bytes *out, const struct options *o, struct bpo_error *err) {
    if (o->prompt && strcmp(o->prompt, "-") != 0) {
        *out = (struct bytes){.data = strdup(o->prompt), .n = strlen(o->prompt)};
        return out->data ? 0
                         : bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the prompt");
    }
    if (o->file) {
        FILE *file = fopen(o->file, "rb");
        if (!file) {
            return bpo_fail(
                err, BPO_ERR_INPUT,
                "-f names a text file that is one prompt; the prompt itself goes behind -p",
                "cannot open %s: %s", o->file, strerror(errno));
        }
        int failed = read_stream(out, file, o->file, err);
        (void)fclose(file);
        return failed;
    }
    if (!o->prompt && isatty(STDIN_FILENO)) {
        return bpo_fail(err, BPO_ERR_USAGE,
                        "bpo -p \"Tell me about Harry Potter\"; bpo --help lists the options",
                        "there is no prompt");
    }
    return read_stream(out, stdin, "standard input", err);
}

/* "1,518, 25580": ids between commas; brackets around them, as --tokenize prints them, are fine.
 * what: whose they are. */
static int parse_ids(int32_t **ids, size_t *n_ids, const char *text, const char *what,
                     struct bpo_error *err) {
    size_t n_most = strlen(text) / 2 + 1;
    const char *hint = "ids are integers between commas: \"1,518,25580\"";
    *n_ids = 0;
    *ids = malloc(n_most * sizeof **ids);
    if (!*ids) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the ids");
    }
    const char *at = text + strspn(text, " [");
    while (*at != '\0' && *at != ']') {
        char *end;
        long long id = strtoll(at, &end, 10);
        if (end == at || id < 0 || id > INT32_MAX || *n_ids == n_most) {
            return bpo_fail(err, BPO_ERR_USAGE, hint, "%s has no id at \"%.20s\"", what, at);
        }
        (*ids)[(*n_ids)++] = (int32_t)id;
        at = end + strspn(end, " ");
        if (*at == ',') {
            at += 1 + strspn(at + 1, " ");
            if (*at != '\0' && *at != ']') {
                continue;
            }
            at--; /* nothing behind the comma */
        }
        if (*at != '\0' && *at != ']') {
            return bpo_fail(err, BPO_ERR_USAGE, hint, "%s has no id at \"%.20s\"", what, at);
        }
    }
    at += strspn(at, "] ");
    return *n_ids > 0 && *at == '\0'
               ? 0
               : bpo_fail(err, BPO_ERR_USAGE, hint, "%s has no ids, or more behind them", what);
}

/* ---------------------------------------------------------------- the model */

/* The folder of this program, without a slash at its end. */
static bool program_folder(char *folder, size_t size, const char *argv0) {
    ssize_t n = readlink("/proc/self/exe", folder, size - 1);
    if (n > 0) {
        folder[n] = '\0';
    } else {
        char *path = strchr(argv0, '/') ? realpath(argv0, NULL) : NULL;
        int written = path ? snprintf(folder, size, "%s", path) : -1;
        free(path);
        if (written < 0 || (size_t)written >= size) {
            return false;
        }
    }
    char *slash = strrchr(folder, '/');
    if (slash) {
        *slash = '\0';
    }
    return slash != NULL;
}

/* -m, $BPO_MODEL, ./bpo.bin, the bundled demo model: the first that is there; --demo: the last. path: room for PATH_MAX
 * bytes. */
static const char *find_model(char *path, const struct options *o, const char *argv0,
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
                       "-m FILE or BPO_MODEL names a model; --demo takes the bundled toy",
                       "a data set wants a model: there is no -m, no BPO_MODEL, no ./bpo.bin");
        return NULL;
    }
    static const char *const places[] = {"demo/bpo-demo.bin", "../share/bpo/bpo-demo.bin"};
    char folder[PATH_MAX];
    bool known = program_folder(folder, sizeof folder, argv0);
    for (size_t i = 0; known && i < 2; i++) {
        int n = snprintf(path, PATH_MAX, "%s/%s", folder, places[i]);
        if (n > 0 && n < PATH_MAX && access(path, F_OK) == 0) {
            say("note", "\033[1m",
                "no model was named: this is the bundled demo model, a toy; -m FILE names a real "
                "one");
            return path;
        }
    }
    (void)bpo_fail(
        err, BPO_ERR_MODEL,
        "name one with -m FILE or BPO_MODEL; make one with: export_weights.py HF_DIR -o bpo.bin",
        "there is no model: no -m, no BPO_MODEL, no ./bpo.bin, and no demo model beside the "
        "program");
    return NULL;
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

/* ---------------------------------------------------------------- results */

/* One sample as it arrives: its text so far and, at the end, the rest. */
struct sample {
    char *text;
    size_t n_text, n_printed;
    bool done, failed;
    char *json;
};

struct run {
    const struct options *options;
    struct sample *samples; /* [n] */
    int32_t n, current;     /* current: the sample whose turn it is to be printed */
    bool printed_any, streaming;
    uint64_t seed;
    double open_s, prefill_s, decode_s;
    int32_t prompt_tokens, kept_tokens, new_tokens;
    int64_t passes, drafted, accepted; /* of all samples together */
    struct bpo_error error;
};

static int sample_append(struct sample *s, const char *text, size_t n, struct bpo_error *err) {
    char *grown = realloc(s->text, s->n_text + n + 1);
    if (!grown) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the result");
    }
    memcpy(grown + s->n_text, text, n);
    s->text = grown;
    s->n_text += n;
    return 0;
}

/* Prints what is due: the current sample's text (while it grows only on a terminal), then the next
 * one's. */
static int print_due(struct run *run, struct bpo_error *err) {
    for (; run->current < run->n; run->current++) {
        struct sample *s = &run->samples[run->current];
        bool has_text = s->n_text > s->n_printed || (s->done && !s->failed && s->n_printed == 0);
        if (run->options->json) {
            if (s->done && s->json) {
                (void)puts(s->json);
            }
        } else if (has_text && (s->done || run->streaming)) {
            if (run->printed_any && s->n_printed == 0) {
                (void)putchar('\n'); /* samples are separated by one empty line */
            }
            run->printed_any = true;
            (void)fwrite(s->text ? s->text + s->n_printed : "", 1, s->n_text - s->n_printed,
                         stdout);
            s->n_printed = s->n_text;
        }
        if (s->done && !run->options->json && (s->n_printed > 0 || has_text)) {
            (void)putchar('\n');
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

static char *result_json(const struct bpo_event *e, uint64_t seed, double open_s) {
    json_t *tokens = json_array();
    for (int32_t i = 0; i < e->new_tokens; i++) {
        (void)json_array_append_new(tokens, json_integer(e->tokens[i]));
    }
    json_t *timings =
        json_pack("{s:f, s:f, s:f, s:i, s:i, s:i, s:i}", "open_s", open_s, "prefill_s",
                  e->prefill_s, "decode_s", e->decode_s, "kept", e->kept_tokens, "passes",
                  e->passes, "drafted", e->drafted, "accepted", e->accepted);
    json_t *object =
        json_pack("{s:s%, s:o, s:i, s:I, s:i, s:i, s:s, s:b, s:o}", "text", e->text, e->n_text,
                  "tokens", tokens, "sample", e->sample, "seed", (json_int_t)seed, "prompt_tokens",
                  e->prompt_tokens, "new_tokens", e->new_tokens, "stop", bpo_stop_name(e->stop),
                  "unchanged", (int)e->unchanged, "timings", timings);
    char *line = object ? json_dumps(object, JSON_REAL_PRECISION(6)) : NULL;
    json_decref(object);
    return line;
}

static int take_event(struct run *run, const struct bpo_event *e, struct bpo_error *err) {
    if (e->kind == BPO_EVENT_WARNING) {
        if (!run->options->quiet) {
            say_warning(e->text);
        }
        return 0;
    }
    struct sample *s = &run->samples[e->sample];
    if (e->kind == BPO_EVENT_TEXT) {
        return sample_append(s, e->text, e->n_text, err);
    }
    if (e->kind != BPO_EVENT_DONE) {
        return 0;
    }
    s->done = true;
    s->failed = e->stop == BPO_STOP_ERROR || (e->stop == BPO_STOP_INTERRUPTED && e->n_text == 0);
    run->prompt_tokens = e->prompt_tokens;
    run->kept_tokens = e->kept_tokens;
    run->new_tokens += e->new_tokens;
    run->passes += e->passes;
    run->drafted += e->drafted;
    run->accepted += e->accepted;
    run->prefill_s = e->prefill_s;
    run->decode_s = e->decode_s > run->decode_s ? e->decode_s : run->decode_s;
    if (e->stop == BPO_STOP_ERROR) {
        run->error = *e->error;
        return 0;
    }
    if (run->options->json && !(s->json = result_json(e, run->seed, run->open_s))) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for the result");
    }
    return 0;
}

/* ---------------------------------------------------------------- running */

/* what a signal interrupts; set while a session is open */
static struct bpo_session *volatile interruptible;
static volatile sig_atomic_t signalled;

static void on_signal(int number) {
    signalled = number;
    bpo_interrupt(interruptible);
}

/* Ctrl-C ends cleanly with what there is; a second one ends at once. */
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

static int random_seed(uint64_t *seed, struct bpo_error *err) {
    FILE *file = fopen("/dev/urandom", "rb");
    bool fine = file && fread(seed, sizeof *seed, 1, file) == 1;
    if (file) {
        (void)fclose(file);
    }
    *seed &= BPO_MAX_SEED;
    return fine ? 0
                : bpo_fail(err, BPO_ERR_RUN, "give one with --seed N",
                           "cannot read a random seed from /dev/urandom");
}

static void print_stats(const struct run *run, const struct bpo_session *session) {
    struct bpo_session_info info;
    struct rusage usage;
    bpo_session_get_info(session, &info);
    /* a sample's first token comes from the prompt's own pass */
    int32_t n_decoded = run->new_tokens - run->n;
    (void)getrusage(RUSAGE_SELF, &usage);
    (void)fprintf(stderr, "load     %8.3f s\n", run->open_s);
    int32_t n_computed = run->prompt_tokens - run->kept_tokens;
    (void)fprintf(stderr,
                  "prefill  %8.3f s   %6d tokens   %8.1f tokens/s   (and %d kept from earlier)\n",
                  run->prefill_s, n_computed,
                  n_computed / (run->prefill_s > 0 ? run->prefill_s : 1), run->kept_tokens);
    (void)fprintf(stderr, "decode   %8.3f s   %6d tokens   %8.1f tokens/s   (%d sample%s)\n",
                  run->decode_s, n_decoded, n_decoded / (run->decode_s > 0 ? run->decode_s : 1),
                  run->n, run->n == 1 ? "" : "s");
    (void)fprintf(stderr,
                  "lookup   %8.2f tokens per pass and sample: %lld passes, %lld tokens drafted, "
                  "%lld rows wasted\n",
                  (double)n_decoded / (double)(run->passes > 0 ? run->passes : 1),
                  (long long)run->passes, (long long)run->drafted,
                  (long long)(run->drafted - run->accepted));
    if (info.n_threads == 0) { /* a GPU */
        (void)fprintf(stderr, "on       %s %s, %s\n", info.device, info.simd, info.blas);
    } else {
        (void)fprintf(stderr, "on       %s %s, %d thread%s, matmul %s, OpenBLAS %s\n", info.device,
                      info.simd, info.n_threads, info.n_threads == 1 ? "" : "s",
                      info.matmul == BPO_MATMUL_OPENBLAS ? "openblas" : "own", info.blas);
    }
    if (info.blas_hint[0]) {
        (void)fprintf(stderr, "hint     %s\n", info.blas_hint);
    }
#ifdef __APPLE__
    double peak_mib = (double)usage.ru_maxrss / 1048576.0;
#else
    double peak_mib = (double)usage.ru_maxrss / 1024.0;
#endif
    (void)fprintf(stderr,
                  "memory   %.1f MiB peak, model file included; buffers %.1f MiB, KV cache %.1f "
                  "KiB a position\n",
                  peak_mib, (double)info.buffer_bytes / 1048576.0,
                  (double)info.kv_position_bytes / 1024.0);
}

static void request_from_options(struct bpo_request *r, const struct bpo_model *model,
                                 const struct options *o) {
    bpo_request_init(r, model, o->mode == 1 ? BPO_AGGRESSIVE : BPO_STABLE);
    r->n_samples = o->n_samples >= 0 ? (int32_t)o->n_samples : r->n_samples;
    r->temperature = o->temperature >= 0 ? (float)o->temperature : r->temperature;
    r->top_p = o->top_p >= 0 ? (float)o->top_p : r->top_p;
    r->top_k = o->top_k >= 0 ? (int32_t)o->top_k : r->top_k;
    r->max_new_tokens = o->max_new_tokens >= 0 ? (int32_t)o->max_new_tokens : r->max_new_tokens;
}

/* Steps the session until nothing is left, and prints results as they come. */
static int run_request(struct run *run, struct bpo_session *session,
                       const struct bpo_request *request, struct bpo_error *err) {
    int64_t number = bpo_submit(session, request, err);
    if (number < 0) {
        return (int)number;
    }
    if (run->options->seed < 0 && request->temperature > 0 && !run->options->quiet) {
        (void)fprintf(stderr, "bpo: seed %llu\n", (unsigned long long)request->seed);
    }
    for (int more = 1; more > 0;) {
        const struct bpo_event *events;
        size_t n_events;
        more = bpo_step(session, &events, &n_events, err);
        if (more < 0) {
            return more;
        }
        for (size_t i = 0; i < n_events; i++) {
            int failed = take_event(run, &events[i], err);
            if (failed) {
                return failed;
            }
        }
        int failed = print_due(run, err);
        if (failed) {
            return failed;
        }
    }
    if (run->options->stats) {
        print_stats(run, session);
    }
    if (run->error.code) {
        *err = run->error;
    }
    return run->error.code;
}

static int rewrite(struct bpo_session *session, const struct bpo_model *model,
                   const struct options *o, const struct bytes *text, const int32_t *ids,
                   size_t n_ids, double open_s, struct bpo_error *err) {
    struct bpo_request request;
    request_from_options(&request, model, o);
    request.text = text->data;
    request.n_text = text->n;
    request.ids = ids;
    request.n_ids = n_ids;
    request.seed = (uint64_t)(o->seed >= 0 ? o->seed : 0);
    if (o->seed < 0 && request.temperature > 0 && random_seed(&request.seed, err)) {
        return err->code;
    }
    /* A hook for benchmarks, not for --help: the ids that replace the drawn ones; see bpo.h. */
    const char *replay = getenv("BPO_FORCE_TOKENS");
    int32_t *forced = NULL;
    if (replay && parse_ids(&forced, &request.n_forced, replay, "BPO_FORCE_TOKENS", err)) {
        free(forced);
        return err->code;
    }
    request.forced = forced;
    struct run run = {.options = o, .n = request.n_samples, .seed = request.seed, .open_s = open_s};
    run.streaming = isatty(STDOUT_FILENO) && !o->json;
    run.samples = calloc((size_t)run.n, sizeof *run.samples);
    int failed = run.samples
                     ? run_request(&run, session, &request, err)
                     : bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for %d samples", run.n);
    free(forced);
    if (!run.samples) {
        return failed;
    }
    for (int32_t i = 0; i < run.n; i++) {
        free(run.samples[i].text);
        free(run.samples[i].json);
    }
    free(run.samples);
    return failed;
}

/* NumPy's .npy, version 1.0: a header padded to a multiple of 64 bytes, then the numbers. */
static int write_npy(const char *path, const float *data, size_t rows, size_t cols,
                     struct bpo_error *err) {
    /* its two zero bytes, of the version and of the header's length, follow */
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
    return fine ? 0
                : bpo_fail(err, BPO_ERR_RUN,
                           "is the folder there and writable, and the disk not full?",
                           "cannot write %s: %s", path, strerror(why));
}

static int dump_logits(struct bpo_session *session, const struct bpo_model *model,
                       const struct options *o, const struct bytes *text, const int32_t *ids,
                       size_t n_ids, struct bpo_error *err) {
    struct bpo_model_info info;
    int32_t *own = NULL;
    int failed = 0;
    bpo_model_get_info(model, &info);
    if (!ids) {
        failed = bpo_tokenize(model, text->data, text->n, true, &own, &n_ids, err);
        ids = own;
    }
    float *logits = failed ? NULL : calloc(n_ids, (size_t)info.vocab_size * sizeof *logits);
    if (!failed && !logits) {
        failed = bpo_fail(err, BPO_ERR_RESOURCE, "give a shorter input",
                          "out of memory for the logits of %zu rows", n_ids);
    }
    failed = failed ? failed : bpo_logits(session, ids, n_ids, logits, err);
    failed =
        failed ? failed : write_npy(o->dump_logits, logits, n_ids, (size_t)info.vocab_size, err);
    free(logits);
    free(own);
    return failed;
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

/* On a terminal: how much of the weights a GPU has; nothing when they are few. */
static void load_progress(void *user, uint64_t done, uint64_t total) {
    (void)user;
    if (total >= (uint64_t)256 << 20) {
        (void)fprintf(stderr, "\rloading %3u %%%s", (unsigned)(done * 100 / total),
                      done < total ? "" : "\r           \r");
    }
}

/* "I/N" */
static int parse_shard(const char *text, int64_t *shard, int64_t *n_shards, struct bpo_error *err) {
    char *end = NULL;
    errno = 0;
    *shard = 0;
    *n_shards = 1;
    if (!text) {
        return 0;
    }
    *shard = strtoll(text, &end, 10);
    *n_shards = end != text && *end == '/' ? strtoll(end + 1, &end, 10) : 0;
    if (*end != '\0' || errno != 0 || *n_shards < 1 || *shard < 0 || *shard >= *n_shards) {
        return bpo_fail(err, BPO_ERR_USAGE, "the shards of four are 0/4, 1/4, 2/4, 3/4",
                        "--shard is \"%s\"; expected I/N with I from 0 to N - 1", text);
    }
    return 0;
}

static void session_from_options(struct bpo_session_options *options, const struct options *o) {
    bpo_session_options_init(options);
    options->device = (enum bpo_device)o->device;
    options->matmul = (enum bpo_matmul)o->matmul;
    options->n_threads = (int32_t)o->n_threads;
    options->n_positions = (int32_t)o->context;
    options->lookup = (int32_t)o->lookup;
    options->no_cache = o->no_cache;
    options->progress = isatty(STDERR_FILENO) && !o->quiet ? load_progress : NULL;
}

/* A data set: files first, so that what is wrong with them is known at once. */
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
    request_from_options(&d.request, model, o);
    d.request.seed = (uint64_t)(o->seed >= 0 ? o->seed : 0);
    int failed = parse_shard(o->shard, &d.shard, &d.n_shards, err);
    if (!failed && o->seed < 0 && d.request.temperature > 0) {
        failed = random_seed(&d.request.seed, err);
    }
    struct dataset *dataset = failed ? NULL : dataset_open(&d, err);
    if (!dataset) {
        return err->code;
    }
    session_from_options(&options, o);
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

/* What needs a session: rewriting, and logits. */
static int with_session(const struct bpo_model *model, const struct options *o,
                        const struct bytes *text, double begun, struct bpo_error *err) {
    int32_t *ids = NULL;
    size_t n_ids = 0;
    struct bpo_request request;
    struct bpo_session_options options;
    int failed = o->tokens ? parse_ids(&ids, &n_ids, o->tokens, "--tokens", err) : 0;
    request_from_options(&request, model, o);
    session_from_options(&options, o);
    int32_t most = o->parallel > 0 ? (int32_t)o->parallel : 32;
    options.n_slots = request.n_samples < most ? request.n_samples : most;
    struct bpo_session *session = failed ? NULL : bpo_session_open(model, &options, err);
    failed = failed || session ? failed : err->code;
    if (session) {
        double open_s = seconds_now() - begun;
        catch_signals(session);
        failed = o->dump_logits ? dump_logits(session, model, o, text, ids, n_ids, err)
                                : rewrite(session, model, o, text, ids, n_ids, open_s, err);
        release_signals();
        bpo_session_close(session);
    }
    free(ids);
    return failed;
}

static int with_model(const struct options *o, const char *argv0, struct bpo_error *err) {
    char place[PATH_MAX];
    double begun = seconds_now();
    const char *path = find_model(place, o, argv0, err);
    struct bytes text = {0};
    bool wants_text = !o->info && !o->verify && !o->tokens && !o->input;
    int failed = path ? 0 : err->code;
    if (!failed && wants_text) {
        failed = read_prompt(&text, o, err);
        begun = seconds_now(); /* typing is not loading */
    }
    struct bpo_model *model = failed ? NULL : bpo_model_open(path, err);
    failed = failed || model ? failed : err->code;
    if (!failed && o->verify) {
        failed = bpo_model_verify(
            model, isatty(STDERR_FILENO) && !o->quiet ? verify_progress : NULL, NULL, err);
        if (!failed) {
            (void)printf("%s: every hash matches\n", path);
        }
    } else if (!failed && o->info) {
        print_info(model, path);
    } else if (!failed && o->input) {
        failed = run_dataset(model, o, err);
    } else if (!failed && o->tokenize) {
        failed = tokenize(model, o, &text, err);
    } else if (!failed) {
        failed = with_session(model, o, &text, begun, err);
    }
    bpo_model_close(model);
    free(text.data);
    return failed;
}

int main(int argc, char **argv) {
    struct options options;
    struct bpo_error err = {0};
    /* a closed stdin, stdout or stderr must not become the model's file descriptor */
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) {
            return -BPO_ERR_RUN;
        }
    }
    (void)signal(SIGPIPE, SIG_IGN); /* a closed pipe is an error message, not a death */
    (void)signal(SIGXFSZ, SIG_IGN); /* and so is a file that reaches its limit */
    int failed = parse_options(&options, argc, argv, &err);
    if (!failed && options.help) {
        print_help();
    } else if (!failed && options.version) {
        failed = print_version(&err);
    } else if (!failed) {
        failed = with_model(&options, argv[0], &err);
    }
    if (failed) {
        return report(&err);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) {
        (void)bpo_fail(&err, BPO_ERR_RUN, "is the disk full, or was the pipe closed?",
                       "cannot write to standard output: %s", strerror(errno));
        return report(&err);
    }
    return signalled ? 128 + signalled : 0;
}

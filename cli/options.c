/*
 * options.c - see options.h.
 */
#include "cli/options.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

static const char *const MODES[] = {"stable", "aggressive", NULL};
static const char *const DEVICES[] = {"auto", "cpu", "cuda", NULL};
static const char *const MATMULS[] = {"auto", "own", "openblas", NULL};

enum setting_kind { FLAG, TEXT, INTEGER, NUMBER, CHOICE };

/* One option: its names, its line of --help, what it takes and where that goes. */
struct setting {
    char letter; /* 0: none */
    const char *name;
    const char *value, *help; /* value: NULL for a FLAG */
    enum setting_kind kind;
    size_t offset;            /* in struct options */
    double min, max;          /* of an INTEGER or a NUMBER */
    const char *const *words; /* of a CHOICE */
};

#define AT(field) offsetof(struct options, field)
#define FLAG_AT(field) FLAG, AT(field), 0, 0, NULL
#define TEXT_AT(field) TEXT, AT(field), 0, 0, NULL
#define INTEGER_AT(field, min, max) INTEGER, AT(field), min, max, NULL
#define NUMBER_AT(field, min, max) NUMBER, AT(field), min, max, NULL
#define CHOICE_AT(field, words) CHOICE, AT(field), 0, 0, words

static const struct setting SETTINGS[] = {
    {'m', "model", "FILE", "the model (default: $BPO_MODEL, ./bpo.bin, the bundled demo model)",
     TEXT_AT(model)},
    {'p', "prompt", "TEXT", "the prompt, exactly as given; - reads standard input",
     TEXT_AT(prompt)},
    {'f', "file", "FILE", "read the prompt from a file, all of it", TEXT_AT(file)},
    {'i', "input", "FILE", "a data set: one JSON object per line; - reads standard input",
     TEXT_AT(input)},
    {'o', "output", "FILE", "the same lines with their rewrites (default: standard output)",
     TEXT_AT(output)},
    {0, "field", "NAME", "the member that holds the prompt (default: prompt)", TEXT_AT(field)},
    {0, "output-field", "NAME", "the member that gets the rewrite (default: optimized_prompt)",
     TEXT_AT(output_field)},
    {0, "resume", NULL, "continue where the output ends", FLAG_AT(resume)},
    {0, "shard", "I/N", "only the lines whose number mod N is I", TEXT_AT(shard)},
    {0, "numbered", NULL, "each line is its number, a tab and the object: a piece of a data set",
     FLAG_AT(numbered)},
    {0, "allow-errors", NULL, "exit with 0 even if some records failed", FLAG_AT(allow_errors)},
    {0, "demo", NULL, "use the bundled demo model (a toy), for a data set too", FLAG_AT(demo)},
    {0, "mode", "MODE", "stable (default): one careful rewrite; aggressive: several freer ones",
     CHOICE_AT(mode, MODES)},
    {'n', "samples", "N", "rewrites of the prompt (default: stable 1, aggressive 5)",
     INTEGER_AT(n_samples, 1, 10000)},
    {0, "temperature", "X", "0 is greedy (default: stable 0.6, aggressive 0.9)",
     NUMBER_AT(temperature, 0, 100)},
    {0, "top-p", "X", "1 is off (default: 0.9)", NUMBER_AT(top_p, 0, 1)},
    {0, "top-k", "N", "0 is off (default: 50)", INTEGER_AT(top_k, 0, INT32_MAX)},
    {0, "max-new-tokens", "N", "the length limit of a rewrite (default: 1024)",
     INTEGER_AT(max_new_tokens, 1, 1 << 30)},
    {0, "greedy", NULL, "always take the likeliest token, as with --temperature 0",
     FLAG_AT(greedy)},
    {0, "seed", "N", "same seed, same text (default: random, reported on stderr)",
     INTEGER_AT(seed, 0, (double)BPO_MAX_SEED)},
    {'t', "threads", "N", "default: the physical cores that the process may use",
     INTEGER_AT(n_threads, 1, 1024)},
    {0, "device", "D", "auto, cpu or cuda", CHOICE_AT(device, DEVICES)},
    {0, "matmul", "M", "auto, own or openblas: what multiplies prompt rows on the CPU",
     CHOICE_AT(matmul, MATMULS)},
    {0, "parallel", "N", "sequences decoded together (default: depends on cores and memory)",
     INTEGER_AT(parallel, 1, 4096)},
    {0, "context", "N", "positions per sequence (default and maximum: the model's)",
     INTEGER_AT(context, 2, 1 << 30)},
    {0, "lookup", "N", "tokens drafted per step, 0 is off; same text (default: adaptive)",
     INTEGER_AT(lookup, 0, 15)},
    {0, "no-cache", NULL, "do not keep the template's prefix in the user's cache folder",
     FLAG_AT(no_cache)},
    {0, "json", NULL, "print each result as a JSON object on one line", FLAG_AT(json)},
    {0, "stats", NULL, "print timings on stderr", FLAG_AT(stats)},
    {'q', "quiet", NULL, "only errors and the notice about the demo model on stderr",
     FLAG_AT(quiet)},
    {0, "info", NULL, "describe the model file", FLAG_AT(info)},
    {0, "verify", NULL, "check every hash of the model file", FLAG_AT(verify)},
    {0, "tokenize", NULL, "print the ids of the prompt in its template as a JSON list",
     FLAG_AT(tokenize)},
    {0, "raw", NULL, "with --tokenize: the ids of the bare text, without BOS", FLAG_AT(raw)},
    {0, "tokens", "IDS", "\"1,518,...\": these ids are the whole input, without the template",
     TEXT_AT(tokens)},
    {0, "dump-logits", "F.npy", "write the logits [rows, vocabulary] of all input rows, then exit",
     TEXT_AT(dump_logits)},
    {'h', "help", NULL, "print this text", FLAG_AT(help)},
    {'V', "version", NULL, "print the version, the SIMD level and OpenBLAS's version",
     FLAG_AT(version)},
};
enum { N_SETTINGS = sizeof SETTINGS / sizeof SETTINGS[0] };

static const char *const SEE_HELP = "bpo --help lists the options";

/* ---------------------------------------------------------------- help */

void options_print_help(void) {
    (void)puts("bpo rewrites a prompt into one that gets a more helpful answer from any LLM.\n"
               "\n"
               "usage: bpo [-m MODEL] -p TEXT     one prompt; '-p -' or a pipe reads it from "
               "standard input\n"
               "       bpo [-m MODEL] -f FILE     the whole file is one prompt\n"
               "       bpo -m MODEL -i IN.jsonl -o OUT.jsonl     a data set\n");
    for (size_t i = 0; i < N_SETTINGS; i++) {
        const struct setting *s = &SETTINGS[i];
        char letter[] = {s->letter ? '-' : ' ', s->letter ? s->letter : ' ', s->letter ? ',' : ' ',
                         '\0'};
        char names[40];
        (void)snprintf(names, sizeof names, "%s --%s %s", letter, s->name,
                       s->value ? s->value : "");
        (void)printf("  %-25s %s\n", names, s->help);
    }
}

/* ---------------------------------------------------------------- parsing */

/* Parses the whole text as an integer or a number within [min, max]. */
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
    if (end == text || *end != '\0' || errno != 0 || !(*number >= s->min && *number <= s->max)) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP,
                        "--%s is \"%s\"; expected %s from %.16g to %.16g", s->name, text,
                        s->kind == INTEGER ? "an integer" : "a number", s->min, s->max);
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
    int choice = 0, failed = 0;
    switch (s->kind) {
    case FLAG:
        memcpy(field, &(bool){true}, sizeof(bool));
        break;
    case TEXT:
        memcpy(field, &text, sizeof text);
        break;
    case INTEGER:
        failed = parse_value(s, text, &integer, &number, err);
        memcpy(field, &integer, sizeof integer);
        break;
    case NUMBER:
        failed = parse_value(s, text, &integer, &number, err);
        memcpy(field, &number, sizeof number);
        break;
    case CHOICE:
        failed = parse_choice(&choice, s, text, err);
        memcpy(field, &choice, sizeof choice);
        break;
    }
    return failed;
}

/* Refuses options that need a data set, or that a data set excludes. */
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
                        "--dump-logits, --json and --stats");
    }
    return 0;
}

/* Refuses options that exclude each other, and words that belong to no option. */
static int check_options(struct options *o, int argc, char **argv, struct bpo_error *err) {
    if (optind < argc) {
        return bpo_fail(err, BPO_ERR_USAGE, "quote the whole prompt: -p \"...\"",
                        "\"%s\" belongs to no option", argv[optind]);
    }
    if ((o->prompt != NULL) + (o->file != NULL) + (o->tokens != NULL) > 1) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP, "-p, -f and --tokens exclude each other");
    }
    if (o->tokenize && o->tokens) {
        return bpo_fail(err, BPO_ERR_USAGE, SEE_HELP, "--tokenize needs text, not --tokens");
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

/* Fills what getopt_long needs: letters [2 * N_SETTINGS + 2] and names [N_SETTINGS + 1]; a name's
 * code is 1000 + its index in SETTINGS. */
static void getopt_tables(char *letters, struct option *names) {
    /* A colon in front makes getopt report a missing value and an unknown option differently. */
    size_t n_letters = 0;
    letters[n_letters++] = ':';
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
    names[N_SETTINGS] = (struct option){NULL, 0, NULL, 0};
}

int options_parse(struct options *o, int argc, char **argv, struct bpo_error *err) {
    struct option names[N_SETTINGS + 1];
    char letters[2 * N_SETTINGS + 2];
    getopt_tables(letters, names);
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

int parse_ids(int32_t **ids, size_t *n_ids, const char *text, const char *what,
              struct bpo_error *err) {
    size_t capacity = strlen(text) / 2 + 1;
    const char *hint = "give integers between commas: \"1,518,25580\"";
    *n_ids = 0;
    *ids = malloc(capacity * sizeof **ids);
    if (!*ids) {
        return out_of_memory(err, what, capacity * sizeof **ids);
    }
    const char *at = text + strspn(text, " [");
    while (*at != '\0' && *at != ']') {
        char *end;
        long long id = strtoll(at, &end, 10);
        if (end == at || id < 0 || id > INT32_MAX || *n_ids == capacity) {
            return bpo_fail(err, BPO_ERR_USAGE, hint, "%s has no id at \"%.20s\"", what, at);
        }
        (*ids)[(*n_ids)++] = (int32_t)id;
        at = end + strspn(end, " ");
        if (*at == ',') {
            at += 1 + strspn(at + 1, " ");
            if (*at != '\0' && *at != ']') {
                continue;
            }
            at--; /* nothing after the comma: the comma is the error */
        }
        if (*at != '\0' && *at != ']') {
            return bpo_fail(err, BPO_ERR_USAGE, hint, "%s has no id at \"%.20s\"", what, at);
        }
    }
    at += strspn(at, "] ");
    if (*n_ids == 0 || *at != '\0') {
        return bpo_fail(err, BPO_ERR_USAGE, hint, "%s is empty, or has text after its ids", what);
    }
    return 0;
}

int parse_shard(const char *text, int64_t *shard, int64_t *n_shards, struct bpo_error *err) {
    char *end = NULL;
    *shard = 0;
    *n_shards = 1;
    if (!text) {
        return 0;
    }
    errno = 0;
    *shard = strtoll(text, &end, 10);
    *n_shards = end != text && *end == '/' ? strtoll(end + 1, &end, 10) : 0;
    if (*end != '\0' || errno != 0 || *n_shards < 1 || *shard < 0 || *shard >= *n_shards) {
        return bpo_fail(err, BPO_ERR_USAGE, "the shards of four are 0/4, 1/4, 2/4, 3/4",
                        "--shard is \"%s\"; expected I/N with I from 0 to N - 1", text);
    }
    return 0;
}

/* ---------------------------------------------------------------- what they mean to the library */

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

int options_request(struct bpo_request *request, const struct options *o,
                    const struct bpo_model *model, struct bpo_error *err) {
    struct bpo_request *r = request;
    bpo_request_init(r, model, (enum bpo_mode)o->mode);
    r->n_samples = o->n_samples >= 0 ? (int32_t)o->n_samples : r->n_samples;
    r->temperature = o->temperature >= 0 ? (float)o->temperature : r->temperature;
    r->top_p = o->top_p >= 0 ? (float)o->top_p : r->top_p;
    r->top_k = o->top_k >= 0 ? (int32_t)o->top_k : r->top_k;
    r->max_new_tokens = o->max_new_tokens >= 0 ? (int32_t)o->max_new_tokens : r->max_new_tokens;
    if (o->seed >= 0) {
        r->seed = (uint64_t)o->seed;
        return 0;
    }
    return r->temperature > 0 ? random_seed(&r->seed, err) : 0;
}

void options_session(struct bpo_session_options *session, const struct options *o) {
    bpo_session_options_init(session);
    session->device = (enum bpo_device)o->device;
    session->matmul = (enum bpo_matmul)o->matmul;
    session->n_threads = (int32_t)o->n_threads;
    session->n_positions = (int32_t)o->context;
    session->lookup = (int32_t)o->lookup;
    session->no_cache = o->no_cache;
}

/*
 * dataset.c - see dataset.h. Read it from top to bottom:
 *
 *     lines       whole lines from a file or a pipe, without waiting while there is other work
 *     records     a line's prompt, name and seed; the same bytes with the rewrite spliced in
 *     output      records are appended whole, or not at all
 *     progress    what a person sees meanwhile
 *     window      records between input and output: waiting, in work, done and waiting for those before them
 *     resume      what the output holds already, checked against the input
 *     running     the loop over bpo_step
 *
 * The rule that everything here serves: the output is a function of (input, model, options, seed).
 * How often the run was killed, how many sequences were decoded together and on how many machines
 * leaves no trace in it.
 */
#include "cli/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/clock.h"
#include "base/memory.h"
#include "base/text.h"
#include "base/threads.h"

enum {
    READ_BYTES = 1 << 16,  /* asked of the system at once */
    WINDOW_RECORDS = 1024, /* between input and output, at least; more with many sequences */
    /* one text of 1,024 tokens must not starve slots whose texts have 30 */
    WINDOW_PER_SLOT = 64,
    WINDOW_BYTES = 256 << 20, /* of lines in the window; one may be longer */
    SYNC_SECONDS = 5,         /* between two fsyncs of the output */
    BAR_WIDTH = 24,
};

/* ---------------------------------------------------------------- types */

/* n bytes without the line's end, in the reader's buffer: valid until it reads on. whole: the end
 * was there. */
struct line {
    const char *text;
    size_t n;
    bool whole;
};

struct reader {
    int fd;
    const char *name;
    /* [capacity] bytes that were read; [begin, end) not yet handed out, [begin, scanned) without a
     * LF */
    char *data;
    size_t begin, scanned, end, capacity;
    uint64_t offset; /* of data[begin] in the file */
    bool at_end;
};

/* What reading gives; or a negative error code. */
enum { GOT_END, GOT_LINE, GOT_NOTHING };

/* One sample of a record. */
struct rewrite {
    char *text;
    size_t n_text;
    int32_t new_tokens;
    enum bpo_stop stop;
    bool unchanged;
};

/* A line of the input on its way to the output. */
struct record {
    char *line;
    size_t n_line;
    uint64_t number;    /* of the line, from 1 */
    uint64_t input_end; /* where the input goes on behind it */
    char *prompt;
    size_t n_prompt;
    uint64_t seed;
    int32_t *forced; /* [n_forced] ids that replace the drawn ones */
    size_t n_forced;
    struct rewrite *rewrites; /* [n_samples] */
    int32_t n_done, prompt_tokens;
    struct bpo_error error; /* code not 0: it failed */
    struct text out;        /* the output line, once complete */
    bool submitted, complete;
    struct record *next;
};

struct output {
    int fd;
    const char *name;
    bool regular, created;
    uint64_t n_bytes; /* of whole records: the file's length, as long as all goes well */
};

struct progress {
    bool terminal;
    double begun, shown, synced;
    /* input: in all (0: unknown), where this run began, written so far */
    uint64_t input_bytes, first_offset, offset;
    uint64_t n_resumed, n_written, n_failed, n_tokens, n_warned;
};

struct dataset {
    struct dataset_options o;
    struct bpo_session *session;
    struct reader input;
    struct line held;     /* a line behind n_blank blank ones; text NULL: none */
    uint64_t n_blank;     /* blank lines that are errors if something follows, and nothing if not */
    uint64_t line_number; /* of the last line that next_line gave or passed over */
    bool input_done;
    struct output output;
    uint64_t run_seed;
    char run[17]; /* hash of model, options and run seed */
    struct record *first, **end, *to_submit;
    size_t n_window, most_window, window_bytes;
    int32_t n_in_work, most_in_work;
    int32_t n_short; /* with so many in work there was no memory for the next */
    struct progress progress;
    char first_failure[800], first_hint[512], first_warning[256];
};

static int no_memory_for(struct bpo_error *err, const char *what) {
    return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory for %s", what);
}

/* ---------------------------------------------------------------- lines */

/* Makes room for the next read: bytes that were handed out go first. */
static int reader_room(struct reader *r, struct bpo_error *err) {
    if (r->begin > 0) {
        memmove(r->data, r->data + r->begin, r->end - r->begin);
        r->scanned -= r->begin;
        r->end -= r->begin;
        r->begin = 0;
    }
    if (r->capacity - r->end >= READ_BYTES) {
        return 0;
    }
    size_t capacity = 2 * r->capacity + READ_BYTES;
    char *grown = realloc(r->data, capacity);
    if (!grown) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                        "out of memory: a line of %s has more than %zu bytes", r->name, r->end);
    }
    r->data = grown;
    r->capacity = capacity;
    return 0;
}

/* Reads once. wait: until there is something, or a signal; else only what is there. */
static int reader_read(struct reader *r, bool wait, const volatile sig_atomic_t *signalled,
                       struct bpo_error *err) {
    struct pollfd ready = {.fd = r->fd, .events = POLLIN};
    for (;;) {
        /* A second: a signal that arrives just before poll would else be noticed with the next line
         * only. */
        int n = poll(&ready, 1, wait ? 1000 : 0);
        if (*signalled || (n == 0 && !wait)) {
            return GOT_NOTHING;
        }
        if (n > 0) {
            break;
        }
    }
    int failed = reader_room(r, err);
    if (failed) {
        return failed;
    }
    ssize_t n = read(r->fd, r->data + r->end, READ_BYTES);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        return GOT_NOTHING;
    }
    if (n < 0) {
        return bpo_fail(err, BPO_ERR_INPUT, "is it a readable file?", "cannot read %s: %s", r->name,
                        strerror(errno));
    }
    r->end += (size_t)n;
    r->at_end = n == 0;
    return GOT_LINE;
}

/* The next line; GOT_NOTHING only if it would have to be waited for, or after a signal. */
static int reader_line(struct reader *r, bool wait, const volatile sig_atomic_t *signalled,
                       struct line *line, struct bpo_error *err) {
    for (;;) {
        const char *end = NULL;
        if (r->data && r->scanned < r->end) {
            end = memchr(r->data + r->scanned, '\n', r->end - r->scanned);
        }
        r->scanned = r->end;
        if (r->data && (end || (r->at_end && r->end > r->begin))) {
            size_t n = end ? (size_t)(end - r->data) - r->begin : r->end - r->begin;
            *line = (struct line){.text = r->data + r->begin, .n = n, .whole = end != NULL};
            n += line->whole;
            r->begin += n;
            r->offset += n;
            r->scanned = r->begin;
            return GOT_LINE;
        }
        if (r->at_end) {
            return GOT_END;
        }
        int got = reader_read(r, wait, signalled, err);
        if (got < 0 || (got == GOT_NOTHING && (!wait || *signalled))) {
            return got;
        }
    }
}

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\r';
}

static bool is_blank(const struct line *line) {
    size_t n = 0;
    while (n < line->n && is_space(line->text[n])) {
        n++;
    }
    return n == line->n;
}

/* Takes the number and the tab from the beginning of a numbered line, for line_number. */
static int take_number(struct dataset *d, struct line *line, struct bpo_error *err) {
    uint64_t number = 0;
    size_t n = 0;
    for (; n < line->n && n < 18 && line->text[n] >= '0' && line->text[n] <= '9'; n++) {
        number = 10 * number + (uint64_t)(line->text[n] - '0');
    }
    if (n == line->n || line->text[n] != '\t' || number == 0) {
        return bpo_fail(err, BPO_ERR_INPUT,
                        "with --numbered each line is its number, a tab, and the object",
                        "the line after line %" PRIu64 " has no number", d->line_number);
    }
    d->line_number = number - 1;
    line->text += n + 1;
    line->n -= n + 1;
    return 0;
}

/* The next line of this shard; line_number is then its number. A byte order mark is not part of the
 * first line. Blank lines at the end of the input do not count; elsewhere they are lines like
 * others. */
static int next_line(struct dataset *d, bool wait, struct line *line, struct bpo_error *err) {
    for (;;) {
        if (!d->held.text) {
            bool at_start = d->input.offset == 0;
            int got = reader_line(&d->input, wait, d->o.signalled, &d->held, err);
            if (got != GOT_LINE) {
                return got;
            }
            if (at_start && d->held.n >= 3 && memcmp(d->held.text, "\xEF\xBB\xBF", 3) == 0) {
                d->held.text += 3;
                d->held.n -= 3;
            }
            if (d->o.numbered) {
                int failed = take_number(d, &d->held, err);
                if (failed) {
                    return failed;
                }
            } else if (is_blank(&d->held)) {
                d->n_blank++;
                d->held.text = NULL;
                continue;
            }
        }
        if (d->n_blank > 0) {
            d->n_blank--;
            *line = (struct line){.text = "", .whole = true};
        } else {
            *line = d->held;
            d->held.text = NULL;
        }
        d->line_number++;
        if ((int64_t)(d->line_number % (uint64_t)d->o.n_shards) == d->o.shard) {
            return GOT_LINE;
        }
    }
}

/* ---------------------------------------------------------------- records: reading */

/* When memory is short, jansson blames the text ("string expected"). A line must not be called bad
 * for that. */
static bool json_starved;

static void *json_malloc(size_t n) {
    void *data = malloc(n);
    json_starved = json_starved || !data;
    return data;
}

/*
 * The numbers in a line are none of our business, but jansson gives up on those that fit no 64-bit
 * integer or no double. This parses a copy without the digits that make them too large, which is as
 * valid, or as invalid, as the line.
 */
static json_t *parse_large_numbers(const char *line, size_t n, json_error_t *why) {
    char *copy = malloc(n);
    size_t n_copy = 0, n_digits = 0, most_digits = 15;
    bool in_string = false;
    for (size_t i = 0; copy && i < n; i++) {
        char c = line[i];
        if (!in_string && c >= '0' && c <= '9') {
            if (++n_digits > most_digits) {
                continue;
            }
        } else {
            most_digits =
                c == 'e' || c == 'E' || (most_digits == 2 && (c == '+' || c == '-')) ? 2 : 15;
            n_digits = 0;
            in_string = in_string != (c == '"');
        }
        copy[n_copy++] = c;
        if (in_string && c == '\\' && i + 1 < n) {
            copy[n_copy++] = line[++i];
        }
    }
    json_t *value = copy ? json_loadb(copy, n_copy, JSON_ALLOW_NUL, why) : NULL;
    json_starved = json_starved || !copy;
    free(copy);
    return value;
}

/* A line as JSON, or NULL with the reason: BPO_ERR_INPUT, or BPO_ERR_RESOURCE, which is no fault of
 * the line. */
static json_t *parse_line(const char *line, size_t n, struct bpo_error *err) {
    const char *hint = "each line of a data set is one JSON object";
    json_error_t why = {.text = ""};
    json_starved = false;
    json_t *value = json_loadb(line, n, JSON_ALLOW_NUL, &why);
    if (!value && json_error_code(&why) == json_error_numeric_overflow) {
        value = parse_large_numbers(line, n, &why);
    }
    if (json_is_object(value)) {
        return value;
    }
    if (value) {
        (void)bpo_fail(err, BPO_ERR_INPUT, hint, "not a JSON object, but a list");
    } else if (json_starved) {
        (void)no_memory_for(err, "a line's JSON");
    } else if (n == 0) {
        (void)bpo_fail(err, BPO_ERR_INPUT, hint, "not a JSON object: the line is blank");
    } else {
        (void)bpo_fail(err, BPO_ERR_INPUT, hint, "not a JSON object: %s", why.text);
    }
    json_decref(value);
    return NULL;
}

/* In valid JSON: behind the string, behind white space, behind the value that begins at i. */
static size_t string_end(const char *s, size_t i) {
    for (i++; s[i] != '"'; i++) {
        i += s[i] == '\\';
    }
    return i + 1;
}

static size_t space_end(const char *s, size_t i) {
    while (is_space(s[i])) {
        i++;
    }
    return i;
}

static size_t value_end(const char *s, size_t i) {
    size_t depth = 0;
    if (s[i] != '"' && s[i] != '{' && s[i] != '[') { /* a number, true, false, null */
        while (!strchr(",}] \t\r", s[i])) {
            i++;
        }
        return i;
    }
    do {
        if (s[i] == '"') {
            i = string_end(s, i);
        } else {
            depth += s[i] == '{' || s[i] == '[';
            depth -= s[i] == '}' || s[i] == ']';
            i++;
        }
    } while (depth > 0);
    return i;
}

/* Whether a key, as written with its quotes, is this name. */
static bool is_key(const char *key, size_t n, const char *name) {
    if (!memchr(key, '\\', n)) {
        return n == strlen(name) + 2 && memcmp(key + 1, name, n - 2) == 0;
    }
    json_t *decoded = json_loadb(key, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    bool same = json_string_length(decoded) == strlen(name) &&
                strcmp(json_string_value(decoded), name) == 0;
    json_decref(decoded);
    return same;
}

/* The value of a member as it is written in a line that is known to be a JSON object; the last one,
 * as in jansson. */
static bool member_as_written(const char *s, const char *name, const char **value,
                              size_t *n_value) {
    bool found = false;
    for (size_t i = space_end(s, space_end(s, 0) + 1); s[i] != '}';) {
        size_t key = i, key_end = string_end(s, i);
        size_t begin = space_end(s, space_end(s, key_end) + 1), end = value_end(s, begin);
        if (is_key(s + key, key_end - key, name)) {
            *value = s + begin;
            *n_value = end - begin;
            found = true;
        }
        i = space_end(s, end);
        i = s[i] == ',' ? space_end(s, i + 1) : i;
    }
    return found;
}

/*
 * A record's seed is a function of the run's seed and of its name: `id`, a string's characters or
 * any other value as it is written, else (also if it is null) the number of its line. So the texts
 * do not change when lines are added, left out or put in another order; and records of the same
 * name draw the same random numbers.
 */
static uint64_t record_seed(uint64_t run_seed, const char *name, size_t n) {
    return XXH3_64bits_withSeed(name, n, run_seed) & BPO_MAX_SEED;
}

/* Refuses a line that has what the output is to add, as an output of ours has. */
static int record_is_new(const struct dataset *d, const json_t *object, struct bpo_error *err) {
    if (json_object_get(object, d->o.output_field)) {
        return bpo_fail(err, BPO_ERR_INPUT, "--output-field gives the rewrite another name",
                        "the line has a member \"%s\" already", d->o.output_field);
    }
    if (json_object_get(object, "bpo")) {
        return bpo_fail(err, BPO_ERR_INPUT, "take it out, for instance with jq -c 'del(.bpo)'",
                        "the line has a member \"bpo\" already");
    }
    return 0;
}

/* A hook for benchmarks, not for --help: BPO_FORCE_FIELD names the member that lists the ids which
 * replace the drawn ones; see bpo.h. */
static int record_force(struct record *r, const json_t *object, struct bpo_error *err) {
    const char *field = getenv("BPO_FORCE_FIELD");
    const json_t *ids = field ? json_object_get(object, field) : NULL;
    if (!ids) {
        return 0;
    }
    r->n_forced = json_array_size(ids);
    if (!(r->forced = malloc((r->n_forced + 1) * sizeof *r->forced))) {
        return no_memory_for(err, "a record's ids");
    }
    for (size_t i = 0; i < r->n_forced; i++) {
        r->forced[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    }
    return 0;
}

/* The prompt and the seed of a line. */
static int record_parse(struct dataset *d, struct record *r, const json_t *object,
                        struct bpo_error *err) {
    const json_t *prompt = json_object_get(object, d->o.field), *id = json_object_get(object, "id");
    if (!json_is_string(prompt)) {
        return bpo_fail(err, BPO_ERR_INPUT, "--field names the member that holds the prompt",
                        prompt ? "the member \"%s\" is not a string" : "there is no member \"%s\"",
                        d->o.field);
    }
    r->n_prompt = json_string_length(prompt);
    if (!(r->prompt = malloc(r->n_prompt + 1))) {
        return no_memory_for(err, "a prompt");
    }
    memcpy(r->prompt, json_string_value(prompt), r->n_prompt + 1);
    char number[24];
    const char *name = number;
    size_t n_name = (size_t)snprintf(number, sizeof number, "%" PRIu64, r->number);
    if (json_is_string(id)) {
        name = json_string_value(id);
        n_name = json_string_length(id);
    } else if (id && !json_is_null(id)) {
        (void)member_as_written(r->line, "id", &name, &n_name);
    }
    r->seed = record_seed(d->run_seed, name, n_name);
    return json_starved ? no_memory_for(err, "a record") : record_force(r, object, err);
}

/* ---------------------------------------------------------------- records: writing */

static uint64_t line_hash(const char *line, size_t n) {
    return XXH3_64bits(line, n);
}

static int append_bytes(const char *bytes, size_t n, void *text) {
    return text_append(text, bytes, n, NULL);
}

static json_t *json_text(const char *text, size_t n) {
    /* an error's message may have been cut */
    return json_stringn(text, utf8_valid_prefix(text, n));
}

/* The members that a record gets: the rewrite under its name, and "bpo". Lists when several samples
 * were asked for. */
static json_t *record_members(const struct dataset *d, const struct record *r) {
    int32_t n = d->o.request.n_samples;
    json_t *lists[] = {json_array(), json_array(), json_array(), json_array()}, *values[4];
    int failed = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct rewrite *w = &r->rewrites[i];
        failed |= json_array_append_new(lists[0], json_stringn(w->text, w->n_text));
        failed |= json_array_append_new(lists[1], json_integer(w->new_tokens));
        failed |= json_array_append_new(lists[2], json_string(bpo_stop_name(w->stop)));
        failed |= json_array_append_new(lists[3], json_boolean(w->unchanged));
    }
    for (size_t i = 0; i < 4; i++) {
        json_t *one = n == 1 ? json_array_get(lists[i], 0) : lists[i];
        values[i] = failed ? NULL : json_incref(one); /* json_pack gives up on a NULL */
        json_decref(lists[i]);
    }
    return json_pack("{s:o, s:{s:I, s:i, s:o, s:o, s:o, s:s, s:I}}", d->o.output_field, values[0],
                     "bpo", "seed", (json_int_t)r->seed, "prompt_tokens", r->prompt_tokens,
                     "new_tokens", values[1], "stop", values[2], "unchanged", values[3], "run",
                     d->run, "run_seed", (json_int_t)d->run_seed);
}

/* The line's own bytes with the new members before its closing brace. */
static int record_splice(const struct dataset *d, struct record *r, struct bpo_error *err) {
    size_t brace = r->n_line;
    while (r->line[--brace] != '}') {
    }
    json_t *members = record_members(d, r);
    struct text *out = &r->out;
    int failed = text_append(out, r->line, brace, err);
    failed = failed ? failed : text_append(out, ", ", 2, err);
    size_t at = out->n;
    failed = failed || (members && json_dump_callback(members, append_bytes, out, 0) == 0)
                 ? failed
                 : no_memory_for(err, "a record");
    json_decref(members);
    if (!failed) {
        memmove(out->data + at, out->data + at + 1, out->n - at - 1); /* its opening brace */
        /* and its closing one: the line's own follows */
        out->n -= 2;
        failed = text_append(out, r->line + brace, r->n_line - brace, err);
    }
    return failed ? failed : text_append(out, "\n", 1, err);
}

/* {"line": 17, "id": ..., "error": "why", "bpo": {...}}, where the id stands if the line has a
 * readable one. */
static int record_failed(struct dataset *d, struct record *r, bool is_object,
                         struct bpo_error *err) {
    char head[48], hash[17];
    const char *id;
    size_t n_id;
    struct text *out = &r->out;
    (void)snprintf(head, sizeof head, "{\"line\": %" PRIu64 ", ", r->number);
    (void)snprintf(hash, sizeof hash, "%016" PRIx64, line_hash(r->line, r->n_line));
    json_t *rest = json_pack("{s:o, s:{s:s, s:s, s:I}}", "error",
                             json_text(r->error.message, strlen(r->error.message)), "bpo", "input",
                             hash, "run", d->run, "run_seed", (json_int_t)d->run_seed);
    int failed = text_append(out, head, strlen(head), err);
    if (is_object && member_as_written(r->line, "id", &id, &n_id)) {
        failed = failed ? failed : text_append(out, "\"id\": ", 6, err);
        failed = failed ? failed : text_append(out, id, n_id, err);
        failed = failed ? failed : text_append(out, ", ", 2, err);
    }
    size_t at = out->n;
    failed = failed || (rest && json_dump_callback(rest, append_bytes, out, 0) == 0)
                 ? failed
                 : no_memory_for(err, "a record");
    json_decref(rest);
    if (!failed) {
        memmove(out->data + at, out->data + at + 1, out->n - at - 1);
        out->n--;
        failed = text_append(out, "\n", 1, err);
    }
    return failed;
}

static void record_free_text(struct record *r, int32_t n_samples) {
    for (int32_t i = 0; r->rewrites && i < n_samples; i++) {
        free(r->rewrites[i].text);
    }
    free(r->rewrites);
    free(r->prompt);
    free(r->forced);
    r->forced = NULL;
    r->rewrites = NULL;
    r->prompt = NULL;
}

static void record_free(struct record *r, int32_t n_samples) {
    if (r) {
        record_free_text(r, n_samples);
        free(r->line);
        free(r->out.data);
        free(r);
    }
}

/* Makes the output line of a record that is done, or has failed. is_object: the line is known to be
 * a JSON object. */
static int record_complete(struct dataset *d, struct record *r, bool is_object,
                           struct bpo_error *err) {
    int failed = r->error.code ? record_failed(d, r, is_object, err) : record_splice(d, r, err);
    record_free_text(r, d->o.request.n_samples);
    r->complete = true;
    return failed;
}

/* ---------------------------------------------------------------- output */

static const char *const OUTPUT_HINT = "is the folder there and writable, and the disk not full?";

static int output_open(struct output *out, const char *path, bool resume, struct bpo_error *err) {
    struct stat about;
    *out = (struct output){.fd = STDOUT_FILENO, .name = path};
    if (strcmp(path, "-") == 0) {
        out->name = "standard output";
        return resume ? bpo_fail(err, BPO_ERR_USAGE, "-o names the file to go on with",
                                 "--resume needs a file")
                      : 0;
    }
    out->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
    out->created = out->fd >= 0;
    if (out->fd < 0 && errno == EEXIST && stat(path, &about) == 0) {
        if (!resume && S_ISREG(about.st_mode)) {
            return bpo_fail(err, BPO_ERR_USAGE,
                            "--resume goes on where it ends; or name another, or remove it",
                            "%s is there already", path);
        }
        out->fd = open(path, (S_ISREG(about.st_mode) ? O_RDWR : O_WRONLY) | O_APPEND | O_CLOEXEC);
    }
    if (out->fd < 0 || fstat(out->fd, &about) != 0) {
        return bpo_fail(err, BPO_ERR_RUN, OUTPUT_HINT, "cannot write %s: %s", path,
                        strerror(errno));
    }
    out->regular = S_ISREG(about.st_mode);
    if (resume && !out->regular) {
        return bpo_fail(err, BPO_ERR_USAGE, "-o names the file to go on with",
                        "--resume needs a file, which %s is not", path);
    }
    if (out->regular && flock(out->fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        return bpo_fail(err, BPO_ERR_USAGE, "wait for its end, or name another output",
                        "another process writes %s", path);
    }
    return 0;
}

/* Appends a record: all of it, or nothing. */
static int output_append(struct output *out, const char *data, size_t n, struct bpo_error *err) {
    for (size_t n_done = 0; n_done < n;) {
        ssize_t written = write(out->fd, data + n_done, n - n_done);
        if (written > 0) {
            n_done += (size_t)written;
        } else if (written < 0 && errno == EAGAIN) {
            (void)poll(&(struct pollfd){.fd = out->fd, .events = POLLOUT}, 1, -1);
        } else if (!(written < 0 && errno == EINTR)) {
            int why = errno;
            if (out->regular && n_done > 0 && ftruncate(out->fd, (off_t)out->n_bytes) != 0) {
                return bpo_fail(err, BPO_ERR_RUN, "--resume drops the torn record at its end",
                                "cannot write %s: %s; and its end is torn", out->name,
                                strerror(why));
            }
            return bpo_fail(err, BPO_ERR_RUN,
                            out->regular ? "free some space, then go on with --resume"
                                         : "was the pipe closed?",
                            "cannot write %s: %s", out->name, strerror(why));
        }
    }
    out->n_bytes += n;
    return 0;
}

/* What was appended must survive a power cut too. */
static int output_sync(const struct output *out, struct bpo_error *err) {
    if (out->regular && fsync(out->fd) != 0 && errno != EINVAL && errno != ENOTSUP) {
        return bpo_fail(err, BPO_ERR_RUN, "free some space, then go on with --resume",
                        "cannot write %s: %s", out->name, strerror(errno));
    }
    return 0;
}

/* ---------------------------------------------------------------- progress */

static const char *duration(char text[32], double seconds) {
    unsigned long s = seconds < 1e9 ? (unsigned long)(seconds + 0.5) : 1000000000UL;
    if (s >= 3600) {
        (void)snprintf(text, 32, "%lu h %02lu min", s / 3600, s / 60 % 60);
    } else if (s >= 60) {
        (void)snprintf(text, 32, "%lu min %02lu s", s / 60, s % 60);
    } else {
        (void)snprintf(text, 32, "%.*f s", seconds < 9.95 ? 1 : 0, seconds);
    }
    return text;
}

/* "823 records (41 %), 3.2 records/s, 412 tokens/s, 2 failed, 12 min 05 s left" */
static void progress_line(char text[200], const struct progress *p, double elapsed, double part) {
    char left[48] = "", percent[16] = "", failures[32] = "", time[32];
    double first = p->input_bytes ? (double)p->first_offset / (double)p->input_bytes : 0;
    if (p->input_bytes) {
        (void)snprintf(percent, sizeof percent, " (%.0f %%)", 100 * part);
    }
    if (part > first && part < 1) {
        (void)snprintf(left, sizeof left, ", %s left",
                       duration(time, elapsed * (1 - part) / (part - first)));
    }
    if (p->n_failed > 0) {
        (void)snprintf(failures, sizeof failures, ", %" PRIu64 " failed", p->n_failed);
    }
    (void)snprintf(text, 200, "%" PRIu64 " records%s, %.1f records/s, %.0f tokens/s%s%s",
                   p->n_resumed + p->n_written, percent, (double)p->n_written / elapsed,
                   (double)p->n_tokens / elapsed, failures, left);
}

/* Columns of the terminal, less the last, in which some wrap. */
static int terminal_width(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1 : 79;
}

/* A bar that moves, on a terminal; elsewhere a line after ten seconds and then every minute. */
static void progress_show(struct progress *p) {
    char text[200], bar[2 * BAR_WIDTH + 8] = "";
    double now = seconds_now(), elapsed = now - p->begun;
    double pause = p->terminal ? 0.2 : p->shown > p->begun ? 60 : 10;
    if (now - p->shown < pause) {
        return;
    }
    p->shown = now;
    double part = p->input_bytes ? (double)p->offset / (double)p->input_bytes : 0;
    progress_line(text, p, elapsed, part);
    if (!p->terminal) {
        (void)fprintf(stderr, "bpo: %s\n", text);
        return;
    }
    int width = terminal_width(), room = width - (int)strlen(text) - 3;
    room = room < BAR_WIDTH ? room : BAR_WIDTH;
    if (p->input_bytes && room >= 5) {
        int n = (int)(part * room + 0.5);
        (void)snprintf(bar, sizeof bar, "[%.*s%.*s] ", n, "########################", room - n,
                       "------------------------");
    }
    (void)fprintf(stderr, "\r%s%-*.*s", bar, width - (int)strlen(bar), width - (int)strlen(bar),
                  text);
}

static void progress_clear(const struct progress *p) {
    if (p->terminal && p->shown > p->begun) {
        (void)fprintf(stderr, "\r%*s\r", terminal_width(), "");
    }
}

static void print_summary(const struct dataset *d) {
    const struct progress *p = &d->progress;
    char time[32];
    double elapsed = seconds_now() - p->begun;
    (void)fprintf(stderr, "bpo: %" PRIu64 " record%s in %s: %.1f records/s, %.0f tokens/s\n",
                  p->n_written, p->n_written == 1 ? "" : "s", duration(time, elapsed),
                  (double)p->n_written / elapsed, (double)p->n_tokens / elapsed);
    if (p->n_resumed > 0) {
        (void)fprintf(stderr, "bpo: %" PRIu64 " were there already\n", p->n_resumed);
    }
    if (p->n_warned > 0) {
        (void)fprintf(stderr, "bpo: %" PRIu64 " warning%s; the first, %s\n", p->n_warned,
                      p->n_warned == 1 ? "" : "s", d->first_warning);
    }
    if (p->n_failed > 0 && d->o.allow_errors) {
        (void)fprintf(stderr, "bpo: %" PRIu64 " failed; the first, %s\n", p->n_failed,
                      d->first_failure);
    }
    if (*d->o.signalled) {
        (void)fprintf(stderr, "bpo: interrupted%s\n",
                      d->output.regular ? "; --resume goes on from here" : "");
    }
}

/* ---------------------------------------------------------------- window */

static struct record *window_add(struct dataset *d, const struct line *line,
                                 struct bpo_error *err) {
    struct record *r = calloc(1, sizeof *r);
    char *copy = malloc(line->n + 1);
    if (!r || !copy) {
        free(r);
        free(copy);
        (void)no_memory_for(err, "a record");
        return NULL;
    }
    memcpy(copy, line->text, line->n);
    copy[line->n] = '\0';
    r->line = copy;
    r->n_line = line->n;
    r->number = d->line_number;
    r->input_end = d->input.offset;
    *d->end = r;
    d->end = &r->next;
    d->to_submit = d->to_submit ? d->to_submit : r;
    d->n_window++;
    d->window_bytes += line->n;
    return r;
}

/* Reads into the window while it has room; waits only when there is nothing else to do. */
static int window_fill(struct dataset *d, struct bpo_error *err) {
    const struct progress *p = &d->progress;
    while (!d->input_done && d->n_window < d->most_window && d->window_bytes < WINDOW_BYTES) {
        struct line line = {.text = ""};
        int got = next_line(d, d->n_window == 0, &line, err);
        if (got != GOT_LINE) {
            d->input_done = got == GOT_END;
            return got < 0 ? got : 0;
        }
        struct record *r = window_add(d, &line, err);
        if (!r) {
            return BPO_ERR_RESOURCE;
        }
        json_t *object = parse_line(r->line, r->n_line, &r->error);
        bool is_object = object != NULL;
        bool is_first = d->n_window == 1 && p->n_resumed + p->n_written == 0;
        bool refused = is_object && record_is_new(d, object, &r->error) != 0;
        if (is_object && !refused) {
            (void)record_parse(d, r, object, &r->error);
        }
        json_decref(object);
        if (r->error.code == BPO_ERR_RESOURCE || (refused && is_first)) {
            /* refused: the input is an output, and nobody wants an error for each of its lines */
            *err = r->error;
            return err->code;
        }
        int failed = r->error.code ? record_complete(d, r, is_object, err) : 0;
        if (failed) {
            return failed;
        }
    }
    return 0;
}

static bool waits(const struct record *r) {
    return !r->submitted && !r->complete;
}

/*
 * The record to begin next: the first that waits. But at the end of the input, where all that wait
 * are known, the one with the longest prompt, if it has more than its slot's share of what is left:
 * begun later, it would be the last to end, alone, and a step for one sequence takes nearly as long
 * as a step for several.
 */
static struct record *window_next(struct dataset *d) {
    while (d->to_submit && !waits(d->to_submit)) {
        d->to_submit = d->to_submit->next;
    }
    struct record *first = d->to_submit, *longest = first;
    size_t n_bytes = 0;
    for (struct record *r = d->input_done ? first : NULL; r; r = r->next) {
        n_bytes += waits(r) ? r->n_prompt : 0;
        longest = waits(r) && r->n_prompt > longest->n_prompt ? r : longest;
    }
    return longest && longest->n_prompt > n_bytes / (size_t)d->most_in_work ? longest : first;
}

/* Gives the engine as many records as it has slots: a slot that becomes free finds the next one
 * waiting. */
static int window_submit(struct dataset *d, struct bpo_error *err) {
    int32_t most = d->n_in_work < d->n_short ? d->most_in_work : 0;
    while (d->n_in_work < most || d->n_in_work == 0) {
        struct record *r = window_next(d);
        if (!r) {
            return 0;
        }
        struct bpo_request request = d->o.request;
        request.text = r->prompt;
        request.n_text = r->n_prompt;
        request.seed = r->seed;
        request.forced = r->forced;
        request.n_forced = r->n_forced;
        request.user = r;
        if (!r->rewrites &&
            !(r->rewrites = calloc((size_t)request.n_samples, sizeof *r->rewrites))) {
            return no_memory_for(err, "a record");
        }
        int64_t number = bpo_submit(d->session, &request, &r->error);
        if (number == BPO_ERR_RESOURCE && d->n_in_work > 0) {
            r->error.code = 0;
            d->n_short = d->n_in_work; /* memory is short: again when one of these is done */
            return 0;
        }
        d->n_short = INT32_MAX;
        if (number < 0 && number != BPO_ERR_INPUT) {
            *err = r->error;
            return err->code;
        }
        int failed = number < 0 ? record_complete(d, r, true, err) : 0;
        if (failed) {
            return failed;
        }
        r->submitted = number >= 0;
        d->n_in_work += number >= 0;
    }
    return 0;
}

/* Appends the records that are complete, in the input's order. */
static int window_write(struct dataset *d, struct bpo_error *err) {
    struct progress *p = &d->progress;
    while (d->first && d->first->complete) {
        struct record *r = d->first;
        int failed = output_append(&d->output, r->out.data, r->out.n, err);
        if (failed) {
            return failed;
        }
        if (r->error.code && p->n_failed++ == 0) {
            (void)snprintf(d->first_failure, sizeof d->first_failure, "line %" PRIu64 ": %s",
                           r->number, r->error.message);
            (void)snprintf(d->first_hint, sizeof d->first_hint, "%s", r->error.hint);
        }
        p->n_written++;
        p->offset = r->input_end;
        d->first = r->next;
        d->end = d->first ? d->end : &d->first;
        d->to_submit = d->to_submit == r ? r->next : d->to_submit;
        d->n_window--;
        d->window_bytes -= r->n_line;
        record_free(r, d->o.request.n_samples);
    }
    double now = seconds_now();
    if (now - p->synced > SYNC_SECONDS) {
        p->synced = now;
        return output_sync(&d->output, err);
    }
    return 0;
}

/* ---------------------------------------------------------------- resume */

/* The run's hash: model, options and seed, all that the texts depend on besides the input. A
 * shard's number does not belong to it: the shards of a run add up to the same bytes as one run
 * over everything. */
static int run_hash(struct dataset *d, const struct bpo_model_info *model, struct bpo_error *err) {
    const struct bpo_request *q = &d->o.request;
    struct bpo_session_info session;
    struct text all = {0};
    char numbers[256];
    bpo_session_get_info(d->session, &session);
    (void)snprintf(numbers, sizeof numbers,
                   "1 %016" PRIx64 " %s %d %d %d %d %a %a %d %d %" PRIu64 "\n", model->hash,
                   session.device, (int)session.matmul, session.n_positions, (int)q->mode,
                   q->n_samples, (double)q->temperature, (double)q->top_p, q->top_k,
                   q->max_new_tokens, d->run_seed);
    int failed = text_append(&all, numbers, strlen(numbers), err);
    failed = failed ? failed : text_append(&all, d->o.field, strlen(d->o.field) + 1, err);
    failed =
        failed ? failed : text_append(&all, d->o.output_field, strlen(d->o.output_field) + 1, err);
    if (!failed) {
        (void)snprintf(d->run, sizeof d->run, "%016" PRIx64, line_hash(all.data, all.n));
    }
    free(all.data);
    return failed;
}

/* Whether an output line stems from an input line: by its hash (an error), else byte for byte
 * around what was spliced in. */
static bool stems_from(const struct line *out, const struct line *in, const char *input_hash) {
    char hash[17];
    if (input_hash) {
        (void)snprintf(hash, sizeof hash, "%016" PRIx64, line_hash(in->text, in->n));
        return strcmp(hash, input_hash) == 0;
    }
    size_t head = in->n;
    while (head > 0 && in->text[head - 1] != '}') {
        head--;
    }
    size_t tail = head > 0 ? in->n - --head : 0; /* from the closing brace on */
    return tail > 0 && out->n > head + tail && memcmp(out->text, in->text, head) == 0 &&
           out->text[head] == ',' && memcmp(out->text + out->n - tail, in->text + head, tail) == 0;
}

static const char *const NOT_OURS_HINT = "-o is to be a file that bpo wrote; name another";

/* Whether a line that the output holds was made by this run: its "bpo" says so. The first one may
 * give the seed. */
static int resume_check(struct dataset *d, const struct bpo_model_info *model, const json_t *meta,
                        struct bpo_error *err) {
    const char *run = json_string_value(json_object_get(meta, "run")), *name = d->output.name;
    const json_t *seed = json_object_get(meta, "run_seed");
    uint64_t n = d->progress.n_resumed + 1;
    if (!run || !json_is_integer(seed)) {
        return bpo_fail(err, BPO_ERR_INPUT, NOT_OURS_HINT,
                        "line %" PRIu64 " of %s is no record of a data set run", n, name);
    }
    if (d->run[0] == '\0') {
        d->run_seed = d->o.seed_given ? d->run_seed : (uint64_t)json_integer_value(seed);
        int failed = run_hash(d, model, err);
        if (failed) {
            return failed;
        }
    }
    if (d->run_seed != (uint64_t)json_integer_value(seed)) {
        return bpo_fail(err, BPO_ERR_USAGE, "leave --seed out: --resume takes it from the file",
                        "%s was made with the seed %" JSON_INTEGER_FORMAT ", not %" PRIu64, name,
                        json_integer_value(seed), d->run_seed);
    }
    if (strcmp(run, d->run) != 0) {
        return bpo_fail(
            err, BPO_ERR_USAGE, "give the same model and options as then, or another -o",
            "line %" PRIu64 " of %s was made with another model or other options (run %s, not %s)",
            n, name, run, d->run);
    }
    return 0;
}

/* Checks one line that the output holds: it must be what this run would write for the next line of
 * the input. */
static int resume_line(struct dataset *d, const struct bpo_model_info *model,
                       const struct line *out, struct bpo_error *err) {
    struct line in = {.text = ""};
    json_t *object = parse_line(out->text, out->n, err);
    if (!object && err->code == BPO_ERR_RESOURCE) {
        return err->code;
    }
    const json_t *meta = json_object_get(object, "bpo");
    const char *input_hash = json_string_value(json_object_get(meta, "input"));
    bool was_error = input_hash != NULL;
    int failed = resume_check(d, model, meta, err),
        got = failed ? failed : next_line(d, true, &in, err);
    if (got == GOT_END || (got == GOT_LINE && !stems_from(out, &in, input_hash))) {
        got =
            bpo_fail(err, BPO_ERR_INPUT, "give the same input (and --shard) as then, or another -o",
                     "line %" PRIu64 " of %s stems from another input: %s",
                     d->progress.n_resumed + 1, d->output.name,
                     got == GOT_END ? "this one ends before" : "this one has another line there");
    }
    json_decref(object);
    if (got == GOT_LINE) {
        d->progress.n_resumed++;
        d->progress.n_failed += was_error;
        d->output.n_bytes += out->n + 1;
    }
    return got < 0 ? got : 0;
}

/* Whether a last line without an end may be dropped. It is all that is known of a file without any
 * whole record: that must look like the beginning of one, lest a file of somebody else's be
 * emptied. */
static int resume_torn(const struct dataset *d, const struct line *torn, struct bpo_error *err) {
    size_t begin, end;
    json_t *object = json_loadb(torn->text, torn->n, JSON_ALLOW_NUL, NULL);
    bool ours = d->progress.n_resumed > 0 || json_object_get(json_object_get(object, "bpo"), "run");
    text_strip(torn->text, torn->n, &begin, &end);
    ours = ours || (!object && begin < end && torn->text[begin] == '{');
    json_decref(object);
    return ours ? 0
                : bpo_fail(err, BPO_ERR_INPUT, NOT_OURS_HINT,
                           "line 1 of %s is no record of a data set run", d->output.name);
}

/* Reads what the output holds, and drops a last line that was torn. */
static int resume(struct dataset *d, const struct bpo_model_info *model, struct bpo_error *err) {
    struct reader old = {.fd = d->output.fd, .name = d->output.name};
    struct line line = {.text = ""};
    int failed = 0, got = GOT_NOTHING;
    while (!failed && got != GOT_END && !*d->o.signalled) {
        got = reader_line(&old, true, d->o.signalled, &line, err);
        if (got == GOT_LINE) {
            failed = line.whole ? resume_line(d, model, &line, err) : resume_torn(d, &line, err);
        }
        failed = got < 0 ? got : failed;
    }
    free(old.data);
    if (!failed && !*d->o.signalled && ftruncate(d->output.fd, (off_t)d->output.n_bytes) != 0) {
        failed = bpo_fail(err, BPO_ERR_RUN, OUTPUT_HINT, "cannot write %s: %s", d->output.name,
                          strerror(errno));
    }
    return failed;
}

/* ---------------------------------------------------------------- running */

static int take_event(struct dataset *d, const struct bpo_event *e, struct bpo_error *err) {
    struct record *r = e->user;
    if (e->kind == BPO_EVENT_WARNING) {
        if (!r && !d->o.quiet) {
            (void)fprintf(stderr, "bpo: warning: %s\n", e->text);
        } else if (r && d->progress.n_warned++ == 0) {
            (void)snprintf(d->first_warning, sizeof d->first_warning, "line %" PRIu64 ": %s",
                           r->number, e->text);
        }
        return 0;
    }
    d->progress.n_tokens += e->kind == BPO_EVENT_TOKEN;
    if (e->kind != BPO_EVENT_DONE || e->stop == BPO_STOP_INTERRUPTED) {
        return 0;
    }
    struct rewrite *w = &r->rewrites[e->sample];
    if (!(w->text = malloc(e->n_text + 1))) {
        return no_memory_for(err, "a rewrite");
    }
    memcpy(w->text, e->text, e->n_text);
    w->n_text = e->n_text;
    w->new_tokens = e->new_tokens;
    w->stop = e->stop;
    w->unchanged = e->unchanged;
    r->prompt_tokens = e->prompt_tokens;
    if (e->stop == BPO_STOP_ERROR && !r->error.code) {
        r->error = *e->error;
    }
    if (++r->n_done < d->o.request.n_samples) {
        return 0;
    }
    d->n_in_work--;
    return record_complete(d, r, true, err);
}

static int step(struct dataset *d, struct bpo_error *err) {
    const struct bpo_event *events;
    size_t n_events;
    int more = bpo_step(d->session, &events, &n_events, err);
    int failed = more < 0 ? more : 0;
    for (size_t i = 0; i < n_events && !failed; i++) {
        failed = take_event(d, &events[i], err);
    }
    return failed;
}

/* The loop: read, submit, step, write. */
static int run(struct dataset *d, struct bpo_error *err) {
    int failed = 0;
    while (!failed && !*d->o.signalled) {
        failed = window_fill(d, err);
        failed = failed ? failed : window_submit(d, err);
        failed = failed || d->n_in_work == 0 ? failed : step(d, err);
        failed = failed ? failed : window_write(d, err);
        if (!failed && !d->o.quiet) {
            progress_show(&d->progress);
        }
        if (d->input_done && !d->first) {
            break;
        }
    }
    return failed ? failed : output_sync(&d->output, err);
}

struct dataset *dataset_open(const struct dataset_options *options, struct bpo_error *err) {
    struct dataset *d = calloc(1, sizeof *d);
    struct stat about;
    if (!d) {
        (void)no_memory_for(err, "the data set");
        return NULL;
    }
    json_set_alloc_funcs(json_malloc, free);
    d->o = *options;
    d->end = &d->first;
    d->output.fd = -1;
    bool is_stream = strcmp(d->o.input, "-") == 0;
    d->input =
        (struct reader){.fd = STDIN_FILENO, .name = is_stream ? "standard input" : d->o.input};
    int failed = 0;
    if (strcmp(d->o.output_field, "bpo") == 0 || strcmp(d->o.output_field, d->o.field) == 0 ||
        utf8_valid_prefix(d->o.output_field, strlen(d->o.output_field)) <
            strlen(d->o.output_field)) {
        failed = bpo_fail(err, BPO_ERR_USAGE, "name a member that is not there yet",
                          "--output-field \"%s\" is taken, or not UTF-8", d->o.output_field);
    }
    if (!failed && !is_stream && (d->input.fd = open(d->o.input, O_RDONLY | O_CLOEXEC)) < 0) {
        failed =
            bpo_fail(err, BPO_ERR_INPUT, "-i names a file of JSON Lines; -i - reads standard input",
                     "cannot open %s: %s", d->o.input, strerror(errno));
    }
    failed = failed ? failed : output_open(&d->output, d->o.output, d->o.resume, err);
    if (failed) {
        dataset_close(d);
        return NULL;
    }
    if (fstat(d->input.fd, &about) == 0 && S_ISREG(about.st_mode)) {
        d->progress.input_bytes = (uint64_t)about.st_size;
    }
    return d;
}

int dataset_run(struct dataset *d, const struct bpo_model *model, struct bpo_session *session,
                struct bpo_error *err) {
    struct bpo_model_info about;
    struct bpo_session_info info;
    struct progress *p = &d->progress;
    bpo_model_get_info(model, &about);
    bpo_session_get_info(session, &info);
    d->session = session;
    d->run_seed = d->o.request.seed;
    d->most_in_work = info.n_slots;
    d->n_short = INT32_MAX;
    d->most_window = (size_t)info.n_slots * WINDOW_PER_SLOT;
    d->most_window = d->most_window > WINDOW_RECORDS ? d->most_window : WINDOW_RECORDS;
    int failed = d->o.resume ? resume(d, &about, err) : 0;
    failed = failed || d->run[0] ? failed : run_hash(d, &about, err);
    p->terminal = isatty(STDERR_FILENO);
    p->begun = p->shown = p->synced = seconds_now();
    p->first_offset = p->offset = d->input.offset;
    if (!failed && !d->o.seed_given && d->o.request.temperature > 0 && !d->o.quiet) {
        (void)fprintf(stderr, "bpo: seed %" PRIu64 "\n", d->run_seed);
    }
    failed = failed ? failed : run(d, err);
    if (failed) {
        progress_clear(p);
        return failed;
    }
    d->output.created = false; /* it stays */
    if (!d->o.quiet) {
        progress_clear(p);
        print_summary(d);
    }
    if (p->n_failed > 0 && !d->o.allow_errors && !*d->o.signalled) {
        return bpo_fail(err, BPO_ERR_INPUT,
                        d->first_hint[0] ? d->first_hint : "look for \"error\" in the output",
                        "%" PRIu64 " of %" PRIu64 " records failed%s%s", p->n_failed,
                        p->n_resumed + p->n_written, d->first_failure[0] ? "; the first, " : "",
                        d->first_failure);
    }
    return 0;
}

void dataset_close(struct dataset *d) {
    if (!d) {
        return;
    }
    while (d->first) {
        struct record *r = d->first;
        d->first = r->next;
        record_free(r, d->o.request.n_samples);
    }
    if (d->output.created && d->output.n_bytes == 0) {
        (void)unlink(d->output.name);
    }
    if (d->input.fd > STDIN_FILENO) {
        (void)close(d->input.fd);
    }
    if (d->output.fd > STDOUT_FILENO) {
        (void)close(d->output.fd);
    }
    free(d->input.data);
    free(d);
}

/*
 * A decode step reads every weight once, whatever the number of rows; from some number on it is the
 * arithmetic that takes the time, and further rows add as much time as they bring tokens. On CPUs
 * of today that is at about 16 rows for a few cores and 32 for many. Each sequence needs memory for
 * its longest text, beside the model, which must stay in memory too.
 */
int32_t dataset_parallel(const struct bpo_model_info *model, const struct bpo_request *request,
                         int32_t n_positions, int32_t n_threads) {
    size_t most = (n_threads > 0 ? n_threads : threads_default()) <= 4 ? 16 : 32;
    size_t position_bytes =
        4 * (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    size_t longest = (size_t)model->trained_length + (size_t)request->max_new_tokens;
    size_t free_bytes = memory_available(), file_bytes = (size_t)model->file_bytes;
    longest = longest < (size_t)n_positions ? longest : (size_t)n_positions;
    free_bytes -= file_bytes < free_bytes ? file_bytes : free_bytes;
    size_t fit = free_bytes / 4 * 3 / (position_bytes * longest);
    return (int32_t)(fit < 1 ? 1 : fit < most ? fit : most);
}

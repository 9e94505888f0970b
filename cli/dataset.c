/*
 * dataset.c - see dataset.h. From top to bottom:
 *
 *     numbering   which lines of the input are this run's, and their numbers
 *     output      records are appended as a whole, or not at all
 *     window      records between input and output: waiting, in work, or done and waiting for those
 *                 before them
 *     resume      what the output already holds, checked against the input
 *     running     the loop over bpo_step
 *
 * Everything here serves one rule: the output is a function of (input, model, options, seed). How
 * often the run was killed, how many sequences were decoded together and on how many machines
 * leaves no trace in it.
 */
#include "cli/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/memory.h"
#include "base/text.h"
#include "base/threads.h"
#include "cli/jsonl.h"
#include "cli/messages.h"
#include "cli/option_words.h"
#include "cli/progress.h"
#include "cli/record.h"

enum {
    /* Records between input and output: this many, or more if many sequences are decoded together,
     * because one text of 1,024 tokens must not starve the slots whose texts have 30. */
    WINDOW_RECORDS = 1024,
    WINDOW_PER_SLOT = 64,
    WINDOW_BYTES = 256 << 20, /* of lines in the window; a single one may be longer */
    SYNC_SECONDS = 5,         /* between two fsyncs of the output */
};

struct output {
    int fd;
    const char *name;
    bool regular, created; /* a regular file; made by this run */
    uint64_t n_bytes;      /* of whole records, which is the file's length unless a write fails */
    double synced;         /* the time of the last fsync */
};

struct dataset {
    struct dataset_options o;
    struct bpo_session *session;
    struct reader input;
    struct line held; /* a line that follows n_blank blank ones; text NULL: none */
    /* blank lines that are errors if another line follows, and otherwise do not count */
    uint64_t n_blank;
    uint64_t line_number; /* of the last line that next_line returned or skipped */
    bool input_done;
    struct output output;
    struct record_run run;
    struct record *first, **end, *to_submit; /* the window, a list */
    size_t n_window, max_window, window_bytes;
    int32_t n_in_work, max_in_work;
    int32_t n_fit; /* with this many in work, memory had no room for another one */
    struct progress progress;
    uint64_t n_warnings;
    char first_failure[800], first_hint[512], first_warning[256];
};

/* ---------------------------------------------------------------- numbering */

/* Cuts the number and the tab off the beginning of a numbered line. The number goes to line_number,
 * less one, because next_line counts the line. */
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

/* Reads until a line is held that is not blank (or is numbered), counting the blank ones before it.
 * A byte order mark is not part of the first line. Returns what reader_line does. */
static int hold_line(struct dataset *d, bool wait, struct bpo_error *err) {
    while (!d->held.text) {
        bool at_start = d->input.offset == 0;
        int got = reader_line(&d->input, wait, &d->held, err);
        if (got != GOT_LINE) {
            return got;
        }
        if (at_start && d->held.n >= 3 && memcmp(d->held.text, "\xEF\xBB\xBF", 3) == 0) {
            d->held.text += 3;
            d->held.n -= 3;
        }
        int failed = d->o.numbered ? take_number(d, &d->held, err) : 0;
        if (failed) {
            return failed;
        }
        if (!d->o.numbered && line_is_blank(&d->held)) {
            d->n_blank++;
            d->held.text = NULL;
        }
    }
    return GOT_LINE;
}

/* Reads the next line of this shard, whose number is then line_number. Blank lines at the end of
 * the input do not count; elsewhere they are lines like any other. Returns what reader_line
 * does. */
static int next_line(struct dataset *d, bool wait, struct line *line, struct bpo_error *err) {
    for (;;) {
        int got = hold_line(d, wait, err);
        if (got != GOT_LINE) {
            return got;
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

/* ---------------------------------------------------------------- output */

static const char *const OUTPUT_HINT = "does the folder exist, is it writable, is the disk full?";
static const char *const RESUME_HINT = "-o names the file to continue";
static const char *const DISK_HINT = "free some space, then continue with --resume";

/* Opens the file, or creates it; one that exists is an error unless it is to be resumed or is a
 * device or a pipe. */
static int output_open_file(struct output *out, bool resume, struct bpo_error *err) {
    struct stat about;
    const char *path = out->name;
    out->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
    out->created = out->fd >= 0;
    if (out->fd < 0 && errno == EEXIST && stat(path, &about) == 0) {
        if (!resume && S_ISREG(about.st_mode)) {
            return bpo_fail(err, BPO_ERR_USAGE,
                            "--resume continues it; or name another file, or remove this one",
                            "%s is there already", path);
        }
        out->fd = open(path, (S_ISREG(about.st_mode) ? O_RDWR : O_WRONLY) | O_APPEND | O_CLOEXEC);
    }
    if (out->fd < 0 || fstat(out->fd, &about) != 0) {
        return bpo_fail(err, BPO_ERR_RUN, OUTPUT_HINT, "cannot write %s: %s", path,
                        strerror(errno));
    }
    out->regular = S_ISREG(about.st_mode);
    return 0;
}

static int output_open(struct output *out, const char *path, bool resume, struct bpo_error *err) {
    *out = (struct output){.fd = STDOUT_FILENO, .name = path};
    if (strcmp(path, "-") == 0) {
        out->name = "standard output";
        return resume ? bpo_fail(err, BPO_ERR_USAGE, RESUME_HINT, "--resume needs a file") : 0;
    }
    int failed = output_open_file(out, resume, err);
    if (failed) {
        return failed;
    }
    if (resume && !out->regular) {
        return bpo_fail(err, BPO_ERR_USAGE, RESUME_HINT,
                        "--resume needs a regular file, which %s is not", path);
    }
    if (out->regular && flock(out->fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        return bpo_fail(err, BPO_ERR_USAGE, "wait until it ends, or name another output",
                        "another process writes %s", path);
    }
    return 0;
}

/* Appends a record: either all of it or nothing. */
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
                return bpo_fail(err, BPO_ERR_RUN, "--resume drops the incomplete record",
                                "cannot write %s: %s; its last record is incomplete", out->name,
                                strerror(why));
            }
            return bpo_fail(err, BPO_ERR_RUN, out->regular ? DISK_HINT : "was the pipe closed?",
                            "cannot write %s: %s", out->name, strerror(why));
        }
    }
    out->n_bytes += n;
    return 0;
}

/* Makes what was appended survive a power cut. */
static int output_sync(struct output *out, struct bpo_error *err) {
    out->synced = seconds_now();
    if (out->regular && fsync(out->fd) != 0 && errno != EINVAL && errno != ENOTSUP) {
        return bpo_fail(err, BPO_ERR_RUN, DISK_HINT, "cannot write %s: %s", out->name,
                        strerror(errno));
    }
    return 0;
}

/* ---------------------------------------------------------------- window */

static struct record *window_add(struct dataset *d, const struct line *line,
                                 struct bpo_error *err) {
    struct record *r = record_new(line->text, line->n, err);
    if (!r) {
        return NULL;
    }
    r->number = d->line_number;
    r->input_end = d->input.offset;
    *d->end = r;
    d->end = &r->next;
    d->to_submit = d->to_submit ? d->to_submit : r;
    d->n_window++;
    d->window_bytes += line->n;
    return r;
}

static struct record *window_remove_first(struct dataset *d) {
    struct record *r = d->first;
    d->first = r->next;
    d->end = d->first ? d->end : &d->first;
    d->to_submit = d->to_submit == r ? r->next : d->to_submit;
    d->n_window--;
    d->window_bytes -= r->n_line;
    return r;
}

/* Parses a record of the window. One with an error is complete. */
static int window_parse(struct dataset *d, struct record *r, struct bpo_error *err) {
    const struct progress *p = &d->progress;
    bool is_first = d->n_window == 1 && p->n_resumed + p->n_written == 0;
    bool has_our_members = record_parse(r, &d->run);
    if (r->error.code == BPO_ERR_RESOURCE || (has_our_members && is_first)) {
        /* If the first record has our members, the input is an output, and nobody wants an error
         * for each of its lines. */
        *err = r->error;
        return err->code;
    }
    return r->error.code ? record_complete(r, &d->run, err) : 0;
}

/* Reads into the window while it has room. Waits only if there is nothing else to do. */
static int window_fill(struct dataset *d, struct bpo_error *err) {
    while (!d->input_done && d->n_window < d->max_window && d->window_bytes < WINDOW_BYTES) {
        struct line line = {.text = ""};
        int got = next_line(d, d->n_window == 0, &line, err);
        if (got != GOT_LINE) {
            d->input_done = got == GOT_END;
            return got < 0 ? got : 0;
        }
        struct record *r = window_add(d, &line, err);
        int failed = r ? window_parse(d, r, err) : BPO_ERR_RESOURCE;
        if (failed) {
            return failed;
        }
    }
    return 0;
}

static bool is_waiting(const struct record *r) {
    return !r->submitted && !r->complete;
}

/*
 * Returns the record to begin next: the first one that waits. At the end of the input, where all
 * that wait are known, it is the one with the longest prompt if that is more than a slot's share of
 * what is left. Begun later, it would end last and alone, and a step for one sequence takes nearly
 * as long as a step for several.
 */
static struct record *window_next(struct dataset *d) {
    while (d->to_submit && !is_waiting(d->to_submit)) {
        d->to_submit = d->to_submit->next;
    }
    struct record *first = d->to_submit, *longest = first;
    size_t n_bytes = 0;
    for (struct record *r = d->input_done ? first : NULL; r; r = r->next) {
        n_bytes += is_waiting(r) ? r->n_prompt : 0;
        longest = is_waiting(r) && r->n_prompt > longest->n_prompt ? r : longest;
    }
    return longest && longest->n_prompt > n_bytes / (size_t)d->max_in_work ? longest : first;
}

/* Submits one record. If there is no memory for it beside those in work, it waits until one of them
 * is done; if its prompt is refused, it is complete. */
static int window_submit_record(struct dataset *d, struct record *r, struct bpo_error *err) {
    struct bpo_request request = d->o.request;
    request.text = r->prompt;
    request.n_text = r->n_prompt;
    request.seed = r->seed;
    request.forced = r->forced;
    request.n_forced = r->n_forced;
    request.user = r;
    if (!r->rewrites && !(r->rewrites = calloc((size_t)request.n_samples, sizeof *r->rewrites))) {
        return no_memory_for(err, "a record");
    }
    int64_t number = bpo_submit(d->session, &request, &r->error);
    if (number == BPO_ERR_RESOURCE && d->n_in_work > 0) {
        r->error.code = 0;
        d->n_fit = d->n_in_work;
        return 0;
    }
    d->n_fit = INT32_MAX;
    if (number >= 0) {
        r->submitted = true;
        d->n_in_work++;
        return 0;
    }
    option_words_in_error(&r->error);
    if (number == BPO_ERR_INPUT) {
        return record_complete(r, &d->run, err);
    }
    *err = r->error;
    return err->code;
}

/* Keeps as many records in work as there are slots: a slot that becomes free has its next record at
 * once. */
static int window_submit(struct dataset *d, struct bpo_error *err) {
    while (d->n_in_work < d->max_in_work && (d->n_in_work < d->n_fit || d->n_in_work == 0)) {
        struct record *r = window_next(d);
        int failed = r ? window_submit_record(d, r, err) : 0;
        if (failed || !r) {
            return failed;
        }
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
        record_free(window_remove_first(d), d->run.n_samples);
    }
    return seconds_now() - d->output.synced > SYNC_SECONDS ? output_sync(&d->output, err) : 0;
}

/* ---------------------------------------------------------------- resume */

/* Computes the run's id, a hash of all that the texts depend on besides the input: model, options
 * and seed. A shard's number does not belong to it, because the shards of a run add up to the same
 * bytes as one run over everything. */
static int set_run_id(struct dataset *d, const struct bpo_model_info *model,
                      struct bpo_error *err) {
    const struct bpo_request *q = &d->o.request;
    struct bpo_session_info session;
    struct text all = {0};
    char numbers[256];
    bpo_session_get_info(d->session, &session);
    (void)snprintf(numbers, sizeof numbers,
                   "1 %016" PRIx64 " %s %d %d %d %d %a %a %d %d %" PRIu64 "\n", model->hash,
                   session.device, (int)session.matmul, session.n_positions, (int)q->mode,
                   q->n_samples, (double)q->temperature, (double)q->top_p, q->top_k,
                   q->max_new_tokens, d->run.seed);
    int failed = text_append(&all, numbers, strlen(numbers), err);
    const char *const fields[] = {d->run.field, d->run.output_field};
    for (size_t i = 0; i < 2; i++) {
        failed = failed ? failed : text_append(&all, fields[i], strlen(fields[i]) + 1, err);
    }
    if (!failed) {
        (void)snprintf(d->run.id, sizeof d->run.id, "%016" PRIx64, line_hash(all.data, all.n));
    }
    free(all.data);
    return failed;
}

static const char *const NOT_OURS_HINT = "-o must name a file that bpo wrote";

/* Checks that a line of the output was made by this run, as its "bpo" says. The first line may
 * supply the seed. */
static int resume_check(struct dataset *d, const struct bpo_model_info *model, const json_t *meta,
                        struct bpo_error *err) {
    const char *run = json_string_value(json_object_get(meta, "run")), *name = d->output.name;
    const json_t *seed = json_object_get(meta, "run_seed");
    uint64_t n = d->progress.n_resumed + 1;
    if (!run || !json_is_integer(seed)) {
        return bpo_fail(err, BPO_ERR_INPUT, NOT_OURS_HINT,
                        "line %" PRIu64 " of %s is not a record of a data set run", n, name);
    }
    if (d->run.id[0] == '\0') {
        d->run.seed = d->o.seed_given ? d->run.seed : (uint64_t)json_integer_value(seed);
        int failed = set_run_id(d, model, err);
        if (failed) {
            return failed;
        }
    }
    if (d->run.seed != (uint64_t)json_integer_value(seed)) {
        return bpo_fail(err, BPO_ERR_USAGE, "omit --seed: --resume takes it from the file",
                        "%s was made with the seed %" JSON_INTEGER_FORMAT ", not %" PRIu64, name,
                        json_integer_value(seed), d->run.seed);
    }
    if (strcmp(run, d->run.id) != 0) {
        return bpo_fail(
            err, BPO_ERR_USAGE, "give the same model and options as before, or another -o",
            "line %" PRIu64 " of %s was made with another model or other options (run %s, not %s)",
            n, name, run, d->run.id);
    }
    return 0;
}

/* Checks that the next line of the input is the one that a line of the output was made of. */
static int resume_input(struct dataset *d, const struct line *out, const char *input_hash,
                        struct bpo_error *err) {
    struct line in = {.text = ""};
    int got = next_line(d, true, &in, err);
    if (got == GOT_END ||
        (got == GOT_LINE && !record_is_of(out->text, out->n, in.text, in.n, input_hash))) {
        return bpo_fail(
            err, BPO_ERR_INPUT, "give the same input (and --shard) as before, or another -o",
            "line %" PRIu64 " of %s was made from another input: %s", d->progress.n_resumed + 1,
            d->output.name,
            got == GOT_END ? "this one ends before" : "this one has another line there");
    }
    return got;
}

/* Checks one line of the output: it must be what this run would write for the next line of the
 * input. */
static int resume_line(struct dataset *d, const struct bpo_model_info *model,
                       const struct line *out, struct bpo_error *err) {
    json_t *object = json_parse_line(out->text, out->n, err);
    if (!object && err->code == BPO_ERR_RESOURCE) {
        return err->code;
    }
    const json_t *meta = json_object_get(object, "bpo");
    const char *input_hash = json_string_value(json_object_get(meta, "input"));
    bool was_error = input_hash != NULL;
    int got = resume_check(d, model, meta, err);
    got = got ? got : resume_input(d, out, input_hash, err);
    json_decref(object);
    if (got == GOT_LINE) {
        d->progress.n_resumed++;
        d->progress.n_failed += was_error;
        d->output.n_bytes += out->n + 1;
    }
    return got < 0 ? got : 0;
}

/* Checks that an incomplete last line may be dropped. If the file has no complete record, the line
 * must look like the beginning of one, so that nobody else's file is emptied. */
static int resume_incomplete(const struct dataset *d, const struct line *last,
                             struct bpo_error *err) {
    size_t begin, end;
    json_t *object = json_loadb(last->text, last->n, JSON_ALLOW_NUL, NULL);
    bool ours = d->progress.n_resumed > 0 || json_object_get(json_object_get(object, "bpo"), "run");
    text_strip(last->text, last->n, &begin, &end);
    ours = ours || (!object && begin < end && last->text[begin] == '{');
    json_decref(object);
    return ours ? 0
                : bpo_fail(err, BPO_ERR_INPUT, NOT_OURS_HINT,
                           "line 1 of %s is not a record of a data set run", d->output.name);
}

/* Reads what the output holds, and drops an incomplete last line. */
static int resume(struct dataset *d, const struct bpo_model_info *model, struct bpo_error *err) {
    struct reader old = {.fd = d->output.fd, .name = d->output.name, .signalled = d->o.signalled};
    struct line line = {.text = ""};
    int failed = 0, got = GOT_NOTHING;
    while (!failed && got != GOT_END && !*d->o.signalled) {
        got = reader_line(&old, true, &line, err);
        if (got == GOT_LINE) {
            failed =
                line.whole ? resume_line(d, model, &line, err) : resume_incomplete(d, &line, err);
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

/* Prints a warning about the session; of those about records, keeps the first one. */
static void take_warning(struct dataset *d, const struct bpo_event *e) {
    const struct record *r = e->user;
    if (!r) {
        if (!d->o.quiet) {
            report_warning(e->text);
        }
    } else if (d->n_warnings++ == 0) {
        (void)snprintf(d->first_warning, sizeof d->first_warning, "line %" PRIu64 ": %s", r->number,
                       e->text);
        option_words(d->first_warning, sizeof d->first_warning);
    }
}

static int take_event(struct dataset *d, const struct bpo_event *e, struct bpo_error *err) {
    struct record *r = e->user;
    if (e->kind == BPO_EVENT_WARNING) {
        take_warning(d, e);
        return 0;
    }
    d->progress.n_tokens += e->kind == BPO_EVENT_TOKEN;
    if (e->kind != BPO_EVENT_DONE || e->stop == BPO_STOP_INTERRUPTED) {
        return 0;
    }
    int failed = record_take_sample(r, e, err);
    if (failed) {
        return failed;
    }
    if (e->stop == BPO_STOP_ERROR && !r->error.code) {
        r->error = *e->error;
        option_words_in_error(&r->error);
    }
    if (r->n_done < d->run.n_samples) {
        return 0;
    }
    d->n_in_work--;
    return record_complete(r, &d->run, err);
}

static int step(struct dataset *d, struct bpo_error *err) {
    const struct bpo_event *events = NULL;
    size_t n_events = 0;
    int more = bpo_step(d->session, &events, &n_events, err);
    int failed = more < 0 ? more : 0;
    for (size_t i = 0; i < n_events && !failed; i++) {
        failed = take_event(d, &events[i], err);
    }
    return failed;
}

/* The loop: read, submit, step, write. */
static int loop(struct dataset *d, struct bpo_error *err) {
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

static int check_output_field(const struct dataset_options *o, struct bpo_error *err) {
    const char *name = o->output_field;
    if (strcmp(name, "bpo") == 0 || strcmp(name, o->field) == 0 ||
        utf8_valid_prefix(name, strlen(name)) < strlen(name)) {
        return bpo_fail(err, BPO_ERR_USAGE, "choose a name that no member has yet",
                        "--output-field \"%s\" is taken, or not UTF-8", name);
    }
    return 0;
}

static int input_open(struct reader *input, const struct dataset_options *o,
                      struct bpo_error *err) {
    *input = (struct reader){.fd = STDIN_FILENO, .name = o->input, .signalled = o->signalled};
    if (strcmp(o->input, "-") == 0) {
        input->name = "standard input";
        return 0;
    }
    input->fd = open(o->input, O_RDONLY | O_CLOEXEC);
    if (input->fd < 0) {
        return bpo_fail(err, BPO_ERR_INPUT,
                        "-i names a file of JSON Lines; -i - reads standard input",
                        "cannot open %s: %s", o->input, strerror(errno));
    }
    return 0;
}

struct dataset *dataset_open(const struct dataset_options *options, struct bpo_error *err) {
    struct dataset *d = calloc(1, sizeof *d);
    struct stat about;
    if (!d) {
        (void)no_memory_for(err, "the data set");
        return NULL;
    }
    json_watch_memory();
    d->o = *options;
    d->run = (struct record_run){.field = options->field,
                                 .output_field = options->output_field,
                                 .n_samples = options->request.n_samples,
                                 .seed = options->request.seed};
    d->end = &d->first;
    d->input.fd = d->output.fd = -1;
    int failed = check_output_field(&d->o, err);
    failed = failed ? failed : input_open(&d->input, &d->o, err);
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

static void print_summary(const struct dataset *d) {
    const struct progress *p = &d->progress;
    progress_summary(p);
    if (p->n_resumed > 0) {
        (void)fprintf(stderr, "bpo: %" PRIu64 " were already there\n", p->n_resumed);
    }
    if (d->n_warnings > 0) {
        (void)fprintf(stderr, "bpo: %" PRIu64 " warning%s; the first, %s\n", d->n_warnings,
                      d->n_warnings == 1 ? "" : "s", d->first_warning);
    }
    if (p->n_failed > 0 && d->o.allow_errors) {
        (void)fprintf(stderr, "bpo: %" PRIu64 " failed; the first, %s\n", p->n_failed,
                      d->first_failure);
    }
    if (*d->o.signalled) {
        (void)fprintf(stderr, "bpo: interrupted%s\n",
                      d->output.regular ? "; --resume continues from here" : "");
    }
}

/* Fails if records failed, unless that is allowed. */
static int check_failures(const struct dataset *d, struct bpo_error *err) {
    const struct progress *p = &d->progress;
    if (p->n_failed == 0 || d->o.allow_errors || *d->o.signalled) {
        return 0;
    }
    return bpo_fail(
        err, BPO_ERR_INPUT, d->first_hint[0] ? d->first_hint : "look for \"error\" in the output",
        "%" PRIu64 " of %" PRIu64 " records failed%s%s", p->n_failed, p->n_resumed + p->n_written,
        d->first_failure[0] ? "; the first, " : "", d->first_failure);
}

int dataset_run(struct dataset *d, const struct bpo_model *model, struct bpo_session *session,
                struct bpo_error *err) {
    struct bpo_model_info about;
    struct bpo_session_info info;
    bpo_model_get_info(model, &about);
    bpo_session_get_info(session, &info);
    d->session = session;
    d->max_in_work = info.n_slots;
    d->n_fit = INT32_MAX;
    d->max_window = (size_t)info.n_slots * WINDOW_PER_SLOT;
    d->max_window = d->max_window > WINDOW_RECORDS ? d->max_window : WINDOW_RECORDS;
    int failed = d->o.resume ? resume(d, &about, err) : 0;
    failed = failed || d->run.id[0] ? failed : set_run_id(d, &about, err);
    progress_begin(&d->progress, d->input.offset);
    d->output.synced = seconds_now();
    if (!failed && !d->o.seed_given && d->o.request.temperature > 0 && !d->o.quiet) {
        (void)fprintf(stderr, "bpo: seed %" PRIu64 "\n", d->run.seed);
    }
    failed = failed ? failed : loop(d, err);
    if (failed) {
        progress_clear(&d->progress);
        return failed;
    }
    d->output.created = false; /* the run has succeeded, so the file stays */
    if (!d->o.quiet) {
        progress_clear(&d->progress);
        print_summary(d);
    }
    return check_failures(d, err);
}

void dataset_close(struct dataset *d) {
    if (!d) {
        return;
    }
    while (d->first) {
        struct record *r = d->first;
        d->first = r->next;
        record_free(r, d->run.n_samples);
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
 * A decode step reads every weight once, whatever the number of rows. From some number of rows on,
 * arithmetic takes the time instead, and every further row costs as much time as it saves: on
 * today's CPUs about 16 rows with a few cores, and 32 with many. Each sequence needs memory for its
 * longest text, beside the model, which must stay in memory too.
 */
int32_t dataset_parallel(const struct bpo_model_info *model, const struct bpo_request *request,
                         int32_t n_positions, int32_t n_threads) {
    size_t max = (n_threads > 0 ? n_threads : threads_default()) <= 4 ? 16 : 32;
    size_t position_bytes =
        4 * (size_t)model->n_layers * (size_t)model->n_kv_heads * (size_t)model->head_dim;
    size_t longest = (size_t)model->trained_length + (size_t)request->max_new_tokens;
    size_t free_bytes = memory_available(), file_bytes = (size_t)model->file_bytes;
    longest = longest < (size_t)n_positions ? longest : (size_t)n_positions;
    free_bytes -= file_bytes < free_bytes ? file_bytes : free_bytes;
    size_t fit = free_bytes / 4 * 3 / (position_bytes * longest);
    return (int32_t)(fit < 1 ? 1 : fit < max ? fit : max);
}

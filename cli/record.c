/*
 * record.c - see record.h.
 */
#include "cli/record.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "cli/jsonl.h"

/* ---------------------------------------------------------------- memory */

struct record *record_new(const char *line, size_t n, struct bpo_error *err) {
    struct record *r = calloc(1, sizeof *r);
    char *copy = malloc(n + 1);
    if (!r || !copy) {
        free(r);
        free(copy);
        (void)no_memory_for(err, "a record");
        return NULL;
    }
    memcpy(copy, line, n);
    copy[n] = '\0';
    r->line = copy;
    r->n_line = n;
    return r;
}

/* Frees what is no longer needed once the output line is made. */
static void record_free_parts(struct record *r, int32_t n_samples) {
    for (int32_t i = 0; r->rewrites && i < n_samples; i++) {
        free(r->rewrites[i].text);
    }
    free(r->rewrites);
    free(r->prompt);
    free(r->forced);
    r->rewrites = NULL;
    r->prompt = NULL;
    r->forced = NULL;
}

void record_free(struct record *r, int32_t n_samples) {
    if (r) {
        record_free_parts(r, n_samples);
        free(r->line);
        free(r->out.data);
        free(r);
    }
}

/* ---------------------------------------------------------------- reading */

/*
 * A record's seed is a function of the run's seed and of the record's name. The name is its "id": a
 * string's characters, or any other value as it is written. Without an id, or if it is null, the
 * name is the number of the line. So the texts do not change when lines are added, left out or
 * reordered; and records of the same name draw the same random numbers.
 */
uint64_t record_seed(uint64_t run_seed, const char *name, size_t n) {
    return XXH3_64bits_withSeed(name, n, run_seed) & BPO_MAX_SEED;
}

static void set_seed(struct record *r, const json_t *object, uint64_t run_seed) {
    const json_t *id = json_object_get(object, "id");
    char number[24];
    const char *name = number;
    size_t n_name = (size_t)snprintf(number, sizeof number, "%" PRIu64, r->number);
    if (json_is_string(id)) {
        name = json_string_value(id);
        n_name = json_string_length(id);
    } else if (id && !json_is_null(id)) {
        (void)json_find_member(r->line, "id", &name, &n_name);
    }
    r->seed = record_seed(run_seed, name, n_name);
}

/* Refuses a line that already has a member that the output would get. */
static int check_members(const json_t *object, const char *output_field, struct bpo_error *err) {
    if (json_object_get(object, output_field)) {
        return bpo_fail(err, BPO_ERR_INPUT, "--output-field gives the rewrite another name",
                        "the line has a member \"%s\" already", output_field);
    }
    if (json_object_get(object, "bpo")) {
        return bpo_fail(err, BPO_ERR_INPUT, "remove it, for instance with jq -c 'del(.bpo)'",
                        "the line has a member \"bpo\" already");
    }
    return 0;
}

static int copy_prompt(struct record *r, const json_t *object, const char *field,
                       struct bpo_error *err) {
    const json_t *prompt = json_object_get(object, field);
    if (!json_is_string(prompt)) {
        return bpo_fail(err, BPO_ERR_INPUT, "--field names the member that holds the prompt",
                        prompt ? "the member \"%s\" is not a string" : "there is no member \"%s\"",
                        field);
    }
    r->n_prompt = json_string_length(prompt);
    if (!(r->prompt = malloc(r->n_prompt + 1))) {
        return no_memory_for(err, "a prompt");
    }
    memcpy(r->prompt, json_string_value(prompt), r->n_prompt + 1);
    return 0;
}

/* A hook for benchmarks, not in --help: BPO_FORCE_FIELD names the member that lists the ids which
 * replace those that are drawn; see bpo.h. */
static int copy_forced(struct record *r, const json_t *object, struct bpo_error *err) {
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

bool record_parse(struct record *r, const struct record_run *run) {
    json_t *object = json_parse_line(r->line, r->n_line, &r->error);
    if (!object) {
        return false;
    }
    r->is_object = true;
    bool has_our_members = check_members(object, run->output_field, &r->error) != 0;
    int failed = has_our_members ? r->error.code : copy_prompt(r, object, run->field, &r->error);
    if (!failed) {
        set_seed(r, object, run->seed);
        failed = json_out_of_memory() ? no_memory_for(&r->error, "a record") : 0;
    }
    if (!failed) {
        (void)copy_forced(r, object, &r->error);
    }
    json_decref(object);
    return has_our_members;
}

/* ---------------------------------------------------------------- writing */

int record_take_sample(struct record *r, const struct bpo_event *e, struct bpo_error *err) {
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
    r->n_done++;
    return 0;
}

/* The members that a record gets: the rewrite under its name, and "bpo". With several samples they
 * are lists. */
static json_t *rewrite_members(const struct record *r, const struct record_run *run) {
    int32_t n = run->n_samples;
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
        values[i] = failed ? NULL : json_incref(one); /* json_pack fails if one of them is NULL */
        json_decref(lists[i]);
    }
    return json_pack("{s:o, s:{s:I, s:i, s:o, s:o, s:o, s:s, s:I}}", run->output_field, values[0],
                     "bpo", "seed", (json_int_t)r->seed, "prompt_tokens", r->prompt_tokens,
                     "new_tokens", values[1], "stop", values[2], "unchanged", values[3], "run",
                     run->id, "run_seed", (json_int_t)run->seed);
}

/* Writes the line's own bytes with the new members before its closing brace. */
static int write_rewrite(struct record *r, const struct record_run *run, struct bpo_error *err) {
    struct text *out = &r->out;
    size_t brace = r->n_line;
    while (r->line[--brace] != '}') {
    }
    int failed = text_append(out, r->line, brace, err);
    failed = failed ? failed : text_append(out, ", ", 2, err);
    failed = failed ? failed : json_append_members(out, rewrite_members(r, run), err);
    failed = failed ? failed : text_append(out, r->line + brace, r->n_line - brace, err);
    return failed ? failed : text_append(out, "\n", 1, err);
}

static json_t *error_members(const struct record *r, const struct record_run *run) {
    char hash[17];
    (void)snprintf(hash, sizeof hash, "%016" PRIx64, line_hash(r->line, r->n_line));
    return json_pack("{s:o, s:{s:s, s:s, s:I}}", "error", json_valid_prefix(r->error.message),
                     "bpo", "input", hash, "run", run->id, "run_seed", (json_int_t)run->seed);
}

/* Writes {"line": 17, "id": ..., "error": "why", "bpo": {...}}; without an id if the line has none
 * that can be read. */
static int write_error(struct record *r, const struct record_run *run, struct bpo_error *err) {
    struct text *out = &r->out;
    char head[48];
    const char *id;
    size_t n_id;
    (void)snprintf(head, sizeof head, "{\"line\": %" PRIu64 ", ", r->number);
    int failed = text_append(out, head, strlen(head), err);
    if (!failed && r->is_object && json_find_member(r->line, "id", &id, &n_id)) {
        failed = text_append(out, "\"id\": ", 6, err);
        failed = failed ? failed : text_append(out, id, n_id, err);
        failed = failed ? failed : text_append(out, ", ", 2, err);
    }
    failed = failed ? failed : json_append_members(out, error_members(r, run), err);
    return failed ? failed : text_append(out, "}\n", 2, err);
}

int record_complete(struct record *r, const struct record_run *run, struct bpo_error *err) {
    int failed = r->error.code ? write_error(r, run, err) : write_rewrite(r, run, err);
    record_free_parts(r, run->n_samples);
    r->complete = true;
    return failed;
}

/* ---------------------------------------------------------------- recognising */

bool record_is_of(const char *out, size_t n_out, const char *in, size_t n_in,
                  const char *input_hash) {
    char hash[17];
    if (input_hash) {
        (void)snprintf(hash, sizeof hash, "%016" PRIx64, line_hash(in, n_in));
        return strcmp(hash, input_hash) == 0;
    }
    size_t head = n_in; /* the bytes before the closing brace */
    while (head > 0 && in[head - 1] != '}') {
        head--;
    }
    size_t tail = head > 0 ? n_in - --head : 0; /* from the closing brace on */
    return tail > 0 && n_out > head + tail && memcmp(out, in, head) == 0 && out[head] == ',' &&
           memcmp(out + n_out - tail, in + head, tail) == 0;
}

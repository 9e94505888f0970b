/*
 * bpo_worker.c - bpo for bench/run.py: a process that keeps a model open and carries out commands
 * through bpo.h. Each line on standard input is a command, a JSON object; the reply is one object
 * on standard output, with the seconds that the command took, or {"error": ...}. worker.py does the
 * same for the other engines.
 *
 *     {"do": "open", "model": FILE, "threads": N}
 *         maps the model and opens a session
 *     {"do": "start", "ids": [...], "room": N}
 *         a new sequence of these ids, up to the first token drawn
 *     {"do": "advance", "n": N}
 *         N more tokens of it, one pass each
 *     {"do": "rewrite", "ids": [...], "forced": [...], "samples": N, "drafts": true|false}
 *         from ids to the last token
 *     {"do": "rows", "n": N}
 *         one pass of N rows, at most 64, with logits for all
 *     {"do": "close"}
 *         ends a session, and with it what its drafts have learned
 *     {"do": "peaks"}
 *         read bandwidth over the model file's bytes, FMA peak, round trip between two threads
 *     {"do": "memory"}
 *         of this process
 *
 * "forced" ids replace the drawn ones in turn; every pass and every draw is still made. "in" names
 * one of a few sessions that exist side by side, so that a long sequence can be kept while short
 * ones come and go.
 */
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bpo.h"
#include "base/clock.h"
#include "base/error.h"
#include "peaks.h"

#define MAX_SESSIONS 16

struct ids {
    int32_t *id;
    size_t n;
};

/* A session, and the state of its current request. */
struct place {
    char name[64];
    int32_t n_slots;
    bool drafts;
    struct bpo_session *session;
    int64_t request; /* of start; -1: none */
};

struct worker {
    struct bpo_model *model;
    const char *path;
    int32_t n_threads;
    struct place places[MAX_SESSIONS];
    size_t n_places;
    struct threads *pool; /* of the peaks */
    struct peaks *peaks;
    struct bpo_error err;
    int64_t n_passes, n_tokens; /* of the current command */
    int64_t n_drafted, n_accepted, n_kept;
    double first_token_s; /* since it began; 0: not yet */
};

static int no_memory(struct worker *w) {
    return bpo_fail(&w->err, BPO_ERR_RESOURCE, NULL, "out of memory");
}

/* ---- members of a command ---- */

static int get_ids(struct worker *w, struct ids *out, const json_t *command, const char *key) {
    const json_t *list = json_object_get(command, key), *id;
    size_t i;
    *out = (struct ids){NULL, json_array_size(list)};
    if (out->n == 0) {
        return bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "the command has no \"%s\"", key);
    }
    out->id = calloc(out->n, sizeof *out->id);
    if (!out->id) {
        return no_memory(w);
    }
    json_array_foreach(list, i, id) {
        out->id[i] = (int32_t)json_integer_value(id);
    }
    return 0;
}

static int32_t get_number(const json_t *command, const char *key, int32_t otherwise) {
    const json_t *value = json_object_get(command, key);
    return json_is_integer(value) ? (int32_t)json_integer_value(value) : otherwise;
}

/* ---- sessions ---- */

/* The session that a command names, opened if it is new. */
static struct place *place_of(struct worker *w, const json_t *command) {
    const char *name = json_string_value(json_object_get(command, "in"));
    int32_t n_slots = get_number(command, "samples", 1);
    bool drafts = json_is_true(json_object_get(command, "drafts"));
    name = name ? name : "main";
    for (size_t i = 0; i < w->n_places; i++) {
        struct place *p = &w->places[i];
        if (strcmp(p->name, name) == 0 && p->n_slots == n_slots && p->drafts == drafts) {
            return p;
        }
    }
    if (w->n_places == MAX_SESSIONS) {
        (void)bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "too many sessions");
        return NULL;
    }
    struct place *p = &w->places[w->n_places];
    struct bpo_session_options options;
    bpo_session_options_init(&options);
    options.n_threads = w->n_threads;
    options.n_slots = n_slots;
    options.n_positions = get_number(command, "context", 0);
    options.lookup = drafts ? -1 : 0;
    options.no_cache = json_is_true(json_object_get(command, "no_cache"));
    *p = (struct place){.n_slots = n_slots, .drafts = drafts, .request = -1};
    (void)snprintf(p->name, sizeof p->name, "%s", name);
    p->session = bpo_session_open(w->model, &options, &w->err);
    w->n_places += p->session != NULL;
    return p->session ? p : NULL;
}

static int64_t submit(struct worker *w, struct place *p, const struct ids *ids,
                      const struct ids *forced) {
    struct bpo_request request;
    bpo_request_init(&request, w->model, BPO_STABLE);
    request.ids = ids->id;
    request.n_ids = ids->n;
    request.forced = forced->id;
    request.n_forced = forced->n;
    request.n_samples = p->n_slots;
    request.max_new_tokens = (int32_t)forced->n;
    return bpo_submit(p->session, &request, &w->err);
}

/* One pass. Returns what bpo_step does; counts passes and tokens. */
static int pass(struct worker *w, struct place *p, double begin) {
    const struct bpo_event *events;
    size_t n_events;
    int more = bpo_step(p->session, &events, &n_events, &w->err);
    w->n_passes++;
    for (size_t i = 0; more >= 0 && i < n_events; i++) {
        if (events[i].kind == BPO_EVENT_TOKEN) {
            w->n_tokens++;
            w->first_token_s = w->first_token_s > 0 ? w->first_token_s : seconds_now() - begin;
        }
        if (events[i].kind == BPO_EVENT_DONE) {
            w->n_drafted += events[i].drafted;
            w->n_accepted += events[i].accepted;
            w->n_kept = events[i].kept_tokens;
        }
        if (events[i].kind == BPO_EVENT_DONE && events[i].stop == BPO_STOP_ERROR) {
            w->err = *events[i].error;
            return w->err.code;
        }
    }
    return more;
}

/* Ends the session's current request, outside of every measurement. */
static int abandon(struct worker *w, struct place *p) {
    int more = p->request >= 0;
    if (more) {
        bpo_cancel(p->session, p->request);
        p->request = -1;
    }
    while (more > 0) {
        more = pass(w, p, 0);
    }
    w->n_passes = w->n_tokens = w->n_drafted = w->n_accepted = w->n_kept = 0;
    w->first_token_s = 0;
    return more;
}

/* ---- commands; each fills reply ---- */

static int do_open(struct worker *w, const json_t *command, json_t *reply) {
    double begin = seconds_now();
    w->path = json_string_value(json_object_get(command, "model"));
    w->n_threads = get_number(command, "threads", 0);
    w->model = bpo_model_open(w->path, &w->err);
    struct place *p = w->model ? place_of(w, command) : NULL;
    if (!p) {
        return w->err.code;
    }
    json_object_set_new(reply, "s", json_real(seconds_now() - begin));
    struct bpo_session_info info;
    bpo_session_get_info(p->session, &info);
    json_object_set_new(reply, "version", json_string(bpo_version()));
    json_object_set_new(reply, "settings",
                        json_pack("{s:s, s:i, s:s}", "simd", info.simd, "threads",
                                  (int)info.n_threads, "matmul",
                                  info.matmul == BPO_MATMUL_OPENBLAS ? info.blas : "own"));
    return 0;
}

static int do_start(struct worker *w, const json_t *command, json_t *reply) {
    struct ids ids = {NULL, 0}, forced = {NULL, (size_t)get_number(command, "room", 1)};
    struct place *p = place_of(w, command);
    int failed = p ? get_ids(w, &ids, command, "ids") : w->err.code;
    forced.id = malloc(forced.n * sizeof *forced.id);
    if (!failed && !forced.id) {
        failed = no_memory(w);
    }
    for (size_t i = 0; !failed && ids.id && forced.id && i < forced.n; i++) {
        forced.id[i] = ids.id[i % ids.n]; /* any ids that do not end the sequence */
    }
    failed = failed ? failed : abandon(w, p);
    if (!failed) {
        double begin = seconds_now();
        p->request = submit(w, p, &ids, &forced);
        failed = p->request < 0 ? (int)p->request : 0;
        while (failed >= 0 && w->first_token_s == 0) {
            failed = pass(w, p, begin);
        }
        json_object_set_new(reply, "s", json_real(seconds_now() - begin));
        p->request = failed == 0 ? -1 : p->request;
    }
    free(ids.id);
    free(forced.id);
    return failed < 0 ? failed : 0;
}

static int do_advance(struct worker *w, const json_t *command, json_t *reply) {
    struct place *p = place_of(w, command);
    int32_t n = get_number(command, "n", 1);
    if (!p || p->request < 0) {
        return p ? bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "there is no sequence to advance")
                 : w->err.code;
    }
    double begin = seconds_now();
    int more = 1;
    while (w->n_tokens < n && (more = pass(w, p, begin)) > 0) {
    }
    json_object_set_new(reply, "s", json_real(seconds_now() - begin));
    if (more >= 0 && w->n_tokens < n) {
        more = bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "the sequence has ended too early");
    }
    p->request = more == 0 ? -1 : p->request;
    return more < 0 ? more : 0;
}

static int do_rewrite(struct worker *w, const json_t *command, json_t *reply) {
    struct ids ids = {NULL, 0}, forced = {NULL, 0};
    struct place *p = place_of(w, command);
    int failed = p ? get_ids(w, &ids, command, "ids") : w->err.code;
    failed = failed ? failed : get_ids(w, &forced, command, "forced");
    failed = failed ? failed : abandon(w, p);
    if (!failed) {
        double begin = seconds_now();
        int64_t number = submit(w, p, &ids, &forced);
        failed = number < 0 ? (int)number : 1;
        while (failed > 0) {
            failed = pass(w, p, begin);
        }
        json_object_set_new(reply, "s", json_real(seconds_now() - begin));
        json_object_set_new(reply, "prefill_s", json_real(w->first_token_s));
        json_object_set_new(reply, "drafted", json_integer(w->n_drafted));
        json_object_set_new(reply, "accepted", json_integer(w->n_accepted));
        json_object_set_new(reply, "kept", json_integer(w->n_kept));
    }
    free(ids.id);
    free(forced.id);
    return failed;
}

static int do_rows(struct worker *w, const json_t *command, json_t *reply) {
    struct bpo_model_info info;
    struct place *p = place_of(w, command);
    int32_t ids[64], n = get_number(command, "n", 1);
    if (!p || n < 1 || n > 64) {
        return p ? bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "%d rows; expected 1 to 64", n)
                 : w->err.code;
    }
    for (int32_t i = 0; i < 64; i++) {
        ids[i] = 5 + i;
    }
    bpo_model_get_info(w->model, &info);
    float *logits = calloc((size_t)n * (size_t)info.vocab_size, sizeof *logits);
    if (!logits) {
        return no_memory(w);
    }
    memset(logits, 1,
           /* its pages exist before the clock starts */
           (size_t)n * (size_t)info.vocab_size * sizeof *logits);
    double begin = seconds_now();
    int failed = bpo_logits(p->session, ids, (size_t)n, logits, &w->err);
    json_object_set_new(reply, "s", json_real(seconds_now() - begin));
    free(logits);
    return failed;
}

static int do_close(struct worker *w, const json_t *command) {
    const char *name = json_string_value(json_object_get(command, "in"));
    for (size_t i = w->n_places; name && i-- > 0;) {
        if (strcmp(w->places[i].name, name) == 0) {
            bpo_session_close(w->places[i].session);
            w->places[i] = w->places[--w->n_places];
        }
    }
    return 0;
}

/* Maps the model file again: the same pages that the engine reads. */
static int peaks_open(struct worker *w) {
    struct bpo_model_info info;
    struct stat file;
    int fd = open(w->path, O_RDONLY | O_CLOEXEC);
    void *data = fd >= 0 && fstat(fd, &file) == 0
                     ? mmap(NULL, (size_t)file.st_size, PROT_READ, MAP_SHARED, fd, 0)
                     : MAP_FAILED;
    if (fd >= 0) {
        (void)close(fd);
    }
    if (data == MAP_FAILED) {
        return bpo_fail(&w->err, BPO_ERR_MODEL, NULL, "cannot map %s", w->path);
    }
    bpo_model_get_info(w->model, &info);
    w->pool = threads_create(w->n_threads > 0 ? w->n_threads : threads_default());
    w->peaks =
        w->pool ? peaks_create(w->pool, data, (size_t)file.st_size / 64 * 64, 2 * (size_t)info.dim)
                : NULL;
    return w->peaks ? 0 : no_memory(w);
}

static int do_peaks(struct worker *w, json_t *reply) {
    double gb_s[PEAK_PATTERNS], gflop_s[PEAK_LEVELS] = {0};
    int failed = w->peaks ? 0 : peaks_open(w);
    if (failed) {
        return failed;
    }
    json_t *reads = json_object(), *fma = json_object();
    double begin = seconds_now();
    peaks_read(w->peaks, gb_s);
    peaks_fma(w->peaks, gflop_s);
    json_object_set_new(reply, "s", json_real(seconds_now() - begin));
    for (int i = 0; i < PEAK_PATTERNS; i++) {
        json_object_set_new(reads, peaks_pattern_name(i), json_real(gb_s[i]));
    }
    for (int i = 0; i < peaks_n_levels(w->peaks); i++) {
        json_object_set_new(fma, peaks_level_name(w->peaks, i), json_real(gflop_s[i]));
    }
    json_object_set_new(reply, "read_gb_s", reads);
    json_object_set_new(reply, "fma_gflop_s", fma);
    json_object_set_new(reply, "round_trip_ns", json_real(peaks_round_trip(w->peaks)));
    return 0;
}

/* The kB of a line of /proc/self/status. */
static json_int_t status_bytes(const char *key) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    json_int_t bytes = -1;
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, strlen(key)) == 0) {
            bytes = 1024 * (json_int_t)strtoll(line + strlen(key), NULL, 10);
        }
    }
    if (file) {
        (void)fclose(file);
    }
    return bytes;
}

static int do_memory(json_t *reply) {
    json_object_set_new(reply, "peak_bytes", json_integer(status_bytes("VmHWM:")));
    json_object_set_new(reply, "private_bytes", json_integer(status_bytes("RssAnon:")));
    return 0;
}

static int do_command(struct worker *w, const json_t *command, json_t *reply) {
    const char *what = json_string_value(json_object_get(command, "do"));
    w->n_passes = w->n_tokens = w->n_drafted = w->n_accepted = w->n_kept = 0;
    w->first_token_s = 0;
    what = what ? what : "";
    if (strcmp(what, "open") != 0 && !w->model) {
        return bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "no model is open");
    }
    return strcmp(what, "open") == 0      ? do_open(w, command, reply)
           : strcmp(what, "start") == 0   ? do_start(w, command, reply)
           : strcmp(what, "advance") == 0 ? do_advance(w, command, reply)
           : strcmp(what, "rewrite") == 0 ? do_rewrite(w, command, reply)
           : strcmp(what, "rows") == 0    ? do_rows(w, command, reply)
           : strcmp(what, "close") == 0   ? do_close(w, command)
           : strcmp(what, "peaks") == 0   ? do_peaks(w, reply)
           : strcmp(what, "memory") == 0
               ? do_memory(reply)
               : bpo_fail(&w->err, BPO_ERR_USAGE, NULL, "unknown command");
}

int main(void) {
    static struct worker w;
    json_t *command, *opened = NULL;
    while ((command = json_loadf(stdin, JSON_DISABLE_EOF_CHECK, NULL))) {
        json_t *reply = json_object();
        int failed = do_command(&w, command, reply);
        if (failed) {
            json_object_set_new(reply, "error", json_string(w.err.message));
        }
        json_object_set_new(reply, "passes", json_integer(w.n_passes));
        json_object_set_new(reply, "tokens", json_integer(w.n_tokens));
        (void)json_dumpf(reply, stdout, JSON_COMPACT);
        (void)printf("\n");
        (void)fflush(stdout);
        json_decref(reply);
        if (!opened) {
            opened = command; /* keeps the path alive, which is used later */
        } else {
            json_decref(command);
        }
    }
    for (size_t i = 0; i < w.n_places; i++) {
        bpo_session_close(w.places[i].session);
    }
    bpo_model_close(w.model);
    peaks_destroy(w.peaks);
    threads_destroy(w.pool);
    json_decref(opened);
    return 0;
}

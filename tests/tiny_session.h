/*
 * tiny_session.h - files in /tmp, and a session on a tiny model (tiny_model.h). What cannot be made
 * fails the test, with the message of the error.
 */
#ifndef BPO_TINY_SESSION_H
#define BPO_TINY_SESSION_H

#include <stdio.h>
#include <unistd.h>

#include "assert_ok.h"
#include "bpo.h"
#include "tiny_model.h"

enum { TEMPORARY_PATH = 64 };

/* A path for a file of this process; the test removes the file. */
static inline void temporary_path(char path[TEMPORARY_PATH], const char *name) {
    (void)snprintf(path, TEMPORARY_PATH, "/tmp/bpo-test-%ld-%s", (long)getpid(), name);
}

/* Writes a tiny model to a path. spoil changes it before; NULL: nothing is changed. */
static inline void tiny_create(const char *path, void (*spoil)(struct tiny *t)) {
    struct tiny t = tiny_model();
    if (spoil) {
        spoil(&t);
    }
    tiny_write(&t, path, NULL, 0);
    tiny_free(&t);
}

/* A model, and a session on it. */
struct opened {
    struct bpo_model *model;
    struct bpo_session *session;
};

static inline struct opened open_session(const char *path,
                                         const struct bpo_session_options *options) {
    struct bpo_error err = {0};
    struct opened o = {.model = bpo_model_open(path, &err)};
    assert_ok(!o.model, &err);
    o.session = bpo_session_open(o.model, options, &err);
    assert_ok(!o.session, &err);
    return o;
}

static inline void close_session(struct opened *o) {
    bpo_session_close(o->session);
    bpo_model_close(o->model);
}

#endif

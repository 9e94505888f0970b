/*
 * prefix_cache.h - the template prefix's keys and values, kept for the next process in a file of
 * the user's cache folder: $XDG_CACHE_HOME/bpo or ~/.cache/bpo (macOS: ~/Library/Caches/bpo).
 *
 * A cache is a convenience: a file that is not as it should be is ignored, and a failed write is
 * not an error. A file is found by the hash of its key. It holds the key and a hash of everything
 * (XXH3-64), and both are compared before its content is used. The PREFIX_CACHE_FILES used most
 * recently are kept.
 */
#ifndef BPO_PREFIX_CACHE_H
#define BPO_PREFIX_CACHE_H

#include <stddef.h>
#include <stdint.h>

enum { PREFIX_CACHE_FILES = 8 };

/* What a file's content is a function of. */
struct prefix_key {
    uint64_t model_hash;  /* XXH3-64 of the model file's header, which holds each tensor's hash */
    uint64_t model_bytes; /* the file's size */
    const char *numerics; /* struct backend_info's */
    const int32_t *ids;   /* [n_ids] */
    size_t n_ids;
};

enum prefix_found { PREFIX_FOUND, PREFIX_NONE, PREFIX_BAD };

/* Reads n_bytes of content. PREFIX_NONE: there is no such file, or no folder. PREFIX_BAD: there is
 * one that cannot be used; note [n_note] says, in one line, which and why. The content is undefined
 * unless PREFIX_FOUND. */
enum prefix_found prefix_cache_read(void *content, size_t n_bytes, const struct prefix_key *key,
                                    char *note, size_t n_note);

/* Writes or replaces a file, atomically: two processes at once do no harm. Failures are silent. */
void prefix_cache_write(const void *content, size_t n_bytes, const struct prefix_key *key);

#endif

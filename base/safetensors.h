/*
 * safetensors.h - a model file: safetensors (a JSON header, then the tensors' bytes), mapped into
 * memory. Every number of the header is checked before it is used. This module knows nothing of
 * models: names, shapes and metadata are the caller's business.
 *
 * bpo requires more than safetensors does: dtypes F16 and U8, one or two dimensions, data at
 * multiples of 64 bytes. The format allows no holes, so tensors named "pad.*" (U8, all zeros) fill
 * them; the functions below skip them.
 */
#ifndef BPO_SAFETENSORS_H
#define BPO_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* The hint for a file that is damaged or is not a model file at all. */
#define MODEL_FILE_HINT                                                                            \
    "is it a complete bpo.bin? make it again: export_weights.py HF_DIR -o bpo.bin"

struct safetensors; /* immutable once open, so threads may share it */

struct tensor {
    const char *name; /* belongs to the file's header */
    bool is_f16;      /* otherwise U8 */
    size_t n_dims, shape[2];
    const uint8_t *data; /* n_bytes in the mapped file */
    size_t n_bytes;
};

/* Maps a file and checks that its tensors lie inside it, aligned, without overlaps or holes. The
 * data is not read. Returns NULL with BPO_ERR_MODEL, or BPO_ERR_RESOURCE if the file cannot be
 * mapped. */
struct safetensors *safetensors_open(const char *path, struct bpo_error *err);
void safetensors_close(struct safetensors *file);

/* The whole file as mapped. */
const uint8_t *safetensors_bytes(const struct safetensors *file, size_t *n_bytes);

/* The number of tensors, not counting padding. */
size_t safetensors_count(const struct safetensors *file);

/* Finds a tensor by name; BPO_ERR_MODEL if there is none. */
int safetensors_find(struct tensor *tensor, const struct safetensors *file, const char *name,
                     struct bpo_error *err);

/* Values of the header's __metadata__, which are all strings: as the string itself (it belongs to
 * the file), as a number, or as an integer in [min, max]. BPO_ERR_MODEL if the value is missing or
 * out of range. */
int safetensors_string(const char **value, const struct safetensors *file, const char *key,
                       struct bpo_error *err);
int safetensors_number(double *value, const struct safetensors *file, const char *key, double min,
                       double max, struct bpo_error *err);
int safetensors_integer(int32_t *value, const struct safetensors *file, const char *key,
                        int32_t min, int32_t max, struct bpo_error *err);

/* Reads the whole file and compares it with the hashes (XXH3-64, 16 hex digits) in the metadata:
 * "xxh3.header" is the hash of the header, computed with these digits as zeros; "xxh3.NAME" is a
 * tensor's. progress (may be NULL) gets the bytes done so far and in all. BPO_ERR_MODEL names the
 * first part that differs. */
int safetensors_verify(const struct safetensors *file,
                       void (*progress)(void *user, uint64_t done, uint64_t total), void *user,
                       struct bpo_error *err);

#endif

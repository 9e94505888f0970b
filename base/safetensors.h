/*
 * safetensors.h - a model file: safetensors (a JSON header, then the tensors' bytes), mapped, with
 * every number of its header checked before it is used. Knows nothing of models: names, shapes and
 * metadata are the caller's.
 *
 * What bpo asks for beyond safetensors itself: dtypes F16 and U8, one or two dimensions, data at
 * multiples of 64 bytes. The format allows no holes, so tensors named "pad.*" (U8, zeros) fill
 * them; they count for nothing here.
 */
#ifndef BPO_SAFETENSORS_H
#define BPO_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct safetensors; /* immutable once open: threads may share it */

struct tensor {
    const char *name; /* the header's */
    bool is_f16;      /* else U8 */
    size_t n_dims, shape[2];
    const uint8_t *data; /* n_bytes in the mapped file */
    size_t n_bytes;
};

/* Maps a file and checks how its tensors lie: inside the file, without overlap or hole, aligned.
 * Its data is not read. NULL with BPO_ERR_MODEL, or BPO_ERR_RESOURCE when it cannot be mapped. */
struct safetensors *safetensors_open(const char *path, struct bpo_error *err);
void safetensors_close(struct safetensors *file);

/* The mapped bytes, all of them. */
const uint8_t *safetensors_bytes(const struct safetensors *file, size_t *n_bytes);

/* The number of tensors, padding apart. */
size_t safetensors_count(const struct safetensors *file);

/* A tensor by its name; BPO_ERR_MODEL when it is not there. */
int safetensors_find(struct tensor *tensor, const struct safetensors *file, const char *name,
                     struct bpo_error *err);

/* Values of the header's __metadata__, all of which are strings: as such (the file's), as a number
 * or an integer within [least, most]. BPO_ERR_MODEL when it is not there or out of range. */
int safetensors_string(const char **value, const struct safetensors *file, const char *key,
                       struct bpo_error *err);
int safetensors_number(double *value, const struct safetensors *file, const char *key, double least,
                       double most, struct bpo_error *err);
int safetensors_integer(int32_t *value, const struct safetensors *file, const char *key,
                        int32_t least, int32_t most, struct bpo_error *err);

/* Reads everything and compares it with the hashes (XXH3-64, 16 hex digits) in the metadata:
 * "xxh3.header" is the header's, with these digits taken as zeros, "xxh3.NAME" a tensor's. progress
 * (may be NULL) gets the bytes done and in all. BPO_ERR_MODEL names the first part that differs. */
int safetensors_verify(const struct safetensors *file,
                       void (*progress)(void *user, uint64_t done, uint64_t total), void *user,
                       struct bpo_error *err);

#endif

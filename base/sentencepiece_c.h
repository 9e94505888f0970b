/*
 * sentencepiece_c.h - the smallest C interface to libsentencepiece, which has none of its own. Used
 * by tokenizer.c alone.
 *
 * No C++ exception leaves these functions. Ids must be 0 .. spm_count() - 1: the caller checks
 * them.
 */
#ifndef SENTENCEPIECE_C_H
#define SENTENCEPIECE_C_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct spm;

enum spm_status { SPM_OK, SPM_FAILED, SPM_NO_MEMORY };

/* Opens a serialised model from memory, which may be freed afterwards. On failure a message says
 * why. */
enum spm_status spm_open(struct spm **spm, const void *model, size_t n_bytes, char *message,
                         size_t message_size);
void spm_close(struct spm *spm);

int32_t spm_count(const struct spm *spm);
/* The piece's text, n bytes of UTF-8 with U+2581 for a space; it belongs to the model. */
const char *spm_piece(const struct spm *spm, int32_t id, size_t *n);
bool spm_is_control(const struct spm *spm, int32_t id);
bool spm_is_unknown(const struct spm *spm, int32_t id);
bool spm_is_byte(const struct spm *spm, int32_t id);

/* n_text bytes, NUL and invalid UTF-8 among them, to a malloc'ed array of ids (NULL when there are
 * none). */
enum spm_status spm_encode(const struct spm *spm, const char *text, size_t n_text, int32_t **ids,
                           size_t *n_ids);

/* All ids at once to malloc'ed text, NUL-terminated behind its n_text bytes. The engine decodes
 * piece by piece (tokenizer.h); this is the reference that its tests compare with. */
enum spm_status spm_decode(const struct spm *spm, const int32_t *ids, size_t n_ids, char **text,
                           size_t *n_text);

#ifdef __cplusplus
}
#endif

#endif

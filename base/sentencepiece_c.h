/*
 * sentencepiece_c.h - a minimal C interface to libsentencepiece, which has only a C++ one. Only
 * tokenizer.c uses it.
 *
 * No C++ exception leaves these functions. The caller makes sure that ids are in
 * 0 .. spm_count() - 1.
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

/* Opens a serialised model from memory, which may be freed afterwards. On failure message says
 * why. */
enum spm_status spm_open(struct spm **spm, const void *model, size_t n_bytes, char *message,
                         size_t message_size);
void spm_close(struct spm *spm);

int32_t spm_count(const struct spm *spm);
/* The piece's text: *n bytes of UTF-8, with U+2581 for a space. It belongs to the model. */
const char *spm_piece(const struct spm *spm, int32_t id, size_t *n);
bool spm_is_control(const struct spm *spm, int32_t id);
bool spm_is_unknown(const struct spm *spm, int32_t id);
bool spm_is_byte(const struct spm *spm, int32_t id);

/* Encodes n_text bytes, which may include NUL and invalid UTF-8. *ids is malloc'ed, or NULL if
 * there are no ids. */
enum spm_status spm_encode(const struct spm *spm, const char *text, size_t n_text, int32_t **ids,
                           size_t *n_ids);

/* Decodes all ids at once. *text is malloc'ed: *n_text bytes, then a NUL. The engine decodes piece
 * by piece instead (tokenizer.h); tests compare the two. */
enum spm_status spm_decode(const struct spm *spm, const int32_t *ids, size_t n_ids, char **text,
                           size_t *n_text);

#ifdef __cplusplus
}
#endif

#endif

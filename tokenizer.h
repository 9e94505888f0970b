/*
 * tokenizer.h - text <-> token ids with a SentencePiece model (Kudo and Richardson 2018), through
 * libsentencepiece.
 */
#ifndef BPO_TOKENIZER_H
#define BPO_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/text.h"

struct tokenizer;

/* Opens a serialised SentencePiece model (the bytes of a tokenizer.model; copied, the caller keeps
 * them). NULL with *err filled (BPO_ERR_MODEL, BPO_ERR_RESOURCE) when they are none. */
struct tokenizer *tokenizer_open(const void *model, size_t n_bytes, struct bpo_error *err);
void tokenizer_close(struct tokenizer *t);

/* The number of pieces; ids are 0 .. count - 1. */
int32_t tokenizer_count(const struct tokenizer *t);

/* The id of a byte's own piece ("<0x0A>"), or -1. */
int32_t tokenizer_byte_id(const struct tokenizer *t, uint8_t byte);

/* True for control pieces (BOS, EOS), for the unknown piece and for ids outside the vocabulary
 * (rows of a padded embedding): none of them has text. */
bool tokenizer_is_control(const struct tokenizer *t, int32_t id);

/* Encodes n_text bytes (NUL is a byte like any other; no BOS or EOS is added, control pieces in the
 * text stay plain text). On success *ids is a malloc'ed array of *n_ids ids, the caller's to free
 * (NULL with 0 for the empty text). */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n_text, int32_t **ids,
                     size_t *n_ids, struct bpo_error *err);

/* Streaming detokenisation. Zero-initialise, push ids in order, flush at the end: all that was
 * appended is then, byte for byte, what SentencePiece's Decode gives for all the ids that are not
 * control: the first piece loses its leading space, runs of byte pieces are joined, and bytes that
 * are no UTF-8 become U+FFFD each. A sequence of byte pieces that may yet become a character is
 * held back. */
struct decoder {
    uint8_t held[4];
    uint8_t n_held;
    bool started; /* the first piece has been seen */
};
int decoder_push(struct decoder *d, const struct tokenizer *t, int32_t id, struct text *out,
                 struct bpo_error *err);
int decoder_flush(struct decoder *d, struct text *out, struct bpo_error *err);

#endif

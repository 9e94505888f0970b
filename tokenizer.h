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

/* Opens a serialised SentencePiece model: the bytes of a tokenizer.model, which are copied. Returns
 * NULL and fills *err on failure: BPO_ERR_MODEL if the bytes are not such a model,
 * BPO_ERR_RESOURCE. */
struct tokenizer *tokenizer_open(const void *model, size_t n_bytes, struct bpo_error *err);
void tokenizer_close(struct tokenizer *t);

/* The number of pieces; ids are 0 .. count - 1. */
int32_t tokenizer_count(const struct tokenizer *t);

/* The id of the piece that stands for a byte ("<0x0A>"), or -1. */
int32_t tokenizer_byte_id(const struct tokenizer *t, uint8_t byte);

/* True for ids without text: control pieces (BOS, EOS), the unknown piece and ids outside the
 * vocabulary (rows of a padded embedding). */
bool tokenizer_is_control(const struct tokenizer *t, int32_t id);

/* Encodes n_text bytes, among which NUL is a byte like any other. No BOS or EOS is added, and names
 * of control pieces in the text stay plain text. On success *ids is a malloc'ed array of *n_ids
 * ids, which the caller frees (NULL with 0 ids for the empty text). */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n_text, int32_t **ids,
                     size_t *n_ids, struct bpo_error *err);

/* Streaming detokenisation. Initialise a decoder with zeros, push the ids in order, and flush it at
 * the end. Byte for byte, the appended text is what SentencePiece's Decode returns for all ids that
 * are not control pieces: the first piece loses its leading space, runs of byte pieces are joined,
 * and each byte that is not UTF-8 becomes U+FFFD. Bytes that may still become a character are held
 * back. */
struct decoder {
    uint8_t held[4];
    uint8_t n_held;
    bool started; /* the first piece has been seen */
};
int decoder_push(struct decoder *d, const struct tokenizer *t, int32_t id, struct text *out,
                 struct bpo_error *err);
int decoder_flush(struct decoder *d, struct text *out, struct bpo_error *err);

#endif

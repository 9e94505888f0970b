/*
 * tokenizer.c - see tokenizer.h.
 *
 * libsentencepiece opens models and encodes. Decoding is done here, because the library decodes
 * only whole texts, and the engine streams them.
 *
 * In order: the model's settings, open and close, encode, decode.
 */
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/sentencepiece_c.h"

#define SPACE_SYMBOL "\xE2\x96\x81" /* U+2581: a space in a piece */
#define REPLACEMENT "\xEF\xBF\xBD"  /* U+FFFD: for a byte that is not UTF-8 */

enum piece_kind { PIECE_TEXT, PIECE_BYTE, PIECE_CONTROL };

struct tokenizer {
    struct spm *spm;
    int32_t count;
    int32_t byte_id[256]; /* -1: the model has no byte pieces */
    uint8_t *kind;        /* [count] enum piece_kind */
    uint8_t *byte;        /* [count] the byte that a PIECE_BYTE means */
    bool strips_first;    /* decoding drops a space from the start of the first piece ... */
    bool strips_leading;  /* ... and from the start of each piece until there is some text */
};

/* ---- the model's settings ----
 *
 * Decoding depends on how a model was made, and libsentencepiece does not expose that. A model is a
 * protobuf message (see sentencepiece_model.proto): fields of (number, wire type, value), some of
 * which hold a message themselves. This section parses that format.
 */

struct settings {
    uint64_t model_type; /* 1 unigram, 2 BPE */
    bool whitespace_as_suffix, add_dummy_prefix, remove_extra_whitespaces, has_rules;
};

struct field {
    uint64_t number, value; /* value: a varint's, or the number of bytes of any other field */
    const uint8_t *data;    /* of a length-delimited field, otherwise NULL */
};

static bool read_varint(const uint8_t **at, const uint8_t *end, uint64_t *value) {
    *value = 0;
    for (unsigned shift = 0; shift < 64 && *at < end; shift += 7) {
        uint8_t byte = *(*at)++;
        *value |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) {
            return true;
        }
    }
    return false;
}

static bool read_field(const uint8_t **at, const uint8_t *end, struct field *field) {
    uint64_t key;
    if (!read_varint(at, end, &key)) {
        return false;
    }
    field->number = key >> 3;
    field->data = NULL;
    switch (key & 7) {
    case 0:
        return read_varint(at, end, &field->value);
    case 1:
        field->value = 8;
        break;
    case 2:
        if (!read_varint(at, end, &field->value)) {
            return false;
        }
        field->data = *at;
        break;
    case 5:
        field->value = 4;
        break;
    default: /* groups, which no model uses */
        return false;
    }
    if (field->value > (uint64_t)(end - *at)) {
        return false;
    }
    *at += field->value;
    return true;
}

/* Reads a TrainerSpec (field 2 of the model), a NormalizerSpec (3) or the denormaliser's
 * NormalizerSpec (5). */
static bool read_spec(const struct field *spec, struct settings *settings) {
    const uint8_t *at = spec->data, *end = at + spec->value;
    struct field field;
    while (at < end) {
        if (!read_field(&at, end, &field)) {
            return false;
        }
        if (spec->number == 2 && field.number == 3 && !field.data) {
            settings->model_type = field.value;
        } else if (spec->number == 2 && field.number == 24 && !field.data) {
            settings->whitespace_as_suffix = field.value != 0;
        } else if (spec->number != 2 && field.number == 2 && field.data) {
            settings->has_rules |= field.value > 0; /* precompiled_charsmap */
        } else if (spec->number == 3 && field.number == 3 && !field.data) {
            settings->add_dummy_prefix = field.value != 0;
        } else if (spec->number == 3 && field.number == 4 && !field.data) {
            settings->remove_extra_whitespaces = field.value != 0;
        }
    }
    return true;
}

static bool read_settings(const uint8_t *model, size_t n_bytes, struct settings *settings) {
    *settings = (struct settings){
        .model_type = 1, .add_dummy_prefix = true, .remove_extra_whitespaces = true};
    const uint8_t *at = model, *end = model + n_bytes;
    struct field field;
    while (at < end) {
        if (!read_field(&at, end, &field)) {
            return false;
        }
        bool is_spec = field.number == 2 || field.number == 3 || field.number == 5;
        if (is_spec && field.data && !read_spec(&field, settings)) {
            return false;
        }
    }
    return true;
}

/* Refuses models with features that the engine lacks; no Llama tokenizer uses them. */
static int check_settings(const struct settings *settings, struct bpo_error *err) {
    static const char *hint =
        "a Llama-2 tokenizer is BPE, with normalisation 'identity' and spaces in front of words";
    if (settings->model_type != 1 && settings->model_type != 2) {
        return bpo_fail(err, BPO_ERR_MODEL, hint,
                        "tokenizer: expected a BPE or unigram model, found type %llu",
                        (unsigned long long)settings->model_type);
    }
    if (settings->whitespace_as_suffix) {
        return bpo_fail(err, BPO_ERR_MODEL, hint,
                        "tokenizer: treat_whitespace_as_suffix is not supported");
    }
    if (settings->has_rules) {
        /* Another reason: the library follows offsets in a rule table without checking them. */
        return bpo_fail(err, BPO_ERR_MODEL, hint,
                        "tokenizer: normalisation rules are not supported");
    }
    return 0;
}

/* ---- open and close ---- */

/* Fills the tables by id, because the decoder and the sampler look up every token. */
static int index_pieces(struct tokenizer *t, struct bpo_error *err) {
    size_t n = (size_t)t->count;
    t->kind = calloc(n, 1);
    t->byte = calloc(n, 1);
    if (!t->kind || !t->byte) {
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                        "not enough memory for a tokenizer of %zu pieces", n);
    }
    for (int b = 0; b < 256; b++) {
        t->byte_id[b] = -1;
    }
    for (int32_t id = 0; id < t->count; id++) {
        if (spm_is_control(t->spm, id) || spm_is_unknown(t->spm, id)) {
            t->kind[id] = PIECE_CONTROL;
        } else if (spm_is_byte(t->spm, id)) {
            size_t n_piece;
            /* like "<0x0A>"; the library has checked it */
            const char *piece = spm_piece(t->spm, id, &n_piece);
            unsigned long byte = n_piece == 6 ? strtoul(piece + 3, NULL, 16) : 256;
            if (byte > 255) {
                return bpo_fail(err, BPO_ERR_MODEL, "is it a complete SentencePiece model?",
                                "tokenizer: byte piece %d is malformed", id);
            }
            t->kind[id] = PIECE_BYTE;
            t->byte[id] = (uint8_t)byte;
            t->byte_id[byte] = id;
        }
    }
    return 0;
}

struct tokenizer *tokenizer_open(const void *model, size_t n_bytes, struct bpo_error *err) {
    static const char *hint = "expected the bytes of a SentencePiece tokenizer.model";
    struct settings settings;
    if (n_bytes == 0 || !read_settings(model, n_bytes, &settings)) {
        (void)bpo_fail(err, BPO_ERR_MODEL, hint,
                       "tokenizer: %zu bytes that are not a SentencePiece model", n_bytes);
        return NULL;
    }
    if (check_settings(&settings, err)) {
        return NULL;
    }
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, NULL, "not enough memory to open a tokenizer");
        return NULL;
    }
    t->strips_first = settings.add_dummy_prefix || settings.remove_extra_whitespaces;
    t->strips_leading = settings.remove_extra_whitespaces;

    char message[256];
    enum spm_status status = spm_open(&t->spm, model, n_bytes, message, sizeof message);
    if (status != SPM_OK) {
        if (status == SPM_NO_MEMORY) {
            (void)bpo_fail(err, BPO_ERR_RESOURCE, NULL,
                           "not enough memory to open a tokenizer of %zu bytes", n_bytes);
        } else {
            (void)bpo_fail(err, BPO_ERR_MODEL, hint,
                           "tokenizer: not a valid SentencePiece model: %s", message);
        }
        tokenizer_close(t);
        return NULL;
    }
    t->count = spm_count(t->spm);
    if (index_pieces(t, err)) {
        tokenizer_close(t);
        return NULL;
    }
    return t;
}

void tokenizer_close(struct tokenizer *t) {
    if (t) {
        spm_close(t->spm);
        free(t->kind);
        free(t->byte);
        free(t);
    }
}

int32_t tokenizer_count(const struct tokenizer *t) {
    return t->count;
}

int32_t tokenizer_byte_id(const struct tokenizer *t, uint8_t byte) {
    return t->byte_id[byte];
}

bool tokenizer_is_control(const struct tokenizer *t, int32_t id) {
    return id < 0 || id >= t->count || t->kind[id] == PIECE_CONTROL;
}

/* ---- encode ---- */

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n_text, int32_t **ids,
                     size_t *n_ids, struct bpo_error *err) {
    *ids = NULL;
    *n_ids = 0;
    if (n_text == 0) {
        return 0;
    }
    /* The library counts in int, and one byte may become three (if it is invalid) or, with a space,
     * six. */
    size_t max = INT32_MAX / 8;
    if (n_text > max) {
        return bpo_fail(err, BPO_ERR_INPUT, "shorten the prompt",
                        "a text of %zu bytes is too long: the tokenizer takes at most %zu", n_text,
                        max);
    }
    switch (spm_encode(t->spm, text, n_text, ids, n_ids)) {
    case SPM_OK:
        return 0;
    case SPM_NO_MEMORY:
        return bpo_fail(err, BPO_ERR_RESOURCE, NULL, "not enough memory to tokenize %zu bytes",
                        n_text);
    case SPM_FAILED:
    default:
        return bpo_fail(err, BPO_ERR_RUN, "check the model file with bpo_model_verify",
                        "SentencePiece could not tokenize a text of %zu bytes", n_text);
    }
}

/* ---- decode ---- */

/* Moves complete characters from the held bytes to out, and a U+FFFD for each byte that cannot
 * begin a character. */
static int release_bytes(struct decoder *d, struct text *out, struct bpo_error *err) {
    while (d->n_held > 0) {
        int length = utf8_character((const char *)d->held, d->n_held);
        if (length == 0) {
            return 0;
        }
        int failed = length > 0 ? text_append(out, (const char *)d->held, (size_t)length, err)
                                : text_append(out, REPLACEMENT, sizeof REPLACEMENT - 1, err);
        if (failed) {
            return failed;
        }
        size_t used = length > 0 ? (size_t)length : 1;
        d->n_held = (uint8_t)(d->n_held - used);
        memmove(d->held, d->held + used, d->n_held);
    }
    return 0;
}

/* Appends a piece's text, with a space for each U+2581. */
static int append_piece(struct text *out, const char *piece, size_t n, struct bpo_error *err) {
    const char *end = piece + n, *from = piece;
    size_t n_space = sizeof SPACE_SYMBOL - 1;
    for (const char *at = piece; at < end;) {
        if ((size_t)(end - at) < n_space || memcmp(at, SPACE_SYMBOL, n_space) != 0) {
            at++;
            continue;
        }
        int failed = text_append(out, from, (size_t)(at - from), err);
        if (!failed) {
            failed = text_append(out, " ", 1, err);
        }
        if (failed) {
            return failed;
        }
        at += n_space;
        from = at;
    }
    return text_append(out, from, (size_t)(end - from), err);
}

int decoder_push(struct decoder *d, const struct tokenizer *t, int32_t id, struct text *out,
                 struct bpo_error *err) {
    if (tokenizer_is_control(t, id)) {
        return 0;
    }
    if (t->kind[id] == PIECE_BYTE) {
        d->started = true;
        /* There is room: after release_bytes at most 3 bytes, a character's beginning, are held. */
        d->held[d->n_held++] = t->byte[id];
        return release_bytes(d, out, err);
    }
    int failed = decoder_flush(d, out, err); /* any other piece ends a run of bytes */
    if (failed) {
        return failed;
    }
    size_t n;
    const char *piece = spm_piece(t->spm, id, &n);
    size_t n_space = sizeof SPACE_SYMBOL - 1;
    if (!d->started && t->strips_first && n >= n_space &&
        memcmp(piece, SPACE_SYMBOL, n_space) == 0) {
        piece += n_space;
        n -= n_space;
        /* Encoding put that space in front of the text. A model that removes extra spaces drops
         * those that follow as well. */
        d->started = !t->strips_leading || n > 0;
    } else {
        d->started = true;
    }
    return append_piece(out, piece, n, err);
}

int decoder_flush(struct decoder *d, struct text *out, struct bpo_error *err) {
    while (d->n_held > 0) {
        int failed = text_append(out, REPLACEMENT, sizeof REPLACEMENT - 1, err);
        if (failed) {
            return failed;
        }
        d->n_held--;
    }
    return 0;
}

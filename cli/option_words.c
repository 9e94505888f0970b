/*
 * option_words.c - see option_words.h.
 */
#include "cli/option_words.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* Words of bpo.h and what the command line says instead. A library text uses them bare: without
 * quotes, parentheses or "->". */
static const struct {
    const char *word, *option;
} WORDS[] = {
    /* fields of struct bpo_session_options */
    {"n_positions", "--context"},
    {"n_slots", "--parallel"},
    {"n_threads", "-t"},
    {"no_cache", "--no-cache"},
    /* fields of struct bpo_request */
    {"n_samples", "-n"},
    {"max_new_tokens", "--max-new-tokens"},
    {"top_k", "--top-k"},
    {"top_p", "--top-p"},
    /* fields whose names are plain English too: in hints only */
    {"device", "--device"},
    {"ids", "--tokens"},
    {"lookup", "--lookup"},
    {"matmul", "--matmul"},
    {"mode", "--mode"},
    /* values: "leave device at BPO_DEVICE_AUTO" */
    {"BPO_DEVICE_AUTO", "auto"},
    {"BPO_DEVICE_CPU", "cpu"},
    {"BPO_DEVICE_CUDA", "cuda"},
    {"BPO_MATMUL_AUTO", "auto"},
    {"BPO_MATMUL_OWN", "own"},
    {"BPO_MATMUL_OPENBLAS", "openblas"},
    {"BPO_STABLE", "stable"},
    {"BPO_AGGRESSIVE", "aggressive"},
    /* functions */
    {"bpo_model_open", "-m"},
    {"bpo_model_get_info", "--info"},
    {"bpo_model_verify", "--verify"},
    {"bpo_tokenize", "--tokenize"},
    {"bpo_cpu_info", "--version"},
};

/* What a word may consist of: also dots, slashes, hyphens and quotes, so that a file name, an
 * option or something quoted is not mistaken for a field. */
static const char WORD_CHARACTERS[] =
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-\"";

/* The command line's word for text[0, n), or NULL. */
static const char *option_for(const char *text, size_t n, bool plain_too) {
    for (size_t i = 0; i < sizeof WORDS / sizeof WORDS[0]; i++) {
        const char *word = WORDS[i].word;
        if (strlen(word) == n && memcmp(word, text, n) == 0) {
            return plain_too || strchr(word, '_') ? WORDS[i].option : NULL;
        }
    }
    return NULL;
}

static void translate(char *text, size_t n_bytes, bool plain_too) {
    char out[1024];
    size_t n_out = 0;
    for (const char *at = text; *at;) {
        size_t n = strspn(at, WORD_CHARACTERS);
        while (n > 1 && at[n - 1] == '.') {
            n--; /* the end of a sentence */
        }
        const char *option = n > 0 ? option_for(at, n, plain_too) : NULL;
        n = n > 0 ? n : 1;
        int n_new = snprintf(out + n_out, sizeof out - n_out, "%.*s",
                             (int)(option ? strlen(option) : n), option ? option : at);
        n_out += (size_t)n_new;
        if (n_out >= sizeof out) {
            break; /* snprintf has cut it to fit */
        }
        at += n;
    }
    (void)snprintf(text, n_bytes, "%.*s", (int)n_out, out);
}

void option_words(char *text, size_t n_bytes) {
    translate(text, n_bytes, false);
}

void option_words_in_error(struct bpo_error *err) {
    translate(err->message, sizeof err->message, false);
    translate(err->hint, sizeof err->hint, true);
}

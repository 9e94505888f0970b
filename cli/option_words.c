/*
 * option_words.c - see option_words.h.
 */
#include "cli/option_words.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* Words of bpo.h and what the command line says instead. A library text uses them bare: without
 * quotes, parentheses, "->" or a possessive 's. */
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
    /* fields whose names are plain English too: see means_field */
    {"device", "--device"},
    {"ids", "--tokens"},
    {"lookup", "--lookup"},
    {"matmul", "--matmul"},
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
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-\"'";

/* The command line's word for at[0, n), or NULL. */
static const char *option_for(const char *at, size_t n) {
    for (size_t i = 0; i < sizeof WORDS / sizeof WORDS[0]; i++) {
        if (strlen(WORDS[i].word) == n && memcmp(WORDS[i].word, at, n) == 0) {
            return WORDS[i].option;
        }
    }
    return NULL;
}

/* Whether the word at[0, n) of a text means a field. One with an underscore is not English, so it
 * always does. A plain one does so in a hint ("without lookup, ..."), but not after an article
 * ("the ids of a text"). */
static bool means_field(const char *text, const char *at, size_t n, bool is_hint) {
    static const char *const ARTICLES[] = {"the ", "a ", "no "};
    if (memchr(at, '_', n)) {
        return true;
    }
    for (size_t i = 0; i < sizeof ARTICLES / sizeof ARTICLES[0]; i++) {
        size_t n_article = strlen(ARTICLES[i]), n_before = (size_t)(at - text);
        bool follows = n_before >= n_article &&
                       memcmp(at - n_article, ARTICLES[i], n_article) == 0 &&
                       (n_before == n_article || at[-(ptrdiff_t)n_article - 1] == ' ');
        if (follows) {
            return false;
        }
    }
    return is_hint;
}

static void translate(char *text, size_t n_bytes, bool is_hint) {
    char out[1024];
    size_t n_out = 0;
    for (const char *at = text; *at;) {
        size_t n = strspn(at, WORD_CHARACTERS);
        while (n > 1 && at[n - 1] == '.') {
            n--; /* the end of a sentence */
        }
        const char *option = n > 0 && means_field(text, at, n, is_hint) ? option_for(at, n) : NULL;
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

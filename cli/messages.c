/*
 * messages.c - see messages.h.
 */
#include "cli/messages.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "cli/option_words.h"

#define BOLD "\033[1m"
#define BOLD_RED "\033[1;31m"
#define BOLD_YELLOW "\033[1;33m"

static void print(const char *kind, const char *colour, const char *text) {
    bool coloured = isatty(STDERR_FILENO) && !getenv("NO_COLOR");
    (void)fprintf(stderr, "bpo: %s%s:%s %s\n", coloured ? colour : "", kind,
                  coloured ? "\033[0m" : "", text);
}

void report_note(const char *text) {
    print("note", BOLD, text);
}

void report_warning(const char *text) {
    char own[1024];
    (void)snprintf(own, sizeof own, "%s", text);
    option_words(own, sizeof own);
    print("warning", BOLD_YELLOW, own);
}

int report_error(const struct bpo_error *err) {
    struct bpo_error own = *err;
    option_words_in_error(&own);
    print("error", BOLD_RED, own.message);
    if (own.hint[0]) {
        print("hint", BOLD, own.hint);
    }
    return -own.code;
}

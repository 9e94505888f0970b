/*
 * progress.c - see progress.h.
 */
#include "cli/progress.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/clock.h"

enum { BAR_WIDTH = 24 };

static const char *duration(char text[32], double seconds) {
    unsigned long s = seconds < 1e9 ? (unsigned long)(seconds + 0.5) : 1000000000UL;
    if (s >= 3600) {
        (void)snprintf(text, 32, "%lu h %02lu min", s / 3600, s / 60 % 60);
    } else if (s >= 60) {
        (void)snprintf(text, 32, "%lu min %02lu s", s / 60, s % 60);
    } else {
        (void)snprintf(text, 32, "%.*f s", seconds < 9.95 ? 1 : 0, seconds);
    }
    return text;
}

/* Writes "823 records (41 %), 3.2 records/s, 412 tokens/s, 2 failed, 12 min 05 s left". part is the
 * share of the input that is done, 0 to 1. */
static void progress_line(char text[200], const struct progress *p, double elapsed, double part) {
    char left[48] = "", percent[16] = "", failures[32] = "", time[32];
    double first = p->input_bytes ? (double)p->first_offset / (double)p->input_bytes : 0;
    if (p->input_bytes) {
        (void)snprintf(percent, sizeof percent, " (%.0f %%)", 100 * part);
    }
    if (part > first && part < 1) {
        (void)snprintf(left, sizeof left, ", %s left",
                       duration(time, elapsed * (1 - part) / (part - first)));
    }
    if (p->n_failed > 0) {
        (void)snprintf(failures, sizeof failures, ", %" PRIu64 " failed", p->n_failed);
    }
    (void)snprintf(text, 200, "%" PRIu64 " records%s, %.1f records/s, %.0f tokens/s%s%s",
                   p->n_resumed + p->n_written, percent, (double)p->n_written / elapsed,
                   (double)p->n_tokens / elapsed, failures, left);
}

/* The terminal's columns, without the last one, because some terminals wrap there. */
static int terminal_width(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1 : 79;
}

void progress_begin(struct progress *p, uint64_t offset) {
    p->terminal = isatty(STDERR_FILENO);
    p->begun = p->shown = seconds_now();
    p->first_offset = p->offset = offset;
}

void progress_show(struct progress *p) {
    char text[200], bar[2 * BAR_WIDTH + 8] = "";
    double now = seconds_now(), elapsed = now - p->begun;
    double pause = p->terminal ? 0.2 : p->shown > p->begun ? 60 : 10;
    if (now - p->shown < pause) {
        return;
    }
    p->shown = now;
    double part = p->input_bytes ? (double)p->offset / (double)p->input_bytes : 0;
    progress_line(text, p, elapsed, part);
    if (!p->terminal) {
        (void)fprintf(stderr, "bpo: %s\n", text);
        return;
    }
    int width = terminal_width(), room = width - (int)strlen(text) - 3;
    room = room < BAR_WIDTH ? room : BAR_WIDTH;
    if (p->input_bytes && room >= 5) {
        int n = (int)(part * room + 0.5);
        (void)snprintf(bar, sizeof bar, "[%.*s%.*s] ", n, "########################", room - n,
                       "------------------------");
    }
    int rest = width - (int)strlen(bar);
    (void)fprintf(stderr, "\r%s%-*.*s", bar, rest, rest, text);
}

void progress_clear(const struct progress *p) {
    if (p->terminal && p->shown > p->begun) {
        (void)fprintf(stderr, "\r%*s\r", terminal_width(), "");
    }
}

void progress_summary(const struct progress *p) {
    char time[32];
    double elapsed = seconds_now() - p->begun;
    (void)fprintf(stderr, "bpo: %" PRIu64 " record%s in %s: %.1f records/s, %.0f tokens/s\n",
                  p->n_written, p->n_written == 1 ? "" : "s", duration(time, elapsed),
                  (double)p->n_written / elapsed, (double)p->n_tokens / elapsed);
}

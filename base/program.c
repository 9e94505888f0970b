/*
 * program.c - see program.h.
 */
#include "base/program.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool program_folder(char *folder, size_t n_bytes, const char *argv0) {
    ssize_t n = readlink("/proc/self/exe", folder, n_bytes);
    if (n > 0 && (size_t)n < n_bytes) {
        folder[n] = '\0';
    } else {
        /* no /proc, as on macOS */
        char *path = argv0 && strchr(argv0, '/') ? realpath(argv0, NULL) : NULL;
        int written = path ? snprintf(folder, n_bytes, "%s", path) : -1;
        free(path);
        if (written < 0 || (size_t)written >= n_bytes) {
            return false;
        }
    }
    char *slash = strrchr(folder, '/');
    if (slash) {
        *slash = '\0';
    }
    return slash != NULL;
}

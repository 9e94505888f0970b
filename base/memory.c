/*
 * memory.c - see memory.h. On Linux: /proc/meminfo, and the limits of the process's cgroups.
 * Elsewhere: the physical memory.
 */
#include "base/memory.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cgroup.h"

static size_t min(size_t a, size_t b) {
    return a < b ? a : b;
}

/* The number after a key at the start of a line ("MemAvailable: 123 kB", "inactive_file 123"). If
 * key is "", the number at the start of the first line that has one. SIZE_MAX: no such file or
 * number; a limit of "max" is one such case. */
static size_t read_number(const char *path, const char *key) {
    FILE *file = fopen(path, "r");
    if (!file) {
        return SIZE_MAX;
    }
    char line[256];
    size_t found = SIZE_MAX, n_key = strlen(key);
    while (found == SIZE_MAX && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, n_key) == 0) {
            char *end;
            unsigned long long number = strtoull(line + n_key, &end, 10);
            if (end != line + n_key && number < SIZE_MAX / 1024) {
                found = (size_t)number * (strncmp(end, " kB", 3) == 0 ? 1024 : 1);
            }
        }
    }
    (void)fclose(file);
    return found;
}

/* The files of a cgroup, by version. Memory that only caches files counts as used there, but is
 * reclaimed when needed. */
struct cgroup_files {
    const char *limit, *usage, *cache_key;
};
static const struct cgroup_files cgroup_v1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                              "total_inactive_file "};
static const struct cgroup_files cgroup_v2 = {"memory.max", "memory.current", "inactive_file "};

static size_t cgroup_number(const char *folder, const char *file, const char *key) {
    char path[4096 + 128];
    int n = snprintf(path, sizeof path, "%s/%s", folder, file);
    return n < 0 || (size_t)n >= sizeof path ? SIZE_MAX : read_number(path, key);
}

struct allowance {
    bool free_only; /* what is not used yet, instead of all */
    size_t n_bytes; /* the smallest so far */
};

static void limit_allowance(void *arg, const char *folder, int version) {
    struct allowance *allowance = arg;
    const struct cgroup_files *files = version == 2 ? &cgroup_v2 : &cgroup_v1;
    size_t limit = cgroup_number(folder, files->limit, "");
    if (limit != SIZE_MAX && allowance->free_only) {
        size_t usage = cgroup_number(folder, files->usage, "");
        size_t cache = cgroup_number(folder, "memory.stat", files->cache_key);
        usage = usage == SIZE_MAX ? 0 : usage;
        usage -= cache == SIZE_MAX ? 0 : min(cache, usage);
        limit -= min(limit, usage);
    }
    allowance->n_bytes = min(allowance->n_bytes, limit);
}

/* What the process's cgroups and their parents allow: in all, or what is still free. */
static size_t cgroups_allow(bool free_only) {
    struct allowance allowance = {.free_only = free_only, .n_bytes = SIZE_MAX};
    cgroup_for_each("memory", limit_allowance, &allowance);
    return allowance.n_bytes;
}

size_t memory_total(void) {
    size_t total = SIZE_MAX;
#ifdef _SC_PHYS_PAGES
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    if (pages > 0 && page_bytes > 0) {
        total = (size_t)pages * (size_t)page_bytes;
    }
#endif
    return min(total, cgroups_allow(false));
}

size_t memory_available(void) {
    size_t available = read_number("/proc/meminfo", "MemAvailable:");
    return min(available == SIZE_MAX ? memory_total() : available, cgroups_allow(true));
}

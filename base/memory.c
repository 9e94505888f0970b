/*
 * memory.c - see memory.h. Linux: /proc/meminfo, and the limits of the process's cgroup and its
 * parents (version 2, and the memory controller of version 1). Elsewhere: the physical memory.
 */
#include "base/memory.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* The number behind a key at the start of a line ("MemAvailable: 123 kB", "inactive_file 123"), or
 * of the file's first line when key is "". SIZE_MAX: no such file or key, or "max". */
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

/* Names of one cgroup version's files. Memory that only caches files counts as used there, but is
 * given back when needed. */
struct cgroup_files {
    const char *root, *limit, *usage, *cache_key;
};
static const struct cgroup_files cgroup_v2 = {"/sys/fs/cgroup", "memory.max", "memory.current",
                                              "inactive_file "};
static const struct cgroup_files cgroup_v1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                              "memory.usage_in_bytes", "total_inactive_file "};

static size_t cgroup_number(const struct cgroup_files *files, const char *group, const char *file,
                            const char *key) {
    char path[4096 + 128];
    int n = snprintf(path, sizeof path, "%s%s/%s", files->root, group, file);
    return n < 0 || (size_t)n >= sizeof path ? SIZE_MAX : read_number(path, key);
}

/* The least that a cgroup or one of its parents allows: in all, or still (free_only). */
static size_t cgroup_allows(const struct cgroup_files *files, char *group, int free_only) {
    size_t allowed = SIZE_MAX;
    for (;;) {
        size_t limit = cgroup_number(files, group, files->limit, "");
        if (limit != SIZE_MAX && free_only) {
            size_t usage = cgroup_number(files, group, files->usage, "");
            size_t cache = cgroup_number(files, group, "memory.stat", files->cache_key);
            usage = usage == SIZE_MAX ? 0 : usage;
            usage -= cache == SIZE_MAX ? 0 : least(cache, usage);
            limit -= least(limit, usage);
        }
        allowed = least(allowed, limit);
        char *slash = strrchr(group, '/');
        if (!slash || group[0] == '\0') {
            return allowed;
        }
        *slash = '\0';
    }
}

static size_t cgroups_allow(int free_only) {
    FILE *file = fopen("/proc/self/cgroup", "r"); /* lines of hierarchy:controllers:/path */
    if (!file) {
        return SIZE_MAX;
    }
    char line[4096];
    size_t allowed = SIZE_MAX;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        *group++ = '\0';
        if (controllers[1] == '\0') {
            allowed = least(allowed, cgroup_allows(&cgroup_v2, group, free_only));
        } else if (strstr(controllers, "memory")) {
            allowed = least(allowed, cgroup_allows(&cgroup_v1, group, free_only));
        }
    }
    (void)fclose(file);
    return allowed;
}

size_t memory_total(void) {
    size_t total = SIZE_MAX;
#ifdef _SC_PHYS_PAGES
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    if (pages > 0 && page_bytes > 0) {
        total = (size_t)pages * (size_t)page_bytes;
    }
#endif
    return least(total, cgroups_allow(0));
}

size_t memory_available(void) {
    size_t available = read_number("/proc/meminfo", "MemAvailable:");
    return least(available == SIZE_MAX ? memory_total() : available, cgroups_allow(1));
}

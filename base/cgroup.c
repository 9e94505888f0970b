/*
 * cgroup.c - see cgroup.h. /proc/self/cgroup has a line for each hierarchy:
 * number:controllers:/path. Version 2 has a single hierarchy, which names no controllers.
 */
#include "base/cgroup.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* Is name one of the comma-separated controllers? */
static bool has_controller(const char *controllers, const char *name) {
    size_t n = strlen(name);
    for (const char *at = controllers; (at = strstr(at, name)); at += n) {
        if ((at == controllers || at[-1] == ',') && (at[n] == ',' || at[n] == '\0')) {
            return true;
        }
    }
    return false;
}

/* Calls fn for a group and its parents, up to the root. Shortens group on the way. */
static void walk_up(const char *root, char *group, int version, cgroup_fn *fn, void *arg) {
    if (strcmp(group, "/") == 0) {
        group[0] = '\0';
    }
    for (;;) {
        char folder[4096 + 64];
        int n = snprintf(folder, sizeof folder, "%s%s", root, group);
        if (n > 0 && (size_t)n < sizeof folder) {
            fn(arg, folder, version);
        }
        char *slash = strrchr(group, '/');
        if (!slash) {
            return;
        }
        *slash = '\0';
    }
}

void cgroup_for_each(const char *controller, cgroup_fn *fn, void *arg) {
    FILE *file = fopen("/proc/self/cgroup", "r");
    if (!file) {
        return;
    }
    char line[4096], root[64];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        *group++ = '\0';
        controllers++;
        if (controllers[0] == '\0') {
            walk_up("/sys/fs/cgroup", group, 2, fn, arg);
        } else if (has_controller(controllers, controller)) {
            (void)snprintf(root, sizeof root, "/sys/fs/cgroup/%s", controller);
            walk_up(root, group, 1, fn, arg);
        }
    }
    (void)fclose(file);
}

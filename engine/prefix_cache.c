/*
 * prefix_cache.c - see prefix_cache.h. A file is, in this machine's byte order,
 *
 *     magic, hash of what follows, n_key, n_bytes      8 bytes each
 *     key [n_key], content [n_bytes]
 */
#include "engine/prefix_cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

/* 0xFF, "bpo-kv1"; another byte order reads another number */
#define MAGIC UINT64_C(0x31766b2d6f7062FF)
#define NAME_FORMAT "prefix-%016llx"

enum { N_HEAD = 4, STALE_SECONDS = 3600 };

/* The key as bytes, malloc'ed: sizes, the numerics with its NUL, the ids. */
static uint8_t *key_bytes(const struct prefix_key *key, size_t *n) {
    size_t n_numerics = strlen(key->numerics) + 1, n_ids = key->n_ids * sizeof *key->ids;
    const uint64_t numbers[] = {key->model_hash, key->model_bytes, n_numerics, key->n_ids};
    *n = sizeof numbers + n_numerics + n_ids;
    uint8_t *bytes = malloc(*n);
    if (bytes) {
        memcpy(bytes, numbers, sizeof numbers);
        memcpy(bytes + sizeof numbers, key->numerics, n_numerics);
        memcpy(bytes + sizeof numbers + n_numerics, key->ids, n_ids);
    }
    return bytes;
}

/* The hash of all that follows it: the rest of the head, the key, the content. */
static uint64_t hash_all(const uint64_t *head, const uint8_t *key, const void *content) {
    const uint64_t parts[] = {head[2], head[3], XXH3_64bits(key, head[2]),
                              XXH3_64bits(content, head[3])};
    return XXH3_64bits(parts, sizeof parts);
}

/* Opens the cache folder, making it (and the folder it is in) if asked to; -1 when there is
 * none. */
static int folder_open(bool make) {
    char path[PATH_MAX];
    const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
#ifdef __APPLE__
    const char *inside = "Library/Caches";
#else
    const char *inside = ".cache";
#endif
    /* the standard says: anything but an absolute path is ignored */
    bool named = base && base[0] == '/';
    if (!named && !(home && home[0] == '/')) {
        return -1;
    }
    int n = named ? snprintf(path, sizeof path, "%s", base)
                  : snprintf(path, sizeof path, "%s/%s", home, inside);
    if (n < 0 || (size_t)n + sizeof "/bpo" > sizeof path) {
        return -1;
    }
    if (make) {
        (void)mkdir(path, 0700);
    }
    memcpy(path + n, "/bpo", sizeof "/bpo");
    if (make) {
        (void)mkdir(path, 0700);
    }
    return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static bool read_all(int fd, void *to, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t now = read(fd, (char *)to + done, n - done);
        if (now <= 0 && !(now < 0 && errno == EINTR)) {
            return false;
        }
        done += now > 0 ? (size_t)now : 0;
    }
    return true;
}

static bool write_all(int fd, const void *from, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t now = write(fd, (const char *)from + done, n - done);
        if (now < 0 && errno != EINTR) {
            return false;
        }
        done += now > 0 ? (size_t)now : 0;
    }
    return true;
}

/* Reads and checks an open file. NULL: all is well; else what is wrong. */
static const char *file_read(int fd, void *content, size_t n_bytes, const uint8_t *key,
                             size_t n_key) {
    struct stat st;
    uint64_t head[N_HEAD];
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        return "it is not a regular file";
    }
    if (!read_all(fd, head, sizeof head) || head[0] != MAGIC) {
        return "it was written by another version";
    }
    if (head[2] != n_key || head[3] != n_bytes ||
        (uint64_t)st.st_size != sizeof head + n_key + n_bytes) {
        return "its size is not what it should be";
    }
    uint8_t *found = malloc(n_key);
    bool fine = found && read_all(fd, found, n_key);
    const char *wrong = !fine                            ? "it cannot be read"
                        : memcmp(found, key, n_key) != 0 ? "it belongs to another model"
                                                         : NULL;
    free(found);
    if (wrong) {
        return wrong;
    }
    if (!read_all(fd, content, n_bytes)) {
        return "it cannot be read";
    }
    return hash_all(head, key, content) == head[1] ? NULL : "it is damaged";
}

enum prefix_found prefix_cache_read(void *content, size_t n_bytes, const struct prefix_key *key,
                                    char *note, size_t n_note) {
    size_t n_key;
    char name[64];
    int folder = folder_open(false);
    uint8_t *bytes = folder >= 0 ? key_bytes(key, &n_key) : NULL;
    enum prefix_found found = PREFIX_NONE;
    if (bytes) {
        (void)snprintf(name, sizeof name, NAME_FORMAT,
                       (unsigned long long)XXH3_64bits(bytes, n_key));
        /* a link is not followed, a pipe does not block */
        int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        const char *wrong = NULL;
        if (fd >= 0) {
            wrong = file_read(fd, content, n_bytes, bytes, n_key);
            (void)(wrong ? 0 : futimens(fd, NULL)); /* used now: among the last to be removed */
            (void)close(fd);
        } else if (errno != ENOENT) {
            wrong = errno == ELOOP ? "it is a symbolic link" : strerror(errno);
        }
        found = wrong ? PREFIX_BAD : fd >= 0 ? PREFIX_FOUND : PREFIX_NONE;
        if (wrong) {
            (void)snprintf(note, n_note,
                           "the kept template prefix %s in the cache folder is ignored: %s", name,
                           wrong);
        }
    }
    free(bytes);
    if (folder >= 0) {
        (void)close(folder);
    }
    return found;
}

/* True if a folder's entry is one of our files; rest: what follows its hash, "" unless it is a
 * temporary one. */
static bool is_ours(int folder, const char *name, const char **rest, struct stat *st) {
    size_t n_hash = strncmp(name, "prefix-", 7) == 0 ? strspn(name + 7, "0123456789abcdef") : 0;
    *rest = name + 7 + n_hash;
    return n_hash == 16 && fstatat(folder, name, st, AT_SYMLINK_NOFOLLOW) == 0 &&
           S_ISREG(st->st_mode);
}

/* Looks through the folder once: removes what a killed process left half-written, counts the files,
 * and names the one that was used longest ago. */
static int folder_count(int folder, DIR *list, char oldest[NAME_MAX + 1]) {
    struct timespec when = {0, 0};
    int n_files = 0;
    const struct dirent *entry;
    while ((entry = readdir(list))) { // NOLINT(concurrency-mt-unsafe): the list is our own
        struct stat st;
        const char *rest;
        if (!is_ours(folder, entry->d_name, &rest, &st)) {
            continue;
        }
        if (*rest) {
            if (st.st_mtime + STALE_SECONDS < time(NULL)) {
                (void)unlinkat(folder, entry->d_name, 0);
            }
            continue;
        }
#ifdef __APPLE__
        struct timespec used = st.st_mtimespec;
#else
        struct timespec used = st.st_mtim;
#endif
        if (n_files++ == 0 || used.tv_sec < when.tv_sec ||
            (used.tv_sec == when.tv_sec && used.tv_nsec < when.tv_nsec)) {
            when = used;
            (void)snprintf(oldest, NAME_MAX + 1, "%s", entry->d_name);
        }
    }
    return n_files;
}

/* Removes the files that were used longest ago while there are too many. */
static void folder_tidy(int folder) {
    for (bool again = true; again;) {
        char oldest[NAME_MAX + 1] = "";
        int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
        if (!list) {
            (void)(fd >= 0 && close(fd));
            return;
        }
        again = folder_count(folder, list, oldest) > PREFIX_CACHE_FILES &&
                unlinkat(folder, oldest, 0) == 0;
        (void)closedir(list);
    }
}

void prefix_cache_write(const void *content, size_t n_bytes, const struct prefix_key *key) {
    size_t n_key;
    char name[64], temporary[128];
    int folder = folder_open(true);
    uint8_t *bytes = folder >= 0 ? key_bytes(key, &n_key) : NULL;
    if (bytes) {
        uint64_t head[N_HEAD] = {MAGIC, 0, n_key, n_bytes};
        struct timespec now;
        (void)clock_gettime(CLOCK_REALTIME, &now);
        head[1] = hash_all(head, bytes, content);
        (void)snprintf(name, sizeof name, NAME_FORMAT,
                       (unsigned long long)XXH3_64bits(bytes, n_key));
        (void)snprintf(temporary, sizeof temporary, "%s.%ld-%ld", name, (long)getpid(),
                       now.tv_nsec);
        int fd =
            openat(folder, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        bool fine = fd >= 0 && write_all(fd, head, sizeof head) && write_all(fd, bytes, n_key) &&
                    write_all(fd, content, n_bytes);
        fine = fd >= 0 && close(fd) == 0 && fine;
        if (fine && renameat(folder, temporary, folder, name) == 0) {
            folder_tidy(folder);
        } else if (fd >= 0) {
            (void)unlinkat(folder, temporary, 0);
        }
    }
    free(bytes);
    if (folder >= 0) {
        (void)close(folder);
    }
}

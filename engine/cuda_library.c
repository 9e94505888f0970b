/*
 * backend.c - see backend.h.
 */
#include "base/error.h"
#include "engine/cuda_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef BPO_LIBDIR
#define BPO_LIBDIR "/usr/local/lib/bpo"
#endif

#define LIBRARY "bpo_cuda.so"
#define MAX_PATH 4096

/* The folder that the running program lies in, with a slash at its end; "" if the system does not
 * say. */
static void program_folder(char *folder, size_t n_bytes) {
    ssize_t n = readlink("/proc/self/exe", folder, n_bytes - 1);
    folder[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(folder, '/');
    *(slash ? slash + 1 : folder) = '\0';
}

/* Where the library is, in path [MAX_PATH]; false: nowhere. */
static bool library_find(char *path) {
    char folder[MAX_PATH - 64];
    const char *named = getenv("BPO_CUDA_SO");
    if (named && strcmp(named, "none") == 0) {
        return false;
    }
    if (named && named[0]) {
        /* With a slash, so that dlopen takes it as a path and does not search. */
        (void)snprintf(path, MAX_PATH, "%s%s", strchr(named, '/') ? "" : "./", named);
        return true;
    }
    program_folder(folder, sizeof folder);
    const struct {
        const char *folder, *below;
    } places[] = {{folder, LIBRARY}, {folder, "../lib/bpo/" LIBRARY}, {BPO_LIBDIR, "/" LIBRARY}};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        (void)snprintf(path, MAX_PATH, "%s%s", places[i].folder, places[i].below);
        /* a whole path: never the working directory */
        if (path[0] == '/' && access(path, F_OK) == 0) {
            return true;
        }
    }
    return false;
}

const struct kernels *backend_cuda(bool *found, struct bpo_error *err) {
    char path[MAX_PATH];
    if (!(*found = library_find(path))) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE,
                       "build it with: make cuda (it needs NVIDIA's nvcc), or leave --device out",
                       "no CUDA device: the GPU backend, " LIBRARY ", is not there");
        return NULL;
    }
    /* never closed: CUDA does not take that well */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE,
                       "is CUDA's cuBLAS installed, in the version that it was built with?",
                       "the GPU backend cannot be opened: %s", dlerror());
        return NULL;
    }
    const struct kernels *(*table_of)(void) = NULL;
    void *symbol = dlsym(library, "kernels_cuda");
    /* ISO C has no cast from data to function pointers */
    memcpy(&table_of, &symbol, sizeof symbol);
    const struct kernels *table = table_of ? table_of() : NULL;
    if (!table || table->abi != KERNELS_ABI) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, "build both from the same sources: make cuda",
                       "%s is the GPU backend of another version: ABI %d; this program's is %d",
                       path, table ? table->abi : 0, KERNELS_ABI);
        return NULL;
    }
    return table;
}

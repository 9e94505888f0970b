/*
 * cuda_library.c - see cuda_library.h.
 */
#include "engine/cuda_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/program.h"

#ifndef BPO_LIBDIR
#define BPO_LIBDIR "/usr/local/lib/bpo"
#endif

#define LIBRARY "bpo_cuda.so"
enum { PATH_BYTES = 4096 };

/* Writes the library's path to path [PATH_BYTES]; false if there is none. */
static bool library_find(char *path) {
    char folder[PATH_BYTES - 64];
    const char *named = getenv("BPO_CUDA_SO");
    if (named && strcmp(named, "none") == 0) {
        return false;
    }
    if (named && named[0]) {
        /* dlopen searches the system's folders for a name without a slash. */
        (void)snprintf(path, PATH_BYTES, "%s%s", strchr(named, '/') ? "" : "./", named);
        return true;
    }
    const char *beside = program_folder(folder, sizeof folder, NULL) ? folder : NULL;
    const struct {
        const char *folder, *below;
    } places[] = {{beside, LIBRARY}, {beside, "../lib/bpo/" LIBRARY}, {BPO_LIBDIR, LIBRARY}};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        if (!places[i].folder) {
            continue;
        }
        (void)snprintf(path, PATH_BYTES, "%s/%s", places[i].folder, places[i].below);
        /* A relative path would mean the working directory, where anybody may put a library. */
        if (path[0] == '/' && access(path, F_OK) == 0) {
            return true;
        }
    }
    return false;
}

const struct kernels *backend_cuda(bool *found, struct bpo_error *err) {
    char path[PATH_BYTES];
    *found = library_find(path);
    if (!*found) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE,
                       "build it with: make cuda (needs NVIDIA's nvcc); or leave device at "
                       "BPO_DEVICE_AUTO",
                       "no CUDA device: the GPU backend, " LIBRARY ", is not there");
        return NULL;
    }
    /* It is never closed: CUDA's runtime does not survive being unloaded. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        (void)bpo_fail(
            err, BPO_ERR_RESOURCE,
            "is CUDA's cuBLAS installed, in the version that the backend was built with?",
            "the GPU backend cannot be opened: %s", dlerror());
        return NULL;
    }
    const struct kernels *(*table_of)(void) = NULL;
    void *symbol = dlsym(library, "kernels_cuda");
    /* ISO C has no cast from a data pointer to a function pointer. */
    memcpy(&table_of, &symbol, sizeof symbol);
    const struct kernels *table = table_of ? table_of() : NULL;
    if (!table || table->abi != KERNELS_ABI) {
        (void)bpo_fail(
            err, BPO_ERR_RESOURCE, "build both from the same sources: make cuda",
            "%s is the GPU backend of another version: ABI %d; this program needs ABI %d", path,
            table ? table->abi : 0, KERNELS_ABI);
        return NULL;
    }
    return table;
}

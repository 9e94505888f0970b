/*
 * cuda_library.h - finds the bpo_cuda.so that the tests of the GPU backend run: the one that
 * BPO_CUDA_SO names (in make gpu-check, the real one), or kernels.cu as built for
 * tests/cuda_on_cpu, in the build folder beside the tests.
 */
#ifndef BPO_CUDA_LIBRARY_H
#define BPO_CUDA_LIBRARY_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "assert_ok.h"
#include "engine/cuda_library.h"
#include "cuda_on_cpu/cuda_on_cpu.h"

/* What the tests can control in tests/cuda_on_cpu; all NULL on a GPU. */
struct cuda_on_cpu {
    void (*order)(enum order order, unsigned seed);
    void (*fail_call)(long n);
    void (*crash_kernel)(long n);
    long (*live)(void);
    long (*calls)(void);
    void (*memory)(size_t n_bytes);
};

/* Opens the library for a program of n_tests tests, of which BPO_TEST_FILTER may name those to run;
 * sets BPO_CUDA_SO if it is not set. Where tests/cuda_on_cpu cannot be built, reports the tests as
 * skipped, and why, and returns NULL. */
static inline const struct kernels *cuda_library(struct cuda_on_cpu *knobs, size_t n_tests) {
    static char path[4096 + 64];
    struct bpo_error err = {0};
    bool found;
    memset(knobs, 0, sizeof *knobs);
    const char *named = getenv("BPO_CUDA_SO");
    if (!named || strcmp(named, "none") == 0) { /* "none" is set for all C tests */
        char program[4096];
        ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
        program[n > 0 ? n : 0] = '\0';
        char *slash = strrchr(program, '/');
        *(slash ? slash : program) = '\0';
        (void)snprintf(path, sizeof path, "%s/../cuda_on_cpu/bpo_cuda.so", program);
        if (access(path, F_OK) != 0) {
            printf("skipped: tests/cuda_on_cpu is built on Linux and x86-64 only\n"
                   "[  PASSED  ] 0 test(s).\n[  SKIPPED ] %zu test(s).\n",
                   n_tests);
            return NULL;
        }
        (void)setenv("BPO_CUDA_SO", path, 1);
    }
    const struct kernels *k = backend_cuda(&found, &err);
    if (!k) {
        (void)fprintf(stderr, "%s (%s)\n", err.message, err.hint);
        exit(1);
    }
    void *library = dlopen(getenv("BPO_CUDA_SO"), RTLD_NOW | RTLD_LOCAL);
    const struct {
        void *function;
        const char *name;
    } table[] = {
        {&knobs->order, "cuda_on_cpu_order"},        {&knobs->fail_call, "cuda_on_cpu_fail"},
        {&knobs->crash_kernel, "cuda_on_cpu_fault"}, {&knobs->live, "cuda_on_cpu_live"},
        {&knobs->calls, "cuda_on_cpu_calls"},        {&knobs->memory, "cuda_on_cpu_memory"}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        void *symbol = dlsym(library, table[i].name);
        memcpy(table[i].function, &symbol, sizeof symbol);
    }
    cmocka_set_test_filter(getenv("BPO_TEST_FILTER"));
    return k;
}

#endif

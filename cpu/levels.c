/*
 * levels.c - which SIMD levels this CPU supports, and which of them to run.
 */
#include "cpu/levels.h"

#include <stdlib.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "base/error.h"

const struct cpu_level *cpu_level_simd(size_t i) {
    const struct cpu_level *found[2];
    size_t n = 0;
#if defined(__x86_64__)
    unsigned a, b, c = 0, d; /* some compilers' __builtin_cpu_supports does not know f16c */
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        found[n++] = &cpu_level_avx512;
    }
    if (avx2) {
        found[n++] = &cpu_level_avx2;
    }
#elif defined(__aarch64__)
    found[n++] = &cpu_level_neon;
#endif
    return i < n ? found[i] : NULL;
}

const struct cpu_level *cpu_level_choose(struct bpo_error *err) {
    static const char *const known[] = {"avx512", "avx2", "neon"};
    const struct cpu_level *best = cpu_level_simd(0) ? cpu_level_simd(0) : &cpu_level_scalar;
    const char *wanted = getenv("BPO_SIMD");
    if (!wanted || !*wanted) {
        return best;
    }
    if (strcmp(wanted, cpu_level_scalar.name) == 0) {
        return &cpu_level_scalar;
    }
    for (size_t i = 0; cpu_level_simd(i); i++) {
        if (strcmp(wanted, cpu_level_simd(i)->name) == 0) {
            return cpu_level_simd(i);
        }
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(wanted, known[i]) == 0) {
            (void)bpo_fail(err, BPO_ERR_USAGE, "unset it: the best level is then chosen",
                           "BPO_SIMD is %s, which this CPU does not have; its best is %s", wanted,
                           best->name);
            return NULL;
        }
    }
    (void)bpo_fail(err, BPO_ERR_USAGE,
                   "set it to scalar, avx2, avx512 or neon, or unset it: the best is then chosen",
                   "BPO_SIMD names no SIMD level: '%s'", wanted);
    return NULL;
}

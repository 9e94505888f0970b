/*
 * cuda_on_cpu.h - what the tests can control in tests/cuda_on_cpu, beside CUDA's own API. They look
 * these functions up with dlsym: the library for a real GPU does not have them.
 */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_ON_CPU_API __attribute__((visibility("default")))

enum order { ORDER_FORWARD, ORDER_REVERSE, ORDER_RANDOM };

/* Sets the order in which threads and blocks run from now on. */
CUDA_ON_CPU_API void cuda_on_cpu_order(enum order order, unsigned seed);
/* The n-th API call from now fails; 0: none. */
CUDA_ON_CPU_API void cuda_on_cpu_fail(long n);
/* The n-th kernel from now ends in a sticky error; 0: none, and an earlier error is cleared. */
CUDA_ON_CPU_API void cuda_on_cpu_fault(long n);
/* The number of objects that were created and not destroyed, and of API calls so far. */
CUDA_ON_CPU_API long cuda_on_cpu_live(void);
CUDA_ON_CPU_API long cuda_on_cpu_calls(void);
/* Sets how many bytes of memory the device has. */
CUDA_ON_CPU_API void cuda_on_cpu_memory(size_t n_bytes);

#ifdef __cplusplus
}
#endif

#endif

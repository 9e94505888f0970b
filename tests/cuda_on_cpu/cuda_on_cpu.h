/* cuda_on_cpu.h - what tests may ask of tests/cuda_on_cpu, beside CUDA's own API. They find it in
 * the library by dlsym: on a real GPU it is not there. */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_ON_CPU_API __attribute__((visibility("default")))

enum order { ORDER_FORWARD, ORDER_REVERSE, ORDER_RANDOM };

/* The order in which threads and blocks are run from now on. */
CUDA_ON_CPU_API void cuda_on_cpu_order(enum order order, unsigned seed);
/* The n-th API call from here fails; 0: none. */
CUDA_ON_CPU_API void cuda_on_cpu_fail(long n);
/* The n-th kernel from here ends in a sticky error; 0: none, and an earlier one is forgotten. */
CUDA_ON_CPU_API void cuda_on_cpu_fault(long n);
/* Objects that were created and not destroyed; API calls so far. */
CUDA_ON_CPU_API long cuda_on_cpu_live(void);
CUDA_ON_CPU_API long cuda_on_cpu_calls(void);
/* Bytes of memory that the device has. */
CUDA_ON_CPU_API void cuda_on_cpu_memory(size_t n_bytes);

#ifdef __cplusplus
}
#endif

#endif

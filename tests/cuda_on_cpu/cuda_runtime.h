/*
 * cuda_runtime.h - part of tests/cuda_on_cpu, which executes kernels.cu without a GPU: g++ compiles
 * that very file, with this folder before CUDA's own on the include path. Where it helps to find
 * mistakes, it is stricter than a GPU:
 *
 *   threads     One fiber per CUDA thread; one block after another; the threads of a block run in
 *               forward, reverse or random order. A barrier is a place in the source: if threads
 *               wait at two different barriers, or some have returned, or none can run, that is
 *               reported. A shuffle needs every lane of its mask at the same place.
 *   memory      New device memory and shared memory hold NaN bits. Host code cannot touch device
 *               memory. Copies must lie within their allocations, and the host side of asynchronous
 *               ones in pinned memory.
 *   streams     Are lazy: queued work runs only when something waits for it. So a result that is
 *               used too early is not there yet.
 *   graphs      Are recorded closures. To allocate or to wait while recording is an error, as in
 *               CUDA.
 *   errors      Any API call can be made to fail, and any kernel to end in a sticky error; live
 *               objects are counted.
 *
 * Code that breaks a rule ends the process with a message, so that the tests fail. There are three
 * builds: plain; with the address and undefined behaviour sanitizers; and with the thread
 * sanitizer, to which every CUDA thread is a thread, ordered by barriers only.
 */
#ifndef CUDA_ON_CPU_RUNTIME_H
#define CUDA_ON_CPU_RUNTIME_H

#include <functional>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>

/* ---- the language ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return uint4{x, y, z, w};
}
static inline float2 make_float2(float x, float y) {
    return float2{x, y};
}

namespace cuda_on_cpu {
extern unsigned char *shared; /* the block's */
void barrier(const char *file, int line);
void warp_barrier(unsigned mask, const char *file, int line);
uint64_t shuffle(unsigned mask, uint64_t value, int lane_xor, const char *file, int line);
[[noreturn]] void report(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

template <typename T>
T shuffle_xor(unsigned mask, T value, int lane_xor, const char *file, int line) {
    uint64_t bits = 0;
    static_assert(sizeof value <= sizeof bits, "a shuffle moves 4 or 8 bytes");
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(mask, bits, lane_xor, file, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T> T load_aligned(const T *from, const char *file, int line) {
    if ((uintptr_t)from % sizeof(T) != 0) {
        report(file, line, "misaligned load of %zu bytes", sizeof(T));
    }
    return *from;
}
} /* namespace cuda_on_cpu */

extern dim3 threadIdx, blockIdx, blockDim, gridDim; /* the running thread's */
#define DYNAMIC_SHARED(name) unsigned char *const name = cuda_on_cpu::shared
#define __syncthreads() cuda_on_cpu::barrier(__FILE__, __LINE__)
#define __syncwarp() cuda_on_cpu::warp_barrier(0xffffffffU, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes)                                                        \
    cuda_on_cpu::shuffle_xor(mask, value, lanes, __FILE__, __LINE__)
#define __ldcs(from) cuda_on_cpu::load_aligned(from, __FILE__, __LINE__)

static inline float __uint_as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static inline uint32_t __float_as_uint(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}
static inline float __fmul_rn(float a, float b) {
    return a * b;
}

template <typename T> T atomicAdd(T *at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <typename T, bool MIN> T atomic_extreme(T *at, T value) {
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (
        (MIN ? value < old : old < value) &&
        !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
static inline int atomicMin(int *at, int value) {
    return atomic_extreme<int, true>(at, value);
}
static inline unsigned long long atomicMax(unsigned long long *at, unsigned long long value) {
    return atomic_extreme<unsigned long long, false>(at, value);
}

/* ---- the API ---- */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorIllegalAddress = 700,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorUnknown = 999,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };

typedef struct cuda_on_cpu_stream *cudaStream_t;
typedef struct cuda_on_cpu_event *cudaEvent_t;
typedef struct cuda_on_cpu_graph *cudaGraph_t;
typedef struct cuda_on_cpu_graph_exec *cudaGraphExec_t;

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

const char *cudaGetErrorString(cudaError_t status);
const char *cudaGetErrorName(cudaError_t status);
cudaError_t cudaGetLastError(void);
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr name, int device);
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaMalloc(void **data, size_t n_bytes);
cudaError_t cudaFree(void *data);
cudaError_t cudaHostAlloc(void **data, size_t n_bytes, unsigned flags);
cudaError_t cudaFreeHost(void *data);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                          unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

namespace cuda_on_cpu {
cudaError_t allow_shared(const void *kernel, int n_bytes);
cudaError_t launch(const cudaLaunchConfig_t *config, const void *kernel,
                   std::function<void()> body);
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work); /* for cuBLAS */
/* counts the call, and fails if its turn has come */
cudaError_t api_call(const char *name);
/* reports a range that is not within one allocation */
void device_range(const void *data, size_t n_bytes, const char *what);
void object_count(int change);
bool capturing(cudaStream_t stream);
} /* namespace cuda_on_cpu */

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
    return cuda_on_cpu::allow_shared((const void *)kernel, value);
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                               A &&...arguments) {
    std::tuple<P...> values(std::forward<A>(arguments)...);
    return cuda_on_cpu::launch(config, (const void *)kernel,
                               [kernel, values] { std::apply(kernel, values); });
}

#endif

/*
 * cuda_on_cpu.cc - implements cuda_runtime.h of this folder: fibers for CUDA's threads, lazy
 * streams, graphs, errors, and the one product of cuBLAS. It is never compiled with the thread
 * sanitizer, which is meant to check the kernels' accesses only.
 */
#include "cublas_v2.h"
#include "cuda_fp16.h"
#include "cuda_on_cpu.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN
#endif
#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_ON_CPU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

unsigned char *shared;

void report(const char *file, int line, const char *format, ...) {
    va_list args;
    va_start(args, format);
    (void)fprintf(stderr, "cuda_on_cpu: %s:%d: ", file, line);
    (void)vfprintf(stderr, format, args);
    (void)fprintf(stderr, "\n");
    va_end(args);
    abort();
}

#define DEMAND(condition, ...) ((condition) ? (void)0 : report(__FILE__, __LINE__, __VA_ARGS__))

/* ---- fibers ---- */

enum { MAX_THREADS = 1024, WARP = 32, STACK_BYTES = 256 * 1024 };
enum state { READY, AT_BARRIER, AT_WARP_BARRIER, AT_SHUFFLE, RETURNED };

struct fiber {
    dim3 index;
    enum state state;
    const char *file; /* where it waits */
    int line;
    unsigned mask;
    uint64_t value; /* its value in a shuffle; afterwards the other lane's */
    int lane_xor;
    void *stack, *stack_pointer;
    void *tsan;
    char token; /* its address is a synchronisation point of the thread sanitizer */
};

static struct fiber fibers[MAX_THREADS];
static struct fiber *current;
static const std::function<void()> *body;
static void *scheduler_stack_pointer;
static char block_token, barrier_token;

#if defined(__x86_64__)
/* Saves the registers that a function must preserve, and the stack pointer; continues on the other
 * stack. */
extern "C" void cuda_on_cpu_switch(void **save, void *load);
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
static void *stack_prepare(struct fiber *f, void (*entry)()) {
    /* Staggered: stacks that begin at the same offset in their pages would compete for the same few
     * cache lines. */
    uint64_t *top = (uint64_t *)((char *)f->stack + STACK_BYTES - (f - fibers) * 448 % 16384) - 2;
    *--top = 0; /* aligns the stack as after a call */
    *--top = (uint64_t)entry;
    for (int i = 0; i < 6; i++) {
        *--top = 0;
    }
    return top;
}
#else
#error "tests/cuda_on_cpu can switch stacks on x86-64 only"
#endif

#if defined(CUDA_ON_CPU_ASAN)
static const void *scheduler_bottom;
static size_t scheduler_bytes;
#endif
#if defined(CUDA_ON_CPU_TSAN)
static void *scheduler_tsan;
#endif

/* Switches from the scheduler to a fiber; returns when that waits. */
static void resume(struct fiber *f) {
    current = f;
    threadIdx = f->index;
#if defined(CUDA_ON_CPU_ASAN)
    void *fake;
    __sanitizer_start_switch_fiber(&fake, f->stack, STACK_BYTES);
#endif
#if defined(CUDA_ON_CPU_TSAN)
    __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
#endif
    cuda_on_cpu_switch(&scheduler_stack_pointer, f->stack_pointer);
#if defined(CUDA_ON_CPU_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

/* Switches from the current fiber back to the scheduler. */
static void suspend(enum state state) {
    struct fiber *f = current;
    f->state = state;
#if defined(CUDA_ON_CPU_ASAN)
    void *fake;
    __sanitizer_start_switch_fiber(state == RETURNED ? nullptr : &fake, scheduler_bottom,
                                   scheduler_bytes);
#endif
#if defined(CUDA_ON_CPU_TSAN)
    __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
    cuda_on_cpu_switch(&f->stack_pointer, scheduler_stack_pointer);
#if defined(CUDA_ON_CPU_ASAN)
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_bytes);
#endif
}

static void tsan_release(void *token) {
#if defined(CUDA_ON_CPU_TSAN)
    __tsan_release(token);
#else
    (void)token;
#endif
}

static void tsan_acquire(void *token) {
#if defined(CUDA_ON_CPU_TSAN)
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

static void fiber_entry() {
#if defined(CUDA_ON_CPU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
    tsan_acquire(&block_token);
    (*body)();
    tsan_release(&block_token);
    suspend(RETURNED);
    abort();
}

static void wait_at(enum state state, unsigned mask, const char *file, int line) {
    current->file = file;
    current->line = line;
    current->mask = mask;
    suspend(state);
}

void barrier(const char *file, int line) {
    DEMAND(current, "a barrier outside of a kernel");
    tsan_release(&barrier_token);
    wait_at(AT_BARRIER, 0, file, line);
    tsan_acquire(&barrier_token);
}

void warp_barrier(unsigned mask, const char *file, int line) {
    char *token = &fibers[(current - fibers) / WARP * WARP].token;
    tsan_release(token);
    wait_at(AT_WARP_BARRIER, mask, file, line);
    tsan_acquire(token);
}

uint64_t shuffle(unsigned mask, uint64_t value, int lane_xor, const char *file, int line) {
    current->value = value;
    current->lane_xor = lane_xor;
    wait_at(AT_SHUFFLE, mask, file, line);
    return current->value;
}

/* Whether a whole warp is in the same state at the same place: the usual case. */
static bool warp_is_whole(const struct fiber *warp, int n_lanes) {
    bool same = n_lanes == WARP;
    for (int lane = 0; lane < n_lanes && same; lane++) {
        same = warp[lane].state == warp[0].state && warp[lane].file == warp[0].file &&
               warp[lane].line == warp[0].line && warp[lane].mask == 0xffffffffU;
    }
    return same;
}

/* Whether any lane of a warp waits for others; reports others that do not wait at the same
 * place. */
static bool warp_check(const struct fiber *warp, int n_lanes) {
    bool any = false;
    for (int lane = 0; lane < n_lanes; lane++) {
        const struct fiber *f = &warp[lane];
        if (f->state != AT_SHUFFLE && f->state != AT_WARP_BARRIER) {
            continue;
        }
        if (!(f->mask >> lane & 1)) {
            report(f->file, f->line, "lane %d is not in its own mask %08x", lane, f->mask);
        }
        for (int other = 0; other < WARP; other++) {
            const struct fiber *g = &warp[other];
            if (!(f->mask >> other & 1)) {
                continue;
            }
            if (other >= n_lanes || g->state == RETURNED) {
                report(f->file, f->line,
                       "lane %d waits for lane %d, which has returned or does not exist", lane,
                       other);
            }
            if (g->state != f->state || g->line != f->line || strcmp(g->file, f->file) != 0) {
                report(f->file, f->line, "lane %d waits for lane %d, which waits at line %d", lane,
                       other, g->line);
            }
            if (g->mask != f->mask) {
                report(f->file, f->line, "lanes %d and %d wait with masks %08x and %08x", lane,
                       other, f->mask, g->mask);
            }
        }
        any = true;
    }
    return any;
}

/* Lets the waiting lanes of a warp continue. Returns whether there were any. */
static bool release_warp(struct fiber *warp, int n_lanes) {
    uint64_t values[WARP];
    bool any = warp_is_whole(warp, n_lanes)
                   ? warp->state == AT_SHUFFLE || warp->state == AT_WARP_BARRIER
                   : warp_check(warp, n_lanes);
    for (int lane = 0; lane < n_lanes && any; lane++) {
        values[lane] = warp[lane].value;
    }
    for (int lane = 0; lane < n_lanes && any; lane++) {
        struct fiber *f = &warp[lane];
        if (f->state == AT_SHUFFLE) {
            int from = lane ^ f->lane_xor;
            if (from >= WARP || !(f->mask >> from & 1)) {
                report(f->file, f->line, "lane %d reads lane %d, which takes no part", lane, from);
            }
            f->value = values[from];
        }
        if (f->state == AT_SHUFFLE || f->state == AT_WARP_BARRIER) {
            f->state = READY;
        }
    }
    return any;
}

/* Lets a block continue if all its threads wait at the same barrier. */
static void release_block(int n) {
    const struct fiber *first = nullptr;
    for (int i = 0; i < n; i++) {
        first = fibers[i].state == AT_BARRIER && !first ? &fibers[i] : first;
    }
    for (int i = 0; i < n && first; i++) {
        const struct fiber *f = &fibers[i];
        if (f->state == RETURNED) {
            report(first->file, first->line, "thread %d waits at a barrier; thread %d has returned",
                   (int)(first - fibers), i);
        }
        if (f->line != first->line || strcmp(f->file, first->file) != 0) {
            report(first->file, first->line,
                   "thread %d waits at this barrier, thread %d at that of line %d",
                   (int)(first - fibers), i, f->line);
        }
    }
    for (int i = 0; i < n; i++) {
        if (fibers[i].state == AT_BARRIER) {
            fibers[i].state = READY;
        }
    }
}

static enum order wanted_order;
static uint64_t random_state = 1;

static uint64_t random_bits() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* The numbers 0 .. n - 1, in the order in which threads or blocks will run. */
static void sweep(std::vector<int> &turn, int n) {
    turn.resize((size_t)n);
    for (int i = 0; i < n; i++) {
        turn[(size_t)i] = wanted_order == ORDER_REVERSE ? n - 1 - i : i;
    }
    for (int i = n - 1; i > 0 && wanted_order == ORDER_RANDOM; i--) {
        std::swap(turn[(size_t)i], turn[random_bits() % (uint64_t)(i + 1)]);
    }
}

static void run_block(int n) {
    std::vector<int> turn;
    for (bool any = true; any;) {
        any = false;
        sweep(turn, n);
        for (int i : turn) {
            if (fibers[i].state == READY) {
                resume(&fibers[i]);
            }
        }
        for (int i = 0; i < n; i += WARP) {
            any = release_warp(&fibers[i], std::min((int)WARP, n - i)) || any;
        }
        if (!any) { /* no warp could continue: the threads wait for the whole block */
            release_block(n);
        }
        for (int i = 0; i < n; i++) {
            any = any || fibers[i].state != RETURNED;
        }
    }
}

static void fibers_make(int n) {
    for (int i = 0; i < n; i++) {
        struct fiber *f = &fibers[i];
        if (!f->stack) {
            f->stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            DEMAND(f->stack != MAP_FAILED, "no memory for a stack");
#if defined(CUDA_ON_CPU_TSAN)
            f->tsan = __tsan_create_fiber(0);
#endif
        }
    }
#if defined(CUDA_ON_CPU_TSAN)
    scheduler_tsan = __tsan_get_current_fiber();
#endif
}

/* ---- kernels ---- */

enum { GUARD_BYTES = 64, FILLED_BYTES = 1 << 20 };

/* New memory is NaN, whatever floating-point type it is read as; of a large allocation only the
 * first part. */
static void fill(void *data, size_t n_bytes) {
    memset(data, 0xff, std::min(n_bytes, (size_t)FILLED_BYTES));
}

static void run_kernel(const std::function<void()> &kernel, dim3 grid, dim3 block,
                       size_t shared_bytes) {
    const int n = (int)(block.x * block.y * block.z);
    std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes + GUARD_BYTES + 16]);
    shared = (unsigned char *)(((uintptr_t)memory.get() + 15) / 16 * 16);
    fibers_make(n);
    body = &kernel;
    blockDim = block;
    gridDim = grid;
    std::vector<int> turn;
    sweep(turn, (int)(grid.x * grid.y * grid.z));
    for (int i : turn) {
        unsigned b = (unsigned)i;
        memset(shared, 0xff, shared_bytes + GUARD_BYTES);
#if defined(CUDA_ON_CPU_ASAN)
        __asan_poison_memory_region(shared + (shared_bytes + 7) / 8 * 8, GUARD_BYTES - 8);
#endif
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        for (int t = 0; t < n; t++) {
            unsigned u = (unsigned)t;
            struct fiber *f = &fibers[t];
            f->index = dim3(u % block.x, u / block.x % block.y, u / block.x / block.y);
            f->state = READY;
            f->stack_pointer = stack_prepare(f, fiber_entry);
        }
        tsan_release(&block_token);
        run_block(n);
        tsan_acquire(&block_token);
        current = nullptr;
#if defined(CUDA_ON_CPU_ASAN)
        __asan_unpoison_memory_region(shared, shared_bytes + GUARD_BYTES);
#endif
        for (size_t at = shared_bytes; at < shared_bytes + GUARD_BYTES; at++) {
            DEMAND(shared[at] == 0xff, "a kernel wrote %zu bytes past the end of its shared memory",
                   at - shared_bytes);
        }
    }
}

/* ---- objects ---- */

struct allocation {
    size_t n_bytes, n_mapped;
};

static std::map<char *, allocation> device_memory, pinned_memory;
static size_t device_total = (size_t)1 << 30, device_used;
static int n_devices = 1;
static long n_live, n_calls, fail_in, fault_in;
static cudaError_t last_error, sticky_error;
static std::map<const void *, int> allowed_shared;

void object_count(int change) {
    n_live += change;
}

/* Every API call begins here: it is counted, and may have to fail. */
cudaError_t api_call(const char *name) {
    (void)name;
    n_calls++;
    if (fail_in > 0 && --fail_in == 0) {
        return last_error = cudaErrorUnknown;
    }
    return sticky_error;
}

static cudaError_t failed(cudaError_t status) {
    return last_error = status;
}

#define API(name)                                                                                  \
    do {                                                                                           \
        cudaError_t status_of_call = api_call(name);                                               \
        if (status_of_call != cudaSuccess) {                                                       \
            return status_of_call;                                                                 \
        }                                                                                          \
    } while (0)

static std::map<char *, allocation>::const_iterator find(const std::map<char *, allocation> &memory,
                                                         const void *data, size_t n_bytes) {
    auto at = memory.upper_bound((char *)data);
    if (at == memory.begin()) {
        return memory.end();
    }
    --at;
    return (char *)data + n_bytes <= at->first + at->second.n_bytes ? at : memory.end();
}

void device_range(const void *data, size_t n_bytes, const char *what) {
    DEMAND(find(device_memory, data, n_bytes) != device_memory.end(),
           "%s: %zu bytes at %p are not in one block of device memory", what, n_bytes, data);
}

static void pinned_range(const void *data, size_t n_bytes, const char *what) {
    DEMAND(find(pinned_memory, data, n_bytes) != pinned_memory.end(),
           "%s: %zu bytes at %p are not in pinned memory", what, n_bytes, data);
}

/* Device memory is accessible only while queued work runs. */
static void device_memory_open(bool open) {
    for (const auto &at : device_memory) {
#if defined(CUDA_ON_CPU_ASAN)
        open ? __asan_unpoison_memory_region(at.first, at.second.n_bytes)
             : __asan_poison_memory_region(at.first, at.second.n_bytes);
#else
        DEMAND(mprotect(at.first + at.second.n_bytes - at.second.n_mapped, at.second.n_mapped,
                        open ? PROT_READ | PROT_WRITE : PROT_NONE) == 0,
               "mprotect");
#endif
    }
}

/* ---- streams ---- */

struct work {
    std::function<void()> run;
    cudaEvent_t event;
};

} /* namespace cuda_on_cpu */

using namespace cuda_on_cpu;

struct cuda_on_cpu_event {
    long n_recorded, n_reached;
    cudaStream_t stream;
};

struct cuda_on_cpu_graph {
    std::vector<work> works;
};

struct cuda_on_cpu_graph_exec {
    std::vector<work> works;
};

struct cuda_on_cpu_stream {
    std::deque<work> queue;
    cudaGraph_t capture; /* NULL: not recording */
    bool invalid;
};

namespace cuda_on_cpu {

static cudaStream_t capturing_stream; /* the stream that records, or NULL */

bool capturing(cudaStream_t stream) {
    return stream->capture != nullptr;
}

/* Fails if a stream records, for calls that are not allowed then. */
static cudaError_t not_while_recording() {
    if (capturing_stream) {
        capturing_stream->invalid = true;
        return failed(cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

static cudaError_t add(cudaStream_t stream, work w) {
    DEMAND(stream, "the default stream is not used");
    if (stream->capture) {
        stream->capture->works.push_back(std::move(w));
    } else {
        stream->queue.push_back(std::move(w));
    }
    return cudaSuccess;
}

cudaError_t enqueue(cudaStream_t stream, std::function<void()> run) {
    return add(stream, work{std::move(run), nullptr});
}

/* Runs the queued work, all of it or until the event is reached. */
static cudaError_t run_queue(cudaStream_t stream, cudaEvent_t until) {
    device_memory_open(true);
    while (!stream->queue.empty() && sticky_error == cudaSuccess &&
           !(until && until->n_reached == until->n_recorded)) {
        work w = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (w.event) {
            w.event->n_reached++;
        } else {
            w.run();
        }
    }
    device_memory_open(false);
    return sticky_error ? failed(sticky_error) : cudaSuccess;
}

cudaError_t allow_shared(const void *kernel, int n_bytes) {
    API("cudaFuncSetAttribute");
    if (n_bytes > 99 * 1024) {
        return failed(cudaErrorInvalidValue);
    }
    allowed_shared[kernel] = n_bytes;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t *config, const void *kernel,
                   std::function<void()> run) {
    API("cudaLaunchKernelEx");
    dim3 grid = config->gridDim, block = config->blockDim;
    size_t n_threads = (size_t)block.x * block.y * block.z, shared_bytes = config->dynamicSmemBytes;
    auto allowed = allowed_shared.find(kernel);
    if (n_threads == 0 || n_threads > MAX_THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.y > 65535 || grid.z > 65535 ||
        shared_bytes > (size_t)(allowed == allowed_shared.end()
                                    ? 48 * 1024
                                    : std::max(48 * 1024, allowed->second))) {
        return failed(cudaErrorInvalidConfiguration);
    }
    return enqueue(config->stream, [run, grid, block, shared_bytes] {
        if (fault_in > 0 && --fault_in == 0) {
            sticky_error = cudaErrorIllegalAddress;
            return;
        }
        run_kernel(run, grid, block, shared_bytes);
    });
}

} /* namespace cuda_on_cpu */

/* ---- the API ---- */

static const struct {
    cudaError_t status;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const char *cudaGetErrorString(cudaError_t status) {
    for (const auto &e : errors) {
        if (e.status == status) {
            return e.text;
        }
    }
    return "unrecognized error code";
}

const char *cudaGetErrorName(cudaError_t status) {
    for (const auto &e : errors) {
        if (e.status == status) {
            return e.name;
        }
    }
    return "unrecognized error code";
}

cudaError_t cudaGetLastError(void) {
    cudaError_t status = sticky_error ? sticky_error : last_error;
    last_error = cudaSuccess;
    return status;
}

cudaError_t cudaGetDeviceCount(int *n) {
    if (const char *value = getenv("CUDA_ON_CPU_DEVICES")) {
        n_devices = atoi(value);
    }
    if (const char *value = getenv("CUDA_ON_CPU_MEMORY")) {
        device_total = (size_t)atoll(value);
    }
    if (const char *value = getenv("CUDA_ON_CPU_ORDER")) {
        wanted_order = strcmp(value, "reverse") == 0  ? ORDER_REVERSE
                       : strcmp(value, "random") == 0 ? ORDER_RANDOM
                                                      : ORDER_FORWARD;
    }
    if (const char *value = getenv("CUDA_ON_CPU_FAULT")) {
        fault_in = atol(value);
    }
    API("cudaGetDeviceCount");
    *n = n_devices;
    return n_devices > 0 ? cudaSuccess : failed(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
    API("cudaSetDevice");
    return device < n_devices ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr name, int device) {
    API("cudaDeviceGetAttribute");
    (void)device;
    *value = name == cudaDevAttrMultiProcessorCount      ? 2
             : name == cudaDevAttrComputeCapabilityMajor ? 8
                                                         : 0;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    API("cudaMemGetInfo");
    *available = device_total - device_used;
    *total = device_total;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **data, size_t n_bytes) {
    API("cudaMalloc");
    if (cudaError_t status = not_while_recording()) {
        return status;
    }
    if (n_bytes == 0 || n_bytes > device_total - device_used) {
        return failed(n_bytes == 0 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation);
    }
    allocation a = {n_bytes, 0};
#if defined(CUDA_ON_CPU_ASAN)
    char *at = (char *)aligned_alloc(256, (n_bytes + 255) / 256 * 256);
    DEMAND(at, "out of host memory");
    fill(at, n_bytes);
    a.n_mapped = n_bytes;
    __asan_poison_memory_region(at, n_bytes);
#else
    /* As close to the end of its pages as the alignment of 256 bytes allows; a page that is never
     * accessible follows. */
    size_t page = (size_t)sysconf(_SC_PAGESIZE), rounded = (n_bytes + 255) / 256 * 256;
    size_t n_pages = (rounded + page - 1) / page * page;
    char *base = (char *)mmap(nullptr, n_pages + page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    DEMAND(base != MAP_FAILED, "out of host memory");
    char *at = base + n_pages - rounded;
    fill(at, n_bytes);
    a.n_mapped = n_bytes + (size_t)(at - base);
    DEMAND(mprotect(base, n_pages + page, PROT_NONE) == 0, "mprotect");
#endif
    device_used += n_bytes;
    device_memory[at] = a;
    object_count(1);
    *data = at;
    return cudaSuccess;
}

cudaError_t cudaFree(void *data) {
    cudaError_t status = api_call("cudaFree");
    if (cudaError_t recording = not_while_recording()) {
        return recording;
    }
    auto at = device_memory.find((char *)data);
    DEMAND(at != device_memory.end(), "cudaFree of %p, which is not allocated", data);
    device_used -= at->second.n_bytes;
#if defined(CUDA_ON_CPU_ASAN)
    __asan_unpoison_memory_region(at->first, at->second.n_bytes);
    free(at->first);
#else
    (void)munmap(at->first + at->second.n_bytes - at->second.n_mapped, at->second.n_mapped);
#endif
    device_memory.erase(at);
    object_count(-1);
    return status;
}

cudaError_t cudaHostAlloc(void **data, size_t n_bytes, unsigned flags) {
    API("cudaHostAlloc");
    (void)flags;
    if (cudaError_t status = not_while_recording()) {
        return status;
    }
    char *at = (char *)malloc(n_bytes);
    if (!at) {
        return failed(cudaErrorMemoryAllocation);
    }
    fill(at, n_bytes);
    pinned_memory[at] = allocation{n_bytes, n_bytes};
    object_count(1);
    *data = at;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *data) {
    cudaError_t status = api_call("cudaFreeHost");
    DEMAND(pinned_memory.erase((char *)data) == 1, "cudaFreeHost of %p, which is not allocated",
           data);
    free(data);
    object_count(-1);
    return status;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    API("cudaMemcpyAsync");
    if (kind == cudaMemcpyDeviceToHost) {
        pinned_range(to, n_bytes, "cudaMemcpyAsync");
    } else {
        device_range(to, n_bytes, "cudaMemcpyAsync");
    }
    if (kind == cudaMemcpyHostToDevice) {
        pinned_range(from, n_bytes, "cudaMemcpyAsync");
    } else {
        device_range(from, n_bytes, "cudaMemcpyAsync");
    }
    return enqueue(stream, [to, from, n_bytes] { memmove(to, from, n_bytes); });
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
    API("cudaMemcpy2DAsync");
    DEMAND(kind == cudaMemcpyDeviceToDevice,
           "cudaMemcpy2DAsync: only device to device is supported");
    if (width > to_pitch || width > from_pitch) {
        return failed(cudaErrorInvalidValue);
    }
    device_range(to, (height - 1) * to_pitch + width, "cudaMemcpy2DAsync");
    device_range(from, (height - 1) * from_pitch + width, "cudaMemcpy2DAsync");
    return enqueue(stream, [=] {
        for (size_t i = 0; i < height; i++) {
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
        }
    });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    API("cudaStreamCreateWithFlags");
    (void)flags;
    *stream = new cuda_on_cpu_stream();
    object_count(1);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cudaError_t status = api_call("cudaStreamDestroy");
    DEMAND(!stream->capture, "a stream is destroyed while it records");
    delete stream;
    object_count(-1);
    return status;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    API("cudaStreamSynchronize");
    if (cudaError_t status = not_while_recording()) {
        return status;
    }
    return run_queue(stream, nullptr);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    API("cudaStreamBeginCapture");
    (void)mode;
    DEMAND(!stream->capture && !capturing_stream, "recording has begun already");
    stream->capture = new cuda_on_cpu_graph();
    stream->invalid = false;
    capturing_stream = stream;
    object_count(1);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    cudaError_t status = api_call("cudaStreamEndCapture");
    DEMAND(stream->capture, "recording has not begun");
    *graph = stream->capture;
    stream->capture = nullptr;
    capturing_stream = nullptr;
    if (stream->invalid || status) {
        delete *graph;
        *graph = nullptr;
        object_count(-1);
        return failed(status ? status : cudaErrorStreamCaptureInvalidated);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                          unsigned long long flags) {
    API("cudaGraphInstantiateWithFlags");
    (void)flags;
    *exec = new cuda_on_cpu_graph_exec{graph->works};
    object_count(1);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    API("cudaGraphLaunch");
    for (const work &w : exec->works) {
        (void)add(stream, w);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    cudaError_t status = api_call("cudaGraphDestroy");
    delete graph;
    object_count(-1);
    return status;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    cudaError_t status = api_call("cudaGraphExecDestroy");
    delete exec;
    object_count(-1);
    return status;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    API("cudaEventCreateWithFlags");
    (void)flags;
    *event = new cuda_on_cpu_event();
    object_count(1);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    cudaError_t status = api_call("cudaEventDestroy");
    DEMAND(event->n_reached == event->n_recorded || sticky_error,
           "an event is destroyed before it was reached");
    delete event;
    object_count(-1);
    return status;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    API("cudaEventRecord");
    event->n_recorded++;
    event->stream = stream;
    return add(stream, work{nullptr, event});
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    API("cudaEventSynchronize");
    if (cudaError_t status = not_while_recording()) {
        return status;
    }
    return event->stream ? run_queue(event->stream, event) : cudaSuccess;
}

/* ---- cuBLAS ---- */

struct cublasContext {
    cudaStream_t stream;
    void *workspace;
};

static cublasStatus_t blas_call(const char *name) {
    return api_call(name) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INTERNAL_ERROR;
}

const char *cublasGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
           : status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                                   : "CUBLAS_STATUS_INTERNAL_ERROR";
}

cublasStatus_t cublasCreate(cublasHandle_t *handle) {
    if (cublasStatus_t status = blas_call("cublasCreate")) {
        return status;
    }
    *handle = new cublasContext();
    object_count(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    cublasStatus_t status = blas_call("cublasDestroy");
    delete handle;
    object_count(-1);
    return status;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    handle->workspace = nullptr; /* as cuBLAS documents */
    return blas_call("cublasSetStream");
}

cublasStatus_t cublasGetVersion(cublasHandle_t handle, int *version) {
    (void)handle;
    *version = 0;
    return blas_call("cublasGetVersion");
}

cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *workspace, size_t n_bytes) {
    device_range(workspace, n_bytes, "cublasSetWorkspace");
    DEMAND((uintptr_t)workspace % 256 == 0, "cuBLAS's workspace must be aligned to 256 bytes");
    handle->workspace = workspace;
    return blas_call("cublasSetWorkspace");
}

static float element(const void *x, bool transposed, int row, int col, int ld) {
    return __half2float(((const __half *)x)[transposed ? (size_t)row * (size_t)ld + (size_t)col
                                                       : (size_t)col * (size_t)ld + (size_t)row]);
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa,
                            cublasOperation_t transb, int m, int n, int k, const void *alpha,
                            const void *a, cudaDataType a_type, int lda, const void *b,
                            cudaDataType b_type, int ldb, const void *beta, void *c,
                            cudaDataType c_type, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algo) {
    (void)algo;
    if (cublasStatus_t status = blas_call("cublasGemmEx")) {
        return status;
    }
    if (m <= 0 || n <= 0 || k <= 0 || lda < (transa ? k : m) || ldb < (transb ? n : k) || ldc < m) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    DEMAND(a_type == CUDA_R_16F && b_type == CUDA_R_16F && c_type == CUDA_R_32F &&
               compute == CUBLAS_COMPUTE_32F,
           "cublasGemmEx: only fp16 times fp16 into fp32 is supported");
    DEMAND(handle->workspace || !capturing(handle->stream),
           "cuBLAS would allocate a workspace while the stream records");
    const float one = *(const float *)alpha, old = *(const float *)beta;
    device_range(a, ((size_t)(transa ? m : k) - 1) * (size_t)lda * 2 + (size_t)(transa ? k : m) * 2,
                 "cublasGemmEx, a");
    device_range(b, ((size_t)(transb ? k : n) - 1) * (size_t)ldb * 2 + (size_t)(transb ? n : k) * 2,
                 "cublasGemmEx, b");
    device_range(c, ((size_t)n - 1) * (size_t)ldc * 4 + (size_t)m * 4, "cublasGemmEx, c");
    cudaError_t queued = enqueue(handle->stream, [=] {
        for (int j = 0; j < n; j++) {
            for (int i = 0; i < m; i++) {
                float sum = 0.0f, *to = (float *)c + (size_t)j * (size_t)ldc + (size_t)i;
                for (int l = 0; l < k; l++) {
                    sum += element(a, transa == CUBLAS_OP_T, i, l, lda) *
                           element(b, transb == CUBLAS_OP_T, l, j, ldb);
                }
                *to = one * sum + (old == 0.0f ? 0.0f : old * *to);
            }
        }
    });
    return queued ? CUBLAS_STATUS_INTERNAL_ERROR : CUBLAS_STATUS_SUCCESS;
}

/* ---- cuda_on_cpu.h ---- */

void cuda_on_cpu_order(enum order wanted, unsigned seed) {
    wanted_order = wanted;
    random_state = seed * 2654435761ULL + 88172645463325252ULL;
}

void cuda_on_cpu_fail(long n) {
    fail_in = n;
}

void cuda_on_cpu_fault(long n) {
    fault_in = n;
    sticky_error = cudaSuccess;
    last_error = cudaSuccess;
}

long cuda_on_cpu_live(void) {
    return n_live;
}

long cuda_on_cpu_calls(void) {
    return n_calls;
}

void cuda_on_cpu_memory(size_t n_bytes) {
    device_total = n_bytes;
}

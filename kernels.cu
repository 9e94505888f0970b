/*
 * kernels.cu - the op table for NVIDIA GPUs. The vocabulary, the shapes and the equations are in
 * kernels.h; bpo.c has the same ops in plain scalar C and is the reference, to be read first. This
 * file is built into a library of its own, which engine/cuda_library.c opens at run time.
 *
 * WHAT LIMITS WHAT
 *
 *   decoding       Each weight is used once per row, so a step cannot be faster than the weights
 *                  can be read. matmul_rows reads each weight once for up to 8 rows, 128 bits at a
 *                  time, with several loads in flight in each thread.
 *   prompts        Each weight is used by hundreds of rows: cuBLAS multiplies fp16 into fp32 on the
 *                  tensor cores. The ops before it write its fp16 input beside their fp32 result (a
 *                  "half copy"), so that no extra pass converts it.
 *   attention      One query row reads all its keys and values once: attention_split spreads a
 *                  head's positions over the GPU's processors, and attention_join combines the
 *                  partial results (Flash-Decoding: Dao et al. 2023). The rows of a prompt share
 *                  what they read: attention_tile stages K and V in shared memory for 32 rows.
 *   launches       A step of a few rows is about 300 kernels of a few microseconds each. It is
 *                  recorded once as a CUDA graph, for each of a few row counts, and replayed.
 *                  Tokens, slots and positions are read from device memory, so the same graph
 *                  serves every step.
 *
 * DETERMINISM. No op adds in an order that depends on timing: there are no floating-point atomics,
 * and reductions are fixed trees. The same call with the same input gives the same bytes.
 *
 * Where there is no GPU, the tests compile this file with g++ against tests/cuda_on_cpu, which
 * executes it. This is why kernels are launched through launch() instead of <<< >>>, and why all
 * shared memory is dynamic (DYNAMIC_SHARED).
 *
 * The long kernels are split into functions that a whole block calls together. Those are forced
 * inline, because their accumulators have to stay in registers. Barriers between threads are in the
 * kernels themselves wherever possible, so that the phases of a kernel can be seen at a glance.
 */
#include <cublas_v2.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "kernels.h"
#include "base/error.h"
#include "base/numbers.h"
}

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

/* *_THREADS: threads of a block. */
enum {
    WARP = 32,
    BLOCK_THREADS = 256,  /* where a kernel has no reason for another number */
    DECODE_ROWS = 8,      /* up to here matmul reads the weights itself; beyond, cuBLAS is faster */
    WEIGHT_ROWS = 4,      /* rows of weights that a warp of matmul_rows works on */
    MAX_HEAD_DIM = 256,   /* attention's accumulators are registers */
    SPLIT_THREADS = 128,  /* attention_split */
    SPLIT_POSITIONS = 64, /* positions that attention_split processes together */
    SPLIT_LANES = 8,      /* threads that share a dot product q . k */
    TILE_THREADS = 128,   /* attention_tile */
    TILE_ROWS = 32,       /* query rows of a tile */
    TILE_POSITIONS = 32,  /* positions that are staged together */
    MAX_TILES = 512,      /* per launch: they are passed by value */
    SAMPLE_THREADS = 512, /* sample_row */
    SAMPLE_SMALL = 1024,  /* up to this many candidates are sorted in shared memory */
    MAX_BUCKET = 32,      /* up to here row counts are padded to powers of two, and recorded */
    MAX_RECORDED = 16,    /* steps that are kept as graphs */
    DEFAULT_SHARED = 49152, /* bytes of shared memory that a block may use without opting in */
};

#define ALL_LANES 0xffffffffU

/* Each of the two halves of pinned memory. */
static const size_t STAGE_BYTES = (size_t)8 << 20;
/* cuBLAS's workspace: what NVIDIA recommends for the largest GPUs. */
static const size_t WORKSPACE_BYTES = (size_t)32 << 20;

/* Device memory that an op needs; it grows on demand. */
struct scratch {
    void *data;
    size_t n_bytes;
};

/* A step's shape that has been seen. The first such step runs as it is (libraries initialise
 * themselves, scratch memory grows), the second is recorded, and all later ones are replayed. */
struct recorded {
    uint64_t shape;
    cudaGraphExec_t graph; /* NULL: not recorded yet */
};

struct backend {
    struct bpo_error error; /* the current step's */
    cudaStream_t stream;
    cublasHandle_t blas;
    int n_processors; /* streaming multiprocessors, "SMs" */
    char arch[16];    /* "sm_90" */
    char blas_version[64];
    void *workspace;

    /* Pinned memory that copies pass through: one half is filled while the GPU reads the other. */
    unsigned char *stage[2];
    cudaEvent_t stage_read[2]; /* the GPU has read this half */
    int filling;               /* the half that is being filled */
    size_t n_staged;           /* bytes of it that are in use */

    void (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
    void *weights;

    struct scratch half_copy;      /* the last op's result, as fp16 */
    const float *half_copy_of;     /* that result, or NULL: half_copy holds nothing */
    struct scratch parts;          /* attention_split's partial results */
    struct scratch sample_scratch; /* see struct sample_layout */
    int32_t *found;                /* first_nonfinite's result */

    struct recorded recorded[MAX_RECORDED];
    int n_recorded;
    struct recorded *step; /* the current step's, or NULL */
    bool recording;
};

/* ---------------------------------------------------------------- errors */

static const char *const GPU_HINT =
    "try again with --device cpu; if it happens again, update NVIDIA's driver";

/* Turns the status of a CUDA call into an error; returns 0 on success. what: the op, or what was
 * being done. */
static int check(cudaError_t status, const char *what, struct bpo_error *err) {
    if (status == cudaSuccess) {
        return 0;
    }
    /* CUDA reports an error that is not sticky once more at the next launch, unless it is read. */
    (void)cudaGetLastError();
    int code = status == cudaErrorMemoryAllocation ? BPO_ERR_RESOURCE : BPO_ERR_RUN;
    return bpo_fail(err, code, GPU_HINT, "CUDA, %s: %s (%s)", what, cudaGetErrorString(status),
                    cudaGetErrorName(status));
}

static int check_blas(cublasStatus_t status, const char *what, struct bpo_error *err) {
    if (status == CUBLAS_STATUS_SUCCESS) {
        return 0;
    }
    return bpo_fail(err, BPO_ERR_RUN, GPU_HINT, "cuBLAS, %s: %s", what,
                    cublasGetStatusString(status));
}

/* Launches a kernel in the backend's stream, unless the step has already failed. */
template <typename... Parameters, typename... Arguments>
static void launch(struct backend *b, const char *op, void (*kernel)(Parameters...), dim3 grid,
                   int n_threads, size_t shared_bytes, Arguments... arguments) {
    if (b->error.code || grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return;
    }
    if (shared_bytes > DEFAULT_SHARED) {
        cudaError_t status = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (check(status, op, &b->error)) {
            return;
        }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)n_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = b->stream;
    (void)check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), op, &b->error);
}

static unsigned n_blocks(size_t n, size_t per_block) {
    return (unsigned)((n + per_block - 1) / per_block);
}

/* ---------------------------------------------------------------- inside the kernels */

static __device__ float warp_sum(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        v += __shfl_xor_sync(ALL_LANES, v, step);
    }
    return v;
}

static __device__ float warp_max(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    }
    return v;
}

/* The sum over all threads of a block; every thread gets it. sums [32] is shared memory. */
static __device__ float block_sum(float v, float *sums) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    v = warp_sum(v);
    if (lane == 0) {
        sums[warp] = v;
    }
    __syncthreads();
    return warp_sum(lane < n_warps ? sums[lane] : 0.0f);
}

/* Loads 8 values, from fp16 or fp32; only the first n of them exist (if n < 8), the others become
 * zeros. VECTOR: the address is a multiple of 16 bytes, and n of 8. KEEP: the values will be read
 * again soon; otherwise the caches should not keep them. */
template <bool VECTOR, bool KEEP>
static __device__ void load_8(float *to, const __half *from, int n) {
    if (VECTOR) {
        const uint4 *address = (const uint4 *)from;
        uint4 four = n <= 0 ? make_uint4(0, 0, 0, 0) : KEEP ? *address : __ldcs(address);
        __half2 pairs[4];
        memcpy(pairs, &four, sizeof pairs);
        for (int i = 0; i < 4; i++) {
            float2 pair = __half22float2(pairs[i]);
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        }
    } else {
        for (int i = 0; i < 8; i++) {
            to[i] = i < n ? __half2float(from[i]) : 0.0f;
        }
    }
}

template <bool VECTOR> static __device__ void load_8(float *to, const float *from, int n) {
    if (VECTOR) {
        float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
        memcpy(to, &low, sizeof low);
        memcpy(to + 4, &high, sizeof high);
    } else {
        for (int i = 0; i < 8; i++) {
            to[i] = i < n ? from[i] : 0.0f;
        }
    }
}

/* Writes a result, and its half copy if there is one. */
static __device__ void store(float *y, __half *half_copy, size_t at, float value) {
    y[at] = value;
    if (half_copy) {
        half_copy[at] = __float2half_rn(value);
    }
}

/* kv_at as CUDA's type for fp16. */
static __device__ __forceinline__ __half *kv_half(const struct kv_cache *kv, int slot, int layer,
                                                  int plane, int kv_head, int pos) {
    return (__half *)kv_at(kv, slot, layer, plane, kv_head, pos);
}

/* ---------------------------------------------------------------- kernels: row by row */

/* Grid: rows. */
static __global__ void embed_row(float *x, const char *table, const int32_t *token, int dim,
                                 size_t row_bytes) {
    const __half *from = (const __half *)(table + (size_t)token[blockIdx.x] * row_bytes);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        x[(size_t)blockIdx.x * dim + i] = __half2float(from[i]);
    }
}

/* Grid: rows. */
static __global__ void gather_row(float *y, const float *x, const int32_t *index, int dim) {
    const float *from = x + (size_t)index[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        y[(size_t)blockIdx.x * dim + i] = from[i];
    }
}

/* Grid: rows. */
static __global__ void rmsnorm_row(float *y, __half *half_copy, const float *x, const __half *gain,
                                   int dim, float eps) {
    DYNAMIC_SHARED(shared);
    const float *row = x + (size_t)blockIdx.x * dim;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        squares = fmaf(row[i], row[i], squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, (float *)shared) / (float)dim + eps);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        store(y, half_copy, (size_t)blockIdx.x * dim + i, __half2float(gain[i]) * (row[i] * scale));
    }
}

/* Grid: blocks of columns, rows. */
static __global__ void swiglu_row(float *y, __half *half_copy, const float *gate_up, int ffn_dim) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < ffn_dim) {
        const float *row = gate_up + (size_t)blockIdx.y * 2 * ffn_dim;
        float gate = row[i], up = row[ffn_dim + i];
        store(y, half_copy, (size_t)blockIdx.y * ffn_dim + i, gate / (1.0f + expf(-gate)) * up);
    }
}

/* Grid: rows. */
static __global__ void rope_angles_row(float *angles, const float *inv_freq, const int32_t *pos,
                                       int n_pairs) {
    for (int i = threadIdx.x; i < n_pairs; i += blockDim.x) {
        float *angle = angles + ((size_t)blockIdx.x * n_pairs + i) * 2;
        sincosf(__fmul_rn((float)pos[blockIdx.x], inv_freq[i]), &angle[1], &angle[0]);
    }
}

/* Rotates a query head in place, rotates a key head and writes it to the cache, or writes a value
 * head to the cache. Pairs are (i, i + hd/2): see rope_kv in bpo.c for the reason. Grid: H + 2 HK
 * heads, rows. */
static __global__ void rope_kv_head(float *qkv, const struct kv_cache kv, const float *angles,
                                    const int32_t *slot, const int32_t *pos, int layer,
                                    int n_heads) {
    int head = blockIdx.x, r = blockIdx.y, n_pairs = kv.head_dim / 2,
        plane = head >= n_heads + kv.n_kv_heads;
    float *x = qkv + ((size_t)r * (n_heads + 2 * kv.n_kv_heads) + head) * kv.head_dim;
    if (slot[r] < 0 && head >= n_heads) {
        return; /* an inert row */
    }
    __half *to = NULL;
    if (head >= n_heads) {
        int kv_head = head - n_heads - plane * kv.n_kv_heads;
        to = kv_half(&kv, slot[r], layer, plane, kv_head, pos[r]);
    }
    for (int i = threadIdx.x; i < n_pairs; i += blockDim.x) {
        float a = x[i], b = x[i + n_pairs];
        if (plane == 0) {
            const float *angle = angles + ((size_t)r * n_pairs + i) * 2;
            float cosine = angle[0], sine = angle[1], rotated = a * cosine - b * sine;
            b = b * cosine + a * sine;
            a = rotated;
        }
        if (to) {
            to[i] = __float2half_rn(a);
            to[i + n_pairs] = __float2half_rn(b);
        } else {
            x[i] = a;
            x[i + n_pairs] = b;
        }
    }
}

/* Grid: blocks of values. */
static __global__ void narrow_values(__half *to, const float *from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        to[i] = __float2half_rn(from[i]);
    }
}

/* *found = the first row that holds a NaN or an infinity; the caller has set it to a larger number.
 * Grid: rows. */
static __global__ void nonfinite_row(int32_t *found, const float *x, size_t cols) {
    bool bad = false;
    for (size_t i = threadIdx.x; i < cols; i += blockDim.x) {
        bad = bad || !isfinite(x[blockIdx.x * cols + i]);
    }
    if (bad) {
        atomicMin(found, (int32_t)blockIdx.x);
    }
}

/* ---------------------------------------------------------------- kernel: matmul of few rows */

/*
 * y[r][i] = w_i . x_r for up to R rows, in fp32. A warp computes 4 rows of weights: each of its
 * lanes takes 8 columns, then the 8 that are 256 further on. A lane has 4 loads of 128 bits in
 * flight, a warp 2 KiB, and a processor with 16 warps 32 KiB: more than the memory's latency times
 * its bandwidth per processor. Weights are read once, past the caches; x, which all warps read,
 * stays in the processor's cache. Grid: blocks of BLOCK_THREADS / WARP warps.
 */
template <int R, bool VECTOR>
static __global__ void matmul_rows(float *y, const float *x, const char *w, int n_rows, int n_w,
                                   int cols, size_t row_bytes, bool add) {
    int lane = threadIdx.x % WARP;
    int first = (int)(blockIdx.x * (BLOCK_THREADS / WARP) + threadIdx.x / WARP) * WEIGHT_ROWS;
    if (first >= n_w) {
        return; /* the whole warp */
    }
    float sums[WEIGHT_ROWS][R] = {};
    for (int k = lane * 8; k < cols; k += WARP * 8) {
        float weights[WEIGHT_ROWS][8], values[8];
#pragma unroll
        for (int i = 0; i < WEIGHT_ROWS; i++) {
            int row = first + i < n_w ? first + i : n_w - 1;
            load_8<VECTOR, false>(weights[i], (const __half *)(w + (size_t)row * row_bytes) + k,
                                  cols - k);
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = r < n_rows ? r : n_rows - 1;
            load_8<VECTOR>(values, x + (size_t)row * cols + k, cols - k);
#pragma unroll
            for (int i = 0; i < WEIGHT_ROWS; i++) {
                for (int j = 0; j < 8; j++) {
                    sums[i][r] = fmaf(weights[i][j], values[j], sums[i][r]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < WEIGHT_ROWS; i++) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            float sum = warp_sum(sums[i][r]);
            if (lane == (i * R + r) % WARP && first + i < n_w && r < n_rows) {
                float *to = y + (size_t)r * n_w + first + i;
                *to = add ? *to + sum : sum;
            }
        }
    }
}

/* ---------------------------------------------------------------- kernels: attention, decoding */

/* What attention_split writes about some positions of a head: the largest score, the sum of
 * exp(s - max), and then hd values, the sum of exp(s - max) v. */
enum { PART_MAX, PART_SUM, PART_VALUES };

struct split {
    int n_splits;    /* of a head's positions */
    int n_positions; /* of one split: a multiple of SPLIT_POSITIONS */
};

/* The softmax of a query head over the positions so far (online softmax: Milakov and Gimelshein
 * 2018). */
struct softmax_state {
    float max, sum; /* the largest score, and the sum of exp(s - max) */
    float rescale;  /* the factor for what was accumulated before max last changed */
    float unused;   /* 16 bytes */
};

/* How a block of attention_split shares the values: n_vectors threads, with 8 columns each, make a
 * team, and each of n_teams teams takes every n_teams-th position. The threads that are left over
 * are in team n_teams, which takes none. */
struct teams {
    int n_vectors, n_teams;
    int vector, team; /* this thread's */
};

static __host__ __device__ __forceinline__ struct teams teams_of(int head_dim, int thread) {
    struct teams teams;
    teams.n_vectors = (head_dim + 7) / 8;
    teams.n_teams = SPLIT_THREADS / teams.n_vectors;
    teams.vector = thread % teams.n_vectors;
    teams.team = thread / teams.n_vectors;
    return teams;
}

/* A block: copies its query heads to shared memory, where a set that is not full repeats its first
 * head, and starts their softmax.
 *
 *     q [G][hd], state [G], from [n_h][hd] */
template <int G>
static __device__ __forceinline__ void split_queries(float *q, struct softmax_state *state,
                                                     const float *from, int n_h, int head_dim) {
    for (int i = threadIdx.x; i < G * head_dim; i += SPLIT_THREADS) {
        q[i] = from[i < n_h * head_dim ? i : i % head_dim];
    }
    if (threadIdx.x < G) {
        state[threadIdx.x].max = -INFINITY;
        state[threadIdx.x].sum = 0.0f;
    }
}

/* A block: e = scale q K^T for n positions, of which each is shared by SPLIT_LANES threads; -inf
 * beyond n.
 *
 *     e [G][SPLIT_POSITIONS], q [G][hd], keys [n][hd], one every `stride` */
template <int G, bool VECTOR>
static __device__ __forceinline__ void split_scores(float *e, const float *q, const __half *keys,
                                                    size_t stride, int n, int head_dim,
                                                    float scale) {
    int lane = threadIdx.x % SPLIT_LANES;
    for (int p = threadIdx.x / SPLIT_LANES; p < SPLIT_POSITIONS; p += SPLIT_THREADS / SPLIT_LANES) {
        float sums[G] = {};
        for (int d = lane * 8; d < head_dim && p < n; d += SPLIT_LANES * 8) {
            float key[8], query[8];
            load_8<VECTOR, true>(key, keys + p * stride + d, head_dim - d);
            for (int g = 0; g < G; g++) {
                load_8<VECTOR>(query, q + g * head_dim + d, head_dim - d);
                for (int j = 0; j < 8; j++) {
                    sums[g] = fmaf(query[j], key[j], sums[g]);
                }
            }
        }
        for (int g = 0; g < G; g++) {
            for (int step = SPLIT_LANES / 2; step > 0; step /= 2) {
                sums[g] += __shfl_xor_sync(ALL_LANES, sums[g], step);
            }
            if (lane == 0) {
                e[g * SPLIT_POSITIONS + p] = p < n ? sums[g] * scale : -INFINITY;
            }
        }
    }
}

/* A warp: replaces one head's scores by exp(s - max), and updates its softmax.
 *
 *     e [SPLIT_POSITIONS] */
static __device__ __forceinline__ void split_softmax(float *e, struct softmax_state *state) {
    int lane = threadIdx.x % WARP;
    float low = e[lane], high = e[lane + WARP], before = state->max, sum = state->sum;
    float max = fmaxf(before, warp_max(fmaxf(low, high)));
    low = expf(low - max);
    high = expf(high - max);
    e[lane] = low;
    e[lane + WARP] = high;
    float added = warp_sum(low + high), rescale = expf(before - max);
    __syncwarp(); /* every lane has read the state */
    if (lane == 0) {
        state->max = max;
        state->sum = sum * rescale + added;
        state->rescale = rescale;
    }
}

/* A block: sum = rescale sum + e V over n positions; each thread computes its 8 columns of its
 * team's positions.
 *
 *     sum [G][8], e [G][SPLIT_POSITIONS], state [G], values [n][hd], one every `stride` */
template <int G, bool VECTOR>
static __device__ __forceinline__ void
split_values(float (&sum)[G][8], const float *e, const struct softmax_state *state,
             const __half *values, size_t stride, int n, int head_dim, const struct teams &teams) {
    for (int g = 0; g < G; g++) {
        for (int j = 0; j < 8; j++) {
            sum[g][j] *= state[g].rescale;
        }
    }
    for (int p = teams.team; p < n && teams.team < teams.n_teams; p += teams.n_teams) {
        float value[8];
        load_8<VECTOR, true>(value, values + p * stride + teams.vector * 8,
                             head_dim - teams.vector * 8);
        for (int g = 0; g < G; g++) {
            for (int j = 0; j < 8; j++) {
                sum[g][j] = fmaf(e[g * SPLIT_POSITIONS + p], value[j], sum[g][j]);
            }
        }
    }
}

/* A block: copies the threads' sums to shared memory.
 *
 *     sums [n_teams][G][8 n_vectors], sum [G][8] */
template <int G>
static __device__ __forceinline__ void split_share(float *sums, const float (&sum)[G][8],
                                                   const struct teams &teams) {
    for (int i = 0; i < G * 8 && teams.team < teams.n_teams; i++) {
        sums[((size_t)teams.team * G + i / 8) * teams.n_vectors * 8 + teams.vector * 8 + i % 8] =
            sum[i / 8][i % 8];
    }
}

/* A block: adds the teams' sums, and writes the parts of its n_h heads, which are part_stride
 * apart. */
template <int G>
static __device__ __forceinline__ void
split_write(float *parts, size_t part_stride, const float *sums, const struct softmax_state *state,
            int n_h, int head_dim, const struct teams &teams) {
    for (int i = threadIdx.x; i < n_h * head_dim; i += SPLIT_THREADS) {
        int g = i / head_dim, d = i % head_dim;
        float *part = parts + g * part_stride, total = 0.0f;
        for (int team = 0; team < teams.n_teams; team++) {
            total += sums[((size_t)team * G + g) * teams.n_vectors * 8 + d];
        }
        part[PART_VALUES + d] = total;
        if (d == 0) {
            part[PART_MAX] = state[g].max;
            part[PART_SUM] = state[g].sum;
        }
    }
}

/*
 * One split of a row's positions, for a set of G query heads that share a key/value head. The grid
 * is the same in every step, because it is recorded: blocks whose split begins after the row's
 * position return at once. Grid: splits, HK times the sets of a group, rows.
 *
 *     parts [R][H][n_splits][PART_VALUES + hd], qkv [R][(H + 2 HK) hd]
 */
template <int G, bool VECTOR>
static __global__ void attention_split(float *parts, const float *qkv, const struct kv_cache kv,
                                       const int32_t *slot, const int32_t *pos, int layer,
                                       int n_heads, struct split split, float scale) {
    DYNAMIC_SHARED(shared);
    const int r = blockIdx.z, hd = kv.head_dim, group = n_heads / kv.n_kv_heads,
              n_sets = (group + G - 1) / G;
    const int kv_head = blockIdx.y / n_sets, first = blockIdx.y % n_sets * G,
              n_h = group - first < G ? group - first : G;
    const int begin = blockIdx.x * split.n_positions, rest = pos[r] + 1 - begin;
    const int n = rest < split.n_positions ? rest : split.n_positions;
    if (slot[r] < 0 || n <= 0) {
        return; /* the whole block */
    }
    const struct teams teams = teams_of(hd, threadIdx.x);
    float *q = (float *)shared, *e = q + G * hd;
    struct softmax_state *state = (struct softmax_state *)(e + G * SPLIT_POSITIONS);
    float *sums = (float *)(state + G);
    const size_t head = (size_t)kv_head * group + first, part_floats = PART_VALUES + hd;
    split_queries<G>(q, state, qkv + ((size_t)r * (n_heads + 2 * kv.n_kv_heads) + head) * hd, n_h,
                     hd);
    __syncthreads();
    const size_t stride = kv.pos_bytes / sizeof(__half);
    const __half *keys = kv_half(&kv, slot[r], layer, 0, kv_head, begin),
                 *values = kv_half(&kv, slot[r], layer, 1, kv_head, begin);
    float sum[G][8] = {};
    for (int at = 0; at < n; at += SPLIT_POSITIONS) {
        const int n_p = n - at < SPLIT_POSITIONS ? n - at : SPLIT_POSITIONS,
                  warp = threadIdx.x / WARP;
        split_scores<G, VECTOR>(e, q, keys + at * stride, stride, n_p, hd, scale);
        __syncthreads(); /* the scores are complete */
        if (warp < G) {
            split_softmax(e + warp * SPLIT_POSITIONS, state + warp);
        }
        __syncthreads(); /* the softmax is complete */
        split_values<G, VECTOR>(sum, e, state, values + at * stride, stride, n_p, hd, teams);
        __syncthreads(); /* the next scores overwrite e */
    }
    split_share<G>(sums, sum, teams);
    __syncthreads();
    split_write<G>(parts +
                       (((size_t)r * n_heads + head) * split.n_splits + blockIdx.x) * part_floats,
                   split.n_splits * part_floats, sums, state, n_h, hd, teams);
}

/* y = sum of exp(max_s - M) values_s / sum of exp(max_s - M) sum_s over the splits s of a head,
 * where M is the largest max_s. An inert row gets zeros. Grid: H, rows.
 *
 *     y [R][H][hd], parts [R][H][n_splits][PART_VALUES + hd] */
static __global__ void attention_join(float *y, __half *half_copy, const float *parts,
                                      const int32_t *slot, const int32_t *pos, int head_dim,
                                      struct split split) {
    const size_t head = (size_t)blockIdx.y * gridDim.x + blockIdx.x,
                 stride = PART_VALUES + head_dim;
    const float *part = parts + head * split.n_splits * stride;
    const int n = slot[blockIdx.y] < 0 ? 0 : pos[blockIdx.y] / split.n_positions + 1;
    float max = -INFINITY;
    for (int s = 0; s < n; s++) {
        max = fmaxf(max, part[s * stride + PART_MAX]);
    }
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float sum = 0.0f, value = 0.0f;
        for (int s = 0; s < n; s++) {
            float weight = expf(part[s * stride + PART_MAX] - max);
            sum += weight * part[s * stride + PART_SUM];
            value += weight * part[s * stride + PART_VALUES + d];
        }
        store(y, half_copy, head * head_dim + d, n > 0 ? value / sum : 0.0f);
    }
}

/* ---------------------------------------------------------------- kernel: attention, prompts */

/* Each tile is up to TILE_ROWS rows of one prompt: consecutive rows of the call, at ascending
 * positions of one slot. */
struct tiles {
    uint16_t first[MAX_TILES], n[MAX_TILES];
};

/*
 * A block of attention_tile computes one head of 32 query rows, 32 positions at a time. Its threads
 * (ty, tx) form a grid of 8 x 16. Thread (ty, tx) computes
 *
 *     scores      of the rows ty, ty + 8, ty + 16 and ty + 24, at the positions tx and tx + 16
 *     results     of the same rows, in the columns 2 (tx + 16 c) and 2 (tx + 16 c) + 1 for
 *                 c < COLUMNS = ceil(hd / 32)
 *
 * The 16 threads of a row are half a warp, so that its maximum and sum need no shared memory.
 * Rows in shared memory are hd + 2 wide, which keeps them off each other's banks.
 */
enum { TILE_X = 16, TILE_Y = TILE_THREADS / TILE_X, THREAD_ROWS = TILE_ROWS / TILE_Y };

/* What a thread keeps of its rows, in registers. */
template <int COLUMNS> struct tile_state {
    int pos[THREAD_ROWS];
    float max[THREAD_ROWS]; /* the largest score so far */
    float sum[THREAD_ROWS]; /* of exp(s - max), over this thread's positions only */
    float result[THREAD_ROWS][2 * COLUMNS];
};

/* A block: copies K or V of n positions (zeros beyond n) to shared memory.
 *
 *     to [TILE_POSITIONS][hd + 2], from [n][hd], one every `stride` */
template <bool VECTOR>
static __device__ __forceinline__ void stage_positions(__half *to, const __half *from,
                                                       size_t stride, int n, int head_dim) {
    const int width = VECTOR ? 8 : 2, per_row = head_dim / width;
    for (int i = threadIdx.x; i < TILE_POSITIONS * per_row; i += TILE_THREADS) {
        int p = i / per_row, d = i % per_row * width;
        uint32_t *pairs = (uint32_t *)(to + p * (head_dim + 2) + d);
        if (VECTOR) {
            uint4 four = p < n ? *(const uint4 *)(from + p * stride + d) : make_uint4(0, 0, 0, 0);
            pairs[0] = four.x;
            pairs[1] = four.y;
            pairs[2] = four.z;
            pairs[3] = four.w;
        } else {
            pairs[0] = p < n ? *(const uint32_t *)(from + p * stride + d) : 0;
        }
    }
}

/* A block: copies the head's queries, scaled, to shared memory, and starts the threads' states. A
 * tile that is not full repeats its last row.
 *
 *     q [TILE_ROWS][hd + 2], from [n_rows][hd], one every `stride`, pos [n_rows] */
template <int COLUMNS>
static __device__ __forceinline__ void
tile_begin(struct tile_state<COLUMNS> &state, float *q, const float *from, size_t stride,
           const int32_t *pos, int n_rows, int head_dim, float scale) {
    const int ty = threadIdx.x / TILE_X;
    for (int i = threadIdx.x; i < TILE_ROWS * head_dim; i += TILE_THREADS) {
        int row = i / head_dim < n_rows ? i / head_dim : n_rows - 1;
        q[i / head_dim * (head_dim + 2) + i % head_dim] = from[row * stride + i % head_dim] * scale;
    }
    for (int i = 0; i < THREAD_ROWS; i++) {
        int row = ty + TILE_Y * i < n_rows ? ty + TILE_Y * i : n_rows - 1;
        state.pos[i] = pos[row];
        state.max[i] = -INFINITY;
        state.sum[i] = 0.0f;
        for (int c = 0; c < 2 * COLUMNS; c++) {
            state.result[i][c] = 0.0f;
        }
    }
}

/* A thread: s = q K^T for its rows and positions.
 *
 *     s [THREAD_ROWS][2], q [TILE_ROWS][hd + 2], k [TILE_POSITIONS][hd + 2] */
static __device__ __forceinline__ void tile_scores(float (&s)[THREAD_ROWS][2], const float *q,
                                                   const __half *k, int head_dim) {
    const int tx = threadIdx.x % TILE_X, ty = threadIdx.x / TILE_X, width = head_dim + 2;
    for (int d = 0; d < head_dim; d += 2) {
        float2 key[2];
        for (int j = 0; j < 2; j++) {
            key[j] = __half22float2(*(const __half2 *)(k + (tx + TILE_X * j) * width + d));
        }
        for (int i = 0; i < THREAD_ROWS; i++) {
            float2 query = *(const float2 *)(q + (ty + TILE_Y * i) * width + d);
            for (int j = 0; j < 2; j++) {
                s[i][j] = fmaf(query.y, key[j].y, fmaf(query.x, key[j].x, s[i][j]));
            }
        }
    }
}

/* Half a warp per row: the causal mask, then the weights p = exp(s - max), with max, sum and result
 * brought up to date (online softmax). at: the first of the positions.
 *
 *     p [TILE_ROWS][TILE_POSITIONS + 1], s [THREAD_ROWS][2] */
template <int COLUMNS>
static __device__ __forceinline__ void tile_softmax(struct tile_state<COLUMNS> &state, float *p,
                                                    float (&s)[THREAD_ROWS][2], int at) {
    const int tx = threadIdx.x % TILE_X, ty = threadIdx.x / TILE_X;
    for (int i = 0; i < THREAD_ROWS; i++) {
        for (int j = 0; j < 2; j++) {
            s[i][j] = at + tx + TILE_X * j <= state.pos[i] ? s[i][j] : -INFINITY;
        }
        float max = fmaxf(s[i][0], s[i][1]);
        for (int step = TILE_X / 2; step > 0; step /= 2) {
            max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, step));
        }
        max = fmaxf(state.max[i], max);
        float rescale = expf(state.max[i] - max), low = expf(s[i][0] - max),
              high = expf(s[i][1] - max);
        p[(ty + TILE_Y * i) * (TILE_POSITIONS + 1) + tx] = low;
        p[(ty + TILE_Y * i) * (TILE_POSITIONS + 1) + tx + TILE_X] = high;
        state.max[i] = max;
        state.sum[i] = state.sum[i] * rescale + (low + high);
        for (int c = 0; c < 2 * COLUMNS; c++) {
            state.result[i][c] *= rescale;
        }
    }
}

/* A thread: result += p V for its rows and columns.
 *
 *     p [TILE_ROWS][TILE_POSITIONS + 1], v [TILE_POSITIONS][hd + 2] */
template <int COLUMNS>
static __device__ __forceinline__ void tile_values(struct tile_state<COLUMNS> &state,
                                                   const float *p, const __half *v, int head_dim) {
    const int tx = threadIdx.x % TILE_X, ty = threadIdx.x / TILE_X, width = head_dim + 2;
    for (int j = 0; j < TILE_POSITIONS; j++) {
        for (int c = 0; c < COLUMNS; c++) {
            int column = 2 * (tx + TILE_X * c);
            float2 value = column < head_dim
                               ? __half22float2(*(const __half2 *)(v + j * width + column))
                               : make_float2(0.0f, 0.0f);
            for (int i = 0; i < THREAD_ROWS; i++) {
                float weight = p[(ty + TILE_Y * i) * (TILE_POSITIONS + 1) + j];
                state.result[i][2 * c] = fmaf(weight, value.x, state.result[i][2 * c]);
                state.result[i][2 * c + 1] = fmaf(weight, value.y, state.result[i][2 * c + 1]);
            }
        }
    }
}

/* Half a warp per row: y = result / sum. Row r of the tile is at (at + r stride) in y and its half
 * copy. */
template <int COLUMNS>
static __device__ __forceinline__ void tile_write(float *y, __half *half_copy, size_t at,
                                                  size_t stride, struct tile_state<COLUMNS> &state,
                                                  int n_rows, int head_dim) {
    const int tx = threadIdx.x % TILE_X, ty = threadIdx.x / TILE_X;
    for (int i = 0; i < THREAD_ROWS; i++) {
        const int row = ty + TILE_Y * i;
        for (int step = TILE_X / 2; step > 0; step /= 2) {
            state.sum[i] += __shfl_xor_sync(ALL_LANES, state.sum[i], step);
        }
        for (int c = 0; c < 2 * COLUMNS; c++) {
            int column = 2 * (tx + TILE_X * (c / 2)) + c % 2;
            if (column < head_dim && row < n_rows) {
                store(y, half_copy, at + row * stride + column, state.result[i][c] / state.sum[i]);
            }
        }
    }
}

/* One head of one tile. Grid: H, tiles.
 *
 *     y [R][H hd], qkv [R][(H + 2 HK) hd] */
template <int COLUMNS, bool VECTOR>
static __global__ void attention_tile(float *y, __half *half_copy, const float *qkv,
                                      const struct kv_cache kv, const int32_t *slot,
                                      const int32_t *pos, const struct tiles tiles, int layer,
                                      int n_heads, float scale) {
    DYNAMIC_SHARED(shared);
    const int hd = kv.head_dim, head = blockIdx.x, kv_head = head / (n_heads / kv.n_kv_heads);
    const int first = tiles.first[blockIdx.y], n_rows = tiles.n[blockIdx.y],
              n_p = pos[first + n_rows - 1] + 1;
    const size_t row_floats = (size_t)(n_heads + 2 * kv.n_kv_heads) * hd,
                 stride = kv.pos_bytes / sizeof(__half);
    float *q = (float *)shared, *p = q + TILE_ROWS * (hd + 2);
    __half *k = (__half *)(p + TILE_ROWS * (TILE_POSITIONS + 1)),
           *v = k + TILE_POSITIONS * (hd + 2);
    struct tile_state<COLUMNS> state;
    tile_begin(state, q, qkv + first * row_floats + (size_t)head * hd, row_floats, pos + first,
               n_rows, hd, scale);
    for (int at = 0; at < n_p; at += TILE_POSITIONS) {
        float s[THREAD_ROWS][2] = {};
        __syncthreads(); /* the last positions have been read, and q has been written */
        stage_positions<VECTOR>(k, kv_half(&kv, slot[first], layer, 0, kv_head, at), stride,
                                n_p - at, hd);
        stage_positions<VECTOR>(v, kv_half(&kv, slot[first], layer, 1, kv_head, at), stride,
                                n_p - at, hd);
        __syncthreads(); /* K and V are complete */
        tile_scores(s, q, k, hd);
        tile_softmax(state, p, s, at);
        __syncwarp(); /* a row of p is written and read by the same half of a warp */
        tile_values(state, p, v, hd);
    }
    tile_write(y, half_copy, ((size_t)first * n_heads + head) * hd, (size_t)n_heads * hd, state,
               n_rows, hd);
}

/* ---------------------------------------------------------------- kernel: the sampler */

/* The sampling parameters of one row; see struct sample_params. */
struct draw {
    double u;
    float temperature, top_p;
    int32_t top_k, n_forbidden, first_forbidden;
};

static __device__ float scaled_logit(const float *logits, int id, const struct draw &draw) {
    return logits[id] / (draw.temperature > 0.0f ? draw.temperature : 1.0f);
}

/* An integer that orders ids as their scaled logits do; 0 if the id must not be drawn. */
static __device__ uint32_t rank_key(const float *logits, int id, const struct draw &draw,
                                    const int32_t *forbidden) {
    for (int i = 0; i < draw.n_forbidden; i++) {
        if (forbidden[draw.first_forbidden + i] == id) {
            return 0;
        }
    }
    float x = scaled_logit(logits, id, draw) + 0.0f; /* -0 and 0 are equal */
    uint32_t bits = bits_of(x);
    return x > -INFINITY ? (bits & 0x80000000U ? ~bits : bits | 0x80000000U) : 0;
}

/* Ranks are by key; of equal keys the lower id comes first. */
static __device__ unsigned long long rank_of(uint32_t key, int id) {
    return (unsigned long long)key << 32 | (0xffffffffU - (uint32_t)id);
}

static __device__ int rank_id(unsigned long long rank) {
    return (int)(0xffffffffU - (uint32_t)rank);
}

/* A block's shared memory. */
struct sample_shared {
    unsigned long long sorted[SAMPLE_SMALL];
    float mass[SAMPLE_SMALL];
    unsigned long long best;
    int histogram[256];
    int n_allowed, n_above, n_listed, nonfinite, rest;
    uint32_t threshold;
};

/* A block: how many ids are allowed, which of them ranks first, and whether a logit is not
 * finite. */
static __device__ void sample_survey(struct sample_shared *s, const float *logits, int vocab,
                                     const struct draw &draw, const int32_t *forbidden) {
    unsigned long long best = 0;
    int n_allowed = 0;
    bool nonfinite = false;
    if (threadIdx.x == 0) {
        s->best = 0;
        s->n_allowed = s->n_listed = s->nonfinite = 0;
        s->threshold = 0;
        s->rest = draw.top_k;
    }
    __syncthreads();
    for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
        uint32_t key = rank_key(logits, id, draw, forbidden);
        nonfinite = nonfinite || !isfinite(logits[id]);
        n_allowed += key != 0;
        best = key != 0 && rank_of(key, id) > best ? rank_of(key, id) : best;
    }
    atomicAdd(&s->n_allowed, n_allowed);
    atomicMax(&s->best, best);
    if (nonfinite) {
        atomicAdd(&s->nonfinite, 1);
    }
    __syncthreads();
}

/* A block: threshold = the key of the k-th id in rank order, which is found 8 bits at a time, from
 * the highest. Returns how many ids have this key or a greater one. */
static __device__ int sample_threshold(struct sample_shared *s, const float *logits, int vocab,
                                       const struct draw &draw, const int32_t *forbidden) {
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            s->histogram[i] = 0;
        }
        __syncthreads();
        uint32_t mask = shift == 24 ? 0 : 0xffffffffU << (shift + 8), high = s->threshold & mask;
        for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
            uint32_t key = rank_key(logits, id, draw, forbidden);
            if (key != 0 && (key & mask) == high) {
                atomicAdd(&s->histogram[key >> shift & 255], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            for (; s->histogram[digit] < s->rest; digit--) {
                /* ids with a greater digit: all of them are among the k */
                s->rest -= s->histogram[digit];
            }
            s->threshold |= (uint32_t)digit << shift;
            s->n_above = draw.top_k - s->rest + s->histogram[digit];
        }
        __syncthreads();
    }
    return s->n_above;
}

/* A block: the mass exp(x - best) of all allowed ids. Only thread 0 gets the sum, which is in the
 * order of the ids.
 *
 *     mass [V], logits [V] */
static __device__ __forceinline__ double sample_total(float *mass, const float *logits, int vocab,
                                                      const struct draw &draw,
                                                      const int32_t *forbidden, float best) {
    double total = 0.0;
    for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
        mass[id] = rank_key(logits, id, draw, forbidden)
                       ? canonical_exp(scaled_logit(logits, id, draw) - best)
                       : 0.0f;
    }
    __syncthreads();
    for (int id = 0; id < vocab && threadIdx.x == 0; id++) {
        total += mass[id];
    }
    return total;
}

/* A block: lists the n ids whose keys are at least the threshold, in any order, and pads the list
 * with ranks that come last.
 *
 *     sorted [n_padded], logits [V] */
static __device__ __forceinline__ void
sample_list(struct sample_shared *s, unsigned long long *sorted, int n, int n_padded,
            const float *logits, int vocab, const struct draw &draw, const int32_t *forbidden) {
    for (int i = n + threadIdx.x; i < n_padded; i += blockDim.x) {
        sorted[i] = 0;
    }
    for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
        uint32_t key = rank_key(logits, id, draw, forbidden);
        if (key != 0 && key >= s->threshold) {
            sorted[atomicAdd(&s->n_listed, 1)] = rank_of(key, id);
        }
    }
}

/* A block: sorts n values, a power of two, in descending order: bitonic sort (Batcher 1968). */
static __device__ void sort_descending(unsigned long long *x, int n) {
    for (int size = 2; size <= n; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
                int low = i / step * step * 2 + i % step, high = low + step;
                bool descending = (low & size) == 0;
                if ((x[low] < x[high]) == descending) {
                    unsigned long long other = x[low];
                    x[low] = x[high];
                    x[high] = other;
                }
            }
            __syncthreads();
        }
    }
}

/* A thread: the nucleus (Holtzman et al. 2020), the first of n ids in rank order that together have
 * top_p of the total mass, or one. Returns how many; *kept is their mass, summed in rank order. */
static __device__ __forceinline__ int sample_nucleus(double *kept, const float *mass, int n,
                                                     double total, float top_p) {
    double sum = 0.0, limit = top_p < 1.0f ? (double)top_p * total : INFINITY;
    int n_kept = 0;
    while (n_kept == 0 || (sum < limit && n_kept < n)) {
        sum += mass[n_kept++];
    }
    *kept = sum;
    return n_kept;
}

/* A thread: the place among the kept ids at which their mass, summed in rank order, exceeds the
 * target; rounding may let it end at the last one that has mass at all. */
static __device__ __forceinline__ int sample_walk(const float *mass, int n_kept, double target) {
    double walked = 0.0;
    int drawn = 0;
    for (int i = 0; i < n_kept; i++) {
        walked += mass[i];
        drawn = mass[i] > 0.0f ? i : drawn;
        if (walked > target) {
            break;
        }
    }
    return drawn;
}

/*
 * Draws an id: for every u the one that sampler_draw in bpo.c, the reference, draws. Sums are in
 * double and in the same order as there. Instead of a heap: the k-th key by counting digits, a list
 * of the ids that have it or a greater one, and a sort of that list, in shared memory unless it is
 * long. Grid: rows.
 *
 *     ids [R], all_logits [R][V], draws [R]; scratch: all_sorted and all_mass [R][n_sort], where
 *     n_sort is a power of two and at least V
 */
static __global__ void sample_row(int32_t *ids, const float *all_logits, const struct draw *draws,
                                  const int32_t *forbidden, unsigned long long *all_sorted,
                                  float *all_mass, int vocab, int n_sort) {
    DYNAMIC_SHARED(shared);
    struct sample_shared *s = (struct sample_shared *)shared;
    const float *logits = all_logits + (size_t)blockIdx.x * vocab;
    const struct draw draw = draws[blockIdx.x];
    float *mass = all_mass + (size_t)blockIdx.x * n_sort;
    unsigned long long *sorted = all_sorted + (size_t)blockIdx.x * n_sort;
    sample_survey(s, logits, vocab, draw, forbidden);
    if (s->nonfinite || s->n_allowed == 0 || !(draw.temperature > 0.0f)) {
        if (threadIdx.x == 0) {
            ids[blockIdx.x] = s->nonfinite ? -2 : s->n_allowed == 0 ? -1 : rank_id(s->best);
        }
        return; /* the whole block */
    }
    const float best = scaled_logit(logits, rank_id(s->best), draw);
    const bool limited = draw.top_k > 0 && draw.top_k < s->n_allowed;
    double total = limited ? 0.0 : sample_total(mass, logits, vocab, draw, forbidden, best);
    const int n = limited ? sample_threshold(s, logits, vocab, draw, forbidden) : s->n_allowed;
    int n_padded = 2;
    while (n_padded < n) {
        n_padded *= 2;
    }
    __syncthreads(); /* the total is known: what follows overwrites mass */
    if (n_padded <= SAMPLE_SMALL) {
        sorted = s->sorted;
        mass = s->mass;
    }
    sample_list(s, sorted, n, n_padded, logits, vocab, draw, forbidden);
    __syncthreads();
    sort_descending(sorted, n_padded);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        mass[i] = canonical_exp(scaled_logit(logits, rank_id(sorted[i]), draw) - best);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < n && limited; i++) {
            total += mass[i];
        }
        double kept;
        const int n_kept = sample_nucleus(&kept, mass, n, total, draw.top_p);
        ids[blockIdx.x] = rank_id(sorted[sample_walk(mass, n_kept, draw.u * kept)]);
    }
}

/* ---------------------------------------------------------------- memory */

/* data may be NULL. */
static void device_free(void *data) {
    if (data) {
        (void)cudaFree(data);
    }
}

static int device_memory(struct backend *b, size_t *available, size_t *total,
                         struct bpo_error *err) {
    (void)b;
    return check(cudaMemGetInfo(available, total), "asking for the free memory", err);
}

static void *device_alloc(struct backend *b, size_t n_bytes, enum memory_kind kind,
                          struct bpo_error *err) {
    void *data = NULL;
    cudaError_t status = cudaMalloc(&data, n_bytes > 0 ? n_bytes : 1);
    (void)kind;
    if (status == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        (void)cudaGetLastError();
        (void)device_memory(b, &available, &total, NULL);
        (void)bpo_fail(err, BPO_ERR_RESOURCE, "lower --parallel or --context, or use --device cpu",
                       "out of GPU memory: %.1f MiB needed, %.1f of %.1f MiB are free",
                       (double)n_bytes / 1048576.0, (double)available / 1048576.0,
                       (double)total / 1048576.0);
        return NULL;
    }
    return check(status, "allocating memory", err) ? NULL : data;
}

/* Recorded graphs hold pointers to memory: when some of it is freed or moved, they are dropped, and
 * recorded again when needed. */
static void forget_recorded(struct backend *b) {
    for (int i = 0; i < b->n_recorded; i++) {
        if (b->recorded[i].graph) {
            (void)cudaGraphExecDestroy(b->recorded[i].graph);
        }
    }
    b->n_recorded = 0;
    b->step = NULL;
}

static void gpu_free(struct backend *b, void *data, size_t n_bytes) {
    (void)n_bytes;
    (void)cudaStreamSynchronize(b->stream); /* queued work may still use it */
    forget_recorded(b);
    device_free(data);
}

/* Scratch memory of at least n_bytes, or NULL if the step has failed. */
static void *scratch_get(struct backend *b, struct scratch *s, size_t n_bytes) {
    if (b->error.code) {
        return NULL;
    }
    if (n_bytes <= s->n_bytes) {
        return s->data;
    }
    if (b->recording) { /* cannot happen: the same step has run before, with the same sizes */
        (void)bpo_fail(&b->error, BPO_ERR_RUN, GPU_HINT,
                       "a recorded step needs more memory than its first run did");
        return NULL;
    }
    if (check(cudaStreamSynchronize(b->stream), "waiting for the GPU", &b->error)) {
        return NULL;
    }
    forget_recorded(b);
    device_free(s->data);
    s->n_bytes = 0;
    s->data = device_alloc(b, n_bytes, MEMORY_BUFFER, &b->error);
    s->n_bytes = s->data ? n_bytes : 0;
    return s->data;
}

/* Waits for all queued work; the GPU has then read all staged bytes. */
static int synchronize(struct backend *b, const char *what, struct bpo_error *err) {
    b->n_staged = 0;
    return check(cudaStreamSynchronize(b->stream), what, err);
}

/* Moves on to the other half of pinned memory, as soon as the GPU has read it. */
static int stage_swap(struct backend *b, struct bpo_error *err) {
    cudaError_t status = cudaEventRecord(b->stage_read[b->filling], b->stream);
    b->filling = 1 - b->filling;
    b->n_staged = 0;
    if (int failed = check(status, "uploading", err)) {
        return failed;
    }
    return check(cudaEventSynchronize(b->stage_read[b->filling]), "uploading", err);
}

/* Copies to the GPU through pinned memory. The caller may overwrite its memory at once; the copy is
 * done before any work that is queued later. */
static int gpu_upload(struct backend *b, void *to, const void *from_host, size_t n_bytes,
                      struct bpo_error *err) {
    for (size_t done = 0, n; done < n_bytes; done += n) {
        if (b->n_staged == STAGE_BYTES) {
            if (int failed = stage_swap(b, err)) {
                return failed;
            }
        }
        n = n_bytes - done < STAGE_BYTES - b->n_staged ? n_bytes - done : STAGE_BYTES - b->n_staged;
        unsigned char *staged = b->stage[b->filling] + b->n_staged;
        memcpy(staged, (const char *)from_host + done, n);
        b->n_staged += n;
        cudaError_t status =
            cudaMemcpyAsync((char *)to + done, staged, n, cudaMemcpyHostToDevice, b->stream);
        if (int failed = check(status, "uploading", err)) {
            return failed;
        }
    }
    return 0;
}

static int gpu_download(struct backend *b, void *to_host, const void *from, size_t n_bytes,
                        struct bpo_error *err) {
    for (size_t done = 0, n; done < n_bytes; done += n) {
        unsigned char *staged = b->stage[b->filling];
        n = n_bytes - done < STAGE_BYTES ? n_bytes - done : STAGE_BYTES;
        cudaError_t status = cudaMemcpyAsync(staged, (const char *)from + done, n,
                                             cudaMemcpyDeviceToHost, b->stream);
        if (int failed = check(status, "downloading", err)) {
            return failed;
        }
        if (int failed = synchronize(b, "running a step", err)) {
            return failed;
        }
        memcpy((char *)to_host + done, staged, n);
    }
    return 0;
}

static const void *gpu_load_weights(struct backend *b, const void *host, size_t n_bytes,
                                    struct bpo_error *err) {
    size_t available = 0, total = 0;
    if (device_memory(b, &available, &total, err)) {
        return NULL;
    }
    if (n_bytes > available) {
        (void)bpo_fail(
            err, BPO_ERR_RESOURCE, "free the GPU of other programs, or use --device cpu",
            "the model's weights do not fit the GPU: %.1f MiB needed, %.1f of %.1f MiB are free",
            (double)n_bytes / 1048576.0, (double)available / 1048576.0, (double)total / 1048576.0);
        return NULL;
    }
    b->weights = device_alloc(b, n_bytes, MEMORY_BUFFER, err);
    if (!b->weights) {
        return NULL;
    }
    for (size_t done = 0, n; done < n_bytes; done += n) {
        n = n_bytes - done < STAGE_BYTES ? n_bytes - done : STAGE_BYTES;
        if (gpu_upload(b, (char *)b->weights + done, (const char *)host + done, n, err)) {
            return NULL;
        }
        if (b->progress) {
            b->progress(b->user, done + n, n_bytes);
        }
    }
    return synchronize(b, "uploading the weights", err) ? NULL : b->weights;
}

/* ---------------------------------------------------------------- life */

static void gpu_destroy(struct backend *b) {
    if (b->stream) {
        (void)cudaStreamSynchronize(b->stream);
    }
    forget_recorded(b);
    if (b->blas) {
        (void)cublasDestroy(b->blas);
    }
    for (int i = 0; i < 2; i++) {
        if (b->stage_read[i]) {
            (void)cudaEventDestroy(b->stage_read[i]);
        }
        if (b->stage[i]) {
            (void)cudaFreeHost(b->stage[i]);
        }
    }
    void *const memory[] = {b->workspace,      b->weights,    b->found,
                            b->half_copy.data, b->parts.data, b->sample_scratch.data};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        device_free(memory[i]);
    }
    if (b->stream) {
        (void)cudaStreamDestroy(b->stream);
    }
    free(b);
}

/* Opens the first GPU that CUDA lists (CUDA_VISIBLE_DEVICES decides which), or fails with the
 * driver's own message. */
static int gpu_find(struct backend *b, struct bpo_error *err) {
    int n = 0, major = 0, minor = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    if (status != cudaSuccess || n == 0) {
        (void)cudaGetLastError();
        return bpo_fail(
            err, BPO_ERR_RESOURCE,
            "install NVIDIA's driver, or leave --device out: everything works on the CPU too",
            "no CUDA device: %s",
            cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status));
    }
    if (int failed = check(cudaSetDevice(0), "opening the GPU", err)) {
        return failed;
    }
    const struct {
        int *value;
        cudaDeviceAttr name;
    } table[] = {{&b->n_processors, cudaDevAttrMultiProcessorCount},
                 {&major, cudaDevAttrComputeCapabilityMajor},
                 {&minor, cudaDevAttrComputeCapabilityMinor}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        cudaError_t got = cudaDeviceGetAttribute(table[i].value, table[i].name, 0);
        if (int failed = check(got, "opening the GPU", err)) {
            return failed;
        }
    }
    (void)snprintf(b->arch, sizeof b->arch, "sm_%d%d", major, minor);
    return 0;
}

/* The stream, and the pinned memory that copies pass through. */
static int stream_open(struct backend *b, struct bpo_error *err) {
    cudaError_t status = cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking);
    if (int failed = check(status, "opening the GPU", err)) {
        return failed;
    }
    for (int i = 0; i < 2; i++) {
        status = cudaHostAlloc((void **)&b->stage[i], STAGE_BYTES, cudaHostAllocDefault);
        if (int failed = check(status, "pinning memory", err)) {
            return failed;
        }
        status = cudaEventCreateWithFlags(&b->stage_read[i], cudaEventDisableTiming);
        if (int failed = check(status, "opening the GPU", err)) {
            return failed;
        }
    }
    return 0;
}

static int blas_open(struct backend *b, struct bpo_error *err) {
    int version = 0;
    if (int failed = check_blas(cublasCreate(&b->blas), "opening it", err)) {
        return failed;
    }
    if (int failed = check_blas(cublasSetStream(b->blas, b->stream), "opening it", err)) {
        return failed;
    }
    if (int failed = check_blas(cublasGetVersion(b->blas, &version), "opening it", err)) {
        return failed;
    }
    (void)snprintf(b->blas_version, sizeof b->blas_version, "cuBLAS %d.%d.%d", version / 10000,
                   version / 100 % 100, version % 100);
    b->workspace = device_alloc(b, WORKSPACE_BYTES, MEMORY_BUFFER, err);
    if (!b->workspace) {
        return BPO_ERR_RESOURCE;
    }
    /* cuBLAS must not allocate a workspace while a step is recorded, so it is given one; after the
     * stream, because setting that resets the workspace. */
    cublasStatus_t status = cublasSetWorkspace(b->blas, b->workspace, WORKSPACE_BYTES);
    return check_blas(status, "opening it", err);
}

static struct backend *gpu_create(const struct backend_options *options, struct bpo_error *err) {
    struct backend *b = (struct backend *)calloc(1, sizeof *b);
    if (!b) {
        (void)bpo_fail(err, BPO_ERR_RESOURCE, NULL, "out of memory: %zu bytes for the GPU backend",
                       sizeof *b);
        return NULL;
    }
    b->progress = options->progress;
    b->user = options->user;
    int failed = gpu_find(b, err);
    failed = failed ? failed : stream_open(b, err);
    failed = failed ? failed : blas_open(b, err);
    b->found = (int32_t *)(failed ? NULL : device_alloc(b, sizeof *b->found, MEMORY_BUFFER, err));
    if (!b->found) {
        gpu_destroy(b);
        return NULL;
    }
    return b;
}

static void gpu_info(const struct backend *b, struct backend_info *info) {
    *info = backend_info();
    info->device = "cuda";
    info->simd = b->arch;
    info->matmul = BPO_MATMUL_OWN;
    (void)snprintf(info->blas, sizeof info->blas, "%s", b->blas_version);
}

/* ---------------------------------------------------------------- steps */

static int32_t gpu_padded(const struct backend *b, int32_t n) {
    int32_t bucket = 1;
    (void)b;
    while (bucket < n) {
        bucket *= 2;
    }
    return bucket <= MAX_BUCKET ? bucket : n;
}

static struct recorded *recorded_find(struct backend *b, uint64_t shape) {
    for (int i = 0; i < b->n_recorded; i++) {
        if (b->recorded[i].shape == shape) {
            return &b->recorded[i];
        }
    }
    return NULL;
}

static int gpu_step_begin(struct backend *b, uint64_t shape) {
    b->error.code = BPO_OK;
    b->half_copy_of = NULL;
    b->step = shape ? recorded_find(b, shape) : NULL;
    if (b->step && b->step->graph) {
        return 0;
    }
    if (b->step) {
        cudaError_t status = cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal);
        b->recording = check(status, "recording a step", &b->error) == 0;
    } else if (shape && b->n_recorded < MAX_RECORDED) {
        b->recorded[b->n_recorded++] = recorded();
        b->recorded[b->n_recorded - 1].shape = shape;
    }
    return 1;
}

/* Ends the recording, even after an error, and makes its graph. */
static void recording_end(struct backend *b) {
    cudaGraph_t graph = NULL;
    b->recording = false;
    cudaError_t status = cudaStreamEndCapture(b->stream, &graph);
    if (!b->error.code && !check(status, "recording a step", &b->error)) {
        status = cudaGraphInstantiateWithFlags(&b->step->graph, graph, 0);
        if (check(status, "recording a step", &b->error)) {
            b->step->graph = NULL;
        }
    }
    (void)cudaGetLastError();
    if (graph) {
        (void)cudaGraphDestroy(graph);
    }
}

/* Does not wait for the step: an error while it runs is reported by the call that downloads its
 * results. */
static int gpu_step_end(struct backend *b, struct bpo_error *err) {
    if (b->recording) {
        recording_end(b);
    }
    if (b->step && b->step->graph && !b->error.code) {
        (void)check(cudaGraphLaunch(b->step->graph, b->stream), "replaying a step", &b->error);
    }
    int code = b->error.code;
    if (code && err) {
        *err = b->error;
    }
    b->error.code = BPO_OK;
    b->step = NULL;
    return code;
}

/* ---------------------------------------------------------------- ops */

/* Memory for the half copy of a result y of n rows, or NULL if there are too few rows for cuBLAS to
 * read it. From here on half_copy belongs to y. */
static __half *half_copy_get(struct backend *b, const float *y, int32_t n, size_t cols) {
    b->half_copy_of = NULL;
    if (n <= DECODE_ROWS) {
        return NULL;
    }
    __half *half_copy = (__half *)scratch_get(b, &b->half_copy, (size_t)n * cols * sizeof(__half));
    b->half_copy_of = half_copy ? y : NULL;
    return half_copy;
}

/* y is overwritten without a half copy: forgets the one that it may have. */
static void half_copy_drop(struct backend *b, const float *y) {
    b->half_copy_of = b->half_copy_of == y ? NULL : b->half_copy_of;
}

static void gpu_embed(struct backend *b, float *x, const struct weight *table,
                      const struct rows *rows) {
    half_copy_drop(b, x);
    launch(b, "embed", embed_row, dim3((unsigned)rows->n), BLOCK_THREADS, 0, x,
           (const char *)table->data, rows->token, (int)table->cols, table->row_bytes);
}

static void gpu_rmsnorm(struct backend *b, float *y, const float *x, const struct weight *gain,
                        int32_t n, float eps) {
    __half *half_copy = half_copy_get(b, y, n, gain->cols);
    launch(b, "rmsnorm", rmsnorm_row, dim3((unsigned)n), BLOCK_THREADS, WARP * sizeof(float), y,
           half_copy, x, (const __half *)gain->data, (int)gain->cols, eps);
}

static void gpu_rope_angles(struct backend *b, float *angles, const float *inv_freq,
                            const struct rows *rows, int32_t head_dim) {
    launch(b, "rope_angles", rope_angles_row, dim3((unsigned)rows->n), 64, 0, angles, inv_freq,
           rows->pos, head_dim / 2);
}

static void gpu_rope_kv(struct backend *b, float *qkv, const struct kv_cache *kv,
                        const float *angles, const struct rows *rows, int32_t layer,
                        int32_t n_heads) {
    dim3 grid((unsigned)(n_heads + 2 * kv->n_kv_heads), (unsigned)rows->n);
    half_copy_drop(b, qkv);
    launch(b, "rope_kv", rope_kv_head, grid, 64, 0, qkv, *kv, angles, rows->slot, rows->pos,
           (int)layer, (int)n_heads);
}

static void gpu_swiglu(struct backend *b, float *y, const float *gate_up, int32_t n,
                       int32_t ffn_dim) {
    __half *half_copy = half_copy_get(b, y, n, (size_t)ffn_dim);
    launch(b, "swiglu", swiglu_row, dim3(n_blocks((size_t)ffn_dim, BLOCK_THREADS), (unsigned)n),
           BLOCK_THREADS, 0, y, half_copy, gate_up, (int)ffn_dim);
}

static void gpu_gather(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                       int32_t dim) {
    half_copy_drop(b, y);
    launch(b, "gather", gather_row, dim3((unsigned)n), BLOCK_THREADS, 0, y, x, index, (int)dim);
}

/* cuBLAS is column-major: to it w [rows][cols] is a matrix of `rows` columns, and y = x w^T is
 * y^T = w x^T. */
static void matmul_blas(struct backend *b, float *y, const float *x, const struct weight *w,
                        int32_t n, enum matmul_mode mode) {
    const size_t n_values = (size_t)n * w->cols;
    if (b->half_copy_of != x) {
        __half *half_copy = half_copy_get(b, x, n, w->cols);
        launch(b, "matmul", narrow_values, dim3(n_blocks(n_values, BLOCK_THREADS)), BLOCK_THREADS,
               0, half_copy, x, n_values);
    }
    if (b->error.code) {
        return;
    }
    const float one = 1.0f, zero = 0.0f;
    cublasStatus_t status =
        cublasGemmEx(b->blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)w->rows, n, (int)w->cols, &one,
                     w->data, CUDA_R_16F, (int)(w->row_bytes / sizeof(__half)), b->half_copy.data,
                     CUDA_R_16F, (int)w->cols, mode == MATMUL_ADD ? &one : &zero, y, CUDA_R_32F,
                     (int)w->rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    (void)check_blas(status, "matmul", &b->error);
}

template <int R>
static void matmul_few_rows(struct backend *b, float *y, const float *x, const struct weight *w,
                            int32_t n, enum matmul_mode mode) {
    bool vector =
        w->cols % 8 == 0 && w->row_bytes % 16 == 0 && ((uintptr_t)w->data | (uintptr_t)x) % 16 == 0;
    launch(b, "matmul", vector ? matmul_rows<R, true> : matmul_rows<R, false>,
           dim3(n_blocks(w->rows, (size_t)BLOCK_THREADS / WARP * WEIGHT_ROWS)), BLOCK_THREADS, 0, y,
           x, (const char *)w->data, (int)n, (int)w->rows, (int)w->cols, w->row_bytes,
           mode == MATMUL_ADD);
}

static void gpu_matmul(struct backend *b, float *y, const float *x, const struct weight *w,
                       const struct rows *rows, enum matmul_mode mode) {
    const int32_t n = rows->n;
    if (w->dtype != DTYPE_F16 && !b->error.code) {
        (void)bpo_fail(&b->error, BPO_ERR_MODEL, NULL,
                       "the GPU kernels cannot read weights of type %d", (int)w->dtype);
    }
    if (b->error.code || n == 0) {
        return;
    }
    if (n > DECODE_ROWS) {
        matmul_blas(b, y, x, w, n, mode);
    } else if (n > 4) {
        matmul_few_rows<8>(b, y, x, w, n, mode);
    } else if (n > 2) {
        matmul_few_rows<4>(b, y, x, w, n, mode);
    } else if (n > 1) {
        matmul_few_rows<2>(b, y, x, w, n, mode);
    } else {
        matmul_few_rows<1>(b, y, x, w, n, mode);
    }
    half_copy_drop(b, y);
}

/* The arguments that all launches of an attention op share. */
struct attention_call {
    float *y;
    __half *half_copy;
    const float *qkv;
    const struct kv_cache *kv;
    const struct rows *rows;
    int layer, n_heads;
    float scale;
    bool vector; /* keys and values can be read 128 bits at a time */
};

/* Enough splits that every processor has several blocks, but none shorter than SPLIT_POSITIONS.
 * They are for a full slot, whatever the positions of this step are: the grid is recorded. */
static struct split split_choose(const struct backend *b, const struct kv_cache *kv,
                                 int32_t n_rows) {
    int n_runs = (kv->n_positions + SPLIT_POSITIONS - 1) / SPLIT_POSITIONS;
    int n = 8 * b->n_processors / (n_rows * kv->n_kv_heads);
    n = n < 1 ? 1 : n > n_runs ? n_runs : n;
    int per_split = (n_runs + n - 1) / n;
    struct split split = {(n_runs + per_split - 1) / per_split, per_split * SPLIT_POSITIONS};
    return split;
}

/* n decoding rows from the first on, G query heads to a block. */
template <int G>
static void attention_decode(struct backend *b, const struct attention_call *c, int32_t first,
                             int32_t n) {
    const struct kv_cache *kv = c->kv;
    const int hd = kv->head_dim, group = c->n_heads / kv->n_kv_heads;
    const struct teams teams = teams_of(hd, 0);
    const struct split split = split_choose(b, kv, n);
    const size_t row_values = (size_t)(c->n_heads + 2 * kv->n_kv_heads) * hd;
    const size_t n_parts = (size_t)n * c->n_heads * split.n_splits * (PART_VALUES + hd);
    /* q, e, state, sums */
    const size_t shared = sizeof(float) * G *
                          ((size_t)hd + SPLIT_POSITIONS + sizeof(struct softmax_state) / 4 +
                           (size_t)teams.n_teams * teams.n_vectors * 8);
    float *parts = (float *)scratch_get(b, &b->parts, n_parts * sizeof *parts);
    dim3 grid((unsigned)split.n_splits, (unsigned)(kv->n_kv_heads * ((group + G - 1) / G)),
              (unsigned)n);
    launch(b, "attention", c->vector ? attention_split<G, true> : attention_split<G, false>, grid,
           SPLIT_THREADS, shared, parts, c->qkv + first * row_values, *kv, c->rows->slot + first,
           c->rows->pos + first, c->layer, c->n_heads, split, c->scale);
    const size_t at = (size_t)first * c->n_heads * hd;
    launch(b, "attention", attention_join, dim3((unsigned)c->n_heads, (unsigned)n), 64, 0,
           c->y + at, c->half_copy ? c->half_copy + at : NULL, parts, c->rows->slot + first,
           c->rows->pos + first, hd, split);
}

/* q, p, k and v in shared memory: see attention_tile. */
static void attention_tiles(struct backend *b, const struct attention_call *c,
                            const struct tiles *tiles, int n_tiles) {
    static void (*const kernels[4][2])(float *, __half *, const float *, struct kv_cache,
                                       const int32_t *, const int32_t *, struct tiles, int, int,
                                       float) = {
        {attention_tile<1, false>, attention_tile<1, true>},
        {attention_tile<2, false>, attention_tile<2, true>},
        {attention_tile<4, false>, attention_tile<4, true>},
        {attention_tile<8, false>, attention_tile<8, true>},
    };
    const size_t hd = (size_t)c->kv->head_dim, width = hd + 2;
    const size_t shared = sizeof(float) * TILE_ROWS * (width + TILE_POSITIONS + 1) +
                          sizeof(__half) * 2 * TILE_POSITIONS * width;
    const int columns = hd <= 32 ? 0 : hd <= 64 ? 1 : hd <= 128 ? 2 : 3;
    launch(b, "attention", kernels[columns][c->vector],
           dim3((unsigned)c->n_heads, (unsigned)n_tiles), TILE_THREADS, shared, c->y, c->half_copy,
           c->qkv, *c->kv, c->rows->slot, c->rows->pos, *tiles, c->layer, c->n_heads, c->scale);
}

/* Cuts the rows of prompts into tiles. */
static void attention_prompts(struct backend *b, const struct attention_call *c) {
    struct tiles tiles;
    int n_tiles = 0;
    for (int32_t s = 0; s < c->rows->n_spans; s++) {
        const struct span *span = &c->rows->spans[s];
        for (int32_t at = 0; at < span->n && span->kind == ROWS_PROMPT; at += TILE_ROWS) {
            tiles.first[n_tiles] = (uint16_t)(span->first + at);
            tiles.n[n_tiles++] = (uint16_t)(span->n - at < TILE_ROWS ? span->n - at : TILE_ROWS);
            if (n_tiles == MAX_TILES) {
                attention_tiles(b, c, &tiles, n_tiles);
                n_tiles = 0;
            }
        }
    }
    attention_tiles(b, c, &tiles, n_tiles);
}

static void gpu_attention(struct backend *b, float *y, const float *qkv, const struct kv_cache *kv,
                          const struct rows *rows, int32_t layer, int32_t n_heads) {
    const size_t hd = (size_t)kv->head_dim;
    const bool shared_kv = n_heads != kv->n_kv_heads; /* by several query heads */
    if (hd > MAX_HEAD_DIM && !b->error.code) {
        (void)bpo_fail(&b->error, BPO_ERR_RESOURCE, "use --device cpu",
                       "heads of size %zu; the GPU kernels take up to %d", hd, (int)MAX_HEAD_DIM);
    }
    const uintptr_t alignment = (uintptr_t)kv->data | kv->slot_bytes | kv->layer_bytes |
                                kv->plane_bytes | kv->head_bytes | kv->pos_bytes;
    const bool vector = hd % 8 == 0 && alignment % 16 == 0;
    __half *half_copy = half_copy_get(b, y, rows->n, (size_t)n_heads * hd);
    const float scale = 1.0f / sqrtf((float)hd);
    const struct attention_call call = {y, half_copy, qkv, kv, rows, layer, n_heads, scale, vector};
    const struct span all = {0, rows->n, ROWS_DECODE};
    for (int32_t s = 0; s < rows->n_spans || s == 0; s++) {
        const struct span *span = rows->n_spans > 0 ? &rows->spans[s] : &all;
        if (span->kind == ROWS_DECODE && span->n > 0 && !b->error.code) {
            (shared_kv ? attention_decode<4> : attention_decode<1>)(b, &call, span->first, span->n);
        }
    }
    attention_prompts(b, &call);
}

/* ---------------------------------------------------------------- outside a step */

static int gpu_first_nonfinite(struct backend *b, int32_t *found, const float *x, int32_t n,
                               size_t cols, struct bpo_error *err) {
    const int32_t none = INT32_MAX;
    b->error.code = BPO_OK;
    int failed = gpu_upload(b, b->found, &none, sizeof none, err);
    launch(b, "first_nonfinite", nonfinite_row, dim3((unsigned)n), BLOCK_THREADS, 0, b->found, x,
           cols);
    if (b->error.code && !failed) {
        failed = b->error.code;
        *err = b->error;
    }
    failed = failed ? failed : gpu_download(b, found, b->found, sizeof *found, err);
    *found = failed || *found == none ? -1 : *found;
    return failed;
}

/* The sampler's scratch memory: the offsets of its parts in bytes. The draws and the forbidden ids
 * are uploaded; the ids are downloaded. */
struct sample_layout {
    size_t forbidden, ids, sorted, mass, n_bytes; /* the draws are first */
    int n_sort; /* ids of a row in sorted and mass: a power of two */
};

static struct sample_layout sample_layout_of(int32_t n, size_t n_forbidden, size_t vocab) {
    struct sample_layout at = {};
    at.n_sort = 2;
    while ((size_t)at.n_sort < vocab) {
        at.n_sort *= 2;
    }
    at.forbidden = (size_t)n * sizeof(struct draw);
    at.ids = at.forbidden + n_forbidden * sizeof(int32_t);
    at.sorted = (at.ids + (size_t)n * sizeof(int32_t) + 15) / 16 * 16;
    at.mass = at.sorted + (size_t)n * at.n_sort * sizeof(unsigned long long);
    at.n_bytes = at.mass + (size_t)n * at.n_sort * sizeof(float);
    return at;
}

/* Writes what is uploaded, the draws and the forbidden ids, to host memory. */
static void sample_pack(char *host, const struct sample_layout *at,
                        const struct sample_params *params, int32_t n) {
    size_t n_listed = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct sample_params *p = &params[i];
        const struct draw draw = {p->u,     p->temperature, p->top_p,
                                  p->top_k, p->n_forbidden, (int32_t)n_listed};
        memcpy(host + (size_t)i * sizeof draw, &draw, sizeof draw);
        if (p->n_forbidden > 0) {
            memcpy(host + at->forbidden + n_listed * sizeof(int32_t), p->forbidden,
                   (size_t)p->n_forbidden * sizeof(int32_t));
        }
        n_listed += (size_t)p->n_forbidden;
    }
}

static int gpu_sample(struct backend *b, int32_t *ids, const float *logits,
                      const struct sample_params *params, int32_t n, size_t vocab,
                      struct bpo_error *err) {
    size_t n_forbidden = 0;
    for (int32_t i = 0; i < n; i++) {
        n_forbidden += (size_t)params[i].n_forbidden;
    }
    const struct sample_layout at = sample_layout_of(n, n_forbidden, vocab);
    b->error.code = BPO_OK;
    char *device = (char *)scratch_get(b, &b->sample_scratch, at.n_bytes),
         *host = (char *)calloc(1, at.ids);
    int failed = device ? 0 : b->error.code;
    if (!failed && !host) {
        failed = out_of_memory(&b->error, "the sampling parameters", at.ids);
    }
    if (!failed) {
        sample_pack(host, &at, params, n);
        failed = gpu_upload(b, device, host, at.ids, &b->error);
    }
    if (!failed) {
        launch(b, "sample", sample_row, dim3((unsigned)n), SAMPLE_THREADS,
               sizeof(struct sample_shared), (int32_t *)(device + at.ids), logits,
               (const struct draw *)device, (const int32_t *)(device + at.forbidden),
               (unsigned long long *)(device + at.sorted), (float *)(device + at.mass), (int)vocab,
               at.n_sort);
        failed = b->error.code;
    }
    failed =
        failed ? failed : gpu_download(b, ids, device + at.ids, (size_t)n * sizeof *ids, &b->error);
    free(host);
    if (failed && err) {
        *err = b->error;
    }
    b->error.code = BPO_OK;
    return failed;
}

/* Copies a plane at a time: a plane's heads are a column of blocks, head_bytes apart. */
static int gpu_kv_copy(struct backend *b, const struct kv_cache *kv, int32_t to_slot,
                       int32_t from_slot, int32_t n, struct bpo_error *err) {
    if (int failed = kv_check(kv, to_slot, n, err)) {
        return failed;
    }
    if (int failed = kv_check(kv, from_slot, n, err)) {
        return failed;
    }
    for (int32_t i = 0; i < 2 * kv->n_layers && n > 0 && to_slot != from_slot; i++) {
        cudaError_t status = cudaMemcpy2DAsync(
            kv_at(kv, to_slot, i / 2, i % 2, 0, 0), kv->head_bytes,
            kv_at(kv, from_slot, i / 2, i % 2, 0, 0), kv->head_bytes, (size_t)n * kv->pos_bytes,
            (size_t)kv->n_kv_heads, cudaMemcpyDeviceToDevice, b->stream);
        if (int failed = check(status, "copying the KV cache", err)) {
            return failed;
        }
    }
    return 0;
}

/* The first position of the i-th of a slot's heads, in the order [L][2][HK]. */
static void *kv_head_at(const struct kv_cache *kv, int32_t slot, int32_t i) {
    const int32_t plane = i / kv->n_kv_heads, head = i % kv->n_kv_heads;
    return kv_at(kv, slot, plane / 2, plane % 2, head, 0);
}

/* One head at a time, through the same pinned memory as every other copy. */
static int gpu_kv_export(struct backend *b, void *to_host, const struct kv_cache *kv, int32_t slot,
                         int32_t n, struct bpo_error *err) {
    const size_t n_bytes = (size_t)n * kv->pos_bytes;
    if (int failed = kv_check(kv, slot, n, err)) {
        return failed;
    }
    for (int32_t i = 0; i < 2 * kv->n_layers * kv->n_kv_heads; i++) {
        char *to = (char *)to_host + (size_t)i * n_bytes;
        if (int failed = gpu_download(b, to, kv_head_at(kv, slot, i), n_bytes, err)) {
            return failed;
        }
    }
    return 0;
}

static int gpu_kv_import(struct backend *b, const struct kv_cache *kv, const void *from_host,
                         int32_t slot, int32_t n, struct bpo_error *err) {
    const size_t n_bytes = (size_t)n * kv->pos_bytes;
    if (int failed = kv_check(kv, slot, n, err)) {
        return failed;
    }
    for (int32_t i = 0; i < 2 * kv->n_layers * kv->n_kv_heads; i++) {
        const char *from = (const char *)from_host + (size_t)i * n_bytes;
        if (int failed = gpu_upload(b, kv_head_at(kv, slot, i), from, n_bytes, err)) {
            return failed;
        }
    }
    return 0;
}

static struct kernels make_table(void) {
    struct kernels table = {};
    table.abi = KERNELS_ABI;
    table.name = "cuda";
    table.create = gpu_create;
    table.destroy = gpu_destroy;
    table.info = gpu_info;
    table.alloc = device_alloc;
    table.free = gpu_free;
    table.upload = gpu_upload;
    table.download = gpu_download;
    table.memory = device_memory;
    table.load_weights = gpu_load_weights;
    table.step_begin = gpu_step_begin;
    table.step_end = gpu_step_end;
    table.padded = gpu_padded;
    table.embed = gpu_embed;
    table.rmsnorm = gpu_rmsnorm;
    table.matmul = gpu_matmul;
    table.rope_angles = gpu_rope_angles;
    table.rope_kv = gpu_rope_kv;
    table.attention = gpu_attention;
    table.swiglu = gpu_swiglu;
    table.gather = gpu_gather;
    table.first_nonfinite = gpu_first_nonfinite;
    table.sample = gpu_sample;
    table.kv_copy = gpu_kv_copy;
    table.kv_export = gpu_kv_export;
    table.kv_import = gpu_kv_import;
    return table;
}

/* The symbol that engine/cuda_library.c looks up in this library. */
extern "C" __attribute__((visibility("default"))) const struct kernels *kernels_cuda(void) {
    static const struct kernels table = make_table();
    return &table;
}

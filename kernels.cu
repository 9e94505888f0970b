/*
 * kernels.cu - the op table for NVIDIA GPUs. The vocabulary, the shapes and the equations are those
 * of kernels.h; kernels.c has the same ops in plain C, to be read first. It is built into a library
 * of its own, which backend.c opens at run time.
 *
 * WHAT LIMITS WHAT
 *
 *   decoding       Each weight is used once per row, so a step cannot be faster than the weights can be read. matmul_rows reads
 *                  each weight once for up to 8 rows, 128 bits at a time, several loads under way in each thread.
 *   prompts        Each weight is used by hundreds of rows: cuBLAS, fp16 into fp32, on the tensor cores. The ops before it write
 *                  what it reads in fp16 as well (a "twin"), so that nothing is converted in a pass of its own.
 *   attention      One query row reads all its keys and values once: attention_split spreads the positions of a head over the
 *                  GPU's processors, attention_join brings the parts together (Flash-Decoding: Dao et al. 2023). The rows of a
 *                  prompt share what they read: attention_tile stages K and V in shared memory for 32 rows.
 *   launches       A step of a few rows is some 300 kernels of a few microseconds: it is recorded once as a CUDA graph, for each
 *                  of a few numbers of rows, and replayed. Tokens, slots and positions are read from device memory, so the same
 *                  graph serves every step.
 *
 * SAME AGAIN. No op adds in an order that depends on timing: no floating-point atomics, fixed
 * trees. The same call, alone, gives the same bytes.
 *
 * Without a GPU the tests compile this file with g++ against tests/cuda_on_cpu, which executes it.
 * So kernels are launched through launch() instead of <<< >>>, and shared memory comes from
 * DYNAMIC_SHARED only.
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

enum {
    WARP = 32,
    /* threads in a block, where a kernel has no reason for another number */
    BLOCK = 256,
    /* rows up to which matmul reads each weight once itself; above, cuBLAS does better */
    DECODE_ROWS = 8,
    WEIGHT_ROWS = 4,        /* rows of weights that a warp of matmul_rows works on */
    MAX_HEAD_DIM = 256,     /* attention's accumulators are registers */
    SPLIT_BLOCK = 128,      /* threads of attention_split */
    SPLIT_CHUNK = 64,       /* positions that it takes together */
    SPLIT_LANES = 8,        /* threads that share a dot product q . k */
    TILE_BLOCK = 128,       /* threads of attention_tile */
    TILE_ROWS = 32,         /* query rows of a tile */
    TILE_POSITIONS = 32,    /* positions that are staged together */
    MAX_TILES = 512,        /* of one launch: they are passed by value */
    SAMPLE_BLOCK = 512,     /* threads that draw one id */
    SAMPLE_SMALL = 1024,    /* candidates that are sorted in shared memory */
    MAX_BUCKET = 32,        /* rows up to which a step is padded to a power of two, and recorded */
    MAX_RECORDED = 16,      /* steps that are kept as graphs */
    DEFAULT_SHARED = 49152, /* bytes of shared memory that a block may have without asking */
};

#define ALL_LANES 0xffffffffU

static const size_t STAGE_BYTES = (size_t)8 << 20; /* each of two halves of pinned memory */
/* cuBLAS's own, what NVIDIA recommends for the largest GPUs */
static const size_t WORKSPACE_BYTES = (size_t)32 << 20;

/* Device memory that an op needs and that grows with its sizes. */
struct scratch {
    void *data;
    size_t n_bytes;
};

/* A step that was seen: at the first time it is run as it is (libraries set themselves up, scratch
 * memory grows); at the second it is recorded; from then on it is replayed. */
struct recorded {
    uint64_t shape;
    cudaGraphExec_t graph; /* NULL: not yet */
};

struct backend {
    struct bpo_error error; /* the step's */
    cudaStream_t stream;
    cublasHandle_t blas;
    int n_processors; /* "SMs" */
    char arch[16];    /* "sm_90" */
    char blas_version[64];
    void *workspace;

    /* Pinned memory that uploads pass through: one half is filled while the GPU reads the other. */
    unsigned char *stage[2];
    cudaEvent_t stage_read[2]; /* the GPU has read this half */
    int half;
    size_t n_staged; /* bytes of the half that are in use */

    void (*progress)(void *user, uint64_t done, uint64_t total);
    void *user;
    void *weights;

    struct scratch twin;    /* fp16 copy of the op's last result */
    const float *twin_of;   /* whose copy it is; NULL: nobody's */
    struct scratch parts;   /* attention_split's results */
    struct scratch drawing; /* the sampler's */
    int32_t *found;         /* first_nonfinite's result */

    struct recorded recorded[MAX_RECORDED];
    int n_recorded;
    struct recorded *step; /* this step's, or NULL */
    bool recording;
};

/* ---------------------------------------------------------------- errors */

static const char *const GPU_HINT =
    "try again with --device cpu; if it happens again, update NVIDIA's driver";

/* The status of a CUDA call as an error: 0 when it is none. what: the op, or what was being
 * done. */
static int check(cudaError_t status, const char *what, struct bpo_error *err) {
    if (status == cudaSuccess) {
        return 0;
    }
    (void)cudaGetLastError(); /* an error that is not sticky would come back with the next launch */
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

/* Runs a kernel in the backend's stream, unless the step has failed. */
template <typename... Parameters, typename... Arguments>
static void launch(struct backend *b, const char *op, void (*kernel)(Parameters...), dim3 grid,
                   int block, size_t shared_bytes, Arguments... arguments) {
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
    config.blockDim = dim3((unsigned)block);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = b->stream;
    (void)check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), op, &b->error);
}

static unsigned blocks(size_t n, size_t block) {
    return (unsigned)((n + block - 1) / block);
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

/* The sum over all threads of a block, the same in each. sums [32] is shared memory. */
static __device__ float block_sum(float v, float *sums) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    v = warp_sum(v);
    if (lane == 0) {
        sums[warp] = v;
    }
    __syncthreads();
    return warp_sum(lane < n_warps ? sums[lane] : 0.0f);
}

/* 8 values, from fp16 or fp32, of which n (8 or more: all) are there; zeros for the others. VECTOR:
 * the address is a multiple of 16 bytes and n of 8. KEEP: others will want them soon; else the
 * caches are not to keep them. */
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

/* A result, and its fp16 twin where there is one. */
static __device__ void store(float *y, __half *twin, size_t at, float value) {
    y[at] = value;
    if (twin) {
        twin[at] = __float2half_rn(value);
    }
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
static __global__ void rmsnorm_row(float *y, __half *twin, const float *x, const __half *gain,
                                   int dim, float eps) {
    DYNAMIC_SHARED(shared);
    const float *row = x + (size_t)blockIdx.x * dim;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        squares = fmaf(row[i], row[i], squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, (float *)shared) / (float)dim + eps);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        store(y, twin, (size_t)blockIdx.x * dim + i, __half2float(gain[i]) * (row[i] * scale));
    }
}

/* Grid: columns, rows. */
static __global__ void swiglu_row(float *y, __half *twin, const float *gate_up, int ffn_dim) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < ffn_dim) {
        const float *row = gate_up + (size_t)blockIdx.y * 2 * ffn_dim;
        float gate = row[i], up = row[ffn_dim + i];
        store(y, twin, (size_t)blockIdx.y * ffn_dim + i, gate / (1.0f + expf(-gate)) * up);
    }
}

/* Grid: rows. */
static __global__ void rope_angles_row(float *angles, const float *inv_freq, const int32_t *pos,
                                       int half) {
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float *angle = angles + ((size_t)blockIdx.x * half + i) * 2;
        sincosf(__fmul_rn((float)pos[blockIdx.x], inv_freq[i]), &angle[1], &angle[0]);
    }
}

/* Rotates a query head, rotates and writes a key head, or writes a value head. The pair is (i, i +
 * hd/2): see rotate in kernels.c for why, and for what happens otherwise. Grid: H + 2 HK heads,
 * rows. */
static __global__ void rope_kv_head(float *qkv, const struct kv_cache kv, const float *angles,
                                    const int32_t *slot, const int32_t *pos, int layer,
                                    int n_heads) {
    int head = blockIdx.x, r = blockIdx.y, half = kv.head_dim / 2,
        plane = head >= n_heads + kv.n_kv_heads;
    float *x = qkv + ((size_t)r * (n_heads + 2 * kv.n_kv_heads) + head) * kv.head_dim;
    if (slot[r] < 0 && head >= n_heads) {
        return;
    }
    __half *to = NULL;
    if (head >= n_heads) {
        int kv_head = head - n_heads - plane * kv.n_kv_heads;
        to = (__half *)kv_at(&kv, slot[r], layer, plane, kv_head, pos[r]);
    }
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float a = x[i], b = x[i + half];
        if (plane == 0) {
            const float *angle = angles + ((size_t)r * half + i) * 2;
            float cosine = angle[0], sine = angle[1], rotated = a * cosine - b * sine;
            b = b * cosine + a * sine;
            a = rotated;
        }
        if (to) {
            to[i] = __float2half_rn(a);
            to[i + half] = __float2half_rn(b);
        } else {
            x[i] = a;
            x[i + half] = b;
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

/* *found = the least row that holds a number that is not finite. Grid: rows. */
static __global__ void nonfinite_row(int32_t *found, const float *x, size_t cols) {
    bool bad = false;
    for (size_t i = threadIdx.x; i < cols; i += blockDim.x) {
        bad = bad || !isfinite(x[blockIdx.x * cols + i]);
    }
    if (bad) {
        atomicMin(found, (int32_t)blockIdx.x);
    }
}

/* ---------------------------------------------------------------- kernel: few rows */

/*
 * y[r][i] = w_i . x_r for up to R rows. A warp takes 4 rows of weights; its lanes take 8 columns
 * each, then the next 256. A lane has 4 loads of 128 bits under way, a warp 2 KiB, an SM with 16
 * warps 32 KiB: more than the memory's latency times its bandwidth per SM. Weights are read once,
 * past the caches; x, which all warps read, stays in the SM's cache. All products are fp32. Grid:
 * blocks of BLOCK / WARP warps.
 */
template <int R, bool VECTOR>
static __global__ void matmul_rows(float *y, const float *x, const char *w, int n_rows, int n_w,
                                   int cols, size_t row_bytes, bool add) {
    int lane = threadIdx.x % WARP;
    int first = (int)(blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP) * WEIGHT_ROWS;
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

/* What attention_split leaves of some positions of a head: the largest score, the sum of exp(s -
 * max), then the sum of exp(s - max) v, hd values. */
enum { PART_MAX, PART_SUM, PART_VALUES };

struct split {
    int n, positions; /* splits of a head; positions in one, a multiple of SPLIT_CHUNK */
};

/* Scores of a chunk of n positions: SPLIT_LANES threads share a position. e [G][SPLIT_CHUNK], -inf
 * where there is none. */
template <int G, bool VECTOR>
static __device__ void split_scores(float *e, const float *q, const char *keys, size_t pos_bytes,
                                    int n, int head_dim, float scale) {
    int lane = threadIdx.x % SPLIT_LANES;
    for (int p = threadIdx.x / SPLIT_LANES; p < SPLIT_CHUNK; p += SPLIT_BLOCK / SPLIT_LANES) {
        float sums[G] = {};
        for (int d = lane * 8; d < head_dim && p < n; d += SPLIT_LANES * 8) {
            float key[8], query[8];
            load_8<VECTOR, true>(key, (const __half *)(keys + p * pos_bytes) + d, head_dim - d);
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
                e[g * SPLIT_CHUNK + p] = p < n ? sums[g] * scale : -INFINITY;
            }
        }
    }
}

/* Makes a chunk's scores of one head to exp(s - max), by one warp, and brings the running maximum
 * and sum up to date (online softmax: Milakov and Gimelshein 2018). state [3]: the maximum, the
 * sum, and by what the earlier results are to be multiplied. */
static __device__ void split_softmax(float *e, float *state) {
    int lane = threadIdx.x % WARP;
    float low = e[lane], high = e[lane + WARP], before = state[0], sum = state[1];
    float max = fmaxf(before, warp_max(fmaxf(low, high)));
    low = expf(low - max);
    high = expf(high - max);
    e[lane] = low;
    e[lane + WARP] = high;
    float now = warp_sum(low + high), rescale = expf(before - max);
    __syncwarp();
    if (lane == 0) {
        state[0] = max;
        state[1] = sum * rescale + now;
        state[2] = rescale;
    }
}

/* One split of the positions of one row, for G query heads of one key/value head. Blocks behind the
 * row's position leave at once: the grid is the same for every step. Grid: splits, HK times sets of
 * G heads, rows. */
template <int G, bool VECTOR>
static __global__ void attention_split(float *parts, const float *qkv, const struct kv_cache kv,
                                       const int32_t *slot, const int32_t *pos, int layer,
                                       int n_heads, struct split split, float scale) {
    DYNAMIC_SHARED(shared);
    const int t = threadIdx.x, r = blockIdx.z, hd = kv.head_dim, group = n_heads / kv.n_kv_heads,
              n_sets = (group + G - 1) / G;
    const int kv_head = blockIdx.y / n_sets, first = blockIdx.y % n_sets * G,
              n_h = group - first < G ? group - first : G;
    const int begin = blockIdx.x * split.positions, behind = pos[r] + 1 - begin;
    const int n = behind < split.positions ? behind : split.positions;
    if (slot[r] < 0 || n <= 0) {
        return; /* the whole block */
    }
    const int n_vectors = (hd + 7) / 8, n_teams = SPLIT_BLOCK / n_vectors, vector = t % n_vectors,
              team = t / n_vectors;
    float *q = (float *)shared, *e = q + G * hd, *state = e + G * SPLIT_CHUNK,
          *sums = state + G * 4;
    const size_t head = (size_t)kv_head * group + first;
    const float *from = qkv + ((size_t)r * (n_heads + 2 * kv.n_kv_heads) + head) * hd;
    for (int i = t; i < G * hd; i += SPLIT_BLOCK) {
        q[i] = from[i < n_h * hd ? i : i % hd]; /* a set that is not full repeats its first head */
    }
    if (t < G) {
        state[t * 4] = -INFINITY;
        state[t * 4 + 1] = 0.0f;
    }
    __syncthreads();
    const char *keys = (const char *)kv_at(&kv, slot[r], layer, 0, kv_head, begin),
               *values = (const char *)kv_at(&kv, slot[r], layer, 1, kv_head, begin);
    float sum[G][8] = {};
    for (int at = 0; at < n; at += SPLIT_CHUNK) {
        int n_p = n - at < SPLIT_CHUNK ? n - at : SPLIT_CHUNK;
        split_scores<G, VECTOR>(e, q, keys + at * kv.pos_bytes, kv.pos_bytes, n_p, hd, scale);
        __syncthreads();
        if (t / WARP < G) {
            split_softmax(e + t / WARP * SPLIT_CHUNK, state + t / WARP * 4);
        }
        __syncthreads();
        for (int g = 0; g < G; g++) {
            for (int j = 0; j < 8; j++) {
                sum[g][j] *= state[g * 4 + 2];
            }
        }
        for (int p = team; p < n_p && team < n_teams; p += n_teams) {
            float value[8];
            load_8<VECTOR, true>(value,
                                 (const __half *)(values + (at + p) * kv.pos_bytes) + vector * 8,
                                 hd - vector * 8);
            for (int g = 0; g < G; g++) {
                for (int j = 0; j < 8; j++) {
                    sum[g][j] = fmaf(e[g * SPLIT_CHUNK + p], value[j], sum[g][j]);
                }
            }
        }
        __syncthreads(); /* the next scores overwrite e */
    }
    for (int i = 0; i < G * 8 && team < n_teams; i++) { /* sums [team][G][vectors of 8] */
        sums[((size_t)team * G + i / 8) * n_vectors * 8 + vector * 8 + i % 8] = sum[i / 8][i % 8];
    }
    __syncthreads();
    for (int i = t; i < n_h * hd; i += SPLIT_BLOCK) {
        int g = i / hd, d = i % hd;
        float *part = parts + (((size_t)r * n_heads + head + g) * split.n + blockIdx.x) *
                                  (PART_VALUES + hd),
              total = 0.0f;
        for (int team_of = 0; team_of < n_teams; team_of++) {
            total += sums[((size_t)team_of * G + g) * n_vectors * 8 + d];
        }
        part[PART_VALUES + d] = total;
        if (d == 0) {
            part[PART_MAX] = state[g * 4];
            part[PART_SUM] = state[g * 4 + 1];
        }
    }
}

/* y = sum of exp(max_s - M) values_s / sum of exp(max_s - M) sum_s over the splits s of a head.
 * Grid: H, rows. */
static __global__ void attention_join(float *y, __half *twin, const float *parts,
                                      const int32_t *slot, const int32_t *pos, int head_dim,
                                      struct split split) {
    const size_t head = (size_t)blockIdx.y * gridDim.x + blockIdx.x,
                 stride = PART_VALUES + head_dim;
    const float *part = parts + head * split.n * stride;
    const int n = slot[blockIdx.y] < 0 ? 0 : pos[blockIdx.y] / split.positions + 1;
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
        store(y, twin, head * head_dim + d, n > 0 ? value / sum : 0.0f);
    }
}

/* ---------------------------------------------------------------- kernel: attention, prompts */

/* Up to TILE_ROWS rows of one prompt, which stand one after another in the call, at ascending
 * positions of one slot. */
struct tiles {
    uint16_t first[MAX_TILES], n[MAX_TILES];
};

/* K or V of n positions to shared memory, [TILE_POSITIONS][hd + 2] fp16 (the 2 keep rows off each
 * other's banks); zeros beyond n. */
template <bool VECTOR>
static __device__ void stage_positions(__half *to, const char *from, size_t pos_bytes, int n,
                                       int head_dim) {
    const int width = VECTOR ? 8 : 2, per_row = head_dim / width;
    for (int i = threadIdx.x; i < TILE_POSITIONS * per_row; i += TILE_BLOCK) {
        int p = i / per_row, d = i % per_row * width;
        uint32_t *pairs = (uint32_t *)(to + p * (head_dim + 2) + d);
        if (VECTOR) {
            uint4 four = p < n ? *(const uint4 *)((const __half *)(from + p * pos_bytes) + d)
                               : make_uint4(0, 0, 0, 0);
            pairs[0] = four.x;
            pairs[1] = four.y;
            pairs[2] = four.z;
            pairs[3] = four.w;
        } else {
            pairs[0] = p < n ? *(const uint32_t *)((const __half *)(from + p * pos_bytes) + d) : 0;
        }
    }
}

/*
 * 32 query rows of one head. Thread (ty, tx) of 8 x 16 has rows ty, ty + 8, ty + 16, ty + 24; of a
 * tile of scores positions tx and tx + 16; of the result columns 2 (tx + 16 j) and the one after, j
 * < COLUMNS = ceil(hd / 32). The 16 threads of a row are half a warp, so its maximum and sum need
 * no shared memory. Grid: H, tiles.
 */
template <int COLUMNS, bool VECTOR>
static __global__ void attention_tile(float *y, __half *twin, const float *qkv,
                                      const struct kv_cache kv, const int32_t *slot,
                                      const int32_t *pos, const struct tiles tiles, int layer,
                                      int n_heads, float scale) {
    enum { ROWS = TILE_ROWS / 8 };
    DYNAMIC_SHARED(shared);
    const int hd = kv.head_dim, head = blockIdx.x, kv_head = head / (n_heads / kv.n_kv_heads);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, width = hd + 2;
    const int first = tiles.first[blockIdx.y], n_rows = tiles.n[blockIdx.y],
              n_p = pos[first + n_rows - 1] + 1;
    const size_t row_floats = (size_t)(n_heads + 2 * kv.n_kv_heads) * hd;
    float *q = (float *)shared, *p = q + TILE_ROWS * width; /* [32][hd + 2], [32][33] */
    /* [32][hd + 2] */
    __half *k = (__half *)(p + TILE_ROWS * (TILE_POSITIONS + 1)), *v = k + TILE_POSITIONS * width;
    for (int i = threadIdx.x; i < TILE_ROWS * hd; i += TILE_BLOCK) {
        /* a tile that is not full repeats its last row */
        int row = i / hd < n_rows ? i / hd : n_rows - 1;
        q[i / hd * width + i % hd] =
            qkv[(first + row) * row_floats + (size_t)head * hd + i % hd] * scale;
    }
    int row_pos[ROWS];
    float max[ROWS], sum[ROWS] = {}, result[ROWS][2 * COLUMNS] = {};
    for (int i = 0; i < ROWS; i++) {
        int row = ty + 8 * i < n_rows ? ty + 8 * i : n_rows - 1;
        row_pos[i] = pos[first + row];
        max[i] = -INFINITY;
    }
    for (int at = 0; at < n_p; at += TILE_POSITIONS) {
        __syncthreads(); /* the last tile has been read, and q written */
        stage_positions<VECTOR>(k, (const char *)kv_at(&kv, slot[first], layer, 0, kv_head, at),
                                kv.pos_bytes, n_p - at, hd);
        stage_positions<VECTOR>(v, (const char *)kv_at(&kv, slot[first], layer, 1, kv_head, at),
                                kv.pos_bytes, n_p - at, hd);
        __syncthreads();
        float s[ROWS][2] = {};
        for (int d = 0; d < hd; d += 2) {
            float2 key[2];
            for (int j = 0; j < 2; j++) {
                key[j] = __half22float2(*(const __half2 *)(k + (tx + 16 * j) * width + d));
            }
            for (int i = 0; i < ROWS; i++) {
                float2 query = *(const float2 *)(q + (ty + 8 * i) * width + d);
                for (int j = 0; j < 2; j++) {
                    s[i][j] = fmaf(query.y, key[j].y, fmaf(query.x, key[j].x, s[i][j]));
                }
            }
        }
        for (int i = 0; i < ROWS; i++) {
            for (int j = 0; j < 2; j++) {
                s[i][j] = at + tx + 16 * j <= row_pos[i] ? s[i][j] : -INFINITY;
            }
            float most = fmaxf(s[i][0], s[i][1]);
            for (int step = 8; step > 0; step /= 2) {
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
            }
            most = fmaxf(max[i], most);
            float rescale = expf(max[i] - most), low = expf(s[i][0] - most),
                  high = expf(s[i][1] - most);
            p[(ty + 8 * i) * (TILE_POSITIONS + 1) + tx] = low;
            p[(ty + 8 * i) * (TILE_POSITIONS + 1) + tx + 16] = high;
            max[i] = most;
            /* this thread's positions only, until the end */
            sum[i] = sum[i] * rescale + (low + high);
            for (int c = 0; c < 2 * COLUMNS; c++) {
                result[i][c] *= rescale;
            }
        }
        __syncwarp(); /* a row of p is written and read by one half of a warp */
        for (int j = 0; j < TILE_POSITIONS; j++) {
            for (int c = 0; c < COLUMNS; c++) {
                int column = 2 * (tx + 16 * c);
                float2 value = column < hd
                                   ? __half22float2(*(const __half2 *)(v + j * width + column))
                                   : make_float2(0.0f, 0.0f);
                for (int i = 0; i < ROWS; i++) {
                    float weight = p[(ty + 8 * i) * (TILE_POSITIONS + 1) + j];
                    result[i][2 * c] = fmaf(weight, value.x, result[i][2 * c]);
                    result[i][2 * c + 1] = fmaf(weight, value.y, result[i][2 * c + 1]);
                }
            }
        }
    }
    for (int i = 0; i < ROWS; i++) {
        for (int step = 8; step > 0; step /= 2) {
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], step);
        }
        for (int c = 0; c < 2 * COLUMNS; c++) {
            int column = 2 * (tx + 16 * (c / 2)) + c % 2;
            if (column < hd && ty + 8 * i < n_rows) {
                store(y, twin, ((size_t)(first + ty + 8 * i) * n_heads + head) * hd + column,
                      result[i][c] / sum[i]);
            }
        }
    }
}

/* ---------------------------------------------------------------- kernel: the sampler */

/* What the sampler needs to know of one row; see struct sample_params. */
struct draw {
    double u;
    float temperature, top_p;
    int32_t top_k, n_forbidden, first_forbidden;
};

static __device__ float scaled(const float *logits, int id, const struct draw &draw) {
    return logits[id] / (draw.temperature > 0.0f ? draw.temperature : 1.0f);
}

/* A whole number that ranks as the id's scaled logit does; 0 if the id may not be drawn. */
static __device__ uint32_t rank_key(const float *logits, int id, const struct draw &draw,
                                    const int32_t *forbidden) {
    for (int i = 0; i < draw.n_forbidden; i++) {
        if (forbidden[draw.first_forbidden + i] == id) {
            return 0;
        }
    }
    float x = scaled(logits, id, draw) + 0.0f; /* -0 is as high as 0 */
    uint32_t bits = __float_as_uint(x);
    return x > -INFINITY ? (bits & 0x80000000U ? ~bits : bits | 0x80000000U) : 0;
}

/* Rank is by key, equal keys by lower id. */
static __device__ unsigned long long rank_of(uint32_t key, int id) {
    return (unsigned long long)key << 32 | (0xffffffffU - (uint32_t)id);
}

static __device__ int rank_id(unsigned long long rank) {
    return (int)(0xffffffffU - (uint32_t)rank);
}

/* The block's shared memory. */
struct sample_shared {
    unsigned long long sorted[SAMPLE_SMALL];
    float mass[SAMPLE_SMALL];
    unsigned long long best;
    int histogram[256];
    int n_allowed, n_above, n_listed, nonfinite, rest;
    uint32_t threshold;
};

/* threshold = the key of the k-th id in rank order, found digit by digit of 8 bits; returns how
 * many ids have it or a greater one. */
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

/* Sorts n, a power of two, descending: bitonic sort (Batcher 1968). */
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

/* The end of sampler_draw in bpo.c, by one thread: the nucleus, and the walk along it. Sums are in
 * double and in rank order, as there. */
static __device__ int sample_walk(const unsigned long long *sorted, const float *mass, int n,
                                  double total, const struct draw &draw) {
    double kept = 0.0, limit = draw.top_p < 1.0f ? (double)draw.top_p * total : INFINITY;
    int n_kept = 0;
    while (n_kept == 0 || (kept < limit && n_kept < n)) {
        kept += mass[n_kept++];
    }
    double target = draw.u * kept, walked = 0.0;
    int drawn = 0;
    for (int i = 0; i < n_kept; i++) {
        walked += mass[i];
        drawn = mass[i] > 0.0f ? i : drawn;
        if (walked > target) {
            break;
        }
    }
    return rank_id(sorted[drawn]);
}

/* What is to be known of a row before anything is drawn: how many ids are allowed, which ranks
 * first, is every logit finite. */
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

/*
 * Draws an id: sampler_draw of bpo.c, the reference, with the same result for every u. Instead of a
 * heap: the k-th key by counting digits, a list of the ids that have it or a greater one, and a
 * sort of that list, in shared memory unless it is long. all_sorted [rows] [n_sort] and all_mass
 * [rows][n_sort] are scratch, n_sort a power of two of at least V. Grid: rows.
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
    const float best = scaled(logits, rank_id(s->best), draw);
    const bool limited = draw.top_k > 0 && draw.top_k < s->n_allowed;
    double total = 0.0;
    if (!limited) { /* the mass of all, in the order of the ids */
        for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
            mass[id] = rank_key(logits, id, draw, forbidden)
                           ? canonical_exp(scaled(logits, id, draw) - best)
                           : 0.0f;
        }
        __syncthreads();
        for (int id = 0; id < vocab && threadIdx.x == 0; id++) {
            total += mass[id];
        }
    }
    const int n = limited ? sample_threshold(s, logits, vocab, draw, forbidden) : s->n_allowed;
    int n_padded = 2;
    while (n_padded < n) {
        n_padded *= 2;
    }
    if (n_padded <= SAMPLE_SMALL) {
        sorted = s->sorted;
    }
    for (int i = n + threadIdx.x; i < n_padded; i += blockDim.x) {
        sorted[i] = 0; /* ranks last */
    }
    __syncthreads(); /* the sum of mass is done: what follows overwrites it */
    mass = n_padded <= SAMPLE_SMALL ? s->mass : mass;
    for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
        uint32_t key = rank_key(logits, id, draw, forbidden);
        if (key != 0 && key >= s->threshold) {
            /* in any order: it is sorted now */
            sorted[atomicAdd(&s->n_listed, 1)] = rank_of(key, id);
        }
    }
    __syncthreads();
    sort_descending(sorted, n_padded);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        mass[i] = canonical_exp(scaled(logits, rank_id(sorted[i]), draw) - best);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < n && limited; i++) {
            total += mass[i];
        }
        ids[blockIdx.x] = sample_walk(sorted, mass, n, total, draw);
    }
}

/* ---------------------------------------------------------------- memory */

/* Ends a block's life; NULL is none. */
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

/* Graphs point to memory: when some of it goes, or moves, they are recorded anew. */
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
    (void)cudaStreamSynchronize(b->stream); /* it may still be in use */
    forget_recorded(b);
    device_free(data);
}

/* Scratch memory of n_bytes at least, or NULL: the step has failed. */
static void *scratch_get(struct backend *b, struct scratch *s, size_t n_bytes) {
    if (b->error.code) {
        return NULL;
    }
    if (n_bytes <= s->n_bytes) {
        return s->data;
    }
    if (b->recording) { /* cannot be: the step ran once before, with the same sizes */
        (void)bpo_fail(&b->error, BPO_ERR_RUN, GPU_HINT,
                       "a recorded step needs more memory than it did at first");
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

/* Waits until all is done; what had been staged has then been read. */
static int synchronize(struct backend *b, const char *what, struct bpo_error *err) {
    int failed = check(cudaStreamSynchronize(b->stream), what, err);
    b->n_staged = 0;
    return failed;
}

/* Copies to the GPU through pinned memory. The caller's memory may change at once; the copy is done
 * before what is launched later. */
static int gpu_upload(struct backend *b, void *to, const void *from_host, size_t n_bytes,
                      struct bpo_error *err) {
    int failed = 0;
    for (size_t done = 0, n; done < n_bytes && !failed; done += n) {
        /* this half is full: take the other, once the GPU has read it */
        if (b->n_staged == STAGE_BYTES) {
            failed = check(cudaEventRecord(b->stage_read[b->half], b->stream), "uploading", err);
            b->half = 1 - b->half;
            failed = failed ? failed
                            : check(cudaEventSynchronize(b->stage_read[b->half]), "uploading", err);
            b->n_staged = 0;
        }
        n = n_bytes - done < STAGE_BYTES - b->n_staged ? n_bytes - done : STAGE_BYTES - b->n_staged;
        if (!failed) {
            unsigned char *staged = b->stage[b->half] + b->n_staged;
            memcpy(staged, (const char *)from_host + done, n);
            failed = check(
                cudaMemcpyAsync((char *)to + done, staged, n, cudaMemcpyHostToDevice, b->stream),
                "uploading", err);
            b->n_staged += n;
        }
    }
    return failed;
}

static int gpu_download(struct backend *b, void *to_host, const void *from, size_t n_bytes,
                        struct bpo_error *err) {
    int failed = 0;
    for (size_t done = 0, n; done < n_bytes && !failed; done += n) {
        n = n_bytes - done < STAGE_BYTES ? n_bytes - done : STAGE_BYTES;
        failed = check(cudaMemcpyAsync(b->stage[b->half], (const char *)from + done, n,
                                       cudaMemcpyDeviceToHost, b->stream),
                       "downloading", err);
        failed = failed ? failed : synchronize(b, "running a step", err);
        if (!failed) {
            memcpy((char *)to_host + done, b->stage[b->half], n);
        }
    }
    return failed;
}

static const void *gpu_load_weights(struct backend *b, const void *host, size_t n_bytes,
                                    struct bpo_error *err) {
    size_t available = 0, total = 0;
    int failed = device_memory(b, &available, &total, err);
    if (!failed && n_bytes > available) {
        failed = bpo_fail(
            err, BPO_ERR_RESOURCE, "free the GPU of other programs, or use --device cpu",
            "the model's weights do not fit the GPU: %.1f MiB needed, %.1f of %.1f MiB are free",
            (double)n_bytes / 1048576.0, (double)available / 1048576.0, (double)total / 1048576.0);
    }
    if (!failed && !(b->weights = device_alloc(b, n_bytes, MEMORY_BUFFER, err))) {
        failed = BPO_ERR_RESOURCE;
    }
    for (size_t done = 0, n; done < n_bytes && !failed; done += n) {
        n = n_bytes - done < STAGE_BYTES ? n_bytes - done : STAGE_BYTES;
        failed = gpu_upload(b, (char *)b->weights + done, (const char *)host + done, n, err);
        if (!failed && b->progress) {
            b->progress(b->user, done + n, n_bytes);
        }
    }
    failed = failed ? failed : synchronize(b, "uploading the weights", err);
    return failed ? NULL : b->weights;
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
    void *const memory[] = {b->workspace, b->weights,    b->found,
                            b->twin.data, b->parts.data, b->drawing.data};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) {
        device_free(memory[i]);
    }
    if (b->stream) {
        (void)cudaStreamDestroy(b->stream);
    }
    free(b);
}

/* The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses), or an error with the driver's own
 * words. */
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
    int failed = check(cudaSetDevice(0), "opening the GPU", err);
    const struct {
        int *value;
        cudaDeviceAttr name;
    } table[] = {{&b->n_processors, cudaDevAttrMultiProcessorCount},
                 {&major, cudaDevAttrComputeCapabilityMajor},
                 {&minor, cudaDevAttrComputeCapabilityMinor}};
    for (size_t i = 0; i < sizeof table / sizeof table[0] && !failed; i++) {
        failed =
            check(cudaDeviceGetAttribute(table[i].value, table[i].name, 0), "opening the GPU", err);
    }
    (void)snprintf(b->arch, sizeof b->arch, "sm_%d%d", major, minor);
    return failed;
}

static int gpu_set_up(struct backend *b, struct bpo_error *err) {
    int version = 0;
    int failed =
        check(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "opening the GPU", err);
    for (int i = 0; i < 2 && !failed; i++) {
        failed = check(cudaHostAlloc((void **)&b->stage[i], STAGE_BYTES, cudaHostAllocDefault),
                       "pinning memory", err);
        failed = failed ? failed
                        : check(cudaEventCreateWithFlags(&b->stage_read[i], cudaEventDisableTiming),
                                "opening the GPU", err);
    }
    failed = failed ? failed : check_blas(cublasCreate(&b->blas), "opening it", err);
    failed = failed ? failed : check_blas(cublasSetStream(b->blas, b->stream), "opening it", err);
    failed = failed ? failed : check_blas(cublasGetVersion(b->blas, &version), "opening it", err);
    if (!failed &&
        (!(b->workspace = device_alloc(b, WORKSPACE_BYTES, MEMORY_BUFFER, err)) ||
         !(b->found = (int32_t *)device_alloc(b, sizeof *b->found, MEMORY_BUFFER, err)))) {
        failed = BPO_ERR_RESOURCE;
    }
    /* A workspace of our own, and after the stream (which resets it): a recorded call must not
     * allocate one. */
    failed = failed ? failed
                    : check_blas(cublasSetWorkspace(b->blas, b->workspace, WORKSPACE_BYTES),
                                 "opening it", err);
    (void)snprintf(b->blas_version, sizeof b->blas_version, "cuBLAS %d.%d.%d", version / 10000,
                   version / 100 % 100, version % 100);
    return failed;
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
    if (gpu_find(b, err) || gpu_set_up(b, err)) {
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
    b->twin_of = NULL;
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

/* Ends the recording, which must be done even after an error, and makes the graph. */
static void step_recorded(struct backend *b) {
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

/* Does not wait: what goes wrong while the step runs is reported by the call that fetches its
 * results. */
static int gpu_step_end(struct backend *b, struct bpo_error *err) {
    if (b->recording) {
        step_recorded(b);
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

/* Room for a result's fp16 twin, if its rows are so many that cuBLAS will read it; else NULL. y is
 * then known as its original. */
static __half *twin_get(struct backend *b, const float *y, int32_t n, size_t cols) {
    b->twin_of = NULL;
    if (n <= DECODE_ROWS) {
        return NULL;
    }
    __half *twin = (__half *)scratch_get(b, &b->twin, (size_t)n * cols * sizeof *twin);
    b->twin_of = twin ? y : NULL;
    return twin;
}

/* y is about to be written without a twin. */
static void twin_drop(struct backend *b, const float *y) {
    b->twin_of = b->twin_of == y ? NULL : b->twin_of;
}

static void gpu_embed(struct backend *b, float *x, const struct weight *table,
                      const struct rows *rows) {
    twin_drop(b, x);
    launch(b, "embed", embed_row, dim3((unsigned)rows->n), BLOCK, 0, x, (const char *)table->data,
           rows->token, (int)table->cols, table->row_bytes);
}

static void gpu_rmsnorm(struct backend *b, float *y, const float *x, const struct weight *gain,
                        int32_t n, float eps) {
    __half *twin = twin_get(b, y, n, gain->cols);
    launch(b, "rmsnorm", rmsnorm_row, dim3((unsigned)n), BLOCK, WARP * sizeof(float), y, twin, x,
           (const __half *)gain->data, (int)gain->cols, eps);
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
    twin_drop(b, qkv);
    launch(b, "rope_kv", rope_kv_head, grid, 64, 0, qkv, *kv, angles, rows->slot, rows->pos,
           (int)layer, (int)n_heads);
}

static void gpu_swiglu(struct backend *b, float *y, const float *gate_up, int32_t n,
                       int32_t ffn_dim) {
    __half *twin = twin_get(b, y, n, (size_t)ffn_dim);
    launch(b, "swiglu", swiglu_row, dim3(blocks((size_t)ffn_dim, BLOCK), (unsigned)n), BLOCK, 0, y,
           twin, gate_up, (int)ffn_dim);
}

static void gpu_gather(struct backend *b, float *y, const float *x, const int32_t *index, int32_t n,
                       int32_t dim) {
    twin_drop(b, y);
    launch(b, "gather", gather_row, dim3((unsigned)n), BLOCK, 0, y, x, index, (int)dim);
}

/* cuBLAS is column-major: w [rows][cols] is to it a matrix of rows columns, y = x w^T is y^T = w
 * x^T. */
static void matmul_blas(struct backend *b, float *y, const float *x, const struct weight *w,
                        int32_t n, enum matmul_mode mode) {
    const size_t n_values = (size_t)n * w->cols;
    if (b->twin_of != x) {
        __half *twin = twin_get(b, x, n, w->cols);
        launch(b, "matmul", narrow_values, dim3(blocks(n_values, BLOCK)), BLOCK, 0, twin, x,
               n_values);
    }
    if (b->error.code) {
        return;
    }
    const float one = 1.0f, zero = 0.0f;
    cublasStatus_t status =
        cublasGemmEx(b->blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)w->rows, n, (int)w->cols, &one,
                     w->data, CUDA_R_16F, (int)(w->row_bytes / sizeof(__half)), b->twin.data,
                     CUDA_R_16F, (int)w->cols, mode == MATMUL_ADD ? &one : &zero, y, CUDA_R_32F,
                     (int)w->rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    (void)check_blas(status, "matmul", &b->error);
}

template <int R>
static void matmul_few(struct backend *b, float *y, const float *x, const struct weight *w,
                       int32_t n, enum matmul_mode mode) {
    bool vector =
        w->cols % 8 == 0 && w->row_bytes % 16 == 0 && ((uintptr_t)w->data | (uintptr_t)x) % 16 == 0;
    launch(b, "matmul", vector ? matmul_rows<R, true> : matmul_rows<R, false>,
           dim3(blocks(w->rows, (size_t)BLOCK / WARP * WEIGHT_ROWS)), BLOCK, 0, y, x,
           (const char *)w->data, (int)n, (int)w->rows, (int)w->cols, w->row_bytes,
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
        matmul_few<8>(b, y, x, w, n, mode);
    } else if (n > 2) {
        matmul_few<4>(b, y, x, w, n, mode);
    } else if (n > 1) {
        matmul_few<2>(b, y, x, w, n, mode);
    } else {
        matmul_few<1>(b, y, x, w, n, mode);
    }
    twin_drop(b, y);
}

/* What attention's launches share. */
struct attention_call {
    float *y;
    __half *twin;
    const float *qkv;
    const struct kv_cache *kv;
    const struct rows *rows;
    int layer, n_heads;
    float scale;
    bool vector; /* keys and values can be read 128 bits at a time */
};

/* Splits, so that a processor has some blocks to choose from; none shorter than a chunk. The
 * longest position that there can be decides, not this step's: the grid is recorded. */
static struct split split_choose(const struct backend *b, const struct kv_cache *kv,
                                 int32_t n_rows) {
    int n_chunks = (kv->n_positions + SPLIT_CHUNK - 1) / SPLIT_CHUNK;
    int n = 8 * b->n_processors / (n_rows * kv->n_kv_heads);
    n = n < 1 ? 1 : n > n_chunks ? n_chunks : n;
    int per_split = (n_chunks + n - 1) / n;
    struct split split = {(n_chunks + per_split - 1) / per_split, per_split * SPLIT_CHUNK};
    return split;
}

template <int G>
static void attention_few(struct backend *b, const struct attention_call *c, int32_t first,
                          int32_t n) {
    const struct kv_cache *kv = c->kv;
    const int hd = kv->head_dim, group = c->n_heads / kv->n_kv_heads,
              n_teams = SPLIT_BLOCK / ((hd + 7) / 8);
    const struct split split = split_choose(b, kv, n);
    const size_t row_values = (size_t)(c->n_heads + 2 * kv->n_kv_heads) * hd;
    const size_t n_parts = (size_t)n * c->n_heads * split.n * (PART_VALUES + hd);
    const size_t shared =
        sizeof(float) * G * ((size_t)hd + SPLIT_CHUNK + 4 + (size_t)n_teams * ((hd + 7) / 8) * 8);
    float *parts = (float *)scratch_get(b, &b->parts, n_parts * sizeof *parts);
    dim3 grid((unsigned)split.n, (unsigned)(kv->n_kv_heads * ((group + G - 1) / G)), (unsigned)n);
    launch(b, "attention", c->vector ? attention_split<G, true> : attention_split<G, false>, grid,
           SPLIT_BLOCK, shared, parts, c->qkv + first * row_values, *kv, c->rows->slot + first,
           c->rows->pos + first, c->layer, c->n_heads, split, c->scale);
    const size_t at = (size_t)first * c->n_heads * hd;
    launch(b, "attention", attention_join, dim3((unsigned)c->n_heads, (unsigned)n), 64, 0,
           c->y + at, c->twin ? c->twin + at : NULL, parts, c->rows->slot + first,
           c->rows->pos + first, hd, split);
}

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
    launch(b, "attention",
           kernels[hd <= 32    ? 0
                   : hd <= 64  ? 1
                   : hd <= 128 ? 2
                               : 3][c->vector],
           dim3((unsigned)c->n_heads, (unsigned)n_tiles), TILE_BLOCK, shared, c->y, c->twin, c->qkv,
           *c->kv, c->rows->slot, c->rows->pos, *tiles, c->layer, c->n_heads, c->scale);
}

/* Cuts the prompts' rows into tiles. */
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
    const bool one_each = n_heads == kv->n_kv_heads; /* no two query heads share keys and values */
    if (hd > MAX_HEAD_DIM && !b->error.code) {
        (void)bpo_fail(&b->error, BPO_ERR_RESOURCE, "use --device cpu",
                       "heads of size %zu; the GPU kernels take up to %d", hd, (int)MAX_HEAD_DIM);
    }
    const bool vector = hd % 8 == 0 && ((uintptr_t)kv->data | kv->slot_bytes | kv->layer_bytes |
                                        kv->plane_bytes | kv->head_bytes | kv->pos_bytes) %
                                               16 ==
                                           0;
    const struct attention_call call = {y,       twin_get(b, y, rows->n, (size_t)n_heads * hd),
                                        qkv,     kv,
                                        rows,    layer,
                                        n_heads, 1.0f / sqrtf((float)hd),
                                        vector};
    const struct span all = {0, rows->n, ROWS_DECODE};
    for (int32_t s = 0; s < rows->n_spans || s == 0; s++) {
        const struct span *span = rows->n_spans > 0 ? &rows->spans[s] : &all;
        if (span->kind == ROWS_DECODE && span->n > 0 && !b->error.code) {
            (one_each ? attention_few<1> : attention_few<4>)(b, &call, span->first, span->n);
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
    launch(b, "first_nonfinite", nonfinite_row, dim3((unsigned)n), BLOCK, 0, b->found, x, cols);
    if (b->error.code && !failed) {
        failed = b->error.code;
        *err = b->error;
    }
    failed = failed ? failed : gpu_download(b, found, b->found, sizeof *found, err);
    *found = failed || *found == none ? -1 : *found;
    return failed;
}

/* Where the parts of the sampler's scratch memory begin. */
struct drawing {
    size_t draws, forbidden, ids, sorted, mass, n_bytes;
    int n_sort;
};

static struct drawing drawing_layout(int32_t n, size_t n_forbidden, size_t vocab) {
    struct drawing at = {};
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

static int gpu_sample(struct backend *b, int32_t *ids, const float *logits,
                      const struct sample_params *params, int32_t n, size_t vocab,
                      struct bpo_error *err) {
    size_t n_forbidden = 0;
    for (int32_t i = 0; i < n; i++) {
        n_forbidden += (size_t)params[i].n_forbidden;
    }
    const struct drawing at = drawing_layout(n, n_forbidden, vocab);
    b->error.code = BPO_OK;
    char *device = (char *)scratch_get(b, &b->drawing, at.n_bytes),
         *host = (char *)calloc(1, at.ids);
    int failed = device ? 0 : b->error.code;
    if (!failed && !host) {
        failed = bpo_fail(&b->error, BPO_ERR_RESOURCE, NULL,
                          "out of memory: %zu bytes to draw with", at.ids);
    }
    size_t n_listed = 0;
    for (int32_t i = 0; i < n && !failed; i++) {
        const struct sample_params *p = &params[i];
        const struct draw draw = {p->u,     p->temperature, p->top_p,
                                  p->top_k, p->n_forbidden, (int32_t)n_listed};
        memcpy(host + (size_t)i * sizeof draw, &draw, sizeof draw);
        if (p->n_forbidden > 0) {
            memcpy(host + at.forbidden + n_listed * sizeof(int32_t), p->forbidden,
                   (size_t)p->n_forbidden * sizeof(int32_t));
        }
        n_listed += (size_t)p->n_forbidden;
    }
    failed = failed ? failed : gpu_upload(b, device, host, at.ids, &b->error);
    if (!failed) {
        launch(b, "sample", sample_row, dim3((unsigned)n), SAMPLE_BLOCK,
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

static int kv_check(const struct kv_cache *kv, int32_t slot, int32_t n, struct bpo_error *err) {
    if (slot < 0 || slot >= kv->n_slots || n < 0 || n > kv->n_positions) {
        return bpo_fail(
            err, BPO_ERR_RUN, NULL,
            "the KV cache has %d slots of %d positions; asked for %d positions of slot %d",
            kv->n_slots, kv->n_positions, n, slot);
    }
    return 0;
}

/* The keys or values of all heads of one layer of a slot: a column of blocks, head_bytes apart. */
static char *kv_plane(const struct kv_cache *kv, int32_t slot, int32_t layer, int32_t plane) {
    return (char *)kv->data + (size_t)slot * kv->slot_bytes + (size_t)layer * kv->layer_bytes +
           (size_t)plane * kv->plane_bytes;
}

static int gpu_kv_copy(struct backend *b, const struct kv_cache *kv, int32_t to_slot,
                       int32_t from_slot, int32_t n, struct bpo_error *err) {
    int failed = kv_check(kv, to_slot, n, err);
    failed = failed ? failed : kv_check(kv, from_slot, n, err);
    for (int32_t i = 0; i < 2 * kv->n_layers && n > 0 && to_slot != from_slot && !failed; i++) {
        failed = check(cudaMemcpy2DAsync(kv_plane(kv, to_slot, i / 2, i % 2), kv->head_bytes,
                                         kv_plane(kv, from_slot, i / 2, i % 2), kv->head_bytes,
                                         (size_t)n * kv->pos_bytes, (size_t)kv->n_kv_heads,
                                         cudaMemcpyDeviceToDevice, b->stream),
                       "copying the KV cache", err);
    }
    return failed;
}

/* One head after another, through the same pinned memory as all that goes up and down. */
static int gpu_kv_export(struct backend *b, void *to_host, const struct kv_cache *kv, int32_t slot,
                         int32_t n, struct bpo_error *err) {
    const size_t n_bytes = (size_t)n * kv->pos_bytes, n_heads = (size_t)kv->n_kv_heads;
    int failed = kv_check(kv, slot, n, err);
    for (size_t i = 0; i < 2 * (size_t)kv->n_layers * n_heads && !failed; i++) {
        size_t plane = i / n_heads;
        failed = gpu_download(b, (char *)to_host + i * n_bytes,
                              kv_plane(kv, slot, (int32_t)(plane / 2), (int32_t)(plane % 2)) +
                                  i % n_heads * kv->head_bytes,
                              n_bytes, err);
    }
    return failed;
}

static int gpu_kv_import(struct backend *b, const struct kv_cache *kv, const void *from_host,
                         int32_t slot, int32_t n, struct bpo_error *err) {
    const size_t n_bytes = (size_t)n * kv->pos_bytes, n_heads = (size_t)kv->n_kv_heads;
    int failed = kv_check(kv, slot, n, err);
    for (size_t i = 0; i < 2 * (size_t)kv->n_layers * n_heads && !failed; i++) {
        size_t plane = i / n_heads;
        failed = gpu_upload(b,
                            kv_plane(kv, slot, (int32_t)(plane / 2), (int32_t)(plane % 2)) +
                                i % n_heads * kv->head_bytes,
                            (const char *)from_host + i * n_bytes, n_bytes, err);
    }
    return failed;
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

/* What backend.c looks for in this library. */
extern "C" __attribute__((visibility("default"))) const struct kernels *kernels_cuda(void) {
    static const struct kernels table = make_table();
    return &table;
}

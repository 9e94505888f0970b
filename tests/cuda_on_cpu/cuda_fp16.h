/* cuda_fp16.h - part of tests/cuda_on_cpu: see cuda_runtime.h there. */
#ifndef CUDA_ON_CPU_FP16_H
#define CUDA_ON_CPU_FP16_H

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};

struct alignas(4) __half2 {
    __half x, y;
};

static inline float __half2float(__half h) {
    uint32_t exponent = h.bits >> 10 & 31, fraction = h.bits & 0x3ff;
    float size = exponent == 0
                     ? (float)fraction * 0x1p-24f
                     : __uint_as_float(exponent == 31 ? 0x7f800000U | fraction << 13
                                                      : (exponent + 112) << 23 | fraction << 13);
    return h.bits & 0x8000 ? -size : size;
}

/* Rounds to nearest, ties to even. */
static inline __half __float2half_rn(float f) {
    uint32_t bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff, half;
    if (size > 0x7f800000) {
        half = 0x7fff;
    } else if (size >= 0x47800000) { /* 65536 */
        half = 0x7c00;
    } else if (size < 0x38800000) { /* below 2^-14: subnormal */
        half = __float_as_uint(__uint_as_float(size) + 0.5f) - __float_as_uint(0.5f);
    } else {
        half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
    }
    return __half{(uint16_t)(sign | half)};
}

static inline float2 __half22float2(__half2 h) {
    return float2{__half2float(h.x), __half2float(h.y)};
}

#endif

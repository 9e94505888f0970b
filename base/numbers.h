/*
 * numbers.h - fp16, and the functions that must give the same bits on every machine. The exp, sin
 * and pow of C libraries differ from one library to the next; these do not.
 */
#ifndef BPO_BASE_NUMBERS_H
#define BPO_BASE_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* kernels.cu uses the inline ones on the GPU. */
#ifdef __CUDACC__
#define NUMBERS_INLINE static inline __host__ __device__
#else
#define NUMBERS_INLINE static inline
#endif

/* The bits of an fp32 value, and back. */
NUMBERS_INLINE uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

NUMBERS_INLINE float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* fp16 is sign, 5 bits of exponent (bias 15), 10 bits of fraction. Widening is exact. */
NUMBERS_INLINE float widen_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 0) { /* subnormal, or zero: fraction 2^-24 */
        return float_of(sign | bits_of((float)fraction * 0x1p-24f));
    }
    if (exponent == 31) { /* infinity, or NaN, which becomes quiet */
        return float_of(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    }
    return float_of(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

/* Rounds to nearest, ties to even. What is too large becomes infinity. A NaN becomes quiet and
 * keeps its upper bits. */
NUMBERS_INLINE uint16_t narrow_f16(float f) {
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    }
    /* Subnormal: from 0.5 on, floats are 2^-24 apart, as fp16 subnormals are. */
    if (rest < (127 - 14) << 23) {
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    }
    /* A carry goes into the 11th bit of the fraction, and on into the exponent. */
    rest += 0xfff + (rest >> 13 & 1);
    rest = (rest >> 13) - ((127 - 15) << 10);
    return (uint16_t)(sign | (rest < 0x7c00 ? rest : 0x7c00));
}

/*
 * exp(x) for x <= 0 (a little above 0 does no harm).
 *
 *     x = n ln 2 + r, |r| <= ln 2 / 2      exp(x) = 2^n exp(r)
 *     exp(r) = 1 + r + r^2 (c0 + c1 r + .. + c4 r^4)
 *
 * The polynomial is a minimax fit with a relative error of 1.1e-8. Below -87 the result would soon
 * be subnormal; there it is 0. Over all floats, the result is within 0.976 units in the last place.
 */
#define EXP_LOG2E 0x1.715476p+0f
/* (t + EXP_ROUND) - EXP_ROUND is t rounded to an integer, and the low bits of the sum are it. */
#define EXP_ROUND 0x1.8p23f
#define EXP_LN2_HIGH 0x1.62e430p-1f
#define EXP_LN2_LOW (-0x1.05c610p-29f)
#define EXP_C0 0x1p-1f
#define EXP_C1 0x1.5554dcp-3f
#define EXP_C2 0x1.55551ap-5f
#define EXP_C3 0x1.120b6ep-7f
#define EXP_C4 0x1.6d110ap-10f
#define EXP_MIN (-87.0f)

NUMBERS_INLINE float canonical_exp(float x) {
    if (x < EXP_MIN) {
        return 0.0f;
    }
    float t = fmaf(x, EXP_LOG2E, EXP_ROUND), n = t - EXP_ROUND;
    float r = fmaf(-n, EXP_LN2_LOW, fmaf(-n, EXP_LN2_HIGH, x));
    float c = fmaf(fmaf(fmaf(fmaf(EXP_C4, r, EXP_C3), r, EXP_C2), r, EXP_C1), r, EXP_C0);
    float p = fmaf(fmaf(c, r, 1.0f), r, 1.0f);
    /* 2^n: the low bits of t are n, and the shift drops the other bits. */
    return p * float_of((bits_of(t) + 127) << 23);
}

/* sin and cos of an angle a in [0, 2^30), in radians. */
void sin_cos(float a, float *sine, float *cosine);

/* base^y for base > 0 and y in [0, 1]. */
double power(double base, double y);

#endif

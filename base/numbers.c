/*
 * numbers.c - see numbers.h.
 */
#include "base/numbers.h"

/*
 * sin(a) and cos(a) for a in [0, 2^30): a = n pi/2 + r with |r| <= pi/4, the Taylor series at r,
 * and then a swap and signs by the quadrant n mod 4. All in double, so that the results are the
 * floats nearest to the exact ones, but for about 1 in 10^8.
 */
void sin_cos(float a, float *sine, float *cosine) {
    static const double reciprocal[] = {/* 1/2!, 1/3!, ... 1/17! */
                                        1.0 / 2,
                                        1.0 / 6,
                                        1.0 / 24,
                                        1.0 / 120,
                                        1.0 / 720,
                                        1.0 / 5040,
                                        1.0 / 40320,
                                        1.0 / 362880,
                                        1.0 / 3628800,
                                        1.0 / 39916800,
                                        1.0 / 479001600,
                                        1.0 / 6227020800,
                                        1.0 / 87178291200,
                                        1.0 / 1307674368000,
                                        1.0 / 20922789888000,
                                        1.0 / 355687428096000};
    const double half_pi_high = 0x1.921fb54442d18p+0, half_pi_low = 0x1.1a62633145c07p-54,
                 two_over_pi = 0x1.45f306dc9c883p-1;
    int64_t quadrant = (int64_t)(a * two_over_pi + 0.5);
    double n = (double)quadrant;
    double r = fma(-n, half_pi_low, fma(-n, half_pi_high, a)), r2 = r * r;
    double s = 0, c = 0;
    for (int i = 15; i >= 1; i -= 2) { /* s = 1/3! - r^2/5! + ..., c = 1/2! - r^2/4! + ... */
        s = fma(-r2, s, reciprocal[i]);
        c = fma(-r2, c, reciprocal[i - 1]);
    }
    s = fma(-r2 * r, s, r);
    c = fma(-r2, c, 1.0);
    double by_quadrant[4] = {s, c, -s, -c};
    *sine = (float)by_quadrant[quadrant & 3];
    *cosine = (float)by_quadrant[(quadrant + 1) & 3];
}

/*
 * base^y for base > 0 and y in [0, 1], in double: exp(y ln base).
 *
 *     base = 2^e m, m in [1/sqrt 2, sqrt 2)
 *     ln base = e ln 2 + 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1)
 */
double power(double base, double y) {
    const double ln2 = 0x1.62e42fefa39efp-1;
    uint64_t u;
    memcpy(&u, &base, sizeof u);
    int e = (int)(u >> 52 & 0x7ff) - 1023;
    u = (u & 0xfffffffffffff) | (uint64_t)1023 << 52;
    double m;
    memcpy(&m, &u, sizeof m);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m /= 2;
        e++;
    }
    double s = (m - 1) / (m + 1), series = 0;
    for (int i = 25; i >= 1; i -= 2) {
        series = fma(series, s * s, 1.0 / i);
    }
    double x = y * fma(2 * s, series, e * ln2);

    /* exp(x) = 2^n exp(r), as in canonical_exp, with a longer series */
    double n = (double)(int64_t)(x / ln2 + (x < 0 ? -0.5 : 0.5)), r = fma(-n, ln2, x), p = 0;
    for (int i = 18; i >= 1; i--) {
        p = fma(p, r / i, 1.0);
    }
    u = (uint64_t)((int64_t)n + 1023) << 52;
    double scale;
    memcpy(&scale, &u, sizeof scale);
    return p * scale;
}

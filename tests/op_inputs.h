/*
 * op_inputs.h - inputs for the tests of the ops: fp16 weights of random values, and the odd sizes
 * at which kernels go wrong.
 */
#ifndef BPO_OP_INPUTS_H
#define BPO_OP_INPUTS_H

#include "base/numbers.h"
#include "kernels.h"
#include "random_values.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* [rows][n] normal values, times scale, as fp16; to be freed by the caller. A row starts every
 * `stride` values. The gaps between rows are NaN, so that reading them shows. */
static inline uint16_t *random_f16(size_t rows, size_t n, size_t stride, float scale) {
    uint16_t *x = must_alloc(rows * stride * sizeof *x);
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < stride; i++) {
            x[r * stride + i] = i < n ? narrow_f16(scale * random_normal()) : 0x7e00;
        }
    }
    return x;
}

/* The matrix [rows][cols] whose rows start every `stride` values of data. */
static inline struct weight weight_of(const void *data, size_t rows, size_t cols, size_t stride) {
    return (struct weight){
        .data = data, .dtype = DTYPE_F16, .rows = rows, .cols = cols, .row_bytes = stride * 2};
}

/* The heads of an attention layer. */
struct heads {
    int32_t n_heads, n_kv_heads, head_dim;
};

/* Rows of a call, and sizes of a row: around the widths of vectors and of tiles. */
static const int32_t row_counts[] = {1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 65};
static const size_t odd_sizes[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 100, 288, 1027};

#endif

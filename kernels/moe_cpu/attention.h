/* What the two directions of causal attention share: strided inputs, packing with a factor, products with unpacked left operands.
 *
 * Letters: S positions, D elements of a query or key, V of a value. N query heads share M key heads, N / M consecutive ones each.
 */
#ifndef MOE_CPU_ATTENTION_H
#define MOE_CPU_ATTENTION_H
#include <math.h>

#include "tiles.h"

enum { BLOCK = 96 }; /* query rows of a block: a multiple of MR and NR on every processor */
_Static_assert(BLOCK % MR == 0 && BLOCK % NR == 0, "a block is whole tiles");

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    long B, N, M, S, D, V;
} sizes;

/* element (b, n, s, j) of a tensor is at data[b * batch + n * head + s * row + j] */
typedef struct {
    float *data;
    long batch, head, row;
} strided;

static inline float *head_of(strided x, long b, long n) { return x.data + b * x.batch + n * x.head; }
static inline long round_up(long count, long size) { return blocks(count, size) * size; }
static inline vec both(float value) { return (vec){0} + value; }
static inline vec greater(vec a, vec b) { return pick(a > b, a, b); }

/* positions of a vector's elements */
static inline ints lanes(void) {
    ints at;
    for (int i = 0; i < VL; i++) at[i] = i;
    return at;
}

/* sum over k < K of a(i, k) x b[k][0 .. width vectors], where a(i, k) = a[i * row + k * step] */
INLINE tile multiply_strided(long K, const float *restrict a, long row, long step, const float *restrict b, int width) {
    tile sum;
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) sum.at[i][0] = sum.at[i][1] = (vec){0};
#pragma GCC unroll 2
    for (long k = 0; k < K; k++) {
        const vec left = *(const vec *)b, right = width == 2 ? *(const vec *)(b + VL) : left;
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            sum.at[i][0] += a[i * row] * left;
            if (width == 2) sum.at[i][1] += a[i * row] * right;
        }
        a += step;
        b += width * VL;
    }
    return sum;
}

/* panels[column / NR][row][..] = factor x source, of `rows` rows, then zeros up to `padded`; a last panel may be VL wide */
static inline void pack_panels(const float *source, long stride, long rows, long padded, long columns, float factor, float *panels) {
    for (long first = 0; first < columns; first += NR, panels += padded * NR) {
        const long n = columns - first;
        const long width = n > VL ? NR : VL;
        for (long s = 0; s < rows; s++) {
            const float *row = source + s * stride + first;
            float *to = panels + s * width;
            if (n >= width)
                for (long j = 0; j < width; j += VL) store(to + j, load(row + j) * factor);
            else
                for (long j = 0; j < width; j++) to[j] = j < n ? row[j] * factor : 0;
        }
        memset(panels + rows * width, 0, sizeof(float) * (padded - rows) * width);
    }
}

/* panels[row / size][k][row % size] = factor x source, of `rows` rows, then zeros up to a multiple of `size` */
INLINE void pack_turned(const float *source, long stride, long rows, long K, int size, float factor, float *panels) {
    for (long first = 0; first < rows; first += size, panels += size * K) {
        pack_rows(source + first * stride, stride, NULL, least(size, rows - first), K, size, panels);
        if (factor != 1)
            for (long k = 0; k < size * K; k++) panels[k] *= factor;
    }
}

#endif

/* What the two directions of causal attention share: strided inputs, what rows see, packing with a factor, products with unpacked
 * left operands.
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

/* cosines and sines of every position, [S, width], for the first `width` elements of queries and keys; no cosines: no rotation */
typedef struct {
    const float *cos, *sin;
    long width;
} angles;

/* the first key that a row sees, for rows of batch b at first + b * batch: never later than the row itself, and no row's is before
 * the one of the row before; no keys named: all from 0 on */
typedef struct {
    const int *first;
    long batch;
} sight;

static inline float *head_of(strided x, long b, long n) { return x.data + b * x.batch + n * x.head; }
static inline long round_up(long count, long size) { return blocks(count, size) * size; }
static inline vec both(float value) { return (vec){0} + value; }
static inline vec greater(vec a, vec b) { return pick(a > b, a, b); }

/* positions of a vector's elements; written out, so that what is computed of them is known when compiling */
#if defined(__AVX512F__)
static const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
static const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const ints lanes = {0, 1, 2, 3};
#endif

/* first keys of rows [row, row + BLOCK); those after the last row have the last row's */
static inline void first_keys(sight seen, long S, long b, long row, int *begin) {
    for (long i = 0; i < BLOCK; i++) begin[i] = seen.first ? seen.first[b * seen.batch + least(row + i, S - 1)] : 0;
}

/* whether they are what `sight` says */
static inline int in_order(sight seen, long S, long batches) {
    for (long b = 0; seen.first && b < batches; b++)
        for (long s = 0, before = 0; s < S; before = seen.first[b * seen.batch + s++])
            if (seen.first[b * seen.batch + s] < before || seen.first[b * seen.batch + s] > s) return 0;
    return 1;
}

/* ask for rows [first, first + MR) of a head, to be read or written soon: strided rows are what processors do not foresee */
static inline void fetch(strided x, long S, long columns, long b, long n, long first) {
    const char *row = (const char *)(head_of(x, b, n) + first * x.row);
    for (long s = first; s < least(first + MR, S); s++, row += x.row * sizeof(float))
        for (long byte = 0; byte < columns * (long)sizeof(float); byte += 64) __builtin_prefetch(row + byte, 0, 2);
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

/* rows as they are; or, where there are angles, in `room`, element i turned with i + width / 2 by those of positions from `first` on */
static inline const float *turned(const float *x, long *stride, long rows, long first, long D, angles by, float *restrict room) {
    if (!by.cos) return x;
    const long half = by.width / 2;
    for (long s = 0; s < rows; s++) {
        const float *row = x + s * *stride, *c = by.cos + (first + s) * by.width, *n = by.sin + (first + s) * by.width;
        float *restrict to = room + s * D;
        for (long j = 0; j < half; j++) to[j] = row[j] * c[j] - row[half + j] * n[j];
        for (long j = half; j < by.width; j++) to[j] = row[j] * c[j] + row[j - half] * n[j];
        for (long j = by.width; j < D; j++) to[j] = row[j];
    }
    *stride = D;
    return room;
}

/* the gradient of a row from that of what it was turned into, in place */
static inline void turn_back(float *row, long s, angles by) {
    const float *c = by.cos + s * by.width, *n = by.sin + s * by.width;
    const long half = by.width / 2;
    for (long j = 0; by.cos && j < half; j++) {
        const float first = row[j], second = row[half + j];
        row[j] = first * c[j] + second * n[half + j];
        row[half + j] = second * c[half + j] - first * n[j];
    }
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

#ifndef HAS_SHUFFLE
static inline void transpose(vec row[VL]) {
    float flat[VL][VL];
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++) flat[j][i] = row[i][j];
    for (int i = 0; i < VL; i++) row[i] = load(flat[i]);
}
#endif

/* panels[row / size][k][row % size] = factor x source, of `rows` rows, then zeros up to a multiple of `size`; VL elements more are touched */
INLINE void pack_turned(const float *source, long stride, long rows, long K, int size, float factor, float *panels) {
    for (long first = 0; first < rows; first += size, panels += size * K, source += size * stride) {
        const long n = least(size, rows - first), whole = K / VL * VL;
        for (long i = size; i < least(2 * size, rows - first); i++)
            for (long k = 0; k < K; k += 16) __builtin_prefetch(source + i * stride + k);
        for (long k = 0; k < whole; k += VL)
            for (long i = 0; i < size; i += VL) {
                vec block[VL];
#pragma GCC unroll 16
                for (int j = 0; j < VL; j++) block[j] = i + j < n ? load(source + (i + j) * stride + k) * factor : (vec){0};
                transpose(block);
#pragma GCC unroll 16
                for (int j = 0; j < VL; j++) store(panels + (k + j) * size + i, block[j]);
            }
        for (long k = whole; k < K; k++)
            for (long i = 0; i < size; i++) panels[k * size + i] = i < n ? source[i * stride + k] * factor : 0;
    }
}

#endif

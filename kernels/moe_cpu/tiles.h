/* What the kernels of this folder share: vectors as wide as the processor's, the tile of a matrix product, packing, exp.
 *
 * Products are computed a tile at a time: MR x NR elements stay in registers while k runs. Both operands are packed first, k-major,
 * MR or NR elements after one another, so that the loop reads two streams whatever the operands' strides, and a gather of rows
 * costs nothing of its own. gcc's and clang's vector extensions: the same source is AVX-512, AVX2 or NEON.
 */
#ifndef MOE_CPU_TILES_H
#define MOE_CPU_TILES_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VL = 16, MR = 12 };
#define LANES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif defined(__AVX2__)
enum { VL = 8, MR = 6 };
#define LANES {0, 1, 2, 3, 4, 5, 6, 7}
#else
enum { VL = 4, MR = 8 };
#define LANES {0, 1, 2, 3}
#endif
enum { NR = 2 * VL, BYTES = 4 * VL };

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(BYTES)));
typedef float loose __attribute__((vector_size(BYTES), aligned(1), may_alias)); /* of any address and type */
typedef int32_t ints __attribute__((vector_size(BYTES)));

static const ints lane = LANES;

typedef struct {
    vec at[MR][2];
} tile;

static inline vec load(const float *from) { return *(const loose *)from; }
static inline void store(float *to, vec value) { *(loose *)to = value; }

/* the first n elements, up to VL; `fill` for the others. n may be 0 or less. */
static inline vec load_part(const float *from, long n, float fill) {
    if (n >= VL) return load(from);
    vec value = (vec){0} + fill;
    for (long i = 0; i < n; i++) value[i] = from[i];
    return value;
}

static inline void store_part(float *to, vec value, long n) {
    if (n >= VL)
        store(to, value);
    else
        for (long i = 0; i < n; i++) to[i] = value[i];
}

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long blocks(long count, long size) { return (count + size - 1) / size; }

/* sum over k < K of a[k][0..MR] x b[k][0..NR], of packed panels */
static inline tile multiply(long K, const float *restrict a, const float *restrict b) {
    tile sum;
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) sum.at[i][0] = sum.at[i][1] = (vec){0};
#pragma GCC unroll 2
    for (long k = 0; k < K; k++) {
        const vec left = *(const vec *)b, right = *(const vec *)(b + VL);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            sum.at[i][0] += a[i] * left;
            sum.at[i][1] += a[i] * right;
        }
        a += MR;
        b += NR;
    }
    return sum;
}

/* out[i][0..columns] = or += tile, for i < rows <= MR and columns <= NR */
static inline void put(const tile *sum, float *out, long stride, long rows, long columns, int add) {
    if (columns == NR) {
        for (long i = 0; i < rows; i++, out += stride) {
            store(out, add ? load(out) + sum->at[i][0] : sum->at[i][0]);
            store(out + VL, add ? load(out + VL) + sum->at[i][1] : sum->at[i][1]);
        }
        return;
    }
    const float *flat = (const float *)sum;
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) out[i * stride + j] = (add ? out[i * stride + j] : 0) + flat[i * NR + j];
}

#if defined(__has_builtin) && !defined(__clang__)
#if __has_builtin(__builtin_shuffle)
#define HAS_SHUFFLE 1
#endif
#endif

#ifdef HAS_SHUFFLE
/* columns `apart` from one another change places between rows as far apart; indices are constants once it is inlined */
INLINE void exchange(vec row[VL], int apart) {
    const ints upper = lane + (((lane & apart) != 0) & (VL - apart)), lower = upper + apart;
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) {
        if (i & apart) continue;
        const vec a = row[i], b = row[i + apart];
        row[i] = __builtin_shuffle(a, b, upper);
        row[i + apart] = __builtin_shuffle(a, b, lower);
    }
}

/* VL x VL elements in registers: halves, then quarters, ... change places across the diagonal */
INLINE void transpose(vec row[VL]) {
    if (VL > 8) exchange(row, 8);
    if (VL > 4) exchange(row, 4);
    exchange(row, 2);
    exchange(row, 1);
}

/* The part of pack_words below that is whole squares of `size` rows; returns how many k it did. Where `size` is no multiple of VL a row of
 * the panel is stored together with what the next row overwrites, and SLACK elements after the panel. */
INLINE long pack_squares(const char *source, long stride, const int64_t *index, long K, int size, float *panel) {
    const long whole = K / VL * VL;
    for (long begin = 0; begin < whole; begin += 4 * VL) /* a few lines of each row: more streams than the processor follows by itself */
        for (int first = 0; first < size; first += VL)
            for (long k = begin; k < least(whole, begin + 4 * VL); k += VL) {
                vec row[VL];
                const long at = k * (long)sizeof(float);
                const char *from = source + first * stride + at;
#pragma GCC unroll 16
                for (int i = 0; i < VL; i++) {
                    row[i] = (vec){0};
                    if (first + i >= size) continue;
                    if (index) from = source + index[first + i] * stride + at;
                    row[i] = load((const float *)from);
                    from += stride;
                }
                transpose(row);
                float *to = panel + k * size + first;
#pragma GCC unroll 16
                for (int i = 0; i < VL; i++) store(to + i * size, row[i]);
            }
    return whole;
}
#else
INLINE long pack_squares(const char *source, long stride, const int64_t *index, long K, int size, float *panel) { return 0; }
#endif
enum { SLACK = VL };

/* panel[k][i] = source row i, word k of 32 bits, for i < n of `size`, zeros after; rows are `stride` bytes apart, or at `index` times
 * stride. Up to SLACK elements after the panel are overwritten. */
INLINE void pack_words(const void *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    long done = 0;
    if (n >= size) done = index ? pack_squares(source, stride, index, K, size, panel) : pack_squares(source, stride, NULL, K, size, panel);
    for (long first = done; first < K; first += 16)
        for (int i = 0; i < size; i++) {
            const char *row = (const char *)source + (i < n ? (index ? index[i] : i) * stride : 0);
            for (long k = first; k < least(first + 16, K); k++) {
                panel[k * size + i] = 0;
                if (i < n) memcpy(panel + k * size + i, row + k * sizeof(float), sizeof(float));
            }
        }
}

/* the same of float32, `stride` elements apart */
INLINE void pack_rows(const float *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    pack_words(source, stride * (long)sizeof(float), index, n, K, size, panel);
}

/* panel[k][i] = source row k, element i: the same of a transposed matrix, whose row k is at k or index[k] times stride */
static inline void pack_columns(const float *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    for (long k = 0; k < K; k++, panel += size) {
        const float *row = source + (index ? index[k] : k) * stride;
        if (n >= size) {
            memcpy(panel, row, sizeof(float) * size);
        } else {
            for (int i = 0; i < size; i++) panel[i] = i < n ? row[i] : 0;
        }
    }
}

/* elementwise mask ? a : b, where a comparison of vectors made the mask */
static inline vec pick(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }

/* The smaller and the larger of two, b where either is NaN; 1 / x for 1 <= x < 2^126, within two units of the last place */
#if defined(__AVX512F__)
static inline vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vec reciprocal(vec x) {
    const vec y = (vec)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
}
#elif defined(__AVX2__)
static inline vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vec reciprocal(vec x) { return 1.0f / x; }
#else
static inline vec smaller(vec a, vec b) { return pick(a < b, a, b); }
static inline vec larger(vec a, vec b) { return pick(a > b, a, b); }
static inline vec reciprocal(vec x) { return 1.0f / x; }
#endif

/* e^x within 2 units of the last place, for x cut off at +-87: x = n ln 2 + r, a polynomial of degree 6 in r, and 2^n from its bits */
static inline vec exponential(vec x) {
    x = larger((vec){0} - 87.0f, x);
    x = smaller((vec){0} + 87.0f, x);
    const vec magic = (vec){0} + 12582912.0f; /* 1.5 x 2^23: adding it rounds to an integer, which is then in the low bits */
    const vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)(((ints)shifted << 23) + (127 << 23));
}

static inline vec sigmoid(vec x) { return reciprocal(1.0f + exponential(-x)); }

static inline float total(vec value) {
    float sum = 0;
    for (int i = 0; i < VL; i++) sum += value[i];
    return sum;
}

/* scratch memory of a thread, with SLACK, which grows and is kept: fresh memory would cost a page fault for every 4 kB */
static inline float *scratch(float **held, size_t *size, size_t elements) {
    if (*size < elements) {
        free(*held);
        *held = aligned_alloc(64, ((elements + SLACK) * sizeof(float) + 63) / 64 * 64);
        *size = *held ? elements : 0;
    }
    return *held;
}
#endif

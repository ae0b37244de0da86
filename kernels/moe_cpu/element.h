/* What the experts' kernels do differently in float32 and, with MOE_BF16, in bfloat16.
 *
 * A panel of either type is made of units of 32 bits: an element of float32, or two of bfloat16 that follow each other along k (and a
 * zero where K is odd), which the processor multiplies and adds in one instruction. So a panel of K has units(K) rows, a gather of
 * bfloat16 rows is one of 32-bit words, and sums are float32 in both. Results are rounded to the nearest, ties to even; the instructions
 * of bfloat16 take subnormal numbers for zero.
 */
#ifndef MOE_CPU_ELEMENT_H
#define MOE_CPU_ELEMENT_H
#include "tiles.h"

#ifdef MOE_BF16
#define KERNEL(name) name##_bf16
enum { PAIR = 2 };
typedef uint16_t element;
#else
#define KERNEL(name) name
enum { PAIR = 1 };
typedef float element;
#endif

static inline long units(long count) { return (count + PAIR - 1) / PAIR; }

#ifndef MOE_BF16
static inline vec read_part(const float *from, long n) { return load_part(from, n, 0); }
static inline void write_part(float *to, vec value, long n) { store_part(to, value, n); }
static inline tile multiply_units(long depth, const float *a, const float *b) { return multiply(depth, a, b); }

static inline void panel_of_rows(const float *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    pack_rows(source, stride, index, n, K, size, panel);
}

static inline void panel_of_columns(const float *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    pack_columns(source, stride, index, n, K, size, panel);
}

/* NR columns as halves of two panels, `apart` from one another, of rows of NR units */
static inline void half_panels_of_columns(const float *source, long stride, long n, long K, long apart, float *panel) {
    for (long k = 0; k < K; k++, source += stride, panel += NR) {
        *(vec *)panel = load_part(source, n, 0);
        if (n > VL) *(vec *)(panel + apart) = load_part(source + VL, n - VL, 0);
    }
}

static inline vec unit_of(const vec rows[PAIR]) { return rows[0]; }

/* to[j][i] = element j < n of row i < m, of rows `first` on of a panel of NR columns; SLACK elements
 * after are overwritten */
static inline void turn_panel(const float *panel, long first, long m, long n, float *to) {
    pack_rows(panel + first * NR, NR, NULL, m, n, MR, to);
}

/* A tile of a sum over chunks, the first and the last of which is told: it is in `out`, or in `partial` as long as it is not whole */
static inline void put_sum(const tile *sum, float *out, float *partial, long stride, long rows, long columns, int first, int last) {
    put(sum, out, stride, rows, columns, !first);
}
#else
static inline __mmask16 first_lanes(long n) { return n >= VL ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

/* the first n elements, up to VL, as 32-bit integers; zeros after */
static inline __m512i raw(const element *from, long n) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), from)); }

static inline vec read_part(const element *from, long n) { return (vec)_mm512_slli_epi32(raw(from, n), 16); }

static inline void write_part(element *to, vec value, long n) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)value);
    if (n >= VL)
        _mm256_storeu_si256((__m256i_u *)to, rounded);
    else
        _mm256_mask_storeu_epi16(to, first_lanes(n), rounded);
}

/* not inlined: gcc would keep some of the sums in memory */
static __attribute__((noinline)) tile multiply_units(long depth, const float *restrict a, const float *restrict b) {
    __m512 sum[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (long k = 0; k < depth; k++) {
        const __m512bh left = (__m512bh)_mm512_load_ps(b), right = (__m512bh)_mm512_load_ps(b + VL);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const __m512bh both = (__m512bh)_mm512_set1_ps(a[i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, right);
        }
        a += MR;
        b += NR;
    }
    tile result;
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) result.at[i][0] = (vec)sum[i][0], result.at[i][1] = (vec)sum[i][1];
    return result;
}

static inline void panel_of_rows(const element *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    pack_words(source, stride * (long)sizeof(element), index, n, K / PAIR, size, panel);
    if (K % PAIR)
        for (int i = 0; i < size; i++) {
            const int32_t unit = i < n ? source[(index ? index[i] : i) * stride + K - 1] : 0;
            memcpy(panel + K / PAIR * size + i, &unit, sizeof unit);
        }
}

/* NR elements of two rows beside each other, of which there are n; without `next` zeros for the second */
static inline void interleave(const element *row, const element *next, long n, float *left, float *right) {
    static const uint16_t lanes[NR] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(lanes), high = _mm512_add_epi16(low, _mm512_set1_epi16(VL));
    const __mmask32 there = n >= NR ? 0xffffffff : n <= 0 ? 0 : ((__mmask32)1 << n) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(there, row), b = _mm512_maskz_loadu_epi16(next ? there : 0, next ? next : row);
    _mm512_storeu_si512(left, _mm512_permutex2var_epi16(a, low, b));
    if (right) _mm512_storeu_si512(right, _mm512_permutex2var_epi16(a, high, b));
}

static inline void panel_of_columns(const element *source, long stride, const int64_t *index, long n, long K, int size, float *panel) {
    for (long k = 0; k < K; k += PAIR, panel += size) {
        const element *row = source + (index ? index[k] : k) * stride, *next = k + 1 < K ? source + (index ? index[k + 1] : k + 1) * stride : NULL;
        interleave(row, next, least(n, size), panel, size > VL ? panel + VL : NULL);
    }
}

/* NR columns as halves of two panels, `apart` from one another, of rows of NR units */
static inline void half_panels_of_columns(const element *source, long stride, long n, long K, long apart, float *panel) {
    for (long k = 0; k < K; k += PAIR, source += PAIR * stride, panel += NR) {
        __builtin_prefetch(source + 16 * stride); /* as many streams as rows: the processor does not follow them by itself */
        __builtin_prefetch(source + 17 * stride);
        interleave(source, k + 1 < K ? source + stride : NULL, n, panel, n > VL ? panel + apart : NULL);
    }
}

/* elements of two rows beside each other */
static inline vec unit_of(const vec rows[PAIR]) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)rows[0]));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)rows[1])), 16));
}

/* to[j][i] = elements 2 j and 2 j + 1 of row i < m, for 2 j < n; of rows `first`, which is even, on of a panel of NR columns; SLACK elements
 * after are overwritten */
static inline void turn_panel(const float *panel, long first, long m, long n, float *to) {
    static const uint16_t even[NR] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i evens = _mm512_loadu_si512(even), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    vec row[VL] = {0};
    panel += first / PAIR * NR;
#pragma GCC unroll 16
    for (int i = 0; i < MR; i += PAIR) {
        if (i >= m) break;
        const __m512i left = _mm512_loadu_si512(panel + i / PAIR * NR), right = _mm512_loadu_si512(panel + i / PAIR * NR + VL);
        row[i] = (vec)_mm512_permutex2var_epi16(left, evens, right);
        row[i + 1] = (vec)_mm512_permutex2var_epi16(left, odds, right);
    }
    transpose(row);
    for (long j = 0; j < units(n); j++) store(to + j * MR, row[j]);
}

static inline void put_sum(const tile *sum, element *out, float *partial, long stride, long rows, long columns, int first, int last) {
    for (long i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++) {
            const long at = i * stride + half * VL, n = columns - half * VL;
            const vec value = first || n <= 0 ? sum->at[i][half] : sum->at[i][half] + load_part(partial + at, n, 0);
            if (n > 0 && last) write_part(out + at, value, n);
            if (n > 0 && !last) store_part(partial + at, value, n);
        }
}
#endif
#endif

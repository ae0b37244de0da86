/* RMSNorm of rows, y = x weight / sqrt(mean(x^2) + eps), and its gradients. Memory-bound: each direction reads and writes rows once. */
#include <math.h>

#include "tiles.h"

enum { ROWS = 64 }; /* a task's, which has a sum of the weight's gradient of its own: the order of additions is the sizes' */

static inline float inner(const float *a, const float *b, const float *c, long n) {
    vec sum = {0};
    long j = 0;
    for (; j + VL <= n; j += VL) sum += c ? load(a + j) * load(b + j) * load(c + j) : load(a + j) * load(b + j);
    float rest = 0;
    for (; j < n; j++) rest += a[j] * b[j] * (c ? c[j] : 1);
    return total(sum) + rest;
}

/* x and y [T, D], weight [D], and 1 / sqrt(mean(x^2) + eps), [T], for backward */
void moe_cpu_norm(long T, long D, float eps, const float *x, const float *weight, float *restrict y, float *restrict inverse, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < T; t++) {
        const float *row = x + t * D;
        float *restrict to = y + t * D;
        const float factor = 1 / sqrtf(inner(row, row, NULL, D) / D + eps);
        for (long j = 0; j < D; j++) to[j] = row[j] * factor * weight[j];
        inverse[t] = factor;
    }
}

/* dx = inverse (dy weight - x inverse^2 mean(dy weight x)) and dweight = the sum over rows of dy x inverse, by way of `sums`, [T / ROWS, D] */
void moe_cpu_norm_backward(long T, long D, const float *dy, const float *x, const float *weight, const float *inverse, float *restrict dx,
                           float *restrict dweight, float *sums, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long task = 0; task < blocks(T, ROWS); task++) {
            float *restrict sum = sums + task * D;
            memset(sum, 0, sizeof(float) * D);
            for (long t = task * ROWS; t < least(T, (task + 1) * ROWS); t++) {
                const float *row = x + t * D, *grad = dy + t * D, factor = inverse[t];
                const float shrink = inner(row, grad, weight, D) / D * factor * factor * factor;
                float *restrict to = dx + t * D;
                for (long j = 0; j < D; j++) {
                    to[j] = grad[j] * weight[j] * factor - row[j] * shrink;
                    sum[j] += grad[j] * row[j] * factor;
                }
            }
        }
#pragma omp for schedule(static)
        for (long first = 0; first < D; first += VL)
            for (long j = first; j < least(first + VL, D); j++) {
                dweight[j] = 0;
                for (long task = 0; task < blocks(T, ROWS); task++) dweight[j] += sums[task * D + j];
            }
    }
}

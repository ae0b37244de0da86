/* Negative log-likelihoods of rows of logits and, in the logits' place, their gradient softmax - one-hot: a row of some thousand
 * logits stays in the core's first caches for all its passes. */
#include <math.h>

#include "tiles.h"

static float row_of(long V, float *row, int64_t target, int gradient) {
    const float own = row[target];
    vec tops = load_part(row, V, -INFINITY), sums = {0};
    for (long j = VL; j < V; j += VL) tops = larger(tops, load_part(row + j, V - j, -INFINITY));
    float top = tops[0];
    for (int i = 1; i < VL; i++) top = tops[i] > top ? tops[i] : top;
    for (long j = 0; j < V; j += VL) {
        const vec e = exponential(load_part(row + j, V - j, -INFINITY) - top);
        sums += V - j < VL ? load_part((const float *)&e, V - j, 0) : e;
        if (gradient) store_part(row + j, e, V - j);
    }
    const float sum = total(sums);
    for (long j = 0; j < V && gradient; j += VL) store_part(row + j, load_part(row + j, V - j, 0) * (1.0f / sum), V - j);
    if (gradient) row[target] -= 1;
    return logf(sum) - (own - top); /* large logits cancel first */
}

/* logits [rows, V] contiguous; losses [rows]. Targets below 0 count nothing: loss and gradient are 0. */
void moe_cpu_cross_entropy(long rows, long V, float *logits, const int64_t *targets, float *losses, int gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        if (targets[i] >= 0) {
            losses[i] = row_of(V, logits + i * V, targets[i], gradient);
            continue;
        }
        losses[i] = 0;
        if (gradient) memset(logits + i * V, 0, sizeof(float) * V);
    }
}

/* Gradients of the expert feed-forward network from dy, x, gate and up.
 *
 * A row's dh = dy W_down^T; with h = silu(gate) x up its weight's gradient is <dh, h>, and dgate and dup follow in registers from the
 * tile of dh. dgate and dup are stored as the packed panels that the weights' gradients need, and give dx = dgate W_gate^T + dup W_up^T
 * as one product while they are in the cache. Then the weights' gradients, a product over all rows of each chunk.
 */
#include "experts.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

typedef struct {
    const float *dy, *gate, *up;                /* [T, D], [P, F], [P, F] */
    float *dweight, *dx, *d_gate, *d_up, *d_down; /* [P], [T, D], as the weights */
    long down_size, in_size;                    /* elements of packed W_down^T, and of packed W_gate^T over W_up^T */
    float *weights;                             /* both, by slot */
    float *dhidden;                             /* panels of dgate, then of dup: of each chunk [blocks(F, NR)][rows][NR], at offset x width */
    float *hidden;                              /* weight x h [rows, F] */
    float *rows;                                /* gradients of x by row [rows, D] */
    float *dy_panels;                           /* dy gathered, of each chunk [blocks(D, NR)][rows][NR] */
} work;

static void pack_weights(const layer *of, long expert, long panel, const work *w, float *packed) {
    const long D = of->D, F = of->F, first = blocks(F, NR), size = D * F;
    if (panel < first) {
        const long j = panel * NR;
        pack_rows(of->down + expert * size + j * D, D, NULL, F - j, D, NR, packed + j * D);
    } else {
        const long j = (panel - first) * NR;
        float *to = packed + w->down_size + j * 2 * F;
        pack_rows(of->gate + expert * size + j * F, F, NULL, D - j, F, NR, to);
        pack_rows(of->up + expert * size + j * F, F, NULL, D - j, F, NR, to + F * NR);
    }
}

/* From a tile of dh: dgate and dup into their panels, weight x h into hidden, and <dh, h> added to dots */
static void through_activation(const tile *sum, long rows, long n, long F, const float *gate, const float *up, const float *weight, float *dgate,
                               float *dup, float *hidden, vec *dots) {
    for (long i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++) {
            const long at = half * VL, here = n - at;
            const vec g = load_part(gate + i * F + at, here, 0), u = load_part(up + i * F + at, here, 0), dh = sum->at[i][half];
            const vec s = sigmoid(g), act = g * s, h = act * u, scaled = dh * weight[i];
            dots[i] += dh * h;
            *(vec *)(dgate + i * NR + at) = scaled * u * (s + act * (1.0f - s));
            *(vec *)(dup + i * NR + at) = scaled * act;
            store_part(hidden + i * F + at, h * weight[i], here);
        }
}

/* panel[k][i] = element k of row i, from panels of NR columns each of `rows` rows */
static void repack(const float *panels, long rows, long first, long n, long F, float *to) {
    for (long j = 0; j < F; j += NR)
        pack_rows(panels + (j * rows + first * NR), NR, NULL, n, least(NR, F - j), MR, to + j * MR);
}

static void backward_rows(const layer *of, const work *w, task t, float *own) {
    const long D = of->D, F = of->F, wide = blocks(F, NR) * NR, rows = t.of->rows, start = t.of->start + t.first, local = t.of->offset + t.first;
    const float *packed = w->weights + t.of->slot * (w->down_size + w->in_size);
    float *dgate = w->dhidden + t.of->offset * 2 * wide, *dup = dgate + rows * wide, *hidden = w->hidden + local * F;
    vec dots[TASK] = {0};
    for (long i = 0; i < t.rows; i += MR) pack_rows(w->dy, D, of->token + start + i, least(MR, t.rows - i), D, MR, own + i * D);
    for (long j = 0; j < F; j += NR)
        for (long i = 0; i < t.rows; i += MR) {
            const long kept = (start + i) * F + j, panel = j * rows + (t.first + i) * NR;
            for (long r = 0; r < least(MR, t.rows - i); r++)
                for (int half = 0; half < 2; half++) { /* there by the time the product is done */
                    __builtin_prefetch(w->gate + kept + r * F + half * VL);
                    __builtin_prefetch(w->up + kept + r * F + half * VL);
                    __builtin_prefetch(hidden + (i + r) * F + j + half * VL, 1);
                }
            const tile sum = multiply(D, own + i * D, packed + j * D);
            through_activation(&sum, least(MR, t.rows - i), F - j, F, w->gate + kept, w->up + kept, of->weight + start + i, dgate + panel,
                               dup + panel, hidden + i * F + j, dots + i);
        }
    for (long i = 0; i < t.rows; i++) w->dweight[start + i] = total(dots[i]);
    for (long i = 0; i < t.rows; i += MR) {
        repack(dgate, rows, t.first + i, least(MR, t.rows - i), F, own + i * 2 * F);
        repack(dup, rows, t.first + i, least(MR, t.rows - i), F, own + i * 2 * F + F * MR);
    }
    packed += w->down_size;
    for (long j = 0; j < D; j += NR)
        for (long i = 0; i < t.rows; i += MR) {
            const tile sum = multiply(2 * F, own + i * 2 * F, packed + j * 2 * F);
            put(&sum, w->rows + (local + i) * D + j, D, least(MR, t.rows - i), least(NR, D - j), 0);
        }
}

/* One block of TASK rows of a weight's gradient, summed over the chunks of a slot: [M, N] += left^T x panels */
typedef struct {
    const float *left;
    long stride;
    const int64_t *index; /* of left's rows */
    const float *panels;
} factors;

static void add_product(factors f, long K, long row, long M, long N, float *out, int add, float *own) {
    const long m = least(TASK, M - row);
    for (long i = 0; i < m; i += MR) pack_columns(f.left + row + i, f.stride, f.index, least(MR, m - i), K, MR, own + i * K);
    for (long j = 0; j < N; j += NR)
        for (long i = 0; i < m; i += MR) {
            const tile sum = multiply(K, own + i * K, f.panels + j * K);
            put(&sum, out + (row + i) * N + j, N, least(MR, m - i), least(NR, N - j), add);
        }
}

static void weight_gradients(const layer *of, const work *w, const group *in, int slot, long block, float *own) {
    const long D = of->D, F = of->F, wide = blocks(F, NR) * NR, deep = blocks(D, NR) * NR, of_down = blocks(F, TASK);
    for (int c = in->first_of[slot]; c < in->first_of[slot + 1]; c++) {
        const chunk *here = in->at + c;
        const int add = here->start != of->offsets[here->expert];
        const int64_t *token = of->token + here->start;
        const long size = here->expert * D * F;
        if (block < of_down) {
            add_product((factors){w->hidden + here->offset * F, F, NULL, w->dy_panels + here->offset * deep}, here->rows, block * TASK, F, D,
                        w->d_down + size, add, own);
        } else {
            const float *panels = w->dhidden + here->offset * 2 * wide;
            const long row = (block - of_down) * TASK;
            add_product((factors){of->x, D, token, panels}, here->rows, row, D, F, w->d_gate + size, add, own);
            add_product((factors){of->x, D, token, panels + here->rows * wide}, here->rows, row, D, F, w->d_up + size, add, own);
        }
    }
}

static void pack_dy(const layer *of, const work *w, const chunk *here, long j) {
    pack_columns(w->dy + j, of->D, of->token + here->start, of->D - j, here->rows, NR, w->dy_panels + here->offset * blocks(of->D, NR) * NR + j * here->rows);
}

/* dx [T, D] must be zero, and so must the gradients of experts without rows. Returns 0, or 1 where memory is short. */
int moe_cpu_experts_backward(long D, long F, long E, const int64_t *offsets, const int64_t *token, const float *weight, const float *x,
                             const float *w_gate, const float *w_up, const float *w_down, const float *gate, const float *up, const float *dy,
                             float *dx, float *d_gate, float *d_up, float *d_down, float *dweight, int threads) {
    static __thread float *held[5], *own = NULL;
    static __thread size_t sizes[5], own_size = 0;
    const layer of = {D, F, E, offsets, token, weight, x, w_gate, w_up, w_down};
    const long wide = blocks(F, NR) * NR, deep = blocks(D, NR) * NR, panels = (wide + deep) / NR, row_blocks = blocks(F, TASK) + blocks(D, TASK);
    const long longest = D > 2 * F ? D : 2 * F;
    work w = {dy, gate, up, dweight, dx, d_gate, d_up, d_down, wide * D, deep * 2 * F, NULL, NULL, NULL, NULL, NULL};
    place at = {0, 0};
    group now;
    int short_of_memory = 0;
    while (next_group(&of, &at, 3 * F + 2 * D, &now)) {
        w.weights = scratch(held, sizes, now.slots * (w.down_size + w.in_size));
        w.dhidden = scratch(held + 1, sizes + 1, now.rows * 2 * wide);
        w.hidden = scratch(held + 2, sizes + 2, now.rows * F);
        w.rows = scratch(held + 3, sizes + 3, now.rows * D);
        w.dy_panels = scratch(held + 4, sizes + 4, now.rows * deep);
        if (!w.weights || !w.dhidden || !w.hidden || !w.rows || !w.dy_panels) return 1;
#pragma omp parallel num_threads(threads)
        {
            float *mine = scratch(&own, &own_size, TASK * (longest > CHUNK + MR ? longest : CHUNK + MR));
            if (!mine) short_of_memory = 1;
#pragma omp for schedule(dynamic, 4) nowait
            for (long i = 0; i < now.chunks * (deep / NR); i++) pack_dy(&of, &w, now.at + i / (deep / NR), i % (deep / NR) * NR);
#pragma omp for schedule(static)
            for (long i = 0; i < now.slots * panels; i++)
                pack_weights(&of, now.expert_of[i / panels], i % panels, &w, w.weights + i / panels * (w.down_size + w.in_size));
#pragma omp for schedule(dynamic)
            for (int i = 0; i < now.tasks; i++)
                if (mine) backward_rows(&of, &w, task_at(&now, i), mine);
#pragma omp for schedule(dynamic) nowait
            for (long i = 0; i < now.slots * row_blocks; i++)
                if (mine) weight_gradients(&of, &w, &now, (int)(i / row_blocks), i % row_blocks, mine);
            sum_rows(&now, &of, w.rows, NULL, dx, omp_get_thread_num(), omp_get_num_threads());
        }
        if (short_of_memory) return 1;
    }
    return 0;
}

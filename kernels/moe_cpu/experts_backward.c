/* Gradients of the expert feed-forward network from dy, x, gate and up.
 *
 * A row's dh = dy W_down^T; with h = silu(gate) x up its weight's gradient is <dh, h>, and dgate and dup follow in registers from the
 * tile of dh. dgate and dup are stored as the packed panels that the weights' gradients need, and give dx = dgate W_gate^T + dup W_up^T
 * as one product while they are in the cache. Then the weights' gradients, a product over all rows of each chunk.
 */
#include "experts.h"

typedef struct {
    const element *dy, *gate, *up;          /* [T, D], [P, F], [P, F] */
    float *dweight, *dx;                    /* [P], [T, D] */
    element *d_gate, *d_up, *d_down;        /* as the weights */
    float *partial;                         /* their sums over an expert's chunks so far, by order x 3 D F; in bfloat16 only */
    long down_size, in_size;                /* units of packed W_down^T, and of packed W_gate^T over W_up^T */
    float *weights;                         /* both, by slot */
    float *dhidden;                         /* panels of dgate, then of dup: of each chunk [blocks(F, NR)][units(rows)][NR], at unit x width */
    float *hidden;                          /* units of weight x h [units(rows), F] */
    float *rows;                            /* gradients of x by row [rows, D] */
    float *dy_panels;                       /* dy gathered, of each chunk [blocks(D, NR)][units(rows)][NR] */
} work;

static void pack_backward(const layer *of, long expert, long panel, const work *w, float *packed) {
    const long D = of->D, F = of->F, first = blocks(F, NR), size = D * F;
    if (panel < first) {
        const long j = panel * NR;
        panel_of_rows(of->down + expert * size + j * D, D, NULL, F - j, D, NR, packed + j * units(D));
    } else {
        const long j = (panel - first) * NR;
        float *to = packed + w->down_size + j * 2 * units(F);
        panel_of_rows(of->gate + expert * size + j * F, F, NULL, D - j, F, NR, to);
        panel_of_rows(of->up + expert * size + j * F, F, NULL, D - j, F, NR, to + units(F) * NR);
    }
}

/* From a tile of dh: dgate and dup into their panels, weight x h into hidden, and <dh, h> added to dots */
static void through_activation(const tile *sum, long rows, long n, long F, const element *gate, const element *up, const float *weight,
                               float *dgate, float *dup, float *hidden, vec *dots) {
    for (long i = 0; i < rows; i += PAIR)
        for (int half = 0; half < 2; half++) {
            const long at = half * VL, here = n - at;
            vec to_gate[PAIR] = {0}, to_up[PAIR] = {0}, to_hidden[PAIR] = {0};
#pragma GCC unroll 2
            for (long p = 0; p < PAIR; p++) {
                if (i + p >= rows) break;
                const long from = (i + p) * F + at;
                const vec g = read_part(gate + from, here), u = read_part(up + from, here), dh = sum->at[i + p][half];
                const vec s = sigmoid(g), act = g * s, h = act * u, scaled = dh * weight[i + p];
                dots[i + p] += dh * h;
                to_gate[p] = scaled * u * (s + act * (1.0f - s));
                to_up[p] = scaled * act;
                to_hidden[p] = h * weight[i + p];
            }
            *(vec *)(dgate + i / PAIR * NR + at) = unit_of(to_gate);
            *(vec *)(dup + i / PAIR * NR + at) = unit_of(to_up);
            store_part(hidden + i / PAIR * F + at, unit_of(to_hidden), here);
        }
}

static void backward_rows(const layer *of, const work *w, task t, float *own) {
    const long D = of->D, F = of->F, deep = units(D), hidden_deep = units(F), wide = blocks(F, NR) * NR;
    const long depth = units(t.of->rows), start = t.of->start + t.first, local = t.of->offset + t.first;
    const float *packed = w->weights + t.of->slot * (w->down_size + w->in_size);
    float *dgate = w->dhidden + t.of->unit * 2 * wide, *dup = dgate + depth * wide, *hidden = w->hidden + (t.of->unit + t.first / PAIR) * F;
    vec dots[TASK] = {0};
    for (long i = 0; i < t.rows; i += MR) panel_of_rows(w->dy, D, of->token + start + i, least(MR, t.rows - i), D, MR, own + i * deep);
    for (long j = 0; j < F; j += NR)
        for (long i = 0; i < t.rows; i += MR) {
            const long kept = (start + i) * F + j, panel = j * depth + (t.first + i) / PAIR * NR, rows = least(MR, t.rows - i);
            for (long r = 0; r < rows; r++)
                for (int half = 0; half < 2; half++) { /* there by the time the product is done */
                    __builtin_prefetch(w->gate + kept + r * F + half * VL);
                    __builtin_prefetch(w->up + kept + r * F + half * VL);
                    __builtin_prefetch(hidden + (i + r) / PAIR * F + j + half * VL, 1);
                }
            const tile sum = multiply_units(deep, own + i * deep, packed + j * deep);
            through_activation(&sum, rows, F - j, F, w->gate + kept, w->up + kept, of->weight + start + i, dgate + panel, dup + panel,
                               hidden + i / PAIR * F + j, dots + i);
        }
    for (long i = 0; i < t.rows; i++) w->dweight[start + i] = total(dots[i]);
    for (long i = 0; i < t.rows; i += MR)
        for (int side = 0; side < 2; side++)
            for (long j = 0; j < F; j += NR)
                turn_panel((side ? dup : dgate) + j * depth, t.first + i, least(MR, t.rows - i), least(NR, F - j),
                           own + (i * 2 + side * MR) * hidden_deep + j / PAIR * MR);
    packed += w->down_size;
    for (long j = 0; j < D; j += NR)
        for (long i = 0; i < t.rows; i += MR) {
            const tile sum = multiply_units(2 * hidden_deep, own + i * 2 * hidden_deep, packed + j * 2 * hidden_deep);
            put(&sum, w->rows + (local + i) * D + j, D, least(MR, t.rows - i), least(NR, D - j), 0);
        }
}

/* TASK rows of a weight's gradient [M, N], of one chunk: (+)= left x panels, both packed, `depth` units deep */
typedef struct {
    element *out;
    float *partial;
    long M, N;
    int first, last; /* chunk of the expert */
} gradient;

static void add_product(gradient to, long row, long depth, const float *left, const float *panels) {
    const long m = least(TASK, to.M - row);
    for (long j = 0; j < to.N; j += NR)
        for (long i = 0; i < m; i += MR) {
            const tile sum = multiply_units(depth, left + i * depth, panels + j * depth);
            const long at = (row + i) * to.N + j;
            put_sum(&sum, to.out + at, to.partial + at, to.N, least(MR, m - i), least(NR, to.N - j), to.first, to.last);
        }
}

static void weight_gradients(const layer *of, const work *w, const group *in, int slot, long block, float *own) {
    const long D = of->D, F = of->F, size = D * F, wide = blocks(F, NR) * NR, deep = blocks(D, NR) * NR, of_down = blocks(F, TASK);
    for (int c = in->first_of[slot]; c < in->first_of[slot + 1]; c++) {
        const chunk *here = in->at + c;
        const long depth = units(here->rows), of_expert = here->expert * size;
        float *partial = w->partial + in->order_of[slot] % most_slots(of) * 3 * size;
        gradient to = {w->d_down + of_expert, partial, F, D, here->start == of->offsets[here->expert],
                       here->start + here->rows == of->offsets[here->expert + 1]};
        if (block < of_down) {
            const long row = block * TASK;
            for (long i = 0; i < least(TASK, F - row); i += MR)
                pack_columns(w->hidden + here->unit * F + row + i, F, NULL, F - row - i, depth, MR, own + i * depth);
            add_product(to, row, depth, own, w->dy_panels + here->unit * deep);
        } else {
            const float *panels = w->dhidden + here->unit * 2 * wide;
            const long row = (block - of_down) * TASK;
            for (long i = 0; i < least(TASK, D - row); i += MR)
                panel_of_columns(of->x + row + i, D, of->token + here->start, D - row - i, here->rows, MR, own + i * depth);
            to = (gradient){w->d_gate + of_expert, partial + size, D, F, to.first, to.last};
            add_product(to, row, depth, own, panels);
            to = (gradient){w->d_up + of_expert, partial + 2 * size, D, F, to.first, to.last};
            add_product(to, row, depth, own, panels + depth * wide);
        }
    }
}

static void pack_dy(const layer *of, const work *w, const chunk *here, long j) {
    const long D = of->D, at = here->unit * blocks(D, NR) * NR + j * units(here->rows);
    panel_of_columns(w->dy + j, D, of->token + here->start, D - j, here->rows, NR, w->dy_panels + at);
}

/* dx [T, D], sums in float32, must be zero, and so must the gradients of experts without rows. Returns 0, or 1 where memory is short. */
int KERNEL(moe_cpu_experts_backward)(long D, long F, long E, const int64_t *offsets, const int64_t *token, const float *weight, const element *x,
                                     const element *w_gate, const element *w_up, const element *w_down, const element *gate, const element *up,
                                     const element *dy, float *dx, element *d_gate, element *d_up, element *d_down, float *dweight,
                                     int threads) {
    static __thread float *held[6], *own = NULL;
    static __thread size_t sizes[6], own_size = 0;
    const layer of = {D, F, E, (long)LIMIT * threads, offsets, token, weight, x, w_gate, w_up, w_down};
    const long wide = blocks(F, NR) * NR, deep = blocks(D, NR) * NR, panels = (wide + deep) / NR, row_blocks = blocks(F, TASK) + blocks(D, TASK);
    const long longest = units(D) > 2 * units(F) ? units(D) : 2 * units(F);
    work w = {.dy = dy, .gate = gate, .up = up, .dweight = dweight, .dx = dx, .d_gate = d_gate, .d_up = d_up, .d_down = d_down};
    w.down_size = wide * units(D);
    w.in_size = deep * 2 * units(F);
    /* never touched, so never there, but for experts of more than one chunk */
    w.partial = scratch(held + 5, sizes + 5, PAIR > 1 ? most_slots(&of) * 3 * D * F : 1);
    place at = {0};
    group now;
    int short_of_memory = 0;
    while (next_group(&of, &at, units(3 * F + D) + D, &now)) {
        w.weights = scratch(held, sizes, now.slots * (w.down_size + w.in_size));
        w.dhidden = scratch(held + 1, sizes + 1, now.units * 2 * wide);
        w.hidden = scratch(held + 2, sizes + 2, now.units * F);
        w.rows = scratch(held + 3, sizes + 3, now.rows * D);
        w.dy_panels = scratch(held + 4, sizes + 4, now.units * deep);
        if (!w.partial || !w.weights || !w.dhidden || !w.hidden || !w.rows || !w.dy_panels) return 1;
#pragma omp parallel num_threads(threads)
        {
            float *mine = scratch(&own, &own_size, TASK * (longest > units(CHUNK + MR) ? longest : units(CHUNK + MR)));
            if (!mine) short_of_memory = 1;
#pragma omp for schedule(dynamic, 4) nowait
            for (long i = 0; i < now.chunks * (deep / NR); i++) pack_dy(&of, &w, now.at + i / (deep / NR), i % (deep / NR) * NR);
#pragma omp for schedule(static)
            for (long i = 0; i < now.slots * panels; i++)
                pack_backward(&of, now.expert_of[i / panels], i % panels, &w, w.weights + i / panels * (w.down_size + w.in_size));
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

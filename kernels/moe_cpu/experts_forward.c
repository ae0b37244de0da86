/* y = sum over a token's experts of weight x (silu(x W_gate) x (x W_up)) W_down.
 *
 * A tile of the first product holds VL columns of gate and the same of up, so that the activation is worked out in registers; a
 * task's hidden values stay in the core's cache for the second product. Kept for backward, if asked for: gate and up.
 */
#include "experts.h"

/* one of blocks(F, NR) pairs of panels, in which columns of gate and of up are beside each other, or a panel of down */
static void pack_forward(const layer *of, long expert, long part, float *packed) {
    const long D = of->D, F = of->F, pairs = blocks(F, NR), panel = units(D) * NR;
    if (part < pairs) {
        const long from = expert * D * F + part * NR, n = F - part * NR;
        half_panels_of_columns(of->gate + from, F, n, D, panel, packed + part * 2 * panel);
        half_panels_of_columns(of->up + from, F, n, D, panel, packed + part * 2 * panel + VL);
    } else {
        const long j = (part - pairs) * NR;
        panel_of_columns(of->down + expert * F * D + j, D, NULL, D - j, F, NR, packed + blocks(F, VL) * panel + j * units(F));
    }
}

/* silu(gate) x up of a tile: kept where asked for, and into hidden, whose rows are F apart */
static void activate(const tile *sum, long rows, long n, long F, element *gate, element *up, element *hidden) {
    for (long i = 0; i < rows; i++) {
        const vec g = sum->at[i][0], u = sum->at[i][1];
        if (gate) {
            write_part(gate + i * F, g, n);
            write_part(up + i * F, u, n);
        }
        write_part(hidden + i * F, g * sigmoid(g) * u, n);
    }
}

static void forward_rows(const layer *of, task rows, const float *packed, element *gate, element *up, float *out, float *own) {
    const long D = of->D, F = of->F, deep = units(D), hidden_deep = units(F), first_panels = blocks(F, VL), start = rows.of->start + rows.first;
    float *panels = own;
    element *hidden = (element *)(own + TASK * (deep > hidden_deep ? deep : hidden_deep));
    for (long i = 0; i < rows.rows; i += MR)
        panel_of_rows(of->x, D, of->token + start + i, least(MR, rows.rows - i), D, MR, panels + i * deep);
    for (long j = 0; j < first_panels; j++)
        for (long i = 0; i < rows.rows; i += MR) {
            const tile sum = multiply_units(deep, panels + i * deep, packed + j * deep * NR);
            const long kept = (start + i) * F + j * VL;
            activate(&sum, least(MR, rows.rows - i), least(VL, F - j * VL), F, gate ? gate + kept : NULL, gate ? up + kept : NULL,
                     hidden + i * F + j * VL);
        }
    for (long i = 0; i < rows.rows; i += MR)
        panel_of_rows(hidden + i * F, F, NULL, least(MR, rows.rows - i), F, MR, panels + i * hidden_deep);
    packed += first_panels * deep * NR;
    for (long j = 0; j < D; j += NR)
        for (long i = 0; i < rows.rows; i += MR) {
            const tile sum = multiply_units(hidden_deep, panels + i * hidden_deep, packed + j * hidden_deep);
            put(&sum, out + (rows.of->offset + rows.first + i) * D + j, D, least(MR, rows.rows - i), least(NR, D - j), 0);
        }
}

/* gate, up [P, F]: NULL where nothing is kept. y [T, D], sums in float32, must be zero. Returns 0, or 1 where memory is short. */
int KERNEL(moe_cpu_experts_forward)(long D, long F, long E, const int64_t *offsets, const int64_t *token, const float *weight, const element *x,
                                    const element *w_gate, const element *w_up, const element *w_down, element *gate, element *up, float *y,
                                    int threads) {
    static __thread float *shared = NULL, *all = NULL, *own = NULL;
    static __thread size_t shared_size = 0, all_size = 0, own_size = 0;
    const layer of = {D, F, E, (long)LIMIT * threads, offsets, token, weight, x, w_gate, w_up, w_down};
    const long parts = blocks(F, NR) + blocks(D, NR), packed = blocks(F, VL) * units(D) * NR + blocks(D, NR) * units(F) * NR,
               wide = units(D > F ? D : F);
    place at = {0};
    group now;
    int short_of_memory = 0;
    while (next_group(&of, &at, D, &now)) {
        float *weights = scratch(&shared, &shared_size, now.slots * packed), *rows = scratch(&all, &all_size, now.rows * D);
        if (!weights || !rows) return 1;
#pragma omp parallel num_threads(threads)
        {
            float *mine = scratch(&own, &own_size, TASK * (wide + F));
            if (!mine) short_of_memory = 1;
#pragma omp for schedule(static)
            for (long i = 0; i < now.slots * parts; i++)
                pack_forward(&of, now.expert_of[i / parts], i % parts, weights + i / parts * packed);
#pragma omp for schedule(dynamic)
            for (int i = 0; i < now.tasks; i++) {
                const task next = task_at(&now, i);
                if (mine) forward_rows(&of, next, weights + next.of->slot * packed, gate, up, rows, mine);
            }
            sum_rows(&now, &of, rows, weight, y, omp_get_thread_num(), omp_get_num_threads());
        }
        if (short_of_memory) return 1;
    }
    return 0;
}

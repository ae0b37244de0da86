/* y = sum over a token's experts of weight x (silu(x W_gate) x (x W_up)) W_down.
 *
 * A tile of the first product holds VL columns of gate and the same of up, so that the activation is worked out in registers; a
 * task's hidden values stay in the core's cache for the second product. Kept for backward, if asked for: gate and up.
 */
#include "experts.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

static void pack_weights(const layer *of, long expert, long panel, long first_panels, float *packed) {
    const long D = of->D, F = of->F;
    if (panel < first_panels) { /* columns of gate and of up beside each other */
        const long j = panel * VL, n = least(VL, F - j);
        const float *gate = of->gate + expert * D * F + j, *up = of->up + expert * D * F + j;
        float *to = packed + panel * D * NR;
        for (long k = 0; k < D; k++, to += NR, gate += F, up += F) {
            if (n == VL) {
                *(vec *)to = load(gate);
                *(vec *)(to + VL) = load(up);
                continue;
            }
            for (long i = 0; i < VL; i++) to[i] = i < n ? gate[i] : 0;
            for (long i = 0; i < VL; i++) to[VL + i] = i < n ? up[i] : 0;
        }
    } else {
        const long j = (panel - first_panels) * NR;
        pack_columns(of->down + expert * F * D + j, D, NULL, D - j, F, NR, packed + first_panels * D * NR + (panel - first_panels) * F * NR);
    }
}

/* silu(gate) x up of a tile: kept where asked for, and into hidden, whose rows are F apart */
static void activate(const tile *sum, long rows, long n, long F, float *gate, float *up, float *hidden) {
    for (long i = 0; i < rows; i++) {
        const vec g = sum->at[i][0], u = sum->at[i][1];
        if (gate) {
            store_part(gate + i * F, g, n);
            store_part(up + i * F, u, n);
        }
        store_part(hidden + i * F, g * sigmoid(g) * u, n);
    }
}

static void forward_rows(const layer *of, task rows, const float *packed, float *gate, float *up, float *out, float *own) {
    const long D = of->D, F = of->F, first_panels = blocks(F, VL), start = rows.of->start + rows.first;
    float *panels = own, *hidden = own + TASK * (D > F ? D : F);
    for (long i = 0; i < rows.rows; i += MR)
        pack_rows(of->x, D, of->token + start + i, least(MR, rows.rows - i), D, MR, panels + i * D);
    for (long j = 0; j < first_panels; j++)
        for (long i = 0; i < rows.rows; i += MR) {
            const tile sum = multiply(D, panels + i * D, packed + j * D * NR);
            const long kept = (start + i) * F + j * VL;
            activate(&sum, least(MR, rows.rows - i), least(VL, F - j * VL), F, gate ? gate + kept : NULL, gate ? up + kept : NULL,
                     hidden + i * F + j * VL);
        }
    for (long i = 0; i < rows.rows; i += MR) pack_rows(hidden + i * F, F, NULL, least(MR, rows.rows - i), F, MR, panels + i * F);
    packed += first_panels * D * NR;
    for (long j = 0; j < D; j += NR)
        for (long i = 0; i < rows.rows; i += MR) {
            const tile sum = multiply(F, panels + i * F, packed + j * F);
            put(&sum, out + (rows.of->offset + rows.first + i) * D + j, D, least(MR, rows.rows - i), least(NR, D - j), 0);
        }
}

/* gate, up [P, F]: NULL where nothing is kept. y [T, D] must be zero. Returns 0, or 1 where memory is short. */
int moe_cpu_experts_forward(long D, long F, long E, const int64_t *offsets, const int64_t *token, const float *weight, const float *x,
                            const float *w_gate, const float *w_up, const float *w_down, float *gate, float *up, float *y, int threads) {
    static __thread float *shared = NULL, *all = NULL, *own = NULL;
    static __thread size_t shared_size = 0, all_size = 0, own_size = 0;
    const layer of = {D, F, E, offsets, token, weight, x, w_gate, w_up, w_down};
    const long first_panels = blocks(F, VL), panels = first_panels + blocks(D, NR);
    const long packed = first_panels * D * NR + blocks(D, NR) * F * NR, wide = D > F ? D : F;
    place at = {0, 0};
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
            for (long i = 0; i < now.slots * panels; i++)
                pack_weights(&of, now.expert_of[i / panels], i % panels, first_panels, weights + i / panels * packed);
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

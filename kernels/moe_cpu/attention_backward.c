/* Causal attention, backward, from the output and the log-sum-exp: gradients of queries, keys and values.
 *
 * The weights p = e^(scale x q k^T - lse) are computed again, BLOCK x BLOCK at a time, with ds = p (do v^T - delta) beside them, where
 * delta is a row's sum of do x out; three products read both from the second cache: dv += p^T do, dk += ds^T q, dq += ds k. A task has
 * all or every so many row blocks of a key head and its own sums dk and dv. How many tasks share a head follows from the sizes, and
 * their sums are added in order, so that results do not depend on the number of threads.
 */
#include "attention.h"

typedef struct {
    float *keys_turned, *values_turned, *keys;               /* of a head: panels of NR keys, and of NR elements */
    float *queries_turned, *grads_turned, *queries, *grads;  /* of a block: panels of MR rows, and of NR elements */
    float *weights, *slopes, *delta, *lse, *dq;              /* p and ds, BLOCK x BLOCK; the block's gradient */
    float *dk, *dv;                                          /* sums of a task, [S, D] and [S, V], with padding */
} space;

static size_t sums_size(sizes z) { return (size_t)round_up(z.S, BLOCK) * (round_up(z.D, VL) + round_up(z.V, VL)); }

/* places in memory at `from`, if that is any; returns the number of elements needed */
static size_t divide(space *space, sizes z, float *from) {
    const long S = round_up(z.S, BLOCK), D = round_up(z.D, VL), V = round_up(z.V, VL);
    float **places[] = {&space->keys_turned, &space->values_turned, &space->keys,    &space->queries_turned, &space->grads_turned, &space->queries,
                        &space->grads,       &space->weights,       &space->slopes,  &space->delta,          &space->lse,          &space->dq};
    const size_t lengths[] = {S * z.D, S * z.V, S * D, BLOCK * z.D, BLOCK * z.V, BLOCK * D, BLOCK * V, BLOCK * BLOCK, BLOCK * BLOCK, BLOCK, BLOCK, BLOCK * D};
    size_t used = 0;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; used += lengths[i++])
        if (from) *places[i] = from + used;
    return used;
}

/* p and ds of a row tile and NR keys from `first` on, of which row i sees those from begin[i] up to `seen` + i */
INLINE void weigh(space space, sizes z, long row, const int *begin, long first, long column, int seen) {
    float *weights = space.weights + row * BLOCK + column, *slopes = space.slopes + row * BLOCK + column;
    const tile scores = multiply_strided(z.D, space.queries_turned + row * z.D, 1, MR, space.keys_turned + first * z.D, 2);
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const vec p = exponential(scores.at[i][j] - space.lse[row + i]);
            *(vec *)(weights + i * BLOCK + j * VL) = pick(lanes + j * VL < seen + i, p, (vec){0});
        }
    for (int i = 0; i < MR && first < begin[MR - 1]; i++)
        for (int j = 0; j < NR; j++)
            if (first + j < begin[i]) weights[i * BLOCK + j] = 0;
    const tile grads = multiply_strided(z.V, space.grads_turned + row * z.V, 1, MR, space.values_turned + first * z.V, 2);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            *(vec *)(slopes + i * BLOCK + j * VL) = *(vec *)(weights + i * BLOCK + j * VL) * (grads.at[i][j] - space.delta[row + i]);
}

/* out[i][0 .. columns] += sum over k < K of a(i, k) x panels[k], for MR rows; `padded` rows to a panel, of which `skip` are passed over */
INLINE void add_product(long K, const float *a, long row, long step, const float *panels, long padded, long skip, float *out, long columns) {
    const long stride = round_up(columns, VL);
    for (long j = 0; j < columns; j += NR, panels += padded * NR) {
        const int wide = columns - j > VL;
        const tile t = wide ? multiply_strided(K, a, row, step, panels + skip * NR, 2) : multiply_strided(K, a, row, step, panels + skip * VL, 1);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            *(vec *)(out + i * stride + j) += t.at[i][0];
            if (wide) *(vec *)(out + i * stride + j + VL) += t.at[i][1];
        }
    }
}

typedef struct {
    strided q, k, v, out, grad, dq, dk, dv;
    angles by;
    sight seen;
} tensors;

/* keys of a block from `first` on that no row of a tile sees, whose first row begins at `begin`: whole tiles of them */
static long unseen(long begin, long first) { return begin > first ? least(BLOCK, (begin - first) / NR * NR) : 0; }

/* what comes next: rows of a query head from `first` on, and those of a key head from `key` on; of no batch where there is nothing */
typedef struct {
    long b, n, first, key_b, m, key;
} place;

/* a row tile of what comes next */
static void fetch_next(sizes z, const tensors *x, place at, long i) {
    if (at.b < z.B) {
        fetch(x->q, z.S, z.D, at.b, at.n, at.first + i);
        fetch(x->grad, z.S, z.V, at.b, at.n, at.first + i);
        fetch(x->out, z.S, z.V, at.b, at.n, at.first + i);
    }
    if (at.key_b < z.B) {
        fetch(x->k, z.S, z.D, at.key_b, at.m, at.key + i);
        fetch(x->v, z.S, z.V, at.key_b, at.m, at.key + i);
    }
}

/* a block of rows against a block of keys from `first` on; what comes next is fetched meanwhile, during the diagonal pair, the last */
static void block_pair(space space, sizes z, const tensors *x, long rows, const int *begin, long first, int diagonal, place next) {
    const long D = round_up(z.D, VL), V = round_up(z.V, VL), S = round_up(z.S, BLOCK), keys = least(BLOCK, z.S - first);
    for (long i = 0; i < rows; i += MR) {
        const long from = unseen(begin[i], first), to = diagonal ? i + MR : keys;
        if (diagonal) fetch_next(z, x, next, i);
        for (long row = i; from && row < i + MR; row++) {
            memset(space.weights + row * BLOCK, 0, sizeof(float) * from);
            memset(space.slopes + row * BLOCK, 0, sizeof(float) * from);
        }
        for (long j = from; j < to; j += NR) weigh(space, z, i, begin + i, first + j, j, diagonal ? i + 1 - j : BLOCK);
    }
    for (long j = 0, last = 0; j < keys; j += MR) {
        const long skip = diagonal ? j : 0; /* rows [skip, last) see keys of this tile */
        while (last < rows && begin[last] < first + j + MR) last++;
        if (last <= skip) continue;
        add_product(last - skip, space.weights + skip * BLOCK + j, 1, BLOCK, space.grads, BLOCK, skip, space.dv + (first + j) * V, z.V);
        add_product(last - skip, space.slopes + skip * BLOCK + j, 1, BLOCK, space.queries, BLOCK, skip, space.dk + (first + j) * D, z.D);
    }
    for (long i = 0; i < rows; i += MR) {
        const long from = unseen(begin[i], first), to = diagonal ? least(keys, i + MR) : keys;
        if (from < to) add_product(to - from, space.slopes + i * BLOCK + from, BLOCK, 1, space.keys, S, first + from, space.dq + i * D, z.D);
    }
}

static inline float inner(const float *a, const float *b, long n) {
    vec sum = {0};
    long j = 0;
    for (; j + VL <= n; j += VL) sum += load(a + j) * load(b + j);
    float rest = 0;
    for (; j < n; j++) rest += a[j] * b[j];
    return total(sum) + rest;
}

static void block_of_rows(space space, sizes z, float scale, const tensors *x, const float *lse, long b, long n, long first, place next) {
    const long rows = least(BLOCK, z.S - first), D = round_up(z.D, VL);
    long stride = x->q.row;
    const float *q = turned(head_of(x->q, b, n) + first * stride, &stride, rows, first, z.D, x->by, space.dq);
    const float *grad = head_of(x->grad, b, n) + first * x->grad.row;
    pack_turned(q, stride, rows, z.D, MR, scale, space.queries_turned);
    pack_turned(grad, x->grad.row, rows, z.V, MR, 1, space.grads_turned);
    pack_panels(q, stride, rows, BLOCK, z.D, scale, space.queries);
    pack_panels(grad, x->grad.row, rows, BLOCK, z.V, 1, space.grads);
    for (long i = 0; i < BLOCK; i++) {
        const float *out = head_of(x->out, b, n) + (first + i) * x->out.row;
        space.delta[i] = i < rows ? inner(grad + i * x->grad.row, out, z.V) : 0;
        space.lse[i] = i < rows ? lse[(b * z.N + n) * z.S + first + i] : 0;
    }
    memset(space.dq, 0, sizeof(float) * BLOCK * D);
    int begin[BLOCK];
    first_keys(x->seen, z.S, b, first, begin);
    for (long key = begin[0] / BLOCK * BLOCK; key <= first; key += BLOCK) block_pair(space, z, x, rows, begin, key, key == first, next);
    for (long i = 0; i < rows; i++) {
        float *to = head_of(x->dq, b, n) + (first + i) * x->dq.row;
        for (long j = 0; j < z.D; j++) to[j] = space.dq[i * D + j] * scale;
        turn_back(to, first + i, x->by);
    }
}

/* every `parts`-th row block of a key head's query heads, from `part` on; `ahead` is the key head that comes next */
static void share_of_head(space space, sizes z, float scale, const tensors *x, const float *lse, long head, long part, long parts, long ahead) {
    const long b = head / z.M, m = head % z.M, group = z.N / z.M, row_blocks = blocks(z.S, BLOCK), S = round_up(z.S, BLOCK);
    long stride = x->k.row;
    const float *k = turned(head_of(x->k, b, m), &stride, z.S, 0, z.D, x->by, space.dk);
    pack_turned(k, stride, z.S, z.D, NR, 1, space.keys_turned);
    pack_turned(head_of(x->v, b, m), x->v.row, z.S, z.V, NR, 1, space.values_turned);
    pack_panels(k, stride, z.S, S, z.D, 1, space.keys);
    memset(space.dk, 0, sizeof(float) * sums_size(z));
    for (long i = part; i < group * row_blocks; i += parts) {
        const long soon = i + parts, first = i % row_blocks * BLOCK;
        place next = {b, m * group + soon / row_blocks, soon % row_blocks * BLOCK, i / row_blocks == group - 1 ? ahead / z.M : z.B, ahead % z.M, first};
        if (soon >= group * row_blocks) next.b = ahead / z.M, next.n = ahead % z.M * group, next.first = 0;
        block_of_rows(space, z, scale, x, lse, b, m * group + i / row_blocks, first, next);
    }
}

/* gradients of a key and its value: the sum of what the parts of a head have */
static void write_row(sizes z, const tensors *x, const float *sums, long parts, long head, long s) {
    const long D = round_up(z.D, VL), V = round_up(z.V, VL);
    float *dk = head_of(x->dk, head / z.M, head % z.M) + s * x->dk.row, *dv = head_of(x->dv, head / z.M, head % z.M) + s * x->dv.row;
    const float *of_k = sums + s * D, *of_v = sums + round_up(z.S, BLOCK) * D + s * V;
    for (long part = 0; part < parts; part++, of_k += sums_size(z), of_v += sums_size(z)) {
        for (long j = 0; j < z.D; j++) dk[j] = (part ? dk[j] : 0) + of_k[j];
        for (long j = 0; j < z.V; j++) dv[j] = (part ? dv[j] : 0) + of_v[j];
    }
    turn_back(dk, s, x->by);
}

/* the tensors in order: q, k, v, out, its gradient, and the gradients of q, k and v; then the angles and what rows see */
int moe_cpu_attention_backward(const sizes *given, float scale, const tensors *x, const float *lse, int threads) {
    static __thread float *all = NULL, *own = NULL;
    static __thread size_t all_size = 0, own_held = 0;
    const sizes z = *given;
    const long heads = z.B * z.M, D = round_up(z.D, VL), S = round_up(z.S, BLOCK);
    if (!in_order(x->seen, z.S, z.B)) return 2;
    if (!heads || !z.N || !z.S) return 0;
    const long parts = heads >= 8 ? 1 : least(blocks(z.S, BLOCK) * (z.N / z.M), blocks(16, heads));
    space nowhere;
    const size_t sums = sums_size(z), needed = divide(&nowhere, z, NULL);
    float *shared = parts > 1 ? scratch(&all, &all_size, sums * parts * heads) : NULL;
    if (parts > 1 && !shared) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *mine = scratch(&own, &own_held, needed + (parts > 1 ? 0 : sums));
        space space;
        failed |= !mine;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < heads * parts; task++) {
            if (failed) continue;
            divide(&space, z, mine);
            space.dk = parts > 1 ? shared + task * sums : mine + needed;
            space.dv = space.dk + S * D;
            const long head = task / parts;
            share_of_head(space, z, scale, x, lse, head, task % parts, parts, parts > 1 ? heads : head + threads);
            for (long s = 0; s < z.S && parts == 1; s++) write_row(z, x, space.dk, 1, head, s);
        }
#pragma omp for schedule(static)
        for (long at = 0; at < (parts > 1 ? heads * z.S : 0); at++)
            if (!failed) write_row(z, x, shared + at / z.S * parts * sums, parts, at / z.S, at % z.S);
    }
    return failed;
}

/* Causal attention, forward: out = softmax(scale x q k^T, keys up to the query's own position) v, and each row's log-sum-exp.
 *
 * MR query rows at a time: their scores against a chunk of keys stay in the first cache, where they become weights, and the product
 * with the values reads them there. Longer sequences are done a chunk after another, with a running maximum; a block of rows passes
 * over a chunk together, so that its keys and values are read from the second cache. Tiles above the diagonal are never computed.
 */
#include "attention.h"

enum { CHUNK = 512, LINE = CHUNK + VL };

typedef struct {
    float *keys, *values;                 /* packed: of a whole head */
    float *queries, *scores, *sum, *lines; /* packed rows of a block; a tile's scores; a block's sums of values, then its maxima and totals */
} space;

static size_t packed_size(sizes z) { return (size_t)round_up(z.S, BLOCK) * (z.D + round_up(z.V, VL)); }
static size_t own_size(sizes z) { return (size_t)BLOCK * (z.D + round_up(z.V, VL) + 2) + MR * LINE + VL; }

static void divide(space *space, sizes z, float *packed, float *own) {
    space->keys = packed;
    space->values = packed + round_up(z.S, BLOCK) * z.D;
    space->scores = own;
    space->sum = space->scores + MR * LINE;
    space->lines = space->sum + BLOCK * round_up(z.V, VL);
    space->queries = space->lines + 2 * BLOCK;
}

static void pack_head(space space, sizes z, strided k, strided v, long b, long m) {
    pack_turned(head_of(k, b, m), k.row, z.S, z.D, NR, 1, space.keys);
    pack_panels(head_of(v, b, m), v.row, z.S, round_up(z.S, BLOCK), z.V, 1, space.values);
}

/* scores of rows [row, row + MR) against keys [first, first + n), and their largest, in a vector for each row */
static void score(space space, long D, const float *queries, long row, long first, long n, vec *largest) {
    const ints lane = lanes();
    for (int i = 0; i < MR; i++) largest[i] = both(-INFINITY);
    for (long j = 0; j < n; j += NR) {
        const tile t = multiply_strided(D, queries, 1, MR, space.keys + (first + j) * D, 2);
        const int whole = first + j + NR <= row + 1;
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const int seen = row + i + 1 - first - j; /* keys of this tile that the row sees */
            store(space.scores + i * LINE + j, t.at[i][0]);
            store(space.scores + i * LINE + j + VL, t.at[i][1]);
            const vec left = whole ? t.at[i][0] : pick(lane < seen, t.at[i][0], both(-INFINITY));
            const vec right = whole ? t.at[i][1] : pick(lane + VL < seen, t.at[i][1], both(-INFINITY));
            largest[i] = greater(greater(left, right), largest[i]);
        }
    }
}

/* scores of a row become e^(score - top), zeros from `seen` to n; returns their sum */
static float weigh(float *scores, float top, long seen, long n) {
    vec sum = {0};
    long j = 0;
    for (; j + VL <= seen; j += VL) {
        const vec p = exponential(*(vec *)(scores + j) - top);
        *(vec *)(scores + j) = p;
        sum += p;
    }
    for (; j < n; j += VL) {
        vec p = {0};
        if (j < seen) p = pick(lanes() < (int)(seen - j), exponential(*(vec *)(scores + j) - top), p);
        *(vec *)(scores + j) = p;
        sum += p;
    }
    return total(sum);
}

INLINE void add_values(space space, sizes z, const float *values, long n, float *sum, const float *fade, int width) {
    const long stride = round_up(z.V, VL);
    const tile t = multiply_strided(n, space.scores, LINE, 1, values, width);
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < width; j++) {
            vec *at = (vec *)(sum + i * stride + j * VL);
            *at = fade ? *at * fade[i] + t.at[i][j] : t.at[i][j];
        }
}

/* rows [row, row + MR), the ones from `at` on in the block, against a chunk of keys */
static void attend_rows(space space, sizes z, long row, long at, long first) {
    float *top = space.lines + at, *sums = top + BLOCK, fade[MR], *sum = space.sum + at * round_up(z.V, VL);
    vec largest[MR];
    const long n = least(CHUNK, row + MR - first);
    score(space, z.D, space.queries + at * z.D, row, first, n, largest);
    for (int i = 0; i < MR; i++) {
        float most = first ? top[i] : -INFINITY;
        for (int j = 0; j < VL; j++) most = largest[i][j] > most ? largest[i][j] : most;
        const float added = weigh(space.scores + i * LINE, most, least(n, row + i + 1 - first), n);
        fade[i] = first ? expf(top[i] - most) : 0;
        sums[i] = first ? sums[i] * fade[i] + added : added;
        top[i] = most;
    }
    const float *values = space.values;
    for (long j = 0; j < z.V; j += NR, values += round_up(z.S, BLOCK) * NR) {
        if (z.V - j > VL)
            add_values(space, z, values + first * NR, n, sum + j, first ? fade : NULL, 2);
        else
            add_values(space, z, values + first * VL, n, sum + j, first ? fade : NULL, 1);
    }
}

static void attend_block(space space, sizes z, float scale, strided q, strided out, float *lse, long b, long n, long first) {
    const long rows = least(BLOCK, z.S - first), stride = round_up(z.V, VL);
    pack_turned(head_of(q, b, n) + first * q.row, q.row, rows, z.D, MR, scale, space.queries);
    for (long key = 0; key < first + rows; key += CHUNK)
        for (long i = 0; i < rows; i += MR)
            if (key < first + i + MR) attend_rows(space, z, first + i, i, key);
    for (long i = 0; i < rows; i++) {
        const float sum = space.lines[BLOCK + i], *from = space.sum + i * stride;
        float *to = head_of(out, b, n) + (first + i) * out.row;
        for (long j = 0; j < z.V; j++) to[j] = from[j] / sum;
        lse[(b * z.N + n) * z.S + first + i] = space.lines[i] + logf(sum);
    }
}

/* whole heads for a thread where there are enough of them; otherwise all heads are packed first and their blocks shared out */
int moe_cpu_attention(const sizes *given, float scale, const strided *q, const strided *k, const strided *v, const strided *out, float *lse,
                      int threads) {
    static __thread float *all = NULL, *own = NULL;
    static __thread size_t all_size = 0, own_held = 0;
    const sizes z = *given;
    const long heads = z.B * z.M, group = z.M ? z.N / z.M : 0, row_blocks = blocks(z.S, BLOCK);
    const int whole = heads >= 2 * threads;
    const size_t packed = packed_size(z);
    float *shared = whole ? NULL : scratch(&all, &all_size, packed * heads);
    if (!whole && !shared) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *mine = scratch(&own, &own_held, own_size(z) + (whole ? packed : 0));
        space space;
        failed |= !mine;
        if (!whole) {
#pragma omp for schedule(dynamic)
            for (long head = 0; head < heads; head++) {
                if (failed) continue;
                divide(&space, z, shared + head * packed, mine);
                pack_head(space, z, *k, *v, head / z.M, head % z.M);
            }
        }
        const long each = whole ? group * row_blocks : 1, tasks = heads * group * row_blocks / (each ? each : 1);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            if (failed) continue;
            const long head = task * each / (group * row_blocks);
            divide(&space, z, whole ? mine + round_up(own_size(z), VL) : shared + head * packed, mine);
            if (whole) pack_head(space, z, *k, *v, head / z.M, head % z.M);
            for (long i = task * each; i < (task + 1) * each; i++) {
                const long n = head % z.M * group + i / row_blocks % group;
                /* the last blocks are the longest: they are begun with */
                attend_block(space, z, scale, *q, *out, lse, head / z.M, n, (row_blocks - 1 - i % row_blocks) * BLOCK);
            }
        }
    }
    return failed;
}

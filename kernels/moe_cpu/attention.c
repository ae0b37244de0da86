/* Causal attention, forward: out = softmax(scale x q k^T, keys from a row's first up to its own position) v, and each row's log-sum-exp.
 *
 * A sink is the score of one more key, whose value is zero.
 *
 * MR query rows at a time: their scores against a chunk of keys stay in the first cache, where they become weights, and the product
 * with the values reads them there. Longer sequences are done a chunk after another, with a running maximum; a block of rows passes
 * over a chunk together, so that its keys and values are read from the second cache. Tiles that no row sees are never computed.
 */
#include <float.h>

#include "attention.h"

/* a line of scores is not a power of two apart from the next; a tile's rows have whole vectors of their figures, ROWS wide */
enum { CHUNK = 512, LINE = CHUNK + VL, ROWS = (MR + VL - 1) / VL * VL, FIGURES = BLOCK / MR * ROWS };

typedef struct {
    float *keys, *values;           /* packed: of a whole head */
    float *queries, *scores, *sum;  /* packed rows of a block; scores of a tile; a block's weighted sums of values */
    float *room;                    /* rows of a block that are turned */
    float *top, *weight;            /* of a block's rows: largest score so far, and sum of e^(score - top) */
} space;

typedef struct {
    sizes z;
    float scale;
    strided q, k, v, out;
    angles by;
    sight seen;
    const float *sink; /* of every query head, or none */
    float *lse;
} job;

/* a block of rows: of batch b, key head m, query head n, from `first` on */
typedef struct {
    long b, m, n, first;
} place;

/* blocks are counted by key head, query head, and from the last, which is the longest, to the first */
static place place_of(sizes z, long item) {
    const long row_blocks = blocks(z.S, BLOCK), n = item / row_blocks % z.N;
    return (place){item / row_blocks / z.N, n * z.M / z.N, n, (row_blocks - 1 - item % row_blocks) * BLOCK};
}

static size_t packed_size(sizes z) { return (size_t)round_up(z.S, BLOCK) * (z.D + round_up(z.V, VL)); }
static size_t own_size(sizes z) { return (size_t)BLOCK * (2 * z.D + round_up(z.V, VL)) + 2 * FIGURES + MR * LINE + VL; }

static void divide(space *space, sizes z, float *packed, float *own) {
    space->keys = packed;
    space->values = packed + round_up(z.S, BLOCK) * z.D;
    space->scores = own;
    space->sum = space->scores + MR * LINE;
    space->top = space->sum + BLOCK * round_up(z.V, VL);
    space->weight = space->top + FIGURES;
    space->room = space->weight + FIGURES;
    space->queries = space->room + BLOCK * z.D;
}

static void pack_head(space space, const job *x, long head) {
    const sizes z = x->z;
    for (long first = 0; first < z.S; first += BLOCK) {
        const long rows = least(BLOCK, z.S - first);
        long stride = x->k.row;
        const float *keys = turned(head_of(x->k, head / z.M, head % z.M) + first * stride, &stride, rows, first, z.D, x->by, space.room);
        pack_turned(keys, stride, rows, z.D, NR, 1, space.keys + first * z.D);
    }
    pack_panels(head_of(x->v, head / z.M, head % z.M), x->v.row, z.S, round_up(z.S, BLOCK), z.V, 1, space.values);
}

/* scores of rows [row, row + MR) against keys [first, first + n), and the largest of those seen, in a vector for each row */
static void score(space space, long D, const float *queries, long row, const int *begin, long first, long n, vec *largest) {
    for (int i = 0; i < ROWS; i++) largest[i] = both(-INFINITY);
    for (long j = 0; j < n; j += NR) {
        const tile t = multiply_strided(D, queries, 1, MR, space.keys + (first + j) * D, 2);
        const int whole = first + j + NR <= row + 1 && first + j >= begin[MR - 1];
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const int from = begin[i] - first - j, to = row + i + 1 - first - j; /* keys of this tile that the row sees */
            store(space.scores + i * LINE + j, t.at[i][0]);
            store(space.scores + i * LINE + j + VL, t.at[i][1]);
            const vec left = whole ? t.at[i][0] : pick((lanes >= from) & (lanes < to), t.at[i][0], both(-INFINITY));
            const vec right = whole ? t.at[i][1] : pick((lanes + VL >= from) & (lanes + VL < to), t.at[i][1], both(-INFINITY));
            largest[i] = greater(greater(left, right), largest[i]);
        }
    }
}

/* scores of a row become e^(score - top) from `from` to `to`, and zeros else up to n; returns parts of their sum */
static inline vec weigh(float *scores, float top, long from, long to, long n) {
    vec sum = {0};
    long j = 0;
    for (; j + VL <= from; j += VL) *(vec *)(scores + j) = sum;
    if (j < from) {
        sum = pick((lanes >= (int)(from - j)) & (lanes < (int)(to - j)), exponential(*(vec *)(scores + j) - top), sum);
        *(vec *)(scores + j) = sum;
        j += VL;
    }
    for (; j + VL <= to; j += VL) {
        const vec p = exponential(*(vec *)(scores + j) - top);
        *(vec *)(scores + j) = p;
        sum += p;
    }
    for (; j < n; j += VL) {
        vec p = {0};
        if (j < to) p = pick(lanes < (int)(to - j), exponential(*(vec *)(scores + j) - top), p);
        *(vec *)(scores + j) = p;
        sum += p;
    }
    return sum;
}

/* scores of a tile's row i, against n keys of which it sees those from begin[i] - first to `to` + i, become weights against its largest
 * so far, which is finite also where it has seen none yet; `fade` is what earlier sums are multiplied by, if this chunk is not the first */
static void soften(space space, long at, const int *begin, long first, long to, long n, int fresh, vec *figures, float *fade) {
    float *top = space.top + at / MR * ROWS, *weight = space.weight + at / MR * ROWS;
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; i += VL) {
        transpose(figures + i);
        vec most = both(-FLT_MAX);
        for (int j = 0; j < VL; j++) most = greater(figures[i + j], most);
        if (!fresh) most = greater(most, *(vec *)(top + i));
        store(fade + i, fresh ? (vec){0} : exponential(*(vec *)(top + i) - most));
        *(vec *)(top + i) = most;
    }
    for (int i = 0; i < MR; i++) {
        const long from = begin[i] > first ? least(n, begin[i] - first) : 0;
        figures[i] = weigh(space.scores + i * LINE, top[i], from, least(n, to + i), n);
    }
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; i += VL) {
        transpose(figures + i);
        vec sum = figures[i];
        for (int j = 1; j < VL; j++) sum += figures[i + j];
        *(vec *)(weight + i) = fresh ? sum : *(vec *)(weight + i) * load(fade + i) + sum;
    }
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

/* rows [row, row + MR), the ones from `at` on in the block, against those of the keys [chunk, chunk + CHUNK) that any of them sees */
static void attend_rows(space space, sizes z, long row, long at, const int *begin, long chunk) {
    float fade[ROWS], *sum = space.sum + at * round_up(z.V, VL);
    vec figures[ROWS];
    const long own = begin[0] / NR * NR, fresh = own >= chunk, first = fresh ? own : chunk;
    const long n = least(chunk + CHUNK, row + MR) - first;
    if (n <= 0) return;
    score(space, z.D, space.queries + at * z.D, row, begin, first, n, figures);
    soften(space, at, begin, first, row + 1 - first, n, fresh, figures, fade);
    const float *values = space.values;
    for (long j = 0; j < z.V; j += NR, values += round_up(z.S, BLOCK) * NR) {
        if (z.V - j > VL)
            add_values(space, z, values + first * NR, n, sum + j, fresh ? NULL : fade, 2);
        else
            add_values(space, z, values + first * VL, n, sum + j, fresh ? NULL : fade, 1);
    }
}

/* one block; meanwhile queries of the next are fetched, and keys and values of the key head `ahead`, where there is one */
static void attend_block(space space, const job *x, place at, place next, long ahead) {
    const sizes z = x->z;
    const long rows = least(BLOCK, z.S - at.first), V = round_up(z.V, VL);
    long stride = x->q.row;
    const float *queries = turned(head_of(x->q, at.b, at.n) + at.first * stride, &stride, rows, at.first, z.D, x->by, space.room);
    pack_turned(queries, stride, rows, z.D, MR, x->scale, space.queries);
    int begin[BLOCK];
    first_keys(x->seen, z.S, at.b, at.first, begin);
    const long start = begin[0] / NR * NR;
    for (long key = start; key < at.first + rows; key += CHUNK)
        for (long i = 0; i < rows; i += MR) {
            if (key == start) {
                if (next.b < z.B) fetch(x->q, z.S, z.D, next.b, next.n, next.first + i);
                if (ahead < z.B * z.M) {
                    fetch(x->k, z.S, z.D, ahead / z.M, ahead % z.M, at.first + i);
                    fetch(x->v, z.S, z.V, ahead / z.M, ahead % z.M, at.first + i);
                }
                fetch(x->out, z.S, z.V, at.b, at.n, at.first + i);
            }
            attend_rows(space, z, at.first + i, i, begin + i, key);
        }
    for (long i = 0; i < rows; i++) {
        const long figure = i / MR * ROWS + i % MR;
        float top = space.top[figure], weight = space.weight[figure], part = 1;
        if (x->sink) {
            const float sink = x->sink[at.n], most = sink > top ? sink : top;
            part = expf(top - most);
            weight = weight * part + expf(sink - most);
            top = most;
        } else if (top == -FLT_MAX)
            weight = NAN; /* every score is -inf: 0 / 0, as it is everywhere else */
        const float share = part / weight, *from = space.sum + i * V;
        float *to = head_of(x->out, at.b, at.n) + (at.first + i) * x->out.row;
        for (long j = 0; j < z.V; j++) to[j] = from[j] * share;
        x->lse[(at.b * z.N + at.n) * z.S + at.first + i] = top + logf(weight);
    }
}

/* Whole heads for a thread where there are enough of them; otherwise all heads are packed first and their blocks shared out.
 * Returns 1 without memory and 2 for first keys that are not in order. */
int moe_cpu_attention(const sizes *given, float scale, const strided *q, const strided *k, const strided *v, const strided *out,
                      const angles *by, const sight *seen, const float *sink, float *lse, int threads) {
    static __thread float *all = NULL, *own = NULL;
    static __thread size_t all_size = 0, own_held = 0;
    const sizes z = *given;
    const job x = {z, scale, *q, *k, *v, *out, *by, *seen, sink, lse};
    const long heads = z.B * z.M;
    if (!in_order(*seen, z.S, z.B)) return 2;
    if (!heads || !z.N || !z.S) return 0;
    const int whole = heads >= 2 * threads;
    const long all_items = z.B * z.N * blocks(z.S, BLOCK), each = whole ? all_items / heads : 1;
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
                pack_head(space, &x, head);
            }
        }
#pragma omp for schedule(dynamic)
        for (long task = 0; task < all_items / each; task++) {
            if (failed) continue;
            const place first = place_of(z, task * each);
            const long head = first.b * z.M + first.m;
            divide(&space, z, whole ? mine + round_up(own_size(z), VL) : shared + head * packed, mine);
            if (whole) pack_head(space, &x, head);
            for (long i = task * each; i < (task + 1) * each; i++) {
                /* what comes next for this thread, if threads take turns */
                const long next = i + 1 < (task + 1) * each ? i + 1 : (task + threads) * each;
                const int last = whole && i >= (task + 1) * each - blocks(z.S, BLOCK);
                attend_block(space, &x, place_of(z, i), place_of(z, next), last ? head + threads : heads);
            }
        }
    }
    return failed;
}

/* Matrix products: C [M, N] = A [M, K] x B [K, N] with either operand transposed, or C += .
 *
 * Panels of B are packed once by all threads, then each thread takes blocks of rows of C and packs A's rows itself. Longer K is done
 * in parts of KC, so that two panels fit a core's second cache; the order of additions does not depend on the number of threads.
 */
#include "tiles.h"

enum { MC = 8 * MR, KC = 512 };

typedef struct {
    const float *data;
    long stride;
    int transposed; /* stored [K, M] or [N, K] */
} operand;

static void pack_b(operand b, long first_k, long K, long first, long n, float *panel) {
    if (b.transposed)
        pack_rows(b.data + first * b.stride + first_k, b.stride, NULL, n, K, NR, panel);
    else
        pack_columns(b.data + first_k * b.stride + first, b.stride, NULL, n, K, NR, panel);
}

static void pack_a(operand a, long first_k, long K, long first, long m, float *panel) {
    if (a.transposed)
        pack_columns(a.data + first_k * a.stride + first, a.stride, NULL, m, K, MR, panel);
    else
        pack_rows(a.data + first * a.stride + first_k, a.stride, NULL, m, K, MR, panel);
}

/* one thread's share: blocks of rows, each over a part of the columns */
static void rows_of_c(operand a, const float *packed_b, long M, long N, long first_k, long K, float *c, long stride, int add, float *packed_a,
                      long row, long column, long last_column) {
    const long m = least(MC, M - row);
    for (long i = 0; i < m; i += MR) pack_a(a, first_k, K, row + i, least(MR, m - i), packed_a + i * K);
    for (long j = column; j < last_column; j += NR)
        for (long i = 0; i < m; i += MR) {
            const tile sum = multiply(K, packed_a + i * K, packed_b + j * K);
            put(&sum, c + (row + i) * stride + j, stride, least(MR, m - i), least(NR, N - j), add);
        }
}

void moe_cpu_product(long M, long N, long K, const float *a, long a_stride, int a_transposed, const float *b, long b_stride, int b_transposed,
                     float *c, long c_stride, int add, int threads) {
    static __thread float *shared = NULL, *own = NULL;
    static __thread size_t shared_size = 0, own_size = 0;
    if (M == 0 || N == 0) return;
    const operand left = {a, a_stride, a_transposed}, right = {b, b_stride, b_transposed};
    const long panels = blocks(N, NR), row_blocks = blocks(M, MC);
    /* few rows: the columns are shared out as well, in parts of at least four panels */
    const long parts = row_blocks >= 4 * threads ? 1 : least(blocks(panels, 4), blocks(4 * threads, row_blocks));
    const long share = blocks(panels, parts) * NR;
    float *packed_b = scratch(&shared, &shared_size, panels * NR * least(K, KC));
    if (K == 0 && !add)
        for (long i = 0; i < M; i++) memset(c + i * c_stride, 0, sizeof(float) * N);
#pragma omp parallel num_threads(threads)
    {
        float *packed_a = scratch(&own, &own_size, (size_t)MC * KC);
        for (long k = 0; k < K; k += KC) {
            const long depth = least(KC, K - k);
#pragma omp for schedule(static)
            for (long j = 0; j < panels; j++) pack_b(right, k, depth, j * NR, least(NR, N - j * NR), packed_b + j * NR * depth);
#pragma omp for schedule(dynamic)
            for (long task = 0; task < row_blocks * parts; task++) {
                const long column = task % parts * share;
                rows_of_c(left, packed_b, M, N, k, depth, c, c_stride, add || k, packed_a, task / parts * MC, column, least(N, column + share));
            }
        }
    }
}

/* The tile's product alone, `times` times in each thread with both panels in the first cache: what this code can reach at most. */
void moe_cpu_tiles(long K, long times, int threads) {
#pragma omp parallel num_threads(threads)
    {
        static __thread float *held = NULL;
        static __thread size_t size = 0;
        float *panels = scratch(&held, &size, K * (MR + NR) + MR * NR), *out = panels + K * (MR + NR);
        if (panels) memset(panels, 0, sizeof(float) * (K * (MR + NR) + MR * NR));
        for (long i = 0; i < times && panels; i++) {
            const tile sum = multiply(K, panels + K * NR, panels);
            put(&sum, out, NR, MR, NR, 0);
            __asm__ volatile("" : : "r"(out) : "memory"); /* or the product would be done once for all times */
        }
    }
}

long moe_cpu_tile_flops(long K) { return 2L * MR * NR * K; }

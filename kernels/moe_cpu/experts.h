/* The expert feed-forward network: what forward.c and backward.c share.
 *
 * Rows, sorted by expert, are taken in groups that fit the caches beside the packed weights of their experts: scratch memory is bounded
 * by LIMIT for each thread whatever the number of rows and experts. A group has chunks (rows of one expert, at most CHUNK of them, of
 * which the weights' gradients are one product), and a chunk is computed in tasks of TASK rows, which the threads share out among
 * themselves. Groups change no sum's order, so neither does the number of threads.
 */
#ifndef MOE_CPU_EXPERTS_H
#define MOE_CPU_EXPERTS_H
#include "element.h"
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

enum { CHUNK = 1024, TASK = 48, LIMIT = 1 << 19, MOST = 256 };

typedef struct {
    long D, F, E;
    long limit; /* units of packed weights, or of anything by row, in a group */
    const int64_t *offsets; /* [E + 1] */
    const int64_t *token;   /* [P] */
    const float *weight;    /* [P] */
    const element *x;         /* [T, D] */
    const element *gate, *up; /* [E, D, F] */
    const element *down;      /* [E, F, D] */
} layer;

typedef struct {
    int slot;          /* whose packed weights */
    long expert, start; /* first row, of all */
    long offset, rows; /* first row within the group */
    long unit;         /* the same, where rows are packed in units */
} chunk;

typedef struct {
    int chunks, slots, tasks;
    long start, rows, units;
    chunk at[MOST];
    long expert_of[MOST];                 /* by slot */
    long order_of[MOST];                  /* among the experts that have rows */
    int first_of[MOST + 1];               /* a slot's chunks are first_of[slot] .. first_of[slot + 1] */
    int first_task[MOST + 1];             /* of a chunk */
} group;

typedef struct {
    long expert, row, opened;
} place;

/* how many experts' weights a group has at most; those of one expert whatever their size */
static inline long most_slots(const layer *of) {
    const long size = units(3 * of->D * of->F);
    return size > of->limit ? 1 : least(MOST, size ? of->limit / size : MOST);
}

/* The next rows after `at` into `found`; 0 when there are none. `columns`: what a row needs of scratch memory. */
static inline int next_group(const layer *of, place *at, long columns, group *found) {
    const long most = most_slots(of);
    *found = (group){.start = -1};
    for (; at->expert < of->E; at->expert++, at->row = 0) {
        const long first = of->offsets[at->expert], count = of->offsets[at->expert + 1] - first;
        const long even = count ? blocks(blocks(count, blocks(count, CHUNK)), MR) * MR : 0;
        while (at->row < count) {
            const long rows = least(even, count - at->row);
            const int fresh = !found->slots || found->expert_of[found->slots - 1] != at->expert;
            if (found->chunks && (found->chunks == MOST || (found->rows + rows) * columns > of->limit || found->slots + fresh > most))
                return 1;
            if (fresh) {
                at->opened += !at->row;
                found->first_of[found->slots] = found->chunks;
                found->order_of[found->slots] = at->opened;
                found->expert_of[found->slots++] = at->expert;
            }
            if (!found->chunks) found->start = first + at->row;
            found->at[found->chunks] = (chunk){found->slots - 1, at->expert, first + at->row, found->rows, rows, found->units};
            found->first_task[found->chunks++] = found->tasks;
            found->first_of[found->slots] = found->chunks;
            found->tasks += blocks(rows, TASK);
            found->first_task[found->chunks] = found->tasks;
            found->rows += rows;
            found->units += units(rows);
            at->row += rows;
        }
    }
    return found->chunks > 0;
}

typedef struct {
    const chunk *of;
    long first, rows; /* within the chunk */
} task;

static inline task task_at(const group *in, int index) {
    int c = 0;
    while (in->first_task[c + 1] <= index) c++;
    const long first = (index - in->first_task[c]) * TASK;
    return (task){in->at + c, first, least(TASK, in->at[c].rows - first)};
}

/* y[token] += row, times the row's weight if there are weights, for the columns of one of `threads` threads: in the order of rows, with
 * any number of threads */
static inline void sum_rows(const group *in, const layer *of, const float *rows, const float *weight, float *y, int thread, int threads) {
    const long share = blocks(blocks(of->D, VL), threads) * VL, first = thread * share, last = least(of->D, first + share);
    for (long p = 0; p < in->rows; p++) {
        const float scale = weight ? weight[in->start + p] : 1;
        const float *row = rows + p * of->D;
        float *sum = y + of->token[in->start + p] * of->D;
        long j = first;
        for (; j + VL <= last; j += VL) store(sum + j, load(sum + j) + scale * load(row + j));
        for (; j < last; j++) sum[j] += scale * row[j];
    }
}
#endif

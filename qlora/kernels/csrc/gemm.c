/* Products of the many rows x (n, ...) of a training step with a frozen weight W (rows, columns) as stored, in 4-bit
   codes or bf16: forward x W^T, backward x W.

   A panel of W is decoded into the cache, in the layout that the products read, and multiplied with tiles of x in
   registers: only the 4 bits are read from memory, and W never exists as a whole. The panel equals the dequantized
   weight to the last bit. Compiled for bf16 (-DBF16) and for fp32 tensors. */

#if !defined(__AVX512F__) || (defined(BF16) && (!defined(__AVX512BF16__) || defined(__AMX_BF16__)))
#error "torch's products are as fast here (AVX2 only, or AMX)"
#endif

#include <omp.h>
#include <stdlib.h>

#include "tiles.h"

#define COLUMNS (WIDE * LANES) /* of a panel */
#define DEPTH 512              /* lanes of a panel, summed separately: shorter chains of roundings */
#define ROWS 1536              /* rows of x that share a decoded panel */
#define AHEAD 32               /* rows of W to prefetch */

struct weight {
    const uint8_t *codes; /* or null */
    const uint16_t *dense;
    const float *scales, *table; /* for codes: one scale per block; the 16 values */
    long rows, columns, block;   /* block: log2 of its size */
};

/* W[row][column ... + 2 LANES), zero outside W: bf16 pairs in *even, or floats with every other one in *even */
INLINE void decode(const struct weight *w, long row, long column, U *even, U *odd) {
    *even = *odd = (U){0};
    if (row >= w->rows || column >= w->columns) return;
    const long at = row * w->columns + column, ahead = at + AHEAD * w->columns;
    if (!w->codes) {
        const U pairs = *(const U *)(w->dense + at);
        __builtin_prefetch(w->dense + ahead);
#ifdef BF16
        *even = pairs;
#else
        *even = pairs << 16, *odd = pairs & 0xffff0000u;
#endif
        return;
    }
    const U bytes = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->codes + at / 2)));
    const V table = *(const V *)w->table * w->scales[at >> w->block];
    __builtin_prefetch(w->codes + ahead / 2);
#ifdef BF16
    const U low = rounded(table), high = low << 16; /* a shuffle uses only the low 4 bits of an index */
    *even = __builtin_shuffle(low, bytes >> 4) | __builtin_shuffle(high, bytes);
#else
    *even = (U)__builtin_shuffle(table, bytes >> 4), *odd = (U)__builtin_shuffle(table, bytes);
#endif
}

INLINE void transpose(U *m) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        U keep, give;
        for (int j = 0; j < LANES; j++) keep[j] = j & step ? LANES + j - step : j, give[j] = keep[j] + step;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            const U a = m[i], b = m[i + step];
            m[i] = __builtin_shuffle(a, b, keep), m[i + step] = __builtin_shuffle(a, b, give);
        }
    }
}

/* A panel (lanes, COLUMNS) stores each 2 LANES columns as the even ones, then the odd ones; `emit` interleaves them.

   Forward: its columns are rows of W from `first`, its lanes columns of W from `begin` to `end`. */
static void pack_forward(const struct weight *w, long first, long begin, long end, uint32_t *panel) {
    for (int v = 0; v < WIDE; v++)
        for (long k = begin; k < end; k += 2 * LANES) {
            U even[LANES], odd[LANES];
            uint32_t *out = panel + (k - begin) / PAIR * COLUMNS + v * LANES;
            for (int r = 0; r < LANES; r++) decode(w, first + v / 2 * 2 * LANES + 2 * r + v % 2, k, even + r, odd + r);
            transpose(even);
#ifdef BF16
            for (int i = 0; i < LANES; i++) *(U *)(out + i * COLUMNS) = even[i];
#else
            transpose(odd);
            for (int i = 0; i < LANES; i++)
                *(U *)(out + 2 * i * COLUMNS) = even[i], *(U *)(out + (2 * i + 1) * COLUMNS) = odd[i];
#endif
        }
}

/* Backward: its columns are columns of W from `first`, its lanes rows of W from `begin` to `end`. */
static void pack_backward(const struct weight *w, long first, long begin, long end, uint32_t *panel) {
    for (long k = begin; k < end; k += PAIR, panel += COLUMNS)
        for (int v = 0; v < WIDE; v += 2) {
            U even, odd;
            decode(w, k, first + v * LANES, &even, &odd);
#ifdef BF16
            U below, none;
            decode(w, k + 1, first + v * LANES, &below, &none);
            odd = even >> 16 | (below & 0xffff0000u), even = (even & 0xffffu) | below << 16;
#endif
            *(U *)(panel + v * LANES) = even, *(U *)(panel + (v + 1) * LANES) = odd;
        }
}

/* Store `count` sums of a row, reordered from a panel's order */
INLINE void emit(const float *c, T *out, long count) {
    for (int v = 0; v < WIDE && count > 0; v += 2, count -= 2 * LANES, c += 2 * LANES, out += 2 * LANES) {
        const V even = *(const V *)c, odd = *(const V *)(c + LANES);
#ifdef BF16
        const U both = rounded(even) | rounded(odd) << 16;
#else
        float both[2 * LANES];
        for (int j = 0; j < LANES; j++) both[2 * j] = even[j], both[2 * j + 1] = odd[j];
#endif
        if (count >= 2 * LANES) memcpy(out, &both, sizeof both);
        else memcpy(out, &both, count * sizeof(T));
    }
}

static _Thread_local uint32_t *space; /* a panel and the sums of ROWS rows, reused by the next product */

/* out (n, rows) = x W^T + bias (null: none), or backward out (n, columns) = x W. Returns 1, with an incomplete result, if
   out of memory. Columns are a multiple of 2 LANES and of a block; sums run over an even number of bf16. */
int product(const struct weight *w, const T *x, const T *bias, T *out, long n, long backward) {
    const long inner = backward ? w->rows : w->columns, outer = backward ? w->columns : w->rows, stride = inner / PAIR;
    const long panels = (outer + COLUMNS - 1) / COLUMNS, threads = omp_get_max_threads();
    long parts = (n + ROWS - 1) / ROWS; /* of the rows; more if the threads' shares would differ */
    if (!n) return 0;
    while (parts * panels % threads && n > 96 * parts) parts++;
    const long most = ((n + parts - 1) / parts + HIGH - 1) / HIGH * HIGH;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        if (!space) space = aligned_alloc(64, (DEPTH + ROWS) * COLUMNS * sizeof(float));
        failed = !space;
#pragma omp for schedule(dynamic) collapse(2)
        for (long part = 0; part < parts; part++)
            for (long p = 0; p < panels; p++) {
                const long start = part * most, size = n - start < most ? n - start : most;
                float *c = (float *)(space + DEPTH * COLUMNS);
                if (!space) continue;
                for (long j = 0; bias && j < COLUMNS; j++) {
                    const long at = p * COLUMNS + j / (2 * LANES) * 2 * LANES + j % LANES * 2 + j / LANES % 2;
                    for (long r = 0; r < size; r++) c[r * COLUMNS + j] = at < outer ? get(bias[at]) : 0;
                }
                for (long k = 0; k < stride; k += DEPTH) {
                    const long lanes = stride - k < DEPTH ? stride - k : DEPTH;
                    (backward ? pack_backward : pack_forward)(w, p * COLUMNS, k * PAIR, (k + lanes) * PAIR, space);
                    multiply(size, COLUMNS, lanes, (const uint32_t *)x + start * stride + k, stride, 1, space, COLUMNS, c,
                             COLUMNS, bias || k > 0);
                }
                for (long r = 0; r < size; r++)
                    emit(c + r * COLUMNS, out + (start + r) * outer + p * COLUMNS, outer - p * COLUMNS);
            }
    }
    return failed;
}

/* y = x W^T for a few rows x (n, columns) fp32, from W (rows, columns) as stored: 4-bit codes or bf16.

   Each weight equals the one used in training to the last bit; sums are in fp32. */

#include "tiles.h"

#define TILE 4 /* rows of W and of x multiplied in registers */
#define TABLE (16 / LANES) /* vectors of the 16 values */

/* LANES bytes of codes -> values of their high halves and of their low halves */
INLINE void look_up(const uint8_t *codes, const V *table, V *high, V *low) {
#ifdef __AVX512F__
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    *high = (V)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)table[0]);
    *low = (V)_mm512_permutexvar_ps(both, (__m512)table[0]); /* it uses only the low 4 bits of an index */
#elif defined(__AVX2__)
    const __m256i low_half = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    const __m256i high_half = _mm256_srli_epi32(low_half, 4);
    const __m256 first = (__m256)table[0], second = (__m256)table[1]; /* the fourth bit selects the half */
#define CHOOSE(index)                                                                                       \
    (V) _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index),   \
                         _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))
    *high = CHOOSE(high_half), *low = CHOOSE(low_half);
#else
    const float *values = (const float *)table;
    for (int j = 0; j < LANES; j++) (*high)[j] = values[codes[j] >> 4], (*low)[j] = values[codes[j] & 15];
#endif
}

/* LANES bf16 numbers -> floats, whose high halves they are */
INLINE V widen(const uint16_t *x) {
#ifdef __AVX512F__
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#elif defined(__AVX2__)
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
#else
    U bits;
    for (int j = 0; j < LANES; j++) bits[j] = (uint32_t)x[j] << 16;
    return (V)bits;
#endif
}

INLINE float total(V v) {
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += v[j];
    return sum;
}

struct weight {
    const uint8_t *codes;   /* two per byte, the first in the high half */
    const float *table;     /* 16 */
    const uint8_t *scales8; /* double quantization: a scale is table8[scales8] absmax + offset; null: absmax */
    const float *table8, *absmax;
    float offset;
    int block, outer; /* log2 of weights per block, and of blocks per absmax */
    int bf16;         /* whether training rounds the weights to bf16 */
};

INLINE float scale(const struct weight *w, long block) {
    return w->scales8 ? w->table8[w->scales8[block]] * w->absmax[block >> w->outer] + w->offset : w->absmax[block];
}

/* The values of the 16 codes in a block */
INLINE void block_values(const struct weight *w, long block, V *values) {
    for (int i = 0; i < TABLE; i++) {
        values[i] = *(const V *)(w->table + i * LANES) * scale(w, block);
        const U bits = (U)values[i], nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000; /* ties to even */
        values[i] = (V)(w->bf16 ? nearest : bits);
    }
}

/* `height` rows of a 4-bit W from `row`, times `n` rows of x */
INLINE void tile4(const int height, const int n, const struct weight *w, const float *x, float *y, long row, long rows,
                  long columns) {
    V sum[TILE][TILE], values[TABLE], even, odd;
    memset(sum, 0, sizeof sum);
    for (long k = 0; k < columns; k += 64) /* the smallest block */
        for (int r = 0; r < height; r++) {
            const long first = (row + r) * columns + k;
            block_values(w, first >> w->block, values);
            for (int half = 0; half < 64; half += 32)
                for (int piece = 0; piece < 16; piece += LANES) {
                    look_up(w->codes + (first + half) / 2 + piece, values, &even, &odd);
                    for (int m = 0; m < n; m++) {
                        const float *xm = x + m * columns + k + half + piece;
                        sum[r][m] += even * *(const V *)xm;
                        sum[r][m] += odd * *(const V *)(xm + 16);
                    }
                }
        }
    for (int r = 0; r < height; r++)
        for (int m = 0; m < n; m++) y[m * rows + row + r] = total(sum[r][m]);
}

/* The same for a W in bf16 */
INLINE void tile16(const int height, const int n, const uint16_t *w, const float *x, float *y, long row, long rows,
                   long columns) {
    V sum[TILE][TILE];
    memset(sum, 0, sizeof sum);
    for (long k = 0; k < columns; k += LANES)
        for (int r = 0; r < height; r++) {
            const V values = widen(w + (row + r) * columns + k);
            for (int m = 0; m < n; m++) sum[r][m] += values * *(const V *)(x + m * columns + k);
        }
    for (int r = 0; r < height; r++)
        for (int m = 0; m < n; m++) y[m * rows + row + r] = total(sum[r][m]);
}

#define LINEAR(tile)                                                                                               \
    _Pragma("omp parallel for schedule(static)") for (long row = 0; row < rows; row += TILE) {                     \
        long m = 0;                                                                                                \
        if (row + TILE > rows)                                                                                     \
            for (long r = row; r < rows; r++)                                                                      \
                for (m = 0; m < n; m++) tile(1, 1, w, x + m * columns, y + m * rows, r, rows, columns);            \
        for (; m + TILE <= n; m += TILE) tile(TILE, TILE, w, x + m * columns, y + m * rows, row, rows, columns);   \
        for (; m + 2 <= n; m += 2) tile(TILE, 2, w, x + m * columns, y + m * rows, row, rows, columns);            \
        for (; m < n; m++) tile(TILE, 1, w, x + m * columns, y + m * rows, row, rows, columns);                    \
    }

/* In x the even columns of every 32 come before the odd ones, in the order in which the halves of the codes are read. */
void linear_4bit(const struct weight *w, const float *x, float *y, long n, long rows, long columns) { LINEAR(tile4) }
void linear_16bit(const uint16_t *w, const float *x, float *y, long n, long rows, long columns) { LINEAR(tile16) }

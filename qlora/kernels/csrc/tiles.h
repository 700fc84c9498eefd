/* Vectors, lanes and matrix products in registers, for fused.c, gemv.c and gemm.c.

   A lane is 32 bits along the summed dimension: two bf16 numbers if the processor multiplies such pairs (PAIR 2), else
   one float. Sums are in fp32. Vectors have the processor's width: for wider ones compilers generate code that is ten
   times slower. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef BF16
typedef uint16_t T; /* element type of the tensors */
static inline float get(T x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline T put(float f) { /* round to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return f == f ? rounded : 0x7fc0;
}
#else
typedef float T;
static inline float get(T x) { return x; }
static inline T put(float f) { return f; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define HIGH 6 /* rows per tile */
#ifdef __AVX512F__
#define LANES 16 /* per vector */
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define WIDE 4 /* vectors per tile row: HIGH x WIDE sums, WIDE vectors of B and one of A fill the registers */
#else
#define WIDE 2
#endif
typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(BF16) && defined(__AVX512BF16__)
#define PAIR 2
typedef T N; /* half a lane, or all of it */
INLINE V multiply_add(V sum, U a, U b) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE U rounded(V x) { return (U)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
#define PAIR 1
typedef float N;
INLINE V multiply_add(V sum, U a, U b) { return sum + (V)a * (V)b; }
#endif

/* `rows` x LANES `vectors` numbers of C = A B, or of C + A B; row r, lane i of A is at a[r a_row + i a_lane] */
INLINE void tile(const int rows, const int vectors, long lanes, const uint32_t *a, long a_row, long a_lane,
                 const uint32_t *b, long b_row, float *c, long c_row, int add) {
    V sum[HIGH][WIDE] = {0};
    const uint32_t *row[HIGH];
    for (int r = 0; r < rows; r++) row[r] = a + r * a_row;
    for (long i = 0, at = 0; i < lanes; i++, at += a_lane, b += b_row) {
        U bi[WIDE];
        for (int j = 0; j < vectors; j++) bi[j] = *(const U *)(b + LANES * j);
        for (int r = 0; r < rows; r++) {
            const U air = row[r][at] - (U){0};
            for (int j = 0; j < vectors; j++) sum[r][j] = multiply_add(sum[r][j], air, bi[j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) {
            V *to = (V *)(c + r * c_row + LANES * j);
            if (add) sum[r][j] += *to;
            *to = sum[r][j];
        }
}

/* C (m, n) = A (m, lanes) B (lanes, n), or C + A B; n is a multiple of LANES */
INLINE void multiply(long m, long n, long lanes, const uint32_t *a, long a_row, long a_lane, const uint32_t *b,
                     long b_row, float *c, long c_row, int add) {
    for (long j = 0; j < n;) {
        const int wide = n - j >= WIDE * LANES;
        for (long i = 0; i < m;) {
            const int high = m - i >= HIGH;
#define PRODUCT(rows, vectors) \
    tile(rows, vectors, lanes, a + i * a_row, a_row, a_lane, b + j, b_row, c + i * c_row + j, c_row, add)
            if (high && wide) PRODUCT(HIGH, WIDE);
            else if (high) PRODUCT(HIGH, 1);
            else if (wide) PRODUCT(1, WIDE);
            else PRODUCT(1, 1);
            i += high ? HIGH : 1;
        }
        j += wide ? WIDE * LANES : LANES;
    }
}

/* The elementwise work of a LLaMA block on a CPU, in one pass over memory where torch needs several.

   Compiled for bf16 (-DBF16) and for fp32 tensors; sums are in fp32, and each result is rounded once. kernels/fused.py
   compiles and calls it, and defines the same functions in plain torch, with formulas and shapes. Arrays are
   contiguous; rows are distributed over the threads. */

#include <math.h>
#include <stdlib.h>

#include "tiles.h"

#define ROWS _Pragma("omp parallel for schedule(static)") for (long i = 0; i < n; i++)
#define SIMD _Pragma("omp simd")
#define SUM(s) _Pragma(#s)

/* e^x to 2 ulp, inlined so that it vectorizes: 2^k times the series of e^r, |r| <= ln(2) / 2. */
static inline float exponential(float x) {
    float y = x > -87.0f ? x : -87.0f; /* also maps NaN */
    y = y < 88.0f ? y : 88.0f;
    float k = rintf(y * 1.44269504f), r = y - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    int32_t bits = ((int32_t)k + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x == x ? p * power : x;
}

/* sum = x + delta (delta may be null: then sum is not written); r = 1 / rms(sum); y = w * sum r */
void add_norm(const T *x, const T *delta, const T *w, float eps, T *sum, T *y, float *r, long n, long d) {
    ROWS {
        const T *xi = x + i * d, *di = delta ? delta + i * d : 0;
        T *si = delta ? sum + i * d : (T *)xi;
        if (di) SIMD for (long j = 0; j < d; j++) si[j] = put(get(xi[j]) + get(di[j]));
        float squares = 0;
        SUM(omp simd reduction(+ : squares)) for (long j = 0; j < d; j++) squares += get(si[j]) * get(si[j]);
        float ri = r[i] = 1 / sqrtf(squares / d + eps);
        SIMD for (long j = 0; j < d; j++) y[i * d + j] = put(get(w[j]) * get(put(get(si[j]) * ri)));
    }
}

/* dx = dsum + r (g - h mean(g h)), g = dy w, h = sum r; dsum may be null */
void norm_backward(const T *dy, const T *dsum, const T *sum, const T *w, const float *r, T *dx, long n, long d) {
    ROWS {
        const T *dyi = dy + i * d, *si = sum + i * d, *di = dsum ? dsum + i * d : 0;
        float dot = 0, ri = r[i];
        SUM(omp simd reduction(+ : dot)) for (long j = 0; j < d; j++) dot += get(dyi[j]) * get(w[j]) * get(si[j]);
        float mean = dot * ri * ri / d;
        if (di) SIMD for (long j = 0; j < d; j++)
            dx[i * d + j] = put(get(di[j]) + ri * (get(dyi[j]) * get(w[j]) - get(si[j]) * mean));
        else SIMD for (long j = 0; j < d; j++)
            dx[i * d + j] = put(ri * (get(dyi[j]) * get(w[j]) - get(si[j]) * mean));
    }
}

/* y = gate sigmoid(gate) up */
void swiglu(const T *gate, const T *up, T *y, long n, long d) {
    ROWS SIMD for (long j = i * d; j < i * d + d; j++) {
        float g = get(gate[j]);
        y[j] = put(g / (1 + exponential(-g)) * get(up[j]));
    }
}

/* dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, s = sigmoid(gate) */
void swiglu_backward(const T *dy, const T *gate, const T *up, T *dgate, T *dup, long n, long d) {
    ROWS SIMD for (long j = i * d; j < i * d + d; j++) {
        float g = get(gate[j]), s = 1 / (1 + exponential(-g)), dyj = get(dy[j]);
        dgate[j] = put(dyj * get(up[j]) * s * (1 + g * (1 - s)));
        dup[j] = put(dyj * g * s);
    }
}

/* ---- attention over packed sequences ---- */

#define QUERIES 48 /* queries per block of scores: even, and a multiple of a tile's rows */
static inline long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

/* An operand of a product, rounded once to the tensors' dtype */
#if PAIR == 2
static inline N number(float f) { return put(f); }
#else
static inline N number(float f) { return get(put(f)); }
#endif

/* Load rows x + i stride (n, d), rotated by the angles with these cosines and sines (null: not rotated) */
static void load(const T *x, long stride, const T *cosine, const T *sine, N *out, long n, long d) {
    const long half = d / 2;
    for (long i = 0; i < n; i++, x += stride, out += d) {
        if (!cosine) SIMD for (long j = 0; j < d; j++) out[j] = number(get(x[j]));
        else SIMD for (long j = 0; j < half; j++) {
            const float low = get(x[j]), high = get(x[j + half]);
            out[j] = number(low * get(cosine[i * d + j]) - high * get(sine[i * d + j]));
            out[j + half] = number(high * get(cosine[i * d + j + half]) + low * get(sine[i * d + j + half]));
        }
    }
}

/* The inverse of load, for gradients */
static void store(const float *x, const T *cosine, const T *sine, T *out, long stride, long n, long d) {
    const long half = d / 2;
    for (long i = 0; i < n; i++, x += d, out += stride) {
        if (!cosine) SIMD for (long j = 0; j < d; j++) out[j] = put(x[j]);
        else SIMD for (long j = 0; j < half; j++) {
            const float low = x[j], high = x[j + half];
            out[j] = put(low * get(cosine[i * d + j]) + high * get(sine[i * d + j + half]));
            out[j + half] = put(high * get(cosine[i * d + j + half]) - low * get(sine[i * d + j]));
        }
    }
}

/* Rows (n, d) -> lanes along d: (d / PAIR, row), zero from column n on */
static void transpose(const N *x, uint32_t *out, long n, long d, long row) {
    const uint32_t *lane = (const uint32_t *)x;
    const long lanes = d / PAIR;
    for (long j = 0; j < lanes; j++) {
        SIMD for (long i = 0; i < n; i++) out[j * row + i] = lane[i * lanes + j];
        memset(out + j * row + n, 0, (row - n) * sizeof *out);
    }
}

/* Rows (n, d) -> lanes along n, (lanes(n), d); rows of floats -> rows of lanes, and lanes along n. The last lane of an
   odd n is half empty. If a lane is one float, nothing is copied. */
static inline long lanes(long n) { return (n + PAIR - 1) / PAIR; }
#if PAIR == 2
static const uint32_t *interleave(const N *x, uint32_t *out, long n, long d) {
    for (long i = 0; i < n; i += 2, x += 2 * d) SIMD for (long j = 0; j < d; j++)
        out[i / 2 * d + j] = x[j] | (i + 1 < n ? (uint32_t)x[d + j] << 16 : 0);
    return out;
}
static const uint32_t *as_rows(const float *x, uint32_t *out, long n, long d) {
    for (long i = 0; i < n * d; i += LANES)
        _mm256_storeu_si256((__m256i *)(out + i / PAIR), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
    return out;
}
static const uint32_t *as_pairs(const float *x, uint32_t *out, long n, long d) {
    for (long i = 0; i < n; i += 2, x += 2 * d)
        for (long j = 0; j < d; j += LANES)
            *(U *)(out + i / 2 * d + j) = rounded(*(V *)(x + j)) | (i + 1 < n ? rounded(*(V *)(x + d + j)) << 16 : (U){0});
    return out;
}
#else
#define interleave(x, out, n, d) ((const uint32_t *)(x))
#define as_rows(x, out, n, d) ((const uint32_t *)(x))
#define as_pairs(x, out, n, d) ((const uint32_t *)(x))
#endif

/* Scores (n queries from `first`, columns from `begin`) -> probabilities; zero for keys that a query does not see */
static void softmax(float *p, float scale, long n, long first, long begin, long columns, long window) {
    for (long i = 0; i < n; i++, p += columns) {
        const long to = first + i + 1 - begin, from = first + i + 1 > window + begin ? to - window : 0;
        float top = -INFINITY, sum = 0;
        SUM(omp simd reduction(max : top)) for (long j = from; j < to; j++) top = p[j] > top ? p[j] : top;
        SUM(omp simd reduction(+ : sum)) for (long j = from; j < to; j++) sum += p[j] = exponential(scale * (p[j] - top));
        const float share = 1 / sum;
        SIMD for (long j = from; j < to; j++) p[j] *= share;
        memset(p, 0, from * sizeof(float));
        memset(p + to, 0, (columns - to) * sizeof(float));
    }
}

static long longest(const int32_t *bounds, long n) {
    long length = 0;
    for (long s = 0; s < n; s++) length = bounds[s + 1] - bounds[s] > length ? bounds[s + 1] - bounds[s] : length;
    return whole(length);
}

/* Runs over (sequence, key-value head) pairs. K, V, Q and dO are rows; the suffix T means lanes along d and columns, R
   lanes along the rows. A thread that cannot allocate K does nothing; the function then returns 1 and its result is
   incomplete. */
#define THREADS _Pragma("omp parallel reduction(| : failed)")
#define HEADS                                                                                                      \
    failed = !K;                                                                                                   \
    _Pragma("omp for schedule(dynamic)") for (long unit = 0; unit < n * kv_heads; unit++) if (K)
#define UNIT                                                                                                       \
    const long head = unit % kv_heads, start = bounds[unit / kv_heads], length = bounds[unit / kv_heads + 1] - start; \
    const long group = heads / kv_heads, row = whole(length), wide = heads * d, narrow = kv_heads * d;             \
    const T *c = cosine + start * d, *s = sine + start * d;                                                        \
    load(k + start * narrow + head * d, narrow, c, s, (N *)K, length, d);                                          \
    load(v + start * narrow + head * d, narrow, 0, 0, (N *)W, length, d);                                          \
    transpose((N *)K, KT, length, d, row);
#define BLOCKS                                                                                                     \
    for (long h = head * group; h < head * group + group; h++)                                                     \
        for (long first = 0; first < length; first += QUERIES)
#define BLOCK                                                                                                      \
    const long size = length - first < QUERIES ? length - first : QUERIES, at = (start + first) * wide + h * d;    \
    const long begin = first + 1 > window ? (first + 1 - window) / 16 * 16 : 0, columns = whole(first + size) - begin; \
    const long seen = first + size - begin;                                                                        \
    load(q + at, wide, c + first * d, s + first * d, (N *)Q, size, d);                                             \
    multiply(size, columns, d / PAIR, Q, d / PAIR, 1, KT + begin, row, P, columns, 0);                             \
    softmax(P, scale, size, first, begin, columns, window);

int attention(const T *q, const T *k, const T *v, const T *cosine, const T *sine, const int32_t *bounds, T *out,
              float scale, long n, long heads, long kv_heads, long d, long window) {
    const long most = longest(bounds, n);
    int failed = 0;
    THREADS {
        uint32_t *K = calloc(4 * most * d + QUERIES * (2 * d + 2 * most), sizeof *K), *W = K + most * d, *KT = W + most * d;
        uint32_t *VR = KT + most * d, *Q = VR + most * d, *R = Q + QUERIES * d;
        float *P = (float *)(R + QUERIES * most), *O = P + QUERIES * most;
        HEADS {
            UNIT
            const uint32_t *rows = interleave((N *)W, VR, length, d);
            BLOCKS {
                BLOCK
                multiply(size, d, lanes(seen), as_rows(P, R, size, columns), columns / PAIR, 1, rows + begin / PAIR * d, d, O,
                         d, 0);
                store(O, 0, 0, out + at, wide, size, d);
            }
        }
        free(K);
    }
    return failed;
}

int attention_backward(const T *q, const T *k, const T *v, const T *cosine, const T *sine, const int32_t *bounds,
                       const T *dout, T *dq, T *dk, T *dv, float scale, long n, long heads, long kv_heads, long d,
                       long window) {
    const long most = longest(bounds, n);
    int failed = 0;
    THREADS {
        uint32_t *K = calloc(7 * most * d + QUERIES * (4 * d + 3 * most), sizeof *K), *W = K + most * d, *KT = W + most * d;
        uint32_t *VT = KT + most * d, *KR = VT + most * d, *Q = KR + most * d, *DO = Q + QUERIES * d;
        uint32_t *R = DO + QUERIES * d, *DR = R + QUERIES * most;
        float *P = (float *)(DR + QUERIES * d), *DP = P + QUERIES * most, *DQ = DP + QUERIES * most;
        float *DK = DQ + QUERIES * d, *DV = DK + most * d;
        HEADS {
            UNIT transpose((N *)W, VT, length, d, row);
            const uint32_t *rows = interleave((N *)K, KR, length, d);
            memset(DK, 0, length * d * sizeof(float));
            memset(DV, 0, length * d * sizeof(float));
            BLOCKS {
                BLOCK
                load(dout + at, wide, 0, 0, (N *)DO, size, d);
                multiply(size, columns, d / PAIR, DO, d / PAIR, 1, VT + begin, row, DP, columns, 0);
                multiply(seen, d, lanes(size), as_pairs(P, R, size, columns), 1, columns, interleave((N *)DO, DR, size, d), d,
                         DV + begin * d, d, 1);
                for (long i = 0; i < size; i++) {
                    float dot = 0, *dp = DP + i * columns, *p = P + i * columns;
                    SUM(omp simd reduction(+ : dot)) for (long j = 0; j < columns; j++) dot += p[j] * dp[j];
                    SIMD for (long j = 0; j < columns; j++) dp[j] = scale * p[j] * (dp[j] - dot);
                }
                multiply(size, d, lanes(seen), as_rows(DP, R, size, columns), columns / PAIR, 1, rows + begin / PAIR * d, d, DQ,
                         d, 0);
                multiply(seen, d, lanes(size), as_pairs(DP, R, size, columns), 1, columns,
                         interleave((N *)Q, DR, size, d), d, DK + begin * d, d, 1);
                store(DQ, c + first * d, s + first * d, dq + at, wide, size, d);
            }
            store(DK, c, s, dk + start * narrow + head * d, narrow, length, d);
            store(DV, 0, 0, dv + start * narrow + head * d, narrow, length, d);
        }
        free(K);
    }
    return failed;
}

/* loss = log sum e^z - z[target]; the gradient softmax(z) - onehot(target) in place of z */
void cross_entropy(T *z, const int64_t *target, float *loss, long n, long v) {
    ROWS {
        T *zi = z + i * v;
        float top = -INFINITY, total = 0, wanted = get(zi[target[i]]);
        SUM(omp simd reduction(max : top)) for (long j = 0; j < v; j++) top = get(zi[j]) > top ? get(zi[j]) : top;
        SUM(omp simd reduction(+ : total)) for (long j = 0; j < v; j++) total += exponential(get(zi[j]) - top);
        float share = 1 / total;
        loss[i] = top + logf(total) - wanted;
        SIMD for (long j = 0; j < v; j++) zi[j] = put(exponential(get(zi[j]) - top) * share);
        zi[target[i]] = put(exponential(wanted - top) * share - 1);
    }
}

/* What the hand-written kernels share: the contract of apollo_fuse/runtime/kernel.h for rows of floats, and
 * sums and maxima over a row with four accumulators, so that a load is not kept waiting by an addition. */
#ifndef HANDWRITTEN_ROWS_H
#define HANDWRITTEN_ROWS_H

#include "kernel.h"
#include "vmath.h"

#include <stdio.h>

/* MAX(x, most) is one instruction. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define MAX(a, b) (vector) _mm512_max_ps((__m512)(a), (__m512)(b))
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define MAX(a, b) (vector) _mm256_max_ps((__m256)(a), (__m256)(b))
#elif defined(__SSE__)
#include <immintrin.h>
#define LANES 4
#define MAX(a, b) (vector) _mm_max_ps((__m128)(a), (__m128)(b))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define MAX(a, b) (vector) vmaxq_f32((float32x4_t)(a), (float32x4_t)(b))
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef vector unaligned __attribute__((aligned(4)));

#define STREAMED_BYTES (1 << 20) /* of a row and its result, from which they do not stay in a second level cache */
#define WORK 8                   /* cheap operations of an element, as kernel.h counts them */

AF_INLINE vector load(const float *x) { return *(const unaligned *)x; }
AF_INLINE vector splat(float x) { return x - (vector){0}; }

AF_INLINE float sum_of(vector v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

AF_INLINE float row_max(const float *x, int64_t n) {
  vector a = splat(-INFINITY), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    a = MAX(load(x + i), a);
    b = MAX(load(x + i + LANES), b);
    c = MAX(load(x + i + 2 * LANES), c);
    d = MAX(load(x + i + 3 * LANES), d);
  }
  a = MAX(MAX(a, b), MAX(c, d));
  float most = -INFINITY;
  for (int l = 0; l < LANES; l++) most = most > a[l] ? most : a[l];
  for (; i < n; i++) most = most > x[i] ? most : x[i];
  return most;
}

AF_INLINE float row_sum(const float *x, int64_t n) {
  vector a = {0}, b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    a += load(x + i);
    b += load(x + i + LANES);
    c += load(x + i + 2 * LANES);
    d += load(x + i + 3 * LANES);
  }
  float s = sum_of((a + b) + (c + d));
  for (; i < n; i++) s += x[i];
  return s;
}

/* The sum of the squared distances from `centre`. */
AF_INLINE float row_squares(const float *x, int64_t n, float centre) {
  const vector m = splat(centre);
  vector a = {0}, b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    const vector p = load(x + i) - m, q = load(x + i + LANES) - m;
    const vector r = load(x + i + 2 * LANES) - m, s = load(x + i + 3 * LANES) - m;
    a += p * p;
    b += q * q;
    c += r * r;
    d += s * s;
  }
  float total = sum_of((a + b) + (c + d));
  for (; i < n; i++) total += (x[i] - centre) * (x[i] - centre);
  return total;
}

/* n[0] rows of n[1] elements; the parameters, if any, hold n[1] elements each. */
__attribute__((unused)) static int64_t rows_grid(const int64_t *n) { return n[0]; }
__attribute__((unused)) static int64_t rows_work(const int64_t *n) { return 1 + WORK * n[1]; }
static int64_t no_scratch(const int64_t *n) { return (void)n, 0; }

__attribute__((unused)) static int bind_rows(const int64_t *const *shapes, void *const *buffers, int64_t *n,
                                             char *message, size_t size) {
  (void)buffers, (void)message, (void)size;
  n[0] = shapes[0][0];
  n[1] = shapes[0][1];
  return 0;
}

__attribute__((unused)) static void rows_shape(const int64_t *n, int64_t *const *shapes) {
  shapes[0][0] = n[0];
  shapes[0][1] = n[1];
}

static int no_indices(void *const *buffers, const int64_t *n, char *message, size_t size) {
  return (void)buffers, (void)n, (void)message, (void)size, 0;
}
static void no_temporaries(const int64_t *n, int64_t *bytes) { (void)n, (void)bytes; }

static const int32_t floats[] = {1, 1, 1, 1};

#endif

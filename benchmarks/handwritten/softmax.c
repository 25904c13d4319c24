/* Softmax over the rows of [rows, columns]. */
#include "rows.h"

static void run(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {
  const int64_t columns = n[1];
  (void)scratch;
  for (int64_t row = begin; row < end; row++) {
    const float *restrict x = (const float *)buffers[0] + row * columns;
    float *restrict y = (float *)buffers[1] + row * columns;
    const float most = row_max(x, columns);
    float total = 0;
    if (8 * columns > STREAMED_BYTES) { /* another exponential is cheaper than the memory */
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < columns; i++) total += af_expf(x[i] - most);
      const float inverse = 1 / total;
#pragma omp simd
      for (int64_t i = 0; i < columns; i++) y[i] = af_expf(x[i] - most) * inverse;
      continue;
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < columns; i++) {
      y[i] = af_expf(x[i] - most);
      total += y[i];
    }
    const float inverse = 1 / total;
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) y[i] *= inverse;
  }
}

static const af_kernel kernel = {rows_grid, rows_work, no_scratch, run};
static const af_kernel *const kernels[] = {&kernel};
static const int32_t ranks[] = {2};
const af_op AF_OP(handwritten_softmax) = {
    "handwritten_softmax", 1, 1, 0, 2, 1, floats, floats, ranks, ranks, bind_rows, no_indices, rows_shape, no_temporaries, kernels,
};

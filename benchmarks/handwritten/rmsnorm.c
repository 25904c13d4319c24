/* RMS normalisation over the rows of [rows, columns], with a scale. */
#include "rows.h"

static void run(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {
  const int64_t columns = n[1];
  const float *restrict scale = buffers[1];
  (void)scratch;
  for (int64_t row = begin; row < end; row++) {
    const float *restrict x = (const float *)buffers[0] + row * columns;
    float *restrict y = (float *)buffers[2] + row * columns;
    const float inverse = 1 / sqrtf(row_squares(x, columns, 0) / (float)columns + 1e-5f);
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) y[i] = x[i] * inverse * scale[i];
  }
}

static const af_kernel kernel = {rows_grid, rows_work, no_scratch, run};
static const af_kernel *const kernels[] = {&kernel};
static const int32_t ranks[] = {2, 1};
const af_op AF_OP(handwritten_rmsnorm) = {
    "handwritten_rmsnorm", 2, 1, 0, 2, 1, floats, floats, ranks, ranks, bind_rows, no_indices, rows_shape, no_temporaries, kernels,
};

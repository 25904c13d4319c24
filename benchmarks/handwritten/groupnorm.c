/* Group normalisation of [batch, channels, height, width], with a scale and a bias a channel.
 *
 * The last input holds one number a group, and is there for its length alone. */
#include "rows.h"

enum { BATCH, CHANNELS, HEIGHT, WIDTH, GROUPS };

static int64_t grid(const int64_t *n) { return n[BATCH] * n[GROUPS]; }
static int64_t group_size(const int64_t *n) { return n[CHANNELS] / n[GROUPS] * n[HEIGHT] * n[WIDTH]; }
static int64_t work(const int64_t *n) { return WORK * group_size(n); }

static void run(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {
  const int64_t size = group_size(n), channels = n[CHANNELS] / n[GROUPS], plane = n[HEIGHT] * n[WIDTH];
  (void)scratch;
  for (int64_t group = begin; group < end; group++) {
    const float *restrict x = (const float *)buffers[0] + group * size;
    const float *scale = (const float *)buffers[1] + group % n[GROUPS] * channels;
    const float *bias = (const float *)buffers[2] + group % n[GROUPS] * channels;
    float *restrict y = (float *)buffers[4] + group * size;
    const float mean = row_sum(x, size) / (float)size;
    const float inverse = 1 / sqrtf(row_squares(x, size, mean) / (float)size + 1e-5f);
    for (int64_t channel = 0; channel < channels; channel++) {
      const float factor = inverse * scale[channel], offset = bias[channel] - mean * factor;
#pragma omp simd
      for (int64_t i = channel * plane; i < (channel + 1) * plane; i++) y[i] = AF_FMAF(x[i], factor, offset);
    }
  }
}

static int bind(const int64_t *const *shapes, void *const *buffers, int64_t *n, char *message, size_t size) {
  (void)buffers, (void)message, (void)size;
  for (int axis = 0; axis < 4; axis++) n[axis] = shapes[0][axis];
  n[GROUPS] = shapes[3][0];
  return 0;
}

static void shape(const int64_t *n, int64_t *const *shapes) {
  for (int axis = 0; axis < 4; axis++) shapes[0][axis] = n[axis];
}

static const af_kernel kernel = {grid, work, no_scratch, run};
static const af_kernel *const kernels[] = {&kernel};
static const int32_t ranks[] = {4, 3, 3, 1};
const af_op AF_OP(handwritten_groupnorm) = {
    "handwritten_groupnorm", 4, 1, 0, 5, 1, floats, floats, ranks, ranks, bind, no_indices, shape, no_temporaries, kernels,
};

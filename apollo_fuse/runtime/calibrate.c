/* Times the kernels that apollo_fuse/calibration.py makes: runs of the items [0, items), again and again. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */

#include "kernel.h"

#include <time.h>

extern const af_op AF_OP(calibration);

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Seconds of one run, the least of `readings`, each over `runs` runs in a row. */
__attribute__((visibility("default"))) double af_calibrate(int32_t kernel, void *const *buffers, const int64_t *n,
                                                           int64_t begin, int64_t end, int32_t runs,
                                                           int32_t readings) {
  const af_kernel *timed = AF_OP(calibration).kernels[kernel];
  double least = 1e9;
  for (int32_t reading = 0; reading < readings; reading++) {
    const double start = now();
    for (int32_t run = 0; run < runs; run++) timed->run(buffers, n, NULL, begin, end);
    const double seconds = (now() - start) / runs;
    if (seconds < least) least = seconds;
  }
  return least;
}

/* What the two halves of the plugin share: an af_node (kernel.h) as onnxruntime knows it.
 *
 * plugin.c registers such ops and gives their outputs shapes while a model is loaded; compute.c runs them.
 * AF_GPU, given to the compiler, is for libraries that hold kernels for GPUs: there, gpu.c runs some of them. */
#ifndef APOLLO_FUSE_OP_H
#define APOLLO_FUSE_OP_H

#include "kernel.h"
#include "ort_api.h"

#include <stdbool.h>

typedef struct registration registration;

typedef struct tensor_kind {
  int32_t type, rank; /* an ONNXTensorElementDataType, and the number of dimensions */
} tensor_kind;

typedef struct custom_op {
  OrtCustomOp base; /* first, so that a pointer to it is a pointer to the custom_op */
  const af_node *node;
  const registration *owner;
  const tensor_kind *inputs, *outputs;
  /* Of all ops of the node together: */
  int32_t output_count, buffer_count, symbol_count, kernel_count;
  int32_t stage_count; /* most kernels of one op */
  int32_t input_dimensions, output_dimensions;
#ifdef AF_GPU
  const struct af_gpu_node *gpu; /* of an op for GPUs, with its provider and that one's driver */
  const struct driver *driver;
  const char *provider;
#endif
} custom_op;

/* What one copy of onnxruntime was given; it lives until the library is unloaded, since sessions
 * refer to it.  A process may hold several copies of onnxruntime, hence the list. */
struct registration {
  registration *next;
  const OrtApi *api;
  bool has_references; /* whether the api has the entries of ORT_API_VERSION_OF_REFERENCES */
  OrtCustomOpDomain *domain;
  OrtMemoryInfo *cpu;
  tensor_kind *kinds; /* those of all ops, one array after the other */
  custom_op ops[];
};

/* An af_op of the node in one call. */
typedef struct part {
  const af_op *op;
  void **buffers;
  int64_t *n;
} part;

#define ALIGNMENT 64 /* of memory that the plugin places */

static inline size_t aligned(int64_t bytes) {
  return ((size_t)bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
}

#define RETURN_IF_FAILED(call)    \
  do {                            \
    OrtStatus *failure_ = (call); \
    if (failure_) return failure_; \
  } while (0)

__attribute__((format(printf, 3, 4))) OrtStatus *failure(const OrtApi *api, OrtErrorCode code,
                                                         const char *format, ...);

/* Compares an input with what the op expects. */
OrtStatus *check_kind(const custom_op *self, int32_t index, ONNXTensorElementDataType type, size_t rank);

/* Compares an input with what the op expects, and reads its shape. */
OrtStatus *read_shape(const custom_op *self, int32_t index, const OrtTensorTypeAndShapeInfo *info,
                      int64_t *shape);

/* Runs the op: onnxruntime's KernelComputeV2. */
OrtStatus *compute(void *kernel, OrtKernelContext *context);

#endif

/* The contract between generated kernels and the plugin: one af_op for each custom op.
 *
 * A library made for a model holds one table of af_op, written by apollo_fuse/codegen/link.py, and
 * plugin.c, which registers each entry with onnxruntime and runs it.  Generated code never calls
 * onnxruntime, and plugin.c knows nothing about what a kernel computes. */
#ifndef APOLLO_FUSE_KERNEL_H
#define APOLLO_FUSE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* One loop nest over a parallel grid.  `buffers` holds the op's inputs, then its outputs, then its
 * temporaries; `n` holds the values of the op's symbolic extents. */
typedef struct af_kernel {
  /* Number of independent work items. 0 means that there is nothing to do. */
  int64_t (*grid)(const int64_t *n);
  /* Least number of consecutive items worth giving to a thread, >= 1. */
  int64_t (*grain)(const int64_t *n);
  /* Bytes of scratch that one call of `run` needs; 0 for none.  Aligned to 64 bytes by the plugin. */
  int64_t (*scratch)(const int64_t *n);
  /* Computes the items [begin, end).  Calls on disjoint ranges may run at once. */
  void (*run)(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end);
} af_kernel;

typedef struct af_op {
  const char *name; /* op type in the domain apollo_fuse */
  int32_t input_count, output_count, temporary_count, symbol_count, kernel_count;
  const int32_t *input_types;  /* ONNXTensorElementDataType */
  const int32_t *output_types;
  const int32_t *input_ranks;
  const int32_t *output_ranks;
  /* Computes n from the input shapes and checks every other extent.  0 when they fit; otherwise
   * writes a sentence to message and returns 1.  Ranks were checked before. */
  int (*bind)(const int64_t *const *shapes, int64_t *n, char *message, size_t message_size);
  /* Looks through the index tensors, once extents are bound and before anything runs.  0 when each index lies
   * within its axis; otherwise writes a sentence to message and returns 1. */
  int (*check)(void *const *buffers, const int64_t *n, char *message, size_t message_size);
  /* Writes the output shapes. */
  void (*output_shapes)(const int64_t *n, int64_t *const *shapes);
  /* Writes the size in bytes of each temporary. */
  void (*temporary_bytes)(const int64_t *n, int64_t *bytes);
  const af_kernel *const *kernels; /* run one after the other */
} af_op;

/* The table of the library, ended by NULL. */
extern const af_op *const af_ops[];
/* x86-64 microarchitecture level the kernels were compiled for (1 to 4); 0 where it does not apply. */
extern const int32_t af_x86_level;

#endif

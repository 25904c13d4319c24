/* The contract between generated kernels and the plugin: one af_op for each kernel group, and one af_node for
 * each custom op, which runs one af_op or several side by side.
 *
 * A library made for a model holds af_ops, written by apollo_fuse/codegen/c.py, tables of af_nodes, written by
 * apollo_fuse/codegen/table.py, and the plugin (plugin.c, compute.c), which registers each entry of one table
 * with onnxruntime and runs it.  Generated code never calls onnxruntime, and the plugin knows nothing about
 * what a kernel computes. */
#ifndef APOLLO_FUSE_KERNEL_H
#define APOLLO_FUSE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* One loop nest over a parallel grid.  `buffers` holds the op's inputs, then its outputs, then its
 * temporaries; `n` holds the values of the op's symbolic extents. */
typedef struct af_kernel {
  /* Number of independent work items. 0 means that there is nothing to do. */
  int64_t (*grid)(const int64_t *n);
  /* Cheap operations of one item, about: what work is parted among threads by.  At least 1. */
  int64_t (*work)(const int64_t *n);
  /* Bytes of scratch that one call of `run` needs; 0 for none.  Aligned to 64 bytes by the plugin. */
  int64_t (*scratch)(const int64_t *n);
  /* Computes the items [begin, end).  Calls on disjoint ranges may run at once. */
  void (*run)(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end);
} af_kernel;

typedef struct af_op {
  const char *name;
  int32_t input_count, output_count, temporary_count, symbol_count, kernel_count;
  const int32_t *input_types;  /* ONNXTensorElementDataType */
  const int32_t *output_types;
  const int32_t *input_ranks;
  const int32_t *output_ranks;
  /* Computes n from the input shapes, and from the inputs that hold extents, and checks every other
   * extent.  0 when they fit; otherwise writes a sentence to message and returns 1.  Ranks were checked
   * before.  `buffers` is NULL while a model is loaded. */
  int (*bind)(const int64_t *const *shapes, void *const *buffers, int64_t *n, char *message, size_t message_size);
  /* Looks through the index tensors, once extents are bound and before anything runs.  0 when each index lies
   * within its axis; otherwise writes a sentence to message and returns 1. */
  int (*check)(void *const *buffers, const int64_t *n, char *message, size_t message_size);
  /* Writes the output shapes. */
  void (*output_shapes)(const int64_t *n, int64_t *const *shapes);
  /* Writes the size in bytes of each temporary. */
  void (*temporary_bytes)(const int64_t *n, int64_t *bytes);
  const af_kernel *const *kernels; /* run one after the other */
} af_op;

/* A library may hold its kernels several times, each compiled for another level, and an op's symbol then
 * says for which.  AF_LEVEL, given to the compiler, is the x86-64 psABI's level (1 to 4), and 0 on other
 * architectures. */
#define AF_OP(name) AF_OP_OF_LEVEL(name, AF_LEVEL)
#define AF_OP_OF_LEVEL(name, level) AF_OP_NAMED(name, level)
#define AF_OP_NAMED(name, level) name##_v##level

/* Floats in a vector of the level. */
#define AF_FLOATS (AF_LEVEL == 4 ? 16 : AF_LEVEL == 3 ? 8 : 4)

/* How many work items go through a phase of a kernel together, so that they fill so many vectors: from 1 to
 * `most`.  `turns` is what loops take for one of them. */
static inline int64_t af_items_together(int64_t turns, int64_t vectors, int64_t most) {
  const int64_t fit = turns < 1 ? most : vectors * AF_FLOATS / turns;
  return fit < 1 ? 1 : fit < most ? fit : most;
}

/* A custom op: ops that do not need each other, whose kernels share their launches (parallelism stitching), or
 * one alone.  Its outputs are those of the ops one after the other; inputs may serve several. */
typedef struct af_node {
  const char *name; /* op type in the domain apollo_fuse */
  int32_t input_count, op_count;
  const af_op *const *ops;
  const int32_t *inputs; /* of each op one after the other: the places of its inputs among the node's */
} af_node;

typedef struct af_table {
  int32_t level;               /* the level that its kernels were compiled for */
  const af_node *const *nodes; /* ended by NULL */
} af_table;

/* The tables of the library, the highest level first, ended by one without nodes. */
extern const af_table af_tables[];

#endif

/* The contract between kernels compiled for GPUs and the plugin: what the library holds beside its af_nodes.
 *
 * A library made for GPUs holds an af_gpu_op for each af_op that has a form there, and one table, written by
 * apollo_fuse/codegen/launches.py; launches.c launches them.  Extents are bound, and outputs and temporaries
 * sized, by the af_op. */
#ifndef APOLLO_FUSE_LAUNCH_H
#define APOLLO_FUSE_LAUNCH_H

#include "kernel.h"

#include <stdbool.h>

/* Code for NVIDIA's GPUs, text that newer drivers compile for newer ones, and code for AMD's. */
enum { AF_CUBIN, AF_PTX, AF_HSACO };

/* A kernel as a module for one architecture: of CUDA a compute capability, 10 times the major number and the
 * minor; of HIP the digits behind gfx, which are hexadecimal. */
typedef struct af_binary {
  int32_t form, architecture;
  int32_t threads, shared_bytes; /* of a block */
  const void *image;             /* NULL ends a list */
} af_binary;

/* How a kernel is started.  Its arguments are the addresses of `tensors`, then of `scratch_count` pieces of memory
 * that have room for each program, then `extents` as 64-bit integers, and two pointers that Triton adds for itself
 * and that no kernel of ours reads. */
typedef struct af_launch {
  const char *name; /* of the function in each module */
  int32_t rows;     /* work items that a program computes, the last one maybe fewer */
  int32_t tensor_count, scratch_count, extent_count;
  const int32_t *tensors; /* their places among the buffers of the af_op */
  const int32_t *extents; /* their places in n */
  int64_t (*items)(const int64_t *n); /* all of them; 0 where there is nothing to do */
  /* Writes the bytes of each piece of scratch that one program needs. */
  void (*scratch_bytes)(const int64_t *n, int64_t *bytes);
  const af_binary *const *binaries; /* for each variant of the op a list; what fits better comes first */
} af_launch;

typedef struct af_gpu_op {
  const af_launch *launches; /* the kernels of the af_op, in the same order */
  /* 0 where each axis that an index tensor points into has elements; otherwise writes a sentence to message and
   * returns 1.  What the tensors hold is on the device: kernels take an index outside of its axis to the nearest
   * element. */
  int (*check)(const int64_t *n, char *message, size_t message_size);
  /* The extents n of each variant, one after the other: what its binaries are best for.  0 for one not known. */
  int32_t variant_count;
  const int64_t *variants;
} af_gpu_op;

/* Kernels that are one launch.
 *
 * Where there are several, they are the members of a function called `stitch`, whose arguments are the address of
 * a table and their number.  The table holds numbers of 64 bits: the first program of each member, then for each
 * where its arguments lie behind all of these, its kind in the upper half, then the arguments that each has alone. */
typedef struct af_run {
  int32_t count;
  const int32_t *members;    /* places of their ops among the node's; one may have several here */
  const int32_t *kernels;    /* their places among those of the op */
  const int32_t *kinds;      /* for each member which kernel of the function it takes; they do not fall */
  const af_binary *stitched; /* NULL where there is one member, which is launched alone */
} af_run;

/* The kernel `write` puts its other arguments, AF_WRITTEN values of 64 bits, where its first one points. */
#define AF_WRITTEN 480
extern const af_binary *const af_writer; /* empty where all kernels are launched alone */

/* What belongs to the af_node at the same place of every af_table. */
typedef struct af_gpu_node {
  const af_gpu_op *const *ops; /* those of the node's ops; NULL where the node has no form on GPUs */
  const uint8_t *on_host;      /* for each input of the node whether extents are read from its elements */
  int32_t run_count;
  const af_run *runs; /* one after the other */
} af_gpu_node;

extern const af_gpu_node af_gpu_nodes[];

#endif

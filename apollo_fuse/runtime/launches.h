/* What gpu.c asks of launches.c in one call of a node: how much memory its launches take, and then those. */
#ifndef APOLLO_FUSE_LAUNCHES_H
#define APOLLO_FUSE_LAUNCHES_H

#include "modules.h"

/* Launches follow each other on a stream, so that they share scratch. */
typedef struct call {
  const custom_op *op;
  const part *parts;
  const loaded_kernel *writer;   /* of tables; NULL where each kernel is launched alone */
  loaded_kernel *const *kernels; /* of each run for each variant, or one where its launch is shared */
  int32_t variant_count;         /* places of each run among these */
  char *scratch;
  char *table; /* of members, where the next values go or the next launch finds its own */
  void *stream;
} call;

/* The bytes of scratch of the greediest launch, and the bytes of all tables. */
void count_memory(const custom_op *, const part *parts, size_t *scratch, size_t *table);

/* Writes the tables, and launches all kernels; temporaries, scratch and tables have their places. */
OrtStatus *write_and_launch(call *);

#endif

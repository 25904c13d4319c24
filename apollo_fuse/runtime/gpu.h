/* Custom ops for onnxruntime's providers of GPUs: what gpu.c adds to a library that holds kernels for those. */
#ifndef APOLLO_FUSE_GPU_H
#define APOLLO_FUSE_GPU_H

#include "driver.h"
#include "op.h"

/* Whether some device of the driver fits what each kernel of the node was compiled for. */
bool runs_on_gpu(const af_node *, const af_gpu_node *, const driver *);

/* Makes a custom op, a copy of the node's op for the CPU, one for a provider whose devices are the driver's. */
void move_to_gpu(custom_op *, const af_gpu_node *, const driver *, const char *provider);

#endif

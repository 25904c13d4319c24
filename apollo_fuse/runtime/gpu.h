/* Custom ops for onnxruntime's CUDA provider: what gpu.c adds to a library that holds kernels for GPUs. */
#ifndef APOLLO_FUSE_GPU_H
#define APOLLO_FUSE_GPU_H

#include "launch.h"
#include "op.h"

/* Starts the driver, before anything else here is called, and by one thread at a time; gives whether there is one. */
bool start_gpus(void);

/* Whether some device of this machine fits what each kernel of the node was compiled for. */
bool runs_on_gpu(const af_node *, const af_gpu_node *);

/* Makes a custom op, a copy of the node's op for the CPU, one for the CUDA provider. */
void move_to_gpu(custom_op *, const af_gpu_node *);

#endif

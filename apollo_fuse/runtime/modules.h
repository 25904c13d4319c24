/* The library's kernels on the devices of this process: loaded once for all sessions. */
#ifndef APOLLO_FUSE_MODULES_H
#define APOLLO_FUSE_MODULES_H

#include "driver.h"
#include "op.h"

typedef struct loaded_kernel loaded_kernel;

/* The code of a loaded kernel, for launches. */
const device_code *code_of(const loaded_kernel *);

/* The binary that devices of the architecture run best; NULL where there is none. */
const af_binary *fitting_binary(const driver *, const af_binary *binaries, int32_t architecture);

/* The kernel on the device of the op's driver, loaded by whoever needs it first, for `let_go` to give back. */
OrtStatus *acquire(const custom_op *, const char *name, const af_binary *binaries, int device,
                   loaded_kernel **out);
void let_go(const custom_op *, loaded_kernel *);

/* What onnxruntime is told where the op's driver refuses. */
OrtStatus *refused(const custom_op *, refusal);

#endif

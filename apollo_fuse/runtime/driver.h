/* The slice of NVIDIA's driver API that kernels are launched through, declared by hand and loaded at run time.
 *
 * Names and signatures are those of cuda.h without the prefix; where it maps a name to a newer symbol, that one is
 * meant.  A device is its ordinal. */
#ifndef APOLLO_FUSE_DRIVER_H
#define APOLLO_FUSE_DRIVER_H

#include <stdint.h>

typedef int CUresult, CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

enum {
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

typedef struct driver {
  CUresult (*Init)(unsigned flags);
  CUresult (*GetErrorName)(CUresult, const char **);
  CUresult (*DeviceGetCount)(int *);
  CUresult (*DeviceGetAttribute)(int *value, int attribute, CUdevice);
  CUresult (*DevicePrimaryCtxRetain)(CUcontext *, CUdevice);
  CUresult (*DevicePrimaryCtxRelease)(CUdevice);
  CUresult (*CtxPushCurrent)(CUcontext);
  CUresult (*CtxPopCurrent)(CUcontext *);
  CUresult (*ModuleLoadData)(CUmodule *, const void *image);
  CUresult (*ModuleUnload)(CUmodule);
  CUresult (*ModuleGetFunction)(CUfunction *, CUmodule, const char *name);
  CUresult (*FuncSetAttribute)(CUfunction, int attribute, int value);
  CUresult (*LaunchKernel)(CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream, void **arguments,
                           void **extra);
} driver;

/* The driver; NULL where there is none or it does not start.  Called by one thread at a time. */
const driver *start_driver(void);

/* The name of an error of the driver. */
const char *error_name(const driver *, CUresult);

/* The device's compute capability, 10 times the major number and the minor; 0 where the driver does not say. */
int32_t capability_of(const driver *, CUdevice);

#endif

/* The drivers of GPUs, NVIDIA's and AMD's: the few entries that are used, declared by hand and loaded at run time.
 *
 * HIP has CUDA's functions for modules and launches under names of its own.  Apart are how a device is made
 * current, by its primary context or by its number, and how an architecture is called.  A device is its ordinal,
 * and a result of 0 is success. */
#ifndef APOLLO_FUSE_DRIVER_H
#define APOLLO_FUSE_DRIVER_H

#include "launch.h"

/* The name here, arguments, and the functions of CUDA and of HIP; where a header maps a name to a newer symbol,
 * that one is meant. */
#define DRIVER_ENTRIES(ENTRY)                                                                                   \
  ENTRY(Init, (unsigned flags), "cuInit", "hipInit")                                                            \
  ENTRY(GetErrorName, (int result, const char **name), "cuGetErrorName", "hipDrvGetErrorName")                  \
  ENTRY(GetDeviceCount, (int *), "cuDeviceGetCount", "hipGetDeviceCount")                                       \
  ENTRY(ModuleLoadData, (void **module, const void *image), "cuModuleLoadData", "hipModuleLoadData")            \
  ENTRY(ModuleUnload, (void *module), "cuModuleUnload", "hipModuleUnload")                                      \
  ENTRY(ModuleGetFunction, (void **function, void *module, const char *name), "cuModuleGetFunction",            \
        "hipModuleGetFunction")                                                                                 \
  ENTRY(LaunchKernel,                                                                                           \
        (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
         unsigned block_z, unsigned shared_bytes, void *stream, void **arguments, void **extra),                \
        "cuLaunchKernel", "hipModuleLaunchKernel")                                                              \
  ENTRY(GetAttribute, (int *value, int attribute, int device), "cuDeviceGetAttribute", NULL)                    \
  ENTRY(RetainContext, (void **context, int device), "cuDevicePrimaryCtxRetain", NULL)                          \
  ENTRY(ReleaseContext, (int device), "cuDevicePrimaryCtxRelease_v2", NULL)                                     \
  ENTRY(PushContext, (void *context), "cuCtxPushCurrent_v2", NULL)                                              \
  ENTRY(PopContext, (void **context), "cuCtxPopCurrent_v2", NULL)                                               \
  ENTRY(SetFunctionAttribute, (void *function, int attribute, int value), "cuFuncSetAttribute", NULL)           \
  ENTRY(GetDevice, (int *device), NULL, "hipGetDevice")                                                         \
  ENTRY(SetDevice, (int device), NULL, "hipSetDevice")                                                          \
  ENTRY(GetProperties, (void *properties, int device), NULL, "hipGetDevicePropertiesR0600")

typedef enum { CUDA, HIP, PLATFORMS } platform;

typedef struct driver {
  platform platform;
#define ENTRY(name, arguments, of_cuda, of_hip) int(*name) arguments;
  DRIVER_ENTRIES(ENTRY)
#undef ENTRY
} driver;

/* What a function of the driver ended with; the function is NULL where all went well. */
typedef struct refusal {
  const char *function;
  int result;
} refusal;

/* A kernel on a device. */
typedef struct device_code {
  int device;
  void *context; /* of CUDA: the primary one, which is onnxruntime's too */
  void *module, *function;
  int32_t threads, shared_bytes; /* of a block */
} device_code;

/* The driver; NULL where there is none or it does not start.  Called by one thread at a time. */
const driver *start_driver(platform);

/* The name of an error of the driver. */
const char *error_name(const driver *, int result);

/* The device's architecture as an af_binary has it; 0 where the driver does not say. */
int32_t architecture_of(const driver *, int device);

/* Writes what such an architecture is called. */
void name_architecture(const driver *, int32_t architecture, char *text, size_t size);

/* Whether the driver takes the binary, and devices of the architecture run it. */
bool runs(const driver *, const af_binary *, int32_t architecture);

/* Loads a kernel, whichever device is current.  `out` goes to `unload_code` whether or not that ends well. */
refusal load_code(const driver *, int device, const af_binary *, const char *name, device_code *out);
void unload_code(const driver *, device_code *);

/* Starts so many programs of a kernel. */
refusal launch_code(const driver *, const device_code *, unsigned programs, void *stream, void **arguments);

#endif

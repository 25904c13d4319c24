/* Stands in for NVIDIA's driver, libcuda.so.1, or where HIP is defined for AMD's, libamdhip64.so.6: keeps books on
 * devices, contexts and modules, and hands each launch to the test, which may run it. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HIP
#define FUNCTION(of_cuda, of_hip) of_hip
#define ERROR(of_cuda, of_hip) "hipError" #of_hip
#else
#define FUNCTION(of_cuda, of_hip) of_cuda
#define ERROR(of_cuda, of_hip) "CUDA_ERROR_" #of_cuda
#endif

#define DEVICES 4
#define DEPTH 8
#define RECORDED 1000 /* launches of a graph, at most */

enum { INVALID_VALUE = 1, OUT_OF_MEMORY, NO_DEVICE = 100, INVALID_DEVICE, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };

typedef struct context { int device, retained; } context;
typedef struct module { context *owner; const void *image; } module;
typedef struct function { module *module; int shared_allowed; char name[128]; } function;

typedef struct launched {
  const void *image;
  const char *name;
  unsigned grid[3], block[3], shared_bytes;
  int device;
  void **arguments;
} launched;

/* What the test sets. */
int architectures[DEVICES], device_count;
const char *failing; /* a function that fails with `failure` */
int failure;
int (*on_launch)(const launched *);
/* What the test reads. */
int starts, loads, unloads, retained, released, launches, allocated, freed;
/* A stream of each device, as onnxruntime would have made it. */
context contexts[DEVICES];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define FAIL_IF_TOLD() \
  if (failing && !strcmp(failing, __func__)) return failure

static void count(int *what) {
  pthread_mutex_lock(&lock);
  ++*what;
  pthread_mutex_unlock(&lock);
}

int FUNCTION(cuInit, hipInit)(unsigned flags) {
  FAIL_IF_TOLD();
  count(&starts);
  return flags ? INVALID_VALUE : device_count ? 0 : NO_DEVICE;
}

int FUNCTION(cuGetErrorName, hipDrvGetErrorName)(int error, const char **name) {
  static const struct { int error; const char *name; } names[] = {
      {1, ERROR(INVALID_VALUE, InvalidValue)},        {2, ERROR(OUT_OF_MEMORY, OutOfMemory)},
      {100, ERROR(NO_DEVICE, NoDevice)},              {101, ERROR(INVALID_DEVICE, InvalidDevice)},
      {201, ERROR(INVALID_CONTEXT, InvalidContext)},  {209, ERROR(NO_BINARY_FOR_GPU, NoBinaryForGpu)},
      {400, ERROR(INVALID_HANDLE, InvalidHandle)},    {500, ERROR(NOT_FOUND, NotFound)},
      {700, ERROR(ILLEGAL_ADDRESS, IllegalAddress)},
  };
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (names[i].error == error) return *name = names[i].name, 0;
  return INVALID_VALUE;
}

int FUNCTION(cuDeviceGetCount, hipGetDeviceCount)(int *count) { return *count = device_count, 0; }

#ifdef HIP

static _Thread_local int device; /* that is current */

int hipGetDevice(int *number) { return *number = device, 0; }

int hipSetDevice(int number) {
  FAIL_IF_TOLD();
  if (number < 0 || number >= device_count) return INVALID_DEVICE;
  contexts[number].device = device = number;
  return 0;
}

int hipGetDevicePropertiesR0600(char *properties, int number) {
  if (number < 0 || number >= device_count) return INVALID_DEVICE;
  memset(properties, 0xA5, 1472);
  sprintf(properties + 1160, "gfx%x:sramecc+:xnack-", (unsigned)architectures[number]);
  return 0;
}

static context *current(void) { return &contexts[device]; }

#else

static _Thread_local context *stack[DEPTH];
static _Thread_local int depth;

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (device < 0 || device >= device_count || (attribute != 75 && attribute != 76 && attribute != 36 && attribute != 37))
    return INVALID_VALUE;
  if (attribute < 75) return *value = attribute == 36 ? 1000000 : 4096, 0; /* kHz, bits: 1,024 GB/s */
  *value = attribute == 75 ? architectures[device] / 10 : architectures[device] % 10;
  return 0;
}

int cuDevicePrimaryCtxRetain(context **out, int device) {
  FAIL_IF_TOLD();
  if (device < 0 || device >= device_count) return INVALID_VALUE;
  contexts[device].device = device;
  count(&contexts[device].retained);
  count(&retained);
  return *out = &contexts[device], 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return count(&released), --contexts[device].retained < 0; }

int cuCtxPushCurrent_v2(context *pushed) {
  FAIL_IF_TOLD();
  if (!pushed->retained || depth == DEPTH) return INVALID_CONTEXT;
  return stack[depth++] = pushed, 0;
}

int cuCtxPopCurrent_v2(context **popped) { return depth ? (*popped = stack[--depth], 0) : INVALID_CONTEXT; }

static context *current(void) { return depth ? stack[depth - 1] : NULL; }

#endif

int FUNCTION(cuModuleLoadData, hipModuleLoadData)(module **out, const void *image) {
  FAIL_IF_TOLD();
  if (!current()) return INVALID_CONTEXT;
  *out = malloc(sizeof **out);
  **out = (module){current(), image};
  return count(&loads), 0;
}

int FUNCTION(cuModuleUnload, hipModuleUnload)(module *gone) {
  if (gone->owner != current()) return INVALID_CONTEXT;
  gone->image = NULL;
  return count(&unloads), 0;
}

int FUNCTION(cuModuleGetFunction, hipModuleGetFunction)(function **out, module *module, const char *name) {
  FAIL_IF_TOLD();
  *out = malloc(sizeof **out);
  (*out)->module = module;
  (*out)->shared_allowed = FUNCTION(48 << 10, 64 << 10);
  strncpy((*out)->name, name, sizeof (*out)->name);
  return 0;
}

/* What a program that has no onnxruntime asks for itself: memory, which the host reads too, a stream, and times. */
int FUNCTION(cuMemAlloc_v2, hipMalloc)(void **out, size_t size) {
  FAIL_IF_TOLD();
  if (!current()) return INVALID_CONTEXT;
  return count(&allocated), (*out = malloc(size)) ? 0 : 2;
}

int FUNCTION(cuMemFree_v2, hipFree)(void *gone) { return free(gone), count(&freed), 0; }

int FUNCTION(cuMemcpyHtoD_v2, hipMemcpyHtoD)(void *to, const void *from, size_t size) { return memcpy(to, from, size), 0; }

int FUNCTION(cuMemcpyDtoH_v2, hipMemcpyDtoH)(void *to, const void *from, size_t size) { return memcpy(to, from, size), 0; }

int FUNCTION(cuStreamCreate, hipStreamCreateWithFlags)(context **out, unsigned flags) {
  return flags ? INVALID_VALUE : (*out = current(), 0);
}

int FUNCTION(cuStreamSynchronize, hipStreamSynchronize)(context *stream) {
  FAIL_IF_TOLD();
  return stream == current() ? 0 : INVALID_HANDLE;
}

int FUNCTION(cuEventCreate, hipEventCreateWithFlags)(int **out, unsigned flags) {
  return flags ? INVALID_VALUE : (*out = calloc(1, sizeof **out), 0);
}

int FUNCTION(cuEventRecord, hipEventRecord)(int *event, context *stream) {
  return stream == current() ? (*event = launches, 0) : INVALID_HANDLE;
}

int FUNCTION(cuEventSynchronize, hipEventSynchronize)(int *event) { return *event < 0; }

/* A launch takes a millisecond. */
int FUNCTION(cuEventElapsedTime, hipEventElapsedTime)(float *out, const int *first, const int *last) {
  return *out = (float)(*last - *first), 0;
}

int FUNCTION(cuEventDestroy_v2, hipEventDestroy)(int *event) { return free(event), 0; }

#ifndef HIP
int cuFuncSetAttribute(function *function, int attribute, int value) {
  FAIL_IF_TOLD();
  if (attribute != 8) return INVALID_VALUE;
  return function->shared_allowed = value, 0;
}
#endif

/* A graph: launches, whose arguments stay where they were. */
typedef struct recorded {
  function *function;
  unsigned programs, threads, shared_bytes;
  context *stream;
  void **arguments;
} recorded;
typedef struct graph { int count; recorded launches[RECORDED]; } graph;
static _Thread_local graph *recording;

int FUNCTION(cuStreamBeginCapture_v2, hipStreamBeginCapture)(context *stream, int mode) {
  if (stream != current() || mode != 1 || recording) return INVALID_VALUE;
  return (recording = calloc(1, sizeof *recording)) ? 0 : OUT_OF_MEMORY;
}

int FUNCTION(cuStreamEndCapture, hipStreamEndCapture)(context *stream, graph **out) {
  if (stream != current() || !recording) return INVALID_VALUE;
  *out = recording;
  return recording = NULL, 0;
}

int FUNCTION(cuGraphInstantiateWithFlags, hipGraphInstantiateWithFlags)(graph **out, graph *graph,
                                                                        unsigned long long flags) {
  if (flags || !(*out = malloc(sizeof **out))) return INVALID_VALUE;
  return **out = *graph, 0;
}

int FUNCTION(cuGraphDestroy, hipGraphDestroy)(graph *gone) { return free(gone), 0; }

int FUNCTION(cuGraphExecDestroy, hipGraphExecDestroy)(graph *gone) { return free(gone), 0; }

int FUNCTION(cuLaunchKernel, hipModuleLaunchKernel)(
    function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared_bytes, context *stream, void **arguments, void **extra) {
  FAIL_IF_TOLD();
  if (recording) {
    if (recording->count == RECORDED) return OUT_OF_MEMORY;
    recording->launches[recording->count++] =
        (recorded){function, grid_x, block_x, shared_bytes, stream, arguments};
    return 0;
  }
  if (!grid_x || !block_x || shared_bytes > (unsigned)function->shared_allowed || extra) return INVALID_VALUE;
  if (!function->module->image || stream != function->module->owner) return INVALID_HANDLE;
  const launched launch = {function->module->image, function->name,
                           {grid_x, grid_y, grid_z}, {block_x, block_y, block_z},
                           shared_bytes, stream->device, arguments};
  count(&launches);
  return on_launch ? on_launch(&launch) : 0;
}

int FUNCTION(cuGraphLaunch, hipGraphLaunch)(const graph *graph, context *stream) {
  int result = 0;
  for (const recorded *x = graph->launches; !result && x < graph->launches + graph->count; x++)
    result = FUNCTION(cuLaunchKernel, hipModuleLaunchKernel)(x->function, x->programs, 1, 1, x->threads, 1, 1,
                                                             x->shared_bytes, stream, x->arguments, NULL);
  return result;
}

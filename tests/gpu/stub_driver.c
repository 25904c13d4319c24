/* Stands in for NVIDIA's driver, libcuda.so.1: keeps books on devices, contexts and modules, and hands each launch
 * to the test, which may run it. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define DEVICES 4
#define DEPTH 8

enum { INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };

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
int capabilities[DEVICES], device_count;
const char *failing; /* a function that fails with `failure` */
int failure;
int (*on_launch)(const launched *);
/* What the test reads. */
int loads, unloads, retained, released, launches;
/* A stream of each device, as onnxruntime would have made it. */
context contexts[DEVICES];

static _Thread_local context *current[DEPTH];
static _Thread_local int depth;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define FAIL_IF_TOLD(name) \
  if (failing && !strcmp(failing, name)) return failure

static void count(int *what) {
  pthread_mutex_lock(&lock);
  ++*what;
  pthread_mutex_unlock(&lock);
}

int cuInit(unsigned flags) {
  FAIL_IF_TOLD("cuInit");
  return flags ? INVALID_VALUE : device_count ? 0 : NO_DEVICE;
}

int cuGetErrorName(int error, const char **name) {
  static const struct { int error; const char *name; } names[] = {
      {1, "CUDA_ERROR_INVALID_VALUE"},  {100, "CUDA_ERROR_NO_DEVICE"},          {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {2, "CUDA_ERROR_OUT_OF_MEMORY"},  {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},  {400, "CUDA_ERROR_INVALID_HANDLE"},
      {500, "CUDA_ERROR_NOT_FOUND"},    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
  };
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (names[i].error == error) return *name = names[i].name, 0;
  return INVALID_VALUE;
}

int cuDeviceGetCount(int *count) { return *count = device_count, 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (device < 0 || device >= device_count || (attribute != 75 && attribute != 76)) return INVALID_VALUE;
  *value = attribute == 75 ? capabilities[device] / 10 : capabilities[device] % 10;
  return 0;
}

int cuDevicePrimaryCtxRetain(context **out, int device) {
  FAIL_IF_TOLD("cuDevicePrimaryCtxRetain");
  if (device < 0 || device >= device_count) return INVALID_VALUE;
  contexts[device].device = device;
  count(&contexts[device].retained);
  count(&retained);
  return *out = &contexts[device], 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return count(&released), --contexts[device].retained < 0; }

int cuCtxPushCurrent_v2(context *pushed) {
  FAIL_IF_TOLD("cuCtxPushCurrent");
  if (!pushed->retained || depth == DEPTH) return INVALID_CONTEXT;
  return current[depth++] = pushed, 0;
}

int cuCtxPopCurrent_v2(context **popped) { return depth ? (*popped = current[--depth], 0) : INVALID_CONTEXT; }

int cuModuleLoadData(module **out, const void *image) {
  FAIL_IF_TOLD("cuModuleLoadData");
  if (!depth) return INVALID_CONTEXT;
  *out = malloc(sizeof **out);
  **out = (module){current[depth - 1], image};
  return count(&loads), 0;
}

int cuModuleUnload(module *gone) {
  if (!depth || gone->owner != current[depth - 1]) return INVALID_CONTEXT;
  gone->image = NULL;
  return count(&unloads), 0;
}

int cuModuleGetFunction(function **out, module *module, const char *name) {
  FAIL_IF_TOLD("cuModuleGetFunction");
  *out = malloc(sizeof **out);
  (*out)->module = module;
  (*out)->shared_allowed = 48 << 10;
  strncpy((*out)->name, name, sizeof (*out)->name);
  return 0;
}

int cuFuncSetAttribute(function *function, int attribute, int value) {
  FAIL_IF_TOLD("cuFuncSetAttribute");
  if (attribute != 8) return INVALID_VALUE;
  return function->shared_allowed = value, 0;
}

int cuLaunchKernel(function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, context *stream, void **arguments,
                   void **extra) {
  FAIL_IF_TOLD("cuLaunchKernel");
  if (!grid_x || !block_x || shared_bytes > (unsigned)function->shared_allowed || extra) return INVALID_VALUE;
  if (!function->module->image || stream != function->module->owner) return INVALID_HANDLE;
  const launched launch = {function->module->image, function->name,
                           {grid_x, grid_y, grid_z}, {block_x, block_y, block_z},
                           shared_bytes, stream->device, arguments};
  count(&launches);
  return on_launch ? on_launch(&launch) : 0;
}

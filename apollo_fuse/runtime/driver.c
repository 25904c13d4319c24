/* Loads the driver of GPUs, where there is one, and hides in what CUDA and HIP differ. */
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of CUDA */
#define COMPUTE_CAPABILITY_MAJOR 75
#define COMPUTE_CAPABILITY_MINOR 76
#define MAX_DYNAMIC_SHARED_SIZE_BYTES 8
#define SHARED_BYTES_UNASKED (48 << 10) /* more dynamic shared memory is for functions that ask for it */

/* hipDeviceProp_t as ROCm has had it since version 6, which is what the function's name says. */
typedef struct properties {
  char before[1160];
  char architecture[256]; /* gfx942:sramecc+:xnack- */
  char behind[56];
} properties;
_Static_assert(sizeof(properties) == 1472, "size");

static const struct {
  size_t place;
  const char *names[PLATFORMS];
} entries[] = {
#define ENTRY(name, arguments, of_cuda, of_hip) {offsetof(driver, name), {of_cuda, of_hip}},
    DRIVER_ENTRIES(ENTRY)
#undef ENTRY
};

static const char *name_at(platform platform, size_t place) {
  size_t i = 0;
  while (entries[i].place != place) i++;
  return entries[i].names[platform];
}

#define TRY(driver, entry, ...)                                                                             \
  do {                                                                                                      \
    const int result_ = (driver)->entry(__VA_ARGS__);                                                       \
    if (result_) return (refusal){name_at((driver)->platform, offsetof(struct driver, entry)), result_};    \
  } while (0)

#define TRY_ALL(call)                         \
  do {                                        \
    const refusal refusal_ = (call);          \
    if (refusal_.function) return refusal_;   \
  } while (0)

static const refusal nothing = {NULL, 0};

/* ---------------------------------------------------------------------------------------- the library */

/* What the process has of it already comes first, which is what onnxruntime runs on. */
static void *open_library(platform platform) {
  static const char *const names[PLATFORMS][4] = {
      {"libcuda.so.1"},
      {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"},
  };
  void *library = NULL;
  for (const char *const *name = names[platform]; *name && !library; name++)
    library = dlopen(*name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  for (const char *const *name = names[platform]; *name && !library; name++)
    library = dlopen(*name, RTLD_NOW | RTLD_LOCAL);
  return library;
}

/* The driver stays when this library goes: what it keeps of the process outlives us. */
const driver *start_driver(platform platform) {
  static driver drivers[PLATFORMS];
  driver *loaded = &drivers[platform];
  void *library = open_library(platform);
  if (!library) return NULL;
  loaded->platform = platform;
  for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
    if (!entries[i].names[platform]) continue;
    void *symbol = dlsym(library, entries[i].names[platform]);
    if (!symbol) return NULL;
    memcpy((char *)loaded + entries[i].place, &symbol, sizeof symbol);
  }
  return loaded->Init(0) ? NULL : loaded;
}

const char *error_name(const driver *driver, int result) {
  const char *name = NULL;
  return driver->GetErrorName(result, &name) == 0 && name ? name : "an unknown error";
}

/* ----------------------------------------------------------------------------------- the architecture */

int32_t architecture_of(const driver *driver, int device) {
  if (driver->platform == HIP) {
    properties properties;
    if (driver->GetProperties(&properties, device) || strncmp(properties.architecture, "gfx", 3)) return 0;
    return (int32_t)strtol(properties.architecture + 3, NULL, 16);
  }
  int major, minor;
  if (driver->GetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, device) ||
      driver->GetAttribute(&minor, COMPUTE_CAPABILITY_MINOR, device))
    return 0;
  return 10 * major + minor;
}

void name_architecture(const driver *driver, int32_t architecture, char *text, size_t size) {
  if (driver->platform == HIP)
    snprintf(text, size, "architecture gfx%x", (unsigned)architecture);
  else
    snprintf(text, size, "compute capability %d.%d", (int)architecture / 10, (int)architecture % 10);
}

bool runs(const driver *driver, const af_binary *binary, int32_t architecture) {
  switch (binary->form) {
    case AF_CUBIN: /* devices of the same major number and the same or a higher minor one */
      return driver->platform == CUDA && binary->architecture <= architecture &&
             binary->architecture / 10 == architecture / 10;
    case AF_PTX: return driver->platform == CUDA && binary->architecture <= architecture;
    case AF_HSACO: return driver->platform == HIP && binary->architecture == architecture;
  }
  return false;
}

/* ----------------------------------------------------------------------------------------- the kernels */

/* Makes the code's device current; `before` is what was, for `leave`. */
static refusal enter(const driver *driver, const device_code *code, int *before) {
  if (driver->platform == HIP) {
    TRY(driver, GetDevice, before);
    TRY(driver, SetDevice, code->device);
  } else {
    TRY(driver, PushContext, code->context);
  }
  return nothing;
}

static void leave(const driver *driver, int before) {
  void *same;
  if (driver->platform == HIP)
    driver->SetDevice(before);
  else
    driver->PopContext(&same);
}

static refusal load_here(const driver *driver, const af_binary *binary, const char *name, device_code *out) {
  TRY(driver, ModuleLoadData, &out->module, binary->image);
  TRY(driver, ModuleGetFunction, &out->function, out->module, name);
  if (driver->platform == CUDA && binary->shared_bytes > SHARED_BYTES_UNASKED)
    TRY(driver, SetFunctionAttribute, out->function, MAX_DYNAMIC_SHARED_SIZE_BYTES, binary->shared_bytes);
  return nothing;
}

refusal load_code(const driver *driver, int device, const af_binary *binary, const char *name, device_code *out) {
  int before;
  *out = (device_code){.device = device, .threads = binary->threads, .shared_bytes = binary->shared_bytes};
  if (driver->platform == CUDA) TRY(driver, RetainContext, &out->context, device);
  TRY_ALL(enter(driver, out, &before));
  const refusal refused = load_here(driver, binary, name, out);
  leave(driver, before);
  return refused;
}

void unload_code(const driver *driver, device_code *code) {
  int before;
  if (code->module && !enter(driver, code, &before).function) {
    driver->ModuleUnload(code->module);
    leave(driver, before);
  }
  if (code->context) driver->ReleaseContext(code->device);
}

refusal launch_code(const driver *driver, const device_code *code, unsigned programs, void *stream,
                    void **arguments) {
  TRY(driver, LaunchKernel, code->function, programs, 1, 1, (unsigned)code->threads, 1, 1,
      (unsigned)code->shared_bytes, stream, arguments, NULL);
  return nothing;
}

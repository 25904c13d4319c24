/* Loads NVIDIA's driver, where there is one. */
#include "driver.h"

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

static const struct {
  size_t place;
  const char *symbol;
} entries[] = {
    {offsetof(driver, Init), "cuInit"},
    {offsetof(driver, GetErrorName), "cuGetErrorName"},
    {offsetof(driver, DeviceGetCount), "cuDeviceGetCount"},
    {offsetof(driver, DeviceGetAttribute), "cuDeviceGetAttribute"},
    {offsetof(driver, DevicePrimaryCtxRetain), "cuDevicePrimaryCtxRetain"},
    {offsetof(driver, DevicePrimaryCtxRelease), "cuDevicePrimaryCtxRelease_v2"},
    {offsetof(driver, CtxPushCurrent), "cuCtxPushCurrent_v2"},
    {offsetof(driver, CtxPopCurrent), "cuCtxPopCurrent_v2"},
    {offsetof(driver, ModuleLoadData), "cuModuleLoadData"},
    {offsetof(driver, ModuleUnload), "cuModuleUnload"},
    {offsetof(driver, ModuleGetFunction), "cuModuleGetFunction"},
    {offsetof(driver, FuncSetAttribute), "cuFuncSetAttribute"},
    {offsetof(driver, LaunchKernel), "cuLaunchKernel"},
};

/* The driver stays when this library goes: what it keeps of the process outlives us. */
const driver *start_driver(void) {
  static driver loaded;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return NULL;
  for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
    void *symbol = dlsym(library, entries[i].symbol);
    if (!symbol) return NULL;
    memcpy((char *)&loaded + entries[i].place, &symbol, sizeof symbol);
  }
  return loaded.Init(0) ? NULL : &loaded;
}

const char *error_name(const driver *driver, CUresult result) {
  const char *name = NULL;
  return driver->GetErrorName(result, &name) == 0 && name ? name : "an unknown error";
}

int32_t capability_of(const driver *driver, CUdevice device) {
  int major, minor;
  if (driver->DeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device) ||
      driver->DeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return 0;
  return 10 * major + minor;
}

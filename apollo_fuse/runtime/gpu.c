/* Runs a custom op on a GPU: binds its tensors as on the CPU, and places its memory for launches.c.
 *
 * Modules are loaded while a session is made, once for all sessions on a device.  A run then neither waits for the
 * device nor allocates anything but from onnxruntime's arena, so that its launches can be captured in a graph. */
#include "gpu.h"

#define CHECKS_INDICES 0 /* they lie on the device */
#include "tensors.h"

#include "launches.h"

#include <stdlib.h>

/* ---------------------------------------------------------------------------------------- the devices */

static bool fits(const af_node *node, const af_gpu_node *gpu, const driver *driver, int32_t architecture) {
  for (int32_t p = 0; p < node->op_count; p++)
    for (int32_t k = 0; k < node->ops[p]->kernel_count; k++)
      if (!fitting_binary(driver, gpu->ops[p]->launches[k].binaries[0], architecture)) return false;
  return true;
}

bool runs_on_gpu(const af_node *node, const af_gpu_node *gpu, const driver *driver) {
  int devices;
  if (!gpu->ops || driver->GetDeviceCount(&devices)) return false;
  for (int device = 0; device < devices; device++)
    if (fits(node, gpu, driver, architecture_of(driver, device))) return true;
  return false;
}

/* ---------------------------------------------------------------------------------------- the kernels */

/* A node in a session. */
typedef struct gpu_kernel {
  const custom_op *op;
  OrtAllocator *allocator;
  const OrtMemoryInfo *memory; /* of the device */
  loaded_kernel *writer;       /* where the node shares launches */
  int32_t variant_count;       /* most of an op */
  loaded_kernel *kernels[];    /* of each run for each variant, or one where its launch is shared */
} gpu_kernel;

static size_t place_count(const gpu_kernel *self) {
  return (size_t)self->op->gpu->run_count * (size_t)self->variant_count;
}

static void destroy_kernel(void *kernel) {
  gpu_kernel *self = kernel;
  for (size_t i = 0; i < place_count(self); i++)
    if (self->kernels[i]) let_go(self->op, self->kernels[i]);
  if (self->writer) let_go(self->op, self->writer);
  if (self->allocator) self->op->owner->api->ReleaseAllocator(self->allocator);
  free(self);
}

static OrtStatus *acquire_kernels(gpu_kernel *self, int device) {
  const af_gpu_node *gpu = self->op->gpu;
  loaded_kernel **kernels = self->kernels;
  for (const af_run *run = gpu->runs; run < gpu->runs + gpu->run_count; run++, kernels += self->variant_count) {
    const af_gpu_op *first = gpu->ops[run->members[0]];
    const af_launch *launch = &first->launches[run->kernels[0]];
    if (run->stitched) {
      if (!self->writer) RETURN_IF_FAILED(acquire(self->op, "write", af_writer, device, &self->writer));
      RETURN_IF_FAILED(acquire(self->op, "stitch", run->stitched, device, kernels));
    } else {
      for (int32_t v = 0; v < first->variant_count; v++)
        RETURN_IF_FAILED(acquire(self->op, launch->name, launch->binaries[v], device, &kernels[v]));
    }
  }
  return NULL;
}

static OrtStatus *open_kernel(gpu_kernel *self, const OrtKernelInfo *info) {
  const OrtApi *api = self->op->owner->api;
  int device;
  RETURN_IF_FAILED(api->KernelInfoGetAllocator(info, OrtMemTypeDefault, &self->allocator));
  RETURN_IF_FAILED(api->AllocatorGetInfo(self->allocator, &self->memory));
  RETURN_IF_FAILED(api->MemoryInfoGetId(self->memory, &device));
  return acquire_kernels(self, device);
}

static OrtStatus *create_kernel(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info,
                                void **kernel) {
  const custom_op *op = (const custom_op *)base;
  gpu_kernel shape = {.op = op};
  for (int32_t p = 0; p < op->node->op_count; p++)
    if (op->gpu->ops[p]->variant_count > shape.variant_count) shape.variant_count = op->gpu->ops[p]->variant_count;
  gpu_kernel *self = calloc(1, sizeof *self + place_count(&shape) * sizeof self->kernels[0]);
  if (!self) return failure(api, ORT_FAIL, "%s: no memory; free some.", op->node->name);
  *self = shape;
  OrtStatus *status = open_kernel(self, info);
  if (status)
    destroy_kernel(self);
  else
    *kernel = self;
  return status;
}

/* ----------------------------------------------------------------------------------------- the memory */

/* The memory is given back once everything is launched: what the stream does later finds it free only then. */
static OrtStatus *run_with_memory(const gpu_kernel *kernel, call *self, OrtKernelContext *context,
                                  size_t temporaries, size_t scratch, size_t table) {
  const OrtApi *api = self->op->owner->api;
  const size_t bytes = temporaries + scratch + table;
  void *block = NULL;
  RETURN_IF_FAILED(api->KernelContext_GetScratchBuffer(context, kernel->memory, bytes + ALIGNMENT, &block));
  if (!block)
    return failure(api, ORT_FAIL, "%s: no memory for %zu bytes on the device; run less at once.",
                   self->op->node->name, bytes);
  char *base = (char *)(((uintptr_t)block + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
  place_temporaries(self->op, self->parts, base);
  self->scratch = base + temporaries;
  self->table = self->scratch + scratch;
  OrtStatus *status = write_and_launch(self);
  OrtStatus *freed = api->AllocatorFree(kernel->allocator, block);
  if (freed) api->ReleaseStatus(freed);
  return status;
}

static OrtStatus *check_axes(const custom_op *self, const part *parts) {
  char sentence[256] = "";
  for (int32_t p = 0; p < self->node->op_count; p++)
    if (self->gpu->ops[p]->check(parts[p].n, sentence, sizeof sentence))
      return failure(self->owner->api, ORT_INVALID_ARGUMENT, "%s: %s", parts[p].op->name, sentence);
  return NULL;
}

static OrtStatus *compute_on_gpu(void *kernel, OrtKernelContext *context) {
  const gpu_kernel *self = kernel;
  const custom_op *op = self->op;
  part parts[op->node->op_count];
  void *buffers[op->buffer_count + 1], *stream;
  int64_t n[op->symbol_count + 1];
  size_t scratch, table;
  lay_out_parts(op, parts, buffers, n);
  RETURN_IF_FAILED(bind_parts(op, context, parts));
  RETURN_IF_FAILED(check_axes(op, parts));
  RETURN_IF_FAILED(allocate_outputs(op, context, parts));
  RETURN_IF_FAILED(op->owner->api->KernelContext_GetGPUComputeStream(context, &stream));
  call call = {.op = op,
               .parts = parts,
               .writer = self->writer,
               .kernels = self->kernels,
               .variant_count = self->variant_count,
               .stream = stream};
  count_memory(op, parts, &scratch, &table);
  const size_t temporaries = place_temporaries(op, parts, NULL);
  if (temporaries + scratch + table) return run_with_memory(self, &call, context, temporaries, scratch, table);
  return write_and_launch(&call);
}

/* ---------------------------------------------------------------------------------------- the custom op */

static const char *get_provider(const OrtCustomOp *base) { return ((const custom_op *)base)->provider; }

static OrtMemType get_memory_type(const OrtCustomOp *base, size_t index) {
  return ((const custom_op *)base)->gpu->on_host[index] ? OrtMemTypeCPUInput : OrtMemTypeDefault;
}

void move_to_gpu(custom_op *self, const af_gpu_node *gpu, const driver *driver, const char *provider) {
  self->gpu = gpu;
  self->driver = driver;
  self->provider = provider;
  self->base.GetExecutionProviderType = get_provider;
  self->base.GetInputMemoryType = get_memory_type;
  self->base.CreateKernelV2 = create_kernel;
  self->base.KernelDestroy = destroy_kernel;
  self->base.KernelComputeV2 = compute_on_gpu;
}

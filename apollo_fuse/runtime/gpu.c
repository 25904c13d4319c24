/* Runs a custom op on a GPU: binds its tensors as on the CPU, and launches its kernels on onnxruntime's stream.
 *
 * Modules are loaded while a session is made, once for all sessions on a device.  A run then neither waits for the
 * device nor allocates anything but from onnxruntime's arena, so that its launches can be captured in a graph. */
#include "gpu.h"

#define CHECKS_INDICES 0 /* they lie on the device */
#include "tensors.h"

#include "driver.h"

#include <pthread.h>
#include <stdlib.h>

#define SHARED_BYTES_UNASKED (48 << 10) /* more dynamic shared memory is for functions that ask for it */

/* ---------------------------------------------------------------------------------------- the modules */

typedef struct loaded_kernel {
  const af_binary *binary;
  CUmodule module;
  CUfunction function;
} loaded_kernel;

/* The kernels of an af_gpu_op in the primary context of a device, which onnxruntime's is too. */
typedef struct loaded_op {
  struct loaded_op *next;
  const af_gpu_op *op;
  CUdevice device;
  CUcontext context;
  int32_t users, kernel_count;
  loaded_kernel kernels[];
} loaded_op;

static const driver *cuda; /* started before there are ops for it */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static loaded_op *loaded_ops;

static OrtStatus *refused(const custom_op *self, const char *function, CUresult result) {
  return failure(self->owner->api, ORT_FAIL,
                 "%s: %s ended with %s, expected success; run the model without its library, or on the CPU.",
                 self->node->name, function, error_name(cuda, result));
}

#define RETURN_IF_REFUSED(self, function, ...)                  \
  do {                                                          \
    CUresult result_ = cuda->function(__VA_ARGS__);             \
    if (result_) return refused(self, "cu" #function, result_); \
  } while (0)

/* Code runs on devices of the same major number and the same or a higher minor one. */
static const af_binary *fitting_binary(const af_launch *launch, int32_t capability) {
  for (const af_binary *found = launch->binaries; found->image; found++)
    if (found->capability <= capability && (found->is_ptx || found->capability / 10 == capability / 10))
      return found;
  return NULL;
}

static bool fits(const af_node *node, const af_gpu_node *gpu, int32_t capability) {
  for (int32_t p = 0; p < node->op_count; p++)
    for (int32_t k = 0; k < node->ops[p]->kernel_count; k++)
      if (!fitting_binary(&gpu->ops[p]->launches[k], capability)) return false;
  return true;
}

bool start_gpus(void) {
  if (!cuda) cuda = start_driver();
  return cuda;
}

bool runs_on_gpu(const af_node *node, const af_gpu_node *gpu) {
  int devices;
  if (!gpu->ops || cuda->DeviceGetCount(&devices)) return false;
  for (int device = 0; device < devices; device++)
    if (fits(node, gpu, capability_of(cuda, device))) return true;
  return false;
}

static OrtStatus *load_kernel(const custom_op *self, const af_launch *launch, int32_t capability,
                              loaded_kernel *out) {
  out->binary = fitting_binary(launch, capability);
  if (!out->binary)
    return failure(self->owner->api, ORT_FAIL,
                   "%s: its kernels fit no device of compute capability %d.%d; name one like it in --target.",
                   self->node->name, (int)capability / 10, (int)capability % 10);
  RETURN_IF_REFUSED(self, ModuleLoadData, &out->module, out->binary->image);
  RETURN_IF_REFUSED(self, ModuleGetFunction, &out->function, out->module, launch->name);
  if (out->binary->shared_bytes > SHARED_BYTES_UNASKED)
    RETURN_IF_REFUSED(self, FuncSetAttribute, out->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                      out->binary->shared_bytes);
  return NULL;
}

/* Loads the op, whose context is current; what was loaded when it fails is left for `unload`. */
static OrtStatus *load_kernels(const custom_op *self, loaded_op *made) {
  const int32_t capability = capability_of(cuda, made->device);
  for (int32_t k = 0; k < made->kernel_count; k++)
    RETURN_IF_FAILED(load_kernel(self, &made->op->launches[k], capability, &made->kernels[k]));
  return NULL;
}

static void unload(loaded_op *self) {
  CUcontext same;
  if (self->context && cuda->CtxPushCurrent(self->context) == 0) {
    for (int32_t k = 0; k < self->kernel_count; k++)
      if (self->kernels[k].module) cuda->ModuleUnload(self->kernels[k].module);
    cuda->CtxPopCurrent(&same);
  }
  if (self->context) cuda->DevicePrimaryCtxRelease(self->device);
  free(self);
}

static OrtStatus *load(const custom_op *self, loaded_op *made) {
  RETURN_IF_REFUSED(self, DevicePrimaryCtxRetain, &made->context, made->device);
  RETURN_IF_REFUSED(self, CtxPushCurrent, made->context);
  OrtStatus *status = load_kernels(self, made);
  CUcontext same;
  cuda->CtxPopCurrent(&same);
  return status;
}

/* The op on the device, loaded by whoever needs it first. */
static OrtStatus *acquire(const custom_op *self, int32_t part, CUdevice device, loaded_op **out) {
  const af_gpu_op *op = self->gpu->ops[part];
  for (loaded_op *known = loaded_ops; known; known = known->next)
    if (known->op == op && known->device == device) {
      known->users++;
      *out = known;
      return NULL;
    }
  const int32_t count = self->node->ops[part]->kernel_count;
  loaded_op *made = calloc(1, sizeof *made + (size_t)count * sizeof made->kernels[0]);
  if (!made) return failure(self->owner->api, ORT_FAIL, "%s: no memory; free some.", self->node->name);
  made->op = op;
  made->device = device;
  made->kernel_count = count;
  OrtStatus *status = load(self, made);
  if (status) {
    unload(made);
    return status;
  }
  made->users = 1;
  made->next = loaded_ops;
  *out = loaded_ops = made;
  return NULL;
}

static void let_go(loaded_op *self) {
  if (--self->users) return;
  loaded_op **place = &loaded_ops;
  while (*place != self) place = &(*place)->next;
  *place = self->next;
  unload(self);
}

/* ---------------------------------------------------------------------------------------- the kernels */

/* A node in a session. */
typedef struct gpu_kernel {
  const custom_op *op;
  OrtAllocator *allocator;
  const OrtMemoryInfo *memory; /* of the device */
  loaded_op *parts[];          /* one for each op of the node */
} gpu_kernel;

static void destroy_kernel(void *kernel) {
  gpu_kernel *self = kernel;
  pthread_mutex_lock(&lock);
  for (int32_t p = 0; p < self->op->node->op_count && self->parts[p]; p++) let_go(self->parts[p]);
  pthread_mutex_unlock(&lock);
  if (self->allocator) self->op->owner->api->ReleaseAllocator(self->allocator);
  free(self);
}

static OrtStatus *open_kernel(gpu_kernel *self, const OrtKernelInfo *info) {
  const OrtApi *api = self->op->owner->api;
  int device;
  RETURN_IF_FAILED(api->KernelInfoGetAllocator(info, OrtMemTypeDefault, &self->allocator));
  RETURN_IF_FAILED(api->AllocatorGetInfo(self->allocator, &self->memory));
  RETURN_IF_FAILED(api->MemoryInfoGetId(self->memory, &device));
  OrtStatus *status = NULL;
  pthread_mutex_lock(&lock);
  for (int32_t p = 0; p < self->op->node->op_count && !status; p++)
    status = acquire(self->op, p, device, &self->parts[p]);
  pthread_mutex_unlock(&lock);
  return status;
}

static OrtStatus *create_kernel(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info,
                                void **kernel) {
  const custom_op *op = (const custom_op *)base;
  gpu_kernel *self = calloc(1, sizeof *self + (size_t)op->node->op_count * sizeof self->parts[0]);
  if (!self) return failure(api, ORT_FAIL, "%s: no memory; free some.", op->node->name);
  self->op = op;
  OrtStatus *status = open_kernel(self, info);
  if (status)
    destroy_kernel(self);
  else
    *kernel = self;
  return status;
}

/* ---------------------------------------------------------------------------------------- the launches */

/* Programs of a kernel of the part; 0 where there is nothing to do. */
static int64_t programs_of(const part *part, const af_launch *launch, int32_t kernel) {
  const int64_t items = part->op->kernels[kernel]->grid(part->n);
  return items <= 0 ? 0 : (items - 1) / launch->items + 1;
}

/* Points `pieces` at the scratch of a launch, one piece after the other from `base` on, or nowhere; gives the
 * bytes that they take. */
static size_t place_scratch(const af_launch *launch, const int64_t *n, int64_t programs, char *base,
                            void **pieces) {
  int64_t bytes[launch->scratch_count + 1];
  size_t total = 0;
  launch->scratch_bytes(n, bytes);
  for (int32_t i = 0; i < launch->scratch_count; total += aligned(bytes[i++] * programs))
    if (base) pieces[i] = base + total;
  return total;
}

/* The bytes of scratch of the greediest launch; as they follow each other on a stream, they share it. */
static size_t most_scratch(const custom_op *self, const part *parts) {
  size_t most = 0;
  for (int32_t p = 0; p < self->node->op_count; p++)
    for (int32_t k = 0; k < parts[p].op->kernel_count; k++) {
      const af_launch *launch = &self->gpu->ops[p]->launches[k];
      const size_t bytes = place_scratch(launch, parts[p].n, programs_of(&parts[p], launch, k), NULL, NULL);
      if (bytes > most) most = bytes;
    }
  return most;
}

static OrtStatus *launch_kernel(const custom_op *self, const part *part, const af_launch *launch,
                                const loaded_kernel *kernel, int64_t programs, char *scratch, CUstream stream) {
  void *pieces[launch->scratch_count + 1], *of_triton = NULL;
  void *arguments[launch->tensor_count + launch->scratch_count + launch->extent_count + 2], **next = arguments;
  if (programs > INT32_MAX)
    return failure(self->owner->api, ORT_INVALID_ARGUMENT,
                   "%s: %s needs %lld programs, expected fewer than 2^31; give it smaller tensors.",
                   part->op->name, launch->name, (long long)programs);
  place_scratch(launch, part->n, programs, scratch, pieces);
  for (int32_t i = 0; i < launch->tensor_count; i++) *next++ = &part->buffers[launch->tensors[i]];
  for (int32_t i = 0; i < launch->scratch_count; i++) *next++ = &pieces[i];
  for (int32_t i = 0; i < launch->extent_count; i++) *next++ = &part->n[launch->extents[i]];
  *next++ = &of_triton;
  *next++ = &of_triton;
  RETURN_IF_REFUSED(self, LaunchKernel, kernel->function, (unsigned)programs, 1, 1,
                    (unsigned)kernel->binary->threads, 1, 1, (unsigned)kernel->binary->shared_bytes, stream,
                    arguments, NULL);
  return NULL;
}

static OrtStatus *launch_kernels(const gpu_kernel *self, const part *parts, char *scratch, CUstream stream) {
  for (int32_t p = 0; p < self->op->node->op_count; p++)
    for (int32_t k = 0; k < parts[p].op->kernel_count; k++) {
      const af_launch *launch = &self->op->gpu->ops[p]->launches[k];
      const int64_t programs = programs_of(&parts[p], launch, k);
      if (programs)
        RETURN_IF_FAILED(launch_kernel(self->op, &parts[p], launch, &self->parts[p]->kernels[k], programs, scratch,
                                       stream));
    }
  return NULL;
}

/* The memory is given back once everything is launched: what the stream does later finds it free only then. */
static OrtStatus *run_with_memory(const gpu_kernel *self, OrtKernelContext *context, const part *parts,
                                  size_t temporaries, size_t scratch, CUstream stream) {
  const OrtApi *api = self->op->owner->api;
  void *block = NULL;
  RETURN_IF_FAILED(
      api->KernelContext_GetScratchBuffer(context, self->memory, temporaries + scratch + ALIGNMENT, &block));
  if (!block)
    return failure(api, ORT_FAIL, "%s: no memory for %zu bytes on the device; run less at once.",
                   self->op->node->name, temporaries + scratch);
  char *base = (char *)(((uintptr_t)block + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
  place_temporaries(self->op, parts, base);
  OrtStatus *status = launch_kernels(self, parts, base + temporaries, stream);
  OrtStatus *freed = api->AllocatorFree(self->allocator, block);
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
  lay_out_parts(op, parts, buffers, n);
  RETURN_IF_FAILED(bind_parts(op, context, parts));
  RETURN_IF_FAILED(check_axes(op, parts));
  RETURN_IF_FAILED(allocate_outputs(op, context, parts));
  RETURN_IF_FAILED(op->owner->api->KernelContext_GetGPUComputeStream(context, &stream));
  const size_t scratch = most_scratch(op, parts);
  const size_t temporaries = place_temporaries(op, parts, NULL);
  if (temporaries + scratch) return run_with_memory(self, context, parts, temporaries, scratch, stream);
  return launch_kernels(self, parts, NULL, stream);
}

/* ---------------------------------------------------------------------------------------- the custom op */

static const char *get_provider(const OrtCustomOp *base) { return (void)base, "CUDAExecutionProvider"; }

static OrtMemType get_memory_type(const OrtCustomOp *base, size_t index) {
  return ((const custom_op *)base)->gpu->on_host[index] ? OrtMemTypeCPUInput : OrtMemTypeDefault;
}

void move_to_gpu(custom_op *self, const af_gpu_node *gpu) {
  self->gpu = gpu;
  self->base.GetExecutionProviderType = get_provider;
  self->base.GetInputMemoryType = get_memory_type;
  self->base.CreateKernelV2 = create_kernel;
  self->base.KernelDestroy = destroy_kernel;
  self->base.KernelComputeV2 = compute_on_gpu;
}

/* Runs a custom op on a GPU: binds its tensors as on the CPU, and launches its kernels on onnxruntime's stream.
 *
 * Modules are loaded while a session is made, once for all sessions on a device.  A run then neither waits for the
 * device nor allocates anything but from onnxruntime's arena, so that its launches can be captured in a graph. */
#include "gpu.h"

#define CHECKS_INDICES 0 /* they lie on the device */
#include "tensors.h"

#include "modules.h"

#include <math.h>
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
  loaded_kernel *kernels[];    /* of each run for each variant, or for none where it is shared */
} gpu_kernel;

static loaded_kernel **kernels_of(gpu_kernel *self, const af_run *run) {
  return &self->kernels[(run - self->op->gpu->runs) * self->variant_count];
}

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
  for (const af_run *run = gpu->runs; run < gpu->runs + gpu->run_count; run++) {
    const af_gpu_op *first = gpu->ops[run->members[0]];
    const af_launch *launch = &first->launches[run->kernel];
    loaded_kernel **kernels = kernels_of(self, run);
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

/* ---------------------------------------------------------------------------------------- the launches */

/* One call of the node.  Launches follow each other on a stream, so that they share scratch. */
typedef struct call {
  gpu_kernel *kernel;
  const custom_op *op;
  const part *parts;
  char *scratch;
  char *table; /* of members, where the next values go or the next launch finds its own */
  void *stream;
} call;

static const af_launch *launch_of(const custom_op *self, const af_run *run, int32_t member) {
  return &self->gpu->ops[run->members[member]]->launches[run->kernel];
}

static int32_t width_of(const af_launch *launch) {
  return launch->tensor_count + launch->scratch_count + launch->extent_count;
}

/* Programs of a kernel of the part; 0 where there is nothing to do. */
static int64_t programs_of(const part *part, const af_launch *launch, int32_t kernel) {
  const int64_t items = part->op->kernels[kernel]->grid(part->n);
  return items <= 0 ? 0 : (items - 1) / launch->items + 1;
}

/* Points `pieces` at the scratch of a kernel, one piece after the other from `base` on, or nowhere; gives the
 * bytes that they take. */
static size_t place_scratch(const af_launch *launch, const int64_t *n, int64_t programs, char *base,
                            void **pieces) {
  int64_t bytes[launch->scratch_count + 1];
  size_t total = 0;
  launch->scratch_bytes(n, bytes);
  for (int32_t i = 0; i < launch->scratch_count; total += aligned(bytes[i++] * programs))
    if (pieces) pieces[i] = base + total;
  return total;
}

/* The bytes of scratch of the greediest launch, and the bytes of all tables. */
static void count_memory(const custom_op *self, const part *parts, size_t *scratch, size_t *table) {
  int64_t values = 0;
  *scratch = 0;
  for (const af_run *run = self->gpu->runs; run < self->gpu->runs + self->gpu->run_count; run++) {
    size_t bytes = 0;
    for (int32_t m = 0; m < run->count; m++) {
      const af_launch *launch = launch_of(self, run, m);
      const part *part = &parts[run->members[m]];
      bytes += place_scratch(launch, part->n, programs_of(part, launch, run->kernel), NULL, NULL);
      if (run->stitched) values += 2 + width_of(launch);
    }
    if (bytes > *scratch) *scratch = bytes;
  }
  *table = (size_t)((values + AF_WRITTEN - 1) / AF_WRITTEN * AF_WRITTEN) * sizeof(int64_t);
}

/* Starts a kernel with `count` arguments; `arguments` has room for two more. */
static OrtStatus *start(const call *self, const loaded_kernel *kernel, int64_t programs, void **arguments,
                        int32_t count) {
  void *of_triton = NULL;
  if (programs > INT32_MAX)
    return failure(self->op->owner->api, ORT_INVALID_ARGUMENT,
                   "%s: a kernel needs %lld programs, expected fewer than 2^31; give it smaller tensors.",
                   self->op->node->name, (long long)programs);
  arguments[count] = arguments[count + 1] = &of_triton;
  const refusal refusal =
      launch_code(self->op->driver, code_of(kernel), (unsigned)programs, self->stream, arguments);
  return refusal.function ? refused(self->op, refusal) : NULL;
}

/* The arguments of a kernel of the part, with its scratch from `scratch` on; gives the scratch behind it. */
static char *place_arguments(const part *part, const af_launch *launch, int64_t programs, char *scratch,
                             int64_t *values) {
  void *pieces[launch->scratch_count + 1];
  const size_t bytes = place_scratch(launch, part->n, programs, scratch, pieces);
  for (int32_t i = 0; i < launch->tensor_count; i++) *values++ = (intptr_t)part->buffers[launch->tensors[i]];
  for (int32_t i = 0; i < launch->scratch_count; i++) *values++ = (intptr_t)pieces[i];
  for (int32_t i = 0; i < launch->extent_count; i++) *values++ = part->n[launch->extents[i]];
  return scratch + bytes;
}

/* The variant of the op whose extents are nearest to n, by the product of their ratios. */
static int32_t nearest_variant(const af_gpu_op *gpu, int32_t count, const int64_t *n) {
  const int64_t *own = gpu->variants;
  double least = INFINITY;
  int32_t nearest = 0;
  for (int32_t v = 0; v < gpu->variant_count; v++, own += count) {
    double distance = 1;
    for (int32_t i = 0; i < count; i++)
      if (own[i] > 0 && n[i] > 0) distance *= n[i] > own[i] ? (double)n[i] / own[i] : (double)own[i] / n[i];
    if (distance < least) {
      least = distance;
      nearest = v;
    }
  }
  return nearest;
}

static OrtStatus *launch_alone(const call *self, const af_run *run) {
  const part *part = &self->parts[run->members[0]];
  const af_launch *launch = launch_of(self->op, run, 0);
  const int64_t programs = programs_of(part, launch, run->kernel);
  const int32_t width = width_of(launch);
  int64_t values[width + 1];
  void *arguments[width + 2];
  if (!programs) return NULL;
  place_arguments(part, launch, programs, self->scratch, values);
  for (int32_t i = 0; i < width; i++) arguments[i] = &values[i];
  const int32_t v = nearest_variant(self->op->gpu->ops[run->members[0]], part->op->symbol_count, part->n);
  return start(self, kernels_of(self->kernel, run)[v], programs, arguments, width);
}

static OrtStatus *launch_stitched(call *self, const af_run *run) {
  int32_t count = run->count;
  int64_t programs = 0;
  void *table = self->table, *arguments[4] = {&table, &count};
  for (int32_t m = 0; m < count; m++) {
    const af_launch *launch = launch_of(self->op, run, m);
    programs += programs_of(&self->parts[run->members[m]], launch, run->kernel);
    self->table += (size_t)(2 + width_of(launch)) * sizeof(int64_t);
  }
  return programs ? start(self, *kernels_of(self->kernel, run), programs, arguments, 2) : NULL;
}

static OrtStatus *launch_kernels(call *self) {
  const af_gpu_node *gpu = self->op->gpu;
  for (const af_run *run = gpu->runs; run < gpu->runs + gpu->run_count; run++)
    RETURN_IF_FAILED(run->stitched ? launch_stitched(self, run) : launch_alone(self, run));
  return NULL;
}

/* ------------------------------------------------------------------------------------- the members' table */

/* Values on their way to the device, as arguments of a launch, which keeps a copy of them. */
typedef struct written {
  int64_t values[AF_WRITTEN];
  int32_t count;
} written;

static OrtStatus *write_values(call *self, written *written) {
  void *place = self->table, *arguments[AF_WRITTEN + 3] = {&place};
  for (int32_t i = 0; i < AF_WRITTEN; i++) arguments[i + 1] = &written->values[i];
  self->table += sizeof written->values;
  written->count = 0;
  return start(self, self->kernel->writer, 1, arguments, AF_WRITTEN + 1);
}

static OrtStatus *put(call *self, written *written, int64_t value) {
  written->values[written->count++] = value;
  return written->count < AF_WRITTEN ? NULL : write_values(self, written);
}

/* Where each member's programs begin, where its arguments lie and its kind, then the arguments of each. */
static OrtStatus *put_members(call *self, written *written, const af_run *run) {
  int64_t begin = 0, place = 0;
  char *scratch = self->scratch;
  for (int32_t m = 0; m < run->count; m++) {
    RETURN_IF_FAILED(put(self, written, begin));
    begin += programs_of(&self->parts[run->members[m]], launch_of(self->op, run, m), run->kernel);
  }
  for (int32_t m = 0; m < run->count; m++) {
    RETURN_IF_FAILED(put(self, written, (int64_t)run->kinds[m] << 32 | place));
    place += width_of(launch_of(self->op, run, m));
  }
  for (int32_t m = 0; m < run->count; m++) {
    const part *part = &self->parts[run->members[m]];
    const af_launch *launch = launch_of(self->op, run, m);
    const int32_t width = width_of(launch);
    int64_t values[width + 1];
    scratch = place_arguments(part, launch, programs_of(part, launch, run->kernel), scratch, values);
    for (int32_t i = 0; i < width; i++) RETURN_IF_FAILED(put(self, written, values[i]));
  }
  return NULL;
}

static OrtStatus *write_tables(call *self) {
  const af_gpu_node *gpu = self->op->gpu;
  char *table = self->table;
  written written = {.count = 0};
  for (const af_run *run = gpu->runs; run < gpu->runs + gpu->run_count; run++)
    if (run->stitched) RETURN_IF_FAILED(put_members(self, &written, run));
  if (written.count) RETURN_IF_FAILED(write_values(self, &written));
  self->table = table;
  return NULL;
}

/* ----------------------------------------------------------------------------------------- the memory */

static OrtStatus *write_and_launch(call *self) {
  RETURN_IF_FAILED(write_tables(self));
  return launch_kernels(self);
}

/* The memory is given back once everything is launched: what the stream does later finds it free only then. */
static OrtStatus *run_with_memory(call *self, OrtKernelContext *context, size_t temporaries, size_t scratch,
                                  size_t table) {
  const OrtApi *api = self->op->owner->api;
  const size_t bytes = temporaries + scratch + table;
  void *block = NULL;
  RETURN_IF_FAILED(api->KernelContext_GetScratchBuffer(context, self->kernel->memory, bytes + ALIGNMENT, &block));
  if (!block)
    return failure(api, ORT_FAIL, "%s: no memory for %zu bytes on the device; run less at once.",
                   self->op->node->name, bytes);
  char *base = (char *)(((uintptr_t)block + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
  place_temporaries(self->op, self->parts, base);
  self->scratch = base + temporaries;
  self->table = self->scratch + scratch;
  OrtStatus *status = write_and_launch(self);
  OrtStatus *freed = api->AllocatorFree(self->kernel->allocator, block);
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
  gpu_kernel *self = kernel;
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
  call call = {.kernel = self, .op = op, .parts = parts, .stream = stream};
  count_memory(op, parts, &scratch, &table);
  const size_t temporaries = place_temporaries(op, parts, NULL);
  if (temporaries + scratch + table) return run_with_memory(&call, context, temporaries, scratch, table);
  return launch_kernels(&call);
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

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
  loaded_kernel *kernels[];    /* of each op of the node, in each stage, for each variant */
} gpu_kernel;

static loaded_kernel **kernels_at(gpu_kernel *self, int32_t op, int32_t stage) {
  return &self->kernels[(op * self->op->stage_count + stage) * self->variant_count];
}

static size_t place_count(const gpu_kernel *self) {
  return (size_t)self->op->node->op_count * (size_t)self->op->stage_count * (size_t)self->variant_count;
}

/* The first op behind those that share their launches with the op at `first`. */
static int32_t run_end(const custom_op *self, int32_t first) {
  const af_op *const *ops = self->node->ops;
  int32_t end = first + 1;
  if (self->gpu->shares)
    while (end < self->node->op_count && ops[end] == ops[first] && end - first < AF_MEMBERS) end++;
  return end;
}

static void destroy_kernel(void *kernel) {
  gpu_kernel *self = kernel;
  for (size_t i = 0; i < place_count(self); i++)
    if (self->kernels[i]) let_go(self->op, self->kernels[i]);
  if (self->writer) let_go(self->op, self->writer);
  if (self->allocator) self->op->owner->api->ReleaseAllocator(self->allocator);
  free(self);
}

/* The kernels of a run stand at the places of its first op; the stitched form is one for all variants. */
static OrtStatus *acquire_kernels(gpu_kernel *self, int device) {
  const custom_op *op = self->op;
  if (op->gpu->shares) RETURN_IF_FAILED(acquire(op, "write", af_writer, device, &self->writer));
  for (int32_t first = 0, end; first < op->node->op_count; first = end) {
    end = run_end(op, first);
    for (int32_t k = 0; k < op->node->ops[first]->kernel_count; k++) {
      const af_launch *launch = &op->gpu->ops[first]->launches[k];
      loaded_kernel **kernels = kernels_at(self, first, k);
      if (end - first > 1) {
        RETURN_IF_FAILED(acquire(op, launch->name, launch->stitched, device, &kernels[0]));
        continue;
      }
      for (int32_t v = 0; v < op->gpu->ops[first]->variant_count; v++)
        RETURN_IF_FAILED(acquire(op, launch->name, launch->binaries[v], device, &kernels[v]));
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

/* Kernels that are one launch, or one that is alone: the kernel number `k` of the ops [first, end). */
typedef struct run {
  int32_t first, end, k;
} run;

/* Goes to the next run, of the first kernels of all ops and then of the second ones, as on the CPU; false behind
 * the last.  The one before the first is all zeros. */
static bool next_run(const custom_op *self, run *run) {
  do {
    run->first = run->end;
    if (run->first == self->node->op_count) {
      run->first = 0;
      if (++run->k == self->stage_count) return false;
    }
    run->end = run_end(self, run->first);
  } while (run->k >= self->node->ops[run->first]->kernel_count);
  return true;
}

static const af_launch *launch_of(const custom_op *self, run run) {
  return &self->gpu->ops[run.first]->launches[run.k];
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
  for (run run = {0}; next_run(self, &run);) {
    const af_launch *launch = launch_of(self, run);
    size_t bytes = 0;
    for (int32_t p = run.first; p < run.end; p++)
      bytes += place_scratch(launch, parts[p].n, programs_of(&parts[p], launch, run.k), NULL, NULL);
    if (bytes > *scratch) *scratch = bytes;
    if (run.end - run.first > 1) values += (run.end - run.first) * (1 + width_of(launch));
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

static OrtStatus *launch_alone(const call *self, run run) {
  const part *part = &self->parts[run.first];
  const af_launch *launch = launch_of(self->op, run);
  const int64_t programs = programs_of(part, launch, run.k);
  const int32_t width = width_of(launch);
  int64_t values[width + 1];
  void *arguments[width + 2];
  if (!programs) return NULL;
  place_arguments(part, launch, programs, self->scratch, values);
  for (int32_t i = 0; i < width; i++) arguments[i] = &values[i];
  const int32_t v = nearest_variant(self->op->gpu->ops[run.first], part->op->symbol_count, part->n);
  return start(self, kernels_at(self->kernel, run.first, run.k)[v], programs, arguments, width);
}

static OrtStatus *launch_stitched(call *self, run run) {
  const af_launch *launch = launch_of(self->op, run);
  int32_t members = run.end - run.first;
  int64_t programs = 0;
  void *table = self->table, *arguments[4] = {&table, &members};
  for (int32_t p = run.first; p < run.end; p++) programs += programs_of(&self->parts[p], launch, run.k);
  self->table += (size_t)(members * (1 + width_of(launch))) * sizeof(int64_t);
  if (!programs) return NULL;
  return start(self, kernels_at(self->kernel, run.first, run.k)[0], programs, arguments, 2);
}

static OrtStatus *launch_kernels(call *self) {
  for (run run = {0}; next_run(self->op, &run);)
    RETURN_IF_FAILED(run.end - run.first > 1 ? launch_stitched(self, run) : launch_alone(self, run));
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

static OrtStatus *put(call *self, written *written, const int64_t *values, int32_t count) {
  for (int32_t i = 0; i < count; i++) {
    written->values[written->count++] = values[i];
    if (written->count == AF_WRITTEN) RETURN_IF_FAILED(write_values(self, written));
  }
  return NULL;
}

/* Where each member begins, then the arguments of each. */
static OrtStatus *put_members(call *self, written *written, run run) {
  const af_launch *launch = launch_of(self->op, run);
  const int32_t width = width_of(launch);
  int64_t begin = 0, values[width + 1];
  char *scratch = self->scratch;
  for (int32_t p = run.first; p < run.end; p++) {
    RETURN_IF_FAILED(put(self, written, &begin, 1));
    begin += programs_of(&self->parts[p], launch, run.k);
  }
  for (int32_t p = run.first; p < run.end; p++) {
    const part *part = &self->parts[p];
    scratch = place_arguments(part, launch, programs_of(part, launch, run.k), scratch, values);
    RETURN_IF_FAILED(put(self, written, values, width));
  }
  return NULL;
}

static OrtStatus *write_tables(call *self) {
  char *table = self->table;
  written written = {.count = 0};
  for (run run = {0}; next_run(self->op, &run);)
    if (run.end - run.first > 1) RETURN_IF_FAILED(put_members(self, &written, run));
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

/* Registers the library's ops (kernel.h) with onnxruntime and runs them on its CPU provider. */
#include "kernel.h"
#include "ort_api.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Enough for every pool to balance its load, and a slot number fits in one word of bits. */
#define MOST_CHUNKS 64
#define ALIGNMENT 64

/* What one copy of onnxruntime was given; it lives until the library is unloaded, since sessions
 * refer to it.  A process may hold several copies of onnxruntime, hence the list. */
typedef struct registration registration;

typedef struct custom_op {
  OrtCustomOp base; /* first, so that a pointer to it is a pointer to the custom_op */
  const af_op *op;
  const registration *owner;
} custom_op;

struct registration {
  registration *next;
  const OrtApi *api;
  OrtCustomOpDomain *domain;
  OrtMemoryInfo *cpu;
  custom_op ops[];
};

static pthread_mutex_t registrations_lock = PTHREAD_MUTEX_INITIALIZER;
static registration *registrations;

#define RETURN_IF_FAILED(call)    \
  do {                            \
    OrtStatus *failure_ = (call); \
    if (failure_) return failure_; \
  } while (0)

__attribute__((format(printf, 3, 4))) static OrtStatus *failure(const OrtApi *api, OrtErrorCode code,
                                                                const char *format, ...) {
  char message[640];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return api->CreateStatus(code, message);
}

/* ------------------------------------------------------------------------------------ the processor */

/* The level of this processor as the x86-64 psABI defines them, counting only what the operating
 * system saves on a context switch. */
static int32_t processor_level(void) {
#if defined(__x86_64__)
  const unsigned v2_ecx = 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23;
  const unsigned v3_ecx = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;
  const unsigned v3_ebx = 1u << 3 | 1u << 5 | 1u << 8;
  const unsigned v4_ebx = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
  unsigned eax, ebx, edx, ecx = 0, extended_ecx = 0, features_ebx = 0, saved = 0;
  __get_cpuid(0x80000001, &eax, &ebx, &extended_ecx, &edx);
  __get_cpuid_count(7, 0, &eax, &features_ebx, &edx, &edx);
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  if ((ecx & v2_ecx) != v2_ecx || !(extended_ecx & 1u)) return 1;
  if ((ecx & v3_ecx) != v3_ecx || (features_ebx & v3_ebx) != v3_ebx || !(extended_ecx & 1u << 5)) return 2;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0)); /* the level holds OSXSAVE */
  if ((saved & 0x06) != 0x06) return 2;                         /* SSE and AVX registers */
  if ((features_ebx & v4_ebx) != v4_ebx || (saved & 0xe6) != 0xe6) return 3;
  return 4;
#else
  return 0;
#endif
}

/* The ops compiled for the highest level that the processor has, or NULL where it has none of them. */
static const af_op *const *fitting_ops(void) {
  const int32_t level = processor_level();
  for (const af_table *table = af_tables; table->ops; table++)
    if (table->level <= level) return table->ops;
  return NULL;
}

/* ---------------------------------------------------------------------------------------- the shapes */

static size_t total_rank(const int32_t *ranks, int32_t count) {
  size_t total = 0;
  for (int32_t i = 0; i < count; i++) total += (size_t)ranks[i];
  return total;
}

/* Points shapes[i] into `dimensions`, which holds one shape after the other. */
static void lay_out(int64_t **shapes, int64_t *dimensions, const int32_t *ranks, int32_t count) {
  for (int32_t i = 0; i < count; dimensions += ranks[i++]) shapes[i] = dimensions;
}

static OrtStatus *read_shape(const custom_op *self, int32_t index, const OrtTensorTypeAndShapeInfo *info,
                             int64_t *shape) {
  const OrtApi *api = self->owner->api;
  const af_op *op = self->op;
  ONNXTensorElementDataType type;
  size_t rank;
  RETURN_IF_FAILED(api->GetTensorElementType(info, &type));
  if (type != op->input_types[index])
    return failure(api, ORT_INVALID_ARGUMENT,
                   "%s: input %d has element type %d, expected %d; feed it the type stated in the model.",
                   op->name, (int)index, (int)type, (int)op->input_types[index]);
  RETURN_IF_FAILED(api->GetDimensionsCount(info, &rank));
  if (rank != (size_t)op->input_ranks[index])
    return failure(api, ORT_INVALID_ARGUMENT,
                   "%s: input %d has %zu dimensions, expected %d; feed it the rank stated in the model.",
                   op->name, (int)index, rank, (int)op->input_ranks[index]);
  return api->GetDimensions(info, shape, rank);
}

/* Gives the outputs their shapes while a model is loaded, where every input extent is known.
 * What does not fit is left alone here, and refused when it runs. */
static OrtStatus *infer_shapes(const OrtCustomOp *base, OrtShapeInferContext *context) {
  const custom_op *self = (const custom_op *)base;
  const OrtApi *api = self->owner->api;
  const af_op *op = self->op;
  int64_t dimensions[total_rank(op->input_ranks, op->input_count) + 1];
  int64_t output_dimensions[total_rank(op->output_ranks, op->output_count) + 1];
  int64_t *shapes[op->input_count + 1], *output_shapes[op->output_count + 1], n[op->symbol_count + 1];
  char message[256];
  lay_out(shapes, dimensions, op->input_ranks, op->input_count);
  lay_out(output_shapes, output_dimensions, op->output_ranks, op->output_count);
  for (int32_t i = 0; i < op->input_count; i++) {
    OrtTensorTypeAndShapeInfo *info = NULL;
    OrtStatus *status = api->ShapeInferContext_GetInputTypeShape(context, (size_t)i, &info);
    if (!status && info) status = read_shape(self, i, info, shapes[i]);
    if (status) api->ReleaseStatus(status);
    if (status || !info) return NULL;
    for (int32_t d = 0; d < op->input_ranks[i]; d++)
      if (shapes[i][d] < 0) return NULL;
  }
  if (op->bind((const int64_t *const *)shapes, NULL, n, message, sizeof message)) return NULL;
  op->output_shapes(n, output_shapes);
  for (int32_t i = 0; i < op->output_count; i++) {
    OrtTensorTypeAndShapeInfo *info;
    RETURN_IF_FAILED(api->CreateTensorTypeAndShapeInfo(&info));
    OrtStatus *status = api->SetTensorElementType(info, op->output_types[i]);
    if (!status) status = api->SetDimensions(info, output_shapes[i], (size_t)op->output_ranks[i]);
    if (!status) status = api->ShapeInferContext_SetOutputTypeShape(context, (size_t)i, info);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
  }
  return NULL;
}

/* --------------------------------------------------------------------------------------- the running */

/* One kernel cut into chunks of its grid.  A chunk takes the lowest free slot of scratch, so that the
 * memory touched is what the running threads need and stays in their caches. */
typedef struct launch {
  const af_kernel *kernel;
  void *const *buffers;
  const int64_t *n;
  int64_t items, chunks;
  char *scratch;
  size_t slot_bytes;
  _Atomic uint64_t slots_taken;
} launch;

static size_t aligned(int64_t bytes) { return ((size_t)bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1); }

static int64_t chunk_count(const af_kernel *kernel, const int64_t *n, int64_t items) {
  int64_t chunks = items / kernel->grain(n);
  return chunks < 1 ? 1 : chunks > MOST_CHUNKS ? MOST_CHUNKS : chunks;
}

static void run_chunk(void *data, size_t index) {
  launch *self = data;
  const int64_t each = self->items / self->chunks, more = self->items % self->chunks, at = (int64_t)index;
  const int64_t begin = at * each + (at < more ? at : more), end = begin + each + (at < more);
  if (!self->slot_bytes) {
    self->kernel->run(self->buffers, self->n, NULL, begin, end);
    return;
  }
  uint64_t taken = atomic_load(&self->slots_taken), slot;
  do slot = ~taken & (taken + 1);
  while (!atomic_compare_exchange_weak(&self->slots_taken, &taken, taken | slot));
  self->kernel->run(self->buffers, self->n, self->scratch + (size_t)__builtin_ctzll(slot) * self->slot_bytes,
                    begin, end);
  atomic_fetch_and(&self->slots_taken, ~slot);
}

static OrtStatus *run_kernels(const custom_op *self, OrtKernelContext *context, void *const *buffers,
                              const int64_t *n, char *scratch) {
  for (int32_t k = 0; k < self->op->kernel_count; k++) {
    const af_kernel *kernel = self->op->kernels[k];
    launch launch = {.kernel = kernel, .buffers = buffers, .n = n, .items = kernel->grid(n), .scratch = scratch};
    if (launch.items <= 0) continue;
    launch.chunks = chunk_count(kernel, n, launch.items);
    launch.slot_bytes = aligned(kernel->scratch(n));
    if (launch.chunks == 1)
      run_chunk(&launch, 0);
    else
      RETURN_IF_FAILED(self->owner->api->KernelContext_ParallelFor(context, run_chunk, (size_t)launch.chunks, 0,
                                                                   &launch));
  }
  return NULL;
}

/* Places the temporaries in `buffers` as offsets; returns the bytes they and the scratch need. */
static size_t plan_memory(const af_op *op, const int64_t *n, size_t *offsets, size_t *scratch_offset) {
  int64_t bytes[op->temporary_count + 1];
  size_t total = 0, most_scratch = 0;
  op->temporary_bytes(n, bytes);
  for (int32_t i = 0; i < op->temporary_count; i++) {
    offsets[i] = total;
    total += aligned(bytes[i]);
  }
  for (int32_t k = 0; k < op->kernel_count; k++) {
    const int64_t items = op->kernels[k]->grid(n);
    if (items <= 0) continue;
    const size_t scratch = aligned(op->kernels[k]->scratch(n)) * (size_t)chunk_count(op->kernels[k], n, items);
    if (scratch > most_scratch) most_scratch = scratch;
  }
  *scratch_offset = total;
  return total + most_scratch;
}

static OrtStatus *bind_inputs(const custom_op *self, OrtKernelContext *context, void **buffers, int64_t *n) {
  const OrtApi *api = self->owner->api;
  const af_op *op = self->op;
  int64_t dimensions[total_rank(op->input_ranks, op->input_count) + 1], *shapes[op->input_count + 1];
  char sentence[512] = "";
  lay_out(shapes, dimensions, op->input_ranks, op->input_count);
  for (int32_t i = 0; i < op->input_count; i++) {
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *info;
    RETURN_IF_FAILED(api->KernelContext_GetInput(context, (size_t)i, &value));
    if (!value)
      return failure(api, ORT_INVALID_ARGUMENT, "%s: input %d is missing, expected a tensor; connect it.",
                     op->name, (int)i);
    RETURN_IF_FAILED(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = read_shape(self, i, info, shapes[i]);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    RETURN_IF_FAILED(api->GetTensorMutableData((OrtValue *)value, &buffers[i])); /* only ever read */
  }
  if (op->bind((const int64_t *const *)shapes, buffers, n, sentence, sizeof sentence))
    return failure(api, ORT_INVALID_ARGUMENT, "%s: %s", op->name, sentence);
  if (op->check(buffers, n, sentence, sizeof sentence))
    return failure(api, ORT_INVALID_ARGUMENT, "%s: %s", op->name, sentence);
  return NULL;
}

static OrtStatus *allocate_outputs(const custom_op *self, OrtKernelContext *context, void **buffers,
                                   const int64_t *n) {
  const OrtApi *api = self->owner->api;
  const af_op *op = self->op;
  int64_t dimensions[total_rank(op->output_ranks, op->output_count) + 1], *shapes[op->output_count + 1];
  lay_out(shapes, dimensions, op->output_ranks, op->output_count);
  op->output_shapes(n, shapes);
  for (int32_t i = 0; i < op->output_count; i++) {
    OrtValue *value;
    RETURN_IF_FAILED(
        api->KernelContext_GetOutput(context, (size_t)i, shapes[i], (size_t)op->output_ranks[i], &value));
    RETURN_IF_FAILED(api->GetTensorMutableData(value, &buffers[i]));
  }
  return NULL;
}

/* Temporaries and scratch come from the session's own arena: a run pays no page faults for them. */
static OrtStatus *compute_with_memory(const custom_op *self, OrtKernelContext *context, void **buffers,
                                      const int64_t *n, const size_t *offsets, size_t scratch_offset,
                                      size_t bytes) {
  const OrtApi *api = self->owner->api;
  void **temporaries = buffers + self->op->input_count + self->op->output_count;
  OrtAllocator *allocator;
  void *block = NULL;
  RETURN_IF_FAILED(api->KernelContext_GetAllocator(context, self->owner->cpu, &allocator));
  OrtStatus *status = api->AllocatorAlloc(allocator, bytes + ALIGNMENT, &block);
  if (!status && !block)
    status = failure(api, ORT_FAIL, "%s: no memory for %zu bytes of temporaries; free some or run less at once.",
                     self->op->name, bytes);
  if (!status) {
    char *base = (char *)(((uintptr_t)block + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
    for (int32_t i = 0; i < self->op->temporary_count; i++) temporaries[i] = base + offsets[i];
    status = run_kernels(self, context, buffers, n, base + scratch_offset);
    OrtStatus *freed = api->AllocatorFree(allocator, block);
    if (freed) api->ReleaseStatus(freed);
  }
  api->ReleaseAllocator(allocator);
  return status;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const custom_op *self = kernel;
  const af_op *op = self->op;
  void *buffers[op->input_count + op->output_count + op->temporary_count + 1];
  int64_t n[op->symbol_count + 1];
  size_t offsets[op->temporary_count + 1], scratch_offset;
  RETURN_IF_FAILED(bind_inputs(self, context, buffers, n));
  RETURN_IF_FAILED(allocate_outputs(self, context, buffers + op->input_count, n));
  const size_t bytes = plan_memory(op, n, offsets, &scratch_offset);
  if (bytes) return compute_with_memory(self, context, buffers, n, offsets, scratch_offset, bytes);
  for (int32_t i = 0; i < op->temporary_count; i++) buffers[op->input_count + op->output_count + i] = NULL;
  return run_kernels(self, context, buffers, n, NULL);
}

/* ---------------------------------------------------------------------------------- the registration */

static const af_op *op_of(const OrtCustomOp *base) { return ((const custom_op *)base)->op; }

static const char *get_name(const OrtCustomOp *base) { return op_of(base)->name; }
static const char *get_provider(const OrtCustomOp *base) { return (void)base, "CPUExecutionProvider"; }
static size_t get_input_count(const OrtCustomOp *base) { return (size_t)op_of(base)->input_count; }
static size_t get_output_count(const OrtCustomOp *base) { return (size_t)op_of(base)->output_count; }
static int get_one(const OrtCustomOp *base) { return (void)base, 1; }
static int get_last_version(const OrtCustomOp *base) { return (void)base, INT32_MAX; }

static ONNXTensorElementDataType get_input_type(const OrtCustomOp *base, size_t index) {
  return op_of(base)->input_types[index];
}

static ONNXTensorElementDataType get_output_type(const OrtCustomOp *base, size_t index) {
  return op_of(base)->output_types[index];
}

static OrtCustomOpInputOutputCharacteristic get_characteristic(const OrtCustomOp *base, size_t index) {
  return (void)base, (void)index, INPUT_OUTPUT_REQUIRED;
}

static OrtMemType get_memory_type(const OrtCustomOp *base, size_t index) {
  return (void)base, (void)index, OrtMemTypeDefault;
}

/* A kernel has no state of its own: it is its op. */
static OrtStatus *create_kernel(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info,
                                void **kernel) {
  (void)api, (void)info;
  *kernel = (void *)base;
  return NULL;
}

static void destroy_kernel(void *kernel) { (void)kernel; }

static const OrtCustomOp interface = {
    .version = ORT_API_VERSION,
    .GetName = get_name,
    .GetExecutionProviderType = get_provider,
    .GetInputType = get_input_type,
    .GetInputTypeCount = get_input_count,
    .GetOutputType = get_output_type,
    .GetOutputTypeCount = get_output_count,
    .KernelDestroy = destroy_kernel,
    .GetInputCharacteristic = get_characteristic,
    .GetOutputCharacteristic = get_characteristic,
    .GetInputMemoryType = get_memory_type,
    .GetVariadicInputMinArity = get_one,
    .GetVariadicInputHomogeneity = get_one,
    .GetVariadicOutputMinArity = get_one,
    .GetVariadicOutputHomogeneity = get_one,
    .CreateKernelV2 = create_kernel,
    .KernelComputeV2 = compute,
    .InferOutputShapeFn = infer_shapes,
    .GetStartVersion = get_one,
    .GetEndVersion = get_last_version,
};

static void release(registration *self) {
  if (self->domain) self->api->ReleaseCustomOpDomain(self->domain);
  if (self->cpu) self->api->ReleaseMemoryInfo(self->cpu);
  free(self);
}

static OrtStatus *fill(registration *self, const af_op *const *ops, size_t count) {
  const OrtApi *api = self->api;
  RETURN_IF_FAILED(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &self->cpu));
  RETURN_IF_FAILED(api->CreateCustomOpDomain("apollo_fuse", &self->domain));
  for (size_t i = 0; i < count; i++) {
    self->ops[i] = (custom_op){.base = interface, .op = ops[i], .owner = self};
    RETURN_IF_FAILED(api->CustomOpDomain_Add(self->domain, &self->ops[i].base));
  }
  return NULL;
}

/* The one registration with this copy of onnxruntime, made on the first call. */
static OrtStatus *registration_for(const OrtApi *api, const af_op *const *ops, registration **out) {
  size_t count = 0;
  for (*out = registrations; *out; *out = (*out)->next)
    if ((*out)->api == api) return NULL;
  while (ops[count]) count++;
  registration *made = calloc(1, sizeof *made + count * sizeof made->ops[0]);
  if (!made) return api->CreateStatus(ORT_FAIL, "apollo_fuse: no memory to register its ops; free some.");
  made->api = api;
  OrtStatus *status = fill(made, ops, count);
  if (status) {
    release(made);
    return status;
  }
  made->next = registrations;
  *out = registrations = made;
  return NULL;
}

/* onnxruntime unloads the library with the last session that uses it. */
__attribute__((destructor)) static void release_all(void) {
  for (registration *next; registrations; registrations = next) {
    next = registrations->next;
    release(registrations);
  }
}

/* Registers nothing where the processor or the runtime is too old for the kernels: the model then runs
 * through the functions that it carries. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
  const af_op *const *ops = fitting_ops();
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (!ops || !api) return NULL;
  registration *found;
  pthread_mutex_lock(&registrations_lock);
  OrtStatus *status = registration_for(api, ops, &found);
  pthread_mutex_unlock(&registrations_lock);
  return status ? status : api->AddCustomOpDomain(options, found->domain);
}

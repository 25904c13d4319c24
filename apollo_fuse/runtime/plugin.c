/* Registers the library's nodes (kernel.h) with onnxruntime, on its CPU provider and, where the library holds
 * kernels for the GPU at hand, on that GPU's providers. */
#include "op.h"

#ifdef AF_GPU
#include "gpu.h"
#define OPS_OF_A_NODE 4 /* one for the CPU, and one for each of gpu_providers */
#else
#define OPS_OF_A_NODE 1
#endif

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static pthread_mutex_t registrations_lock = PTHREAD_MUTEX_INITIALIZER;
static registration *registrations;

OrtStatus *failure(const OrtApi *api, OrtErrorCode code, const char *format, ...) {
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

/* The nodes compiled for the highest level that the processor has, or NULL where it has none of them. */
static const af_node *const *fitting_nodes(void) {
  const int32_t level = processor_level();
  for (const af_table *table = af_tables; table->nodes; table++)
    if (table->level <= level) return table->nodes;
  return NULL;
}

/* ---------------------------------------------------------------------------------------- the shapes */

OrtStatus *check_kind(const custom_op *self, int32_t index, ONNXTensorElementDataType type, size_t rank) {
  const OrtApi *api = self->owner->api;
  const tensor_kind expected = self->inputs[index];
  if (type != expected.type)
    return failure(api, ORT_INVALID_ARGUMENT,
                   "%s: input %d has element type %d, expected %d; feed it the type stated in the model.",
                   self->node->name, (int)index, (int)type, (int)expected.type);
  if (rank != (size_t)expected.rank)
    return failure(api, ORT_INVALID_ARGUMENT,
                   "%s: input %d has %zu dimensions, expected %d; feed it the rank stated in the model.",
                   self->node->name, (int)index, rank, (int)expected.rank);
  return NULL;
}

OrtStatus *read_shape(const custom_op *self, int32_t index, const OrtTensorTypeAndShapeInfo *info,
                      int64_t *shape) {
  const OrtApi *api = self->owner->api;
  ONNXTensorElementDataType type;
  size_t rank;
  RETURN_IF_FAILED(api->GetTensorElementType(info, &type));
  RETURN_IF_FAILED(api->GetDimensionsCount(info, &rank));
  RETURN_IF_FAILED(check_kind(self, index, type, rank));
  return api->GetDimensions(info, shape, rank);
}

/* Whether every extent of an input is known while the model is loaded; then `shape` holds them. */
static bool knows_shape(const custom_op *self, OrtShapeInferContext *context, int32_t index, int64_t *shape) {
  const OrtApi *api = self->owner->api;
  OrtTensorTypeAndShapeInfo *info = NULL;
  OrtStatus *status = api->ShapeInferContext_GetInputTypeShape(context, (size_t)index, &info);
  if (!status && info) status = read_shape(self, index, info, shape);
  if (status) api->ReleaseStatus(status);
  if (status || !info) return false;
  for (int32_t d = 0; d < self->inputs[index].rank; d++)
    if (shape[d] < 0) return false;
  return true;
}

static OrtStatus *set_shape(const custom_op *self, OrtShapeInferContext *context, int32_t index,
                            const int64_t *shape) {
  const OrtApi *api = self->owner->api;
  const tensor_kind kind = self->outputs[index];
  OrtTensorTypeAndShapeInfo *info;
  RETURN_IF_FAILED(api->CreateTensorTypeAndShapeInfo(&info));
  OrtStatus *status = api->SetTensorElementType(info, kind.type);
  if (!status) status = api->SetDimensions(info, shape, (size_t)kind.rank);
  if (!status) status = api->ShapeInferContext_SetOutputTypeShape(context, (size_t)index, info);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

/* The same for one op of the node, whose inputs are at `places` and whose outputs begin at `output`.
 * What does not fit is left alone here, and refused when it runs. */
static OrtStatus *infer_op(const custom_op *self, OrtShapeInferContext *context, const af_op *op,
                           const int32_t *places, int32_t output) {
  int64_t inputs[self->input_dimensions + 1], outputs[self->output_dimensions + 1], n[op->symbol_count + 1];
  int64_t *shapes[op->input_count + 1], *output_shapes[op->output_count + 1], *next = inputs;
  char message[256];
  for (int32_t i = 0; i < op->input_count; next += op->input_ranks[i++]) {
    shapes[i] = next;
    if (!knows_shape(self, context, places[i], shapes[i])) return NULL;
  }
  next = outputs;
  for (int32_t i = 0; i < op->output_count; next += op->output_ranks[i++]) output_shapes[i] = next;
  if (op->bind((const int64_t *const *)shapes, NULL, n, message, sizeof message)) return NULL;
  op->output_shapes(n, output_shapes);
  for (int32_t i = 0; i < op->output_count; i++)
    RETURN_IF_FAILED(set_shape(self, context, output + i, output_shapes[i]));
  return NULL;
}

/* Gives the outputs their shapes while a model is loaded, where every input extent is known. */
static OrtStatus *infer_shapes(const OrtCustomOp *base, OrtShapeInferContext *context) {
  const custom_op *self = (const custom_op *)base;
  const int32_t *places = self->node->inputs;
  int32_t output = 0;
  for (int32_t p = 0; p < self->node->op_count; p++) {
    const af_op *op = self->node->ops[p];
    RETURN_IF_FAILED(infer_op(self, context, op, places, output));
    places += op->input_count;
    output += op->output_count;
  }
  return NULL;
}

/* ---------------------------------------------------------------------------------- the registration */

static const custom_op *own(const OrtCustomOp *base) { return (const custom_op *)base; }

static const char *get_name(const OrtCustomOp *base) { return own(base)->node->name; }
static const char *get_provider(const OrtCustomOp *base) { return (void)base, "CPUExecutionProvider"; }
static size_t get_input_count(const OrtCustomOp *base) { return (size_t)own(base)->node->input_count; }
static size_t get_output_count(const OrtCustomOp *base) { return (size_t)own(base)->output_count; }
static int get_one(const OrtCustomOp *base) { return (void)base, 1; }
static int get_last_version(const OrtCustomOp *base) { return (void)base, INT32_MAX; }

static ONNXTensorElementDataType get_input_type(const OrtCustomOp *base, size_t index) {
  return own(base)->inputs[index].type;
}

static ONNXTensorElementDataType get_output_type(const OrtCustomOp *base, size_t index) {
  return own(base)->outputs[index].type;
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

static OrtStatus *no_memory(const OrtApi *api) {
  return api->CreateStatus(ORT_FAIL, "apollo_fuse: no memory to register its ops; free some.");
}

static void release(registration *self) {
  if (self->domain) self->api->ReleaseCustomOpDomain(self->domain);
  if (self->cpu) self->api->ReleaseMemoryInfo(self->cpu);
  free(self->kinds);
  free(self);
}

static int32_t sum(const int32_t *numbers, int32_t count) {
  int32_t total = 0;
  for (int32_t i = 0; i < count; i++) total += numbers[i];
  return total;
}

static size_t tensor_count(const af_node *node) {
  size_t count = (size_t)node->input_count;
  for (int32_t p = 0; p < node->op_count; p++) count += (size_t)node->ops[p]->output_count;
  return count;
}

/* The op with the kinds of its tensors, which it writes to `kinds`, and its totals. */
static custom_op describe(const af_node *node, const registration *owner, tensor_kind *kinds) {
  custom_op self = {.base = interface, .node = node, .owner = owner, .inputs = kinds};
  const int32_t *place = node->inputs;
  tensor_kind *output = kinds + node->input_count;
  self.outputs = output;
  for (int32_t p = 0; p < node->op_count; p++) {
    const af_op *op = node->ops[p];
    for (int32_t i = 0; i < op->input_count; i++)
      kinds[*place++] = (tensor_kind){op->input_types[i], op->input_ranks[i]};
    for (int32_t i = 0; i < op->output_count; i++)
      *output++ = (tensor_kind){op->output_types[i], op->output_ranks[i]};
    self.output_count += op->output_count;
    self.buffer_count += op->input_count + op->output_count + op->temporary_count;
    self.symbol_count += op->symbol_count;
    self.kernel_count += op->kernel_count;
    if (op->kernel_count > self.stage_count) self.stage_count = op->kernel_count;
    self.input_dimensions += sum(op->input_ranks, op->input_count);
    self.output_dimensions += sum(op->output_ranks, op->output_count);
  }
  return self;
}

static OrtStatus *fill(registration *self, const af_node *const *nodes, size_t count) {
  const OrtApi *api = self->api;
  size_t tensors = 1;
  for (size_t i = 0; i < count; i++) tensors += tensor_count(nodes[i]);
  self->kinds = calloc(tensors, sizeof *self->kinds);
  if (!self->kinds) return no_memory(api);
  RETURN_IF_FAILED(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &self->cpu));
  RETURN_IF_FAILED(api->CreateCustomOpDomain("apollo_fuse", &self->domain));
  tensor_kind *kinds = self->kinds;
  for (size_t i = 0; i < count; kinds += tensor_count(nodes[i++])) {
    self->ops[i] = describe(nodes[i], self, kinds);
    RETURN_IF_FAILED(api->CustomOpDomain_Add(self->domain, &self->ops[i].base));
  }
  return NULL;
}

#ifdef AF_GPU
static const struct {
  platform platform;
  const char *name;
} gpu_providers[OPS_OF_A_NODE - 1] = {
    {CUDA, "CUDAExecutionProvider"},
    {HIP, "ROCMExecutionProvider"},
    {HIP, "MIGraphXExecutionProvider"},
};

static bool has_provider(const OrtApi *api, const char *name) {
  char **names;
  int count;
  bool found = false;
  OrtStatus *status = api->GetAvailableProviders(&names, &count);
  if (!status) {
    for (int i = 0; i < count; i++) found |= !strcmp(names[i], name);
    status = api->ReleaseAvailableProviders(names, count);
  }
  if (status) api->ReleaseStatus(status);
  return found;
}

/* Registers the nodes once more for each provider of GPUs whose driver has one that they were compiled for.  The
 * driver of a provider that onnxruntime does not have is left alone: starting one takes time, and a process that
 * has started CUDA cannot fork and go on with it. */
static OrtStatus *add_gpu_ops(registration *self, const af_node *const *nodes, size_t count) {
  custom_op *op = &self->ops[count];
  for (size_t p = 0; p < OPS_OF_A_NODE - 1; p++) {
    if (!has_provider(self->api, gpu_providers[p].name)) continue;
    const driver *driver = start_driver(gpu_providers[p].platform);
    for (size_t i = 0; driver && i < count; i++) {
      if (!runs_on_gpu(nodes[i], &af_gpu_nodes[i], driver)) continue;
      *op = self->ops[i];
      move_to_gpu(op, &af_gpu_nodes[i], driver, gpu_providers[p].name);
      RETURN_IF_FAILED(self->api->CustomOpDomain_Add(self->domain, &op++->base));
    }
  }
  return NULL;
}
#endif

/* onnxruntime complains on stderr of a version that it does not have yet, hence the comparison. */
static bool has_references(const OrtApiBase *base) {
  int minor = 0;
  if (sscanf(base->GetVersionString(), "1.%d", &minor) != 1) return false;
  return minor >= ORT_API_VERSION_OF_REFERENCES; /* the version 1.N has the API of version N */
}

/* The one registration with this copy of onnxruntime, made on the first call. */
static OrtStatus *registration_for(const OrtApiBase *base, const OrtApi *api, const af_node *const *nodes,
                                   registration **out) {
  size_t count = 0;
  for (*out = registrations; *out; *out = (*out)->next)
    if ((*out)->api == api) return NULL;
  while (nodes[count]) count++;
  registration *made = calloc(1, sizeof *made + OPS_OF_A_NODE * count * sizeof made->ops[0]);
  if (!made) return no_memory(api);
  made->api = api;
  made->has_references = has_references(base);
  OrtStatus *status = fill(made, nodes, count);
#ifdef AF_GPU
  if (!status && base->GetApi(ORT_API_VERSION_OF_DEVICE_MEMORY)) status = add_gpu_ops(made, nodes, count);
#endif
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
  const af_node *const *nodes = fitting_nodes();
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (!nodes || !api) return NULL;
  registration *found;
  pthread_mutex_lock(&registrations_lock);
  OrtStatus *status = registration_for(base, api, nodes, &found);
  pthread_mutex_unlock(&registrations_lock);
  return status ? status : api->AddCustomOpDomain(options, found->domain);
}

/* Stands between onnxruntime and a library of ours, as if the CPU's memory were that of a provider of GPUs.
 *
 * The library's ops for that provider become ops for the CPU's, and those for the CPU are kept back unless the test
 * wants both; those for any other are kept back.  Streams are those of the stub driver, and scratch is watched for
 * what is written around it. */
#include "ort_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define MARGIN 64
#define FILL 0xA5

/* What the test sets. */
char library[1024], provider[64];
int registers_cpu_ops, has_providers;
void *streams[4];
/* What the test reads. */
int cpu_ops, gpu_ops, other_ops, blocks_given, blocks_back, blocks_spoilt;
char memory_types[4096]; /* of the inputs of each op for the provider: d or h, and a space behind each op */

typedef struct block {
  struct block *next;
  size_t bytes;
  unsigned char memory[];
} block;

static block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const OrtApi *real;
static OrtApi changed;
static _Thread_local int device; /* of the sessions and runs of this thread */

void use_device(int number) { device = number; }

static const char *cpu_provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }

static OrtStatus *add(OrtCustomOpDomain *domain, const OrtCustomOp *op) {
  if (!strcmp(op->GetExecutionProviderType(op), "CPUExecutionProvider")) {
    cpu_ops++;
    return registers_cpu_ops ? real->CustomOpDomain_Add(domain, op) : NULL;
  }
  if (strcmp(op->GetExecutionProviderType(op), provider)) return other_ops++, NULL;
  gpu_ops++;
  char *types = memory_types + strlen(memory_types);
  for (size_t i = 0; i < op->GetInputTypeCount(op) && types < memory_types + sizeof memory_types - 2; i++)
    *types++ = op->GetInputMemoryType(op, i) == OrtMemTypeDefault ? 'd' : 'h';
  *types++ = ' ';
  if (!registers_cpu_ops) ((OrtCustomOp *)op)->GetExecutionProviderType = cpu_provider;
  return real->CustomOpDomain_Add(domain, op);
}

/* The CPU's memory has the number 0, and its ops have no stream; onnxruntime is asked so that the entries are seen
 * to be what they are taken for. */
static OrtStatus *get_id(const OrtMemoryInfo *info, int *id) {
  OrtStatus *status = real->MemoryInfoGetId(info, id);
  if (!status && *id) abort();
  return *id = device, status;
}

static OrtStatus *get_stream(const OrtKernelContext *context, void **stream) {
  OrtStatus *status = real->KernelContext_GetGPUComputeStream(context, stream);
  if (!status && *stream) abort();
  return *stream = streams[device], status;
}

static OrtStatus *get_scratch(const OrtKernelContext *context, const OrtMemoryInfo *info, size_t bytes, void **out) {
  (void)context, (void)info;
  block *made = malloc(sizeof *made + bytes + 2 * MARGIN);
  made->bytes = bytes;
  memset(made->memory, FILL, bytes + 2 * MARGIN);
  pthread_mutex_lock(&lock);
  made->next = blocks;
  blocks = made;
  blocks_given++;
  pthread_mutex_unlock(&lock);
  return *out = made->memory + MARGIN, NULL;
}

static OrtStatus *give_back(OrtAllocator *allocator, void *memory) {
  pthread_mutex_lock(&lock);
  block **place = &blocks, *found;
  while (*place && (*place)->memory + MARGIN != (unsigned char *)memory) place = &(*place)->next;
  if ((found = *place)) {
    *place = found->next;
    blocks_back++;
    for (size_t i = 0; i < MARGIN; i++)
      blocks_spoilt += found->memory[i] != FILL || found->memory[MARGIN + found->bytes + i] != FILL;
  }
  pthread_mutex_unlock(&lock);
  free(found);
  return found ? NULL : real->AllocatorFree(allocator, memory);
}

static OrtStatus *get_providers(char ***names, int *count) {
  static char *all[] = {"CPUExecutionProvider", "CUDAExecutionProvider", "ROCMExecutionProvider",
                        "MIGraphXExecutionProvider"};
  return *names = all, *count = has_providers ? 4 : 1, NULL;
}

static OrtStatus *release_providers(char **names, int count) { return (void)names, (void)count, NULL; }

static const OrtApiBase *real_base;

static const OrtApi *get_api(uint32_t version) { return real_base->GetApi(version) ? &changed : NULL; }

static const char *get_version(void) { return real_base->GetVersionString(); }

/* Once: sessions of other threads call what it holds. */
static void change(void) {
  real = real_base->GetApi(ORT_API_VERSION);
  changed = *real;
  changed.CustomOpDomain_Add = add;
  changed.GetAvailableProviders = get_providers;
  changed.ReleaseAvailableProviders = release_providers;
  changed.MemoryInfoGetId = get_id;
  changed.KernelContext_GetGPUComputeStream = get_stream;
  changed.KernelContext_GetScratchBuffer = get_scratch;
  changed.AllocatorFree = give_back;
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
  static const OrtApiBase own = {get_api, get_version};
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  real_base = base; /* of all sessions */
  pthread_once(&once, change);
  void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  OrtStatus *(*registers)(OrtSessionOptions *, const OrtApiBase *) = NULL;
  if (handle) *(void **)&registers = dlsym(handle, "RegisterCustomOps");
  return registers ? registers(options, &own) : real->CreateStatus(ORT_FAIL, dlerror());
}

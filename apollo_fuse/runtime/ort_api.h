/* The slice of onnxruntime's C API that the plugin uses, declared by hand.
 *
 * onnxruntime's wheel ships no headers.  Its API table is append-only: an entry keeps its ordinal in
 * every later release, so that the entries used here and their ordinals are all that is needed. */
#ifndef APOLLO_FUSE_ORT_API_H
#define APOLLO_FUSE_ORT_API_H

#include <stddef.h>
#include <stdint.h>

/* The first version that has every entry below but those of the next two (shape inference and ParallelFor came
 * with it). */
#define ORT_API_VERSION 17
/* The first that has the memory of devices, for kernels on GPUs. */
#define ORT_API_VERSION_OF_DEVICE_MEMORY 18
/* The first that has the last entry too. */
#define ORT_API_VERSION_OF_REFERENCES 24

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtCustomOp OrtCustomOp;

typedef enum { ORT_OK, ORT_FAIL, ORT_INVALID_ARGUMENT } OrtErrorCode;
typedef enum { OrtDeviceAllocator, OrtArenaAllocator } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
#define OrtMemTypeCPUInput ((OrtMemType)-2) /* of the same enum in the original */
typedef enum { INPUT_OUTPUT_REQUIRED = 0 } OrtCustomOpInputOutputCharacteristic;
typedef int ONNXTensorElementDataType; /* an enum in the original, with the values of af_op's types */

#define ORT_GAP(first, last) void (*entries_##first##_to_##last[last - first + 1])(void)

typedef struct OrtApi {
  OrtStatus *(*CreateStatus)(OrtErrorCode, const char *message);
  ORT_GAP(1, 25);
  OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **);
  OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *);
  OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *);
  ORT_GAP(29, 50);
  OrtStatus *(*GetTensorMutableData)(OrtValue *, void **);
  ORT_GAP(52, 56);
  OrtStatus *(*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo **);
  OrtStatus *(*SetTensorElementType)(OrtTensorTypeAndShapeInfo *, ONNXTensorElementDataType);
  OrtStatus *(*SetDimensions)(OrtTensorTypeAndShapeInfo *, const int64_t *dimensions, size_t count);
  OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *, ONNXTensorElementDataType *);
  OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *, size_t *);
  OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *, int64_t *dimensions, size_t count);
  ORT_GAP(63, 64);
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **);
  ORT_GAP(66, 68);
  OrtStatus *(*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo **);
  ORT_GAP(70, 71);
  OrtStatus *(*MemoryInfoGetId)(const OrtMemoryInfo *, int *);
  ORT_GAP(73, 74);
  OrtStatus *(*AllocatorAlloc)(OrtAllocator *, size_t bytes, void **);
  OrtStatus *(*AllocatorFree)(OrtAllocator *, void *);
  /* The memory info belongs to the allocator. */
  OrtStatus *(*AllocatorGetInfo)(const OrtAllocator *, const OrtMemoryInfo **);
  ORT_GAP(78, 89);
  OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *, size_t index, const OrtValue **);
  OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *, size_t index, const int64_t *dimensions,
                                        size_t count, OrtValue **);
  ORT_GAP(92, 92);
  void (*ReleaseStatus)(OrtStatus *);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo *);
  ORT_GAP(95, 98);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *);
  ORT_GAP(100, 100);
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *);
  ORT_GAP(102, 124);
  /* The names of what this copy of onnxruntime was built with. */
  OrtStatus *(*GetAvailableProviders)(char ***names, int *count);
  OrtStatus *(*ReleaseAvailableProviders)(char **names, int count);
  ORT_GAP(127, 131);
  void (*ReleaseAllocator)(OrtAllocator *);
  ORT_GAP(133, 192);
  OrtStatus *(*KernelContext_GetGPUComputeStream)(const OrtKernelContext *, void **stream);
  ORT_GAP(194, 252);
  OrtStatus *(*KernelContext_GetAllocator)(const OrtKernelContext *, const OrtMemoryInfo *, OrtAllocator **);
  ORT_GAP(254, 267);
  /* The context keeps the ownership of what this returns. */
  OrtStatus *(*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext *, size_t index,
                                                    OrtTensorTypeAndShapeInfo **);
  ORT_GAP(269, 269);
  OrtStatus *(*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext *, size_t index,
                                                     const OrtTensorTypeAndShapeInfo *);
  ORT_GAP(271, 273);
  OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *, void (*task)(void *data, size_t index),
                                          size_t total, size_t batches, void *data);
  ORT_GAP(275, 276);
  /* Memory that is the stream's until AllocatorFree gives it back, which may be before the stream is done. */
  OrtStatus *(*KernelContext_GetScratchBuffer)(const OrtKernelContext *, const OrtMemoryInfo *, size_t bytes,
                                               void **);
  OrtStatus *(*KernelInfoGetAllocator)(const OrtKernelInfo *, OrtMemType, OrtAllocator **);
  ORT_GAP(279, 413);
  /* The shape belongs to the value. */
  OrtStatus *(*GetTensorElementTypeAndShapeDataReference)(const OrtValue *, ONNXTensorElementDataType *,
                                                          const int64_t **dimensions, size_t *count);
} OrtApi;

_Static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, MemoryInfoGetId) == 72 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, AllocatorGetInfo) == 77 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, KernelContext_GetOutput) == 91 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, GetAvailableProviders) == 125 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, ReleaseAllocator) == 132 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, KernelContext_GetGPUComputeStream) == 193 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, KernelInfoGetAllocator) == 278 * sizeof(void *), "ordinal");
_Static_assert(offsetof(OrtApi, GetTensorElementTypeAndShapeDataReference) == 414 * sizeof(void *), "ordinal");

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

/* As of version 17; onnxruntime reads no later field of an op that states this version. */
struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp *, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
};

#endif

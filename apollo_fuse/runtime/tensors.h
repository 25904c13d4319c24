/* Binds the tensors of a custom op in one call, the same wherever its kernels run.
 *
 * Who includes it defines CHECKS_INDICES: whether index tensors can be looked through before anything runs. */
#ifndef APOLLO_FUSE_TENSORS_H
#define APOLLO_FUSE_TENSORS_H

#include "op.h"

/* Points each part at its buffers and extents; buffers hold a part's inputs, outputs and temporaries. */
static void lay_out_parts(const custom_op *self, part *parts, void **buffers, int64_t *n) {
  for (int32_t p = 0; p < self->node->op_count; p++) {
    const af_op *op = self->node->ops[p];
    parts[p] = (part){op, buffers, n};
    buffers += op->input_count + op->output_count + op->temporary_count;
    n += op->symbol_count;
  }
}

/* Reads the node's inputs; `dimensions` is room for the shapes that are not read in place. */
static OrtStatus *read_inputs(const custom_op *self, OrtKernelContext *context, const int64_t **shapes,
                              void **data, int64_t *dimensions) {
  const OrtApi *api = self->owner->api;
  for (int32_t i = 0; i < self->node->input_count; i++) {
    const OrtValue *value = NULL;
    RETURN_IF_FAILED(api->KernelContext_GetInput(context, (size_t)i, &value));
    if (!value)
      return failure(api, ORT_INVALID_ARGUMENT, "%s: input %d is missing, expected a tensor; connect it.",
                     self->node->name, (int)i);
    if (self->owner->has_references) {
      ONNXTensorElementDataType type;
      size_t rank;
      RETURN_IF_FAILED(api->GetTensorElementTypeAndShapeDataReference(value, &type, &shapes[i], &rank));
      RETURN_IF_FAILED(check_kind(self, i, type, rank));
    } else {
      OrtTensorTypeAndShapeInfo *info;
      RETURN_IF_FAILED(api->GetTensorTypeAndShape(value, &info));
      OrtStatus *status = read_shape(self, i, info, dimensions);
      api->ReleaseTensorTypeAndShapeInfo(info);
      if (status) return status;
      shapes[i] = dimensions;
      dimensions += self->inputs[i].rank;
    }
    RETURN_IF_FAILED(api->GetTensorMutableData((OrtValue *)value, &data[i])); /* only ever read */
  }
  return NULL;
}

/* Hands the node's inputs to the parts, and solves them for the parts' extents. */
static OrtStatus *bind_parts(const custom_op *self, OrtKernelContext *context, const part *parts) {
  const OrtApi *api = self->owner->api;
  const int32_t count = self->node->input_count, *place = self->node->inputs;
  const int64_t *shapes[count + 1], *own[count + 1];
  void *data[count + 1];
  int64_t dimensions[self->owner->has_references ? 1 : self->input_dimensions + 1];
  char sentence[512] = "";
  RETURN_IF_FAILED(read_inputs(self, context, shapes, data, dimensions));
  for (int32_t p = 0; p < self->node->op_count; place += parts[p++].op->input_count) {
    const part *part = &parts[p];
    for (int32_t i = 0; i < part->op->input_count; i++) {
      own[i] = shapes[place[i]];
      part->buffers[i] = data[place[i]];
    }
    if (part->op->bind(own, part->buffers, part->n, sentence, sizeof sentence) ||
        (CHECKS_INDICES && part->op->check(part->buffers, part->n, sentence, sizeof sentence)))
      return failure(api, ORT_INVALID_ARGUMENT, "%s: %s", part->op->name, sentence);
  }
  return NULL;
}

static OrtStatus *allocate_outputs(const custom_op *self, OrtKernelContext *context, const part *parts) {
  const OrtApi *api = self->owner->api;
  int64_t room[self->output_dimensions + 1], *dimensions = room, *shapes[self->output_count + 1];
  size_t output = 0;
  for (int32_t p = 0; p < self->node->op_count; p++) {
    const af_op *op = parts[p].op;
    for (int32_t i = 0; i < op->output_count; dimensions += op->output_ranks[i++]) shapes[i] = dimensions;
    op->output_shapes(parts[p].n, shapes);
    for (int32_t i = 0; i < op->output_count; i++) {
      OrtValue *value;
      RETURN_IF_FAILED(
          api->KernelContext_GetOutput(context, output++, shapes[i], (size_t)op->output_ranks[i], &value));
      RETURN_IF_FAILED(api->GetTensorMutableData(value, &parts[p].buffers[op->input_count + i]));
    }
  }
  return NULL;
}

/* Places all temporaries one after the other, at `base` or nowhere; gives the bytes that they take. */
static size_t place_temporaries(const custom_op *self, const part *parts, char *base) {
  size_t total = 0;
  for (int32_t p = 0; p < self->node->op_count; p++) {
    const af_op *op = parts[p].op;
    int64_t bytes[op->temporary_count + 1];
    op->temporary_bytes(parts[p].n, bytes);
    for (int32_t i = 0; i < op->temporary_count; total += aligned(bytes[i++]))
      parts[p].buffers[op->input_count + op->output_count + i] = base ? base + total : NULL;
  }
  return total;
}

#endif

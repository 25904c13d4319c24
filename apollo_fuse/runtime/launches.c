/* Launches the kernels of a custom op on a GPU: each alone, or members of a stitch together. */
#include "launches.h"

#include <math.h>

static loaded_kernel *const *kernels_of(const call *self, const af_run *run) {
  return &self->kernels[(run - self->op->gpu->runs) * self->variant_count];
}

static const af_launch *launch_of(const custom_op *self, const af_run *run, int32_t member) {
  return &self->gpu->ops[run->members[member]]->launches[run->kernels[member]];
}

static int32_t width_of(const af_launch *launch) {
  return launch->tensor_count + launch->scratch_count + launch->extent_count;
}

/* Programs of a kernel of the part; 0 where there is nothing to do. */
static int64_t programs_of(const part *part, const af_launch *launch) {
  const int64_t items = launch->items(part->n);
  return items <= 0 ? 0 : (items - 1) / launch->rows + 1;
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

void count_memory(const custom_op *self, const part *parts, size_t *scratch, size_t *table) {
  int64_t values = 0;
  *scratch = 0;
  for (const af_run *run = self->gpu->runs; run < self->gpu->runs + self->gpu->run_count; run++) {
    size_t bytes = 0;
    for (int32_t m = 0; m < run->count; m++) {
      const af_launch *launch = launch_of(self, run, m);
      const part *part = &parts[run->members[m]];
      bytes += place_scratch(launch, part->n, programs_of(part, launch), NULL, NULL);
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
  const int64_t programs = programs_of(part, launch);
  const int32_t width = width_of(launch);
  int64_t values[width + 1];
  void *arguments[width + 2];
  if (!programs) return NULL;
  place_arguments(part, launch, programs, self->scratch, values);
  for (int32_t i = 0; i < width; i++) arguments[i] = &values[i];
  const int32_t v = nearest_variant(self->op->gpu->ops[run->members[0]], part->op->symbol_count, part->n);
  return start(self, kernels_of(self, run)[v], programs, arguments, width);
}

static OrtStatus *launch_stitched(call *self, const af_run *run) {
  int32_t count = run->count;
  int64_t programs = 0;
  void *table = self->table, *arguments[4] = {&table, &count};
  for (int32_t m = 0; m < count; m++) {
    const af_launch *launch = launch_of(self->op, run, m);
    programs += programs_of(&self->parts[run->members[m]], launch);
    self->table += (size_t)(2 + width_of(launch)) * sizeof(int64_t);
  }
  return programs ? start(self, *kernels_of(self, run), programs, arguments, 2) : NULL;
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
  return start(self, self->writer, 1, arguments, AF_WRITTEN + 1);
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
    begin += programs_of(&self->parts[run->members[m]], launch_of(self->op, run, m));
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
    scratch = place_arguments(part, launch, programs_of(part, launch), scratch, values);
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

OrtStatus *write_and_launch(call *self) {
  RETURN_IF_FAILED(write_tables(self));
  return launch_kernels(self);
}

/* Runs a custom op: binds its tensors, places its memory, and parts its kernels' work among threads.
 *
 * The kernels of one af_op run one after the other; those of several ops of a node share a launch, the first
 * kernels of all of them, then the second ones, and so on. */
#define CHECKS_INDICES 1
#include "tensors.h"

#include <stdatomic.h>

#define MOST_CHUNKS 64     /* enough for every pool to balance its load, and a slot number fits in a word */
#define GRAIN (1 << 19)    /* cheap operations that are worth a thread */
#define FINER 4            /* chunks of so much work, so that threads end at about the same time */

/* A kernel in a launch; the work of its items begins at `start`. */
typedef struct share {
  const part *part;
  const af_kernel *kernel;
  int64_t items, work, start;
} share;

/* Kernels that share a launch, cut into chunks of equal work.  A chunk takes the lowest free slot of scratch, so
 * that the memory touched is what the running threads need and stays in their caches. */
typedef struct launch {
  const share *shares;
  int32_t count;
  int64_t work, chunks;
  size_t slot_bytes;
  char *scratch;
  _Atomic uint64_t slots_taken;
} launch;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

/* --------------------------------------------------------------------------------------- the launches */

/* The kernels of the node by launch; gives the bytes of scratch that the greediest launch needs. */
static size_t plan_launches(const custom_op *self, const part *parts, launch *launches, share *shares) {
  size_t most = 0;
  for (int32_t stage = 0; stage < self->stage_count; stage++) {
    launch *launch = &launches[stage];
    int64_t items = 0;
    *launch = (struct launch){.shares = shares};
    for (int32_t p = 0; p < self->node->op_count; p++) {
      if (stage >= parts[p].op->kernel_count) continue;
      const af_kernel *kernel = parts[p].op->kernels[stage];
      const int64_t *n = parts[p].n;
      share share = {&parts[p], kernel, kernel->grid(n), 1, launch->work};
      if (share.items <= 0) continue;
      share.work = kernel->work(n);
      const size_t scratch = aligned(kernel->scratch(n));
      if (scratch > launch->slot_bytes) launch->slot_bytes = scratch;
      items += share.items;
      launch->work += share.items * share.work;
      *shares++ = share;
      launch->count++;
    }
    const int64_t threads = min((launch->work + GRAIN / 2) / GRAIN, items); /* that have enough to do */
    launch->chunks = threads < 2 ? 1 : min(threads * FINER, min(items, MOST_CHUNKS));
    const size_t bytes = launch->slot_bytes * (size_t)launch->chunks;
    if (bytes > most) most = bytes;
  }
  return most;
}

/* Where a chunk begins, of all the launch's work. */
static int64_t chunk_start(const launch *self, int64_t chunk) {
  return self->work / self->chunks * chunk + self->work % self->chunks * chunk / self->chunks;
}

/* The first item of a kernel that begins at `at` or later. */
static int64_t item_from(const share *share, int64_t at) {
  return at <= share->start ? 0 : min((at - share->start + share->work - 1) / share->work, share->items);
}

/* The share of the work that is done at `at`. */
static const share *share_at(const launch *self, int64_t at) {
  const share *first = self->shares;
  for (int32_t count = self->count; count > 1;) {
    const int32_t half = count / 2;
    if (first[half].start <= at) first += half;
    count -= half;
  }
  return first;
}

static void run_items(const launch *self, int64_t begin, int64_t end, void *scratch) {
  const share *last = self->shares + self->count;
  for (const share *share = share_at(self, begin); share < last && share->start < end; share++) {
    const int64_t first = item_from(share, begin), behind = item_from(share, end);
    if (first < behind) share->kernel->run(share->part->buffers, share->part->n, scratch, first, behind);
  }
}

static void run_chunk(void *data, size_t index) {
  launch *self = data;
  const int64_t begin = chunk_start(self, (int64_t)index), end = chunk_start(self, (int64_t)index + 1);
  if (!self->slot_bytes) {
    run_items(self, begin, end, NULL);
    return;
  }
  uint64_t taken = atomic_load(&self->slots_taken), slot;
  do slot = ~taken & (taken + 1);
  while (!atomic_compare_exchange_weak(&self->slots_taken, &taken, taken | slot));
  run_items(self, begin, end, self->scratch + (size_t)__builtin_ctzll(slot) * self->slot_bytes);
  atomic_fetch_and(&self->slots_taken, ~slot);
}

static OrtStatus *run_launches(const custom_op *self, OrtKernelContext *context, launch *launches,
                               char *scratch) {
  for (int32_t stage = 0; stage < self->stage_count; stage++) {
    launch *launch = &launches[stage];
    launch->scratch = scratch;
    if (launch->chunks == 1)
      run_chunk(launch, 0);
    else
      RETURN_IF_FAILED(self->owner->api->KernelContext_ParallelFor(context, run_chunk, (size_t)launch->chunks, 0,
                                                                   launch));
  }
  return NULL;
}

/* ----------------------------------------------------------------------------------------- the memory */

/* Temporaries and scratch come from the session's own arena: a run pays no page faults for them. */
static OrtStatus *run_with_memory(const custom_op *self, OrtKernelContext *context, const part *parts,
                                  launch *launches, size_t temporaries, size_t scratch) {
  const OrtApi *api = self->owner->api;
  const size_t bytes = temporaries + scratch;
  OrtAllocator *allocator;
  void *block = NULL;
  RETURN_IF_FAILED(api->KernelContext_GetAllocator(context, self->owner->cpu, &allocator));
  OrtStatus *status = api->AllocatorAlloc(allocator, bytes + ALIGNMENT, &block);
  if (!status && !block)
    status = failure(api, ORT_FAIL, "%s: no memory for %zu bytes of temporaries; free some or run less at once.",
                     self->node->name, bytes);
  if (!status) {
    char *base = (char *)(((uintptr_t)block + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
    place_temporaries(self, parts, base);
    status = run_launches(self, context, launches, base + temporaries);
    OrtStatus *freed = api->AllocatorFree(allocator, block);
    if (freed) api->ReleaseStatus(freed);
  }
  api->ReleaseAllocator(allocator);
  return status;
}

OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const custom_op *self = kernel;
  part parts[self->node->op_count];
  void *buffers[self->buffer_count + 1];
  int64_t n[self->symbol_count + 1];
  share shares[self->kernel_count + 1];
  launch launches[self->stage_count + 1];
  lay_out_parts(self, parts, buffers, n);
  RETURN_IF_FAILED(bind_parts(self, context, parts));
  RETURN_IF_FAILED(allocate_outputs(self, context, parts));
  const size_t scratch = plan_launches(self, parts, launches, shares);
  const size_t temporaries = place_temporaries(self, parts, NULL);
  if (temporaries + scratch) return run_with_memory(self, context, parts, launches, temporaries, scratch);
  return run_launches(self, context, launches, NULL);
}

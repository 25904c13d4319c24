/* Loads the library's kernels onto devices, once for all sessions, and unloads them with the last one. */
#include "modules.h"

#include <pthread.h>
#include <stdlib.h>

struct loaded_kernel {
  loaded_kernel *next;
  const af_binary *binaries; /* those that there are, of which one was taken */
  const driver *driver;
  device_code code;
  int32_t users;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static loaded_kernel *loaded_kernels;

const device_code *code_of(const loaded_kernel *self) { return &self->code; }

OrtStatus *refused(const custom_op *self, refusal refusal) {
  return failure(self->owner->api, ORT_FAIL,
                 "%s: %s ended with %s, expected success; run the model without its library, or on the CPU.",
                 self->node->name, refusal.function, error_name(self->driver, refusal.result));
}

const af_binary *fitting_binary(const driver *driver, const af_binary *binaries, int32_t architecture) {
  for (const af_binary *found = binaries; found->image; found++)
    if (runs(driver, found, architecture)) return found;
  return NULL;
}

static OrtStatus *fits_nothing(const custom_op *self, int32_t architecture) {
  char text[64];
  name_architecture(self->driver, architecture, text, sizeof text);
  return failure(self->owner->api, ORT_FAIL, "%s: its kernels fit no device of %s; name one like it in --target.",
                 self->node->name, text);
}

static OrtStatus *load(const custom_op *self, const char *name, const af_binary *binaries, int device,
                       loaded_kernel **out) {
  const int32_t architecture = architecture_of(self->driver, device);
  const af_binary *binary = fitting_binary(self->driver, binaries, architecture);
  if (!binary) return fits_nothing(self, architecture);
  loaded_kernel *made = calloc(1, sizeof *made);
  if (!made) return failure(self->owner->api, ORT_FAIL, "%s: no memory; free some.", self->node->name);
  *made = (loaded_kernel){.next = loaded_kernels, .binaries = binaries, .driver = self->driver};
  const refusal refusal = load_code(self->driver, device, binary, name, &made->code);
  if (refusal.function) {
    unload_code(self->driver, &made->code);
    free(made);
    return refused(self, refusal);
  }
  *out = loaded_kernels = made;
  return NULL;
}

OrtStatus *acquire(const custom_op *self, const char *name, const af_binary *binaries, int device,
                   loaded_kernel **out) {
  OrtStatus *status = NULL;
  pthread_mutex_lock(&lock);
  loaded_kernel *known = loaded_kernels;
  while (known && (known->binaries != binaries || known->driver != self->driver || known->code.device != device))
    known = known->next;
  if (!known) status = load(self, name, binaries, device, &known);
  if (known) known->users++;
  *out = known;
  pthread_mutex_unlock(&lock);
  return status;
}

void let_go(const custom_op *self, loaded_kernel *kernel) {
  pthread_mutex_lock(&lock);
  if (!--kernel->users) {
    loaded_kernel **place = &loaded_kernels;
    while (*place != kernel) place = &(*place)->next;
    *place = kernel->next;
    unload_code(self->driver, &kernel->code);
    free(kernel);
  }
  pthread_mutex_unlock(&lock);
}

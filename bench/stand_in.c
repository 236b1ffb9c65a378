// SPDX-License-Identifier: Apache-2.0
// A CUDA driver for machines without a GPU: it loads nothing and launches nothing, but tells what a launch was given.
#include <stdint.h>
#include <string.h>

// As cuda.h has it; nothing here reads further.
typedef struct {
  unsigned grid[3], block[3], shared;
} Config;

static int count;
static const uint8_t *sizes;
static uint64_t *values;
static int handle;

// From now on a launch leaves its programs, threads and bytes of dynamic shared memory in into[0..2], and behind them
// its first n arguments, of each[i] bytes; n = 0 ends it.
void stand_in_listen(int n, const uint8_t *each, uint64_t *into) { count = n, sizes = each, values = into; }

int cuLaunchKernelEx(const Config *config, void *function, void **params, void **extra) {
  if (!count) return 0;
  values[0] = config->grid[0], values[1] = config->block[0], values[2] = config->shared;
  for (int i = 0; i < count; ++i) {
    values[3 + i] = 0;
    memcpy(values + 3 + i, params[i], sizes[i]);
  }
  return 0;
}

int cuPointerGetAttribute(uint64_t *value, int what, uint64_t pointer) { return *value = pointer, 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = &handle, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = &handle, 0; }
int cuCtxGetCurrent(void **context) { return *context = &handle, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
// Threads of a block are the one attribute of a function that is asked for its value.
int cuFuncGetAttribute(int *value, int what, void *function) { return *value = what ? 0 : 1024, 0; }
int cuFuncSetAttribute(void *function, int what, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "not in the stand-in for a CUDA driver", 0; }
// Shared memory of a block on sm_90, and something positive whatever is asked.
int cuDeviceGetAttribute(int *value, int what, int device) { return *value = 227 * 1024, 0; }

// Linked against, never called: CUDA_ERROR_NOT_SUPPORTED.
int cuCtxGetLimit(void) { return 801; }
int cuCtxSetLimit(void) { return 801; }
int cuDevicePrimaryCtxRetain(void) { return 801; }
int cuStreamIsCapturing(void) { return 801; }

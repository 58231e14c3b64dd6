/* libcuda.so.1 as far as the C library calls it. It has no GPU: a launch is handed to `on_launch`, which can do the kernel's work on the host. */
#include <string.h>

int capability = 90, context = 1, device_error = 0, loads = 0, opted_in_bytes = 0;
int (*on_launch)(const void *image, const unsigned *grid, unsigned threads, unsigned shared, void *stream, void **parameters);

int cuInit(unsigned flags) { return flags ? 1 : device_error; }

int cuGetErrorName(int error, const char **name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : error == 1 ? "CUDA_ERROR_INVALID_VALUE" : NULL;
  return !*name;
}

int cuCtxGetCurrent(void **current) { return *current = context ? &context : NULL, 0; }

int cuCtxGetId(void *current, unsigned long long *id) { return *id = (unsigned long long)*(int *)current, 0; }

int cuCtxGetDevice(int *device) { return *device = 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return (attribute != 75 && attribute != 76) || device;
}

int cuModuleLoadData(void **module, const void *image) {
  __atomic_fetch_add(&loads, 1, __ATOMIC_SEQ_CST);
  *module = (void *)image;
  return memcmp(image, "\177ELF", 4) != 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = module, !*name; }

int cuFuncSetAttribute(void *function, int attribute, int value) {
  opted_in_bytes = value;
  return !function || attribute != 8;
}

int cuLaunchKernel(const void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z, unsigned shared,
                   void *stream, void **parameters, void **extra) {
  const unsigned grid[3] = {x, y, z};
  return extra || threads_y * threads_z != 1 ? 1 : on_launch(function, grid, threads, shared, stream, parameters);
}

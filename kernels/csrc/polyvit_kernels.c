#include "polyvit_table.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PARAMETERS = 64, WARP = 32, DEFAULT_SHARED_BYTES = 48 * 1024, MAX_GRID_YZ = 65535 };

static _Thread_local char words[1024];

const char *polyvit_kernels_error(void) { return words; }

int polyvit_fail(int status, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(words, sizeof words, format, values);
  va_end(values);
  return status;
}

/* ---- the table ---- */

size_t polyvit_kernels_count(void) { return polyvit_num_rows; }

const polyvit_row *polyvit_kernels_entry(size_t index) { return index < polyvit_num_rows ? &polyvit_rows[index] : NULL; }

static int older_arch(int arch) {
  int older = 0;
  for (size_t i = 0; i < polyvit_num_archs; i++)
    if (polyvit_archs[i] <= arch && polyvit_archs[i] > older) older = polyvit_archs[i];
  return older;
}

const polyvit_row *polyvit_kernels_find(const char *op, const char *dtype, int arch, int64_t tokens, int64_t features) {
  if (!op || !dtype) return polyvit_fail(POLYVIT_BAD_ARGUMENT, "op and dtype are needed, NULL was given"), NULL;
  int older = older_arch(arch), built = 0;
  for (size_t i = 0; i < polyvit_num_rows; i++) {
    const polyvit_row *row = &polyvit_rows[i];
    if (row->arch != older) continue;
    built = 1;
    if (strcmp(row->op, op) || strcmp(row->dtype, dtype)) continue;
    if (tokens < row->min_tokens || tokens > row->max_tokens || features > row->max_features) continue;
    if (row->num_kernels) return row;
    polyvit_fail(POLYVIT_NO_KERNEL, "%s of %s, sm_%d, %lld tokens, %lld features is left to the backend %s", op, dtype, arch,
                 (long long)tokens, (long long)features, row->backend);
    return NULL;
  }
  if (older && !built)
    polyvit_fail(POLYVIT_NO_KERNEL, "this library was built without sm_%d, whose rows sm_%d takes", older, arch);
  else
    polyvit_fail(POLYVIT_NO_KERNEL, "no kernel for %s of %s, sm_%d, %lld tokens, %lld features", op, dtype, arch, (long long)tokens,
                 (long long)features);
  return NULL;
}

static const char *constant_of(const polyvit_kernel *kernel, const char *name, size_t length) {
  for (int i = 0; i < kernel->num_constants; i++) {
    const polyvit_constant *constant = &kernel->constants[i];
    if (!strncmp(constant->name, name, length) && !constant->name[length]) return constant->value;
  }
  return NULL;
}

static int has_constants(const polyvit_kernel *kernel, const char *wanted) {
  for (wanted += strspn(wanted, " "); *wanted; wanted += strspn(wanted, " ")) {
    size_t length = strcspn(wanted, " "), name = strcspn(wanted, "= ");
    if (name >= length) return 0;
    const char *value = constant_of(kernel, wanted, name);
    if (!value || strlen(value) != length - name - 1 || strncmp(value, wanted + name + 1, length - name - 1)) return 0;
    wanted += length;
  }
  return 1;
}

const polyvit_kernel *polyvit_kernels_choose(const polyvit_row *row, const char *name, const char *constants) {
  if (!row) return polyvit_fail(POLYVIT_BAD_ARGUMENT, "a row is needed, NULL was given"), NULL;
  for (int i = 0; i < row->num_kernels; i++) {
    const polyvit_kernel *kernel = row->kernels[i];
    if ((!name || !strcmp(kernel->name, name)) && (!constants || has_constants(kernel, constants))) return kernel;
  }
  polyvit_fail(POLYVIT_NO_KERNEL, "%s of %s for sm_%d was not compiled as %s with %s", row->op, row->dtype, row->arch,
               name ? name : "any kernel", constants ? constants : "any constants");
  return NULL;
}

int64_t polyvit_kernels_constant(const polyvit_kernel *kernel, const char *name, int64_t otherwise) {
  const char *value = constant_of(kernel, name, strlen(name));
  return value ? strtoll(value, NULL, 10) : otherwise;
}

/* ---- the driver, and the images that are loaded ---- */

typedef struct cuda_driver {
  int (*init)(unsigned flags);
  int (*error_name)(int error, const char **name);
  int (*current_context)(void **context);
  int (*context_id)(void *context, unsigned long long *id); /* NULL before CUDA 12 */
  int (*context_device)(int *device);
  int (*device_attribute)(int *value, int attribute, int device);
  int (*load_module)(void **module, const void *image);
  int (*module_function)(void **function, void *module, const char *name);
  int (*set_function_attribute)(void *function, int attribute, int value);
  int (*launch)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                unsigned shared_bytes, void *stream, void **parameters, void **extra);
} cuda_driver;

enum { COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 }; /* of cuda.h */

typedef struct loaded_context {
  unsigned long long id;
  int arch;
  struct loaded_context *next;
  void *functions[]; /* of polyvit_images; NULL: not loaded yet */
} loaded_context;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* over the three below */
static cuda_driver driver;
static int driver_is_open;
static loaded_context *contexts;

static const char *error_name(int error) {
  const char *name = NULL;
  driver.error_name(error, &name);
  return name ? name : "an error that the driver has no name for";
}

static int cuda_failed(const char *what, int error) {
  return polyvit_fail(POLYVIT_CUDA_ERROR, "%s failed: %s (%d)", what, error_name(error), error);
}

static int open_driver(void) {
  static const struct {
    void *pointer;
    const char *name;
  } functions[] = {
      {&driver.init, "cuInit"},
      {&driver.error_name, "cuGetErrorName"},
      {&driver.current_context, "cuCtxGetCurrent"},
      {&driver.context_id, "cuCtxGetId"},
      {&driver.context_device, "cuCtxGetDevice"},
      {&driver.device_attribute, "cuDeviceGetAttribute"},
      {&driver.load_module, "cuModuleLoadData"},
      {&driver.module_function, "cuModuleGetFunction"},
      {&driver.set_function_attribute, "cuFuncSetAttribute"},
      {&driver.launch, "cuLaunchKernel"},
  };
  if (driver_is_open) return POLYVIT_OK;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return polyvit_fail(POLYVIT_NO_GPU, "no CUDA driver: %s", dlerror());
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    void *found = dlsym(library, functions[i].name);
    if (!found && functions[i].pointer != &driver.context_id)
      return polyvit_fail(POLYVIT_NO_GPU, "the CUDA driver has no %s: it is too old", functions[i].name);
    memcpy(functions[i].pointer, &found, sizeof found);
  }
  int error = driver.init(0);
  if (error) return polyvit_fail(POLYVIT_NO_GPU, "no CUDA GPU: cuInit gives %s", error_name(error));
  driver_is_open = 1;
  return POLYVIT_OK;
}

/* The current context's record, made at its first use. */
static int enter_context(loaded_context **found) {
  int status = open_driver();
  if (status) return status;
  void *context = NULL;
  int error = driver.current_context(&context);
  if (error) return cuda_failed("cuCtxGetCurrent", error);
  if (!context) return polyvit_fail(POLYVIT_NO_CONTEXT, "no CUDA context is current on this thread: cuCtxSetCurrent or cudaFree(0) first");
  /* A context may get the address of one that was destroyed; its id is new. */
  unsigned long long id = (uintptr_t)context;
  if (driver.context_id && (error = driver.context_id(context, &id))) return cuda_failed("cuCtxGetId", error);
  for (*found = contexts; *found; *found = (*found)->next)
    if ((*found)->id == id) return POLYVIT_OK;
  int device = 0, major = 0, minor = 0;
  if ((error = driver.context_device(&device))) return cuda_failed("cuCtxGetDevice", error);
  if ((error = driver.device_attribute(&major, COMPUTE_CAPABILITY_MAJOR, device)) ||
      (error = driver.device_attribute(&minor, COMPUTE_CAPABILITY_MINOR, device)))
    return cuda_failed("cuDeviceGetAttribute", error);
  loaded_context *record = calloc(1, sizeof *record + polyvit_num_images * sizeof *record->functions);
  if (!record) return polyvit_fail(POLYVIT_CUDA_ERROR, "out of host memory");
  record->id = id;
  record->arch = 10 * major + minor;
  record->next = contexts;
  *found = contexts = record;
  return POLYVIT_OK;
}

/* Before Hopper an image runs on every later GPU of its generation; since then it is compiled for one architecture's own instructions. */
static int runs_on(int image, int device) {
  return image < 90 ? image / 10 == device / 10 && image <= device : image == device;
}

static int load_image(const loaded_context *context, const polyvit_kernel *kernel, void **function) {
  if (!runs_on(kernel->arch, context->arch))
    return polyvit_fail(POLYVIT_NO_GPU, "the image of %s is for sm_%d and does not run on this GPU, sm_%d", kernel->name, kernel->arch,
                        context->arch);
  void *module = NULL;
  int error = driver.load_module(&module, kernel->image);
  if (error) return cuda_failed("cuModuleLoadData", error);
  if ((error = driver.module_function(function, module, kernel->name))) return cuda_failed("cuModuleGetFunction", error);
  if (kernel->shared_bytes > DEFAULT_SHARED_BYTES &&
      (error = driver.set_function_attribute(*function, MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel->shared_bytes))) {
    *function = NULL;
    return cuda_failed("allowing the kernel its shared memory", error);
  }
  return POLYVIT_OK;
}

static int find_function(const polyvit_kernel *kernel, void **function) {
  if (kernel < polyvit_images || kernel >= polyvit_images + polyvit_num_images)
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "a kernel of this library's table is needed");
  pthread_mutex_lock(&lock);
  loaded_context *context = NULL;
  int status = enter_context(&context);
  if (!status) {
    void **loaded = &context->functions[kernel - polyvit_images];
    if (!*loaded) status = load_image(context, kernel, loaded);
    *function = *loaded;
  }
  pthread_mutex_unlock(&lock);
  return status;
}

int polyvit_kernels_arch(void) {
  pthread_mutex_lock(&lock);
  loaded_context *context = NULL;
  int status = enter_context(&context), arch = status ? -status : context->arch;
  pthread_mutex_unlock(&lock);
  return arch;
}

int polyvit_kernels_load(const polyvit_kernel *kernel) {
  void *function = NULL;
  return find_function(kernel, &function);
}

/* ---- a launch ---- */

typedef union launch_value {
  uint64_t address;
  int32_t i32;
  int64_t i64;
  float fp32;
} launch_value;

static int fill_value(launch_value *target, const polyvit_kernel *kernel, const polyvit_parameter *parameter, const polyvit_argument *argument) {
  const char *type = parameter->type;
  polyvit_kind kind = type[0] == '*' ? POLYVIT_POINTER : type[0] == 'i' ? POLYVIT_INTEGER : POLYVIT_REAL;
  if (argument->kind != kind)
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s: %s is a %s", kernel->name, parameter->name, type);
  if (kind == POLYVIT_REAL) {
    target->fp32 = (float)argument->real;
    return POLYVIT_OK;
  }
  int64_t value = kind == POLYVIT_POINTER ? (int64_t)(uintptr_t)argument->pointer : argument->integer;
  if (kind == POLYVIT_POINTER && !value) return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s: %s is NULL", kernel->name, parameter->name);
  if (value % parameter->multiple)
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s: %s is %lld%s, but must be a multiple of %d%s", kernel->name, parameter->name,
                        (long long)value, kind == POLYVIT_POINTER ? " as an address" : "", parameter->multiple,
                        kind == POLYVIT_POINTER ? " bytes" : "");
  if (!strcmp(type, "i32") && (value < INT32_MIN || value > INT32_MAX))
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s: %s is %lld, which 32 bits do not hold", kernel->name, parameter->name, (long long)value);
  if (!strcmp(type, "i32"))
    target->i32 = (int32_t)value;
  else
    target->i64 = value;
  return POLYVIT_OK;
}

static int fill_values(launch_value *values, const polyvit_kernel *kernel, const polyvit_argument *arguments, size_t count) {
  for (int i = 0; i < kernel->num_parameters; i++) {
    const polyvit_argument *given = NULL;
    for (size_t k = 0; k < count && !given; k++)
      if (!strcmp(arguments[k].name, kernel->parameters[i].name)) given = &arguments[k];
    if (!given) return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s needs the argument %s", kernel->name, kernel->parameters[i].name);
    int status = fill_value(&values[i], kernel, &kernel->parameters[i], given);
    if (status) return status;
  }
  if (count != (size_t)kernel->num_parameters)
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s has %d parameters, %zu arguments were given", kernel->name, kernel->num_parameters, count);
  return POLYVIT_OK;
}

int polyvit_kernels_launch(const polyvit_kernel *kernel, void *stream, const int64_t grid[3], const polyvit_argument *arguments,
                           size_t count) {
  if (!kernel || !grid || (count && !arguments)) return polyvit_fail(POLYVIT_BAD_ARGUMENT, "kernel, grid and arguments are needed");
  if (kernel->num_parameters > MAX_PARAMETERS)
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s has more than %d parameters", kernel->name, MAX_PARAMETERS);
  launch_value values[MAX_PARAMETERS];
  int status = fill_values(values, kernel, arguments, count);
  if (status) return status;
  for (int i = 0; i < 3; i++)
    if (grid[i] < 0 || grid[i] > (i ? MAX_GRID_YZ : INT32_MAX))
      return polyvit_fail(POLYVIT_BAD_ARGUMENT, "%s: %lld programs along axis %d of the grid are more than a GPU takes", kernel->name,
                          (long long)grid[i], i);
  if (!grid[0] || !grid[1] || !grid[2]) return POLYVIT_OK;
  void *function = NULL;
  if ((status = find_function(kernel, &function))) return status;
  /* Triton's kernels end with two pointers to scratch memory, which those of the table do not use. */
  uint64_t no_scratch = 0;
  void *parameters[MAX_PARAMETERS + 2];
  for (int i = 0; i < kernel->num_parameters; i++) parameters[i] = &values[i];
  parameters[kernel->num_parameters] = parameters[kernel->num_parameters + 1] = &no_scratch;
  int error = driver.launch(function, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2], (unsigned)kernel->num_warps * WARP, 1, 1,
                            (unsigned)kernel->shared_bytes, stream, parameters, NULL);
  return error ? cuda_failed(kernel->name, error) : POLYVIT_OK;
}

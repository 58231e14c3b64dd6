/* The kernels of polyvit_kernels as a C library: images compiled ahead of time, found by the tile table and launched through the CUDA driver.
 *
 * Needs neither Python nor the CUDA toolkit; libcuda.so.1 is opened at the first call that needs a GPU. Every function may be called from
 * any thread. A CUDA context must be current for those that load or launch; an image is loaded once per context.
 */
#ifndef POLYVIT_KERNELS_H
#define POLYVIT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(POLYVIT_KERNELS_BUILD)
#define POLYVIT_API __attribute__((visibility("default")))
#else
#define POLYVIT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a function that returns `int` gives; polyvit_kernels_error() explains it. */
typedef enum polyvit_status {
  POLYVIT_OK = 0,
  POLYVIT_NO_KERNEL = 1,    /* the table has no kernel of ours for the call */
  POLYVIT_BAD_ARGUMENT = 2, /* a size, stride, pointer or name that the kernel cannot take */
  POLYVIT_NO_GPU = 3,       /* no driver, no device, or one that the image is not for */
  POLYVIT_NO_CONTEXT = 4,   /* no CUDA context is current on this thread */
  POLYVIT_CUDA_ERROR = 5    /* an error of the CUDA driver, which the message names */
} polyvit_status;

/* A run-time argument of a kernel, in the order of the launch. */
typedef struct polyvit_parameter {
  const char *name;
  const char *type;  /* as Triton names it: "*bf16" (a device pointer), "i32", "i64", "fp32" */
  int32_t multiple;  /* its value, for a pointer the address, must be a multiple of this */
} polyvit_parameter;

/* A value that is fixed in the image: "HEAD_DIM", "64". Booleans are "1" and "0", an absent pointer is "none". */
typedef struct polyvit_constant {
  const char *name;
  const char *value;
} polyvit_constant;

typedef struct polyvit_kernel {
  const char *name;
  int32_t arch; /* compiled for this compute capability, 10 x major + minor */
  int32_t num_warps;
  int32_t shared_bytes;  /* dynamic shared memory of a block */
  int32_t num_registers; /* per thread */
  int32_t num_parameters;
  int32_t num_constants;
  const polyvit_parameter *parameters;
  const polyvit_constant *constants;
  const unsigned char *image; /* a cubin */
  size_t image_bytes;
} polyvit_kernel;

/* A row of the tile table for one GPU and dtype. What `features` counts depends on the op: for attention it is head_dim. */
typedef struct polyvit_row {
  const char *op;
  const char *dtype; /* "bf16", "fp16" or "fp32" */
  const char *backend; /* "triton": ours; any other has no kernels here */
  int32_t arch;
  int32_t min_tokens;
  int32_t max_tokens;
  int32_t max_features;
  int32_t num_kernels;
  const polyvit_kernel *const *kernels;
} polyvit_row;

/* The message of this thread's last failure; empty before the first. */
POLYVIT_API const char *polyvit_kernels_error(void);

POLYVIT_API size_t polyvit_kernels_count(void);

/* Row `index` of the table; NULL beyond its end. */
POLYVIT_API const polyvit_row *polyvit_kernels_entry(size_t index);

/* The row that polyvit_kernels.tiles.pick takes: the first that fits, for an `arch` without rows among those of the nearest older one.
 * NULL when there is none, when its row names another backend, or when the library was built without that architecture. */
POLYVIT_API const polyvit_row *polyvit_kernels_find(const char *op, const char *dtype, int arch, int64_t tokens, int64_t features);

/* The row's kernel of that name (NULL: any) with all of `constants`, written "HEAD_DIM=64 VARLEN=0" (NULL: any); NULL when it has none. */
POLYVIT_API const polyvit_kernel *polyvit_kernels_choose(const polyvit_row *row, const char *name, const char *constants);

/* The value of an integer constant of the kernel; `otherwise` when it has none of that name. */
POLYVIT_API int64_t polyvit_kernels_constant(const polyvit_kernel *kernel, const char *name, int64_t otherwise);

/* 10 x major + minor of the current context's GPU; minus a polyvit_status when there is none. */
POLYVIT_API int polyvit_kernels_arch(void);

/* Load the image into the current context, as the first launch would: for use before a stream is captured. */
POLYVIT_API int polyvit_kernels_load(const polyvit_kernel *kernel);

typedef enum polyvit_kind { POLYVIT_POINTER, POLYVIT_INTEGER, POLYVIT_REAL } polyvit_kind;

/* A named value for a kernel's parameter; made by the three functions below. */
typedef struct polyvit_argument {
  const char *name;
  polyvit_kind kind;
  const void *pointer; /* device memory */
  int64_t integer;
  double real;
} polyvit_argument;

static inline polyvit_argument polyvit_pointer(const char *name, const void *pointer) {
  polyvit_argument argument = {name, POLYVIT_POINTER, pointer, 0, 0.0};
  return argument;
}

static inline polyvit_argument polyvit_integer(const char *name, int64_t integer) {
  polyvit_argument argument = {name, POLYVIT_INTEGER, NULL, integer, 0.0};
  return argument;
}

static inline polyvit_argument polyvit_real(const char *name, double real) {
  polyvit_argument argument = {name, POLYVIT_REAL, NULL, 0, real};
  return argument;
}

/* Launch on `stream` (a CUstream or cudaStream_t; NULL: the default one). The arguments are matched with the kernel's parameters by name
 * and checked against their types; each parameter needs one, in any order. A grid with a zero launches nothing. */
POLYVIT_API int polyvit_kernels_launch(const polyvit_kernel *kernel, void *stream, const int64_t grid[3],
                                       const polyvit_argument *arguments, size_t count);

/* Attention over the packed projection qkv [batch, tokens, 3, heads, head_dim], whose last axis is contiguous. */
typedef struct polyvit_attention {
  const char *dtype; /* of all tensors: "bf16" or "fp16" */
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t qkv_strides[4];  /* elements to the next batch, token, part (q, k, v) and head; all 0: contiguous */
  int64_t grad_strides[3]; /* of the output's gradient: batch, token, head; all 0: contiguous */
} polyvit_attention;

/* out [batch, tokens, heads, head_dim] = softmax(q k' / sqrt(head_dim)) v, contiguous; lse [batch, heads, tokens], the base-2
 * log-sum-exp of the scores, is for the backward. */
POLYVIT_API int polyvit_attention_forward(const polyvit_attention *call, const void *qkv, void *out, float *lse, void *stream);

/* qkv_grad [batch, tokens, 3, heads, head_dim], contiguous, from the output's gradient. `out` and `lse` are the forward's; `scratch` has
 * the size of `lse`. Bitwise the same at every run. */
POLYVIT_API int polyvit_attention_backward(const polyvit_attention *call, const void *grad, const void *qkv, const void *out,
                                           const float *lse, float *scratch, void *qkv_grad, void *stream);

#ifdef __cplusplus
}
#endif
#endif

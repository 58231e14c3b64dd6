/* Attention of a ViT on a GPU, forward and backward, from C alone; checked against the same in double precision on the host.
 *
 *   cc example_attention.c -lpolyvit_kernels -ldl -lm && ./a.out [batch tokens heads head_dim]
 *
 * Ends with 0 when the numbers are right, 1 when not, 77 where there is no GPU to run on. */
#include "polyvit_kernels.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WRONG = 1, NO_GPU = 77, REPEATS = 20 };

/* What is needed of the CUDA driver; its header is not. */
typedef unsigned long long device_memory;
static int (*cuInit)(unsigned), (*cuDeviceGet)(int *, int), (*cuDevicePrimaryCtxRetain)(void **, int), (*cuCtxSetCurrent)(void *);
static int (*cuMemAlloc)(device_memory *, size_t), (*cuMemcpyHtoD)(device_memory, const void *, size_t);
static int (*cuMemcpyDtoH)(void *, device_memory, size_t), (*cuCtxSynchronize)(void);
static int (*cuEventCreate)(void **, unsigned), (*cuEventRecord)(void *, void *), (*cuEventElapsedTime)(float *, void *, void *);

static void stop(int status, const char *why, const char *details) {
  fprintf(stderr, "%s: %s\n", why, details);
  exit(status);
}

static void must(int error, const char *what) {
  if (error) {
    char details[32];
    snprintf(details, sizeof details, "CUDA error %d", error);
    stop(WRONG, what, details);
  }
}

static void must_launch(int status) {
  if (status) stop(status == POLYVIT_NO_GPU ? NO_GPU : WRONG, "polyvit_kernels", polyvit_kernels_error());
}

static void open_gpu(void) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW), *context;
  if (!driver) stop(NO_GPU, "no GPU to run on: no CUDA driver", dlerror());
  const struct { void *pointer; const char *name; } functions[] = {
      {&cuInit, "cuInit"}, {&cuDeviceGet, "cuDeviceGet"}, {&cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain"},
      {&cuCtxSetCurrent, "cuCtxSetCurrent"}, {&cuMemAlloc, "cuMemAlloc_v2"}, {&cuMemcpyHtoD, "cuMemcpyHtoD_v2"},
      {&cuMemcpyDtoH, "cuMemcpyDtoH_v2"}, {&cuCtxSynchronize, "cuCtxSynchronize"}, {&cuEventCreate, "cuEventCreate"},
      {&cuEventRecord, "cuEventRecord"}, {&cuEventElapsedTime, "cuEventElapsedTime"}};
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    void *found = dlsym(driver, functions[i].name);
    if (!found) stop(NO_GPU, "no GPU to run on: the CUDA driver is too old for", functions[i].name);
    memcpy(functions[i].pointer, &found, sizeof found);
  }
  int device;
  if (cuInit(0) || cuDeviceGet(&device, 0)) stop(NO_GPU, "no GPU to run on: no CUDA device", "the driver finds none");
  must(cuDevicePrimaryCtxRetain(&context, device), "opening the GPU");
  must(cuCtxSetCurrent(context), "opening the GPU");
}

static void *pointer(device_memory memory) { return (void *)(uintptr_t)memory; }

static device_memory on_gpu(const void *values, size_t bytes) {
  device_memory memory;
  must(cuMemAlloc(&memory, bytes), "allocating GPU memory");
  if (values) must(cuMemcpyHtoD(memory, values, bytes), "copying to the GPU");
  return memory;
}

static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static double from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint16_t *random_values(size_t count) {
  uint16_t *values = malloc(count * sizeof *values);
  uint32_t state = 12345;
  for (size_t i = 0; i < count; i++) {
    double sum = -6; /* twelve uniform numbers: nearly a normal one */
    for (int k = 0; k < 12; k++) sum += (state = state * 1664525u + 1013904223u) / 4294967296.0;
    values[i] = to_bf16((float)sum);
  }
  return values;
}

/* One head of one example: its out, and its part of the packed gradient when `grad` is there. */
static void reference(const polyvit_attention *call, const uint16_t *qkv, const uint16_t *grad, int64_t head, double *out, double *qkv_grad) {
  int64_t n = call->tokens, d = call->head_dim, dim = call->heads * d;
  double scale = 1 / sqrt((double)d), *p = malloc(n * sizeof *p);
#define QKV(part, token, k) from_bf16(qkv[(token) * 3 * dim + (part) * dim + head * d + (k)])
#define QKV_GRAD(part, token, k) qkv_grad[((part) * n + (token)) * d + (k)]
#define GRAD(token, k) from_bf16(grad[(token) * dim + head * d + (k)])
  memset(qkv_grad, 0, 3 * n * d * sizeof *qkv_grad);
  for (int64_t i = 0; i < n; i++) {
    double most = -INFINITY, sum = 0, delta = 0;
    for (int64_t j = 0; j < n; j++) {
      p[j] = 0;
      for (int64_t k = 0; k < d; k++) p[j] += QKV(0, i, k) * QKV(1, j, k) * scale;
      most = fmax(most, p[j]);
    }
    for (int64_t j = 0; j < n; j++) sum += p[j] = exp(p[j] - most);
    for (int64_t k = 0; k < d; k++) {
      out[i * d + k] = 0;
      for (int64_t j = 0; j < n; j++) out[i * d + k] += p[j] / sum * QKV(2, j, k);
      delta += out[i * d + k] * GRAD(i, k);
    }
    for (int64_t j = 0; j < n; j++) {
      double dp = 0, ds;
      for (int64_t k = 0; k < d; k++) dp += GRAD(i, k) * QKV(2, j, k);
      ds = p[j] / sum * (dp - delta) * scale;
      for (int64_t k = 0; k < d; k++) {
        QKV_GRAD(0, i, k) += ds * QKV(1, j, k);
        QKV_GRAD(1, j, k) += ds * QKV(0, i, k);
        QKV_GRAD(2, j, k) += p[j] / sum * GRAD(i, k);
      }
    }
  }
  free(p);
}

static int is_close(const char *what, double error, double largest) {
  int close = error <= 0.02 * largest;
  printf("%-8s greatest error %.5f of values up to %.3f: %s\n", what, error, largest, close ? "as bf16 rounds" : "WRONG");
  return close;
}

static int compare(const polyvit_attention *call, const uint16_t *qkv, const uint16_t *grad, const uint16_t *out, const uint16_t *qkv_grad) {
  int64_t n = call->tokens, d = call->head_dim, dim = call->heads * d, last = call->batch - 1, head = call->heads - 1;
  double *true_out = malloc(n * d * sizeof *true_out), *true_grad = malloc(3 * n * d * sizeof *true_grad);
  reference(call, qkv + last * n * 3 * dim, grad + last * n * dim, head, true_out, true_grad);
  double errors[2] = {0, 0}, largest[2] = {0, 0};
  for (int64_t i = 0; i < n * d; i++) {
    int64_t token = i / d, k = i % d;
    errors[0] = fmax(errors[0], fabs(true_out[i] - from_bf16(out[(last * n + token) * dim + head * d + k])));
    largest[0] = fmax(largest[0], fabs(true_out[i]));
    for (int64_t part = 0; part < 3; part++) {
      double truth = true_grad[(part * n + token) * d + k];
      errors[1] = fmax(errors[1], fabs(truth - from_bf16(qkv_grad[(last * n + token) * 3 * dim + part * dim + head * d + k])));
      largest[1] = fmax(largest[1], fabs(truth));
    }
  }
  free(true_out), free(true_grad);
  return is_close("out", errors[0], largest[0]) & is_close("gradient", errors[1], largest[1]);
}

int main(int count, char **arguments) {
  polyvit_attention call = {.dtype = "bf16", .batch = 8, .tokens = 197, .heads = 12, .head_dim = 64};
  int64_t *sizes[] = {&call.batch, &call.tokens, &call.heads, &call.head_dim};
  for (int i = 1; i < count && i <= 4; i++) *sizes[i - 1] = atoll(arguments[i]);
  open_gpu();
  size_t elements = (size_t)(call.batch * call.tokens * call.heads * call.head_dim);
  size_t lse_bytes = (size_t)(call.batch * call.heads * call.tokens) * sizeof(float);
  uint16_t *qkv = random_values(3 * elements), *grad = random_values(elements);
  uint16_t *out = malloc(elements * sizeof *out), *qkv_grad = malloc(3 * elements * sizeof *qkv_grad);
  device_memory qkv_there = on_gpu(qkv, 3 * elements * sizeof *qkv), grad_there = on_gpu(grad, elements * sizeof *grad);
  device_memory out_there = on_gpu(NULL, elements * sizeof *out), qkv_grad_there = on_gpu(NULL, 3 * elements * sizeof *qkv_grad);
  float *lse = pointer(on_gpu(NULL, lse_bytes)), *scratch = pointer(on_gpu(NULL, lse_bytes));

  void *events[3];
  for (int i = 0; i < 3; i++) must(cuEventCreate(&events[i], 0), "making an event");
  for (int warm = 0; warm < 2; warm++) {
    must(cuEventRecord(events[0], NULL), "timing");
    for (int i = 0; i < REPEATS; i++) must_launch(polyvit_attention_forward(&call, pointer(qkv_there), pointer(out_there), lse, NULL));
    must(cuEventRecord(events[1], NULL), "timing");
    for (int i = 0; i < REPEATS; i++)
      must_launch(polyvit_attention_backward(&call, pointer(grad_there), pointer(qkv_there), pointer(out_there), lse, scratch,
                                             pointer(qkv_grad_there), NULL));
    must(cuEventRecord(events[2], NULL), "timing");
    must(cuCtxSynchronize(), "running the kernels");
  }
  float forward, backward;
  must(cuEventElapsedTime(&forward, events[0], events[1]), "timing");
  must(cuEventElapsedTime(&backward, events[1], events[2]), "timing");
  must(cuMemcpyDtoH(out, out_there, elements * sizeof *out), "copying from the GPU");
  must(cuMemcpyDtoH(qkv_grad, qkv_grad_there, 3 * elements * sizeof *qkv_grad), "copying from the GPU");
  printf("sm_%d, batch %lld, tokens %lld, heads %lld, head_dim %lld: forward %.1f us, backward %.1f us\n", polyvit_kernels_arch(),
         (long long)call.batch, (long long)call.tokens, (long long)call.heads, (long long)call.head_dim, forward * 1e3 / REPEATS,
         backward * 1e3 / REPEATS);
  return compare(&call, qkv, grad, out, qkv_grad) ? 0 : WRONG;
}

#include "polyvit_table.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int64_t blocks(int64_t tokens, int64_t block) { return (tokens + block - 1) / block; }

/* log2(e) / sqrt(head_dim): what turns a dot product into an exponent of 2. */
static double scale_of(const polyvit_attention *call) { return 1.4426950408889634 / sqrt((double)call->head_dim); }

/* Whether 32 bits, in which the kernels count within an example, hold the offset of its last element. */
static int reaches(const int64_t *sizes, const int64_t *strides, int axes, int64_t head_dim) {
  int64_t last = head_dim - 1;
  for (int i = 0; i < axes; i++) {
    if (strides[i] < 0 || (sizes[i] > 1 && strides[i] > (INT32_MAX - last) / (sizes[i] - 1))) return 0;
    if (sizes[i] > 1) last += (sizes[i] - 1) * strides[i];
  }
  return 1;
}

/* A copy in which the strides are written out. */
static int checked(const polyvit_attention *call, polyvit_attention *full) {
  if (!call || !call->dtype) return polyvit_fail(POLYVIT_BAD_ARGUMENT, "attention: the sizes and a dtype are needed");
  *full = *call;
  if (call->batch < 0 || call->tokens < 0 || call->heads < 1 || call->head_dim < 1)
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "attention: batch %lld, tokens %lld, heads %lld, head_dim %lld are no sizes",
                        (long long)call->batch, (long long)call->tokens, (long long)call->heads, (long long)call->head_dim);
  int64_t *qkv = full->qkv_strides, *grad = full->grad_strides, dim = call->heads * call->head_dim;
  if (!qkv[0] && !qkv[1] && !qkv[2] && !qkv[3]) qkv[0] = call->tokens * 3 * dim, qkv[1] = 3 * dim, qkv[2] = dim, qkv[3] = call->head_dim;
  if (!grad[0] && !grad[1] && !grad[2]) grad[0] = call->tokens * dim, grad[1] = dim, grad[2] = call->head_dim;
  const int64_t qkv_sizes[4] = {1, call->tokens, 3, call->heads}, grad_sizes[3] = {1, call->tokens, call->heads};
  if (!reaches(qkv_sizes, qkv, 4, call->head_dim) || !reaches(grad_sizes, grad, 3, call->head_dim) ||
      !reaches((const int64_t[]){3 * call->tokens, call->heads}, (const int64_t[]){dim, call->head_dim}, 2, call->head_dim))
    return polyvit_fail(POLYVIT_BAD_ARGUMENT, "attention: an example of %lld tokens with these strides is more than 32 bits count",
                        (long long)call->tokens);
  return POLYVIT_OK;
}

/* The row for short sequences where one fits, else for long ones. */
static int find_row(const polyvit_attention *call, const char *direction, const polyvit_row **row) {
  int arch = polyvit_kernels_arch();
  if (arch < 0) return -arch;
  static const char *const families[] = {"short", "long"};
  for (int i = 0; i < 2; i++) {
    char op[64];
    snprintf(op, sizeof op, "attention_%s_%s", families[i], direction);
    *row = polyvit_kernels_find(op, call->dtype, arch, call->tokens, call->head_dim);
    if (*row) return POLYVIT_OK;
  }
  return POLYVIT_NO_KERNEL;
}

static const polyvit_kernel *kernel_of(const polyvit_row *row, const char *name, const polyvit_attention *call, int is_long) {
  char constants[64];
  snprintf(constants, sizeof constants, "HEAD_DIM=%lld%s", (long long)call->head_dim, is_long ? " VARLEN=0" : "");
  return polyvit_kernels_choose(row, name, constants);
}

static int is_long(const polyvit_row *row) { return !strncmp(row->op, "attention_long", strlen("attention_long")); }

enum { QKV = 4, GRAD = 3 };

static void put_qkv_strides(polyvit_argument *arguments, const polyvit_attention *call) {
  static const char *const names[QKV] = {"stride_batch", "stride_token", "stride_part", "stride_head"};
  for (int i = 0; i < QKV; i++) arguments[i] = polyvit_integer(names[i], call->qkv_strides[i]);
}

static void put_grad_strides(polyvit_argument *arguments, const polyvit_attention *call) {
  static const char *const names[GRAD] = {"grad_batch", "grad_token", "grad_head"};
  for (int i = 0; i < GRAD; i++) arguments[i] = polyvit_integer(names[i], call->grad_strides[i]);
}

int polyvit_attention_forward(const polyvit_attention *call, const void *qkv, void *out, float *lse, void *stream) {
  polyvit_attention full;
  const polyvit_row *row;
  int status = checked(call, &full);
  if (status || !full.batch || !full.tokens) return status;
  if ((status = find_row(&full, "forward", &row))) return status;
  const char *name = is_long(row) ? "attention_long_fwd_kernel" : "attention_short_fwd_kernel";
  const polyvit_kernel *kernel = kernel_of(row, name, &full, is_long(row));
  if (!kernel) return POLYVIT_NO_KERNEL;
  polyvit_argument arguments[] = {
      polyvit_pointer("p_qkv", qkv),          polyvit_pointer("p_out", out),         polyvit_pointer("p_lse", lse),
      polyvit_integer("tokens", full.tokens), polyvit_integer("heads", full.heads), polyvit_real("scale", scale_of(&full)),
      {0}, {0}, {0}, {0}};
  put_qkv_strides(arguments + 6, &full);
  const int64_t grid[3] = {blocks(full.tokens, polyvit_kernels_constant(kernel, "BLOCK_M", 1)), full.heads, full.batch};
  return polyvit_kernels_launch(kernel, stream, grid, arguments, sizeof arguments / sizeof *arguments);
}

static int launch_delta(const polyvit_row *row, const polyvit_attention *call, const void *grad, const void *out, float *delta,
                        void *stream) {
  const polyvit_kernel *kernel = kernel_of(row, "attention_long_bwd_kernel_delta", call, 1);
  if (!kernel) return POLYVIT_NO_KERNEL;
  polyvit_argument arguments[] = {polyvit_pointer("p_grad", grad),         polyvit_pointer("p_out", out),
                                  polyvit_pointer("p_delta", delta),       polyvit_integer("tokens", call->tokens),
                                  polyvit_integer("heads", call->heads),   {0}, {0}, {0}};
  put_grad_strides(arguments + 5, call);
  const int64_t grid[3] = {blocks(call->tokens, polyvit_kernels_constant(kernel, "BLOCK_M", 1)), call->heads, call->batch};
  return polyvit_kernels_launch(kernel, stream, grid, arguments, sizeof arguments / sizeof *arguments);
}

static int launch_backward(const polyvit_row *row, const polyvit_attention *call, const polyvit_argument *pointers, size_t num_pointers,
                           void *stream) {
  const polyvit_kernel *kernel =
      kernel_of(row, is_long(row) ? "attention_long_bwd_kernel" : "attention_short_bwd_kernel", call, is_long(row));
  if (!kernel) return POLYVIT_NO_KERNEL;
  polyvit_argument arguments[16];
  size_t count = 0;
  for (; count < num_pointers; count++) arguments[count] = pointers[count];
  arguments[count++] = polyvit_integer("tokens", call->tokens);
  arguments[count++] = polyvit_integer("heads", call->heads);
  arguments[count++] = polyvit_real("scale", scale_of(call));
  put_grad_strides(arguments + count, call);
  put_qkv_strides(arguments + count + GRAD, call);
  count += GRAD + QKV;
  if (!is_long(row)) {
    const int64_t grid[3] = {call->heads, call->batch, 1};
    return polyvit_kernels_launch(kernel, stream, grid, arguments, count);
  }
  /* The first programs take the blocks of keys, the others those of queries. */
  int64_t key_blocks = blocks(call->tokens, polyvit_kernels_constant(kernel, "KEYS_N", 1));
  arguments[count++] = polyvit_integer("key_blocks", key_blocks);
  const int64_t grid[3] = {key_blocks + blocks(call->tokens, polyvit_kernels_constant(kernel, "BLOCK_M", 1)), call->heads, call->batch};
  return polyvit_kernels_launch(kernel, stream, grid, arguments, count);
}

int polyvit_attention_backward(const polyvit_attention *call, const void *grad, const void *qkv, const void *out, const float *lse,
                               float *scratch, void *qkv_grad, void *stream) {
  polyvit_attention full;
  const polyvit_row *row;
  int status = checked(call, &full);
  if (status || !full.batch || !full.tokens) return status;
  if ((status = find_row(&full, "backward", &row))) return status;
  const polyvit_argument common[] = {polyvit_pointer("p_grad", grad), polyvit_pointer("p_qkv", qkv), polyvit_pointer("p_lse", lse),
                                     polyvit_pointer("p_dqkv", qkv_grad), polyvit_pointer(is_long(row) ? "p_delta" : "p_out", is_long(row) ? scratch : out)};
  if (is_long(row) && (status = launch_delta(row, &full, grad, out, scratch, stream))) return status;
  return launch_backward(row, &full, common, sizeof common / sizeof *common, stream);
}

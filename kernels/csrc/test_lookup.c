/* Every lookup of a file written with the table (op, dtype, arch, tokens, features, row) gives that row, and near misses give none. */
#include "polyvit_kernels.h"

#include <stdio.h>
#include <string.h>

enum { MOST_TOLD = 20 };

static int failures;

static void check(int is_right, const char *what) {
  if (!is_right && failures++ < MOST_TOLD) fprintf(stderr, "wrong: %s (last error: %s)\n", what, polyvit_kernels_error());
}

static size_t repeat_lookups(const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  char op[64], dtype[16];
  int arch;
  long long tokens, features, expected;
  size_t count = 0;
  for (; fscanf(file, "%63s %15s %d %lld %lld %lld", op, dtype, &arch, &tokens, &features, &expected) == 6; count++) {
    const polyvit_row *row = polyvit_kernels_find(op, dtype, arch, tokens, features);
    if (row == (expected < 0 ? NULL : polyvit_kernels_entry((size_t)expected))) continue;
    if (failures++ < MOST_TOLD)
      fprintf(stderr, "wrong: %s %s sm_%d, %lld tokens, %lld features gives another row than %lld\n", op, dtype, arch, tokens, features, expected);
  }
  fclose(file);
  return count;
}

static void check_row(const polyvit_row *row) {
  char words[256];
  snprintf(words, sizeof words, "%s %s sm_%d", row->op, row->dtype, row->arch);
  const polyvit_row *found = polyvit_kernels_find(row->op, row->dtype, row->arch, row->min_tokens, row->max_features);
  /* An earlier row may serve a part of this one's sizes. */
  check(row->num_kernels ? found && found <= row && !strcmp(found->op, row->op) : 1, words);
  check(!polyvit_kernels_find(row->op, "int8", row->arch, row->min_tokens, row->max_features), "a dtype without rows");
  check(strstr(polyvit_kernels_error(), "no kernel for") != NULL, "the words for it");
  check(!polyvit_kernels_find(row->op, row->dtype, 70, row->min_tokens, row->max_features), "a GPU older than all");
  check(!polyvit_kernels_find(row->op, row->dtype, row->arch, -1, row->max_features), "a number of tokens out of range");
  for (int i = 0; i < row->num_kernels; i++) {
    const polyvit_kernel *kernel = row->kernels[i];
    check(kernel->image_bytes > 4 && !memcmp(kernel->image, "\177ELF", 4), "an image is an ELF file");
    check((uintptr_t)kernel->image % 64 == 0, "an image is aligned");
    check(polyvit_kernels_choose(row, kernel->name, NULL) != NULL, "a kernel by its name");
    check(!polyvit_kernels_choose(row, kernel->name, "NO_SUCH=1"), "a constant that it has not");
    if (!kernel->num_constants) continue;
    snprintf(words, sizeof words, "%s=%s", kernel->constants[0].name, kernel->constants[0].value);
    check(polyvit_kernels_choose(row, kernel->name, words) != NULL, words);
    strcat(words, "0");
    check(polyvit_kernels_choose(row, kernel->name, words) != kernel, words);
  }
}

int main(int count, char **arguments) {
  size_t rows = polyvit_kernels_count(), lookups = count > 1 ? repeat_lookups(arguments[1]) : 0;
  check(rows > 0, "the table has rows");
  check(lookups > rows, "the file has a lookup for every row");
  for (size_t i = 0; i < rows; i++) check_row(polyvit_kernels_entry(i));
  check(!polyvit_kernels_entry(rows), "there is nothing beyond the last row");
  check(!polyvit_kernels_find("attention_sideways", "bf16", 90, 1, 1), "an op without rows");
  check(!polyvit_kernels_find(NULL, "bf16", 90, 1, 1), "no op");
  printf("%zu rows, %zu lookups, %d failures\n", rows, lookups, failures);
  return failures != 0;
}

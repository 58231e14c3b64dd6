/* The generated part of the library: what `python -m polyvit_kernels.aot --out` writes. */
#ifndef POLYVIT_TABLE_H
#define POLYVIT_TABLE_H

#include "polyvit_kernels.h"

extern const polyvit_row polyvit_rows[];
extern const size_t polyvit_num_rows;

/* Each image once; rows point here. */
extern const polyvit_kernel polyvit_images[];
extern const size_t polyvit_num_images;

/* The architectures that have rows, whether compiled or not: an arch takes the rows of the nearest older one of these. */
extern const int32_t polyvit_archs[];
extern const size_t polyvit_num_archs;

/* The cubins, one after the other (polyvit_cubins.S). */
extern const unsigned char polyvit_cubins[];

/* Keep the message of a failure, and return the status. */
int polyvit_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif

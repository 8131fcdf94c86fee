// Kernels of 16-bit activations on float weights: support/gpu_kernels.cuh.
#include "support/gpu_kernels.cuh"

KERNELS_16_ON_FLOAT(template, bfloat16)
KERNELS_16_ON_FLOAT(template, half)
KERNELS_BFLOAT16_BY_COLUMN_ON_FLOAT(template)

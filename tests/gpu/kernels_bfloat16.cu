// Kernels of bfloat16, and of float on its weights: support/gpu_kernels.cuh.
#include "support/gpu_kernels.cuh"

KERNELS_16(template, bfloat16)
KERNELS_FLOAT_ON_16(template, bfloat16)

// Kernels of half, and of float on its weights: support/gpu_kernels.cuh.
#include "support/gpu_kernels.cuh"

KERNELS_16(template, half)
KERNELS_FLOAT_ON_16(template, half)

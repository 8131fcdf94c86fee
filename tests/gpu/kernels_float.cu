// Kernels of float, and rows of any scalar: support/gpu_kernels.cuh.
#include "support/gpu_kernels.cuh"

FLOAT_KERNELS(template)
ROWS_OF(template, Gate)
ROWS_OF(template, GateBackward)

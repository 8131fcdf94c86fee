#include "support/cpu_kernels.hpp"

KERNELS_OF_BFLOAT16()

#define KERNELS template struct
#include "support/cpu_kernels.hpp"

// What no op may call: allocation and synchronisation; and how many launches an op takes.
#pragma once

namespace loramix_test {

/// How often this program has called cudaMalloc, cudaFree, cudaMemcpy or a synchronisation so far.
int forbidden_calls();
/// How many kernels it has launched and memories it has set.
int launches();

}  // namespace loramix_test

// What no op may call: allocation and synchronisation.
#pragma once

namespace loramix_test {

/// How often this program has called cudaMalloc, cudaFree, cudaMemcpy or a synchronisation so far.
int forbidden_calls();

}  // namespace loramix_test

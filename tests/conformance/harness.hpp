// What a backend's tests give to the conformance suite: a harness.
//
//   static constexpr lm::Space space
//   backend()                      what ops take
//   upload(values) → T*            std::vector<T> copied to memory that kernels see, never null, alive until release()
//   download(from, values)         waits for the backend's work, then copies values.size() elements into `values`
//   arena(bytes) → lm::Arena       exactly so many usable bytes, their contents arbitrary (best: NaN), alive until release()
//   status() → lm::StatusFlags*    device memory, or null
//   release() → bool               frees all; false where something was written outside what was handed out, or flagged
//
// Each harness is a few lines: tests/cpu/harness.hpp, tests/gpu/harness.cuh.
#pragma once

#include <loramix/core/arena.hpp>
#include <loramix/ops/execute.hpp>

namespace loramix_test {

namespace lm = loramix;

/// Runs an op with exactly the scratch that it asks for.
template <class H, class Op>
void run(H& harness, const Op& op) {
  lm::execute(harness.backend(), op, harness.arena(lm::scratch_bytes(harness.backend(), op)));
}

}  // namespace loramix_test

/// How blocks that share a result find out which of them is the last to arrive, and so adds up what all have left.
///
///   Tickets            counters in device memory; a Backend carries their address, one Tickets per stream
///   last_to_arrive     true in every thread of the last of `arrivals` blocks, which then sees what the others wrote before
///
/// Computes:    integer counts; sums are the last block's business, in a fixed order: which block that is changes no bit.
/// Errors:      CUDA calls failing (ErrorCode::device).
/// Cost:        4 KiB; one atomic per block. Counters are zero before and after every kernel. Without Tickets the sums take a launch
///              of their own, and each row body that follows them another.
/// Determinism: the order of arrival decides who adds, never in which order.
/// Example:     tests/gpu/harness.cuh
#pragma once
#include <loramix/gpu/buffer.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// Counters that an op may use at a time. More tiles than that fill any device without sharing.
inline constexpr Index ticket_count = 1024;

/// Owns the counters of one stream; give `address()` to Backend::tickets.
class Tickets {
 public:
  Tickets() : counters_(ticket_count) {}
  unsigned* address() { return counters_.data(); }

 private:
  Buffer<unsigned, Space::device> counters_;
};

namespace detail {

__device__ inline bool last_to_arrive(unsigned* ticket, unsigned arrivals) {
  __shared__ bool last;
  __threadfence();  // what this thread wrote is there before its block counts
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) + 1 == arrivals;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

/// Adapters between host and device: made and loaded on the host, run on the device.
///
/// Computes:    a copy of every parameter, elements and layout unchanged.
/// Reads:       parameters() of one side, [n] values.
/// Writes:      the other's.
/// Errors:      sizes that differ; CUDA failures (ErrorCode::device).
/// Cost:        to_device allocates; all wait until the copy is done, but not for what streams that do not wait for the default
///              one still compute: synchronise those first. For loaders, checkpoints and tests.
/// Determinism: bit for bit.
/// Example:     tests/consumer/use_gpu.cu
#pragma once
#include <loramix/core/adapter.hpp>
#include <loramix/gpu/buffer.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// The adapter A in device memory.
template <Adapter A>
using device_t = typename A::template rebind<typename A::element, Space::device>;

/// Copies parameters between two adapters, or two gradients, of one configuration.
template <Adapter From, Adapter To>
void copy_parameters(const From& from, To& to) {
  check::same("copy_parameters", "to", "size", to.parameters().size, "the other's", from.parameters().size);
  copy(from.parameters(), to.parameters());
}

/// A device copy of a host adapter.
template <Adapter A>
  requires(A::space == Space::host)
device_t<A> to_device(const A& adapter) {
  device_t<A> there(adapter.config());
  copy_parameters(adapter, there);
  return there;
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

/// The GPU backend: the engine's stream and cuBLAS handle. Views are in device memory; scratch comes from the caller's
/// arena.
///
/// No op allocates, synchronises or reads device memory on the host: whatever a call enqueues can be captured in a CUDA
/// graph. The stream's device must be current. The handle may be shared with the engine: an op sets stream, pointer
/// mode, math mode, atomics mode and workspace, and puts back what it found, except that the workspace becomes cuBLAS's
/// own again (cuBLAS does not tell what it was). One handle per thread, as cuBLAS asks.
///
/// Errors:      every CUDA and cuBLAS status other than success is an Error (ErrorCode::device) that names the call. What
///              kernels find wrong with data, such as a bad expert id, sets a flag in `status` (gpu/status.cuh).
/// Cost:        every op that multiplies takes `blas_bytes` of workspace. cuBLAS recommends 4 MiB, 12 MiB on sm_120 and
///              32 MiB on sm_90 and sm_100; it needs 16 KiB. With a workspace of ours it never takes its own pool.
/// Determinism: run to run, for one device model, cuBLAS version and blas_bytes: which product cuBLAS runs depends on them.
/// Example:     tests/gpu/harness.cuh
#pragma once
#include <cublas_v2.h>

#include <loramix/core/arena.hpp>
#include <loramix/gate/form.hpp>
#include <loramix/gpu/check.cuh>
#include <loramix/gpu/tickets.cuh>
#include <loramix/gpu/tuning.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// Device memory: a matrix in it, and an arena of it.
template <class T, Major M = Major::row>
using View = MatrixView<T, Space::device, M>;
using DeviceArena = Arena<Space::device>;

/// What an op needs of the engine. A value: copy it freely.
struct Backend {
  static constexpr Space space = Space::device;
  cudaStream_t stream = nullptr;
  cublasHandle_t cublas = nullptr;
  StatusFlags* status = nullptr;  // device memory, or null: bad data contributes nothing and is not reported
  Index blas_bytes = Index{4} << 20;
  unsigned* tickets = nullptr;  // gpu/tickets.cuh, of this stream; null: what blocks share takes launches more
  Tuning tuning{};              // gpu/tuning.cuh: 163 KiB of shared memory; tune(machine_of(device)) for others
};

namespace detail {

/// The form as this backend's kernels see it.
template <class Score>
GateForm<Score, Space::device> reporting(const Backend& be, GateForm<Score, Space::device> gate) {
  if (be.status != nullptr) gate.status = be.status;
  return gate;
}

}  // namespace detail

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

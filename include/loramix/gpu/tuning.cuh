/// How kernels cut their work: one formula from documented facts of a machine, and a plain struct that the caller may replace.
///
///   Machine            multiprocessors, and shared memory that a block may have; machine_of(device) asks CUDA, outside of any op
///   Tuning             what the kernels obey; tune(machine) is the formula
///
/// Computes:    tune: fused kernels on, exact arithmetic, and how work is cut. A multiprocessor takes in at most 64 bytes per clock, so
///              a block of `block_bytes` = 128 KiB streams for about 1.5 µs, and handing its sums to another block costs about
///              one (a write, an atomic and a read through L2): that is as small as blocks get. Blocks that share a result read
///              or leave something twice: kernels take as many blocks as there is room for while that is at most 1/share of x, y,
///              dx or dy, which are moved once, and more only where a block would stream more than 4·block_bytes.
/// Errors:      a CUDA call failing (ErrorCode::device).
/// Cost:        none; machine_of is a few host calls.
/// Determinism: kernels, tiles and orders of summation follow from shape, scalar, gate, class of T and these numbers.
/// Example:     tests/gpu/fused.cu
#pragma once
#include <loramix/core/views.hpp>
#include <loramix/gpu/check.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// Facts of a device; the defaults are those of compute capability 8.0 (CUDA programming guide, table of technical specifications).
struct Machine {
  int multiprocessors = 108;
  Index shared_bytes = Index{163} << 10;  // of one block, opt-in
};

/// The current device's, or another's.
inline Machine machine_of(int device) {
  int multiprocessors = 0, shared = 0;
  check_cuda("cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_cuda("cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {multiprocessors, shared};
}

/// How floats of rank space (ũ, dU, dH) enter the tensor cores of 16-bit types.
enum class RankTerms {
  exact,   // as terms that hold all of their bits: the composed path's accuracy
  rounded  // rounded once to the weights' type, as PyTorch and vLLM do: a third of the tensor-core work
};

/// What the kernels obey.
struct Tuning {
  Machine machine{};
  bool fused = true;  // false: the composed path
  bool tf32 = false;  // float products on tensor cores, operands rounded to 11 bits
  RankTerms terms = RankTerms::exact;
  Index block_bytes = Index{128} << 10;
  Index share = 8;
  Index dense_ranks =
      256;  // up to here all ranks are computed, whatever a top-k gate closes; beyond, by expert (ADR 11, 12)
};

/// The formula.
constexpr Tuning tune(const Machine& machine) {
  Tuning t;
  t.machine = machine;
  return t;
}

namespace detail {

/// MATH.md section 6: inside a class a token's result does not depend on how many there are. The tokens that stand for the class in
/// formulas.
constexpr Index class_tokens(Index tokens) { return tokens <= 4 ? 4 : 64; }

constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
constexpr Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

/// How many parts: one for every block_bytes of `bytes`, but where `twice` · parts exceeds once / share, only one for every
/// 4·block_bytes.
constexpr Index parts_for(const Tuning& tuning, Index bytes, Index once, Index twice, Index most) {
  const Index wanted = bytes / tuning.block_bytes, needed = bytes / (4 * tuning.block_bytes);
  const Index cheap = once / (tuning.share * (twice < 1 ? 1 : twice));
  const Index parts = wanted < cheap ? wanted : cheap < needed ? needed : cheap;
  return parts < 1 ? 1 : parts < most ? parts : most;
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

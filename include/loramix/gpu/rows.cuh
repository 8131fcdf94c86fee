/// Row operations and token sums on the GPU: a warp per row, a thread per (group, column).
///
/// Computes:    what ops/rows.hpp and ops/column_sum.hpp say, for any number of rows: grids stride over them.
/// Errors:      a launch that CUDA refuses (ErrorCode::device).
/// Cost:        one launch; no scratch.
/// Determinism: as ops/rows.hpp and ops/column_sum.hpp.
/// Example:     tests/gpu/rows.cu
#pragma once
#include <loramix/gpu/launch.cuh>
#include <loramix/gpu/team.cuh>
#include <loramix/ops/column_sum.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

namespace detail {

inline constexpr int warps_per_block = 4;     // rows of a block whose teams are warps
inline constexpr int wide_row_threads = 256;  // of a block that shares one row of x, y or a weight matrix
inline constexpr Index most_blocks = 65535;   // beyond, blocks take several rows each

/// Blocks for `items`, `per_block` of them in each.
constexpr unsigned blocks_for(Index items, Index per_block) {
  const Index blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks);
}

/// __grid_constant__: a body may keep references to its members without a copy in every thread.
template <class Tm, int teams, class Body>
__global__ void __launch_bounds__(teams* Tm::width) rows_kernel(Index rows, const __grid_constant__ Body body) {
  const Index step = Index{gridDim.x} * teams;
  for (Index t = Index{blockIdx.x} * teams + threadIdx.x / Tm::width; t < rows; t += step) body(Tm{}, t);
}

template <class Tm, int teams, class Body>
void launch_rows(const Backend& be, Index rows, const Body& body) {
  launch(be, "rows_kernel", &rows_kernel<Tm, teams, Body>, dim3(blocks_for(rows, teams)), teams * Tm::width, 0, rows,
         body);
}

/// A block for every row: bodies that run along x, y or a weight matrix.
template <class Body>
void for_wide_rows(const Backend& be, Index rows, const Body& body) {
  launch_rows<BlockTeam<wide_row_threads>, 1>(be, rows, body);
}

template <class Op>
__global__ void __launch_bounds__(128) column_sum_kernel(const __grid_constant__ Op op) {
  const Index cells = op.out.rows * op.out.cols, step = Index{gridDim.x} * blockDim.x;
  for (Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x; i < cells; i += step) {
    op.template block<1>(i / op.out.cols, i % op.out.cols, 1);
  }
}

}  // namespace detail

template <class Body>
Index scratch_impl(const Backend&, const Rows<Body, Space::device>&) {
  return 0;
}

/// Runs the body with a warp for every row.
template <class Body>
void execute_impl(const Backend& be, const Rows<Body, Space::device>& op, DeviceArena) {
  detail::launch_rows<WarpTeam, detail::warps_per_block>(be, op.rows, op.body);
}

template <class Acc, class Out>
Index scratch_impl(const Backend&, const ColumnSum<Acc, Out, Space::device>&) {
  return 0;
}

template <class Acc, class Out>
void execute_impl(const Backend& be, const ColumnSum<Acc, Out, Space::device>& op, DeviceArena) {
  if (op.out.empty()) return;
  constexpr int threads = 128;
  detail::launch(be, "column_sum_kernel", &detail::column_sum_kernel<ColumnSum<Acc, Out, Space::device>>,
                 dim3(detail::blocks_for(op.out.rows * op.out.cols, threads)), threads, 0, op);
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

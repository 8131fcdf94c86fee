// The GPU kernels of the scalars that tests use, compiled once for all of them (tests/gpu/kernels_*.cu). Forced upon every .cu of
// test_gpu: without it each would compile its own. What is left to a test is kernels that go on with the rows of its gate.
#pragma once
#include <loramix/gpu/product.cuh>

namespace loramix_test::kernels {

using loramix::gpu::WarpTeam;
using loramix::gpu::detail::NoRows;
using Gate = loramix::detail::ApplyGate<float, float, loramix::Space::device>;
using GateBackward = loramix::detail::ApplyGateBackward<float, float, loramix::Space::device>;
template <class E>
using Exact = loramix::gpu::detail::Tensor<E>;
template <class E>
using Rounded = loramix::gpu::detail::Tensor<E, 1>;
using Tf32 = loramix::gpu::detail::Tensor<float>;
using Ffma = loramix::gpu::detail::Fma<float, float>;
template <class X>
using OnFloat = loramix::gpu::detail::Fma<X, float>;
template <class W>
using FloatOn = loramix::gpu::detail::Fma<float, W>;

}  // namespace loramix_test::kernels

// KERNELS is `extern template` or `template`.
#define LAUNCH_OF(KERNELS, OWNER, MATH, ...) \
  KERNELS struct loramix::gpu::detail::fused::OWNER<loramix_test::kernels::MATH, __VA_ARGS__>;
#define SHRINK_OF(KERNELS, MATH)                                              \
  LAUNCH_OF(KERNELS, ShrinkLaunch, MATH, true, loramix_test::kernels::NoRows) \
  LAUNCH_OF(KERNELS, ShrinkLaunch, MATH, true, loramix_test::kernels::Gate)   \
  LAUNCH_OF(KERNELS, ShrinkLaunch, MATH, true, loramix_test::kernels::GateBackward)
#define SHRINK_BY_COLUMN_OF(KERNELS, MATH) \
  LAUNCH_OF(KERNELS, ShrinkLaunch, MATH, false, loramix_test::kernels::GateBackward)
#define EXPAND_OF(KERNELS, MATH, Y) LAUNCH_OF(KERNELS, ExpandLaunch, MATH, Y, false)
#define EXPAND_BY_COLUMN_OF(KERNELS, MATH, Y) LAUNCH_OF(KERNELS, ExpandLaunch, MATH, Y, true)
#define TOKEN_SUM_OF(KERNELS, MATH) LAUNCH_OF(KERNELS, TokenSumLaunch, MATH, float)

// What a unit compiles, by the scalars of x and y; "on" weights of others.
#define FLOAT_KERNELS(KERNELS)              \
  SHRINK_OF(KERNELS, Tf32)                  \
  SHRINK_OF(KERNELS, Ffma)                  \
  SHRINK_BY_COLUMN_OF(KERNELS, Tf32)        \
  SHRINK_BY_COLUMN_OF(KERNELS, Ffma)        \
  EXPAND_OF(KERNELS, Tf32, float)           \
  EXPAND_OF(KERNELS, Ffma, float)           \
  EXPAND_BY_COLUMN_OF(KERNELS, Tf32, float) \
  EXPAND_BY_COLUMN_OF(KERNELS, Ffma, float) \
  TOKEN_SUM_OF(KERNELS, Tf32)               \
  TOKEN_SUM_OF(KERNELS, Ffma)
#define KERNELS_16(KERNELS, E)                                  \
  SHRINK_OF(KERNELS, Exact<loramix::E>)                         \
  SHRINK_BY_COLUMN_OF(KERNELS, Exact<loramix::E>)               \
  EXPAND_OF(KERNELS, Exact<loramix::E>, loramix::E)             \
  EXPAND_OF(KERNELS, Rounded<loramix::E>, loramix::E)           \
  EXPAND_BY_COLUMN_OF(KERNELS, Exact<loramix::E>, loramix::E)   \
  EXPAND_BY_COLUMN_OF(KERNELS, Rounded<loramix::E>, loramix::E) \
  TOKEN_SUM_OF(KERNELS, Exact<loramix::E>)                      \
  TOKEN_SUM_OF(KERNELS, Rounded<loramix::E>)
#define KERNELS_FLOAT_ON_16(KERNELS, E)        \
  SHRINK_OF(KERNELS, FloatOn<loramix::E>)      \
  EXPAND_OF(KERNELS, Exact<loramix::E>, float) \
  EXPAND_OF(KERNELS, Rounded<loramix::E>, float)
#define KERNELS_16_ON_FLOAT(KERNELS, E)   \
  SHRINK_OF(KERNELS, OnFloat<loramix::E>) \
  EXPAND_OF(KERNELS, Tf32, loramix::E)    \
  EXPAND_OF(KERNELS, Ffma, loramix::E)
#define KERNELS_BFLOAT16_BY_COLUMN_ON_FLOAT(KERNELS)       \
  SHRINK_BY_COLUMN_OF(KERNELS, OnFloat<loramix::bfloat16>) \
  EXPAND_BY_COLUMN_OF(KERNELS, Tf32, loramix::bfloat16)    \
  EXPAND_BY_COLUMN_OF(KERNELS, Ffma, loramix::bfloat16)
#define ROWS_OF(KERNELS, BODY)                                                                               \
  KERNELS void                                                                                               \
  loramix::gpu::detail::launch_rows<loramix_test::kernels::WarpTeam, loramix::gpu::detail::warps_per_block>( \
      const loramix::gpu::Backend&, loramix::Index, const loramix_test::kernels::BODY&);

FLOAT_KERNELS(extern template)
KERNELS_16(extern template, bfloat16)
KERNELS_16(extern template, half)
KERNELS_FLOAT_ON_16(extern template, bfloat16)
KERNELS_FLOAT_ON_16(extern template, half)
KERNELS_16_ON_FLOAT(extern template, bfloat16)
KERNELS_16_ON_FLOAT(extern template, half)
KERNELS_BFLOAT16_BY_COLUMN_ON_FLOAT(extern template)
ROWS_OF(extern template, Gate)
ROWS_OF(extern template, GateBackward)

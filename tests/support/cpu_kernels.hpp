// The CPU kernels of the scalars that tests use, compiled once for all of them (cpu_kernels_*.cpp). Forced upon every test that
// runs on the CPU: without it each would compile its own.
#pragma once
#include <loramix/cpu/fused.hpp>

#define KERNELS_OF(DECLARED, X, W, M)                         \
  DECLARED loramix::cpu::detail::PanelContraction<X, W, M>;   \
  DECLARED loramix::cpu::detail::Spread<X, W, M>;             \
  DECLARED loramix::cpu::detail::TokenSum<X, W, M>;           \
  DECLARED loramix::cpu::detail::GroupedContraction<X, W, M>; \
  DECLARED loramix::cpu::detail::GroupedSpread<X, W, M>;      \
  DECLARED loramix::cpu::detail::GroupedTokenSum<X, W, M>;
#define ALL_KERNELS_OF(DECLARED, X, W)                 \
  DECLARED loramix::cpu::detail::DotContraction<X, W>; \
  KERNELS_OF(DECLARED, X, W, loramix::Major::row)      \
  KERNELS_OF(DECLARED, X, W, loramix::Major::column)

#define KERNELS_OF_FLOAT(DECLARED)       \
  ALL_KERNELS_OF(DECLARED, float, float) \
  ALL_KERNELS_OF(DECLARED, float, loramix::bfloat16)
#define KERNELS_OF_BFLOAT16(DECLARED)                            \
  ALL_KERNELS_OF(DECLARED, loramix::bfloat16, loramix::bfloat16) \
  ALL_KERNELS_OF(DECLARED, loramix::bfloat16, float)
#define KERNELS_OF_HALF(DECLARED)                        \
  ALL_KERNELS_OF(DECLARED, loramix::half, loramix::half) \
  ALL_KERNELS_OF(DECLARED, loramix::half, float)

KERNELS_OF_FLOAT(extern template struct)
KERNELS_OF_BFLOAT16(extern template struct)
KERNELS_OF_HALF(extern template struct)

// The CPU kernels of the scalars that tests use, compiled once for all of them (cpu_kernels.cpp). Forced upon every test that
// runs on the CPU: without it each would compile its own.
#pragma once
#include <loramix/cpu/fused.hpp>

#ifndef KERNELS
#define KERNELS extern template struct
#endif
#define KERNELS_OF(X, W, M)                                  \
  KERNELS loramix::cpu::detail::PanelContraction<X, W, M>;   \
  KERNELS loramix::cpu::detail::Spread<X, W, M>;             \
  KERNELS loramix::cpu::detail::TokenSum<X, W, M>;           \
  KERNELS loramix::cpu::detail::GroupedContraction<X, W, M>; \
  KERNELS loramix::cpu::detail::GroupedSpread<X, W, M>;      \
  KERNELS loramix::cpu::detail::GroupedTokenSum<X, W, M>;
#define ALL_KERNELS_OF(X, W)                          \
  KERNELS loramix::cpu::detail::DotContraction<X, W>; \
  KERNELS_OF(X, W, loramix::Major::row)               \
  KERNELS_OF(X, W, loramix::Major::column)

ALL_KERNELS_OF(float, float)
ALL_KERNELS_OF(float, loramix::bfloat16)
ALL_KERNELS_OF(loramix::bfloat16, loramix::bfloat16)
ALL_KERNELS_OF(loramix::bfloat16, float)
ALL_KERNELS_OF(loramix::half, loramix::half)
ALL_KERNELS_OF(loramix::half, float)

// The CPU kernels of the scalars that tests use, compiled once for all of them (cpu_kernels_*.cpp). Forced upon every test that
// runs on the CPU: without it each would compile its own.
#pragma once
#include <loramix/cpu/fused.hpp>

// EXTERN: `extern`, or nothing.
#define KERNELS_OF(EXTERN, X, W, M)                                                                                \
  EXTERN template struct loramix::cpu::detail::PanelContraction<X, W, M>;                                          \
  EXTERN template struct loramix::cpu::detail::Spread<X, W, M>;                                                    \
  EXTERN template void loramix::cpu::detail::TokenSum<X, W, M>::run(                                               \
      loramix::Index, loramix::Index, loramix::Index, loramix::Index, float*, const loramix::cpu::detail::NoHint&) \
      const;                                                                                                       \
  EXTERN template struct loramix::cpu::detail::GroupedContraction<X, W, M>;                                        \
  EXTERN template struct loramix::cpu::detail::GroupedSpread<X, W, M>;                                             \
  EXTERN template struct loramix::cpu::detail::GroupedTokenSum<X, W, M>;
#define ALL_KERNELS_OF(EXTERN, X, W)                                 \
  EXTERN template struct loramix::cpu::detail::DotContraction<X, W>; \
  KERNELS_OF(EXTERN, X, W, loramix::Major::row)                      \
  KERNELS_OF(EXTERN, X, W, loramix::Major::column)

#define KERNELS_OF_FLOAT(EXTERN)                                          \
  ALL_KERNELS_OF(EXTERN, float, float)                                    \
  ALL_KERNELS_OF(EXTERN, float, loramix::bfloat16)                        \
  EXTERN template struct loramix::cpu::detail::DotsAndSums<float, float>; \
  EXTERN template struct loramix::cpu::detail::DotsAndSums<loramix::bfloat16, float>;
#define KERNELS_OF_BFLOAT16(EXTERN)                            \
  ALL_KERNELS_OF(EXTERN, loramix::bfloat16, loramix::bfloat16) \
  ALL_KERNELS_OF(EXTERN, loramix::bfloat16, float)
#define KERNELS_OF_HALF(EXTERN)                        \
  ALL_KERNELS_OF(EXTERN, loramix::half, loramix::half) \
  ALL_KERNELS_OF(EXTERN, loramix::half, float)

KERNELS_OF_FLOAT(extern)
KERNELS_OF_BFLOAT16(extern)
KERNELS_OF_HALF(extern)

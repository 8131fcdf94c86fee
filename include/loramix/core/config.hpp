/// Everything that depends on the compiler: the two public macros, and every `#if` of the library.
///
///   LORAMIX_ABI  name of the inline namespace: major version, instruction set, CUDA architectures, exceptions off. Two
///                translation units compiled for different machines then hold different functions instead of sharing one
///                body by link order.
///   LORAMIX_HD   marks a function that also runs on the device.
#pragma once

#if defined(__AVX512F__) && defined(__AMX_TILE__)
#define LORAMIX_DETAIL_ISA v0_avx512_amx
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LORAMIX_DETAIL_ISA v0_avx512
#elif defined(__AVX512F__)
#define LORAMIX_DETAIL_ISA v0_avx512f
#elif defined(__AVX2__) && defined(__FMA__)
#define LORAMIX_DETAIL_ISA v0_avx2_fma
#elif defined(__AVX2__)
#define LORAMIX_DETAIL_ISA v0_avx2
#elif defined(__AVX__)
#define LORAMIX_DETAIL_ISA v0_avx
#elif defined(__SSE4_2__)
#define LORAMIX_DETAIL_ISA v0_sse42
#elif defined(__SSE2__)
#define LORAMIX_DETAIL_ISA v0_sse2
#elif defined(__ARM_NEON)
#define LORAMIX_DETAIL_ISA v0_neon
#else
#define LORAMIX_DETAIL_ISA v0_generic
#endif

#if defined(__CUDACC__)
#define LORAMIX_HD __host__ __device__
#define LORAMIX_DETAIL_1(i, a) i##_sm##a
#define LORAMIX_DETAIL_2(i, a, b) i##_sm##a##_##b
#define LORAMIX_DETAIL_3(i, a, b, c) i##_sm##a##_##b##_##c
#define LORAMIX_DETAIL_4(i, a, b, c, d) i##_sm##a##_##b##_##c##_##d
#define LORAMIX_DETAIL_5(i, a, b, c, d, ...) i##_sm##a##_##b##_##c##_##d##_more
#define LORAMIX_DETAIL_PICK(i, a, b, c, d, e, f, g, h, name, ...) name
#define LORAMIX_DETAIL_NAME(...)                                                                           \
  LORAMIX_DETAIL_PICK(__VA_ARGS__, LORAMIX_DETAIL_5, LORAMIX_DETAIL_5, LORAMIX_DETAIL_5, LORAMIX_DETAIL_5, \
                      LORAMIX_DETAIL_4, LORAMIX_DETAIL_3, LORAMIX_DETAIL_2, LORAMIX_DETAIL_1, )            \
  (__VA_ARGS__)
#define LORAMIX_DETAIL_EXPAND(...) LORAMIX_DETAIL_NAME(__VA_ARGS__)
#define LORAMIX_ABI LORAMIX_DETAIL_EXPAND(LORAMIX_DETAIL_ISA, __CUDA_ARCH_LIST__)
#else
#define LORAMIX_HD
#if defined(__cpp_exceptions)
#define LORAMIX_ABI LORAMIX_DETAIL_ISA
#else
#define LORAMIX_DETAIL_WITHOUT(isa) isa##_noexceptions
#define LORAMIX_DETAIL_EXPAND(isa) LORAMIX_DETAIL_WITHOUT(isa)
#define LORAMIX_ABI LORAMIX_DETAIL_EXPAND(LORAMIX_DETAIL_ISA)
#endif
#endif

namespace loramix {
inline namespace LORAMIX_ABI {
namespace detail {

/// True where contents of views are checked as well as shapes: builds without NDEBUG.
#if defined(NDEBUG)
inline constexpr bool debug_checks = false;
#else
inline constexpr bool debug_checks = true;
#endif

/// The products of the low halves of 64-bit lanes. gcc would multiply whole lanes where it has AVX-512 DQ: three times
/// the work.
template <class Lanes>
LORAMIX_HD inline Lanes multiply_low_halves(Lanes a, Lanes b) {
  return (a & 0xffffffffu) * (b & 0xffffffffu);
}
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
typedef unsigned long long Lanes512 __attribute__((vector_size(64)));
inline Lanes512 multiply_low_halves(Lanes512 a, Lanes512 b) {
  typedef int Halves __attribute__((vector_size(64)));
  typedef long long Signed __attribute__((vector_size(64)));
  return (Lanes512)__builtin_ia32_pmuludq512_mask((Halves)a, (Halves)b, Signed{}, 0xff);
}
#endif

/// Throws `error`; returns, so that the caller can go to the error handler, where exceptions are off.
template <class Error>
void throw_if_possible(const Error& error) {
#if defined(__cpp_exceptions)
  throw error;
#else
  static_cast<void>(error);
#endif
}

}  // namespace detail
}  // namespace LORAMIX_ABI
}  // namespace loramix

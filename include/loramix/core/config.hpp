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

/// The products of the low halves of 64-bit lanes, whatever the high halves hold. gcc multiplies whole lanes otherwise, at
/// three times the cost.
template <class Lanes>
LORAMIX_HD inline Lanes multiply_low_halves(Lanes a, Lanes b) {
  return (a & 0xffffffffu) * (b & 0xffffffffu);
}
#if defined(__SSE2__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
typedef unsigned long long Lanes128 __attribute__((vector_size(16)));
typedef int Halves128 __attribute__((vector_size(16)));
inline Lanes128 multiply_low_halves(Lanes128 a, Lanes128 b) {
  return (Lanes128)__builtin_ia32_pmuludq128((Halves128)a, (Halves128)b);
}
#if defined(__AVX2__)
typedef unsigned long long Lanes256 __attribute__((vector_size(32)));
typedef int Halves256 __attribute__((vector_size(32)));
inline Lanes256 multiply_low_halves(Lanes256 a, Lanes256 b) {
  return (Lanes256)__builtin_ia32_pmuludq256((Halves256)a, (Halves256)b);
}
#endif
#if defined(__AVX512F__)
typedef unsigned long long Lanes512 __attribute__((vector_size(64)));
typedef int Halves512 __attribute__((vector_size(64)));
typedef long long Signed512 __attribute__((vector_size(64)));
inline Lanes512 multiply_low_halves(Lanes512 a, Lanes512 b) {
  return (Lanes512)__builtin_ia32_pmuludq512_mask((Halves512)a, (Halves512)b, Signed512{}, 0xff);
}
#endif
#endif

/// Whether `keep_lanes_by_mask` below is there: lanes of 16 floats kept by the bits of a mask register.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__CUDACC__)
inline constexpr bool has_mask_registers = true;
typedef float Floats512 __attribute__((vector_size(64), may_alias));
inline Floats512 keep_lanes_by_mask(Floats512 v, unsigned short bits) {
#if defined(__clang__)
  return __builtin_ia32_selectps_512(bits, v, Floats512{});
#else
  return __builtin_ia32_movaps512_mask(v, Floats512{}, bits);
#endif
}
#else
inline constexpr bool has_mask_registers = false;
template <class V>
LORAMIX_HD inline V keep_lanes_by_mask(V v, unsigned short) {
  return v;
}
#endif

/// Keeps a vector in a register: what is used more than once is not read from memory with every use, as compilers like to.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__CUDACC__)
template <class V>
[[gnu::always_inline]] inline void keep_in_register(V& v) {
  asm("" : "+v"(v));
}
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
template <class V>
[[gnu::always_inline]] inline void keep_in_register(V& v) {
  asm("" : "+x"(v));
}
#else
template <class V>
LORAMIX_HD inline void keep_in_register(V&) {}
#endif

/// Whether `round_to_bfloat16` below is there: 16 floats rounded to nearest at once; subnormal ones become 0.
#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__GNUC__) && !defined(__CUDACC__)
inline constexpr bool has_bfloat16_rounding = true;
typedef unsigned short Shorts256 __attribute__((vector_size(32)));
inline Shorts256 round_to_bfloat16(Floats512 v) {
  Shorts256 out;
  asm("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(v));
  return out;
}
#else
inline constexpr bool has_bfloat16_rounding = false;
template <class V>
LORAMIX_HD inline V round_to_bfloat16(V v) {
  return v;
}
#endif

/// Whether assembly of x86-64 may be written (cpu/amx.hpp).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
inline constexpr bool has_x86_assembly = true;
#else
inline constexpr bool has_x86_assembly = false;
#endif

/// What a thread says to its core while it looks for something another thread will write.
inline void relax() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
  __builtin_ia32_pause();
#endif
}

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

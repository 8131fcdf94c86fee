#include <cstdio>

double product_avx2();
double product_avx512();

int main() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("isa: not run (this CPU has no AVX2)");
    return 77;
  }
  const double narrow = product_avx2();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) {
    std::printf("avx2 %.9g; avx512: not run (this CPU has none)\n", narrow);
    return 77;
  }
  const double wide = product_avx512();
  std::printf("avx2 %.9g, avx512 %.9g\n", narrow, wide);
  return narrow == wide && narrow != 0 ? 0 : 1;
}

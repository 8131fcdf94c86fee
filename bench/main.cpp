// All rows in one process. Called by bench/run.
#include "rows.hpp"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("timing", "medians of interleaved rounds; ratios within a round; steady_clock");
  benchmark::AddCustomContext("compiler", LORAMIX_BENCH_COMPILER);
  benchmark::AddCustomContext("flags", LORAMIX_BENCH_FLAGS);
  bench::register_instrument();
  bench::register_lora();
  bench::register_gates();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

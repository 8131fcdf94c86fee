// All rows in one process. Called by bench/run.
//
//   --quick            12 rounds instead of 30
//   --rounds N         N rounds; half for what takes more than 50 ms, a quarter for what takes more than 0.25 s
//   --smoke            one round: whether rows run, and baselines agree
//   --beside A,B,…     beside the baselines of these names only
#include <cstring>
#include <sstream>

#include "rows.hpp"

namespace {

// Takes our own arguments out of argv.
int take_arguments(int argc, char** argv) {
  int kept = 0;
  for (int i = 0; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) {
      bench::thoroughness().rounds = {.rounds = 12, .rounds_of_slow = 6, .rounds_of_slowest = 3};
    } else if (std::strcmp(argv[i], "--smoke") == 0) {
      bench::thoroughness().rounds = {.rounds = 1, .rounds_of_slow = 1, .rounds_of_slowest = 1, .sample = 0};
    } else if (std::strcmp(argv[i], "--rounds") == 0 && i + 1 < argc) {
      const int n = std::max(1, std::atoi(argv[++i]));
      bench::thoroughness().rounds = {
          .rounds = n, .rounds_of_slow = (n + 1) / 2, .rounds_of_slowest = (n + 3) / 4, .sample = 1e-3};
    } else if (std::strcmp(argv[i], "--beside") == 0 && i + 1 < argc) {
      std::istringstream names(argv[++i]);
      for (std::string name; std::getline(names, name, ',');) bench::thoroughness().beside.push_back(name);
    } else {
      argv[kept++] = argv[i];
    }
  }
  return kept;
}

}  // namespace

int main(int argc, char** argv) {
  argc = take_arguments(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("timing", "medians of interleaved rounds; ratios within a round; steady_clock");
  benchmark::AddCustomContext("compiler", LORAMIX_BENCH_COMPILER);
  benchmark::AddCustomContext("flags", LORAMIX_BENCH_FLAGS);
  bench::register_instrument();
  bench::register_classes();
  bench::register_shapes();
  bench::register_stages();
  bench::register_adapters();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

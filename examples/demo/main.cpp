// The demo: a small network that reads handwritten digits is fine-tuned to read them in six domains at once (rotated,
// inverted, …), each of which calls the digits by other names, by every method of the library.
//
//   demo [--out FOLDER] [--quick] [--same-labels] [--threads N]
//
// The training loop of an adapter is in adapted.hpp. The same accuracies in every run, with any number of threads.
#include <chrono>
#include <cstdlib>
#include <exception>
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/moe_lora.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/core/thread_pool.hpp>

#include "report.hpp"

namespace {

using namespace demo;

// One line per method, at most the parameters of LoRA r = 24 from there on, routers included.
std::vector<Method> all_methods() {
  const auto by_task = [](auto& config) { config.tasks = domains; };
  const auto by_task_shared = [](lm::MoeLoraConfig& config) {
    config.tasks = domains;
    config.shared_A = true;
  };
  return {
      frozen_base(),
      full_fine_tuning(),
      adapter<lm::Lora<float>>("LoRA, r = 4", {.total_rank = 4}),
      adapter<lm::Lora<float>>("LoRA, r = 24", {.total_rank = 24}),
      // One adapter for all images.
      adapter<lm::Dora<float>>("DoRA", {.total_rank = 24}),
      adapter<lm::MosLora<float>>("MoSLoRA", {.total_rank = 24}),
      adapter<lm::MultiLora<float>>("MultiLoRA, 3 of 7", {.total_rank = 24, .experts = 3}),
      adapter<lm::AdaLora<float>>("AdaLoRA, 69 to 46 ranks", {.total_rank = 24}),
      adapter<lm::Ia3<float>>("IA3, natural size", {}),
      // Mixtures whose routers see the image.
      adapter<lm::LoraMoe<float>>("LoRAMoE, 4 of 5", {.total_rank = 20, .experts = 4}),
      adapter<lm::HydraLora<float>>("HydraLoRA, 4 of 9", {.total_rank = 36, .experts = 4}),
      adapter<lm::Mola<float>>("MoLA, 2 of 4", {.total_rank = 20, .experts = 4}),
      adapter<lm::TeamLora<float>>("TeamLoRA, 4 of 5", {.total_rank = 20, .experts = 4},
                                   [](lm::TeamLoraConfig& config) { config.hidden = 7; }),
      adapter<lm::Moa<float>>("MoA, routed by itself", {.total_rank = 18, .experts = domains}, {}, Domains::routed),
      // Methods that are told the domain.
      adapter<lm::Moa<float>>("MoA, told", {.total_rank = 18, .experts = domains}),
      adapter<lm::MoeLora<float>>("MOELoRA, 4 of 5, told", {.total_rank = 20, .experts = 4}, by_task),
      adapter<lm::MoeLora<float>>("MOELoRA, one A, told", {.total_rank = 36, .experts = 4}, by_task_shared),
      adapter<lm::More<float>>("MoRE, at most 13, told", {.total_rank = 13}, by_task),
  };
}

struct Options {
  std::string out = ".";
  bool quick = false;        // one seed, few epochs
  bool same_labels = false;  // the domains do not conflict
  int threads = static_cast<int>(std::thread::hardware_concurrency());
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool value = i + 1 < argc;
    if (argument == "--quick")
      options.quick = true;
    else if (argument == "--same-labels")
      options.same_labels = true;
    else if (argument == "--out" && value)
      options.out = argv[++i];
    else if (argument == "--threads" && value)
      options.threads = std::atoi(argv[++i]);
    else
      throw std::runtime_error("usage: demo [--out FOLDER] [--quick] [--same-labels] [--threads N]");
  }
  options.threads = std::max(options.threads, 1);
  return options;
}

/// The data of a seed, and the network that has learnt the clean images.
Task make_task(const Images& digits, const Options& options, std::uint64_t seed) {
  const Protocol clean{.epochs = options.quick ? 5 : 40, .batch = 64, .lr = 1e-3, .lr_at_end = 1e-3};
  const Protocol mixed{.epochs = options.quick ? 2 : 30, .batch = 128, .lr = 5e-3, .lr_at_end = 0};
  Task task{seed, split(digits, !options.same_labels, seed), fresh_network(seed), mixed};
  train(task.base, task.data.clean_train, clean, seed);
  return task;
}

/// Every method on every task, as many at a time as there are threads. No number depends on how many.
std::vector<Row> learn(const Images& digits, const Options& options, std::vector<Task>& tasks) {
  std::vector<Row> rows;
  for (const Method& method : all_methods()) rows.push_back({method, std::vector<Outcome>(tasks.size())});

  Eigen::setNbThreads(1);
  lm::ThreadPool pool(options.threads);
  const lm::Index seeds = static_cast<lm::Index>(tasks.size()), methods = static_cast<lm::Index>(rows.size());
  Progress progress(static_cast<std::size_t>(seeds * (1 + methods)), options.threads);
  pool.executor().run(seeds, [&](Index seed, Index) {
    tasks[seed] = make_task(digits, options, seed + 1);
    progress.done("base network, seed " + std::to_string(seed + 1));
  });
  pool.executor().run(seeds * methods, [&](Index job, Index) {
    Row& row = rows[job / seeds];
    const Index seed = job % seeds;
    row.seeds[seed] = row.method.run(tasks[seed]);
    progress.done(row.method.name + ", seed " + std::to_string(seed + 1));
  });
  return rows;
}

void print_setting(const Options& options, const std::vector<Task>& tasks) {
  double clean = 0;
  for (const Task& task : tasks) {
    const Images& test = task.data.clean_test;
    clean += accuracy(task.base.logits(test), test.label) / static_cast<double>(tasks.size());
  }
  std::printf(
      "Handwritten digits in six domains with %s labels: %% of 540 test images read right, mean of %zu seed%s.\n"
      "The base network reads %.1f %% of the clean images.\n\n",
      options.same_labels ? "the same" : "conflicting", tasks.size(), tasks.size() == 1 ? "" : "s", clean);
}

/// Saves, loads and merges what was trained with the first seed.
bool check_round_trips(const std::vector<Row>& rows, const std::string& folder) {
  bool passed = true;
  std::printf("Saved in %s, loaded back, merged into the weights and taken out again (first seed):\n", folder.c_str());
  for (const Row& row : rows) {
    if (!row.seeds[0].check) continue;
    const RoundTrip trip = row.seeds[0].check(folder);
    std::printf("  %-8s%s\n", trip.passed ? "ok" : "FAILED", trip.text.c_str());
    passed = passed && trip.passed;
  }
  return passed;
}

int run(const Options& options) {
  std::filesystem::create_directories(options.out);
  const Images digits = read_digits(LORAMIX_EXAMPLES_DIR "/data/digits.csv");
  std::vector<Task> tasks(options.quick ? 1 : 5);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<Row> rows = learn(digits, options, tasks);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  print_setting(options, tasks);
  print_table(rows);
  std::printf("\n");
  print_details(rows);
  std::printf("\n");
  const bool passed = check_round_trips(rows, options.out);
  const std::string results = options.out + "/results.json";
  write_results(results, rows);
  std::printf("\n%.0f s; written to %s\n", seconds.count(), results.c_str());
  return passed ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "demo: %s\n", error.what());
    return 1;
  }
}

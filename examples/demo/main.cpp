// The demo: a small network that reads handwritten digits is fine-tuned to read them in six domains at once (rotated,
// inverted, …), each of which calls the digits by other names, by every method of the library.
//
//   demo [--out FOLDER] [--quick] [--same-labels] [--threads N]
//
// The training loop of an adapter is in adapted.hpp. The same accuracies in every run, with any number of threads.
#include <cstdlib>
#include <exception>
#include <loramix/adapter/lora.hpp>
#include <loramix/core/thread_pool.hpp>

#include "report.hpp"

namespace {

using namespace demo;

// One line per method.
std::vector<Method> all_methods() {
  return {
      frozen_base(),
      full_fine_tuning(),
      adapter<lm::Lora<float>>("LoRA, r = 4", {.total_rank = 4}),
      adapter<lm::Lora<float>>("LoRA, r = 24", {.total_rank = 24}),
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

int run(const Options& options) {
  Eigen::setNbThreads(1);  // the threads work on different seeds and methods instead
  lm::ThreadPool pool(options.threads);
  std::filesystem::create_directories(options.out);

  const std::vector<Method> methods = all_methods();
  const Images digits = read_digits(LORAMIX_EXAMPLES_DIR "/data/digits.csv");
  std::vector<Task> tasks(options.quick ? 1 : 5);
  std::vector<std::vector<Outcome>> outcomes(methods.size(), std::vector<Outcome>(tasks.size()));
  Progress progress(tasks.size() * (methods.size() + 1));

  const double seconds = seconds_of([&] {
    const auto each = [&](std::size_t jobs, const auto& job) {
      pool.executor().run(static_cast<Index>(jobs), [&](Index i, Index) { job(static_cast<std::size_t>(i)); });
    };
    each(tasks.size(), [&](std::size_t seed) {
      tasks[seed] = make_task(digits, options, seed + 1);
      progress.done("base network, seed " + std::to_string(seed + 1));
    });
    each(methods.size() * tasks.size(), [&](std::size_t job) {
      const std::size_t method = job / tasks.size(), seed = job % tasks.size();
      outcomes[method][seed] = methods[method].run(tasks[seed]);
      progress.done(methods[method].name + ", seed " + std::to_string(seed + 1));
    });
  });

  double clean = 0;
  for (const Task& task : tasks) {
    clean += accuracy(task.base.logits(task.data.clean_test.x), task.data.clean_test.label) / tasks.size();
  }
  std::printf(
      "Digits in six domains, %s labels: accuracy in %% of 540 test images, %zu seed%s. The base network reads "
      "%.1f %% of\nthe clean images.\n\n",
      options.same_labels ? "the same" : "conflicting", tasks.size(), tasks.size() == 1 ? "" : "s", clean);
  print_table(methods, outcomes);

  bool passed = true;
  std::printf("\nWhat was trained with the first seed, saved, loaded and merged:\n");
  for (std::size_t i = 0; i < methods.size(); ++i) {
    if (!outcomes[i][0].check) continue;
    const RoundTrip trip = outcomes[i][0].check(options.out);
    std::printf("%s %s\n", trip.passed ? "ok    " : "FAILED", trip.text.c_str());
    passed = passed && trip.passed;
  }

  const std::string file = options.out + "/results.json";
  write_results(file, methods, outcomes);
  std::printf("\n%.0f s with %d thread%s; written to %s\n", seconds, options.threads, options.threads == 1 ? "" : "s",
              file.c_str());
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

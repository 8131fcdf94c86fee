// The demo: a small network that reads handwritten digits is fine-tuned to read them in six domains at once (rotated,
// inverted, …), each of which calls the digits by other names, by every method of the library.
//
//   demo [--out FOLDER] [--pictures FOLDER] [--only TEXT] [--quick] [--ablations] [--same-labels] [--threads N]
//
// Methods are in one_adapter.cpp, token_mixtures.cpp, told_the_domain.cpp and other_networks.cpp, the training loop of an
// adapter in adapted.hpp. The same accuracies in every run, with any number of threads.
#include <chrono>
#include <cstdlib>
#include <exception>
#include <filesystem>

#include "expert_picture.hpp"
#include "loss_picture.hpp"
#include "rank_picture.hpp"
#include "report.hpp"
#include "results.hpp"
#include "study.hpp"

namespace {

using namespace demo;

Choices parse(int argc, char** argv) {
  Choices choices;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool value = i + 1 < argc;
    if (argument == "--quick")
      choices.quick = true;
    else if (argument == "--ablations")
      choices.ablations = true;
    else if (argument == "--same-labels")
      choices.same_labels = true;
    else if (argument == "--out" && value)
      choices.out = argv[++i];
    else if (argument == "--pictures" && value)
      choices.pictures = argv[++i];
    else if (argument == "--only" && value)
      choices.only = argv[++i];
    else if (argument == "--threads" && value)
      choices.threads = std::atoi(argv[++i]);
    else
      throw std::runtime_error(
          "usage: demo [--out FOLDER] [--pictures FOLDER] [--only TEXT] [--quick] [--ablations] [--same-labels] "
          "[--threads N]");
  }
  choices.threads = std::max(choices.threads, 1);
  if (choices.pictures.empty()) choices.pictures = choices.out;
  return choices;
}

/// How many of the clean images a base network reads, in percent.
template <class Net>
double reads_clean(const std::vector<Task>& tasks) {
  std::vector<double> percent;
  for (const Task& task : tasks) {
    const Images& test = task.data.clean_test;
    percent.push_back(accuracy(logits(task.network<Net>(), test.x), test.label));
  }
  return spread(percent).mean;
}

void print_setting(const Choices& choices, const std::vector<Task>& tasks) {
  std::printf(
      "Handwritten digits in six domains with %s labels: %% of 540 test images read right, mean of %zu seed%s.\n"
      "The base networks read %.1f %% (gated: %.1f %%, tokens: %.1f %%) of the clean images.\n\n",
      choices.same_labels ? "the same" : "conflicting", tasks.size(), tasks.size() == 1 ? "" : "s",
      reads_clean<Mlp>(tasks), reads_clean<Gated>(tasks), reads_clean<Reader>(tasks));
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

void draw(const std::vector<Row>& rows, const std::string& folder) {
  draw_losses(rows, folder + "/loss.svg");
  draw_load(rows, folder + "/load.svg");
  draw_shapley(rows, folder + "/shapley.svg");
  for (const Row& row : rows) {
    if (row.title.name == more_name && !row.ablation()) draw_ranks(row, more_rank, folder + "/ranks.svg");
  }
}

int run(const Choices& choices) {
  const auto start = std::chrono::steady_clock::now();
  std::filesystem::create_directories(choices.out);
  std::filesystem::create_directories(choices.pictures);
  Study study(read_digits(LORAMIX_EXAMPLES_DIR "/data/digits.csv"), choices);
  study.run();

  print_setting(choices, study.tasks());
  print_table(study.rows());
  std::printf("\n");
  print_details(study.rows());
  if (choices.ablations) print_ablations(study.rows());
  const bool passed = check_round_trips(study.rows(), choices.out);
  const std::string results = choices.out + "/results.json";
  write_results(results, study.rows());
  draw(study.rows(), choices.pictures);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("\n%.0f s; written to %s; pictures to %s\n", seconds.count(), results.c_str(), choices.pictures.c_str());
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

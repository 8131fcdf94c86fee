// All of it: every network of every seed learns the clean images, and then every method the domains.
#pragma once
#include <loramix/core/thread_pool.hpp>

#include "report.hpp"

namespace demo {

/// What the command line chose.
struct Choices {
  std::string out = ".", pictures = {};
  std::string only = {};     // methods with this in their names, and their ablations
  bool quick = false;        // one seed, few epochs
  bool ablations = false;    // too
  bool same_labels = false;  // the domains do not conflict
  int threads = static_cast<int>(std::thread::hardware_concurrency());
};

/// The data of a seed; the networks know nothing yet.
inline Task make_task(const Images& digits, const Choices& choices, std::uint64_t seed) {
  const Protocol mixed{.epochs = choices.quick ? 2 : 30, .batch = 128, .lr = 5e-3, .lr_at_end = 0};
  return {seed,
          split(digits, !choices.same_labels, seed),
          {fresh<Mlp>(seed), fresh<Gated>(seed), fresh<Reader>(seed)},
          mixed};
}

/// Trains as many at a time as there are threads. No number depends on how many.
class Study {
 public:
  Study(const Images& digits, const Choices& choices) : choices_(choices) {
    for (int seed = 1; seed <= (choices.quick ? 1 : 5); ++seed) tasks_.push_back(make_task(digits, choices, seed));
    for (const Group& group : {no_adapter(), one_adapter(), token_mixtures(), told_the_domain(), listed(),
                               gated_blocks(), image_rows_as_tokens()}) {
      for (const Method& method : group.methods) {
        if (std::none_of(method.rows.begin(), method.rows.end(), [&](const Title& t) { return wanted(t); })) continue;
        methods_.push_back(method);
        for (const Title& title : method.rows) {
          rows_.push_back({group.title, title, method.trainable, method.network, std::vector<Outcome>(tasks_.size())});
        }
      }
    }
    if (methods_.empty()) throw std::runtime_error("no method has \"" + choices.only + "\" in its name");
  }

  void run() {
    Eigen::setNbThreads(1);
    lm::ThreadPool pool(choices_.threads);
    const Index seeds = static_cast<Index>(tasks_.size()), methods = static_cast<Index>(methods_.size());
    Progress progress(static_cast<std::size_t>(seeds * (3 + methods)), choices_.threads);
    pool.executor().run(seeds * 3, [&](Index job, Index) {
      Task& task = tasks_[job % seeds];
      if (job / seeds == 0) learn_clean<Mlp>(task, 1e-3);
      if (job / seeds == 1) learn_clean<Gated>(task, 1e-3);
      if (job / seeds == 2) learn_clean<Reader>(task, 3e-3);
      progress.done("a base network, seed " + std::to_string(task.seed));
    });
    std::vector<std::size_t> first_row{0};
    for (const Method& method : methods_) first_row.push_back(first_row.back() + method.rows.size());
    pool.executor().run(seeds * methods, [&](Index job, Index) {
      const Index m = job / seeds, seed = job % seeds;
      std::vector<Outcome> outcomes = methods_[m].run(tasks_[seed]);
      for (std::size_t i = 0; i < outcomes.size(); ++i) {
        rows_[first_row[m] + i].seeds[seed] = std::move(outcomes[i]);
      }
      progress.done(methods_[m].rows[0].name + ", seed " + std::to_string(seed + 1));
    });
    std::erase_if(rows_, [&](const Row& row) { return !wanted(row.title); });
  }

  const std::vector<Task>& tasks() const { return tasks_; }
  const std::vector<Row>& rows() const { return rows_; }

 private:
  bool wanted(const Title& title) const {
    if (!title.of.empty() && !choices_.ablations) return false;
    return title.of.empty() ? title.name.find(choices_.only) != std::string::npos : wanted({title.of});
  }
  template <class Net>
  void learn_clean(Task& task, double lr) const {
    const Protocol clean{.epochs = choices_.quick ? 5 : 40, .batch = 64, .lr = lr, .lr_at_end = lr};
    train(std::get<Net>(task.networks), task.data.clean_train, clean, task.seed);
  }

  Choices choices_;
  std::vector<Task> tasks_;
  std::vector<Method> methods_;
  std::vector<Row> rows_;
};

}  // namespace demo

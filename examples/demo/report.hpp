// What is printed and written: a progress line, a table and results.json.
#pragma once
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>

#include "methods.hpp"

namespace demo {

/// One line that says how far the work is; on a terminal only.
class Progress {
 public:
  explicit Progress(std::size_t jobs) : jobs_(jobs) {}

  void done(const std::string& what) {
    const std::lock_guard lock(mutex_);
    ++done_;
    if (terminal_) std::printf("\r\033[K[%zu/%zu] %s", done_, jobs_, done_ < jobs_ ? what.c_str() : "\r\033[K");
    std::fflush(stdout);
  }

 private:
  std::mutex mutex_;
  const bool terminal_ = isatty(STDOUT_FILENO) != 0;
  const std::size_t jobs_;
  std::size_t done_ = 0;
};

/// A method over all seeds.
struct Summary {
  double seconds = 0;                      // mean
  std::array<double, domains> accuracy{};  // means
  double average = 0, sd = 0;              // of the averages over domains; sd of the sample, 0 for one seed
};

inline Summary summarise(const std::vector<Outcome>& outcomes) {
  const double n = static_cast<double>(outcomes.size());
  Summary s;
  for (const Outcome& outcome : outcomes) {
    s.seconds += outcome.seconds / n;
    s.average += outcome.average() / n;
    for (int k = 0; k < domains; ++k) s.accuracy[k] += outcome.accuracy[k] / n;
  }
  for (const Outcome& outcome : outcomes) s.sd += std::pow(outcome.average() - s.average, 2);
  s.sd = outcomes.size() > 1 ? std::sqrt(s.sd / (n - 1)) : 0;
  return s;
}

inline double percent_of_network(const Method& method) {
  return 100.0 * static_cast<double>(method.trainable) / static_cast<double>(Network::size());
}

inline void print_table(const std::vector<Method>& methods, const std::vector<std::vector<Outcome>>& outcomes) {
  std::printf("%-18s%10s%8s%9s", "method", "trainable", "%", "seconds");
  for (const char* name : domain_names) std::printf("%10s", name);
  std::printf("%15s\n", "average ± sd");
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const Summary s = summarise(outcomes[i]);
    std::printf("%-18s%10lld%8.1f%9.1f", methods[i].name.c_str(), static_cast<long long>(methods[i].trainable),
                percent_of_network(methods[i]), s.seconds);
    for (const double percent : s.accuracy) std::printf("%10.1f", percent);
    std::printf("%8.1f ± %3.1f\n", s.average, s.sd);
  }
}

inline void write_results(const std::string& file, const std::vector<Method>& methods,
                          const std::vector<std::vector<Outcome>>& outcomes) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const Summary s = summarise(outcomes[i]);
    nlohmann::ordered_json accuracy;
    for (int k = 0; k < domains; ++k) accuracy[domain_names[k]] = s.accuracy[k];
    rows.push_back({{"method", methods[i].name},
                    {"trainable", methods[i].trainable},
                    {"percent", percent_of_network(methods[i])},
                    {"seconds", s.seconds},
                    {"seeds", outcomes[i].size()},
                    {"accuracy", accuracy},
                    {"average", s.average},
                    {"sd", s.sd}});
  }
  std::ofstream out(file);
  out << rows.dump(2) << '\n';
  if (!out.flush()) throw std::runtime_error("cannot write " + file);
}

}  // namespace demo

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

/// How far the work is: one line, rewritten on a terminal, written once elsewhere.
class Progress {
 public:
  Progress(std::size_t jobs, int threads) : jobs_(jobs) {
    std::printf("training %zu networks, %d at a time%s", jobs, threads, terminal_ ? "" : "\n\n");
    std::fflush(stdout);
  }
  void done(const std::string& what) {
    const std::lock_guard lock(mutex_);
    ++done_;
    if (!terminal_) return;
    std::printf("\r\033[K");
    if (done_ < jobs_) std::printf("[%zu/%zu] %s", done_, jobs_, what.c_str());
    std::fflush(stdout);
  }

 private:
  std::mutex mutex_;
  const bool terminal_ = isatty(STDOUT_FILENO) != 0;
  const std::size_t jobs_;
  std::size_t done_ = 0;
};

struct Row {
  Method method;
  std::vector<Outcome> seeds;
};

/// A method over all seeds.
struct Summary {
  double seconds = 0;                      // mean
  std::array<double, domains> accuracy{};  // means
  double average = 0, sd = 0;              // of the averages over domains; sd of the sample, 0 for one seed
  std::vector<Detail> details;             // means
};

inline Summary summarise(const std::vector<Outcome>& outcomes) {
  const double n = static_cast<double>(outcomes.size());
  Summary s;
  for (const Outcome& outcome : outcomes) {
    s.seconds += outcome.seconds / n;
    s.average += outcome.average() / n;
    for (int k = 0; k < domains; ++k) s.accuracy[k] += outcome.accuracy[k] / n;
  }
  for (std::size_t i = 0; i < outcomes[0].details.size(); ++i) {
    s.details.push_back({outcomes[0].details[i].name});
    for (const Outcome& outcome : outcomes) {
      for (int k = 0; k < domains; ++k) s.details[i].value[k] += outcome.details[i].value[k] / n;
    }
  }
  for (const Outcome& outcome : outcomes) s.sd += std::pow(outcome.average() - s.average, 2);
  s.sd = outcomes.size() > 1 ? std::sqrt(s.sd / (n - 1)) : 0;
  return s;
}

inline double percent_of_network(const Method& method) {
  return 100.0 * static_cast<double>(method.trainable) / static_cast<double>(Network::size());
}

inline void print_table(const std::vector<Row>& rows) {
  std::printf("%-24s%10s%7s%9s", "method", "trainable", "%", "seconds");
  for (const char* name : domain_names) std::printf("%9s", name);
  std::printf("%15s\n", "average ± sd");
  for (const Row& row : rows) {
    const Summary s = summarise(row.seeds);
    std::printf("%-24s%10lld%7.1f%9.1f", row.method.name.c_str(), static_cast<long long>(row.method.trainable),
                percent_of_network(row.method), s.seconds);
    for (const double percent : s.accuracy) std::printf("%9.1f", percent);
    std::printf("%8.1f ± %3.1f\n", s.average, s.sd);
  }
}

/// What routers chose in the domains, mean over seeds.
inline void print_details(const std::vector<Row>& rows) {
  std::printf("%-50s", "what routers chose");
  for (const char* name : domain_names) std::printf("%9s", name);
  std::printf("\n");
  for (const Row& row : rows) {
    for (const Detail& detail : summarise(row.seeds).details) {
      std::printf("%-24s%-26s", row.method.name.c_str(), detail.name.c_str());
      for (const double value : detail.value) std::printf(value < 10 ? "%9.2f" : "%9.1f", value);
      std::printf("\n");
    }
  }
}

inline void write_results(const std::string& path, const std::vector<Row>& rows) {
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const Row& row : rows) {
    const Summary s = summarise(row.seeds);
    nlohmann::ordered_json accuracy;
    for (int k = 0; k < domains; ++k) accuracy[domain_names[k]] = s.accuracy[k];
    nlohmann::ordered_json details = nlohmann::ordered_json::object();
    for (const Detail& detail : s.details) {
      for (int k = 0; k < domains; ++k) details[detail.name][domain_names[k]] = detail.value[k];
    }
    results.push_back({{"method", row.method.name},
                       {"trainable", row.method.trainable},
                       {"percent", percent_of_network(row.method)},
                       {"seconds", s.seconds},
                       {"seeds", row.seeds.size()},
                       {"accuracy", accuracy},
                       {"average", s.average},
                       {"sd", s.sd},
                       {"details", details}});
  }
  std::ofstream file(path);
  file << results.dump(2) << '\n';
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace demo

// What is printed: a progress line and tables.
#pragma once
#include <unistd.h>

#include <cstdio>
#include <mutex>

#include "rows.hpp"

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
  bool terminal_ = isatty(STDOUT_FILENO) != 0;
  std::mutex mutex_;
  std::size_t jobs_, done_ = 0;
};

/// Left-aligned in `width` columns: printf counts bytes, and φ has two.
inline std::string padded(const std::string& text, int width) {
  int columns = 0;
  for (const char c : text) columns += (c & 0xC0) != 0x80;
  return text + std::string(static_cast<std::size_t>(std::max(width - columns, 0)), ' ');
}

inline void print_domain_names() {
  for (const char* name : domain_names) std::printf("%9s", name);
}

inline void print_table(const std::vector<Row>& rows) {
  std::printf("%s%10s%7s%9s", padded("method", 28).c_str(), "trainable", "%", "seconds");
  print_domain_names();
  std::printf("%15s\n", "average ± sd");
  std::string group;
  for (const Row& row : rows) {
    if (row.ablation()) continue;
    if (row.group != group && !group.empty()) std::printf("— %s\n", row.group.c_str());
    group = row.group;
    const double seconds = over_seeds(row, [](const Outcome& outcome) { return outcome.seconds; }).mean;
    std::printf("%s%10lld%7.1f%9.1f", padded(row.title.name, 28).c_str(), static_cast<long long>(row.trainable),
                row.percent(), seconds);
    for (int k = 0; k < domains; ++k) {
      std::printf("%9.1f", over_seeds(row, [k](const Outcome& outcome) { return outcome.accuracy[k]; }).mean);
    }
    const Spread all = average(row);
    std::printf("%8.1f ± %3.1f\n", all.mean, all.sd);
  }
}

/// What routers chose in the domains, mean over seeds.
inline void print_details(const std::vector<Row>& rows) {
  const auto has_none = [](const Row& row) { return row.ablation() || row.seeds[0].details.of_domains.empty(); };
  if (std::all_of(rows.begin(), rows.end(), has_none)) return;
  std::printf("%s", padded("what routers chose", 60).c_str());
  print_domain_names();
  std::printf("\n");
  for (const Row& row : rows) {
    if (has_none(row)) continue;
    for (const Detail& detail : details(row)) {
      std::printf("%s%s", padded(row.title.name, 28).c_str(), padded(detail.name, 32).c_str());
      for (const double value : detail.value) std::printf(std::fabs(value) < 10 ? "%9.2f" : "%9.1f", value);
      std::printf("\n");
    }
  }
  std::printf("\n");
}

/// What every ablation changes, and how much that varies from seed to seed.
inline void print_ablations(const std::vector<Row>& rows) {
  std::printf("%s%15s%22s\n", padded("ablation", 36).c_str(), "average ± sd", "difference ± sd");
  for (const Row& own : rows) {
    if (own.ablation()) continue;
    bool first = true;
    for (const Row& row : rows) {
      if (row.title.of != own.title.name) continue;
      const Spread all = average(own), other = average(row), change = difference(row, rows);
      if (first) std::printf("%s%8.1f ± %3.1f\n", padded(own.title.name, 36).c_str(), all.mean, all.sd);
      std::printf("  %s%8.1f ± %3.1f%+15.1f ± %3.1f\n", padded(row.title.name, 34).c_str(), other.mean, other.sd,
                  change.mean, change.sd);
      first = false;
    }
  }
  std::printf("\n");
}

}  // namespace demo

/// Timing that survives a machine that drifts: everything compared is called in the same rounds, and only ratios
/// within a round are kept.
///
/// Computes:    seconds[contender][round], per call; a Ratio is the median over rounds of per-round ratios, with the
///              minimum and the interquartile range beside it.
/// Parameters:  contenders: a name and a call each. In a round they come in shuffled order (seeded); each is called as
///              often as fills a sample, after one call that is not timed where a call is short, so that it finds the
///              caches as it leaves them itself. A sample during which the scheduler took the processor away is taken
///              again where it is short, up to three times, and the fastest kept; `disturbed` says how many stayed so.
/// Errors:      none.
/// Cost:        30 rounds; contenders over 50 ms take part in 15 of them, contenders over a quarter of a second in 5.
/// Determinism: the order is; times are not.
/// Example:     bench/instrument.cpp
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <sys/resource.h>

#include <loramix/core/config.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace bench {

/// Something to be timed.
struct Contender {
  std::string name;
  std::function<void()> call;
  double sample = 0;  // seconds that one sample lasts at least, where that is more than the others need
};

/// How many rounds, and how long a sample.
struct RoundOptions {
  int rounds = 30;
  int rounds_of_slow = 15;    // a divisor of rounds, so that the slow ones meet each other
  int rounds_of_slowest = 5;  // a divisor of rounds_of_slow
  double slow = 0.05;         // seconds per call from which a contender is slow
  double slowest = 0.25;      // and among the slowest
  double sample = 1e-3;       // seconds that one sample lasts at least
  double warmed = 1e-2;       // seconds per call below which an untimed call goes before each sample
  unsigned seed = 7;          // of the order
};

/// Median, extremes and interquartile range of per-round values.
struct Ratio {
  double median = std::numeric_limits<double>::quiet_NaN();
  double min = median, max = median, spread = median;
  int rounds = 0;
};

/// Summary of the values that are not NaN.
inline Ratio summary(std::vector<double> values) {
  std::erase_if(values, [](double v) { return std::isnan(v); });
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto quantile = [&values](double q) {
    const double at = q * static_cast<double>(values.size() - 1);
    const std::size_t low = static_cast<std::size_t>(at);
    const std::size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
  };
  return {quantile(0.5), values.front(), values.back(), quantile(0.75) - quantile(0.25),
          static_cast<int>(values.size())};
}

/// Seconds per call, by contender and round; NaN where a slow contender sat a round out.
struct Rounds {
  std::vector<std::vector<double>> seconds;
  double disturbed = 0;  // share of the samples in which the process was preempted

  Ratio time(std::size_t i) const { return summary(seconds[i]); }
  /// Time of i over time of j, round by round.
  Ratio ratio(std::size_t i, std::size_t j) const {
    std::vector<double> ratios(seconds[i].size());
    for (std::size_t r = 0; r < ratios.size(); ++r) ratios[r] = seconds[i][r] / seconds[j][r];
    return summary(std::move(ratios));
  }
};

namespace detail {
inline double seconds_of(const std::function<void()>& call, long calls) {
  const auto begin = std::chrono::steady_clock::now();
  for (long i = 0; i < calls; ++i) call();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return elapsed.count() / static_cast<double>(calls);
}

/// How often the scheduler has taken a processor from one of our threads.
inline long preemptions() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nivcsw;
}
/// The first undisturbed one of four samples, or else the fastest.
inline double sample(const std::function<void()>& call, long calls, long& disturbed) {
  double fastest = std::numeric_limits<double>::infinity();
  for (int attempt = 0; attempt < 4; ++attempt) {
    const long before = preemptions();
    const double seconds = seconds_of(call, calls);
    if (preemptions() == before) return seconds;
    fastest = std::min(fastest, seconds);
    if (seconds > 0.02) break;  // longer than the scheduler leaves anyone alone
  }
  ++disturbed;
  return fastest;
}
}  // namespace detail

/// Times all contenders in the same rounds.
inline Rounds interleave(const std::vector<Contender>& contenders, const RoundOptions& options = {}) {
  const std::size_t count = contenders.size();
  std::vector<double> estimate(count);
  std::vector<std::size_t> order(count);
  for (std::size_t i = 0; i < count; ++i) {
    contenders[i].call();
    estimate[i] = std::max(detail::seconds_of(contenders[i].call, 1), 1e-8);
    order[i] = i;
  }
  Rounds result;
  result.seconds.assign(
      count, std::vector<double>(static_cast<std::size_t>(options.rounds), std::numeric_limits<double>::quiet_NaN()));
  long samples = 0, disturbed = 0;
  std::mt19937 random(options.seed);
  // Spreads n rounds evenly over all.
  const auto among = [&options](int round, int n) {
    return round * n / options.rounds != (round + 1) * n / options.rounds;
  };
  for (int round = 0; round < options.rounds; ++round) {
    const bool with_slow = among(round, options.rounds_of_slow), with_slowest = among(round, options.rounds_of_slowest);
    std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t i : order) {
      if (estimate[i] > options.slow && !with_slow) continue;
      if (estimate[i] > options.slowest && !with_slowest) continue;
      if (estimate[i] < options.warmed) contenders[i].call();
      const double at_least = std::max(options.sample, contenders[i].sample);
      const long calls = std::max(1L, static_cast<long>(std::ceil(at_least / estimate[i])));
      const double seconds = detail::sample(contenders[i].call, calls, disturbed);
      ++samples;
      result.seconds[i][static_cast<std::size_t>(round)] = seconds;
      if (seconds < estimate[i]) estimate[i] = seconds;
    }
  }
  if (samples != 0) result.disturbed = static_cast<double>(disturbed) / static_cast<double>(samples);
  return result;
}

}  // namespace bench
}  // namespace LORAMIX_ABI
}  // namespace loramix

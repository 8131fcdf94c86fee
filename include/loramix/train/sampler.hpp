/// Which task the next example comes from, when tasks have data sets of different sizes.
///
/// Computes:    q_t = |D_t| / Σ|D|;  proportional p = q;  temperature p ∝ q^{1/τ};  softmax p = softmax(q) (MoRE's balanced
///              sampling, nearly uniform);  uniform p = 1/n. Example i of a step: the first t with u < p_0 + … + p_t,
///              u = column 0 of row i; its place in D_t is ⌊u′·|D_t|⌋, u′ = column 1 (purpose sampling, MATH.md section 1).
/// Source:      MATH.md section 5, "Samplers"; MoRE (arXiv 2505.22694) for softmax.
/// Reads:       sizes [n] of the data sets.
/// Writes:      tasks [examples], assigned.
/// Errors:      no task, an empty data set, a temperature that is not above 0 and finite.
/// Cost:        one Philox block and n comparisons per example.
/// Determinism: a pure function of (seed, site, step, i): ranks and micro-batches that number their examples globally draw
///              one batch between them.
/// Example:     tests/train/sampler.cpp
#pragma once
#include <cmath>
#include <cstdio>
#include <span>
#include <vector>

#include <loramix/core/draws.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// How often a task is drawn.
enum class Sampling { proportional, temperature, softmax, uniform };

/// The rule, its temperature τ, and the stream of draws.
struct SamplerOptions {
  Sampling by = Sampling::proportional;
  double temperature = 2;
  std::uint64_t seed = 0;
  std::uint64_t site = loramix::site("sampler");
};

/// One example: of data set `task`, number `example`.
struct Drawn {
  Index task = 0;
  Index example = 0;
};

/// A value: sizes and probabilities.
class TaskSampler {
 public:
  TaskSampler(std::span<const Index> sizes, const SamplerOptions& options)
      : options_(options), sizes_(sizes.begin(), sizes.end()) {
    const char* const op = "TaskSampler";
    check::at_least(op, "the number of tasks", static_cast<Index>(sizes.size()), 1);
    double all = 0;
    for (const Index size : sizes_) {
      check::at_least(op, "the size of a data set", size, 1);
      all += static_cast<double>(size);
    }
    if (options.by == Sampling::temperature && !(options.temperature > 0 && std::isfinite(options.temperature))) {
      char text[32];
      std::snprintf(text, sizeof text, "%g", options.temperature);
      fail(check::detail::about(ErrorCode::value, op, "temperature")
           << " is " << text << ", must be above 0 and finite");
    }
    double sum = 0, most = 0;
    for (const Index size : sizes_) most = std::max(most, static_cast<double>(size) / all);
    for (const Index size : sizes_) {
      probabilities_.push_back(weight(static_cast<double>(size) / all, most));
      sum += probabilities_.back();
    }
    for (double& p : probabilities_) p /= sum;
  }

  const std::vector<double>& probabilities() const { return probabilities_; }
  Drawn operator()(std::uint64_t step, std::uint64_t i) const {
    const std::uint64_t key = philox_key({.seed = options_.seed, .site = options_.site, .step = step});
    const double u = draw_uniform(key, Purpose::sampling, i, 0);
    std::size_t task = 0;
    for (double below = probabilities_[0]; task + 1 < sizes_.size() && u >= below; below += probabilities_[task])
      ++task;
    const double place = draw_uniform(key, Purpose::sampling, i, 1) * static_cast<double>(sizes_[task]);
    const Index example = static_cast<Index>(place);
    return {static_cast<Index>(task), example < sizes_[task] ? example : sizes_[task] - 1};
  }
  /// Tasks of examples first, first + 1, …
  void tasks(std::uint64_t step, std::uint64_t first, VectorView<std::int32_t> out) const {
    check::view("TaskSampler", "out", out);
    for (Index i = 0; i < out.size; ++i) {
      out[i] = static_cast<std::int32_t>((*this)(step, first + static_cast<std::uint64_t>(i)).task);
    }
  }

 private:
  /// `most`: the largest q, which a small temperature must not take to 0.
  double weight(double q, double most) const {
    switch (options_.by) {
      case Sampling::proportional:
        return q;
      case Sampling::temperature:
        return std::pow(q / most, 1 / options_.temperature);
      case Sampling::softmax:
        return std::exp(q);
      case Sampling::uniform:
        break;
    }
    return 1;
  }

  SamplerOptions options_;
  std::vector<Index> sizes_;
  std::vector<double> probabilities_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

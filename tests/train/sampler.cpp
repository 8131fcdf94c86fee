// Samplers: probabilities by hand, draws equal to literal ones, frequencies as promised.
#include <doctest/doctest.h>

#include <cmath>

#include <loramix/train/sampler.hpp>

#include "core/caught.hpp"
#include "reference/draws.hpp"
#include "support/seed.hpp"

namespace loramix_test {
namespace {

namespace lm = loramix;
using lm::Index;

const std::vector<Index> sizes{10, 30, 60};

TEST_CASE("probabilities of every rule") {
  using lm::Sampling;
  const double q[] = {0.1, 0.3, 0.6};
  for (const Sampling by : {Sampling::proportional, Sampling::temperature, Sampling::softmax, Sampling::uniform}) {
    const lm::TaskSampler sampler(sizes, {.by = by, .temperature = 4});
    double sum = 0, weights[3];
    for (int t = 0; t < 3; ++t) {
      weights[t] = by == Sampling::proportional  ? q[t]
                   : by == Sampling::temperature ? std::sqrt(std::sqrt(q[t]))
                   : by == Sampling::softmax     ? std::exp(q[t])
                                                 : 1.0;
      sum += weights[t];
    }
    for (std::size_t t = 0; t < 3; ++t) CHECK(std::abs(sampler.probabilities()[t] - weights[t] / sum) <= 1e-15);
  }
}

TEST_CASE("however small the temperature, the largest data set has its share") {
  const auto of = [](std::vector<Index> many) {
    return lm::TaskSampler(many, {.by = lm::Sampling::temperature, .temperature = 5e-4}).probabilities();
  };
  CHECK(of({7, 7}) == std::vector<double>{0.5, 0.5});
  CHECK(of({3, 7}) == std::vector<double>{0, 1});
}

TEST_CASE("draws are those of the counters: purpose 4, row = example, columns 0 and 1") {
  const std::uint64_t seed_ = seed(1);
  const lm::TaskSampler sampler(sizes, {.seed = seed_, .site = 77});
  for (std::uint64_t step = 0; step < 3; ++step) {
    for (std::uint64_t i = 0; i < 50; ++i) {
      const std::uint64_t row = i * 0x123456789u;
      const auto words =
          reference::philox(reference::fold(reference::fold(seed_, 77), step),
                            {0, 4, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32)});
      const double u = (words[0] + 0.5) / 4294967296.0, v = (words[1] + 0.5) / 4294967296.0;
      const Index task = u < 0.1 ? 0 : u < 0.4 ? 1 : 2;
      const lm::Drawn drawn = sampler(step, row);
      CHECK(drawn.task == task);
      CHECK(drawn.example == static_cast<Index>(v * static_cast<double>(sizes[static_cast<std::size_t>(task)])));
    }
  }
}

TEST_CASE("frequencies follow the probabilities, and micro-batches draw one batch between them") {
  const lm::TaskSampler sampler(sizes, {.by = lm::Sampling::softmax, .seed = seed(2)});
  constexpr Index n = 20000;
  std::vector<std::int32_t> all(n), parts(n);
  sampler.tasks(5, 0, {all.data(), n});
  sampler.tasks(5, 0, {parts.data(), 7000});
  sampler.tasks(5, 7000, {parts.data() + 7000, n - 7000});
  CHECK(all == parts);
  double counts[3] = {};
  for (const std::int32_t task : all) {
    REQUIRE(task >= 0);
    REQUIRE(task < 3);
    counts[task] += 1;
  }
  for (std::size_t t = 0; t < 3; ++t) {
    const double p = sampler.probabilities()[t];
    CHECK(std::abs(counts[t] - p * n) <= 5 * std::sqrt(n * p * (1 - p)));
  }
  std::vector<std::int32_t> next(n);
  sampler.tasks(6, 0, {next.data(), n});
  CHECK(next != all);
}

TEST_CASE("what cannot be sampled is refused") {
  using Code = lm::ErrorCode;
  check_error(Code::value, {"TaskSampler", "tasks"}, [] { lm::TaskSampler({}, {}); });
  const std::vector<Index> empty{3, 0};
  check_error(Code::value, {"TaskSampler", "size", "0"}, [&] { lm::TaskSampler(empty, {}); });
  for (const double bad : {0.0, -1.0, HUGE_VAL, std::nan("")}) {
    check_error(Code::value, {"TaskSampler", "temperature"},
                [&] { lm::TaskSampler(sizes, {.by = lm::Sampling::temperature, .temperature = bad}); });
  }
}

}  // namespace
}  // namespace loramix_test

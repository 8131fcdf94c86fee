// Merging by the average gate, against a forward of the same tokens and literal sums.
#include <loramix/adapter/average_merge.hpp>

#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/moa.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>

#include "adapter/tasks.hpp"

namespace loramix_test {
namespace {

using Real = lm::Matrix<double>;
using Options = lm::ForwardOptions<lm::Space::host>;

constexpr Index T = 9, L = 3;
constexpr Index ends[L + 1] = {0, 4, 4, 9};
const std::vector<std::int32_t> labels{1, 0, 0};
const std::vector<std::uint8_t> valid{1, 1, 0, 1, 0, 1, 1, 1, 1};

Options told() {
  Options options;
  options.sequences = lm::Groups<>::by_segment(ends, L);
  options.tasks = groups_of(mixed, 3);
  options.labels = {labels.data(), L};
  options.valid = {valid.data(), T};
  return options;
}
/// ‖rows of valid tokens‖_F of y − x (after − before)ᵀ.
double norm_of_rest(const Real& y, const Real& x, const Real& after, const Real& before) {
  double sum = 0;
  for (Index t = 0; t < T; ++t) {
    for (Index o = 0; o < y.cols() && valid[static_cast<std::size_t>(t)] != 0; ++o) {
      double rest = y(t, o);
      for (Index c = 0; c < x.cols(); ++c) rest -= x(t, c) * (after(o, c) - before(o, c));
      sum += rest * rest;
    }
  }
  return std::sqrt(sum);
}

template <class A>
void check_average(const typename A::Config& config, const Options& options) {
  Batch<A> b(config, T, 11);
  for (Index i = 0; i < config.d_in; ++i) b.x(2, i) = b.x(4, i) = 100;  // masked: must not matter
  auto y = b.zeros_y();
  b.forward(y, options);
  Real weights = random_matrix<double>(config.d_out, config.d_in, b.random);
  const Real before = weights;
  const auto average = lm::merge_average(b.be, b.adapter, weights, b.x, options);
  CHECK_FALSE(same_bits(weights, before));
  CHECK(average.tokens == 7);
  const double want = norm_of_rest(y, b.x, weights, before), norm = norm_of_rest(y, b.x, before, before);
  CHECK(want > 0.01 * norm);
  CHECK(std::abs(average.error - want) <= 1e-11 * norm);
  CHECK(std::abs(average.norm - norm) <= 1e-12 * norm);
  CHECK(average.error < 2 * average.norm);
  CHECK(average.gate.size() == b.adapter.B().cols);
  CHECK(average.merged.report.max_rounding <= 0x1p-52 * 100);
  average.merged.undo(weights);
  CHECK(same_bits(weights, before));

  // Tokens that are all gated alike: nothing is lost.
  Batch<A> alike(config, 1, 12);
  const std::int32_t task = 1;
  const Index one[2] = {0, 1};
  Options alone;
  alone.sequences = lm::Groups<>::by_segment(one, 1);
  alone.tasks = lm::Groups<>::by_id(&task, 3);
  const auto exact = lm::merge_average(b.be, alike.adapter, weights, alike.x, alone);
  CHECK(exact.error <= 1e-14 * exact.norm);
  CHECK(exact.norm > 0);
}

TEST_CASE("the error is that of the merged weights on the given tokens, for every gate that depends on them") {
  const lm::MixtureConfig mixture{.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5};
  check_average<lm::LoraMoe<double>>(mixture, told());
  check_average<lm::HydraLora<double>>(mixture, told());
  for (const Index k : {1, 2}) {
    check_average<lm::Mola<double>>(
        {.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .alpha = 3, .rule = {.k = k, .renormalise = k == 2}},
        told());
  }
  check_average<lm::TeamLora<double>>({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2}, told());
  check_average<lm::TeamLora<double>>({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .reads = lm::Reads::sequence},
                                      told());
  check_average<lm::TeamLora<double>>(
      {.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .reads = lm::Reads::task, .tasks = 3}, told());
  check_average<lm::Moa<double>>({.d_in = 13, .d_out = 11, .experts = 2, .rank = 2}, told());
  check_average<lm::MoeLora<double>>({.d_in = 13, .d_out = 11, .tasks = 3, .experts = 2, .rank = 4}, told());
  check_average<lm::More<double>>({.d_in = 13, .d_out = 11, .tasks = 3, .rank = 4}, told());
}

TEST_CASE("the gate is the mean of what valid tokens were weighted with") {
  Batch<lm::LoraMoe<double>> b({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2}, T);
  Real weights = random_matrix<double>(11, 13, b.random);
  // [average]
  const auto average = lm::merge_average(b.be, b.adapter, weights, b.x, {.valid = {valid.data(), T}});
  const double lost = average.error / average.norm;  // of ‖ΔY‖ over these tokens
  // [/average]
  CHECK(lost > 0);
  CHECK(lost < 1);
  lm::Arena<> reserve = b.memory.arena();
  auto y = b.zeros_y();
  const auto saved = b.forward(y, {.save = &reserve});
  for (Index e = 0; e < 3; ++e) {
    double mean = 0;
    for (Index t = 0; t < T; ++t) mean += valid[static_cast<std::size_t>(t)] != 0 ? saved.scores.weights(t, e) / 7 : 0;
    for (Index j = 0; j < 2; ++j) CHECK(std::abs(average.gate[2 * e + j] - mean) <= 1e-15);
  }
  lm::ThreadPool pool(3);
  Real threaded = weights;
  average.merged.undo(threaded);
  const auto again =
      lm::merge_average(lm::cpu::Backend{pool.executor()}, b.adapter, threaded, b.x, {.valid = {valid.data(), T}});
  CHECK(same_bits(threaded, weights));
  CHECK(again.error == average.error);
}

TEST_CASE("16-bit weights: rounded once, the rounding reported apart from the average's error") {
  Batch<lm::LoraMoe<lm::bfloat16>> b({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2}, T);
  lm::Matrix<lm::bfloat16> weights = random_matrix<lm::bfloat16>(11, 13, b.random);
  const auto before = weights;
  const auto average = lm::merge_average(b.be, b.adapter, weights, b.x);
  CHECK(average.tokens == T);
  CHECK(average.merged.report.max_rounding > 0);
  CHECK(average.error > 0);
  average.merged.undo(weights);
  CHECK(same_bits(weights, before));
}

TEST_CASE("refused before any write: nothing to average, draws, values that are not finite, shapes") {
  Batch<lm::LoraMoe<float>> b({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2}, T);
  lm::Matrix<float> weights = random_matrix<float>(11, 13, b.random);
  const auto before = weights;
  using Code = lm::ErrorCode;
  const auto refused = [&](Code code, std::initializer_list<std::string> parts, lm::MatrixView<const float> x,
                           const Options& options = {}) {
    check_error(code, parts, [&] { lm::merge_average(b.be, b.adapter, weights, x, options); });
    CHECK(same_bits(weights, before));
  };
  const lm::MatrixView<const float> x = b.x;
  const std::vector<std::uint8_t> none(T, 0);
  refused(Code::value, {"merge_average", "no valid token"}, x.row_range(0, 0));
  refused(Code::value, {"merge_average", "no valid token"}, x, {.valid = {none.data(), T}});
  refused(Code::shape, {"merge_average", "valid", "8", "9"}, x, {.valid = {none.data(), 8}});
  refused(Code::shape, {"merge_average", "x", "12", "13"}, x.col_range(0, 12));
  refused(Code::value, {"merge_average", "key"}, x, {.key = b.key});
  lm::Arena<> reserve = b.memory.arena();
  refused(Code::value, {"merge_average", "save"}, x, {.save = &reserve});
  lm::Matrix<float> both(12, 13);
  check_error(Code::alias, {"merge_average", "weights", "x"}, [&] {
    lm::merge_average(b.be, b.adapter, both.view().row_range(0, 11), std::as_const(both).view().row_range(10, 2));
  });
  b.x(3, 5) = static_cast<float>(nan);
  refused(Code::value, {"merge_average", "token 3", "not finite"}, x);
  b.x(3, 5) = 0;
  b.adapter.A()(1, 1) = static_cast<float>(nan);
  refused(Code::value, {"merge_average", "A is not finite"}, x);
  check_error(Code::shape, {"merge_average", "weights", "10", "11"},
              [&] { lm::merge_average(b.be, b.adapter, weights.view().row_range(0, 10), x); });
  lm::More<float> told_nothing({.d_in = 13, .d_out = 11, .tasks = 3, .rank = 4});
  check_error(Code::value, {"merge_average", "tasks"}, [&] { lm::merge_average(b.be, told_nothing, weights, x); });
}

}  // namespace
}  // namespace loramix_test

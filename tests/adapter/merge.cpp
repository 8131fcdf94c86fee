// Merging: against double loops, rounded once, undone to the last bit.
#include "adapter/kinds.hpp"

#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/combine.hpp>

namespace loramix_test {
namespace {

template <class T>
double round_off() {
  return std::is_same_v<T, lm::bfloat16> ? 0x1p-8 : std::is_same_v<T, lm::half> ? 0x1p-11 : 0x1p-24;
}

/// s Σ_j B[o,j] g_j A[j,c], in double.
template <class A>
double product(const A& adapter, Index o, Index c) {
  double sum = 0;
  const auto g = adapter.gate().form(0, adapter.B().cols).rank_scale;
  for (Index j = 0; j < adapter.A().rows; ++j) {
    sum += lm::widen<double>(adapter.B()(o, j)) * (g.data == nullptr ? 1.0 : lm::widen<double>(g[j])) *
           lm::widen<double>(adapter.A()(j, c));
  }
  return adapter.scale() * sum;
}
template <class P>
double product(const lm::FusedLora<P>& fused, Index o, Index c) {
  for (Index i = 0; i < fused.config().slices.size(); ++i) {
    const lm::Slice slice = fused.config().slices[i];
    if (o < slice.begin || o >= slice.begin + slice.width) continue;
    double sum = 0;
    for (Index j = 0; j < fused.config().rank; ++j) {
      sum +=
          lm::widen<double>(fused.B(i)(o - slice.begin, j)) * lm::widen<double>(fused.A()(fused.first_rank(i) + j, c));
    }
    return fused.scale() * sum;
  }
  return 0;
}

template <class K, class T>
void check_merge() {
  Random random(3);
  typename K::Adapter adapter(K::config());
  fill_parameters(adapter, random);
  const Index in = K::config().d_in, out = K::config().d_out;
  lm::Matrix<T> weights = random_matrix<T>(out, in, random);
  weights(0, 0) = lm::narrow<T>(-0.0);
  const auto before = weights;
  const auto merged = lm::merge(lm::cpu::Backend{}, adapter, weights);

  double largest = 0, squares = 0, moved = 0;
  for (Index o = 0; o < out; ++o) {
    for (Index c = 0; c < in; ++c) {
      const double exact = lm::widen<double>(before(o, c)) + product(adapter, o, c);
      const double error = std::abs(lm::widen<double>(weights(o, c)) - exact);
      REQUIRE(error <= round_off<T>() * std::abs(exact) * (1 + 1e-6) + 0x1p-25);
      largest = std::max(largest, error);
      squares += error * error;
      moved = std::max(moved, std::abs(product(adapter, o, c)));
    }
  }
  const double rms = std::sqrt(squares / static_cast<double>(in * out));
  CHECK(moved > 0.1);
  CHECK(largest > 0);
  CHECK(std::abs(merged.report.max_rounding - largest) <= 1e-14);
  CHECK(std::abs(merged.report.rms_rounding - rms) <= 1e-14);
  CHECK_FALSE(same_bits(weights, before));
  merged.undo(weights);
  CHECK(same_bits(weights, before));
}

TEST_CASE_TEMPLATE("W + s B g A in double, rounded once, with the rounding it reports; undone bitwise", T, float,
                   lm::bfloat16, lm::half) {
  check_merge<LoraKind<float>, T>();
  check_merge<LoraKind<lm::bfloat16>, T>();
  check_merge<RankStabilisedKind<lm::half>, T>();
  check_merge<FusedKind<float>, T>();
  check_merge<SharedKind<float>, T>();
  check_merge<ScaledKind<float>, T>();
}

TEST_CASE("rounding is straight from double: 1 + 2^-8 + 2^-40 is above the middle") {
  lm::Lora<float> lora({.d_in = 1, .d_out = 1, .rank = 2, .alpha = 2});
  lora.A()(0, 0) = 0x1p-8f;
  lora.A()(1, 0) = 0x1p-40f;  // through float this would be lost, and the tie go to 1
  lora.B()(0, 0) = lora.B()(0, 1) = 1;
  lm::Matrix<lm::bfloat16> weights(1, 1);
  weights(0, 0) = lm::narrow<lm::bfloat16>(1.0);
  lm::merge(lm::cpu::Backend{}, lora, weights);
  CHECK(lm::widen<double>(weights(0, 0)) == 1 + 0x1p-7);
}

TEST_CASE_TEMPLATE("merged weights give what base and adapter give", K, LoraKind<float>, RankStabilisedKind<float>,
                   FusedKind<float>, SharedKind<float>, ScaledKind<float>, RankZeroKind<float>) {
  Batch<typename K::Adapter> b(K::config(), 9);
  const Index in = K::config().d_in, out = K::config().d_out;
  lm::Matrix<float> weights = random_matrix<float>(out, in, b.random);
  const auto base = [&] {
    lm::Matrix<float> y(9, out);
    for (Index t = 0; t < 9; ++t) {
      for (Index o = 0; o < out; ++o) {
        double sum = 0;
        for (Index c = 0; c < in; ++c) sum += static_cast<double>(b.x(t, c)) * static_cast<double>(weights(o, c));
        y(t, o) = static_cast<float>(sum);
      }
    }
    return y;
  };
  auto y = base();
  b.forward(y);
  const auto before = weights;
  // [merge]
  const auto merged = lm::merge(b.be, b.adapter, weights);
  // [/merge]
  const auto want = base();
  // |x|, |W|, |A|, |B|, |λ| ≤ 1: terms sum to at most in·(1 + s·r).
  const double bound = 40 * 0x1p-24 * static_cast<double>(in) * (1 + b.adapter.scale() * K::config().rank);
  double largest = 0;
  for (Index i = 0; i < 9 * out; ++i) {
    REQUIRE(std::abs(static_cast<double>(y.data()[i]) - static_cast<double>(want.data()[i])) <= bound);
    largest = std::max(largest, std::abs(static_cast<double>(want.data()[i])));
  }
  CHECK(largest > 1);
  // [undo]
  merged.undo(weights);
  CHECK(same_bits(weights, before));
  // [/undo]
}

TEST_CASE("undo restores NaN payloads, negative zeros and strided rows, and touches nothing beside them") {
  lm::Lora<lm::bfloat16> lora({.d_in = 3, .d_out = 2, .rank = 2});
  Random random(4);
  fill_parameters(lora, random);
  lm::Matrix<lm::bfloat16> memory = random_matrix<lm::bfloat16>(2, 5, random);
  memory(0, 0) = {0x7f91};  // a signalling NaN
  memory(0, 1) = {0x8000};
  memory(1, 2) = {0xffc3};
  memory(0, 4) = {0x7fa5};  // beyond the view
  const auto before = memory;
  const lm::MatrixView<lm::bfloat16> weights = memory.view().col_range(0, 3);
  const auto merged = lm::merge(lm::cpu::Backend{}, lora, weights);
  CHECK_FALSE(same_bits(memory, before));
  CHECK(memory(0, 4).bits == 0x7fa5);
  CHECK(merged.report.max_rounding != merged.report.max_rounding);  // NaN in, NaN reported
  merged.undo(weights);
  CHECK(same_bits(memory, before));
  check_error(lm::ErrorCode::shape, {"undo", "weights"}, [&] { merged.undo(memory.view()); });
}

TEST_CASE("a rank scale that is not finite is refused before any write") {
  lm::AdaLora<float> adapter({.d_in = 5, .d_out = 4, .rank = 3});
  Random random(6);
  fill_parameters(adapter, random);
  lm::Matrix<float> weights = random_matrix<float>(4, 5, random);
  const auto before = weights;
  adapter.lambda()(0, 1) = static_cast<float>(nan);
  check_error(lm::ErrorCode::value, {"merge", "rank scale is not finite at [1]"},
              [&] { lm::merge(lm::cpu::Backend{}, adapter, weights.view()); });
  CHECK(same_bits(weights, before));
  check_error(lm::ErrorCode::value, {"weighted_sum", "rank scale is not finite at [1]"},
              [&] { lm::weighted_sum({lm::Weighted<lm::AdaLora<float>>{&adapter}}); });
}

TEST_CASE_TEMPLATE("weights that are not finite, or do not fit, are refused before any write", K, LoraKind<float>,
                   FusedKind<float>, SharedKind<float>) {
  typename K::Adapter adapter(K::config());
  Random random(5);
  fill_parameters(adapter, random);
  const Index in = K::config().d_in, out = K::config().d_out;
  lm::Matrix<float> weights = random_matrix<float>(out, in, random);
  const auto before = weights;
  const lm::cpu::Backend be;
  using Code = lm::ErrorCode;
  const auto refused = [&](Code code, std::initializer_list<std::string> parts, lm::MatrixView<float> into) {
    check_error(code, parts, [&] { lm::merge(be, adapter, into); });
    CHECK(same_bits(weights, before));
  };
  refused(Code::shape, {"merge", "weights"}, weights.view().row_range(0, out - 1));
  refused(Code::shape, {"merge", "weights"}, weights.view().col_range(0, in - 1));
  refused(Code::null, {"merge", "weights"}, {nullptr, out, in});
  refused(Code::alias, {"merge", "weights", "A"}, {adapter.A().data, out, in});
  K::Adapter::visit(adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    for (const double bad : {nan, HUGE_VAL, -HUGE_VAL}) {
      const float good = view(1, 2);
      view(1, 2) = static_cast<float>(bad);
      refused(Code::value, {"merge", std::strstr(name, "lora_A") != nullptr ? "A is not finite" : "B is not finite"},
              weights);
      view(1, 2) = good;
    }
  });
  lm::merge(be, adapter, weights);
  CHECK_FALSE(same_bits(weights, before));
}

}  // namespace
}  // namespace loramix_test

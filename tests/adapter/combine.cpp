// Weighted sums by concatenation and truncation by SVD, against dense matrices. That σ are the singular values is shown
// in tests/ops/svd.cpp.
#include <loramix/adapter/combine.hpp>

#include <loramix/adapter/ada_lora.hpp>

#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

/// A dense matrix as a row of numbers: sums, differences and the Frobenius norm are all that is asked of it.
using Dense = std::vector<double>;
Dense plus(double a, const Dense& x, double b, const Dense& y) {
  Dense out(x);
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = a * x[i] + b * y[i];
  return out;
}
double norm(const Dense& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}
double distance(const Dense& x, const Dense& y) { return norm(plus(1, x, -1, y)); }

/// ΔW in double.
template <class A>
Dense delta(const A& adapter) {
  const auto down = adapter.A();
  const auto up = adapter.B();
  const auto g = adapter.gate().form(0, up.cols).rank_scale;
  Dense w;
  for (Index o = 0; o < up.rows; ++o) {
    for (Index c = 0; c < down.cols; ++c) {
      double sum = 0;
      for (Index j = 0; j < up.cols; ++j) {
        sum += lm::widen<double>(up(o, j)) * (g.data == nullptr ? 1.0 : lm::widen<double>(g[j])) *
               lm::widen<double>(down(j, c));
      }
      w.push_back(adapter.scale() * sum);
    }
  }
  return w;
}
template <class P>
lm::Lora<P> drawn(Index rank, double alpha, std::uint64_t site, bool rank_stabilised = false) {
  Random random(site);
  lm::Lora<P> lora({.d_in = 13, .d_out = 11, .rank = rank, .alpha = alpha, .rank_stabilised = rank_stabilised});
  fill_parameters(lora, random);
  return lora;
}

}  // namespace

TEST_CASE("a weighted sum is exact: signed weights, mixed ranks, scales and rank-stabilised ones (PEERS 3.15)") {
  const auto a = drawn<double>(5, 7, 1), b = drawn<double>(2, 3, 2, true), c = drawn<double>(0, 3, 3);
  // [sum]
  const lm::Lora<double> sum = lm::weighted_sum<lm::Lora<double>>({{&a, 0.7}, {&b, -1.3}, {&c, 2}});
  // [/sum]
  const Dense want = plus(0.7, delta(a), -1.3, delta(b));
  CHECK(sum.config().rank == 7);
  CHECK(sum.scale() == 1);
  CHECK(distance(delta(sum), want) <= 1e-14 * norm(want));
  const lm::Lora<double> none = lm::weighted_sum<lm::Lora<double>>({{&a, 1}, {&a, -1}});
  CHECK(norm(delta(none)) <= 1e-14);

  // One rounding per element of B.
  const auto f = drawn<float>(5, 7, 1), g = drawn<float>(2, 3, 2);
  const lm::Lora<float> rounded = lm::weighted_sum<lm::Lora<float>>({{&f, 0.3}, {&g, -0.9}});
  const double s = 0.3 * f.scale();
  for (Index o = 0; o < 11; ++o) {
    for (Index j = 0; j < 5; ++j) CHECK(rounded.B()(o, j) == static_cast<float>(s * static_cast<double>(f.B()(o, j))));
  }
  // A power of two as factor: nothing is rounded.
  const lm::Lora<float> same = lm::weighted_sum<lm::Lora<float>>({{&f, 0.5 / f.scale()}});
  for (Index o = 0; o < 11; ++o) CHECK(same.B()(o, 1) == 0.5f * f.B()(o, 1));
}

TEST_CASE("PEERS 3.15: adding A and B element by element has cross terms, concatenation has none") {
  const auto a = drawn<double>(3, 3, 1), b = drawn<double>(3, 3, 2);
  const Dense want = plus(0.5, delta(a), 0.5, delta(b));
  lm::Lora<double> linear({.d_in = 13, .d_out = 11, .rank = 3, .alpha = 3});
  const double root = std::sqrt(0.5);  // PEFT: √w on both
  for (Index j = 0; j < 3; ++j) {
    for (Index i = 0; i < 13; ++i) linear.A()(j, i) = root * (a.A()(j, i) + b.A()(j, i));
    for (Index o = 0; o < 11; ++o) linear.B()(o, j) = root * (a.B()(o, j) + b.B()(o, j));
  }
  CHECK(distance(delta(linear), want) > 0.3 * norm(want));
  CHECK(distance(delta(lm::weighted_sum<lm::Lora<double>>({{&a, 0.5}, {&b, 0.5}})), want) <= 1e-14 * norm(want));
}

TEST_CASE("AdaLoRA's factors go into B") {
  Random random(4);
  lm::AdaLora<double> ada({.d_in = 13, .d_out = 11, .rank = 4, .alpha = 6});
  fill_parameters(ada, random);
  const lm::Lora<double> sum = lm::weighted_sum<lm::AdaLora<double>>({{&ada, -2}});
  CHECK(norm(plus(1, delta(sum), 2, delta(ada))) <= 1e-14 * norm(delta(ada)));
}

TEST_CASE("a truncated LoRA is the nearest of its rank, and says how far it is") {
  const auto lora = drawn<double>(7, 9, 5);
  const Dense before = delta(lora);
  for (Index rank = 0; rank <= 9; ++rank) {
    // [truncate]
    const auto small = lm::truncate(lora, rank);
    // [/truncate]
    const Index kept = std::min<Index>(rank, 7);
    CHECK(small.lora.config().rank == kept);
    REQUIRE(small.sigma.size() == 7);
    double of_kept = 0, of_rest = 0;
    for (Index i = 0; i < 7; ++i) (i < kept ? of_kept : of_rest) += small.sigma[i] * small.sigma[i];
    const double size = norm(before);
    CHECK(std::abs(small.error - std::sqrt(of_rest)) <= 1e-13 * size);
    CHECK(std::abs(distance(delta(small.lora), before) - small.error) <= 1e-12 * size);
    CHECK(std::abs(norm(delta(small.lora)) - std::sqrt(of_kept)) <= 1e-12 * size);
    CHECK((small.error > 0.01 * size) == (kept < 7));
  }
  const auto single = drawn<float>(7, 9, 5);
  const auto small = lm::truncate(single, 7);
  // Factors of size √σ, rounded once each: 2·2⁻²⁴ of every product's term, 7 of them.
  CHECK(distance(delta(small.lora), delta(single)) <= 4 * 0x1p-24 * 7 * small.sigma[0]);
  CHECK(small.error <= 1e-12 * small.sigma[0]);
}

TEST_CASE("sums are truncated to what they were worth: two LoRAs of one subspace") {
  const auto a = drawn<double>(3, 3, 1);
  auto b = a;
  for (Index i = 0; i < 3 * 13; ++i) b.A().data[i] *= -0.5;
  const auto small = lm::truncate(lm::weighted_sum<lm::Lora<double>>({{&a, 1}, {&b, 1}}), 3);
  CHECK(norm(plus(1, delta(small.lora), -0.5, delta(a))) <= 1e-13 * norm(delta(a)));
  CHECK(small.error <= 1e-13 * norm(delta(a)));
}

TEST_CASE("what does not add up is refused") {
  using Code = lm::ErrorCode;
  auto a = drawn<float>(5, 7, 1);
  const lm::Lora<float> narrow({.d_in = 13, .d_out = 10, .rank = 5}), shallow({.d_in = 12, .d_out = 11, .rank = 5});
  using L = lm::Lora<float>;
  check_error(Code::value, {"weighted_sum", "0"}, [] { lm::weighted_sum(std::span<const lm::Weighted<L>>()); });
  check_error(Code::shape, {"weighted_sum", "d_out", "10", "11"}, [&] {
    lm::weighted_sum<L>({{&a, 1}, {&narrow, 1}});
  });
  check_error(Code::shape, {"weighted_sum", "d_in", "12", "13"}, [&] {
    lm::weighted_sum<L>({{&a, 1}, {&shallow, 1}});
  });
  check_error(Code::value, {"weighted_sum", "weight"}, [&] { lm::weighted_sum<L>({{&a, nan}}); });
  check_error(Code::value, {"truncate", "rank", "-1"}, [&] { lm::truncate(a, -1); });
  a.B()(3, 2) = static_cast<float>(nan);
  check_error(Code::value, {"weighted_sum", "B", "[3, 2]"}, [&] { lm::weighted_sum<L>({{&a, 1}}); });
  check_error(Code::value, {"truncate", "B", "[3, 2]"}, [&] { lm::truncate(a, 2); });
}

}  // namespace loramix_test

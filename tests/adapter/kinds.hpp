// Adapters at small shapes of primes, in several precisions, and what the tests of this room need. What all adapters have in
// common is tested in tests/suite.
#pragma once
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/fused_forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>

#include "../examples/train/mixture.hpp"
#include "core/caught.hpp"
#include "support/seed.hpp"

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

template <class P>
struct LoraKind {
  using Adapter = lm::Lora<P>;
  static lm::LoraConfig config() { return {.d_in = 13, .d_out = 11, .rank = 5, .alpha = 7, .dropout = 0.5}; }
};
template <class P>
struct RankStabilisedKind {
  using Adapter = lm::Lora<P>;
  static lm::LoraConfig config() {
    return {.d_in = 7, .d_out = 19, .rank = 3, .alpha = 2, .dropout = 0.5, .rank_stabilised = true};
  }
};
template <class P>
struct RankZeroKind {
  using Adapter = lm::Lora<P>;
  static lm::LoraConfig config() { return {.d_in = 13, .d_out = 11, .rank = 0, .dropout = 0.5}; }
};
template <class P, bool Shared = false>
struct FusedKind {
  using Adapter = lm::FusedLora<P>;
  static lm::FusedLoraConfig config() {  // columns 4…8 belong to no slice, and the slices are not in order
    return {.d_in = 13,
            .d_out = 23,
            .slices = {{0, 4}, {14, 9}, {9, 5}},
            .rank = 3,
            .alpha = 5,
            .dropout = 0.5,
            .shared_A = Shared};
  }
};
template <class P>
struct SharedKind : FusedKind<P, true> {};
template <class P>
struct MixtureKind {
  using Adapter = ::Mixture<P>;
  static MixtureConfig config() {
    return {.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5, .temperature = 0.7};
  }
};
template <class P>
struct ScaledKind {  // a gate whose values are parameters
  using Adapter = lm::AdaLora<P>;
  static lm::AdaLoraConfig config() { return {.d_in = 13, .d_out = 11, .rank = 5, .alpha = 7, .dropout = 0.5}; }
};

/// Uniform numbers in (−1, 1).
class Random {
 public:
  explicit Random(std::uint64_t site) : engine_(seed(site)) {}
  double operator()() { return static_cast<double>(engine_() >> 11) * 0x1p-52 - 1; }

 private:
  std::mt19937_64 engine_;
};

template <class View>
void fill(View v, Random& random, double size = 1) {
  using T = std::remove_reference_t<decltype(v(0, 0))>;
  for (Index i = 0; i < v.rows; ++i) {
    for (Index j = 0; j < v.cols; ++j) v(i, j) = lm::narrow<T>(size * random());
  }
}
template <class A>
void fill_parameters(A& adapter, Random& random) {
  A::visit(adapter, [&random](const char*, auto view, lm::ParameterGroup) { fill(view, random); });
}
template <class T>
lm::Matrix<T> random_matrix(Index rows, Index cols, Random& random) {
  lm::Matrix<T> m(rows, cols);
  fill(m.view(), random);
  return m;
}
template <class T>
lm::Matrix<T> constant(Index rows, Index cols, double value) {
  lm::Matrix<T> m(rows, cols);
  for (Index i = 0; i < rows * cols; ++i) m.data()[i] = lm::narrow<T>(value);
  return m;
}
inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T>
bool same_bits(const lm::Matrix<T>& a, const lm::Matrix<T>& b) {
  const std::size_t bytes = static_cast<std::size_t>(a.rows() * a.cols()) * sizeof(T);
  return a.rows() == b.rows() && a.cols() == b.cols() && (bytes == 0 || std::memcmp(a.data(), b.data(), bytes) == 0);
}
/// Bit for bit over every parameter; the gaps between parameters too.
template <class A>
bool same_parameters(const A& a, const A& b) {
  const auto x = a.parameters(), y = b.parameters();
  return x.size == y.size &&
         (x.size == 0 || std::memcmp(x.data, y.data, static_cast<std::size_t>(x.size) * sizeof(*x.data)) == 0);
}
template <class A>
void poison(A& adapter) {
  using T = typename A::element;
  A::visit(adapter, [](const char*, auto view, lm::ParameterGroup) {
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = lm::narrow<T>(nan);
    }
  });
}

/// Memory for arenas, full of NaN.
struct Memory {
  explicit Memory(Index size) : bytes(static_cast<std::size_t>(size), std::byte{0xff}) {}
  lm::Arena<> arena() { return lm::Arena<>{bytes}; }
  std::vector<std::byte> bytes;
};

/// An adapter with random weights, a batch for it, and memory for both passes.
template <class A>
struct Batch {
  using X = typename A::precision::activation;
  static constexpr lm::Key key{.seed = 5, .site = lm::site("module"), .step = 3, .first_token = 100};

  Batch(const typename A::Config& config, Index tokens_, std::uint64_t site = 0)
      : random(site), adapter(config), tokens(tokens_) {
    fill_parameters(adapter, random);
    x = random_matrix<X>(tokens, config.d_in, random);
    dy = random_matrix<X>(tokens, config.d_out, random);
    work =
        Memory(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward) + lm::workspace_bytes(be, adapter, tokens));
    memory = Memory(lm::reserve_bytes(adapter, tokens));
  }

  auto forward(lm::Matrix<X>& y, lm::ForwardOptions<lm::Space::host> options = {}) {
    return lm::forward(be, adapter, x, y, work.arena(), options);
  }
  template <class Saved, class Gradient>
  void backward(Saved& saved, lm::MatrixView<X> dx, Gradient& grad, lm::BackwardOptions options = {}) {
    lm::backward(be, adapter, saved, x, dy, dx, grad, work.arena(), options);
  }
  lm::Matrix<X> zeros_y() const { return {tokens, adapter.config().d_out}; }
  lm::Matrix<X> zeros_dx() const { return {tokens, adapter.config().d_in}; }

  lm::cpu::Backend<> be;
  Random random;
  A adapter;
  Index tokens;
  lm::Matrix<X> x, dy;
  Memory work{0}, memory{0};
};

}  // namespace loramix_test

// What the tests of train/ share: random flat data, executors, an adapter with every kind of parameter group.
#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <loramix/core/adapter.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>

#include "support/seed.hpp"

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

/// More exact than what is tested.
using Wide = long double;

inline std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class T>
Wide wide(T v) {
  return static_cast<Wide>(lm::narrow<double>(v));
}

/// Half the distance of two neighbouring numbers at 1 in the type an optimiser computes in.
template <class T>
Wide unit() {
  return std::is_same_v<T, double> ? 0x1p-53L : 0x1p-24L;
}

template <class T>
std::vector<T> normals(Index n, std::uint64_t site, double sd = 1) {
  std::mt19937_64 random(seed(site));
  std::normal_distribution<double> normal(0, sd);
  std::vector<T> values(at(n));
  for (T& v : values) v = lm::narrow<T>(normal(random));
  return values;
}

template <class T>
lm::VectorView<T> flat(std::vector<T>& v) {
  return {v.data(), static_cast<Index>(v.size())};
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
std::vector<std::remove_const_t<T>> copy_of(lm::VectorView<T> v) {
  return {v.data, v.data + v.size};
}

/// Runs the jobs last first.
struct BackwardsExecutor {
  Index lanes() const { return 1; }
  template <class Job>
  void run(Index jobs, const Job& job) const {
    for (Index i = jobs; i-- > 0;) job(i, Index{0});
  }
};

/// One for all element types, so that a gradient has its adapter's.
struct ToyConfig {
  Index size = 3;
  static ToyConfig of(const lm::Shape& shape) { return {shape.total_rank}; }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("size", self.size);
  }
};

/// Parameters that decay and that do not, of sizes that leave gaps in the flat buffer.
template <class T>
class Toy {
 public:
  using Config = ToyConfig;
  using precision = lm::precision_t<T>;
  using element = T;
  template <class U, lm::Space>
  using rebind = Toy<U>;
  static constexpr lm::Space space = lm::Space::host;
  static constexpr const char* kind = "toy";

  explicit Toy(const Config& config)
      : config_(config), all_({config.size * 5, config.size, config.size * 7, config.size, config.size}) {}
  const Config& config() const { return config_; }
  lm::VectorView<T> parameters() { return all_.flat(); }
  lm::VectorView<const T> parameters() const { return all_.flat(); }
  lm::Cost cost(Index) const { return {}; }

  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const Index n = self.config_.size;
    f("a", self.all_.matrix(0, n, 5), lm::group::A);
    f("bias", self.all_.matrix(1, 1, n), lm::group::bias);
    f("b", self.all_.template matrix<lm::Major::column>(2, 7, n), lm::group::B);
    f("lambda", self.all_.matrix(3, 1, n), lm::group::scale);
    f("embedding", self.all_.matrix(4, 1, n), lm::group::embedding);
  }

 private:
  Config config_;
  lm::Parameters<T, lm::Space::host, 5> all_;
};

/// Where a parameter of an adapter lies in the flat buffer.
struct Place {
  std::string name, group;
  Index begin = 0, size = 0;
};

template <class A>
std::vector<Place> places(const A& adapter) {
  std::vector<Place> found;
  const auto begin = adapter.parameters().data;
  A::visit(adapter, [&](const char* name, auto view, lm::ParameterGroup group) {
    found.push_back({name, group.name, view.data - begin, view.rows * view.cols});
  });
  return found;
}

/// Random numbers in the parameters, 0 in the gaps.
template <class A>
void randomise(A& adapter, std::uint64_t site) {
  using T = typename A::element;
  std::vector<T> values = normals<T>(adapter.parameters().size, site);
  for (const Place& p : places(adapter)) {
    std::copy_n(values.data() + p.begin, p.size, adapter.parameters().data + p.begin);
  }
}

}  // namespace loramix_test

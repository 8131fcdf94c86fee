/// Row operations (a gate, a softmax, a loss row) are written once against a team of threads that share one row:
/// one thread on the CPU, a warp or a block on the GPU (gpu/team.cuh).
///
///   Team::width        threads in the team, known at compile time
///   place()            which of them the caller is: in [0, width). Of n ≤ width items, item i is the business of the thread at place i,
///                      in each, sum and maximum: it may hold what it knows of it in a variable
///   each(n, f)         f(i) for every i in [0, n), each by one thread; all are done when it returns
///   sum(n, f)          Σ f(i), returned to every thread; a fixed order for a given width
///   sums(n, size, f, put)  put(g, Σ f(g, i) over i in [0, size)) for every g in [0, n), each by one thread
///   maximum(n, f)      the largest f(i), NaN first, returned to every thread; n ≥ 1
///   once(f)            f() by one thread; done when it returns
///
/// Determinism: results depend on the width, never on scheduling. Widths may differ in the last bits. A team of one adds every
///              16th term together where there are 32 or more.
#pragma once
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
struct AnyValue {
  LORAMIX_HD float operator()(Index) const { return 0; }
};
struct AnyPair {
  LORAMIX_HD float operator()(Index, Index) const { return 0; }
};
struct AnyAction {
  LORAMIX_HD void operator()(Index) const {}
  LORAMIX_HD void operator()(Index, float) const {}
  LORAMIX_HD void operator()() const {}
};
}  // namespace detail

template <class T>
concept Team = requires(const T& team) {
  T::width;
  team.place();
  team.each(Index{1}, detail::AnyAction{});
  team.sum(Index{1}, detail::AnyValue{});
  team.sums(Index{1}, Index{1}, detail::AnyPair{}, detail::AnyAction{});
  team.maximum(Index{1}, detail::AnyValue{});
  team.once(detail::AnyAction{});
};

/// A team of one.
struct SerialTeam {
  static constexpr int width = 1;

  LORAMIX_HD static constexpr Index place() { return 0; }
  template <class F>
  LORAMIX_HD void each(Index n, const F& f) const {
    for (Index i = 0; i < n; ++i) f(i);
  }
  template <class F>
  LORAMIX_HD auto sum(Index n, const F& f) const {
    using T = decltype(f(Index{0}) + f(Index{0}));
    T total{};
    Index i = 0;
    if (n >= 2 * lanes) {  // every 16th together: chains that a compiler puts side by side
      T part[lanes]{};
      for (Index block = 0; block < n / lanes; ++block, i += lanes) {
        for (int j = 0; j < lanes; ++j) part[j] += f(i + j);
      }
      for (int half = lanes / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) part[j] += part[j + half];
      }
      total = part[0];
    }
    for (; i < n; ++i) total += f(i);
    return total;
  }
  template <class F, class Put>
  LORAMIX_HD void sums(Index n, Index size, const F& f, const Put& put) const {
    for (Index g = 0; g < n; ++g) put(g, sum(size, [&](Index i) { return f(g, i); }));
  }
  template <class F>
  LORAMIX_HD auto maximum(Index n, const F& f) const {
    auto best = f(Index{0});
    for (Index i = 1; i < n; ++i) {
      const auto v = f(i);
      if (!(v <= best) && best == best) best = v;
    }
    return best;
  }
  template <class F>
  LORAMIX_HD void once(const F& f) const {
    f();
  }

 private:
  static constexpr int lanes = 16;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

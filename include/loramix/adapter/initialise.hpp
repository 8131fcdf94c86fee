/// Starting values, drawn from (seed, site, parameter name, row, column): the same on every machine.
///
/// Computes:    what the adapter's start() asks for: uniform(−b, b), normal(0, variance), zero, a constant; purpose 3 of
///              MATH.md section 1, with site = FNV-1a-64 of "<site>.<parameter>".
/// Writes:      every parameter [rows, cols] of a host adapter. Device adapters are copies of host ones (gpu/adapter.cuh).
/// Errors:      none.
/// Cost:        one Philox block per 4 values.
/// Determinism: bit for bit; normals up to the C library's log and cos.
/// Example:     examples/train
#pragma once
#include <cmath>

#include <loramix/core/adapter.hpp>
#include <loramix/core/normal.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The seed and the module's name.
struct InitialiseOptions {
  std::uint64_t seed = 0;
  const char* site = "";  // the module's name: modules with different names start differently
};

/// What an adapter's start() is handed.
class Fill {
 public:
  explicit Fill(const InitialiseOptions& options) : options_(options) {}

  /// U(low, high).
  template <class T, Major M>
  void uniform(const char* name, MatrixView<T, Space::host, M> v, double low, double high) const {
    const std::uint64_t key = key_of(name);
    each(v, [&](Index i, Index j) {
      return low + (high - low) * draw_uniform(key, Purpose::initialisation, static_cast<std::uint64_t>(i), j);
    });
  }
  /// U(−bound, bound).
  template <class T, Major M>
  void uniform(const char* name, MatrixView<T, Space::host, M> v, double bound) const {
    uniform(name, v, -bound, bound);
  }
  template <class T, Major M>
  void normal(const char* name, MatrixView<T, Space::host, M> v, double variance) const {
    const std::uint64_t key = key_of(name);
    each(v, [&](Index i, Index j) {
      return std::sqrt(variance) * draw_normal(key, Purpose::initialisation, static_cast<std::uint64_t>(i), j);
    });
  }
  template <class T, Major M>
  void constant(MatrixView<T, Space::host, M> v, double value) const {
    each(v, [&](Index, Index) { return value; });
  }
  template <class T, Major M>
  void zero(MatrixView<T, Space::host, M> v) const {
    constant(v, 0);
  }

 private:
  std::uint64_t key_of(const char* parameter) const {
    std::uint64_t hash = loramix::site(options_.site);
    if (options_.site[0] != '\0') hash = loramix::site(".", hash);
    return philox_key({.seed = options_.seed, .site = loramix::site(parameter, hash)});
  }
  template <class T, Major M, class F>
  static void each(MatrixView<T, Space::host, M> v, const F& value) {
    for (Index i = 0; i < v.rows; ++i) {
      for (Index j = 0; j < v.cols; ++j) v(i, j) = narrow<T>(value(i, j));
    }
  }

  InitialiseOptions options_;
};

/// Draws every parameter of `adapter` as its start() says.
template <Adapter A>
  requires(A::space == Space::host)
void initialise(A& adapter, const InitialiseOptions& options) {
  Fill fill(options);
  adapter.start(fill);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

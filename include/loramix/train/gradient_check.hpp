/// Is a backward right? Gradients against finite differences, in double, for any adapter and for any loss.
///
/// Computes:    for every tensor the error ‖g − fd‖₂ and the bound 1e-7·‖g‖₂ + 1e-8·(largest ‖g‖₂ of the case) of MATH.md
///              section 6. fd = (8(L(w+h) − L(w−h)) − (L(w+2h) − L(w−2h)))/12h, h = 1e-4: a stencil of fourth order. For
///              an adapter L = Σ c∘ΔY with random c [T, d_out]; its tensors are x and all parameters.
/// Reads:       adapter (a copy of it is changed), x and c made from the seed; or tensors' gradients [n].
/// Writes:      tensors' values [n], one at a time, and puts every one back.
/// Errors:      null, sizes that differ, no tensors; what forward and backward refuse.
/// Cost:        4 losses per value; allocates. On the host only.
/// Determinism: a pure function of adapter and options. Dropout, noise: one key for all losses, so masks are frozen.
///              What backward calls constant (a selection, a stop-gradient) must not move within 2h: for an adapter that
///              is the seed's business.
/// Example:     tests/train/gradient_check.cpp:  MyAdapter<double> mine({.d_in = 7, .d_out = 5, .dropout = 0.5});
///                                               const lm::GradientReport report = lm::gradient_check(be, mine);
///                                               if (!report.ok()) std::puts(report.text().c_str());
#pragma once
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include <loramix/adapter/forward.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What was found for one tensor.
struct CheckedTensor {
  std::string name;
  double norm = 0;   // ‖g‖₂
  double error = 0;  // ‖g − fd‖₂
  double bound = 0;
  bool ok = false;
};

/// What was found for all.
struct GradientReport {
  std::vector<CheckedTensor> tensors;

  /// All within their bounds, and not everything 0: a case without any gradient shows nothing.
  bool ok() const {
    bool all = true, any = false;
    for (const CheckedTensor& tensor : tensors) {
      all = all && tensor.ok;
      any = any || tensor.norm > 0;
    }
    return all && any;
  }
  /// A line per tensor.
  std::string text() const {
    std::string lines;
    for (const CheckedTensor& tensor : tensors) {
      char numbers[128];
      std::snprintf(numbers, sizeof numbers, " |g| %.3e  |g - fd| %.3e  bound %.3e  %s\n", tensor.norm, tensor.error,
                    tensor.bound, tensor.ok ? "ok" : "WRONG");
      lines += tensor.name + numbers;
    }
    return lines;
  }
};

/// A tensor [n] that a loss reads, and the gradient [n] that is claimed.
struct GradientClaim {
  const char* name;
  VectorView<double> values;
  VectorView<const double> gradient;
};

/// Checks claimed gradients of `loss`, any callable that returns a double from the tensors' present values.
template <class Loss>
GradientReport gradient_check(std::span<const GradientClaim> tensors, Loss&& loss) {
  const char* const op = "gradient_check";
  check::at_least(op, "the number of tensors", static_cast<Index>(tensors.size()), 1);
  for (const GradientClaim& tensor : tensors) {
    check::view(op, tensor.name, tensor.values);
    check::view(op, tensor.name, tensor.gradient);
    check::same(op, tensor.name, "gradient size", tensor.gradient.size, "the size of its values", tensor.values.size);
  }
  constexpr double h = 1e-4;
  GradientReport report;
  double largest = 0;
  for (const GradientClaim& tensor : tensors) {
    double squares = 0, errors = 0;
    for (Index i = 0; i < tensor.values.size; ++i) {
      double& value = tensor.values[i];
      const double before = value;
      const auto loss_at = [&](double moved) {
        value = moved;
        const double found = loss();
        value = before;
        return found;
      };
      const double near = loss_at(before + h) - loss_at(before - h);
      const double far = loss_at(before + 2 * h) - loss_at(before - 2 * h);
      const double difference = tensor.gradient[i] - (8 * near - far) / (12 * h);
      squares += tensor.gradient[i] * tensor.gradient[i];
      errors += difference * difference;
    }
    report.tensors.push_back({tensor.name, std::sqrt(squares), std::sqrt(errors), 0, false});
    if (std::sqrt(squares) > largest) largest = std::sqrt(squares);
  }
  for (CheckedTensor& tensor : report.tensors) {
    tensor.bound = 1e-7 * tensor.norm + 1e-8 * largest;
    tensor.ok = tensor.error <= tensor.bound;
  }
  return report;
}
template <class Loss>
GradientReport gradient_check(std::initializer_list<GradientClaim> tensors, Loss&& loss) {
  return gradient_check(std::span<const GradientClaim>(tensors.begin(), tensors.size()), loss);
}

/// The case that an adapter is checked with.
struct GradientCheckOptions {
  Index tokens = 5;
  std::uint64_t seed = 1;
  double noise = 0.5;  // added to every parameter, uniform in ±noise: many start at 0, where gradients vanish
  Keep keep = Keep::z;
  Batch<> batch{};  // what routers of tasks and sequences need to know of the tokens
};

namespace detail {
/// Fills `v` with uniform numbers in ±bound, added to what is there.
inline void add_noise(VectorView<double> v, const char* name, std::uint64_t seed, double bound) {
  const std::uint64_t key = philox_key({.seed = seed, .site = site(name)});
  for (Index i = 0; i < v.size; ++i) {
    v[i] += bound * (2 * draw_uniform(key, Purpose::sampling, 0, i) - 1);
  }
}
}  // namespace detail

/// Checks the backward of an adapter, with its dropout.
template <class Backend, ProductAdapter A>
GradientReport gradient_check(const Backend& be, A adapter, const GradientCheckOptions& options = {}) {
  static_assert(std::is_same_v<typename A::precision, Precision<double>> && A::space == Space::host,
                "loramix: gradient_check needs the adapter in double on the host: MyAdapter<double>");
  const Index tokens = options.tokens, d_in = adapter.A().cols, d_out = adapter.B().rows;
  Matrix<double> x(tokens, d_in), dx(tokens, d_in), y(tokens, d_out), dy(tokens, d_out);
  const auto flat = [](Matrix<double>& m) { return VectorView<double>(m.data(), m.rows() * m.cols()); };
  detail::add_noise(flat(x), "x", options.seed, 1);
  detail::add_noise(flat(dy), "dy", options.seed, 1);
  std::vector<GradientClaim> claims{{"x", flat(x), flat(dx)}};
  A::visit(adapter, [&](const char* name, auto view, ParameterGroup) {
    claims.push_back({name, {view.data, view.rows * view.cols}, {}});
    detail::add_noise(claims.back().values, name, options.seed, options.noise);
  });
  auto gradient = zeros_like(adapter);
  std::size_t next = 1;
  gradient_t<A>::visit(gradient, [&](const char*, auto view, ParameterGroup) {
    claims[next++].gradient = {view.data, view.rows * view.cols};
  });

  const Index there = workspace_bytes(be, adapter, tokens), back = workspace_bytes(be, adapter, tokens, Pass::backward);
  Buffer<std::byte> scratch(there > back ? there : back), kept(reserve_bytes(adapter, tokens, options.keep));
  const Key key{.seed = options.seed, .site = site("gradient_check")};
  Arena<> work{scratch.data(), scratch.size()}, reserve{kept.data(), kept.size()};
  const auto call = [&](Arena<>* save, Into into) {
    const Batch<>& batch = options.batch;
    return ForwardOptions<Space::host>{.save = save,
                                       .key = key,
                                       .keep = options.keep,
                                       .into = into,
                                       .sequences = batch.sequences,
                                       .tasks = batch.tasks,
                                       .labels = batch.labels,
                                       .valid = batch.valid};
  };
  auto saved = forward(be, adapter, x, y, work, call(&reserve, Into::add));
  backward(be, adapter, saved, x, dy, dx, gradient, work);
  return gradient_check(claims, [&] {
    forward(be, adapter, x, y, work, call(nullptr, Into::set));
    double loss = 0;
    for (Index t = 0; t < tokens; ++t) {
      for (Index o = 0; o < d_out; ++o) loss += dy(t, o) * y(t, o);
    }
    return loss;
  });
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

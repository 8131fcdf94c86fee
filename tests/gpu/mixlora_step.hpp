// One forward and backward of a MixLoRA block, described so that a .cu and a .cpp can both run it. The engine's products
// are left out: u, v and dh̄ are given.
#pragma once

#include <cstdint>
#include <vector>

#include <loramix/adapter/mix_lora_forward.hpp>

namespace loramix_test {

struct MixLoraStep {
  static constexpr std::int64_t tokens = 23, d_in = 12, d_hidden = 37, d_out = 9, experts = 3, rank = 2;
  static constexpr loramix::Key key{.seed = 7, .site = loramix::site("in"), .step = 2, .first_token = 11};
  static loramix::MixLoraConfig config(std::int64_t k, double capacity) {
    return {.d_in = d_in,
            .d_hidden = d_hidden,
            .d_out = d_out,
            .experts = experts,
            .rank = rank,
            .alpha = 3,
            .dropout = 0.5,
            .rule = {.k = k, .capacity = capacity}};
  }
  std::int64_t k;
  double capacity;
  std::vector<float> parameters, x, u, v, dy, dhbar;
};

struct MixLoraResults {
  std::vector<float> y, hbar, dx, du, dv, gradient;
  std::vector<std::int32_t> ids;
  bool operator==(const MixLoraResults&) const = default;
};

/// The stages on any backend; `at` has a view for every name.
template <class Backend, class A, class Gradient, class Views, class Arena>
auto run_mix_lora(const Backend& be, const A& mix, Gradient& grad, const Views& at, Arena& reserve, Arena work) {
  namespace lm = loramix;
  auto saved = lm::route(be, mix, at.x, reserve, work, {.key = MixLoraStep::key, .down_site = lm::site("down")});
  lm::mix(be, mix, saved, at.u, at.v, at.hbar, work);
  lm::finish(be, mix, saved, at.y, work, lm::Into::set);
  lm::finish_backward(be, mix, saved, at.dy, grad, work, lm::Into::set);
  lm::mix_backward(be, mix, saved, at.u, at.v, at.dhbar, at.du, at.dv, grad, work, lm::Into::set);
  lm::route_backward(be, mix, saved, at.x, at.dx, grad, work, {.parameters = lm::Into::set, .input = lm::Into::set});
  return saved.state.ids;
}

/// What run_mix_lora reads and writes.
template <loramix::Space S, class X = float>
struct MixLoraViews {
  loramix::MatrixView<const X, S> x, u, v, dy, dhbar;
  loramix::MatrixView<X, S> y, hbar, dx, du, dv;
};

/// On the CPU backend.
MixLoraResults mix_lora_on_host(const MixLoraStep& step);

}  // namespace loramix_test

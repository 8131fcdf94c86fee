// The CPU's side of tests/gpu/mixtures.cu.
#include "gpu/mixture_step.hpp"

#include <algorithm>

#include <loramix/cpu/cpu.hpp>

namespace lm = loramix;
using namespace loramix_test;

namespace {

template <class A>
MixtureResults run_on_host(const typename A::Config& config, const MixtureStep& step) {
  using S = MixtureStep;
  const lm::cpu::Backend be;
  A adapter(config);
  std::copy(step.parameters.begin(), step.parameters.end(), adapter.parameters().data);
  auto gradient = lm::zeros_like(adapter);
  MixtureResults r{std::vector<float>(static_cast<std::size_t>(S::tokens * S::d_out)),
                   std::vector<float>(step.x.size()),
                   {},
                   {},
                   {}};
  std::vector<std::byte> work(static_cast<std::size_t>(lm::workspace_bytes(be, adapter, S::tokens, lm::Pass::backward) +
                                                       lm::workspace_bytes(be, adapter, S::tokens)));
  std::vector<std::byte> kept(static_cast<std::size_t>(lm::reserve_bytes(adapter, S::tokens)));
  lm::Arena<> reserve{kept};
  lm::ForwardOptions<lm::Space::host> options{.save = &reserve, .key = {S::seed, S::site, S::number, S::first_token}};
  options.valid = {step.valid.data(), S::tokens};
  options.sequences = lm::Groups<>::by_segment(step.offsets.data(), S::sequences);
  options.tasks = lm::Groups<>::by_segment(step.offsets.data(), S::sequences, step.task_of.data(), S::tasks);
  const lm::MatrixView<const float> x{step.x.data(), S::tokens, S::d_in};
  auto saved = lm::forward(be, adapter, x, {r.y.data(), S::tokens, S::d_out}, lm::Arena<>{work}, options);
  const auto& scores = saved.scores;
  r.p.assign(scores.p.data, scores.p.data + scores.p.rows * scores.p.cols);
  r.ids.assign(scores.ids.data, scores.ids.data + scores.ids.rows * scores.ids.cols);
  lm::backward(be, adapter, saved, x, {step.dy.data(), S::tokens, S::d_out}, {r.dx.data(), S::tokens, S::d_in},
               gradient, lm::Arena<>{work});
  const auto all = gradient.parameters();
  r.gradient.assign(all.data, all.data + all.size);
  return r;
}

}  // namespace

MixtureResults loramix_test::mixture_on_host(MixtureCase which, const MixtureStep& step) {
  return with_mixture(which, [&]<class A>(const typename A::Config& config) { return run_on_host<A>(config, step); });
}

// The CPU's side of tests/gpu/domains.cu.
#include "gpu/domain_step.hpp"

#include <algorithm>
#include <utility>

#include <loramix/adapter/domains.hpp>
#include <loramix/cpu/cpu.hpp>

namespace lm = loramix;

loramix_test::DomainStepResults loramix_test::domain_step_on_host(const DomainStep& step) {
  const lm::cpu::Backend be;
  lm::Moa<float> moa({.d_in = step.d_in,
                      .d_out = step.d_out,
                      .experts = step.experts,
                      .rank = step.rank,
                      .dropout = step.dropout,
                      .places = step.places,
                      .pooling = step.last ? lm::Pooling::last : lm::Pooling::mean,
                      .straight_through = true});
  std::copy(step.parameters.begin(), step.parameters.end(), moa.parameters().data);
  auto gradient = lm::zeros_like(moa);
  DomainStepResults results{std::vector<float>(static_cast<std::size_t>(step.tokens * step.d_out)),
                            std::vector<float>(step.x.size()),
                            {},
                            {}};
  std::vector<std::byte> work(static_cast<std::size_t>(lm::workspace_bytes(be, moa, step.tokens, lm::Pass::backward) +
                                                       lm::workspace_bytes(be, moa, step.tokens))),
      kept(static_cast<std::size_t>(lm::reserve_bytes(moa, step.tokens)));
  lm::Arena reserve{kept};
  const lm::MatrixView<const float> x{step.x.data(), step.tokens, step.d_in};
  auto saved = lm::forward(be, moa, x, {results.y.data(), step.tokens, step.d_out}, lm::Arena{work},
                           {.save = &reserve,
                            .key = {.seed = 7, .step = 2},
                            .sequences = lm::Groups<>::by_segment(step.offsets.data(), step.sequences),
                            .labels = {step.labels.data(), step.sequences},
                            .valid = {step.valid.data(), step.tokens}});
  const auto& scores = saved.scores;
  std::copy(step.dp.begin(), step.dp.end(), scores.dp.data);
  results.ids.assign(scores.ids.data, scores.ids.data + step.sequences);
  lm::backward(be, moa, saved, x, {step.dy.data(), step.tokens, step.d_out},
               {results.dx.data(), step.tokens, step.d_in}, gradient, lm::Arena{work});
  results.gradient.assign(gradient.parameters().data, gradient.parameters().data + gradient.parameters().size);
  return results;
}

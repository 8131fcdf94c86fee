// GateData as a GateForm on a backend, with places for the gradients of its factors.
#pragma once

#include <loramix/gate/form.hpp>

#include "conformance/tensor.hpp"
#include "reference/gate_data.hpp"

namespace loramix_test {

template <class H, class Score>
class LoweredGate {
 public:
  static constexpr lm::Space space = H::space;

  LoweredGate(H& harness, const GateData& data, Index padding) {
    form_.tokens = data.tokens;
    form_.ranks = data.ranks;
    form_.experts = data.experts;
    form_.status = harness.status();
    if (data.spec.mixed_ranks) {
      form_.rank_offsets = harness.upload(std::vector<lm::Index>(data.rank_offsets.begin(), data.rank_offsets.end()));
    }
    if (data.id_groups.present()) {
      form_.ids = Tensor<H, std::int32_t>(harness, data.ids, padding).view();
      form_.id_groups = groups(harness, data.id_groups);
      if (data.spec.id_weights) form_.id_weights = Tensor<H, Score>(harness, data.id_weights, padding).view();
    }
    if (data.weight_groups.present() && !data.spec.computed) {
      form_.weights = Tensor<H, Score>(harness, data.weights, padding).view();
      form_.weight_groups = groups(harness, data.weight_groups);
    }
    if (data.spec.values) form_.values = Tensor<H, Score>(harness, data.values, padding).view();
    if (data.multiplier_groups.present()) {
      form_.multiplier = Tensor<H, Score>(harness, data.multiplier, 0).column();
      form_.multiplier_groups = groups(harness, data.multiplier_groups);
    }
    if (data.spec.rank_scale) form_.rank_scale = Tensor<H, Score>(harness, data.rank_scale, 0).flat();
    if (data.prefix_groups.present()) {
      form_.prefix = Tensor<H, std::int32_t>(harness, data.prefix, 0).column();
      form_.prefix_groups = groups(harness, data.prefix_groups);
    }
    if (data.subset_groups.present()) {
      form_.subset = Tensor<H, std::uint8_t>(harness, data.subset, padding).view();
      form_.subset_groups = groups(harness, data.subset_groups);
    }
  }

  lm::GateForm<Score, space>& form() { return form_; }

  static lm::Groups<space> groups(H& harness, const GroupData& data) {
    if (data.by == By::id) return lm::Groups<space>::by_id(harness.upload(data.ids), data.count);
    if (data.by == By::segment) {
      const std::vector<lm::Index> offsets(data.offsets.begin(), data.offsets.end());
      return lm::Groups<space>::by_segment(harness.upload(offsets), data.count);
    }
    return {};
  }

 private:
  lm::GateForm<Score, space> form_;
};

/// A tensor for each factor of a gate, wired into a GateGradient.
template <class H, class Score>
struct GateGradients {
  std::vector<Tensor<H, Score>> tensors;
  lm::GateGradient<Score, H::space> views;

  template <class Make>
  GateGradients(const NamedGate<Tracked>& gate, Index padding, const Make& make) {
    for (std::size_t i = 0; i < gate.names.size(); ++i) {
      const Grid<Tracked>& like = gate.gate.factors[i].values;
      const FactorName name = gate.names[i];
      const bool vector = name == FactorName::multiplier || name == FactorName::rank_scale;
      tensors.push_back(make(like.rows(), like.cols(), vector ? 0 : padding));
      const Tensor<H, Score>& made = tensors.back();
      if (name == FactorName::id_weights) views.id_weights = made.view();
      if (name == FactorName::weights) views.weights = made.view();
      if (name == FactorName::values) views.values = made.view();
      if (name == FactorName::multiplier) views.multiplier = made.column();
      if (name == FactorName::rank_scale) views.rank_scale = made.flat();
    }
  }
};

}  // namespace loramix_test

/// Many LoRAs side by side as one adapter: mixed ranks and scales, an adapter id per token or segment.
///
/// Computes:    ΔY of a token with id e = s_e (X A_eᵀ) B_eᵀ; id −1: nothing. One gated product: the LoRAs' ranks lie
///              one behind the other, rank_offsets say where each begins, scales are values per rank.
/// Source:      S-LoRA (arXiv 2311.03285) and Punica (2310.18547) for what engines need.
/// Parameters:  lora_A.weight [Σr, d_in], lora_B.weight [d_out, Σr]. Ids come with the call: ForwardOptions::tasks, by
///              id or by segment, with count = slots(). Without dropout: LoRAs are trained alone.
/// Errors:      sizes below 0; no ids in the call, an id that is no slot or an empty one (host).
/// Cost:        LoRA of rank Σr on the composed path; rows of y without an adapter are not written (CPU).
/// Determinism: adapter/forward.hpp; a token depends on its own row and id only. Forward is const.
/// Merge:       none: several adapters at once.
/// Example:     tests/adapter/serving.cpp
#pragma once
#include <vector>

#include <loramix/adapter/lora.hpp>
#include <loramix/router/request.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Rank and scale of the LoRA in a slot; an empty slot has neither.
struct ServedSlot {
  Index rank = 0;
  double scale = 1;
  bool used = false;
};

/// Sizes of what is served.
struct ServedConfig {
  Index d_in = 0;
  Index d_out = 0;
  std::vector<ServedSlot> slots{};

  static ServedConfig of(const Shape& shape) {
    const ServedSlot slot{shape.total_rank / shape.experts, 2, true};
    return {shape.d_in, shape.d_out, std::vector<ServedSlot>(static_cast<std::size_t>(shape.experts), slot)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
  }
};

/// Owns the A and B of all slots; there is at least one slot.
template <class P = float, class T = typename precision_t<P>::weight>
class Served {
 public:
  using Config = ServedConfig;
  using precision = precision_t<P>;
  using element = T;
  using score = typename precision::score;
  template <class U, Space V = Space::host>
  using rebind = Served<P, U>;
  static constexpr Space space = Space::host;
  static constexpr const char* kind = "served";

  explicit Served(const Config& config)
      : config_(normal(config)),
        offsets_(slots() + 1),
        ids_(slots()),
        scale_(tables()),
        parameters_({detail::size_of(ranks(), config.d_in), detail::size_of(config.d_out, ranks())}) {
    for (Index e = 0; e < slots(); ++e) {
      ids_[e] = slot(e).used ? static_cast<std::int32_t>(e) : -1;
      for (Index j = offsets_[e]; j < offsets_[e + 1]; ++j) scale_[j] = score(slot(e).scale);
    }
  }

  const Config& config() const { return config_; }
  Index slots() const { return static_cast<Index>(config_.slots.size()); }
  const ServedSlot& slot(Index e) const { return config_.slots[static_cast<std::size_t>(e)]; }
  Index ranks() const { return offsets_[slots()]; }
  VectorView<T> parameters() { return parameters_.flat(); }
  VectorView<const T> parameters() const { return parameters_.flat(); }
  double scale() const { return 1; }
  double dropout() const { return 0; }

  auto A() { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  /// The ranks of slot e.
  auto A(Index e) { return A().row_range(offsets_[e], slot(e).rank); }
  auto A(Index e) const { return A().row_range(offsets_[e], slot(e).rank); }
  auto B(Index e) { return B().col_range(offsets_[e], slot(e).rank); }
  auto B(Index e) const { return B().col_range(offsets_[e], slot(e).rank); }
  RequestGate<T, score> gate() { return {ids_.view(), offsets_.data(), scale_.view()}; }
  RequestGate<const T, score> gate() const { return {ids_.view(), offsets_.data(), scale_.view()}; }

  Cost cost(Index tokens) const {
    return product_cost<precision>(tokens, config_.d_in, config_.d_out, ranks(), ranks(), 0);
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
  }

 private:
  static Config normal(Config config) {
    if (config.slots.empty()) config.slots.emplace_back();
    for (const ServedSlot& slot : config.slots) {
      detail::checked("Served", LoraConfig{config.d_in, config.d_out, slot.rank});
    }
    return config;
  }
  Index tables() {
    for (Index e = 0; e < slots(); ++e) offsets_[e + 1] = offsets_[e] + slot(e).rank;
    return ranks();
  }

  Config config_;
  Buffer<Index> offsets_;
  Buffer<std::int32_t> ids_;
  Buffer<score> scale_;
  Parameters<T, Space::host, 2> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

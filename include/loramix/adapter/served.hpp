/// Many LoRAs side by side as one adapter: mixed ranks and scales, an adapter id per token or segment.
///
/// Computes:    ΔY of a token with id e = s_e (X A_eᵀ) B_eᵀ; id −1: nothing. One gated product: the LoRAs' ranks lie
///              one behind the other, rank_offsets say where each begins, scales are values per rank.
/// Source:      S-LoRA (arXiv 2311.03285) and Punica (2310.18547) for what engines need.
/// Parameters:  lora_A.weight [Σr, d_in], lora_B.weight [d_out, Σr]. Ids come with the call: ForwardOptions::tasks, by
///              id or by segment, with count = slots(). Without dropout: LoRAs are trained alone.
/// Errors:      sizes below 0; no ids in the call, an id that is no slot or an empty one (host; on the device it
///              contributes nothing, and an id that is no slot sets gpu::Status).
/// Cost:        LoRA of rank Σr on the composed paths; the fused ones compute what the batch asks for, and do not write
///              rows of y without an adapter.
/// Determinism: adapter/forward.hpp; a token depends on its own row and id only. Forward is const.
/// Merge:       none: several adapters at once.
/// Example:     tests/adapter/serving.cpp
#pragma once
#include <vector>

#include <loramix/adapter/lora.hpp>
#include <loramix/router/request.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Rank and scale of the LoRA in a slot; an empty slot has no scale, and a rank where it is room (gpu/serving.cuh).
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
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Served {
 public:
  using Config = ServedConfig;
  using precision = precision_t<P>;
  using element = T;
  using score = typename precision::score;
  template <class U, Space V = S>
  using rebind = Served<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "served";

  explicit Served(const Config& config)
      : config_(normal(config)),
        begin_(table<Index>(
            slots() + 1, [this, sum = Index{0}](Index e) mutable { return e == 0 ? sum : sum += slot(e - 1).rank; })),
        offsets_(begin_),
        ids_(
            table<std::int32_t>(slots(), [this](Index e) { return static_cast<std::int32_t>(slot(e).used ? e : -1); })),
        scale_(table<score>(ranks(),
                            [this, e = Index{0}](Index j) mutable {
                              while (begin_[e + 1] <= j) ++e;
                              return score(slot(e).scale);
                            })),
        parameters_({detail::size_of(ranks(), config.d_in), detail::size_of(config.d_out, ranks())}) {}

  const Config& config() const { return config_; }
  Index slots() const { return static_cast<Index>(config_.slots.size()); }
  const ServedSlot& slot(Index e) const { return config_.slots[static_cast<std::size_t>(e)]; }
  Index ranks() const { return begin_[slots()]; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  double scale() const { return 1; }
  double dropout() const { return 0; }

  auto A() { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  /// The ranks of slot e.
  auto A(Index e) { return A().row_range(begin_[e], slot(e).rank); }
  auto A(Index e) const { return A().row_range(begin_[e], slot(e).rank); }
  auto B(Index e) { return B().col_range(begin_[e], slot(e).rank); }
  auto B(Index e) const { return B().col_range(begin_[e], slot(e).rank); }
  /// Slot e as the gate reads it, for who puts LoRAs into room (gpu/serving.cuh): its id, −1 where it is empty,
  /// and the scale of its ranks.
  VectorView<std::int32_t, S> id(Index e) { return {ids_.data() + e, 1}; }
  VectorView<score, S> scales(Index e) { return {scale_.data() + begin_[e], slot(e).rank}; }
  RequestGate<T, score, S> gate() { return {ids_.view(), offsets_.data(), scale_.view()}; }
  RequestGate<const T, score, S> gate() const { return {ids_.view(), offsets_.data(), scale_.view()}; }

  /// With the adapter of most ranks for every token.
  Cost cost(Index tokens) const {
    Index most = 0;
    for (const ServedSlot& slot : config_.slots) most = slot.rank > most ? slot.rank : most;
    return product_cost<precision>(tokens, config_.d_in, config_.d_out, ranks(), ranks(), 0, most);
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
  }

 private:
  static Config normal(Config config) {
    if (config.slots.empty()) config.slots.emplace_back();
    for (const auto& slot : config.slots) detail::checked("Served", LoraConfig{config.d_in, config.d_out, slot.rank});
    return config;
  }
  /// What the gate reads, made on the host: value(i) for i in [0, n).
  template <class V, class F>
  static Buffer<V> table(Index n, F value) {
    Buffer<V> values(n);
    for (Index i = 0; i < n; ++i) values[i] = value(i);
    return values;
  }

  Config config_;
  Buffer<Index> begin_;  // [slots + 1] a slot's first rank
  Buffer<Index, S> offsets_;
  Buffer<std::int32_t, S> ids_;
  Buffer<score, S> scale_;
  Parameters<T, S, 2> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

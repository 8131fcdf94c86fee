// The gates of benchmark rows: drawn from a counter, as the library takes them and as baselines want them.
#pragma once
#include <cstdint>
#include <vector>

#include <loramix/core/draws.hpp>
#include <loramix/gate/gates.hpp>

#include "baselines.hpp"

namespace bench {

enum class Gate {
  open,
  dense,     // weights [T, E]
  shared,    // the same, with one A of R/E rows for all experts
  top_k,     // ids and weights [T, k]
  segments,  // one expert per sequence
  served,    // one adapter per token, ranks as they come
  prefix     // leading ranks of a token
};

// What a row's gate is made of.
struct GateShape {
  Gate kind = Gate::open;
  Index tokens = 0, ranks = 0, experts = 1, chosen = 2;
  std::vector<Index> rank_of{};  // of each adapter, where they differ
  Index prefix = 0;              // leading ranks of every token; 0: drawn
};

struct GateData {
  lm::Matrix<float> weights, dweights;  // [T, E] or [T, k]
  lm::Matrix<std::int32_t> ids;         // [T, k], or [T or segments, 1]
  lm::Buffer<std::int32_t> prefix;      // [T]
  std::vector<Index> segments;          // [E + 1]
  std::vector<Index> offsets;           // [E + 1] of ranks
  lm::GateForm<float> form;
  lm::GateGradient<float> gradient;
  std::vector<Assignment<float>> experts;
  double active = 1;  // mean share of ranks that are open
  double used = 1;    // share of the weights that some token uses
  bool selects = false;

  GateData() = default;
  GateData(const GateData&) = delete;
  GateData& operator=(const GateData&) = delete;
  explicit GateData(const GateShape& s) {
    for (Index e = 0; e <= s.experts; ++e) {
      const bool mixed = !s.rank_of.empty();
      offsets.push_back(
          e == 0 ? 0 : offsets.back() + (mixed ? s.rank_of[static_cast<std::size_t>(e - 1)] : s.ranks / s.experts));
    }
    for (Index e = 0; e < s.experts; ++e) {
      const Index begin = offsets[static_cast<std::size_t>(e)];
      experts.push_back(
          {begin, offsets[static_cast<std::size_t>(e + 1)] - begin, {}, {}, false, s.kind == Gate::shared});
    }
    form.tokens = s.tokens, form.ranks = s.ranks;
    if (s.kind == Gate::open) open(s);
    if (s.kind == Gate::dense || s.kind == Gate::shared) dense(s);
    if (s.kind == Gate::top_k) top_k(s);
    if (s.kind == Gate::segments) of_segments(s);
    if (s.kind == Gate::served) served(s);
    if (s.kind == Gate::prefix) prefixes(s);
  }

 private:
  static std::uint64_t draw(std::uint64_t i) { return lm::detail::splitmix64(i ^ 0x5eedu); }
  static float draw_weight(Index t, Index k) {
    return 0.1f + static_cast<float>(draw(static_cast<std::uint64_t>(t * 64 + k)) >> 40) * 0x1p-24f;
  }
  void give(Index e, Index t, float w) {
    auto& expert = experts[static_cast<std::size_t>(e)];
    expert.tokens.push_back(t);
    expert.weights.push_back(w);
  }
  // What share of the weights the experts that have tokens are.
  void count_used(const GateShape& s) {
    Index ranks = 0;
    for (const auto& e : experts) ranks += e.tokens.empty() ? 0 : e.ranks;
    used = static_cast<double>(ranks) / static_cast<double>(s.ranks);
  }

  void open(const GateShape& s) {
    form = lm::OpenGate<float>{}.form(s.tokens, s.ranks);
    for (Index t = 0; t < s.tokens; ++t) experts[0].tokens.push_back(t);
    experts[0].contiguous = true;
  }
  void dense(const GateShape& s) {
    weights = lm::Matrix<float>(s.tokens, s.experts), dweights = lm::Matrix<float>(s.tokens, s.experts);
    for (Index t = 0; t < s.tokens; ++t) {
      for (Index e = 0; e < s.experts; ++e) give(e, t, weights(t, e) = draw_weight(t, e));
    }
    for (auto& e : experts) e.contiguous = true;
    form = lm::TokenExperts<float>{weights.view()}.form(s.tokens, s.ranks);
    gradient.weights = dweights;
  }
  void top_k(const GateShape& s) {
    const Index k = s.chosen;
    weights = lm::Matrix<float>(s.tokens, k), dweights = lm::Matrix<float>(s.tokens, k);
    ids = lm::Matrix<std::int32_t>(s.tokens, k);
    for (Index t = 0; t < s.tokens; ++t) {
      Index e = static_cast<Index>(draw(static_cast<std::uint64_t>(t)) >> 33) % s.experts;
      for (Index i = 0; i < k; ++i) {  // strides of at most E/k: never the same twice
        ids(t, i) = static_cast<std::int32_t>(e);
        give(e, t, weights(t, i) = draw_weight(t, i));
        e = (e + 1 +
             static_cast<Index>(draw(static_cast<std::uint64_t>(~(t * k + i))) >> 33) %
                 std::max<Index>(1, s.experts / k - 1)) %
            s.experts;
      }
    }
    form = lm::TopKExperts<float>{ids.view(), weights.view(), s.experts}.form(s.tokens, s.ranks);
    gradient.id_weights = dweights;
    active = static_cast<double>(k) / static_cast<double>(s.experts);
    selects = true;
    count_used(s);
  }
  void of_segments(const GateShape& s) {  // in an order of their own
    ids = lm::Matrix<std::int32_t>(s.experts, 1);
    for (Index i = 0; i <= s.experts; ++i) segments.push_back(i * s.tokens / s.experts);
    for (Index i = 0; i < s.experts; ++i) {
      const Index e = (i * 3 + 1) % s.experts;
      ids(i, 0) = static_cast<std::int32_t>(e);
      auto& expert = experts[static_cast<std::size_t>(e)];
      for (Index t = segments[static_cast<std::size_t>(i)]; t < segments[static_cast<std::size_t>(i + 1)]; ++t) {
        expert.tokens.push_back(t);
      }
      expert.contiguous = true;
    }
    const auto groups = lm::Groups<>::by_segment(segments.data(), s.experts);
    form = lm::OneExpert<float>{{ids.data(), s.experts}, groups, s.experts}.form(s.tokens, s.ranks);
    active = 1.0 / static_cast<double>(s.experts);
    selects = true;
  }
  void served(const GateShape& s) {
    ids = lm::Matrix<std::int32_t>(s.tokens, 1);
    double open_ranks = 0;
    for (Index t = 0; t < s.tokens; ++t) {
      const Index e = (t * 7 + 3) % s.experts;
      ids(t, 0) = static_cast<std::int32_t>(e);
      experts[static_cast<std::size_t>(e)].tokens.push_back(t);
      open_ranks += static_cast<double>(experts[static_cast<std::size_t>(e)].ranks);
    }
    form =
        lm::OneExpert<float>{{ids.data(), s.tokens}, {}, s.experts, s.rank_of.empty() ? nullptr : offsets.data()}.form(
            s.tokens, s.ranks);
    active = open_ranks / static_cast<double>(s.tokens * s.ranks);
    selects = true;
    count_used(s);
  }
  void prefixes(const GateShape& s) {  // one "expert" per length
    experts.clear();
    prefix = lm::Buffer<std::int32_t>(s.tokens);
    double open_ranks = 0;
    for (Index p = 1; p <= s.ranks; ++p) experts.push_back({0, p, {}, {}, false, false});
    for (Index t = 0; t < s.tokens; ++t) {
      const Index drawn = 1 + static_cast<Index>(draw(static_cast<std::uint64_t>(t)) >> 33) % s.ranks;
      const Index p = s.prefix != 0 ? s.prefix : drawn;
      prefix[t] = static_cast<std::int32_t>(p);
      experts[static_cast<std::size_t>(p - 1)].tokens.push_back(t);
      open_ranks += static_cast<double>(p);
    }
    form = lm::RankPrefix<float>{prefix.view()}.form(s.tokens, s.ranks);
    active = open_ranks / static_cast<double>(s.tokens * s.ranks);
    selects = true;
  }
};

}  // namespace bench

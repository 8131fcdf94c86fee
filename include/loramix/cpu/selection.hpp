/// Which tokens belong to which ranks, where a gate closes most of them: a counting sort, chunk by chunk.
///
/// Computes:    for every chunk of tokens and every group of ranks (an expert; a pair of experts; or, where there is only a
///              prefix, the packets up to which it reaches) the tokens whose gate is open there, in order; behind the groups
///              the tokens of none.
/// Reads:       ids and prefix of a GateForm.
/// Writes:      begin [chunks, groups + 2], entries [chunks, chunk · most], and which groups have tokens [chunks, 1 + min(groups, chunk · most)].
/// Errors:      none: the form was checked.
/// Cost:        O(T·k + chunks·groups).
/// Determinism: groups ascend, tokens ascend inside a group.
/// Example:     cpu/grouped.hpp
#pragma once
#include <algorithm>

#include <loramix/core/arena.hpp>
#include <loramix/cpu/gate_rows.hpp>
#include <loramix/cpu/packet.hpp>
#include <loramix/cpu/tuning.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Whether a form selects in a way that can be grouped. Sizes only: in a size query its views are null.
inline bool selects(const GateForm<float>& gate) { return gate.ids.cols != 0 || gate.prefix.size != 0; }

/// Whether tokens may be listed by the two experts that they chose: a token is then in one list, and the products with both
/// experts meet in registers. Few experts only: lists of a handful of tokens are no use.
inline bool lists_pairs(const GateForm<float>& gate) { return gate.ids.cols == 2 && gate.experts <= 12; }

/// Whether there are so many experts that a chunk has a handful of tokens for each: lists are then as long as they can be, and
/// weights, which few tokens meet, are read as they lie.
inline bool many_experts(const GateForm<float>& gate) {
  return gate.ids.cols != 0 && gate.experts > 16 * gate.ids.cols;
}

/// Ranks of the largest expert.
inline Index most_ranks_of(const GateForm<float>& gate) {
  Index most = 0;
  for (Index e = 0; e < gate.experts; ++e) most = larger(most, gate.expert_begin(e + 1) - gate.expert_begin(e));
  return most;
}

class Selection {
 public:
  enum class By { expert, pair, one_of_many };
  struct Entry {
    std::uint16_t token;  // of the chunk
  };
  /// Tokens, in order, of one group in one chunk.
  struct List {
    const Entry* entries;
    Index count;
    Index first_entry;  // of the chunk's entries

    /// Whether entries [i, i + n) are neighbours: a tile may then step from row to row.
    bool consecutive(Index i, Index n) const { return entries[i + n - 1].token - entries[i].token == n - 1; }
    /// What of it lies in entries [begin, end) of the chunk.
    List inside(Index begin, Index end) const {
      const Index from = larger(begin, first_entry), to = smaller(end, first_entry + count);
      return {entries + (from - first_entry), larger(0, to - from), from};
    }
  };
  /// Ranks that lie together: a part of a group.
  struct Run {
    Index expert, begin, count;
  };
  static constexpr Index chunk_by_expert = 120, chunk_by_pair = 512, chunk_of_many = 4096;

  Selection() = default;
  /// `by` pairs: where lists_pairs; one of many, whose lists are long: where there are ids.
  Selection(Arena<>& arena, const GateForm<float>& gate, By by = By::expert)
      : gate_(gate),
        in_pairs_(by == By::pair),
        of_many_(by == By::one_of_many),
        begin_(arena.matrix<std::int32_t>(chunks(), groups() + 2)),
        entries_(arena.matrix<Entry>(chunks(), chunk() * most())),
        open_(arena.matrix<std::int32_t>(chunks(), 1 + smaller(groups(), chunk() * most()))) {}

  Index chunk() const {
    return of_many_ ? smaller(chunk_of_many, larger(1, gate_.tokens)) : in_pairs_ ? chunk_by_pair : chunk_by_expert;
  }
  Index chunks() const { return blocks_of(gate_.tokens, chunk()); }
  Index tokens() const { return gate_.tokens; }
  Index tokens(Index c) const { return smaller(chunk(), gate_.tokens - c * chunk()); }
  bool in_pairs() const { return in_pairs_; }
  bool of_many() const { return of_many_; }
  /// Pairs: experts e ≤ f make group e · experts + f.
  Index groups() const {
    if (in_pairs_) return gate_.experts * gate_.experts;
    return by_ids() ? gate_.experts : blocks_of(gate_.ranks, width);
  }
  Index experts() const { return by_ids() ? gate_.experts : 1; }
  Run run_of(Index expert) const {
    if (!by_ids()) return {0, 0, gate_.ranks};
    const Index begin = gate_.expert_begin(expert);
    return {expert, begin, gate_.expert_begin(expert + 1) - begin};
  }
  /// f(run) for what belongs to group g, ranks ascending.
  template <class F>
  void each_run(Index g, F&& f) const {
    if (!in_pairs_) return f(Run{by_ids() ? g : 0, rank_begin(g), rank_count(g)});
    const Index first = g / gate_.experts, last = g % gate_.experts;
    f(run_of(first));
    if (last != first) f(run_of(last));
  }
  /// Whether a rank may belong to several groups: prefixes do.
  bool share_ranks() const { return !by_ids(); }
  /// Groups of one token, at most, and at least one: none is a list, too.
  Index most() const { return by_ids() && !in_pairs_ ? larger(1, gate_.ids.cols) : 1; }
  /// Ranks that all tokens together reach, at most.
  Index most_open() const {
    return elements(tokens(), elements(gate_.ids.cols == 0 ? 1 : gate_.ids.cols, most_ranks()));
  }
  /// Packets of sums of the largest group.
  Index most_packets() const { return (in_pairs_ ? 2 : 1) * blocks_of(most_ranks(), width); }
  Index rank_begin(Index g) const { return by_ids() ? gate_.expert_begin(g) : 0; }
  Index rank_count(Index g) const {
    return by_ids() ? gate_.expert_begin(g + 1) - gate_.expert_begin(g) : smaller(gate_.ranks, (g + 1) * width);
  }
  /// Ranks of the largest expert, or of the longest prefix.
  Index most_ranks() const { return by_ids() ? most_ranks_of(gate_) : gate_.ranks; }
  /// `g` = groups(): the tokens that are in no group.
  List list(Index c, Index g) const {
    const std::int32_t* const begin = begin_.row(c) + g;
    return {entries_.row(c) + begin[0], begin[1] - begin[0], begin[0]};
  }
  /// f(g, the one that follows) for the groups with tokens in chunk c, in order; groups() follows the last.
  template <class F>
  void each_group_in(Index c, F&& f) const {
    const std::int32_t* const open = open_.row(c);
    for (Index i = 0, n = open[0]; i < n; ++i) f(Index{open[1 + i]}, i + 1 < n ? Index{open[2 + i]} : groups());
  }

  template <class E>
  void build(const Backend<E>& be) const {
    be.run(chunks(), [this](Index c, Index) { sort(c); });
  }

 private:
  bool by_ids() const { return gate_.ids.cols != 0; }

  /// f(group) for the groups of token t, or for the list of those without.
  template <class F>
  void each_group(Index t, F&& f) const {
    const FloatRow row(gate_, t);
    if (!by_ids()) {
      const Index open = row.covered() ? smaller(row.limit(), gate_.ranks) : 0;
      return f(open > 0 ? blocks_of(open, width) - 1 : groups());
    }
    Index first = -1, second = -1;
    each_open_run(gate_, row, [&](const OpenRun& run) {
      if (!in_pairs_) f(run.expert);
      (first < 0 ? first : second) = run.expert;
    });
    if (first < 0) return f(groups());
    if (!in_pairs_) return;
    if (second < 0) second = first;
    f(smaller(first, second) * gate_.experts + larger(first, second));
  }
  void sort(Index c) const {
    const Index groups = this->groups() + 1;
    std::int32_t* const begin = begin_.row(c);
    std::fill_n(begin, groups + 1, 0);
    for (Index i = 0; i < tokens(c); ++i) each_group(c * chunk() + i, [&](Index g) { ++begin[g + 1]; });
    for (Index g = 0; g < groups; ++g) begin[g + 1] += begin[g];
    for (Index i = 0; i < tokens(c); ++i) {
      each_group(c * chunk() + i, [&](Index g) { entries_(c, begin[g]++) = {static_cast<std::uint16_t>(i)}; });
    }
    // Filling moved every beginning to its end.
    for (Index g = groups; g > 0; --g) begin[g] = begin[g - 1];
    begin[0] = 0;
    std::int32_t* const open = open_.row(c);
    open[0] = 0;
    for (Index g = 0; g < this->groups(); ++g) {
      if (begin[g + 1] != begin[g]) open[++open[0]] = static_cast<std::int32_t>(g);
    }
  }

  GateForm<float> gate_;
  bool in_pairs_ = false, of_many_ = false;
  MatrixView<std::int32_t> begin_;  // [chunks, groups + 2]
  MatrixView<Entry> entries_;       // [chunks, chunk · most]
  MatrixView<std::int32_t> open_;   // [chunks, 1 + groups with tokens]: how many, which
};

/// How tokens are listed for products whose rows are tokens: by pairs where they may be, but for T ≤ 64, where each expert's
/// weights are to be read once.
inline Selection::By listing(const Tuning& tuning, const GateForm<float>& gate) {
  if (many_experts(gate)) return Selection::By::one_of_many;
  const bool many = class_of(tuning, gate.tokens) == TokenClass::many;
  return many && lists_pairs(gate) ? Selection::By::pair : Selection::By::expert;
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

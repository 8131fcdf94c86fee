/// Which tokens belong to which ranks, where a gate closes most of them: a counting sort, chunk by chunk.
///
/// Computes:    for every chunk of tokens and every group of ranks (an expert; or, where there is only a prefix, the packets up
///              to which it reaches) the tokens whose gate is open there, in order; behind the groups the tokens of none.
/// Reads:       ids and prefix of a GateForm.
/// Writes:      begin [chunks, groups + 2], entries [chunks, chunk · most].
/// Errors:      none: the form was checked.
/// Cost:        O(T·k + chunks·groups).
/// Determinism: groups ascend, tokens ascend inside a group.
/// Example:     cpu/grouped.hpp
#pragma once
#include <loramix/core/arena.hpp>
#include <loramix/cpu/gate_rows.hpp>
#include <loramix/cpu/packet.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Whether a form selects in a way that can be grouped. Sizes only: in a size query its views are null.
inline bool selects(const GateForm<float>& gate) { return gate.ids.cols != 0 || gate.prefix.size != 0; }

class Selection {
 public:
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
  };
  static constexpr Index chunk = 128;

  Selection() = default;
  Selection(Arena<>& arena, const GateForm<float>& gate)
      : gate_(gate),
        begin_(arena.matrix<std::int32_t>(chunks(), groups() + 2)),
        entries_(arena.matrix<Entry>(chunks(), chunk * most())) {}

  Index chunks() const { return blocks_of(gate_.tokens, chunk); }
  Index tokens(Index c) const { return smaller(chunk, gate_.tokens - c * chunk); }
  Index groups() const { return by_ids() ? gate_.experts : blocks_of(gate_.ranks, width); }
  /// Whether a rank may belong to several groups: prefixes do.
  bool share_ranks() const { return !by_ids(); }
  /// Groups of one token, at most, and at least one: none is a list, too.
  Index most() const { return by_ids() ? larger(1, gate_.ids.cols) : 1; }
  Index rank_begin(Index g) const { return by_ids() ? gate_.expert_begin(g) : 0; }
  Index rank_count(Index g) const {
    return by_ids() ? gate_.expert_begin(g + 1) - gate_.expert_begin(g) : smaller(gate_.ranks, (g + 1) * width);
  }
  /// Ranks of the largest group.
  Index most_ranks() const {
    Index most = 0;
    for (Index g = 0; g < groups(); ++g) most = larger(most, rank_count(g));
    return most;
  }
  /// `g` = groups(): the tokens that are in no group.
  List list(Index c, Index g) const {
    const std::int32_t* const begin = begin_.row(c) + g;
    return {entries_.row(c) + begin[0], begin[1] - begin[0], begin[0]};
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
    bool none = true;
    each_open_run(gate_, row, [&](const OpenRun& run) {
      f(run.expert);
      none = false;
    });
    if (none) f(groups());
  }
  void sort(Index c) const {
    const Index groups = this->groups() + 1;
    std::int32_t* const begin = begin_.row(c);
    for (Index g = 0; g <= groups; ++g) begin[g] = 0;
    for (Index i = 0; i < tokens(c); ++i) each_group(c * chunk + i, [&](Index g) { ++begin[g + 1]; });
    for (Index g = 0; g < groups; ++g) begin[g + 1] += begin[g];
    for (Index i = 0; i < tokens(c); ++i) {
      each_group(c * chunk + i, [&](Index g) { entries_(c, begin[g]++) = {static_cast<std::uint16_t>(i)}; });
    }
    // Filling moved every beginning to its end.
    for (Index g = groups; g > 0; --g) begin[g] = begin[g - 1];
    begin[0] = 0;
  }

  GateForm<float> gate_;
  MatrixView<std::int32_t> begin_;  // [chunks, groups + 2]
  MatrixView<Entry> entries_;       // [chunks, chunk · most]
};

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

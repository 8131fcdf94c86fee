/// The normal form of a gate: the one shape in which every gate reaches the kernels.
///
/// Computes: g(t, j) for token t and rank j, never stored dense:
///
///     g(t,j) = id_weight · weight · value · multiplier · rank_scale    over the slots that are present, or
///     closed                                                          where a selection (ids, prefix, subset) says so
///
///   A closed rank *selects* zero: whatever its activation holds, NaN too, goes nowhere. A value of 0.0 is a number.
///   Ranks are laid out expert by expert; `rank_offsets` says where each begins, or all have ranks / experts.
///   Rows of a slot belong to tokens, or to groups of tokens (Groups): segments of a ragged batch, tasks, domains.
///
/// Source:      MATH.md section 1 ("Gate value types").
/// Reads:       the slots. Kernels are instantiated per scalar, never per gate.
/// Errors:      check_form on the host. On the device a bad id contributes nothing and sets a flag in `status`.
/// Cost:        a few loads and multiplications per rank; a binary search per token for segments.
/// Determinism: a pure function of the slots.
/// Example:     tests/gate
#pragma once
#include <cstdint>

#include <loramix/core/check.hpp>
#include <loramix/core/scalars.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Which group a token belongs to: its own (default), ids[t], or the segment [offsets[i], offsets[i+1]) around it, which is
/// its own group or belongs to group of_segment[i] (a sequence's task).
template <Space S = Space::host>
struct Groups {
  const std::int32_t* ids = nullptr;         // [T], −1 = none
  const Index* offsets = nullptr;            // [segments + 1], ascending from 0 to T
  Index count = 0;                           // groups; with neither ids nor offsets: one per token
  Index segments = 0;                        // of offsets
  const std::int32_t* of_segment = nullptr;  // [segments], −1 = none; null: every segment is a group

  static constexpr Groups by_id(const std::int32_t* ids_, Index count_) { return {ids_, nullptr, count_, 0, nullptr}; }
  static constexpr Groups by_segment(const Index* offsets_, Index count_) {
    return {nullptr, offsets_, count_, count_, nullptr};
  }
  /// Group of segment i is of_segment[i] in [0, count).
  static constexpr Groups by_segment(const Index* offsets_, Index segments_, const std::int32_t* of_segment_,
                                     Index count_) {
    return {nullptr, offsets_, count_, segments_, of_segment_};
  }

  LORAMIX_HD constexpr bool per_token() const { return ids == nullptr && offsets == nullptr && count == 0; }
  LORAMIX_HD constexpr Index size(Index tokens) const { return per_token() ? tokens : count; }
  /// The segment around token t, or −1.
  LORAMIX_HD constexpr Index segment_of(Index t) const {
    Index low = 0, high = segments;  // the last segment that begins at or before t; empty ones are skipped
    while (high - low > 1) {
      const Index middle = low + (high - low) / 2;
      (offsets[middle] <= t ? low : high) = middle;
    }
    return segments != 0 && t >= offsets[low] && t < offsets[low + 1] ? low : Index{-1};
  }
  /// The group of token t, or −1; ids are not range-checked here.
  LORAMIX_HD constexpr Index of(Index t) const {
    if (ids != nullptr) return ids[t];
    if (offsets == nullptr) return t;
    const Index segment = segment_of(t);
    return of_segment == nullptr || segment < 0 ? segment : Index{of_segment[segment]};
  }
};

/// What device kernels found wrong with the contents of memory that the host cannot read. Zero is good.
struct StatusFlags {
  std::uint32_t bad_expert_id = 0;
  std::uint32_t bad_group_id = 0;
};

/// Every slot a gate can fill. Views without an address and a size are absent.
template <class Score, Space S = Space::host>
struct GateForm {
  Index tokens = 0;                     // T
  Index ranks = 0;                      // R
  Index experts = 1;                    // E
  const Index* rank_offsets = nullptr;  // [E+1] for mixed ranks; null: every expert has R / E
  StatusFlags* status = nullptr;        // device only
  bool computed = false;                // by a router of ours: contents are not there yet, or right

  // Selections: a rank is open where all that are present say so.
  MatrixView<const std::int32_t, S> ids{};  // [groups, k] chosen experts, distinct, −1 = none
  Groups<S> id_groups{};
  VectorView<const std::int32_t, S> prefix{};  // [groups] how many leading ranks are open
  Groups<S> prefix_groups{};
  MatrixView<const std::uint8_t, S> subset{};  // [groups, R] 0 = closed
  Groups<S> subset_groups{};

  // Factors.
  MatrixView<const Score, S> id_weights{};  // [groups, k] beside ids
  MatrixView<const Score, S> weights{};     // [groups, E]
  Groups<S> weight_groups{};
  MatrixView<const Score, S> values{};      // [T, R]
  VectorView<const Score, S> multiplier{};  // [groups]
  Groups<S> multiplier_groups{};
  VectorView<const Score, S> rank_scale{};  // [R]

  LORAMIX_HD constexpr Index expert_begin(Index e) const {
    return rank_offsets != nullptr ? rank_offsets[e] : e * (ranks / experts);
  }
  LORAMIX_HD constexpr Index expert_of(Index j) const {
    if (rank_offsets == nullptr) return experts == 1 ? 0 : j / (ranks / experts);
    Index e = 0;
    while (rank_offsets[e + 1] <= j) ++e;
    return e;
  }
};

/// Where the gradients of a form's factors go; an empty view is not wanted. All are added to, or set, by group.
template <class Score, Space S = Space::host>
struct GateGradient {
  MatrixView<Score, S> id_weights{};  // [groups, k]
  MatrixView<Score, S> weights{};     // [groups, E]
  MatrixView<Score, S> values{};      // [T, R]
  VectorView<Score, S> multiplier{};  // [groups]
  VectorView<Score, S> rank_scale{};  // [R]
};

/// The factors of a form, as names for "all but this one".
enum class Factor { none, id_weight, weight, value, multiplier, rank_scale };

/// The gate of one token: groups resolved once, then asked rank by rank. `Held`: so many of its ids are kept in registers, for
/// those who ask often and have registers to spare.
template <class Acc, class Score, Space S, int Held = 2>
class GateRow {
 public:
  LORAMIX_HD GateRow(const GateForm<Score, S>& form, Index t) : form_(form), t_(t) {
    id_row_ = resolve(form.ids.data != nullptr, form.id_groups, form.ids.rows);
    prefix_row_ = resolve(form.prefix.data != nullptr, form.prefix_groups, form.prefix.size);
    subset_row_ = resolve(form.subset.data != nullptr, form.subset_groups, form.subset.rows);
    weight_row_ = resolve(form.weights.data != nullptr, form.weight_groups, form.weights.rows);
    multiplier_row_ = resolve(form.multiplier.data != nullptr, form.multiplier_groups, form.multiplier.size);
    for (std::int32_t& id : first_) id = -1;
    if (form.ids.data == nullptr || !covered_) return;
    for (int k = 0; k < Held && k < form.ids.cols; ++k) first_[k] = form.ids(id_row_, k);
  }

  /// Whether rank j of expert e lets anything through.
  LORAMIX_HD bool open(Index j, Index e) const {
    if (!covered_) return false;
    if (j >= limit() || !in_subset(j)) return false;
    return form_.ids.data == nullptr || slot(e) >= 0;
  }

  /// Π of the factors of rank j but one.
  template <Factor Skip = Factor::none>
  LORAMIX_HD Acc factor(Index j, Index e) const {
    Acc g = Acc(1);
    if (Skip != Factor::id_weight && form_.id_weights.data != nullptr) g *= id_weight(slot(e));
    if (Skip != Factor::weight) g *= weight(e);
    if (Skip != Factor::value && form_.values.data != nullptr) g *= Acc(form_.values(t_, j));
    if (Skip != Factor::multiplier) g *= multiplier();
    if (Skip != Factor::rank_scale && form_.rank_scale.data != nullptr) g *= Acc(form_.rank_scale[j]);
    return g;
  }

  /// The place of expert e among the chosen ones, or −1.
  LORAMIX_HD Index slot(Index e) const {
    for (int k = 0; k < Held; ++k) {
      if (first_[k] == e && k < form_.ids.cols) return k;
    }
    for (Index k = Held; k < form_.ids.cols; ++k) {
      if (form_.ids(id_row_, k) == e) return k;
    }
    return -1;
  }
  /// The expert in place k, or −1 for none or a bad id: out of range, or in an earlier place already.
  LORAMIX_HD Index expert_at(Index k) const {
    const Index e = covered_ ? id(k) : -1;
    if (e == -1) return -1;
    if (e >= 0 && e < form_.experts && slot(e) == k) return e;
    flag(&StatusFlags::bad_expert_id);
    return -1;
  }
  LORAMIX_HD bool covered() const { return covered_; }

  // One slot each; 1 (everything) where the slot is absent.
  LORAMIX_HD Index limit() const {
    return form_.prefix.data == nullptr ? form_.ranks : Index{form_.prefix[prefix_row_]};
  }
  LORAMIX_HD bool in_subset(Index j) const { return form_.subset.data == nullptr || form_.subset(subset_row_, j) != 0; }
  LORAMIX_HD Acc id_weight(Index k) const {
    return form_.id_weights.data == nullptr ? Acc(1) : Acc(form_.id_weights(id_row_, k));
  }
  LORAMIX_HD Acc weight(Index e) const {
    return form_.weights.data == nullptr ? Acc(1) : Acc(form_.weights(weight_row_, e));
  }
  LORAMIX_HD Acc multiplier() const {
    return form_.multiplier.data == nullptr ? Acc(1) : Acc(form_.multiplier[multiplier_row_]);
  }

 private:
  LORAMIX_HD Index resolve(bool present, const Groups<S>& groups, Index rows) {
    if (!present) return 0;
    const Index group = groups.of(t_);
    if (group >= 0 && group < rows) return group;
    // Segments cover every token; none (−1) is what an id may say.
    const bool none = group == -1 && (groups.offsets == nullptr || groups.of_segment != nullptr);
    if (!none) flag(&StatusFlags::bad_group_id);
    covered_ = false;
    return 0;
  }
  LORAMIX_HD void flag(std::uint32_t StatusFlags::*which) const {
    if (form_.status != nullptr) form_.status->*which = 1;
  }

  LORAMIX_HD Index id(Index k) const {
    for (int i = 0; i < Held; ++i) {  // not first_[k]: an index that is not a constant takes an array out of registers
      if (i == k) return first_[i];
    }
    return form_.ids(id_row_, k);
  }

  const GateForm<Score, S>& form_;
  Index t_;
  std::int32_t first_[Held > 0 ? Held : 1];
  Index id_row_ = 0, prefix_row_ = 0, subset_row_ = 0, weight_row_ = 0, multiplier_row_ = 0;
  bool covered_ = true;
};

namespace detail {

template <class Score, Space S>
void check_groups(const char* op, const char* slot, const Groups<S>& groups, Index tokens, Index rows) {
  check::same(op, slot, "rows", rows, "the number of groups", groups.size(tokens));
  if (groups.offsets != nullptr) {
    check::at_least(op, slot, groups.segments, 0);
    if (groups.of_segment == nullptr)
      check::same(op, slot, "segments", groups.segments, "the number of groups", groups.count);
  }
  if (groups.ids == nullptr && groups.offsets == nullptr && groups.count != 0 && tokens != 0) {
    fail(check::detail::about(ErrorCode::null, op, slot)
         << " has " << groups.count << " groups, but null ids of the " << tokens << " tokens");
  }
  if constexpr (S == Space::host) {
    if (groups.offsets != nullptr) {
      for (Index i = 0; i < groups.segments; ++i) {
        if (groups.offsets[i + 1] < groups.offsets[i]) {
          fail(check::detail::about(ErrorCode::value, op, slot) << " has segment offsets that descend at " << i + 1);
        }
      }
      check::same(op, slot, "first segment offset", groups.offsets[0], "the first token", 0);
      check::same(op, slot, "last segment offset", groups.offsets[groups.segments], "the number of tokens", tokens);
    }
    for (Index i = 0; groups.of_segment != nullptr && i < groups.segments; ++i) {
      if (groups.of_segment[i] < -1 || groups.of_segment[i] >= groups.count) {
        fail(check::detail::about(ErrorCode::value, op, slot)
             << " has group id " << groups.of_segment[i] << " for segment " << i << ", but there are " << groups.count
             << " groups");
      }
    }
    for (Index t = 0; groups.ids != nullptr && t < tokens; ++t) {
      if (groups.ids[t] < -1 || groups.ids[t] >= groups.count) {
        fail(check::detail::about(ErrorCode::value, op, slot) << " has group id " << groups.ids[t] << " for token " << t
                                                              << ", but there are " << groups.count << " groups");
      }
    }
  }
}

template <Space S>
void check_ids(const char* op, MatrixView<const std::int32_t, S> ids, Index experts) {
  if constexpr (S == Space::host) {
    for (Index g = 0; g < ids.rows; ++g) {
      for (Index k = 0; k < ids.cols; ++k) {
        const Index e = ids(g, k);
        if (e < -1 || e >= experts) {
          fail(check::detail::about(ErrorCode::value, op, "gate ids")
               << " has expert " << e << " in row " << g << ", but there are " << experts << " experts");
        }
        for (Index other = 0; other < k; ++other) {
          if (e >= 0 && ids(g, other) == e) {
            fail(check::detail::about(ErrorCode::value, op, "gate ids")
                 << " has expert " << e << " twice in row " << g);
          }
        }
      }
    }
  }
}

/// A slot without an address is absent; one that has a size, columns, or groups of tokens, was meant to be there.
template <Space S, class View>
void check_presence(const char* op, const char* slot, View view, const Groups<S>& groups, Index tokens) {
  check::view(op, slot, view);
  if (view.data != nullptr || tokens == 0) return;
  if (!groups.per_token()) {
    fail(check::detail::about(ErrorCode::null, op, slot) << " has groups of tokens, but no rows and a null address");
  }
  if constexpr (requires { view.cols; }) {
    if (view.cols != 0)
      fail(check::detail::about(ErrorCode::null, op, slot) << " has columns, but no rows and a null address");
  }
}

}  // namespace detail

/// Refuses a form whose shapes disagree with [tokens, ranks]; on the host also bad ids, groups and offsets.
template <class Score, Space S>
void check_form(const char* op, const GateForm<Score, S>& form, Index tokens, Index ranks) {
  check::same(op, "gate", "tokens", form.tokens, "the number of tokens", tokens);
  check::same(op, "gate", "ranks", form.ranks, "the number of ranks", ranks);
  check::at_least(op, "gate experts", form.experts, 1);
  if (form.rank_offsets == nullptr) {
    if (ranks % form.experts != 0) {
      fail(check::detail::about(ErrorCode::shape, op, "gate")
           << " divides " << ranks << " ranks among " << form.experts << " experts: give rank_offsets");
    }
  } else if constexpr (S == Space::host) {
    check::same(op, "gate rank_offsets", "first value", form.rank_offsets[0], "the first rank", 0);
    check::same(op, "gate rank_offsets", "last value", form.rank_offsets[form.experts], "the number of ranks", ranks);
    for (Index e = 0; e < form.experts; ++e) {
      if (form.rank_offsets[e + 1] < form.rank_offsets[e]) {
        fail(check::detail::about(ErrorCode::value, op, "gate rank_offsets") << " descends at expert " << e);
      }
    }
  }
  detail::check_presence(op, "gate ids", form.ids, form.id_groups, tokens);
  if (form.ids.data == nullptr && form.ids.rows != 0 && tokens != 0) {
    fail(check::detail::about(ErrorCode::null, op, "gate ids") << " has rows, but no columns and a null address");
  }
  check::view(op, "gate id_weights", form.id_weights);  // empty: 1
  detail::check_presence(op, "gate prefix", form.prefix, form.prefix_groups, tokens);
  detail::check_presence(op, "gate subset", form.subset, form.subset_groups, tokens);
  detail::check_presence(op, "gate weights", form.weights, form.weight_groups, tokens);
  detail::check_presence(op, "gate values", form.values, Groups<S>{}, tokens);
  detail::check_presence(op, "gate multiplier", form.multiplier, form.multiplier_groups, tokens);
  detail::check_presence(op, "gate rank_scale", form.rank_scale, Groups<S>{}, tokens);
  if (form.ids.data != nullptr) {
    detail::check_groups<Score>(op, "gate ids", form.id_groups, tokens, form.ids.rows);
    if (!form.computed) detail::check_ids(op, form.ids, form.experts);
  }
  if (form.id_weights.data != nullptr) {
    check::shape(op, "gate id_weights", form.id_weights, "the rows of ids", form.ids.rows, "the columns of ids",
                 form.ids.cols);
  }
  if (form.prefix.data != nullptr) {
    detail::check_groups<Score>(op, "gate prefix", form.prefix_groups, tokens, form.prefix.size);
  }
  if (form.subset.data != nullptr) {
    check::shape(op, "gate subset", form.subset, "the number of groups", form.subset.rows, "the number of ranks",
                 ranks);
    detail::check_groups<Score>(op, "gate subset", form.subset_groups, tokens, form.subset.rows);
  }
  if (form.weights.data != nullptr) {
    check::shape(op, "gate weights", form.weights, "the number of groups", form.weights.rows, "the number of experts",
                 form.experts);
    detail::check_groups<Score>(op, "gate weights", form.weight_groups, tokens, form.weights.rows);
  }
  if (form.values.data != nullptr) {
    check::shape(op, "gate values", form.values, "the number of tokens", tokens, "the number of ranks", ranks);
  }
  if (form.multiplier.data != nullptr) {
    detail::check_groups<Score>(op, "gate multiplier", form.multiplier_groups, tokens, form.multiplier.size);
  }
  if (form.rank_scale.data != nullptr) {
    check::same(op, "gate rank_scale", "size", form.rank_scale.size, "the number of ranks", ranks);
  }
}

/// The gradient's views must have the shapes of the slots they belong to.
template <class Score, Space S>
void check_gradient(const char* op, const GateForm<Score, S>& form, const GateGradient<Score, S>& gradient) {
  const auto like = [op](const char* name, auto got, auto want) {
    check::view(op, name, got);
    if (got.data != nullptr) check::shape(op, name, got, "rows of the factor", want.rows, "its columns", want.cols);
  };
  like("gate gradient id_weights", gradient.id_weights, form.id_weights);
  like("gate gradient weights", gradient.weights, form.weights);
  like("gate gradient values", gradient.values, form.values);
  check::view(op, "gate gradient multiplier", gradient.multiplier);
  check::view(op, "gate gradient rank_scale", gradient.rank_scale);
  if (gradient.multiplier.data != nullptr) {
    check::same(op, "gate gradient multiplier", "size", gradient.multiplier.size, "the factor's", form.multiplier.size);
  }
  if (gradient.rank_scale.data != nullptr) {
    check::same(op, "gate gradient rank_scale", "size", gradient.rank_scale.size, "the factor's", form.rank_scale.size);
  }
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

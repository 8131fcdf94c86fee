/// Dropout masks as bits, drawn once and read by every pass that needs them.
///
/// Computes:    bits[t, b] = keep of columns 8b … 8b + 7 of row t (MATH.md section 1), one bit each.
/// Source:      core/draws.hpp.
/// Writes:      bits [T, mask_bytes(columns)], assigned; what is behind the last column may hold anything.
/// Errors:      shape, null.
/// Cost:        one Philox block per byte; T · columns / 8 bytes, read instead of drawn in backward.
/// Determinism: the bits of Dropout::keep8, on every device.
/// Example:     tests/cpu/dropout.cpp
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Row body.
template <Space S>
struct DrawMaskRow {
  Dropout dropout;
  Index columns;
  MatrixView<std::uint8_t, S> bits;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    team.each((columns + 7) / 8, [&](Index b) { bits(t, b) = static_cast<std::uint8_t>(dropout.keep8(t, b)); });
  }
};

/// Draws the mask of `columns` columns; returns the dropout that reads it.
template <class Backend, Space S>
Dropout draw_mask(const Backend& be, Dropout dropout, Index tokens, Index columns, MatrixView<std::uint8_t, S> bits) {
  check::shape("draw_mask", "bits", bits, "the number of tokens", tokens, "mask_bytes of the columns",
               mask_bytes(columns));
  dropout.mask = nullptr;
  for_rows<S>(be, tokens, DrawMaskRow<S>{dropout, columns, bits});
  dropout.mask = bits.data;
  dropout.mask_stride = bits.stride;
  return dropout;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

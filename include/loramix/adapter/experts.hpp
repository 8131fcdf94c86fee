/// Experts that were LoRAs: copies between a LoRA and one expert of a mixture.
///
/// Computes:    A_e ← A, B_e ← B, bit for bit.
/// Reads:       a LoRA's A [r, d_in], B [d_out, r].
/// Writes:      rows [e·r, (e + 1)·r) of a mixture's A and the same ranks of its B.
/// Errors:      another shape, rank or scale, before any write.
/// Cost:        a copy. On the host.
/// Determinism: bit for bit.
/// Example:     adapter/moa.hpp, tests/adapter/moa.cpp
#pragma once
#include <cmath>
#include <span>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
template <class From, class To>
void copy_rows(From from, To to) {
  for (Index i = 0; i < to.rows; ++i) {
    for (Index j = 0; j < to.cols; ++j) to(i, j) = from(i, j);
  }
}
/// A LoRA into expert e's place.
template <class L, class M>
void copy_expert(const char* op, const L& lora, M& moa, Index e) {
  const LoraConfig& one = lora.config();
  const auto& c = moa.config();
  check::same(op, "the LoRA", "d_in", one.d_in, "the adapter's", c.d_in);
  check::same(op, "the LoRA", "d_out", one.d_out, "the adapter's", c.d_out);
  check::same(op, "the LoRA", "rank", one.rank, "an expert's", c.rank);
  if (!(std::fabs(one.scale() - moa.scale()) <= 1e-12 * std::fabs(moa.scale()))) {
    fail(check::detail::about(ErrorCode::value, op, "the LoRA") << " has another scale than the other experts");
  }
  copy_rows(lora.A(), moa.A().row_range(e * c.rank, c.rank));
  copy_rows(lora.B().transposed(), moa.B().transposed().row_range(e * c.rank, c.rank));
}
/// A mixture whose experts are copies of LoRAs, and everything else as its start() says.
template <class M, class L>
M mixture_from(const char* op, std::span<const L> loras, const InitialiseOptions& start, typename M::Config config) {
  check::at_least(op, "the number of LoRAs", static_cast<Index>(loras.size()), 1);
  const LoraConfig one = loras[0].config();
  config.d_in = one.d_in;
  config.d_out = one.d_out;
  config.rank = one.rank;
  config.alpha = one.scale() * static_cast<double>(one.rank);
  config.dropout = one.dropout;
  config.experts = static_cast<Index>(loras.size());
  M mixture(config);
  initialise(mixture, start);
  for (Index e = 0; e < config.experts; ++e) copy_expert(op, loras[static_cast<std::size_t>(e)], mixture, e);
  return mixture;
}
}  // namespace detail

}  // namespace LORAMIX_ABI
}  // namespace loramix

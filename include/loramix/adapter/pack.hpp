/// Weights prepared once for inference: an explicit value that the caller holds and shares between threads.
///
/// Computes:    the adapter's parameters in the accumulation type, in the order the kernels read; forward on the pack gives
///              the same bits as forward on the adapter.
/// Reads:       every parameter [rows, cols], once. The pack is a copy: later changes of the adapter do not reach it.
/// Writes:      nothing of the caller's.
/// Errors:      require_current() refuses a pack whose adapter has changed since (a checksum of all bytes, host).
/// Cost:        parameter_count values of the accumulation type; saves the widening of 16-bit weights in every call.
/// Determinism: bitwise equal to the unpacked call (MATH.md section 6).
/// Example:     examples/engine
#pragma once
#include <loramix/adapter/forward.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
/// Row body: 256 values of a flat buffer, widened.
template <class From, class To, Space S>
struct ConvertChunk {
  static constexpr Index chunk = 256;
  VectorView<const From, S> from;
  VectorView<To, S> to;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const Index left = to.size - t * chunk;
    team.each(left < chunk ? left : chunk, [&](Index i) { to[t * chunk + i] = widen<To>(from[t * chunk + i]); });
  }
};
}  // namespace detail

/// Immutable. Copy it or share it; forward on it is const and thread-safe.
template <Adapter A>
class Packed {
 public:
  using Values = typename A::template rebind<typename A::precision::accumulation, A::space>;

  template <class Backend>
  Packed(const Backend& be, const A& adapter) : values_(adapter.config()), source_(detail::checksum(adapter)) {
    using Body = detail::ConvertChunk<typename A::element, typename Values::element, A::space>;
    const auto to = values_.parameters();
    for_rows<A::space>(be, (to.size + Body::chunk - 1) / Body::chunk, Body{adapter.parameters(), to});
  }

  const Values& values() const { return values_; }
  bool is_current(const A& adapter) const requires(A::space == Space::host) {
    return source_ == detail::checksum(adapter);
  }
  void require_current(const A& adapter) const requires(A::space == Space::host) {
    if (is_current(adapter)) return;
    fail(check::detail::about(ErrorCode::state, "packed", "the adapter") << " has changed since it was packed");
  }

 private:
  Values values_;
  std::uint64_t source_;
};

/// Packs for `pass`. Training reads weights that change every step: there is no pack for backward.
template <class Backend, Adapter A>
Packed<A> prepack(const Backend& be, const A& adapter, Pass pass = Pass::forward) {
  if (pass != Pass::forward) {
    fail(check::detail::about(ErrorCode::value, "prepack", "pass") << " must be forward: packs are for inference");
  }
  return Packed<A>(be, adapter);
}

/// Bytes of workspace of a forward on the pack.
template <class Backend, Adapter A>
Index workspace_bytes(const Backend& be, const Packed<A>& packed, Index tokens) {
  return workspace_bytes(be, packed.values(), tokens);
}

/// Inference: y (+)= ΔY.
template <class Backend, Adapter A>
void forward(const Backend& be, const Packed<A>& packed,
             MatrixView<const typename A::precision::activation, A::space> x,
             MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work, Into into = Into::add) {
  forward(be, packed.values(), x, y, work, {.into = into});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

/// Weights prepared once for inference: an explicit value that the caller holds and shares between threads.
///
/// Computes:    the adapter's parameters in the accumulation type, in the order the kernels read, and what inference would
///              make of them in every call: B′ of a reparametrised adapter, m/n of DoRA. Forward on the pack is told the same
///              options as forward on the adapter.
/// Reads:       every parameter [rows, cols], once. The pack is a copy: later changes of the adapter do not reach it.
/// Writes:      nothing of the caller's.
/// Errors:      require_current() refuses a pack whose adapter has changed since (a checksum of all bytes, host); a forward
///              that is to save. IA3 and prompt tuning, which read each parameter once as it lies, do not compile.
/// Cost:        parameter_count values of the accumulation type; saves the widening of 16-bit weights in every call. On the device
///              it is made on the backend's stream: who copies it, or reads it on another one, waits for that.
/// Determinism: bitwise equal to the unpacked call (MATH.md section 6), but where that takes AMX's tiles (cpu/amx.hpp): a pack,
///              of floats, takes packets.
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

/// What a pack holds beside the widened parameters: nothing, but where a header with a forward of its own says more.
template <class A>
struct Prepared {
  template <class Backend, class Values>
  Prepared(const Backend&, const Values&) {}
};
}  // namespace detail

/// Immutable. Copy it or share it; forward on it is const and thread-safe.
template <Adapter A>
class Packed {
 public:
  using Values = typename A::template rebind<typename A::precision::accumulation, A::space>;

  /// `base` is what the adapter's forward needs of the frozen layer, if anything.
  template <class Backend, class... Base>
  Packed(const Backend& be, const A& adapter, const Base&... base)
      : values_(widened(be, adapter)), prepared_(be, values_, base...), source_(detail::checksum(adapter)) {}

  const Values& values() const { return values_; }
  const detail::Prepared<A>& prepared() const { return prepared_; }
  bool is_current(const A& adapter) const requires(A::space == Space::host) {
    return source_ == detail::checksum(adapter);
  }
  void require_current(const A& adapter) const requires(A::space == Space::host) {
    if (is_current(adapter)) return;
    fail(check::detail::about(ErrorCode::state, "packed", "the adapter") << " has changed since it was packed");
  }

 private:
  template <class Backend>
  static Values widened(const Backend& be, const A& adapter) {
    using Body = detail::ConvertChunk<typename A::element, typename Values::element, A::space>;
    Values values(adapter.config());
    const auto to = values.parameters();
    for_rows<A::space>(be, (to.size + Body::chunk - 1) / Body::chunk, Body{adapter.parameters(), to});
    return values;
  }

  Values values_;
  [[no_unique_address]] detail::Prepared<A> prepared_;
  std::uint64_t source_;
};

namespace detail {
inline void check_pass(Pass pass) {
  if (pass == Pass::forward) return;
  fail(check::detail::about(ErrorCode::value, "prepack", "pass") << " must be forward: packs are for inference");
}
template <class Options>
void check_inference(const Options& options) {
  if (options.save == nullptr) return;
  fail(check::detail::about(ErrorCode::value, "forward", "save")
       << " is given, but packs are for inference: train the adapter");
}
}  // namespace detail

/// Packs for `pass`. Training reads weights that change every step: there is no pack for backward.
template <class Backend, Adapter A>
Packed<A> prepack(const Backend& be, const A& adapter, Pass pass = Pass::forward) {
  static_assert(
      !requires { requires !A::has_pack; },
      "loramix: this adapter has no pack: its forward reads each parameter once, as it lies");
  static_assert(std::is_constructible_v<detail::Prepared<A>, const Backend&, const typename Packed<A>::Values&>,
                "loramix: this adapter's pack is made for a frozen layer: prepack(be, adapter, base)");
  detail::check_pass(pass);
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
             MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
             const ForwardOptions<A::space>& options = {}) {
  detail::check_inference(options);
  forward(be, packed.values(), x, y, work, options);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

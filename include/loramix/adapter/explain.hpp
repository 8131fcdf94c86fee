/// Which path a call takes, what it costs, and why.
///
/// Computes:    the backend's answer for a shape; nothing is run.
/// Reads:       sizes. Writes: nothing.
/// Errors:      none.
/// Cost:        none.
/// Determinism: depends on shape, scalar, gate and backend, never on data.
/// Example:     tests/adapter
#pragma once
#include <cstdio>

#include <loramix/adapter/forward.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What explain() found, all in one value.
struct Explanation {
  PathFacts facts;
  Cost cost;
  Index tokens;
  Index forward_workspace, backward_workspace;  // bytes
  Index reserve_per_token;                      // bytes with Keep::z
  Index reserve_per_token_recomputed;           // bytes with Keep::recompute
};

namespace detail {
template <class Backend, Adapter A>
PathFacts facts_of(const Backend& be, const A& adapter, Index tokens) {
  if constexpr (ProductAdapter<A>) {
    const auto expand = expand_for_sizes(adapter, tokens);
    if constexpr (requires { path_of(be, expand); }) return path_of(be, expand);
  }
  return path_of(be);
}
}  // namespace detail

/// What a call with `tokens` tokens would do.
template <class Backend, Adapter A>
Explanation explain(const Backend& be, const A& adapter, Index tokens) {
  const auto per_token = [&adapter](Keep keep) {
    constexpr Index many = 1024;
    return (reserve_bytes(adapter, 2 * many, keep) - reserve_bytes(adapter, many, keep)) / many;
  };
  return {detail::facts_of(be, adapter, tokens),
          adapter.cost(tokens),
          tokens,
          workspace_bytes(be, adapter, tokens),
          workspace_bytes(be, adapter, tokens, Pass::backward),
          per_token(Keep::z),
          per_token(Keep::recompute)};
}

/// Four lines of text.
inline void print(const Explanation& e, std::FILE* to = stdout) {
  std::fprintf(
      to,
      "%lld tokens: %s: %s\n"
      "  %s, tiles of %lld tokens\n"
      "  forward  %.3g GFLOP, %.3g MB moved, %lld bytes of workspace\n"
      "  backward %.3g GFLOP, %.3g MB moved, %lld bytes of workspace, %lld bytes kept per token (%lld recomputed)\n",
      static_cast<long long>(e.tokens), e.facts.path, e.facts.why, e.facts.kernels,
      static_cast<long long>(e.facts.tile_tokens), e.cost.forward_flop * 1e-9, e.cost.forward_bytes * 1e-6,
      static_cast<long long>(e.forward_workspace), e.cost.backward_flop * 1e-9, e.cost.backward_bytes * 1e-6,
      static_cast<long long>(e.backward_workspace), static_cast<long long>(e.reserve_per_token),
      static_cast<long long>(e.reserve_per_token_recomputed));
}

}  // namespace LORAMIX_ABI
}  // namespace loramix

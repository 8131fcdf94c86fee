/// The storage that mixtures of LoRA experts share: A, B and a router. A method is a few facts about it.
///
/// Computes:    ΔY = s Σ_e g_e (X̂ A_eᵀ) B_eᵀ, or with one A of r rows for all experts; s = α/r of one expert (MATH.md
///              sections 1 and 4). A Method says
///                kind, shared_A, Config (d_in, d_out, experts, rank, alpha, dropout; router_rows(): what is read with the
///                                        token; room(), if experts may be fewer than there is memory for)
///                router(config)                       its router's parameters, the rows that are read with the token first
///                gate<W, Score, S>(config, views)     a computed gate of them; W is const in an adapter's own gate
///                start_router(fill, config, views)    their starting values
///                check(config)                        (optional) what it refuses
///                chosen(config)                       (optional) experts that a token is given, where not all
/// Parameters:  lora_A.weight [E·r or r, d_in], lora_B.weight [d_out, E·r] and the router's, without those of no values; in
///              files experts.{e}.lora_A.weight [r, d_in], experts.{e}.lora_B.weight [d_out, r].
/// Errors:      sizes below 0, no expert, dropout outside [0, 1); what the method and the gate's check() refuse; from():
///              LoRAs that differ in shape, rank or scale.
/// Cost:        LoRA of rank E·r, or of the chosen experts' ranks (one shrink of r rows where A is shared), plus the router's
///              rows.
/// Determinism: adapter/forward.hpp
/// Example:     tests/adapter
#pragma once
#include <array>

#include <loramix/adapter/experts.hpp>
#include <loramix/gate/softmax.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and scale of a mixture; `rank` is of one expert.
struct MixtureConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 8;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;

  static MixtureConfig of(const Shape& shape) {
    const Index rank = shape.total_rank / shape.experts;
    return {.d_in = shape.d_in,
            .d_out = shape.d_out,
            .experts = shape.experts,
            .rank = rank,
            .alpha = 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("experts", self.experts);
    f("rank", self.rank);
    f("alpha", self.alpha);
    f("dropout", self.dropout);
  }
  Index router_rows() const { return experts; }
};

/// One parameter of a router: its name in files, shape and role.
struct RouterParameter {
  const char* name;
  Index rows;
  Index cols;
  ParameterGroup role = group::router;
  Index room = 0;  // values that there is memory for, where they are more than rows·cols
};

/// What dense mixtures with a softmax router and no bias have in common.
template <bool SharedA>
struct SoftmaxMethod {
  using Config = MixtureConfig;
  static constexpr bool shared_A = SharedA;

  static std::array<RouterParameter, 1> router(const Config& c) { return {{{"moe_gate.weight", c.experts, c.d_in}}}; }
  template <class W, class Score, Space S, class Views>
  static SoftmaxGate<std::remove_const_t<W>, Score, S> gate(const Config&, const Views& views) {
    return SoftmaxGate<std::remove_const_t<W>, Score, S>{views[0]};
  }
  template <class Fill, class Views>
  static void start_router(Fill& fill, const Config& config, const Views& views) {
    fill.uniform("moe_gate.weight", views[0], 1 / std::sqrt(static_cast<double>(config.d_in)));
  }
};

/// Owns A, B and the router.
template <class Method, class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Mixture {
 public:
  using Config = typename Method::Config;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Mixture<Method, P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = Method::kind;

  explicit Mixture(const Config& config) : config_(checked(config)), parameters_(sized(config_)) {}
  /// Experts are copies of LoRAs, whose sizes, scale and dropout `config` takes over; the router starts anew.
  static Mixture from(std::span<const Lora<P, S, T>> loras, const InitialiseOptions& start, Config config = {}) {
    static_assert(!Method::shared_A, "loramix: experts that share one A cannot be copies of LoRAs");
    return detail::mixture_from<Mixture>("Mixture::from", loras, start, config);
  }

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  Index ranks() const { return ranks_of(config_); }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  auto A() { return parameters_.matrix(0, rows_of_A(config_), config_.d_in); }
  auto A() const { return parameters_.matrix(0, rows_of_A(config_), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  /// The router's rows that are read with the token, or none.
  MatrixView<T, S> side() { return side_of(router_of<T>(*this)[0]); }
  MatrixView<const T, S> side() const { return side_of(router_of<const T>(*this)[0]); }
  auto gate() { return Method::template gate<T, typename precision::score, S>(config_, router_of<T>(*this)); }
  auto gate() const {
    return Method::template gate<const T, typename precision::score, S>(config_, router_of<const T>(*this));
  }

  Cost cost(Index tokens) const {
    Index open = ranks();
    if constexpr (requires { Method::chosen(config_); }) open = Method::chosen(config_) * config_.rank;
    Cost cost =
        product_cost<precision>(tokens, config_.d_in, config_.d_out, A().rows, ranks(), config_.router_rows(), open);
    cost.parameters = parameter_count(*this);
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.used_A(), group::A);
    f("lora_B.weight", self.B().col_range(0, self.config_.experts * self.config_.rank), group::B);
    const auto router = Method::router(self.config_);
    const auto views = router_of<std::remove_reference_t<decltype(*self.parameters().data)>>(self);
    for (std::size_t i = 0; i < parts; ++i) {
      if (views[i].rows != 0 && views[i].cols != 0) f(router[i].name, views[i], router[i].role);
    }
  }
  /// Files hold the A and B of every expert apart.
  Index tensors(ParameterGroup role) const {
    const bool split = role.is(group::B) || (role.is(group::A) && !Method::shared_A);
    return split ? config_.experts : 0;
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", used_A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    fill.zero(B());
    Method::start_router(fill, config_, router_of<T>(*this));
  }

 private:
  static constexpr std::size_t parts = std::tuple_size_v<decltype(Method::router(std::declval<const Config&>()))>;
  using Store = Parameters<T, S, static_cast<int>(parts) + 2>;

  static const Config& checked(const Config& config) {
    detail::checked_mixture(kind, config);
    if constexpr (requires { Method::check(config); }) Method::check(config);
    return config;
  }
  static Index ranks_of(const Config& c) {
    if constexpr (requires { c.room(); })
      return detail::size_of(c.room(), c.rank);
    else
      return detail::size_of(c.experts, c.rank);
  }
  static Index rows_of_A(const Config& c) { return Method::shared_A ? c.rank : ranks_of(c); }
  static Store sized(const Config& c) {
    Index sizes[parts + 2] = {detail::size_of(rows_of_A(c), c.d_in), detail::size_of(c.d_out, ranks_of(c))};
    Index* next = sizes + 2;
    for (const RouterParameter& p : Method::router(c)) *next++ = p.room != 0 ? p.room : detail::size_of(p.rows, p.cols);
    return Store(sizes);
  }
  auto used_A() { return A().row_range(0, Method::shared_A ? config_.rank : config_.experts * config_.rank); }
  auto used_A() const { return A().row_range(0, Method::shared_A ? config_.rank : config_.experts * config_.rank); }
  template <class W>
  MatrixView<W, S> side_of(MatrixView<W, S> first) const {
    const Index rows = config_.router_rows();
    return rows == 0 ? MatrixView<W, S>{} : MatrixView<W, S>{first.data, rows, config_.d_in};
  }
  template <class W, class Self>
  static std::array<MatrixView<W, S>, parts> router_of(Self& self) {
    const auto router = Method::router(self.config_);
    std::array<MatrixView<W, S>, parts> views;
    for (std::size_t i = 0; i < parts; ++i) {
      views[i] = self.parameters_.matrix(static_cast<int>(i) + 2, router[i].rows, router[i].cols);
    }
    return views;
  }

  Config config_;
  Store parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

/// An adapter on its frozen layer: how any adapter is called when nothing is known of it but its type. For whoever goes
/// through a list of adapters: the fixture, tests.
///
/// Computes:    forward: y (+)= what the adapter adds to its layer; for DoRA that reads W, for a MixLoRA block all of
///              W2 (Σ g_e h_e) + …, the engine's three products included; for prompts y = prompt and x. backward: its gradients.
/// Reads:       x [T, in()], dy [out_rows(T, sequences), out()]; frozen weights, which visit names and the caller fills.
/// Adds to:     y, dx and the gradient, as adapter/forward.hpp; prompts assign y.
/// Errors:      those of the adapter's own calls.
/// Cost:        the adapter's; a layer with frozen weights owns them, and what an engine would hold between its products,
///              for the largest number of tokens it was made for. Nothing is allocated after that.
/// Determinism: the adapter's.
/// Example:     tests/suite
#pragma once
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace bench {

/// A's configuration at a given budget, and what Config::of cannot know: how many tasks or domains a batch may name.
template <class A>
typename A::Config configured(Shape shape, Index tasks) {
  if constexpr (requires(typename A::Config c) { c.places; }) shape.experts = tasks;  // an expert per domain
  typename A::Config config = A::Config::of(shape);
  if constexpr (requires { config.tasks; }) config.tasks = tasks;
  return config;
}

/// A product with a frozen weight: backward makes dx only.
template <class P>
constexpr Cost frozen_product_cost(Index tokens, Index d_in, Index d_out) {
  const double T = static_cast<double>(tokens), in = static_cast<double>(d_in), out = static_cast<double>(d_out);
  constexpr double x = sizeof(typename P::activation), w = sizeof(typename P::weight);
  const double flop = 2 * T * in * out, bytes = x * T * (in + out) + w * in * out;
  return {flop, flop, bytes, bytes, 0};
}

/// Adapters that see x and y only, which are nearly all.
template <class A>
class Layer {
 public:
  static constexpr Space space = A::space;
  using X = typename A::precision::activation;
  using Options = ForwardOptions<space>;

  Layer(const A& adapter, Index) : in_(width_in(adapter.config())), out_(width_out(adapter.config())) {}

  Index in() const { return in_; }
  Index out() const { return out_; }
  static Index out_rows(const A& adapter, Index tokens, Index sequences) {
    if constexpr (requires { adapter.output_rows(tokens, sequences); })
      return adapter.output_rows(tokens, sequences);
    else
      return tokens;
  }
  /// f(name, view) for every frozen weight.
  template <class Self, class F>
  static void visit(Self&, F&&) {}
  /// Once the frozen weights have their values, and the adapter is initialised.
  template <class Backend>
  void start(const Backend&, A&) {}
  /// What the layer's own products cost beside adapter.cost().
  static Cost frozen_cost(Index) { return {}; }

  template <class Backend>
  static Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
    using loramix::workspace_bytes;  // and whatever the adapter's own header has
    return workspace_bytes(be, adapter, tokens, pass);
  }
  static Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
    using loramix::reserve_bytes;
    return reserve_bytes(adapter, tokens, keep);
  }
  template <class Backend>
  auto forward(const Backend& be, const A& adapter, MatrixView<const X, space> x, MatrixView<X, space> y,
               Arena<space> work, const Options& options) {
    using loramix::forward;
    return forward(be, adapter, x, y, work, options);
  }
  template <class Backend, class Saved, class Gradient>
  void backward(const Backend& be, const A& adapter, Saved& saved, MatrixView<const X, space> x,
                MatrixView<const X, space> dy, MatrixView<X, space> dx, Gradient& grad, Arena<space> work,
                BackwardOptions options) {
    using loramix::backward;
    backward(be, adapter, saved, x, dy, dx, grad, work, options);
  }

 private:
  template <class Config>
  static Index width_in(const Config& config) {
    if constexpr (requires { config.width(); })  // IA3 scales one tensor
      return config.width();
    else
      return config.d_in;
  }
  template <class Config>
  static Index width_out(const Config& config) {
    if constexpr (requires { config.width(); })
      return config.width();
    else if constexpr (requires { config.d_out; })
      return config.d_out;
    else
      return config.d_in;
  }
  Index in_, out_;
};

/// DoRA reads the frozen weight.
template <DoraAdapter A>
class Layer<A> {
 public:
  static constexpr Space space = A::space;
  using X = typename A::precision::activation;
  using Acc = typename A::precision::accumulation;
  using Options = ForwardOptions<space>;

  Layer(const A& adapter, Index)
      : weights_(adapter.config().d_out, adapter.config().d_in), squares_(adapter.config().d_out) {}

  Index in() const { return weights_.cols(); }
  Index out() const { return weights_.rows(); }
  static Index out_rows(const A&, Index tokens, Index) { return tokens; }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("W", self.weights_.view());
  }
  template <class Backend>
  void start(const Backend& be, A& adapter) {
    row_squares(be, RowSquares<X, Acc, space>{weights_.view(), squares_.view()});
    start_magnitude(be, adapter, base());
  }
  Cost frozen_cost(Index tokens) const { return frozen_product_cost<typename A::precision>(tokens, in(), out()); }
  DoraBase<A> base() const { return {.weights = weights_.view(), .squares = squares_.view()}; }

  template <class Backend>
  static Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
    return loramix::workspace_bytes(be, adapter, tokens, pass);
  }
  static Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
    return loramix::reserve_bytes(adapter, tokens, keep);
  }
  template <class Backend>
  auto forward(const Backend& be, const A& adapter, MatrixView<const X, space> x, MatrixView<X, space> y,
               Arena<space> work, const Options& options) {
    return loramix::forward(be, adapter, base(), x, y, work, options);
  }
  template <class Backend, class Saved, class Gradient>
  void backward(const Backend& be, const A& adapter, Saved& saved, MatrixView<const X, space> x,
                MatrixView<const X, space> dy, MatrixView<X, space> dx, Gradient& grad, Arena<space> work,
                BackwardOptions options) {
    loramix::backward(be, adapter, base(), saved, x, dy, dx, grad, work, options);
  }

 private:
  Matrix<X, space> weights_;    // [d_out, d_in]
  Buffer<Acc, space> squares_;  // [d_out]
};

/// A MixLoRA block: three stages around the engine's W1 x, W3 x and W2 h̄.
template <MixLoraAdapter A>
class Layer<A> {
 public:
  static constexpr Space space = A::space;
  using X = typename A::precision::activation;
  using Acc = typename A::precision::accumulation;
  using Options = ForwardOptions<space>;

  Layer(const A& adapter, Index tokens)
      : W1_(adapter.config().d_hidden, adapter.config().d_in),
        W3_(adapter.config().d_hidden, adapter.config().d_in),
        W2_(adapter.config().d_out, adapter.config().d_hidden),
        u_(tokens, hidden()),
        v_(tokens, hidden()),
        h_(tokens, hidden()),
        dh_(tokens, hidden()),
        dv_(tokens, hidden()),
        wide_(tokens, hidden() > out() ? hidden() : out()),
        inference_(loramix::reserve_bytes(adapter, tokens)) {}

  Index in() const { return W1_.cols(); }
  Index hidden() const { return W1_.rows(); }
  Index out() const { return W2_.rows(); }
  static Index out_rows(const A&, Index tokens, Index) { return tokens; }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("W1", self.W1_.view());
    f("W3", self.W3_.view());
    f("W2", self.W2_.view());
  }
  template <class Backend>
  void start(const Backend&, A&) {}
  Cost frozen_cost(Index tokens) const {
    const Cost up = frozen_product_cost<typename A::precision>(tokens, in(), hidden());
    return loramix::detail::sum_of({up, up, frozen_product_cost<typename A::precision>(tokens, hidden(), out())});
  }

  template <class Backend>
  Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) const {
    const Index own = loramix::workspace_bytes(be, adapter, tokens, pass);
    const MatrixView<const X, space> x{nullptr, tokens, in()}, h{nullptr, tokens, hidden()};
    Index products = larger(scratch_bytes(be, up(W1_, x, {})), scratch_bytes(be, up(W2_, h, {})));
    if (pass == Pass::backward) {
      const MatrixView<const Acc, space> dy{nullptr, tokens, out()}, dh{nullptr, tokens, hidden()};
      products = larger(products, larger(scratch_bytes(be, down(W2_, h, dy, {}, Into::set)),
                                         scratch_bytes(be, down(W1_, x, dh, {}, Into::set))));
    }
    return larger(own, Arena<space>::with_alignment(products));
  }
  static Index reserve_bytes(const A& adapter, Index tokens, Keep = Keep::z) {
    return loramix::reserve_bytes(adapter, tokens);
  }
  template <class Backend>
  auto forward(const Backend& be, const A& adapter, MatrixView<const X, space> x, MatrixView<X, space> y,
               Arena<space> work, const Options& options) {
    const auto of = [&](Matrix<X, space>& m) { return m.view().row_range(0, x.rows); };
    const MixLoraOptions<space> block{options.key,       site("down_proj"), options.dropout_off,
                                      options.sequences, options.valid,     options.selection_bias};
    check::shape("forward", "x", x, "at most the tokens of the layer", x.rows, "d_in", in());
    check::shape("forward", "y", y, "the number of tokens", x.rows, "d_out", out());
    Arena<space> own{inference_.data(), inference_.size()};
    auto saved = route(be, adapter, x, options.save != nullptr ? *options.save : own, work, block);
    multiply(be, W1_, x, of(u_), Into::set, work);
    multiply(be, W3_, x, of(v_), Into::set, work);
    mix(be, adapter, saved, of(u_), of(v_), of(h_), work);
    multiply(be, W2_, of(h_), y, options.into, work);
    finish(be, adapter, saved, y, work);
    return saved;
  }
  template <class Backend, class Saved, class Gradient>
  void backward(const Backend& be, const A& adapter, Saved& saved, MatrixView<const X, space> x,
                MatrixView<const X, space> dy, MatrixView<X, space> dx, Gradient& grad, Arena<space> work,
                BackwardOptions options) {
    const auto of = [&](Matrix<X, space>& m) { return m.view().row_range(0, x.rows); };
    check::shape("backward", "dy", dy, "the number of tokens", x.rows, "d_out", out());
    if (dx.data != nullptr) check::shape("backward", "dx", dx, "the number of tokens", x.rows, "d_in", in());
    const MatrixView<X, space> dh = of(dh_), u = of(u_), v = of(v_), du = of(h_), dv = of(dv_);
    finish_backward(be, adapter, saved, dy, grad, work, options.parameters);
    multiply_back(be, W2_, of(h_), dy, dh, Into::set, work);
    // du stands where h̄ did, which is spent.
    mix_backward(be, adapter, saved, u, v, dh, du, dv, grad, work, options.parameters);
    if (dx.data != nullptr) {
      multiply_back(be, W1_, x, du, dx, options.input, work);
      multiply_back(be, W3_, x, dv, dx, Into::add, work);
    }
    route_backward(be, adapter, saved, x, dx, grad, work, {options.parameters, Into::add});
  }

 private:
  using Product = Shrink<X, X, Acc, Acc, space>;
  using ProductBackward = ShrinkBackward<X, X, Acc, Acc, Acc, space>;
  static Index larger(Index a, Index b) { return a > b ? a : b; }
  static Product up(const Matrix<X, space>& w, MatrixView<const X, space> in, MatrixView<Acc, space> out) {
    return {w.view(), {}, in, {}, out.data == nullptr ? MatrixView<Acc, space>{nullptr, in.rows, w.rows()} : out, {}};
  }
  static ProductBackward down(const Matrix<X, space>& w, MatrixView<const X, space> in,
                              MatrixView<const Acc, space> dout, MatrixView<X, space> din, Into into) {
    return {w.view(), {}, in, {}, dout, {}, {}, {}, din, Into::add, into};
  }
  /// out (+)= in Wᵀ.
  template <class Backend>
  void multiply(const Backend& be, const Matrix<X, space>& w, MatrixView<const X, space> in, MatrixView<X, space> out,
                Into into, Arena<space> work) {
    const MatrixView<Acc, space> wide{wide_.data(), in.rows, w.rows()};
    execute(be, up(w, in, wide), work);
    for_rows<space>(be, in.rows, loramix::detail::StoreRow<Acc, X, space>{wide, out, into});
  }
  /// din (+)= dout W; `in` is what W was multiplied with, of which the shape matters.
  template <class Backend>
  void multiply_back(const Backend& be, const Matrix<X, space>& w, MatrixView<const X, space> in,
                     MatrixView<const X, space> dout, MatrixView<X, space> din, Into into, Arena<space> work) {
    const MatrixView<Acc, space> wide{wide_.data(), in.rows, w.rows()};
    for_rows<space>(be, in.rows, loramix::detail::WidenRow<X, Acc, space>{dout, wide});
    execute(be, down(w, in, wide, din, into), work);
  }

  Matrix<X, space> W1_, W3_, W2_;         // [d_hidden, d_in] twice, [d_out, d_hidden]
  Matrix<X, space> u_, v_, h_, dh_, dv_;  // [T, d_hidden] the engine's
  Matrix<Acc, space> wide_;               // [T, widest] a product before it is rounded
  Buffer<std::byte, space> inference_;    // what the stages hand each other where nobody saves
};

}  // namespace bench
}  // namespace LORAMIX_ABI
}  // namespace loramix

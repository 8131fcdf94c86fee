// The conformance suite of the gated product: Shrink, the row stage of a computed gate, Expand and their backward, every
// gate × both orders of B × a table of shapes, against the literal reference with its own error bounds.
//
// Instantiated once per harness and precision; gates are data. A backend passes it whole or not at all:
//
//   TEST_CASE_TEMPLATE("the gated product conforms", P, float, double, …) { loramix_test::product_conforms<P>(harness, {}); }
//
// dropout, Into::add / set, padded rows and first tokens alternate over the cases, so that every gate and every shape
// meets each of them.
#pragma once

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include <loramix/core/precision.hpp>
#include <loramix/gate/softmax.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

#include "conformance/gates.hpp"
#include "reference/draws.hpp"
#include "support/seed.hpp"

namespace loramix_test {

struct ProductShape {
  Index tokens, d_in, d_out, experts, rank;
  bool shared_a = false;
};

inline const std::vector<ProductShape>& product_shapes() {
  static const std::vector<ProductShape> shapes = {
      {0, 8, 5, 3, 2},       {1, 1, 1, 1, 1},     {1, 9, 16, 4, 1},   {4, 16, 16, 4, 2},        {7, 13, 11, 3, 5},
      {9, 24, 17, 1, 6},     {5, 8, 4, 2, 0},     {31, 37, 29, 5, 3}, {63, 16, 24, 4, 4},       {64, 32, 16, 3, 4},
      {65, 12, 20, 4, 3},    {130, 17, 8, 4, 2},  {17, 19, 23, 8, 1}, {13, 31, 16, 4, 4, true}, {66, 16, 9, 3, 2, true},
      {1, 8, 8, 2, 3, true}, {6, 23, 14, 9, 8},   {3, 20, 7, 33, 8},  {5, 257, 19, 3, 4},       {4, 21, 300, 2, 3},
      {67, 264, 259, 4, 4},  {2, 10, 2105, 3, 7}, {3, 8, 4, 2, 0},
  };
  return shapes;
}

/// How much of the table runs. An emulator of a GPU gets less: widths up to 192, every second case.
struct ProductBudget {
  Index max_width = INT64_MAX;
  Index max_tokens = INT64_MAX;
  int every = 1;  // of the cases of each gate; another remainder for each gate
  int first = 0;
};

struct ProductCase {
  GateSpec gate;
  ProductShape shape;
  bool dropout;
  lm::Into into;
  Index padding;
  std::uint64_t first_token;
  bool side_rows = false;  // even where the gate has no use for them
};

inline std::string describe(const ProductCase& c) {
  char text[256];
  std::snprintf(text, sizeof text, "gate '%s', T %lld, d_in %lld, d_out %lld, E %lld, r %lld%s%s%s%s", c.gate.name,
                static_cast<long long>(c.shape.tokens), static_cast<long long>(c.shape.d_in),
                static_cast<long long>(c.shape.d_out), static_cast<long long>(c.shape.experts),
                static_cast<long long>(c.shape.rank), c.shape.shared_a ? ", shared A" : "",
                c.dropout ? ", dropout" : "", c.into == lm::Into::set ? ", set" : ", add",
                c.padding != 0 ? ", padded rows" : "");
  return text;
}

/// The row stage of SoftmaxGate, as an op.
template <class Gate, class Score, lm::Space S>
struct SoftmaxForward {
  Gate gate;
  lm::MatrixView<const Score, S> h;
  typename Gate::State state;
  template <lm::Team Tm>
  LORAMIX_HD void operator()(const Tm& team, lm::Index t) const {
    gate.forward_row(team, t, h.row(t), state);
  }
};
template <class Gate, class Score, lm::Space S>
struct SoftmaxBackward {
  Gate gate;
  lm::MatrixView<const Score, S> h;
  typename Gate::State state, dstate;
  lm::MatrixView<Score, S> dh;
  template <lm::Team Tm>
  LORAMIX_HD void operator()(const Tm& team, lm::Index t) const {
    gate.backward_row(team, t, h.row(t), state, dstate, dh.row(t));
  }
};

template <class Precision, class H>
class ProductTest {
  using P = lm::precision_t<Precision>;
  using X = typename P::activation;
  using W = typename P::weight;
  using Acc = typename P::accumulation;
  using Score = typename P::score;
  using G = typename P::gradient;
  static constexpr lm::Space space = H::space;
  static constexpr lm::Major row = lm::Major::row;
  using Softmax = lm::SoftmaxGate<W, Score, space>;

 public:
  ProductTest(H& harness, const ProductCase& c, Random& random) : harness_(harness), case_(c), random_(random) {
    const ProductShape& s = c.shape;
    data_ = draw_gate(random, c.gate, s.tokens, s.experts, s.rank);
    const Index ranks = s.experts * s.rank, side = c.gate.computed || c.side_rows ? s.experts : 0;
    x_ = Tensor<H, X>(harness, draw_grid(random, s.tokens, s.d_in), c.padding);
    A_ = Tensor<H, W>(harness, draw_grid(random, s.shared_a ? s.rank : ranks, s.d_in), c.padding);
    Grid<double> side_rows = draw_grid(random, side, s.d_in);
    for (Index e = 1; c.gate.tied && e < side; ++e) {
      for (Index i = 0; i < s.d_in; ++i) side_rows(e, i) = side_rows(0, i);
    }
    side_ = Tensor<H, W>(harness, side_rows, c.padding);
    B_values_ = draw_grid(random, s.d_out, ranks);
    dy_ = Tensor<H, X>(harness, draw_grid(random, s.tokens, s.d_out), c.padding);

    if (c.dropout) {
      const lm::Key key{.seed = 42, .site = lm::site("conformance"), .step = 3, .first_token = c.first_token};
      dropout_ = lm::make_dropout("conformance", 0.5, key);
    }
    truth_.x = x_.values().template as<Tracked>();
    truth_.keep = Grid<std::uint8_t>(s.tokens, s.d_in, 1);
    for (Index t = 0; c.dropout && t < s.tokens; ++t) {
      for (Index i = 0; i < s.d_in; ++i) {
        truth_.keep(t, i) =
            reference::keep(42, lm::site("conformance"), 3, c.first_token + static_cast<std::uint64_t>(t), i, 32768);
      }
    }
    truth_.kept = c.dropout ? Tracked::rounded(2) : Tracked(1);
    truth_.A = A_.values().template as<Tracked>();
    truth_.side = side_.values().template as<Tracked>();
    truth_.s = Tracked(1.25);
  }

  /// Every output by itself has the bits that it has beside the others.
  void run_one_by_one() {
    run_shrink();
    const Tensor<H, W> B(harness_, B_values_, case_.padding);
    LoweredGate<H, Score> gate(harness_, data_, case_.padding);
    const NamedGate<Tracked> named = truth<Tracked>(data_);
    const auto expand = [&](int only) {
      Results<row> r;
      r.du = output<Acc>(u_.view().rows, u_.view().cols);
      r.dB = output<G>(case_.shape.d_out, data_.ranks);
      const GateGradients<H, Score> dgate(named, case_.padding, [&](Index rows, Index cols, Index padding) {
        return output<Score>(rows, cols, padding, lm::Into::set);
      });
      r.factors = dgate.tensors;
      lm::GateGradient<Score, space> wanted = dgate.views;
      if (only >= 0) {
        wanted = {};
        if (only == 1) wanted.id_weights = dgate.views.id_weights;
        if (only == 2) wanted.weights = dgate.views.weights;
        if (only == 3) wanted.values = dgate.views.values;
        if (only == 4) wanted.multiplier = dgate.views.multiplier;
        if (only == 5) wanted.rank_scale = dgate.views.rank_scale;
      }
      run(harness_,
          lm::ExpandBackward<Acc, W, X, Score, G, space, row>{
              u_.view(), gate.form(), B.view(), Acc(1.25), dy_.view(), r.du.view(),
              only <= 0 ? r.dB.view() : lm::MatrixView<G, space, row>{}, wanted, lm::Into::set, lm::Into::set});
      return r;
    };
    const auto all = expand(-1);
    REQUIRE(all.factors.size() == 5);
    for (int only = 0; only <= 5; ++only) {
      const auto one = expand(only);
      INFO("only gradient ", only);
      CHECK(same(one.du, all.du));
      if (only == 0)
        CHECK(same(one.dB, all.dB));
      else
        CHECK(same(one.factors[static_cast<std::size_t>(only - 1)], all.factors[static_cast<std::size_t>(only - 1)]));
    }

    const Tensor<H, Score> dh(harness_, draw_grid(random_, h_.view().rows, h_.view().cols), case_.padding);
    const auto shrink = [&](int only) {
      Results<row> r;
      r.dA = output<G>(A_.view().rows, case_.shape.d_in);
      r.dside = output<G>(side_.view().rows, case_.shape.d_in);
      r.dx = output<X>(case_.shape.tokens, case_.shape.d_in);
      const auto wanted = [&](int which, auto view) { return only < 0 || only == which ? view : decltype(view){}; };
      run(harness_, lm::ShrinkBackward<X, W, Acc, Score, G, space>{
                        A_.view(), side_.view(), x_.view(), dropout_, all.du.view(), dh.view(), wanted(0, r.dA.view()),
                        wanted(1, r.dside.view()), wanted(2, r.dx.view()), lm::Into::set, lm::Into::set});
      return r;
    };
    const auto both = shrink(-1);
    CHECK(same(shrink(0).dA, both.dA));
    CHECK(same(shrink(1).dside, both.dside));
    CHECK(same(shrink(2).dx, both.dx));
  }

  void run_all() {
    run_shrink();
    run_order<lm::Major::column>();
    run_order<lm::Major::row>();
  }

 private:
  template <lm::Major M>
  struct Results {
    Tensor<H, Acc> du;
    Tensor<H, G, M> dB;
    std::vector<Tensor<H, Score>> factors;
    Tensor<H, G> dA, dside;
    Tensor<H, X> dx;
  };
  /// The same bits, and numbers: what was never written is NaN.
  template <class T>
  bool same(const T& a, const T& b) {
    std::string problem;
    const Grid<double> values = a.read(harness_, problem);
    for (Index i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values[i])) return false;
    }
    const auto x = a.bits(harness_), y = b.bits(harness_);
    return values.size() != 0 && problem.empty() && std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
  }

  void run_shrink() {
    const ProductShape& s = case_.shape;
    u_ = Tensor<H, Acc>::poisoned(harness_, s.tokens, A_.view().rows, case_.padding);
    h_ = Tensor<H, Score>::poisoned(harness_, s.tokens, side_.view().rows, case_.padding);
    run(harness_,
        lm::Shrink<X, W, Acc, Score, space>{A_.view(), side_.view(), x_.view(), dropout_, u_.view(), h_.view()});
    truth_u_ = reference::shrink(truth_);
    truth_h_ = reference::side_rows(truth_);
    check<Acc>("U", u_, truth_u_);
    check<Score>("H", h_, truth_h_);
  }

  template <lm::Major M>
  void run_order() {
    INFO("B is ", std::string(M == row ? "row-major" : "rank-major"));
    const Tensor<H, W, M> B(harness_, B_values_, case_.padding);
    truth_.B = B.values().template as<Tracked>();

    // Row stage.
    LoweredGate<H, Score> gate(harness_, data_, case_.padding);
    const Softmax softmax{side_.view(), Score(0.75)};
    typename Softmax::State state, dstate;
    Tensor<H, Score> weights;
    Grid<Tracked> p;
    if (case_.gate.computed) {
      weights = Tensor<H, Score>::poisoned(harness_, data_.tokens, data_.experts, case_.padding);
      state.weights = weights.view();
      using Body = SoftmaxForward<Softmax, Score, space>;
      lm::for_rows<space>(harness_.backend(), data_.tokens, Body{softmax, h_.view(), state});
      p = reference::softmax(truth_h_, Tracked(0.75));
      check<Score>("softmax", weights, p);
      gate.form().weights = state.weights;
    }
    const NamedGate<Tracked> named = truth<Tracked>(data_, case_.gate.computed ? &p : nullptr);
    truth_.gate = named.gate;

    // Shrink again, where the gate is known and only open ranks need be computed. All that follows reads this U.
    const lm::GateForm<Score, space> select = case_.shape.shared_a ? lm::GateForm<Score, space>{} : gate.form();
    const Tensor<H, Acc> u = Tensor<H, Acc>::poisoned(harness_, u_.view().rows, u_.view().cols, case_.padding);
    run(harness_, lm::Shrink<X, W, Acc, Score, space>{A_.view(), {}, x_.view(), dropout_, u.view(), {}, select});

    // Expand.
    Tensor<H, X> y = output<X>(case_.shape.tokens, case_.shape.d_out);
    run(harness_,
        lm::Expand<Acc, W, X, Score, space, M>{u.view(), gate.form(), B.view(), Acc(1.25), y.view(), case_.into});
    check<X>("Y", y, reference::expand(truth_, as_read(truth_u_)), case_.into);

    // Expand backward. The computed gate's own gradient is assigned, whatever the case says.
    const lm::Into gate_into = case_.gate.computed ? lm::Into::set : case_.into;
    const Tensor<H, Acc> du = Tensor<H, Acc>::poisoned(harness_, u.view().rows, u.view().cols, case_.padding);
    Tensor<H, G, M> dB = output<G, M>(case_.shape.d_out, data_.ranks);
    const GateGradients<H, Score> dgate(named, case_.padding, [&](Index rows, Index cols, Index padding) {
      return output<Score>(rows, cols, padding, gate_into);
    });
    run(harness_,
        lm::ExpandBackward<Acc, W, X, Score, G, space, M>{u.view(), gate.form(), B.view(), Acc(1.25), dy_.view(),
                                                          du.view(), dB.view(), dgate.views, gate_into, gate_into});
    const auto truth_dy = dy_.values().template as<Tracked>();
    const reference::ExpandGradient<Tracked> want = reference::expand_backward(truth_, truth_u_, truth_dy);
    check<Acc>("dU", du, want.du);
    check<G>("dB", dB, reference::expand_backward(truth_, as_read(truth_u_), truth_dy).dB, gate_into);
    for (std::size_t i = 0; i < dgate.tensors.size(); ++i) {
      INFO("gate gradient ", static_cast<int>(named.names[i]));
      check<Score>("dg", dgate.tensors[i], want.factors[i], gate_into);
    }

    // Row stage and shrink, backward.
    const Tensor<H, Score> dh(harness_, Grid<double>(h_.view().rows, h_.view().cols, 0.0), case_.padding);
    Grid<Tracked> truth_dh(h_.view().rows, h_.view().cols);
    if (case_.gate.computed) {
      dstate.weights = dgate.views.weights;
      using Body = SoftmaxBackward<Softmax, Score, space>;
      lm::for_rows<space>(harness_.backend(), data_.tokens, Body{softmax, h_.view(), state, dstate, dh.view()});
      truth_dh = reference::softmax_backward(p, want.factors[0], Tracked(0.75));
      check<Score>("dH", dh, truth_dh, lm::Into::set, case_.shape.experts == 1);
    }
    Tensor<H, G> dA = output<G>(A_.view().rows, case_.shape.d_in),
                 dside = output<G>(side_.view().rows, case_.shape.d_in);
    Tensor<H, X> dx = output<X>(case_.shape.tokens, case_.shape.d_in);
    run(harness_, lm::ShrinkBackward<X, W, Acc, Score, G, space>{A_.view(), side_.view(), x_.view(), dropout_,
                                                                 du.view(), dh.view(), dA.view(), dside.view(),
                                                                 dx.view(), case_.into, case_.into, select});
    const auto sums = reference::shrink_backward(truth_, as_read(want.du), as_read(truth_dh));
    check<G>("dA", dA, sums.dA, case_.into);
    check<G>("dside", dside, sums.dside, case_.into, case_.shape.experts == 1);
    check<X>("dX", dx, sums.dx, case_.into);
  }

  /// Values of rank space as products and sums over tokens read them: a backend may round them further, by H::split_units.
  static Grid<Tracked> as_read(Grid<Tracked> values) {
    if constexpr (requires { H::split_units; }) {
      for (Index i = 0; i < values.size(); ++i) values[i].depth += H::split_units;
    }
    return values;
  }

  /// Something to add to, or NaN where the op assigns.
  template <class T, lm::Major M = row>
  Tensor<H, T, M> output(Index rows, Index cols) {
    return output<T, M>(rows, cols, case_.padding, case_.into);
  }
  template <class T, lm::Major M = row>
  Tensor<H, T, M> output(Index rows, Index cols, Index padding, lm::Into into) {
    if (into == lm::Into::set) return Tensor<H, T, M>::poisoned(harness_, rows, cols, padding);
    return Tensor<H, T, M>(harness_, draw_grid(random_, rows, cols), padding);
  }

  template <class Store, class T>
  void check(const char* what, const T& tensor, const Grid<Tracked>& want, lm::Into into = lm::Into::set,
             bool zero = false) {
    std::string problem;
    const Grid<double> got = tensor.read(harness_, problem), old = tensor.values();
    const bool nothing = zero || data_.tokens == 0 || data_.ranks == 0 || (case_.dropout && case_.shape.d_in < 8);
    if (problem.empty()) problem = compare<Store, Acc>(got, want, into == lm::Into::add ? &old : nullptr, nothing);
    CHECK_MESSAGE(problem.empty(), std::string(what), ": ", problem);
  }

  H& harness_;
  const ProductCase& case_;
  Random& random_;
  GateData data_;
  Tensor<H, X> x_, dy_;
  Tensor<H, W> A_, side_;
  Grid<double> B_values_;
  lm::Dropout dropout_;
  Tensor<H, Acc> u_;
  Tensor<H, Score> h_;
  reference::Product<Tracked> truth_;
  Grid<Tracked> truth_u_, truth_h_;
};

/// Runs the table for one precision.
template <class Precision, class H>
void product_conforms(H& harness, const ProductBudget& budget) {
  Random random(seed(2));
  int gates = 0, ran = 0;
  for (const GateSpec& gate : gate_specs()) {
    int number = gates++;
    for (const ProductShape& shape : product_shapes()) {
      ++number;
      if (shape.d_in > budget.max_width || shape.d_out > budget.max_width || shape.tokens > budget.max_tokens) continue;
      // A shared A needs experts of one size; a form without experts has no word for it.
      if (shape.shared_a && (!gate.by_expert() || gate.mixed_ranks)) continue;
      if ((number + budget.first) % budget.every != 0) continue;
      const int n = number / budget.every;
      const ProductCase c{gate,
                          shape,
                          n % 2 == 0,
                          n % 4 < 2 ? lm::Into::add : lm::Into::set,
                          n % 3 == 0 ? Index{0} : Index{3},
                          n % 5 == 0 ? (std::uint64_t{7} << 32) - 2 : 0};
      INFO(describe(c));
      ProductTest<Precision, H>(harness, c, random).run_all();
      CHECK(harness.release());
      ++ran;
    }
  }
  CHECK(ran > 0);
}

/// Outputs that are not wanted stay away, and the others do not notice.
template <class Precision, class H>
void product_outputs_are_optional(H& harness) {
  Random random(seed(3));
  for (const GateSpec& gate : gate_specs()) {
    if (std::string(gate.name) != "every slot") continue;
    const ProductCase c{gate, {67, 24, 17, 3, 3}, true, lm::Into::set, 3, 0, true};
    ProductTest<Precision, H>(harness, c, random).run_one_by_one();
    CHECK(harness.release());
  }
}

}  // namespace loramix_test

// The MixLoRA block against a feed-forward network whose every expert has its own three matrices (reference/mixlora.hpp),
// its gradients against finite differences, and the laws of MATH.md section 6.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/balance_loss.hpp>
#include <loramix/train/gradient_check.hpp>

#include "core/caught.hpp"
#include "reference/draws.hpp"
#include "reference/mixlora.hpp"
#include "support/allocations.hpp"
#include "support/seed.hpp"

namespace loramix_test {
namespace {

namespace lm = loramix;
using Block = lm::MixLora<double>;
using Real = lm::Matrix<double>;

constexpr std::uint64_t in_site = lm::site("mlp.gate_proj"), down_site = lm::site("mlp.down_proj");
constexpr lm::Key key{.seed = 5, .site = in_site, .step = 3, .first_token = 100};

lm::MixLoraConfig config(Index experts, Index k, double dropout = 0.5) {
  return {.d_in = 7,
          .d_hidden = 13,
          .d_out = 5,
          .experts = experts,
          .rank = 3,
          .alpha = 4,
          .dropout = dropout,
          .rule = {.k = k}};
}

struct Experts {
  Index experts, k;
};
constexpr Experts experts_and_k[] = {{5, 1}, {5, 2}, {5, 5}, {1, 1}};

class Random {
 public:
  explicit Random(std::uint64_t site) : engine_(seed(site)) {}
  double operator()() { return static_cast<double>(engine_() >> 11) * 0x1p-52 - 1; }
  template <class View>
  void fill(View v) {
    for (Index i = 0; i < v.rows; ++i) {
      for (Index j = 0; j < v.cols; ++j) v(i, j) = (*this)();
    }
  }

 private:
  std::mt19937_64 engine_;
};

/// out (+)= a b or a bᵀ, as an engine would.
void multiply(const Real& a, const Real& b, bool transposed, Real& out, bool add) {
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index j = 0; j < out.cols(); ++j) {
      double sum = add ? out(i, j) : 0;
      for (Index l = 0; l < a.cols(); ++l) sum += a(i, l) * (transposed ? b(j, l) : b(l, j));
      out(i, j) = sum;
    }
  }
}

struct Memory {
  explicit Memory(Index size) : bytes(static_cast<std::size_t>(size), std::byte{0xff}) {}
  lm::Arena<> arena() { return lm::Arena<>{bytes}; }
  std::vector<std::byte> bytes;
};

/// The engine's block: frozen base, one adapter, everything that a step writes.
struct Engine {
  Block mix;
  Real W1, W3, W2, x, u, v, hbar, y, dy, dhbar, du, dv, dx;
  Real eu, ev;  // added to u and v: leaves for finite differences
  lm::gradient_t<Block> grad;
  lm::MixLoraOptions<lm::Space::host> options{.key = key, .down_site = down_site};
  Memory work{0}, kept{0};

  Engine(const lm::MixLoraConfig& c, Index T, std::uint64_t site = 0)
      : mix(c),
        W1(c.d_hidden, c.d_in),
        W3(c.d_hidden, c.d_in),
        W2(c.d_out, c.d_hidden),
        x(T, c.d_in),
        u(T, c.d_hidden),
        v(u),
        hbar(u),
        y(T, c.d_out),
        dy(y),
        dhbar(u),
        du(u),
        dv(u),
        dx(x),
        eu(u),
        ev(u),
        grad(lm::zeros_like(mix)) {
    Random random(site);
    Block::visit(mix, [&](const char*, auto view, lm::ParameterGroup) { random.fill(view); });
    for (Real* m : {&W1, &W3, &W2, &dy}) random.fill(m->view());
    for (Index t = 0; t < T; ++t) {
      do random.fill(x.view().row_range(t, 1));
      while (margin(t) < 1e-2);
    }
    size(lm::cpu::Backend<>{});
  }
  template <class Backend>
  void size(const Backend& be) {
    const Index T = x.rows();
    const Index there = lm::workspace_bytes(be, mix, T), back = lm::workspace_bytes(be, mix, T, lm::Pass::backward);
    work = Memory(there > back ? there : back);
    kept = Memory(lm::reserve_bytes(mix, T));
  }
  double margin(Index t) const {
    const Index E = mix.config().experts;
    double least = 1;
    std::vector<double> l(static_cast<std::size_t>(E), 0);
    for (Index e = 0; e < E; ++e) {
      for (Index i = 0; i < x.cols(); ++i) l[static_cast<std::size_t>(e)] += mix.side()(e, i) * x(t, i);
    }
    for (std::size_t a = 0; a < l.size(); ++a) {
      for (std::size_t b = 0; b < a; ++b) least = std::fmin(least, std::fabs(l[a] - l[b]));
    }
    return least;
  }

  /// y = the whole block.
  template <class Backend>
  auto forward(const Backend& be) {
    // [before-the-activation]
    lm::Arena<> reserve = kept.arena();
    auto saved = lm::route(be, mix, x, reserve, work.arena(), options);
    multiply(x, W1, true, u, false);
    multiply(x, W3, true, v, false);
    // [/before-the-activation]
    for (Index i = 0; i < u.rows() * u.cols(); ++i) {
      u.data()[i] += eu.data()[i];
      v.data()[i] += ev.data()[i];
    }
    // [after-it]
    lm::mix(be, mix, saved, u, v, hbar, work.arena());
    multiply(hbar, W2, true, y, false);
    lm::finish(be, mix, saved, y, work.arena());
    // [/after-it]
    return saved;
  }
  template <class Backend, class Saved>
  void backward(const Backend& be, Saved& saved) {
    lm::finish_backward(be, mix, saved, dy, grad, work.arena());
    multiply(dy, W2, false, dhbar, false);
    lm::mix_backward(be, mix, saved, u, v, dhbar, du, dv, grad, work.arena());
    multiply(du, W1, false, dx, false);
    multiply(dv, W3, false, dx, true);
    lm::route_backward(be, mix, saved, x, dx, grad, work.arena());
  }
  template <class Backend>
  void step(const Backend& be) {
    auto saved = forward(be);
    backward(be, saved);
  }

  reference::MixBlock literal() const {
    const auto grid = [](auto view) {
      Grid<double> g(view.rows, view.cols);
      for (Index i = 0; i < view.rows; ++i) {
        for (Index j = 0; j < view.cols; ++j) g(i, j) = view(i, j);
      }
      return g;
    };
    const Index R = mix.ranks();
    reference::MixBlock b;
    b.experts = mix.config().experts;
    b.rank = mix.config().rank;
    b.k = mix.config().rule.k;
    b.scale = mix.scale();
    b.x = grid(x.view());
    b.W1 = grid(W1.view());
    b.W3 = grid(W3.view());
    b.W2 = grid(W2.view());
    b.A1 = grid(mix.A13().row_range(0, R));
    b.A3 = grid(mix.A13().row_range(R, R));
    b.B1 = grid(mix.B1());
    b.B3 = grid(mix.B3());
    b.A2 = grid(mix.A2());
    b.B2 = grid(mix.B2());
    b.router = grid(mix.side());
    if (options.key.on && mix.dropout() > 0) {
      const auto mask = [&](std::uint64_t site, Index cols) {
        Grid<std::uint8_t> keep(x.rows(), cols);
        for (Index t = 0; t < x.rows(); ++t) {
          for (Index c = 0; c < cols; ++c) {
            keep(t, c) = reference::keep(key.seed, site, key.step, key.first_token + static_cast<std::uint64_t>(t), c,
                                         lm::dropout_p16("test", mix.dropout()));
          }
        }
        return keep;
      };
      b.kept = 1 / (1 - mix.dropout());
      b.keep_x = mask(in_site, x.cols());
      b.keep_h = mask(down_site, u.cols());
    }
    return b;
  }
  Grid<double> literal_y() const {
    const reference::MixBlock b = literal();
    const auto ids = b.choose(b.x);
    return b.forward(ids, b.weigh(b.x, ids));
  }
};

void check_close(const Real& got, const Grid<double>& want, double tolerance = 1e-11) {
  double largest = 0, wrong = 0;
  for (Index t = 0; t < got.rows(); ++t) {
    for (Index o = 0; o < got.cols(); ++o) {
      largest = std::fmax(largest, std::fabs(want(t, o)));
      const double error = std::fabs(got(t, o) - want(t, o));
      if (!(error <= wrong)) wrong = error;
    }
  }
  CHECK(largest > 0.1);
  CHECK(wrong <= tolerance * largest);
}
bool same_bits(const Real& a, const Real& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.rows() * a.cols()) * sizeof(double)) == 0;
}
template <class A>
bool same_parameters(const A& a, const A& b) {
  return std::memcmp(a.parameters().data, b.parameters().data,
                     static_cast<std::size_t>(a.parameters().size) * sizeof(double)) == 0;
}

}  // namespace

TEST_CASE("the block is the materialised feed-forward network, with and without dropout") {
  for (const double dropout : {0.0, 0.5}) {
    for (const Experts of : experts_and_k) {
      CAPTURE(dropout);
      CAPTURE(of.k);
      Engine engine(config(of.experts, of.k, dropout), 11);
      engine.forward(lm::cpu::Backend{});
      check_close(engine.y, engine.literal_y());
    }
  }
}

TEST_CASE("tiles and blocks of columns: more than one of each") {
  lm::MixLoraConfig c = config(3, 2);
  c.d_hidden = 523;
  c.d_in = 11;
  Engine engine(c, 131);
  engine.forward(lm::cpu::Backend{});
  check_close(engine.y, engine.literal_y());
}

TEST_CASE("all gradients against finite differences, dropout 0.5") {
  for (const Experts of : experts_and_k) {
    CAPTURE(of.experts);
    CAPTURE(of.k);
    Engine engine(config(of.experts, of.k), 6, 3);
    const lm::cpu::Backend be;
    engine.step(be);
    const auto flat = [](Real& m) { return lm::VectorView<double>(m.data(), m.rows() * m.cols()); };
    Real dx = engine.dx, du = engine.du, dv = engine.dv;
    std::vector<lm::GradientClaim> claims{
        {"x", flat(engine.x), flat(dx)}, {"u", flat(engine.eu), flat(du)}, {"v", flat(engine.ev), flat(dv)}};
    Block::visit(engine.mix, [&](const char* name, auto view, lm::ParameterGroup) {
      claims.push_back({name, {view.data, view.rows * view.cols}, {}});
    });
    std::size_t next = 3;
    lm::gradient_t<Block>::visit(engine.grad, [&](const char*, auto view, lm::ParameterGroup) {
      claims[next++].gradient = {view.data, view.rows * view.cols};
    });
    const auto report = lm::gradient_check(claims, [&] {
      engine.forward(be);
      double loss = 0;
      for (Index i = 0; i < engine.y.rows() * engine.y.cols(); ++i) loss += engine.dy.data()[i] * engine.y.data()[i];
      return loss;
    });
    CHECK_MESSAGE(report.ok(), report.text());
    for (const auto& tensor : report.tensors) {
      const bool no_router = of.k == 1 && tensor.name == "moe_gate.weight";
      CHECK_MESSAGE((tensor.norm > 0) == !no_router, tensor.name);
    }
  }
}

TEST_CASE("the mixtral loss of a block reaches router and x, and leaves masked tokens alone") {
  Engine engine(config(5, 2), 6, 3);
  const lm::cpu::Backend be;
  const std::vector<std::uint8_t> valid{1, 1, 0, 1, 0, 1};
  engine.options.valid = {valid.data(), 6};
  Memory more(lm::loss_workspace_bytes<double>(6, 5));
  // [balance]
  const auto balance = [&](const auto& saved) {
    return lm::balance_loss(be, saved, {.form = lm::Balance::mixtral, .weight = 0.3}, more.arena());
  };
  // [/balance]
  auto saved = engine.forward(be);
  CHECK(balance(saved) > 0.3);
  double slopes = 0;
  for (Index e = 0; e < 5; ++e) slopes += saved.state.dp(0, e);
  CHECK(slopes > 0);
  for (Index e = 0; e < 5; ++e) CHECK(saved.state.dp(2, e) == 0);
  engine.backward(be, saved);
  Real dx = engine.dx;
  const auto report =
      lm::gradient_check({{"x", {engine.x.data(), 6 * 7}, {dx.data(), 6 * 7}},
                          {"router", {engine.mix.side().data, 5 * 7}, {engine.grad.side().data, 5 * 7}}},
                         [&] {
                           double loss = 0.3 * balance(engine.forward(be));  // the value is without its weight
                           for (Index i = 0; i < 30; ++i) loss += engine.dy.data()[i] * engine.y.data()[i];
                           return loss;
                         });
  CHECK_MESSAGE(report.ok(), report.text());
}

TEST_CASE("one, two or three lanes: the same bits") {
  lm::MixLoraConfig c = config(5, 2);
  c.d_hidden = 307;
  Engine one(c, 150, 7), many(c, 150, 7);
  one.step(lm::cpu::Backend{});
  for (int threads = 2; threads <= 3; ++threads) {
    lm::ThreadPool pool(threads);
    const lm::cpu::Backend be{pool.executor()};
    many.size(be);
    many.grad = lm::zeros_like(many.mix);
    many.step(be);
    CHECK(same_bits(one.y, many.y));
    CHECK(same_bits(one.hbar, many.hbar));
    CHECK(same_bits(one.dx, many.dx));
    CHECK(same_bits(one.du, many.du));
    CHECK(same_parameters(one.grad, many.grad));
  }
}

TEST_CASE("a token's result does not depend on the others, nor on their order") {
  lm::MixLoraConfig c = config(5, 2, 0);
  c.d_hidden = 307;
  constexpr Index T = 150;
  Engine straight(c, T, 8), turned(c, T, 8);
  for (Index t = 0; t < T; ++t) {
    for (Index i = 0; i < c.d_in; ++i) turned.x(t, i) = straight.x(t * 7 % T, i);
    for (Index o = 0; o < c.d_out; ++o) turned.dy(t, o) = straight.dy(t * 7 % T, o);
  }
  straight.step(lm::cpu::Backend{});
  turned.step(lm::cpu::Backend{});
  Index wrong = 0;
  for (Index t = 0; t < T; ++t) {
    const auto same = [&](const Real& a, const Real& b) {
      return std::memcmp(a.view().row(t), b.view().row(t * 7 % T), static_cast<std::size_t>(a.cols()) * 8) == 0;
    };
    wrong += !same(turned.y, straight.y) + !same(turned.hbar, straight.hbar) + !same(turned.dx, straight.dx);
  }
  CHECK(wrong == 0);
}

TEST_CASE("a step allocates nothing") {
  Engine engine(config(5, 2), 70);
  const lm::cpu::Backend be;
  engine.step(be);
  const Index before = static_cast<Index>(allocations());
  engine.step(be);
  CHECK(static_cast<Index>(allocations()) == before);
}

TEST_CASE("what an expert that is off holds goes nowhere; capacity drops choices") {
  Engine engine(config(5, 2), 9), poisoned(config(5, 2), 9);
  const lm::cpu::Backend be;
  const auto step = [&](Engine& e, bool poison) {
    auto saved = e.forward(be);
    lm::Arena<> reserve = e.kept.arena();
    saved = lm::route(be, e.mix, e.x, reserve, e.work.arena(), e.options);
    const_cast<std::int32_t&>(saved.state.ids(4, 1)) = -1;  // a dropped choice
    for (Index t = 0; t < 9 && poison; ++t) {
      for (Index expert = 0; expert < 5; ++expert) {
        bool on = false;
        for (Index s = 0; s < 2; ++s) on = on || saved.state.ids(t, s) == expert;
        for (Index j = 0; j < 3 && !on; ++j) {
          saved.z(t, expert * 3 + j) = saved.z(t, 15 + expert * 3 + j) = std::numeric_limits<double>::quiet_NaN();
        }
      }
    }
    lm::mix(be, e.mix, saved, e.u, e.v, e.hbar, e.work.arena());
    multiply(e.hbar, e.W2, true, e.y, false);
    lm::finish(be, e.mix, saved, e.y, e.work.arena());
    e.backward(be, saved);
    CHECK(saved.dstate.weights(4, 1) == 0);
    CHECK(saved.dstate.weights(4, 0) != 0);
  };
  step(engine, false);
  step(poisoned, true);
  CHECK(same_bits(engine.y, poisoned.y));
  CHECK(same_bits(engine.dx, poisoned.dx));
  CHECK(same_parameters(engine.grad, poisoned.grad));
  CHECK(engine.dx(4, 0) == engine.dx(4, 0));

  reference::MixBlock b = engine.literal();
  auto ids = b.choose(b.x);
  const auto g = b.weigh(b.x, ids);
  ids(4, 1) = -1;
  check_close(engine.y, b.forward(ids, g));

  lm::MixLoraConfig full = config(5, 2, 0);
  full.rule.capacity = 1e-3;  // one place for every expert
  Engine dropped(full, 40);
  auto saved = dropped.forward(be);
  Index kept = 0;
  for (Index t = 0; t < 40; ++t) {
    for (Index s = 0; s < 2; ++s) kept += saved.state.ids(t, s) >= 0;
  }
  CHECK(kept <= 5);
  CHECK(kept > 0);
  for (Index o = 0; o < 5; ++o) CHECK(dropped.y(39, o) == 0);  // nothing left for the last token: y is 0, not x
}

// What public code does otherwise (PEERS 1.8).

TEST_CASE("jitter alters expert input: here it alters the router's alone, and only in training") {
  lm::MixLoraConfig c = config(5, 5, 0);
  c.rule.jitter = 0.3;
  Engine engine(c, 9);
  const lm::cpu::Backend be;
  engine.forward(be);
  const reference::MixBlock b = engine.literal();
  Grid<double> seen = b.x;
  const std::uint64_t jitter_key = lm::philox_key(key);
  for (Index t = 0; t < 9; ++t) {
    for (Index i = 0; i < c.d_in; ++i) {
      const double draw =
          lm::draw_uniform(jitter_key, lm::Purpose::jitter, key.first_token + static_cast<std::uint64_t>(t), i);
      seen(t, i) *= 1 + 0.3 * (2 * draw - 1);
    }
  }
  const auto ids = b.choose(seen);
  check_close(engine.y, b.forward(ids, b.weigh(seen, ids)));
  engine.options.key = lm::no_draws;
  engine.forward(be);
  check_close(engine.y, engine.literal_y());

  engine.options.key = key;  // and its gradient
  engine.step(be);
  Real dx = engine.dx;
  const auto report =
      lm::gradient_check({{"x", {engine.x.data(), 9 * c.d_in}, {dx.data(), 9 * c.d_in}},
                          {"router", {engine.mix.side().data, 5 * c.d_in}, {engine.grad.side().data, 5 * c.d_in}}},
                         [&] {
                           engine.forward(be);
                           double loss = 0;
                           for (Index i = 0; i < engine.y.rows() * engine.y.cols(); ++i)
                             loss += engine.dy.data()[i] * engine.y.data()[i];
                           return loss;
                         });
  CHECK_MESSAGE(report.ok(), report.text());
}

TEST_CASE("switch inference returns input: here top-1 with capacity computes its experts") {
  lm::MixLoraConfig c = config(5, 1);
  c.d_out = c.d_in;
  c.rule.renormalise = false;
  c.rule.capacity = 4;
  Engine engine(c, 11);
  engine.options.key = lm::no_draws;
  engine.forward(lm::cpu::Backend{});
  const reference::MixBlock b = engine.literal();
  const auto ids = b.choose(b.x);
  Grid<double> p(11, 1);
  for (Index t = 0; t < 11; ++t) {
    double sum = 0;
    for (Index e = 0; e < 5; ++e) sum += std::exp(b.logit(b.x, t, e));
    p(t, 0) = std::exp(b.logit(b.x, t, ids(t, 0))) / sum;
  }
  check_close(engine.y, b.forward(ids, p));
  CHECK(!same_bits(engine.y, engine.x));
}

TEST_CASE("W2 per expert: here one product with h̄ serves all") {
  Engine engine(config(5, 5), 9);
  const lm::cpu::Backend be;
  for (Index i = 0; i < engine.mix.B2().rows; ++i) {
    for (Index j = 0; j < engine.mix.B2().cols; ++j) engine.mix.B2()(i, j) = 0;
  }
  engine.forward(be);
  Real y(9, 5);
  multiply(engine.hbar, engine.W2, true, y, false);
  CHECK(same_bits(y, engine.y));  // adapters of the down projection aside, y is that one product
  check_close(engine.y, engine.literal_y());
}

TEST_CASE("B = 0 leaves the frozen block, one expert is three LoRAs, and the router starts small") {
  Engine engine(config(5, 2), 9);
  lm::initialise(engine.mix, {.seed = 3});
  double squares = 0;
  for (Index e = 0; e < 5; ++e) {
    for (Index i = 0; i < 7; ++i) squares += engine.mix.side()(e, i) * engine.mix.side()(e, i);
  }
  CHECK(std::sqrt(squares / 35) == doctest::Approx(0.02).epsilon(0.5));
  engine.step(lm::cpu::Backend{});
  check_close(engine.y, engine.literal_y());
  const reference::MixBlock b = engine.literal();
  double wrong = 0, of_B = 0, of_A = 0;
  for (Index t = 0; t < 9; ++t) {
    for (Index o = 0; o < 5; ++o) {
      double sum = 0;
      for (Index f = 0; f < 13; ++f) {
        double t1 = 0, t3 = 0;
        for (Index i = 0; i < 7; ++i) {
          t1 += b.W1(f, i) * b.x(t, i);
          t3 += b.W3(f, i) * b.x(t, i);
        }
        sum += b.W2(o, f) * (t1 / (1 + std::exp(-t1))) * t3;
      }
      wrong = std::fmax(wrong, std::fabs(sum - engine.y(t, o)));
    }
  }
  CHECK(wrong < 1e-11);
  lm::gradient_t<Block>::visit(engine.grad, [&](const char* name, auto view, lm::ParameterGroup) {
    const bool A = std::strstr(name, "lora_A") != nullptr, B = std::strstr(name, "lora_B") != nullptr;
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) (A ? of_A : B ? of_B : squares) += std::fabs(view(i, j));
    }
  });
  CHECK(of_A == 0);
  CHECK(of_B > 0);
}

TEST_CASE("experts may change places") {
  Engine engine(config(5, 2, 0), 9), other(config(5, 2, 0), 9);
  const auto from = [](Index e) { return (e + 2) % 5; };
  const Block& a = engine.mix;
  Block& b = other.mix;
  for (Index e = 0; e < 5; ++e) {
    for (Index i = 0; i < 7; ++i) b.side()(e, i) = a.side()(from(e), i);
    for (Index j = 0; j < 3; ++j) {
      const Index to = e * 3 + j, at = from(e) * 3 + j;
      for (Index i = 0; i < 7; ++i) {
        b.A13()(to, i) = a.A13()(at, i);
        b.A13()(15 + to, i) = a.A13()(15 + at, i);
      }
      for (Index f = 0; f < 13; ++f) {
        b.B1()(f, to) = a.B1()(f, at);
        b.B3()(f, to) = a.B3()(f, at);
        b.A2()(to, f) = a.A2()(at, f);
      }
      for (Index o = 0; o < 5; ++o) b.B2()(o, to) = a.B2()(o, at);
    }
  }
  engine.forward(lm::cpu::Backend{});
  other.forward(lm::cpu::Backend{});
  Grid<double> want(9, 5);
  for (Index i = 0; i < 45; ++i) want[i] = engine.y.data()[i];
  check_close(other.y, want);
}

TEST_CASE("no token, and Into::set, which never reads") {
  Engine none(config(5, 2), 0);
  none.step(lm::cpu::Backend{});
  Engine engine(config(5, 2), 9), again(config(5, 2), 9);
  const lm::cpu::Backend be;
  engine.step(be);
  auto saved = again.forward(be);
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  for (Index i = 0; i < again.grad.parameters().size; ++i) again.grad.parameters()[i] = nan;
  lm::finish_backward(be, again.mix, saved, again.dy, again.grad, again.work.arena(), lm::Into::set);
  multiply(again.dy, again.W2, false, again.dhbar, false);
  lm::mix_backward(be, again.mix, saved, again.u, again.v, again.dhbar, again.du, again.dv, again.grad,
                   again.work.arena(), lm::Into::set);
  lm::route_backward(be, again.mix, saved, again.x, again.dx, again.grad, again.work.arena(),
                     {.parameters = lm::Into::set, .input = lm::Into::set});
  lm::gradient_t<Block>::visit(again.grad, [&](const char* name, auto got, lm::ParameterGroup) {
    lm::gradient_t<Block>::visit(engine.grad, [&](const char* other, auto want, lm::ParameterGroup) {
      if (std::strcmp(name, other) != 0) return;
      Index wrong = 0;
      for (Index i = 0; i < got.rows; ++i) {
        for (Index j = 0; j < got.cols; ++j) wrong += !(got(i, j) == want(i, j));
      }
      CHECK_MESSAGE(wrong == 0, name);
    });
  });
}

TEST_CASE("float adapters on a bfloat16 base, and frozen parameters") {
  using A = lm::MixLora<lm::Precision<lm::bfloat16, float>>;
  Engine engine(config(5, 2), 9);
  A mix(config(5, 2));
  const auto source = engine.mix.parameters();
  REQUIRE(source.size == mix.parameters().size);
  for (Index i = 0; i < source.size; ++i) mix.parameters()[i] = static_cast<float>(source[i]);
  const auto half = [](const Real& m) {
    lm::Matrix<lm::bfloat16> out(m.rows(), m.cols());
    for (Index i = 0; i < m.rows() * m.cols(); ++i) out.data()[i] = lm::narrow<lm::bfloat16>(m.data()[i]);
    return out;
  };
  const lm::cpu::Backend be;
  engine.forward(be);
  const auto x = half(engine.x), u = half(engine.u), v = half(engine.v), dy = half(engine.dy);
  lm::Matrix<lm::bfloat16> hbar(9, 13), y(9, 5), du(9, 13), dv(9, 13), dx(9, 7);
  Memory work(lm::workspace_bytes(be, mix, 9, lm::Pass::backward) + lm::workspace_bytes(be, mix, 9));
  Memory kept(lm::reserve_bytes(mix, 9));
  lm::Arena<> reserve = kept.arena();
  auto saved = lm::route(be, mix, x, reserve, work.arena(), engine.options);
  lm::mix(be, mix, saved, u, v, hbar, work.arena());
  lm::finish(be, mix, saved, y, work.arena());
  double largest = 0, wrong = 0;
  for (Index i = 0; i < 9 * 13; ++i) {
    largest = std::fmax(largest, std::fabs(engine.hbar.data()[i]));
    wrong = std::fmax(wrong, std::fabs(static_cast<double>(lm::widen<float>(hbar.data()[i])) - engine.hbar.data()[i]));
  }
  CHECK(wrong < 0.05 * largest);
  lm::finish_backward(be, mix, saved, dy, lm::frozen, work.arena());
  lm::mix_backward(be, mix, saved, u, v, hbar, du, dv, lm::frozen, work.arena());
  lm::route_backward(be, mix, saved, x, dx, lm::frozen, work.arena());
  CHECK(lm::widen<float>(dx(0, 0)) != 0);
}

TEST_CASE("bad input is refused at the door") {
  using Code = lm::ErrorCode;
  Engine e(config(5, 2), 9);
  const lm::cpu::Backend be;
  lm::Arena<> reserve = e.kept.arena();
  Real narrow(9, 12), few(8, 13);
  const auto route = [&] {
    reserve.reset();
    return lm::route(be, e.mix, e.x, reserve, e.work.arena(), e.options);
  };
  check_error(Code::shape, {"route", "x", "12", "7"},
              [&] { lm::route(be, e.mix, narrow, reserve, e.work.arena(), e.options); });
  check_error(Code::value, {"route", "down_site"},
              [&] { lm::route(be, e.mix, e.x, reserve, e.work.arena(), {.key = key}); });
  check_error(Code::value, {"route", "down_site"},
              [&] { lm::route(be, e.mix, e.x, reserve, e.work.arena(), {.key = key, .down_site = in_site}); });
  check_error(Code::arena, {"route", "work"}, [&] { lm::route(be, e.mix, e.x, reserve, {}, e.options); });
  check_error(Code::arena, {"route", "reserve"}, [&] {
    lm::Arena<> small;
    lm::route(be, e.mix, e.x, small, e.work.arena(), e.options);
  });
  CHECK(reserve.used() == 0);
  lm::Arena<> within = e.work.arena();
  check_error(Code::alias, {"route", "reserve", "work"},
              [&] { lm::route(be, e.mix, e.x, within, e.work.arena(), e.options); });
  CHECK(within.used() == 0);
  const auto inside = e.work.arena().matrix<double>(9, 7);
  check_error(Code::alias, {"route", "work", "x"},
              [&] { lm::route(be, e.mix, inside, reserve, e.work.arena(), e.options); });
  CHECK(reserve.used() == 0);
  auto saved = route();
  check_error(Code::shape, {"mix_experts", "v", "12", "13"},
              [&] { lm::mix(be, e.mix, saved, e.u, narrow, e.hbar, e.work.arena()); });
  check_error(Code::shape, {"mix_experts", "u", "8", "9"},
              [&] { lm::mix(be, e.mix, saved, few, e.v, e.hbar, e.work.arena()); });
  check_error(Code::alias, {"mix_experts", "hbar", "u"},
              [&] { lm::mix(be, e.mix, saved, e.u, e.v, e.u, e.work.arena()); });
  check_error(Code::arena, {"mix_experts", "work"}, [&] { lm::mix(be, e.mix, saved, e.u, e.v, e.hbar, {}); });
  const auto of_saved = [](const auto& view) {
    return lm::Arena<>(view.data, view.rows * view.cols * lm::Index{sizeof(double)});
  };
  check_error(Code::alias, {"mix_experts", "work", "saved"},
              [&] { lm::mix(be, e.mix, saved, e.u, e.v, e.hbar, of_saved(saved.z)); });
  check_error(Code::state, {"finish", "saved", "mix", "route"},
              [&] { lm::finish(be, e.mix, saved, e.y, e.work.arena()); });
  const Engine other(config(5, 2), 9);
  check_error(Code::state, {"mix", "another adapter"},
              [&] { lm::mix(be, other.mix, saved, e.u, e.v, e.hbar, e.work.arena()); });
  lm::mix(be, e.mix, saved, e.u, e.v, e.hbar, e.work.arena());
  check_error(Code::shape, {"expand", "y", "12", "5"}, [&] { lm::finish(be, e.mix, saved, narrow, e.work.arena()); });
  lm::finish(be, e.mix, saved, e.y, e.work.arena());
  check_error(Code::state, {"mix_backward"},
              [&] { lm::mix_backward(be, e.mix, saved, e.u, e.v, e.dhbar, e.du, e.dv, e.grad, e.work.arena()); });
  lm::finish_backward(be, e.mix, saved, e.dy, e.grad, e.work.arena());
  check_error(Code::alias, {"mix_experts_backward", "du", "dv"},
              [&] { lm::mix_backward(be, e.mix, saved, e.u, e.v, e.dhbar, e.du, e.du, e.grad, e.work.arena()); });
  check_error(Code::alias, {"mix_experts_backward", "du", "u"},
              [&] { lm::mix_backward(be, e.mix, saved, e.u, e.v, e.dhbar, e.u, e.dv, e.grad, e.work.arena()); });
  e.options.key = lm::no_draws;
  saved = route();
  lm::mix(be, e.mix, saved, e.u, e.v, e.hbar, e.work.arena());
  lm::finish(be, e.mix, saved, e.y, e.work.arena());
  check_error(Code::value, {"finish_backward", "key", "dropout_off"},
              [&] { lm::finish_backward(be, e.mix, saved, e.dy, e.grad, e.work.arena()); });

  std::vector<std::int32_t> ids(18, 0);
  for (std::size_t i = 1; i < 18; i += 2) ids[i] = 1;
  ids[7] = 5;
  std::vector<double> weights(18, 0.5);
  auto op = lm::detail::MixLoraOps<Block>::mix(e.mix, saved, e.u, e.v, e.hbar);
  op.gate = lm::TopKExperts<double>{{ids.data(), 9, 2}, {weights.data(), 9, 2}, 5}.form(9, 15);
  check_error(Code::value, {"mix_experts", "ids", "5"}, [&] { lm::execute(be, op, e.work.arena()); });
  op.gate = lm::OpenGate<double>{}.form(9, 15);
  check_error(Code::value, {"mix_experts", "gate", "ids"}, [&] { lm::execute(be, op, e.work.arena()); });
  check_error(Code::value, {"mixlora", "d_hidden", "-1"}, [&] { Block({.d_in = 1, .d_hidden = -1, .d_out = 1}); });
}

}  // namespace loramix_test

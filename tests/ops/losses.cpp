// Every loss of MATH.md section 5: its value against the literal sum, its gradient against finite differences, its
// numbers, and the defects of other libraries' losses (PEERS.md 1.15 and section 3, item 8).
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/moe_lora.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/losses.hpp>
#include <loramix/train/gradient_check.hpp>

#include "core/caught.hpp"
#include "reference/losses.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;

namespace {

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
const lm::cpu::Backend<> be;

struct Draws {
  explicit Draws(std::uint64_t site) : engine(seed(site)) {}
  double operator()() { return std::uniform_real_distribution<double>(-1, 1)(engine); }
  Index below(Index n) { return static_cast<Index>(engine() % static_cast<std::uint64_t>(n)); }
  std::mt19937_64 engine;
};

template <class T>
lm::VectorView<const T> view(const std::vector<T>& v) {
  return {v.data(), static_cast<Index>(v.size())};
}
lm::VectorView<double> flat(lm::Matrix<double>& m) { return {m.data(), m.rows() * m.cols()}; }
Grid<double> grid(const lm::Matrix<double>& m) {
  Grid<double> g(m.rows(), m.cols());
  for (Index i = 0; i < g.size(); ++i) g[i] = m.data()[i];
  return g;
}

/// Scores of T tokens, E experts, k choices; three ragged sequences, the middle one of padding alone.
struct Router {
  Router(Index tokens, Index experts, Index k, bool masked, std::uint64_t site = 400)
      : logits(tokens, experts),
        p(tokens, experts),
        dlogits(tokens, experts),
        dp(tokens, experts),
        chosen(tokens, k),
        sequence(static_cast<std::size_t>(tokens), 2),
        offsets{0, tokens / 3, tokens / 2, tokens},
        memory(static_cast<std::size_t>(lm::loss_workspace_bytes<double>(tokens, experts, 3)), std::byte{0xff}) {
    Draws draw(site);
    for (Index t = 0; t < tokens; ++t) {
      double sum = 0;
      for (Index e = 0; e < experts; ++e) sum += std::exp(logits(t, e) = 2 * draw());
      for (Index e = 0; e < experts; ++e) p(t, e) = std::exp(logits(t, e)) / sum;
      for (Index s = 0; s < k; ++s) chosen(t, s) = static_cast<std::int32_t>((draw.below(experts / k) * k + s));
      sequence[static_cast<std::size_t>(t)] = t < offsets[1] ? 0 : t < offsets[2] ? 1 : 2;
    }
    if (masked) {
      valid.resize(static_cast<std::size_t>(tokens));
      for (Index t = 0; t < tokens; ++t) {
        valid[static_cast<std::size_t>(t)] = t % 4 != 1 && sequence[static_cast<std::size_t>(t)] != 1;
      }
    }
  }
  lm::Scores<double, lm::Space::host> scores() {
    return {.logits = logits.view(),
            .p = p.view(),
            .dlogits = dlogits,
            .dp = dp,
            .ids = chosen.view(),
            .weights = p.view(),
            .chosen = chosen.view(),
            .valid = view(valid)};
  }
  Grid<std::int32_t> choice() const {
    Grid<std::int32_t> g(chosen.rows(), chosen.cols());
    for (Index i = 0; i < g.size(); ++i) g[i] = chosen.data()[i];
    return g;
  }
  lm::Groups<> sequences() const { return lm::Groups<>::by_segment(offsets.data(), 3); }
  lm::Arena<> work() { return lm::Arena<>{memory}; }

  lm::Matrix<double> logits, p, dlogits, dp;
  lm::Matrix<std::int32_t> chosen;
  reference::Mask valid;
  reference::Sequence sequence;
  std::vector<Index> offsets;
  std::vector<std::byte> memory;
};

/// A loss on a router: ours with a weight, and the literal one.
struct RouterLoss {
  const char* name;
  bool on_logits;
  std::function<double(Router&, double)> ours;
  std::function<double(const Router&)> literal;
};
const std::vector<std::int32_t> types{1, 0, 0};
std::vector<std::int32_t> labels_of(const Router& r) {
  std::vector<std::int32_t> labels(static_cast<std::size_t>(r.logits.rows()));
  for (std::size_t t = 0; t < labels.size(); ++t) {
    labels[t] = static_cast<std::int32_t>(static_cast<Index>(t * 3) % (r.logits.cols() + 1)) - 1;
  }
  return labels;
}
std::vector<RouterLoss> router_losses() {
  const auto balance = [](lm::Balance form) {
    return
        [form](Router& r, double w) { return lm::balance_loss(be, r.scores(), {.form = form, .weight = w}, r.work()); };
  };
  return {
      {"mixtral", false, balance(lm::Balance::mixtral),
       [](const Router& r) { return reference::balance(grid(r.p), r.choice(), r.valid, false); }},
      {"mola", false, balance(lm::Balance::mola),
       [](const Router& r) { return reference::balance(grid(r.p), r.choice(), r.valid, true); }},
      {"importance_cv2", false, balance(lm::Balance::importance_cv2),
       [](const Router& r) { return reference::importance_cv2(grid(r.p), r.valid); }},
      {"localised", false,
       [](Router& r, double w) {
         return lm::localised_loss(
             be, r.scores(), {.weight = w, .delta = 0.3, .types = view(types), .sequences = r.sequences()}, r.work());
       },
       [](const Router& r) { return reference::localised(grid(r.p), r.sequence, types, r.valid, 0.3); }},
      {"sequence-wise", false,
       [](Router& r, double w) {
         return lm::sequence_balance_loss(be, r.scores(), {.weight = w, .sequences = r.sequences()}, r.work());
       },
       [](const Router& r) { return reference::sequence_wise(grid(r.p), r.choice(), r.sequence, 3, r.valid); }},
      {"z", true, [](Router& r, double w) { return lm::z_loss(be, r.scores(), {.weight = w}, r.work()); },
       [](const Router& r) { return reference::z_loss(grid(r.logits), r.valid); }},
      {"routing", true,
       [](Router& r, double w) {
         const auto labels = labels_of(r);
         return lm::routing_loss(be, r.scores(), {.weight = w, .labels = view(labels)}, r.work());
       },
       [](const Router& r) { return reference::cross_entropy(grid(r.logits), labels_of(r), r.valid); }},
  };
}

bool near(double got, double want) { return std::abs(got - want) <= 1e-12 * (1 + std::abs(want)); }

}  // namespace

TEST_CASE("router losses are the literal sums, and their gradients the differences of them") {
  for (const RouterLoss& loss : router_losses()) {
    for (const Index tokens : {6, 40, 300}) {
      for (const bool masked : {false, true}) {
        INFO(loss.name, ", T ", tokens, ", masked ", masked);
        Router r(tokens, 4, 2, masked);
        const double want = loss.literal(r);
        CHECK(want > 0);
        CHECK(near(loss.ours(r, 0.7), want));
        auto& tensor = loss.on_logits ? r.logits : r.p;
        auto& gradient = loss.on_logits ? r.dlogits : r.dp;
        const lm::GradientReport report =
            lm::gradient_check({{loss.name, flat(tensor), flat(gradient)}}, [&] { return 0.7 * loss.literal(r); });
        CHECK_MESSAGE(report.ok(), report.text());
        auto& other = loss.on_logits ? r.dp : r.dlogits;
        for (Index i = 0; i < other.rows() * other.cols(); ++i) CHECK(other.data()[i] == 0);
      }
    }
  }
}

TEST_CASE("peer defect: padding counted; masked rows change nothing and get exactly nothing, NaN too") {
  for (const RouterLoss& loss : router_losses()) {
    INFO(loss.name);
    Router clean(40, 4, 2, true), dirty(40, 4, 2, true);
    for (Index t = 0; t < 40; ++t) {
      if (reference::in(clean.valid, t)) continue;
      for (Index e = 0; e < 4; ++e) {
        dirty.p(t, e) = dirty.logits(t, e) = nan_value;
        dirty.dp(t, e) = dirty.dlogits(t, e) = 17;
      }
      dirty.chosen(t, 0) = dirty.chosen(t, 1) = 0;
    }
    CHECK(loss.ours(clean, 1) == loss.ours(dirty, 1));
    long wrong = 0;
    for (Index t = 0; t < 40; ++t) {
      for (Index e = 0; e < 4; ++e) {
        const double offset = reference::in(clean.valid, t) ? 0 : 17;
        wrong += dirty.dp(t, e) != clean.dp(t, e) + offset || dirty.dlogits(t, e) != clean.dlogits(t, e) + offset;
        if (offset != 0) wrong += clean.dp(t, e) != 0 || clean.dlogits(t, e) != 0;
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("no valid row, no row, one expert: value and gradient 0") {
  for (const RouterLoss& loss : router_losses()) {
    INFO(loss.name);
    Router r(9, 4, 2, true);
    for (auto& v : r.valid) v = 0;
    CHECK(loss.ours(r, 1) == 0);
    for (Index i = 0; i < 36; ++i) CHECK((r.dp.data()[i] == 0 && r.dlogits.data()[i] == 0));
    Router none(0, 4, 2, false);
    CHECK(loss.ours(none, 1) == 0);
  }
  Router one(5, 1, 1, false);
  CHECK(lm::balance_loss(be, one.scores(), {.form = lm::Balance::importance_cv2}, one.work()) == 0);
  for (Index t = 0; t < 5; ++t) CHECK(one.dp(t, 0) == 0);
}

namespace {
/// Uniform p, choices in turn; or everything on expert 0.
void route(Router& r, bool uniform) {
  for (Index t = 0; t < r.p.rows(); ++t) {
    for (Index e = 0; e < r.p.cols(); ++e) {
      const double p = uniform ? 1.0 / static_cast<double>(r.p.cols()) : e == 0 ? 0.97 : 0.01;
      r.p(t, e) = p;
      r.logits(t, e) = std::log(p);
    }
    for (Index s = 0; s < r.chosen.cols(); ++s) {
      r.chosen(t, s) = static_cast<std::int32_t>(uniform ? (t * r.chosen.cols() + s) % r.p.cols() : s);
    }
  }
}
double balance_at(Index k, lm::Balance form, bool uniform) {
  Router r(40, 4, k, false);
  route(r, uniform);
  return lm::balance_loss(be, r.scores(), {.form = form, .weight = 0}, r.work());
}
}  // namespace

TEST_CASE("numbers at uniform routing: switch 1, mixtral k, mola 1, CV² 0, sequence-wise 1") {
  CHECK(near(balance_at(1, lm::Balance::switch_transformer, true), 1));
  for (const Index k : {1, 2, 4}) {
    CHECK(near(balance_at(k, lm::Balance::mixtral, true), static_cast<double>(k)));
    CHECK(near(balance_at(k, lm::Balance::mola, true), 1));
    CHECK(balance_at(k, lm::Balance::importance_cv2, true) <= 1e-20);
  }
  Router r(40, 4, 2, false);
  route(r, true);
  CHECK(near(lm::sequence_balance_loss(be, r.scores(), {.sequences = r.sequences()}, r.work()), 1));
  // Two sequences of one length with δ = 0: CV² of equal numbers.
  const std::vector<Index> halves{0, 20, 40};
  const std::vector<std::int32_t> two{1, 0};
  CHECK(lm::localised_loss(be, r.scores(),
                           {.delta = 0, .types = view(two), .sequences = lm::Groups<>::by_segment(halves.data(), 2)},
                           r.work()) <= 1e-20);
}

TEST_CASE("imbalanced costs more than balanced") {
  CHECK(balance_at(1, lm::Balance::switch_transformer, false) > 3);
  for (const lm::Balance form : {lm::Balance::mixtral, lm::Balance::mola, lm::Balance::importance_cv2}) {
    CHECK(balance_at(2, form, false) > balance_at(2, form, true) + 0.5);
  }
  Router even(40, 4, 2, false), uneven(40, 4, 2, false);
  route(even, true);
  route(uneven, false);
  for (const RouterLoss& loss : router_losses()) {
    if (loss.on_logits) continue;
    INFO(loss.name);
    CHECK(loss.ours(uneven, 0) > loss.ours(even, 0) + 0.3);
  }
}

TEST_CASE("peer defect OLMoE#45: the k factor; forms say what they are, and Switch refuses k = 2") {
  Router r(40, 4, 2, false);
  const double mixtral = lm::balance_loss(be, r.scores(), {.form = lm::Balance::mixtral}, r.work());
  CHECK(near(mixtral, 2 * lm::balance_loss(be, r.scores(), {.form = lm::Balance::mola}, r.work())));
  check_error(lm::ErrorCode::shape, {"balance_loss", "chosen", "2", "1"},
              [&] { lm::balance_loss(be, r.scores(), {.form = lm::Balance::switch_transformer}, r.work()); });
}

TEST_CASE("peer defect: pooled over layers; opposite imbalances of two layers do not cancel") {
  Router a(40, 4, 2, false), b(40, 4, 2, false), even(40, 4, 2, false);
  route(a, false);
  route(b, false);
  route(even, true);
  for (Index t = 0; t < 40; ++t) {  // layer b loads what layer a leaves empty
    std::swap(b.p(t, 0), b.p(t, 2));
    std::swap(b.p(t, 1), b.p(t, 3));
    for (Index s = 0; s < 2; ++s) b.chosen(t, s) += 2;
  }
  const auto mola = [](Router& r) { return lm::balance_loss(be, r.scores(), {.form = lm::Balance::mola}, r.work()); };
  CHECK(mola(a) + mola(b) > 2 * mola(even) + 1);
}

TEST_CASE("peer defect hyper-parallel#752: a constant loss; the gradient through the softmax is not zero") {
  Router r(40, 4, 2, false);
  const double before = lm::balance_loss(be, r.scores(), {.weight = 0.1}, r.work());
  std::vector<double> dlogits(4);
  double norm = 0;
  for (Index t = 0; t < 40; ++t) {
    std::fill(dlogits.begin(), dlogits.end(), 0);
    lm::detail::softmax_backward_row(lm::SerialTeam{}, 4, r.p.view().row(t), r.dp.view().row(t), 1.0, dlogits.data());
    for (Index e = 0; e < 4; ++e) {
      norm += std::pow(dlogits[static_cast<std::size_t>(e)], 2);
      r.logits(t, e) -= 50 * dlogits[static_cast<std::size_t>(e)];
    }
    lm::detail::softmax_row(lm::SerialTeam{}, 4, r.logits.view().row(t), 1.0, r.p.view().row(t));
  }
  CHECK(norm > 1e-8);
  CHECK(lm::balance_loss(be, r.scores(), {}, r.work()) < before);
}

TEST_CASE("counts of several ranks: halves with summed counts are the whole") {
  Router whole(40, 4, 2, true);
  for (Index t = 0; t < 20; ++t)
    whole.valid[static_cast<std::size_t>(t + 20)] = whole.valid[static_cast<std::size_t>(t)];
  const auto scores = whole.scores();
  std::vector<double> first(5), second(5);
  auto rank = [&](Index begin, lm::MatrixView<double> dp) {
    auto s = scores;
    s.p = s.p.row_range(begin, 20);
    s.chosen = s.chosen.row_range(begin, 20);
    s.ids = {};
    s.dp = dp;
    s.valid = s.valid.part(begin, 20);
    return s;
  };
  lm::Matrix<double> left(20, 4), right(20, 4);
  lm::expert_counts(be, rank(0, left), {first.data(), 5}, whole.work());
  lm::expert_counts(be, rank(20, right), {second.data(), 5}, whole.work());
  CHECK(first[4] == reference::valid_rows(whole.valid, 20));
  for (std::size_t e = 0; e < 5; ++e) first[e] += second[e];
  const double a = lm::balance_loss(be, rank(0, left), {.counts = view(first)}, whole.work());
  const double b = lm::balance_loss(be, rank(20, right), {.counts = view(first)}, whole.work());
  CHECK(near((a + b) / 2, lm::balance_loss(be, scores, {}, whole.work())));
  long wrong = 0;
  for (Index t = 0; t < 20; ++t) {
    for (Index e = 0; e < 4; ++e) {
      wrong += !near(left(t, e), 2 * whole.dp(t, e)) || !near(right(t, e), 2 * whole.dp(t + 20, e));
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("losses on rows of any values: cross-entropy and squared error, set and add") {
  for (const bool masked : {false, true}) {
    for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
      Router r(40, 4, 2, masked);
      const auto labels = labels_of(r);
      auto& y = r.logits;
      auto& target = r.p;
      const bool add = into == lm::Into::add;
      const auto fill = [&](lm::Matrix<double>& m) {
        for (Index i = 0; i < 160; ++i) m.data()[i] = add ? 0 : nan_value;
      };
      fill(r.dp);
      fill(r.dlogits);
      CHECK(near(lm::cross_entropy_loss(be, y.view(), view(labels), r.dlogits.view(),
                                        {.weight = 3, .valid = view(r.valid), .into = into}, r.work()),
                 reference::cross_entropy(grid(y), labels, r.valid)));
      CHECK(near(lm::squared_error_loss(be, y.view(), target.view(), r.dp.view(),
                                        {.weight = 3, .valid = view(r.valid), .into = into}, r.work()),
                 reference::squared_error(grid(y), grid(target), r.valid)));
      const auto ce = lm::gradient_check({{"logits", flat(y), flat(r.dlogits)}},
                                         [&] { return 3 * reference::cross_entropy(grid(y), labels, r.valid); });
      CHECK_MESSAGE(ce.ok(), ce.text());
      const auto mse = lm::gradient_check({{"y", flat(y), flat(r.dp)}},
                                          [&] { return 3 * reference::squared_error(grid(y), grid(target), r.valid); });
      CHECK_MESSAGE(mse.ok(), mse.text());
      for (Index t = 0; t < 40; ++t) {
        for (Index c = 0; !reference::in(r.valid, t) && c < 4; ++c) CHECK((r.dp(t, c) == 0 && r.dlogits(t, c) == 0));
      }
    }
  }
}

TEST_CASE("weight 0 assigns a gradient of 0 where gradients are assigned") {
  Router r(6, 4, 2, true);
  const auto labels = labels_of(r);
  for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
    for (Index i = 0; i < 24; ++i) r.dp.data()[i] = r.dlogits.data()[i] = 7;
    lm::cross_entropy_loss(be, r.logits.view(), view(labels), r.dlogits.view(), {.weight = 0, .into = into}, r.work());
    lm::squared_error_loss(be, r.logits.view(), r.p.view(), r.dp.view(), {.weight = 0, .into = into}, r.work());
    for (Index i = 0; i < 24; ++i) {
      CHECK(r.dlogits.data()[i] == (into == lm::Into::set ? 0 : 7));
      CHECK(r.dp.data()[i] == (into == lm::Into::set ? 0 : 7));
    }
  }
}

TEST_CASE("a temperature that nothing can be divided by is refused") {
  lm::Matrix<double> x(2, 3), e(2, 3), dx(2, 3), de(2, 3);
  const std::vector<std::int32_t> labels{0, 1};
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::contrastive_workspace_bytes<double>(2, 2, 3)));
  for (const double bad : {0., -1., nan_value, HUGE_VAL}) {
    check_error(lm::ErrorCode::value, {"contrastive_loss", "temperature"}, [&] {
      lm::contrastive_loss(be, x.view(), e.view(), view(labels), dx.view(), de.view(), {.temperature = bad},
                           lm::Arena<>{memory});
    });
  }
}

TEST_CASE("a temperature that the sums' type cannot divide by is refused") {
  lm::Matrix<float> x(2, 3), e(2, 3), dx(2, 3), de(2, 3);
  for (Index i = 0; i < 6; ++i) x.data()[i] = e.data()[i] = static_cast<float>(i % 4 + 1);
  const std::vector<std::int32_t> labels{0, 1};
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::contrastive_workspace_bytes<float>(2, 2, 3)));
  const auto loss = [&](double temperature) {
    return lm::contrastive_loss(be, x.view(), e.view(), view(labels), dx.view(), de.view(),
                                {.temperature = temperature}, lm::Arena<>{memory});
  };
  for (const double bad : {1e-46, 1e-39, 1e300}) {  // as floats: 0, one without an inverse, infinity
    check_error(lm::ErrorCode::value, {"contrastive_loss", "temperature"}, [&] { loss(bad); });
  }
  for (Index i = 0; i < 6; ++i) CHECK((dx.data()[i] == 0 && de.data()[i] == 0));
  CHECK(std::isfinite(loss(0.05)));
}

TEST_CASE("a gradient with a size and no address is refused, not taken as one that is not wanted") {
  lm::Matrix<double> a(2, 3), b(2, 3), da(2, 3), db(2, 3);
  const std::vector<std::int32_t> labels{0, 1};
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::contrastive_workspace_bytes<double>(2, 2, 3) +
                                                         lm::loss_workspace_bytes<double>(2, 3)));
  const lm::Arena<> work{memory};
  const lm::MatrixView<double> nowhere{nullptr, 2, 3};
  check_error(lm::ErrorCode::null, {"squared_error_loss", "dy", "[2, 3]"},
              [&] { lm::squared_error_loss(be, a.view(), b.view(), nowhere, {}, work); });
  check_error(lm::ErrorCode::null, {"cross_entropy_loss", "dlogits", "[2, 3]"},
              [&] { lm::cross_entropy_loss(be, a.view(), view(labels), nowhere, {}, work); });
  check_error(lm::ErrorCode::null, {"contrastive_loss", "dx", "[2, 3]"},
              [&] { lm::contrastive_loss(be, a.view(), b.view(), view(labels), nowhere, db.view(), {}, work); });
  check_error(lm::ErrorCode::null, {"contrastive_loss", "dembeddings", "[2, 3]"},
              [&] { lm::contrastive_loss(be, a.view(), b.view(), view(labels), da.view(), nowhere, {}, work); });
}

TEST_CASE("the squared error of no entries is 0") {
  constexpr Index sizes[][2] = {{0, 3}, {3, 0}, {0, 0}};
  for (const auto& size : sizes) {
    for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
      const lm::Matrix<double> y(size[0], size[1]), target(size[0], size[1]);
      lm::Matrix<double> dy(size[0], size[1]);
      std::vector<std::byte> memory(static_cast<std::size_t>(lm::loss_workspace_bytes<double>(size[0], size[1])));
      CHECK(lm::squared_error_loss(be, y.view(), target.view(), dy.view(), {.into = into}, lm::Arena<>{memory}) == 0);
    }
  }
}

TEST_CASE("16-bit logits and outputs are summed in float and stored once") {
  lm::Matrix<lm::bfloat16> y(3, 2), target(3, 2), dy(3, 2);
  for (Index i = 0; i < 6; ++i) y.data()[i] = lm::narrow<lm::bfloat16>(static_cast<double>(i));
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::loss_workspace_bytes<float>(3, 2)));
  CHECK(lm::squared_error_loss(be, y.view(), target.view(), dy.view(), {}, lm::Arena<>{memory}) == 55.0f / 6);
  CHECK(lm::widen<float>(dy(2, 1)) == doctest::Approx(10.0 / 6).epsilon(0.005));
  const std::vector<std::int32_t> labels{0, -1, 1};
  CHECK(lm::cross_entropy_loss(be, y.view(), view(labels), lm::MatrixView<lm::bfloat16>{}, {}, lm::Arena<>{memory}) ==
        doctest::Approx((std::log(1 + std::exp(1.0)) + std::log(1 + std::exp(-1.0))) / 2));
}

TEST_CASE("contrastive: literal value, gradients to x and embeddings; zero vectors, labels −1, padding") {
  constexpr Index tokens = 20, tasks = 3, d = 5;
  for (const bool masked : {false, true}) {
    for (const bool mean : {false, true}) {
      Draws draw(410);
      lm::Matrix<double> x(tokens, d), e(tasks, d), dx(tokens, d), de(tasks, d);
      for (Index i = 0; i < tokens * d; ++i) x.data()[i] = draw();
      for (Index i = 0; i < tasks * d; ++i) e.data()[i] = draw();
      const std::vector<Index> offsets{0, 4, 9, 9, 15, tokens};
      reference::Sequence sequence;
      for (Index b = 0; b < 5; ++b) {
        for (Index t = offsets[static_cast<std::size_t>(b)]; t < offsets[static_cast<std::size_t>(b) + 1]; ++t) {
          sequence.push_back(b);
        }
      }
      const reference::Labels labels{0, 2, 1, -1, 1};
      reference::Mask valid;
      for (Index t = 0; masked && t < tokens; ++t) valid.push_back(t == 0 || t == 5 || t == 16 ? 0 : 1);
      std::vector<std::byte> memory(static_cast<std::size_t>(lm::contrastive_workspace_bytes<double>(5, tasks, d)));
      const lm::ContrastiveOptions<double> options{.weight = 0.1,
                                                   .temperature = 0.2,
                                                   .mean = mean,
                                                   .sequences = lm::Groups<>::by_segment(offsets.data(), 5),
                                                   .valid = view(valid)};
      const auto literal = [&] { return reference::contrastive(grid(x), grid(e), sequence, labels, valid, 0.2, mean); };
      CHECK(near(lm::contrastive_loss(be, x.view(), e.view(), view(labels), dx.view(), de.view(), options,
                                      lm::Arena<>{memory}),
                 literal()));
      const auto report = lm::gradient_check({{"x", flat(x), flat(dx)}, {"embeddings", flat(e), flat(de)}},
                                             [&] { return 0.1 * literal(); });
      CHECK_MESSAGE(report.ok(), report.text());

      for (Index j = 0; j < d; ++j) x(1, j) = x(0, j) = x(2, j) = x(3, j) = e(1, j) = 0;  // sequence 0 and task 1
      for (auto* m : {&dx, &de}) std::fill_n(m->data(), m->rows() * d, 0.0);
      CHECK(near(lm::contrastive_loss(be, x.view(), e.view(), view(labels), dx.view(), de.view(), options,
                                      lm::Arena<>{memory}),
                 literal()));
      for (Index j = 0; j < d; ++j) CHECK((dx(0, j) == 0 && dx(1, j) == 0 && de(1, j) == 0 && std::isfinite(de(0, j))));
    }
  }
}

TEST_CASE("rows may be their own sequences: MoRE on rows of a classifier") {
  lm::Matrix<double> x(2, 2), e(2, 2), dx(2, 2);
  x(0, 0) = x(1, 1) = e(0, 0) = e(1, 1) = 3;
  const std::vector<std::int32_t> labels{0, 1};
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::contrastive_workspace_bytes<double>(2, 2, 2)));
  CHECK(lm::contrastive_loss(be, x.view(), e.view(), view(labels), dx.view(), lm::MatrixView<double>{}, {},
                             lm::Arena<>{memory}) == doctest::Approx(std::log(1 + std::exp(-20.0))));
}

TEST_CASE("telemetry says what the router does") {
  Router r(40, 4, 2, true);
  lm::Matrix<std::int32_t> kept = r.chosen;
  double want_dropped = 0, entropy = 0;
  for (Index t = 0; t < 40; ++t) {
    for (Index s = 0; s < 2; ++s) {
      if (r.chosen(t, s) == 3) r.chosen(t, s) = 1;  // expert 3 is dead
      kept(t, s) = t % 5 == 0 ? -1 : r.chosen(t, s);
      want_dropped += t % 5 == 0 && reference::in(r.valid, t) ? 1 : 0;
    }
    for (Index e = 0; e < 4; ++e) entropy -= reference::in(r.valid, t) ? r.p(t, e) * std::log(r.p(t, e)) : 0;
    if (!reference::in(r.valid, t)) r.p(t, 0) = nan_value;
  }
  auto scores = r.scores();
  scores.ids = kept.view();
  lm::RouterTelemetry<double> seen(4);
  lm::telemetry(be, scores, seen, r.work());
  std::vector<double> load, importance;
  for (Index e = 0; e < 4; ++e) {
    load.push_back(reference::count_of(r.choice(), r.valid, e));
    importance.push_back(reference::importance_of(grid(r.p), r.valid, e));
    CHECK(near(seen.load()[e], load.back()));
    CHECK(near(seen.importance()[e], importance.back()));
  }
  const double n = reference::valid_rows(r.valid, 40);
  CHECK(seen.tokens() == n);
  CHECK(near(seen.entropy(), entropy / n));
  CHECK(near(seen.max_violation(), *std::max_element(load.begin(), load.end()) / (2 * n / 4) - 1));
  CHECK(seen.dropped() == want_dropped);
  CHECK(seen.dead() == 1);
  CHECK(near(seen.load_cv(), std::sqrt(reference::cv2(load))));
  CHECK(near(seen.importance_cv(), std::sqrt(reference::cv2(importance))));

  scores.ids = scores.chosen = {};  // dense: load is importance; 0 ln 0 = 0
  for (Index t = 0; t < 40; ++t) {
    for (Index e = 0; e < 4; ++e) r.p(t, e) = e == 1;
  }
  lm::telemetry(be, scores, seen, r.work());
  CHECK(seen.load()[1] == n);
  CHECK(seen.entropy() == 0);
  CHECK(seen.dead() == 3);
  for (auto& v : r.valid) v = 0;
  lm::telemetry(be, scores, seen, r.work());
  CHECK((seen.tokens() == 0 && seen.entropy() == 0 && seen.max_violation() == 0 && seen.load_cv() == 0));
}

TEST_CASE("three threads give the bits of one") {
  lm::ThreadPool pool(3);
  const lm::cpu::Backend threads{pool.executor()};
  Router a(700, 5, 1, true), b(700, 5, 1, true);
  CHECK(lm::balance_loss(be, a.scores(), {}, a.work()) == lm::balance_loss(threads, b.scores(), {}, b.work()));
  CHECK(lm::z_loss(be, a.scores(), {}, a.work()) == lm::z_loss(threads, b.scores(), {}, b.work()));
  CHECK(std::equal(a.dp.data(), a.dp.data() + 3500, b.dp.data()));
  CHECK(std::equal(a.dlogits.data(), a.dlogits.data() + 3500, b.dlogits.data()));
}

TEST_CASE("losses refuse what they cannot do, and write nothing") {
  Router r(8, 4, 2, true);
  auto s = r.scores();
  const auto refuses = [&](lm::ErrorCode code, std::initializer_list<std::string> parts, const auto& call) {
    check_error(code, parts, call);
    for (Index i = 0; i < 32; ++i) CHECK((r.dp.data()[i] == 0 && r.dlogits.data()[i] == 0));
  };
  const auto with = [&](const auto& change) {
    auto changed = s;
    change(changed);
    return changed;
  };
  refuses(lm::ErrorCode::state, {"balance_loss", "dp", "saves"},
          [&] { lm::balance_loss(be, with([](auto& c) { c.dp = {}; }), {}, r.work()); });
  refuses(lm::ErrorCode::shape, {"balance_loss", "dp", "7", "8"},
          [&] { lm::balance_loss(be, with([](auto& c) { c.dp.rows = 7; }), {}, r.work()); });
  refuses(lm::ErrorCode::shape, {"z_loss", "valid", "5", "8"},
          [&] { lm::z_loss(be, with([](auto& c) { c.valid.size = 5; }), {}, r.work()); });
  refuses(lm::ErrorCode::shape, {"balance_loss", "chosen", "0", "8"},
          [&] { lm::balance_loss(be, with([](auto& c) { c.ids = c.chosen = {}; }), {}, r.work()); });
  refuses(lm::ErrorCode::shape, {"balance_loss", "counts", "4", "5"}, [&] {
    const std::vector<double> counts(4);
    lm::balance_loss(be, s, {.counts = view(counts)}, r.work());
  });
  refuses(lm::ErrorCode::alias, {"z_loss", "dlogits", "logits"},
          [&] { lm::z_loss(be, with([&](auto& c) { c.dlogits = r.logits; }), {}, r.work()); });
  refuses(lm::ErrorCode::arena, {"balance_loss", "work", "too few"}, [&] {
    lm::balance_loss(be, s, {}, lm::Arena<>{r.memory.data(), 64});
  });
  refuses(lm::ErrorCode::value, {"routing_loss", "label 4", "row 2", "4 classes"}, [&] {
    const std::vector<std::int32_t> labels{0, 1, 4, 0, 0, 0, 0, 0};
    lm::routing_loss(be, s, {.labels = view(labels)}, r.work());
  });
  refuses(lm::ErrorCode::shape, {"localised_loss", "types", "2", "3"},
          [&] { lm::localised_loss(be, s, {.types = view(types).part(0, 2), .sequences = r.sequences()}, r.work()); });
  refuses(lm::ErrorCode::shape, {"localised_loss", "sequences", "8", "6"}, [&] {
    const std::vector<Index> offsets{0, 2, 4, 6};
    lm::localised_loss(be, s, {.types = view(types), .sequences = lm::Groups<>::by_segment(offsets.data(), 3)},
                       r.work());
  });
}

// ---- a loss beside a task, through an adapter -------------------------------------------------------------------------

namespace {

/// All gradients of Σ dy∘y + the losses that `add` adds to a saved forward, under MATH.md section 6.
template <class A, class Add>
void check_with_losses(typename A::Config config, const Add& add) {
  constexpr Index tokens = 12;
  config.d_in = 7;
  config.d_out = 5;
  config.dropout = 0.5;
  A adapter(config);
  Draws draw(420);
  lm::Matrix<double> x(tokens, 7), dx(tokens, 7), y(tokens, 5), dy(tokens, 5);
  for (auto* m : {&x, &dy}) {
    for (Index i = 0; i < m->rows() * m->cols(); ++i) m->data()[i] = draw();
  }
  auto gradient = lm::zeros_like(adapter);
  std::vector<lm::GradientClaim> claims{{"x", flat(x), flat(dx)}};
  A::visit(adapter, [&](const char* name, auto v, lm::ParameterGroup) {
    for (Index i = 0; i < v.rows * v.cols; ++i) v.data[i] = draw();
    claims.push_back({name, {v.data, v.rows * v.cols}, {}});
  });
  std::size_t next = 1;
  A::visit(gradient, [&](const char*, auto v, lm::ParameterGroup) {
    claims[next++].gradient = {v.data, v.rows * v.cols};
  });
  const std::vector<std::uint8_t> valid{1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0};
  const std::vector<Index> offsets{0, 4, 7, tokens};
  const auto bytes = [&](lm::Pass pass) { return lm::workspace_bytes(be, adapter, tokens, pass); };
  std::vector<std::byte> kept(static_cast<std::size_t>(lm::reserve_bytes(adapter, tokens))),
      scratch(static_cast<std::size_t>(bytes(lm::Pass::forward) + bytes(lm::Pass::backward) +
                                       lm::loss_workspace_bytes<double>(tokens, 8, 3)));
  const lm::Arena<> work{scratch};
  lm::Arena<> reserve{kept};
  const auto run = [&] {
    reserve.reset();
    return lm::forward(be, adapter, x, y, work,
                       {.save = &reserve,
                        .key = {.seed = 5, .site = lm::site("loss")},
                        .into = lm::Into::set,
                        .sequences = lm::Groups<>::by_segment(offsets.data(), 3),
                        .valid = view(valid)});
  };
  auto saved = run();
  CHECK(saved.scores.valid.data == valid.data());  // the batch's mask reaches the losses by itself
  CHECK(add(saved, work) > 0);
  lm::backward(be, adapter, saved, x, dy, dx, gradient, work);
  const auto report = lm::gradient_check(claims, [&] {
    const auto now = run();
    double loss = add(now, work);
    for (Index i = 0; i < tokens * 5; ++i) loss += dy.data()[i] * y.data()[i];
    return loss;
  });
  CHECK_MESSAGE(report.ok(), report.text());
}

}  // namespace

TEST_CASE("peer defect minimind#140: a loss computed and never added; LoRAMoE with localised balance and z-loss") {
  check_with_losses<lm::LoraMoe<double>>({.experts = 4, .rank = 2}, [](const auto& saved, lm::Arena<> work) {
    return 3 * lm::localised_loss(be, saved, {.weight = 3, .delta = 0.2, .types = view(types)}, work) +
           0.5 * lm::z_loss(be, saved, {.weight = 0.5}, work);
  });
}

TEST_CASE("MoLA with its balance loss, DeepSeek's and z-loss: counts are constant, all gradients right") {
  check_with_losses<lm::Mola<double>>({.experts = 4, .rank = 2}, [](const auto& saved, lm::Arena<> work) {
    return 2 * lm::balance_loss(be, saved, {.form = lm::Balance::mola, .weight = 2}, work) +
           lm::sequence_balance_loss(be, saved, {}, work) + 0.3 * lm::z_loss(be, saved, {.weight = 0.3}, work);
  });
}

TEST_CASE("MoLA with sigmoid scores: losses see σ/Σσ") {
  check_with_losses<lm::Mola<double>>(
      {.experts = 4, .rank = 2, .rule = {.k = 2, .scoring = lm::Scoring::sigmoid}},
      [](const auto& saved, lm::Arena<> work) { return 2 * lm::balance_loss(be, saved, {.weight = 2}, work); });
}

TEST_CASE("TeamLoRA with the CV² of its importance") {
  check_with_losses<lm::TeamLora<double>>(
      {.experts = 3, .rank = 2, .hidden = 6}, [](const auto& saved, lm::Arena<> work) {
        return 4 * lm::balance_loss(be, saved, {.form = lm::Balance::importance_cv2, .weight = 4}, work);
      });
}

TEST_CASE("peer defect: padding counted, of another axis; as many tasks as tokens, and no token mask on tasks") {
  using A = lm::MoeLora<double>;
  A adapter({.d_in = 3, .d_out = 2, .tasks = 4, .experts = 2, .rank = 2, .embedding = 3});
  lm::Matrix<double> x(4, 3), y(4, 2);
  const std::vector<std::int32_t> task{0, 1, 2, 3};
  const std::vector<std::uint8_t> valid{1, 0, 0, 1};
  std::vector<std::byte> kept(static_cast<std::size_t>(lm::reserve_bytes(adapter, 4))),
      scratch(static_cast<std::size_t>(lm::workspace_bytes(be, adapter, 4)));
  lm::Arena<> reserve{kept};
  const auto saved =
      lm::forward(be, adapter, x, y, lm::Arena<>{scratch},
                  {.save = &reserve, .tasks = lm::Groups<>::by_id(task.data(), 4), .valid = view(valid)});
  CHECK(saved.scores.logits.rows == 4);
  CHECK(saved.scores.valid.empty());
  CHECK(saved.call.batch.valid.data == valid.data());
}

// MoA: against literal loops and finite differences (dropout 0.5, token mask, ragged sequences, empty ones too), its
// decisions, its domains, and the defects that PEERS.md names.
#include <loramix/adapter/domains.hpp>
#include <loramix/ops/logit_loss.hpp>
#include <loramix/train/gradient_check.hpp>

#include <numeric>

#include "adapter/kinds.hpp"
#include "reference/draws.hpp"
#include "reference/moa.hpp"

namespace loramix_test {
namespace {

using lm::Pooling;

constexpr Index T = 23, L = 7;
constexpr Index ends[L + 1] = {0, 0, 5, 5, 12, 13, 21, 23};  // sequences 0 and 2 are empty
constexpr std::int32_t labels[L] = {2, 0, -1, 1, -1, -1, 2};
constexpr std::uint8_t valid[T] = {1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 1,
                                   0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1};  // 12: all of 4

lm::ForwardOptions<lm::Space::host> ragged() {
  return {.sequences = lm::Groups<>::by_segment(ends, L), .labels = {labels, L}, .valid = {valid, T}};
}
lm::MoaConfig small(Pooling pooling = Pooling::mean, Index places = 0) {
  return {.d_in = 13,
          .d_out = 11,
          .experts = 3,
          .rank = 2,
          .alpha = 3,
          .dropout = 0.5,
          .places = places,
          .pooling = pooling};
}

/// The literal case of a batch.
template <class B>
reference::MoaCase literal(const B& b) {
  const lm::MoaConfig& c = b.adapter.config();
  reference::MoaCase m{T,
                       c.d_in,
                       c.d_out,
                       c.experts,
                       c.rank,
                       {},
                       {},
                       {},
                       {},
                       {},
                       {},
                       {},
                       {},
                       {},
                       b.adapter.scale(),
                       c.pooling == Pooling::last};
  const auto values = [](auto view) {
    std::vector<double> v;
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) v.push_back(view(i, j));
    }
    return v;
  };
  m.x = values(b.x.view());
  m.A = values(b.adapter.A().row_range(0, c.experts * c.rank));
  m.B = values(b.adapter.B().transposed().row_range(0, c.experts * c.rank));
  m.W = values(b.adapter.gate().router.row_range(0, c.experts));
  m.b = values(b.adapter.gate().bias.col_range(0, c.experts));
  m.offsets.assign(ends, ends + L + 1);
  m.label.assign(labels, labels + L);
  m.valid.assign(valid, valid + T);
  for (Index t = 0; t < T; ++t) {
    for (Index i = 0; i < c.d_in; ++i) {
      const std::uint64_t token = b.key.first_token + static_cast<std::uint64_t>(t);
      m.kept.push_back(reference::keep(b.key.seed, b.key.site, b.key.step, token, i, 32768) ? 2.0 : 0.0);
    }
  }
  return m;
}

TEST_CASE("values: the label's expert, else the argmax of the pooled row; padding follows its sequence") {
  for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
    for (const Index places : {0, 5}) {
      Batch<lm::Moa<double>> b(small(pooling, places), T, 3);
      auto y = b.zeros_y();
      lm::Arena<> reserve = b.memory.arena();
      auto options = ragged();
      options.save = &reserve;
      options.key = b.key;
      const auto saved = b.forward(y, options);
      const auto scores = saved.scores;
      const reference::MoaCase want = literal(b);
      REQUIRE(scores.p.rows == L);
      REQUIRE(scores.p.cols == 3);
      double largest = 0;
      for (Index s = 0; s < L; ++s) {
        CHECK(scores.ids(s, 0) == want.expert(s));
        for (Index e = 0; e < 3; ++e) {
          CHECK(std::fabs(scores.logits(s, e) - want.logits(s)[static_cast<std::size_t>(e)]) <= 1e-13);
          CHECK(std::fabs(scores.p(s, e) - want.p(s)[static_cast<std::size_t>(e)]) <= 1e-13);
        }
      }
      for (Index t = 0; t < T; ++t) {
        for (Index o = 0; o < 11; ++o) {
          const double delta = want.delta(t, o, want.expert(want.sequence(t)));
          REQUIRE(std::fabs(y(t, o) - delta) <= 1e-13);
          largest = std::fmax(largest, std::fabs(delta));
        }
      }
      CHECK(largest > 0.1);
    }
  }
}

/// All gradients against differences of the literal loops.
void check_gradients(lm::MoaConfig config, bool with_labels, lm::Keep keep) {
  Batch<lm::Moa<double>> b(config, T, 9);
  constexpr double eta = 0.7;
  auto grad = lm::zeros_like(b.adapter);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  lm::Arena<> reserve = b.memory.arena();
  auto options = ragged();
  if (!with_labels) options.labels = {};
  options.save = &reserve;
  options.key = b.key;
  options.keep = keep;
  auto saved = b.forward(y, options);
  reference::MoaCase at = literal(b);
  if (!with_labels) at.label.assign(L, -1);
  if (with_labels) {
    const double value = lm::routing_loss(b.be, saved, {.weight = eta}, b.work.arena());
    CHECK(std::fabs(value - at.routing_loss()) <= 1e-13);
  }
  b.backward(saved, dx, grad);

  // What is called constant: the choice, and stop(p).
  std::vector<Index> chosen;
  std::vector<double> stopped;
  for (Index s = 0; s < L; ++s) {
    chosen.push_back(at.expert(s));
    stopped.push_back(at.p(s)[static_cast<std::size_t>(chosen.back())]);
  }
  const auto loss = [&] {
    double sum = with_labels ? eta * at.routing_loss() : 0;
    std::vector<double> m(L, 1.0);
    for (std::size_t s = 0; s < L && config.straight_through; ++s) {
      if (at.label[s] < 0) m[s] += at.p(static_cast<Index>(s))[static_cast<std::size_t>(chosen[s])] - stopped[s];
    }
    for (Index t = 0; t < T; ++t) {
      const auto s = static_cast<std::size_t>(at.sequence(t));
      for (Index o = 0; o < 11; ++o) sum += b.dy(t, o) * m[s] * at.delta(t, o, chosen[s]);
    }
    return sum;
  };
  std::vector<double> dB;  // rank by rank, as the literal B
  for (Index j = 0; j < 6; ++j) {
    for (Index o = 0; o < 11; ++o) dB.push_back(grad.B()(o, j));
  }
  const auto view = [](std::vector<double>& v) {
    return lm::VectorView<double>(v.data(), static_cast<Index>(v.size()));
  };
  const lm::GradientReport report = lm::gradient_check({{"x", view(at.x), {dx.data(), T * 13}},
                                                        {"A", view(at.A), {grad.A().data, 6 * 13}},
                                                        {"B", view(at.B), view(dB)},
                                                        {"router", view(at.W), {grad.gate().router.data, 3 * 13}},
                                                        {"bias", view(at.b), {grad.gate().bias.data, 3}}},
                                                       loss);
  CHECK_MESSAGE(report.ok(), report.text());
  for (const lm::CheckedTensor& tensor : report.tensors) CHECK_MESSAGE(tensor.norm > 0, tensor.name);
}

TEST_CASE("gradients with the routing loss, which reaches X, the router and its bias") {
  for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
    check_gradients(small(pooling), true, lm::Keep::z);
    check_gradients(small(pooling, 4), true, lm::Keep::recompute);
  }
}

TEST_CASE("ablation without labels: argmax with the straight-through multiplier") {
  for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
    lm::MoaConfig config = small(pooling);
    config.straight_through = true;
    check_gradients(config, false, lm::Keep::z);
    check_gradients(config, true, lm::Keep::recompute);  // labels −1 only
  }
}

TEST_CASE("without the routing loss the label's expert trains and the router does not") {
  Batch<lm::Moa<double>> b(small(), T);
  auto grad = lm::zeros_like(b.adapter);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  lm::Arena<> reserve = b.memory.arena();
  const std::int32_t all_one[L] = {1, 1, 1, 1, 1, 1, 1};
  auto options = ragged();
  options.labels = {all_one, L};
  options.save = &reserve;
  options.key = b.key;
  auto saved = b.forward(y, options);
  b.backward(saved, dx, grad);
  double one = 0;
  for (Index j = 0; j < 6; ++j) {
    for (Index c = 0; c < 13; ++c) {
      if (j / 2 == 1) one += std::fabs(grad.A()(j, c));
      if (j / 2 != 1) CHECK(grad.A()(j, c) == 0);
    }
  }
  CHECK(one > 0);
  for (Index c = 0; c < 3 * 13; ++c) CHECK(grad.gate().router.data[c] == 0);
}

TEST_CASE("PEERS 1.5: element 0 of the batch does not decide for the others") {
  Batch<lm::Moa<double>> b(small(), T, 3);
  auto y = b.zeros_y(), alone = b.zeros_y();
  auto options = ragged();
  options.labels = {};
  b.forward(y, options);
  lm::Matrix<std::int32_t> ids(1, L);
  lm::route(b.be, b.adapter, b.x.view(), {ids.data(), L}, b.work.arena(), options);
  bool differ = false;
  for (const Index s : {1, 3, 4, 5, 6}) {
    differ = differ || ids(0, s) != ids(0, 1);
    const Index n = ends[s + 1] - ends[s], one[2] = {0, n};
    std::int32_t id = -1;
    const lm::ForwardOptions<lm::Space::host> by_itself{.sequences = lm::Groups<>::by_segment(one, 1),
                                                        .valid = {valid + ends[s], n}};
    const lm::MatrixView<const double> x = b.x.view().row_range(ends[s], n);
    lm::route(b.be, b.adapter, x, {&id, 1}, b.work.arena(), by_itself);
    CHECK(id == ids(0, s));
    lm::forward(b.be, b.adapter, x, alone.view().row_range(ends[s], n), b.work.arena(), by_itself);
  }
  CHECK(differ);
  CHECK(same_bits(y, alone));
}

TEST_CASE("padding decides nothing, whatever it holds") {
  for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
    Batch<lm::Moa<double>> b(small(pooling), T, 3);
    std::int32_t before[L], after[L];
    lm::route(b.be, b.adapter, b.x.view(), {before, L}, b.work.arena(), ragged());
    for (Index t = 0; t < T; ++t) {
      for (Index c = 0; valid[t] == 0 && c < 13; ++c) b.x(t, c) = nan;
    }
    lm::route(b.be, b.adapter, b.x.view(), {after, L}, b.work.arena(), ragged());
    CHECK(std::equal(before, before + L, after));
  }
}

TEST_CASE("ties go to the lower expert, NaN sorts last and shows where the router chose") {
  Batch<lm::Moa<float>> b({.d_in = 2, .d_out = 3, .experts = 4, .rank = 1}, 3);
  for (Index e = 0; e < 4; ++e) {
    b.adapter.gate().bias(0, e) = 0;
    for (Index c = 0; c < 2; ++c) b.adapter.gate().router(e, c) = e == 0 ? -1.0f : 1.0f;
  }
  for (Index i = 0; i < 6; ++i) b.x.data()[i] = 0.5f;
  std::int32_t ids[3];
  lm::route(b.be, b.adapter, b.x.view(), {ids, 3}, b.work.arena());  // without sequences every token is one
  CHECK(ids[0] == 1);
  b.adapter.gate().bias(0, 1) = std::numeric_limits<float>::quiet_NaN();
  auto y = b.zeros_y(), forced = b.zeros_y();
  lm::route(b.be, b.adapter, b.x.view(), {ids, 3}, b.work.arena());
  CHECK(ids[0] == 2);
  b.forward(y);
  CHECK(y(0, 0) != y(0, 0));
  b.forward(forced, {.labels = {ids, 3}});
  CHECK(forced(0, 0) == forced(0, 0));
  for (Index e = 0; e < 4; ++e) b.adapter.gate().bias(0, e) = std::numeric_limits<float>::quiet_NaN();
  lm::route(b.be, b.adapter, b.x.view(), {ids, 3}, b.work.arena());
  CHECK(ids[0] == 0);
}

TEST_CASE("policies: vote, last, first; ties to the lower expert, layers without a decision do not vote") {
  lm::Matrix<std::int32_t> decisions(4, 5);
  const std::int32_t of[4][5] = {{2, 1, 0, -1, -1}, {1, 2, 2, 3, -1}, {1, 2, 2, -1, -1}, {2, 1, 3, -1, -1}};
  for (Index l = 0; l < 4; ++l) std::copy(of[l], of[l] + 5, &decisions(l, 0));
  const lm::cpu::Backend be;
  // [policies]
  const auto by = [&](lm::Decision decision) {
    std::vector<std::int32_t> ids(5, 77);
    lm::decide(be, decision, std::as_const(decisions).view(), 4, {ids.data(), 5});
    return ids;
  };
  // [/policies]
  CHECK(by(lm::Decision::vote) == std::vector<std::int32_t>{1, 1, 2, 3, -1});
  CHECK(by(lm::Decision::first) == std::vector<std::int32_t>{2, 1, 0, -1, -1});
  CHECK(by(lm::Decision::last) == std::vector<std::int32_t>{2, 1, 3, -1, -1});
  check_error(lm::ErrorCode::shape, {"decide", "ids", "4", "5"}, [&] {
    std::int32_t ids[4];
    lm::decide(be, lm::Decision::vote, std::as_const(decisions).view(), 4, {ids, 4});
  });
}

TEST_CASE("decisions of one router serve the other matrices of its block, and forced ids any layer") {
  Batch<lm::Moa<double>> b(small(), T, 3);
  lm::MoaConfig other = small();
  other.router = false;
  Batch<lm::Moa<double>> second(other, T, 3);
  std::copy_n(b.adapter.A().data, 6 * 13, second.adapter.A().data);
  std::copy_n(b.adapter.B().data, 6 * 11, second.adapter.B().data);
  second.x = b.x;
  auto y = b.zeros_y(), y2 = b.zeros_y(), none = b.zeros_y();
  std::int32_t ids[L];
  auto options = ragged();
  options.labels = {};
  options.key = b.key;
  b.forward(y, options);
  // [decision]
  lm::route(b.be, b.adapter, b.x.view(), {ids, L}, b.work.arena(), options);
  second.forward(none, options);  // nobody decided
  options.labels = {ids, L};
  second.forward(y2, options);
  // [/decision]
  CHECK(same_bits(y, y2));
  CHECK(same_bits(none, b.zeros_y()));
  CHECK_FALSE(same_bits(y, none));
  lm::Arena<> reserve = second.memory.arena();
  options.save = &reserve;
  auto grad = lm::zeros_like(second.adapter);
  auto saved = second.forward(y2, options);
  second.backward(saved, {}, grad);
  CHECK(lm::parameter_count(second.adapter) == 6 * 13 + 6 * 11);
}

TEST_CASE("built from LoRAs: forced to a domain it is that LoRA") {
  Random random(5);
  std::vector<lm::Lora<float>> loras;
  for (int e = 0; e < 3; ++e) {
    loras.emplace_back(lm::LoraConfig{.d_in = 13, .d_out = 11, .rank = 4, .alpha = 5, .rank_stabilised = true});
    fill_parameters(loras.back(), random);
  }
  const lm::Moa<float> moa = lm::Moa<float>::from(loras, {.seed = 3, .site = "block"});
  CHECK(moa.config().experts == 3);
  CHECK(moa.scale() == doctest::Approx(2.5));
  CHECK(moa.gate().router(2, 5) != 0);
  CHECK(moa.gate().bias(0, 2) == 0);
  Batch<lm::Moa<float>> b(moa.config(), 9);
  b.adapter = moa;
  for (std::int32_t e = 0; e < 3; ++e) {
    const lm::Lora<float> back = lm::domain(moa, e);
    CHECK(std::equal(back.A().data, back.A().data + 4 * 13, loras[static_cast<std::size_t>(e)].A().data));
    CHECK(std::equal(back.B().data, back.B().data + 4 * 11, loras[static_cast<std::size_t>(e)].B().data));
    const std::vector<std::int32_t> ids(9, e);
    auto y = b.zeros_y(), want = b.zeros_y();
    b.forward(y, {.labels = {ids.data(), 9}});
    Memory work(lm::workspace_bytes(b.be, back, 9));
    lm::forward(b.be, back, b.x, want, work.arena());
    // Sums of 13 · 4 terms of size at most 1, times a scale of 2.5, in another order.
    for (Index i = 0; i < 9 * 11; ++i) REQUIRE(std::fabs(y.data()[i] - want.data()[i]) <= 2.5 * 52 * 52 * 0x1p-24);
    // The exact merge of a domain, and back.
    auto weights = random_matrix<float>(11, 13, b.random);
    const auto before = weights;
    const auto merged = lm::merge_domain(b.be, moa, e, weights.view());
    for (Index o = 0; o < 11; ++o) {
      for (Index c = 0; c < 13; ++c) {
        double delta = 0;
        for (Index j = 0; j < 4; ++j) delta += double{back.B()(o, j)} * double{back.A()(j, c)};
        REQUIRE(std::fabs(weights(o, c) - (before(o, c) + 2.5 * delta)) <= 16 * 0x1p-24);
      }
    }
    CHECK_FALSE(same_bits(weights, before));
    merged.undo(weights.view());
    CHECK(same_bits(weights, before));
  }
  const std::vector<lm::Lora<float>> mixed{lm::Lora<float>({.d_in = 3, .d_out = 2, .rank = 1}),
                                           lm::Lora<float>({.d_in = 3, .d_out = 2, .rank = 2})};
  check_error(lm::ErrorCode::shape, {"Mixture::from", "rank 2", "is 1"}, [&] { lm::Moa<float>::from(mixed, {}); });
  const std::vector<lm::Lora<float>> scales{lm::Lora<float>({.d_in = 3, .d_out = 2, .rank = 1}),
                                            lm::Lora<float>({.d_in = 3, .d_out = 2, .rank = 1, .alpha = 3})};
  check_error(lm::ErrorCode::value, {"Mixture::from", "another scale"}, [&] { lm::Moa<float>::from(scales, {}); });
  check_error(lm::ErrorCode::value, {"Mixture::from", "0"}, [] { lm::Moa<float>::from({}, {}); });
}

TEST_CASE("add_domain: old parameters, old logits and old domains' outputs keep every bit") {
  for (const Index tokens : {Index{23}, Index{200}}) {
    lm::MoaConfig config{.d_in = 70, .d_out = 37, .experts = 2, .rank = 3, .places = 5};
    Batch<lm::Moa<float>> b(config, tokens, 7);
    const std::vector<std::int32_t> before_ids = [&] {
      std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
      lm::route(b.be, b.adapter, b.x.view(), {ids.data(), tokens}, b.work.arena());
      return ids;
    }();
    const auto run = [&](lm::Matrix<float>& y) {
      lm::Arena<> reserve = b.memory.arena();
      const auto saved = b.forward(y, {.save = &reserve});
      const auto scores = saved.scores;
      lm::Matrix<float> logits(tokens, 2);
      std::vector<std::int32_t> ids;
      for (Index s = 0; s < tokens; ++s) {
        for (Index e = 0; e < 2; ++e) logits(s, e) = scores.logits(s, e);
        ids.push_back(scores.ids(s, 0));
      }
      return std::pair(logits, ids);
    };
    auto y = b.zeros_y();
    auto [logits, ids] = run(y);
    CHECK(ids == before_ids);
    const lm::Moa<float> old = b.adapter;
    for (Index round = 0; round < 3; ++round) {
      // [add]
      lm::Lora<float> lora({.d_in = 70, .d_out = 37, .rank = 3});
      fill_parameters(lora, b.random);
      lm::add_domain(b.adapter, lora);
      // [/add]
      b.memory = Memory(lm::reserve_bytes(b.adapter, tokens));
      auto now = b.zeros_y();
      const auto [new_logits, new_ids] = run(now);
      CHECK(same_bits(logits, new_logits));
      Index kept = 0;
      for (Index t = 0; t < tokens; ++t) {
        if (new_ids[static_cast<std::size_t>(t)] >= 2) continue;
        CHECK(new_ids[static_cast<std::size_t>(t)] == ids[static_cast<std::size_t>(t)]);
        REQUIRE(std::memcmp(&now(t, 0), &y(t, 0), 37 * sizeof(float)) == 0);
        ++kept;
      }
      CHECK(kept > tokens / 10);
      const lm::Lora<float> back = lm::domain(b.adapter, 2 + round);
      CHECK(same_parameters(back, lora));
    }
    CHECK(std::memcmp(b.adapter.A().data, old.A().data, 6 * 70 * sizeof(float)) == 0);
    CHECK(std::memcmp(b.adapter.B().data, old.B().data, 6 * 37 * sizeof(float)) == 0);
    CHECK(std::memcmp(b.adapter.gate().router.data, old.gate().router.data, 2 * 70 * sizeof(float)) == 0);
    CHECK(std::memcmp(b.adapter.gate().bias.data, old.gate().bias.data, 2 * sizeof(float)) == 0);
    for (Index c = 0; c < 70; ++c) {
      const double mean = (double{old.gate().router(0, c)} + double{old.gate().router(1, c)}) / 2;
      CHECK(b.adapter.gate().router(2, c) == static_cast<float>(mean));
    }
    CHECK(b.adapter.gate().bias(0, 2) == 0);
    check_error(lm::ErrorCode::value, {"add_domain", "places", "5", "reserve_domains"},
                [&] { lm::add_domain(b.adapter, lm::Lora<float>({.d_in = 70, .d_out = 37, .rank = 3})); });
    lm::reserve_domains(b.adapter, 8);
    CHECK(std::memcmp(b.adapter.A().data, old.A().data, 6 * 70 * sizeof(float)) == 0);
    lm::add_domain(b.adapter, lm::Lora<float>({.d_in = 70, .d_out = 37, .rank = 3}));
    CHECK(b.adapter.config().experts == 6);
  }
}

TEST_CASE("remove_domain: higher ids move down; the last one stays") {
  Batch<lm::Moa<float>> b({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2}, 5);
  const lm::Moa<float> old = b.adapter;
  lm::remove_domain(b.adapter, 1);
  CHECK(b.adapter.config().experts == 2);
  CHECK(same_parameters(lm::domain(b.adapter, 0), lm::domain(old, 0)));
  CHECK(same_parameters(lm::domain(b.adapter, 1), lm::domain(old, 2)));
  for (Index c = 0; c < 13; ++c) CHECK(b.adapter.gate().router(1, c) == old.gate().router(2, c));
  CHECK(b.adapter.gate().bias(0, 1) == old.gate().bias(0, 2));
  lm::add_domain(b.adapter, lm::domain(old, 1));  // the place is free again
  CHECK(same_parameters(lm::domain(b.adapter, 2), lm::domain(old, 1)));
  lm::remove_domain(b.adapter, 2);
  lm::remove_domain(b.adapter, 1);
  check_error(lm::ErrorCode::value, {"remove_domain", "domain", "5"}, [&] { lm::remove_domain(b.adapter, 5); });
  check_error(lm::ErrorCode::value, {"remove_domain", "left"}, [&] { lm::remove_domain(b.adapter, 0); });
}

TEST_CASE("refit: one expert trained alone, by itself or under a mask") {
  Batch<lm::Moa<double>> b(small(), T, 3);
  const lm::Moa<double> old = b.adapter;
  // [refit]
  lm::Lora<double> lora = lm::domain(b.adapter, 1);
  for (Index i = 0; i < 2 * 13; ++i) lora.A().data[i] += 1;
  lm::set_domain(b.adapter, 1, lora);
  CHECK(same_parameters(lm::domain(b.adapter, 1), lora));
  CHECK(same_parameters(lm::domain(b.adapter, 0), lm::domain(old, 0)));
  CHECK(same_parameters(lm::domain(b.adapter, 2), lm::domain(old, 2)));
  // [/refit]

  auto grad = lm::zeros_like(b.adapter);
  fill_parameters(grad, b.random);
  const auto all = grad;
  lm::keep_domain(grad, 1);
  for (Index j = 0; j < 6; ++j) {
    for (Index c = 0; c < 13; ++c) CHECK(grad.A()(j, c) == (j / 2 == 1 ? all.A()(j, c) : 0));
    for (Index o = 0; o < 11; ++o) CHECK(grad.B()(o, j) == (j / 2 == 1 ? all.B()(o, j) : 0));
  }
  for (Index i = 0; i < 3 * 13; ++i) CHECK(grad.gate().router.data[i] == 0);
}

TEST_CASE("ablation: a classifier by itself is a MoA of rank 0") {
  Batch<lm::Moa<double>> b({.d_in = 13, .d_out = 11, .experts = 3, .rank = 0}, T, 3);
  auto grad = lm::zeros_like(b.adapter);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  lm::Arena<> reserve = b.memory.arena();
  auto options = ragged();
  options.save = &reserve;
  auto saved = b.forward(y, options);
  CHECK(lm::routing_loss(b.be, saved, {}, b.work.arena()) > 0);
  b.backward(saved, dx, grad);
  CHECK(same_bits(y, b.zeros_y()));
  CHECK(grad.gate().bias(0, 0) != 0);
  CHECK_FALSE(same_bits(dx, b.zeros_dx()));
}

TEST_CASE("a frozen adapter gives the same dx; threads and saving change no bit") {
  Batch<lm::Moa<float>> b(small(), T, 3);
  auto dx = b.zeros_dx(), dx_frozen = b.zeros_dx(), y = b.zeros_y(), plain = b.zeros_y(), threaded = b.zeros_y();
  auto grad = lm::zeros_like(b.adapter);
  const auto run = [&](lm::Matrix<float>& into, auto& gradient) {
    lm::Arena<> reserve = b.memory.arena();
    auto options = ragged();
    options.save = &reserve;
    options.key = b.key;
    options.into = lm::Into::set;
    auto saved = b.forward(y, options);
    const auto scores = saved.scores;
    for (Index e = 0; e < 3; ++e) scores.dp(1, e) += static_cast<float>(e);
    b.backward(saved, into, gradient);
  };
  run(dx, grad);
  run(dx_frozen, lm::frozen);
  CHECK(same_bits(dx, dx_frozen));
  auto options = ragged();
  options.key = b.key;
  b.forward(plain, options);
  lm::ThreadPool pool(3);
  const lm::cpu::Backend be{pool.executor()};
  Memory work(lm::workspace_bytes(be, b.adapter, T));
  lm::forward(be, b.adapter, b.x, threaded, work.arena(), options);
  CHECK(same_bits(plain, y));
  CHECK(same_bits(plain, threaded));
}

TEST_CASE("what a batch must say") {
  Batch<lm::Moa<double>> b(small(), T);
  auto y = random_matrix<double>(T, 11, b.random);
  const auto before = y;
  const std::int32_t bad[L] = {0, 1, 2, 3, 0, 0, 0}, short_labels[2] = {0, 0};
  auto options = ragged();
  options.labels = {bad, L};
  check_error(lm::ErrorCode::value, {"forward", "labels", "domain 3", "sequence 3", "3 domains"},
              [&] { b.forward(y, options); });
  options.labels = {short_labels, 2};
  check_error(lm::ErrorCode::shape, {"forward", "labels", "2", "7"}, [&] { b.forward(y, options); });
  options.labels = {};
  const std::int32_t ids[T] = {};
  options.sequences = lm::Groups<>::by_id(ids, 1);
  check_error(lm::ErrorCode::value, {"forward", "sequences", "segments"}, [&] { b.forward(y, options); });
  std::vector<Index> many(T + 3, T);
  options.sequences = lm::Groups<>::by_segment(many.data(), T + 2);
  check_error(lm::ErrorCode::shape, {"forward", "sequences", "25", "23"}, [&] { b.forward(y, options); });
  CHECK(same_bits(y, before));
  lm::Matrix<double> nothing(0, 13), no_y(0, 11);
  const Index empty[3] = {0, 0, 0};
  lm::forward(b.be, b.adapter, nothing, no_y, b.work.arena(), {.sequences = lm::Groups<>::by_segment(empty, 2)});
}

}  // namespace
}  // namespace loramix_test

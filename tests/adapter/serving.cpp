// Many LoRAs in one call: against a call per adapter, by token and by segment; adapters that come and go while other
// threads run forward on the old snapshot; what PEERS.md section 3 asks for, item by item.
#include <loramix/adapter/serving.hpp>

#include <atomic>
#include <thread>

#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

constexpr Index d_in = 37, d_out = 29;
using Ids = std::vector<std::int32_t>;

template <class X>
lm::Lora<X> lora_of(Index rank, double alpha, std::uint64_t site) {
  lm::Lora<X> lora({.d_in = d_in, .d_out = d_out, .rank = rank, .alpha = alpha});
  Random random(site);
  fill_parameters(lora, random);
  return lora;
}

/// A server of four LoRAs of ranks 3, 8, 0, 1 in slots 0 to 3, and what they were.
template <class X>
struct Server {
  Server() {
    for (const auto& [rank, alpha] : {std::pair<Index, double>{3, 5}, {8, 16}, {0, 1}, {1, 0.25}}) {
      loras.push_back(lora_of<X>(rank, alpha, 20 + loras.size()));
      CHECK(serving.add(loras.back()) == static_cast<Index>(loras.size()) - 1);
    }
  }
  std::vector<lm::Lora<X>> loras;
  lm::Serving<X> serving{d_in, d_out};
};

template <class X>
void serve(const lm::Served<X>& served, const lm::Matrix<X>& x, lm::Matrix<X>& y, lm::Groups<> tasks) {
  const lm::cpu::Backend be;
  Memory work(lm::workspace_bytes(be, served, x.rows()));
  lm::forward(be, served, x, y, work.arena(), {.tasks = tasks});
}

/// y of a call per adapter, token by token.
template <class X>
lm::Matrix<X> one_by_one(const std::vector<lm::Lora<X>>& loras, const lm::Matrix<X>& x, lm::Matrix<X> y,
                         const Ids& ids) {
  const lm::cpu::Backend be;
  for (Index t = 0; t < x.rows(); ++t) {
    const std::int32_t id = ids[static_cast<std::size_t>(t)];
    if (id < 0) continue;
    const lm::Lora<X>& lora = loras[static_cast<std::size_t>(id)];
    Memory work(lm::workspace_bytes(be, lora, 1));
    lm::forward(be, lora, x.view().row_range(t, 1), y.view().row_range(t, 1), work.arena());
  }
  return y;
}

/// |x|, |A|, |B| ≤ 1, s ≤ 2, r ≤ 8: sums of 37 · 8 terms, times the roundings along them, and the last one of y.
template <class X>
void check_close(const lm::Matrix<X>& got, const lm::Matrix<X>& want) {
  const double last = lm::is_16bit<X> ? 0x1p-8 : 0x1p-24;
  for (Index i = 0; i < got.rows() * got.cols(); ++i) {
    const double a = lm::widen<double>(got.data()[i]), b = lm::widen<double>(want.data()[i]);
    REQUIRE(std::fabs(a - b) <= 2 * 37 * 8 * (37 + 12 + 3) * 0x1p-24 + 2 * last * std::fabs(b));
  }
}

TEST_CASE_TEMPLATE("PEERS 3.4: many adapters in one batch, mixed ranks and scales, by token and by segment", X, float,
                   double, lm::bfloat16) {
  Server<X> s;
  const auto served = s.serving.snapshot();
  CHECK(served->slots() == 4);
  CHECK(served->ranks() == 12);
  Random random(3);
  const auto x = random_matrix<X>(70, d_in, random), y0 = random_matrix<X>(70, d_out, random);
  Ids ids(70);
  for (std::size_t t = 0; t < 70; ++t)
    ids[t] = static_cast<std::int32_t>(t * t % 6) - 1 > 3 ? -1 : static_cast<std::int32_t>(t * t % 5) - 1;
  auto y = y0;
  serve(*served, x, y, lm::Groups<>::by_id(ids.data(), 4));
  check_close(y, one_by_one(s.loras, x, y0, ids));
  CHECK_FALSE(same_bits(y, y0));

  // [by-segment]
  const Index ends[6] = {0, 20, 20, 33, 64, 70};
  const std::int32_t of[5] = {1, 0, -1, 3, 2};
  // [/by-segment]
  for (Index t = 0; t < 70; ++t) ids[static_cast<std::size_t>(t)] = t < 20 ? 1 : t < 33 ? -1 : t < 64 ? 3 : 2;
  // [call]
  auto by_segment = y0, by_token = y0;
  serve(*served, x, by_segment, lm::Groups<>::by_segment(ends, 5, of, 4));
  serve(*served, x, by_token, lm::Groups<>::by_id(ids.data(), 4));
  CHECK(same_bits(by_segment, by_token));
  // [/call]
  check_close(by_segment, one_by_one(s.loras, x, y0, ids));
}

TEST_CASE("PEERS 3.26: a token without an adapter costs no write of y, nor does its x matter") {
  Server<float> s;
  Random random(4);
  auto x = random_matrix<float>(70, d_in, random);
  lm::Matrix<float> y(70, d_out), y0;
  for (Index i = 0; i < 70 * d_out; ++i) {  // -0.0 + 0.0 would be +0.0, and a NaN would lose its payload
    y.data()[i] = i % 2 == 0 ? -0.0f : lm::detail::bit_cast<float>(std::uint32_t{0xff812345u});
  }
  for (Index c = 0; c < d_in; ++c) x(5, c) = std::numeric_limits<float>::quiet_NaN();
  y0 = y;
  Ids ids(70, -1);
  serve(*s.serving.snapshot(), x, y, lm::Groups<>::by_id(ids.data(), 4));
  CHECK(same_bits(y, y0));
  ids[6] = 1;
  serve(*s.serving.snapshot(), x, y, lm::Groups<>::by_id(ids.data(), 4));
  for (Index t = 0; t < 70; ++t) {
    const bool same = std::memcmp(&y(t, 0), &y0(t, 0), static_cast<std::size_t>(d_out) * sizeof(float)) == 0;
    CHECK(same == (t != 6));
  }
}

TEST_CASE("a token's result depends on its own row and id only, not on who else is served") {
  Server<float> s;
  Random random(5);
  const auto x = random_matrix<float>(9, d_in, random);
  const Ids one{0, 1, 3, 1, -1, 0, 3, 2, 1}, other{3, 1, 0, -1, -1, 0, 1, 2, 1};
  lm::Matrix<float> a(9, d_out), b(9, d_out);
  serve(*s.serving.snapshot(), x, a, lm::Groups<>::by_id(one.data(), 4));
  serve(*s.serving.snapshot(), x, b, lm::Groups<>::by_id(other.data(), 4));
  for (const Index t : {1, 5, 8}) CHECK(std::memcmp(&a(t, 0), &b(t, 0), sizeof(float) * d_out) == 0);
}

TEST_CASE("slots keep their ids; a removed one is refused until it is used again") {
  Server<float> s;
  const auto before = s.serving.snapshot();
  s.serving.remove(1);
  const auto after = s.serving.snapshot();
  CHECK(before->slot(1).used);
  CHECK_FALSE(after->slot(1).used);
  CHECK(after->ranks() == 4);
  Random random(6);
  const auto x = random_matrix<float>(3, d_in, random), y0 = random_matrix<float>(3, d_out, random);
  const Ids ids{0, 1, 3};
  auto y = y0;
  const std::int32_t of[2] = {3, 1};
  const Index ends[3] = {0, 2, 3};
  check_error(lm::ErrorCode::value, {"forward", "adapter 1", "token 1", "empty"},
              [&] { serve(*after, x, y, lm::Groups<>::by_id(ids.data(), 4)); });
  check_error(lm::ErrorCode::value, {"forward", "adapter 1", "segment 1", "empty"},
              [&] { serve(*after, x, y, lm::Groups<>::by_segment(ends, 2, of, 4)); });
  check_error(lm::ErrorCode::value, {"forward", "tasks", "missing"}, [&] { serve(*after, x, y, {}); });
  const Ids far{0, 4, 3}, unused(3, -1);
  check_error(lm::ErrorCode::value, {"group id 4", "4 groups"},
              [&] { serve(*after, x, y, lm::Groups<>::by_id(far.data(), 4)); });
  check_error(lm::ErrorCode::shape, {"groups", "5", "4"},
              [&] { serve(*after, x, y, lm::Groups<>::by_id(unused.data(), 5)); });
  CHECK(same_bits(y, y0));
  serve(*before, x, y, lm::Groups<>::by_id(ids.data(), 4));  // the old snapshot still serves it
  check_close(y, one_by_one(s.loras, x, y0, ids));

  s.loras[1] = lora_of<float>(2, 7, 99);
  CHECK(s.serving.add(s.loras[1]) == 1);
  y = y0;
  serve(*s.serving.snapshot(), x, y, lm::Groups<>::by_id(ids.data(), 4));
  check_close(y, one_by_one(s.loras, x, y0, ids));

  check_error(lm::ErrorCode::value, {"Serving::remove", "9", "4 slots"}, [&] { s.serving.remove(9); });
  check_error(lm::ErrorCode::shape, {"Serving::add", "d_in", "5", "37"},
              [&] { s.serving.add(lm::Lora<float>({.d_in = 5, .d_out = d_out})); });
  for (const Index id : {0, 1, 2, 3}) s.serving.remove(id);
  check_error(lm::ErrorCode::value, {"Serving::remove", "0"}, [&] { s.serving.remove(0); });
  const lm::Serving<float> nobody(d_in, d_out);
  const Ids none(3, -1);
  y = y0;
  serve(*nobody.snapshot(), x, y, lm::Groups<>::by_id(none.data(), 1));
  CHECK(same_bits(y, y0));
}

TEST_CASE("PEERS 3.21: adapters come and go while three threads run forward on their snapshots") {
  Server<float> s;
  Random random(7);
  const auto x = random_matrix<float>(9, d_in, random);
  const Ids ids{0, 3, -1, 0, 0, 3, 3, 2, -1};  // slot 1 is the one that changes
  lm::Matrix<float> want(9, d_out);
  want = one_by_one(s.loras, x, want, ids);
  std::atomic<bool> stop{false};
  std::atomic<int> runs{0}, wrong{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!stop) {
        // [snapshot]
        const auto served = s.serving.snapshot();
        lm::Matrix<float> y(9, d_out);
        serve(*served, x, y, lm::Groups<>::by_id(ids.data(), served->slots()));
        // [/snapshot]
        for (Index k = 0; k < 9 * d_out; ++k) wrong += !(std::fabs(y.data()[k] - want.data()[k]) <= 1e-3f);
        ++runs;
      }
    });
  }
  int swaps = 0;
  for (; swaps < 40 || runs < 30; ++swaps) {
    // [swap]
    s.serving.remove(1);
    CHECK(s.serving.add(lora_of<float>(swaps % 7, 3, static_cast<std::uint64_t>(swaps))) == 1);
    // [/swap]
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  CHECK(runs >= 30);
  CHECK(wrong == 0);
}

TEST_CASE("served LoRAs can train side by side: gradients against one by one") {
  Server<double> s;
  const lm::Served<double> served = *s.serving.snapshot();
  Random random(8);
  const auto x = random_matrix<double>(11, d_in, random), dy = random_matrix<double>(11, d_out, random);
  const Ids ids{0, 3, -1, 0, 1, 1, 3, 2, -1, 1, 0};
  const lm::cpu::Backend be;
  auto grad = lm::zeros_like(served);
  lm::Matrix<double> y(11, d_out), dx(11, d_in), want_dx(11, d_in);
  Memory work(lm::workspace_bytes(be, served, 11, lm::Pass::backward) + lm::workspace_bytes(be, served, 11)),
      kept(lm::reserve_bytes(served, 11));
  lm::Arena<> reserve = kept.arena();
  auto saved =
      lm::forward(be, served, x, y, work.arena(), {.save = &reserve, .tasks = lm::Groups<>::by_id(ids.data(), 4)});
  lm::backward(be, served, saved, x, dy, dx, grad, work.arena());
  for (std::size_t e = 0; e < 4; ++e) {
    auto one = lm::zeros_like(s.loras[e]);
    for (Index t = 0; t < 11; ++t) {
      if (ids[static_cast<std::size_t>(t)] != static_cast<std::int32_t>(e)) continue;
      Memory m(lm::workspace_bytes(be, s.loras[e], 1, lm::Pass::backward) + 4096), k(lm::reserve_bytes(s.loras[e], 1));
      lm::Arena<> r = k.arena();
      lm::Matrix<double> row(1, d_out);
      auto one_saved = lm::forward(be, s.loras[e], x.view().row_range(t, 1), row.view(), m.arena(), {.save = &r});
      lm::backward(be, s.loras[e], one_saved, x.view().row_range(t, 1), dy.view().row_range(t, 1),
                   want_dx.view().row_range(t, 1), one, m.arena());
    }
    const Index rank = served.slot(static_cast<Index>(e)).rank;
    for (Index j = 0; j < rank; ++j) {
      for (Index c = 0; c < d_in; ++c) REQUIRE(std::fabs(grad.A(static_cast<Index>(e))(j, c) - one.A()(j, c)) <= 1e-11);
      for (Index o = 0; o < d_out; ++o)
        REQUIRE(std::fabs(grad.B(static_cast<Index>(e))(o, j) - one.B()(o, j)) <= 1e-11);
    }
    if (rank != 0) CHECK(one.A()(0, 0) != 0);
  }
  for (Index i = 0; i < 11 * d_in; ++i) REQUIRE(std::fabs(dx.data()[i] - want_dx.data()[i]) <= 1e-11);
}

}  // namespace
}  // namespace loramix_test

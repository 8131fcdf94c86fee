// Many LoRAs in one call on the device: against a call per LoRA, by token and by segment, in a graph whose ids change between
// replays; a token without an adapter; ids that are none.
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/serving.hpp>
#include <loramix/gpu/serving.cuh>

#include <cmath>
#include <random>

#include "gpu/captured.cuh"
#include "gpu/forbidden_calls.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;
constexpr Index d_in = 72, d_out = 56;
using Ids = std::vector<std::int32_t>;
using Groups = lm::Groups<device>;

template <class T>
std::vector<T> draw(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::vector<T> values;
  for (Index i = 0; i < n; ++i) values.push_back(lm::narrow<T>(static_cast<float>(random() >> 56) / 128 - 1));
  return values;
}

/// A server of LoRAs of ranks 3, 16, 0, 33 and 8 in slots 0 to 4, its snapshot on the device, and the LoRAs there.
template <class T>
struct Server {
  using Lora = lm::gpu::device_t<lm::Lora<T>>;
  Server() {
    for (const auto& [rank, alpha] : {std::pair<Index, double>{3, 5}, {16, 16}, {0, 1}, {33, 0.25}, {8, 24}}) {
      lm::Lora<T> lora({.d_in = d_in, .d_out = d_out, .rank = rank, .alpha = alpha});
      const auto values = draw<T>(lora.parameters().size, 20 + loras.size());
      for (Index i = 0; i < lora.parameters().size; ++i) lora.parameters()[i] = values[static_cast<std::size_t>(i)];
      CHECK(serving.add(lora) == static_cast<Index>(loras.size()));
      loras.push_back(lm::gpu::to_device(lora));
    }
  }
  /// y, which was there, of one call.
  std::vector<T> serve(const std::vector<T>& x, const std::vector<T>& y0, Groups tasks) {
    // [snapshot]
    const auto there = lm::gpu::to_device(*serving.snapshot());
    // [/snapshot]
    const auto tokens = static_cast<Index>(x.size()) / d_in;
    const lm::MatrixView<const T, device> in{gpu.upload(x), tokens, d_in};
    const lm::MatrixView<T, device> y{gpu.upload(y0), tokens, d_out};
    const lm::gpu::Backend be = gpu.backend();
    const auto work = gpu.arena(lm::workspace_bytes(be, there, tokens));
    lm::forward(be, there, in, y, work, {.tasks = tasks});
    auto out = y0;
    gpu.download(y.data, out);
    return out;
  }
  /// The same of a call per LoRA and token.
  std::vector<T> one_by_one(const std::vector<T>& x, const std::vector<T>& y0, const Ids& ids) {
    const lm::gpu::Backend be = gpu.backend();
    T *const in = gpu.upload(x), *const y = gpu.upload(y0);
    for (std::size_t t = 0; t < ids.size(); ++t) {
      if (ids[t] < 0) continue;
      const Lora& lora = loras[static_cast<std::size_t>(ids[t])];
      const auto work = gpu.arena(lm::workspace_bytes(be, lora, 1));
      const auto row = static_cast<Index>(t);
      lm::forward(be, lora, lm::MatrixView<const T, device>(in + row * d_in, 1, d_in),
                  lm::MatrixView<T, device>(y + row * d_out, 1, d_out), work);
    }
    auto out = y0;
    gpu.download(y, out);
    return out;
  }
  Groups by_token(const Ids& ids) { return Groups::by_id(gpu.upload(ids), 5); }

  GpuHarness gpu;
  lm::Serving<T> serving{d_in, d_out};
  std::vector<Lora> loras;
};

/// |x|, |A|, |B| ≤ 1, s r ≤ 24: sums of 72 terms for each rank, times the roundings along them, and the last one of y.
template <class T>
void check_close(const std::vector<T>& got, const std::vector<T>& want) {
  const double last = lm::is_16bit<T> ? 0x1p-8 : 0x1p-24;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double a = lm::widen<double>(got[i]), b = lm::widen<double>(want[i]);
    REQUIRE(std::fabs(a - b) <= 2.0 * 72 * 24 * (72 + 33 + 3) * 0x1p-24 + 2 * last * std::fabs(b));
  }
}
template <class V>
bool same_bits(const V& a, const V& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
}

}  // namespace

TEST_CASE_TEMPLATE("served on the device: mixed ranks and scales, by token and by segment", T, float, lm::bfloat16) {
  Server<T> s;
  constexpr Index tokens = 150;
  const auto x = draw<T>(tokens * d_in, 3), y0 = draw<T>(tokens * d_out, 4);
  Ids ids(tokens);
  for (std::size_t t = 0; t < tokens; ++t) ids[t] = static_cast<std::int32_t>(t * t % 7 % 6) - 1;
  for (const bool fused : {true, false}) {
    CAPTURE(fused);
    s.gpu.tuning.fused = fused;
    const auto y = s.serve(x, y0, s.by_token(ids));
    check_close(y, s.one_by_one(x, y0, ids));
    CHECK_FALSE(same_bits(y, y0));
  }
  s.gpu.tuning = {};
  const std::vector<Index> ends{0, 20, 20, 33, 97, tokens};
  const Ids of{1, 0, -1, 3, 4};
  for (std::size_t t = 0; t < tokens; ++t) ids[t] = t < 20 ? 1 : t < 33 ? -1 : t < 97 ? 3 : 4;
  const auto segments = s.serve(x, y0, Groups::by_segment(s.gpu.upload(ends), 5, s.gpu.upload(of), 5));
  CHECK(same_bits(segments, s.serve(x, y0, s.by_token(ids))));
  check_close(segments, s.one_by_one(x, y0, ids));
  CHECK(s.gpu.release());
}

TEST_CASE("served on the device: a token without an adapter costs no write of y, nor does its x matter") {
  Server<float> s;
  constexpr Index tokens = 70;
  auto x = draw<float>(tokens * d_in, 5);
  std::vector<float> y0;  // −0.0 + 0.0 would be +0.0, and a NaN would lose its payload
  for (Index i = 0; i < tokens * d_out; ++i) {
    y0.push_back(i % 2 == 0 ? -0.0f : lm::detail::bit_cast<float>(std::uint32_t{0xff812345u}));
  }
  for (Index c = 0; c < d_in; ++c) x[5 * d_in + c] = std::nanf("");
  Ids ids(tokens, -1);
  CHECK(same_bits(s.serve(x, y0, s.by_token(ids)), y0));
  ids[6] = 1;
  const auto y = s.serve(x, y0, s.by_token(ids));
  for (Index t = 0; t < tokens; ++t) {
    CHECK((std::memcmp(y.data() + t * d_out, y0.data() + t * d_out, d_out * sizeof(float)) == 0) == (t != 6));
  }
  CHECK(s.gpu.release());
}

TEST_CASE("served on the device: one graph serves whatever ids its memory holds") {
  Server<lm::bfloat16> s;
  constexpr Index tokens = 20;
  const auto x = draw<lm::bfloat16>(tokens * d_in, 6), y0 = draw<lm::bfloat16>(tokens * d_out, 7);
  const auto there = lm::gpu::to_device(*s.serving.snapshot());
  const lm::gpu::Backend be = s.gpu.backend();
  std::int32_t* const ids = s.gpu.upload(Ids(tokens, -1));
  const lm::MatrixView<const lm::bfloat16, device> in{s.gpu.upload(x), tokens, d_in};
  const lm::MatrixView<lm::bfloat16, device> y{s.gpu.upload(y0), tokens, d_out};
  const auto work = s.gpu.arena(lm::workspace_bytes(be, there, tokens));
  const int before = forbidden_calls();
  // [served]
  const Graph graph(s.gpu.stream(), [&] {
    lm::forward(be, there, in, y, work, {.tasks = Groups::by_id(ids, 5)});  // ids [T] in device memory, −1 = none
  });
  // [/served]
  CHECK(forbidden_calls() == before);
  for (const std::int32_t shift : {0, 3}) {
    Ids now(tokens);
    for (std::size_t t = 0; t < tokens; ++t) now[t] = (static_cast<std::int32_t>(t) + shift) % 6 - 1;
    lm::gpu::copy(lm::VectorView<const std::int32_t>(now.data(), tokens),
                  lm::VectorView<std::int32_t, device>(ids, tokens));
    lm::gpu::copy(lm::VectorView<const lm::bfloat16>(y0.data(), tokens * d_out),
                  lm::VectorView<lm::bfloat16, device>(y.data, tokens * d_out));
    graph.launch(s.gpu.stream());
    auto got = y0;
    s.gpu.download(y.data, got);
    CHECK(same_bits(got, s.serve(x, y0, s.by_token(now))));
    check_close(got, s.one_by_one(x, y0, now));
  }
  CHECK(s.gpu.release());
}

TEST_CASE("served on the device: LoRAs come and go in room that stays, and one graph goes on serving") {
  Server<float> s;
  constexpr Index tokens = 40;
  const auto x = draw<float>(tokens * d_in, 10), y0 = draw<float>(tokens * d_out, 11);
  // [room]
  lm::Served<float, device> room({d_in, d_out, {{40}, {16}, {40}}});  // three slots of these ranks, empty
  // [/room]
  const lm::gpu::Backend be = s.gpu.backend();
  Ids ids(tokens);
  for (std::size_t t = 0; t < tokens; ++t) ids[t] = static_cast<std::int32_t>(t % 4) - 1;
  const Groups tasks = Groups::by_id(s.gpu.upload(ids), 3);
  const lm::MatrixView<const float, device> in{s.gpu.upload(x), tokens, d_in};
  const lm::MatrixView<float, device> y{s.gpu.upload(y0), tokens, d_out};
  const auto work = s.gpu.arena(lm::workspace_bytes(be, room, tokens));
  const Graph graph(s.gpu.stream(), [&] { lm::forward(be, room, in, y, work, {.tasks = tasks}); });
  std::vector<std::int32_t> held{-1, -1, -1};  // which of the server's LoRAs a slot holds
  const auto check = [&] {
    lm::gpu::copy(lm::VectorView<const float>(y0.data(), tokens * d_out),
                  lm::VectorView<float, device>(y.data, tokens * d_out));
    graph.launch(s.gpu.stream());
    auto got = y0;
    s.gpu.download(y.data, got);
    Ids loras(tokens, -1);
    for (std::size_t t = 0; t < tokens; ++t) {
      if (ids[t] >= 0) loras[t] = held[static_cast<std::size_t>(ids[t])];
    }
    check_close(got, s.one_by_one(x, y0, loras));
    return same_bits(got, y0);
  };
  const auto place = [&](Index slot, std::int32_t which) {
    lm::gpu::place(be.stream, s.loras[static_cast<std::size_t>(which)], room, slot);
    held[static_cast<std::size_t>(slot)] = which;
  };
  CHECK(check());
  place(0, 3), place(1, 1);
  CHECK_FALSE(check());
  place(0, 0), place(2, 3);  // a smaller one, where a larger one was
  CHECK_FALSE(check());
  lm::gpu::clear_slot(be.stream, room, 1);
  held[1] = -1;
  CHECK_FALSE(check());
  CHECK(error_of([&] { place(1, 3); }).find("has rank 33, but slot 1 has room for 16") != std::string::npos);
  CHECK(error_of([&] { lm::gpu::clear_slot(be.stream, room, 3); }).find("is 3; there are 3") != std::string::npos);
  CHECK_FALSE(check());
  CHECK(s.gpu.release());
}

TEST_CASE(
    "served on the device: an empty slot, and an id that is no slot, contribute nothing; the second is reported") {
  Server<float> s;
  s.serving.remove(1);
  constexpr Index tokens = 6;
  const auto x = draw<float>(tokens * d_in, 8), y0 = draw<float>(tokens * d_out, 9);
  const Ids ids{0, 1, 3, -1, 4, 1}, none{0, -1, 3, -1, 4, -1};
  const auto want = s.serve(x, y0, s.by_token(none));
  CHECK(same_bits(s.serve(x, y0, s.by_token(ids)), want));
  CHECK(s.gpu.flags().bad_expert_id == 0);
  CHECK(s.gpu.flags().bad_group_id == 0);
  CHECK(same_bits(s.serve(x, y0, s.by_token({0, 5, 3, -1, 4, -2})), want));
  CHECK(s.gpu.flags().bad_group_id != 0);
  s.gpu.clear_flags();
  CHECK(s.gpu.release());
}

// The norm of everything, what is done with it, and what is not when it is no number.
#include <limits>

#include <loramix/adapter/lora.hpp>
#include <loramix/train/clip.hpp>

#include "core/caught.hpp"
#include "support/allocations.hpp"
#include "train/support.hpp"

using namespace loramix_test;

namespace {

template <class T>
Wide literal_norm(const std::vector<T>& g) {
  Wide sum = 0;
  for (const T v : g) sum += wide(v) * wide(v);
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE_TEMPLATE("clip_norm: the norm, and the scaling above it only", T, float, double) {
  const lm::cpu::Backend be;
  for (const Index n : {1, 3, 255, 256, 257, 1000, 262144, 262145, 300001}) {
    CAPTURE(n);
    const std::vector<T> start = normals<T>(n, 1);
    const Wide norm = literal_norm(start);
    // A sum of n squares in double, halved by the root; squares of floats are exact.
    const Wide tolerance = norm * 0x1p-53L * (static_cast<Wide>(n) / 2 + 4);

    std::vector<T> g = start;
    const double above = static_cast<double>(norm * 2);
    const lm::Clip kept = lm::clip_norm(be, flat(g), above);
    CHECK(std::abs(static_cast<Wide>(kept.norm) - norm) <= tolerance);
    CHECK(kept.scale == 1);
    CHECK(kept.finite);
    CHECK(same_bits(g, start));
    CHECK(lm::clip_norm(be, flat(g), kept.norm).scale == 1);  // at the limit
    CHECK(same_bits(g, start));

    const lm::Clip cut = lm::clip_norm(be, flat(g), kept.norm / 4);
    CHECK(cut.norm == kept.norm);
    CHECK(cut.scale == 0.25);
    CHECK(cut.finite);
    std::vector<T> quarter = start;
    for (T& v : quarter) v /= 4;
    CHECK(same_bits(g, quarter));
  }
}

TEST_CASE_TEMPLATE("clip_norm: NaN and infinities anywhere leave everything as it is", T, float, double) {
  const lm::cpu::Backend be;
  constexpr Index n = 3000;
  using Limits = std::numeric_limits<T>;
  for (const T bad : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()}) {
    for (const Index where : {Index{0}, Index{255}, Index{256}, Index{1501}, n - 1}) {
      CAPTURE(where);
      std::vector<T> g = normals<T>(n, 1);
      g[at(where)] = bad;
      const std::vector<T> before = g;
      const lm::Clip clip = lm::clip_norm(be, flat(g), 0.5);
      CHECK(!clip.finite);
      CHECK(clip.scale == 1);
      CHECK(!(clip.norm < Limits::infinity()));
      CHECK(same_bits(g, before));
    }
  }
}

TEST_CASE("clip_norm: floats do not overflow, doubles beyond 1e154 count as not finite") {
  const lm::cpu::Backend be;
  std::vector<float> g(1000, 3e38f);
  const lm::Clip clip = lm::clip_norm(be, flat(g), 1);
  CHECK(clip.finite);
  CHECK(clip.norm == doctest::Approx(3e38 * std::sqrt(1000.0)));
  CHECK(g[999] == doctest::Approx(1 / std::sqrt(1000.0)));
  std::vector<float> tiny(100, 1e-40f);
  CHECK(lm::clip_norm(be, flat(tiny), 1).norm == doctest::Approx(1e-39));
  std::vector<double> big(10, 1e200);
  CHECK(!lm::clip_norm(be, flat(big), 1).finite);
  CHECK(big[9] == 1e200);
}

TEST_CASE("clip_norm: several gradients have one norm") {
  const lm::cpu::Backend be;
  lm::Lora<float> a({.d_in = 300, .d_out = 20, .rank = 4}), b({.d_in = 20, .d_out = 500, .rank = 3});
  auto ga = lm::zeros_like(a), gb = lm::zeros_like(b);
  randomise(ga, 1);
  randomise(gb, 2);
  std::vector<float> dense = normals<float>(777, 3), none;
  const std::vector<float> dense_before = dense;
  const auto before = copy_of(gb.parameters());
  const Wide na = literal_norm(copy_of(ga.parameters())), nb = literal_norm(before), nd = literal_norm(dense);
  const Wide norm = std::sqrt(na * na + nb * nb + nd * nd);
  const lm::Clip clip = lm::clip_norm(be, {ga.parameters(), flat(none), gb.parameters(), flat(dense)}, 0.5);
  CHECK(clip.norm == doctest::Approx(static_cast<double>(norm)).epsilon(1e-13));
  CHECK(clip.scale == doctest::Approx(0.5 / static_cast<double>(norm)).epsilon(1e-13));
  CHECK(dense[776] == static_cast<float>(clip.scale * static_cast<double>(dense_before[776])));
  CHECK(gb.parameters()[5] == static_cast<float>(clip.scale * static_cast<double>(before[5])));
  CHECK(lm::clip_norm(be, {ga.parameters(), gb.parameters(), flat(dense)}, 1).norm == doctest::Approx(0.5));

  gb.parameters()[5] = std::nanf("");
  const std::vector<float> now = dense;
  CHECK(!lm::clip_norm(be, {ga.parameters(), gb.parameters(), flat(dense)}, 1e-3).finite);
  CHECK(same_bits(dense, now));
}

TEST_CASE("clip_norm: the same bits for any number of threads, no allocation") {
  constexpr Index n = 700'001;
  const std::vector<float> start = normals<float>(n, 1);
  const auto run = [&](auto executor) {
    const lm::cpu::Backend be{executor};
    std::vector<float> g = start;
    const long before = allocations();
    const lm::Clip clip = lm::clip_norm(be, flat(g), 3);
    CHECK(allocations() == before);
    g.push_back(static_cast<float>(clip.norm));
    return std::pair(g, clip.norm);
  };
  const auto [one, norm] = run(lm::SerialExecutor{});
  const auto check_same = [&, &first = one, &first_norm = norm](auto executor) {
    const auto [g, other] = run(executor);
    CHECK(same_bits(first, g));
    CHECK(other == first_norm);
  };
  check_same(BackwardsExecutor{});
  for (const Index lanes : {1, 2, 3}) {
    lm::ThreadPool pool(lanes);
    begin_threads(pool.executor());
    check_same(pool.executor());
  }
}

TEST_CASE("clip_norm: edges and errors; zero") {
  const lm::cpu::Backend be;
  std::vector<float> none, g(600, 2), nothing(300);
  CHECK(lm::clip_norm(be, flat(none), 1).norm == 0);
  CHECK(lm::clip_norm(be, flat(none), 1).finite);
  CHECK(lm::clip_norm(be, flat(nothing), 0).scale == 1);
  CHECK(lm::clip_norm(be, std::span<const lm::VectorView<float>>{}, 1).norm == 0);
  CHECK(lm::clip_norm(be, flat(g), std::numeric_limits<double>::infinity()).scale == 1);
  const std::vector<float> before = g;
  check_error(lm::ErrorCode::value, {"clip_norm", "max_norm"}, [&] { lm::clip_norm(be, flat(g), -1); });
  check_error(lm::ErrorCode::value, {"clip_norm", "max_norm"}, [&] { lm::clip_norm(be, flat(g), std::nan("")); });
  check_error(lm::ErrorCode::null, {"clip_norm", "gradient"}, [&] {
    lm::clip_norm(be, lm::VectorView<float>{nullptr, 4}, 1);
  });
  lm::Clip result;
  std::vector<std::byte> small(100);
  const std::vector<lm::VectorView<float>> views{flat(g)};
  check_error(lm::ErrorCode::arena, {"too few"}, [&] {
    lm::clip_norm(be, std::span<const lm::VectorView<float>>(views), 1.0, lm::VectorView<lm::Clip>(&result, 1),
                  lm::Arena<>{small});
  });
  CHECK(same_bits(g, before));
  std::vector<std::byte> enough(at(lm::clip_bytes<lm::Space::host>()));
  lm::clip_norm(be, std::span<const lm::VectorView<float>>(views), 1.0, lm::VectorView<lm::Clip>(&result, 1),
                lm::Arena<>{enough});
  CHECK(result.norm == doctest::Approx(2 * std::sqrt(600.0)));

  CHECK(lm::clip_norm(be, flat(g), 0).scale == 0);
  CHECK(same_bits(g, std::vector<float>(600)));
  g.assign(600, std::nanf(""));
  lm::zero(be, flat(g));
  CHECK(same_bits(g, std::vector<float>(600)));
  lm::Lora<lm::bfloat16> lora({.d_in = 70, .d_out = 33, .rank = 4});
  auto grad = lm::zeros_like(lora);
  randomise(grad, 1);
  CHECK(lm::clip_norm(be, grad, 1e30).norm > 1);
  lm::zero(be, grad);
  CHECK(lm::clip_norm(be, grad, 1e30).norm == 0);
}

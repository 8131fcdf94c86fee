// The bias for selection: counts over valid tokens since the last update, moved by the sign of mean − load.
#include <loramix/router/selection_bias.hpp>

#include "core/caught.hpp"
#include "router/routing.hpp"

using namespace loramix_test;

TEST_CASE("the bias moves by gamma against the load of the valid tokens, and the load starts anew") {
  const lm::cpu::Backend be;
  // Chosen: expert 0 five times, 1 twice, 2 never, 3 once; the padded third token and a −1 count for nothing.
  const std::vector<std::int32_t> chosen{0, 1, 0, 3, 2, 2, 0, 1, 0, -1, 0, -1};
  const std::vector<std::uint8_t> valid{1, 1, 0, 1, 1, 1};
  std::vector<Index> load(4, 0);
  std::vector<float> bias{0.5f, 0.25f, 0, -1};
  const lm::VectorView<Index> loads(load.data(), 4);
  const lm::VectorView<float> biases(bias.data(), 4);
  lm::count_load<lm::Space::host>(be, {chosen.data(), 6, 2}, {valid.data(), 6}, loads);
  CHECK(load == std::vector<Index>{5, 2, 0, 1});
  lm::update_selection_bias<lm::Space::host>(be, loads, biases, 0.125);  // the mean is 2
  CHECK(bias == std::vector<float>{0.375f, 0.25f, 0.125f, -0.875f});
  CHECK(load == std::vector<Index>(4, 0));
  lm::update_selection_bias<lm::Space::host>(be, loads, biases, 0.125);
  CHECK(bias[0] == 0.375f);  // sign(0) = 0

  lm::count_load<lm::Space::host>(be, {chosen.data(), 2, 2}, {}, loads);
  lm::count_load<lm::Space::host>(be, {chosen.data() + 4, 1, 2}, {}, loads);
  CHECK(load == std::vector<Index>{2, 1, 2, 1});
  lm::update_selection_bias<lm::Space::host>(be, loads, biases, 0.125);  // the mean is 1.5
  CHECK(bias == std::vector<float>{0.25f, 0.375f, 0, -0.75f});
}

TEST_CASE("a mask or a bias that has an address or a size has both") {
  const lm::cpu::Backend be;
  const std::vector<std::int32_t> chosen{0, 1, 0, 3};
  const std::vector<std::uint8_t> valid{1, 1};
  std::vector<Index> load(4, 9);
  const auto count = [&](lm::VectorView<const std::uint8_t> mask) {
    lm::count_load<lm::Space::host>(be, {chosen.data(), 2, 2}, mask, {load.data(), 4});
  };
  check_error(lm::ErrorCode::shape, {"count_load", "valid", "0", "2"}, [&] { count({valid.data(), 0}); });
  check_error(lm::ErrorCode::null, {"count_load", "valid"}, [&] { count({nullptr, 2}); });
  CHECK(load == std::vector<Index>(4, 9));
  const std::vector<float> bias(4);
  const lm::TopKGate<double, double> gate{{nullptr, 4, 1}, {.k = 1}};
  check_error(lm::ErrorCode::shape, {"test", "selection bias", "0", "4"}, [&] {
    gate.check("test", {2, {}, lm::no_draws, {bias.data(), 0}});
  });
}

TEST_CASE("a biased router spreads its load") {
  Uniform random(340);
  std::vector<float> bias(4, 0);
  std::vector<Index> load(4, 0);
  lm::GateCall<> call{200, {}, lm::no_draws, {bias.data(), 4}};
  Routed<lm::TopKGate<double, double>> r({{nullptr, 4, 0}, {.k = 1, .scoring = lm::Scoring::sigmoid}}, call);
  for (Index t = 0; t < 200; ++t) {
    for (Index e = 0; e < 4; ++e) r.h(t, e) = random() + (e == 2 ? 1 : 0);
  }
  const auto most = [&] {
    r.forward();
    lm::count_load<lm::Space::host>(r.be, r.state.chosen, {}, {load.data(), 4});
    return *std::max_element(load.begin(), load.end());
  };
  const Index before = most();
  for (int step = 0; step < 100; ++step) {
    most();
    lm::update_selection_bias<lm::Space::host>(r.be, {load.data(), 4}, {bias.data(), 4}, 0.005);
  }
  CHECK(before > 100);
  CHECK(most() < 70);
}

TEST_CASE("sizes that differ are refused") {
  const lm::cpu::Backend be;
  std::vector<Index> load(4);
  std::vector<float> bias(3);
  const auto refusal = [](const auto& f) -> std::string {
    try {
      f();
    } catch (const lm::Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(refusal([&] {
          lm::update_selection_bias<lm::Space::host>(be, {load.data(), 4}, {bias.data(), 3}, 1);
        }).find("update_selection_bias: bias has size 3, but the size of load is 4") != std::string::npos);
  CHECK(refusal([&] {
          const std::vector<std::uint8_t> valid(5);
          const std::vector<std::int32_t> chosen(8);
          lm::count_load<lm::Space::host>(be, {chosen.data(), 4, 2}, {valid.data(), 5}, {load.data(), 4});
        }).find("count_load: valid has size 5, but the number of tokens is 4") != std::string::npos);
}

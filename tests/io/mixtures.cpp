// The mixtures through a file: every config field and every parameter comes back, and the file names its kind.
#include <loramix/io/adapter.hpp>

#include <cstring>

#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>

#include "io/support.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using loramix_test::Folder;
using loramix_test::has;
using loramix_test::refusal;

namespace {

template <class A>
A drawn(const typename A::Config& config) {
  A adapter(config);
  lm::initialise(adapter, {.seed = loramix_test::seed(360)});
  A::visit(adapter, [&](const char*, auto view, lm::ParameterGroup) {
    for (lm::Index i = 0; i < view.rows; ++i) {
      for (lm::Index j = 0; j < view.cols; ++j) view(i, j) += static_cast<float>(i) - 0.5f * static_cast<float>(j);
    }
  });
  return adapter;
}

template <class Config>
std::vector<double> numbers(const Config& config) {
  std::vector<double> all;
  Config copy = config;
  Config::fields(copy, [&all](const char*, auto& value) { all.push_back(static_cast<double>(value)); });
  return all;
}

template <class A>
void round_trip(const typename A::Config& config) {
  const Folder folder;
  const std::string path = folder / "mixture.safetensors";
  const A adapter = drawn<A>(config);
  lm::io::save(path, "layers.0.up", adapter);
  const A back = lm::io::load<A>(path, "layers.0.up");
  CHECK(numbers(back.config()) == numbers(config));
  const auto a = adapter.parameters(), b = back.parameters();
  REQUIRE(a.size == b.size);
  CHECK(std::memcmp(a.data, b.data, static_cast<std::size_t>(a.size) * sizeof(float)) == 0);
}

}  // namespace

TEST_CASE("every mixture comes back from its file") {
  const lm::MixtureConfig mixture{.d_in = 7, .d_out = 5, .experts = 3, .rank = 2, .alpha = 3.25, .dropout = 0.125};
  round_trip<lm::LoraMoe<float>>(mixture);
  round_trip<lm::HydraLora<float>>(mixture);
  lm::MolaConfig mola{.d_in = 7, .d_out = 5, .experts = 3, .rank = 2};
  round_trip<lm::Mola<float>>(mola);
  mola.rule = {.k = 3,
               .scoring = lm::Scoring::sigmoid,
               .renormalise = false,
               .temperature = 0.7,
               .route_scale = 2.5,
               .top_p = 0.9,
               .capacity = 1.25,
               .order = lm::CapacityOrder::priority,
               .noise = true,
               .jitter = 0.01};
  round_trip<lm::Mola<float>>(mola);
  for (const lm::Index hidden : {0, 6}) {
    round_trip<lm::TeamLora<float>>(
        {.d_in = 7, .d_out = 5, .experts = 3, .rank = 2, .hidden = hidden, .competition = lm::Competition::identity});
    round_trip<lm::TeamLora<float>>({.d_in = 7,
                                     .d_out = 5,
                                     .experts = 3,
                                     .rank = 2,
                                     .hidden = hidden,
                                     .reads = lm::Reads::task,
                                     .tasks = 4,
                                     .embedding = 3});
  }
  round_trip<lm::TeamLora<float>>(
      {.d_in = 7, .d_out = 5, .experts = 3, .rank = 2, .reads = lm::Reads::sequence, .pooling = lm::Pooling::last});
  round_trip<lm::MoeLora<float>>(lm::hydra_by_task(mixture, 4, 3));
}

TEST_CASE("a mixture of another kind is refused") {
  const Folder folder;
  const std::string path = folder / "mixture.safetensors";
  lm::io::save(path, "m", drawn<lm::LoraMoe<float>>({.d_in = 7, .d_out = 5, .experts = 3, .rank = 2}));
  const std::string found = refusal([&] { lm::io::load<lm::HydraLora<float>>(path, "m"); });
  CHECK(has(found, "lora_moe"));
  CHECK(has(found, "hydra_lora"));
}

// MOELoRA and MoRE through a file: every config field, every parameter, and the ranks that MoRE chooses.
#include <loramix/io/adapter.hpp>

#include <cstring>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/moe_lora.hpp>
#include <loramix/adapter/more.hpp>

#include "io/support.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using loramix_test::Folder;

namespace {

template <class Config>
std::vector<double> numbers(const Config& config) {
  std::vector<double> all;
  Config copy = config;
  Config::fields(copy, [&all](const char*, auto& value) { all.push_back(static_cast<double>(value)); });
  return all;
}

template <class A>
A round_trip(const typename A::Config& config) {
  const Folder folder;
  const std::string path = folder / "tasks.safetensors";
  A adapter(config);
  lm::initialise(adapter, {.seed = loramix_test::seed(370)});
  lm::io::save(path, "layers.0.up", adapter);
  A back = lm::io::load<A>(path, "layers.0.up");
  CHECK(numbers(back.config()) == numbers(config));
  const auto a = adapter.parameters(), b = back.parameters();
  REQUIRE(a.size == b.size);
  CHECK(std::memcmp(a.data, b.data, static_cast<std::size_t>(a.size) * sizeof(*a.data)) == 0);
  return back;
}

TEST_CASE("MOELoRA: a round trip keeps every bit") {
  for (const bool shared : {false, true}) {
    round_trip<lm::MoeLora<float>>({.d_in = 7,
                                    .d_out = 5,
                                    .tasks = 3,
                                    .experts = 2,
                                    .rank = 6,
                                    .alpha = 0.1,
                                    .dropout = 1.0 / 3,
                                    .embedding = 9,
                                    .shared_A = shared});
  }
}

// PEERS 1.3: there the map from tasks to ranks is made again after loading, from other embeddings.
TEST_CASE("defect of MoRE's code, ranks after loading: they are those of before") {
  for (const bool embedding : {false, true}) {
    const lm::MoreConfig config{.d_in = 7,
                                .d_out = 5,
                                .tasks = 9,
                                .rank = 6,
                                .dropout = 0.1,
                                .rule = {.law = lm::RankLaw::code_squared,
                                         .choice = lm::RankChoice::subset,
                                         .straight_through = lm::StraightThrough::raw_logit},
                                .task_embedding = embedding};
    const auto back = round_trip<lm::More<float>>(config);
    lm::More<float> before(config);
    lm::initialise(before, {.seed = loramix_test::seed(370)});
    bool differ = false;
    for (lm::Index task = 0; task < 9; ++task) {
      CHECK(back.chosen_rank(task) == before.chosen_rank(task));
      differ = differ || back.chosen_rank(task) != back.chosen_rank(0);
    }
    CHECK(differ);
  }
}

}  // namespace

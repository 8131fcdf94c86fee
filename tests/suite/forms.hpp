// In which forms the suite sees an adapter: its configuration at one small shape of primes, and what a form changes of it.
// Forms are run-time values: they cost no compilation. An adapter that says nothing here is seen once.
#pragma once
#include <string>
#include <vector>

#include <loramix/bench/layer.hpp>

#include <adapters/list.hpp>

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

/// How many tasks, domains and served adapters a batch of the suite knows.
inline constexpr Index told_tasks = 3;

/// One form of an adapter's configuration. `differences`: its gradients are differences of its forward, with what MATH.md
/// calls constant held (Subject::hold); false where a test of its own has to say what is held.
template <class Config>
struct Form {
  const char* name;
  void (*change)(Config&);
  bool differences = true;
  const char* silent = "";  // a tensor that is there and has no gradient
};

template <class Config>
std::vector<Form<Config>> forms(const Config&) {
  return {{"", [](Config&) {}}};
}
inline std::vector<Form<lm::LoraConfig>> forms(const lm::LoraConfig&) {
  using C = lm::LoraConfig;
  return {{"", [](C&) {}},
          {"rank-stabilised", [](C& c) { c.rank_stabilised = true; }},
          {"rank 0", [](C& c) { c.rank = 0; }, true, "x"},
          {"without dropout", [](C& c) { c.dropout = 0; }}};
}
inline std::vector<Form<lm::FusedLoraConfig>> forms(const lm::FusedLoraConfig&) {
  using C = lm::FusedLoraConfig;  // a column that belongs to no slice, and slices out of order
  return {{"", [](C&) {}},
          {"with a gap",
           [](C& c) {
             c.slices = {{7, 4}, {0, 6}};
           }},
          {"one A", [](C& c) { c.shared_A = true; }}};
}
inline std::vector<Form<lm::DoraConfig>> forms(const lm::DoraConfig&) {
  using C = lm::DoraConfig;
  return {{"", [](C&) {}}, {"dropping the base's input", [](C& c) { c.drop_base = true; }}};
}
inline std::vector<Form<lm::AdaLoraConfig>> forms(const lm::AdaLoraConfig&) {
  using C = lm::AdaLoraConfig;
  return {{"", [](C&) {}}, {"per active rank", [](C& c) { c.per_active_rank = true, c.active_rank = 2; }}};
}
inline std::vector<Form<lm::Ia3Config>> forms(const lm::Ia3Config&) {
  using C = lm::Ia3Config;
  return {{"", [](C&) {}}, {"feed-forward", [](C& c) { c.feed_forward = true; }}};
}
inline std::vector<Form<lm::TeamLoraConfig>> forms(const lm::TeamLoraConfig&) {
  using C = lm::TeamLoraConfig;
  return {{"", [](C& c) { c.hidden = 5; }},
          {"linear S", [](C& c) { c.hidden = 0; }},
          {"M = I", [](C& c) { c.hidden = 5, c.competition = lm::Competition::identity; }, true, "interaction.weight"},
          {"equal shares", [](C& c) { c.hidden = 5, c.competition = lm::Competition::equal; }},
          {"by sequence", [](C& c) { c.hidden = 5, c.reads = lm::Reads::sequence; }},
          {"linear S by last row",
           [](C& c) { c.hidden = 0, c.reads = lm::Reads::sequence, c.pooling = lm::Pooling::last; }},
          {"by task", [](C& c) { c.hidden = 5, c.reads = lm::Reads::task, c.embedding = 7; }}};
}
inline std::vector<Form<lm::MolaConfig>> forms(const lm::MolaConfig&) {
  using C = lm::MolaConfig;
  using lm::Scoring;
  return {
      {"", [](C&) {}},
      {"Switch", [](C& c) { c.rule = {.k = 1, .renormalise = false}; }},
      {"sigmoid", [](C& c) { c.rule = {.k = 2, .scoring = Scoring::sigmoid, .route_scale = 2.5}; }},
      {"top-p", [](C& c) { c.rule = {.k = 3, .temperature = 0.7, .top_p = 0.8}; }},
      {"noise and jitter", [](C& c) { c.rule = {.k = 2, .noise = true, .jitter = 0.25}; }},
      {"capacity by arrival", [](C& c) { c.rule = {.k = 2, .renormalise = false, .capacity = 0.8}; }},
      {"capacity by weight", [](C& c) { c.rule = {.k = 2, .capacity = 0.8, .order = lm::CapacityOrder::priority}; }}};
}
inline std::vector<Form<lm::MixLoraConfig>> forms(const lm::MixLoraConfig&) {
  using C = lm::MixLoraConfig;
  return {{"", [](C&) {}}, {"all experts, jitter", [](C& c) { c.rule = {.k = 3, .jitter = 0.25}; }}};
}
inline std::vector<Form<lm::MoeLoraConfig>> forms(const lm::MoeLoraConfig&) {
  using C = lm::MoeLoraConfig;
  return {{"", [](C& c) { c.embedding = 7; }}, {"one A", [](C& c) { c.embedding = 7, c.shared_A = true; }}};
}
inline std::vector<Form<lm::MoreConfig>> forms(const lm::MoreConfig&) {
  using C = lm::MoreConfig;
  using lm::RankChoice, lm::RankLaw, lm::StraightThrough;
  return {{"", [](C&) {}},
          {"squared law, raw logit",
           [](C& c) {
             c.rule = {RankLaw::code_squared, RankChoice::argmax, StraightThrough::raw_logit};
           }},
          {"learning-rate law",  // its gradients are no differences, on purpose
           [](C& c) { c.rule = {.law = RankLaw::lr_linear}; }, false},
          {"a subset of ranks",
           [](C& c) {
             c.rule = {RankLaw::none, RankChoice::subset, StraightThrough::probability};
           },
           false},
          {"random ranks", [](C& c) { c.rule = {.choice = RankChoice::random}; }},
          {"without embeddings", [](C& c) { c.task_embedding = false; }}};
}
inline std::vector<Form<lm::MoaConfig>> forms(const lm::MoaConfig&) {
  using C = lm::MoaConfig;
  return {{"", [](C&) {}},
          {"last row, straight through", [](C& c) { c.pooling = lm::Pooling::last, c.straight_through = true; }},
          {"with room", [](C& c) { c.places = 5; }},
          {"told by another router", [](C& c) { c.router = false; }}};
}
inline std::vector<Form<lm::ServedConfig>> forms(const lm::ServedConfig&) {
  using C = lm::ServedConfig;
  return {{"", [](C&) {}}, {"mixed ranks", [](C& c) { c.slots[0].rank = 5, c.slots[1] = {0, 3, true}; }}};
}

/// A's configuration in the suite, before a form changes it.
template <class A>
typename A::Config suite_config() {
  auto config = lm::bench::configured<A>({.d_in = 13, .d_out = 11, .total_rank = 6, .experts = told_tasks}, told_tasks);
  if constexpr (requires { config.dropout; }) config.dropout = 0.5;
  return config;
}

/// "team_lora, linear S".
template <class A>
std::string suite_name(const char* form) {
  return *form == '\0' ? std::string(A::kind) : std::string(A::kind) + ", " + form;
}

}  // namespace loramix_test

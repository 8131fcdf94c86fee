// Packs and explanations of what is no single product, and packs of gates that are told something.
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/adapter/moa.hpp>
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/prompt_forward.hpp>
#include <loramix/adapter/reparam_forward.hpp>
#include <loramix/adapter/serving.hpp>
#include <loramix/ops/row_norm.hpp>

#include "adapter/tasks.hpp"

namespace loramix_test {
namespace {

constexpr Index T = 9;

template <class A>
typename A::Config config(double dropout) {
  auto config = A::Config::of({.d_in = 13, .d_out = 11, .total_rank = 8, .experts = 2});
  if constexpr (requires { config.dropout; }) config.dropout = dropout;
  return config;
}
/// A forward on the adapter and one on the pack: the same bits, added and assigned, with and without dropout.
template <class A, class Adapter, class Pack>
void check_same(Batch<A>& b, const Adapter& unpacked, const Pack& packed) {
  using X = typename A::precision::activation;
  auto y = random_matrix<X>(b.tokens, b.adapter.config().d_out, b.random);
  auto want = y;
  for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
    for (const lm::Key& key : {lm::no_draws, b.key}) {
      const auto before = y;
      unpacked(want, {.key = key, .into = into});
      packed(y, {.key = key, .into = into});
      CHECK(same_bits(y, want));
      CHECK_FALSE(same_bits(y, before));
    }
  }
}

using bf16 = lm::bfloat16;
using mixed_types = lm::Precision<float, bf16>;

TEST_CASE_TEMPLATE("a reparametrised adapter's pack holds B' and gives the same bits", A, lm::MosLora<float>,
                   lm::MosLora<bf16>, lm::MosLora<mixed_types>, lm::MultiLora<double>, lm::MultiLora<lm::half>) {
  for (const Index tokens : {Index{1}, T, Index{70}}) {
    Batch<A> b(config<A>(0.5), tokens);
    // [pack]
    const auto packed = lm::prepack(b.be, b.adapter);
    Memory work(lm::workspace_bytes(b.be, packed, tokens));
    // [/pack]
    check_same(
        b, [&](auto& y, lm::ForwardOptions<lm::Space::host> options) { b.forward(y, options); },
        [&](auto& y, lm::ForwardOptions<lm::Space::host> options) {
          lm::forward(b.be, packed, b.x, y, work.arena(), options);
        });
    CHECK(packed.is_current(b.adapter));
    auto y = b.zeros_y(), again = y;
    lm::forward(b.be, packed, b.x, y, work.arena());
    poison(b.adapter);  // a pack is a copy
    lm::forward(b.be, packed, b.x, again, work.arena());
    CHECK(same_bits(y, again));
    CHECK_FALSE(packed.is_current(b.adapter));
  }
}

TEST_CASE_TEMPLATE("DoRA's pack holds m/n for its layer and gives the same bits", P, float, bf16, mixed_types) {
  using A = lm::Dora<P>;
  using X = typename A::precision::activation;
  using Acc = typename A::precision::accumulation;
  for (const bool drop_base : {false, true}) {
    auto c = config<A>(0.5);
    c.drop_base = drop_base;
    Batch<A> b(c, T);
    const auto weights = random_matrix<X>(11, 13, b.random);
    lm::Matrix<Acc> squares(1, 11);
    lm::row_squares(b.be, lm::RowSquares<X, Acc, lm::Space::host>{weights, {squares.data(), 11}});
    lm::DoraBase<A> base{weights, {squares.data(), 11}};
    // [dora-pack]
    const auto packed = lm::prepack(b.be, b.adapter, base);
    // [/dora-pack]
    Memory work(lm::workspace_bytes(b.be, packed, T));
    check_same(
        b,
        [&](auto& y, lm::ForwardOptions<lm::Space::host> options) {
          lm::forward(b.be, b.adapter, base, b.x, y, b.work.arena(), options);
        },
        [&](auto& y, lm::ForwardOptions<lm::Space::host> options) {
          lm::forward(b.be, packed, base, b.x, y, work.arena(), options);
        });
    auto y = random_matrix<X>(T, 11, b.random), want = y;
    base.in_y = true;
    lm::forward(b.be, b.adapter, base, b.x, want, b.work.arena());
    lm::forward(b.be, packed, base, b.x, y, work.arena());
    CHECK(same_bits(y, want));
    check_error(lm::ErrorCode::value, {"forward", "in_y"},
                [&] { lm::forward(b.be, packed, base, b.x, y, work.arena(), {.into = lm::Into::set}); });
    CHECK(same_bits(y, want));
    check_error(lm::ErrorCode::value, {"prepack", "pass"},
                [&] { lm::prepack(b.be, b.adapter, base, lm::Pass::backward); });
    base.weights = base.weights.row_range(0, 10);
    check_error(lm::ErrorCode::shape, {"prepack", "W", "10", "11"}, [&] { lm::prepack(b.be, b.adapter, base); });
  }
}

TEST_CASE_TEMPLATE("a MixLoRA block's pack goes through the same stages", P, double, bf16) {
  using A = lm::MixLora<P>;
  using X = typename A::precision::activation;
  const lm::cpu::Backend<> be;
  Random random(2);
  A block({.d_in = 13, .d_hidden = 17, .d_out = 11, .experts = 3, .rank = 2, .dropout = 0.5});
  fill_parameters(block, random);
  const auto x = random_matrix<X>(T, 13, random), u = random_matrix<X>(T, 17, random),
             v = random_matrix<X>(T, 17, random);
  const auto run = [&](const auto& of, Memory work, Memory kept, lm::Matrix<X>& hbar, lm::Matrix<X>& y) {
    lm::Arena<> reserve = kept.arena();
    auto saved = lm::route(be, of, x, reserve, work.arena(), {.key = {.seed = 3, .site = 5}, .down_site = 7});
    lm::mix(be, of, saved, u, v, hbar, work.arena());
    lm::finish(be, of, saved, y, work.arena());
  };
  const auto packed = lm::prepack(be, block);
  lm::Matrix<X> hbar(T, 17), y(T, 11), packed_hbar(T, 17), packed_y(T, 11);
  run(block, Memory(lm::workspace_bytes(be, block, T)), Memory(lm::reserve_bytes(block, T)), hbar, y);
  run(packed, Memory(lm::workspace_bytes(be, packed, T)), Memory(lm::reserve_bytes(packed, T)), packed_hbar, packed_y);
  CHECK(same_bits(hbar, packed_hbar));
  CHECK(same_bits(y, packed_y));
  CHECK_FALSE(same_bits(y, lm::Matrix<X>(T, 11)));
}

TEST_CASE("packs are told what adapters are told: tasks, sequences, labels; they save nothing") {
  const auto check = [](auto& b, lm::ForwardOptions<lm::Space::host> told) {
    const auto packed = lm::prepack(b.be, b.adapter);
    Memory work(lm::workspace_bytes(b.be, packed, T));
    auto y = b.zeros_y(), want = y;
    b.forward(want, told);
    lm::forward(b.be, packed, b.x, y, work.arena(), told);
    CHECK(same_bits(y, want));
    CHECK_FALSE(same_bits(y, b.zeros_y()));
    lm::Arena<> reserve = b.memory.arena();
    told.save = &reserve;
    check_error(lm::ErrorCode::value, {"forward", "save", "packs are for inference"},
                [&] { lm::forward(b.be, packed, b.x, y, work.arena(), told); });
  };
  const lm::ForwardOptions<lm::Space::host> tasks{.tasks = groups_of(mixed, 3)};
  Batch<lm::MoeLora<bf16>> moe({.d_in = 7, .d_out = 5, .tasks = 3, .experts = 2, .rank = 6}, T);
  check(moe, tasks);
  Batch<lm::More<float>> more({.d_in = 7, .d_out = 5, .tasks = 3, .rank = 6}, T);
  check(more, tasks);
  const Index ends[]{0, 4, 4, 9};
  const std::vector<std::int32_t> labels{1, 0, -1};
  lm::ForwardOptions<lm::Space::host> domains;
  domains.sequences = lm::Groups<>::by_segment(ends, 3);
  domains.labels = {labels.data(), 3};
  Batch<lm::Moa<bf16>> moa({.d_in = 7, .d_out = 5, .experts = 2, .rank = 2, .places = 3}, T);
  check(moa, domains);

  lm::ServedConfig served{7, 5, {{2, 1.5, true}, {0, 0, false}, {3, -0.5, true}}};
  Batch<lm::Served<bf16>> serving(served, T);
  const std::vector<std::int32_t> ids{0, 2, -1, 2, 2, 0, 0, -1, 2};
  check(serving, {.tasks = groups_of(ids, 3)});
}

TEST_CASE_TEMPLATE("explain knows every adapter", A, lm::Dora<float>, lm::MosLora<float>, lm::MultiLora<float>,
                   lm::Ia3<float>, lm::Prompt<float>, lm::MixLora<float>, lm::FusedLora<float>, lm::Served<float>,
                   lm::MoeLora<float>, lm::Moa<float>) {
  const lm::cpu::Backend<> be;
  const A adapter(config<A>(0));
  const lm::Explanation e = lm::explain(be, adapter, 70);
  CHECK(e.tokens == 70);
  CHECK(e.forward_workspace == lm::workspace_bytes(be, adapter, 70));
  CHECK(e.backward_workspace == lm::workspace_bytes(be, adapter, 70, lm::Pass::backward));
  CHECK(e.cost.forward_flop == adapter.cost(70).forward_flop);
  const Index kept = (lm::reserve_bytes(adapter, 2048) - lm::reserve_bytes(adapter, 1024)) / 1024;
  CHECK(e.reserve_per_token == kept);
  CHECK(e.reserve_per_token_recomputed <= kept);
  CHECK((kept > 0) == !lm::PromptAdapter<A>);
  std::FILE* const file = std::tmpfile();
  REQUIRE(file != nullptr);
  lm::print(e, file);
  CHECK(std::ftell(file) > 100);
  std::fclose(file);
}

}  // namespace
}  // namespace loramix_test

// What a forward leaves is used once, by the forward that left it, whatever kind of adapter it is of: a spent, copied,
// foreign or stale Saved is refused, and in debug builds one of weights that have changed.
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/prompt_forward.hpp>
#include <loramix/adapter/reparam_forward.hpp>
#include <loramix/ops/row_norm.hpp>

#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

constexpr Index tokens = 9, d_in = 13, d_out = 11;

template <class A>
typename A::Config config() {
  if constexpr (requires(typename A::Config c) { c.slices; })
    return FusedKind<float>::config();
  else
    return A::Config::of({.d_in = d_in, .d_out = d_out, .total_rank = 8, .experts = 2});
}

/// One layer's step, as the engine of each adapter runs it.
template <class A>
struct Layer {
  Layer() : random(3), adapter(config<A>()), other(adapter), width(output()) {
    fill_parameters(adapter, random);
    x = random_matrix<float>(tokens, d_in, random);
    y = lm::Matrix<float>(rows(), width);
    dy = random_matrix<float>(rows(), width, random);
    dx = lm::Matrix<float>(tokens, d_in);
    weights = random_matrix<float>(d_out, d_in, random);
    squares = lm::Matrix<float>(1, d_out);
    lm::row_squares(be, lm::RowSquares<float, float, lm::Space::host>{weights, {squares.data(), d_out}});
    work =
        Memory(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward) + lm::workspace_bytes(be, adapter, tokens));
    kept = Memory(lm::reserve_bytes(adapter, tokens));
    reserve = kept.arena();
  }
  static constexpr bool is_prompt = lm::PromptAdapter<A>, is_dora = lm::DoraAdapter<A>, is_ia3 = lm::Ia3Adapter<A>;

  auto forward() {
    reserve.reset();
    lm::ForwardOptions<lm::Space::host> options{.save = &reserve, .dropout_off = true};
    options.sequences = lm::Groups<>::by_segment(offsets, 2);
    if constexpr (is_dora)
      return lm::forward(be, adapter, {weights, {squares.data(), d_out}}, x, y, work.arena(), options);
    else if constexpr (is_ia3)
      return lm::forward(be, adapter, y, y, work.arena(), options);
    else
      return lm::forward(be, adapter, x, y, work.arena(), options);
  }
  template <class Saved>
  void backward(const A& of, Saved& saved) {
    if constexpr (is_dora)
      lm::backward(be, of, {weights, {squares.data(), d_out}}, saved, x, dy, dx, lm::frozen, work.arena());
    else if constexpr (is_ia3)
      lm::backward(be, of, saved, y, dy, dy, lm::frozen, work.arena());
    else
      lm::backward(be, of, saved, x, dy, dx, lm::frozen, work.arena());
  }
  /// Refused, and nothing is written.
  template <class Saved>
  void refused(const A& of, Saved& saved, const std::string& part) {
    const auto before_dx = dx, before_dy = dy;
    check_error(lm::ErrorCode::state, {"backward", "saved", part}, [&] { backward(of, saved); });
    CHECK(same_bits(dx, before_dx));
    CHECK(same_bits(dy, before_dy));
  }

  lm::cpu::Backend<> be;
  Random random;
  A adapter, other;
  Index width;
  lm::Matrix<float> x, y, dy, dx, weights, squares;
  Memory work{0}, kept{0};
  lm::Arena<> reserve;
  const Index offsets[3] = {0, 4, tokens};

 private:
  Index output() const {
    if constexpr (is_prompt)
      return d_in;
    else
      return adapter.config().d_out;
  }
  Index rows() const {
    if constexpr (is_prompt)
      return adapter.output_rows(tokens, 2);
    else
      return tokens;
  }
};

}  // namespace

TEST_CASE_TEMPLATE("a Saved is used once, by its own adapter, and not after its reserve was used again", A,
                   lm::Lora<float>, lm::HydraLora<float>, lm::FusedLora<float>, lm::Dora<float>, lm::MosLora<float>,
                   lm::MultiLora<float>, lm::Ia3<float>, lm::Prompt<float>) {
  Layer<A> layer;
  auto saved = layer.forward();
  auto copy = saved;
  layer.refused(layer.other, saved, "another adapter");
  layer.backward(layer.adapter, saved);
  layer.refused(layer.adapter, saved, "spent");
  layer.refused(layer.adapter, copy, "copy");

  auto stale = layer.forward();
  auto fresh = layer.forward();
  layer.refused(layer.adapter, stale, "gone");
  layer.backward(layer.adapter, fresh);

  decltype(layer.forward()) never;
  layer.refused(layer.adapter, never, "spent");

#ifndef NDEBUG
  auto changed = layer.forward();
  layer.adapter.parameters()[0] += 1;
  check_error(lm::ErrorCode::state, {"backward", "changed its weights"},
              [&] { layer.backward(layer.adapter, changed); });
#endif
}

TEST_CASE("a MixLoRA block's Saved moves on from stage to stage: a copy from before is refused") {
  const lm::cpu::Backend<> be;
  Random random(5);
  lm::MixLora<float> block({.d_in = 7, .d_hidden = 6, .d_out = 5, .experts = 3, .rank = 2});
  fill_parameters(block, random);
  const auto x = random_matrix<float>(4, 7, random), u = random_matrix<float>(4, 6, random), v = u;
  const auto dy = random_matrix<float>(4, 5, random), dhbar = u;
  lm::Matrix<float> hbar(4, 6), du(4, 6), dv(4, 6), y(4, 5), dx(4, 7);
  Memory scratch(lm::workspace_bytes(be, block, 4, lm::Pass::backward)), kept(lm::reserve_bytes(block, 4));
  lm::Arena<> reserve = kept.arena();
  const auto work = [&] { return scratch.arena(); };
  auto saved = lm::route(be, block, x, reserve, work());
  auto routed = saved;
  lm::mix(be, block, saved, u, v, hbar, work());
  check_error(lm::ErrorCode::state, {"mix", "saved"}, [&] { lm::mix(be, block, routed, u, v, hbar, work()); });
  auto mixed = saved;
  lm::finish(be, block, saved, y, work());
  const auto once = y;
  check_error(lm::ErrorCode::state, {"finish", "saved"}, [&] { lm::finish(be, block, mixed, y, work()); });
  CHECK(same_bits(y, once));
  auto finished = saved;
  lm::finish_backward(be, block, saved, dy, lm::frozen, work());
  lm::mix_backward(be, block, saved, u, v, dhbar, du, dv, lm::frozen, work());
  auto middle = saved;
  lm::route_backward(be, block, saved, x, dx, lm::frozen, work());
  for (auto* old : {&saved, &finished, &middle}) {
    check_error(lm::ErrorCode::state, {"saved"}, [&] {
      if (old == &finished)
        lm::finish_backward(be, block, *old, dy, lm::frozen, work());
      else
        lm::route_backward(be, block, *old, x, dx, lm::frozen, work());
    });
  }
}

}  // namespace loramix_test

// What a reviewer's programs got past the doors of forward, backward and the optimisers; each is refused now.
#include <vector>

#include <loramix/adapter/fused_forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/mixlora.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/sgd.hpp>

#include <doctest/doctest.h>

#include "core/caught.hpp"

namespace lm = loramix;
using lm::ErrorCode;
using namespace loramix_test;

namespace {

struct Step {
  static constexpr lm::Index tokens = 10, d_in = 12, d_out = 9;
  lm::cpu::Backend<> be;
  lm::Lora<float> lora{{.d_in = d_in, .d_out = d_out, .rank = 4}};
  lm::Matrix<float> x{tokens, d_in}, y{tokens, d_out}, dy{tokens, d_out}, dx{tokens, d_in};
  std::vector<std::byte> scratch = std::vector<std::byte>(lm::workspace_bytes(be, lora, tokens, lm::Pass::backward)),
                         kept = std::vector<std::byte>(lm::reserve_bytes(lora, tokens));
  lm::Arena<> work{scratch}, reserve{kept};

  Step() { lm::initialise(lora, {.seed = 3}); }
  auto forward() { return lm::forward(be, lora, x, y, work, {.save = &reserve}); }
  void backward(lm::Saved<lm::Lora<float>>& saved) { lm::backward(be, lora, saved, x, dy, dx, lm::frozen, work); }
};

/// An engine's pool that counts no lane for the thread that waits.
struct NoLanes {
  lm::Index lanes() const { return 0; }
  template <class Job>
  void run(lm::Index jobs, const Job& job) const {
    for (lm::Index i = 0; i < jobs; ++i) job(i, lm::Index{0});
  }
};

}  // namespace

TEST_CASE("one arena cannot be workspace and reserve") {
  Step step;
  std::vector<std::byte> memory(step.scratch.size() + step.kept.size());
  lm::Arena<> one{memory};
  check_error(ErrorCode::alias, {"forward", "save", "work"},
              [&] { lm::forward(step.be, step.lora, step.x, step.y, one, {.save = &one}); });
}

TEST_CASE("what the reserve holds is used once, by the forward that left it") {
  Step step;
  auto first = step.forward();
  auto copy = first;
  step.backward(first);
  check_error(ErrorCode::state, {"backward", "saved"}, [&] { step.backward(copy); });

  step.reserve.reset();
  auto stale = step.forward();
  step.reserve.reset();
  auto fresh = step.forward();
  check_error(ErrorCode::state, {"backward", "saved", "gone"}, [&] { step.backward(stale); });
  step.backward(fresh);
}

TEST_CASE("a fused projection without slices has no gradient") {
  const lm::cpu::Backend<> be;
  lm::FusedLora<float> none({.d_in = 6, .d_out = 4, .slices = {}, .rank = 2, .shared_A = true});
  lm::initialise(none, {.seed = 1});
  lm::Matrix<float> x(3, 6), y(3, 4), dy(3, 4), dx(3, 6);
  for (lm::Index i = 0; i < 18; ++i) x.data()[i] = 1;
  auto grad = lm::zeros_like(none);
  std::vector<std::byte> scratch(lm::workspace_bytes(be, none, 3, lm::Pass::backward), std::byte{0x7f});
  std::vector<std::byte> kept(lm::reserve_bytes(none, 3));
  lm::Arena<> reserve{kept};
  auto saved = lm::forward(be, none, x, y, lm::Arena{scratch}, {.save = &reserve});
  lm::backward(be, none, saved, x, dy, dx, grad, lm::Arena{scratch});
  for (lm::Index i = 0; i < 18; ++i) CHECK(dx.data()[i] == 0);
  for (const float g : std::vector<float>(grad.parameters().data, grad.parameters().data + grad.parameters().size)) {
    CHECK(g == 0);
  }
}

TEST_CASE("an optimiser knows its adapter by its parameters, not by their number") {
  const lm::cpu::Backend<> be;
  lm::Lora<float> up({.d_in = 4, .d_out = 16, .rank = 2}), down({.d_in = 16, .d_out = 4, .rank = 2});
  REQUIRE(up.parameters().size == down.parameters().size);
  const auto up_gradient = lm::zeros_like(up), down_gradient = lm::zeros_like(down);
  lm::AdamW adamw(up);
  lm::Sgd sgd(up);
  check_error(ErrorCode::shape, {"AdamW", "gradient"}, [&] { adamw.step(be, up, down_gradient); });
  check_error(ErrorCode::shape, {"AdamW", "adapter"}, [&] { adamw.step(be, down, up_gradient); });
  check_error(ErrorCode::shape, {"Sgd", "gradient"}, [&] { sgd.step(be, up, down_gradient); });
  adamw.step(be, up, up_gradient);
}

TEST_CASE("an executor without lanes is refused") {
  Step step;
  const lm::cpu::Backend be{NoLanes{}};
  check_error(ErrorCode::value, {"lanes"}, [&] { lm::forward(be, step.lora, step.x, step.y, step.work); });
  lm::MixExperts<float, float, float, float, lm::Space::host, lm::Major::column> mix{};
  mix.z1 = {nullptr, Step::tokens, 4};
  mix.gate = {.tokens = Step::tokens, .ranks = 4, .experts = 2};
  check_error(ErrorCode::value, {"lanes"}, [&] { lm::scratch_bytes(be, mix); });
}

TEST_CASE("a transposed x is called that, not a small workspace") {
  Step step;
  lm::Matrix<float> transposed(Step::d_in, Step::tokens);
  check_error(ErrorCode::shape, {"forward", "x"},
              [&] { lm::forward(step.be, step.lora, transposed, step.y, step.work); });
}

TEST_CASE("a null dx with a size is no way to say that it is not wanted") {
  Step step;
  auto saved = step.forward();
  check_error(ErrorCode::null, {"dx"}, [&] {
    lm::backward(step.be, step.lora, saved, step.x, step.dy, lm::MatrixView<float>(nullptr, Step::tokens, Step::d_in),
                 lm::frozen, step.work);
  });
}

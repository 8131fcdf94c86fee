// The MixLoRA block, base products included, against golden values: tests/golden/README.md.
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/cpu/mixlora.hpp>

#include "golden/data/mix_lora.hpp"
#include "golden/golden.hpp"

namespace loramix_test {
namespace {

/// out (+)= a bᵀ, or a b: the engine's products.
template <class A, class B>
void multiply(const A& a, const B& b, bool transposed, lm::Matrix<double>& out) {
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index j = 0; j < out.cols(); ++j) {
      for (Index k = 0; k < (transposed ? b.cols : b.rows); ++k)
        out(i, j) += a(i, k) * (transposed ? b(j, k) : b(k, j));
    }
  }
}

TEST_CASE("golden: MixLoRA's block") {
  const golden::Table table(golden::mix_lora);
  const lm::cpu::Backend<> be;
  using Adapter = lm::MixLora<double>;
  Adapter mix({.d_in = 7, .d_hidden = 6, .d_out = 7, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5});
  Adapter::visit(mix, [&](const char* name, auto view, lm::ParameterGroup) {
    const golden::Tensor& from = table[name];
    REQUIRE(view.rows == from.rows);
    REQUIRE(view.cols == from.cols);
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = from(i, j);
    }
  });
  const golden::Tensor &x = table["x"], &dy = table["dy"], &W1 = table["W1"], &W3 = table["W3"], &W2 = table["W2"];
  lm::Matrix<double> u(5, 6), v(5, 6), hbar(5, 6), y(5, 7), dhbar(5, 6), du(5, 6), dv(5, 6), dx(5, 7);
  const Index bytes = lm::workspace_bytes(be, mix, 5), more = lm::workspace_bytes(be, mix, 5, lm::Pass::backward);
  std::vector<std::byte> work(static_cast<std::size_t>(std::max(bytes, more))),
      memory(static_cast<std::size_t>(lm::reserve_bytes(mix, 5)));
  lm::Arena<> reserve{memory};
  auto saved = lm::route(be, mix, x.view(), reserve, lm::Arena<>{work},
                         {.key = golden::key, .down_site = lm::site("golden.down")});
  multiply(x, W1, true, u);
  multiply(x, W3, true, v);
  lm::mix(be, mix, saved, u.view(), v.view(), hbar.view(), lm::Arena<>{work});
  multiply(hbar, W2, true, y);
  lm::finish(be, mix, saved, y.view(), lm::Arena<>{work});
  golden::check("y", y.view(), table["a/y"]);

  auto gradient = lm::zeros_like(mix);
  lm::finish_backward(be, mix, saved, dy.view(), gradient, lm::Arena<>{work});
  multiply(dy, W2, false, dhbar);
  lm::mix_backward(be, mix, saved, u.view(), v.view(), dhbar.view(), du.view(), dv.view(), gradient, lm::Arena<>{work});
  multiply(du, W1, false, dx);
  multiply(dv, W3, false, dx);
  lm::route_backward(be, mix, saved, x.view(), dx.view(), gradient, lm::Arena<>{work});
  golden::check("dx", dx.view(), table["a/d.x"]);
  decltype(gradient)::visit(gradient, [&](const char* name, auto view, lm::ParameterGroup) {
    golden::check(name, view, table[std::string("a/d.") + name]);
  });
}

}  // namespace
}  // namespace loramix_test

// An adapter against a table: forward, and all gradients of ⟨dy, ΔY⟩, in double. Include its forward before this.
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/cpu/cpu.hpp>

#include "golden/golden.hpp"

namespace loramix_test::golden {

/// What a case says beyond its configuration.
struct Case {
  std::string variant;
  std::string inputs{};  // whose inputs, if not the variant's
  lm::ForwardOptions<lm::Space::host> options{};
  bool draws = true;
};

struct NoLoss {
  template <class Saved>
  void operator()(const Saved&) const {}
};

/// `loss` may add to what forward saved before backward runs; `base` is what a forward beside a frozen weight takes.
template <class A, class Loss = NoLoss, class... Base>
void check_adapter(const Table& table, const typename A::Config& config, const Case& one, Loss&& loss = {},
                   const Base&... base) {
  const std::string& variant = one.variant;
  CAPTURE(variant);
  const lm::cpu::Backend<> be;
  A adapter(config);
  A::visit(adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    if (view.empty()) return;
    const Tensor& from = table.input(one.inputs.empty() ? variant : one.inputs, name);
    REQUIRE(view.rows == from.rows);
    REQUIRE(view.cols == from.cols);
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = from(i, j);
    }
  });
  const Tensor &x = table["x"], &dy = table["dy"];
  lm::Matrix<double> y(x.rows, dy.cols), dx(x.rows, x.cols);
  lm::Buffer<std::byte> work(workspace_bytes(be, adapter, x.rows, lm::Pass::backward) +
                             workspace_bytes(be, adapter, x.rows, lm::Pass::forward)),
      memory(reserve_bytes(adapter, x.rows));
  const auto arena = [](lm::Buffer<std::byte>& bytes) { return lm::Arena<>{bytes.data(), bytes.size()}; };
  lm::Arena<> reserve = arena(memory);
  auto options = one.options;
  options.save = &reserve;
  options.key = one.draws ? key : lm::no_draws;
  options.dropout_off = !one.draws;
  auto saved = forward(be, adapter, base..., x.view(), y.view(), arena(work), options);
  loss(saved);
  auto gradient = zeros_like(adapter);
  backward(be, adapter, base..., saved, x.view(), dy.view(), dx.view(), gradient, arena(work));

  check("y", y.view(), table[variant + "/y"]);
  if (table.has(variant + "/d.x")) check("dx", dx.view(), table[variant + "/d.x"]);
  decltype(gradient)::visit(gradient, [&](const char* name, auto view, lm::ParameterGroup) {
    if (!view.empty()) check(name, view, table[variant + "/d." + name]);
  });
}

}  // namespace loramix_test::golden

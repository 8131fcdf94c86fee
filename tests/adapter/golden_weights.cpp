// DoRA, MoSLoRA, MultiLoRA, AdaLoRA, IA3 and prompt tuning against golden values: tests/golden/README.md.
#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/prompt_forward.hpp>
#include <loramix/adapter/reparam_forward.hpp>
#include <loramix/train/ada_budget.hpp>

#include "golden/adapter.hpp"
#include "golden/data/ada_lora.hpp"
#include "golden/data/dora.hpp"
#include "golden/data/ia3.hpp"
#include "golden/data/mos_lora.hpp"
#include "golden/data/multi_lora.hpp"
#include "golden/data/prompt_tuning.hpp"

namespace loramix_test {
namespace {

TEST_CASE("golden: DoRA, MATH and PEFT, which drops the base's input too") {
  using Dora = lm::Dora<double>;
  const golden::Table table(golden::dora);
  const golden::Tensor& W = table["W"];
  std::vector<double> squares(6);
  for (Index i = 0; i < 6; ++i) {
    for (Index j = 0; j < 7; ++j) squares[static_cast<std::size_t>(i)] += W(i, j) * W(i, j);
  }
  const lm::DoraBase<Dora> base{W.view(), {squares.data(), 6}};
  lm::DoraConfig config{.d_in = 7, .d_out = 6, .rank = 2, .alpha = 3, .dropout = 0.5};
  const auto check = [&](const char* variant, bool draws = true) {
    golden::check_adapter<Dora>(table, config, {.variant = variant, .draws = draws}, golden::NoLoss{}, base);
  };
  check("none", false);
  check("peft_none", false);
  check("dropout");
  config.drop_base = true;
  check("drop_base");
  check("peft_drop_base");
}

TEST_CASE("golden: MoSLoRA and MultiLoRA") {
  golden::check_adapter<lm::MosLora<double>>(golden::Table(golden::mos_lora),
                                             {.d_in = 7, .d_out = 6, .rank = 2, .alpha = 3, .dropout = 0.5},
                                             {.variant = "a"});
  golden::check_adapter<lm::MultiLora<double>>(
      golden::Table(golden::multi_lora), {.d_in = 7, .d_out = 6, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5},
      {.variant = "a"});
}

TEST_CASE("golden: AdaLoRA's product, MATH and PEFT, and the budget of both") {
  const golden::Table table(golden::ada_lora);
  lm::AdaLoraConfig config{.d_in = 7, .d_out = 6, .rank = 2, .alpha = 3, .dropout = 0.5};
  golden::check_adapter<lm::AdaLora<double>>(table, config, {.variant = "dropout"});
  config.per_active_rank = true;  // α/(r + 1e-5), PEFT's scale
  golden::check_adapter<lm::AdaLora<double>>(table, config, {.variant = "peft"});

  const lm::AdaBudgetOptions options{
      .total_steps = 20, .initial_steps = 4, .final_steps = 6, .initial_budget = 24, .final_budget = 8};
  const golden::Tensor& budget = table["budget"];
  REQUIRE(budget.cols == 21);
  for (Index n = 0; n < budget.cols; ++n) CHECK(static_cast<double>(lm::budget_at(options, n)) == budget(0, n));
}

TEST_CASE("golden: AdaLoRA's orthogonality, twice PEFT's, and its importance") {
  using Ada = lm::AdaLora<double>;
  const golden::Table table(golden::ada_lora);
  const lm::cpu::Backend<> be;
  const lm::AdaLoraConfig config{.d_in = 7, .d_out = 6, .rank = 2, .alpha = 3};
  Ada first(config), second(config);
  const auto put = [](auto view, const golden::Tensor& from, double factor) {
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = factor * from(i, j);
    }
  };
  put(first.A(), table["lora_A.weight"], 1);
  put(first.B(), table["lora_B.weight"], 1);
  put(second.A(), table["second.A"], 1);
  put(second.B(), table["second.B"], 1);
  auto dfirst = lm::zeros_like(first), dsecond = lm::zeros_like(second);
  Ada* const layers[] = {&first, &second};
  lm::gradient_t<Ada>* const gradients[] = {&dfirst, &dsecond};
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::orthogonality_bytes<Ada>(2)));
  double value = 0;
  lm::orthogonality_loss(be, std::span<Ada* const>(layers), std::span<lm::gradient_t<Ada>* const>(gradients),
                         {.weight = 1}, {&value, 1}, lm::Arena<>{memory});
  golden::check("value", value, table["orthogonality/value"]);
  golden::check("PEFT's value", value / 2, table["orthogonality/peft_value"]);
  golden::check("dA", dfirst.A(), table["orthogonality/d.lora_A.weight"]);
  golden::check("dB", dfirst.B(), table["orthogonality/d.lora_B.weight"]);
  golden::check("dA of the second", dsecond.A(), table["orthogonality/d.second.A"]);
  golden::check("dB of the second", dsecond.B(), table["orthogonality/d.second.B"]);

  lm::AdaBudget<Ada> budget(std::span<Ada* const>(layers, 1), {.total_steps = 9, .initial_budget = 2});
  for (const double factor : {1.0, 0.5}) {  // two steps: the weights of the table, then half of them
    put(first.A(), table["lora_A.weight"], factor);
    put(first.B(), table["lora_B.weight"], factor);
    put(first.lambda(), table["lora_E"], factor);
    put(dfirst.A(), table["dropout/d.lora_A.weight"], 1);
    put(dfirst.B(), table["dropout/d.lora_B.weight"], 1);
    put(dfirst.lambda(), table["dropout/d.lora_E"], 1);
    budget.measure(be, std::span<Ada* const>(layers, 1), std::span<lm::gradient_t<Ada>* const>(gradients, 1));
  }
  REQUIRE(budget.prune(be, std::span<Ada* const>(layers, 1), 0));
  golden::check("score", lm::MatrixView<const double>{budget.scores().data, 1, 2}, table["importance/score"]);
}

/// a bᵀ or a b.
golden::Tensor product(const golden::Tensor& a, const golden::Tensor& b, bool transposed) {
  golden::Tensor c{a.rows, transposed ? b.rows : b.cols, {}};
  for (Index i = 0; i < c.rows; ++i) {
    for (Index j = 0; j < c.cols; ++j) {
      double sum = 0;
      for (Index k = 0; k < a.cols; ++k) sum += a(i, k) * (transposed ? b(j, k) : b(k, j));
      c.values.push_back(sum);
    }
  }
  return c;
}
golden::Tensor tensor(const lm::Matrix<double>& m) {
  return {m.rows(), m.cols(), std::vector<double>(m.data(), m.data() + m.rows() * m.cols())};
}

TEST_CASE("golden: IA3 on an output and before a feed-forward product, MATH and PEFT") {
  const golden::Table table(golden::ia3);
  const golden::Tensor &x = table["x"], &dy = table["dy"], &W = table["W"];
  const lm::cpu::Backend<> be;
  for (const bool inner : {false, true}) {
    lm::Ia3<double> ia3({.d_in = 7, .d_out = 6, .feed_forward = inner});
    const std::string name = inner ? "feedforward" : "output";
    golden::put(ia3.l(), table[name + ".ia3_l"]);
    const golden::Tensor in = inner ? x : product(x, W, true), dout = inner ? product(dy, W, false) : dy;
    lm::Matrix<double> out(in.rows, in.cols), din(in.rows, in.cols);
    std::vector<std::byte> work(1 << 14), memory(1 << 14);
    lm::Arena<> reserve{memory};
    auto saved = lm::forward(be, ia3, in.view(), out.view(), lm::Arena<>{work}, {.save = &reserve});
    auto gradient = lm::zeros_like(ia3);
    lm::backward(be, ia3, saved, in.view(), dout.view(), din.view(), gradient, lm::Arena<>{work});
    for (const std::string from : {"", "peft_"}) {
      CAPTURE(from + name);
      golden::check("y", (inner ? product(tensor(out), W, true) : tensor(out)).view(), table[from + name + "/y"]);
      golden::check("dx", (inner ? tensor(din) : product(tensor(din), W, false)).view(), table[from + name + "/d.x"]);
      golden::check("dl", gradient.l(), table[from + name + "/d.ia3_l"]);
    }
  }
}

TEST_CASE("golden: prompt tuning, MATH and PEFT") {
  const golden::Table table(golden::prompt_tuning);
  const golden::Tensor &x = table["x"], &dy = table["dy"];
  const lm::cpu::Backend<> be;
  lm::Prompt<double> prompt({.d_in = 7, .rows = 2});
  golden::put(prompt.rows(), table["prompt_embeddings"]);
  const auto check = [&](const char* variant, Index tokens, const std::vector<Index>& offsets) {
    CAPTURE(variant);
    const Index rows = tokens + 4;
    lm::Matrix<double> y(rows, 7), dx(tokens, 7);
    std::vector<std::byte> work(1 << 14), memory(static_cast<std::size_t>(lm::reserve_bytes(prompt, tokens)));
    lm::Arena<> reserve{memory};
    auto saved = lm::forward(be, prompt, x.view().row_range(0, tokens), y.view(), lm::Arena<>{work},
                             {.save = &reserve, .sequences = lm::Groups<>::by_segment(offsets.data(), 2)});
    auto gradient = lm::zeros_like(prompt);
    lm::backward(be, prompt, saved, x.view().row_range(0, tokens), dy.view().row_range(0, rows), dx.view(), gradient,
                 lm::Arena<>{work});
    golden::check("y", y.view(), table[std::string(variant) + "/y"]);
    golden::check("dx", dx.view(), table[std::string(variant) + "/d.x"]);
    golden::check("prompt", gradient.rows(), table[std::string(variant) + "/d.prompt_embeddings"]);
  };
  const std::vector<Index> ragged = table["offsets"].as<Index>(), equal{0, 2, 4};
  check("a", 5, ragged);
  check("two", 4, equal);
  check("peft_two", 4, equal);
}

}  // namespace
}  // namespace loramix_test

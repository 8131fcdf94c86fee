// Shapley values and the loss that trains S towards them, against golden values: tests/golden/README.md.
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/shapley.hpp>

#include "golden/data/shapley.hpp"
#include "golden/golden.hpp"

namespace loramix_test {
namespace {

double inner(const golden::Tensor& a, const golden::Tensor& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i) sum += a.values[i] * b.values[i];
  return sum;
}

TEST_CASE("golden: Shapley values, exact and closed form") {
  const golden::Table table(golden::shapley);
  const golden::Tensor &q = table["q"], *const h[3] = {&table["h0"], &table["h1"], &table["h2"]};
  const auto game = [&](std::uint64_t coalition) {
    double value = inner(q, q);
    for (std::size_t i = 0; i < q.values.size(); ++i) {
      double rest = q.values[i];
      for (int e = 0; e < 3; ++e) rest -= coalition >> e & 1 ? h[e]->values[i] : 0;
      value -= rest * rest;
    }
    return value;
  };
  double phi[3], with_q[3], gram[9];
  lm::shapley_exact(3, game, {phi, 3});
  golden::check("exact", lm::MatrixView<const double>{phi, 1, 3}, table["phi"]);
  for (int e = 0; e < 3; ++e) {
    with_q[e] = inner(q, *h[e]);
    for (int j = 0; j < 3; ++j) gram[3 * e + j] = inner(*h[e], *h[j]);
  }
  lm::shapley_closed_form(lm::VectorView<double>{with_q, 3}, lm::MatrixView<double>{gram, 3, 3}, {phi, 3});
  golden::check("closed form", lm::MatrixView<const double>{phi, 1, 3}, table["phi"]);
}

TEST_CASE("golden: the loss that trains S towards Shapley values") {
  const golden::Table table(golden::shapley);
  const lm::cpu::Backend<> be;
  const std::vector<std::uint8_t> valid = table["valid"].as<std::uint8_t>();
  lm::Matrix<double> dlogits(5, 3);
  std::vector<std::byte> memory(1 << 14);
  lm::Scores<double, lm::Space::host> scores{.logits = table["logits"].view(), .dlogits = dlogits};
  scores.valid = {valid.data(), 5};
  const double value = lm::shapley_loss(be, scores, table["phi_tokens"].view(), {}, lm::Arena<>{memory});
  golden::check("value", value, table["train/value"]);
  golden::check("gradient", dlogits.view(), table["train/d.logits"]);
}

}  // namespace
}  // namespace loramix_test

// AdamW and SGD against PyTorch's own: tests/golden/README.md.
#include <loramix/cpu/cpu.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/sgd.hpp>

#include "golden/data/optimisers.hpp"
#include "golden/golden.hpp"

namespace loramix_test {
namespace {

TEST_CASE("golden: four steps of AdamW and of SGD with momentum, both with decay") {
  const golden::Table table(golden::optimisers);
  const lm::cpu::Backend<> be;
  std::vector<double> adam = table["w"].values, sgd = adam, g = table["g"].values, m(7), v(7), b(7);
  const golden::Tensor &want_adam = table["adamw"], &want_sgd = table["sgd"];
  const auto flat = [](std::vector<double>& values) { return lm::VectorView<double>{values.data(), 7}; };
  for (Index t = 0; t < 4; ++t) {
    const lm::VectorView<const double> gradient{&g[static_cast<std::size_t>(7 * t)], 7};
    lm::adamw_step(be, flat(adam), gradient, flat(m), flat(v), {.lr = 0.05, .weight_decay = 0.25, .t = t + 1});
    lm::sgd_step(be, flat(sgd), gradient, flat(b), {.lr = 0.05, .momentum = 0.75, .weight_decay = 0.25});
    for (Index i = 0; i < 7; ++i) {
      CHECK(std::abs(adam[static_cast<std::size_t>(i)] - want_adam(t, i)) <= 1e-10);
      CHECK(std::abs(sgd[static_cast<std::size_t>(i)] - want_sgd(t, i)) <= 1e-10);
    }
  }
}

}  // namespace
}  // namespace loramix_test

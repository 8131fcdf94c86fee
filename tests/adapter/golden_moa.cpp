// MoA against golden values: tests/golden/README.md.
#include <loramix/adapter/moa.hpp>
#include <loramix/ops/losses.hpp>

#include "golden/adapter.hpp"
#include "golden/data/moa.hpp"

namespace loramix_test {
namespace {

TEST_CASE("golden: MoA by label with the routing loss, and by its own argmax with the multiplier") {
  const golden::Table table(golden::moa);
  const std::vector<Index> offsets = table["offsets"].as<Index>();
  const std::vector<std::int32_t> labels = table["labels"].as<std::int32_t>();
  const std::vector<std::uint8_t> valid = table["valid"].as<std::uint8_t>();
  const lm::cpu::Backend<> be;
  lm::MoaConfig config{.d_in = 7, .d_out = 6, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5};
  lm::ForwardOptions<lm::Space::host> options;
  options.sequences = lm::Groups<>::by_segment(offsets.data(), 3);
  options.valid = {valid.data(), 7};

  golden::Case one{.variant = "argmax", .options = options};
  config.straight_through = true;
  golden::check_adapter<lm::Moa<double>>(table, config, one);

  config.straight_through = false;
  one.options.labels = {labels.data(), 3};
  for (const char* variant : {"mean", "last"}) {
    one.variant = variant;
    config.pooling = one.variant == "mean" ? lm::Pooling::mean : lm::Pooling::last;
    golden::check_adapter<lm::Moa<double>>(table, config, one, [&](const auto& saved) {
      std::vector<std::byte> memory(1 << 14);
      const double ce = lm::routing_loss(be, saved, {.weight = 0.75}, lm::Arena<>{memory});
      golden::check("CE", ce, table[one.variant + "/ce"]);
    });
  }
}

}  // namespace
}  // namespace loramix_test

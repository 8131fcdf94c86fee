// A MoA through a file: the experts there are, not the places kept free for more.
#include <loramix/io/adapter.hpp>

#include <cstring>

#include <loramix/adapter/domains.hpp>

#include "io/support.hpp"

namespace lm = loramix;
using loramix_test::Folder;

namespace {

TEST_CASE("save and load: config, experts, router; a domain can be added afterwards") {
  const Folder folder;
  for (const bool router : {true, false}) {
    lm::Moa<float> moa({.d_in = 7,
                        .d_out = 5,
                        .experts = 3,
                        .rank = 2,
                        .alpha = 3,
                        .places = 6,
                        .pooling = lm::Pooling::last,
                        .router = router});
    lm::initialise(moa, {.seed = 3, .site = "layers.0"});
    for (lm::Index i = 0; i < 3 * 2 * 5; ++i) moa.B().data[i] = static_cast<float>(i) - 7.5f;
    if (router) moa.gate().bias(0, 2) = 0.25f;
    lm::io::save(folder / "moa", "layers.0.block", moa);
    lm::Moa<float> back = lm::io::load<lm::Moa<float>>(folder / "moa", "layers.0.block");
    const lm::MoaConfig& config = back.config();
    CHECK(config.places == 6);
    CHECK(config.pooling == lm::Pooling::last);
    CHECK(config.router == router);
    CHECK(back.scale() == moa.scale());
    REQUIRE(back.parameters().size == moa.parameters().size);
    CHECK(std::memcmp(back.parameters().data, moa.parameters().data,
                      static_cast<std::size_t>(moa.parameters().size) * sizeof(float)) == 0);
    CHECK(moa.A()(5, 6) != 0);
    lm::add_domain(back, lm::domain(moa, 1));
    CHECK(back.config().experts == 4);
  }
}

}  // namespace

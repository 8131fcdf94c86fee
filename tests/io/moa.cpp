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

TEST_CASE("numbers of a file that no tensor's shape holds are refused before memory is taken for them") {
  const Folder folder;
  using Moa = lm::Moa<float>;
  const std::string path = folder / "moa";
  lm::io::save(path, "m", Moa({.d_in = 7, .d_out = 5, .experts = 3, .rank = 2, .places = 6}));
  const std::string good = loramix_test::get(path);
  const auto refused = [&](const std::string& bytes, const lm::io::LoadOptions& options, const char* part) {
    loramix_test::put(path, bytes);
    std::string said;
    try {
      lm::io::load<Moa>(path, "m", options);
    } catch (const lm::Error& error) {
      said = error.what();
    }
    CHECK_MESSAGE(said.find(part) != std::string::npos, said);
  };
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string bytes = good;
    REQUIRE(bytes.find(from) != std::string::npos);
    return bytes.replace(bytes.find(from), from.size(), to);
  };
  CHECK(lm::io::load<Moa>(path, "m", {.most_places = 6}).config().places == 6);
  refused(good, {.most_places = 5}, "config field places is 6, above LoadOptions::most_places, 5");
  refused(changed("experts\\\":3", "experts\\\":9"), {}, "is of 9 experts, but the file has 8 tensors");
  refused(changed("pooling\\\":0", "pooling\\\":2"), {}, "config field pooling is 2, is none of its values, 0 to 1");
}

}  // namespace

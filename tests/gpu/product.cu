// What the conformance table leaves out: several chunks of tokens, precisions that widen everything, the dropout mask
// itself, activations of closed experts that are not finite.
#include <loramix/ops/draw_mask.hpp>

#include "conformance/product.hpp"
#include "gpu/harness.cuh"

namespace lm = loramix;
using namespace loramix_test;

namespace {

constexpr lm::Space device = lm::Space::device;

const GateSpec& gate_named(const std::string& name) {
  for (const GateSpec& spec : gate_specs()) {
    if (name == spec.name) return spec;
  }
  FAIL("no gate ", name);
  return gate_specs()[0];
}

/// 2,500 tokens are three chunks of the composed path.
template <class P>
void conforms_in_chunks(const char* gate, const ProductShape& shape, bool dropout, lm::Into into) {
  GpuHarness gpu;
  Random random(seed(5));
  const ProductCase c{gate_named(gate), shape, dropout, into, 3, 1};
  INFO(describe(c));
  ProductTest<P, GpuHarness>(gpu, c, random).run_all();
  CHECK(gpu.release());
}

// Gradients, weights and activations are narrower than the accumulation; in the second also scores.
using Widened = lm::Precision<float, float, double, float>;
using AllWidened = lm::Precision<float, float, double, float, float>;

}  // namespace

TEST_CASE("sums over several chunks of tokens") {
  conforms_in_chunks<float>("every slot", {2500, 9, 7, 3, 2}, true, lm::Into::set);
  conforms_in_chunks<float>("softmax x multiplier x rank scale", {1024, 5, 6, 2, 2}, false, lm::Into::add);
  conforms_in_chunks<lm::bfloat16>("top-2", {2049, 9, 7, 3, 2}, true, lm::Into::add);
}

TEST_CASE("any mix of types is widened") {
  conforms_in_chunks<Widened>("softmax x multiplier x rank scale", {1025, 6, 5, 2, 2}, true, lm::Into::set);
  conforms_in_chunks<Widened>("softmax", {0, 17, 12, 3, 2}, false, lm::Into::set);
  conforms_in_chunks<AllWidened>("every slot", {40, 17, 12, 3, 2}, true, lm::Into::add);
  conforms_in_chunks<lm::Precision<double, float>>("top-2 of a task", {31, 17, 12, 4, 2}, false, lm::Into::add);
  conforms_in_chunks<lm::Precision<lm::half, lm::bfloat16>>("top-2", {31, 17, 12, 4, 2}, true, lm::Into::add);
}

TEST_CASE("scores narrower than the accumulation") {
  // Small integers: every sum is exact in every type.
  constexpr Index tokens = 5, width = 3;
  GpuHarness gpu;
  std::vector<float> h(tokens), dside(width, 1.0f), dx(tokens * width, 1.0f);
  const lm::MatrixView<const float, device> side{gpu.upload(std::vector<float>{1, 2, -1}), 1, width};
  std::vector<float> x(tokens * width), dh(tokens);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  for (std::size_t t = 0; t < dh.size(); ++t) dh[t] = static_cast<float>(t) - 1;
  const lm::MatrixView<const float, device> x_view{gpu.upload(x), tokens, width}, dh_view{gpu.upload(dh), tokens, 1};
  const lm::MatrixView<const float, device> A{nullptr, 0, width};
  float* const h_memory = gpu.upload(h);
  float* const dside_memory = gpu.upload(dside);
  float* const dx_memory = gpu.upload(dx);
  run(gpu, lm::Shrink<float, float, double, float, device>{
               A, side, x_view, {}, {nullptr, tokens, 0}, {h_memory, tokens, 1}});
  run(gpu, lm::ShrinkBackward<float, float, double, float, float, device>{A,
                                                                          side,
                                                                          x_view,
                                                                          {},
                                                                          {nullptr, tokens, 0},
                                                                          dh_view,
                                                                          {},
                                                                          {dside_memory, 1, width},
                                                                          {dx_memory, tokens, width}});
  gpu.download(h_memory, h);
  gpu.download(dside_memory, dside);
  gpu.download(dx_memory, dx);
  for (std::size_t t = 0; t < tokens; ++t) {
    CHECK(h[t] == x[3 * t] + 2 * x[3 * t + 1] - x[3 * t + 2]);
    CHECK(dx[3 * t + 1] == 1 + 2 * dh[t]);
  }
  CHECK(dside[2] == 1 - x[2] + x[8] + 2 * x[11] + 3 * x[14]);
  CHECK(gpu.release());
}

TEST_CASE("the dropout mask is the host's, bit by bit") {
  // A = identity and x = 1, so that U is the mask itself. Tokens cross 2³² and a chunk.
  constexpr Index tokens = 1030, width = 21;
  GpuHarness gpu;
  const lm::Key key{
      .seed = 42, .site = lm::site("layers.0.mlp.up_proj"), .step = 3, .first_token = (std::uint64_t{1} << 32) - 500};
  const lm::Dropout dropout = lm::make_dropout("test", 0.1, key);
  std::vector<float> identity(width * width), ones(tokens * width, 1.0f), mask(tokens * width);
  for (std::size_t i = 0; i < width; ++i) identity[i * width + i] = 1;
  float* const u = gpu.upload(mask);
  run(gpu, lm::Shrink<float, float, float, float, device>{{gpu.upload(identity), width, width},
                                                          {},
                                                          {gpu.upload(ones), tokens, width},
                                                          dropout,
                                                          {u, tokens, width},
                                                          {}});
  gpu.download(u, mask);
  Index wrong = 0, dropped = 0;
  for (Index t = 0; t < tokens; ++t) {
    for (Index c = 0; c < width; ++c) {
      const bool keep = reference::keep(42, lm::site("layers.0.mlp.up_proj"), 3,
                                        key.first_token + static_cast<std::uint64_t>(t), c, dropout.p16);
      wrong +=
          mask[static_cast<std::size_t>(t * width + c)] != (keep ? static_cast<float>(dropout.kept_scale()) : 0.0f);
      wrong += keep != dropout.keep(t, c);
      dropped += !keep;
    }
  }
  CHECK(wrong == 0);
  CHECK(std::abs(static_cast<double>(dropped) / (tokens * width) - 0.1) < 0.01);
}

namespace {

/// Under the bits that were drawn before, in memory that ends with the last token, everything is as under those that are drawn when
/// they are asked for.
template <class X>
void saved_bits_are_those_drawn(bool fused) {
  constexpr Index tokens = 1030, width = 500, ranks = 24,
                  side = 3;  // a chunk and six tokens; columns behind the last warp
  GpuHarness gpu;
  gpu.tuning.fused = fused;
  const auto upload = [&](auto zero, Index rows, Index cols) {
    std::vector<decltype(zero)> values(static_cast<std::size_t>(rows * cols));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = lm::narrow<decltype(zero)>(static_cast<float>((i * 31 + 7) % 17) / 8 - 1);
    }
    return gpu.upload(values);
  };
  const lm::MatrixView<const X, device> A{upload(X{}, ranks, width), ranks, width},
      S{upload(X{}, side, width), side, width}, x{upload(X{}, tokens, width), tokens, width};
  const lm::MatrixView<const float, device> du{upload(0.0f, tokens, ranks), tokens, ranks},
      dh{upload(0.0f, tokens, side), tokens, side};
  const auto results = [&](const lm::Dropout& dropout) {
    std::vector<float> all;
    const auto take = [&](const auto* from, Index count) {
      std::vector<std::remove_cv_t<std::remove_pointer_t<decltype(from)>>> values(static_cast<std::size_t>(count));
      gpu.download(from, values);
      for (const auto v : values) all.push_back(lm::widen<float>(v));
    };
    float* const u = upload(0.0f, tokens, ranks);
    float* const h = upload(0.0f, tokens, side);
    float* const dA = upload(0.0f, ranks, width);
    float* const dside = upload(0.0f, side, width);
    X* const dx = upload(X{}, tokens, width);
    run(gpu, lm::Shrink<X, X, float, float, device>{A, S, x, dropout, {u, tokens, ranks}, {h, tokens, side}});
    run(gpu, lm::ShrinkBackward<X, X, float, float, float, device>{
                 A, S, x, dropout, du, dh, {dA, ranks, width}, {dside, side, width}, {dx, tokens, width}});
    take(u, tokens * ranks);
    take(h, tokens * side);
    take(dA, ranks * width);
    take(dside, side * width);
    take(dx, tokens * width);
    return all;
  };
  const lm::Dropout dropout = lm::make_dropout("test", 0.1, {.seed = 42, .site = 7, .step = 3, .first_token = 11});
  lm::Buffer<std::uint8_t, device> bits(tokens * lm::mask_bytes(width));
  const lm::Dropout saved =
      lm::draw_mask(gpu.backend(), dropout, tokens, width,
                    lm::MatrixView<std::uint8_t, device>{bits.data(), tokens, lm::mask_bytes(width)});
  REQUIRE(saved.mask == bits.data());
  CHECK(results(saved) == results(dropout));
  CHECK(gpu.release());
}

}  // namespace

TEST_CASE("a dropout mask that was saved is the one that is drawn") {
  saved_bits_are_those_drawn<float>(true);
  saved_bits_are_those_drawn<lm::bfloat16>(true);
  saved_bits_are_those_drawn<float>(false);
}

TEST_CASE("what a closed expert computes goes nowhere") {
  constexpr Index tokens = 3, experts = 2, rank = 2, width = 5;
  GpuHarness gpu;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Expert 1 is chosen by no token and holds NaN; so does every rank of token 1, which chose none.
  const std::vector<float> u{1, 2, nan, nan, nan, nan, nan, nan, 3, 4, nan, nan};
  const std::vector<std::int32_t> ids{0, -1, 0};
  const std::vector<float> B(width * experts * rank, 0.5f), dy(tokens * width, 1.0f);
  std::vector<float> y(tokens * width, nan), du(u.size(), nan);
  const auto form = lm::OneExpert<float, device>{{gpu.upload(ids), tokens}, {}, experts}.form(tokens, experts * rank);
  const lm::MatrixView<const float, device> u_view{gpu.upload(u), tokens, experts * rank};
  const lm::MatrixView<const float, device, lm::Major::column> B_view{gpu.upload(B), width, experts * rank};
  float* const y_memory = gpu.upload(y);
  float* const du_memory = gpu.upload(du);
  run(gpu, lm::Expand<float, float, float, float, device, lm::Major::column>{
               u_view, form, B_view, 1.0f, {y_memory, tokens, width}, lm::Into::set});
  run(gpu, lm::ExpandBackward<float, float, float, float, float, device, lm::Major::column>{
               u_view, form, B_view, 1.0f, {gpu.upload(dy), tokens, width}, {du_memory, tokens, experts * rank}});
  gpu.download(y_memory, y);
  gpu.download(du_memory, du);
  for (std::size_t i = 0; i < y.size(); ++i) CHECK(y[i] == (i < 5 ? 1.5f : i < 10 ? 0.0f : 3.5f));
  for (std::size_t i = 0; i < du.size(); ++i) CHECK(du[i] == (i % 4 < 2 && i / 4 != 1 ? 2.5f : 0.0f));
  CHECK(gpu.release());
}

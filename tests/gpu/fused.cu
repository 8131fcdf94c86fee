// What the fused kernels promise beyond conformance: bits that depend neither on how work is cut nor on the tokens around one,
// the bounds of the arithmetics that round, and launches.
#include "conformance/product.hpp"
#include "gpu/forbidden_calls.hpp"
#include "gpu/harness.cuh"

namespace lm = loramix;
using namespace loramix_test;

namespace {

constexpr lm::Space device = lm::Space::device;

std::vector<float> random_values(Index n, std::uint64_t site) {
  Random random(seed(site));
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = static_cast<float>(draw(random));
  return values;
}
template <class T>
std::vector<T> narrowed(const std::vector<float>& values) {
  std::vector<T> out;
  for (const float v : values) out.push_back(lm::narrow<T>(v));
  return out;
}

/// Both products of a forward on the device: u = x̂ Aᵀ, h = x sideᵀ, y = 1.25 (u ∘ scale) Bᵀ; d_in 300, d_out 290, R 18, n 3.
template <class T>
class Forward {
 public:
  static constexpr Index d_in = 300, d_out = 290, ranks = 18, side = 3;
  struct Results {
    std::vector<float> u, h;
    std::vector<T> y;
  };

  explicit Forward(GpuHarness& gpu) : gpu_(gpu) {
    A_ = gpu.upload(narrowed<T>(random_values(ranks * d_in, 71)));
    side_ = gpu.upload(narrowed<T>(random_values(side * d_in, 72)));
    B_ = gpu.upload(narrowed<T>(random_values(ranks * d_out, 73)));
    scale_ = gpu.upload(random_values(ranks, 74));
  }

  /// Tokens with the global ids first, first + 1, …; row t of x is drawn for its own id.
  Results run(Index first, Index tokens) {
    std::vector<float> x;
    for (Index t = first; t < first + tokens; ++t) {
      const std::vector<float> row = random_values(d_in, 1000 + static_cast<std::uint64_t>(t));
      x.insert(x.end(), row.begin(), row.end());
    }
    Results r{std::vector<float>(static_cast<std::size_t>(tokens * ranks)),
              std::vector<float>(static_cast<std::size_t>(tokens * side)),
              std::vector<T>(static_cast<std::size_t>(tokens * d_out))};
    float *const u = gpu_.upload(r.u), *const h = gpu_.upload(r.h);
    T* const y = gpu_.upload(r.y);
    const lm::Dropout dropout = lm::make_dropout(
        "test", 0.3, {.seed = 5, .site = lm::site("x"), .first_token = static_cast<std::uint64_t>(first)});
    loramix_test::run(gpu_, lm::Shrink<T, T, float, float, device>{{A_, ranks, d_in},
                                                                   {side_, side, d_in},
                                                                   {gpu_.upload(narrowed<T>(x)), tokens, d_in},
                                                                   dropout,
                                                                   {u, tokens, ranks},
                                                                   {h, tokens, side}});
    const auto form = lm::RankScale<float, device>{{scale_, ranks}}.form(tokens, ranks);
    loramix_test::run(gpu_,
                      lm::Expand<float, T, T, float, device, lm::Major::column>{
                          {u, tokens, ranks}, form, {B_, d_out, ranks}, 1.25f, {y, tokens, d_out}, lm::Into::set});
    gpu_.download(u, r.u);
    gpu_.download(h, r.h);
    gpu_.download(y, r.y);
    return r;
  }

 private:
  GpuHarness& gpu_;
  const T *A_, *side_, *B_;
  const float* scale_;
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
template <class R>
bool same_results(const R& a, const R& b) {
  return same_bits(a.u, b.u) && same_bits(a.h, b.h) && same_bits(a.y, b.y);
}
/// Row `t` of a matrix.
template <class T>
std::vector<T> row_of(const std::vector<T>& m, Index t, Index cols) {
  return {m.begin() + t * cols, m.begin() + (t + 1) * cols};
}

/// d_in in five chunks.
constexpr lm::gpu::Tuning chunked{.machine = {.multiprocessors = 1000}, .block_bytes = 1};

}  // namespace

TEST_CASE_TEMPLATE("who adds up the chunks changes no bit", T, float, lm::bfloat16, lm::half) {
  GpuHarness gpu;
  Forward<T> forward(gpu);
  gpu.tuning = chunked;
  const auto shared = forward.run(0, 70);
  CHECK(shared.u[0] != 0);
  gpu.with_tickets = false;
  CHECK(same_results(forward.run(0, 70), shared));
  gpu.tuning.machine.multiprocessors = 1;
  CHECK(same_results(forward.run(0, 70), shared));
  gpu.tuning.block_bytes = lm::gpu::Tuning{}.block_bytes;  // one chunk is another sum
  CHECK_FALSE(same_bits(forward.run(0, 70).u, shared.u));
  CHECK(gpu.release());
}

TEST_CASE("who adds up a backward's chunks of tokens changes no bit") {
  GpuHarness gpu;
  constexpr Index tokens = 300, m = 21, n = 70;
  const lm::MatrixView<const float, device> left{gpu.upload(random_values(tokens * m, 91)), tokens, m},
      right{gpu.upload(random_values(tokens * n, 92)), tokens, n};
  const auto sum = [&] {
    std::vector<float> out(static_cast<std::size_t>(m * n), 1.0f);
    float* const there = gpu.upload(out);
    loramix_test::run(gpu, lm::TokenProduct<float, float, device>{left, right, {there, m, n}});
    gpu.download(there, out);
    return out;
  };
  gpu.tuning = chunked;
  const int before = launches();
  const auto shared = sum();
  CHECK(launches() - before == 1);
  CHECK(shared[0] != 1);
  CHECK(same_bits(sum(), shared));
  gpu.with_tickets = false;
  CHECK(same_bits(sum(), shared));
  CHECK(launches() - before == 4);
  gpu.tuning = {};  // one chunk is another sum
  CHECK_FALSE(same_bits(sum(), shared));
  CHECK(gpu.release());
}

TEST_CASE_TEMPLATE("a token's result does not depend on the tokens around it", T, float, lm::bfloat16) {
  GpuHarness gpu;
  Forward<T> forward(gpu);
  gpu.tuning = chunked;
  const auto check_class = [&](Index most, std::initializer_list<Index> sizes) {
    const auto all = forward.run(0, most);
    for (const Index tokens : sizes) {
      CAPTURE(tokens);
      const Index first = most - tokens;
      const auto some = forward.run(first, tokens);
      for (Index t = 0; t < tokens; ++t) {
        CHECK(same_bits(row_of(some.u, t, Forward<T>::ranks), row_of(all.u, first + t, Forward<T>::ranks)));
        CHECK(same_bits(row_of(some.h, t, Forward<T>::side), row_of(all.h, first + t, Forward<T>::side)));
        CHECK(same_bits(row_of(some.y, t, Forward<T>::d_out), row_of(all.y, first + t, Forward<T>::d_out)));
      }
    }
  };
  check_class(4, {1, 3});
  check_class(64, {5, 17, 63});
  check_class(150, {65, 128});
  CHECK(gpu.release());
}

TEST_CASE("arithmetics that round stay inside their bounds") {
  GpuHarness gpu;
  Forward<float> exact(gpu);
  const auto want = exact.run(0, 40);
  // Products of values below 1, rounded to 11 bits: 2⁻¹¹ of each factor.
  const auto check_within = [](const std::vector<float>& got, const std::vector<float>& want, double bound) {
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) worst = std::fmax(worst, std::abs(double{got[i]} - double{want[i]}));
    CHECK(worst <= bound);
    CHECK(worst > 0);
  };
  gpu.tuning.tf32 = true;
  const auto tf32 = exact.run(0, 40);
  const double factor = 2 * 0x1p-11 + 0x1p-20;
  check_within(tf32.h, want.h, 300 * factor);
  check_within(tf32.u, want.u, 300 / 0.7 * factor);
  gpu.tuning.tf32 = false;

  Forward<lm::bfloat16> rounding(gpu);
  const auto all_bits = rounding.run(0, 40);
  gpu.tuning.terms = lm::gpu::RankTerms::rounded;
  const auto rounded = rounding.run(0, 40);
  CHECK(same_bits(rounded.u, all_bits.u));
  CHECK_FALSE(same_bits(rounded.y, all_bits.y));
  double largest = 0, worst = 0;
  for (std::size_t i = 0; i < rounded.y.size(); ++i) {
    worst = std::fmax(worst, std::abs(to_double(rounded.y[i]) - to_double(all_bits.y[i])));
  }
  for (const float u : rounded.u) largest = std::fmax(largest, std::abs(double{u}));
  // |y| ≤ 1.25 · 18 · largest; ũ is rounded by 2⁻⁹, y twice by 2⁻⁹.
  CHECK(worst <= 1.25 * 18 * largest * 3 * 0x1p-9);
  CHECK(gpu.release());
}

TEST_CASE("launches: one for shrink and expand, two for each backward") {
  GpuHarness gpu;
  gpu.tuning = chunked;
  constexpr Index tokens = 70, width = 200, ranks = 10;
  const auto matrix = [&](Index rows, Index cols) { return gpu.upload(random_values(rows * cols, 81)); };
  const auto counted = [&](const auto& op) {
    const auto arena = gpu.arena(lm::scratch_bytes(gpu.backend(), op));
    const int before = launches();
    lm::execute(gpu.backend(), op, arena);
    return launches() - before;
  };
  const lm::MatrixView<const float, device> A{matrix(ranks, width), ranks, width},
      x{matrix(tokens, width), tokens, width};
  const lm::MatrixView<const float, device, lm::Major::column> B{matrix(width, ranks), width, ranks};
  const lm::MatrixView<float, device> u{matrix(tokens, ranks), tokens, ranks}, du{matrix(tokens, ranks), tokens, ranks};
  const lm::MatrixView<float, device> y{matrix(tokens, width), tokens, width}, dA{matrix(ranks, width), ranks, width};
  const auto form = lm::OpenGate<float, device>{}.form(tokens, ranks);
  const lm::ExpandBackward<float, float, float, float, float, device, lm::Major::column> expand{
      u, form, B, 1.0f, x, du, {matrix(width, ranks), width, ranks}};
  const lm::ShrinkBackward<float, float, float, float, float, device> shrink{A, {}, x, {}, du, {}, dA, {}, y};
  CHECK(counted(lm::Shrink<float, float, float, float, device>{A, {}, x, {}, u, {}}) == 1);
  CHECK(counted(lm::Expand<float, float, float, float, device, lm::Major::column>{u, form, B, 1.0f, y}) == 1);
  CHECK(counted(expand) == 2);
  CHECK(counted(shrink) == 2);
  gpu.with_tickets = false;  // what blocks share takes a launch of its own
  CHECK(counted(lm::Shrink<float, float, float, float, device>{A, {}, x, {}, u, {}}) == 2);
  CHECK(gpu.release());
}

// Merging and conversions in device memory: half a unit in the last place of a sum in long double, and bytes that come back.
#include <cmath>
#include <cstring>
#include <random>

#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/merge_on_device.hpp>
#include <loramix/ops/convert.hpp>

#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;
constexpr lm::Space device = lm::Space::device;

namespace {

template <class T>
std::vector<T> draw(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& v : values) v = lm::narrow<T>(uniform(random));
  return values;
}
template <class T>
long double wide(T v) {
  return static_cast<long double>(lm::widen<double>(v));
}
/// Unit roundoff.
template <class T>
constexpr long double unit = std::is_same_v<T, float>      ? 0x1p-24L
                             : std::is_same_v<T, lm::half> ? 0x1p-11L
                                                           : 0x1p-8L;

/// `lambda(j)`: the scale of rank j.
template <class Adapter, class T, class F>
void check_merge(const F& lambda) {
  GpuHarness gpu;
  constexpr Index d_in = 300, d_out = 37, rank = 5;
  using Element = typename Adapter::element;
  Adapter adapter({.d_in = d_in, .d_out = d_out, .rank = rank, .alpha = 7});
  const auto values = draw<Element>(adapter.parameters().size, 1);
  lm::gpu::copy(lm::VectorView<const Element>(values.data(), adapter.parameters().size), adapter.parameters());
  const Index at_B = adapter.B().data - adapter.parameters().data;
  const auto before = draw<T>(d_out * d_in, 2);
  std::vector<T> merged = before, kept(before.size());
  std::vector<lm::MergeReport> report(1);
  const lm::MatrixView<T, device> W{gpu.upload(merged), d_out, d_in}, old{gpu.upload(kept), d_out, d_in};
  const lm::MergePlaces<T> places{old, {gpu.upload(report), 1}};
  lm::merge(gpu.backend(), adapter, W, places, gpu.arena(lm::merge_bytes(d_out)));
  gpu.download(W.data, merged);
  gpu.download(old.data, kept);
  gpu.download(places.report.data, report);
  CHECK(std::memcmp(kept.data(), before.data(), kept.size() * sizeof(T)) == 0);
  int wrong = 0;
  long double largest = 0, squares = 0, change = 0;
  for (Index o = 0; o < d_out; ++o) {
    for (Index c = 0; c < d_in; ++c) {
      const std::size_t i = static_cast<std::size_t>(o * d_in + c);
      long double sum = 0, absolute = std::abs(wide(before[i]));
      for (Index j = 0; j < rank; ++j) {  // A [R, d_in], then B rank-major
        const long double term = wide(values[static_cast<std::size_t>(at_B + j * d_out + o)]) *
                                 lambda(values, adapter, j) * wide(values[static_cast<std::size_t>(j * d_in + c)]);
        sum += term;
        absolute += std::abs(term);
      }
      const long double exact = wide(before[i]) + static_cast<long double>(adapter.scale()) * sum;
      const long double slack = absolute * 2 * (rank + 4) * 0x1p-53L, error = std::abs(wide(merged[i]) - exact);
      wrong += !(error <= unit<T> * std::abs(exact) + slack);
      largest = std::max(largest, error);
      squares += error * error;
      change = std::max(change, std::abs(exact - wide(before[i])));
    }
  }
  CHECK(wrong == 0);
  CHECK(change > 0.1L);
  CHECK(std::abs(static_cast<long double>(report[0].max_rounding) - largest) <= 1e-12L);
  CHECK(std::abs(static_cast<long double>(report[0].rms_rounding) - std::sqrt(squares / (d_out * d_in))) <= 1e-12L);
  lm::gpu::copy(gpu.stream(), lm::MatrixView<const T, device>(old), W);  // undone
  gpu.download(W.data, merged);
  CHECK(std::memcmp(merged.data(), before.data(), merged.size() * sizeof(T)) == 0);
  CHECK(gpu.release());
}

template <class From, class To>
void check_convert() {
  GpuHarness gpu;
  constexpr Index rows = 3, cols = 300, stride = 304;
  const auto from = draw<From>(rows * cols, 5);
  std::vector<To> to(static_cast<std::size_t>(rows * stride), lm::narrow<To>(7.0));
  const lm::MatrixView<To, device> there{gpu.upload(to), rows, cols, stride};
  lm::convert(gpu.backend(), lm::MatrixView<const From, device>{gpu.upload(from), rows, cols}, there);
  gpu.download(there.data, to);
  int wrong = 0;
  for (Index t = 0; t < rows; ++t) {
    for (Index c = 0; c < stride; ++c) {
      const To got = to[static_cast<std::size_t>(t * stride + c)];
      const To want = c < cols ? lm::narrow<To>(lm::widen<double>(from[static_cast<std::size_t>(t * cols + c)]))
                               : lm::narrow<To>(7.0);
      wrong += std::memcmp(&got, &want, sizeof got) != 0;
    }
  }
  CHECK(wrong == 0);
  CHECK(gpu.release());
}

const auto one = [](const auto&, const auto&, Index) { return 1.0L; };
const auto of_rank = [](const auto& values, auto& adapter, Index j) {
  return wide(values[static_cast<std::size_t>(adapter.lambda().data - adapter.parameters().data + j)]);
};

}  // namespace

TEST_CASE("merge on the device rounds once, says by how much, and is undone to the last bit") {
  check_merge<lm::Lora<float, device>, float>(one);
  check_merge<lm::Lora<float, device>, lm::bfloat16>(one);
  check_merge<lm::Lora<lm::bfloat16, device>, lm::half>(one);
  check_merge<lm::AdaLora<float, device>, float>(of_rank);
}

TEST_CASE("conversions on the device round as the host does") {
  check_convert<float, lm::bfloat16>();
  check_convert<double, lm::bfloat16>();
  check_convert<lm::half, float>();
  check_convert<lm::bfloat16, lm::half>();
}

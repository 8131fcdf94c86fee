// The one unit that nvcc compiles: all that host code needs of loramix, instantiated for the methods it names.
#include "layer.hpp"

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/gpu/gpu.cuh>

namespace lm = loramix;

namespace engine {
namespace {

constexpr lm::Space device = lm::Space::device;

template <class Method>
struct AdapterOf;
template <>
struct AdapterOf<Lora> {
  using type = lm::Lora<float>;
  static lm::LoraConfig config(const Sizes& s) { return {.d_in = s.d_in, .d_out = s.d_out, .rank = s.rank}; }
};
template <>
struct AdapterOf<TeamLora> {
  using type = lm::TeamLora<float>;
  static lm::TeamLoraConfig config(const Sizes& s) {
    return {.d_in = s.d_in, .d_out = s.d_out, .experts = s.experts, .rank = s.rank};
  }
};

/// A host adapter with B drawn: it starts as zero, and would add nothing.
template <class Method>
auto drawn(const Sizes& sizes, std::uint64_t seed) {
  typename AdapterOf<Method>::type adapter(AdapterOf<Method>::config(sizes));
  lm::initialise(adapter, {.seed = seed, .site = "layer"});
  const auto B = adapter.B();
  for (lm::Index o = 0; o < B.rows; ++o) {
    for (lm::Index j = 0; j < B.cols; ++j) B(o, j) = static_cast<float>((o + 3 * j) % 7 - 3) / 8;
  }
  return adapter;
}

}  // namespace

template <class Method>
struct Layer<Method>::Device {
  Sizes sizes;
  lm::gpu::device_t<typename AdapterOf<Method>::type> adapter;
  lm::gpu::Tickets tickets{};
  lm::gpu::Backend be{.tickets = tickets.address()};
};

template <class Method>
Layer<Method>::Layer(const Sizes& sizes, std::uint64_t seed)
    : device_(new Device{sizes, lm::gpu::to_device(drawn<Method>(sizes, seed))}) {}
template <class Method>
Layer<Method>::~Layer() = default;
template <class Method>
std::int64_t Layer<Method>::parameters() const {
  return device_->adapter.parameters().size;
}
template <class Method>
std::vector<float> Layer<Method>::forward(const std::vector<float>& x, std::vector<float> y) {
  const lm::Index tokens = static_cast<lm::Index>(x.size()) / device_->sizes.d_in;
  lm::Matrix<float, device> in(tokens, device_->sizes.d_in), out(tokens, device_->sizes.d_out);
  lm::Buffer<std::byte, device> work(lm::workspace_bytes(device_->be, device_->adapter, tokens));
  const lm::MatrixView<float> back(y.data(), tokens, device_->sizes.d_out);
  lm::gpu::copy(lm::MatrixView<const float>(x.data(), tokens, device_->sizes.d_in), in.view());
  lm::gpu::copy(lm::MatrixView<const float>(back), out.view());
  lm::forward(device_->be, device_->adapter, in.view(), out.view(), lm::Arena<device>{work});
  lm::gpu::copy(std::as_const(out).view(), back);
  return y;
}

// [instantiation]
template class Layer<Lora>;
template class Layer<TeamLora>;
// [/instantiation]

}  // namespace engine

// An adapted layer as host code sees it: plain C++, no CUDA, no header of loramix. Its members are compiled once, in layer.cu; units
// that use it compile none of them.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace engine {

struct Sizes {
  std::int64_t d_in, d_out, experts, rank;
};

// Names of methods. Types of loramix stay in the .cu: their namespace holds what a unit is compiled for, and a .cpp and a
// .cu differ in that.
struct Lora;
struct TeamLora;

/// Parameters, memory and stream of one layer on the GPU.
template <class Method>
class Layer {
 public:
  Layer(const Sizes& sizes, std::uint64_t seed);
  ~Layer();
  std::int64_t parameters() const;
  /// y + ΔY for x [tokens, d_in], y [tokens, d_out].
  std::vector<float> forward(const std::vector<float>& x, std::vector<float> y);

 private:
  struct Device;
  std::unique_ptr<Device> device_;
};

// [extern]
extern template class Layer<Lora>;
extern template class Layer<TeamLora>;
// [/extern]

}  // namespace engine

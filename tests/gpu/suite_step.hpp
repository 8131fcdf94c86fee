// One forward and backward of any adapter of the suite, in words that a .cu and a .cpp share: nothing here names a type of
// the library, whose ABI namespaces differ between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace loramix_test {

/// Values are exact in every storage type of the suite.
struct DeviceStep {
  std::int64_t tokens = 0, rows = 0;  // of x, of y
  std::vector<float> parameters, x, dy;
  std::vector<std::vector<float>> frozen;
  std::vector<float> dp, dlogits;  // what losses add: as the scores of the host's forward, or empty
  std::vector<std::int32_t> tasks, labels;
  std::vector<std::int64_t> offsets;
  std::vector<std::uint8_t> valid;
  bool composed = false;  // not by fused kernels
  std::uint64_t seed = 0, site = 0, step = 0, first_token = 0;
};

struct DeviceResults {
  std::vector<float> y, dx, gradient;
  std::vector<std::int32_t> ids;  // what a router chose
  bool same_bits_replayed = false;
  int forbidden = 0;  // allocations and synchronisations inside the step
  bool clean = false;
};

/// What parameters, x, y and their like are stored as on the device.
enum class Stored { float32, bfloat16, float16 };

/// How to run an adapter in one form; parts as in suite/subject.hpp, those of the list that have a device.
struct DeviceRun {
  std::string name;
  DeviceResults (*run)(const DeviceStep& step, std::size_t form);
  std::size_t form;
};
inline constexpr std::size_t device_parts = 2;
template <Stored S, std::size_t Part>
std::vector<DeviceRun> device_part();

}  // namespace loramix_test

// The CPU backend under the conformance suite: memory is the heap's, scratch is full of NaN and has guards behind it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include <loramix/cpu/cpu.hpp>

namespace loramix_test {

/// Every byte 0xff is a NaN in every floating-point type of the library.
class Scratch {
 public:
  explicit Scratch(loramix::Index bytes)
      : bytes_(bytes), memory_(static_cast<std::size_t>(bytes + 2 * edge), std::byte{0xff}) {
    const std::size_t at = static_cast<std::size_t>(begin() - memory_.data());
    std::fill(memory_.begin() + static_cast<std::ptrdiff_t>(at) + bytes, memory_.end(), std::byte{0x77});
  }
  loramix::Arena<> arena() { return {begin(), bytes_}; }
  bool intact() {
    return std::all_of(begin() + bytes_, memory_.data() + memory_.size(),
                       [](std::byte b) { return b == std::byte{0x77}; });
  }

 private:
  static constexpr loramix::Index edge = loramix::Arena<>::alignment;
  std::byte* begin() {
    void* p = memory_.data();
    std::size_t room = memory_.size();
    return static_cast<std::byte*>(std::align(static_cast<std::size_t>(edge), 1, p, room));
  }
  loramix::Index bytes_;
  std::vector<std::byte> memory_;
};

/// The ways in which the CPU backend can be told to work: as it likes; with blocks so small that every shape of the table
/// has several, grouped and dense; in one order at every T; and composed.
inline const std::vector<loramix::cpu::Tuning>& tunings() {
  using namespace loramix::cpu;
  static const std::vector<Tuning> all = {
      {},
      {.grouping = Grouping::grouped, .sweep = 64, .weights = 640, .tokens_per_sum = 7},
      {.order = Order::fixed, .grouping = Grouping::grouped, .sweep = 64, .weights = 640, .tokens_per_sum = 7},
      {.order = Order::fixed, .grouping = Grouping::dense, .sweep = 128, .weights = 640, .tokens_per_sum = 16},
      {.path = Path::composed},
  };
  return all;
}

template <loramix::Executor E = loramix::SerialExecutor, class Backend = loramix::cpu::Backend<E>>
class CpuHarness {
 public:
  static constexpr loramix::Space space = loramix::Space::host;

  CpuHarness() = default;
  explicit CpuHarness(E executor, const loramix::cpu::Tuning& tuning = {}) : backend_(Backend{executor, tuning}) {}

  const Backend& backend() const { return backend_; }
  template <class T>
  T* upload(const std::vector<T>& values) {
    const auto memory = std::make_shared<std::vector<T>>(values);
    if (memory->empty()) memory->reserve(1);
    alive_.push_back(memory);
    return memory->data();
  }
  template <class T>
  void download(const T* from, std::vector<T>& values) const {
    std::copy_n(from, values.size(), values.begin());
  }
  loramix::Arena<> arena(loramix::Index bytes) {
    scratch_.push_back(std::make_unique<Scratch>(bytes));
    return scratch_.back()->arena();
  }
  loramix::StatusFlags* status() { return nullptr; }
  bool release() {
    const bool intact = std::all_of(scratch_.begin(), scratch_.end(), [](const auto& s) { return s->intact(); });
    alive_.clear();
    scratch_.clear();
    return intact;
  }

 private:
  Backend backend_;
  std::vector<std::shared_ptr<void>> alive_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
};

}  // namespace loramix_test

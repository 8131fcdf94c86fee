/// Column ranges of one output: the parts of a fused projection (q, k, v; gate, up).
#pragma once
#include <initializer_list>

#include <loramix/core/check.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Columns [begin, begin + width) of y.
struct Slice {
  Index begin = 0;
  Index width = 0;
};

/// The names of slice i's fields and parameters: files and visit() want names that live for ever.
struct SliceNames {
  const char *begin, *width, *A, *B;
};
inline constexpr SliceNames slice_names[] = {
    {"slice0.begin", "slice0.width", "slice0.lora_A.weight", "slice0.lora_B.weight"},
    {"slice1.begin", "slice1.width", "slice1.lora_A.weight", "slice1.lora_B.weight"},
    {"slice2.begin", "slice2.width", "slice2.lora_A.weight", "slice2.lora_B.weight"},
    {"slice3.begin", "slice3.width", "slice3.lora_A.weight", "slice3.lora_B.weight"},
    {"slice4.begin", "slice4.width", "slice4.lora_A.weight", "slice4.lora_B.weight"},
    {"slice5.begin", "slice5.width", "slice5.lora_A.weight", "slice5.lora_B.weight"},
    {"slice6.begin", "slice6.width", "slice6.lora_A.weight", "slice6.lora_B.weight"},
    {"slice7.begin", "slice7.width", "slice7.lora_A.weight", "slice7.lora_B.weight"}};

/// Up to eight slices that do not overlap, a value.
class Slices {
 public:
  static constexpr Index capacity = 8;
  constexpr Slices() = default;
  Slices(std::initializer_list<Slice> slices) {
    for (const Slice& slice : slices) push_back(slice);
  }
  void push_back(Slice slice) {
    if (size_ == capacity) {
      fail(loramix::check::detail::about(ErrorCode::value, "Slices", "slices") << " are more than " << capacity);
    }
    slice_[size_++] = slice;
  }
  constexpr Index size() const { return size_; }
  constexpr const Slice& operator[](Index i) const { return slice_[i]; }
  constexpr const Slice* begin() const { return slice_; }
  constexpr const Slice* end() const { return slice_ + size_; }

  /// The slices as numbers by name, as a Config's fields; unused ones are 0.
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("slices", self.size_);
    for (Index i = 0; i < capacity; ++i) {
      f(slice_names[i].begin, self.slice_[i].begin);
      f(slice_names[i].width, self.slice_[i].width);
    }
  }

  /// Refuses slices outside [0, columns), slices that overlap, and a number of slices that a file made up.
  void check(const char* op, Index columns) const {
    if (size_ < 0 || size_ > capacity) {
      fail(loramix::check::detail::about(ErrorCode::value, op, "slices")
           << " are " << size_ << ", must be 0 to " << capacity);
    }
    for (Index i = 0; i < size_; ++i) {
      const Slice a = slice_[i];
      if (a.begin < 0 || a.width < 0 || a.begin > columns || a.width > columns - a.begin) {
        fail(loramix::check::detail::about(ErrorCode::shape, op, "slice")
             << " " << i << " [" << a.begin << ", +" << a.width << "] lies outside d_out, which is " << columns);
      }
      for (Index j = 0; j < i; ++j) {
        const Slice b = slice_[j];
        if (a.begin < b.begin + b.width && b.begin < a.begin + a.width) {
          fail(loramix::check::detail::about(ErrorCode::shape, op, "slice") << " " << i << " overlaps slice " << j);
        }
      }
    }
  }

 private:
  Slice slice_[capacity] = {};
  Index size_ = 0;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

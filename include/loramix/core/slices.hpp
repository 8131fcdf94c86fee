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

  /// Refuses slices outside [0, columns) and slices that overlap.
  void check(const char* op, Index columns) const {
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

/// The checks at the door of every op: shape, stride, null, overflow, alias. They read no element and run in release
/// builds too, before anything is written.
#pragma once
#include <cstdint>

#include <loramix/core/error.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace check {

namespace detail {
inline Error about(ErrorCode code, const char* op, const char* argument) {
  Error error(code);
  error << "loramix: " << op << ": " << argument;
  return error;
}

/// a * b, or -1 where it does not fit.
inline Index product(Index a, Index b) {
  Index out;
  return __builtin_mul_overflow(a, b, &out) ? Index{-1} : out;
}

struct Strided {  // bytes: `count` runs of `run`, `stride` apart
  std::uintptr_t begin;
  Index count, run, stride;
};

template <class T, Space S, Major M>
Strided strided(MatrixView<T, S, M> v) {
  const Index outer = M == Major::row ? v.rows : v.cols, inner = M == Major::row ? v.cols : v.rows;
  const Index size = static_cast<Index>(sizeof(T));
  if (v.stride <= 0) return {reinterpret_cast<std::uintptr_t>(v.data), 1, inner * size, 0};  // all rows are one
  if (outer <= 1 || v.stride == inner) return {reinterpret_cast<std::uintptr_t>(v.data), 1, outer * inner * size, 0};
  return {reinterpret_cast<std::uintptr_t>(v.data), outer, inner * size, v.stride * size};
}

/// Whether the two share a byte; exact where both have one stride (slices of one buffer) or either is one run.
inline bool overlap(Strided a, Strided b) {
  if (b.begin < a.begin) {
    const Strided swap = a;
    a = b;
    b = swap;
  }
  const Index distance = static_cast<Index>(b.begin - a.begin);
  if (distance >= (a.count - 1) * a.stride + a.run) return false;
  if (a.count == 1) return true;  // b begins inside a's only run
  if (b.count > 1 && b.stride != a.stride) return true;
  // b's runs repeat with a's stride (or there is one): compare positions inside a period.
  // Behind a's run at that place there is another run of a's, for b begins before a ends.
  const Index phase = distance % a.stride;
  return phase < a.run || phase + b.run > a.stride;
}
}  // namespace detail

/// Two sizes that must be equal.
inline void same(const char* op, const char* argument, const char* what, Index got, const char* expected, Index want) {
  if (got == want) return;
  fail(detail::about(ErrorCode::shape, op, argument)
       << " has " << what << " " << got << ", but " << expected << " is " << want);
}

/// A number that must not be below a bound.
inline void at_least(const char* op, const char* argument, Index got, Index least) {
  if (got >= least) return;
  fail(detail::about(ErrorCode::value, op, argument) << " is " << got << ", must be at least " << least);
}

/// A number that is divided by.
template <class Score>
void above_zero(const char* op, const char* argument, Score got) {
  if (got > Score(0) && got - got == Score(0)) return;
  fail(detail::about(ErrorCode::value, op, argument) << " must be above 0 and finite");
}

/// Sizes not negative, stride not shorter than a row, address present, extent inside 63 bits.
template <class T, Space S, Major M>
void view(const char* op, const char* argument, MatrixView<T, S, M> v) {
  const Index outer = M == Major::row ? v.rows : v.cols, inner = M == Major::row ? v.cols : v.rows;
  if (v.rows < 0 || v.cols < 0) {
    fail(detail::about(ErrorCode::shape, op, argument) << " has negative size [" << v.rows << ", " << v.cols << "]");
  }
  if (outer > 1 && v.stride < inner) {
    fail(detail::about(ErrorCode::stride, op, argument) << " has stride " << v.stride << ", shorter than its "
                                                        << (M == Major::row ? "row of " : "column of ") << inner);
  }
  const Index wide = v.stride > inner ? v.stride : inner;
  const Index elements = detail::product(outer, wide);
  if (elements < 0 || detail::product(elements, static_cast<Index>(sizeof(T))) < 0) {
    fail(detail::about(ErrorCode::overflow, op, argument)
         << " of size [" << v.rows << ", " << v.cols << "] and stride " << v.stride << " overflows 63-bit offsets");
  }
  if (v.data == nullptr && !v.empty()) {
    fail(detail::about(ErrorCode::null, op, argument)
         << " of size [" << v.rows << ", " << v.cols << "] has a null address");
  }
}

template <class T, Space S>
void view(const char* op, const char* argument, VectorView<T, S> v) {
  view(op, argument, MatrixView<T, S>(v.data, 1, v.size));
}

/// A view that must have exactly this shape.
template <class T, Space S, Major M>
void shape(const char* op, const char* argument, MatrixView<T, S, M> v, const char* rows_are, Index rows,
           const char* cols_are, Index cols) {
  view(op, argument, v);
  same(op, argument, "rows", v.rows, rows_are, rows);
  same(op, argument, "columns", v.cols, cols_are, cols);
}

/// What is written must not share memory with what is read. Slices of one interleaved buffer are legal.
template <class T, Space S, Major M, class U, Major N>
void disjoint(const char* op, const char* a_name, MatrixView<T, S, M> a, const char* b_name, MatrixView<U, S, N> b) {
  if (a.empty() || b.empty()) return;
  if (!detail::overlap(detail::strided(a), detail::strided(b))) return;
  fail(detail::about(ErrorCode::alias, op, a_name) << " [" << a.rows << ", " << a.cols << "] shares memory with "
                                                   << b_name << " [" << b.rows << ", " << b.cols << "]");
}

}  // namespace check
}  // namespace LORAMIX_ABI
}  // namespace loramix

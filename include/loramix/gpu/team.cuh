/// Teams of GPU threads for bodies written against core/team.hpp: a warp, or a block of N threads.
///
/// Computes:    sum and maximum as trees of shuffles over values that thread i gathers from i, i + width, i + 2·width, …;
///              every thread gets the same bits.
/// Errors:      none. Every thread of the team must make every call; blocks are one-dimensional.
///              sums of up to 32 terms: neighbouring threads of a warp have one each, and as many sums as fit are made at once.
/// Cost:        WarpTeam: five shuffles and a broadcast per reduction. BlockTeam<N>: that, N / 32 shared values, two
///              barriers.
/// Determinism: a fixed order for a given width; no atomics.
/// Example:     tests/gpu/team.cu
#pragma once
#include <cuda_runtime.h>

#include <loramix/core/team.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

inline constexpr int warp_width = 32;

namespace detail {

inline constexpr unsigned whole_warp = 0xffffffffu;

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

/// The larger; NaN is larger than any number.
struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return !(b <= a) && a == a ? b : a;
  }
};

/// The values of a warp's lanes, combined pairwise; lane 0's result for all, so that signs of zero agree too.
template <class T, class Combine>
__device__ T reduce_warp(T value, Combine combine) {
  for (int distance = warp_width / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_down_sync(whole_warp, value, distance));
  }
  return __shfl_sync(whole_warp, value, 0);
}

/// What thread `first` of `width` gathers.
template <class F>
__device__ auto gather_sum(Index first, Index width, Index n, const F& f) {
  decltype(f(Index{0}) + f(Index{0})) total{};
  for (Index i = first; i < n; i += width) total += f(i);
  return total;
}

/// Threads without a value of their own repeat f(0), which changes no maximum.
template <class F>
__device__ auto gather_maximum(Index first, Index width, Index n, const F& f) {
  auto best = f(first < n ? first : Index{0});
  for (Index i = first + width; i < n; i += width) best = Larger{}(best, f(i));
  return best;
}

}  // namespace detail

/// The 32 threads of a warp.
struct WarpTeam {
  static constexpr int width = warp_width;

  __device__ static Index place() { return threadIdx.x % width; }
  template <class F>
  __device__ void each(Index n, const F& f) const {
    for (Index i = place(); i < n; i += width) f(i);
    __syncwarp();
  }
  template <class F>
  __device__ auto sum(Index n, const F& f) const {
    return detail::reduce_warp(detail::gather_sum(place(), width, n, f), detail::Plus{});
  }
  /// Shorter sums than the warp is wide are trees among neighbours; the bits are those of sum().
  template <class F, class Put>
  __device__ void sums(Index n, Index size, const F& f, const Put& put) const {
    if (size > width) {
      for (Index g = 0; g < n; ++g) {
        const auto total = sum(size, [&](Index i) { return f(g, i); });
        if (place() == 0) put(g, total);
      }
    } else {
      int span = 1;
      while (span < size) span *= 2;
      const Index i = place() % span;
      for (Index first = 0; first < n; first += width / span) {
        const Index g = first + place() / span;
        decltype(f(Index{0}, Index{0}) + f(Index{0}, Index{0})) total{};
        if (g < n && i < size) total += f(g, i);
        for (int distance = span / 2; distance > 0; distance /= 2) {
          total = total + __shfl_down_sync(detail::whole_warp, total, distance);
        }
        if (g < n && i == 0) put(g, total);
      }
    }
    __syncwarp();
  }
  template <class F>
  __device__ auto maximum(Index n, const F& f) const {
    return detail::reduce_warp(detail::gather_maximum(place(), width, n, f), detail::Larger{});
  }
  template <class F>
  __device__ void once(const F& f) const {
    if (place() == 0) f();
    __syncwarp();
  }
};

/// All N threads of a block.
template <int N>
struct BlockTeam {
  static_assert(N % warp_width == 0 && N >= warp_width && N <= 1024,
                "loramix: a BlockTeam has 32 to 1024 threads, a multiple of 32");
  static constexpr int width = N;

  __device__ static Index place() { return threadIdx.x; }
  template <class F>
  __device__ void each(Index n, const F& f) const {
    for (Index i = threadIdx.x; i < n; i += width) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ auto sum(Index n, const F& f) const {
    return reduce(detail::gather_sum(threadIdx.x, width, n, f), detail::Plus{});
  }
  template <class F, class Put>
  __device__ void sums(Index n, Index size, const F& f, const Put& put) const {
    for (Index g = 0; g < n; ++g) {
      const auto total = sum(size, [&](Index i) { return f(g, i); });
      if (place() == 0) put(g, total);
    }
    __syncthreads();
  }
  template <class F>
  __device__ auto maximum(Index n, const F& f) const {
    return reduce(detail::gather_maximum(threadIdx.x, width, n, f), detail::Larger{});
  }
  template <class F>
  __device__ void once(const F& f) const {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

 private:
  /// Warp by warp, then the warps' results in order.
  template <class T, class Combine>
  __device__ static T reduce(T value, Combine combine) {
    constexpr int warps = N / warp_width;
    value = detail::reduce_warp(value, combine);
    if constexpr (warps > 1) {
      __shared__ T of_warp[warps];
      if (threadIdx.x % warp_width == 0) of_warp[threadIdx.x / warp_width] = value;
      __syncthreads();
      value = of_warp[0];
      for (int w = 1; w < warps; ++w) value = combine(value, of_warp[w]);
      __syncthreads();  // of_warp is free for the next reduction
    }
    return value;
  }
};

static_assert(Team<WarpTeam>);
static_assert(Team<BlockTeam<256>>);

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

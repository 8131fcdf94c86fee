// What a query says of some tokens, and of ranks and side rows together, is enough for fewer tokens and for either alone. Sizes are
// all that it reads: nothing runs.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include <loramix/gpu/gpu.cuh>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

#include "gpu/harness.cuh"

namespace lm = loramix;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

/// Sizes, and that there is a view.
template <class V>
V sized(Index rows, Index cols) {
  return {reinterpret_cast<decltype(V::data)>(std::uintptr_t{64}), rows, cols};
}

template <class T>
Index shrink_bytes(const lm::gpu::Backend& be, Index tokens, Index d, Index ranks, Index side) {
  return lm::scratch_bytes(be,
                           lm::Shrink<T, T, float, float, device>{sized<lm::MatrixView<const T, device>>(ranks, d),
                                                                  sized<lm::MatrixView<const T, device>>(side, d),
                                                                  sized<lm::MatrixView<const T, device>>(tokens, d),
                                                                  {},
                                                                  sized<lm::MatrixView<float, device>>(tokens, ranks),
                                                                  sized<lm::MatrixView<float, device>>(tokens, side)});
}
template <class T>
Index backward_bytes(const lm::gpu::Backend& be, Index tokens, Index d, Index ranks, Index side) {
  lm::ShrinkBackward<T, T, float, float, float, device> op{sized<lm::MatrixView<const T, device>>(ranks, d),
                                                           sized<lm::MatrixView<const T, device>>(side, d),
                                                           sized<lm::MatrixView<const T, device>>(tokens, d),
                                                           {},
                                                           sized<lm::MatrixView<const float, device>>(tokens, ranks),
                                                           sized<lm::MatrixView<const float, device>>(tokens, side)};
  op.dA = sized<lm::MatrixView<float, device>>(ranks, d);
  return lm::scratch_bytes(be, op);
}
template <class T>
Index expand_backward_bytes(const lm::gpu::Backend& be, Index tokens, Index d, Index ranks) {
  lm::ExpandBackward<float, T, T, float, float, device, lm::Major::column> op{
      sized<lm::MatrixView<const float, device>>(tokens, ranks),
      {},
      sized<lm::MatrixView<const T, device, lm::Major::column>>(d, ranks),
      1,
      sized<lm::MatrixView<const T, device>>(tokens, d),
      sized<lm::MatrixView<float, device>>(tokens, ranks)};
  op.gate.tokens = tokens, op.gate.ranks = ranks;
  op.dB = sized<lm::MatrixView<float, device, lm::Major::column>>(d, ranks);
  return lm::scratch_bytes(be, op);
}

}  // namespace

TEST_CASE_TEMPLATE("GPU scratch is enough for fewer tokens, and for ranks or side rows alone", T, float, lm::bfloat16) {
  loramix_test::GpuHarness gpu;
  lm::gpu::Backend be = gpu.backend();
  for (const int multiprocessors : {20, 108, 132}) {
    be.tuning.machine.multiprocessors = multiprocessors;
    for (const Index d : {1024, 4096}) {
      for (const Index ranks : {8, 64, 512}) {
        CAPTURE(multiprocessors);
        CAPTURE(d);
        CAPTURE(ranks);
        Index most[3] = {}, falls = 0, less = 0;
        for (Index tokens = 1; tokens <= 5000; tokens += tokens % 64 < 2 || tokens % 64 == 63 ? 1 : 61) {
          const Index bytes[] = {shrink_bytes<T>(be, tokens, d, ranks, 8), backward_bytes<T>(be, tokens, d, ranks, 8),
                                 expand_backward_bytes<T>(be, tokens, d, ranks)};
          for (int i = 0; i < 3; ++i) {
            falls += bytes[i] < most[i] ? 1 : 0;
            most[i] = std::max(most[i], bytes[i]);
          }
          less += bytes[0] < std::max(shrink_bytes<T>(be, tokens, d, ranks, 0), shrink_bytes<T>(be, tokens, d, 0, 8))
                      ? 1
                      : 0;
          less +=
              bytes[1] < std::max(backward_bytes<T>(be, tokens, d, ranks, 0), backward_bytes<T>(be, tokens, d, 0, 8))
                  ? 1
                  : 0;
        }
        CHECK(falls == 0);
        CHECK(less == 0);
      }
    }
  }
}

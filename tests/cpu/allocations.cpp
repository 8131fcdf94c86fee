// No op of the library allocates: malloc and its relatives are counted in this program, on every thread.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdlib>
#include <string>

#include <loramix/core/thread_pool.hpp>
#if LORAMIX_TEST_OPENMP
#include <loramix/cpu/openmp.hpp>
#endif

#include "conformance/gates.hpp"
#include "cpu/on_host.hpp"
#include "support/allocations.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

/// All ops of one product, each twice; the second time is counted.
template <class T, class E>
long allocations_of(const E& executor, const GateSpec& spec) {
  using Acc = lm::accumulation_t<T>;
  constexpr lm::Space host = lm::Space::host;
  constexpr Index tokens = 200, d_in = 300, d_out = 270, experts = 9, rank = 8, ranks = experts * rank;
  const lm::cpu::Backend<E> be{executor};
  Random random(seed(60));
  const Inputs<T> in = draw_inputs<T>(random, tokens, d_in, d_out, ranks);
  const lm::Matrix<T> side = drawn<lm::Matrix<T>>(random, experts, d_in);
  const lm::Dropout dropout = lm::make_dropout("test", 0.5, {.seed = 1});
  CpuHarness<> memory;
  const GateData data = draw_gate(random, spec, tokens, experts, rank);
  LoweredGate<CpuHarness<>, Acc> gate(memory, data, 0);
  const GateGradients<CpuHarness<>, Acc> dgate(truth<Tracked>(data), 0, [&](Index rows, Index cols, Index padding) {
    return Tensor<CpuHarness<>, Acc>(memory, Grid<double>(rows, cols), padding);
  });
  lm::Matrix<Acc> u(tokens, ranks), h(tokens, experts), du(tokens, ranks), dA(ranks, d_in), dside(experts, d_in);
  lm::Matrix<T> y(tokens, d_out), dx(tokens, d_in);
  RankMajor<Acc> dB(d_out, ranks);

  const lm::Shrink<T, T, Acc, Acc, host> shrink{in.A, side, in.x, dropout, u, h};
  const lm::Expand<Acc, T, T, Acc, host, lm::Major::column> expand{u, gate.form(), in.B, Acc(1), y};
  const lm::ExpandBackward<Acc, T, T, Acc, Acc, host, lm::Major::column> expand_backward{
      u, gate.form(), in.B, Acc(1), in.dy, du, dB, dgate.views};
  const lm::ShrinkBackward<T, T, Acc, Acc, Acc, host> shrink_backward{in.A, side, in.x, dropout, du, h, dA, dside, dx};
  const Index bytes = std::max({lm::scratch_bytes(be, shrink), lm::scratch_bytes(be, expand),
                                lm::scratch_bytes(be, expand_backward), lm::scratch_bytes(be, shrink_backward)});
  Scratch scratch(bytes);
  const auto step = [&] {
    lm::execute(be, shrink, scratch.arena());
    lm::execute(be, expand, scratch.arena());
    lm::execute(be, expand_backward, scratch.arena());
    lm::execute(be, shrink_backward, scratch.arena());
  };
  step();
  const long before = allocations();
  step();
  return allocations() - before;
}

}  // namespace

TEST_CASE("the counter counts") {
  const long before = allocations();
  take_memory();
  CHECK(allocations() == before + 1);
}

TEST_CASE_TEMPLATE("no op allocates", T, float, double, lm::bfloat16) {
  for (const GateSpec& spec : gate_specs()) {
    if (spec.computed || spec.mixed_ranks) continue;
    INFO(std::string(spec.name));
    CHECK(allocations_of<T>(lm::SerialExecutor{}, spec) == 0);
  }
}

TEST_CASE("no op allocates, with threads") {
  const GateSpec& spec = gate_specs()[1];
  lm::ThreadPool pool(3);
  CHECK(allocations_of<float>(pool.executor(), spec) == 0);
#if LORAMIX_TEST_OPENMP
  CHECK(allocations_of<float>(lm::OpenMPExecutor(2), spec) == 0);
#endif
}

// A router alone: its logits are given, its memory is NaN before it writes.
#pragma once
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <loramix/core/matrix.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/router/top_k.hpp>
#include <loramix/train/gradient_check.hpp>

#include "reference/routing.hpp"
#include "support/seed.hpp"

namespace loramix_test {

namespace lm = loramix;

inline constexpr double inf = std::numeric_limits<double>::infinity(),
                        not_a_number = std::numeric_limits<double>::quiet_NaN();

struct Uniform {
  explicit Uniform(std::uint64_t site) : engine(seed(site)) {}
  double operator()() { return static_cast<double>(engine() >> 11) * 0x1p-52 - 1; }
  Index below(Index n) { return static_cast<Index>(engine() % static_cast<std::uint64_t>(n)); }
  std::mt19937_64 engine;
};

/// A gate, its rows h [T, n], and memory for both passes.
template <class Gate, class Score = double>
struct Routed {
  using State = typename Gate::State;

  Routed(Gate gate_, lm::GateCall<> call_, bool training = true)
      : gate(gate_), call(call_), h(call.tokens, gate.side().rows), dh(h.rows(), h.cols()) {
    memory.assign(1 << 22, std::byte{0xff});
    arena = lm::Arena<>{memory};
    state = gate.carve(arena, call.tokens, training);
    dstate = gate.carve(arena, call.tokens, false);
  }
  void forward() {
    gate.check("forward", call);
    gate.forward(be, h.view(), state, call, arena);
  }
  template <class GradientGate>
  void backward(const GradientGate& gradient, lm::Into into = lm::Into::add) {
    gate.backward(be, h.view(), state, dstate, dh.view(), call, gradient, into, arena);
  }

  lm::cpu::Backend<> be;
  Gate gate;
  lm::GateCall<> call;
  lm::Matrix<Score> h, dh;
  std::vector<std::byte> memory;
  lm::Arena<> arena;
  State state, dstate;
};

inline bool near(double got, double want, double tolerance = 1e-12) {
  if (std::isnan(want)) return std::isnan(got);
  return got == want || std::abs(got - want) <= tolerance * (1 + std::abs(want));
}

}  // namespace loramix_test

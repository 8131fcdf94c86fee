// Compiled once per instruction set, with Eigen renamed (see CMakeLists.txt).
#include <cstddef>
#include <loramix/cpu/cpu.hpp>
#include <loramix/gate/gates.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>
#include <vector>

#define TEST_JOIN2(a, b) a##b
#define TEST_JOIN(a, b) TEST_JOIN2(a, b)

namespace {

namespace lm = loramix;

std::vector<float> small_integers(int count, int modulus) {
  std::vector<float> out(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) out[static_cast<std::size_t>(i)] = static_cast<float>(i % modulus - modulus / 2);
  return out;
}

}  // namespace

/// Sum of y += x Aᵀ Bᵀ over small integers: every partial sum is exact, so each instruction set gives the same number.
double TEST_JOIN(product_, LORAMIX_TEST_ISA)() {
  constexpr int tokens = 37, in = 23, rank = 5, out = 19;
  const auto x = small_integers(tokens * in, 7), a = small_integers(rank * in, 5), b = small_integers(out * rank, 3);
  std::vector<float> u(tokens * rank), y(tokens * out, 1.0f);
  const lm::cpu::Backend be;

  lm::Shrink<float, float, float, float, lm::Space::host> shrink{};
  shrink.A = {a.data(), rank, in};
  shrink.x = {x.data(), tokens, in};
  shrink.u = {u.data(), tokens, rank};
  lm::Expand<float, float, float, float, lm::Space::host, lm::Major::row> expand{};
  expand.u = {u.data(), tokens, rank};
  expand.gate = lm::OpenGate<>{}.form(tokens, rank);
  expand.B = {b.data(), out, rank};
  expand.scale = 1.0f;
  expand.y = {y.data(), tokens, out};

  std::vector<std::byte> scratch(static_cast<std::size_t>(
      lm::Arena<>::with_alignment(lm::scratch_bytes(be, shrink) + lm::scratch_bytes(be, expand))));
  lm::execute(be, shrink, lm::Arena<>{scratch});
  lm::execute(be, expand, lm::Arena<>{scratch});

  double sum = 0;
  for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * static_cast<double>(i % 11);
  return sum;
}

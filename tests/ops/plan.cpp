// The dispatch plan against a literal stable sort: random and lopsided ids, none chosen, one expert, segments, threads.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/plan.hpp>

#include "reference/plan.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;

namespace {

struct Made {
  Made(Index choices, Index experts)
      : offsets(static_cast<std::size_t>(experts + 1), -7),
        order(static_cast<std::size_t>(choices), -7),
        inverse(order),
        scratch(static_cast<std::size_t>(lm::plan_scratch_bytes<lm::Space::host>(choices, experts) + 64)) {}
  lm::DispatchPlan<> plan() {
    return {{offsets.data(), static_cast<Index>(offsets.size())},
            {order.data(), static_cast<Index>(order.size())},
            {inverse.data(), static_cast<Index>(inverse.size())}};
  }
  std::vector<Index> offsets;
  std::vector<std::int32_t> order, inverse;
  std::vector<std::byte> scratch;
};

template <class Backend>
void check_plan(const Backend& be, const std::vector<std::int32_t>& ids, Index k, lm::Groups<> groups, Index tokens,
                Index experts) {
  Made made(tokens * k, experts);
  const lm::MatrixView<const std::int32_t> view{ids.data(), static_cast<Index>(ids.size()) / k, k};
  lm::make_plan(be, view, groups, tokens, experts, made.plan(), lm::Arena<>{made.scratch});
  const reference::Plan want = reference::plan(tokens * k, experts, [&](Index i) -> std::int32_t {
    const Index row = groups.of(i / k);
    return row < 0 ? -1 : view(row, i % k);
  });
  CHECK(made.offsets == want.offsets);
  CHECK(made.order == want.order);
  CHECK(made.inverse == want.inverse);
}

}  // namespace

TEST_CASE("the plan is a stable sort of choices by expert") {
  std::mt19937_64 random(seed(350));
  lm::ThreadPool pool(3);
  const lm::cpu::Backend threads{pool.executor()};
  for (const Index tokens : {0, 1, 5, 255, 256, 257, 700}) {
    for (const Index experts : {1, 3, 40}) {
      const Index k = experts < 2 ? 1 : 2;
      for (const int spread : {0, 1, 2}) {  // all to expert 0, some −1, even
        std::vector<std::int32_t> ids;
        for (Index t = 0; t < tokens; ++t) {
          const Index first = spread == 0 ? 0 : static_cast<Index>(random() % static_cast<std::uint64_t>(experts));
          for (Index s = 0; s < k; ++s) {
            const bool none = spread == 1 && random() % 3 == 0;
            ids.push_back(none ? -1 : static_cast<std::int32_t>((first + s) % experts));
          }
        }
        CAPTURE(tokens);
        CAPTURE(experts);
        check_plan(lm::cpu::Backend{}, ids, k, {}, tokens, experts);
        check_plan(threads, ids, k, {}, tokens, experts);
      }
    }
  }
}

TEST_CASE("ragged segments: an expert per segment, some of none, some empty") {
  const std::vector<Index> offsets{0, 3, 3, 10, 11, 20};
  check_plan(lm::cpu::Backend{}, {2, 0, -1, 2, 1}, 1, lm::Groups<>::by_segment(offsets.data(), 5), 20, 3);
  const std::vector<std::int32_t> of_segment{1, 0, -1, 1, 0};
  check_plan(lm::cpu::Backend{}, {2, 0}, 1, lm::Groups<>::by_segment(offsets.data(), 5, of_segment.data(), 2), 20, 3);
}

TEST_CASE("bad ids, sizes and memory are refused before anything is written") {
  const std::vector<std::int32_t> ids{0, 1, 2, 5};
  const auto refusal = [&](Index experts, Index choices, bool memory) -> std::string {
    Made made(choices, experts);
    try {
      lm::make_plan(lm::cpu::Backend{}, lm::MatrixView<const std::int32_t>{ids.data(), 4, 1}, {}, 4, experts,
                    made.plan(), memory ? lm::Arena<>{made.scratch} : lm::Arena<>{});
    } catch (const lm::Error& error) {
      CHECK(made.offsets[0] == -7);
      return error.what();
    }
    return "";
  };
  CHECK(refusal(6, 4, true) == "");
  CHECK(refusal(5, 4, true).find("make_plan: gate ids has expert 5 in row 3, but there are 5") != std::string::npos);
  CHECK(refusal(6, 3, true).find("order has size 3, but the number of choices is 4") != std::string::npos);
  CHECK(refusal(6, 4, false).find("work has 0 bytes left") != std::string::npos);
}

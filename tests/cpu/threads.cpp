// The number of threads never changes a bit (MATH.md section 6, i): with executors that prove that jobs overlapped.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include <loramix/core/thread_pool.hpp>
#if LORAMIX_TEST_OPENMP
#include <loramix/cpu/openmp.hpp>
#endif

#include "conformance/gates.hpp"
#include "cpu/on_host.hpp"
#include "cpu/user_scalars.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

/// All outputs of a few gates, with dropout and side rows.
template <class T, class E>
std::vector<Outputs<T>> all_outputs(const E& executor, Index tokens, Index d_in, Index d_out, Index experts,
                                    Index rank) {
  const lm::cpu::Backend<E> be{executor};
  std::vector<Outputs<T>> all;
  for (const GateSpec& spec : gate_specs()) {
    const std::string name = spec.name;
    if (name != "open" && name != "every slot" && name != "group experts by id" && name != "softmax") continue;
    Random random(seed(20));
    Inputs<T> in = draw_inputs<T>(random, tokens, d_in, d_out, experts * rank);
    in.side = drawn<lm::Matrix<T>>(random, spec.computed ? experts : 0, d_in);
    in.dropout = lm::make_dropout("test", 0.25, {.seed = 1, .site = 2, .step = 3});
    CpuHarness<> memory;
    LoweredGate<CpuHarness<>, lm::accumulation_t<T>> gate(memory, draw_gate(random, spec, tokens, experts, rank), 1);
    all.push_back(product(be, in, [&](const Outputs<T>& out) {
      if (spec.computed) gate.form().weights = out.h.view();
      return gate.form();
    }));
  }
  return all;
}

template <class T>
bool all_same(const std::vector<Outputs<T>>& a, const std::vector<Outputs<T>>& b) {
  bool same = a.size() == b.size() && a.size() == 4;
  for (std::size_t i = 0; same && i < a.size(); ++i) same = same_bits(a[i], b[i]) && largest(a[i].y) > 0;
  return same;
}

}  // namespace

TEST_CASE_TEMPLATE("lanes never change a bit", T, float, lm::bfloat16) {
  const auto outputs = [](const auto& executor) {
    return all_outputs<T>(executor, 600, 264, 270, 9, 8);  // several jobs in every stage
  };
  const auto serial = outputs(lm::SerialExecutor{});
  for (const Index lanes : {1, 2, 3}) {
    INFO(lanes, " lanes");
    const WaveExecutor wave(lanes);
    CHECK(all_same(serial, outputs(wave)));
    CHECK((lanes == 1 || wave.overlapped() > 100));
    CHECK(all_same(serial, outputs(ShuffledExecutor(lanes, seed(21)))));
    lm::ThreadPool pool(lanes);
    CHECK(all_same(serial, outputs(pool.executor())));
#if LORAMIX_TEST_OPENMP
    CHECK(all_same(serial, outputs(lm::OpenMPExecutor(static_cast<int>(lanes)))));
#endif
  }
}

namespace {

/// Two lanes, and how often they were asked for more than one job.
struct Counting {
  Index* regions;
  Index lanes() const { return 2; }
  template <class Job>
  void run(Index jobs, const Job& job) const {
    *regions += jobs > 1 ? 1 : 0;
    for (Index i = 0; i < jobs; ++i) job(i, i % 2);
  }
};

}  // namespace

TEST_CASE("few tokens wake nobody for small weights") {
  for (const Index tokens : {1, 4, 5}) {
    for (const Index d : {64, 4096}) {
      CAPTURE(tokens);
      CAPTURE(d);
      Index regions = 0;
      const auto outputs = all_outputs<float>(Counting{&regions}, tokens, d, d, 9, 8);
      CHECK((regions == 0) == (tokens <= 4 && d == 64));
      CHECK(all_same(all_outputs<float>(lm::SerialExecutor{}, tokens, d, d, 9, 8), outputs));
    }
  }
}

TEST_CASE("jobs that are inside their bodies at the same time do not disturb each other") {
  const auto serial = all_outputs<Meeting>(lm::SerialExecutor{}, 200, 264, 270, 9, 8);
  for (const Index lanes : {2, 3}) {
    const long before = Rendezvous::met_inside();
    const WaveExecutor wave(lanes);
    const auto together = all_outputs<Meeting>(wave, 200, 264, 270, 9, 8);
    CHECK(Rendezvous::met_inside() - before > 50);
    bool same = true;
    for (std::size_t i = 0; i < serial.size(); ++i) same = same && same_bits(serial[i], together[i]);
    CHECK(same);
  }
}

TEST_CASE("work is cut into jobs that cover it, evenly and in whole steps") {
  Index wrong = 0, cuts = 0;
  for (const Index step : {1, 6, 48}) {
    for (const Index most : {step, 3 * step, 40 * step}) {
      for (const Index lanes : {1, 2, 3, 16}) {
        for (Index n = 0; n < 500; n += 1 + n / 7) {
          const lm::cpu::detail::Cut cut(n, lanes, most, step);
          Index end = 0, least = n, largest = 0;
          for (Index job = 0; job < cut.jobs; ++job) {
            const Index count = cut.count(job), whole = job + 1 < cut.jobs ? count : (count + step - 1) / step * step;
            wrong += cut.begin(job) != end || count < 1 || count > most || whole % step != 0 ? 1 : 0;
            least = std::min(least, whole), largest = std::max(largest, whole), end += count;
          }
          wrong += end != n || largest - least > step ? 1 : 0;
          wrong += cut.jobs < std::min(lanes, (n + step - 1) / step) ? 1 : 0;  // no lane waits while there is work
          ++cuts;
        }
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(cuts > 1000);
}

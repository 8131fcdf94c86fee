// SGD against the literal formula in long double, with the rounding error it may have at most.
#include <loramix/adapter/lora.hpp>
#include <loramix/train/sgd.hpp>

#include "core/caught.hpp"
#include "support/allocations.hpp"
#include "train/support.hpp"

using namespace loramix_test;

namespace {

struct Literal {
  Wide w, b = 0;
  Wide error_w = 0, error_b = 0;

  void step(Wide g, const lm::SgdStep& h, Wide u) {
    const Wide mu = h.momentum, lr = h.lr, decay = h.weight_decay;
    error_b = mu * error_b + decay * error_w + 4 * u * (std::abs(mu * b) + std::abs(g) + std::abs(decay * w));
    b = mu * b + g + decay * w;
    error_w += lr * error_b + u * (3 * std::abs(lr * b) + std::abs(w - lr * b));
    w -= lr * b;
  }
};

template <class Got>
void check_close(Got got, const Literal& want) {
  CHECK(std::abs(wide(got) - want.w) <= 1.01L * want.error_w);
}

}  // namespace

TEST_CASE_TEMPLATE("SGD of an adapter follows the formula", W, float, double, lm::bfloat16) {
  using M = lm::accumulation_t<W>;
  const lm::cpu::Backend be;
  for (const double momentum : {0.0, 0.9}) {
    CAPTURE(momentum);
    Toy<W> toy({.size = 37});
    randomise(toy, 1);
    auto grad = lm::zeros_like(toy);
    const auto w = toy.parameters();
    const auto before = copy_of(w);
    lm::Sgd opt(toy, {.lr = 1e-2,
                      .momentum = momentum,
                      .weight_decay = 0.1,
                      .groups = {{"B", {.lr_ratio = 4}}, {"bias", {.weight_decay = 0.2}}, {"A", {.frozen = true}}}});
    CHECK(opt.momentum().size == (momentum == 0 ? 0 : w.size));
    std::vector<Literal> want;
    for (Index i = 0; i < w.size; ++i) want.push_back({wide(w[i])});
    for (int t = 1; t <= 200; ++t) {
      const std::vector<M> g = normals<M>(w.size, 100 + static_cast<std::uint64_t>(t));
      if (t == 100) opt.lr(2e-2);
      for (const Place& p : places(toy)) {
        std::copy_n(g.data() + p.begin, p.size, grad.parameters().data + p.begin);
        const lm::SgdStep step{.lr = opt.lr() * (p.group == "B" ? 4 : 1),
                               .momentum = momentum,
                               .weight_decay = p.group == "B"      ? 0.1
                                               : p.group == "bias" ? 0.2
                                                                   : 0};
        if (p.group == "A") continue;
        for (Index i = p.begin; i < p.begin + p.size; ++i) want[at(i)].step(wide(g[at(i)]), step, unit<M>());
      }
      opt.step(be, toy, grad);
    }
    for (const Place& p : places(toy)) {
      CAPTURE(p.name);
      Index moved = 0;
      for (Index i = p.begin; i < p.begin + p.size; ++i) {
        if constexpr (lm::is_16bit<W>) {
          if (p.group != "A") check_close(opt.master()[i], want[at(i)]);
          if (p.group != "A") CHECK(w[i] == lm::narrow<W>(opt.master()[i]));
        } else {
          check_close(w[i], want[at(i)]);
        }
        moved += wide(w[i]) != wide(before[at(i)]);
      }
      if (p.group == "A")
        CHECK(moved == 0);
      else
        CHECK(moved > p.size / 8);
    }
  }
}

TEST_CASE("SGD: the same bits for any number of threads, no allocation, and the guard") {
  constexpr Index n = 100'003;
  const std::vector<float> start = normals<float>(n, 1);
  std::vector<float> g = normals<float>(n, 2);
  const auto run = [&](auto executor, const lm::Clip* guard = nullptr) {
    const lm::cpu::Backend be{executor};
    std::vector<float> w = start, b(at(n));
    const long before = allocations();
    for (int t = 0; t < 3; ++t) {
      lm::sgd_step(be, flat(w), flat(g), flat(b), {.momentum = 0.9, .weight_decay = 0.1}, {}, guard);
    }
    CHECK(allocations() == before);
    return w;
  };
  const std::vector<float> one = run(lm::SerialExecutor{});
  CHECK(!same_bits(one, start));
  CHECK(same_bits(one, run(BackwardsExecutor{})));
  for (const Index lanes : {1, 2, 3}) {
    lm::ThreadPool pool(lanes);
    begin_threads(pool.executor());
    CHECK(same_bits(one, run(pool.executor())));
  }
  const lm::Clip bad{.finite = false};
  CHECK(same_bits(start, run(lm::SerialExecutor{}, &bad)));
}

TEST_CASE("SGD: an adapter's step allocates nothing; bad input is refused") {
  const lm::cpu::Backend be;
  lm::Lora<float> lora({.d_in = 70, .d_out = 33, .rank = 4});
  auto grad = lm::zeros_like(lora);
  lm::Sgd opt(lora, {.momentum = 0.9, .groups = {{"B", {.lr_ratio = 16}}}});
  const long before = allocations();
  opt.step(be, lora, grad);
  CHECK(allocations() == before);

  using lm::ErrorCode;
  check_error(ErrorCode::value, {"Sgd", "\"router\"", "\"A\", \"B\""}, [&] {
    lm::Sgd(lora, {.groups = {{"router", {}}}});
  });
  check_error(ErrorCode::value, {"Sgd", "momentum"}, [&] { lm::Sgd(lora, {.momentum = 1}); });
  check_error(ErrorCode::value, {"Sgd", "lr"}, [&] { opt.lr(-1); });
  std::vector<float> w(10), g(10), none;
  check_error(ErrorCode::shape, {"b"}, [&] { lm::sgd_step(be, flat(w), flat(g), flat(none), {.momentum = 0.5}); });
  check_error(ErrorCode::alias, {"g"}, [&] { lm::sgd_step(be, flat(w), flat(w), flat(none), {}); });
}

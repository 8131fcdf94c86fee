// AdamW against the literal formula in long double, with the rounding error it may have at most.
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/schedule.hpp>

#include "core/caught.hpp"
#include "support/allocations.hpp"
#include "train/support.hpp"

using namespace loramix_test;

namespace {

/// One weight by the formula of MATH.md section 5, and how far a computation with unit roundoff u may be from it: every
/// operation and every constant is rounded once, first order, errors carried along.
struct Literal {
  Wide w, m = 0, v = 0;
  Wide error_w = 0, error_m = 0, error_v = 0;

  void step(Wide g, const lm::AdamWStep& h, Wide u) {
    const Wide b1 = h.beta1, b2 = h.beta2, t = static_cast<Wide>(h.t);
    error_m = b1 * error_m + 3 * u * (std::abs(b1 * m) + std::abs((1 - b1) * g));
    error_v = b2 * error_v + 4 * u * (b2 * v + (1 - b2) * g * g);
    m = b1 * m + (1 - b1) * g;
    v = b2 * v + (1 - b2) * g * g;
    const Wide first = 1 / (1 - std::pow(b1, t)), second = 1 / (1 - std::pow(b2, t));
    const Wide root = std::sqrt(v * second) + static_cast<Wide>(h.eps);
    const Wide update = static_cast<Wide>(h.lr) * m * first / root;
    const Wide decayed = w - static_cast<Wide>(h.lr) * static_cast<Wide>(h.weight_decay) * w;
    const Wide error_update = std::abs(update) * (10 * u + (v > 0 ? error_v / (2 * v) : 0)) +
                              static_cast<Wide>(h.lr) * first / root * error_m;
    error_w += error_update + u * (3 * std::abs(w - decayed) + std::abs(decayed) + std::abs(decayed - update));
    w = decayed - update;
  }
};

template <class Got>
void check_close(Got got, const Literal& want) {
  CHECK(std::abs(wide(got) - want.w) <= 1.01L * want.error_w);
}

/// The gradient of step t: what an optimiser sees, exactly.
template <class G>
std::vector<G> gradient_of_step(Index n, int t) {
  std::vector<G> g = normals<G>(n, 100 + static_cast<std::uint64_t>(t), 0.01);
  for (std::size_t i = 0; i < g.size(); i += 5) g[i] = G{};       // rare features: v decays, m too
  for (std::size_t i = 0; i < g.size(); i += 7) g[i] *= G(1000);  // and large ones
  return g;
}

template <class W>
void flat_steps(const lm::AdamWStep& hyper, int steps) {
  using M = lm::accumulation_t<W>;
  constexpr Index n = 700;  // two chunks and a part
  const lm::cpu::Backend be;
  std::vector<W> w = normals<W>(n, 1);
  std::vector<M> m(at(n)), v(at(n)), master(lm::is_16bit<W> ? at(n) : 0);
  std::vector<Literal> want;
  for (const W start : w) want.push_back({wide(start)});
  lm::AdamWStep h = hyper;
  for (h.t = 1; h.t <= steps; ++h.t) {
    std::vector<M> g = gradient_of_step<M>(n, static_cast<int>(h.t));
    lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), h, flat(master));
    for (std::size_t i = 0; i < want.size(); ++i) want[i].step(wide(g[i]), h, unit<M>());
  }
  Wide moved = 0, allowed = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if constexpr (lm::is_16bit<W>) {
      check_close(master[i], want[i]);
      CHECK(w[i] == lm::narrow<W>(master[i]));
    } else {
      check_close(w[i], want[i]);
    }
    moved = std::max(moved, std::abs(want[i].w - wide(normals<W>(n, 1)[i])));
    allowed = std::max(allowed, want[i].error_w);
  }
  CHECK(moved > 1e3L * allowed);  // the bound means something
}

/// Twenty parameters of two groups in turn: more than go into one launch.
class Striped {
 public:
  using Config = ToyConfig;
  using precision = lm::precision_t<float>;
  using element = float;
  template <class, lm::Space>
  using rebind = Striped;
  static constexpr lm::Space space = lm::Space::host;
  static constexpr const char* kind = "striped";
  static constexpr int stripes = 20;

  explicit Striped(const Config& config) : config_(config), all_(Sizes(config.size).of) {}
  const Config& config() const { return config_; }
  lm::VectorView<float> parameters() { return all_.flat(); }
  lm::VectorView<const float> parameters() const { return all_.flat(); }
  lm::Cost cost(Index) const { return {}; }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    for (int i = 0; i < stripes; ++i) {
      f(names[i], self.all_.matrix(i, 1, self.config_.size), i % 2 == 0 ? lm::group::A : lm::group::bias);
    }
  }

 private:
  static constexpr const char* names[stripes] = {"a", "b", "c", "d", "e", "f", "g", "h", "i", "j",
                                                 "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"};
  struct Sizes {
    Index of[stripes];
    explicit Sizes(Index size) { std::fill_n(of, stripes, size); }
  };
  Config config_;
  lm::Parameters<float, lm::Space::host, stripes> all_;
};

}  // namespace

TEST_CASE_TEMPLATE("AdamW follows the formula for hundreds of steps", W, float, double, lm::bfloat16, lm::half) {
  flat_steps<W>({.lr = 3e-3, .weight_decay = 0.1}, 300);
  flat_steps<W>({.lr = 1e-2, .beta1 = 0, .beta2 = 0.5, .eps = 1e-3}, 40);
}

TEST_CASE("AdamW: the first step is the sign of the gradient, whatever its size") {
  const lm::cpu::Backend be;
  std::vector<double> w{1, 1, 1, 1}, g{1e-3, -50, 0, 1e-8}, m(4), v(4);
  lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.lr = 0.25});
  CHECK(std::abs(w[0] - 0.75) < 1e-5);
  CHECK(std::abs(w[1] - 1.25) < 1e-9);
  CHECK(w[2] == 1);
  CHECK(std::abs(w[3] - (1 - 0.125)) < 1e-9);  // |g| = ε: ε stands outside the root
}

TEST_CASE("AdamW: the smallest epsilons there are make no NaN of a gradient of 0") {
  const lm::cpu::Backend be;
  std::vector<float> w{1}, g{0}, m(1), v(1);
  lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.eps = 1e-45});
  CHECK(w[0] == 1);
  std::vector<double> wide_w{1}, wide_g{0}, wide_m(1), wide_v(1);
  lm::adamw_step(be, flat(wide_w), flat(wide_g), flat(wide_m), flat(wide_v), {.eps = 1e-50});
  CHECK(wide_w[0] == 1);
}

TEST_CASE("AdamW: 16-bit weights gather steps that are smaller than their spacing") {
  const lm::cpu::Backend be;
  std::vector<lm::bfloat16> w(1, lm::narrow<lm::bfloat16>(1.0f));
  std::vector<float> g{1}, m(1), v(1), master(1);
  for (Index t = 1; t <= 1000; ++t) {
    lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.lr = 1e-4, .t = t}, flat(master));
  }
  CHECK(std::abs(master[0] - 0.9f) < 1e-4f);
  CHECK(lm::narrow<float>(w[0]) == lm::narrow<float>(lm::narrow<lm::bfloat16>(master[0])));

  w[0] = lm::narrow<lm::bfloat16>(-3.0f);  // somebody loads another weight
  lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.lr = 1e-4, .t = 1001}, flat(master));
  CHECK(std::abs(master[0] + 3.0001f) < 1e-6f);
}

TEST_CASE_TEMPLATE("AdamW of an adapter: groups, decay flags, gaps", W, float, double, lm::bfloat16) {
  using M = lm::accumulation_t<W>;
  const lm::cpu::Backend be;
  Toy<W> toy({.size = 37});
  randomise(toy, 1);
  auto grad = lm::zeros_like(toy);
  const auto w = toy.parameters();
  const auto before = copy_of(w);
  lm::AdamW opt(
      toy, {.lr = 1e-3,
            .weight_decay = 0.5,
            .groups = {{"B", {.lr_ratio = 16}}, {"scale", {.weight_decay = 0.25}}, {"embedding", {.frozen = true}}}});
  std::vector<Literal> want;
  for (Index i = 0; i < w.size; ++i) want.push_back({wide(w[i])});
  const lm::LinearSchedule schedule{.base = 1e-3, .warmup = 5, .total = 60};
  constexpr int steps = 50;
  for (int t = 1; t <= steps; ++t) {
    opt.lr(schedule(t - 1));
    CHECK(opt.lr() == schedule(t - 1));
    const std::vector<M> g = gradient_of_step<M>(w.size, t);
    for (const Place& p : places(toy)) {
      std::copy_n(g.data() + p.begin, p.size, grad.parameters().data + p.begin);
      const double lr = schedule(t - 1);
      const lm::AdamWStep step{.lr = p.group == "B" ? 16 * lr : lr,
                               .weight_decay = p.group == "A" || p.group == "B" ? 0.5
                                               : p.group == "scale"             ? 0.25
                                                                                : 0,
                               .t = t};
      if (p.group == "embedding") continue;
      for (Index i = p.begin; i < p.begin + p.size; ++i) want[at(i)].step(wide(g[at(i)]), step, unit<M>());
    }
    opt.step(be, toy, grad);
    CHECK(opt.steps() == t);
  }
  std::vector<bool> inside(at(w.size));
  for (const Place& p : places(toy)) {
    CAPTURE(p.name);
    Index moved = 0;
    for (Index i = p.begin; i < p.begin + p.size; ++i) {
      inside[at(i)] = true;
      if constexpr (lm::is_16bit<W>) {
        if (p.group != "embedding") check_close(opt.master()[i], want[at(i)]);
        if (p.group != "embedding") CHECK(w[i] == lm::narrow<W>(opt.master()[i]));
      } else {
        check_close(w[i], want[at(i)]);
      }
      moved += wide(w[i]) != wide(before[at(i)]);
    }
    if (p.group == "embedding")
      CHECK(moved == 0);
    else
      CHECK(moved > p.size / 8);
  }
  int gaps = 0;
  for (Index i = 0; i < w.size; ++i) {
    if (inside[at(i)]) continue;
    ++gaps;
    CHECK(wide(w[i]) == 0);
  }
  CHECK(gaps > 0);
}

TEST_CASE_TEMPLATE("AdamW: moments without gradient end at 0, not among the subnormal numbers", W, float, double) {
  const lm::cpu::Backend be;
  std::vector<W> w{1}, g{W(0.5)}, m(1), v(1);
  int subnormal = 0;
  Index zero_at = 0;
  for (Index t = 1; t <= 8000; ++t) {
    lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.beta2 = 0.9, .t = t});
    g[0] = 0;
    subnormal += std::fpclassify(m[0]) == FP_SUBNORMAL || std::fpclassify(v[0]) == FP_SUBNORMAL;
    if (m[0] == 0 && zero_at == 0) zero_at = t;
  }
  CHECK(subnormal == 0);
  CHECK(v[0] == 0);
  // 0.05 · 0.9ᵗ passes the smallest normal number
  CHECK(std::abs(zero_at - (std::is_same_v<W, float> ? 803 : 6697)) < 10);
}

TEST_CASE("AdamW: LoRA+ in the words of DESIGN 4, and its state is a value") {
  const lm::cpu::Backend be;
  lm::Lora<float> team({.d_in = 70, .d_out = 33, .rank = 4}), copy = team;
  lm::initialise(team, {.seed = 7});
  lm::initialise(copy, {.seed = 7});
  auto grad = lm::zeros_like(team);
  lm::AdamW opt(team, {.lr = 2e-4, .groups = {{"B", {.lr_ratio = 16}}}});
  for (float& g : std::span(grad.B().data, 33 * 4)) g = -1;
  for (float& g : std::span(grad.A().data, 4 * 70)) g = 1;
  opt.step(be, team, grad);
  CHECK(team.B()(32, 3) == doctest::Approx(16 * 2e-4));
  CHECK(team.A()(3, 69) == doctest::Approx(copy.A()(3, 69) - 2e-4));

  auto again = opt;
  copy = team;
  opt.step(be, team, grad);
  again.step(be, copy, grad);
  CHECK(same_bits(copy_of(team.parameters()), copy_of(copy.parameters())));
  CHECK(team.B()(32, 3) > 16 * 2e-4);
}

TEST_CASE("AdamW: any number of groups in turn, each as a step of its own") {
  const lm::cpu::Backend be;
  Striped adapter({.size = 300}), grad = adapter, want = adapter;
  randomise(adapter, 1);
  randomise(grad, 2);
  want = adapter;
  lm::AdamW(adapter, {.lr = 1e-2, .weight_decay = 0.5, .groups = {{"A", {.lr_ratio = 4}}}}).step(be, adapter, grad);
  std::vector<float> m(300), v(300);
  for (const Place& p : places(want)) {
    const bool decays = p.group == "A";
    std::fill(m.begin(), m.end(), 0.0f);
    std::fill(v.begin(), v.end(), 0.0f);
    lm::adamw_step(be, want.parameters().part(p.begin, p.size), grad.parameters().part(p.begin, p.size), flat(m),
                   flat(v), {.lr = decays ? 4e-2 : 1e-2, .weight_decay = decays ? 0.5 : 0, .t = 1});
  }
  CHECK(same_bits(copy_of(adapter.parameters()), copy_of(want.parameters())));
}

TEST_CASE("AdamW: a frozen group beside one that differs in nothing else") {
  const lm::cpu::Backend be;
  lm::Lora<float> lora({.d_in = 70, .d_out = 33, .rank = 4});
  auto grad = lm::zeros_like(lora);
  randomise(grad, 1);
  lm::AdamW(lora, {.groups = {{"A", {.frozen = true}}}}).step(be, lora, grad);
  CHECK(lora.A()(3, 69) == 0);
  CHECK(lora.B()(32, 3) != 0);
  lm::AdamW(lora, {.groups = {{"B", {.frozen = true}}}}).step(be, lora, grad);
  CHECK(lora.A()(3, 69) != 0);
}

TEST_CASE_TEMPLATE("AdamW: checkpoints go on bit by bit", W, float, lm::bfloat16) {
  const lm::cpu::Backend be;
  Toy<W> toy({.size = 37});
  randomise(toy, 1);
  auto grad = lm::zeros_like(toy);
  randomise(grad, 2);
  lm::AdamW opt(toy, {.lr = 1e-2, .weight_decay = 0.1});
  for (int t = 0; t < 3; ++t) opt.step(be, toy, grad);

  Toy<W> other = toy;
  lm::AdamW restored(other, {.lr = 1e-2, .weight_decay = 0.1});
  restored.steps(opt.steps());
  std::copy_n(opt.m().data, opt.m().size, restored.m().data);
  std::copy_n(opt.v().data, opt.v().size, restored.v().data);
  std::copy_n(opt.master().data, opt.master().size, restored.master().data);
  opt.step(be, toy, grad);
  restored.step(be, other, grad);
  CHECK(same_bits(copy_of(toy.parameters()), copy_of(other.parameters())));
}

TEST_CASE_TEMPLATE("AdamW: the same bits for any number of threads, no allocation", W, float, double, lm::bfloat16) {
  using M = lm::accumulation_t<W>;
  constexpr Index n = 100'003;
  const std::vector<W> start = normals<W>(n, 1);
  std::vector<M> g = gradient_of_step<M>(n, 1);
  const auto run = [&](auto executor) {
    const lm::cpu::Backend be{executor};
    std::vector<W> w = start;
    std::vector<M> m(at(n)), v(at(n)), master(lm::is_16bit<W> ? at(n) : 0);
    const long before = allocations();
    for (Index t = 1; t <= 3; ++t) {
      lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.weight_decay = 0.1, .t = t}, flat(master));
    }
    CHECK(allocations() == before);
    return w;
  };
  const std::vector<W> one = run(lm::SerialExecutor{});
  CHECK(!same_bits(one, start));
  CHECK(same_bits(one, run(BackwardsExecutor{})));
  for (const Index lanes : {1, 2, 3}) {
    lm::ThreadPool pool(lanes);
    begin_threads(pool.executor());
    CHECK(same_bits(one, run(pool.executor())));
  }
}

TEST_CASE("AdamW: an adapter's step allocates nothing") {
  const lm::cpu::Backend be;
  Toy<lm::bfloat16> toy({.size = 370});
  auto grad = lm::zeros_like(toy);
  randomise(grad, 2);
  lm::AdamW opt(toy, {.groups = {{"B", {.lr_ratio = 16}}, {"A", {.frozen = true}}}});
  const long before = allocations();
  opt.lr(1e-4);
  opt.step(be, toy, grad);
  CHECK(allocations() == before);
  take_memory();
  CHECK(allocations() == before + 1);  // the counter counts
}

TEST_CASE("AdamW: a guard that says not finite stops the step on the device too") {
  const lm::cpu::Backend be;
  std::vector<float> w = normals<float>(600, 1), g = normals<float>(600, 2), m(600), v(600);
  const std::vector<float> before = w;
  lm::Clip clip{.finite = false};
  lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {}, {}, &clip);
  CHECK(same_bits(w, before));
  CHECK(same_bits(v, std::vector<float>(600)));
  clip.finite = true;
  lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {}, {}, &clip);
  CHECK(!same_bits(w, before));
}

TEST_CASE("AdamW: bad input is refused before anything is written") {
  const lm::cpu::Backend be;
  Toy<float> toy({.size = 3});
  using lm::ErrorCode;
  const auto make = [&](const lm::AdamWOptions& options) { return [&toy, options] { lm::AdamW(toy, options); }; };
  check_error(ErrorCode::value, {"AdamW", "\"b\"", "\"A\", \"bias\", \"B\", \"scale\", \"embedding\""},
              make({.groups = {{"b", {.lr_ratio = 16}}}}));
  check_error(ErrorCode::value, {"\"B\" twice"}, make({.groups = {{"B", {}}, {"B", {}}}}));
  check_error(ErrorCode::value, {"lr_ratio", "-1"}, make({.groups = {{"B", {.lr_ratio = -1}}}}));
  check_error(ErrorCode::value, {"weight_decay", "nan"}, make({.groups = {{"B", {.weight_decay = std::nan("")}}}}));
  check_error(ErrorCode::value, {"lr", "inf"}, make({.lr = 1.0 / 0.0}));
  check_error(ErrorCode::value, {"lr", "-0.1"}, make({.lr = -0.1}));
  check_error(ErrorCode::value, {"beta1", "[0, 1)"}, make({.beta1 = 1}));
  check_error(ErrorCode::value, {"beta2"}, make({.beta2 = -0.5}));
  check_error(ErrorCode::value, {"AdamW", "eps"}, make({.eps = -1}));
  check_error(ErrorCode::value, {"AdamW", "eps"}, make({.eps = 0}));
  check_error(ErrorCode::value, {"AdamW", "eps"}, make({.eps = 1e-50}));  // 0 as a float
  check_error(ErrorCode::value, {"weight_decay"}, make({.weight_decay = -1}));

  lm::AdamW opt(toy);
  check_error(ErrorCode::value, {"lr"}, [&] { opt.lr(std::nan("")); });
  check_error(ErrorCode::value, {"steps"}, [&] { opt.steps(-1); });
  Toy<float> larger({.size = 30});
  auto grad = lm::zeros_like(toy), large_grad = lm::zeros_like(larger);
  check_error(ErrorCode::shape, {"AdamW", "adapter"}, [&] { opt.step(be, larger, large_grad); });
  check_error(ErrorCode::shape, {"AdamW", "gradient"}, [&] { opt.step(be, toy, large_grad); });
  CHECK(opt.steps() == 0);

  std::vector<float> w(10, 1), g(10, 1), m(10), v(10), none;
  std::vector<lm::bfloat16> w16(10);
  const auto refuse = [&](ErrorCode code, std::initializer_list<std::string> parts, auto&& f) {
    check_error(code, parts, f);
    CHECK(same_bits(w, std::vector<float>(10, 1)));
  };
  refuse(ErrorCode::shape, {"g", "size 9"},
         [&] { lm::adamw_step(be, flat(w), flat(g).part(0, 9), flat(m), flat(v), {}); });
  refuse(ErrorCode::shape, {"v"}, [&] { lm::adamw_step(be, flat(w), flat(g), flat(m), flat(none), {}); });
  refuse(ErrorCode::alias, {"weights", "g"}, [&] { lm::adamw_step(be, flat(w), flat(w), flat(m), flat(v), {}); });
  refuse(ErrorCode::alias, {"m", "v"}, [&] { lm::adamw_step(be, flat(w), flat(g), flat(m), flat(m), {}); });
  refuse(ErrorCode::null, {"w"}, [&] {
    lm::adamw_step(be, lm::VectorView<float>{nullptr, 10}, flat(g), flat(m), flat(v), {});
  });
  refuse(ErrorCode::value, {"t"}, [&] { lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.t = 0}); });
  refuse(ErrorCode::value, {"adamw_step", "eps"},
         [&] { lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.eps = 0}); });
  refuse(ErrorCode::value, {"adamw_step", "eps"},
         [&] { lm::adamw_step(be, flat(w), flat(g), flat(m), flat(v), {.eps = 1e-50}); });
  refuse(ErrorCode::shape, {"master"}, [&] { lm::adamw_step(be, flat(w16), flat(g), flat(m), flat(v), {}); });

  lm::Lora<float> empty({.d_in = 5, .d_out = 5, .rank = 0});
  auto nothing = lm::zeros_like(empty);
  lm::AdamW(empty).step(be, empty, nothing);
}

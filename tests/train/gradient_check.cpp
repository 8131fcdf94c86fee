// The gradient check accepts what is right and refuses what is wrong, by as little as its bound says.
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/gate/softmax.hpp>
#include <loramix/train/gradient_check.hpp>

#include "core/caught.hpp"
#include "train/support.hpp"

using namespace loramix_test;

namespace {

/// A softmax gate whose backward forgets what normalisation does.
struct ForgetfulGate : lm::SoftmaxGate<double> {
  template <lm::Team Tm>
  LORAMIX_HD void backward_row(const Tm& team, Index t, const double*, const State& state, const State& dstate,
                               double* dh) const {
    team.each(state.weights.cols, [&](Index e) { dh[e] += state.weights(t, e) * dstate.weights(t, e); });
  }
};

struct MixtureConfig {
  Index d_in = 7, d_out = 5, rank = 2, experts = 3;
  double dropout = 0.5;
  static MixtureConfig of(const lm::Shape& s) { return {s.d_in, s.d_out, s.total_rank / s.experts, s.experts, 0}; }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("rank", self.rank);
    f("experts", self.experts);
    f("dropout", self.dropout);
  }
};

/// What a user writes: a dense mixture of LoRAs, here with a gate to choose.
template <class P, class G, class T = typename lm::precision_t<P>::weight>
class Mixture {
 public:
  using Config = MixtureConfig;
  using precision = lm::precision_t<P>;
  using element = T;
  template <class U, lm::Space>
  using rebind = Mixture<P, G, U>;
  static constexpr lm::Space space = lm::Space::host;
  static constexpr const char* kind = "mixture";

  explicit Mixture(const Config& c)
      : config_(c), all_({c.rank * c.experts * c.d_in, c.d_out * c.rank * c.experts, c.experts * c.d_in}) {}
  const Config& config() const { return config_; }
  lm::VectorView<T> parameters() { return all_.flat(); }
  lm::VectorView<const T> parameters() const { return all_.flat(); }
  auto A() { return all_.matrix(0, config_.rank * config_.experts, config_.d_in); }
  auto A() const { return all_.matrix(0, config_.rank * config_.experts, config_.d_in); }
  auto B() { return all_.template matrix<lm::Major::column>(1, config_.d_out, config_.rank * config_.experts); }
  auto B() const { return all_.template matrix<lm::Major::column>(1, config_.d_out, config_.rank * config_.experts); }
  auto side() { return all_.matrix(2, config_.experts, config_.d_in); }
  auto side() const { return all_.matrix(2, config_.experts, config_.d_in); }
  G gate() const {
    G made;
    made.router = side();
    made.temperature = 0.7;
    return made;
  }
  double scale() const { return 1.5; }
  double dropout() const { return config_.dropout; }
  lm::Cost cost(Index) const { return {}; }

  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("A", self.A(), lm::group::A);
    f("B", self.B(), lm::group::B);
    f("router", self.side(), lm::group::router);
  }

 private:
  Config config_;
  lm::Parameters<T, lm::Space::host, 3> all_;
};

const lm::CheckedTensor& tensor(const lm::GradientReport& report, const std::string& name) {
  for (const lm::CheckedTensor& found : report.tensors) {
    if (found.name == name) return found;
  }
  FAIL("no tensor ", name, " in\n", report.text());
  return report.tensors[0];
}

}  // namespace

TEST_CASE("gradient_check: LoRA with dropout is right") {
  const lm::cpu::Backend be;
  lm::Lora<double> lora({.d_in = 7, .d_out = 5, .rank = 3, .dropout = 0.5});
  lm::initialise(lora, {.seed = 3});
  const auto before = copy_of(lora.parameters());
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    const lm::GradientReport report = lm::gradient_check(be, lora, {.tokens = 6, .keep = keep});
    INFO(report.text());
    CHECK(report.ok());
    REQUIRE(report.tensors.size() == 3);
    for (const char* name : {"x", "lora_A.weight", "lora_B.weight"}) {
      const lm::CheckedTensor& found = tensor(report, name);
      CHECK(found.ok);
      CHECK(found.norm > 0.1);
      CHECK(found.error <= 1e-9 * found.norm);  // far inside: the stencil is not what is measured
      CHECK(found.bound < 1e-5);
    }
  }
  CHECK(same_bits(before, copy_of(lora.parameters())));
}

TEST_CASE("gradient_check: a user's mixture is right, with a wrong gate it is found") {
  const lm::cpu::Backend be;
  const Mixture<double, lm::SoftmaxGate<double>> good({});
  const lm::GradientReport right = lm::gradient_check(be, good);
  INFO(right.text());
  CHECK(right.ok());
  CHECK(tensor(right, "router").norm > 0.01);

  const Mixture<double, ForgetfulGate> bad({});
  const lm::GradientReport wrong = lm::gradient_check(be, bad);
  INFO(wrong.text());
  CHECK(!wrong.ok());
  CHECK(!tensor(wrong, "router").ok);
  CHECK(!tensor(wrong, "x").ok);  // the router's part of dx
  CHECK(tensor(wrong, "A").ok);
  CHECK(tensor(wrong, "B").ok);
  CHECK(wrong.text().find("router |g|") != std::string::npos);
  CHECK(wrong.text().find("WRONG") != std::string::npos);
}

TEST_CASE("gradient_check: another dropout mask in backward is found") {
  // What a backward that draws anew would return: the gradient under another key.
  const lm::cpu::Backend be;
  lm::Lora<double> lora({.d_in = 20, .d_out = 3, .rank = 2, .dropout = 0.5});
  randomise(lora, 1);
  lm::Matrix<double> x(4, 20), y(4, 3), dy(4, 3), dx(4, 20);
  for (Index i = 0; i < 80; ++i) x.data()[i] = 1 + 0.01 * static_cast<double>(i);
  for (Index i = 0; i < 12; ++i) dy.data()[i] = 1;
  std::vector<std::byte> scratch(1 << 20), kept(1 << 20);
  const auto report_with = [&](std::uint64_t seed_of_backward) {
    auto grad = lm::zeros_like(lora);
    lm::Arena<> reserve{kept};
    auto saved =
        lm::forward(be, lora, x, y, lm::Arena<>{scratch}, {.save = &reserve, .key = {.seed = seed_of_backward}});
    lm::backward(be, lora, saved, x, dy, {}, grad, lm::Arena<>{scratch});
    const lm::VectorView<double> a{lora.A().data, 40};
    return lm::gradient_check({{"A", a, {grad.A().data, 40}}}, [&] {
      lm::forward(be, lora, x, y, lm::Arena<>{scratch}, {.key = {.seed = 1}, .into = lm::Into::set});
      double loss = 0;
      for (Index i = 0; i < 12; ++i) loss += y.data()[i];
      return loss;
    });
  };
  CHECK(report_with(1).ok());
  CHECK(!report_with(2).ok());
}

TEST_CASE("gradient_check: any loss; an error of a millionth is found") {
  std::vector<double> w{0.3, -1.2, 2.5}, v{1.5, 0.25};
  const auto loss = [&] { return std::sin(w[0]) * std::exp(w[1]) + w[2] * w[2] * w[2] * v[0] + std::cos(v[1]); };
  const std::vector<double> dw{std::cos(0.3) * std::exp(-1.2), std::sin(0.3) * std::exp(-1.2), 3 * 2.5 * 2.5 * 1.5};
  const std::vector<double> dv{2.5 * 2.5 * 2.5, -std::sin(0.25)};
  const auto check = [&](std::vector<double> gw) {
    return lm::gradient_check({{"w", flat(w), flat(gw)}, {"v", flat(v), {dv.data(), 2}}}, loss);
  };
  CHECK(check(dw).ok());
  CHECK(w == std::vector<double>{0.3, -1.2, 2.5});
  for (std::size_t i : {0, 1, 2}) {
    std::vector<double> wrong = dw;
    wrong[i] += 1e-6 * dw[2] * 2;
    CHECK(!check(wrong).ok());
    CHECK(!tensor(check(wrong), "w").ok);
    CHECK(tensor(check(wrong), "v").ok);
    wrong[i] = std::nan("");
    CHECK(!check(wrong).ok());
    wrong[i] = dw[i] * (1 + 1e-9);
    CHECK(check(wrong).ok());
  }
  const lm::GradientReport report = check(dw);
  const double norm = std::sqrt(dw[0] * dw[0] + dw[1] * dw[1] + dw[2] * dw[2]), other = std::hypot(dv[0], dv[1]);
  CHECK(tensor(report, "w").bound == doctest::Approx(1e-7 * norm + 1e-8 * std::max(norm, other)));
}

TEST_CASE("gradient_check: a case that shows nothing is not ok; bad input") {
  std::vector<double> w{1, 2}, zero{0, 0}, one{1};
  CHECK(!lm::gradient_check({{"w", flat(w), flat(zero)}}, [] { return 1.0; }).ok());
  CHECK(!lm::gradient_check({{"w", flat(w), flat(zero)}}, [] { return std::nan(""); }).ok());
  check_error(lm::ErrorCode::shape, {"gradient_check", "w"}, [&] {
    lm::gradient_check({{"w", flat(w), flat(one)}}, [] { return 1.0; });
  });
  check_error(lm::ErrorCode::value, {"tensors"},
              [&] { lm::gradient_check(std::span<const lm::GradientClaim>{}, [] { return 1.0; }); });
}

// DoRA against literal sums: values, gradients with n frozen, both ways to the base product, merge, numbers of MATH 6.
#include <loramix/adapter/dora_forward.hpp>

#include "adapter/weight_space.hpp"

namespace loramix_test {
namespace {

template <class P>
lm::DoraConfig config(bool drop_base) {
  return {.d_in = 13, .d_out = 11, .rank = 3, .alpha = 4, .dropout = 0.5, .drop_base = drop_base};
}

/// A batch with its frozen weight.
template <class P>
struct Beside {
  using A = lm::Dora<P>;
  using X = typename A::precision::activation;
  Batch<A> b;
  lm::Matrix<X> weights;
  lm::Matrix<typename A::precision::accumulation> squares;
  lm::DoraBase<A> base;

  Beside(Index tokens, bool drop_base)
      : b(config<P>(drop_base), tokens, static_cast<std::uint64_t>(tokens)),
        weights(random_matrix<X>(11, 13, b.random)),
        squares(1, 11),
        base{weights, {squares.data(), 11}} {
    lm::row_squares(
        b.be, lm::RowSquares<X, typename A::precision::accumulation, lm::Space::host>{weights, {squares.data(), 11}});
  }
  reference::Values norms() const { return reference::row_norms(grid(weights), A_(), B_(), b.adapter.scale()); }
  reference::Values A_() const { return grid(b.adapter.A()); }
  reference::Values B_() const { return grid(b.adapter.B()); }
  reference::Values want(const reference::Values& n, bool drop) const {
    const auto hat = drop ? x_hat(b, 0.5) : grid(b.x);
    return reference::dora(b.adapter.config().drop_base ? hat : grid(b.x), hat, grid(weights), A_(), B_(),
                           grid(b.adapter.magnitude()), n, b.adapter.scale());
  }
  auto forward(lm::MatrixView<X> y, lm::ForwardOptions<lm::Space::host> options = {}) {
    return lm::forward(b.be, b.adapter, base, b.x, y, b.work.arena(), options);
  }
};

TEST_CASE("ΔY is the literal sum, and gradients are its differences with n constant") {
  for (const bool drop_base : {false, true}) {
    for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
      for (const Index tokens : {1, 9, 66}) {
        Beside<double> c(tokens, drop_base);
        auto y = c.b.zeros_y(), dx = c.b.zeros_dx();
        auto grad = lm::zeros_like(c.b.adapter);
        lm::Arena<> reserve = c.b.memory.arena();
        auto saved = c.forward(y, {.save = &reserve, .key = c.b.key, .keep = keep});
        const auto n = c.norms();
        check_close(y, c.want(n, true), 1e-12);
        lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena());
        check_gradients(c.b.adapter, grad, c.b.x, dx, [&] { return reference::inner(grid(c.b.dy), c.want(n, true)); });
      }
    }
  }
}

TEST_CASE("the engine's own X Wᵀ in y: one product with W, and dY passed on") {
  Beside<double> c(9, false);
  auto y = c.b.zeros_y(), delta = y, dx = c.b.zeros_dx(), dx_all = dx, passed = y;
  auto grad = lm::zeros_like(c.b.adapter), grad_all = grad;
  const auto base = base_output(grid(c.b.x), grid(c.weights));
  for (Index i = 0; i < base.size(); ++i) y.data()[i] = base[i];
  lm::Arena<> reserve = c.b.memory.arena();
  auto saved_all = c.forward(delta, {.save = &reserve, .key = c.b.key});
  lm::backward(c.b.be, c.b.adapter, c.base, saved_all, c.b.x, c.b.dy, dx_all, grad_all, c.b.work.arena());
  reserve.reset();
  // [in-y]
  c.base.in_y = true;
  auto saved = c.forward(y, {.save = &reserve, .key = c.b.key});
  c.base.passed = passed;
  lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena());
  // [/in-y]
  check_close(y, reference::plus(base, 1, grid(delta)), 1e-12);
  for (Index i = 0; i < grad.parameters().size; ++i) {
    CHECK(std::abs(grad.parameters()[i] - grad_all.parameters()[i]) <= 1e-12);
  }
  // dX of ours + (m/n ∘ dY) W is dX of all + dY W.
  const auto engine = reference::times(grid(passed), grid(c.weights));
  const auto plain = reference::times(grid(c.b.dy), grid(c.weights));
  check_close(dx, reference::plus(reference::plus(grid(dx_all), 1, plain), -1, engine), 1e-12);
}

TEST_CASE("DoRA at its start equals the base bit for bit, and m starts at the norms") {
  for (const Index tokens : {1, 70}) {
    Beside<float> c(tokens, false);
    // [start]
    lm::initialise(c.b.adapter, {.seed = 3});
    CHECK(std::isnan(c.b.adapter.magnitude()(0, 0)));
    lm::start_magnitude(c.b.be, c.b.adapter, c.base);
    // [/start]
    const auto n = c.norms();
    for (Index i = 0; i < 11; ++i) CHECK(std::abs(c.b.adapter.magnitude()(0, i) - n[i]) <= 1e-6 * n[i]);
    auto y = c.b.zeros_y();
    c.forward(y, {.key = c.b.key});
    CHECK(same_bits(y, c.b.zeros_y()));
    auto dx = c.b.zeros_dx();
    auto grad = lm::zeros_like(c.b.adapter);
    lm::Arena<> reserve = c.b.memory.arena();
    auto saved = c.forward(y, {.save = &reserve, .key = c.b.key});
    lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena());
    double a = 0, b = 0, m = 0;
    for (Index i = 0; i < 39; ++i) a += std::abs(grad.A().data[i]);
    for (Index i = 0; i < 33; ++i) b += std::abs(grad.B().data[i]);
    for (Index i = 0; i < 11; ++i) m += std::abs(grad.magnitude().data[i]);
    CHECK(a == 0);
    CHECK(b > 0);
    CHECK(m > 0);
    CHECK(same_bits(dx, c.b.zeros_dx()));
  }
}

TEST_CASE("n = 0 gives m/n = 0: the row is W's negative, and no gradient is infinite") {
  Beside<double> c(5, false);
  const double s = c.b.adapter.scale();
  for (Index col = 0; col < 13; ++col) {  // W_4 = −s (BA)_4, but for rounding
    double sum = 0;
    for (Index j = 0; j < 3; ++j) sum += c.b.adapter.B()(4, j) * c.b.adapter.A()(j, col);
    c.weights(4, col) = std::nextafter(-(s * sum), col % 2 == 0 ? 9.0 : -9.0);
  }
  lm::row_squares(c.b.be, lm::RowSquares<double, double, lm::Space::host>{c.weights, {c.squares.data(), 11}});
  auto y = c.b.zeros_y(), dx = c.b.zeros_dx();
  auto grad = lm::zeros_like(c.b.adapter);
  lm::Arena<> reserve = c.b.memory.arena();
  auto saved = c.forward(y, {.save = &reserve, .dropout_off = true});
  CHECK(saved.ratio[4] == 0);
  CHECK(saved.inverse[4] == 0);
  const auto base = base_output(grid(c.b.x), grid(c.weights));
  for (Index t = 0; t < 5; ++t) CHECK(std::abs(y(t, 4) + base(t, 4)) <= 1e-13);
  lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena());
  CHECK(grad.magnitude()(0, 4) == 0);
  for (Index i = 0; i < grad.parameters().size; ++i) CHECK(std::isfinite(grad.parameters()[i]));
  auto merged = c.weights;
  lm::merge(c.b.be, c.b.adapter, merged);
  for (Index col = 0; col < 13; ++col) CHECK(merged(4, col) == 0);
}

TEST_CASE("a norm that overflows is infinite, not 0") {
  Beside<double> c(1, false);
  c.b.adapter.B()(2, 0) = 1e200;
  std::vector<double> norms(11);
  const lm::DoraNorms<double, double, double, lm::Space::host> op{
      c.weights, {c.squares.data(), 11}, c.b.adapter.A(), c.b.adapter.B(), c.b.adapter.scale(), {norms.data(), 11}};
  Memory work(lm::dora_norms_bytes(c.b.be, op) + 64);
  lm::dora_norms(c.b.be, op, work.arena());
  CHECK(std::isinf(norms[2]));
  CHECK(std::isfinite(norms[3]));
}

TEST_CASE("PEERS 3.17: the norms cost no d_out × d_in scratch, and agree with the direct sum also where terms cancel") {
  Beside<double> c(1, false);
  for (Index col = 0; col < 13; ++col) {  // row 2: W = −s BA + 1e-6
    double sum = 0;
    for (Index j = 0; j < 3; ++j) sum += c.b.adapter.B()(2, j) * c.b.adapter.A()(j, col);
    c.weights(2, col) = -c.b.adapter.scale() * sum + 1e-6;
  }
  lm::row_squares(c.b.be, lm::RowSquares<double, double, lm::Space::host>{c.weights, {c.squares.data(), 11}});
  std::vector<double> norms(11);
  using Norms = lm::DoraNorms<double, double, double, lm::Space::host>;
  const Norms op{c.weights,       {c.squares.data(), 11}, c.b.adapter.A(),
                 c.b.adapter.B(), c.b.adapter.scale(),    {norms.data(), 11}};
  Memory work(lm::dora_norms_bytes(c.b.be, op) + 64);
  lm::dora_norms(c.b.be, op, work.arena());
  const auto want = c.norms();
  for (Index i = 0; i < 11; ++i) CHECK(std::abs(norms[static_cast<std::size_t>(i)] - want[i]) <= 1e-9 * want[i]);
  const auto bytes = [&](Index d_out) {
    const Norms sized{{nullptr, d_out, 4096}, {nullptr, d_out}, {nullptr, 8, 4096}, {nullptr, d_out, 8}, 1.0, {}};
    return lm::dora_norms_bytes(c.b.be, sized);
  };
  CHECK(bytes(8192) - bytes(4096) <= 4096 * 8 * 8 + 64);
}

template <class T>
void check_merge(double unit) {
  Beside<float> c(9, false);
  lm::Matrix<T> weights(11, 13);
  for (Index i = 0; i < 11 * 13; ++i) weights.data()[i] = lm::narrow<T>(lm::widen<double>(c.weights.data()[i]));
  const auto before = weights;
  const auto W = grid(weights), n = reference::row_norms(W, c.A_(), c.B_(), c.b.adapter.scale());
  auto want = reference::plus(W, c.b.adapter.scale(), reference::times(c.B_(), c.A_()));
  const auto merged = lm::merge(c.b.be, c.b.adapter, weights);
  double worst = 0;
  for (Index i = 0; i < 11; ++i) {
    for (Index col = 0; col < 13; ++col) {
      want(i, col) *= c.b.adapter.magnitude()(0, i) / n[i];
      const double error = std::abs(lm::widen<double>(weights(i, col)) - want(i, col));
      CHECK(error <= unit * std::abs(want(i, col)) * (1 + 1e-6) + 0x1p-40);
      worst = std::max(worst, error);
    }
  }
  CHECK(std::abs(worst - merged.report.max_rounding) <= 1e-12);
  CHECK_FALSE(same_bits(weights, before));
  merged.undo(weights);
  CHECK(same_bits(weights, before));
}
TEST_CASE("merge is (m/n) (W + s B A) rounded once; undo is bitwise (PEERS 3.3)") {
  check_merge<float>(0x1p-24);
  check_merge<lm::bfloat16>(0x1p-8);
}

TEST_CASE("merged weights give base and adapter") {
  Beside<double> c(9, false);
  auto y = c.b.zeros_y();
  c.forward(y);
  const auto base = base_output(grid(c.b.x), grid(c.weights));
  auto merged = c.weights;
  lm::merge(c.b.be, c.b.adapter, merged);
  check_close(y, reference::plus(base_output(grid(c.b.x), grid(merged)), -1, base), 1e-12);
}

TEST_CASE("three lanes, Into, frozen, allocations, exact sizes") {
  Beside<float> c(70, true);
  auto y = c.b.zeros_y(), y3 = y, dx = c.b.zeros_dx(), dx3 = constant<float>(70, 13, nan);
  auto grad = lm::zeros_like(c.b.adapter), grad3 = grad;
  poison(grad3);
  lm::Arena<> reserve = c.b.memory.arena();
  auto saved = c.forward(y, {.save = &reserve, .key = c.b.key});
  lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena());
  CHECK(reserve.used() == lm::reserve_bytes(c.b.adapter, 70) - 64);
  lm::ThreadPool pool(3);
  const lm::cpu::Backend be{pool.executor()};
  const Index there = lm::workspace_bytes(be, c.b.adapter, 70);
  const Index back = lm::workspace_bytes(be, c.b.adapter, 70, lm::Pass::backward);
  Memory f(there), g(back);
  const auto step = [&] {
    reserve.reset();
    auto now = lm::forward(be, c.b.adapter, c.base, c.b.x, y3, f.arena(),
                           {.save = &reserve, .key = c.b.key, .into = lm::Into::set});
    lm::backward(be, c.b.adapter, c.base, now, c.b.x, c.b.dy, dx3, grad3, g.arena(),
                 {.parameters = lm::Into::set, .input = lm::Into::set});
  };
  step();
  const Index count = allocations();
  step();
  CHECK(allocations() == count);
  CHECK(same_bits(y, y3));
  CHECK(same_bits(dx, dx3));
  CHECK(same_parameters(grad, grad3));
  reserve.reset();
  saved = c.forward(y, {.save = &reserve, .key = c.b.key});
  auto dx_alone = c.b.zeros_dx();
  lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx_alone, lm::frozen, c.b.work.arena());
  CHECK(same_bits(dx, dx_alone));
}

TEST_CASE("wrong calls are refused before any write") {
  Beside<float> c(5, true);
  auto y = c.b.zeros_y();
  lm::Arena<> reserve = c.b.memory.arena();
  auto saved = c.forward(y, {.save = &reserve, .key = c.b.key});
  const auto before = y;
  auto grad = lm::zeros_like(c.b.adapter);
  auto dx = c.b.zeros_dx();
  const auto base = c.base;
  using Code = lm::ErrorCode;
  const auto refused = [&](Code code, std::initializer_list<std::string> parts,
                           lm::ForwardOptions<lm::Space::host> options) {
    check_error(code, parts, [&] { c.forward(y, options); });
    CHECK(same_bits(y, before));
    c.base = base;
  };
  c.base.in_y = true;
  refused(Code::value, {"forward", "in_y", "drop_base"}, {.key = c.b.key});
  c.base.in_y = true;
  refused(Code::value, {"forward", "in_y", "Into::add"}, {.into = lm::Into::set});
  c.base.weights = c.base.weights.row_range(0, 10);
  refused(Code::shape, {"forward", "W", "10", "11"}, {});
  c.base.squares = c.base.squares.part(0, 10);
  refused(Code::shape, {"forward", "squares", "10", "11"}, {});
  c.base.passed = {nullptr, y.rows(), y.cols()};
  check_error(Code::null, {"backward", "passed"},
              [&] { lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena()); });
  c.base.passed = y;
  check_error(Code::value, {"backward", "passed"},
              [&] { lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena()); });
  c.base = base;
  lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena());
  check_error(Code::state, {"backward", "spent"},
              [&] { lm::backward(c.b.be, c.b.adapter, c.base, saved, c.b.x, c.b.dy, dx, grad, c.b.work.arena()); });
}

TEST_CASE("bfloat16 throughout, a float adapter on a bfloat16 base, and rank 0") {
  const auto run = [](auto& c, double bound) {
    auto y = c.b.zeros_y();
    c.forward(y);
    check_close(y, c.want(c.norms(), false), bound);
  };
  Beside<lm::bfloat16> narrow(5, false);
  run(narrow, 0.5);
  Beside<lm::Precision<lm::bfloat16, float>> mixed(5, false);
  run(mixed, 0.5);
  lm::Dora<float> lengths({.d_in = 13, .d_out = 11, .rank = 0});
  Beside<float> c(5, false);
  lm::start_magnitude(c.b.be, lengths, {c.weights, {c.squares.data(), 11}});
  for (Index i = 0; i < 11; ++i) lengths.magnitude()(0, i) *= 3;
  auto y = c.b.zeros_y();
  Memory work(lm::workspace_bytes(c.b.be, lengths, 5));
  lm::forward(c.b.be, lengths, lm::DoraBase<lm::Dora<float>>{c.weights, {c.squares.data(), 11}}, c.b.x, y,
              work.arena());
  const auto base = base_output(grid(c.b.x), grid(c.weights));
  check_close(y, reference::plus(base, 1, base), 1e-5);
}

}  // namespace
}  // namespace loramix_test

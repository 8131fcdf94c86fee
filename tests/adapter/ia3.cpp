// IA3 against literal sums: the output and the feed-forward form, in place and beside, gradients through W, merge.
#include <loramix/adapter/ia3_forward.hpp>

#include "adapter/weight_space.hpp"

namespace loramix_test {
namespace {

/// A layer x → X Wᵀ with l on one side, as an engine runs it.
struct Layer {
  using A = lm::Ia3<double>;
  Layer(Index tokens, bool feed_forward)
      : random(static_cast<std::uint64_t>(tokens)),
        adapter({.d_in = 13, .d_out = 11, .feed_forward = feed_forward}),
        x(random_matrix<double>(tokens, 13, random)),
        dy(random_matrix<double>(tokens, 11, random)),
        weights(random_matrix<double>(11, 13, random)),
        reserve(lm::reserve_bytes(adapter, tokens)),
        work(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward)) {
    fill_parameters(adapter, random);
  }
  reference::Values want() const {  // X (diag(l) W)ᵀ or X (W diag(l))ᵀ
    auto W = grid(weights);
    for (Index o = 0; o < 11; ++o) {
      for (Index c = 0; c < 13; ++c) W(o, c) *= adapter.l()(0, adapter.config().feed_forward ? c : o);
    }
    return base_output(grid(x), W);
  }
  static lm::Matrix<double> matrix(const reference::Values& v) {
    lm::Matrix<double> m(v.rows(), v.cols());
    for (Index i = 0; i < v.size(); ++i) m.data()[i] = v[i];
    return m;
  }
  lm::cpu::Backend<> be;
  Random random;
  A adapter;
  lm::Matrix<double> x, dy, weights;
  Memory reserve, work;
};

TEST_CASE("output form in place: y becomes l ∘ X Wᵀ, dy becomes what the engine's backward goes on with") {
  for (const Index tokens : {1, 9}) {
    Layer layer(tokens, false);
    auto y = Layer::matrix(base_output(grid(layer.x), grid(layer.weights)));
    lm::Arena<> reserve = layer.reserve.arena();
    // [in-place]
    auto saved = lm::forward(layer.be, layer.adapter, y, y, layer.work.arena(), {.save = &reserve});
    check_close(y, layer.want(), 1e-12);
    auto grad = lm::zeros_like(layer.adapter);
    auto passed = layer.dy;
    lm::backward(layer.be, layer.adapter, saved, y, passed, passed, grad, layer.work.arena());
    // [/in-place]
    auto dx = Layer::matrix(reference::times(grid(passed), grid(layer.weights)));
    check_gradients(layer.adapter, grad, layer.x, dx, [&] { return reference::inner(grid(layer.dy), layer.want()); });
  }
}

TEST_CASE("feed-forward form: l ∘ x goes into the product; Keep::recompute reads x again") {
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    Layer layer(9, true);
    auto scaled = layer.x;  // holds x, to which (l − 1) ∘ x is added
    lm::Arena<> reserve = layer.reserve.arena();
    auto saved =
        lm::forward(layer.be, layer.adapter, layer.x, scaled, layer.work.arena(), {.save = &reserve, .keep = keep});
    CHECK((saved.x.data == nullptr) == (keep == lm::Keep::recompute));
    check_close(Layer::matrix(base_output(grid(scaled), grid(layer.weights))), layer.want(), 1e-12);
    const auto d = Layer::matrix(reference::times(grid(layer.dy), grid(layer.weights)));
    auto dx = d;
    auto grad = lm::zeros_like(layer.adapter);
    lm::backward(layer.be, layer.adapter, saved, layer.x, d, dx, grad, layer.work.arena());
    check_gradients(layer.adapter, grad, layer.x, dx, [&] { return reference::inner(grid(layer.dy), layer.want()); });
  }
}

TEST_CASE("l = 1 at start changes no bit; Into::set is ΔY alone") {
  Layer layer(9, false);
  lm::initialise(layer.adapter, {});
  const auto y = Layer::matrix(base_output(grid(layer.x), grid(layer.weights)));
  auto scaled = y, delta = constant<double>(9, 11, nan);
  lm::forward(layer.be, layer.adapter, scaled, scaled, layer.work.arena());
  CHECK(same_bits(scaled, y));
  lm::forward(layer.be, layer.adapter, y, delta, layer.work.arena(), {.into = lm::Into::set});
  CHECK(same_bits(delta, lm::Matrix<double>(9, 11)));
}

TEST_CASE("PEERS 1.14 and 3.3: unmerging l = 0 or a rounded l is bitwise, no division by l + 1e-8") {
  for (const bool feed_forward : {false, true}) {
    Layer layer(9, feed_forward);
    layer.adapter.l()(0, 3) = 0;
    lm::Matrix<lm::bfloat16> weights = random_matrix<lm::bfloat16>(11, 13, layer.random);
    const auto before = weights;
    const auto merged = lm::merge(layer.be, layer.adapter, weights);
    for (Index o = 0; o < 11; ++o) {
      for (Index c = 0; c < 13; ++c) {
        const double want = lm::widen<double>(before(o, c)) * layer.adapter.l()(0, feed_forward ? c : o);
        CHECK(std::abs(lm::widen<double>(weights(o, c)) - want) <= 0x1p-8 * std::abs(want));
      }
    }
    CHECK_FALSE(same_bits(weights, before));
    CHECK(merged.report.max_rounding > 0);
    merged.undo(weights);
    CHECK(same_bits(weights, before));
  }
}

TEST_CASE("three lanes change no bit, a step allocates nothing, frozen gives the same dx, errors name sizes") {
  Layer layer(70, false);
  const auto y0 = Layer::matrix(base_output(grid(layer.x), grid(layer.weights)));
  lm::ThreadPool pool(3);
  const auto run = [&](const auto& be, lm::Matrix<double>& y, lm::Matrix<double>& dx, auto& grad) {
    lm::Arena<> reserve = layer.reserve.arena();
    auto saved = lm::forward(be, layer.adapter, y0, y, layer.work.arena(), {.save = &reserve, .into = lm::Into::set});
    lm::backward(be, layer.adapter, saved, y0, layer.dy, dx, grad, layer.work.arena(),
                 {.parameters = lm::Into::set, .input = lm::Into::set});
  };
  lm::Matrix<double> y(70, 11), y3 = y, dx = y, dx3 = y, dx_alone = y;
  auto grad = lm::zeros_like(layer.adapter), grad3 = grad;
  run(layer.be, y, dx, grad);
  run(layer.be, y, dx_alone, lm::frozen);
  run(lm::cpu::Backend{pool.executor()}, y3, dx3, grad3);
  const Index count = allocations();
  run(lm::cpu::Backend{pool.executor()}, y3, dx3, grad3);
  CHECK(allocations() == count);
  CHECK(same_bits(y, y3));
  CHECK(same_bits(dx, dx3));
  CHECK(same_bits(dx, dx_alone));
  CHECK(same_parameters(grad, grad3));
  lm::Arena<> reserve = layer.reserve.arena();
  check_error(lm::ErrorCode::shape, {"output_scale", "c", "11", "13"},
              [&] { lm::forward(layer.be, layer.adapter, layer.x, layer.x, layer.work.arena()); });
  check_error(lm::ErrorCode::value, {"forward", "keep"}, [&] {
    lm::forward(layer.be, layer.adapter, y, y, layer.work.arena(), {.save = &reserve, .keep = lm::Keep::recompute});
  });
  CHECK(same_bits(y, y3));
  CHECK(reserve.used() == 0);
}

TEST_CASE("a null address with a size is an error, not something that is not wanted") {
  using Code = lm::ErrorCode;
  Layer layer(9, false);
  const auto before = Layer::matrix(base_output(grid(layer.x), grid(layer.weights)));
  auto y = before;
  lm::Arena<> reserve = layer.reserve.arena();
  auto saved = lm::forward(layer.be, layer.adapter, before, y, layer.work.arena(), {.save = &reserve});
  auto grad = lm::zeros_like(layer.adapter);
  const lm::MatrixView<double> nowhere{nullptr, 9, 11};
  check_error(Code::null, {"backward", "dx", "[9, 11]"}, [&] {
    lm::backward(layer.be, layer.adapter, saved, before, layer.dy, nowhere, grad, layer.work.arena());
  });
  const lm::VectorView<const double> l{layer.adapter.l().data, 11};
  using Scale = lm::OutputScale<double, double, double, double, lm::Space::host>;
  using Back = lm::OutputScaleBackward<double, double, double, double, lm::Space::host>;
  check_error(Code::null, {"output_scale", "delta", "[9, 11]"}, [&] { Scale{l, before, nowhere, y}.check(); });
  check_error(Code::null, {"output_scale", "sum", "[9, 11]"}, [&] { Scale{l, before, {}, y, nowhere}.check(); });
  check_error(Code::null, {"output_scale_backward", "sum", "[9, 11]"}, [&] { Back{l, nowhere, before}.check(); });
  check_error(Code::null, {"output_scale_backward", "passed", "[9, 11]"}, [&] {
    Back{l, {}, before, nowhere}.check();
  });
  CHECK(grad.l()(0, 0) == 0);
}

}  // namespace
}  // namespace loramix_test

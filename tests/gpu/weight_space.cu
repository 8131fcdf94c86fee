// The weight-space forms on the device against literal sums: DoRA both ways, IA3, MoSLoRA, MultiLoRA, AdaLoRA's budget and
// loss, prompts. Values and every gradient.
#include <cmath>
#include <random>

#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/prompt_forward.hpp>
#include <loramix/adapter/reparam_forward.hpp>
#include <loramix/train/ada_budget.hpp>

#include "gpu/harness.cuh"
#include "reference/weight_space.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
namespace ref = loramix_test::reference;
using namespace loramix_test;
using lm::Space;
constexpr Space device = Space::device;

namespace {

constexpr Index T = 5, in = 13, out = 11;

ref::Values draw(Index rows, Index cols, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<float> uniform(-1, 1);
  ref::Values v(rows, cols);
  for (Index i = 0; i < v.size(); ++i) v[i] = uniform(random);  // floats, so that both sides see the same numbers
  return v;
}
lm::MatrixView<float, device> upload(GpuHarness& gpu, const ref::Values& v) {
  std::vector<float> host(static_cast<std::size_t>(v.size()));
  for (Index i = 0; i < v.size(); ++i) host[static_cast<std::size_t>(i)] = static_cast<float>(v[i]);
  return {gpu.upload(host), v.rows(), v.cols()};
}
template <class V>
ref::Values download(GpuHarness& gpu, V view) {  // dense
  std::vector<float> host(static_cast<std::size_t>(view.rows * view.cols));
  gpu.download(view.data, host);
  const lm::MatrixView<const float, Space::host, V::major> there(host.data(), view.rows, view.cols);
  ref::Values v(view.rows, view.cols);
  for (Index i = 0; i < view.rows; ++i) {
    for (Index j = 0; j < view.cols; ++j) v(i, j) = there(i, j);
  }
  return v;
}
void check_equal(const char* what, const ref::Values& got, const ref::Values& want) {
  double worst = 0, largest = 0;
  bool finite = true;
  for (Index i = 0; i < want.size(); ++i) {
    worst = std::max(worst, std::abs(got[i] - want[i]));
    largest = std::max(largest, std::abs(want[i]));
    finite = finite && std::isfinite(got[i]);
  }
  CHECK_MESSAGE((finite && got.size() == want.size() && worst <= 2e-5 * (1 + largest)), what, " differs by ", worst);
  CHECK_MESSAGE(largest > 0, what);
}
/// d loss / d v by central differences of a literal sum.
template <class Loss>
ref::Values difference(ref::Values& v, const Loss& loss) {
  ref::Values d(v.rows(), v.cols());
  for (Index i = 0; i < v.size(); ++i) {
    const double before = v[i], h = 1e-4;
    v[i] = before + h;
    const double up = loss();
    v[i] = before - h;
    d[i] = (up - loss()) / (2 * h);
    v[i] = before;
  }
  return d;
}

/// Host numbers in the parameters of a device adapter, in the order of visit.
template <class A>
void set_parameters(A& adapter, std::initializer_list<const ref::Values*> values) {
  using Host = typename A::template rebind<float, Space::host>;
  Host host(adapter.config());
  auto next = values.begin();
  Host::visit(host, [&](const char*, auto view, lm::ParameterGroup) {
    const ref::Values& v = **next++;
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = static_cast<float>(v(i, j));
    }
  });
  lm::gpu::copy(host.parameters(), adapter.parameters());
}
template <class A, class Loss>
void check_parameters(GpuHarness& gpu, A& grad, std::initializer_list<ref::Values*> values, const Loss& loss) {
  auto next = values.begin();
  A::visit(grad, [&](const char* name, auto view, lm::ParameterGroup) {
    check_equal(name, download(gpu, view), difference(**next++, loss));
  });
}
constexpr lm::Key key{.seed = 3, .site = lm::site("m"), .step = 2, .first_token = 7};
ref::Values dropped(const ref::Values& x) { return ref::dropped(x, 3, key.site, 2, 7, 0.5); }

void check_bits(GpuHarness& gpu, lm::MatrixView<const float, device> got, lm::MatrixView<const float, device> want) {
  const ref::Values a = download(gpu, got), b = download(gpu, want);
  Index other = 0;
  for (Index i = 0; i < b.size(); ++i) other += a[i] == b[i] ? 0 : 1;
  CHECK(other == 0);
}

/// Forward and backward of an adapter without a base, against `want()`.
template <class A, class Want>
void check_adapter(const typename A::Config& config, std::initializer_list<ref::Values*> values, ref::Values& x,
                   const Want& want) {
  GpuHarness gpu;
  const auto be = gpu.backend();
  A adapter(config);
  std::vector<const ref::Values*> start(values.begin(), values.end());
  if (start.size() == 3) set_parameters(adapter, {start[0], start[1], start[2]});
  ref::Values dy = draw(T, out, 9);
  const auto dx_ = upload(gpu, x), ddy = upload(gpu, dy);
  const auto y = upload(gpu, ref::Values(T, out, 0)), dx = upload(gpu, ref::Values(T, in, 0));
  auto grad = lm::zeros_like(adapter);
  lm::Arena<device> reserve = gpu.arena(lm::reserve_bytes(adapter, T));
  auto saved =
      lm::forward(be, adapter, dx_, y, gpu.arena(lm::workspace_bytes(be, adapter, T)), {.save = &reserve, .key = key});
  check_equal("y", download(gpu, y), want());
  lm::backward(be, adapter, saved, dx_, ddy, dx, grad,
               gpu.arena(lm::workspace_bytes(be, adapter, T, lm::Pass::backward)));
  const auto loss = [&] { return ref::inner(dy, want()); };
  check_parameters(gpu, grad, values, loss);
  check_equal("dx", download(gpu, dx), difference(x, loss));
  const auto packed = lm::prepack(be, adapter);
  const auto py = upload(gpu, ref::Values(T, out, 0));
  lm::forward(be, packed, dx_, py, gpu.arena(lm::workspace_bytes(be, packed, T)), {.key = key});
  check_bits(gpu, py, y);
  CHECK(gpu.release());
}

}  // namespace

TEST_CASE("weight space: MoSLoRA, MultiLoRA and AdaLoRA on the device equal literal sums") {
  ref::Values x = draw(T, in, 1), A = draw(4, in, 2), B = draw(out, 4, 3), S = draw(4, 4, 4), gamma = draw(2, out, 5),
              lambda = draw(1, 4, 6);
  check_adapter<lm::MosLora<float, device>>({.d_in = in, .d_out = out, .rank = 4, .alpha = 6, .dropout = 0.5},
                                            {&A, &B, &S}, x, [&] { return ref::moslora(dropped(x), A, S, B, 1.5); });
  check_adapter<lm::MultiLora<float, device>>(
      {.d_in = in, .d_out = out, .experts = 2, .rank = 2, .alpha = 3, .dropout = 0.5}, {&A, &B, &gamma}, x,
      [&] { return ref::multi_lora(dropped(x), A, B, gamma, 1.5); });
  check_adapter<lm::AdaLora<float, device>>({.d_in = in, .d_out = out, .rank = 4, .alpha = 6, .dropout = 0.5},
                                            {&A, &B, &lambda}, x,
                                            [&] { return ref::ada_lora(dropped(x), A, B, lambda, 1.5); });
}

TEST_CASE("weight space: DoRA on the device equals literal sums, whoever multiplies with W; n = 0 is found") {
  using A_ = lm::Dora<float, device>;
  for (const bool in_y : {false, true}) {
    GpuHarness gpu;
    const auto be = gpu.backend();
    A_ adapter({.d_in = in, .d_out = out, .rank = 3, .alpha = 3, .dropout = 0.5});
    ref::Values x = draw(T, in, 1), A = draw(3, in, 2), B = draw(out, 3, 3), m = draw(1, out, 4), W = draw(out, in, 5),
                dy = draw(T, out, 6);
    for (Index c = 0; c < in; ++c) W(2, c) = 0;
    for (Index j = 0; j < 3; ++j) B(2, j) = 0;
    set_parameters(adapter, {&A, &B, &m});
    const auto n = ref::row_norms(W, A, B, 1);
    CHECK(n[2] == 0);
    const auto want = [&] { return ref::dora(x, dropped(x), W, A, B, m, n, 1); };
    const auto base_y = ref::times_transposed(x, W);
    const auto w = upload(gpu, W), xd = upload(gpu, x), dyd = upload(gpu, dy);
    const auto squares = upload(gpu, ref::Values(1, out, 0));
    lm::row_squares(be, lm::RowSquares<float, float, device>{w, {squares.data, out}});
    lm::DoraBase<A_> base{w, {squares.data, out}, in_y};
    const auto y = upload(gpu, in_y ? base_y : ref::Values(T, out, 0)), dx = upload(gpu, ref::Values(T, in, 0));
    auto grad = lm::zeros_like(adapter);
    lm::Arena<device> reserve = gpu.arena(lm::reserve_bytes(adapter, T));
    auto saved = lm::forward(be, adapter, base, xd, y, gpu.arena(lm::workspace_bytes(be, adapter, T)),
                             {.save = &reserve, .key = key});
    check_equal("y", download(gpu, y), in_y ? ref::plus(base_y, 1, want()) : want());
    const auto packed = lm::prepack(be, adapter, base);
    const auto py = upload(gpu, in_y ? base_y : ref::Values(T, out, 0));
    lm::forward(be, packed, base, xd, py, gpu.arena(lm::workspace_bytes(be, packed, T)), {.key = key});
    check_bits(gpu, py, y);
    if (in_y) base.passed = upload(gpu, ref::Values(T, out, 0));
    lm::backward(be, adapter, base, saved, xd, dyd, dx, grad,
                 gpu.arena(lm::workspace_bytes(be, adapter, T, lm::Pass::backward)));
    const auto loss = [&] { return ref::inner(dy, want()); };
    check_parameters(gpu, grad, {&A, &B, &m}, loss);
    auto all = download(gpu, dx);
    if (in_y) all = ref::plus(ref::plus(all, 1, ref::times(download(gpu, base.passed), W)), -1, ref::times(dy, W));
    check_equal("dx", all, difference(x, loss));
    lm::start_magnitude(be, adapter, base);
    check_equal("m", download(gpu, adapter.magnitude()), ref::row_norms(W, A, B, 0));
    CHECK(gpu.release());
  }
}

TEST_CASE("weight space: IA3 and prompts on the device") {
  GpuHarness gpu;
  const auto be = gpu.backend();
  ref::Values x = draw(T, out, 1), l = draw(1, out, 2), dy = draw(T, out, 3), v = draw(2, out, 4);
  {
    lm::Ia3<float, device> ia3({.d_in = in, .d_out = out});
    set_parameters(ia3, {&l});
    const auto y = upload(gpu, x), d = upload(gpu, dy);
    lm::Arena<device> reserve = gpu.arena(lm::reserve_bytes(ia3, T));
    auto saved = lm::forward(be, ia3, y, y, {}, {.save = &reserve});
    auto grad = lm::zeros_like(ia3);
    lm::backward(be, ia3, saved, y, d, d, grad, gpu.arena(lm::workspace_bytes(be, ia3, T, lm::Pass::backward)));
    ref::Values scaled = x, passed = dy, dl(1, out, 0);
    for (Index t = 0; t < T; ++t) {
      for (Index i = 0; i < out; ++i) {
        scaled(t, i) *= l[i];
        passed(t, i) *= l[i];
        dl[i] += dy(t, i) * x(t, i);
      }
    }
    check_equal("y", download(gpu, y), scaled);
    check_equal("dy", download(gpu, d), passed);
    check_equal("dl", download(gpu, grad.l()), dl);
  }
  lm::Prompt<float, device> prompt({.d_in = out, .rows = 2});
  set_parameters(prompt, {&v});
  const std::vector<Index> offsets{0, 2, 2, T};
  const auto sequences = lm::Groups<device>::by_segment(gpu.upload(offsets), 3);
  const auto xd = upload(gpu, x), y = upload(gpu, ref::Values(T + 6, out, 0)), dx = upload(gpu, ref::Values(T, out, 0));
  const ref::Values dlong = draw(T + 6, out, 8);
  lm::Arena<device> reserve;
  auto saved = lm::forward(be, prompt, xd, y, {}, {.save = &reserve, .sequences = sequences});
  auto grad = lm::zeros_like(prompt);
  lm::backward(be, prompt, saved, xd, upload(gpu, dlong), dx, grad, {});
  const Index source[T + 6] = {-1, -2, 0, 1, -1, -2, -1, -2, 2, 3, 4};  // −1 − i: row i of the prompt
  ref::Values want(T + 6, out), want_dx(T, out), want_dv(2, out, 0);
  for (Index row = 0; row < T + 6; ++row) {
    for (Index c = 0; c < out; ++c) {
      const Index s = source[row];
      want(row, c) = s < 0 ? v(-1 - s, c) : x(s, c);
      if (s < 0) want_dv(-1 - s, c) += dlong(row, c);
      if (s >= 0) want_dx(s, c) = dlong(row, c);
    }
  }
  check_equal("y", download(gpu, y), want);
  check_equal("dx", download(gpu, dx), want_dx);
  check_equal("dprompt", download(gpu, grad.rows()), want_dv);
  CHECK(gpu.release());
}

TEST_CASE("weight space: AdaLoRA's pruning and orthogonality on the device") {
  using A_ = lm::AdaLora<float, device>;
  GpuHarness gpu;
  const auto be = gpu.backend();
  A_ first({.d_in = in, .d_out = out, .rank = 3}), second({.d_in = in, .d_out = out, .rank = 2});
  ref::Values A3 = draw(3, in, 1), B3 = draw(out, 3, 2), A2 = draw(2, in, 3), B2 = draw(out, 2, 4);
  const ref::Values l3(1, 3, 0.5), l2(1, 2, 0.5);
  set_parameters(first, {&A3, &B3, &l3});
  set_parameters(second, {&A2, &B2, &l2});
  auto g3 = lm::zeros_like(first), g2 = lm::zeros_like(second);
  std::vector<A_*> layers{&first, &second};
  std::vector<lm::gradient_t<A_>*> grads{&g3, &g2};
  const auto value = upload(gpu, ref::Values(1, 1, 0));
  lm::orthogonality_loss(be, std::span<A_* const>(layers), std::span<lm::gradient_t<A_>* const>(grads), {},
                         {value.data, 1}, gpu.arena(lm::orthogonality_bytes<A_>(3)));
  const auto literal = [&] { return (ref::orthogonality(A3, B3, false) + ref::orthogonality(A2, B2, false)) / 2; };
  check_equal("value", download(gpu, value), ref::Values(1, 1, literal()));
  const auto half = [&] { return literal() / 2; };
  check_equal("dA", download(gpu, g3.A()), difference(A3, half));
  check_equal("dB", download(gpu, g2.B()), difference(B2, half));

  lm::AdaBudget<A_> budget(layers, {.total_steps = 5, .initial_budget = 3, .final_budget = 3});
  const ref::Values none3A(3, in, 0), none3B(out, 3, 0), none2A(2, in, 0), none2B(out, 2, 0);
  ref::Values d3(1, 3, 0), d2(1, 2, 0);
  d3[0] = 1, d3[1] = 5, d3[2] = 1, d2[0] = 4, d2[1] = 1;  // the tie goes to layer 0, rank 0
  set_parameters(g3, {&none3A, &none3B, &d3});
  set_parameters(g2, {&none2A, &none2B, &d2});
  budget.measure(be, layers, grads);
  CHECK(budget.prune(be, layers, 0));
  const auto lambda3 = download(gpu, first.lambda()), lambda2 = download(gpu, second.lambda());
  CHECK((lambda3[0] == 0.5 && lambda3[1] == 0.5 && lambda3[2] == 0));
  CHECK((lambda2[0] == 0.5 && lambda2[1] == 0));
  CHECK(gpu.release());
}

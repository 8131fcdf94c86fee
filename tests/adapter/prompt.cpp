// Prompt tuning against literal loops: where rows go, and the gradient summed over sequences.
#include <loramix/adapter/prompt_forward.hpp>

#include "adapter/weight_space.hpp"

namespace loramix_test {
namespace {

using A = lm::Prompt<double>;

/// y as a list of rows: sequence by sequence, the prompt and then the tokens.
reference::Values want(const A& adapter, const reference::Values& x, const std::vector<Index>& offsets) {
  const Index n = static_cast<Index>(offsets.size()) - 1, v = adapter.config().rows;
  reference::Values y(x.rows() + n * v, x.cols());
  Index row = 0;
  for (Index b = 0; b < n; ++b) {
    for (Index i = 0; i < v; ++i, ++row) {
      for (Index c = 0; c < x.cols(); ++c) y(row, c) = adapter.rows()(i, c);
    }
    for (Index t = offsets[static_cast<std::size_t>(b)]; t < offsets[static_cast<std::size_t>(b) + 1]; ++t, ++row) {
      for (Index c = 0; c < x.cols(); ++c) y(row, c) = x(t, c);
    }
  }
  REQUIRE(row == y.rows());
  return y;
}

TEST_CASE("rows go where they belong, and gradients are differences: ragged, empty and no sequences") {
  const lm::cpu::Backend be;
  for (const Index v : {0, 1, 3}) {
    for (const std::vector<Index>& offsets : std::vector<std::vector<Index>>{{0}, {0, 9}, {0, 0, 4, 4, 5, 9, 9}}) {
      Random random(static_cast<std::uint64_t>(v));
      A adapter({.d_in = 5, .rows = v});
      fill_parameters(adapter, random);
      const Index tokens = offsets.back(), n = static_cast<Index>(offsets.size()) - 1;
      auto x = random_matrix<double>(tokens, 5, random), y = constant<double>(adapter.output_rows(tokens, n), 5, nan);
      const auto dy = random_matrix<double>(y.rows(), 5, random);
      CHECK(lm::workspace_bytes(be, adapter, tokens) == 0);
      Memory kept(lm::reserve_bytes(adapter, tokens));
      lm::Arena<> reserve = kept.arena();
      // [forward]
      auto saved = lm::forward(be, adapter, x, y, lm::Arena<>{},
                               {.save = &reserve, .sequences = lm::Groups<>::by_segment(offsets.data(), n)});
      // [/forward]
      const auto literal = want(adapter, grid(x), offsets);
      for (Index i = 0; i < literal.size(); ++i) CHECK(y.data()[i] == literal[i]);
      lm::Matrix<double> dx(tokens, 5);
      auto grad = lm::zeros_like(adapter);
      lm::backward(be, adapter, saved, x, dy, dx, grad, lm::Arena<>{});
      if (tokens != 0 && v != 0) {
        check_gradients(adapter, grad, x, dx,
                        [&] { return reference::inner(grid(dy), want(adapter, grid(x), offsets)); });
      }
      CHECK_FALSE(saved.origin.live);
    }
  }
}

TEST_CASE("three lanes, Into::add, frozen; no allocation in a step") {
  Random random(1);
  lm::Prompt<float> adapter({.d_in = 33, .rows = 4});
  lm::initialise(adapter, {.seed = 1});
  const std::vector<Index> offsets{0, 20, 50, 90};
  const auto x = random_matrix<float>(90, 33, random), dy = random_matrix<float>(102, 33, random);
  lm::ThreadPool pool(3);
  lm::Matrix<float> y(102, 33), y3 = y, dx(90, 33), dx3 = dx, dx_alone = dx;
  auto grad = lm::zeros_like(adapter), grad3 = grad;
  const auto run = [&](const auto& be, lm::Matrix<float>& into, lm::Matrix<float>& d, auto& g) {
    alignas(64) std::byte kept[128];
    lm::Arena<> reserve{kept, sizeof kept};
    auto saved = lm::forward(be, adapter, x, into, lm::Arena<>{},
                             {.save = &reserve, .sequences = lm::Groups<>::by_segment(offsets.data(), 3)});
    lm::backward(be, adapter, saved, x, dy, d, g, lm::Arena<>{});
  };
  run(lm::cpu::Backend{}, y, dx, grad);
  run(lm::cpu::Backend{}, y, dx_alone, lm::frozen);
  const Index count = allocations();
  run(lm::cpu::Backend{pool.executor()}, y3, dx3, grad3);
  CHECK(allocations() == count);
  CHECK(same_bits(y, y3));
  CHECK(same_bits(dx, dx3));
  CHECK(same_bits(dx, dx_alone));
  CHECK(same_parameters(grad, grad3));
  run(lm::cpu::Backend{}, y, dx, grad);
  for (Index i = 0; i < 90 * 33; ++i) CHECK(dx.data()[i] == 2 * dx3.data()[i]);
  for (Index i = 0; i < grad.parameters().size; ++i) CHECK(grad.parameters()[i] == 2 * grad3.parameters()[i]);
}

TEST_CASE("wrong batches are refused before any write") {
  const lm::cpu::Backend be;
  Random random(1);
  A adapter({.d_in = 5, .rows = 2});
  fill_parameters(adapter, random);
  const auto x = random_matrix<double>(9, 5, random);
  auto y = random_matrix<double>(13, 5, random);
  const auto before = y;
  const auto refused = [&](lm::ErrorCode code, std::initializer_list<std::string> parts, lm::MatrixView<double> into,
                           std::vector<Index> offsets) {
    lm::Groups<> groups;
    if (!offsets.empty()) groups = lm::Groups<>::by_segment(offsets.data(), static_cast<Index>(offsets.size()) - 1);
    check_error(code, parts, [&] { lm::forward(be, adapter, x, into, lm::Arena<>{}, {.sequences = groups}); });
    CHECK(same_bits(y, before));
  };
  using Code = lm::ErrorCode;
  refused(Code::null, {"prepend_rows", "sequences"}, y, {});
  refused(Code::shape, {"sequences", "last offset", "8", "9"}, y, {0, 4, 8});
  refused(Code::shape, {"sequences", "first offset", "1", "0"}, y, {1, 4, 9});
  refused(Code::value, {"sequences", "3", "4"}, y, {0, 4, 3, 9});
  refused(Code::shape, {"y", "13", "15"}, y, {0, 2, 4, 9});
  refused(Code::shape, {"columns", "4", "5"}, y.view().col_range(0, 4), {0, 4, 9});
  const Index offsets[] = {0, 4, 9};
  const auto groups = lm::Groups<>::by_segment(offsets, 2);
  auto dx = random_matrix<double>(9, 5, random), dprompt = random_matrix<double>(2, 5, random);
  const auto dx_before = dx, dprompt_before = dprompt;
  const auto backward = [&](lm::MatrixView<double> to_prompt, lm::MatrixView<double> to_x) {
    return [&be, &y, groups, to_prompt, to_x] {
      lm::prepend_rows_backward<double>(be, lm::MatrixView<const double>(y), groups, 2, to_prompt, lm::Into::add, to_x,
                                        lm::Into::add);
    };
  };
  check_error(Code::null, {"prepend_rows_backward", "dprompt", "[2, 5]"}, backward({nullptr, 2, 5}, dx));
  check_error(Code::null, {"prepend_rows_backward", "dx", "[9, 5]"}, backward(dprompt, {nullptr, 9, 5}));
  CHECK(same_bits(dx, dx_before));
  CHECK(same_bits(dprompt, dprompt_before));
  check_error(Code::value, {"Prompt", "rows is -1"}, [] { A({.d_in = 5, .rows = -1}); });
  check_error(Code::value, {"Prompt", "d_in is -5"}, [] { A({.d_in = -5}); });
}

}  // namespace
}  // namespace loramix_test

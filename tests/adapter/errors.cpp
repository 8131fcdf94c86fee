// What forward and backward refuse: before any write, with the reserve as it was.
#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

TEST_CASE_TEMPLATE("forward refuses wrong calls, and nothing is written or reserved", K, LoraKind<float>,
                   FusedKind<float>, MixtureKind<float>) {
  using A = typename K::Adapter;
  Batch<A> b(K::config(), 9);
  const Index in = b.adapter.config().d_in, out = b.adapter.config().d_out;
  auto y = random_matrix<float>(9, out, b.random);
  const auto before = y;
  const auto x_before = b.x;
  lm::Arena<> reserve = b.memory.arena();
  const auto refused = [&](lm::ErrorCode code, std::initializer_list<std::string> parts, auto&& call) {
    check_error(code, parts, call);
    CHECK(same_bits(y, before));
    CHECK(same_bits(b.x, x_before));
    CHECK(reserve.used() == 0);
  };
  using In = lm::MatrixView<const float>;
  using Out = lm::MatrixView<float>;
  const auto run = [&](In x, Out into, lm::Arena<> work) {
    return [&b, &reserve, x, into, work] {
      lm::forward(b.be, b.adapter, x, into, work, {.save = &reserve, .key = b.key});
    };
  };
  const In x = b.x;
  const Out ok = y;
  const lm::Arena<> work = b.work.arena();
  using Code = lm::ErrorCode;
  refused(Code::shape, {"x", std::to_string(in - 1), std::to_string(in)}, run(x.col_range(0, in - 1), ok, work));
  refused(Code::shape, {"y", "8", "9"}, run(x, ok.row_range(0, 8), work));
  refused(Code::shape, {"y", std::to_string(out - 1), std::to_string(out)}, run(x, ok.col_range(0, out - 1), work));
  refused(Code::shape, {"x", "negative"}, run({x.data, -1, in}, ok, work));
  refused(Code::stride, {"x", "stride"}, run({x.data, 9, in, in - 1}, ok, work));
  refused(Code::stride, {"y", "stride"}, run(x, {ok.data, 9, out, out - 1}, work));
  refused(Code::null, {"x", "null"}, run({nullptr, 9, in}, ok, work));
  refused(Code::null, {"y", "null"}, run(x, {nullptr, 9, out}, work));
  refused(Code::alias, {"y", "x"}, run(x, {b.x.data() + 1, 9, out, in + out}, work));
  refused(Code::overflow, {"x", "overflows"}, run({x.data, Index{1} << 61, in}, ok, work));

  const Index need = lm::workspace_bytes(b.be, b.adapter, 9), kept = lm::reserve_bytes(b.adapter, 9);
  alignas(64) static std::byte memory[1 << 22];
  REQUIRE(need < static_cast<Index>(sizeof memory));
  run(x, random_matrix<float>(9, out, b.random), {memory, need - 64})();  // aligned memory needs no spare bytes
  reserve.reset();
  refused(Code::arena, {"forward", "work", std::to_string(need - 64), "1 too few"}, run(x, ok, {memory, need - 65}));
  refused(Code::arena, {"forward", "work", "too few"}, run(x, ok, {}));
  if (kept != 0) {
    reserve = {memory, kept - 64 - 1};
    refused(Code::arena, {"forward", "save", std::to_string(kept - 64), "1 too few"}, run(x, ok, work));
    reserve = {};
    refused(Code::arena, {"save"}, run(x, ok, work));
    reserve = b.memory.arena();
  }
  refused(Code::value, {"forward", "key", "dropout"},
          [&] { lm::forward(b.be, b.adapter, x, ok, work, {.save = &reserve}); });
  if constexpr (lm::ProductAdapter<A>) {
    const auto with_mask = [&](void* at) {
      const lm::MatrixView<std::uint8_t> mask{static_cast<std::uint8_t*>(at), 9, lm::mask_bytes(in)};
      return [&b, &reserve, x, ok, work, mask] {
        lm::forward(b.be, b.adapter, x, ok, work, {.save = &reserve, .key = b.key, .mask = mask});
      };
    };
    lm::Arena<> of_work = work, of_reserve = reserve;
    refused(Code::alias, {"mask", "work"}, with_mask(of_work.matrix<float>(1, 1).data));
    if (kept != 0) refused(Code::alias, {"mask", "save"}, with_mask(of_reserve.matrix<float>(1, 1).data));
    refused(Code::alias, {"mask", "y"}, with_mask(y.data()));
  }
}

TEST_CASE_TEMPLATE("backward refuses what does not belong together, and writes nothing", K, LoraKind<float>,
                   FusedKind<float>, MixtureKind<float>) {
  using A = typename K::Adapter;
  using Code = lm::ErrorCode;
  Batch<A> b(K::config(), 9), other(K::config(), 9, 1);
  const Index in = b.adapter.config().d_in, out = b.adapter.config().d_out;
  lm::Arena<> reserve = b.memory.arena();
  auto y = b.zeros_y(), dx = random_matrix<float>(9, in, b.random);
  const auto dx_before = dx;
  auto grad = lm::zeros_like(b.adapter);
  fill_parameters(grad, b.random);
  const auto grad_before = grad;
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  using In = lm::MatrixView<const float>;
  using Out = lm::MatrixView<float>;
  const In x = b.x, dy = b.dy;
  const auto refused = [&](Code code, std::initializer_list<std::string> parts, In x_, In dy_, Out dx_,
                           lm::Arena<> work) {
    check_error(code, parts, [&] { lm::backward(b.be, b.adapter, saved, x_, dy_, dx_, grad, work); });
    CHECK(same_bits(dx, dx_before));
    CHECK(same_parameters(grad, grad_before));
  };
  const lm::Arena<> work = b.work.arena();
  refused(Code::shape, {"x", "8", "saved", "9"}, x.row_range(0, 8), dy, dx, work);
  refused(Code::shape, {"dy", "8", "9"}, x, dy.row_range(0, 8), dx, work);
  refused(Code::shape, {"dy", std::to_string(out - 1), std::to_string(out)}, x, dy.col_range(0, out - 1), dx, work);
  refused(Code::shape, {"dx", std::to_string(in - 1)}, x, dy, dx.view().col_range(0, in - 1), work);
  refused(Code::null, {"dy"}, x, {nullptr, 9, out}, dx, work);
  refused(Code::alias, {"dx", "x"}, x, dy, {b.x.data(), 9, in}, work);
  const Index need = lm::workspace_bytes(b.be, b.adapter, 9, lm::Pass::backward);
  alignas(64) static std::byte memory[1 << 22];
  REQUIRE(need < static_cast<Index>(sizeof memory));
  refused(Code::arena, {"backward", "work", std::to_string(need - 64), "1 too few"}, x, dy, dx, {memory, need - 65});

  if constexpr (lm::ProductAdapter<A>) {  // a mask that was saved is read again
    const auto kept = saved.dropout;
    saved.dropout.mask = reinterpret_cast<std::uint8_t*>(dx.data());
    saved.dropout.mask_stride = lm::mask_bytes(in);
    refused(Code::alias, {"dx", "mask"}, x, dy, dx, work);
    lm::Arena<> of_work = work;
    saved.dropout.mask = reinterpret_cast<std::uint8_t*>(of_work.matrix<float>(1, 1).data);
    refused(Code::alias, {"work", "mask"}, x, dy, dx, work);
    saved.dropout = kept;
  }
  auto small_config = b.adapter.config();
  small_config.d_in += 16;
  auto small = lm::gradient_t<A>(small_config);
  if (lm::parameter_count(b.adapter) != 0) {
    check_error(Code::shape, {"grad"}, [&] { lm::backward(b.be, b.adapter, saved, x, dy, dx, small, work); });
    check_error(Code::state, {"another adapter's"}, [&] { other.backward(saved, dx, grad); });
  }
  CHECK(same_bits(dx, dx_before));

  // All that was refused left `saved` alive.
  lm::backward(b.be, b.adapter, saved, x, dy, dx, grad, {memory, need - 64});
  const auto dx_after = dx;
  check_error(Code::state, {"spent"}, [&] { b.backward(saved, dx, grad); });
  decltype(saved) nothing = b.forward(y);
  check_error(Code::state, {"saved nothing"}, [&] { b.backward(nothing, dx, grad); });
  CHECK(same_bits(dx, dx_after));
}

TEST_CASE_TEMPLATE("debug builds see weights that changed between forward and backward", K, LoraKind<float>,
                   FusedKind<float>, MixtureKind<float>, ScaledKind<float>) {
  if (!lm::detail::debug_checks) return;
  Batch<typename K::Adapter> b(K::config(), 9);
  lm::Arena<> reserve = b.memory.arena();
  auto y = b.zeros_y();
  auto grad = lm::zeros_like(b.adapter);
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  float& weight = b.adapter.parameters()[2];
  weight += 1;
  check_error(lm::ErrorCode::state, {"adapter", "changed its weights since forward"},
              [&] { b.backward(saved, {}, grad); });
  weight -= 1;
  weight = b.adapter.parameters()[2];
}

TEST_CASE("configurations that cannot be") {
  using Code = lm::ErrorCode;
  const auto make = [](lm::LoraConfig config) { return [config] { lm::Lora<float> lora(config); }; };
  check_error(Code::value, {"Lora", "d_in", "-1"}, make({.d_in = -1, .d_out = 2}));
  check_error(Code::value, {"Lora", "d_out", "-2"}, make({.d_in = 1, .d_out = -2}));
  check_error(Code::value, {"Lora", "rank", "-3"}, make({.d_in = 1, .d_out = 2, .rank = -3}));
  check_error(Code::value, {"dropout"}, make({.d_in = 1, .d_out = 2, .dropout = 1}));
  check_error(Code::value, {"dropout"}, make({.d_in = 1, .d_out = 2, .dropout = -0.1}));
  check_error(Code::value, {"dropout"}, make({.d_in = 1, .d_out = 2, .dropout = nan}));
  CHECK(caught(make({.d_in = Index{1} << 40, .d_out = 2, .rank = Index{1} << 40})).any);
  check_error(Code::overflow, {"no memory"}, make({.d_in = Index{1} << 61, .d_out = 2, .rank = 1}));
  check_error(Code::overflow, {"Parameters", "overflows"}, make({.d_in = INT64_MAX, .d_out = 0, .rank = 1}));
  check_error(Code::overflow, {"Parameters", "overflows"}, make({.d_in = 1, .d_out = 1, .rank = INT64_MAX - 31}));
}

}  // namespace
}  // namespace loramix_test

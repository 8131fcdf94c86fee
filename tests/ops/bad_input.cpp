// Bad input to the stages of the product: a clear error, raised before any write; and the edges that are not errors.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include <loramix/core/matrix.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/gate/gates.hpp>

#include "core/caught.hpp"

namespace lm = loramix;
using lm::Arena, lm::ErrorCode, lm::Index, lm::Into, lm::Major, lm::Space;
using loramix_test::caught;
using loramix_test::check_error;

namespace {

constexpr Index huge = Index{1} << 62;
constexpr Index T = 5, d_in = 11, d_out = 9, R = 6, side_rows = 3, E = 3;

/// All arguments lie in one block of memory, far enough apart that an aliased view meets one other view only.
class World {
 public:
  World() : memory_(slots * room) {
    for (Index i = 0; i < memory_.size(); ++i) memory_[i] = std::sin(static_cast<float>(i) * 0.7f);
  }
  template <Major M = Major::row>
  lm::MatrixView<float, Space::host, M> view(Index rows, Index cols) {
    REQUIRE(next_ < slots);
    float* const at = memory_.data() + next_++ * room + room / 2;
    return {at, rows, cols, (M == Major::row ? cols : rows) + 2};
  }
  lm::VectorView<float> vector(Index size) { return {view(1, size).data, size}; }
  lm::Buffer<float> snapshot() const { return memory_; }
  bool is(const lm::Buffer<float>& before) const {
    return std::memcmp(before.data(), memory_.data(), static_cast<std::size_t>(memory_.size()) * sizeof(float)) == 0;
  }

 private:
  static constexpr Index slots = 16, room = 256;
  lm::Buffer<float> memory_;
  Index next_ = 0;
};

template <class Op>
struct Case {
  World world;
  Op op;
  lm::cpu::Backend<> be;
  std::vector<std::byte> scratch;

  void make_scratch() { scratch.resize(static_cast<std::size_t>(Arena<>::with_alignment(lm::scratch_bytes(be, op)))); }
  void run(const Op& it) { lm::execute(be, it, Arena<>{scratch}); }
  /// Runs `op` as it has become, with the scratch that it needs now, and says whether it was refused.
  bool refused() {
    make_scratch();
    return caught([&] { run(op); }).any;
  }

  /// `change` makes the op bad: the error must have this code and name these parts, and no byte may change. Compiled once
  /// per op, not once per change.
  void refuses(ErrorCode code, std::initializer_list<std::string> parts, const std::function<void(Op&)>& change) {
    Op bad = op;
    change(bad);
    const lm::Buffer<float> before = world.snapshot();
    check_error(code, parts, [&] { run(bad); });
    CHECK(world.is(before));
  }
};

// ---- the four ops, all arguments present ---------------------------------------------------------------------------

using Shrink = lm::Shrink<float, float, float, float, Space::host>;
using ShrinkBackward = lm::ShrinkBackward<float, float, float, float, float, Space::host>;
template <Major M>
using Expand = lm::Expand<float, float, float, float, Space::host, M>;
template <Major M>
using ExpandBackward = lm::ExpandBackward<float, float, float, float, float, Space::host, M>;

Case<Shrink> shrink() {
  Case<Shrink> c;
  World& w = c.world;
  c.op.A = w.view(R, d_in);
  c.op.side = w.view(side_rows, d_in);
  c.op.x = w.view(T, d_in);
  c.op.u = w.view(T, R);
  c.op.h = w.view(T, side_rows);
  c.make_scratch();
  return c;
}

Case<ShrinkBackward> shrink_backward() {
  Case<ShrinkBackward> c;
  World& w = c.world;
  c.op.A = w.view(R, d_in);
  c.op.side = w.view(side_rows, d_in);
  c.op.x = w.view(T, d_in);
  c.op.du = w.view(T, R);
  c.op.dh = w.view(T, side_rows);
  c.op.dA = w.view(R, d_in);
  c.op.dside = w.view(side_rows, d_in);
  c.op.dx = w.view(T, d_in);
  c.make_scratch();
  return c;
}

template <Major M>
Case<Expand<M>> expand() {
  Case<Expand<M>> c;
  World& w = c.world;
  c.op.u = w.view(T, R);
  c.op.B = w.view<M>(d_out, R);
  c.op.gate = lm::TokenExperts<float>{w.view(T, E)}.form(T, R);
  c.op.scale = 0.5f;
  c.op.y = w.view(T, d_out);
  c.make_scratch();
  return c;
}

template <Major M>
Case<ExpandBackward<M>> expand_backward() {
  Case<ExpandBackward<M>> c;
  World& w = c.world;
  c.op.u = w.view(T, R);
  c.op.B = w.view<M>(d_out, R);
  c.op.gate = lm::TokenExperts<float>{w.view(T, E)}.form(T, R);
  c.op.dy = w.view(T, d_out);
  c.op.du = w.view(T, R);
  c.op.dB = w.view<M>(d_out, R);
  c.op.dgate.weights = w.view(T, E);
  c.make_scratch();
  return c;
}

/// A view of an op, whatever its type.
struct ViewRef {
  const float** data;
  Index *rows, *cols, *stride;
  Major major;

  Index extent() const {  // elements from the first to the last
    const bool by_row = major == Major::row;
    return ((by_row ? *rows : *cols) - 1) * *stride + (by_row ? *cols : *rows);
  }
};
template <class V>
ViewRef ref(V& view) {
  return {const_cast<const float**>(&view.data), &view.rows, &view.cols, &view.stride, V::major};
}

/// An argument: its name in messages, its place in the op, and whether a null address means "not wanted".
template <class Op>
struct Argument {
  const char* name;
  ViewRef (*get)(Op&);
  bool optional = false;
};
template <class Op>
using Arguments = std::vector<Argument<Op>>;

#define LORAMIX_ARGUMENT(name, member, ...)                      \
  {                                                              \
    name, [](auto& op) { return ref(op.member); }, ##__VA_ARGS__ \
  }

const Arguments<Shrink> shrink_read{LORAMIX_ARGUMENT("A", A), LORAMIX_ARGUMENT("side", side), LORAMIX_ARGUMENT("x", x)};
const Arguments<Shrink> shrink_written{LORAMIX_ARGUMENT("u", u), LORAMIX_ARGUMENT("h", h)};
const Arguments<ShrinkBackward> shrink_backward_read{LORAMIX_ARGUMENT("A", A), LORAMIX_ARGUMENT("side", side),
                                                     LORAMIX_ARGUMENT("x", x), LORAMIX_ARGUMENT("du", du),
                                                     LORAMIX_ARGUMENT("dh", dh)};
const Arguments<ShrinkBackward> shrink_backward_written{
    LORAMIX_ARGUMENT("dA", dA, true), LORAMIX_ARGUMENT("dside", dside, true), LORAMIX_ARGUMENT("dx", dx, true)};
template <Major M>
const Arguments<Expand<M>> expand_read{LORAMIX_ARGUMENT("u", u), LORAMIX_ARGUMENT("B", B),
                                       LORAMIX_ARGUMENT("gate weights", gate.weights, true)};
template <Major M>
const Arguments<Expand<M>> expand_written{LORAMIX_ARGUMENT("y", y)};
template <Major M>
const Arguments<ExpandBackward<M>> expand_backward_read{LORAMIX_ARGUMENT("u", u), LORAMIX_ARGUMENT("B", B),
                                                        LORAMIX_ARGUMENT("gate weights", gate.weights, true),
                                                        LORAMIX_ARGUMENT("dy", dy)};
template <Major M>
const Arguments<ExpandBackward<M>> expand_backward_written{
    LORAMIX_ARGUMENT("du", du), LORAMIX_ARGUMENT("dB", dB, true),
    LORAMIX_ARGUMENT("gate gradient weights", dgate.weights, true)};

// ---- what is asked of each -----------------------------------------------------------------------------------------

template <class Op>
void refuses_bad_views(Case<Op>& c, const Argument<Op>& argument) {
  const auto get = argument.get;
  const std::string name = argument.name, op = std::string("loramix: ") + Op::name + ": ";
  CAPTURE(name);
  const ViewRef good = get(c.op);
  const Index rows = *good.rows, cols = *good.cols;
  const bool by_row = good.major == Major::row;
  for (const Index off : {-1, 1}) {
    c.refuses(ErrorCode::shape, {op, std::to_string(rows), std::to_string(rows + off)},
              [&](Op& o) { *get(o).rows += off; });
    c.refuses(ErrorCode::shape, {op, std::to_string(cols), std::to_string(cols + off)},
              [&](Op& o) { *get(o).cols += off; });
  }
  c.refuses(ErrorCode::shape, {op + name, "[-1, "}, [&](Op& o) { *get(o).rows = -1; });
  c.refuses(ErrorCode::shape, {op + name, ", -1]"}, [&](Op& o) { *get(o).cols = -1; });
  const Index inner = by_row ? cols : rows;
  for (const Index stride : {inner - 1, Index{0}, -inner}) {
    c.refuses(ErrorCode::stride, {op + name, "stride " + std::to_string(stride), std::to_string(inner)},
              [&](Op& o) { *get(o).stride = stride; });
  }
  c.refuses(ErrorCode::overflow, {op + name, std::to_string(huge)},
            [&](Op& o) { *(by_row ? get(o).rows : get(o).cols) = huge; });
  c.refuses(ErrorCode::overflow, {op + name, std::to_string(huge)}, [&](Op& o) {
    *(by_row ? get(o).cols : get(o).rows) = huge;
    *get(o).stride = huge;
  });
  c.refuses(ErrorCode::overflow, {op + name, std::to_string(huge)}, [&](Op& o) { *get(o).stride = huge; });
  if (!argument.optional) {
    c.refuses(ErrorCode::null, {op + name, "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]"},
              [&](Op& o) { *get(o).data = nullptr; });
  }
}

template <class Op>
void refuses_alias(Case<Op>& c, const Argument<Op>& written, const Argument<Op>& other) {
  const std::string w = written.name, r = other.name;
  CAPTURE(w);
  CAPTURE(r);
  const Index to_last = other.get(c.op).extent() - 1, own_last = written.get(c.op).extent() - 1;
  for (const Index shift : {Index{0}, to_last, -own_last}) {  // the same begin, only its last element, only its first
    c.refuses(ErrorCode::alias, {std::string("loramix: ") + Op::name + ": ", w + " [", r + " ["},
              [&](Op& o) { *written.get(o).data = *other.get(o).data + shift; });
  }
}

template <class Op>
void refuses_all_bad_views(Case<Op> c, const Arguments<Op>& read, const Arguments<Op>& written) {
  for (const auto* all : {&read, &written}) {
    for (const Argument<Op>& argument : *all) refuses_bad_views(c, argument);
  }
  const lm::Buffer<float> before = c.world.snapshot();
  CHECK(!c.refused());  // the good call is good, and would have written
  CHECK(!c.world.is(before));
}

template <class Op>
void refuses_all_aliases(Case<Op> c, const Arguments<Op>& read, const Arguments<Op>& written) {
  for (const Argument<Op>& w : written) {
    for (const Argument<Op>& r : read) refuses_alias(c, w, r);
    for (const Argument<Op>& other : written) {
      if (&other != &w) refuses_alias(c, w, other);
    }
  }
}

template <class C>
void refuses_small_workspace(C c) {
  const Index need = lm::scratch_bytes(c.be, c.op);
  REQUIRE(need >= 128);
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines(static_cast<std::size_t>(need / 64));
  const lm::Buffer<float> before = c.world.snapshot();
  const std::string name = std::string("loramix: ") + decltype(c.op)::name + ": work";
  const auto with = [&](Index bytes) {
    return [&c, &lines, bytes] { lm::execute(c.be, c.op, Arena<>(lines.data(), bytes)); };
  };
  check_error(
      ErrorCode::arena,
      {name, "has " + std::to_string(need - 64) + " bytes left", std::to_string(need) + " are needed", "64 too few"},
      with(need - 64));
  check_error(ErrorCode::arena, {name, "1 too few"}, with(need - 1));
  check_error(ErrorCode::arena, {name, "has 0 bytes left", std::to_string(need) + " too few"},
              [&] { lm::execute(c.be, c.op, Arena<>{}); });
  CHECK(c.world.is(before));
  CHECK(!caught(with(need)).any);
  CHECK(!c.world.is(before));
}

/// Every element of `view` is a number other than zero somewhere, and equals want(r, c) up to float rounding.
template <class V, class F>
void check_equal(V view, const F& want) {
  double largest = 0;
  long wrong = 0;
  for (Index r = 0; r < view.rows; ++r) {
    for (Index c = 0; c < view.cols; ++c) {
      const double w = want(r, c);
      largest = std::fmax(largest, std::fabs(w));
      wrong += !(std::fabs(static_cast<double>(view(r, c)) - w) <= 1e-5);  // at most 11 terms of at most 1 each
    }
  }
  CHECK(wrong == 0);
  CHECK(largest > 0.01);
}

}  // namespace

TEST_CASE("shrink refuses bad views") { refuses_all_bad_views(shrink(), shrink_read, shrink_written); }
TEST_CASE("shrink_backward refuses bad views") {
  refuses_all_bad_views(shrink_backward(), shrink_backward_read, shrink_backward_written);
}
TEST_CASE("expand refuses bad views, B in both orders") {
  refuses_all_bad_views(expand<Major::column>(), expand_read<Major::column>, expand_written<Major::column>);
  refuses_all_bad_views(expand<Major::row>(), expand_read<Major::row>, expand_written<Major::row>);
}
TEST_CASE("expand_backward refuses bad views, B in both orders") {
  refuses_all_bad_views(expand_backward<Major::column>(), expand_backward_read<Major::column>,
                        expand_backward_written<Major::column>);
  refuses_all_bad_views(expand_backward<Major::row>(), expand_backward_read<Major::row>,
                        expand_backward_written<Major::row>);
}

TEST_CASE("shrink refuses aliases") { refuses_all_aliases(shrink(), shrink_read, shrink_written); }
TEST_CASE("shrink_backward refuses aliases") {
  refuses_all_aliases(shrink_backward(), shrink_backward_read, shrink_backward_written);
}
TEST_CASE("expand refuses aliases") {
  refuses_all_aliases(expand<Major::column>(), expand_read<Major::column>, expand_written<Major::column>);
  refuses_all_aliases(expand<Major::row>(), expand_read<Major::row>, expand_written<Major::row>);
}
TEST_CASE("expand_backward refuses aliases") {
  refuses_all_aliases(expand_backward<Major::column>(), expand_backward_read<Major::column>,
                      expand_backward_written<Major::column>);
  refuses_all_aliases(expand_backward<Major::row>(), expand_backward_read<Major::row>,
                      expand_backward_written<Major::row>);
}

TEST_CASE("outputs may not share memory with any slot of the gate") {
  Case<Expand<Major::column>> c = expand<Major::column>();
  World& w = c.world;
  auto& gate = c.op.gate;
  gate.values = w.view(T, R);
  gate.rank_scale = w.vector(R);
  gate.multiplier = w.vector(T);
  std::vector<std::int32_t> prefix(T, 4);
  std::vector<std::uint8_t> subset(static_cast<std::size_t>(T * R), 1);
  gate.prefix = lm::VectorView<const std::int32_t>(prefix.data(), T);
  gate.subset = lm::MatrixView<const std::uint8_t>(subset.data(), T, R);
  CHECK(!c.refused());
  const auto shares = [&](const char* slot, const void* at) {
    const std::string slot_name = slot;
    CAPTURE(slot_name);
    c.refuses(ErrorCode::alias, {"loramix: expand: y [", slot},
              [&](auto& o) { o.y.data = const_cast<float*>(static_cast<const float*>(at)); });
  };
  shares("values", gate.values.data);
  shares("rank_scale", gate.rank_scale.data);
  shares("multiplier", gate.multiplier.data);
  const lm::Buffer<float> before = w.snapshot();
  const auto integers = [&](const char* slot, auto member) {  // slots whose memory is not floats lie in y instead
    const std::string slot_name = slot;
    CAPTURE(slot_name);
    c.refuses(ErrorCode::alias, {"loramix: expand: y [", slot}, [&](auto& o) {
      auto& view = o.gate.*member;
      view.data = reinterpret_cast<decltype(view.data)>(o.y.data);
    });
  };
  integers("prefix", &lm::GateForm<float>::prefix);
  integers("subset", &lm::GateForm<float>::subset);
  CHECK(w.is(before));
}

TEST_CASE("gradients of gate slots may not share memory with inputs, outputs or each other") {
  Case<ExpandBackward<Major::column>> c = expand_backward<Major::column>();
  World& w = c.world;
  c.op.gate.values = w.view(T, R);
  c.op.gate.rank_scale = w.vector(R);
  c.op.gate.multiplier = w.vector(T);
  c.op.dgate.values = w.view(T, R);
  c.op.dgate.rank_scale = w.vector(R);
  c.op.dgate.multiplier = w.vector(T);
  CHECK(!c.refused());
  const auto written = [&](const char* slot, auto gradient) {
    const std::string slot_name = slot;
    CAPTURE(slot_name);
    const auto onto = [&](const char* other, const float* at) {
      const std::string other_name = other;
      CAPTURE(other_name);
      c.refuses(ErrorCode::alias, {"loramix: expand_backward: "},
                [&](auto& o) { gradient(o).data = const_cast<float*>(at); });
    };
    onto("u", c.op.u.data);
    onto("B", c.op.B.data);
    onto("dy", c.op.dy.data);
    onto("du", c.op.du.data);
    onto("dB", c.op.dB.data);
    onto("gate weights", c.op.gate.weights.data);
    onto("gate values", c.op.gate.values.data);
    onto("gate rank_scale", c.op.gate.rank_scale.data);
    onto("gate multiplier", c.op.gate.multiplier.data);
  };
  written(
      "weights", [](auto& o) -> auto& { return o.dgate.weights; });
  written(
      "values", [](auto& o) -> auto& { return o.dgate.values; });
  written(
      "rank_scale", [](auto& o) -> auto& { return o.dgate.rank_scale; });
  written(
      "multiplier", [](auto& o) -> auto& { return o.dgate.multiplier; });
  c.refuses(ErrorCode::alias, {}, [&](auto& o) { o.dgate.values.data = o.dgate.weights.data; });
  c.refuses(ErrorCode::alias, {}, [&](auto& o) { o.dgate.rank_scale.data = o.dgate.multiplier.data; });
}

TEST_CASE("expand refuses a gate that does not fit") {
  Case<Expand<Major::column>> c = expand<Major::column>();
  auto& w = c.world;
  const std::string op = "loramix: expand: gate";
  c.refuses(ErrorCode::shape, {op, "tokens 6", "is 5"}, [](auto& o) { o.gate.tokens = 6; });
  c.refuses(ErrorCode::shape, {op, "ranks 7", "is 6"}, [](auto& o) { o.gate.ranks = 7; });
  c.refuses(ErrorCode::value, {op, "experts is 0"}, [](auto& o) { o.gate.experts = 0; });
  c.refuses(ErrorCode::value, {op, "experts is -1"}, [](auto& o) { o.gate.experts = -1; });
  c.refuses(ErrorCode::shape, {op, "6 ranks", "4 experts"}, [](auto& o) { o.gate.experts = 4; });
  c.refuses(ErrorCode::shape, {op + " weights", "3", "2"}, [](auto& o) { o.gate.experts = 2; });
  c.refuses(ErrorCode::shape, {op + " values", "rows 4", "is 5"}, [&](auto& o) { o.gate.values = w.view(4, R); });
  c.refuses(ErrorCode::shape, {op + " rank_scale", "5", "6"}, [&](auto& o) { o.gate.rank_scale = w.vector(5); });
  c.refuses(ErrorCode::shape, {op + " multiplier", "4", "5"}, [&](auto& o) { o.gate.multiplier = w.vector(4); });

  std::int32_t ids[T * 2] = {0, 1, 1, 2, 2, 0, 0, 2, 1, -1};
  const auto with_ids = [&](auto& o) { o.gate.ids = lm::MatrixView<const std::int32_t>(ids, T, 2); };
  Case<Expand<Major::column>> good = expand<Major::column>();
  with_ids(good.op);
  CHECK(!good.refused());
  c.refuses(ErrorCode::shape, {op + " ids", "rows 4", "is 5"},
            [&](auto& o) { o.gate.ids = lm::MatrixView<const std::int32_t>(ids, 4, 2); });
  c.refuses(ErrorCode::shape, {op + " id_weights", "1", "2"}, [&](auto& o) {
    with_ids(o);
    o.gate.id_weights = w.view(T, 1);
  });
  for (const std::int32_t bad : {3, -2, INT32_MAX, INT32_MIN}) {
    c.refuses(ErrorCode::value, {op + " ids", "expert " + std::to_string(bad), "row 2", "3 experts"}, [&](auto& o) {
      with_ids(o);
      ids[4] = bad;
    });
  }
  ids[4] = 0;
  c.refuses(ErrorCode::value, {op + " ids", "expert 0 twice in row 2"}, with_ids);
  ids[4] = 2;

  std::int32_t groups[T] = {0, 1, 1, -1, 0};
  const auto grouped = [&](auto& o) {
    o.gate.weights.rows = 2;
    o.gate.weight_groups = lm::Groups<>::by_id(groups, 2);
  };
  c.refuses(ErrorCode::shape, {op + " weights", "rows 5", "is 2"}, [&](auto& o) {
    grouped(o);
    o.gate.weights.rows = 5;
  });
  for (const std::int32_t bad : {2, -2}) {
    groups[3] = bad;
    c.refuses(ErrorCode::value, {op + " weights", "group id " + std::to_string(bad), "token 3", "2 groups"}, grouped);
  }
  Index offsets[3] = {0, 2, T};
  const auto segmented = [&](auto& o) {
    o.gate.weights.rows = 2;
    o.gate.weight_groups = lm::Groups<>::by_segment(offsets, 2);
  };
  offsets[2] = 4;
  c.refuses(ErrorCode::shape, {op + " weights", "4", "5"}, segmented);
  offsets[2] = T;
  offsets[0] = 1;
  c.refuses(ErrorCode::shape, {op + " weights", "1", "0"}, segmented);
  offsets[0] = 0;
  offsets[1] = 6;
  c.refuses(ErrorCode::value, {op + " weights", "descend at 2"}, segmented);

  Index rank_offsets[4] = {0, 1, 3, 6};
  const auto mixed = [&](auto& o) { o.gate.rank_offsets = rank_offsets; };
  rank_offsets[3] = 5;
  c.refuses(ErrorCode::shape, {op + " rank_offsets", "5", "6"}, mixed);
  rank_offsets[3] = 6;
  rank_offsets[0] = 1;
  c.refuses(ErrorCode::shape, {op + " rank_offsets", "1", "0"}, mixed);
  rank_offsets[0] = 0;
  rank_offsets[1] = 4;
  c.refuses(ErrorCode::value, {op + " rank_offsets", "descends"}, mixed);
}

TEST_CASE("expand_backward refuses gradients of slots that are not there, or of other shapes") {
  Case<ExpandBackward<Major::column>> c = expand_backward<Major::column>();
  World& w = c.world;
  const std::string op = "loramix: expand_backward: gate gradient";
  c.refuses(ErrorCode::shape, {op + " values"}, [&](auto& o) { o.dgate.values = w.view(T, R); });
  c.refuses(ErrorCode::shape, {op + " id_weights"}, [&](auto& o) { o.dgate.id_weights = w.view(T, 2); });
  c.refuses(ErrorCode::shape, {op + " rank_scale", "6", "0"}, [&](auto& o) { o.dgate.rank_scale = w.vector(R); });
  c.refuses(ErrorCode::shape, {op + " multiplier", "5", "0"}, [&](auto& o) { o.dgate.multiplier = w.vector(T); });
}

TEST_CASE("a workspace that is too small is refused, saying by how much; the size asked for is enough") {
  refuses_small_workspace(shrink());
  refuses_small_workspace(shrink_backward());
  refuses_small_workspace(expand<Major::column>());
  refuses_small_workspace(expand_backward<Major::row>());
}

TEST_CASE("sizes that no memory has: refused, whichever check sees it first") {
  Case<Expand<Major::column>> c = expand<Major::column>();
  const Index many = Index{1} << 40;  // each view is legal by itself; the scratch is too large
  c.refuses(ErrorCode::arena, {"loramix: expand: work", "too few"}, [&](auto& o) {
    o.u = {o.u.data, many, R};
    o.y = lm::MatrixView<float>(o.y.data + (many << 4), many, d_out);
    o.gate = lm::OpenGate<float>{}.form(many, R);
  });
}

TEST_CASE("a scratch size that leaves 63 bits is refused, not wrapped") {
  const Index ranks = Index{1} << 58;  // so many that the size of the scratch leaves 63 bits
  Case<Shrink> s = shrink();
  Shrink composed;
  composed.A = {s.op.A.data, ranks, 1};
  composed.x = {s.op.x.data, 1, 1};
  composed.u = {s.op.u.data, 1, ranks};
  const lm::cpu::Backend<> by_library{{}, {.path = lm::cpu::Path::composed}};
  check_error(ErrorCode::overflow, {"2"}, [&] { lm::scratch_bytes(by_library, composed); });

  Case<Expand<Major::column>> e = expand<Major::column>();
  Expand<Major::column> fused;
  fused.B = {e.op.B.data, 1, ranks};
  fused.u = {e.op.u.data, 1, ranks};
  fused.y = {e.op.y.data, 1, 1};
  fused.gate = lm::OpenGate<float>{}.form(1, ranks);
  check_error(ErrorCode::overflow, {"2"}, [&] { lm::scratch_bytes(e.be, fused); });
}

TEST_CASE("slices of one interleaved buffer are legal, and give the bits of separate buffers") {
  SUBCASE("expand: u and y in one buffer") {
    Case<Expand<Major::column>> c = expand<Major::column>();
    lm::Matrix<float> together(T, R + 2 * d_out);
    auto op = c.op;
    const auto u = together.view().col_range(d_out, R), y = together.view().col_range(d_out + R, d_out);
    for (Index t = 0; t < T; ++t) {
      for (Index j = 0; j < R; ++j) u(t, j) = c.op.u(t, j);
      for (Index j = 0; j < d_out; ++j) y(t, j) = c.op.y(t, j);
    }
    op.u = u;
    op.y = y;
    c.run(op);
    c.run(c.op);
    long wrong = 0;
    for (Index t = 0; t < T; ++t) {
      for (Index j = 0; j < d_out; ++j) wrong += y(t, j) != c.op.y(t, j) || together(t, j) != 0.0f;
    }
    CHECK(wrong == 0);
  }
  SUBCASE("shrink and its backward: x, u and dx in one buffer") {
    Case<ShrinkBackward> c = shrink_backward();
    lm::Matrix<float> together(T, 2 * d_in + R);
    auto op = c.op;
    const auto x = together.view().col_range(0, d_in), du = together.view().col_range(d_in, R),
               dx = together.view().col_range(d_in + R, d_in);
    for (Index t = 0; t < T; ++t) {
      for (Index j = 0; j < d_in; ++j) x(t, j) = c.op.x(t, j);
      for (Index j = 0; j < d_in; ++j) dx(t, j) = c.op.dx(t, j);
      for (Index j = 0; j < R; ++j) du(t, j) = c.op.du(t, j);
    }
    lm::Matrix<float> dA(R, d_in), dside(side_rows, d_in);
    op.x = x;
    op.du = du;
    op.dx = dx;
    op.dA = dA;
    op.dside = dside;
    op.parameters = c.op.parameters = Into::set;
    c.run(op);
    c.run(c.op);
    long wrong = 0;
    for (Index t = 0; t < T; ++t) {
      for (Index j = 0; j < d_in; ++j) wrong += dx(t, j) != c.op.dx(t, j) || x(t, j) != c.op.x(t, j);
    }
    for (Index r = 0; r < R; ++r) {
      for (Index j = 0; j < d_in; ++j) wrong += dA(r, j) != c.op.dA(r, j);
    }
    CHECK(wrong == 0);
  }
  SUBCASE("one column too far is an alias") {
    Case<Expand<Major::column>> c = expand<Major::column>();
    lm::Matrix<float> together(T, R + d_out);
    c.refuses(ErrorCode::alias, {"y [", "u ["}, [&](auto& o) {
      o.u = together.view().col_range(0, R);
      o.y = together.view().col_range(R - 1, d_out);
    });
  }
}

TEST_CASE("the good calls give the right answers") {
  Case<Shrink> s = shrink();
  s.run(s.op);
  const auto dot = [](auto a, Index i, auto b, Index j) {
    double sum = 0;
    for (Index c = 0; c < a.cols; ++c) sum += static_cast<double>(a(i, c)) * b(j, c);
    return sum;
  };
  check_equal(s.op.u, [&](Index t, Index j) { return dot(s.op.x, t, s.op.A, j); });
  check_equal(s.op.h, [&](Index t, Index j) { return dot(s.op.x, t, s.op.side, j); });

  Case<Expand<Major::row>> e = expand<Major::row>();
  e.op.into = Into::set;
  e.run(e.op);
  check_equal(e.op.y, [&](Index t, Index o) {
    double sum = 0;
    for (Index j = 0; j < R; ++j) {
      sum += static_cast<double>(e.op.u(t, j)) * e.op.gate.weights(t, j / (R / E)) * e.op.B(o, j);
    }
    return 0.5 * sum;
  });
}

TEST_CASE("no tokens: nothing to do, gradients of parameters are sums over nothing") {
  Case<Shrink> s = shrink();
  lm::Buffer<float> before = s.world.snapshot();
  Shrink none = s.op;
  none.x.rows = none.u.rows = none.h.rows = 0;
  CHECK(!caught([&] { s.run(none); }).any);
  none.x.data = nullptr;
  none.u.data = nullptr;
  none.h.data = nullptr;
  CHECK(!caught([&] { s.run(none); }).any);
  CHECK(s.world.is(before));

  Case<Expand<Major::column>> e = expand<Major::column>();
  before = e.world.snapshot();
  for (const Into into : {Into::add, Into::set}) {
    auto empty = e.op;
    empty.into = into;
    empty.u = {nullptr, 0, R};
    empty.y = {nullptr, 0, d_out};
    empty.gate = lm::OpenGate<float>{}.form(0, R);
    CHECK(!caught([&] { e.run(empty); }).any);
  }
  CHECK(e.world.is(before));

  for (const Into into : {Into::add, Into::set}) {
    Case<ShrinkBackward> b = shrink_backward();
    before = b.world.snapshot();
    auto empty = b.op;
    empty.parameters = into;
    empty.x.rows = empty.du.rows = empty.dh.rows = empty.dx.rows = 0;
    CHECK(!caught([&] { b.run(empty); }).any);
    if (into == Into::add) CHECK(b.world.is(before));
    long wrong = 0;
    for (Index r = 0; into == Into::set && r < R; ++r) {
      for (Index c = 0; c < d_in; ++c) wrong += b.op.dA(r, c) != 0.0f || (r < side_rows && b.op.dside(r, c) != 0.0f);
    }
    CHECK(wrong == 0);

    Case<ExpandBackward<Major::column>> x = expand_backward<Major::column>();
    before = x.world.snapshot();
    auto nothing = x.op;
    nothing.parameters = into;
    nothing.u.rows = nothing.dy.rows = nothing.du.rows = 0;
    nothing.gate = lm::OpenGate<float>{}.form(0, R);
    nothing.dgate = {};
    CHECK(!caught([&] { x.run(nothing); }).any);
    if (into == Into::add) CHECK(x.world.is(before));
    for (Index o = 0; into == Into::set && o < d_out; ++o) {
      for (Index j = 0; j < R; ++j) wrong += x.op.dB(o, j) != 0.0f;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("rank zero: y and dx stay as they are, or become zero with Into::set") {
  for (const Into into : {Into::add, Into::set}) {
    CAPTURE(static_cast<int>(into));
    Case<Expand<Major::column>> e = expand<Major::column>();
    lm::Buffer<float> before = e.world.snapshot();
    auto op = e.op;
    op.into = into;
    op.u = {nullptr, T, 0};
    op.B = {nullptr, d_out, 0};
    op.gate = lm::OpenGate<float>{}.form(T, 0);
    CHECK(!caught([&] { e.run(op); }).any);
    long wrong = 0;
    if (into == Into::add) CHECK(e.world.is(before));
    for (Index t = 0; into == Into::set && t < T; ++t) {
      for (Index o = 0; o < d_out; ++o) wrong += op.y(t, o) != 0.0f;
    }

    Case<ShrinkBackward> b = shrink_backward();
    before = b.world.snapshot();
    auto back = b.op;
    back.input = back.parameters = into;
    back.A = {nullptr, 0, d_in};
    back.du = {nullptr, T, 0};
    back.dA = {};
    back.side = {};
    back.dh = {};
    back.dside = {};
    CHECK(!caught([&] { b.run(back); }).any);
    if (into == Into::add) CHECK(b.world.is(before));
    for (Index t = 0; into == Into::set && t < T; ++t) {
      for (Index c = 0; c < d_in; ++c) wrong += back.dx(t, c) != 0.0f;
    }
    CHECK(wrong == 0);
  }

  Case<Shrink> s = shrink();
  auto op = s.op;
  op.A = {nullptr, 0, d_in};
  op.u = {nullptr, T, 0};
  CHECK(!caught([&] { s.run(op); }).any);  // the side rows alone
  check_equal(op.h, [&](Index t, Index j) {
    double sum = 0;
    for (Index c = 0; c < d_in; ++c) sum += static_cast<double>(op.x(t, c)) * op.side(j, c);
    return sum;
  });

  Case<ExpandBackward<Major::column>> x = expand_backward<Major::column>();
  const lm::Buffer<float> before = x.world.snapshot();
  auto back = x.op;
  back.u = {nullptr, T, 0};
  back.du = {nullptr, T, 0};
  back.B = {nullptr, d_out, 0};
  back.dB = {};
  back.gate = lm::OpenGate<float>{}.form(T, 0);
  back.dgate = {};
  CHECK(!caught([&] { x.run(back); }).any);
  CHECK(x.world.is(before));
}

TEST_CASE("outputs that are not wanted stay away, and the others do not notice") {
  Case<ShrinkBackward> all = shrink_backward(), one = shrink_backward();
  all.run(all.op);
  auto op = one.op;
  op.dA = {};
  op.dside = {};
  one.run(op);
  long wrong = 0;
  for (Index t = 0; t < T; ++t) {
    for (Index c = 0; c < d_in; ++c) wrong += one.op.dx(t, c) != all.op.dx(t, c);
  }
  CHECK(wrong == 0);
  Case<ShrinkBackward> fresh = shrink_backward();
  CHECK(std::memcmp(one.op.dA.data, fresh.op.dA.data, sizeof(float) * static_cast<std::size_t>(ref(op.A).extent())) ==
        0);
}

// Our kernels behind plain C, for a process that is not ours: bench/peers/ours.py loads this beside PyTorch. OpenMP's
// symbols stay open on purpose: the process resolves them in the one libgomp that PyTorch brought with it.
//
// A call returns 0, or 1 where the library threw: loramix_error() says what. Layouts are the library's own; B, B1, B2, B3
// and their gradients are rank-major.
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/core/scalars.hpp>
#include <loramix/cpu/amx.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/cpu/openmp.hpp>
#include <loramix/ops/draw_mask.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/row_norm.hpp>
#include <loramix/ops/shrink.hpp>

namespace lm = loramix;

// The same fields in the same order as Call in ours.py. Null slots are absent.
struct LoramixCall {
  std::int64_t threads, is_bfloat16;  // activations and weights: float or bfloat16; everything else is float
  std::int64_t tokens, d_in, d_out, ranks, ranks_of_a, experts, chosen;
  double scale, dropout;
  std::int64_t step;                 // counts forwards that draw
  const void *x, *A, *B;             // [T, d_in], [R_a, d_in], [R, d_out]
  void* y;                           // [T, d_out]
  const float* weights;              // [T, E]
  const std::int32_t* ids;           // [groups, k]
  const float* id_weights;           // [groups, k]
  const std::int32_t* prefix;        // [groups]
  const std::int64_t* rank_offsets;  // [E + 1]
  const std::int64_t* segments;      // [groups + 1] of ids or prefix; absent: a group per token
  std::int64_t groups;
  float* u;                     // [T, R_a] from forward to backward
  const void* dy;               // [T, d_out]
  void* dx;                     // [T, d_in]
  float *dA, *dB, *dgate, *du;  // [R_a, d_in], [R, d_out], like weights or id_weights, [T, R_a]
  std::uint8_t* mask;           // [T, mask_bytes(d_in)] of the dropout, from forward to backward; absent: drawn again
  std::byte* work;
  std::int64_t work_bytes;
};

namespace {

constexpr lm::Space host = lm::Space::host;
constexpr lm::Major rank_major = lm::Major::column;
using lm::Index;

thread_local std::string error;

template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

// For bfloat16: AMX's tiles, where there are any.
template <class T = float>
auto backend(std::int64_t threads) {
  const lm::OpenMPExecutor executor{static_cast<int>(threads)};
  if constexpr (std::is_same_v<T, lm::bfloat16>)
    return lm::cpu::AmxBackend{executor};
  else
    return lm::cpu::Backend{executor};
}

// The four ops of a call whose activations and weights are of type T.
template <class T>
struct Ops {
  using Shrink = lm::Shrink<T, T, float, float, host>;
  using Expand = lm::Expand<float, T, T, float, host, rank_major>;
  using ShrinkBackward = lm::ShrinkBackward<T, T, float, float, float, host>;
  using ExpandBackward = lm::ExpandBackward<float, T, T, float, float, host, rank_major>;

  Shrink shrink;
  Expand expand;
  ExpandBackward expand_backward;
  ShrinkBackward shrink_backward;

  explicit Ops(const LoramixCall& c) {
    const Index tokens = c.tokens;
    const lm::MatrixView<const T> x{static_cast<const T*>(c.x), tokens, c.d_in};
    const lm::MatrixView<const T> A{static_cast<const T*>(c.A), c.ranks_of_a, c.d_in};
    const lm::MatrixView<const T, host, rank_major> B{static_cast<const T*>(c.B), c.d_out, c.ranks};
    const lm::MatrixView<const T> dy{static_cast<const T*>(c.dy), tokens, c.d_out};
    const lm::MatrixView<float> u{c.u, tokens, c.ranks_of_a}, du{c.du, tokens, c.ranks_of_a};
    const lm::GateForm<float> gate = form(c);
    lm::Dropout dropout = lm::make_dropout("peers", c.dropout, {.seed = 7, .step = static_cast<std::uint64_t>(c.step)});
    if (c.mask != nullptr) dropout.mask = c.mask, dropout.mask_stride = lm::mask_bytes(c.d_in);
    const float scale = static_cast<float>(c.scale);
    // A gate that closes most experts is known before U is computed.
    const lm::GateForm<float> select =
        gate.ids.data == nullptr && gate.prefix.data == nullptr ? lm::GateForm<float>{} : gate;
    shrink = {A, {}, x, dropout, u, {}, select};
    expand = {u, gate, B, scale, {static_cast<T*>(c.y), tokens, c.d_out}};
    lm::GateGradient<float> dgate;
    if (c.weights != nullptr) dgate.weights = {c.dgate, tokens, c.experts};
    if (c.id_weights != nullptr) dgate.id_weights = {c.dgate, gate.id_weights.rows, c.chosen};
    expand_backward = {u, gate, B, scale, dy, du, {c.dB, c.d_out, c.ranks}, dgate};
    expand_backward.gate_values = lm::Into::set;
    shrink_backward = {
        A, {}, x, dropout, du, {}, {c.dA, c.ranks_of_a, c.d_in}, {}, {static_cast<T*>(c.dx), tokens, c.d_in}};
    shrink_backward.select = select;
  }

  static lm::GateForm<float> form(const LoramixCall& c) {
    lm::GateForm<float> f;
    f.tokens = c.tokens;
    f.ranks = c.ranks;
    f.experts = c.experts;
    f.rank_offsets = c.rank_offsets;
    const lm::Groups<> groups = c.segments == nullptr ? lm::Groups<>{} : lm::Groups<>::by_segment(c.segments, c.groups);
    if (c.weights != nullptr) f.weights = {c.weights, c.tokens, c.experts};
    if (c.ids != nullptr) f.ids = {c.ids, c.groups, c.chosen}, f.id_groups = groups;
    if (c.id_weights != nullptr) f.id_weights = {c.id_weights, c.groups, c.chosen};
    if (c.prefix != nullptr) f.prefix = {c.prefix, c.groups}, f.prefix_groups = groups;
    return f;
  }
};

template <class T>
Index work_bytes(const LoramixCall& c) {
  const auto be = backend<T>(c.threads);
  const Ops<T> ops(c);
  Index most = std::max(scratch_bytes(be, ops.shrink), scratch_bytes(be, ops.expand));
  if (c.dy != nullptr) {
    most = std::max({most, scratch_bytes(be, ops.expand_backward), scratch_bytes(be, ops.shrink_backward)});
  }
  return lm::Arena<>::with_alignment(most);
}
template <class T>
void forward(const LoramixCall& c) {
  const auto be = backend<T>(c.threads);
  const Ops<T> ops(c);
  const lm::Arena<> work{c.work, c.work_bytes};
  if (c.mask != nullptr) {
    const Index bytes = lm::mask_bytes(c.d_in);
    lm::draw_mask(be, ops.shrink.dropout, c.tokens, c.d_in, lm::MatrixView<std::uint8_t>{c.mask, c.tokens, bytes});
  }
  lm::execute(be, ops.shrink, work);
  lm::execute(be, ops.expand, work);
}
template <class T>
void backward(const LoramixCall& c) {
  const auto be = backend<T>(c.threads);
  const Ops<T> ops(c);
  const lm::Arena<> work{c.work, c.work_bytes};
  lm::execute(be, ops.expand_backward, work);
  lm::execute(be, ops.shrink_backward, work);
}

// A MixLoRA block between the process's own products with W1, W3 and W2.
struct Block {
  using Adapter = lm::MixLora<float>;
  std::int64_t threads;
  Adapter adapter;
  lm::gradient_t<Adapter> gradient;
  lm::Buffer<std::byte> work, reserve;
  lm::MixLoraSaved<Adapter> saved{};

  Block(std::int64_t n, std::int64_t tokens, const lm::MixLoraConfig& config)
      : threads(n),
        adapter(config),
        gradient(lm::zeros_like(adapter)),
        work(lm::workspace_bytes(be(), adapter, tokens, lm::Pass::backward)),
        reserve(lm::reserve_bytes(adapter, tokens)) {}
  lm::cpu::Backend<lm::OpenMPExecutor> be() const { return backend(threads); }
  lm::Arena<> arena() { return lm::Arena<>{work}; }
  Index tokens() const { return saved.origin.tokens; }
  Index d_in() const { return adapter.config().d_in; }
  Index d_hidden() const { return adapter.config().d_hidden; }
  Index d_out() const { return adapter.config().d_out; }
};
lm::MatrixView<const float> in(const float* data, Index rows, Index cols) { return {data, rows, cols}; }
lm::MatrixView<float> out(float* data, Index rows, Index cols) { return {data, rows, cols}; }

}  // namespace

extern "C" {

const char* loramix_error() { return error.c_str(); }
int loramix_amx() { return lm::cpu::request_amx() ? 1 : 0; }

std::int64_t loramix_work_bytes(const LoramixCall* c) {
  std::int64_t bytes = -1;
  guarded([&] { bytes = c->is_bfloat16 != 0 ? work_bytes<lm::bfloat16>(*c) : work_bytes<float>(*c); });
  return bytes;
}
int loramix_forward(LoramixCall* c) {
  if (c->dropout > 0) ++c->step;
  return guarded([&] { c->is_bfloat16 != 0 ? forward<lm::bfloat16>(*c) : forward<float>(*c); });
}
int loramix_backward(const LoramixCall* c) {
  return guarded([&] { c->is_bfloat16 != 0 ? backward<lm::bfloat16>(*c) : backward<float>(*c); });
}
// keep [T, d_in] ← 1 where the last forward kept x.
int loramix_kept(const LoramixCall* c, std::uint8_t* keep) {
  return guarded([&] {
    const lm::Dropout dropout = Ops<float>(*c).shrink.dropout;
    for (Index t = 0; t < c->tokens; ++t) {
      for (Index i = 0; i < c->d_in; ++i) keep[t * c->d_in + i] = dropout.keep(t, i) ? 1 : 0;
    }
  });
}

// norms [d_out] ← ‖w_i + s (BA)_i‖; squares [d_out] = ‖w_i‖²; W [d_out, d_in], A [r, d_in], B [r, d_out]. Without `work`:
// returns the bytes it takes.
std::int64_t loramix_norms(std::int64_t threads, std::int64_t d_out, std::int64_t d_in, std::int64_t r, const float* W,
                           const float* squares, const float* A, const float* B, double scale, float* norms,
                           std::byte* work, std::int64_t bytes) {
  std::int64_t result = -1;
  guarded([&] {
    const auto be = backend(threads);
    const lm::DoraNorms<float, float, float, host> op{{W, d_out, d_in}, {squares, d_out},          {A, r, d_in},
                                                      {B, d_out, r},    static_cast<float>(scale), {norms, d_out}};
    result = lm::Arena<>::with_alignment(lm::dora_norms_bytes(be, op));
    if (work != nullptr) lm::dora_norms(be, op, lm::Arena<>{work, bytes});
  });
  return result;
}

void* loramix_block_new(std::int64_t threads, std::int64_t tokens, std::int64_t d_in, std::int64_t d_hidden,
                        std::int64_t d_out, std::int64_t experts, std::int64_t rank, std::int64_t chosen,
                        double alpha) {
  Block* block = nullptr;
  guarded([&] {
    lm::MixLoraConfig config{d_in, d_hidden, d_out, experts, rank, alpha};
    config.rule.k = chosen;
    block = std::make_unique<Block>(threads, tokens, config).release();
  });
  return block;
}
void loramix_block_delete(void* block) { delete static_cast<Block*>(block); }
// Parameter `name` (adapter/mix_lora.hpp), or its gradient: the address of its first value.
float* loramix_block_values(void* handle, const char* name, int of_gradient) {
  Block& b = *static_cast<Block*>(handle);
  float* found = nullptr;
  const auto look = [&](auto& owner) {
    std::decay_t<decltype(owner)>::visit(owner, [&](const char* each, auto view, lm::ParameterGroup) {
      if (std::strcmp(each, name) == 0) found = view.data;
    });
  };
  of_gradient != 0 ? look(b.gradient) : look(b.adapter);
  return found;
}
int loramix_block_route(void* handle, const float* x, std::int64_t tokens) {
  Block& b = *static_cast<Block*>(handle);
  return guarded([&] {
    lm::Arena<> reserve{b.reserve};
    b.saved = lm::route(b.be(), b.adapter, in(x, tokens, b.d_in()), reserve, b.arena());
  });
}
int loramix_block_mix(void* handle, const float* u, const float* v, float* hbar) {
  Block& b = *static_cast<Block*>(handle);
  const Index T = b.tokens(), d = b.d_hidden();
  return guarded([&] { lm::mix(b.be(), b.adapter, b.saved, in(u, T, d), in(v, T, d), out(hbar, T, d), b.arena()); });
}
int loramix_block_finish(void* handle, float* y) {
  Block& b = *static_cast<Block*>(handle);
  return guarded([&] { lm::finish(b.be(), b.adapter, b.saved, out(y, b.tokens(), b.d_out()), b.arena()); });
}
int loramix_block_finish_backward(void* handle, const float* dy) {
  Block& b = *static_cast<Block*>(handle);
  return guarded(
      [&] { lm::finish_backward(b.be(), b.adapter, b.saved, in(dy, b.tokens(), b.d_out()), b.gradient, b.arena()); });
}
int loramix_block_mix_backward(void* handle, const float* u, const float* v, const float* dhbar, float* du, float* dv) {
  Block& b = *static_cast<Block*>(handle);
  const Index T = b.tokens(), d = b.d_hidden();
  return guarded([&] {
    lm::mix_backward(b.be(), b.adapter, b.saved, in(u, T, d), in(v, T, d), in(dhbar, T, d), out(du, T, d),
                     out(dv, T, d), b.gradient, b.arena());
  });
}
int loramix_block_route_backward(void* handle, const float* x, float* dx) {
  Block& b = *static_cast<Block*>(handle);
  const Index T = b.tokens(), d = b.d_in();
  return guarded(
      [&] { lm::route_backward(b.be(), b.adapter, b.saved, in(x, T, d), out(dx, T, d), b.gradient, b.arena()); });
}

}  // extern "C"

/// The fused path of the gated product: how its ops become launches of three kernels.
///
///   Shrink          shrink_kernel                      1 launch
///   Expand          expand_kernel, gate applied where ũ is read                               1 launch
///   ExpandBackward  shrink_kernel on dY, whose last block of a tile goes on with the gate's backward; token_sum_kernel for dB
///   ShrinkBackward  token_sum_kernel for dA and dside; expand_kernel for dX
///
/// ShrinkLaunch, ExpandLaunch and TokenSumLaunch own the launches: where many units use the same scalars, `extern template` them
/// and compile the kernels in one (tests/support/gpu_kernels.cuh).
///
/// Computes:    what the ops say, for float, bfloat16 and half in any mix, accumulation, scores and gradients in float; every gate,
///              rank and size.
/// Errors:      launches that CUDA refuses (ErrorCode::device). Bad ids and groups: as in the composed path.
/// Cost:        no cuBLAS. Scratch: partial sums where few tokens share many blocks, T·R for dŨ, what the gate's gradient needs.
/// Determinism: gpu/shrink.cuh, gpu/expand.cuh, gpu/token_sum.cuh.
/// Example:     tests/gpu/conformance.cu
#pragma once
#include <loramix/gpu/backend.cuh>
#include <loramix/gpu/expand.cuh>
#include <loramix/gpu/launch.cuh>
#include <loramix/gpu/rows.cuh>
#include <loramix/gpu/shrink.cuh>
#include <loramix/gpu/token_sum.cuh>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>
#include <loramix/ops/token_product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {
namespace fused {

template <class T>
inline constexpr bool is_stored = std::is_same_v<T, float> || is_16bit<T>;

/// Types that the kernels are written for.
template <class X, class W, class Acc, class Score, class G = float>
inline constexpr bool takes =
    is_stored<X>&& is_stored<W>&& std::is_same_v<Acc, float>&& std::is_same_v<Score, float>&& std::is_same_v<G, float>;

/// f(the arithmetic for stored operands X and W).
template <class X, class W, class F>
auto with_math(const Tuning& tuning, const F& f) {
  if constexpr (std::is_same_v<X, W> && is_16bit<X>) {
    return f(Tensor<X>{});
  } else if constexpr (std::is_same_v<X, float> && std::is_same_v<W, float>) {
    return tuning.tf32 ? f(Tensor<float>{}) : f(Fma<float, float>{});
  } else {
    return f(Fma<X, W>{});
  }
}
/// The same where rank space is the left operand and E is stored on the right.
template <class E, class F>
auto with_rank_math(const Tuning& tuning, const F& f) {
  if constexpr (is_16bit<E>) {
    return tuning.terms == RankTerms::exact ? f(Tensor<E>{}) : f(Tensor<E, 1>{});
  } else {
    return with_math<E, E>(tuning, f);
  }
}

/// f(arithmetic of x and w, arithmetic of rank space and x): the two products of a backward.
template <class X, class W, class F>
auto with_both(const Tuning& tuning, const F& f) {
  if constexpr (std::is_same_v<X, float> && std::is_same_v<W, float>) {
    return with_math<X, W>(tuning, [&](auto math) { return f(math, math); });
  } else {
    return with_math<X, W>(tuning, [&](auto math) {
      return with_rank_math<X>(tuning, [&](auto rank_math) { return f(math, rank_math); });
    });
  }
}

inline unsigned as_grid(Index n) { return static_cast<unsigned>(n); }

// ---- shrink ----------------------------------------------------------------------------------------------------------

/// How a product over `width` features is cut.
struct ShrinkPlan {
  Index tiles = 0, groups = 0;  // of tokens, of columns
  int group = 32;
  Index chunk = shrink_stage;
  int chunks = 1, splits = 1;
  Index partial_tokens = 0;  // the most that ever share their chunks among blocks

  bool shared() const { return splits * groups > 1; }
};
template <class Math>
ShrinkPlan plan_shrink(const Tuning& tuning, Index tokens, Index width, int columns, bool copy_of_x) {
  using Block = ShrinkBlock<Math, true>;
  ShrinkPlan plan;
  while (plan.group < 256 && plan.group < columns &&
         Block::shared_bytes(2 * plan.group, copy_of_x) + Block::own_bytes <= tuning.machine.shared_bytes) {
    plan.group *= 2;
  }
  plan.tiles = ceil_div(tokens, tile_rows);
  plan.groups = ceil_div(columns, plan.group);
  // A block streams x and its weights; what a chunk leaves is written and read, and the row stage moves some of it again.
  const Index x = class_tokens(tokens) * width * Index{sizeof(typename Math::Left)};
  const Index own = columns < plan.group ? columns : plan.group;
  const Index weights = own * width * Index{sizeof(typename Math::Right)};
  const Index sums = class_tokens(tokens) * own * Index{sizeof(float)} * 5 / 2;
  plan.chunks = static_cast<int>(parts_for(tuning, x + weights, x, sums, ceil_div(width, shrink_stage)));
  plan.chunk = round_up(width < 1 ? 1 : ceil_div(width, plan.chunks), shrink_stage);
  plan.chunks = static_cast<int>(width < 1 ? 1 : ceil_div(width, plan.chunk));
  if (plan.chunks == 1 || plan.groups == 0) return plan;
  const Index few = ceil_div(tuning.machine.multiprocessors, plan.groups) - 1;  // tiles that leave blocks to spare
  plan.partial_tokens = tokens < few * tile_rows ? tokens : few * tile_rows;
  if (plan.tiles <= few) plan.splits = plan.chunks;
  return plan;
}

inline int padded_columns(Index ranks, Index side) { return static_cast<int>(round_up(ranks, 8) + side); }

template <class X, class W>
float* carve_partial(DeviceArena& arena, const ShrinkPlan& plan, const ShrinkTask<X, W>& task) {
  return arena.take<float>(plan.chunks * plan.partial_tokens * task.pitch());
}

template <class X, class W>
ShrinkTask<X, W> shrink_task(const Backend& be, const ShrinkPlan& plan, Source<X> x, Source<W> weights,
                             Source<W> side) {
  ShrinkTask<X, W> task;
  task.x = x;
  task.weights = weights;
  task.side = side;
  task.group = plan.group;
  task.chunk = plan.chunk;
  task.chunks = plan.chunks;
  task.splits = plan.splits;
  task.tickets = plan.tiles <= ticket_count ? be.tickets : nullptr;
  return task;
}

/// What the last block of a tile adds up, as a launch of its own: where there are no tickets.
template <class X, class W>
__global__ void __launch_bounds__(256, 1) shrink_finish_kernel(const __grid_constant__ ShrinkTask<X, W> task) {
  const Index token = Index{blockIdx.x} * tile_rows, left = task.x.rows - token;
  add_partial_sums(task, token, left < tile_rows ? static_cast<int>(left) : tile_rows);
}
template <class X, class W>
struct ShrinkFinishLaunch {
  static void run(const Backend& be, const ShrinkPlan& plan, const ShrinkTask<X, W>& task);
};
template <class X, class W>
void ShrinkFinishLaunch<X, W>::run(const Backend& be, const ShrinkPlan& plan, const ShrinkTask<X, W>& task) {
  launch(be, "shrink_finish_kernel", &shrink_finish_kernel<X, W>, dim3(as_grid(plan.tiles)), 256, 0, task);
}

/// Row bodies as launches of their own, one for each part: those of the composed path.
inline void launch_bodies(const Backend&, Index, const NoRows&) {}
template <class Body>
void launch_bodies(const Backend& be, Index rows, const Body& body) {
  launch_rows<WarpTeam, warps_per_block>(be, rows, body);
}
template <class First, class Second>
void launch_bodies(const Backend& be, Index rows, const InTurn<First, Second>& bodies) {
  launch_bodies(be, rows, bodies.first);
  launch_bodies(be, rows, bodies.second);
}

template <class Math, bool k_major, class Body>
struct ShrinkLaunch {
  using Task = ShrinkTask<typename Math::Left, typename Math::Right>;
  /// `passing`: nobody but `body` reads u.
  static void run(const Backend& be, const ShrinkPlan& plan, Task task, const Body& body, bool passing);
};
template <class Math, bool k_major, class Body>
void ShrinkLaunch<Math, k_major, Body>::run(const Backend& be, const ShrinkPlan& plan, Task task, const Body& body,
                                            bool passing) {
  using Block = ShrinkBlock<Math, k_major>;
  const bool copy_of_x = task.dropout.on() && task.columns > task.padded;
  task.near = ReadsBefore<Body, WarpTeam, NearRows> && plan.groups == 1 && task.ranks != 0 && !task.sparse &&
              (plan.splits == 1 || task.tickets != nullptr);
  if (task.near && passing) task.u.data = nullptr;
  if (plan.groups != 0) {
    launch(be, "shrink_kernel", &shrink_kernel<Math, k_major, Body>,
           dim3(as_grid(plan.tiles), as_grid(plan.groups), as_grid(plan.splits)), ShrinkWarps(plan.group).threads(),
           Block::shared_bytes(plan.group, copy_of_x), task, body);
  }
  const bool left_over = plan.groups == 0 || (plan.shared() && task.tickets == nullptr);
  if (left_over && plan.splits > 1) ShrinkFinishLaunch<typename Math::Left, typename Math::Right>::run(be, plan, task);
  if (left_over) launch_bodies(be, task.x.rows, body);
}

template <class Math, bool k_major, class Body>
void launch_shrink(const Backend& be, const ShrinkPlan& plan,
                   const ShrinkTask<typename Math::Left, typename Math::Right>& task, const Body& body, bool passing) {
  ShrinkLaunch<Math, k_major, Body>::run(be, plan, task, body, passing);
}

template <class X, class W, class Acc, class Score>
Index scratch(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op) {
  return with_math<X, W>(be.tuning, [&](auto math) {
    // Of both together and of either alone, as calls with jitter or a recomputed U have them: fewer columns may need more.
    Index bytes = 0;
    for (const int columns :
         {padded_columns(op.A.rows, op.side.rows), padded_columns(op.A.rows, 0), padded_columns(0, op.side.rows)}) {
      ShrinkTask<X, W> task;
      task.columns = columns;
      const ShrinkPlan plan = plan_shrink<decltype(math)>(be.tuning, op.x.rows, op.x.cols, columns, true);
      const Index own = carved_bytes<Space::device>([&](DeviceArena& arena) { carve_partial(arena, plan, task); });
      bytes = own > bytes ? own : bytes;
    }
    return bytes;
  });
}

/// The op, and then `body` for every token.
template <class X, class W, class Acc, class Score, class Body>
void execute(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op, DeviceArena work, const Body& body) {
  with_math<X, W>(be.tuning, [&](auto math) {
    using Math = decltype(math);
    const int columns = padded_columns(op.A.rows, op.side.rows);
    const ShrinkPlan plan = plan_shrink<Math>(be.tuning, op.x.rows, op.x.cols, columns, true);
    ShrinkTask<X, W> task = shrink_task<X, W>(be, plan, source_of(op.x), source_of(op.A), source_of(op.side));
    task.dropout = op.dropout;
    task.scale = op.dropout.on() ? static_cast<float>(op.dropout.kept_scale()) : 1.0f;
    task.u = op.u;
    task.h = op.h;
    task.select = op.select;
    task.sparse = is_sparse(be.tuning, op.select);
    task.ranks = op.A.rows;
    task.padded = static_cast<int>(round_up(op.A.rows, 8));
    task.columns = columns;
    task.partial = carve_partial(work, plan, task);
    launch_shrink<Math, true>(be, plan, task, body, op.passing);
  });
}
template <class X, class W, class Acc, class Score>
void execute(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op, DeviceArena work) {
  if (op.A.rows + op.side.rows != 0) execute(be, op, work, NoRows{});
}

// ---- expand ----------------------------------------------------------------------------------------------------------

template <class Math, class Y, bool by_column>
struct ExpandLaunch {
  using Task = ExpandTask<Y, typename Math::Right>;
  static void run(const Backend& be, const Task& task);

 private:
  template <bool sparse>
  static bool try_kernel(const Backend& be, Task task);
};
/// Tokens of y, and how many columns a block takes; false, and nothing is launched, where a block has no room.
template <class Math, class Y, bool by_column>
template <bool sparse>
bool ExpandLaunch<Math, Y, by_column>::try_kernel(const Backend& be, Task task) {
  using Block = ExpandBlock<Math, Y, by_column, sparse>;
  constexpr int warps = strip_warps<Math, sparse>;
  const Tuning& tuning = be.tuning;
  const Index steps = task.ranks.steps(), all = ceil_div(task.y.cols, warps * tile_cols);
  const Index tiles = ceil_div(task.y.rows, tile_rows);
  if constexpr (sparse) task.unit = steps_of_unit(task.ranks.gate);
  const int least = sparse ? task.unit : 2, units = task.ranks.padded / tile_step / task.unit;
  const auto shared_bytes = [&] { return Block::shared_bytes(task.window, units); };
  task.window = static_cast<int>(steps < least ? least : round_up(steps, least));
  while (task.window > least && shared_bytes() > tuning.machine.shared_bytes) task.window -= least;
  if (sparse && shared_bytes() > tuning.machine.shared_bytes) return false;
  task.aligned = reinterpret_cast<std::uintptr_t>(task.y.data) % 16 == 0 && task.y.stride * Index{sizeof(Y)} % 16 == 0;
  // Blocks side by side read ũ again each; more than fill the device are of no use.
  const Index tokens = task.y.rows < tile_rows ? task.y.rows : tile_rows, ranks = steps * tile_step;
  const Index y = 2 * tokens * task.y.cols * Index{sizeof(Y)};
  const Index weights = ranks * task.y.cols * Index{sizeof(typename Math::Right)};
  const Index room = ceil_div(tuning.machine.multiprocessors, tiles);
  Index blocks = parts_for(tuning, 8 * (y + weights), y, tokens * ranks * Index{sizeof(float)}, room);
  if (steps > task.window) blocks = all;  // ũ does not stay in shared memory: one tile of columns per block
  blocks = blocks < 1 ? 1 : blocks < all ? blocks : all;
  task.tiles = static_cast<int>(ceil_div(all, blocks));
  launch(be, "expand_kernel", &expand_kernel<Math, Y, by_column, sparse>,
         dim3(as_grid(tiles), as_grid(ceil_div(all, task.tiles))), 32 * warps, shared_bytes(), task);
  return true;
}
template <class Math, class Y, bool by_column>
void ExpandLaunch<Math, Y, by_column>::run(const Backend& be, const Task& task) {
  if (task.y.rows == 0 || task.y.cols == 0) return;
  if (task.ranks.steps() == 0 && task.into == Into::add) return;
  if (task.ranks.sparse && try_kernel<true>(be, task)) return;
  try_kernel<false>(be, task);
}

template <class Acc, class W, class Y, class Score, Major M>
Index scratch(const Backend&, const Expand<Acc, W, Y, Score, Space::device, M>&) {
  return 0;
}
template <class Acc, class W, class Y, class Score, Major M>
void execute(const Backend& be, const Expand<Acc, W, Y, Score, Space::device, M>& op, DeviceArena) {
  with_rank_math<W>(be.tuning, [&](auto math) {
    ExpandTask<Y, W> task;
    task.ranks = rank_source(op.u, reporting(be, op.gate));
    task.ranks.sparse = is_sparse(be.tuning, op.gate);
    task.weights = source_of(op.B);
    task.scale = op.scale;
    task.y = op.y;
    task.into = op.into;
    ExpandLaunch<decltype(math), Y, M == Major::row>::run(be, task);
  });
}

// ---- sums over tokens ------------------------------------------------------------------------------------------------

struct TokenSumPlan {
  int warps = 4;
  Index blocks = 0, groups = 0;  // of columns, of rows
  Index chunk = tile_rows;       // tokens
  int chunks = 1;
  Index most_chunks = 1;  // of any number of tokens up to these: rounding may give fewer tokens more
};
/// `steps`: of 16 rows, wanted or not, so that what is wanted changes no bit.
template <class Math>
TokenSumPlan plan_token_sum(const Tuning& tuning, Index tokens, Index width, Index steps) {
  using Block = TokenSumBlock<Math, float, true>;
  TokenSumPlan plan;
  // Blocks of columns read the ranks again each; the widest block that registers and shared memory allow has the fewest.
  const Index ranks = steps * tile_step * Index{sizeof(float)}, x = width * Index{sizeof(typename Math::Left)};
  plan.warps = Math::token_warps;
  while (plan.warps > 1 && (Block::shared_bytes(plan.warps, true) > tuning.machine.shared_bytes ||
                            (plan.warps / 2) * tile_cols >= width ||
                            tuning.share * ranks * ceil_div(width, plan.warps / 2 * tile_cols) <= x)) {
    plan.warps /= 2;
  }
  plan.blocks = ceil_div(width, plan.warps * tile_cols);
  plan.groups = ceil_div(steps, 4);
  if (plan.blocks * plan.groups == 0 || tokens == 0) return plan;
  const Index streamed = plan.warps * tile_cols * Index{sizeof(typename Math::Left)};  // per token
  Index least = round_up(ceil_div(tuning.block_bytes, streamed), tile_rows);
  if (least < token_chunk && tuning.block_bytes > streamed) least = token_chunk;
  const Index most = ceil_div(tuning.machine.multiprocessors, plan.blocks * plan.groups);
  const Index chunks = ceil_div(tokens, least);
  plan.most_chunks = chunks < most ? chunks : most;
  plan.chunk = round_up(ceil_div(tokens, plan.most_chunks), tile_rows);
  plan.chunks = static_cast<int>(ceil_div(tokens, plan.chunk));
  return plan;
}
/// Room for the partial sums of any number of tokens up to that of the plan.
inline float* carve_partial(DeviceArena& arena, const TokenSumPlan& plan, Index steps, Index width) {
  return arena.take<float>(plan.most_chunks == 1 ? 0 : plan.most_chunks * steps * tile_step * round_up(width, 8));
}

template <class X, class G>
__global__ void __launch_bounds__(256)
    token_sum_finish_kernel(const __grid_constant__ TokenSumTask<X, G> task, int cols) {
  add_chunks(task, static_cast<int>(blockIdx.y) * 16, 16, Index{blockIdx.x} * cols, cols);
}

template <class Math, class G>
struct TokenSumLaunch {
  using Task = TokenSumTask<typename Math::Left, G>;
  static void run(const Backend& be, const TokenSumPlan& plan, Task task);

 private:
  template <bool sparse>
  static void launch_kernel(const Backend& be, const TokenSumPlan& plan, const Task& task);
};
template <class Math, class G>
template <bool sparse>
void TokenSumLaunch<Math, G>::launch_kernel(const Backend& be, const TokenSumPlan& plan, const Task& task) {
  const bool copy_of_x = task.dropout.on() && task.ranks.h.cols != 0;
  launch(be, "token_sum_kernel", &token_sum_kernel<Math, G, sparse>,
         dim3(as_grid(plan.blocks), as_grid(ceil_div(task.row_tiles(), 4)), static_cast<unsigned>(plan.chunks)),
         32 * plan.warps, TokenSumBlock<Math, G, sparse>::shared_bytes(plan.warps, copy_of_x), task);
}
template <class Math, class G>
void TokenSumLaunch<Math, G>::run(const Backend& be, const TokenSumPlan& plan, Task task) {
  task.chunk = plan.chunk;
  task.chunks = plan.chunks;
  task.tickets = plan.blocks * ceil_div(task.row_tiles(), 4) <= ticket_count ? be.tickets : nullptr;
  if (task.ranks.sparse) {
    launch_kernel<true>(be, plan, task);
  } else {
    launch_kernel<false>(be, plan, task);
  }
  if (plan.chunks > 1 && task.tickets == nullptr) {
    constexpr int cols = 512;
    launch(be, "token_sum_finish_kernel", &token_sum_finish_kernel<typename Math::Left, G>,
           dim3(as_grid(ceil_div(task.x.cols, cols)), as_grid(task.row_tiles())), 256, 0, task, cols);
  }
}
template <class Math, class G>
void launch_token_sum(const Backend& be, const TokenSumPlan& plan, const TokenSumTask<typename Math::Left, G>& task) {
  TokenSumLaunch<Math, G>::run(be, plan, task);
}

/// out (+)= leftᵀ right for left [T, m], right [T, n].
template <class Acc, class Out>
Index scratch(const Backend& be, const TokenProduct<Acc, Out, Space::device>& op) {
  const Index steps = ceil_div(op.left.cols, tile_step);
  const auto plan = plan_token_sum<Fma<float, float>>(be.tuning, op.left.rows, op.right.cols, steps);
  return carved_bytes<Space::device>([&](DeviceArena& arena) { carve_partial(arena, plan, steps, op.right.cols); });
}
template <class Acc, class Out>
void execute(const Backend& be, const TokenProduct<Acc, Out, Space::device>& op, DeviceArena work) {
  const Index steps = ceil_div(op.left.cols, tile_step);
  const auto plan = plan_token_sum<Fma<float, float>>(be.tuning, op.left.rows, op.right.cols, steps);
  GateForm<float, Space::device> open;
  open.tokens = op.left.rows;
  open.ranks = op.left.cols;
  TokenSumTask<float, Out> task;
  task.ranks = rank_source(op.left, open);
  task.x = source_of(op.right);
  task.out = sum_target(op.out);
  task.into = op.into;
  task.partial = carve_partial(work, plan, steps, op.right.cols);
  launch_token_sum<Fma<float, float>>(be, plan, task);
}

// ---- backward of expand ----------------------------------------------------------------------------------------------

struct ExpandBackwardScratch {
  float* partial;   // of dŨ
  View<float> dut;  // [T, R]
  float* dB_partial;
  loramix::detail::GateContributions<float, Space::device> by_token;
};

template <class Math, class Op>
ExpandBackwardScratch carve(DeviceArena& arena, const Op& op, const ShrinkPlan& plan, const TokenSumPlan& sum) {
  ShrinkTask<typename Math::Left, typename Math::Right> task;
  task.columns = padded_columns(op.B.cols, 0);
  return {carve_partial(arena, plan, task), arena.matrix<float>(op.u.rows, op.B.cols),
          carve_partial(arena, sum, ceil_div(op.B.cols, tile_step), op.B.rows),
          loramix::detail::carve_contributions<float>(arena, op.gate, op.dgate, op.gate_values)};
}

template <class Acc, class W, class Y, class Score, class G, Major M>
Index scratch(const Backend& be, const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op) {
  return with_both<Y, W>(be.tuning, [&](auto math, auto rank_math) {
    using Math = decltype(math);
    const ShrinkPlan plan = plan_shrink<Math>(be.tuning, op.u.rows, op.B.rows, padded_columns(op.B.cols, 0), false);
    const auto sum =
        plan_token_sum<decltype(rank_math)>(be.tuning, op.u.rows, op.B.rows, ceil_div(op.B.cols, tile_step));
    return carved_bytes<Space::device>([&](DeviceArena& arena) { carve<Math>(arena, op, plan, sum); });
  });
}

/// Whether every gradient that is wanted is final when its token's row body has run.
template <class Score>
bool final_by_token(const GateForm<Score, Space::device>& gate, const GateGradient<Score, Space::device>& wanted,
                    const loramix::detail::GateContributions<float, Space::device>& by_token) {
  const auto own = [](const auto& out, const auto& from) { return out.data == nullptr || from.data == out.data; };
  return own(wanted.id_weights, by_token.id_weights) && own(wanted.weights, by_token.weights) &&
         own(wanted.multiplier, by_token.multiplier) && wanted.rank_scale.data == nullptr && gate.tokens != 0;
}

/// The op, and then `then` for every token; NoRows: the op alone.
template <class Acc, class W, class Y, class Score, class G, Major M, class Then = NoRows>
void execute(const Backend& be, const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op, DeviceArena work,
             const Then& then = {}) {
  constexpr bool alone = std::is_same_v<Then, NoRows>;
  const Index width = op.B.rows, ranks = op.B.cols;
  const auto gate = reporting(be, op.gate);
  with_both<Y, W>(be.tuning, [&](auto math, auto rank_math) {
    using Math = decltype(math);
    using RankMath = decltype(rank_math);
    const ShrinkPlan plan = plan_shrink<Math>(be.tuning, op.u.rows, width, padded_columns(ranks, 0), false);
    const auto sum = plan_token_sum<RankMath>(be.tuning, op.u.rows, width, ceil_div(ranks, tile_step));
    const ExpandBackwardScratch scratch = carve<Math>(work, op, plan, sum);

    ShrinkTask<Y, W> task = shrink_task<Y, W>(be, plan, source_of(op.dy), source_of(op.B), {});
    task.scale = op.scale;
    task.select = gate;
    task.sparse = is_sparse(be.tuning, gate);
    task.u = scratch.dut;
    task.ranks = ranks;
    task.padded = task.columns = padded_columns(ranks, 0);
    task.partial = scratch.partial;
    using Body = loramix::detail::ApplyGateBackward<float, Score, Space::device>;
    const Body body{op.u, scratch.dut, gate, op.du, scratch.by_token, op.dgate.values, op.gate_values};
    const bool follows = final_by_token(gate, op.dgate, scratch.by_token);
    if (alone || !follows) {
      launch_shrink<Math, M == Major::column>(be, plan, task, body, true);
    } else if constexpr (!alone) {
      launch_shrink<Math, M == Major::column>(be, plan, task, InTurn{body, then}, true);
    }

    if (op.dB.data != nullptr) {
      TokenSumTask<Y, G> dB;
      dB.ranks = rank_source(op.u, gate);
      dB.ranks.sparse = is_sparse(be.tuning, gate);
      dB.x = source_of(op.dy);
      dB.scale = op.scale;
      dB.out = sum_target(op.dB.transposed());
      dB.into = op.parameters;
      dB.partial = scratch.dB_partial;
      launch_token_sum<RankMath>(be, sum, dB);
    }
    loramix::detail::sum_contributions(be, gate, scratch.by_token, op.dgate, op.parameters, op.gate_values);
    if constexpr (!alone) {
      if (!follows) gpu::execute_impl(be, Rows<Then, Space::device>{op.u.rows, then}, DeviceArena{});
    }
  });
}

// ---- backward of shrink ----------------------------------------------------------------------------------------------

/// dU, with dH behind it.
template <class Op>
RankSource<float> gradient_source(const Tuning& tuning, const Op& op, bool ranks, bool side) {
  GateForm<float, Space::device> open;
  open.tokens = op.x.rows;
  open.ranks = ranks ? op.du.cols : 0;
  auto source = rank_source(ranks ? op.du : op.du.col_range(0, 0), open);
  if (ranks && is_sparse(tuning, op.select)) {
    source.gate = op.select;
    source.sparse = true;
  }
  if (side) source.h = op.dh;
  return source;
}
template <class Op>
Index gradient_steps(const Op& op) {
  return ceil_div(op.A.rows, tile_step) + ceil_div(op.side.rows, tile_step);
}

template <class X, class W, class Acc, class Score, class G>
Index scratch(const Backend& be, const ShrinkBackward<X, W, Acc, Score, G, Space::device>& op) {
  return with_rank_math<X>(be.tuning, [&](auto math) {
    Index bytes = 0;  // as of shrink
    for (const Index steps : {gradient_steps(op), ceil_div(op.A.rows, tile_step), ceil_div(op.side.rows, tile_step)}) {
      const auto plan = plan_token_sum<decltype(math)>(be.tuning, op.x.rows, op.x.cols, steps);
      const Index own =
          carved_bytes<Space::device>([&](DeviceArena& arena) { carve_partial(arena, plan, steps, op.x.cols); });
      bytes = own > bytes ? own : bytes;
    }
    return bytes;
  });
}

template <class X, class W, class Acc, class Score, class G>
void execute(const Backend& be, const ShrinkBackward<X, W, Acc, Score, G, Space::device>& op, DeviceArena work) {
  const bool side = op.side.rows != 0, dA = op.dA.data != nullptr, dside = side && op.dside.data != nullptr;
  const float kept = op.dropout.on() ? static_cast<float>(op.dropout.kept_scale()) : 1.0f;
  if (dA || dside) {
    with_rank_math<X>(be.tuning, [&](auto math) {
      const Index steps = gradient_steps(op);
      const auto plan = plan_token_sum<decltype(math)>(be.tuning, op.x.rows, op.x.cols, steps);
      TokenSumTask<X, G> task;
      task.ranks = gradient_source(be.tuning, op, dA, dside);
      task.x = source_of(op.x);
      task.dropout = op.dropout;
      task.scale = kept;
      if (dA) task.out = sum_target(op.dA);
      if (dside) task.side_out = sum_target(op.dside);
      task.into = op.parameters;
      task.partial = carve_partial(work, plan, steps, op.x.cols);
      launch_token_sum<decltype(math)>(be, plan, task);
    });
  }
  if (op.dx.data == nullptr) return;
  with_rank_math<W>(be.tuning, [&](auto math) {
    ExpandTask<X, W> task;
    task.ranks = gradient_source(be.tuning, op, true, side);
    task.weights = source_of(op.A);
    task.side = source_of(op.side);
    task.dropout = op.dropout;
    task.kept = kept;
    task.y = op.dx;
    task.into = op.input;
    ExpandLaunch<decltype(math), X, false>::run(be, task);
  });
}

}  // namespace fused
}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix

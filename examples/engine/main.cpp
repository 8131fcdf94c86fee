// An inference engine that adapts its linear layers: its own threads, its own memory, its own products. loramix adds
// the adapter's part to what the engine has computed, and takes nothing that it is not given.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <vector>

#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/fused_forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/io/adapter.hpp>

#include "engine.hpp"

namespace lm = loramix;

// [executor]
// The engine's threads as loramix sees them. A lane is a place to work: no two jobs at a time share one.
struct EngineExecutor {
  engine::Pool* pool;
  lm::Index lanes() const { return pool->size(); }
  template <class Job>
  void run(lm::Index jobs, const Job& job) const {
    pool->parallel_for(jobs, [&job](long i, int thread) { job(lm::Index{i}, lm::Index{thread}); });
  }
};
// [/executor]

namespace {

using View = lm::MatrixView<float>;
using ConstView = lm::MatrixView<const float>;
constexpr lm::Index hidden = 96, wide = 160, max_tokens = 64;

/// Numbers that stand for activations and trained weights.
void fill(float* v, lm::Index n, unsigned state) {
  for (lm::Index i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    v[i] = static_cast<float>(state >> 8) * 0x1p-23f - 1;
  }
}

/// The largest difference from y + s (x Aᵀ) Bᵀ, summed in double.
double error_of(ConstView y, ConstView before, ConstView x, const lm::Lora<float>& lora) {
  double largest = 0;
  for (lm::Index t = 0; t < y.rows; ++t) {
    for (lm::Index o = 0; o < y.cols; ++o) {
      double want = before(t, o);
      for (lm::Index j = 0; j < lora.A().rows; ++j) {
        double u = 0;
        for (lm::Index c = 0; c < x.cols; ++c) u += static_cast<double>(x(t, c)) * static_cast<double>(lora.A()(j, c));
        want += lora.scale() * u * static_cast<double>(lora.B()(o, j));
      }
      const double error = std::abs(static_cast<double>(y(t, o)) - want);
      if (!(error <= largest)) largest = error;
    }
  }
  return largest;
}

/// What training left behind.
void write_adapter(const char* path) {
  lm::Lora<float> lora({.d_in = hidden, .d_out = wide, .rank = 8, .alpha = 16});
  lm::initialise(lora, {.seed = 7, .site = "layers.0.mlp.up_proj"});
  fill(lora.B().data, wide * 8, 3);
  lm::io::save(path, "layers.0.mlp.up_proj", lora);
}

/// One adapted layer: base product, then the adapter's part.
double one_layer(engine::Pool& pool, const char* path) {
  const engine::Linear up(hidden, wide);
  std::vector<float> x(hidden * max_tokens), y(wide * max_tokens);
  const lm::Index tokens = 37;
  fill(x.data(), hidden * tokens, 1);

  // [inference]
  lm::cpu::Backend be{EngineExecutor{&pool}};  // the engine's own threads
  auto lora = lm::io::load<lm::Lora<float>>(path, "layers.0.mlp.up_proj");
  auto packed = lm::prepack(be, lora, lm::Pass::forward);                       // immutable: share it between threads
  std::vector<std::byte> scratch(lm::workspace_bytes(be, packed, max_tokens));  // one per stream, for every batch
  const ConstView x_view(x.data(), tokens, hidden);
  const View y_view(y.data(), tokens, wide);
  up.forward(x.data(), y.data(), tokens);  // the engine's own GEMM
  // [/inference]
  const std::vector<float> base = y;
  // [forward]
  lm::forward(be, packed, x_view, y_view, lm::Arena{scratch});  // y += delta
  // [/forward]
  lm::print(lm::explain(be, lora, tokens));
  return error_of(y_view, {base.data(), tokens, wide}, x_view, lora);
}

/// The layer before is split by columns between two devices, this one by rows: each device holds half of x and of A.
/// The halves of U are summed (the engine's all-reduce: R values per token instead of d_out), then expanded once.
double tensor_parallel(engine::Pool& pool, const char* path) {
  lm::cpu::Backend be{EngineExecutor{&pool}};
  const auto lora = lm::io::load<lm::Lora<float>>(path, "layers.0.mlp.up_proj");
  const lm::Index tokens = 5, rank = lora.config().rank, half = hidden / 2;
  lm::Matrix<float> x(tokens, hidden), y(tokens, wide), u(tokens, rank), other(tokens, rank);
  fill(x.data(), tokens * hidden, 2);
  std::vector<std::byte> scratch(lm::workspace_bytes(be, lora, max_tokens));
  const lm::Arena work{scratch};

  // [tensor-parallel]
  const auto shrink = [&](lm::Index begin, View into) {
    const auto half_of = [&](auto view) { return view.col_range(begin, half); };
    lm::execute(be, lm::make_shrink(half_of(lora.A()), half_of(x.view()), into), work);
  };
  shrink(0, u);                                                                  // on the first device
  shrink(half, other);                                                           // on the second
  for (lm::Index i = 0; i < tokens * rank; ++i) u.data()[i] += other.data()[i];  // all-reduce
  lm::execute(be, lm::make_expand(u.view(), lora.B(), lora.scale(), y.view()), work);
  // [/tensor-parallel]
  return error_of(y, lm::Matrix<float>(tokens, wide), x, lora);
}

/// q, k and v in one base product, interleaved in one buffer. q and v are adapted, k stays what it is.
bool fused_qkv(engine::Pool& pool) {
  lm::cpu::Backend be{EngineExecutor{&pool}};
  const lm::Index tokens = 9, head = 32;
  const engine::Linear base(hidden, 3 * head);
  lm::Matrix<float> x(tokens, hidden), y(tokens, 3 * head);
  fill(x.data(), tokens * hidden, 4);
  base.forward(x.data(), y.data(), tokens);
  const auto before = y;

  // [fused-qkv]
  lm::FusedLora<float> qv({.d_in = hidden, .d_out = 3 * head, .slices = {{0, head}, {2 * head, head}}, .rank = 8});
  // [/fused-qkv]
  lm::initialise(qv, {.seed = 7, .site = "layers.0.attention.qkv"});
  for (lm::Index i = 0; i < 2; ++i) fill(qv.B(i).data, head * 8, 5);
  // [fused-forward]
  const auto packed = lm::prepack(be, qv);
  std::vector<std::byte> scratch(lm::workspace_bytes(be, packed, tokens));
  lm::forward(be, packed, x, y, lm::Arena{scratch});
  // [/fused-forward]

  bool changed = false, k_kept = true;
  for (lm::Index t = 0; t < tokens; ++t) {
    for (lm::Index c = 0; c < 3 * head; ++c) {
      const bool same = y(t, c) == before(t, c);
      if (c / head == 1)
        k_kept = k_kept && same;
      else
        changed = changed || !same;
    }
  }
  return changed && k_kept;
}

}  // namespace

int main() {
  engine::Pool pool(2);
  const std::filesystem::path file = std::filesystem::temp_directory_path() / "loramix-engine-example.safetensors";
  write_adapter(file.c_str());
  const double layer = one_layer(pool, file.c_str()), parallel = tensor_parallel(pool, file.c_str());
  const bool fused = fused_qkv(pool);
  std::filesystem::remove(file);
  std::printf("largest error: layer %.1e, tensor parallel %.1e; fused qkv %s\n", layer, parallel,
              fused ? "ok" : "WRONG");
  return layer < 1e-4 && parallel < 1e-4 && fused ? 0 : 1;
}

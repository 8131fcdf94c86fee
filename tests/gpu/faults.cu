// Bad input: what the host can see is refused before anything is launched; what only the device can see contributes
// nothing and sets a flag.
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/more.hpp>
#include <loramix/gate/gates.hpp>

#include "conformance/harness.hpp"
#include "gpu/harness.cuh"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;
constexpr Index tokens = 4, experts = 3, rank = 2, ranks = experts * rank, width = 5;

using Form = lm::GateForm<float, device>;
using Expand = lm::Expand<float, float, float, float, device, lm::Major::column>;
using Backward = lm::ExpandBackward<float, float, float, float, float, device, lm::Major::column>;

std::vector<float> counting(Index n) {
  std::vector<float> values(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 0.25f * static_cast<float>(i % 7 + 1);
  return values;
}

struct Results {
  std::vector<float> y, du, id_weights;
};

/// y = (u ∘ g) Bᵀ and its backward, for a form over four tokens.
Results run_form(GpuHarness& gpu, const Form& form) {
  Results r{std::vector<float>(tokens * width), std::vector<float>(tokens * ranks),
            std::vector<float>(static_cast<std::size_t>(form.ids.rows * form.ids.cols))};
  const lm::MatrixView<const float, device> u{gpu.upload(counting(tokens * ranks)), tokens, ranks};
  const lm::MatrixView<const float, device, lm::Major::column> B{gpu.upload(counting(width * ranks)), width, ranks};
  float* const y = gpu.upload(r.y);
  float* const du = gpu.upload(r.du);
  float* const id_weights = gpu.upload(r.id_weights);
  run(gpu, Expand{u, form, B, 1.0f, {y, tokens, width}, lm::Into::set});
  Backward backward{u, form, B, 1.0f, {gpu.upload(counting(tokens * width)), tokens, width}, {du, tokens, ranks}};
  if (form.id_weights.data != nullptr) backward.dgate.id_weights = {id_weights, form.ids.rows, form.ids.cols};
  run(gpu, backward);
  gpu.download(y, r.y);
  gpu.download(du, r.du);
  gpu.download(id_weights, r.id_weights);
  return r;
}

/// Two experts of three for every token.
Form top_2(GpuHarness& gpu, const std::vector<std::int32_t>& ids) {
  const lm::MatrixView<const std::int32_t, device> id_view{gpu.upload(ids), tokens, 2};
  const lm::MatrixView<const float, device> weights{gpu.upload(counting(tokens * 2)), tokens, 2};
  return lm::TopKExperts<float, device>{id_view, weights, experts}.form(tokens, ranks);
}

void check_same(const Results& got, const Results& want) {
  CHECK(got.y == want.y);
  CHECK(got.du == want.du);
  CHECK(got.id_weights == want.id_weights);
}

}  // namespace

TEST_CASE("a bad expert id contributes nothing and sets its flag") {
  GpuHarness gpu;
  const Results good = run_form(gpu, top_2(gpu, {0, 1, 2, -1, -1, 0, 1, -1}));
  CHECK(gpu.flags().bad_expert_id == 0);
  CHECK(good.y[0] != 0);

  const std::vector<std::vector<std::int32_t>> bad{
      {0, 1, 2, 3, -1, 0, 1, -1},  // one too many
      {0, 1, 2, -2, INT32_MIN, 0, 1, INT32_MAX},
      {0, 1, 2, 2, -1, 0, 1, 1},  // twice
  };
  for (const auto& ids : bad) {
    check_same(run_form(gpu, top_2(gpu, ids)), good);
    CHECK(gpu.flags().bad_expert_id == 1);
    CHECK(gpu.flags().bad_group_id == 0);
    gpu.clear_flags();
  }
  CHECK(gpu.release());
}

TEST_CASE("a bad group contributes nothing and sets its flag") {
  GpuHarness gpu;
  using Groups = lm::Groups<device>;
  const float* const scale = gpu.upload(std::vector<float>{2, 3});
  const auto by = [&](const Groups& groups) {
    return lm::Multiplier<float, device>{{scale, 2}, groups}.form(tokens, ranks);
  };
  const auto ids = [&](std::vector<std::int32_t> values) { return by(Groups::by_id(gpu.upload(values), 2)); };
  const auto segments = [&](std::vector<Index> values) { return by(Groups::by_segment(gpu.upload(values), 2)); };

  const Results good = run_form(gpu, ids({0, 1, -1, -1}));
  CHECK(gpu.flags().bad_group_id == 0);
  check_same(run_form(gpu, ids({0, 1, 2, INT32_MIN})), good);
  CHECK(gpu.flags().bad_group_id == 1);
  gpu.clear_flags();
  check_same(run_form(gpu, segments({0, 1, 2})), good);  // tokens 2 and 3 are left out
  CHECK(gpu.flags().bad_group_id == 1);
  gpu.clear_flags();

  const Results all = run_form(gpu, segments({0, 1, 4}));
  CHECK(gpu.flags().bad_group_id == 0);
  CHECK(all.y[0] == good.y[0]);
  CHECK(all.y[3 * width] != 0);
  CHECK(gpu.release());
}

TEST_CASE("a task there is not contributes nothing, and says so") {
  GpuHarness gpu;
  const lm::gpu::Backend be = gpu.backend();
  lm::More<float, device> more({.d_in = width, .d_out = width, .tasks = 3, .rank = 2});
  lm::gpu::copy(lm::VectorView<const float>(counting(more.parameters().size).data(), more.parameters().size),
                more.parameters());
  const lm::MatrixView<float, device> x{gpu.upload(counting(tokens * width)), tokens, width};
  std::vector<float> y(tokens * width, 1.0f);
  float* const memory = gpu.upload(y);
  const auto tasks = lm::Groups<device>::by_id(gpu.upload(std::vector<std::int32_t>{0, 2, 7, -1}), 3);
  lm::forward(be, more, x, {memory, tokens, width}, gpu.arena(lm::workspace_bytes(be, more, tokens)), {.tasks = tasks});
  gpu.download(memory, y);
  for (Index t = 0; t < tokens; ++t) {
    for (Index o = 0; o < width; ++o) CHECK((y[static_cast<std::size_t>(t * width + o)] != 1) == (t < 2));
  }
  CHECK(gpu.flags().bad_group_id != 0);
  gpu.clear_flags();
  CHECK(gpu.release());
}

TEST_CASE("without a status bad ids are still harmless") {
  GpuHarness gpu;
  lm::gpu::Backend be = gpu.backend();
  be.status = nullptr;
  const Form form = top_2(gpu, {0, 1, 2, 7, -9, 0, 1, -1});
  const lm::MatrixView<const float, device> u{gpu.upload(counting(tokens * ranks)), tokens, ranks};
  const lm::MatrixView<const float, device, lm::Major::column> B{gpu.upload(counting(width * ranks)), width, ranks};
  const Expand op{u, form, B, 1.0f, {gpu.upload(counting(tokens * width)), tokens, width}, lm::Into::set};
  lm::execute(be, op, gpu.arena(lm::scratch_bytes(be, op)));
  CHECK(gpu.release());
}

TEST_CASE("what the host sees is refused and y stays as it was") {
  GpuHarness gpu;
  gpu.tuning.fused = false;  // the path that takes scratch and cuBLAS
  std::vector<float> y = counting(tokens * width);
  float* const memory = gpu.upload(y);
  const Expand good{{gpu.upload(counting(tokens * ranks)), tokens, ranks},
                    lm::OpenGate<float, device>{}.form(tokens, ranks),
                    {gpu.upload(counting(width * ranks)), width, ranks},
                    1.0f,
                    {memory, tokens, width},
                    lm::Into::add};
  const Index bytes = lm::scratch_bytes(gpu.backend(), good);
  const lm::Arena<device> work = gpu.arena(bytes);
  const auto error = [&](const Expand& op, lm::Arena<device> arena) {
    return error_of([&] { lm::execute(gpu.backend(), op, arena); });
  };

  Expand bad = good;
  bad.y.cols = width - 1;
  CHECK(error(bad, work) == "loramix: expand: y has columns 4, but d_out of B is 5");
  bad = good;
  bad.u.stride = ranks - 1;
  CHECK(error(bad, work).find("stride") != std::string::npos);
  bad = good;
  bad.B.data = nullptr;
  CHECK(error(bad, work).find("B of size [5, 6] has a null address") != std::string::npos);
  bad = good;
  bad.y.data = const_cast<float*>(good.u.data);
  CHECK(error(bad, work).find("shares memory with u") != std::string::npos);
  const std::string small = error(good, lm::Arena<device>(work.memory(), bytes - 64));
  CHECK(small.find("are needed: 64 too few") != std::string::npos);

  lm::gpu::Backend be = gpu.backend();
  be.cublas = nullptr;
  CHECK(error_of([&] { lm::execute(be, good, work); }).find("failed: CUBLAS_STATUS_NOT_INITIALIZED") !=
        std::string::npos);

  std::vector<float> after(y.size());
  gpu.download(memory, after);
  CHECK(after == y);
  CHECK(error(good, work) == "");
  be.tuning.fused = true;
  CHECK(error_of([&] { lm::execute(be, good, work); }) == "");  // needs no cuBLAS
  CHECK(gpu.release());
}

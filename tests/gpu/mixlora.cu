// The MixLoRA block on the device: the CPU's values, gradients and choices, the same bits from a graph, and bad ids.
#include <cmath>
#include <random>

#include <loramix/gpu/adapter.cuh>

#include "gpu/captured.cuh"
#include "gpu/mixlora_step.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

std::vector<float> draw(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = static_cast<float>(random() >> 40) * 0x1p-23f - 1;
  return values;
}

MixLoraStep draw_step(Index k, double capacity) {
  using S = MixLoraStep;
  const Index size = lm::MixLora<float>(S::config(k, capacity)).parameters().size;
  return {k,
          capacity,
          draw(size, 501),
          draw(S::tokens * S::d_in, 502),
          draw(S::tokens * S::d_hidden, 503),
          draw(S::tokens * S::d_hidden, 504),
          draw(S::tokens * S::d_out, 505),
          draw(S::tokens * S::d_hidden, 506)};
}

/// Sums of at most a few dozen products of size 1 to 4, in another order and through another exp.
void check_close(const char* what, const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  REQUIRE(got.size() == want.size());
  float largest = 0, difference = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    largest = std::fmax(largest, std::fabs(want[i]));
    difference = std::fmax(difference, got[i] == got[i] ? std::fabs(got[i] - want[i]) : INFINITY);
  }
  CAPTURE(std::string(what));
  CHECK(largest > 0);
  CHECK(difference <= tolerance * largest);
}

/// Activations X on float parameters.
template <class X>
class OnDevice {
 public:
  using Adapter = lm::MixLora<lm::Precision<X, float>, device>;
  using S = MixLoraStep;

  OnDevice(GpuHarness& gpu, const MixLoraStep& step)
      : gpu_(gpu), mix_(S::config(step.k, step.capacity)), grad_(lm::zeros_like(mix_)) {
    lm::gpu::copy(lm::VectorView<const float>(step.parameters.data(), mix_.parameters().size), mix_.parameters());
    at_ = {{put(step.x), S::tokens, S::d_in},
           {put(step.u), S::tokens, S::d_hidden},
           {put(step.v), S::tokens, S::d_hidden},
           {put(step.dy), S::tokens, S::d_out},
           {put(step.dhbar), S::tokens, S::d_hidden},
           room(S::d_out),
           room(S::d_hidden),
           room(S::d_in),
           room(S::d_hidden),
           room(S::d_hidden)};
    const lm::gpu::Backend be = gpu.backend();
    const Index there = lm::workspace_bytes(be, mix_, S::tokens);
    const Index back = lm::workspace_bytes(be, mix_, S::tokens, lm::Pass::backward);
    work_ = gpu.arena(there > back ? there : back);
    reserve_ = gpu.arena(lm::reserve_bytes(mix_, S::tokens));
  }
  /// Enqueues the step; everything is assigned.
  void run() {
    reserve_.reset();
    ids_ = run_mix_lora(gpu_.backend(), mix_, grad_, at_, reserve_, work_);
  }
  MixLoraResults results() {
    MixLoraResults r{get(at_.y), get(at_.hbar), get(at_.dx), get(at_.du), get(at_.dv), {}, {}};
    r.ids.resize(static_cast<std::size_t>(ids_.rows * ids_.cols));
    gpu_.download(ids_.data, r.ids);
    r.gradient.resize(static_cast<std::size_t>(grad_.parameters().size));
    gpu_.download(grad_.parameters().data, r.gradient);
    return r;
  }

 private:
  X* put(const std::vector<float>& from) {
    std::vector<X> values(from.size());
    for (std::size_t i = 0; i < from.size(); ++i) values[i] = lm::narrow<X>(from[i]);
    return gpu_.upload(values);
  }
  lm::MatrixView<X, device> room(Index cols) {
    return {put(std::vector<float>(static_cast<std::size_t>(S::tokens * cols), NAN)), S::tokens, cols};
  }
  std::vector<float> get(lm::MatrixView<X, device> from) {
    std::vector<X> values(static_cast<std::size_t>(from.rows * from.cols));
    gpu_.download(from.data, values);
    std::vector<float> out(values.size());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = lm::widen<float>(values[i]);
    return out;
  }

  GpuHarness& gpu_;
  Adapter mix_;
  lm::gradient_t<Adapter> grad_;
  MixLoraViews<device, X> at_;
  lm::Arena<device> work_, reserve_;
  lm::MatrixView<std::int32_t, device> ids_;
};

template <class X>
void check_block(Index k, double capacity, float tolerance) {
  CAPTURE(k);
  GpuHarness gpu;
  const MixLoraStep step = draw_step(k, capacity);
  const MixLoraResults want = mix_lora_on_host(step);
  OnDevice<X> there(gpu, step);
  there.run();
  const MixLoraResults got = there.results();
  if (tolerance < 1e-3f) CHECK(got.ids == want.ids);
  check_close("h̄", got.hbar, want.hbar, tolerance);
  check_close("y", got.y, want.y, tolerance);
  check_close("du", got.du, want.du, tolerance);
  check_close("dv", got.dv, want.dv, tolerance);
  check_close("dx", got.dx, want.dx, tolerance);
  check_close("gradient", got.gradient, want.gradient, tolerance);

  const Graph graph(gpu.stream(), [&] { there.run(); });
  graph.launch(gpu.stream());
  CHECK(there.results() == got);
  CHECK(gpu.release());
}

}  // namespace

TEST_CASE("the MixLoRA block on the device is the host's, directly and in a graph") {
  check_block<float>(1, 0, 3e-5f);
  check_block<float>(2, 0, 3e-5f);
  check_block<float>(2, 0.5, 3e-5f);  // most choices dropped
}

TEST_CASE("a MixLoRA block with bfloat16 activations") { check_block<lm::bfloat16>(3, 0, 0.06f); }

TEST_CASE("a bad expert id and what experts that are off hold contribute nothing to the block") {
  GpuHarness gpu;
  const lm::gpu::Backend be = gpu.backend();
  constexpr Index T = 3, ff = 5, R = 4;
  const auto matrix = [&](Index rows, Index cols, float value) {
    return lm::MatrixView<float, device>{gpu.upload(std::vector<float>(static_cast<std::size_t>(rows * cols), value)),
                                         rows, cols};
  };
  const std::int32_t* const ids = gpu.upload(std::vector<std::int32_t>{0, 7, -1});
  const auto weights = matrix(T, 1, 1), hbar = matrix(T, ff, NAN), z2 = matrix(T, R, NAN);
  std::vector<float> open(T * R, NAN);
  open[0] = open[1] = 1;
  const lm::MatrixView<float, device> z1{gpu.upload(open), T, R}, z3{gpu.upload(open), T, R};
  const auto gate = lm::TopKExperts<float, device>{{ids, T, 1}, weights, 2}.form(T, R);
  const auto u = matrix(T, ff, 1), v = matrix(T, ff, 1), B1 = matrix(ff, R, 1), B3 = matrix(ff, R, 1);
  const auto A2 = matrix(R, ff, 1), dB1 = matrix(ff, R, NAN), dB3 = matrix(ff, R, NAN), dA2 = matrix(R, ff, NAN);
  const lm::MixExperts<float, float, float, float, device, lm::Major::row> op{z1, z3,   u, v,  B1,   B3,
                                                                              A2, gate, 1, {}, hbar, z2};
  const lm::MixExpertsBackward<float, float, float, float, float, device, lm::Major::row> back{z1,
                                                                                               z3,
                                                                                               u,
                                                                                               v,
                                                                                               B1,
                                                                                               B3,
                                                                                               A2,
                                                                                               gate,
                                                                                               1,
                                                                                               {},
                                                                                               matrix(T, ff, 1),
                                                                                               z3,
                                                                                               matrix(T, ff, NAN),
                                                                                               matrix(T, ff, NAN),
                                                                                               matrix(T, R, NAN),
                                                                                               matrix(T, R, NAN),
                                                                                               matrix(T, 1, NAN),
                                                                                               dB1,
                                                                                               dB3,
                                                                                               dA2,
                                                                                               lm::Into::set};
  lm::execute(be, op, gpu.arena(lm::scratch_bytes(be, op)));
  std::vector<float> h(T * ff), z(T * R);
  gpu.download(hbar.data, h);
  gpu.download(z2.data, z);
  const float t = 3, want = t / (1 + std::exp(-t)) * t;
  CHECK(h[0] == doctest::Approx(want));
  CHECK(z[0] == doctest::Approx(5 * want));
  CHECK(z[2] == 0);  // the other expert
  for (std::size_t i = ff; i < h.size(); ++i) CHECK(h[i] == 0);
  for (std::size_t i = R; i < z.size(); ++i) CHECK(z[i] == 0);
  lm::execute(be, back, gpu.arena(lm::scratch_bytes(be, back)));
  for (const auto view : {dB1, dB3, dA2, lm::MatrixView<float, device>(back.dz1), back.dz3, back.du, back.dweights}) {
    std::vector<float> values(static_cast<std::size_t>(view.rows * view.cols));
    gpu.download(view.data, values);
    CHECK(values[0] != 0);
    for (const float value : values) CHECK(value - value == 0);
  }
  CHECK(gpu.flags().bad_expert_id != 0);
  gpu.clear_flags();
  CHECK(gpu.release());
}

// Every adapter of the list on the device, in all its forms: values and gradients of the CPU within bounds that an error
// analysis of the same computation gives, its masks and choices bit for bit, captured and replayed, and nothing allocated
// or waited for inside.
#include <map>

#include "gpu/suite_step.hpp"
#include "reference/tracked.hpp"
#include "suite/trial.hpp"

namespace loramix_test {
namespace {

const std::vector<DeviceRun>& all_device_runs() {
  static const std::vector<DeviceRun> all = []<std::size_t... K>(std::index_sequence<K...>) {
    std::vector<DeviceRun> runs;
    for (auto part_k : {&device_part<K>...}) {
      for (const DeviceRun& run : part_k()) runs.push_back(run);
    }
    return runs;
  }
  (std::make_index_sequence<device_parts>());
  return all;
}
template <class T>
const Maker<T>& maker(const std::string& name) {
  for (const Maker<T>& make : all_subjects<T>()) {
    if (make.name == name) return make;
  }
  FAIL(name, " is not on the host");
  return all_subjects<T>().front();
}

/// The step of a trial whose forward has saved; `with_losses`: random gradients for its scores.
DeviceStep step_of(Trial<float>& trial, bool with_losses) {
  const auto flat = trial.subject->flat();
  const auto values = [](lm::Matrix<float>& m) { return std::vector<float>(m.data(), m.data() + m.rows() * m.cols()); };
  DeviceStep step{trial.tokens,
                  trial.dy.rows(),
                  {flat.data, flat.data + flat.size},
                  values(trial.x),
                  values(trial.dy),
                  {},
                  {},
                  {},
                  trial.told.tasks,
                  trial.told.labels,
                  {},
                  trial.told.valid};
  step.offsets.assign(trial.told.offsets.begin(), trial.told.offsets.end());
  for (const Tensor<float>& w : trial.subject->frozen()) step.frozen.push_back({w.data, w.data + w.size()});
  const lm::Key& key = Trial<float>::key;
  step.seed = key.seed, step.site = key.site, step.step = key.step, step.first_token = key.first_token;
  const Seen<float> seen = trial.subject->scores();
  for (Index r = 0; with_losses && seen.dp.data != nullptr && r < seen.p.rows; ++r) {
    for (Index e = 0; e < seen.p.cols; ++e) {
      const bool counts = seen.valid.data == nullptr || seen.valid[r] != 0;
      step.dp.push_back(counts ? static_cast<float>(trial.uniform()) : 0.0f);
      step.dlogits.push_back(counts ? static_cast<float>(trial.uniform()) : 0.0f);
    }
  }
  return step;
}

/// y, dx and the gradient of a step on the host.
template <class T>
struct Results {
  lm::Matrix<T> y, dx;
  std::vector<T> gradient;
  std::vector<std::int32_t> ids;
};
template <class T>
Results<T> on_host(Trial<T>& trial, const DeviceStep& step) {
  Results<T> r{trial.new_y(), trial.new_dx(), {}, {}};
  trial.fill_gradient(0);
  trial.saving(r.y, trial.call());
  const Seen<T> seen = trial.subject->scores();
  r.ids.assign(seen.ids.data, seen.ids.data + seen.ids.rows * seen.ids.cols);
  std::size_t next = 0;
  for (Index i = 0; i < static_cast<Index>(step.dp.size()); ++i, ++next) {
    seen.dp(i / seen.p.cols, i % seen.p.cols) += static_cast<T>(step.dp[next]);
    seen.dlogits(i / seen.p.cols, i % seen.p.cols) += static_cast<T>(step.dlogits[next]);
  }
  trial.backward(r.dx);
  r.gradient = trial.gradient();
  return r;
}

/// Within the bound of every element; constants of a configuration may be rounded once more on the way.
void check_close(const char* what, const std::vector<float>& got, const Tracked* want, std::size_t n) {
  REQUIRE(got.size() == n);
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double bound = Tracked(want[i].value, want[i].absolute, want[i].depth + 4).bound(0x1p-24);
    const double error = std::abs(static_cast<double>(got[i]) - want[i].value);
    if (!(error <= worst * bound)) worst = bound > 0 ? error / bound : INFINITY, at = i;
  }
  CHECK_MESSAGE(worst <= 1, what, "[", at, "]: ", got[at], " for ", want[at].value, ", ", worst, " of the bound");
}

/// A trial in which no choice is close, unless it is a tie.
Trial<float> clear_trial(const Maker<float>& make, Index tokens, std::uint64_t* site) {
  for (*site = 0; *site < 1000; ++*site) {
    Trial<float> trial(make, tokens, 6000 + *site);
    lm::Matrix<float> y = trial.new_y();
    trial.saving(y, trial.call());
    if (trial.subject->clear_choices()) return trial;
  }
  FAIL("no batch with clear choices");
  return Trial<float>(make, tokens);
}

}  // namespace

TEST_CASE("suite on the device: the CPU's values, gradients and choices; captured, replayed, nothing waited for") {
  CHECK(all_device_runs().size() + 2 == all_subjects<float>().size());  // all but what is served, in two forms
  for (const DeviceRun& device : all_device_runs()) {
    CAPTURE(device.name);
    std::uint64_t site = 0;
    Trial<float> trial = clear_trial(maker<float>(device.name), 13, &site);
    DeviceStep step = step_of(trial, true);
    Trial<Tracked> exact(maker<Tracked>(device.name), 13, 6000 + site);
    const Results<float> host = on_host(trial, step);
    const Results<Tracked> want = on_host(exact, step);
    for (const bool composed : {false, true}) {
      if (composed && device.form != 0) continue;
      CAPTURE(composed);
      step.composed = composed;
      const DeviceResults got = device.run(step, device.form);
      check_close("y", got.y, want.y.data(), static_cast<std::size_t>(want.y.rows() * want.y.cols()));
      check_close("dx", got.dx, want.dx.data(), static_cast<std::size_t>(want.dx.rows() * want.dx.cols()));
      check_close("gradient", got.gradient, want.gradient.data(), want.gradient.size());
      CHECK(got.ids == host.ids);
      CHECK(got.ids == want.ids);
      CHECK(got.same_bits_replayed);
      CHECK(got.forbidden == 0);
      CHECK(got.clean);
    }
  }
}

TEST_CASE("suite on the device: masks are the CPU's, bit for bit") {
  for (const DeviceRun& device : all_device_runs()) {
    if (device.form != 0) continue;
    CAPTURE(device.name);
    Trial<float> trial(maker<float>(device.name), 13);
    if (!trial.subject->draws) continue;
    // Without router and base dx goes through the mask alone: it is 0 where x was dropped, and nowhere else.
    const auto zero = [](const Tensor<float>& tensor) { std::fill(tensor.data, tensor.data + tensor.size(), 0.0f); };
    for (const Tensor<float>& p : trial.subject->parameters()) {
      if (p.group == lm::group::router.name) zero(p);
    }
    for (const Tensor<float>& w : trial.subject->frozen()) zero(w);
    lm::Matrix<float> y = trial.new_y();
    trial.saving(y, trial.call());
    const DeviceStep step = step_of(trial, false);
    const Results<float> want = on_host(trial, step);
    const DeviceResults got = device.run(step, device.form);
    Index dropped = 0;
    for (std::size_t i = 0; i < got.dx.size(); ++i) {
      CHECK((got.dx[i] == 0) == (want.dx.data()[i] == 0));
      dropped += got.dx[i] == 0;
    }
    CHECK(dropped > 20);
  }
}

TEST_CASE("suite on the device: choices at exact ties are the CPU's") {
  int routers = 0;
  for (const DeviceRun& device : all_device_runs()) {
    CAPTURE(device.name);
    Trial<float> trial(maker<float>(device.name), 24, 77);
    // Quarters: logits are exact, and tie or differ by 1/16 at least; every fourth token ties all of them.
    const auto coarse = [&](float* values, Index n) {
      for (Index i = 0; i < n; ++i) values[i] = static_cast<float>(static_cast<int>(trial.uniform() * 5)) / 4;
    };
    for (const Tensor<float>& p : trial.subject->parameters()) coarse(p.data, p.size());
    coarse(trial.x.data(), trial.x.rows() * trial.x.cols());
    for (Index t = 0; t < 24; t += 4) {
      for (Index i = 0; i < trial.x.cols(); ++i) trial.x(t, i) = 0;
    }
    lm::Matrix<float> y = trial.new_y();
    trial.saving(y, trial.call());
    const Seen<float> seen = trial.subject->scores();
    Index ties = 0;
    bool clear = seen.ids.data != nullptr && !seen.logits.empty() && device.name.find("noise") == std::string::npos;
    for (Index r = 0; r < seen.logits.rows && clear; ++r) {
      for (Index e = 0; e < seen.logits.cols; ++e) {
        for (Index f = 0; f < e; ++f) {
          const float gap = std::abs(seen.logits(r, e) - seen.logits(r, f));
          ties += gap == 0;
          clear = clear && (gap == 0 || gap >= 1e-3f);
        }
      }
    }
    if (!clear) continue;  // no choices, or noise
    ++routers;
    const DeviceStep step = step_of(trial, false);
    const Results<float> want = on_host(trial, step);
    CHECK(ties > 0);
    CHECK(device.run(step, device.form).ids == want.ids);
  }
  CHECK(routers >= 10);
}

}  // namespace loramix_test

// Every adapter of the list on the device, in all its forms: values and gradients of the CPU within bounds that an error
// analysis of the same computation gives, its masks and choices bit for bit, captured and replayed, and nothing allocated
// or waited for inside.
#include <cmath>
#include <utility>

#include "gpu/suite_step.hpp"
#include "reference/tracked.hpp"
#include "suite/trial.hpp"

namespace loramix_test {
namespace {

template <Stored S>
std::vector<DeviceRun> all_device_runs() {
  return []<std::size_t... K>(std::index_sequence<K...>) {
    std::vector<DeviceRun> runs;
    for (auto part_k : {&device_part<S, K>...}) {
      for (const DeviceRun& run : part_k()) runs.push_back(run);
    }
    return runs;
  }
  (std::make_index_sequence<device_parts>());
}
/// The storage types of the suite, for TEST_CASE_TEMPLATE.
template <Stored S>
struct As {
  static constexpr Stored value = S;
  static constexpr bool is_16bit = S != Stored::float32;
  static constexpr double round_off = S == Stored::bfloat16 ? 0x1p-8 : S == Stored::float16 ? 0x1p-11 : 0;
  static constexpr double underflow = S == Stored::float16 ? 0x1p-25 : 0;
  static constexpr int bits = is_16bit ? 8 : 23;  // of what Trial draws
};
using Float32 = As<Stored::float32>;
using Bfloat16 = As<Stored::bfloat16>;
using Float16 = As<Stored::float16>;

/// The most factors 1 + δ, |δ| ≤ round_off, by which stores in the activations' type multiply an input on its way to a result.
/// Plain adapters store y once, and dx once by the product and once more where a pooled router or a frozen base adds to it;
/// fused slices store dx each. A router's jittered input x̃ is stored (1): g has one factor, its logits' gradient
/// p ∘ (dp − ⟨dp, p⟩) with dp = dŨ ∘ U three, the noise's slope one more, then come x̃ or two stores of dx. In a MixLoRA block u and v
/// are stored, so h = u σ(u) ∘ v has three factors, h̄ four, its base product five and y six; dh̄ has one, du = dh̄ ∘ v ∘ act′(u) five
/// and six when stored, dx nine with its three stores, and with jitter one more each for g and for x̃ in the router's part.
struct Stores {
  int y, dx, gradient;
};
inline Stores stores_of(const std::string& name) {
  const auto says = [&](const char* word) { return name.find(word) != std::string::npos; };
  if (says("mixlora")) return says("jitter") ? Stores{7, 10, 8} : Stores{6, 9, 6};
  if (says("jitter")) return {2, 6, 5};
  if (says("fused_lora")) return {1, 3, 0};
  return {1, 2, 0};
}
/// How far a result may be from `want`: `stores` factors of stores beside those of sums in float, the last one on the result itself;
/// constants of a configuration may be rounded once more on the way. Tensor cores are no worse: they truncate, 2⁻²³ at a time, but
/// once per four products at least, which depth counts one by one.
template <class S>
double bound(const Tracked& want, int stores) {
  const double computed = Tracked(want.value, want.absolute, want.depth + 4, want.carried).bound(0x1p-24);
  if (!S::is_16bit || stores == 0) return computed;
  // `carried` is the terms of what went through a function, by its slope and many times over.
  const double terms = want.absolute + want.carried + computed;
  const double before = (std::pow(1 + S::round_off, stores - 1) - 1) * terms;
  return computed + before + S::round_off * (std::abs(want.value) + computed + before) + stores * S::underflow;
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

/// Within the bound of every element.
template <class S>
void check_close(const char* what, const std::vector<float>& got, const Tracked* want, std::size_t n, int stores) {
  REQUIRE(got.size() == n);
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double allowed = bound<S>(want[i], stores), error = std::abs(static_cast<double>(got[i]) - want[i].value);
    if (!(error <= worst * allowed)) worst = allowed > 0 ? error / allowed : INFINITY, at = i;
  }
  CHECK_MESSAGE(worst <= 1, what, "[", at, "]: ", got[at], " for ", want[at].value, ", ", worst, " of the bound");
}

/// No two logits of a row are within what rounding may move them by: a jittered input is stored.
template <class S>
bool clear_of_rounding(const Seen<Tracked>& seen) {
  for (Index t = 0; S::is_16bit && seen.ids.data != nullptr && t < seen.logits.rows; ++t) {
    for (Index e = 0; e < seen.logits.cols; ++e) {
      for (Index f = 0; f < e; ++f) {
        const Tracked a = seen.logits(t, e), b = seen.logits(t, f);
        if (!(std::abs(a.value - b.value) > bound<S>(a, 1) + bound<S>(b, 1))) return false;
      }
    }
  }
  return true;
}

/// A trial in which no choice is close, unless it is a tie, and the same one tracked.
template <class S>
std::pair<Trial<float>, Trial<Tracked>> clear_trials(const std::string& name) {
  const bool stored_logits = name.find("jitter") != std::string::npos;
  for (std::uint64_t site = 6000; site < 7000; ++site) {
    Trial<float> trial(maker<float>(name), 13, site, true, S::bits);
    lm::Matrix<float> y = trial.new_y();
    trial.saving(y, trial.call());
    if (!trial.subject->clear_choices()) continue;
    Trial<Tracked> exact(maker<Tracked>(name), 13, site, true, S::bits);
    lm::Matrix<Tracked> exact_y = exact.new_y();
    exact.saving(exact_y, exact.call());
    if (!stored_logits || clear_of_rounding<S>(exact.subject->scores())) return {std::move(trial), std::move(exact)};
  }
  FAIL("no batch with clear choices");
  return {Trial<float>(maker<float>(name), 13), Trial<Tracked>(maker<Tracked>(name), 13)};
}

}  // namespace

TEST_CASE_TEMPLATE(
    "suite on the device: the CPU's values, gradients and choices; captured, replayed, nothing waited for", S, Float32,
    Bfloat16, Float16) {
  const std::vector<DeviceRun> runs = all_device_runs<S::value>();
  CHECK(runs.size() == all_subjects<float>().size());
  for (const DeviceRun& device : runs) {
    CAPTURE(device.name);
    auto [trial, exact] = clear_trials<S>(device.name);
    DeviceStep step = step_of(trial, true);
    const Results<float> host = on_host(trial, step);
    const Results<Tracked> want = on_host(exact, step);
    const Stores stores = stores_of(device.name);
    for (const bool composed : {false, true}) {
      if (composed && device.form != 0) continue;
      CAPTURE(composed);
      step.composed = composed;
      const DeviceResults got = device.run(step, device.form);
      check_close<S>("y", got.y, want.y.data(), static_cast<std::size_t>(want.y.rows() * want.y.cols()), stores.y);
      check_close<S>("dx", got.dx, want.dx.data(), static_cast<std::size_t>(want.dx.rows() * want.dx.cols()),
                     stores.dx);
      check_close<S>("gradient", got.gradient, want.gradient.data(), want.gradient.size(), stores.gradient);
      CHECK(got.ids == host.ids);
      CHECK(got.ids == want.ids);
      CHECK(got.same_bits_replayed);
      CHECK(got.forbidden == 0);
      CHECK(got.clean);
    }
  }
}

TEST_CASE_TEMPLATE("suite on the device: masks are the CPU's, bit for bit", S, Float32, Bfloat16, Float16) {
  for (const DeviceRun& device : all_device_runs<S::value>()) {
    if (device.form != 0) continue;
    CAPTURE(device.name);
    Trial<float> trial(maker<float>(device.name), 13, 0, true, S::bits);
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

TEST_CASE_TEMPLATE("suite on the device: choices at exact ties are the CPU's", S, Float32, Bfloat16, Float16) {
  int routers = 0;
  for (const DeviceRun& device : all_device_runs<S::value>()) {
    CAPTURE(device.name);
    if (S::is_16bit && device.name.find("jitter") != std::string::npos) continue;  // its input is rounded: no ties
    Trial<float> trial(maker<float>(device.name), 24, 77, true, S::bits);
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

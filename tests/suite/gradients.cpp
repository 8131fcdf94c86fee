// Every gradient of every adapter, in all its forms, against finite differences in double: dropout 0.5, padding, and losses on
// the router's probabilities and logits, under the bounds of MATH.md section 6.
#include <loramix/train/gradient_check.hpp>

#include "suite/trial.hpp"

namespace loramix_test {
namespace {

using Losses = std::vector<double>;  // weights of p, then of the logits

/// Σ dy∘y + Σ c∘(p, logits) over the rows that count.
double loss_of(const lm::Matrix<double>& dy, const lm::Matrix<double>& y, const Seen<double>& seen, const Losses& c) {
  double loss = 0;
  for (Index i = 0; i < y.rows() * y.cols(); ++i) loss += dy.data()[i] * y.data()[i];
  std::size_t next = 0;
  for (Index r = 0; r < seen.p.rows && !c.empty(); ++r) {
    for (Index e = 0; e < seen.p.cols; ++e, next += 2) {
      loss += c[next] * seen.p(r, e) + c[next + 1] * seen.logits(r, e);
    }
  }
  return loss;
}

/// Draws the losses and does what a loss does; rows that are padding get nothing.
Losses add_losses(const Seen<double>& seen, Uniform& uniform) {
  Losses c;
  for (Index r = 0; r < seen.p.rows && seen.dp.data != nullptr; ++r) {
    for (Index e = 0; e < seen.p.cols; ++e) {
      const double on = seen.valid.data == nullptr || seen.valid[r] != 0 ? 1 : 0;
      c.push_back(on * uniform());
      c.push_back(on * uniform());
      seen.dp(r, e) += c[c.size() - 2];
      seen.dlogits(r, e) += c.back();
    }
  }
  return c;
}

/// x too, or only the parameters.
lm::GradientReport check(Trial<double>& trial, lm::Keep keep, bool of_x = true) {
  Subject<double>& subject = *trial.subject;
  lm::Matrix<double> y = trial.new_y(), dx = trial.new_dx();
  Call how = trial.call();
  how.keep = keep;
  trial.saving(y, how);
  const Losses losses = add_losses(subject.scores(), trial.uniform);
  trial.backward(dx);
  const lm::Matrix<double> claimed_dx = dx;
  const std::vector<double> claimed = trial.gradient();

  how.keep = lm::Keep::z;
  how.into = lm::Into::set;
  trial.saving(y, how);
  subject.remember(trial.told);
  std::vector<lm::GradientClaim> claims;
  const Index values = dx.rows() * dx.cols();
  if (of_x) claims.push_back({"x", {trial.x.data(), values}, {claimed_dx.data(), values}});
  const auto parameters = subject.parameters(), gradients = subject.gradient();
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const auto offset = gradients[i].data - subject.flat_gradient().data;
    claims.push_back({parameters[i].name.c_str(),
                      {parameters[i].data, parameters[i].size()},
                      {claimed.data() + offset, parameters[i].size()}});
  }
  return lm::gradient_check(claims, [&] {
    trial.saving(y, how);
    subject.hold(y, trial.told);
    return loss_of(trial.dy, y, subject.scores(), losses);
  });
}

/// A trial whose choices are no closer calls than differences can bear.
Trial<double> clear_trial(const Maker<double>& make, Index tokens) {
  for (std::uint64_t site = 0; site < 1000; ++site) {
    Trial<double> trial(make, tokens, 3000 + site);
    lm::Matrix<double> y = trial.new_y();
    trial.saving(y, trial.call());
    if (trial.subject->clear_choices()) return trial;
  }
  FAIL("no batch with clear choices");
  return Trial<double>(make, tokens);
}

void check_report(const Trial<double>& trial, const lm::GradientReport& report) {
  for (const lm::CheckedTensor& tensor : report.tensors) {
    CHECK_MESSAGE(tensor.ok, report.text());
    const bool silent = tensor.name == trial.subject->silent || trial.is_empty(tensor.name);
    CHECK_MESSAGE((tensor.norm > 0) != silent, tensor.name);
  }
}

}  // namespace

TEST_CASE("suite: every gradient of every adapter equals finite differences") {
  for_every_subject<double>([](const Maker<double>& make) {
    if (!make()->differences) return;
    for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
      Trial<double> trial = clear_trial(make, 7);
      check_report(trial, check(trial, keep));
    }
  });
}

TEST_CASE("suite: gradients of parameters, of more tokens than a tile has, equal finite differences") {
  for_every_subject<double>([](const Maker<double>& make) {
    if (make.form != 0 || make.name.rfind("mola", 0) == 0 || make.name.rfind("mixlora", 0) == 0) return;
    Trial<double> trial(make, 66);  // top-k of 66 tokens has close calls: its tiles are those of the others
    check_report(trial, check(trial, lm::Keep::z, false));
  });
}

}  // namespace loramix_test

/// Learning rates as functions of the step: warm-up, then a line or half a cosine down to `floor`.
///
/// Computes:    step < warmup:          base·(step + 1)/warmup, so that the first step already learns
///              warmup ≤ step < total:  floor + (base − floor)·f(p), p = (step − warmup)/(total − warmup),
///                                      f(p) = 1 − p, or (1 + cos πp)/2 (Loshchilov & Hutter 2017, eq. 5)
///              step ≥ total:           floor
/// Parameters:  step, counted from 0; base at the end of the warm-up; warmup and total in steps, total with the warm-up.
/// Errors:      step or warmup below 0, total below warmup or below 1 (forgotten).
/// Cost:        a few flop.
/// Determinism: a pure function; the cosine is the C library's.
/// Example:     tests/train/schedule.cpp:  lm::CosineSchedule lr{.base = 2e-4, .warmup = 100, .total = 5000};
///                                         opt.lr(lr(step));
#pragma once
#include <cmath>

#include <loramix/core/check.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
template <class Fall>
double scheduled(const char* op, double base, double floor, Index warmup, Index total, Index step, const Fall& fall) {
  check::at_least(op, "step", step, 0);
  check::at_least(op, "warmup", warmup, 0);
  check::at_least(op, "total", total, warmup > 1 ? warmup : 1);
  if (step < warmup) return base * (static_cast<double>(step + 1) / static_cast<double>(warmup));
  if (step >= total) return floor;
  return floor + (base - floor) * fall(static_cast<double>(step - warmup) / static_cast<double>(total - warmup));
}
}  // namespace detail

/// Warm-up, then a line.
struct LinearSchedule {
  double base = 0;
  Index warmup = 0;
  Index total = 0;
  double floor = 0;

  double operator()(Index step) const {
    return detail::scheduled("LinearSchedule", base, floor, warmup, total, step, [](double p) { return 1 - p; });
  }
};

/// Warm-up, then half a cosine.
struct CosineSchedule {
  double base = 0;
  Index warmup = 0;
  Index total = 0;
  double floor = 0;

  double operator()(Index step) const {
    return detail::scheduled("CosineSchedule", base, floor, warmup, total, step,
                             [](double p) { return 0.5 * (1 + std::cos(3.14159265358979323846 * p)); });
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix

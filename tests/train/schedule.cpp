// Schedules at their corners and between them.
#include <loramix/train/schedule.hpp>

#include "core/caught.hpp"
#include "train/support.hpp"

using namespace loramix_test;

TEST_CASE_TEMPLATE("warm-up, peak, end", Schedule, lm::LinearSchedule, lm::CosineSchedule) {
  const Schedule lr{.base = 2e-3, .warmup = 4, .total = 12};
  CHECK(lr(0) == 2e-3 / 4);
  CHECK(lr(1) == 2e-3 / 2);
  CHECK(lr(3) == 2e-3);
  CHECK(lr(4) == 2e-3);
  CHECK(lr(5) < 2e-3);
  CHECK(lr(8) == doctest::Approx(1e-3));  // halfway, both
  CHECK(lr(11) > 0);
  CHECK(lr(12) == 0);
  CHECK(lr(1000) == 0);
  for (Index step = 4; step < 12; ++step) CHECK(lr(step) > lr(step + 1));
}

TEST_CASE("the line and the cosine") {
  const lm::LinearSchedule line{.base = 1, .warmup = 0, .total = 10, .floor = 0.5};
  CHECK(line(0) == 1);
  CHECK(line(3) == doctest::Approx(0.85));
  CHECK(line(9) == doctest::Approx(0.55));
  CHECK(line(10) == 0.5);
  const lm::CosineSchedule cosine{.base = 1, .warmup = 0, .total = 6, .floor = 0};
  CHECK(cosine(0) == 1);
  CHECK(cosine(2) == doctest::Approx(0.75));  // (1 + cos 60°)/2
  CHECK(cosine(4) == doctest::Approx(0.25));
  CHECK(cosine(6) == 0);
}

TEST_CASE_TEMPLATE("edges", Schedule, lm::LinearSchedule, lm::CosineSchedule) {
  CHECK(Schedule{.base = 1, .warmup = 3, .total = 3}(2) == 1);  // nothing but warm-up
  CHECK(Schedule{.base = 1, .warmup = 3, .total = 3, .floor = 0.25}(3) == 0.25);
  CHECK(Schedule{.base = 1, .warmup = 0, .total = 1}(0) == 1);
  const Index huge = Index{1} << 62;
  CHECK(Schedule{.base = 1, .warmup = 0, .total = huge}(huge / 2) == doctest::Approx(0.5));
  using lm::ErrorCode;
  check_error(ErrorCode::value, {"total", "at least 1"},
              [] { Schedule{.base = 1}(0); });  // forgotten: nothing would train
  check_error(ErrorCode::value, {"step", "-1"}, [] { Schedule{.base = 1, .total = 3}(-1); });
  check_error(ErrorCode::value, {"warmup"}, [] { Schedule{.base = 1, .warmup = -1, .total = 3}(0); });
  check_error(ErrorCode::value, {"total", "at least 5"}, [] { Schedule{.base = 1, .warmup = 5, .total = 3}(0); });
}

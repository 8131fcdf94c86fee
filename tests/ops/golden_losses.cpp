// Every loss and the telemetry against golden values: tests/golden/README.md.
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/losses.hpp>

#include "golden/data/losses.hpp"
#include "golden/golden.hpp"

namespace loramix_test {
namespace {

const lm::cpu::Backend<> be;

template <class T>
lm::VectorView<const T> view(const std::vector<T>& v) {
  return {v.data(), static_cast<Index>(v.size())};
}

/// The table's router: 7 tokens, two of them padding, 4 experts, 2 chosen, 3 sequences.
struct Router {
  const golden::Table table{golden::losses};
  const golden::Tensor &logits = table["logits"], &p = table["p"];
  const std::vector<std::uint8_t> valid = table["valid"].as<std::uint8_t>();
  const std::vector<Index> offsets = table["offsets"].as<Index>();
  const std::vector<std::int32_t> types = table["types"].as<std::int32_t>(),
                                  labels = table["labels"].as<std::int32_t>();
  std::vector<std::int32_t> chosen = table["chosen"].as<std::int32_t>();
  lm::Matrix<double> dp{7, 4}, dlogits{7, 4};
  std::vector<std::byte> memory = std::vector<std::byte>(1 << 16);

  lm::Scores<double, lm::Space::host> scores(Index k = 2) {
    lm::Scores<double, lm::Space::host> s{.logits = logits.view(), .p = p.view(), .dlogits = dlogits, .dp = dp};
    s.chosen = {chosen.data(), 7, k, 2};
    s.valid = view(valid);
    return s;
  }
  lm::Groups<> sequences() const { return lm::Groups<>::by_segment(offsets.data(), 3); }
  lm::Arena<> work() { return lm::Arena<>{memory}; }
  void check(const std::string& name, double value, const lm::Matrix<double>& gradient) {
    CAPTURE(name);
    golden::check("value", value, table[name + "/value"]);
    golden::check("gradient", gradient.view(), table[name + "/d"]);
  }
};

TEST_CASE("golden: balance losses") {
  const auto check = [](const char* name, lm::Balance form, Index k) {
    Router r;
    r.check(name, lm::balance_loss(be, r.scores(k), {.form = form}, r.work()), r.dp);
  };
  check("switch", lm::Balance::switch_transformer, 1);
  check("mixtral", lm::Balance::mixtral, 2);
  check("mola", lm::Balance::mola, 2);
  check("importance_cv2", lm::Balance::importance_cv2, 2);
}

TEST_CASE("golden: losses that look at sequences") {
  Router a, b;
  a.check(
      "localised",
      lm::localised_loss(be, a.scores(), {.delta = 0.25, .types = view(a.types), .sequences = a.sequences()}, a.work()),
      a.dp);
  b.check("sequence_wise", lm::sequence_balance_loss(be, b.scores(), {.sequences = b.sequences()}, b.work()), b.dp);
}

TEST_CASE("golden: losses on logits, and the squared error") {
  Router a, b, c;
  a.check("z", lm::z_loss(be, a.scores(), {}, a.work()), a.dlogits);
  b.check("cross_entropy", lm::cross_entropy_loss(be, b.logits.view(), view(b.labels), b.dlogits.view(), {}, b.work()),
          b.dlogits);
  c.check("mse",
          lm::squared_error_loss(be, c.logits.view(), c.table["target"].view(), c.dp.view(), {.valid = view(c.valid)},
                                 c.work()),
          c.dp);
}

TEST_CASE("golden: the contrastive loss") {
  const golden::Table table(golden::losses);
  const golden::Tensor &h = table["contrastive/h"], &e = table["contrastive/e"];
  const std::vector<std::int32_t> labels = table["contrastive/labels"].as<std::int32_t>();
  lm::Matrix<double> dh(h.rows, h.cols), de(e.rows, e.cols);
  std::vector<std::byte> memory(
      static_cast<std::size_t>(lm::contrastive_workspace_bytes<double>(h.rows, e.rows, h.cols)));
  const double value =
      lm::contrastive_loss(be, h.view(), e.view(), view(labels), dh.view(), de.view(), {}, lm::Arena<>{memory});
  golden::check("value", value, table["contrastive/value"]);
  golden::check("dh", dh.view(), table["contrastive/d.h"]);
  golden::check("de", de.view(), table["contrastive/d.e"]);
}

TEST_CASE("golden: the contrastive loss of sequences") {
  for (const bool mean : {false, true}) {
    Router r;
    const golden::Tensor &x = r.table["contrastive/x"], &e = r.table["contrastive/e"];
    const std::vector<std::int32_t> labels = r.table["contrastive/sequence_labels"].as<std::int32_t>();
    lm::Matrix<double> dx(x.rows, x.cols), de(e.rows, e.cols);
    const double value =
        lm::contrastive_loss(be, x.view(), e.view(), view(labels), dx.view(), de.view(),
                             {.mean = mean, .sequences = r.sequences(), .valid = view(r.valid)}, r.work());
    const std::string name = mean ? "contrastive_mean" : "contrastive_first";
    golden::check("value", value, r.table[name + "/value"]);
    golden::check("dx", dx.view(), r.table[name + "/d.x"]);
    golden::check("de", de.view(), r.table[name + "/d.e"]);
  }
}

TEST_CASE("golden: telemetry") {
  Router r;
  lm::RouterTelemetry<double> seen(4);
  lm::telemetry(be, r.scores(), seen, r.work());
  const golden::Tensor &load = r.table["telemetry/load"], &importance = r.table["telemetry/importance"];
  for (Index e = 0; e < 4; ++e) {
    CHECK(seen.load()[e] == load(0, e));
    CHECK(std::abs(seen.importance()[e] - importance(0, e)) <= 1e-10);
  }
  const double got[] = {seen.entropy(), seen.max_violation(), seen.load_cv(), seen.importance_cv()};
  golden::check("entropy, violation, CV of load, CV of importance", lm::MatrixView<const double>{got, 1, 4},
                r.table["telemetry/entropy_violation_cvload_cvimportance"]);
}

}  // namespace
}  // namespace loramix_test

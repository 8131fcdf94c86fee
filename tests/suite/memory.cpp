// What every adapter promises of memory, in float: sizes are exact and look at nothing but sizes; a step allocates nothing;
// bad input is named before anything is written.
#include "core/caught.hpp"
#include "suite/trial.hpp"
#include "support/allocations.hpp"

namespace loramix_test {
namespace {
using Y = lm::Matrix<float>;
}

TEST_CASE("suite: size queries grow with the tokens and do not look at the data") {
  for_every_subject<float>([](const Maker<float>& make) {
    const auto subject = make(), poisoned = make();
    for (const Tensor<float>& p : poisoned->parameters()) {
      for (Index i = 0; i < p.size(); ++i) p.data[i] = static_cast<float>(not_a_number);
    }
    std::vector<Index> last(4, 0);
    for (const Index tokens : {0, 1, 2, 3, 5, 17, 63, 64, 65, 128, 1000, 4096, 100000}) {
      const auto sizes = [&](const Subject<float>& s) {
        return std::vector<Index>{s.workspace_bytes(tokens, lm::Pass::forward),
                                  s.workspace_bytes(tokens, lm::Pass::backward), s.reserve_bytes(tokens),
                                  s.reserve_bytes(tokens, lm::Keep::recompute)};
      };
      const auto now = sizes(*subject);
      CHECK(now == sizes(*poisoned));
      for (std::size_t i = 0; i < last.size(); ++i) CHECK(now[i] >= last[i]);
      CHECK(now[1] >= now[0]);
      CHECK(now[3] <= now[2]);
      last = now;
    }
    check_error(lm::ErrorCode::value, {"workspace_bytes", "tokens", "-1"},
                [&] { subject->workspace_bytes(-1, lm::Pass::forward); });
  });
}

TEST_CASE("suite: memory of exactly the size asked for is enough, at any address, and less is refused") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 70);
    const Index there = trial.subject->workspace_bytes(70, lm::Pass::forward),
                back = trial.subject->workspace_bytes(70, lm::Pass::backward);
    for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
      const Index reserve = trial.subject->reserve_bytes(70, keep);
      Call how = trial.call();
      how.keep = keep;
      Y want = trial.new_y();
      trial.forward(want, how);
      for (const Index shift : {0, 1, 63}) {
        Scratch f(there, shift), b(back, shift), k(reserve, shift);
        lm::Arena<> save = k.arena();
        Y y = trial.new_y(), dx = trial.new_dx();
        trial.subject->forward(trial.x, y, trial.told, f.arena(), &save, how);
        CHECK(save.used() == (reserve == 0 ? 0 : reserve - lm::Arena<>::alignment));
        trial.subject->backward(trial.x, trial.dy, dx, b.arena());
        CHECK(same_bits(y, want));
        CHECK(f.untouched_behind());
        CHECK(b.untouched_behind());
        CHECK(k.untouched_behind());
      }
      // An aligned arena needs no byte for alignment, and then not one byte less.
      const auto less = [&](Index whole, const char* what, auto&& call) {
        if (whole == 0) return;
        Scratch enough(whole), few(whole - lm::Arena<>::alignment - 1);
        const Caught error = caught([&] { call(few.arena()); });
        CHECK_MESSAGE(error.any, what);
        for (const std::string& part : {std::string(what), std::to_string(few.size())}) {
          CHECK_MESSAGE(error.names(part), what, ": ", error.text);
        }
      };
      Y y = trial.new_y();
      less(there, "work",
           [&](lm::Arena<> arena) { trial.subject->forward(trial.x, y, trial.told, arena, nullptr, how); });
      less(reserve, "",
           [&](lm::Arena<> arena) { trial.subject->forward(trial.x, y, trial.told, trial.work.arena(), &arena, how); });
      for (Index i = 0; i < y.rows() * y.cols(); ++i) REQUIRE(y.data()[i] == 0);  // before any write
    }
  });
}

TEST_CASE("suite: after the first a step allocates nothing") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 200);
    Y y = trial.new_y(), dx = trial.new_dx();
    Call how = trial.call();
    how.threads = 2;
    const auto step = [&] {
      trial.saving(y, how);
      trial.backward(dx, {}, true, 2);
      trial.forward(y, how);
      trial.subject->workspace_bytes(200, lm::Pass::backward, 2);
    };
    step();
    const long before = allocations();
    step();
    CHECK(allocations() == before);
  });
  const long before = allocations();
  take_memory();
  CHECK(allocations() > before);  // the count counts
}

TEST_CASE("suite: errors name the operation, the argument and both sizes, before anything is written") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    Subject<float>& subject = *trial.subject;
    Y y = trial.new_y(), dx = trial.new_dx();
    fill(y, 3);
    const Y before = y;
    const auto refused = [&](std::initializer_list<std::string> parts, auto&& call) {
      const Caught error = caught(call);
      CHECK_MESSAGE(error.any, "no error");
      for (const std::string& part : parts) CHECK_MESSAGE(error.names(part), part, " is not in: ", error.text);
      CHECK(same_bits(y, before));
    };
    const auto text = [](Index n) { return std::to_string(n); };
    const lm::MatrixView<const float> x = trial.x, dy = trial.dy;
    const auto forward = [&](lm::MatrixView<const float> x_, lm::MatrixView<float> y_) {
      return [&trial, &subject, x_, y_] {
        subject.forward(x_, y_, trial.told, trial.work.arena(), nullptr, trial.call());
      };
    };
    refused({"loramix", "x", text(subject.in() - 1), text(subject.in())}, forward(x.col_range(0, subject.in() - 1), y));
    refused({"loramix", "y", text(subject.out() - 1), text(subject.out())},
            forward(x, y.view().col_range(0, subject.out() - 1)));
    refused({"loramix", "y", text(y.rows() - 1), text(y.rows())}, forward(x, y.view().row_range(0, y.rows() - 1)));
    refused({"loramix", "x", "null"}, forward({nullptr, 9, subject.in()}, y));
    refused({"loramix", "y", "null"}, forward(x, {nullptr, y.rows(), y.cols()}));

    Y saved = trial.new_y();
    if (subject.draws) {
      const Caught error = caught([&] {
        trial.saving(saved, {});
        trial.backward(dx);  // MixLoRA's block may be inference until here
      });
      CHECK_MESSAGE((error.any && error.names("key") && error.names("dropout")), error.text);
    }
    fill(saved, 0);
    trial.saving(saved, trial.call());
    const auto backward = [&](lm::MatrixView<const float> dy_, lm::MatrixView<float> dx_) {
      return [&trial, &subject, x, dy_, dx_] { subject.backward(x, dy_, dx_, trial.work.arena()); };
    };
    refused({"loramix", "dy", text(dy.rows - 1), text(dy.rows)}, backward(dy.row_range(0, dy.rows - 1), dx));
    refused({"loramix", "dy", text(dy.cols - 1), text(dy.cols)}, backward(dy.col_range(0, dy.cols - 1), dx));
    refused({"loramix", "dx", text(dx.rows() - 1), text(dx.rows())}, backward(dy, dx.view().row_range(0, 8)));
    for (Index i = 0; i < dx.rows() * dx.cols(); ++i) REQUIRE(dx.data()[i] == 0);
    for (const Tensor<float>& g : subject.gradient()) {
      for (Index i = 0; i < g.size(); ++i) REQUIRE(g.data[i] == 0);
    }
    trial.backward(dx);  // nothing was spent
  });
}

}  // namespace loramix_test

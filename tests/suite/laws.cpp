// What every adapter promises, in float: how it starts, and what changes no bit.
#include "reference/draws.hpp"
#include "suite/trial.hpp"

namespace loramix_test {
namespace {

using Y = lm::Matrix<float>;

/// y, dx and the gradient of one step.
struct Step {
  Y y, dx;
  std::vector<float> gradient;
  bool operator==(const Step& other) const {
    return same_bits(y, other.y) && same_bits(dx, other.dx) && same_bits(gradient, other.gradient);
  }
};
Step step(Trial<float>& trial, Call how) {
  Step s{trial.new_y(), trial.new_dx(), {}};
  trial.fill_gradient(0);
  trial.saving(s.y, how);
  trial.backward(s.dx, {}, true, how.threads);
  s.gradient = trial.gradient();
  return s;
}
bool all_zero(const Tensor<float>& tensor) {
  for (Index i = 0; i < tensor.size(); ++i) {
    if (!(tensor.data[i] == 0)) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("suite: at the start an adapter adds exactly nothing, and only what was 0 or a factor learns") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    if (!trial.subject->adds || trial.subject->name == "served" || trial.subject->name == "served, mixed ranks") return;
    trial.subject->start(7);
    Y y = trial.new_y(), dx = trial.new_dx();
    trial.saving(y, trial.call());
    for (Index i = 0; i < y.rows() * y.cols(); ++i) REQUIRE(y.data()[i] == 0);
    trial.backward(dx);
    const auto parameters = trial.subject->parameters(), gradient = trial.subject->gradient();
    bool any = trial.subject->silent == "x";  // rank 0: there is nothing to learn
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      any = any || !all_zero(gradient[i]);
      const bool factor = parameters[i].group == lm::group::scale.name;
      if (!factor && !all_zero(parameters[i])) CHECK_MESSAGE(all_zero(gradient[i]), parameters[i].name);
    }
    CHECK(any);
  });
}

TEST_CASE("suite: one, two and three threads, saving or not, keeping or recomputing: the same bits") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 200);
    const Step one = step(trial, trial.call());
    double largest = 0;
    for (Index i = 0; i < one.y.rows() * one.y.cols(); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(one.y.data()[i])));
    }
    CHECK((largest > 0) == (trial.subject->silent != "x"));
    for (const int threads : {1, 2, 3}) {
      for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
        Call how = trial.call();
        how.threads = threads, how.keep = keep;
        CHECK(step(trial, how) == one);
        Y inference = trial.new_y();
        trial.forward(inference, how);
        CHECK(same_bits(inference, one.y));
      }
    }
  });
}

TEST_CASE("suite: a pack gives the same bits, in no more memory") {
  for_every_subject<float>([](const Maker<float>& make) {
    for (const Index tokens : {1, 70}) {
      Trial<float> trial(make, tokens);
      Y y = trial.new_y(), packed = trial.new_y();
      trial.forward(y, trial.call());
      const Index bytes = trial.subject->forward_packed(trial.x, packed, trial.told, trial.call());
      if (bytes < 0) continue;
      CHECK(same_bits(y, packed));
      CHECK(bytes <= trial.subject->workspace_bytes(tokens, lm::Pass::forward, 1));
    }
  });
}

TEST_CASE("suite: Into::set reads nothing, and equals adding to zero") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    const Step added = step(trial, trial.call());
    Step set{trial.new_y(), trial.new_dx(), {}};
    fill(set.y, not_a_number);
    fill(set.dx, not_a_number);
    trial.fill_gradient(not_a_number);
    Call how = trial.call();
    how.into = lm::Into::set;
    if (trial.subject->name == "fused_lora, with a gap") fill(set.y, 0);  // columns of no slice are not y's business
    trial.saving(set.y, how);
    trial.backward(set.dx, {lm::Into::set, lm::Into::set});
    set.gradient = trial.gradient();
    const auto equal = [](const float* a, const float* b, Index n) {  // 0 + (−0) is 0
      for (Index i = 0; i < n; ++i) {
        if (!(a[i] == b[i])) return false;
      }
      return true;
    };
    CHECK(equal(set.y.data(), added.y.data(), added.y.rows() * added.y.cols()));
    CHECK(equal(set.dx.data(), added.dx.data(), added.dx.rows() * added.dx.cols()));
    CHECK(equal(set.gradient.data(), added.gradient.data(), static_cast<Index>(added.gradient.size())));
  });
}

TEST_CASE("suite: a frozen adapter gives the same dx, an empty dx the same gradient") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    const Step both = step(trial, trial.call());
    Step alone{trial.new_y(), trial.new_dx(), {}};
    trial.saving(alone.y, trial.call());
    trial.backward(alone.dx, {}, false);
    CHECK(same_bits(alone.dx, both.dx));
    trial.fill_gradient(0);
    fill(alone.y, 0);
    trial.saving(alone.y, trial.call());
    trial.backward({});
    CHECK(same_bits(trial.gradient(), both.gradient));
  });
}

TEST_CASE("suite: the masks are those of the counters; without a key there are none") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    Call off, on = trial.call();
    off.dropout_off = true;
    on.key.step += 1;
    const Step with = step(trial, trial.call()), other = step(trial, on), without = step(trial, off);
    if (trial.subject->silent == "x") return;
    CHECK(same_bits(with.y, other.y) == !trial.subject->draws);
    CHECK(same_bits(with.y, without.y) == !trial.subject->draws);
  });
}

TEST_CASE("suite: what is dropped is what the counters of the literal reference drop, for all experts alike") {
  std::size_t silent = 0;
  for_every_subject<float>([&silent](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    if (!trial.subject->draws || trial.subject->silent == "x") return;
    // Without router and base dx goes through the mask alone: it is 0 where x was dropped, and nowhere else.
    const auto zero = [](const Tensor<float>& tensor) { std::fill(tensor.data, tensor.data + tensor.size(), 0.0f); };
    for (const Tensor<float>& p : trial.subject->parameters()) {
      if (p.group == lm::group::router.name) zero(p);
    }
    for (const Tensor<float>& w : trial.subject->frozen()) zero(w);
    const Step s = step(trial, trial.call());
    Index rows = 0;
    for (Index t = 0; t < trial.tokens; ++t) {
      bool reached = false;
      for (Index i = 0; i < s.dx.cols(); ++i) reached = reached || s.dx(t, i) != 0;
      if (!reached) continue;  // a token of no expert
      ++rows;
      for (Index i = 0; i < s.dx.cols(); ++i) {
        const lm::Key& key = Trial<float>::key;
        const bool kept = reference::keep(key.seed, key.site, key.step, key.first_token + static_cast<std::uint64_t>(t),
                                          static_cast<int>(i), 32768);
        CHECK((s.dx(t, i) != 0) == kept);
      }
    }
    silent += rows == 0;  // a router of zeros may let nothing through
    if (rows != 0) CHECK(rows >= 4);
  });
  CHECK(silent * 8 < all_subjects<float>().size());
}

TEST_CASE("suite: adding twice to a gradient and to dx doubles them") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    const Step once = step(trial, trial.call());
    Y y = trial.new_y(), dx = trial.new_dx();
    trial.fill_gradient(0);
    for (int run = 0; run < 2; ++run) {
      trial.saving(y, trial.call());
      trial.backward(dx);
    }
    const std::vector<float> twice = trial.gradient();
    for (std::size_t i = 0; i < twice.size(); ++i) REQUIRE(twice[i] == 2 * once.gradient[i]);  // v + v is exact
    float largest = 0;
    for (Index i = 0; i < dx.rows() * dx.cols(); ++i) largest = std::max(largest, std::abs(once.dx.data()[i]));
    for (Index i = 0; i < dx.rows() * dx.cols(); ++i) {  // of two or three parts, each added: a rounding each
      REQUIRE(std::abs(dx.data()[i] - 2 * once.dx.data()[i]) <= 6 * 0x1p-24f * 2 * largest);
    }
  });
}

TEST_CASE("suite: micro-batches that say their first token are the large batch, bit for bit") {
  for_every_subject<float>([](const Maker<float>& make) {
    constexpr Index tokens = 17;  // and parts of 5, 5 and 7: one class of T (MATH.md section 6)
    Trial<float> whole(make, tokens);
    Subject<float>& subject = *whole.subject;
    if (!subject.by_token) return;
    const Step want = step(whole, whole.call());
    Y y = whole.new_y(), dx = whole.new_dx();
    whole.fill_gradient(0);
    for (const Index begin : {0, 5, 10}) {
      const Index n = begin == 10 ? 7 : 5;
      Told told(n);
      for (Index t = 0; t < n; ++t) {
        told.tasks[static_cast<std::size_t>(t)] = whole.told.tasks[static_cast<std::size_t>(begin + t)];
      }
      Call how = whole.call();
      how.key.first_token += static_cast<std::uint64_t>(begin);
      const auto x = lm::MatrixView<const float>(whole.x).row_range(begin, n);
      lm::Arena<> reserve = whole.kept.arena();
      subject.forward(x, y.view().row_range(begin, n), told, whole.work.arena(), &reserve, how);
      subject.backward(x, lm::MatrixView<const float>(whole.dy).row_range(begin, n), dx.view().row_range(begin, n),
                       whole.work.arena());
    }
    CHECK(same_bits(y, want.y));
    CHECK(same_bits(dx, want.dx));
    // Sums over 17 tokens in another order: 17 roundings of sums of absolute terms, which are below (2·13·6·11)².
    const std::vector<float> parts = whole.gradient();
    float largest = 0;
    for (const float g : want.gradient) largest = std::max(largest, std::abs(g));
    for (std::size_t i = 0; i < parts.size(); ++i) {
      CHECK(std::abs(parts[i] - want.gradient[i]) <= 17 * 0x1p-23f * 40 * largest);
    }
  });
}

TEST_CASE("suite: a batch without tokens is a batch") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 0);
    const Step none = step(trial, trial.call());
    for (const float g : none.gradient) CHECK(g == 0);
    trial.fill_gradient(not_a_number);
    Y y = trial.new_y();
    trial.saving(y, trial.call());
    trial.backward({}, {lm::Into::set, lm::Into::set});
    for (const Tensor<float>& g : trial.subject->gradient()) {
      for (Index i = 0; i < g.size() && trial.subject->adds; ++i) CHECK_MESSAGE(g.data[i] == 0, g.name);
    }
  });
}

TEST_CASE("suite: a saved step is spent by its backward, and is of one adapter only") {
  for_every_subject<float>([](const Maker<float>& make) {
    Trial<float> trial(make, 9);
    Y y = trial.new_y(), dx = trial.new_dx();
    const auto refused = [&](const std::string& what, auto&& call) {
      std::string message;
      try {
        call();
      } catch (const lm::Error& error) {
        message = error.what();
      }
      CHECK_MESSAGE(message.find("saved") != std::string::npos, what, ": ", message);
    };
    refused("nothing saved", [&] { trial.backward(dx); });
    trial.saving(y, trial.call());
    if (trial.subject->flat().size != 0) {
      const auto other = trial.subject->another();
      other->take_saved(*trial.subject);
      refused("another's", [&] { other->backward(trial.x, trial.dy, dx, trial.work.arena()); });
    }
    if (trial.subject->stamped) {
      trial.subject->backward_of_copy(trial.x, trial.dy, dx, trial.work.arena());
      refused("after a copy's", [&] { trial.backward(dx); });
      trial.saving(y, trial.call());
    }
    trial.backward(dx);
    refused("twice", [&] { trial.backward(dx); });
  });
}

TEST_CASE("suite: parameters have names of their own, in the order of their buffer, and cost() counts them") {
  for_every_subject<float>([](const Maker<float>& make) {
    const auto subject = make();
    std::vector<std::string> names;
    const float* end = subject->flat().data;
    Index count = 0;
    for (const Tensor<float>& p : subject->parameters()) {
      CHECK(std::find(names.begin(), names.end(), p.name) == names.end());
      names.push_back(p.name);
      if (p.size() != 0) CHECK(p.data >= end);
      if (p.size() != 0) end = p.data + p.size();
      count += p.size();
    }
    CHECK(end <= subject->flat().data + subject->flat().size);
    CHECK(subject->cost(1).parameters == count);
  });
}

TEST_CASE("suite: explain says path, work and memory") {
  for_every_subject<float>([](const Maker<float>& make) {
    const auto subject = make();
    std::FILE* const file = std::tmpfile();
    REQUIRE(file != nullptr);
    if (subject->explained(512, file)) {
      char text[2048] = {};
      std::rewind(file);
      const std::size_t read = std::fread(text, 1, sizeof text - 1, file);
      const std::string said(text, read);
      for (const char* part : {"512 tokens", "forward", "backward", "GFLOP", "bytes of workspace", "per token"}) {
        CHECK_MESSAGE(said.find(part) != std::string::npos, said);
      }
    }
    std::fclose(file);
  });
}

}  // namespace loramix_test

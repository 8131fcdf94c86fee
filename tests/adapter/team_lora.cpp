// TeamLoRA whose S reads a sequence or a task, and HydraLoRA gated by the task: literal sums, differences, laws, merges.
#include <algorithm>

#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/router/task.hpp>

#include "adapter/tasks.hpp"
#include "reference/routing.hpp"

namespace loramix_test {
namespace {

constexpr Index T = 14, L = 6;
constexpr Index ends[L + 1] = {0, 4, 4, 5, 11, 14, 14};
constexpr std::uint8_t valid[T] = {0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1};  // none of sequence 2
const std::vector<std::int32_t> task_of{2, 0, -1, 0, 2, 1};                    // task 1 has no token

struct Form {
  lm::Reads reads;
  lm::Pooling pooling = lm::Pooling::mean;
};
constexpr Form forms[] = {{lm::Reads::token},
                          {lm::Reads::sequence, lm::Pooling::mean},
                          {lm::Reads::sequence, lm::Pooling::last},
                          {lm::Reads::task}};

lm::TeamLoraConfig team(const Form& form, Index hidden, lm::Competition competition = lm::Competition::learned,
                        Index experts = 3) {
  return {.d_in = 7,
          .d_out = 5,
          .experts = experts,
          .rank = 2,
          .alpha = 3,
          .dropout = 0.5,
          .hidden = hidden,
          .competition = competition,
          .reads = form.reads,
          .pooling = form.pooling,
          .tasks = 3,
          .embedding = 6};
}
lm::ForwardOptions<lm::Space::host> told(lm::ForwardOptions<lm::Space::host> options) {
  options.sequences = lm::Groups<>::by_segment(ends, L);
  options.tasks = lm::Groups<>::by_segment(ends, L, task_of.data(), 3);
  options.valid = {valid, T};
  return options;
}
template <class A>
Index rows_of(const A& adapter) {
  const lm::Reads reads = adapter.config().reads;
  return reads == lm::Reads::task ? 3 : reads == lm::Reads::sequence ? L : T;
}

/// What S makes of its row r, and ΔY of the batch: literal sums.
template <class A>
struct Literal {
  explicit Literal(const Batch<A>& b_) : b(b_), rows(static_cast<std::size_t>(rows_of(b.adapter))) {
    const auto gate = b.adapter.gate();
    const auto grid_of = [](auto m) {
      Grid<double> g(m.rows, m.cols);
      for (Index i = 0; i < m.rows; ++i) {
        for (Index j = 0; j < m.cols; ++j) g(i, j) = lm::widen<double>(m(i, j));
      }
      return g;
    };
    const auto row_of = [](auto m) {
      reference::Row r;
      for (Index j = 0; j < m.cols; ++j) r.push_back(lm::widen<double>(m(0, j)));
      return r;
    };
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const reference::Row v = read(static_cast<Index>(r));
      reference::Row h(static_cast<std::size_t>(gate.S1.rows), 0.0);
      for (std::size_t i = 0; i < h.size(); ++i) {
        for (std::size_t c = 0; c < v.size(); ++c)
          h[i] += lm::widen<double>(gate.S1(static_cast<Index>(i), static_cast<Index>(c))) * v[c];
      }
      rows[r] = reference::competition(h, row_of(gate.b1), grid_of(gate.S2), row_of(gate.b2), grid_of(gate.M),
                                       static_cast<reference::Ablation>(b.adapter.config().competition));
    }
  }
  /// V of row r: a token, the mean or last valid row of a sequence, a task's embedding.
  reference::Row read(Index r) const {
    const auto& c = b.adapter.config();
    reference::Row v;
    if (c.reads == lm::Reads::task) {
      for (Index i = 0; i < c.embedding; ++i) v.push_back(lm::widen<double>(b.adapter.gate().embedding(r, i)));
      return v;
    }
    v.assign(static_cast<std::size_t>(c.d_in), 0.0);
    const bool token = c.reads == lm::Reads::token;
    double n = 0;
    for (Index t = token ? r : ends[r]; t < (token ? r + 1 : ends[r + 1]); ++t) {
      if (!token && valid[t] == 0) continue;
      n = c.pooling == lm::Pooling::last ? 1 : n + 1;
      for (Index i = 0; i < c.d_in; ++i) {
        double& to = v[static_cast<std::size_t>(i)];
        to = (c.pooling == lm::Pooling::last ? 0 : to) + lm::widen<double>(b.x(t, i));
      }
    }
    for (double& to : v) to /= n == 0 ? 1 : n;
    return v;
  }
  /// The row that token t is gated with, or −1.
  Index row_at(Index t) const {
    Index sequence = 0;
    while (t >= ends[sequence + 1]) ++sequence;
    const lm::Reads reads = b.adapter.config().reads;
    return reads == lm::Reads::task       ? task_of[static_cast<std::size_t>(sequence)]
           : reads == lm::Reads::sequence ? sequence
                                          : t;
  }
  reference::Values delta() const {
    const auto& c = b.adapter.config();
    reference::Values y(static_cast<std::size_t>(T * c.d_out), 0.0);
    for (Index t = 0; t < T; ++t) {
      for (Index j = 0; j < c.experts * c.rank && row_at(t) >= 0; ++j) {
        double u = 0;
        for (Index i = 0; i < c.d_in; ++i) {
          const bool keep = reference::keep(b.key.seed, b.key.site, b.key.step,
                                            b.key.first_token + static_cast<std::uint64_t>(t), i, 32768);
          u += keep ? 2 * lm::widen<double>(b.x(t, i)) * lm::widen<double>(b.adapter.A()(j, i)) : 0;
        }
        const double g =
            rows[static_cast<std::size_t>(row_at(t))].omega[static_cast<std::size_t>(j / c.rank)] * c.alpha / 2;
        for (Index o = 0; o < c.d_out; ++o)
          y[static_cast<std::size_t>(t * c.d_out + o)] += g * u * lm::widen<double>(b.adapter.B()(o, j));
      }
    }
    return y;
  }

  const Batch<A>& b;
  std::vector<reference::CompetitionRow> rows;
};

/// Gradients of Σ dy∘ΔY and of losses on S's logits and probabilities, against differences of the literal sums.
void check_gradients(const lm::TeamLoraConfig& config, lm::Keep keep) {
  using A = lm::TeamLora<double>;
  Batch<A> b(config, T, static_cast<std::uint64_t>(config.hidden));
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, told({.save = &reserve, .key = b.key, .keep = keep}));
  CHECK(distance(y, Literal<A>(b).delta()) <= 1e-13);
  const Index rows = rows_of(b.adapter);
  REQUIRE(saved.scores.p.rows == rows);
  CHECK(saved.scores.by_token == (config.reads == lm::Reads::token));
  auto dp = random_matrix<double>(rows, config.experts, b.random);
  auto dl = random_matrix<double>(rows, config.experts, b.random);
  for (Index r = 0; r < rows; ++r) {
    for (Index e = 0; e < config.experts; ++e) {
      if (config.reads == lm::Reads::token && valid[r] == 0) dp(r, e) = dl(r, e) = 0;
      saved.scores.dp(r, e) += dp(r, e);
      saved.scores.dlogits(r, e) += dl(r, e);
    }
  }
  b.backward(saved, dx, grad);
  std::vector<lm::GradientClaim> claims{{"x", {b.x.data(), T * config.d_in}, {dx.data(), T * config.d_in}}};
  A::visit(b.adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    claims.push_back({name, {view.data, view.rows * view.cols}, {}});
  });
  std::size_t next = 1;
  A::visit(grad, [&](const char*, auto view, lm::ParameterGroup) {
    claims[next++].gradient = {view.data, view.rows * view.cols};
  });
  const lm::GradientReport report = lm::gradient_check(claims, [&] {
    const Literal<A> now(b);
    const reference::Values delta = now.delta();
    double loss = 0;
    for (Index i = 0; i < T * config.d_out; ++i) loss += b.dy.data()[i] * delta[static_cast<std::size_t>(i)];
    for (Index r = 0; r < rows; ++r) {
      const reference::CompetitionRow& row = now.rows[static_cast<std::size_t>(r)];
      for (Index e = 0; e < config.experts; ++e) {
        loss += dp(r, e) * row.phi[static_cast<std::size_t>(e)] + dl(r, e) * row.logits[static_cast<std::size_t>(e)];
      }
    }
    return loss;
  });
  CHECK_MESSAGE(report.ok(), report.text());
  for (const lm::CheckedTensor& tensor : report.tensors) {
    const bool read = config.competition != lm::Competition::identity || tensor.name != "interaction.weight";
    CHECK_MESSAGE((tensor.norm > 0) == read, tensor.name);
  }
}

TEST_CASE("whatever S reads: values are the literal sums, gradients their differences, dropout 0.5 and a mask") {
  for (const Form& form : forms) {
    for (const Index hidden : {0, 4}) {
      for (const auto competition : {lm::Competition::learned, lm::Competition::identity, lm::Competition::equal}) {
        CAPTURE(static_cast<int>(form.reads));
        CAPTURE(static_cast<int>(form.pooling));
        CAPTURE(hidden);
        CAPTURE(static_cast<int>(competition));
        check_gradients(team(form, hidden, competition), lm::Keep::z);
      }
    }
    check_gradients(team(form, 4), lm::Keep::recompute);
  }
}

TEST_CASE("the library's own check agrees, with as much memory as it was told") {
  const lm::cpu::Backend be;
  for (const Form& form : forms) {
    lm::TeamLora<double> adapter(team(form, 4));
    lm::initialise(adapter, {.seed = seed(2)});
    const auto options = told({});
    const auto report =
        lm::gradient_check(be, adapter, {.tokens = T, .batch = {options.sequences, options.tasks, {}, options.valid}});
    CHECK_MESSAGE(report.ok(), report.text());
  }
}

TEST_CASE("with one expert and M = 1 TeamLoRA is LoRA whatever S reads, bit for bit, but for tokens of no task") {
  const lm::LoraConfig one{.d_in = 7, .d_out = 5, .rank = 2, .alpha = 3, .dropout = 0.5};
  for (const Form& form : forms) {
    Batch<lm::Lora<float>> lora(one, T);
    Batch<lm::TeamLora<float>> b(team(form, 4, lm::Competition::learned, 1), T, 6);
    const auto copy_of = [](auto from, auto to) { lm::detail::copy_rows(from, to); };
    copy_of(lora.adapter.A(), b.adapter.A());
    copy_of(lora.adapter.B(), b.adapter.B());
    b.adapter.gate().M(0, 0) = 1;
    b.x = lora.x;
    auto y = b.zeros_y(), want = lora.zeros_y();
    b.forward(y, told({.key = b.key}));
    lora.forward(want, {.key = lora.key});
    for (Index o = 0; o < 5 && form.reads == lm::Reads::task; ++o) {
      CHECK(y(4, o) == 0);  // sequence 2 has no task
      want(4, o) = 0;
    }
    CHECK(same_bits(y, want));
  }
}

TEST_CASE("a sequence of tokens alone is the token; a linear S of the task that does not interact is MOELoRA's gate") {
  Batch<lm::TeamLora<double>> token(team({lm::Reads::token}, 4), T), alone(team({lm::Reads::sequence}, 4), T);
  auto y = token.zeros_y(), z = alone.zeros_y();
  token.forward(y);
  alone.forward(z);  // the same numbers: no batch says of sequences anything
  CHECK(same_bits(y, z));

  auto config = team({lm::Reads::task}, 0, lm::Competition::identity);
  Batch<lm::TeamLora<double>> b(config, T);
  Batch<lm::MoeLora<double>> moe(
      {.d_in = 7, .d_out = 5, .tasks = 3, .experts = 3, .rank = 6, .alpha = 9, .dropout = 0.5, .embedding = 6}, T);
  lm::detail::copy_rows(b.adapter.A(), moe.adapter.A());
  lm::detail::copy_rows(b.adapter.B(), moe.adapter.B());
  lm::detail::copy_rows(b.adapter.gate().S1, moe.adapter.gate().scorer.projection);
  lm::detail::copy_rows(b.adapter.gate().embedding, moe.adapter.gate().scorer.embedding);
  for (Index e = 0; e < 3; ++e) b.adapter.gate().b2(0, e) = 0.5;  // a shift of all
  moe.x = b.x;
  auto got = b.zeros_y(), want = moe.zeros_y();
  b.forward(got, told({.key = b.key}));
  moe.forward(want, told({.key = b.key}));
  CHECK(distance(got, values_of(want.view())) <= 1e-14);
}

TEST_CASE("merged for a task, undone bitwise; S that reads tokens has none") {
  for (const Index hidden : {0, 4}) {
    Batch<lm::TeamLora<double>> b(team({lm::Reads::task}, hidden), 9);
    check_merged_by_task(b);
  }
  Batch<lm::TeamLora<double>> b(team({lm::Reads::token}, 4), 9);
  lm::Matrix<double> weights(5, 7);
  check_error(lm::ErrorCode::value, {"merge", "task", "token"},
              [&] { lm::merge(b.be, b.adapter, weights, {.task = 0}); });
}

TEST_CASE("a batch without tasks and a config without any are refused; start and counts") {
  Batch<lm::TeamLora<float>> b(team({lm::Reads::task}, 4), 9);
  auto y = b.zeros_y();
  using Code = lm::ErrorCode;
  check_error(Code::value, {"forward", "tasks", "3", "9"}, [&] { b.forward(y); });
  CHECK(same_bits(y, b.zeros_y()));
  auto config = team({lm::Reads::task}, 4);
  config.tasks = 0;
  check_error(Code::value, {"team_lora", "tasks"}, [&] { lm::TeamLora<float>{config}; });
  config.tasks = 3;
  config.embedding = 0;
  check_error(Code::value, {"team_lora", "embedding"}, [&] { lm::TeamLora<float>{config}; });
  config = team({lm::Reads::token}, -1);
  check_error(Code::value, {"team_lora", "hidden"}, [&] { lm::TeamLora<float>{config}; });

  lm::TeamLora<float> adapter(
      {.d_in = 200, .d_out = 3, .experts = 4, .rank = 2, .reads = lm::Reads::task, .tasks = 50});
  lm::initialise(adapter, {.seed = seed(3)});
  double squares = 0;
  for (const double value : values_of(adapter.gate().embedding)) squares += value * value;
  CHECK(std::abs(squares / 3200 - 1) <= 0.125);  // 3200 normals: 5·√(2/n)
  for (Index e = 0; e < 4; ++e) CHECK(adapter.gate().M(e, e) == 1);
  CHECK(lm::parameter_count(adapter) == adapter.cost(1).parameters);
  CHECK(lm::parameter_count(adapter) == 8 * 200 + 3 * 8 + 64 * 64 + 64 + 4 * 64 + 4 + 16 + 50 * 64);
}

TEST_CASE("HydraLoRA gated by the task is MOELoRA with one A, at HydraLoRA's scale and start") {
  const lm::MixtureConfig hydra{.d_in = 7, .d_out = 5, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5};
  // [by-task]
  lm::MoeLora<double> by_task(lm::hydra_by_task(hydra, 3));  // three tasks
  // [/by-task]
  CHECK(by_task.scale() == lm::HydraLora<double>(hydra).scale());
  CHECK(by_task.A().rows == 2);
  CHECK(by_task.B().cols == 6);
  CHECK(by_task.config().dropout == 0.5);
  lm::HydraLora<double> token(hydra);
  lm::initialise(by_task, {.seed = seed(4), .site = "m"});
  lm::initialise(token, {.seed = seed(4), .site = "m"});
  CHECK(values_of(by_task.A()) == values_of(token.A()));

  Batch<lm::MoeLora<double>> b(lm::hydra_by_task(hydra, 3), T);
  auto y = b.zeros_y();
  b.forward(y, told({}));
  reference::Values want(static_cast<std::size_t>(T * 5), 0.0);
  for (Index t = 0; t < T; ++t) {
    Index sequence = 0;
    while (t >= ends[sequence + 1]) ++sequence;
    const Index task = task_of[static_cast<std::size_t>(sequence)];
    if (task < 0) continue;
    const auto scorer = b.adapter.gate().scorer;
    reference::Row logits(3, 0.0);
    for (Index e = 0; e < 3; ++e) {
      for (Index i = 0; i < 64; ++i)
        logits[static_cast<std::size_t>(e)] += scorer.embedding(task, i) * scorer.projection(e, i);
    }
    const reference::Row g = reference::softmax_of(logits, 1);
    for (Index j = 0; j < 2; ++j) {
      double u = 0;
      for (Index i = 0; i < 7; ++i) u += b.x(t, i) * b.adapter.A()(j, i);
      for (Index e = 0; e < 3; ++e) {
        for (Index o = 0; o < 5; ++o)
          want[static_cast<std::size_t>(t * 5 + o)] +=
              1.5 * g[static_cast<std::size_t>(e)] * u * b.adapter.B()(o, e * 2 + j);
      }
    }
  }
  CHECK(distance(y, want) <= 1e-13);
}

}  // namespace
}  // namespace loramix_test

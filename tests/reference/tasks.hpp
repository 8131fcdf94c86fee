// Products gated by the task, literally from MATH.md sections 1 to 4: MOELoRA and MoRE, and MoRE's surrogate with its
// straight-through multiplier 1 + p_c − stop(p_c), in which everything called constant is frozen.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "reference/draws.hpp"

namespace loramix_test::reference {

using Values = std::vector<double>;

/// ΔY = s Σ_j g(task of t, j) (Σ_c x̂ A) B; a token of task −1 gets nothing.
struct TaskProduct {
  int tokens, d_in, d_out, ranks, rows_of_A, tasks, columns, dim;  // columns: logits of a task
  double scale;
  Values x, A, B;  // [tokens, d_in], [rows_of_A, d_in], [d_out, ranks]
  Values e, w, b;  // [tasks, dim], [columns, dim] or empty, [columns] or empty
  Values keep;     // [tokens, d_in]: 0 or 1/(1 − p)
  std::vector<int> task;

  Values logits(int tau) const {
    Values l(static_cast<std::size_t>(columns), 0.0);
    for (int i = 0; i < columns; ++i) {
      double sum = w.empty() ? at(e, tau * dim + i) : 0;
      for (int c = 0; !w.empty() && c < dim; ++c) sum += at(e, tau * dim + c) * at(w, i * dim + c);
      l[static_cast<std::size_t>(i)] = sum + (b.empty() ? 0.0 : at(b, i));
    }
    return l;
  }
  static Values softmax(const Values& l) {
    double sum = 0, top = l[0];
    for (double v : l) top = v > top ? v : top;
    for (double v : l) sum += std::exp(v - top);
    Values p;
    for (double v : l) p.push_back(std::exp(v - top) / sum);
    return p;
  }
  template <class Gate>
  Values delta(const Gate& g) const {
    Values y(static_cast<std::size_t>(tokens * d_out), 0.0);
    for (int t = 0; t < tokens; ++t) {
      const int tau = task[static_cast<std::size_t>(t)];
      if (tau < 0) continue;
      for (int j = 0; j < ranks; ++j) {
        double u = 0;
        for (int c = 0; c < d_in; ++c) {
          u += at(x, t * d_in + c) * at(keep, t * d_in + c) * at(A, j % rows_of_A * d_in + c);
        }
        for (int o = 0; o < d_out; ++o) {
          y[static_cast<std::size_t>(t * d_out + o)] += scale * u * g(tau, j) * at(B, o * ranks + j);
        }
      }
    }
    return y;
  }
  static double at(const Values& v, int i) { return v[static_cast<std::size_t>(i)]; }
};

inline double moe_lora_gate(const TaskProduct& p, int tau, int j) {
  return TaskProduct::at(TaskProduct::softmax(p.logits(tau)), j / (p.ranks / p.columns));
}

enum class Law { paper_linear, code_squared, none };
enum class Through { probability, raw_logit, none };
enum class Choice { argmax, random, subset };

/// What MoRE has chosen with the parameters of one moment, and its gate as a function of the parameters of another.
struct MoreSelection {
  std::vector<int> c, count;
  std::vector<std::vector<bool>> open;
  std::vector<Values> p0, l0;
  Law law;
  Through through;
  Choice choice;

  MoreSelection(const TaskProduct& product, Law law_, Through through_, Choice choice_, std::uint64_t key = 0)
      : law(law_), through(through_), choice(choice_) {
    const int R = product.ranks;
    for (int tau = 0; tau < product.tasks; ++tau) {
      l0.push_back(product.logits(tau));
      p0.push_back(TaskProduct::softmax(l0.back()));
      int best = 0;
      for (int j = 1; j < R; ++j) best = TaskProduct::at(l0.back(), j) > TaskProduct::at(l0.back(), best) ? j : best;
      if (choice == Choice::random) {
        const double u = (philox(key, {0, 4, static_cast<std::uint32_t>(tau), 0})[0] + 0.5) / 4294967296.0;
        best = static_cast<int>(u * R);
      }
      std::vector<bool> mine;
      int n = 0;
      for (int j = 0; j < R; ++j) {
        const bool above = TaskProduct::at(p0.back(), j) >= 1.0 / R || j == best;
        mine.push_back(choice == Choice::subset ? above : j <= best);
        n += mine.back() ? 1 : 0;
      }
      c.push_back(best);
      count.push_back(n);
      open.push_back(mine);
    }
  }
  double operator()(const TaskProduct& now, int tau, int j) const {
    const std::size_t t = static_cast<std::size_t>(tau);
    if (!open[t][static_cast<std::size_t>(j)]) return 0;
    const double R = now.ranks;
    const double by_law = law == Law::paper_linear   ? count[t] / R
                          : law == Law::code_squared ? (j + 1) / R * (j + 1) / R
                                                     : 1.0;
    const Values l = now.logits(tau), p = TaskProduct::softmax(l);
    double m = 1;
    for (int i = 0; i < now.ranks; ++i) {
      const bool covered = choice == Choice::subset ? bool{open[t][static_cast<std::size_t>(i)]} : i == c[t];
      if (!covered || through == Through::none) continue;
      m += through == Through::probability ? TaskProduct::at(p, i) - TaskProduct::at(p0[t], i)
                                           : TaskProduct::at(l, i) - TaskProduct::at(l0[t], i);
    }
    return by_law * m;
  }
};

}  // namespace loramix_test::reference

// Where an adapter sits: one layer of the frozen network. Most methods see x and y only; those that want more of the
// engine say here what.
#pragma once
#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/moa.hpp>
#include <loramix/adapter/reparam_forward.hpp>
#include <loramix/ops/losses.hpp>
#include <loramix/train/ada_budget.hpp>

#include "network.hpp"

namespace demo {

using Options = lm::ForwardOptions<lm::Space::host>;

/// One layer of the frozen network.
class Layer {
 public:
  Layer(const Network& base, int l) : base_(&base), l_(l) {}

  const lm::cpu::Backend<>& backend() const { return be_; }

 protected:
  /// What the layer below hears through the base; nothing below the first layer.
  lm::MatrixView<float> through_base(const Matrix& dy, Matrix& dx) const {
    if (l_ == 0) return {};
    dx.noalias() = dy * base_->weight(l_);
    return view(dx);
  }

  const Network* base_;
  int l_;
  lm::cpu::Backend<> be_;  // the calling thread: the demo's threads work on different seeds and methods
};

/// y = x Wᵀ + b and what the adapter adds to it.
template <class Adapter>
class Site : public Layer {
 public:
  using Layer::Layer;

  void start(Adapter&) const {}
  auto forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    base_->linear(l_, x, y);
    auto saved = lm::forward(be_, adapter, view(x), view(y), work, options);
    if constexpr (std::is_same_v<Adapter, lm::Moa<float>>) {  // its router has a loss of its own
      if (!options.labels.empty()) lm::routing_loss(be_, saved, {}, work);
    }
    return saved;
  }
  /// dy may be overwritten.
  template <class Saved>
  void backward(const Adapter& adapter, Saved& saved, const Matrix& x, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    lm::backward(be_, adapter, saved, view(x), view(dy), through_base(dy, dx), grad, work,
                 {.parameters = lm::Into::set});
  }
};

/// DoRA reads the frozen weight.
template <>
class Site<lm::Dora<float>> : public Layer {
 public:
  using Adapter = lm::Dora<float>;

  Site(const Network& base, int l)
      : Layer(base, l), weights_{base.weight(l).data(), width[l + 1], width[l]}, squares_(width[l + 1]) {
    lm::row_squares(be_, lm::RowSquares<float, float, lm::Space::host>{weights_, squares_.view()});
  }

  void start(Adapter& adapter) const { lm::start_magnitude(be_, adapter, frozen()); }
  auto forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    base_->linear(l_, x, y);
    return lm::forward(be_, adapter, frozen(), view(x), view(y), work, options);
  }
  void backward(const Adapter& adapter, lm::DoraSaved<Adapter>& saved, const Matrix& x, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    lm::backward(be_, adapter, frozen(), saved, view(x), view(dy), through_base(dy, dx), grad, work,
                 {.parameters = lm::Into::set});
  }

 private:
  lm::DoraBase<Adapter> frozen() const { return {.weights = weights_, .squares = squares_.view()}; }

  lm::MatrixView<const float> weights_;
  lm::Buffer<float> squares_;
};

/// IA3 scales x Wᵀ before the bias, in place.
template <>
class Site<lm::Ia3<float>> : public Layer {
 public:
  using Adapter = lm::Ia3<float>;
  using Layer::Layer;

  void start(Adapter&) const {}
  auto forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    y.noalias() = x * base_->weight(l_).transpose();
    auto saved = lm::forward(be_, adapter, view(y), view(y), work, options);
    y.rowwise() += base_->bias(l_);
    return saved;
  }
  void backward(const Adapter& adapter, lm::Ia3Saved<Adapter>& saved, const Matrix&, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    lm::backward(be_, adapter, saved, view(dy), view(dy), view(dy), grad, work, {.parameters = lm::Into::set});
    through_base(dy, dx);
  }
};

/// What a method does around the optimiser's steps; most do nothing.
template <class Adapter>
struct Regime {
  Regime(std::vector<Adapter>&, std::vector<lm::gradient_t<Adapter>>&, Index) {}
  void before_step() {}
  void after_step(Index) {}
};

/// AdaLoRA keeps its factors orthogonal and prunes a third of its ranks.
template <>
class Regime<lm::AdaLora<float>> {
 public:
  using Adapter = lm::AdaLora<float>;
  using Gradient = lm::gradient_t<Adapter>;

  Regime(std::vector<Adapter>& adapters, std::vector<Gradient>& gradients, Index steps)
      : layers_(addresses(adapters)),
        gradients_(addresses(gradients)),
        memory_(static_cast<std::size_t>(lm::orthogonality_bytes<Adapter>(most_ranks(adapters)))),
        budget_(layers_, options(adapters, steps)) {}

  void before_step() {
    float value;
    lm::orthogonality_loss<lm::cpu::Backend<>, Adapter>(be_, layers_, gradients_, {}, {&value, 1},
                                                        lm::Arena<>{memory_});
    budget_.measure(be_, layers_, gradients_);
  }
  void after_step(Index step) { budget_.prune(be_, layers_, step); }

 private:
  template <class T>
  static std::vector<T*> addresses(std::vector<T>& all) {
    std::vector<T*> pointers;
    for (T& one : all) pointers.push_back(&one);
    return pointers;
  }
  static Index most_ranks(const std::vector<Adapter>& adapters) {
    Index most = 0;
    for (const Adapter& adapter : adapters) most = std::max(most, adapter.config().rank);
    return most;
  }
  static lm::AdaBudgetOptions options(const std::vector<Adapter>& adapters, Index steps) {
    Index ranks = 0;
    for (const Adapter& adapter : adapters) ranks += adapter.config().rank;
    return {.total_steps = steps,
            .initial_steps = steps / 10,
            .final_steps = steps / 3,
            .interval = 10,
            .initial_budget = static_cast<double>(ranks),
            .final_budget = static_cast<double>(ranks * 2 / 3)};
  }

  std::vector<Adapter*> layers_;
  std::vector<Gradient*> gradients_;
  std::vector<std::byte> memory_;
  lm::AdaBudget<Adapter> budget_;
  lm::cpu::Backend<> be_;
};

}  // namespace demo

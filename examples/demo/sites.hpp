// Where an adapter sits: at a layer of the frozen network, at a gated block (MixLoRA), before the tokens (prompts). Most
// methods see x and y only; those that want more of the engine say here what.
#pragma once
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/reparam_forward.hpp>

#include "domain_bias.hpp"
#include "linears.hpp"

namespace demo {

using Options = lm::ForwardOptions<lm::Space::host>;

/// A frozen layer, and the backend of the calling thread: the demo's threads work on different seeds and methods.
class LayerSite {
 public:
  LayerSite(const Linears& network, int place) : layer_(network.layer(place)) {}

 protected:
  lm::MatrixView<float> wanted(Matrix& dx) const { return layer_.first ? lm::MatrixView<float>{} : view(dx); }

  Layer layer_;
  lm::cpu::Backend<> be_;
};

/// y = x Wᵀ + b and what the adapter adds to it.
template <class Adapter>
class AddingSite : public LayerSite {
 public:
  using LayerSite::LayerSite;

  void start(Adapter&) const {}
  auto forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    layer_.forward(x, y);
    return lm::forward(be_, adapter, view(x), view(y), work, options);
  }
  /// dx is assigned, dy may be overwritten.
  template <class Saved>
  void backward(const Adapter& adapter, Saved& saved, const Matrix& x, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    layer_.backward(dy, dx);
    lm::backward(be_, adapter, saved, view(x), view(dy), wanted(dx), grad, work, {.parameters = lm::Into::set});
  }
};

template <class Adapter>
class Site : public AddingSite<Adapter> {
  using AddingSite<Adapter>::AddingSite;
};

/// DoRA reads the frozen weight.
template <>
class Site<lm::Dora<float>> : public LayerSite {
 public:
  using Adapter = lm::Dora<float>;

  Site(const Linears& network, int place) : LayerSite(network, place), squares_(layer_.weight.rows()) {
    lm::row_squares(be_, lm::RowSquares<float, float, lm::Space::host>{layer_.weight_view(), squares_.view()});
  }

  void start(Adapter& adapter) const { lm::start_magnitude(be_, adapter, frozen()); }
  auto forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    layer_.forward(x, y);
    return lm::forward(be_, adapter, frozen(), view(x), view(y), work, options);
  }
  void backward(const Adapter& adapter, lm::DoraSaved<Adapter>& saved, const Matrix& x, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    layer_.backward(dy, dx);
    lm::backward(be_, adapter, frozen(), saved, view(x), view(dy), wanted(dx), grad, work,
                 {.parameters = lm::Into::set});
  }

 private:
  lm::DoraBase<Adapter> frozen() const { return {.weights = layer_.weight_view(), .squares = squares_.view()}; }

  lm::Buffer<float> squares_;
};

/// IA3 scales in place: x Wᵀ before the bias, or what the product reads.
template <>
class Site<lm::Ia3<float>> : public LayerSite {
 public:
  using Adapter = lm::Ia3<float>;
  using LayerSite::LayerSite;

  void start(Adapter&) const {}
  auto forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    Matrix scaled;
    const bool before = adapter.config().feed_forward;
    if (before)
      scaled = x;
    else
      scaled.noalias() = x * layer_.weight.transpose();
    auto saved = lm::forward(be_, adapter, view(scaled), view(scaled), work, options);
    if (before) {
      layer_.forward(scaled, y);
    } else {
      y = scaled.rowwise() + layer_.bias;
    }
    return saved;
  }
  void backward(const Adapter& adapter, lm::Ia3Saved<Adapter>& saved, const Matrix&, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    const bool before = adapter.config().feed_forward;
    if (before) dx.noalias() = dy * layer_.weight;
    Matrix& scaled = before ? dx : dy;
    lm::backward(be_, adapter, saved, view(scaled), view(scaled), view(scaled), grad, work,
                 {.parameters = lm::Into::set});
    if (!before) layer_.backward(dy, dx);
  }
};

/// LoRA, and the bias of the image's domain.
template <>
class Site<BiasedLora<float>> : public AddingSite<BiasedLora<float>> {
 public:
  using Adapter = BiasedLora<float>;
  using AddingSite<Adapter>::AddingSite;
  struct Saved {
    lm::Saved<Adapter> product;
    lm::Groups<> tasks;
  };

  Saved forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    Saved saved{AddingSite::forward(adapter, x, y, work, options), options.tasks};
    const Eigen::Map<const Matrix> bias(adapter.bias().data, domains, y.cols());
    for (Index t = 0; t < y.rows(); ++t) y.row(t) += bias.row(options.tasks.ids[t]);
    return saved;
  }
  void backward(const Adapter& adapter, Saved& saved, const Matrix& x, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    lm::execute(be_, lm::ColumnSum<float, float, lm::Space::host>{view(dy), saved.tasks, grad.bias(), lm::Into::set},
                lm::Arena<>{});
    AddingSite::backward(adapter, saved.product, x, dy, dx, grad, work);
  }
};

}  // namespace demo

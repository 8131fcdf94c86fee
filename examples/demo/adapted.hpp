// A frozen network with an adapter at every place, and the training loop of any adapter of the library.
#pragma once
#include <functional>
#include <loramix/adapter/domains.hpp>

#include "own_losses.hpp"
#include "regimes.hpp"
#include "training.hpp"
#include "wide_sites.hpp"

namespace demo {

/// What makes a method: an adapter at a budget.
template <class Adapter>
struct Recipe {
  lm::Shape budget = {};                                       // total rank, experts; the network says the rest
  std::function<void(typename Adapter::Config&)> adjust = {};  // what else a configuration needs
  LossWeights losses = {};
  std::vector<lm::GroupRule> groups = {};  // of the optimiser
  bool labels = true;                      // of domains are given while training
};

/// Who says which of MoA's experts reads a test image: the label, every layer for itself, or one decision of all layers.
enum class Deciding { label, every_layer, vote, last, first };

template <class Adapter, class Net>
class Adapted {
 public:
  using Site = demo::Site<Adapter>;
  using Saved = std::remove_cvref_t<decltype(std::declval<const Site&>().forward(
      std::declval<const Adapter&>(), std::declval<const Matrix&>(), std::declval<Matrix&>(), lm::Arena<>(),
      Options()))>;
  /// What is looked at on the way: a place, what it read, what its forward saved.
  using See = std::function<void(int, const Matrix&, const Saved&)>;

  Adapted(const Net& network, const Recipe<Adapter>& recipe, std::uint64_t seed) : recipe_(recipe), network_(&network) {
    const Places<Adapter, Net> places{network};
    for (int i = 0; i < places.count(); ++i) {
      auto config = places.config(i, recipe.budget);
      if (recipe.adjust) recipe.adjust(config);
      adapters.emplace_back(config);
      lm::initialise(adapters[i], {.seed = seed, .site = places.name(i).c_str()});
      sites_.emplace_back(network, i);
      sites_[i].start(adapters[i]);
    }
  }
  /// The same with other adapters.
  Adapted with(std::vector<Adapter> trained) const {
    Adapted other = *this;
    other.adapters = std::move(trained);
    return other;
  }

  const Net& network() const { return *network_; }
  Index trainable() const {
    Index count = 0;
    for (const Adapter& adapter : adapters) count += lm::parameter_count(adapter);
    return count;
  }

  Matrix logits(const Images& images, const See& see = {}) const {
    Memory memory(*this, images.size());
    const auto pass = [&](const std::vector<std::int32_t>& labels, const See& look) {
      memory.reserve.reset();
      typename Net::Trace trace;
      Pass at(*this, memory, images, labels, lm::no_draws);
      at.see = look;
      return Matrix(network_->forward(images.x, trace, at));
    };
    if (deciding == Deciding::label) return pass(images.domain, see);
    const std::vector<std::int32_t> nobody(images.domain.size(), -1);
    if (deciding == Deciding::every_layer) return pass(nobody, see);
    return pass(decisions(images, [&](const See& look) { pass(nobody, look); }), see);
  }

  /// Returns every epoch's mean loss.
  std::vector<double> train(const Images& images, const Protocol& protocol, std::uint64_t seed) {
    Memory memory(*this, protocol.batch);
    std::vector<lm::gradient_t<Adapter>> gradient;
    std::vector<lm::AdamW<Adapter>> optimiser;
    for (const Adapter& adapter : adapters) {
      gradient.push_back(lm::zeros_like(adapter));
      optimiser.emplace_back(adapter, lm::AdamWOptions{.groups = recipe_.groups});
    }
    Regime<Adapter> regime(adapters, gradient, protocol.steps(images));
    const lm::cpu::Backend be;
    typename Net::Trace trace;

    return for_batches(images, protocol, seed, [&](const Images& batch, Index step, double lr) {
      memory.reserve.reset();
      const std::vector<std::int32_t> unknown(batch.domain.size(), -1);
      Pass at(*this, memory, batch, recipe_.labels ? batch.domain : unknown,
              {.seed = seed, .step = static_cast<std::uint64_t>(step)});
      at.gradient = &gradient;

      Matrix dy;
      const double loss = cross_entropy(network_->forward(batch.x, trace, at), batch.label, dy);
      network_->backward(trace, dy, at);

      regime.before_step();
      for (std::size_t i = 0; i < adapters.size(); ++i) {
        optimiser[i].lr(lr);
        optimiser[i].step(be, adapters[i], gradient[i]);
      }
      regime.after_step(step);
      return loss;
    });
  }

  std::vector<Adapter> adapters;  // one per place
  Deciding deciding = Deciding::label;

 private:
  /// What the library's calls need: they allocate nothing themselves.
  struct Memory {
    std::vector<std::byte> work_bytes, reserve_bytes;
    lm::Arena<> work, reserve;

    Memory(const Adapted& model, Index images) {
      const lm::cpu::Backend be;
      const Index tokens = Net::rows(images);
      Index most = 0, all = 0;
      for (const Adapter& adapter : model.adapters) {
        most = std::max(
            {most, lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward), losses_bytes(adapter, tokens)});
        all += lm::reserve_bytes(adapter, tokens);
      }
      work_bytes.resize(most);
      reserve_bytes.resize(all);
      work = lm::Arena<>{work_bytes};
      reserve = lm::Arena<>{reserve_bytes};
    }
  };

  /// What the network's forward and backward call.
  class Pass {
   public:
    Pass(const Adapted& model, Memory& memory, const Images& images, const std::vector<std::int32_t>& labels,
         const lm::Key& key)
        : model_(model), memory_(memory), images_(images), labels_(labels), key_(key), saved_(model.adapters.size()) {
      if constexpr (sits_before_tokens<Adapter>) {
        for (Index i = 0; i <= images.size(); ++i) offsets_.push_back(Net::rows(i));
      }
    }

    void linear(int l, const Matrix& x, Matrix& y) {
      if constexpr (sits_at_layers<Adapter>)
        forward(l, x, y);
      else
        model_.network_->layer(l).forward(x, y);
    }
    void linear_backward(int l, const Matrix& x, Matrix& dy, Matrix& dx) {
      if constexpr (sits_at_layers<Adapter>)
        backward(l, x, dy, dx, model_.network_->shape(l).first);
      else
        model_.network_->layer(l).backward(dy, dx);
    }
    void block(int b, const Matrix& x, Matrix& y) requires sits_at_blocks<Adapter> { forward(b, x, y); }
    void block_backward(int b, const Matrix& x, Matrix& dy, Matrix& dx) requires sits_at_blocks<Adapter> {
      backward(b, x, dy, dx, b == 0);
    }
    void prepend(const Matrix& x, Matrix& y) requires sits_before_tokens<Adapter> { forward(0, x, y); }
    void prepend_backward(const Matrix& x, Matrix& dy) requires sits_before_tokens<Adapter> {
      Matrix none;
      backward(0, x, dy, none, true);
    }

    std::vector<lm::gradient_t<Adapter>>* gradient = nullptr;  // one per place
    See see;

   private:
    void forward(int place, const Matrix& x, Matrix& y) {
      saved_[place] = model_.sites_[place].forward(model_.adapters[place], x, y, memory_.work, options(place));
      if (see) see(place, x, saved_[place]);
    }
    void backward(int place, const Matrix& x, Matrix& dy, Matrix& dx, bool first) {
      const Adapter& adapter = model_.adapters[place];
      auto& grad = (*gradient)[place];
      const LossCall call{model_.recipe_.losses, 1.0 / static_cast<double>(saved_.size()), images_.domain,
                          memory_.work};
      losses_before_backward(call, adapter, saved_[place], dy);
      model_.sites_[place].backward(adapter, saved_[place], x, dy, dx, grad, memory_.work);
      losses_after_backward(call, adapter, x, first ? lm::MatrixView<float>{} : view(dx), grad);
    }
    /// The domain of every image is there for methods that are told: as its task, and as its label.
    Options options(int place) {
      Options options{.save = &memory_.reserve, .key = key_, .dropout_off = !key_.on};
      options.key.site = lm::site(Places<Adapter, Net>{*model_.network_}.name(place).c_str());
      if constexpr (sits_before_tokens<Adapter>) {
        options.sequences = lm::Groups<>::by_segment(offsets_.data(), images_.size());
      } else if constexpr (Net::row_per_image) {
        options.tasks = lm::Groups<>::by_id(images_.domain.data(), domains);
        options.labels = {labels_.data(), images_.size()};
      }
      return options;
    }

    const Adapted& model_;
    Memory& memory_;
    const Images& images_;
    const std::vector<std::int32_t>& labels_;
    lm::Key key_;
    std::vector<Saved> saved_;
    std::vector<Index> offsets_;
  };

  /// MoA's decision for every image, from a pass in which each layer makes its own.
  template <class RoutingPass>
  std::vector<std::int32_t> decisions(const Images& images, const RoutingPass& pass) const {
    std::vector<std::int32_t> decided(images.domain.size(), -1);
    if constexpr (std::is_same_v<Adapter, lm::Moa<float>>) {
      lm::Matrix<std::int32_t> of_layers(static_cast<Index>(adapters.size()), images.size());
      pass([&](int place, const Matrix&, const Saved& saved) {
        for (Index t = 0; t < images.size(); ++t) of_layers.view()(place, t) = saved.scores.ids(t, 0);
      });
      const auto how = deciding == Deciding::vote   ? lm::Decision::vote
                       : deciding == Deciding::last ? lm::Decision::last
                                                    : lm::Decision::first;
      lm::decide(lm::cpu::Backend{}, how, std::as_const(of_layers).view(), adapters[0].config().experts,
                 lm::VectorView<std::int32_t>{decided.data(), images.size()});
    }
    return decided;
  }

  Recipe<Adapter> recipe_;
  const Net* network_;
  std::vector<Site> sites_;
};

}  // namespace demo

// A frozen network with one adapter per linear layer, and the training loop of any adapter of the library.
#pragma once
#include <functional>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/cpu/cpu.hpp>

#include "sites.hpp"

namespace demo {

constexpr std::array<const char*, layers> layer_name{"layers.0", "layers.1", "layers.2"};

template <class Adapter>
class Adapted {
 public:
  using Config = typename Adapter::Config;

  /// `shape` says the budget (total rank, experts), `adjust` what else a method's configuration needs; the layers say the
  /// rest.
  Adapted(const Network& base, lm::Shape shape, std::uint64_t seed, const std::function<void(Config&)>& adjust)
      : sites_(sites(base)) {
    for (int l = 0; l < layers; ++l) {
      shape.d_in = width[l];
      shape.d_out = width[l + 1];
      Config config = Adapter::Config::of(shape);
      if (adjust) adjust(config);
      adapters.emplace_back(config);
      lm::initialise(adapters[l], {.seed = seed, .site = layer_name[l]});
      sites_[l].start(adapters[l]);
    }
  }

  Adapted(const Network& base, std::vector<Adapter> trained, bool told)
      : adapters(std::move(trained)), labels_told(told), sites_(sites(base)) {}

  Index trainable() const {
    Index count = 0;
    for (const Adapter& adapter : adapters) count += lm::parameter_count(adapter);
    return count;
  }

  Matrix logits(const Images& images) const {
    return logits(images, [](int, const auto&) {});
  }
  /// see(layer, what its forward saved) on the way: what routers did.
  template <class See>
  Matrix logits(const Images& images, const See& see) const {
    Memory memory(*this, images.size());
    Activations h{images.x};
    for (int l = 0; l < layers; ++l) {
      const auto saved = sites_[l].forward(adapters[l], h[l], h[l + 1], memory.work,
                                           options(images, memory, lm::no_draws, labels_told));
      see(l, saved);
      if (l + 1 < layers) h[l + 1] = h[l + 1].cwiseMax(0);
    }
    return h[layers];
  }

  void train(const Images& images, const Protocol& protocol, std::uint64_t seed) {
    Memory memory(*this, protocol.batch);
    std::vector<lm::gradient_t<Adapter>> grad;
    std::vector<lm::AdamW<Adapter>> optimiser;
    for (const Adapter& adapter : adapters) {
      grad.push_back(lm::zeros_like(adapter));
      optimiser.emplace_back(adapter);
    }
    Regime<Adapter> regime(adapters, grad, protocol.steps(images));

    for_batches(images, protocol, seed, [&](const Images& batch, std::uint64_t step, double lr) {
      Activations h{batch.x};
      std::vector<Saved> saved;
      for (int l = 0; l < layers; ++l) {
        const lm::Key key{.seed = seed, .site = lm::site(layer_name[l]), .step = step};
        saved.push_back(sites_[l].forward(adapters[l], h[l], h[l + 1], memory.work, options(batch, memory, key, true)));
        if (l + 1 < layers) h[l + 1] = h[l + 1].cwiseMax(0);
      }

      Matrix dy = cross_entropy_gradient(h[layers], batch.label), dx;
      for (int l = layers - 1; l >= 0; --l) {
        sites_[l].backward(adapters[l], saved[l], h[l], dy, dx, grad[l], memory.work);
        if (l > 0) relu_backward(h[l], dx);
        dy.swap(dx);
      }
      memory.reserve.reset();

      regime.before_step();
      for (int l = 0; l < layers; ++l) {
        optimiser[l].lr(lr);
        optimiser[l].step(sites_[l].backend(), adapters[l], grad[l]);
      }
      regime.after_step(static_cast<Index>(step));
    });
  }

  std::vector<Adapter> adapters;  // one per layer
  bool labels_told = true;        // also after training: false leaves MoA to its routers

 private:
  /// What the library's calls need: they allocate nothing themselves.
  struct Memory {
    std::vector<std::byte> work_bytes, reserve_bytes;
    lm::Arena<> work, reserve;

    Memory(const Adapted& model, Index tokens) {
      Index most = lm::loss_workspace_bytes<float>(tokens, domains), all = 0;
      for (int l = 0; l < layers; ++l) {
        const Adapter& adapter = model.adapters[l];
        most = std::max(most, lm::workspace_bytes(model.sites_[l].backend(), adapter, tokens, lm::Pass::backward));
        all += lm::reserve_bytes(adapter, tokens);
      }
      work_bytes.resize(most);
      reserve_bytes.resize(all);
      work = lm::Arena<>{work_bytes};
      reserve = lm::Arena<>{reserve_bytes};
    }
  };

  using Saved = decltype(std::declval<const Site<Adapter>&>().forward(
      std::declval<const Adapter&>(), std::declval<const Matrix&>(), std::declval<Matrix&>(), lm::Arena<>(),
      Options()));

  static std::vector<Site<Adapter>> sites(const Network& base) {
    std::vector<Site<Adapter>> all;
    for (int l = 0; l < layers; ++l) all.emplace_back(base, l);
    return all;
  }

  /// The domain of every image is there for methods that are told: as its task, and as its label.
  static Options options(const Images& images, Memory& memory, const lm::Key& key, bool labels) {
    Options options{.save = &memory.reserve, .key = key};
    options.tasks = lm::Groups<>::by_id(images.domain.data(), domains);
    if (labels) options.labels = {images.domain.data(), images.size()};
    return options;
  }

  std::vector<Site<Adapter>> sites_;
};

}  // namespace demo

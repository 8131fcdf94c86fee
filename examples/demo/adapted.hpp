// A frozen network with one adapter per linear layer, and the training loop of any adapter of the library.
#pragma once
#include <functional>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/cpu/cpu.hpp>

#include "network.hpp"

namespace demo {

constexpr std::array<const char*, layers> layer_name{"layers.0", "layers.1", "layers.2"};

template <class Adapter>
class Adapted {
 public:
  using Config = typename Adapter::Config;

  /// `shape` says the budget (total rank, experts), `adjust` what else a method's configuration needs; the layers say the
  /// rest.
  Adapted(const Network& base, lm::Shape shape, std::uint64_t seed, const std::function<void(Config&)>& adjust)
      : base_(&base) {
    for (int l = 0; l < layers; ++l) {
      shape.d_in = width[l];
      shape.d_out = width[l + 1];
      Config config = Adapter::Config::of(shape);
      if (adjust) adjust(config);
      adapters.emplace_back(config);
      lm::initialise(adapters[l], {.seed = seed, .site = layer_name[l]});
    }
  }

  Adapted(const Network& base, std::vector<Adapter> trained) : adapters(std::move(trained)), base_(&base) {}

  Index trainable() const {
    Index count = 0;
    for (const Adapter& adapter : adapters) count += lm::parameter_count(adapter);
    return count;
  }

  Matrix logits(const Images& images) const {
    const Memory memory(*this, images.size());
    Activations h{images.x};
    for (int l = 0; l < layers; ++l) {
      base_->linear(l, h[l], h[l + 1]);
      lm::forward(be, adapters[l], view(h[l]), view(h[l + 1]), memory.work, {.tasks = tasks_of(images)});
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

    for_batches(images, protocol, seed, [&](const Images& batch, std::uint64_t step, double lr) {
      Activations h{batch.x};
      std::vector<lm::Saved<Adapter>> saved;
      for (int l = 0; l < layers; ++l) {
        const lm::Key key{.seed = seed, .site = lm::site(layer_name[l]), .step = step};
        base_->linear(l, h[l], h[l + 1]);
        saved.push_back(lm::forward(be, adapters[l], view(h[l]), view(h[l + 1]), memory.work,
                                    {.save = &memory.reserve, .key = key, .tasks = tasks_of(batch)}));
        if (l + 1 < layers) h[l + 1] = h[l + 1].cwiseMax(0);
      }

      Matrix dy = cross_entropy_gradient(h[layers], batch.label), dx;
      for (int l = layers - 1; l >= 0; --l) {
        if (l > 0) dx.noalias() = dy * base_->weight(l);  // the layer below also hears it through the base
        lm::backward(be, adapters[l], saved[l], view(h[l]), view(dy), l > 0 ? view(dx) : lm::MatrixView<float>{},
                     grad[l], memory.work, {.parameters = lm::Into::set});
        if (l > 0) relu_backward(h[l], dx);
        dy.swap(dx);
      }
      memory.reserve.reset();

      for (int l = 0; l < layers; ++l) {
        optimiser[l].lr(lr);
        optimiser[l].step(be, adapters[l], grad[l]);
      }
    });
  }

  std::vector<Adapter> adapters;  // one per layer

 private:
  /// The domain of every image, for methods that are told.
  static lm::Groups<> tasks_of(const Images& images) { return lm::Groups<>::by_id(images.domain.data(), domains); }

  /// What the library's calls need: they allocate nothing themselves.
  struct Memory {
    std::vector<std::byte> work_bytes, reserve_bytes;
    lm::Arena<> work, reserve;

    Memory(const Adapted& model, Index tokens) {
      Index most = 0, all = 0;
      for (const Adapter& adapter : model.adapters) {
        most = std::max(most, lm::workspace_bytes(model.be, adapter, tokens, lm::Pass::backward));
        all += lm::reserve_bytes(adapter, tokens);
      }
      work_bytes.resize(most);
      reserve_bytes.resize(all);
      work = lm::Arena<>{work_bytes};
      reserve = lm::Arena<>{reserve_bytes};
    }
  };

  const Network* base_;
  lm::cpu::Backend<> be;  // the calling thread: the demo's threads work on different seeds and methods
};

}  // namespace demo

// Adapters that are not at one layer: MixLoRA around a gated block, prompts before the tokens; and the places of all.
#pragma once
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/adapter/prompt_forward.hpp>

#include "sites.hpp"

namespace demo {

/// MixLoRA's three stages, and the engine's products between them.
template <>
class Site<lm::MixLora<float>> {
 public:
  using Adapter = lm::MixLora<float>;
  struct Saved : lm::MixLoraSaved<Adapter> {
    Matrix u, v, h;  // [T, d_hidden] W1 x, W3 x, Σ g_e h_e
  };

  Site(const Linears& network, int block)
      : gate_(network.layer(3 * block)), up_(network.layer(3 * block + 1)), down_(network.layer(3 * block + 2)) {}

  void start(Adapter&) const {}
  Saved forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    const lm::MixLoraOptions<lm::Space::host> call{.key = options.key, .down_site = ~options.key.site};
    Saved saved{lm::route(be_, adapter, view(x), *options.save, work, call), {}, {}, {}};
    gate_.forward(x, saved.u);
    up_.forward(x, saved.v);
    saved.h.resize(x.rows(), saved.u.cols());
    lm::mix(be_, adapter, saved, view(saved.u), view(saved.v), view(saved.h), work);
    down_.forward(saved.h, y);
    lm::finish(be_, adapter, saved, view(y), work);
    return saved;
  }
  void backward(const Adapter& adapter, Saved& saved, const Matrix& x, Matrix& dy, Matrix& dx,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    constexpr auto set = lm::Into::set;
    Matrix dh, du(x.rows(), saved.u.cols()), dv(x.rows(), saved.v.cols()), dx_of_v;
    lm::finish_backward(be_, adapter, saved, view(dy), grad, work, set);
    down_.backward(dy, dh);
    lm::mix_backward(be_, adapter, saved, view(saved.u), view(saved.v), view(dh), view(du), view(dv), grad, work, set);
    gate_.backward(du, dx);
    up_.backward(dv, dx_of_v);
    if (!gate_.first) dx += dx_of_v;
    lm::route_backward(be_, adapter, saved, view(x), gate_.first ? lm::MatrixView<float>{} : view(dx), grad, work,
                       {.parameters = set});
  }

 private:
  Layer gate_, up_, down_;
  lm::cpu::Backend<> be_;
};

/// Prompts, before the tokens of every image.
template <>
class Site<lm::Prompt<float>> {
 public:
  using Adapter = lm::Prompt<float>;
  using Saved = lm::PromptSaved<Adapter>;

  Site(const Linears&, int) {}

  void start(Adapter&) const {}
  Saved forward(const Adapter& adapter, const Matrix& x, Matrix& y, lm::Arena<> work, const Options& options) const {
    y.resize(adapter.output_rows(x.rows(), options.sequences.segments), x.cols());
    return lm::forward(be_, adapter, view(x), view(y), work, options);
  }
  /// Of x only the number of rows is read. The tokens come from the images: nothing below wants dx.
  void backward(const Adapter& adapter, Saved& saved, const Matrix& x, Matrix& dy, Matrix&,
                lm::gradient_t<Adapter>& grad, lm::Arena<> work) const {
    lm::backward(be_, adapter, saved, view(x), view(dy), {}, grad, work, {.parameters = lm::Into::set});
  }

 private:
  lm::cpu::Backend<> be_;
};

// ---- places --------------------------------------------------------------------------------------------------------

template <class Adapter>
constexpr bool sits_at_blocks = lm::MixLoraAdapter<Adapter>;
template <class Adapter>
constexpr bool sits_before_tokens = lm::PromptAdapter<Adapter>;
template <class Adapter>
constexpr bool sits_at_layers = !sits_at_blocks<Adapter> && !sits_before_tokens<Adapter>;

/// How many places a network has for an adapter, what they are called in files, and the configuration at one: `budget`
/// says total rank and experts (or rows), the network the rest.
template <class Adapter, class Net>
struct Places {
  const Net& network;

  int count() const { return network.layers(); }
  std::string name(int place) const { return network.shape(place).name; }
  typename Adapter::Config config(int place, const lm::Shape& budget) const {
    const LayerShape& shape = network.shape(place);
    return Adapter::Config::of({shape.in, shape.out, budget.total_rank, budget.experts});
  }
};
template <class Net>
struct Places<lm::MixLora<float>, Net> {
  const Net& network;

  int count() const { return Net::blocks; }
  std::string name(int place) const { return Net::block_name(place); }
  lm::MixLoraConfig config(int place, const lm::Shape& budget) const {
    const LayerShape& gate = network.shape(3 * place);
    auto config = lm::MixLoraConfig::of({gate.in, gate.out, budget.total_rank, budget.experts});
    config.d_out = network.shape(3 * place + 2).out;
    return config;
  }
};
template <class Net>
struct Places<lm::Prompt<float>, Net> {
  const Net& network;

  int count() const { return 1; }
  std::string name(int) const { return "prompt"; }
  lm::PromptConfig config(int, const lm::Shape& budget) const { return {.d_in = Net::d, .rows = budget.total_rank}; }
};

}  // namespace demo

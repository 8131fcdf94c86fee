// What users do with a trained adapter: save it, load it back, merge it into the weights, take it out again. Nothing
// may change on the way.
#pragma once
#include <cctype>
#include <cstdio>
#include <cstring>
#include <loramix/adapter/merge.hpp>
#include <loramix/io/adapter.hpp>

#include "adapted.hpp"

namespace demo {

struct RoundTrip {
  bool passed;
  std::string text;
};

inline std::string scientific(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1g", value);
  return text;
}

/// "LoRA, r = 24" is saved as lora-r-24.safetensors.
inline std::string file_name(const std::string& method) {
  std::string name;
  for (const unsigned char c : method) {
    if (std::isalnum(c))
      name += static_cast<char>(std::tolower(c));
    else if (!name.empty() && name.back() != '-')
      name += '-';
  }
  return name + ".safetensors";
}

/// How far the outputs of two models lie apart over all test images.
struct Difference {
  double outputs = 0;     // largest difference of two / largest output
  Index predictions = 0;  // that differ
};

template <class Model, class Other>
Difference difference(const Model& model, const Other& other, const Data& data) {
  Difference d;
  float size = 0, apart = 0;
  for (const Images& images : data.test) {
    const Matrix a = model.logits(images.x), b = other.logits(images.x);
    size = std::max(size, a.cwiseAbs().maxCoeff());
    apart = std::max(apart, (a - b).cwiseAbs().maxCoeff());
    const std::vector<int> p = predictions(a), q = predictions(b);
    for (std::size_t t = 0; t < p.size(); ++t) d.predictions += p[t] != q[t];
  }
  d.outputs = static_cast<double>(apart) / static_cast<double>(size);
  return d;
}

template <class Adapter>
constexpr bool merges_exactly = decltype(std::declval<const Adapter&>().gate())::facts.token_invariant;

/// Saves the model's adapters into one file; returns a model with what the file holds.
template <class Adapter>
Adapted<Adapter> saved_and_loaded(const Adapted<Adapter>& model, const Network& base, const std::string& path) {
  lm::io::AdapterWriter writer;
  for (int l = 0; l < layers; ++l) writer.add(layer_name[l], model.adapters[l]);
  writer.save(path);

  const lm::io::Safetensors file(path);
  std::vector<Adapter> adapters;
  for (int l = 0; l < layers; ++l) adapters.push_back(lm::io::load<Adapter>(file, layer_name[l]));
  return {base, std::move(adapters)};
}

template <class Adapter>
RoundTrip round_trip(const Adapted<Adapter>& model, const Network& base, const Data& data, const std::string& path) {
  const Adapted<Adapter> loaded = saved_and_loaded(model, base, path);
  const Difference d = difference(model, loaded, data);
  RoundTrip trip{d.outputs == 0 && d.predictions == 0, path + ": outputs differ by " + scientific(d.outputs) + ", " +
                                                           std::to_string(d.predictions) + " predictions"};
  if constexpr (merges_exactly<Adapter>) {
    const lm::cpu::Backend be;
    Network network = base;
    std::vector<lm::Merged<float>> merged;
    for (int l = 0; l < layers; ++l) merged.push_back(lm::merge(be, loaded.adapters[l], network.weight_view(l)));
    const Difference m = difference(model, network, data);
    for (int l = 0; l < layers; ++l) merged[l].undo(network.weight_view(l));
    const bool undone = std::memcmp(network.parameters().data, base.parameters().data,
                                    sizeof(float) * static_cast<std::size_t>(Network::size())) == 0;
    trip.passed = trip.passed && m.outputs < 1e-5 && m.predictions == 0 && undone;
    trip.text += "; merged: by " + scientific(m.outputs) + ", " + std::to_string(m.predictions) +
                 " predictions; undone: " + (undone ? "bitwise the base" : "not the base");
  }
  return trip;
}

}  // namespace demo

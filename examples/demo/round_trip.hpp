// What users do with a trained adapter: save it, load it back, merge it into the weights (domain by domain), take it
// out again. Nothing may change on the way.
#pragma once
#include <cctype>
#include <cstdio>
#include <cstring>
#include <loramix/adapter/domains.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/adapter/reparam_forward.hpp>
#include <loramix/io/adapter.hpp>

#include "adapted.hpp"

namespace demo {

struct RoundTrip {
  bool passed;
  std::string text;
};

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

/// How far the outputs of two models lie apart.
struct Difference {
  float outputs = 0;      // largest difference of two / largest output, of the images it is larger for; NaN stays
  Index predictions = 0;  // that differ

  void add(const Difference& other) {
    if (outputs == outputs && !(other.outputs <= outputs)) outputs = other.outputs;
    predictions += other.predictions;
  }
};

template <class Model, class Other>
Difference difference(const Model& model, const Other& other, const Images& images) {
  const Matrix a = model.logits(images), b = other.logits(images);
  Difference found{(a - b).cwiseAbs().maxCoeff<Eigen::PropagateNaN>() / a.cwiseAbs().maxCoeff<Eigen::PropagateNaN>()};
  const std::vector<int> p = predictions(a), q = predictions(b);
  for (std::size_t t = 0; t < p.size(); ++t) found.predictions += p[t] != q[t];
  return found;
}

inline bool same_bits(const Network& a, const Network& b) {
  return std::memcmp(a.parameters().data, b.parameters().data, sizeof(float) * Network::size()) == 0;
}

/// Whether a weight can stand for the adapter: for all images, or for those of one domain that is told.
template <class Adapter>
constexpr bool merges() {
  if constexpr (lm::ProductAdapter<Adapter> && !std::is_same_v<Adapter, lm::Moa<float>>) {
    using Gate = decltype(std::declval<const Adapter&>().gate());
    return Gate::facts.token_invariant || requires { Gate::by_task; };
  }
  return true;
}

/// W of a layer as the domain sees it.
template <class Adapter>
lm::Merged<float> merged_for(int domain, const Adapter& adapter, lm::MatrixView<float> weights) {
  const lm::cpu::Backend be;
  if constexpr (std::is_same_v<Adapter, lm::Moa<float>>) {
    return lm::merge_domain(be, adapter, domain, weights);
  } else if constexpr (requires { decltype(adapter.gate())::by_task; }) {
    return lm::merge(be, adapter, weights, {.task = domain});
  } else {
    return lm::merge(be, adapter, weights);
  }
}

/// Saves the model's adapters into one file; returns a model with what the file holds.
template <class Adapter>
Adapted<Adapter> saved_and_loaded(const Adapted<Adapter>& model, const Network& base, const std::string& path) {
  lm::io::AdapterWriter writer;
  for (int l = 0; l < layers; ++l) writer.add(layer_name[l], model.adapters[l]);
  writer.save(path);

  const lm::io::Safetensors file(path);
  std::vector<Adapter> adapters;
  for (int l = 0; l < layers; ++l) adapters.push_back(lm::io::load<Adapter>(file, layer_name[l]));
  return {base, std::move(adapters), model.labels_told};
}

template <class Adapter>
RoundTrip round_trip(const Adapted<Adapter>& model, const Network& base, const Data& data, const std::string& folder,
                     const std::string& file) {
  const Adapted<Adapter> loaded = saved_and_loaded(model, base, folder + "/" + file);
  Difference after_loading;
  for (const Images& images : data.test) after_loading.add(difference(model, loaded, images));
  bool passed = after_loading.outputs == 0 && after_loading.predictions == 0;
  std::string text = file + ": loaded: outputs " + (passed ? "the same" : "DIFFER");

  if constexpr (merges<Adapter>()) {
    if (!model.labels_told) return {passed, text};
    Network network = base;
    Difference after_merging;
    for (int k = 0; k < domains; ++k) {
      std::vector<lm::Merged<float>> merged;
      for (int l = 0; l < layers; ++l) merged.push_back(merged_for(k, loaded.adapters[l], network.weight_view(l)));
      after_merging.add(difference(model, network, data.test[k]));
      for (int l = 0; l < layers; ++l) merged[l].undo(network.weight_view(l));
    }
    const bool undone = same_bits(network, base);

    char line[160];
    std::snprintf(line, sizeof line, "; merged: %d predictions differ, outputs by %.0e; undone: bits %s",
                  static_cast<int>(after_merging.predictions), static_cast<double>(after_merging.outputs),
                  undone ? "the same" : "DIFFER");
    text += line;
    passed = passed && after_merging.predictions == 0 && after_merging.outputs < 1e-5f && undone;
  }
  return {passed, text};
}

}  // namespace demo

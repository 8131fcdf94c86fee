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

inline Difference difference(const Matrix& a, const Matrix& b) {
  Difference found{(a - b).cwiseAbs().maxCoeff<Eigen::PropagateNaN>() / a.cwiseAbs().maxCoeff<Eigen::PropagateNaN>()};
  const std::vector<int> p = predictions(a), q = predictions(b);
  for (std::size_t t = 0; t < p.size(); ++t) found.predictions += p[t] != q[t];
  return found;
}

inline bool same_bits(const Linears& a, const Linears& b) {
  return std::memcmp(a.parameters().data, b.parameters().data, sizeof(float) * a.size()) == 0;
}

/// Whether a weight can stand for adapters of this kind: for all images, or for those of one domain that is told.
template <class Adapter>
constexpr bool merges() {
  if constexpr (!sits_at_layers<Adapter>) return false;
  if constexpr (lm::ProductAdapter<Adapter> && !std::is_same_v<Adapter, lm::Moa<float>>) {
    using Gate = decltype(std::declval<const Adapter&>().gate());
    return Gate::facts.token_invariant || requires(const Gate& gate) { gate.tasks(); };
  }
  return true;
}
/// Whether it can for these: TeamLoRA's gate may read the token or the task.
template <class Adapter, class Net>
bool told(const Adapted<Adapter, Net>& model) {
  if constexpr (requires { model.adapters[0].gate().tasks(); }) return model.adapters[0].gate().tasks() != 0;
  return model.deciding == Deciding::label;
}

/// W of a layer as the domain sees it.
template <class Adapter>
lm::Merged<float> merged_for(int domain, const Adapter& adapter, lm::MatrixView<float> weights) {
  const lm::cpu::Backend be;
  if constexpr (std::is_same_v<Adapter, lm::Moa<float>>) {
    return lm::merge_domain(be, adapter, domain, weights);
  } else if constexpr (requires { adapter.gate().tasks(); }) {
    return lm::merge(be, adapter, weights, {.task = domain});
  } else {
    return lm::merge(be, adapter, weights);
  }
}

/// The network with the model's adapters merged into it, as the domain sees it, and what undoes that.
template <class Adapter, class Net>
class MergedNetwork {
 public:
  MergedNetwork(const Adapted<Adapter, Net>& model, int domain) : network(model.network()) {
    for (int l = 0; l < network.layers(); ++l) {
      const Adapter& adapter = model.adapters[l];
      merged_.push_back(merged_for(domain, adapter, network.weight_view(l)));
      if constexpr (requires { adapter.bias(); }) {
        biases_.push_back(network.bias(l));
        network.bias(l) += Eigen::Map<const Eigen::RowVectorXf>(adapter.bias().row(domain), adapter.bias().cols);
      }
    }
  }
  void undo() {
    for (int l = 0; l < network.layers(); ++l) {
      merged_[l].undo(network.weight_view(l));
      if (!biases_.empty()) network.bias(l) = biases_[l];
    }
  }

  Net network;

 private:
  std::vector<lm::Merged<float>> merged_;
  std::vector<Eigen::RowVectorXf> biases_;
};

/// Saves the model's adapters into one file; returns a model with what the file holds.
template <class Adapter, class Net>
Adapted<Adapter, Net> saved_and_loaded(const Adapted<Adapter, Net>& model, const std::string& path) {
  const Places<Adapter, Net> places{model.network()};
  lm::io::AdapterWriter writer;
  for (int i = 0; i < places.count(); ++i) writer.add(places.name(i), model.adapters[i]);
  writer.save(path);

  const lm::io::Safetensors file(path);
  std::vector<Adapter> adapters;
  for (int i = 0; i < places.count(); ++i) adapters.push_back(lm::io::load<Adapter>(file, places.name(i)));
  return model.with(std::move(adapters));
}

template <class Adapter, class Net>
RoundTrip round_trip(const Adapted<Adapter, Net>& model, const Data& data, const std::string& folder,
                     const std::string& file) {
  const Adapted<Adapter, Net> loaded = saved_and_loaded(model, folder + "/" + file);
  Difference after_loading;
  for (const Images& images : data.test) after_loading.add(difference(model.logits(images), loaded.logits(images)));
  bool passed = after_loading.outputs == 0 && after_loading.predictions == 0;
  std::string text = file + ": loaded: outputs " + (passed ? "the same" : "DIFFER");

  if constexpr (merges<Adapter>()) {
    if (!told(model)) return {passed, text};
    Difference after_merging;
    bool undone = true;
    for (int k = 0; k < domains; ++k) {
      MergedNetwork<Adapter, Net> merged(loaded, k);
      after_merging.add(difference(model.logits(data.test[k]), logits(merged.network, data.test[k].x)));
      merged.undo();
      undone = undone && same_bits(merged.network, model.network());
    }

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

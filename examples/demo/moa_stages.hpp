// MoA is trained in two stages, each for half of the epochs: a LoRA per domain, alone; then a mixture that starts from
// them. One training gives a row for every way of deciding which expert reads a test image.
#pragma once
#include "methods.hpp"

namespace demo {

struct MoaRow {
  Title title;
  Deciding deciding;
};

using MoaRecipe = Recipe<lm::Moa<float>>;

/// All images of one domain.
inline Images images_of(int domain, const Images& all) {
  std::vector<Index> rows;
  for (Index i = 0; i < all.size(); ++i) {
    if (all.domain[i] == domain) rows.push_back(i);
  }
  return select(all, rows, 0, static_cast<Index>(rows.size()));
}

/// Stage 1 and the start of stage 2. A step sees as many images of a domain as it would in the mixture.
inline std::vector<double> start_from_loras(Adapted<lm::Moa<float>, Mlp>& moa, const Task& task, Protocol protocol) {
  protocol.batch /= domains;
  const Index rank = moa.adapters[0].config().rank;
  const std::size_t layers = moa.adapters.size();
  std::vector<std::vector<lm::Lora<float>>> experts(layers);
  std::vector<double> loss(static_cast<std::size_t>(protocol.epochs), 0.0);
  for (int k = 0; k < domains; ++k) {
    const std::uint64_t seed = task.seed + 100 * static_cast<std::uint64_t>(k + 1);
    Adapted<lm::Lora<float>, Mlp> alone(moa.network(), {{.total_rank = rank}}, seed);
    const std::vector<double> of_domain = alone.train(images_of(k, task.data.train), protocol, seed);
    for (std::size_t i = 0; i < loss.size(); ++i) loss[i] += of_domain[i] / domains;
    for (std::size_t l = 0; l < layers; ++l) experts[l].push_back(alone.adapters[l]);
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const std::string site = moa.network().shape(static_cast<int>(l)).name;
    moa.adapters[l] = lm::Moa<float>::from(std::span<const lm::Lora<float>>(experts[l]),
                                           {.seed = task.seed, .site = site.c_str()}, moa.adapters[l].config());
  }
  return loss;
}

/// `fresh`: no stage 1, and all epochs for the mixture.
inline Method moa(const std::vector<MoaRow>& rows, const MoaRecipe& recipe, bool fresh = false) {
  std::vector<Title> titles;
  for (const MoaRow& row : rows) titles.push_back(row.title);
  const Mlp network;
  const Index trainable = Adapted<lm::Moa<float>, Mlp>(network, recipe, 0).trainable();
  return {titles, trainable, network.size(), [=](const Task& task) {
            Adapted<lm::Moa<float>, Mlp> model(task.network<Mlp>(), recipe, task.seed);
            std::vector<double> loss;
            const double seconds = seconds_of([&] {
              Protocol stage = task.protocol;
              if (!fresh) {
                stage.epochs = task.protocol.epochs / 2;
                loss = start_from_loras(model, task, stage);
                stage.epochs = task.protocol.epochs - stage.epochs;
              }
              const std::vector<double> of_mixture = model.train(task.data.train, stage, task.seed);
              loss.insert(loss.end(), of_mixture.begin(), of_mixture.end());
            });
            std::vector<Outcome> outcomes;
            for (const MoaRow& row : rows) {
              model.deciding = row.deciding;
              outcomes.push_back(outcome(model, task, row.title, seconds, loss));
            }
            return outcomes;
          }};
}

}  // namespace demo

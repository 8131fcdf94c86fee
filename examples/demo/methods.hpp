// What is compared: a method is trained on one seed's task and gives a row of the table, or several.
#pragma once
#include <time.h>

#include <functional>
#include <tuple>

#include "details.hpp"
#include "gated.hpp"
#include "mlp.hpp"
#include "reader.hpp"
#include "round_trip.hpp"

namespace demo {

/// One seed: its data, the networks that have learnt the clean images, and how long methods may learn the domains.
struct Task {
  std::uint64_t seed;
  Data data;
  std::tuple<Mlp, Gated, Reader> networks;
  Protocol protocol;

  template <class Net>
  const Net& network() const {
    return std::get<Net>(networks);
  }
};

struct Outcome {
  double seconds = 0;                                         // of training
  std::array<double, domains> accuracy{};                     // in percent of each domain's test images
  std::vector<double> loss;                                   // of every epoch
  Details details;                                            // the same for every seed but for the values
  std::function<RoundTrip(const std::string& folder)> check;  // save, load and merge what was trained

  double average() const { return std::accumulate(accuracy.begin(), accuracy.end(), 0.0) / domains; }
};

/// A row of the table; `of`: it is an ablation of that row.
struct Title {
  std::string name, of = {};
};

struct Method {
  std::vector<Title> rows;
  Index trainable, network;  // values
  std::function<std::vector<Outcome>(const Task&)> run;
};

/// Processor time of this thread: methods are trained side by side, each by one thread.
template <class Work>
double seconds_of(const Work& work) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double start = now();
  work();
  return now() - start;
}

/// logits(images of a domain) → how many are read right.
template <class Logits>
std::array<double, domains> accuracies(const Data& data, const Logits& logits) {
  std::array<double, domains> percent;
  for (int k = 0; k < domains; ++k) percent[k] = accuracy(logits(data.test[k]), data.test[k].label);
  return percent;
}

template <class Net>
std::array<double, domains> accuracies(const Data& data, const Net& network) requires std::derived_from<Net, Linears> {
  return accuracies(data, [&](const Images& images) { return logits(network, images.x); });
}

template <class Adapter, class Net>
Outcome outcome(const Adapted<Adapter, Net>& model, const Task& task, const Title& title, double seconds,
                const std::vector<double>& loss) {
  Outcome outcome{.seconds = seconds,
                  .accuracy = accuracies(task.data, [&](const Images& images) { return model.logits(images); }),
                  .loss = loss,
                  .details = details(model, task.data),
                  .check = {}};
  if (title.of.empty()) {
    outcome.check = [=, &task](const std::string& folder) {
      return round_trip(model, task.data, folder, file_name(title.name));
    };
  }
  return outcome;
}

template <class Net>
Method frozen(const std::string& name) {
  return {{{name}}, 0, Net().size(), [](const Task& task) {
            Outcome outcome;
            outcome.accuracy = accuracies(task.data, task.network<Net>());
            return std::vector{outcome};
          }};
}

template <class Net>
Method full_fine_tuning(const std::string& name) {
  return {{{name}}, Net().size(), Net().size(), [](const Task& task) {
            Net network = task.network<Net>();
            Outcome outcome;
            outcome.seconds =
                seconds_of([&] { outcome.loss = train(network, task.data.train, task.protocol, task.seed); });
            outcome.accuracy = accuracies(task.data, network);
            return std::vector{outcome};
          }};
}

/// Any adapter of the library, at a budget.
template <class Net, class Adapter>
Method adapter(const Title& title, const Recipe<Adapter>& recipe) {
  const Net network;
  return {{title}, Adapted<Adapter, Net>(network, recipe, 0).trainable(), network.size(), [=](const Task& task) {
            Adapted<Adapter, Net> model(task.network<Net>(), recipe, task.seed);
            std::vector<double> loss;
            const double seconds = seconds_of([&] { loss = model.train(task.data.train, task.protocol, task.seed); });
            return std::vector{outcome(model, task, title, seconds, loss)};
          }};
}

/// The recipe with something else in its configurations.
template <class Adapter, class Change>
Recipe<Adapter> changed(Recipe<Adapter> recipe, const Change& change) {
  recipe.adjust = [before = recipe.adjust, change](typename Adapter::Config& config) {
    if (before) before(config);
    change(config);
  };
  return recipe;
}

/// Methods that belong together, and ablations of them after each.
struct Group {
  std::string title;
  std::vector<Method> methods = {};

  template <class Net = Mlp, class Adapter>
  void add(const std::string& name, const Recipe<Adapter>& recipe) {
    methods.push_back(adapter<Net, Adapter>({name}, recipe));
  }
  /// Of the method added last.
  template <class Net = Mlp, class Adapter>
  void ablation(const std::string& what, const Recipe<Adapter>& recipe) {
    const Title& last = methods.back().rows.back();
    methods.push_back(adapter<Net, Adapter>({what, last.of.empty() ? last.name : last.of}, recipe));
  }
  template <class Net = Mlp, class Adapter, class Change>
  void ablation(const std::string& what, const Recipe<Adapter>& recipe, const Change& change) {
    ablation<Net>(what, changed(recipe, change));
  }
};

/// MoRE's row, whose ranks are drawn.
inline constexpr int more_rank = 13;
inline constexpr const char* more_name = "MoRE, at most 13";

inline Group no_adapter() {
  return {"no adapter", {frozen<Mlp>("frozen base"), full_fine_tuning<Mlp>("full fine-tuning")}};
}
Group one_adapter();           // one_adapter.cpp
Group token_mixtures();        // token_mixtures.cpp
Group told_the_domain();       // told_the_domain.cpp
Group listed();                // listed.cpp
Group gated_blocks();          // other_networks.cpp
Group image_rows_as_tokens();  // other_networks.cpp

}  // namespace demo

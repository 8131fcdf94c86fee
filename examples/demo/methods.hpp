// What is compared: a method has a name, a number of trainable parameters and a way to learn one seed's task.
#pragma once
#include <time.h>

#include <cmath>
#include <functional>
#include <loramix/adapter/more.hpp>

#include "round_trip.hpp"

namespace demo {

/// One seed: its data, the network that has learnt the clean images, and how long methods may learn the domains.
struct Task {
  std::uint64_t seed;
  Data data;
  Network base;
  Protocol protocol;
};

/// Something seen in the trained layers, domain by domain.
struct Detail {
  std::string name;
  std::array<double, domains> value{};
};

struct Outcome {
  double seconds = 0;                                         // of training
  std::array<double, domains> accuracy{};                     // in percent of each domain's test images
  std::vector<Detail> details;                                // the same for every seed but for the values
  std::function<RoundTrip(const std::string& folder)> check;  // save, load and merge what was trained

  double average() const { return std::accumulate(accuracy.begin(), accuracy.end(), 0.0) / domains; }
};

struct Method {
  std::string name;
  Index trainable;
  std::function<Outcome(const Task&)> run;
};

template <class Model>
std::array<double, domains> accuracies(const Model& model, const Data& data) {
  std::array<double, domains> percent;
  for (int k = 0; k < domains; ++k) percent[k] = accuracy(model.logits(data.test[k]), data.test[k].label);
  return percent;
}

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

inline Method frozen_base() {
  return {"frozen base", 0, [](const Task& task) {
            return Outcome{.seconds = 0, .accuracy = accuracies(task.base, task.data), .details = {}, .check = {}};
          }};
}

inline Method full_fine_tuning() {
  return {"full fine-tuning", Network::size(), [](const Task& task) {
            Network network = task.base;
            const double seconds = seconds_of([&] { train(network, task.data.train, task.protocol, task.seed); });
            return Outcome{.seconds = seconds, .accuracy = accuracies(network, task.data), .details = {}, .check = {}};
          }};
}

/// How unevenly the images of a batch load the experts of a token router: sd/mean of the experts' summed weights.
template <class Scores>
double load_variation(const Scores& scores, Index experts) {
  Eigen::ArrayXd load = Eigen::ArrayXd::Zero(experts);
  for (Index t = 0; t < scores.weights.rows; ++t) {
    for (Index i = 0; i < scores.weights.cols; ++i) {
      const Index e = scores.ids.data == nullptr ? i : scores.ids(t, i);
      if (e >= 0) load[e] += static_cast<double>(scores.weights(t, i));
    }
  }
  return std::sqrt((load - load.mean()).square().mean()) / load.mean();
}

template <class Adapter>
constexpr bool routes_experts = lm::ProductAdapter<Adapter>&& requires(const Adapter& a) {
  a.config().experts;
};

/// What routers chose: MoRE's ranks, whether MoA's routers are right, how evenly the others load their experts.
template <class Adapter>
std::vector<Detail> details(const Adapted<Adapter>& model, const Data& data) {
  std::vector<Detail> found(layers);
  for (int k = 0; k < domains; ++k) {
    model.logits(data.test[k], [&](int l, const auto& saved) {
      const std::string layer = ", layer " + std::to_string(l + 1);
      if constexpr (std::is_same_v<Adapter, lm::More<float>>) {
        found[l] = {"rank" + layer, found[l].value};
        found[l].value[k] = static_cast<double>(model.adapters[l].chosen_rank(k));
      } else if constexpr (std::is_same_v<Adapter, lm::Moa<float>>) {
        if (model.labels_told) return;
        const Index images = saved.scores.ids.rows;
        Index right = 0;
        for (Index t = 0; t < images; ++t) right += saved.scores.ids(t, 0) == k;
        found[l] = {"routed right %" + layer, found[l].value};
        found[l].value[k] = 100.0 * static_cast<double>(right) / static_cast<double>(images);
      } else if constexpr (routes_experts<Adapter>) {
        if (!saved.scores.by_token || saved.scores.weights.rows != data.test[k].size()) return;
        found[l] = {"load CV" + layer, found[l].value};
        found[l].value[k] = load_variation(saved.scores, model.adapters[l].config().experts);
      }
    });
  }
  std::erase_if(found, [](const Detail& detail) { return detail.name.empty(); });
  return found;
}

/// Whether MoA is told the domain of a test image or its routers choose.
enum class Domains { told, routed };

/// Any adapter of the library, at a budget.
template <class Adapter>
Method adapter(const std::string& name, const lm::Shape& shape,
               const std::function<void(typename Adapter::Config&)>& adjust = {}, Domains tests = Domains::told) {
  return {name, Adapted<Adapter>(Network(), shape, 0, adjust).trainable(), [=](const Task& task) {
            Adapted<Adapter> model(task.base, shape, task.seed, adjust);
            const double seconds = seconds_of([&] { model.train(task.data.train, task.protocol, task.seed); });
            model.labels_told = tests == Domains::told;
            const auto check = [=, &task](const std::string& folder) {
              return round_trip(model, task.base, task.data, folder, file_name(name));
            };
            return Outcome{.seconds = seconds,
                           .accuracy = accuracies(model, task.data),
                           .details = details(model, task.data),
                           .check = check};
          }};
}

}  // namespace demo

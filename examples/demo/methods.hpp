// What is compared: a method has a name, a number of trainable parameters and a way to learn one seed's task.
#pragma once
#include <time.h>

#include <functional>

#include "round_trip.hpp"

namespace demo {

/// One seed: its data, the network that has learnt the clean images, and how long methods may learn the domains.
struct Task {
  std::uint64_t seed;
  Data data;
  Network base;
  Protocol protocol;
};

struct Outcome {
  double seconds = 0;                                         // of training
  std::array<double, domains> accuracy{};                     // in percent of each domain's test images
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
            return Outcome{.seconds = 0, .accuracy = accuracies(task.base, task.data), .check = {}};
          }};
}

inline Method full_fine_tuning() {
  return {"full fine-tuning", Network::size(), [](const Task& task) {
            Network network = task.base;
            const double seconds = seconds_of([&] { train(network, task.data.train, task.protocol, task.seed); });
            return Outcome{.seconds = seconds, .accuracy = accuracies(network, task.data), .check = {}};
          }};
}

/// Any adapter of the library, at a budget.
template <class Adapter>
Method adapter(const std::string& name, const lm::Shape& shape,
               const std::function<void(typename Adapter::Config&)>& adjust = {}) {
  return {name, Adapted<Adapter>(Network(), shape, 0, adjust).trainable(), [=](const Task& task) {
            Adapted<Adapter> model(task.base, shape, task.seed, adjust);
            const double seconds = seconds_of([&] { model.train(task.data.train, task.protocol, task.seed); });
            const auto check = [=, &task](const std::string& folder) {
              return round_trip(model, task.base, task.data, folder, file_name(name));
            };
            return Outcome{.seconds = seconds, .accuracy = accuracies(model, task.data), .check = check};
          }};
}

}  // namespace demo

// The demo's own training: what the engine around the library does.
#pragma once
#include <algorithm>
#include <cmath>
#include <loramix/train/adamw.hpp>
#include <loramix/train/schedule.hpp>

#include "linears.hpp"

namespace demo {

/// The mean cross-entropy, and its gradient (softmax(logits) − one-hot(label)) / T.
inline double cross_entropy(const Matrix& logits, const std::vector<int>& label, Matrix& d) {
  const Eigen::VectorXf top = logits.rowwise().maxCoeff();
  d = (logits.colwise() - top).array().exp();
  const Eigen::VectorXf sum = d.rowwise().sum();
  d.array().colwise() /= sum.array();
  double loss = 0;
  for (Index t = 0; t < d.rows(); ++t) {
    loss += static_cast<double>(top[t] + std::log(sum[t]) - logits(t, label[t]));
    d(t, label[t]) -= 1;
  }
  d /= static_cast<float>(d.rows());
  return loss / static_cast<double>(d.rows());
}

/// What each row of logits says: the class of the largest one, the lower class on a tie.
inline std::vector<int> predictions(const Matrix& logits) {
  std::vector<int> prediction(logits.rows());
  for (Index t = 0; t < logits.rows(); ++t) logits.row(t).maxCoeff(&prediction[t]);
  return prediction;
}

/// Percentage of images that are called by their label.
inline double accuracy(const Matrix& logits, const std::vector<int>& label) {
  const std::vector<int> prediction = predictions(logits);
  Index right = 0;
  for (Index t = 0; t < logits.rows(); ++t) right += prediction[t] == label[t];
  return 100.0 * static_cast<double>(right) / static_cast<double>(logits.rows());
}

template <class Net>
Matrix logits(const Net& network, const Matrix& images) {
  typename Net::Trace trace;
  return network.forward(images, trace, AsItIs{network});
}

struct Protocol {
  int epochs;
  Index batch;
  double lr;         // of the first step
  double lr_at_end;  // reached in a line

  Index steps(const Images& images) const { return epochs * ((images.size() + batch - 1) / batch); }
};

/// step(batch, number, learning rate) → loss for every batch of every epoch, each epoch in an order of its own. Returns
/// every epoch's mean loss.
template <class Step>
std::vector<double> for_batches(const Images& images, const Protocol& protocol, std::uint64_t seed, const Step& step) {
  const lm::LinearSchedule lr{.base = protocol.lr, .total = protocol.steps(images), .floor = protocol.lr_at_end};
  std::vector<double> losses;
  Index number = 0;
  for (int epoch = 0; epoch < protocol.epochs; ++epoch) {
    const std::vector<Index> order = shuffled(images.size(), seed, "demo.batches", epoch);
    double sum = 0;
    for (Index begin = 0; begin < images.size(); begin += protocol.batch, ++number) {
      const Index count = std::min(protocol.batch, images.size() - begin);
      sum += static_cast<double>(count) * step(select(images, order, begin, count), number, lr(number));
    }
    losses.push_back(sum / static_cast<double>(images.size()));
  }
  return losses;
}

/// Trains every weight of the network.
template <class Net>
std::vector<double> train(Net& network, const Images& images, const Protocol& protocol, std::uint64_t seed) {
  const lm::cpu::Backend be;
  Net gradient;
  lm::Buffer<float> m(network.size()), v(network.size());
  typename Net::Trace trace;
  return for_batches(images, protocol, seed, [&](const Images& batch, Index step, double lr) {
    Matrix dy;
    const Trained at{network, gradient};
    const double loss = cross_entropy(network.forward(batch.x, trace, at), batch.label, dy);
    network.backward(trace, dy, at);
    lm::adamw_step(be, network.parameters(), gradient.parameters(), m.view(), v.view(), {.lr = lr, .t = step + 1});
    return loss;
  });
}

/// W, b ~ U(−1/√d_in, 1/√d_in).
template <class Net>
Net fresh(std::uint64_t seed) {
  Net network;
  const lm::Fill fill({.seed = seed, .site = Net::site});
  for (int l = 0; l < network.layers(); ++l) {
    const std::string number = std::to_string(l + 1);
    const double bound = 1 / std::sqrt(static_cast<double>(network.shape(l).in));
    fill.uniform(("W" + number).c_str(), network.weight_view(l), bound);
    fill.uniform(("b" + number).c_str(), lm::MatrixView<float>(network.bias(l).data(), 1, network.shape(l).out), bound);
  }
  return network;
}

}  // namespace demo

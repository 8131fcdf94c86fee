// The network that is adapted, and its own training: what the engine around the library does.
#pragma once
#include <algorithm>
#include <loramix/cpu/cpu.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/schedule.hpp>

#include "digits.hpp"

namespace demo {

constexpr int layers = 3;
constexpr std::array<Index, layers + 1> width{pixels, 256, 256, classes};

/// What the layers see and say: [T, width[l]] for l = 0 (the images), 1, 2 (after ReLU), 3 (the logits).
using Activations = std::array<Matrix, layers + 1>;

/// 64 → 256 → 256 → 10: y = x Wᵀ + b, ReLU between the layers. Also what holds the gradient of one.
class Network {
 public:
  Network() : parameters_(offset(layers)) {}

  static constexpr Index size() { return offset(layers); }
  lm::VectorView<float> parameters() { return parameters_.view(); }
  lm::VectorView<const float> parameters() const { return parameters_.view(); }

  auto weight(int l) { return Eigen::Map<Matrix>(begin(l), width[l + 1], width[l]); }
  auto weight(int l) const { return Eigen::Map<const Matrix>(begin(l), width[l + 1], width[l]); }
  auto bias(int l) { return Eigen::Map<Eigen::RowVectorXf>(begin(l) + width[l + 1] * width[l], width[l + 1]); }
  auto bias(int l) const {
    return Eigen::Map<const Eigen::RowVectorXf>(begin(l) + width[l + 1] * width[l], width[l + 1]);
  }
  /// The same memory as the library sees it.
  lm::MatrixView<float> weight_view(int l) { return {begin(l), width[l + 1], width[l]}; }

  /// One layer, without its ReLU.
  void linear(int l, const Matrix& x, Matrix& y) const {
    y.noalias() = x * weight(l).transpose();
    y.rowwise() += bias(l);
  }
  /// All layers; h[0] is given.
  void forward(Activations& h) const {
    for (int l = 0; l < layers; ++l) {
      linear(l, h[l], h[l + 1]);
      if (l + 1 < layers) h[l + 1] = h[l + 1].cwiseMax(0);
    }
  }
  Matrix logits(const Images& images) const {
    Activations h{images.x};
    forward(h);
    return h[layers];
  }

 private:
  static constexpr Index offset(int l) { return l == 0 ? 0 : offset(l - 1) + width[l] * (width[l - 1] + 1); }
  float* begin(int l) { return parameters_.data() + offset(l); }
  const float* begin(int l) const { return parameters_.data() + offset(l); }

  lm::Buffer<float> parameters_;
};

/// Gradient of the mean cross-entropy: (softmax(logits) − one-hot(label)) / T.
inline Matrix cross_entropy_gradient(const Matrix& logits, const std::vector<int>& label) {
  Matrix d = (logits.colwise() - logits.rowwise().maxCoeff().eval()).array().exp();
  d.array().colwise() /= d.rowwise().sum().eval().array();
  for (Index t = 0; t < d.rows(); ++t) d(t, label[t]) -= 1;
  return d / static_cast<float>(d.rows());
}

/// Through a ReLU whose output was h: the gradient passes where the output is positive.
inline void relu_backward(const Matrix& h, Matrix& dh) { dh.array() *= (h.array() > 0).cast<float>(); }

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

// ---- training -----------------------------------------------------------------------------------------------------

struct Protocol {
  int epochs;
  Index batch;
  double lr;         // of the first step
  double lr_at_end;  // reached in a line

  Index steps(const Images& images) const { return epochs * ((images.size() + batch - 1) / batch); }
};

/// step(batch, number, learning rate) for every batch of every epoch, each epoch in an order of its own.
template <class Step>
void for_batches(const Images& images, const Protocol& protocol, std::uint64_t seed, const Step& step) {
  const lm::LinearSchedule lr{.base = protocol.lr, .total = protocol.steps(images), .floor = protocol.lr_at_end};
  Index number = 0;
  for (int epoch = 0; epoch < protocol.epochs; ++epoch) {
    const std::vector<Index> order = shuffled(images.size(), seed, "demo.batches", epoch);
    for (Index begin = 0; begin < images.size(); begin += protocol.batch, ++number) {
      const Index count = std::min(protocol.batch, images.size() - begin);
      step(select(images, order, begin, count), number, lr(number));
    }
  }
}

/// Trains every weight of the network.
inline void train(Network& network, const Images& images, const Protocol& protocol, std::uint64_t seed) {
  const lm::cpu::Backend be;
  Network grad;
  lm::Buffer<float> m(Network::size()), v(Network::size());
  for_batches(images, protocol, seed, [&](const Images& batch, Index step, double lr) {
    Activations h{batch.x};
    network.forward(h);
    Matrix dy = cross_entropy_gradient(h[layers], batch.label), dx;
    for (int l = layers - 1; l >= 0; --l) {
      grad.weight(l).noalias() = dy.transpose() * h[l];
      grad.bias(l) = dy.colwise().sum();
      if (l == 0) break;
      dx.noalias() = dy * network.weight(l);
      relu_backward(h[l], dx);
      dy.swap(dx);
    }
    lm::adamw_step(be, network.parameters(), grad.parameters(), m.view(), v.view(), {.lr = lr, .t = step + 1});
  });
}

/// W, b ~ U(−1/√d_in, 1/√d_in).
inline Network fresh_network(std::uint64_t seed) {
  static constexpr const char* names[layers][2] = {{"W1", "b1"}, {"W2", "b2"}, {"W3", "b3"}};
  Network network;
  const lm::Fill fill({.seed = seed, .site = "demo.base"});
  for (int l = 0; l < layers; ++l) {
    const double bound = 1 / std::sqrt(static_cast<double>(width[l]));
    fill.uniform(names[l][0], network.weight_view(l), bound);
    fill.uniform(names[l][1], lm::MatrixView<float>(network.bias(l).data(), 1, width[l + 1]), bound);
  }
  return network;
}

}  // namespace demo

// Linear layers in one buffer: what every network of the demo is made of, and how one of them looks to an adapter.
#pragma once
#include <loramix/cpu/cpu.hpp>

#include "digits.hpp"

namespace demo {

/// One layer: y = x Wᵀ + b.
struct Layer {
  Eigen::Map<const Matrix> weight;            // [out, in]
  Eigen::Map<const Eigen::RowVectorXf> bias;  // [out]
  bool first;                                 // reads the images: nothing below wants dx

  void forward(const Matrix& x, Matrix& y) const {
    y.noalias() = x * weight.transpose();
    y.rowwise() += bias;
  }
  void backward(const Matrix& dy, Matrix& dx) const {
    if (!first) dx.noalias() = dy * weight;
  }
  /// The weight as the library sees it.
  lm::MatrixView<const float> weight_view() const { return {weight.data(), weight.rows(), weight.cols()}; }
};

/// A layer's name in files, and its size.
struct LayerShape {
  std::string name;
  Index in, out;
  bool first = false;
};

/// Owns W and b of all layers. Also what holds the gradient of a network.
class Linears {
 public:
  explicit Linears(std::vector<LayerShape> shapes) : shapes_(std::move(shapes)) {
    offset_.push_back(0);
    for (const LayerShape& s : shapes_) offset_.push_back(offset_.back() + s.out * (s.in + 1));
    parameters_ = lm::Buffer<float>(size());
  }

  int layers() const { return static_cast<int>(shapes_.size()); }
  const LayerShape& shape(int l) const { return shapes_[l]; }
  Index size() const { return offset_.back(); }
  lm::VectorView<float> parameters() { return parameters_.view(); }
  lm::VectorView<const float> parameters() const { return parameters_.view(); }

  auto weight(int l) { return Eigen::Map<Matrix>(begin(l), shape(l).out, shape(l).in); }
  auto bias(int l) { return Eigen::Map<Eigen::RowVectorXf>(begin(l) + shape(l).out * shape(l).in, shape(l).out); }
  lm::MatrixView<float> weight_view(int l) { return {begin(l), shape(l).out, shape(l).in}; }
  Layer layer(int l) const {
    const LayerShape& s = shapes_[l];
    const float* const w = parameters_.data() + offset_[l];
    return {{w, s.out, s.in}, {w + s.out * s.in, s.out}, s.first};
  }

 private:
  float* begin(int l) { return parameters_.data() + offset_[l]; }

  std::vector<LayerShape> shapes_;
  std::vector<Index> offset_;
  lm::Buffer<float> parameters_;
};

/// A network (mlp.hpp, gated.hpp, reader.hpp) writes its forward and backward once, for every way of training it: this is
/// what they call where a layer is. This one: the network as it is.
struct AsItIs {
  const Linears& network;

  void linear(int l, const Matrix& x, Matrix& y) const { network.layer(l).forward(x, y); }
  /// dx is assigned; dy may be overwritten.
  void linear_backward(int l, const Matrix&, Matrix& dy, Matrix& dx) const { network.layer(l).backward(dy, dx); }
};

/// This one: all weights are trained.
struct Trained {
  const Linears& network;
  Linears& gradient;

  void linear(int l, const Matrix& x, Matrix& y) const { network.layer(l).forward(x, y); }
  void linear_backward(int l, const Matrix& x, Matrix& dy, Matrix& dx) const {
    gradient.weight(l).noalias() = dy.transpose() * x;
    gradient.bias(l) = dy.colwise().sum();
    network.layer(l).backward(dy, dx);
  }
};

/// Through a ReLU whose output was h: the gradient passes where the output is positive.
inline void relu_backward(const Matrix& h, Matrix& dh) { dh.array() *= (h.array() > 0).cast<float>(); }

}  // namespace demo

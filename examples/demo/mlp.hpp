// The network that most methods adapt.
#pragma once
#include "linears.hpp"

namespace demo {

/// 64 → 256 → 256 → 10, ReLU between the layers.
class Mlp : public Linears {
 public:
  static constexpr const char* site = "demo.base";
  static constexpr bool row_per_image = true;
  struct Trace {
    std::array<Matrix, 4> h;  // [T, width] the images, after ReLU twice, the logits
  };

  Mlp() : Linears({{"layers.0", pixels, 256, true}, {"layers.1", 256, 256}, {"layers.2", 256, classes}}) {}
  static Index rows(Index images) { return images; }

  template <class At>
  const Matrix& forward(const Matrix& images, Trace& trace, At&& at) const {
    trace.h[0] = images;
    for (int l = 0; l < 3; ++l) {
      at.linear(l, trace.h[l], trace.h[l + 1]);
      if (l < 2) trace.h[l + 1] = trace.h[l + 1].cwiseMax(0);
    }
    return trace.h[3];
  }
  template <class At>
  void backward(Trace& trace, Matrix& dy, At&& at) const {
    Matrix dx;
    for (int l = 2; l >= 0; --l) {
      at.linear_backward(l, trace.h[l], dy, dx);
      if (l > 0) relu_backward(trace.h[l], dx);
      dy.swap(dx);
    }
  }
};

}  // namespace demo

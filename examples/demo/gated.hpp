// A network of gated blocks, as MixLoRA adapts them.
#pragma once
#include "linears.hpp"

namespace demo {

/// Two gated blocks, y = W2 (silu(W1 x) ∘ W3 x): 64 → 256 → 64, added to the image, and 64 → 256 → 10.
class Gated : public Linears {
 public:
  static constexpr const char* site = "demo.gated";
  static constexpr bool row_per_image = true;
  static constexpr int blocks = 2;
  /// Of one block.
  struct Middle {
    Matrix u, v, h;  // [T, 256] W1 x, W3 x, silu(u) ∘ v
  };
  struct Trace {
    std::array<Matrix, blocks + 1> x;  // what the blocks read; the logits
    std::array<Middle, blocks> middle;
  };

  Gated()
      : Linears({{"blocks.0.gate_proj", pixels, 256, true},
                 {"blocks.0.up_proj", pixels, 256, true},
                 {"blocks.0.down_proj", 256, pixels},
                 {"blocks.1.gate_proj", pixels, 256},
                 {"blocks.1.up_proj", pixels, 256},
                 {"blocks.1.down_proj", 256, classes}}) {}
  static Index rows(Index images) { return images; }
  static std::string block_name(int b) { return "blocks." + std::to_string(b); }

  template <class At>
  const Matrix& forward(const Matrix& images, Trace& trace, At&& at) const {
    trace.x[0] = images;
    for (int b = 0; b < blocks; ++b) {
      if constexpr (requires { at.block(b, trace.x[b], trace.x[b + 1]); })
        at.block(b, trace.x[b], trace.x[b + 1]);
      else
        block(b, trace.x[b], trace.middle[b], trace.x[b + 1], at);
      if (b == 0) trace.x[1] += images;
    }
    return trace.x[blocks];
  }
  template <class At>
  void backward(Trace& trace, Matrix& dy, At&& at) const {
    Matrix dx;
    for (int b = blocks - 1; b >= 0; --b) {
      if constexpr (requires { at.block_backward(b, trace.x[b], dy, dx); })
        at.block_backward(b, trace.x[b], dy, dx);
      else
        block_backward(b, trace.x[b], trace.middle[b], dy, dx, at);
      dy.swap(dx);
    }
  }

 private:
  template <class At>
  static void block(int b, const Matrix& x, Middle& m, Matrix& y, At& at) {
    at.linear(3 * b, x, m.u);
    at.linear(3 * b + 1, x, m.v);
    m.h = m.u.array() / (1 + (-m.u.array()).exp()) * m.v.array();
    at.linear(3 * b + 2, m.h, y);
  }
  template <class At>
  static void block_backward(int b, const Matrix& x, const Middle& m, Matrix& dy, Matrix& dx, At& at) {
    Matrix dh, dx_of_v;
    at.linear_backward(3 * b + 2, m.h, dy, dh);
    const Matrix sigmoid = (1 + (-m.u.array()).exp()).inverse();
    Matrix dv = dh.array() * m.u.array() * sigmoid.array();
    Matrix du = dh.array() * m.v.array() * sigmoid.array() * (1 + m.u.array() * (1 - sigmoid.array()));
    at.linear_backward(3 * b, x, du, dx);
    at.linear_backward(3 * b + 1, x, dv, dx_of_v);
    if (b > 0) dx += dx_of_v;
  }
};

}  // namespace demo

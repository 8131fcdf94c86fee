// What an engine has already, in small: its own threads and its own product. Nothing here knows loramix.
#pragma once
#include <atomic>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

namespace engine {

/// The engine's threads. A real one keeps them alive; what matters here is that they are not ours.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}
  int size() const { return threads_; }
  /// task(i, thread) for every i in [0, n); returns when all are done.
  void parallel_for(long n, const std::function<void(long, int)>& task) {
    std::atomic<long> next{0};
    const auto work = [&](int thread) {
      for (long i; (i = next++) < n;) task(i, thread);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads_; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
  }

 private:
  int threads_;
};

/// A frozen linear layer: y = x Wᵀ, W [d_out, d_in].
struct Linear {
  std::size_t d_in, d_out;
  std::vector<float> weights;

  Linear(std::size_t in, std::size_t out) : d_in(in), d_out(out), weights(in * out) {
    unsigned state = 1;
    for (float& w : weights) {
      state = state * 1664525u + 1013904223u;
      w = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) / 8;
    }
  }
  void forward(const float* x, float* y, std::size_t tokens) const {
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t o = 0; o < d_out; ++o) {
        float sum = 0;
        for (std::size_t c = 0; c < d_in; ++c) sum += weights[o * d_in + c] * x[t * d_in + c];
        y[t * d_out + o] = sum;
      }
    }
  }
};

}  // namespace engine

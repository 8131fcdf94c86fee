// What an engine has already: streams, graphs, and a GEMM. Sums are where mma.sync would leave them, 64 × 32 per warp.
#pragma once
#include <cuda_runtime.h>

#include <loramix/gpu/block.cuh>

namespace engine {

inline void check(cudaError_t status) { loramix::gpu::check_cuda("engine", status); }

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What `work` enqueues, to be launched again and again.
class Graph {
 public:
  template <class F>
  Graph(const Stream& stream, const F& work) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeGlobal));
    work();
    check(cudaStreamEndCapture(stream.get(), &graph));
    check(cudaGraphInstantiate(&executable_, graph, 0));
    cudaGraphDestroy(graph);
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) const { check(cudaGraphLaunch(executable_, stream.get())); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

inline constexpr int threads = 256, deep = 16;
inline constexpr loramix::Index shared_bytes = (64 + threads) * (deep + 1) * sizeof(float);

/// sums = x Wᵀ for 64 rows of x from `token` on and 256 rows of W from `column` on.
template <class View>
__device__ void multiply(const View& x, const View& W, loramix::Index token, loramix::Index column,
                         loramix::gpu::block::Accumulator& sums, unsigned char* shared) {
  using Row = float[deep + 1];
  Row* const xs = reinterpret_cast<Row*>(shared);
  Row* const ws = xs + 64;
  const auto load = [](const View& from, loramix::Index first, int rows, loramix::Index k, Row* to) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * deep; i += threads) {
      const loramix::Index row = first + i / deep, col = k + i % deep;
      to[i / deep][i % deep] = row < from.rows && col < from.cols ? loramix::widen<float>(from(row, col)) : 0.0f;
    }
  };
  sums.clear();
  for (loramix::Index k = 0; k < x.cols; k += deep) {
    __syncthreads();
    load(x, token, 64, k, xs);
    load(W, column, threads, k, ws);
    __syncthreads();
    for (int d = 0; d < deep; ++d) {
      loramix::gpu::block::each(sums, [&](int row, int c, float& sum) { sum += xs[row][d] * ws[c][d]; });
    }
  }
}

}  // namespace engine

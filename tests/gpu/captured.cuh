// CUDA graphs of what ops enqueue, and a harness under which every op runs as one.
#pragma once

#include "conformance/harness.hpp"
#include "gpu/harness.cuh"

namespace loramix_test {

/// What `work` enqueues on `stream`, captured and not run.
class Graph {
 public:
  template <class F>
  Graph(cudaStream_t stream, const F& work) {
    lm::gpu::check_cuda("cudaStreamBeginCapture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    work();
    lm::gpu::check_cuda("cudaStreamEndCapture", cudaStreamEndCapture(stream, &graph_));
    lm::gpu::check_cuda("cudaGraphInstantiate", cudaGraphInstantiate(&executable_, graph_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const {
    lm::gpu::check_cuda("cudaGraphLaunch", cudaGraphLaunch(executable_, stream));
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

class CapturingHarness : public GpuHarness {};

/// Found instead of conformance/harness.hpp's run.
template <class Op>
void run(CapturingHarness& harness, const Op& op) {
  const lm::gpu::Backend be = harness.backend();
  const auto arena = harness.arena(lm::scratch_bytes(be, op));
  const Graph graph(harness.stream(), [&] { lm::execute(be, op, arena); });
  graph.launch(harness.stream());
  harness.wait();
}

}  // namespace loramix_test

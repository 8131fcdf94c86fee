// Every adapter, for whoever goes through all of them: tests/suite on the CPU, tests/gpu, bench/adapters.cpp and the demo.
// A new one is a header in include/loramix/adapter/ (or here, if it is your own) and a line in this list. It then has a
// gradient check, the laws, files, the GPU suite, a row of the bench and one of the demo.
#pragma once
#include <utility>

#include <adapter_headers.hpp>  // all headers of both folders, as CMake finds them

namespace adapters {

namespace lm = loramix;

template <class... A>
struct List {
  static constexpr std::size_t size = sizeof...(A);
};

// P: a scalar, or an lm::Precision. In the order of MATH.md section 4.
// clang-format off
template <class P>
using All = List<
    lm::Lora<P>,
    lm::FusedLora<P>,
    lm::Dora<P>,
    lm::LoraMoe<P>,
    lm::MoeLora<P>,
    lm::HydraLora<P>,
    lm::TeamLora<P>,
    lm::MixLora<P>,
    lm::Mola<P>,
    lm::Moa<P>,
    lm::More<P>,
    lm::AdaLora<P>,
    lm::MosLora<P>,
    lm::MultiLora<P>,
    lm::Ia3<P>,
    lm::Prompt<P>,
    tanh_mixture::TanhMixture<P>,
    lm::Served<P>>;
// clang-format on

// f.template operator()<A>() for every adapter A of a list, in its order.
template <class... A, class F>
void for_each(List<A...>, F&& f) {
  (f.template operator()<A>(), ...);
}

}  // namespace adapters

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

// P: a scalar, or an lm::Precision.
template <class P>
using All = List<      // a line each, in the order of MATH.md section 4
    lm::Lora<P>,       // LoRA and rsLoRA
    lm::FusedLora<P>,  // LoRA on slices of one projection
    lm::Dora<P>,       // DoRA
    lm::LoraMoe<P>,    // LoRAMoE
    lm::MoeLora<P>,    // MOELoRA
    lm::HydraLora<P>,  // HydraLoRA
    lm::TeamLora<P>,   // TeamLoRA
    lm::MixLora<P>,    // MixLoRA's block
    lm::Mola<P>,       // MoLA
    lm::Moa<P>,        // MoA
    lm::More<P>,       // MoRE
    lm::AdaLora<P>,    // AdaLoRA
    lm::MosLora<P>,    // MoSLoRA
    lm::MultiLora<P>,  // MultiLoRA
    lm::Ia3<P>,        // IA3
    lm::Prompt<P>,     // prompt tuning
    lm::Served<P>      // many LoRAs at once
    >;

// A's configuration at a given budget, and what Config::of cannot know: how many tasks or domains there are.
template <class A>
typename A::Config configured(lm::Shape shape, lm::Index tasks) {
  typename A::Config config;
  if constexpr (requires { config.places; }) shape.experts = tasks;  // an expert per domain
  config = A::Config::of(shape);
  if constexpr (requires { config.tasks; }) config.tasks = tasks;
  return config;
}

// f.template operator()<A>() for every adapter A of a list, in its order.
template <class... A, class F>
void for_each(List<A...>, F&& f) {
  (f.template operator()<A>(), ...);
}

}  // namespace adapters

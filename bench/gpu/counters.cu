// One case of bench/gpu/counters.json: counters SCALAR ADAPTER TOKENS PASS runs one pass of one adapter on the GPU, or under the
// emulator, whose statistics bench/gpu/counters reads.
//
//   SCALAR    float, tf32 (float on tensor cores), bfloat16, half
//   ADAPTER   lora-16, dense-32, top-64, top16-512, …: kind, experts of a mixture (8) and total rank; top is top-2
//   PASS      forward; train (a forward that saves); step (train, and its backward)
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/gpu/gpu.cuh>

namespace lm = loramix;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;
constexpr Index width = 4096;

/// Values between −1 and 1 that repeat after 251, or, so that tokens choose at random, drawn.
template <class T>
lm::Buffer<T, device> pattern(Index n, bool drawn) {
  std::vector<T> host(static_cast<std::size_t>(n));
  std::mt19937 random(1);
  for (T& value : host) {
    const auto i = static_cast<Index>(&value - host.data());
    value =
        lm::narrow<T>(drawn ? static_cast<float>(random() >> 24) / 128 - 1 : static_cast<float>(i % 251 - 125) / 128);
  }
  lm::Buffer<T, device> there(n);
  lm::gpu::copy(lm::VectorView<const T>(host.data(), n), there.view());
  return there;
}

template <class A>
void run(const typename A::Config& config, Index tokens, const std::string& pass, bool tf32) {
  using Adapter = typename A::template rebind<typename A::element, device>;
  using X = typename A::precision::activation;
  lm::gpu::Tickets tickets;
  const lm::gpu::Backend be{.tickets = tickets.address(), .tuning = {.tf32 = tf32}};
  Adapter adapter(config);
  bool drawn = false;
  if constexpr (requires { config.rule; }) drawn = config.experts != 8;
  const auto weights = pattern<typename A::element>(adapter.parameters().size, drawn);
  lm::gpu::copy(weights.view(), adapter.parameters());
  auto gradient = lm::zeros_like(adapter);
  const auto rows = [&] { return pattern<X>(tokens * width, drawn); };
  auto x = rows(), y = rows(), dy = rows(), dx = rows();
  const auto view = [tokens](auto& buffer) { return lm::MatrixView<X, device>(buffer.data(), tokens, width); };
  lm::Buffer<std::byte, device> work(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward));
  lm::Buffer<std::byte, device> kept(lm::reserve_bytes(adapter, tokens));
  lm::Arena<device> reserve{kept};
  const bool train = pass != "forward";
  auto saved = lm::forward(be, adapter, view(x), view(y), lm::Arena<device>{work},
                           {.save = train ? &reserve : nullptr, .dropout_off = true});
  if (pass == "step") lm::backward(be, adapter, saved, view(x), view(dy), view(dx), gradient, lm::Arena<device>{work});
  lm::gpu::check_cuda("cudaDeviceSynchronize", cudaDeviceSynchronize());
}

template <class P>
void run_adapter(const std::string& adapter, Index tokens, const std::string& pass, bool tf32 = false) {
  const auto dash = adapter.find('-');
  const Index rank = std::atoi(adapter.c_str() + dash + 1);
  const auto digits = adapter.find_first_of("0123456789");
  const std::string kind = adapter.substr(0, digits < dash ? digits : dash);
  const Index experts = digits < dash ? std::atoi(adapter.c_str() + digits) : 8;
  if (kind == "lora") run<lm::Lora<P>>({.d_in = width, .d_out = width, .rank = rank}, tokens, pass, tf32);
  if (kind == "dense") run<lm::LoraMoe<P>>({width, width, experts, rank / experts}, tokens, pass, tf32);
  if (kind == "top") run<lm::Mola<P>>({width, width, experts, rank / experts}, tokens, pass, tf32);
}

}  // namespace

int main(int count, char** argument) {
  if (count != 5) return std::fprintf(stderr, "usage: %s SCALAR ADAPTER TOKENS PASS\n", argument[0]), 2;
  const std::string scalar = argument[1];
  const Index tokens = std::atoi(argument[3]);
  if (scalar == "float") run_adapter<float>(argument[2], tokens, argument[4]);
  if (scalar == "tf32") run_adapter<float>(argument[2], tokens, argument[4], true);
  if (scalar == "bfloat16") run_adapter<lm::bfloat16>(argument[2], tokens, argument[4]);
  if (scalar == "half") run_adapter<lm::half>(argument[2], tokens, argument[4]);
  return 0;
}

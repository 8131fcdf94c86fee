// The experts of mixtures in files: PEFT's names and orders for every expert apart (PEERS 5.3), files of MoE-PEFT, and what
// a strict reader says of the others.
#include <loramix/io/adapter.hpp>

#include <cstring>
#include <deque>
#include <set>
#include <span>

#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mix_lora.hpp>
#include <loramix/adapter/moa.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/team_lora.hpp>

#include "io/support.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using lm::Index;
using loramix_test::Folder;
using loramix_test::has;
using loramix_test::refusal;

namespace {

using Names = std::set<std::string>;

/// Every value another one.
template <class A>
A numbered(const typename A::Config& config) {
  A adapter(config);
  float next = 1;
  A::visit(adapter, [&next](const char*, auto view, lm::ParameterGroup) {
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = next++;
    }
  });
  return adapter;
}
Names names_of(const lm::io::Safetensors& file) {
  Names names;
  for (const lm::io::Tensor& tensor : file.tensors()) {
    std::string shape;
    for (const Index n : tensor.shape) shape += " " + std::to_string(n);
    names.insert(tensor.name + shape);
  }
  return names;
}
template <class A>
Names saved_names(const Folder& folder, const typename A::Config& config) {
  lm::io::save(folder / "m", "m", numbered<A>(config));
  return names_of(lm::io::Safetensors(folder / "m"));
}
std::vector<float> values(const lm::io::Safetensors& file, const std::string& name) {
  const lm::io::Tensor* const tensor = file.find(name);
  REQUIRE(tensor != nullptr);
  const auto bytes = file.read(*tensor);
  std::vector<float> out(bytes.size() / sizeof(float));
  std::memcpy(out.data(), bytes.data(), bytes.size());
  return out;
}

/// A file as another program writes it: `count` tensors of rising numbers.
struct Foreign {
  std::vector<lm::io::TensorBytes> tensors;
  std::deque<std::vector<float>> memory;
  float next = 0;

  Foreign& add(const std::string& name, Index rows, Index cols) {
    std::vector<float> numbers(static_cast<std::size_t>(rows * cols));
    for (float& n : numbers) n = next += 0.5f;
    const std::vector<float>& kept = memory.emplace_back(std::move(numbers));
    tensors.push_back({name, lm::io::Dtype::F32, {rows, cols}, std::as_bytes(std::span(kept))});
    return *this;
  }
  std::string write(const Folder& folder) const {
    lm::io::write_safetensors(folder / "foreign", tensors, {});
    return folder / "foreign";
  }
};

const lm::MixtureConfig mixture{.d_in = 7, .d_out = 5, .experts = 2, .rank = 3};

}  // namespace

TEST_CASE("every expert has tensors of PEFT's names and shapes; what is shared is one") {
  const Folder folder;
  CHECK(saved_names<lm::LoraMoe<float>>(folder, mixture) ==
        Names{"m.experts.0.lora_A.weight 3 7", "m.experts.1.lora_A.weight 3 7", "m.experts.0.lora_B.weight 5 3",
              "m.experts.1.lora_B.weight 5 3", "m.moe_gate.weight 2 7"});
  CHECK(saved_names<lm::HydraLora<float>>(folder, mixture) ==
        Names{"m.lora_A.weight 3 7", "m.experts.0.lora_B.weight 5 3", "m.experts.1.lora_B.weight 5 3",
              "m.moe_gate.weight 2 7"});
  CHECK(saved_names<lm::TeamLora<float>>(folder, {.d_in = 7,
                                                  .d_out = 5,
                                                  .experts = 1,
                                                  .rank = 3,
                                                  .hidden = 4,
                                                  .reads = lm::Reads::task,
                                                  .tasks = 2,
                                                  .embedding = 6}) ==
        Names{"m.experts.0.lora_A.weight 3 7", "m.experts.0.lora_B.weight 5 3", "m.shapley.0.weight 4 6",
              "m.shapley.0.bias 1 4", "m.shapley.2.weight 1 4", "m.shapley.2.bias 1 1", "m.interaction.weight 1 1",
              "m.task_embedding.weight 2 6"});
  CHECK(saved_names<lm::Moa<float>>(folder, {.d_in = 7, .d_out = 5, .experts = 2, .rank = 3, .places = 4}) ==
        Names{"m.experts.0.lora_A.weight 3 7", "m.experts.1.lora_A.weight 3 7", "m.experts.0.lora_B.weight 5 3",
              "m.experts.1.lora_B.weight 5 3", "m.moe_gate.weight 2 7", "m.moe_gate.bias 1 2"});
  CHECK(saved_names<lm::MoeLora<float>>(folder, lm::hydra_by_task(mixture, 4, 6)) ==
        Names{"m.lora_A.weight 3 7", "m.experts.0.lora_B.weight 5 3", "m.experts.1.lora_B.weight 5 3",
              "m.task_embedding.weight 4 6", "m.moe_gate.weight 2 6"});
  CHECK(saved_names<lm::MultiLora<float>>(folder, {.d_in = 7, .d_out = 5, .experts = 2, .rank = 3}) ==
        Names{"m.experts.0.lora_A.weight 3 7", "m.experts.1.lora_A.weight 3 7", "m.experts.0.lora_B.weight 5 3",
              "m.experts.1.lora_B.weight 5 3", "m.gamma 2 5"});
  CHECK(saved_names<lm::MixLora<float>>(
            folder, {.d_in = 7, .d_hidden = 9, .d_out = 5, .experts = 1, .rank = 3, .rule = {.k = 1}}) ==
        Names{"m.gate_proj.experts.0.lora_A.weight 3 7", "m.gate_proj.experts.0.lora_B.weight 9 3",
              "m.up_proj.experts.0.lora_A.weight 3 7", "m.up_proj.experts.0.lora_B.weight 9 3",
              "m.down_proj.experts.0.lora_A.weight 3 9", "m.down_proj.experts.0.lora_B.weight 5 3",
              "m.moe_gate.weight 1 7"});
}

TEST_CASE("an expert's tensors are its rows of A and its columns of B, row by row") {
  const Folder folder;
  const auto moe = numbered<lm::LoraMoe<float>>(mixture);
  lm::io::save(folder / "m", "m", moe);
  const lm::io::Safetensors file(folder / "m");
  for (Index e = 0; e < 2; ++e) {
    const auto a = values(file, "m.experts." + std::to_string(e) + ".lora_A.weight");
    const auto b = values(file, "m.experts." + std::to_string(e) + ".lora_B.weight");
    for (Index j = 0; j < 3; ++j) {
      for (Index c = 0; c < 7; ++c) CHECK(a[static_cast<std::size_t>(j * 7 + c)] == moe.A()(e * 3 + j, c));
      for (Index o = 0; o < 5; ++o) CHECK(b[static_cast<std::size_t>(o * 3 + j)] == moe.B()(o, e * 3 + j));
    }
  }
  // One expert is a LoRA of PEFT: the same file, read as one.
  const auto one = lm::io::load_as<lm::Lora<float>>(file, "m.experts.1", {.d_in = 7, .d_out = 5, .rank = 3});
  for (Index c = 0; c < 7; ++c) CHECK(one.A()(2, c) == moe.A()(5, c));
  for (Index o = 0; o < 5; ++o) CHECK(one.B()(o, 2) == moe.B()(o, 5));
}

TEST_CASE("files of MoE-PEFT: LORAMOE, MOLA and MIXLORA map one to one") {
  const Folder folder;
  Foreign file;
  const std::string q = "loramoe.layers.0.self_attn.q_proj", mlp = "mixlora.layers.3.mlp";
  file.add(q + ".moe_gate.weight", 2, 7);
  for (const char* e : {"0", "1"}) {
    file.add(q + ".experts." + e + ".lora_A.weight", 3, 7).add(q + ".experts." + e + ".lora_B.weight", 5, 3);
  }
  file.add(mlp + ".moe_gate.weight", 2, 7);
  for (const std::string e : {"0", "1"}) {
    for (const std::string p : {"gate_proj", "up_proj", "down_proj"}) {
      const bool down = p == "down_proj";
      file.add(mlp + "." + p + ".experts." + e + ".lora_A.weight", 3, down ? 9 : 7);
      file.add(mlp + "." + p + ".experts." + e + ".lora_B.weight", down ? 7 : 9, 3);
    }
  }
  file.add("mixlora.layers.3.self_attn.o_proj.lora_A.weight", 3, 7);
  file.add("mixlora.layers.3.self_attn.o_proj.lora_B.weight", 5, 3);
  const lm::io::Safetensors open(file.write(folder));

  const auto moe = lm::io::load_as<lm::LoraMoe<float>>(open, q, mixture);
  CHECK(moe.side()(1, 6) == values(open, q + ".moe_gate.weight")[13]);
  CHECK(moe.A()(4, 2) == values(open, q + ".experts.1.lora_A.weight")[9]);
  CHECK(moe.B()(4, 5) == values(open, q + ".experts.1.lora_B.weight")[14]);
  lm::MolaConfig mola{.d_in = 7, .d_out = 5, .experts = 2, .rank = 3};
  const auto sparse = lm::io::load_as<lm::Mola<float>>(open, q, mola);
  CHECK(std::memcmp(sparse.parameters().data, moe.parameters().data,
                    static_cast<std::size_t>(moe.parameters().size) * sizeof(float)) == 0);
  // [moe-peft]
  const lm::MixLoraConfig config{.d_in = 7, .d_hidden = 9, .d_out = 7, .experts = 2, .rank = 3, .alpha = 6};
  const auto block = lm::io::load_as<lm::MixLora<float>>(open, "mixlora.layers.3.mlp", config);
  // [/moe-peft]
  CHECK(block.A13()(4, 6) == values(open, mlp + ".gate_proj.experts.1.lora_A.weight")[13]);
  CHECK(block.A13()(6 + 1, 0) == values(open, mlp + ".up_proj.experts.0.lora_A.weight")[7]);
  CHECK(block.B3()(8, 3) == values(open, mlp + ".up_proj.experts.1.lora_B.weight")[24]);
  CHECK(block.A2()(3, 8) == values(open, mlp + ".down_proj.experts.1.lora_A.weight")[8]);
  CHECK(block.B2()(6, 2) == values(open, mlp + ".down_proj.experts.0.lora_B.weight")[20]);
  const auto lora =
      lm::io::load_as<lm::Lora<float>>(open, "mixlora.layers.3.self_attn.o_proj", {.d_in = 7, .d_out = 5, .rank = 3});
  CHECK(lora.B()(4, 2) == values(open, "mixlora.layers.3.self_attn.o_proj.lora_B.weight")[14]);
}

TEST_CASE("PEERS 3.25: missing, unexpected and mismatched tensors are all named; nothing is half loaded") {
  const Folder folder;
  Foreign file;
  file.add("m.moe_gate.weight", 2, 7).add("m.experts.0.lora_A.weight", 3, 7).add("m.experts.0.lora_B.weight", 3, 5);
  file.add("m.experts.1.lora_A.weight", 3, 7).add("m.experts.2.lora_B.weight", 5, 3);
  const std::string path = file.write(folder);
  const std::string found = refusal([&] { lm::io::load_as<lm::LoraMoe<float>>(path, "m", mixture); });
  CHECK(has(found, "experts.0.lora_B.weight has shape [3, 5], but its config says [5, 3]"));
  CHECK(has(found, "experts.1.lora_B.weight is missing"));
  CHECK(has(found, "experts.2.lora_B.weight is unexpected"));
}

TEST_CASE("a file whose experts lie in one tensor is refused in a sentence") {
  const Folder folder;
  lm::io::save(folder / "m", "m", numbered<lm::LoraMoe<float>>(mixture));
  const lm::io::Safetensors now(folder / "m");
  Foreign before;  // as main wrote it until experts had names
  before.add("m.lora_A.weight", 6, 7).add("m.lora_B.weight", 5, 6).add("m.moe_gate.weight", 2, 7);
  lm::io::write_safetensors(folder / "old", before.tensors, now.metadata());
  const std::string found = refusal([&] { lm::io::load<lm::LoraMoe<float>>(folder / "old", "m"); });
  CHECK(has(found, "lora_A.weight holds all experts, as files did before experts had tensors of their own: save it"));
  CHECK(has(found, "lora_B.weight holds all experts"));
  CHECK_FALSE(has(found, "missing"));
  CHECK_FALSE(has(found, "unexpected"));
}

// Saving and loading of any adapter, in parts of its own: what reads JSON takes long to compile.
#pragma once
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include <loramix/adapter/initialise.hpp>
#include <loramix/io/adapter.hpp>

#include "suite/forms.hpp"
#include "suite/subject.hpp"

namespace loramix_test {

template <class A>
std::string check_file(std::size_t form, const std::string& folder) {
  auto config = suite_config<A>();
  forms(config)[form].change(config);
  A adapter(config);
  double value = 1;
  std::vector<std::string> names;
  A::visit(adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    names.push_back(name);
    for (Index i = 0; i < view.rows * view.cols; ++i) view.data[i] = lm::narrow<typename A::element>(value /= -1.01);
  });
  const std::string path = folder + "/" + A::kind + ".safetensors", module = "layers.0.mlp.up_proj";
  const auto bytes = [&path] {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  lm::io::save(path, module, adapter);
  const std::string first = bytes();
  const A back = lm::io::load<A>(path, module);
  const auto a = std::as_const(adapter).parameters(), b = back.parameters();
  if (a.size != b.size) return "parameters differ in number";
  if (a.size != 0 && std::memcmp(a.data, b.data, static_cast<std::size_t>(a.size) * sizeof(*a.data)) != 0) {
    return "parameters differ";
  }
  lm::io::save(path, module, back);
  if (bytes() != first) return "the file of what was loaded differs";
  for (const std::string& name : names) {
    const std::size_t own = name.find("lora_");  // an expert's number may stand before it
    const std::string last = own == std::string::npos ? "." + name : "." + name.substr(own);
    if (first.find(last + "\"") == std::string::npos) return "the file does not name " + name;
  }
  const std::vector<lm::io::Module> said = lm::io::list(path);
  return said.size() == 1 && said[0].name == module && said[0].kind == A::kind ? "" : "the file says another kind";
}

template <std::size_t Part, class... A>
std::vector<FileCase> file_cases_of(adapters::List<A...>) {
  std::vector<FileCase> cases;
  const auto add = [&]<class B, std::size_t I>() {
    // What is served is not saved: its LoRAs are.
    if constexpr (I % file_parts == Part && requires(B & adapter, lm::Fill & fill) { adapter.start(fill); }) {
      const auto all = forms(suite_config<B>());
      for (std::size_t f = 0; f < all.size(); ++f) cases.push_back({suite_name<B>(all[f].name), &check_file<B>, f});
    }
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) { (add.template operator()<A, I>(), ...); }
  (std::index_sequence_for<A...>());
  return cases;
}

template <std::size_t Part>
std::vector<FileCase> file_part() {
  return file_cases_of<Part>(adapters::All<float>());
}

}  // namespace loramix_test

/// Adapters in safetensors files: saved and loaded through visit, for every adapter on the host.
///
/// Computes:    tensor "<module>.<parameter>" [rows, cols] for every parameter of visit, row-major (PEFT's order: a
///              rank-major B is transposed once), and in __metadata__ "loramix.version" and
///              "loramix.adapter.<module>": {"kind": …, "config": {every field of Config::fields}}. Experts have tensors of
///              their own: "<module>.experts.{e}.lora_A.weight" [r, d_in], "….lora_B.weight" [d_out, r], which are PEFT's
///              names and orders of one LoRA, and MoE-PEFT's of a mixture.
/// Reads:       load(), load_into(), list(); load_as() the same tensors from a file without our metadata. Same dtype, or one that the element type holds exactly; others only with
///              .narrow = true, rounded once.
/// Writes:      save(), AdapterWriter::save(): io/safetensors.hpp. load_into() writes an adapter's parameters in place.
/// Errors:      ErrorCode::file with the path, the module and every problem: another kind; missing, unknown or mistyped
///              config fields; missing or unexpected tensors of the module; shapes; dtypes; values that are not finite
///              (.check_finite = false lets them pass). Config and shapes are compared before memory is taken for them.
///              What an adapter's constructor refuses in a config keeps its own message. Nothing is half loaded.
///              check_finite(): ErrorCode::value. save() does not ask whether values are finite.
/// Cost:        each byte of the module read once, one buffer as large as its largest tensor.
/// Determinism: save and load give the same bits; doubles in a config too. Equal adapters give equal files.
/// Example:     auto lora = lm::io::load<lm::Lora<float>>("adapters.safetensors", "layers.0.mlp.up_proj");
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include <loramix/core/adapter.hpp>
#include <loramix/core/version.hpp>
#include <loramix/io/safetensors.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class P, Space S, class T>
class Served;

namespace io::detail {
/// An element type that takes no memory: an adapter rebound to it tells names and shapes of a config that nobody trusts.
struct NoElement {};
}  // namespace io::detail

/// What an adapter rebound to io::detail::NoElement owns: a size. Its addresses must not be used.
template <>
class Buffer<io::detail::NoElement, Space::host> {
 public:
  Buffer() = default;
  explicit Buffer(Index size) : size_(size) { check::at_least("Buffer", "size", size, 0); }
  io::detail::NoElement* data() { return reinterpret_cast<io::detail::NoElement*>(std::uintptr_t{64}); }
  const io::detail::NoElement* data() const {
    return reinterpret_cast<const io::detail::NoElement*>(std::uintptr_t{64});
  }
  VectorView<io::detail::NoElement> view() { return {data(), size_}; }
  VectorView<const io::detail::NoElement> view() const { return {data(), size_}; }

 private:
  Index size_ = 0;
};

namespace io {

/// How a load treats what does not fit.
struct LoadOptions {
  bool narrow = false;  // accept a dtype that the element type does not hold exactly
  bool check_finite = true;
  Index most_places = 4096;  // of an adapter that reserves places for more experts than its file holds
};

/// An adapter that a file holds.
struct Module {
  std::string name;
  std::string kind;
};

namespace detail {

inline constexpr const char* adapter_key = "loramix.adapter.";
inline constexpr const char* version_key = "loramix.version";

/// "[row, column]" of the first value that is not finite, or nothing.
template <class View>
std::string first_not_finite(View view) {
  for (Index i = 0; i < view.rows && view.cols != 0; ++i) {
    for (Index j = 0; j < view.cols; ++j) {
      if (is_finite(view(i, j))) continue;
      std::string place(1, '[');  // as in shown()
      place.append(std::to_string(i)).append(", ").append(std::to_string(j)).append("]");
      return place;
    }
  }
  return {};
}

// ---- configurations ----------------------------------------------------------------------------------------------

using Fields = std::map<std::string, nlohmann::json, std::less<>>;

/// What a file says about one adapter.
struct Entry {
  std::string kind;
  Fields config;
};

template <class T>
nlohmann::json field_to_json(const T& value) {
  static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>,
                "loramix: io saves fields of a Config that are bool, numbers or enumerations");
  if constexpr (std::is_enum_v<T>)
    return static_cast<std::underlying_type_t<T>>(value);
  else
    return value;
}

/// The problem with a field's value, or nothing and the field is set.
template <class T>
std::string field_from_json(const nlohmann::json& value, T& field) {
  if constexpr (std::is_enum_v<T>) {
    std::underlying_type_t<T> number{};
    std::string problem = field_from_json(value, number);
    if constexpr (requires { last_of(T{}); }) {
      const auto last = static_cast<std::underlying_type_t<T>>(last_of(T{}));
      if (problem.empty() && (number < 0 || number > last))
        return "is none of its values, 0 to " + std::to_string(last);
    }
    field = static_cast<T>(number);
    return problem;
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!value.is_boolean()) return "must be true or false";
    field = value.get<bool>();
  } else if constexpr (std::is_floating_point_v<T>) {
    if (!value.is_number()) return "must be a number";
    field = value.get<T>();
    if (!is_finite(field)) return "is too large for its type";
  } else {
    if (!value.is_number_integer()) return "must be a whole number";
    const bool fits =
        value.is_number_unsigned()
            ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<T>::max())
            : std::is_signed_v<T> && value.get<std::int64_t>() >= std::int64_t{std::numeric_limits<T>::min()};
    if (!fits) return "is too large for its type";
    field = value.get<T>();
  }
  return {};
}

template <Adapter A>
Fields fields_of(const typename A::Config& config) {
  Fields fields;
  A::Config::fields(config, [&fields](const char* name, const auto& value) { fields[name] = field_to_json(value); });
  return fields;
}

inline std::string entry_text(const Entry& entry) {
  return nlohmann::json{{"kind", entry.kind}, {"config", entry.config}}.dump();
}

/// Reads {"kind": string, "config": {name: bool or number}} and nothing else.
class EntryReader : public JsonEvents<EntryReader> {
 public:
  EntryReader(const char* op, const std::string& path, const std::string& module)
      : op_(op), path_(path), module_(module) {}
  Entry take() {
    if (!has_kind_ || !has_config_) refuse("lacks kind or config");
    return std::move(entry_);
  }

  [[noreturn]] void refuse(const std::string& sentence) const {
    fail(about_file(op_, path_) << ": the metadata of adapter " << shown(module_).c_str() << " "
                                << printable(sentence, 160).c_str());
  }
  [[noreturn]] void unexpected(const char* what) const {
    refuse((key_.empty() ? std::string() : shown(key_, 40) + " ") + "holds " + what + ", which does not belong there");
  }

  bool start_object(std::size_t) {
    const bool wanted = depth_ == 0 || (depth_ == 1 && key_ == "config");
    if (!wanted) unexpected("an object");
    ++depth_;
    key_.clear();
    return true;
  }
  bool end_object() {
    --depth_;
    key_.clear();
    return true;
  }
  bool key(std::string& name) {
    key_ = name;
    bool& seen = name == "kind" ? has_kind_ : has_config_;
    if (depth_ == 1 && name != "kind" && name != "config") refuse("has an unknown key " + shown(name, 40));
    if (depth_ == 1 ? seen : entry_.config.contains(name)) refuse("has the key " + shown(name, 40) + " twice");
    if (depth_ == 1) seen = true;
    return true;
  }
  bool string(std::string& value) {
    if (depth_ != 1 || key_ != "kind") unexpected("a string");
    entry_.kind = value;
    return true;
  }
  bool boolean(bool value) { return scalar(value, "a boolean"); }
  bool number_integer(std::int64_t value) { return scalar(value, "a number"); }
  bool number_unsigned(std::uint64_t value) { return scalar(value, "a number"); }
  bool number_float(double value, const std::string&) { return scalar(value, "a number"); }

 private:
  template <class T>
  bool scalar(T value, const char* what) {
    if (depth_ != 2) unexpected(what);
    entry_.config[key_] = value;
    return true;
  }

  const char* op_;
  const std::string& path_;
  const std::string& module_;
  Entry entry_;
  std::string key_;
  int depth_ = 0;
  bool has_kind_ = false, has_config_ = false;
};

inline Entry parse_entry(const char* op, const std::string& path, const std::string& module, std::string_view text) {
  EntryReader reader(op, path, module);
  read_json(text, reader);
  return reader.take();
}

// ---- which tensor belongs to which module --------------------------------------------------------------------------

/// Calls f(module, entry text) for every adapter of a file.
template <class F>
void each_module(const Metadata& metadata, F&& f) {
  const std::string_view prefix = adapter_key;
  for (auto at = metadata.lower_bound(prefix); at != metadata.end() && at->first.starts_with(prefix); ++at) {
    f(at->first.substr(prefix.size()), at->second);
  }
}

inline std::string tensor_name(const std::string& module, const std::string& parameter) {
  return module + "." + parameter;
}

/// Whether `tensor` stands below `module` and below no longer module's name. Names may have megabytes of dots: no key lies
/// between a prefix of the tensor's name and the first key from it on, so dots that both names share need not be tried.
inline bool belongs(const Metadata& metadata, std::string_view tensor, std::string_view module) {
  if (tensor.size() <= module.size() || !tensor.starts_with(module) || tensor[module.size()] != '.') return false;
  const std::string key = std::string(adapter_key).append(tensor);
  std::size_t dot = key.find('.', key.size() - tensor.size() + module.size() + 1);
  while (dot != std::string::npos) {
    const std::string_view shorter = std::string_view(key).substr(0, dot);
    const auto found = metadata.lower_bound(shorter);
    if (found == metadata.end() || !found->first.starts_with(shorter)) return true;
    if (found->first.size() == dot) return false;
    const auto differ = std::mismatch(key.begin(), key.end(), found->first.begin(), found->first.end()).first;
    dot = key.find('.', std::max(dot + 1, static_cast<std::size_t>(differ - key.begin())));
  }
  return true;
}

/// How many experts share a parameter's rows or columns in an adapter's files; 0: none.
template <class A>
Index experts_of(const A& adapter, ParameterGroup role) {
  if constexpr (requires { adapter.tensors(role); })
    return adapter.tensors(role);
  else
    return 0;
}
/// Calls f(name, view) for every tensor of a parameter: itself, or that of every expert.
template <class View, class F>
void each_tensor(const char* parameter, View view, ParameterGroup role, Index experts, F&& f) {
  if (experts == 0) return f(std::string(parameter), view);
  const std::string name = parameter;
  const std::size_t place = name.rfind("lora_");
  for (Index e = 0; e < experts; ++e) {
    const std::string of_expert = name.substr(0, place) + "experts." + std::to_string(e) + "." + name.substr(place);
    const Index rows = view.rows / experts, cols = view.cols / experts;
    f(of_expert, role.is(group::A) ? view.row_range(e * rows, rows) : view.col_range(e * cols, cols));
  }
}
/// The same for every parameter of an adapter.
template <class A, class F>
void each_tensor(A& adapter, F&& f) {
  std::remove_const_t<A>::visit(adapter, [&](const char* parameter, auto view, ParameterGroup role) {
    each_tensor(parameter, view, role, experts_of(adapter, role), f);
  });
}

// ---- loading -------------------------------------------------------------------------------------------------------

/// Everything wrong with one module, for one message.
class Problems {
 public:
  void add(std::string problem) { list_.push_back(std::move(problem)); }
  void fail_if_any(const std::string& path, const std::string& module) const {
    if (list_.empty()) return;
    Error error = about_file("io::load", path);
    error << ": adapter " << shown(module).c_str() << ": ";
    std::size_t said = 0;
    for (; said < list_.size(); ++said) {
      const std::size_t used = std::strlen(error.what()), room = used < message_room ? message_room - used : 0;
      if (said > 0 && list_[said].size() > room) break;
      error << (said == 0 ? "" : "; ") << printable(list_[said], room).c_str();
    }
    if (said < list_.size()) error << "; and " << static_cast<Index>(list_.size() - said) << " more";
    fail(error);
  }

 private:
  static constexpr std::size_t message_room = 480;  // an Error holds 511 bytes
  std::vector<std::string> list_;
};

/// Whether every value of `from` is a T.
template <class T>
bool holds(Dtype from) {
  if (from == dtype_of<T>::value) return true;
  const bool half_like = from == Dtype::F16 || from == Dtype::BF16;
  if constexpr (std::is_same_v<T, float>) return half_like;
  if constexpr (std::is_same_v<T, double>) return half_like || from == Dtype::F32;
  return false;
}

inline bool is_real(Dtype dtype) {
  return dtype == Dtype::F64 || dtype == Dtype::F32 || dtype == Dtype::F16 || dtype == Dtype::BF16;
}

template <class From, class View, class T>
void copy_from(std::span<const std::byte> bytes, View view, T) {
  for (Index i = 0; i < view.rows && view.cols != 0; ++i) {
    for (Index j = 0; j < view.cols; ++j) view(i, j) = narrow<T>(element<From>(bytes, i * view.cols + j));
  }
}

/// Fills a parameter [rows, cols] from row-major bytes of any real dtype.
template <class View>
void copy_in(Dtype dtype, std::span<const std::byte> bytes, View view) {
  using T = std::remove_reference_t<decltype(view(0, 0))>;
  if (dtype == Dtype::F64) copy_from<double>(bytes, view, T{});
  if (dtype == Dtype::F32) copy_from<float>(bytes, view, T{});
  if (dtype == Dtype::F16) copy_from<half>(bytes, view, T{});
  if (dtype == Dtype::BF16) copy_from<bfloat16>(bytes, view, T{});
}

template <class View>
std::vector<std::byte> copy_out(View view) {
  using T = std::remove_cv_t<std::remove_reference_t<decltype(view(0, 0))>>;
  std::vector<std::byte> bytes(static_cast<std::size_t>(view.rows * view.cols) * sizeof(T));
  std::byte* to = bytes.data();
  for (Index i = 0; i < view.rows; ++i) {
    for (Index j = 0; j < view.cols; ++j, to += sizeof(T)) std::memcpy(to, &view(i, j), sizeof(T));
  }
  return bytes;
}

/// Compares names, dtypes and shapes of a module's tensors with those of an adapter (of any element type) of T.
template <class T, class A>
void check_tensors(const Safetensors& file, const std::string& module, const A& adapter, bool narrow,
                   Problems& problems) {
  std::vector<std::string> expected;
  const auto check = [&](const std::string& parameter, auto view) {
    const Tensor* const tensor = file.find(expected.emplace_back(tensor_name(module, parameter)));
    const std::vector<Index> shape{view.rows, view.cols};
    if (tensor == nullptr) return problems.add("tensor " + parameter + " is missing");
    if (tensor->shape != shape) {
      problems.add("tensor " + parameter + " has shape " + shown_shape(tensor->shape) + ", but its config says " +
                   shown_shape(shape));
    }
    if (!is_real(tensor->dtype) || !(narrow || holds<T>(tensor->dtype))) {
      problems.add("tensor " + parameter + " is " + name_of(tensor->dtype) + ", but the adapter's elements are " +
                   name_of(dtype_of<T>::value) + (is_real(tensor->dtype) ? " (.narrow = true rounds)" : ""));
    }
  };
  A::visit(adapter, [&](const char* parameter, auto view, ParameterGroup role) {
    const Index experts = experts_of(adapter, role), held = static_cast<Index>(file.tensors().size());
    if (experts > held) {
      return problems.add("parameter " + std::string(parameter) + " is of " + std::to_string(experts) +
                          " experts, but the file has " + std::to_string(held) + " tensors");
    }
    if (experts != 0 && file.find(tensor_name(module, parameter)) != nullptr) {
      expected.push_back(tensor_name(module, parameter));
      return problems.add("tensor " + std::string(parameter) +
                          " holds all experts, as files did before experts had tensors of their own: save it again");
    }
    each_tensor(parameter, view, role, experts, check);
  });
  std::sort(expected.begin(), expected.end());
  for (const Tensor& tensor : file.tensors()) {
    if (!belongs(file.metadata(), tensor.name, module)) continue;
    if (std::binary_search(expected.begin(), expected.end(), tensor.name)) continue;
    problems.add("tensor " + printable(std::string_view(tensor.name).substr(module.size() + 1), 80) + " is unexpected");
  }
}

/// Whether a config says all of an adapter but its parameters.
template <class A>
inline constexpr bool has_file = true;
template <class P, Space S, class T>
inline constexpr bool has_file<Served<P, S, T>> = false;

template <Adapter A>
void check_loadable() {
  static_assert(A::space == Space::host,
                "loramix: io loads and saves adapters on the host; copy device adapters first");
  static_assert(dtype_of<typename A::element>::known,
                "loramix: io loads and saves adapters of float, double, half or bfloat16");
  static_assert(has_file<A>, "loramix: what is served has no file; save and load its LoRAs");
}

inline Entry find_entry(const Safetensors& file, const std::string& module, const char* kind) {
  const auto found = file.metadata().find(adapter_key + module);
  if (found == file.metadata().end()) {
    std::string held;
    each_module(file.metadata(), [&held](const std::string& name, const std::string&) {
      if (held.size() < 120) held += (held.empty() ? "" : ", ") + shown(name, 60);
    });
    fail(about_file("io::load", file.path()) << " has no adapter " << shown(module).c_str() << "; it holds "
                                             << (held.empty() ? "none written by loramix" : held.c_str()));
  }
  Entry entry = parse_entry("io::load", file.path(), module, found->second);
  if (entry.kind != kind) {
    fail(about_file("io::load", file.path()) << ": adapter " << shown(module).c_str() << " is of kind "
                                             << shown(entry.kind).c_str() << ", not '" << kind << "'");
  }
  return entry;
}

template <Adapter A>
typename A::Config read_config(const std::string& path, const std::string& module, const Fields& fields) {
  typename A::Config config{};
  Problems problems;
  std::vector<std::string> known;
  A::Config::fields(config, [&](const char* name, auto& field) {
    known.emplace_back(name);
    const auto found = fields.find(name);
    if (found == fields.end()) return problems.add("config field " + known.back() + " is missing");
    const std::string problem = field_from_json(found->second, field);
    if (!problem.empty()) problems.add("config field " + known.back() + " is " + found->second.dump() + ", " + problem);
  });
  for (const auto& [name, value] : fields) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      problems.add("config field " + printable(name, 40) + " is unknown");
    }
  }
  problems.fail_if_any(path, module);
  return config;
}

}  // namespace detail

/// Refuses an adapter with NaN or infinity in its parameters, naming the first.
template <Adapter A>
void check_finite(const A& adapter) {
  detail::check_loadable<A>();
  A::visit(adapter, [](const char* name, auto view, ParameterGroup) {
    const std::string at = detail::first_not_finite(view);
    if (at.empty()) return;
    fail(check::detail::about(ErrorCode::value, "io::check_finite", name)
         << " [" << view.rows << ", " << view.cols << "] is not finite at " << at.c_str());
  });
}

/// The adapters of a file, by name. A file without any (a PEFT checkpoint) gives none.
inline std::vector<Module> list(const Safetensors& file) {
  std::vector<Module> modules;
  detail::each_module(file.metadata(), [&](const std::string& name, const std::string& text) {
    modules.push_back({name, detail::parse_entry("io::list", file.path(), name, text).kind});
  });
  return modules;
}
inline std::vector<Module> list(const std::string& path) { return list(Safetensors(path)); }

/// The tensors of `module` in an open file as an adapter of `config`, whole or not at all; nothing is asked of the file's
/// metadata. MoE-PEFT's LORAMOE, MOLA and MIXLORA and one LoRA of PEFT have these names, once they are safetensors:
///
///     load_as<Mola<float>>(file, "mola.layers.0.self_attn.q_proj", config)
///     load_as<MixLora<float>>(file, "mixlora.layers.0.mlp", config)
///     load_as<Lora<float>>(file, "base_model.model.model.layers.0.self_attn.q_proj", config)
template <Adapter A>
A load_as(const Safetensors& file, const std::string& module, const typename A::Config& config,
          LoadOptions options = {}) {
  detail::check_loadable<A>();
  using T = typename A::element;
  using Outline = typename A::template rebind<detail::NoElement, Space::host>;
  detail::Problems problems;
  detail::check_tensors<T>(file, module, Outline(config), options.narrow, problems);
  if constexpr (requires { config.places; }) {  // in no tensor's shape
    if (config.places > options.most_places && config.places > config.experts) {
      problems.add("config field places is " + std::to_string(config.places) + ", above LoadOptions::most_places, " +
                   std::to_string(options.most_places));
    }
  }
  problems.fail_if_any(file.path(), module);

  A adapter(config);
  detail::each_tensor(adapter, [&](const std::string& parameter, auto view) {
    const Tensor& tensor = *file.find(detail::tensor_name(module, parameter));
    detail::copy_in(tensor.dtype, file.read(tensor), view);
    const std::string at = options.check_finite ? detail::first_not_finite(view) : std::string();
    if (!at.empty()) {
      problems.add("tensor " + parameter + " is not finite at " + at +
                   (detail::holds<T>(tensor.dtype) ? "" : ", rounded from " + std::string(name_of(tensor.dtype))));
    }
  });
  problems.fail_if_any(file.path(), module);
  return adapter;
}
template <Adapter A>
A load_as(const std::string& path, const std::string& module, const typename A::Config& config,
          LoadOptions options = {}) {
  return load_as<A>(Safetensors(path), module, config, options);
}

/// The adapter `module` of an open file, whole or not at all.
template <Adapter A>
A load(const Safetensors& file, const std::string& module, LoadOptions options = {}) {
  detail::check_loadable<A>();
  const detail::Entry entry = detail::find_entry(file, module, A::kind);
  return load_as<A>(file, module, detail::read_config<A>(file.path(), module, entry.config), options);
}
template <Adapter A>
A load(const std::string& path, const std::string& module, LoadOptions options = {}) {
  return load<A>(Safetensors(path), module, options);
}

/// Loads into an adapter that is in use (an optimiser knows its addresses): its config must be the file's.
template <Adapter A>
void load_into(const Safetensors& file, const std::string& module, A& adapter, LoadOptions options = {}) {
  const A loaded = load<A>(file, module, options);
  const detail::Fields theirs = detail::fields_of<A>(loaded.config()), ours = detail::fields_of<A>(adapter.config());
  detail::Problems problems;
  for (const auto& [name, value] : theirs) {
    const nlohmann::json& own = ours.at(name);
    if (own != value)
      problems.add("config field " + name + " is " + value.dump() + ", but the adapter's is " + own.dump());
  }
  problems.fail_if_any(file.path(), module);
  const auto from = loaded.parameters();
  const auto to = adapter.parameters();
  std::copy(from.data, from.data + from.size, to.data);
}
template <Adapter A>
void load_into(const std::string& path, const std::string& module, A& adapter, LoadOptions options = {}) {
  load_into(Safetensors(path), module, adapter, options);
}

/// Several adapters for one file. add() copies the parameters; save() may be called again.
class AdapterWriter {
 public:
  template <Adapter A>
  AdapterWriter& add(const std::string& module, const A& adapter) {
    detail::check_loadable<A>();
    if (module.empty()) fail(check::detail::about(ErrorCode::value, "io::save", "the module's name") << " is empty");
    detail::Entry entry{A::kind, detail::fields_of<A>(adapter.config())};
    for (const detail::Fields::value_type& field : entry.config) {
      if (!field.second.is_number_float() || is_finite(field.second.get<double>())) continue;
      fail(check::detail::about(ErrorCode::value, "io::save", field.first.c_str()) << " of the config is not finite");
    }
    if (!metadata_.emplace(detail::adapter_key + module, detail::entry_text(entry)).second) {
      fail(check::detail::about(ErrorCode::value, "io::save", "module")
           << " " << detail::shown(module).c_str() << " is there already");
    }
    detail::each_tensor(adapter, [&](const std::string& parameter, auto view) {
      parameters_.push_back({detail::tensor_name(module, parameter),
                             detail::dtype_of<typename A::element>::value,
                             {view.rows, view.cols},
                             detail::copy_out(view),
                             module});
    });
    return *this;
  }

  void save(const std::string& path) const {
    std::vector<TensorBytes> tensors;
    for (const Parameter& parameter : parameters_) {
      if (!detail::belongs(metadata_, parameter.name, parameter.module)) {
        fail(check::detail::about(ErrorCode::value, "io::save", "module")
             << " " << detail::shown(parameter.module).c_str() << ": its tensor "
             << detail::shown(parameter.name).c_str() << " would belong to another module of the file");
      }
      tensors.push_back({parameter.name, parameter.dtype, parameter.shape, parameter.bytes});
    }
    Metadata metadata = metadata_;
    metadata[detail::version_key] =
        std::to_string(version_major) + "." + std::to_string(version_minor) + "." + std::to_string(version_patch);
    write_safetensors(path, tensors, metadata);
  }

 private:
  struct Parameter {
    std::string name;
    Dtype dtype;
    std::vector<Index> shape;
    std::vector<std::byte> bytes;
    std::string module;
  };
  Metadata metadata_;
  std::vector<Parameter> parameters_;
};

/// One adapter in a file of its own.
template <Adapter A>
void save(const std::string& path, const std::string& module, const A& adapter) {
  AdapterWriter().add(module, adapter).save(path);
}

}  // namespace io

}  // namespace LORAMIX_ABI
}  // namespace loramix

// Adapters in files: what is saved comes back, and whatever does not fit is named.
#include <loramix/io/adapter.hpp>

#include <limits>
#include <random>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>

#include "io/golden/python.hpp"
#include "io/support.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using loramix_test::Folder;
using loramix_test::get;
using loramix_test::has;
using loramix_test::put;
using loramix_test::refusal;

namespace {

/// A visit of three parameters, every kind of field, B rank-major: nothing that io knows about.
enum class Mode : std::uint8_t { slow, fast = 200 };
struct OtherConfig {
  lm::Index width = 0;
  std::int8_t small = -7;
  std::uint64_t seed = 0xffffffffffffffffu;
  float ratio = 0.1f;
  double exact = 0.1;
  bool on = true;
  Mode mode = Mode::fast;

  static OtherConfig of(const lm::Shape& shape) { return {.width = shape.d_in}; }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("width", self.width);
    f("small", self.small);
    f("seed", self.seed);
    f("ratio", self.ratio);
    f("exact", self.exact);
    f("on", self.on);
    f("mode", self.mode);
  }
};

template <class P = float, lm::Space S = lm::Space::host, class T = P>
class Other {
 public:
  using Config = OtherConfig;
  using precision = lm::precision_t<P>;
  using element = T;
  template <class U, lm::Space V = S>
  using rebind = Other<P, V, U>;
  static constexpr lm::Space space = S;
  static constexpr const char* kind = "other";

  explicit Other(const Config& config)
      : config_(config), parameters_({config.width, check_product(config.width, 3), config.width}) {}
  const Config& config() const { return config_; }
  auto parameters() { return parameters_.flat(); }
  auto parameters() const { return parameters_.flat(); }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const lm::Index width = self.config_.width;
    f("moe_gate.weight", self.parameters_.matrix(0, 1, width), lm::group::router);
    f("experts.0.lora_B.weight", self.parameters_.template matrix<lm::Major::column>(1, width, 3), lm::group::B);
    f("scale", self.parameters_.matrix(2, width, 1), lm::group::scale);
  }
  lm::Cost cost(lm::Index) const { return {}; }

 private:
  static lm::Index check_product(lm::Index a, lm::Index b) { return lm::check::detail::product(a, b); }
  Config config_;
  lm::Parameters<T, S, 3> parameters_;
};
static_assert(lm::Adapter<Other<float>>);

/// Every bit pattern that is a finite number may occur.
template <class A>
void fill(A& adapter, std::uint64_t site) {
  using T = typename A::element;
  std::mt19937_64 random(loramix_test::seed(site));
  A::visit(adapter, [&random](const char*, auto view, lm::ParameterGroup) {
    for (lm::Index i = 0; i < view.rows; ++i) {
      for (lm::Index j = 0; j < view.cols; ++j) {
        do {
          const std::uint64_t bits = random();
          std::memcpy(&view(i, j), &bits, sizeof(T));
        } while (!lm::is_finite(view(i, j)));
      }
    }
  });
}

template <class A>
bool same_bits(const A& a, const A& b) {
  const auto x = a.parameters(), y = b.parameters();
  return x.size == y.size &&
         (x.size == 0 ||
          std::memcmp(x.data, y.data, static_cast<std::size_t>(x.size) * sizeof(typename A::element)) == 0);
}

template <class A>
std::string loading(const std::string& path, const std::string& module, lm::io::LoadOptions options = {}) {
  return refusal([&] { lm::io::load<A>(path, module, options); });
}

/// A file of one lora, with its metadata and tensors as given.
struct Forged {
  std::string entry =
      R"({"kind":"lora","config":{"d_in":3,"d_out":2,"rank":1,"alpha":2.0,"dropout":0.0,"rank_stabilised":false}})";
  std::vector<float> a{1, 2, 3}, b{4, 5};
  std::vector<lm::Index> a_shape{1, 3}, b_shape{2, 1};
  bool with_b = true;
  std::vector<std::string> more, modules;  // tensors, and adapters, beside those of m
  std::string path;

  explicit Forged(const Folder& folder) : path(folder / "forged.safetensors") {}
  void write() const {
    const auto bytes = [](const std::vector<float>& v) { return std::as_bytes(std::span(v)); };
    std::vector<lm::io::TensorBytes> tensors{{"m.lora_A.weight", lm::io::Dtype::F32, a_shape, bytes(a)}};
    if (with_b) tensors.push_back({"m.lora_B.weight", lm::io::Dtype::F32, b_shape, bytes(b)});
    for (const std::string& name : more) tensors.push_back({name, lm::io::Dtype::U8, {0}, {}});
    lm::io::Metadata metadata{{"loramix.adapter.m", entry}};
    for (const std::string& name : modules) metadata[std::string("loramix.adapter.").append(name)] = entry;
    lm::io::write_safetensors(path, tensors, metadata);
  }
  std::string write_and_load(lm::io::LoadOptions options = {}) const {
    write();
    return loading<lm::Lora<float>>(path, "m", options);
  }
};

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  REQUIRE(has(text, from));
  return text.replace(text.find(from), from.size(), to);
}

}  // namespace

TEST_CASE_TEMPLATE("adapter: a round trip keeps every bit", T, float, double, lm::half, lm::bfloat16) {
  const Folder folder;
  const std::string path = folder / "a.safetensors", module = "layers.0.mlp.up_proj";
  for (const lm::LoraConfig& config :
       {lm::LoraConfig{.d_in = 7, .d_out = 5, .rank = 3, .alpha = 0.1, .dropout = 1.0 / 3},
        lm::LoraConfig{.d_in = 64, .d_out = 33, .rank = 16, .rank_stabilised = true},
        lm::LoraConfig{.d_in = 4, .d_out = 4, .rank = 0}, lm::LoraConfig{.d_in = 0, .d_out = 4, .rank = 2},
        lm::LoraConfig{.d_in = 1, .d_out = 1, .rank = 1, .alpha = 5e-324}}) {
    lm::Lora<T> lora(config);
    fill(lora, 1);
    lm::io::save(path, module, lora);
    const auto back = lm::io::load<lm::Lora<T>>(path, module);
    CHECK(same_bits(lora, back));
    CHECK(back.config().d_in == config.d_in);
    CHECK(back.config().d_out == config.d_out);
    CHECK(back.config().rank == config.rank);
    CHECK(back.config().alpha == config.alpha);
    CHECK(back.config().dropout == config.dropout);
    CHECK(back.config().rank_stabilised == config.rank_stabilised);
    const std::string bytes = get(path);
    lm::io::save(path, module, back);
    CHECK(get(path) == bytes);
  }
  CHECK(folder.count() == 1);
}

TEST_CASE("adapter: the file holds PEFT's order") {
  const Folder folder;
  lm::Lora<float> lora({.d_in = 2, .d_out = 3, .rank = 2});
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 2; ++j) lora.B()(i, j) = static_cast<float>(10 * i + j);
  }
  lm::io::save(folder / "a", "m", lora);
  const lm::io::Safetensors file(folder / "a");
  const lm::io::Tensor* b = file.find("m.lora_B.weight");
  REQUIRE(b != nullptr);
  CHECK(b->shape == std::vector<lm::Index>{3, 2});
  const auto bytes = file.read(*b);
  const float want[] = {0, 1, 10, 11, 20, 21};
  CHECK(std::memcmp(bytes.data(), want, sizeof want) == 0);
  CHECK(file.find("m.lora_A.weight")->shape == std::vector<lm::Index>{2, 2});
}

TEST_CASE("adapter: any adapter, any field") {
  const Folder folder;
  Other<double> other({.width = 5, .ratio = 0.3f, .exact = 1e-300});
  fill(other, 2);
  lm::io::save(folder / "a", "x", other);
  const auto back = lm::io::load<Other<double>>(folder / "a", "x");
  CHECK(same_bits(other, back));
  CHECK(back.config().small == -7);
  CHECK(back.config().seed == 0xffffffffffffffffu);
  CHECK(back.config().ratio == 0.3f);
  CHECK(back.config().exact == 1e-300);
  CHECK(back.config().on);
  CHECK(back.config().mode == Mode::fast);
  CHECK(has(refusal([&] { lm::io::load<lm::Lora<double>>(folder / "a", "x"); }), "'x' is of kind 'other', not 'lora'"));
}

TEST_CASE("adapter: several modules, of different types, in one file") {
  const Folder folder;
  const std::string path = folder / "all.safetensors";
  lm::Lora<float> q({.d_in = 4, .d_out = 6, .rank = 2}), inner({.d_in = 6, .d_out = 4, .rank = 1});
  lm::Lora<lm::bfloat16> k({.d_in = 8, .d_out = 3, .rank = 5});
  Other<double> other({.width = 3});
  fill(q, 3), fill(inner, 4), fill(k, 5), fill(other, 6);
  lm::io::AdapterWriter writer;
  writer.add("mlp", q).add("mlp.inner", inner).add("attn.k", k).add("größe", other);
  writer.save(path);
  const lm::io::Safetensors file(path);
  CHECK(same_bits(q, lm::io::load<lm::Lora<float>>(file, "mlp")));
  CHECK(same_bits(inner, lm::io::load<lm::Lora<float>>(file, "mlp.inner")));
  CHECK(same_bits(k, lm::io::load<lm::Lora<lm::bfloat16>>(file, "attn.k")));
  CHECK(same_bits(other, lm::io::load<Other<double>>(file, "größe")));
  const auto modules = lm::io::list(path);
  REQUIRE(modules.size() == 4);
  CHECK(modules[0].name == "attn.k");
  CHECK(modules[0].kind == "lora");
  CHECK(modules[1].name == "größe");
  CHECK(modules[1].kind == "other");
  CHECK(modules[3].name == "mlp.inner");
  const std::string text = loading<lm::Lora<float>>(path, "mlp.outer");
  CHECK(has(text, "no adapter 'mlp.outer'; it holds 'attn.k', 'größe', 'mlp', 'mlp.inner'"));
}

TEST_CASE("adapter: what the writer refuses") {
  const Folder folder;
  const lm::Lora<float> lora({.d_in = 2, .d_out = 2, .rank = 1});
  const Other<float> other({.width = 2});
  lm::io::AdapterWriter writer;
  CHECK_THROWS_AS(writer.add("", lora), lm::Error);
  CHECK_THROWS_AS(lm::io::AdapterWriter().add("m", lora).add("m", lora), lm::Error);
  // "x.experts.0.lora_B.weight" of other stands below the name of a second module.
  CHECK_THROWS_AS(lm::io::AdapterWriter().add("x", other).add("x.experts.0", lora).save(folder / "a"), lm::Error);
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK_THROWS_AS(writer.add("m", lm::Lora<float>({.d_in = 2, .d_out = 2, .rank = 1, .alpha = infinity})), lm::Error);
  CHECK(folder.count() == 0);
}

TEST_CASE("adapter: everything that does not fit is named, at once") {
  const Folder folder;
  Forged good(folder);
  CHECK(good.write_and_load() == "");

  const auto refused = [](const Forged& forged, std::initializer_list<const char*> parts) {
    const std::string text = forged.write_and_load();
    CAPTURE(text);
    CHECK(has(text, "forged.safetensors"));
    for (const char* part : parts) CHECK_MESSAGE(has(text, part), part);
  };
  Forged bad = good;
  bad.with_b = false;
  bad.more = {"m.lora_C.weight", "m.lora_B", "n.lora_B.weight", "mm", "m"};
  bad.a_shape = {3, 1};
  refused(bad, {"'m'", "lora_A.weight has shape [3, 1], but its config says [1, 3]", "lora_B.weight is missing",
                "lora_C.weight is unexpected", "lora_B is unexpected"});
  CHECK(!has(bad.write_and_load(), "n.lora_B"));

  const auto config = [&](const char* from, const char* to, std::initializer_list<const char*> parts) {
    Forged forged = good;
    forged.entry = replaced(good.entry, from, to);
    refused(forged, parts);
  };
  config("\"lora\"", "\"team_lora\"", {"is of kind 'team_lora', not 'lora'"});
  config("\"rank\":1", "\"rank\":2", {"lora_A.weight has shape [1, 3], but its config says [2, 3]", "[2, 2]"});
  config("\"rank\":1", "\"rank\":1.0", {"config field rank is 1.0, must be a whole number"});
  config("\"rank\":1", "\"rank\":true", {"rank is true, must be a whole number"});
  config("\"rank\":1", "\"rank\":9223372036854775808", {"rank is 9223372036854775808, is too large"});
  config("\"rank\":1,", "", {"config field rank is missing"});
  config("\"rank\":1", "\"Rank\":1", {"config field rank is missing", "config field Rank is unknown"});
  config("\"rank\":1", "\"rank\":1,\"rank\":1", {"'rank' twice"});
  config("\"rank\":1", "\"rank\":[1]", {"'rank' holds an array"});
  config("\"rank\":1", "\"rank\":\"1\"", {"'rank' holds a string"});
  config("\"rank\":1", "\"rank\":null", {"'rank' holds null"});
  config("false", "0", {"rank_stabilised is 0, must be true or false"});
  config("2.0", "false", {"alpha is false, must be a number"});
  config("2.0", "1e999", {"not JSON"});
  config("\"kind\":\"lora\",", "", {"lacks kind"});
  config("\"kind\":\"lora\"", "\"kind\":1", {"'kind' holds a number"});
  config("\"kind\":\"lora\"", "\"kind\":\"lora\",\"x\":1", {"unknown key 'x'"});
  config("\"kind\":\"lora\"", "\"kind\":{\"lora\":1}", {"'kind' holds an object"});
  config("{\"kind\"", "[{\"kind\"", {"does not begin with '{'"});
  config("}}", "}", {"not JSON"});

  Forged empty = good;
  empty.entry = "";
  refused(empty, {"io::load", "the metadata of adapter 'm' does not begin"});
  const std::string listing = refusal([&] { lm::io::list(empty.path); });
  CAPTURE(listing);
  CHECK(has(listing, "io::list: "));
  CHECK(has(listing, "the metadata of adapter 'm' does not begin"));
}

TEST_CASE("adapter: a tensor is of the longest module's name that stands before one of its dots") {
  const std::string key = "loramix.adapter.";
  const auto literal = [&key](const lm::io::Metadata& metadata, const std::string& tensor, const std::string& module) {
    if (!tensor.starts_with(module + ".")) return false;
    for (std::size_t dot = module.size() + 1; dot < tensor.size(); ++dot) {
      if (tensor[dot] == '.' && metadata.contains(key + tensor.substr(0, dot))) return false;
    }
    return true;
  };
  std::mt19937_64 random(loramix_test::seed(11));
  const auto name = [&random](std::size_t most) {
    std::string text = "a";
    while (text.size() < 1 + random() % most) text += "..-a0"[random() % 5];  // '-' comes before '.', '0' behind it
    return text;
  };
  int wrong = 0, yes = 0, no = 0;
  for (int round = 0; round < 20000; ++round) {
    lm::io::Metadata metadata{{"loramix.version", "1"}, {"format", "pt"}};
    for (int i = 0; i < 6; ++i) metadata[key + name(8)] = "";
    const std::string tensor = name(12), module = round % 2 == 0 ? "a" : name(4);
    const bool want = literal(metadata, tensor, module);
    wrong += lm::io::detail::belongs(metadata, tensor, module) != want;
    if (tensor.starts_with(module + ".")) (want ? yes : no) += 1;
  }
  CHECK(wrong == 0);
  CHECK(yes > 500);
  CHECK(no > 500);
}

TEST_CASE("adapter: names with a million dots are read in no time") {
  const Folder folder;
  std::string deep = "m";
  while (deep.size() < 2'000'000) deep += ".a";
  Forged forged(folder);
  forged.more = {deep};
  CHECK(has(forged.write_and_load(), "is unexpected"));
  forged.modules = {deep + "a", deep + ".a"};  // alike to the last letter
  CHECK(has(forged.write_and_load(), "is unexpected"));
  forged.modules.push_back(deep.substr(0, deep.size() - 2));  // whose tensor "a" it is
  CHECK(forged.write_and_load() == "");
}

TEST_CASE("adapter: a config that lies about sizes takes no memory") {
  const Folder folder;
  Forged lie(folder);
  lie.entry = replaced(lie.entry, "\"d_in\":3", "\"d_in\":100000000000");
  lie.entry = replaced(lie.entry, "\"rank\":1", "\"rank\":1000000");
  CHECK(has(lie.write_and_load(), "[1000000, 100000000000]"));
  Forged negative(folder);
  negative.entry = replaced(negative.entry, "\"rank\":1", "\"rank\":-1");
  negative.write();
  CHECK_THROWS_WITH_AS(lm::io::load<lm::Lora<float>>(negative.path, "m"),
                       "loramix: Lora: rank is -1, must be at least 0", lm::Error);  // the adapter's own sentence
}

TEST_CASE("adapter: many problems, one message that says how many are left out") {
  const Folder folder;
  Forged bad(folder);
  for (int i = 0; i < 50; ++i) bad.more.push_back("m.unknown" + std::to_string(i));
  const std::string text = bad.write_and_load();
  CAPTURE(text);
  CHECK(has(text, "tensor unknown0 is unexpected; "));
  CHECK(has(text, " more"));
}

TEST_CASE("adapter: values that are not finite") {
  const Folder folder;
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    Forged bad(folder);
    bad.b[1] = value;
    CHECK(has(bad.write_and_load(), "tensor lora_B.weight is not finite at [1, 0]"));
    CHECK(bad.write_and_load({.check_finite = false}) == "");
    lm::Lora<float> lora = lm::io::load<lm::Lora<float>>(bad.path, "m", {.check_finite = false});
    CHECK_THROWS_WITH_AS(lm::io::check_finite(lora),
                         "loramix: io::check_finite: lora_B.weight [2, 1] is not finite at [1, 0]", lm::Error);
    lora.B()(1, 0) = 0;
    lm::io::check_finite(lora);
  }
  lm::Lora<lm::half> half({.d_in = 1, .d_out = 1, .rank = 1});
  half.A()(0, 0) = lm::half{0x7c00};
  CHECK_THROWS_AS(lm::io::check_finite(half), lm::Error);
  half.A()(0, 0) = lm::half{0x7bff};
  lm::io::check_finite(half);
  lm::Lora<lm::bfloat16> bf16({.d_in = 1, .d_out = 1, .rank = 1});
  bf16.A()(0, 0) = lm::bfloat16{0x7f80};
  CHECK_THROWS_AS(lm::io::check_finite(bf16), lm::Error);
  bf16.A()(0, 0) = lm::bfloat16{0x7f7f};
  lm::io::check_finite(bf16);
}

TEST_CASE("adapter: widening is exact and silent, rounding only when asked") {
  const Folder folder;
  const std::string path = folder / "a";
  lm::Lora<lm::bfloat16> narrow({.d_in = 3, .d_out = 2, .rank = 2});
  fill(narrow, 7);
  lm::io::save(path, "m", narrow);
  const auto wide = lm::io::load<lm::Lora<float>>(path, "m");
  const auto wider = lm::io::load<lm::Lora<double>>(path, "m");
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 3; ++j) {
      CHECK(wide.A()(i, j) == lm::widen<float>(narrow.A()(i, j)));
      CHECK(wider.A()(i, j) == lm::widen<double>(narrow.A()(i, j)));
    }
  }
  CHECK(has(loading<lm::Lora<lm::half>>(path, "m"), "lora_A.weight is BF16, but the adapter's elements are F16"));

  lm::io::save(path, "m", wide);
  CHECK(has(loading<lm::Lora<lm::bfloat16>>(path, "m"), "is F32, but the adapter's elements are BF16 (.narrow = true"));
  CHECK(same_bits(narrow, lm::io::load<lm::Lora<lm::bfloat16>>(path, "m", {.narrow = true})));

  lm::Lora<double> big({.d_in = 1, .d_out = 1, .rank = 1});
  big.A()(0, 0) = 1e300;
  lm::io::save(path, "m", big);
  CHECK(has(loading<lm::Lora<lm::half>>(path, "m", {.narrow = true}), "is not finite at [0, 0], rounded from F64"));
}

TEST_CASE("adapter: load_into keeps addresses and refuses another config") {
  const Folder folder;
  const std::string path = folder / "a";
  lm::Lora<float> saved({.d_in = 4, .d_out = 3, .rank = 2}), used({.d_in = 4, .d_out = 3, .rank = 2});
  fill(saved, 8);
  lm::io::save(path, "m", saved);
  const float* const address = used.parameters().data;
  lm::io::load_into(path, "m", used);
  CHECK(used.parameters().data == address);
  CHECK(same_bits(saved, used));

  lm::Lora<float> other({.d_in = 4, .d_out = 3, .rank = 2, .alpha = 8});
  CHECK(has(refusal([&] { lm::io::load_into(path, "m", other); }), "alpha is 16.0, but the adapter's is 8.0"));
  CHECK(same_bits(other, lm::Lora<float>(other.config())));
}

TEST_CASE("adapter: a failed save leaves the old file") {
  const Folder folder;
  const std::string path = folder / "a";
  lm::Lora<float> lora({.d_in = 4, .d_out = 3, .rank = 2});
  lm::io::save(path, "m", lora);
  const std::string before = get(path);
  CHECK(has(refusal([&] { lm::io::save(folder / "absent/a", "m", lora); }), "cannot be written"));
  CHECK(has(refusal([&] { lm::io::save(path, "\xff", lora); }), "not JSON"));
  CHECK(get(path) == before);
  CHECK(folder.count() == 1);
}

TEST_CASE("adapter: a file cut or corrupted anywhere gives an error or the right adapter") {
  const Folder folder;
  const std::string path = folder / "a";
  lm::Lora<float> lora({.d_in = 3, .d_out = 2, .rank = 2});
  fill(lora, 9);
  lm::io::save(path, "m", lora);
  const std::string good = get(path);
  for (std::size_t n = 0; n < good.size(); n += 3) {
    put(path, good.substr(0, n));
    CHECK(loading<lm::Lora<float>>(path, "m") != "");
  }
  std::mt19937_64 random(loramix_test::seed(10));
  const std::size_t header = static_cast<unsigned char>(good[0]) + 256u * static_cast<unsigned char>(good[1]);
  int loaded = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = good;
    bytes[8 + random() % header] = round % 2 == 0 ? static_cast<char>(random()) : good[8 + random() % header];
    put(path, bytes);
    try {
      const auto back = lm::io::load<lm::Lora<float>>(path, "m");
      CHECK(same_bits(lora, back));  // only alpha, dropout or the padding can have changed
      ++loaded;
    } catch (const lm::Error& error) {
      CHECK(std::strlen(error.what()) > 20);
    }
  }
  CHECK(loaded > 20);
  CHECK(loaded < 1000);
}

TEST_CASE("adapter: a file written by Python's safetensors") {
  const Folder folder;
  const std::string path = folder / "python.safetensors", golden(python_file, python_file_size);
  put(path, golden);
  const lm::io::Safetensors file(path);
  REQUIRE(file.tensors().size() == 7);
  CHECK(file.find("none")->shape == std::vector<lm::Index>{0, 5});
  CHECK(file.find("double")->shape.empty());
  CHECK(file.find("flag")->dtype == lm::io::Dtype::BOOL);
  CHECK(lm::io::detail::element<double>(file.read(*file.find("double")), 0) == 0.1);
  CHECK(lm::io::detail::element<std::int64_t>(file.read(*file.find("ids")), 1) == -2);
  CHECK(lm::io::detail::element<lm::half>(file.read(*file.find("half")), 2) == lm::half{0x7bff});

  const auto lora = lm::io::load<lm::Lora<float>>(file, "m");
  CHECK(lora.config().alpha == 4);
  CHECK(lora.config().dropout == 0.1);
  for (int i = 0; i < 6; ++i) CHECK(lora.A()(i / 3, i % 3) == static_cast<float>(i) / 4 - 1);
  for (int i = 0; i < 8; ++i) CHECK(lora.B()(i / 2, i % 2) == static_cast<float>(i) * 0.125f);

  // Written again by us: the same bytes.
  std::vector<std::vector<std::byte>> data;
  std::vector<lm::io::TensorBytes> tensors;
  for (const auto& tensor : file.tensors()) data.push_back(file.read(tensor));
  for (std::size_t i = data.size(); i-- > 0;) {
    const auto& tensor = file.tensors()[i];
    tensors.push_back({tensor.name, tensor.dtype, tensor.shape, data[i]});
  }
  lm::io::write_safetensors(folder / "ours", tensors, file.metadata());
  CHECK(get(folder / "ours") == golden);
}

TEST_CASE("adapter: the contract's example") {
  const Folder folder;
  std::filesystem::current_path(folder.path());
  lm::Lora<float> trained({.d_in = 8, .d_out = 4, .rank = 2});
  lm::initialise(trained, {.seed = 7});
  lm::io::save("adapters.safetensors", "layers.0.mlp.up_proj", trained);
  auto lora = lm::io::load<lm::Lora<float>>("adapters.safetensors", "layers.0.mlp.up_proj");
  CHECK(same_bits(trained, lora));
  std::filesystem::current_path("/");
}

// Measures this machine and writes a header that holds a cpu::Tuning for it (docs/how-to/tune.md).
//
//   tune [--threads N] [--quick | --smoke] [--out FILE]
//
// Candidates for one value are timed in the same rounds, over shapes that the value matters for; a candidate replaces the
// library's own value where its time is at least 3 % less, in the geometric mean over the shapes.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <sstream>

#include <loramix/bench/rounds.hpp>
#include <loramix/core/matrix.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/gate/gates.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

namespace {

namespace lm = loramix;
using lm::Index;
using lm::cpu::Grouping;
using lm::cpu::Tuning;
using Backend = lm::cpu::Backend<lm::ThreadPool::PoolExecutor>;

constexpr double gain = 0.03;

struct Shape {
  Index tokens, d_in, d_out, ranks;
  Index experts = 1, chosen = 0;  // 0: all of them, an open gate
};

// One gated product, its forward and its backward.
class Problem {
 public:
  explicit Problem(const Shape& s)
      : shape_(s),
        x_(s.tokens, s.d_in),
        dx_(s.tokens, s.d_in),
        y_(s.tokens, s.d_out),
        dy_(s.tokens, s.d_out),
        A_(s.ranks, s.d_in),
        dA_(s.ranks, s.d_in),
        B_(s.d_out, s.ranks),
        dB_(s.d_out, s.ranks),
        u_(s.tokens, s.ranks),
        du_(s.tokens, s.ranks),
        weights_(s.chosen == 0 ? 0 : s.tokens, s.chosen),
        ids_(s.chosen == 0 ? 0 : s.tokens, s.chosen) {
    for (auto* m : {&x_, &y_, &dy_, &A_}) fill(m->view(), 0.01f);
    fill(B_.view(), 0.01f);
    fill(weights_.view(), 1);
    for (Index t = 0; t < ids_.rows(); ++t) {
      for (Index k = 0; k < s.chosen; ++k) ids_(t, k) = static_cast<std::int32_t>((t * 5 + t / 7 + k) % s.experts);
    }
    form_ = s.chosen == 0 ? lm::OpenGate<float>{}.form(s.tokens, s.ranks)
                          : lm::TopKExperts<float>{ids_.view(), weights_.view(), s.experts}.form(s.tokens, s.ranks);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  std::function<void()> forward(const Backend& be) {
    const lm::GateForm<float> select = shape_.chosen == 0 ? lm::GateForm<float>{} : form_;
    return step(be, lm::Shrink<float, float, float, float, host>{A_.view(), {}, x_.view(), {}, u_.view(), {}, select},
                lm::Expand<float, float, float, float, host, rank_major>{u_.view(), form_, B_.view(), 1, y_.view()});
  }
  std::function<void()> backward(const Backend& be) {
    return step(be,
                lm::ExpandBackward<float, float, float, float, float, host, rank_major>{
                    u_.view(), form_, B_.view(), 1, dy_.view(), du_.view(), dB_.view(), {}},
                lm::ShrinkBackward<float, float, float, float, float, host>{
                    A_.view(), {}, x_.view(), {}, du_.view(), {}, dA_.view(), {}, dx_.view()});
  }

 private:
  static constexpr lm::Space host = lm::Space::host;
  static constexpr lm::Major rank_major = lm::Major::column;

  template <lm::Major M>
  static void fill(lm::MatrixView<float, host, M> v, float bound) {
    for (Index i = 0; i < v.rows; ++i) {
      for (Index j = 0; j < v.cols; ++j) v(i, j) = bound * static_cast<float>((i * 31 + j * 7) % 101 - 50) / 50;
    }
  }
  template <class First, class Then>
  std::function<void()> step(const Backend& be, const First& first, const Then& then) {
    const Index bytes = std::max(scratch_bytes(be, first), scratch_bytes(be, then));
    if (bytes > scratch_.size()) scratch_ = lm::Buffer<std::byte>(lm::Arena<>::with_alignment(bytes));
    return [this, be, first, then] {
      const lm::Arena<> work{scratch_};
      lm::execute(be, first, work);
      lm::execute(be, then, work);
    };
  }

  Shape shape_;
  lm::Matrix<float> x_, dx_, y_, dy_, A_, dA_;
  lm::Matrix<float, host, rank_major> B_, dB_;
  lm::Matrix<float> u_, du_, weights_;
  lm::Matrix<std::int32_t> ids_;
  lm::GateForm<float> form_;
  lm::Buffer<std::byte> scratch_;
};

enum class Pass { forward, backward };

// How much, and what came of it.
class Tuner {
 public:
  Tuner(lm::ThreadPool& pool, int rounds, bool small) : be_{pool.executor()}, small_(small) {
    options_.rounds = rounds;
    options_.rounds_of_slow = options_.rounds_of_slowest = rounds;
  }

  const Tuning& tuning() const { return be_.tuning; }
  Index threads() const { return be_.lanes(); }
  const std::string& said() const { return said_; }

  // The best of the candidates for one value; the first is the library's.
  void choose(const char* name, Index Tuning::*value, std::vector<Index> candidates, Pass pass,
              std::vector<Shape> shapes) {
    std::vector<double> logs(candidates.size(), 0);
    for (const Shape& shape : shapes) {
      std::vector<Tuning> tunings(candidates.size(), be_.tuning);
      for (std::size_t i = 0; i < candidates.size(); ++i) tunings[i].*value = candidates[i];
      const std::vector<double> ratios = compare(fit(shape), pass, tunings);
      for (std::size_t i = 0; i < ratios.size(); ++i)
        logs[i] += std::log(ratios[i]) / static_cast<double>(shapes.size());
    }
    std::size_t best = 0;
    std::ostringstream line;
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      if (logs[i] < logs[best] && logs[i] < std::log(1 - gain)) best = i;
      line << (i == 0 ? "" : ", ") << candidates[i] << ": " << shown(std::exp(logs[i]));
    }
    be_.tuning.*value = candidates[best];
    say(std::string(name) + "  " + line.str());
  }

  // From how many bytes of weights on it pays to wake other threads, at T = 1.
  void choose_serial_bytes() {
    if (threads() == 1) return say("serial_bytes  one thread: not measured");
    std::vector<Tuning> tunings(2, be_.tuning);
    tunings[0].serial_bytes = Index{1} << 40, tunings[1].serial_bytes = 0;
    const Index first = 1 << 14, last = small_ ? 1 << 15 : 1 << 23;
    Index from = first;  // half of the least size from which all larger ones gain
    std::ostringstream line;
    for (Index bytes = first; bytes <= last; bytes *= 2) {
      const Index ranks = 16, columns = bytes / ranks / 4;  // A and B of so many bytes each
      const double ratio = compare({1, columns, columns, ranks}, Pass::forward, tunings)[1];
      if (ratio > 1 - gain) from = 2 * bytes;
      line << (bytes == first ? "" : ", ") << bytes << ": " << shown(ratio);
    }
    be_.tuning.serial_bytes = from - 1;
    say("serial_bytes  all threads over one, by bytes of A: " + line.str());
  }

  // Up to which share of open experts computing them alone pays.
  void choose_grouping() {
    std::vector<Tuning> tunings(2, be_.tuning);
    tunings[0].grouping = Grouping::dense, tunings[1].grouping = Grouping::grouped;
    std::ostringstream line;
    bool ever = false, always = true;
    for (Index chosen = 1; chosen < 8; ++chosen) {
      const double ratio = compare(fit({512, 4096, 4096, 128, 8, chosen}), Pass::forward, tunings)[1];
      ever = ever || ratio < 1, always = always && ratio < 1;
      line << (chosen == 1 ? "" : ", ") << chosen << ": " << shown(ratio);
    }
    // The library's own rule is by shapes; it is overruled only where the machine leaves no choice.
    be_.tuning.grouping = always ? Grouping::grouped : ever ? Grouping::automatic : Grouping::dense;
    say("grouping  grouped over dense, by experts of 8 that are open: " + line.str());
  }

 private:
  // Where there is hardly time, the same in small.
  Shape fit(Shape s) const {
    if (small_) s.tokens = std::min<Index>(s.tokens, 70), s.d_in = std::min<Index>(s.d_in, 160), s.d_out = s.d_in;
    return s;
  }
  // Times over that of the first, medians of rounds.
  std::vector<double> compare(const Shape& shape, Pass pass, const std::vector<Tuning>& tunings) {
    Problem problem(shape);
    std::vector<lm::bench::Contender> contenders;
    for (const Tuning& tuning : tunings) {
      Backend be = be_;
      be.tuning = tuning;
      contenders.push_back({"", pass == Pass::forward ? problem.forward(be) : problem.backward(be)});
    }
    const lm::bench::Rounds rounds = lm::bench::interleave(contenders, options_);
    std::vector<double> ratios;
    for (std::size_t i = 0; i < tunings.size(); ++i) ratios.push_back(rounds.ratio(i, 0).median);
    return ratios;
  }
  static std::string shown(double ratio) {
    char text[16];
    std::snprintf(text, sizeof text, "%.2f", ratio);
    return text;
  }
  void say(const std::string& line) {
    std::fprintf(stderr, "%s\n", line.c_str());
    said_ += "//   " + line + "\n";
  }

  Backend be_;
  bool small_;
  lm::bench::RoundOptions options_;
  std::string said_;
};

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "an unnamed processor";
}

std::string header(const Tuner& tuner) {
  char date[16];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::localtime(&now));
  const Tuning& t = tuner.tuning();
  const char* const grouping = t.grouping == Grouping::dense     ? "dense"
                               : t.grouping == Grouping::grouped ? "grouped"
                                                                 : "automatic";
  std::ostringstream out;
  out << "// Written by ./dev tune on " << processor() << ", threads: " << tuner.threads() << ", " << date << ".\n"
      << "// Times over that of the first candidate, the library's own value:\n//\n"
      << tuner.said() << "#pragma once\n#include <loramix/cpu/tuning.hpp>\n\n"
      << "inline constexpr loramix::cpu::Tuning machine_tuning{.grouping = loramix::cpu::Grouping::" << grouping
      << ",\n                                                     .sweep = " << t.sweep
      << ",\n                                                     .weights = " << t.weights
      << ",\n                                                     .tokens_per_sum = " << t.tokens_per_sum
      << ",\n                                                     .serial_bytes = " << t.serial_bytes << "};\n";
  return out.str();
}

}  // namespace

int main(int argc, char** argv) {
  const char* out = nullptr;
  long threads = static_cast<long>(std::max(1u, std::thread::hardware_concurrency()));
  int rounds = 21;
  bool small = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) {
      rounds = 7;
    } else if (std::strcmp(argv[i], "--smoke") == 0) {
      rounds = 1, small = true;
    } else if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
      threads = std::atol(argv[++i]);
    } else if (std::strcmp(argv[i], "--out") == 0 && i + 1 < argc) {
      out = argv[++i];
    } else {
      std::fprintf(stderr, "usage: tune [--threads N] [--quick | --smoke] [--out FILE]\n");
      return 2;
    }
  }
  lm::ThreadPool pool(threads);
  Tuner tuner(pool, rounds, small);
  const Tuning own;
  const std::vector<Shape> many{{512, 4096, 4096, 16}, {512, 4096, 4096, 64}, {512, 4096, 4096, 128}};
  tuner.choose("sweep", &Tuning::sweep, {own.sweep, 256, 512, 2048, 4096}, Pass::forward,
               {{1, 4096, 4096, 16}, {4, 4096, 4096, 64}, {512, 4096, 4096, 128, 8, 2}});
  tuner.choose("weights", &Tuning::weights, {own.weights, 32 * 1024, 64 * 1024, 256 * 1024, 512 * 1024}, Pass::forward,
               {{512, 4096, 4096, 32}, {512, 4096, 4096, 128}, {512, 4096, 4096, 512}});
  tuner.choose("tokens_per_sum", &Tuning::tokens_per_sum, {own.tokens_per_sum, 24, 48, 192}, Pass::backward, many);
  tuner.choose_serial_bytes();
  tuner.choose_grouping();
  const std::string text = header(tuner);
  std::fputs(text.c_str(), stdout);
  if (out != nullptr) {
    std::ofstream file(out);
    file << text;
    if (!file.flush()) {
      std::fprintf(stderr, "tune: cannot write %s\n", out);
      return 1;
    }
  }
}

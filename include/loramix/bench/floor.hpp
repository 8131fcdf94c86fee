/// How fast a pass could be here and now: what every benchmark's floor/time is measured against.
///
/// Computes:    floor = Σ over passes of max(flop / FMA rate, time of the memory twin). The FMA rate is that of
///              independent multiply-add chains in registers, on all lanes of the backend; the twin touches the pass's
///              own operands and nothing else: it reads those that are read, reads and writes back, unchanged, those
///              that are added to, both at the same time, over the same lanes.
/// Parameters:  Traffic of each pass: spans [bytes] of host memory. A ring of several is gone round, call by call, as a
///              benchmark on cold weights goes round its adapters.
/// Errors:      none.
/// Cost:        measure it in the same rounds as the work (bench/rounds.hpp): 10 ms of multiply-adds, for a rate that the
///              machine sustains and not one that it starts with, and one twin per pass each.
/// Determinism: operands keep their bits.
/// Example:     bench/instrument.cpp checks it on work whose cost is known.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>

#include <loramix/bench/rounds.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace bench {

/// Contiguous memory.
struct Span {
  std::byte* data = nullptr;
  Index bytes = 0;
};

/// The span of a contiguous matrix [rows, cols]; nothing is written through it where it is only read.
template <class T, Space S, Major M>
Span span_of(MatrixView<T, S, M> view) {
  using Bytes = std::byte*;
  return {reinterpret_cast<Bytes>(const_cast<std::remove_const_t<T>*>(view.data)),
          view.rows * view.cols * static_cast<Index>(sizeof(T))};
}
template <class T, Space S>
Span span_of(VectorView<T, S> view) {
  return span_of(MatrixView<T, S>(view.data, 1, view.size));
}

/// What a pass must move at least.
struct Traffic {
  std::vector<Span> read;
  std::vector<Span> updated;

  Index bytes() const {
    Index sum = 0;
    for (const Span& s : read) sum += s.bytes;
    for (const Span& s : updated) sum += 2 * s.bytes;
    return sum;
  }
};

namespace detail {

/// A vector of `Bytes` bytes, in as many registers as it takes.
template <class T, int Bytes>
struct Packet {
  typedef T type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};

/// Independent chains of c ← c · a + b, kept in registers. Returns something that depends on all of them.
template <class T, int Bytes, std::size_t... I>
T fma_chains(Index steps, T a, T b, std::index_sequence<I...>) {
  typedef T Vector __attribute__((vector_size(Bytes)));
  Vector chain[sizeof...(I)];
  ((chain[I] = Vector{} + T(I)), ...);
  const Vector va = Vector{} + a, vb = Vector{} + b;
  for (Index step = 0; step < steps; ++step) ((chain[I] = chain[I] * va + vb), ...);
  Vector sum = chain[0];
  ((sum += chain[I]), ...);
  T total{};
  for (int i = 0; i < Bytes / static_cast<int>(sizeof(T)); ++i) total += sum[i];
  return total;
}

/// One way to issue multiply-adds; which is fastest depends on the machine's registers.
template <class T>
struct FmaKernel {
  T (*run)(Index steps, T a, T b);
  double flop_per_step;
};
template <class T, int Bytes, int Chains>
T fma_run(Index steps, T a, T b) {
  return fma_chains<T, Bytes>(steps, a, b, std::make_index_sequence<Chains>{});
}
template <class T, int Bytes, int Chains>
constexpr FmaKernel<T> fma_kernel() {
  return {&fma_run<T, Bytes, Chains>, 2.0 * Chains * Bytes / static_cast<int>(sizeof(T))};
}

/// What the compiler must not know, and what it must believe is used.
template <class T>
struct Opaque {
  static inline std::atomic<T> ratio{T(0.999)}, step{T(0.001)}, zero{T(0)}, sink{T(0)};
};

template <class T>
const FmaKernel<T>& fastest_fma() {
  static const FmaKernel<T> best = [] {
    const FmaKernel<T> kernels[] = {fma_kernel<T, 16, 12>(), fma_kernel<T, 32, 12>(), fma_kernel<T, 64, 12>(),
                                    fma_kernel<T, 16, 24>(), fma_kernel<T, 64, 24>()};
    std::vector<double> rates[std::size(kernels)];
    for (int repeat = 0; repeat < 9; ++repeat) {
      for (std::size_t i = 0; i < std::size(kernels); ++i) {
        const Index steps = 40000;
        const auto call = [&] {
          Opaque<T>::sink.store(kernels[i].run(steps, Opaque<T>::ratio, Opaque<T>::step), std::memory_order_relaxed);
        };
        rates[i].push_back(kernels[i].flop_per_step * static_cast<double>(steps) / seconds_of(call, 1));
      }
    }
    std::size_t fastest = 0;
    for (std::size_t i = 1; i < std::size(kernels); ++i) {
      if (summary(rates[i]).median > summary(rates[fastest]).median) fastest = i;
    }
    return kernels[fastest];
  }();
  return best;
}

using Word = Packet<std::uint64_t, 32>::type;  // wider ones are taken apart where registers are not that wide

/// p ^= mask for the updated bytes, which is 0, what the compiler does not know; the others are read. Side by side, 128 of
/// each at a time, as far as there are both: loads and stores of two streams overlap.
inline std::uint64_t move_bytes(const std::byte* read, Index reads, std::byte* updated, Index updates,
                                std::uint64_t mask) {
  constexpr Index step = 4 * sizeof(Word);
  Word sum[4] = {};
  const Word m = Word{} ^ mask;
  const auto read_step = [&](Index i) {
    const Word* const w = reinterpret_cast<const Word*>(read + i);
    sum[0] ^= w[0], sum[1] ^= w[1], sum[2] ^= w[2], sum[3] ^= w[3];
  };
  const auto update_step = [&](Index i) {
    Word* const w = reinterpret_cast<Word*>(updated + i);
    w[0] ^= m, w[1] ^= m, w[2] ^= m, w[3] ^= m;
  };
  Index r = 0, u = 0;
  for (; r + step <= reads && r + step <= updates; r += step) read_step(r), update_step(r);
  for (u = r; u + step <= updates; u += step) update_step(u);
  for (; r + step <= reads; r += step) read_step(r);
  std::uint64_t total = 0;
  for (; r < reads; ++r) total += static_cast<std::uint64_t>(read[r]);
  for (; u < updates; ++u) updated[u] ^= static_cast<std::byte>(mask & 255u);
  sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
  for (int k = 0; k < 4; ++k) total ^= sum[0][k];
  return total;
}

}  // namespace detail

/// Multiply-adds on all lanes.
class FmaProbe {
 public:
  /// T: the type in which the work's products are summed.
  template <class T, class Backend>
  static FmaProbe of(const Backend& be) {
    const detail::FmaKernel<T> kernel = detail::fastest_fma<T>();
    const Index jobs = 32 * be.lanes(), steps = 20000;
    FmaProbe probe;
    probe.flop_ = kernel.flop_per_step * static_cast<double>(jobs * steps);
    probe.call_ = [be, kernel, jobs] {
      be.run(jobs, [&kernel](Index, Index) {
        using Values = detail::Opaque<T>;
        const T got = kernel.run(steps, Values::ratio, Values::step);
        Values::sink.store(got, std::memory_order_relaxed);
      });
    };
    return probe;
  }

  double flop() const { return flop_; }
  void operator()() const { call_(); }

 private:
  double flop_ = 0;
  std::function<void()> call_;
};

/// Where a ring of copies stands. All who go round it share one place: nobody finds warm what another has just read.
class RingPlace {
 public:
  std::size_t next(std::size_t size) const { return (*calls_)++ % size; }

 private:
  std::shared_ptr<std::size_t> calls_ = std::make_shared<std::size_t>(0);
};

/// Moves a pass's operands, and does nothing else.
class MemoryTwin {
 public:
  template <class Backend>
  MemoryTwin(const Backend& be, std::vector<Traffic> ring, RingPlace place = {})
      : place_(std::move(place)),
        run_([be](Index n, const std::function<void(Index)>& f) { be.run(n, [&f](Index job, Index) { f(job); }); }) {
    for (const Traffic& traffic : ring) plans_.push_back(plan_of(traffic, be.lanes()));
  }

  void operator()() {
    const Plan& plan = plans_[place_.next(plans_.size())];
    run_(plan.jobs, [&plan](Index job) {
      const Index count = static_cast<Index>(plan.pieces.size());
      std::uint64_t sum = 0;
      const std::uint64_t zero = detail::Opaque<std::uint64_t>::zero;
      for (Index i = job * count / plan.jobs; i < (job + 1) * count / plan.jobs; ++i) {
        const Piece& p = plan.pieces[static_cast<std::size_t>(i)];
        sum ^= detail::move_bytes(p.read.data, p.read.bytes, p.updated.data, p.updated.bytes, zero);
      }
      detail::Opaque<std::uint64_t>::sink.store(sum, std::memory_order_relaxed);
    });
  }

 private:
  struct Piece {
    Span read, updated;
  };
  struct Plan {
    std::vector<Piece> pieces;
    Index jobs = 1;
  };

  /// Small pieces of what is read beside pieces of what is updated, so that loads and stores overlap as in the fastest
  /// kernel; consecutive ones make a job: few jobs on one lane, enough to balance several.
  static Plan plan_of(const Traffic& traffic, Index lanes) {
    Index read = 0, updated = 0;
    for (const Span& s : traffic.read) read += s.bytes;
    for (const Span& s : traffic.updated) updated += s.bytes;
    const Index slices = std::max<Index>(1, (read + updated) / 4096);
    Plan plan;
    Cursor reads{&traffic.read}, updates{&traffic.updated};
    for (Index i = 1; i <= slices; ++i) {
      const Index read_until = share(read, i, slices), updated_until = share(updated, i, slices);
      while (reads.done < read_until || updates.done < updated_until) {
        plan.pieces.push_back({reads.take(read_until), updates.take(updated_until)});
      }
    }
    plan.jobs = lanes == 1 ? 1 : std::clamp(slices / 4, lanes, std::max(8 * lanes, slices / 64));
    return plan;
  }
  /// The end of slice i of `slices`, at a multiple of 64 bytes.
  static Index share(Index bytes, Index i, Index slices) {
    return i == slices
               ? bytes
               : static_cast<Index>(static_cast<double>(bytes) * static_cast<double>(i) / static_cast<double>(slices)) /
                     64 * 64;
  }
  /// Walks over spans as if they were one.
  struct Cursor {
    const std::vector<Span>* spans;
    std::size_t span = 0;
    Index at = 0, done = 0;
    /// What lies together of the bytes up to `until`; none where they are done.
    Span take(Index until) {
      while (done < until && at == (*spans)[span].bytes) ++span, at = 0;
      if (done >= until) return {};
      const Span& s = (*spans)[span];
      const Span taken{s.data + at, std::min(until - done, s.bytes - at)};
      at += taken.bytes, done += taken.bytes;
      return taken;
    }
  };

  RingPlace place_;
  std::function<void(Index, const std::function<void(Index)>&)> run_;
  std::vector<Plan> plans_;
};

/// One pass: what it computes and what it moves.
struct PassCost {
  double flop = 0;
  std::vector<Traffic> traffic;  // the ring
  RingPlace place{};
};

/// The floor of a sequence of passes.
class Floor {
 public:
  template <class T, class Backend>
  static Floor of(const Backend& be, const std::vector<PassCost>& passes) {
    Floor floor{FmaProbe::of<T>(be)};
    for (const PassCost& pass : passes) floor.passes_.push_back({pass.flop, MemoryTwin(be, pass.traffic, pass.place)});
    return floor;
  }

  /// What takes part in the rounds: the FMA probe, then the passes' twins.
  std::vector<Contender> contenders() const {
    std::vector<Contender> all{{"fma", fma_, sustained}};
    for (const Pass& pass : passes_) all.push_back({"twin", pass.twin});
    return all;
  }

  /// The floor in each round, given that contenders() stand at `first` there. `flop_share`, where wanted, is set to the
  /// part of the floor that multiply-adds determine, in the median.
  std::vector<double> seconds(const Rounds& rounds, std::size_t first, double* flop_share = nullptr) const {
    std::vector<double> floors(rounds.seconds[first].size()), shares(floors.size());
    for (std::size_t r = 0; r < floors.size(); ++r) {
      const double rate = fma_.flop() / rounds.seconds[first][r];
      double total = 0, computing = 0;
      for (std::size_t p = 0; p < passes_.size(); ++p) {
        const double compute = passes_[p].flop / rate, move = rounds.seconds[first + 1 + p][r];
        total += move >= compute ? move : compute;
        computing += move >= compute ? 0 : compute;
        if (std::isnan(move)) total = move;
      }
      floors[r] = total;
      shares[r] = computing / total;
    }
    if (flop_share != nullptr) *flop_share = summary(shares).median;
    return floors;
  }
  double fma_rate(const Rounds& rounds, std::size_t first) const { return fma_.flop() / rounds.time(first).median; }

 private:
  struct Pass {
    double flop;
    MemoryTwin twin;
  };
  explicit Floor(FmaProbe fma) : fma_(std::move(fma)) {}

  static constexpr double sustained = 0.01;  // seconds
  FmaProbe fma_;
  std::vector<Pass> passes_;
};

/// One row of a benchmark.
struct Measurement {
  Ratio time;         // seconds per call
  Ratio floor;        // floor / time
  double flop_share;  // how much of the floor is multiply-adds; the rest is memory
  double fma_rate;    // flop/s of the probe, all lanes
  double disturbed;   // share of samples in which the process was preempted: near 0, or do not trust the row
  std::vector<std::pair<std::string, Ratio>> others;  // time of each other contender / time of the work
};

/// Times `work` beside its floor and beside others, in the same rounds.
inline Measurement measure(const std::function<void()>& work, const Floor& floor,
                           const std::vector<Contender>& others = {}, const RoundOptions& options = {}) {
  std::vector<Contender> all{{"work", work}};
  for (Contender& c : floor.contenders()) all.push_back(std::move(c));
  const std::size_t first_other = all.size();
  all.insert(all.end(), others.begin(), others.end());
  const Rounds rounds = interleave(all, options);

  Measurement m;
  m.time = rounds.time(0);
  m.disturbed = rounds.disturbed;
  m.fma_rate = floor.fma_rate(rounds, 1);
  std::vector<double> ratios = floor.seconds(rounds, 1, &m.flop_share);
  for (std::size_t r = 0; r < ratios.size(); ++r) ratios[r] /= rounds.seconds[0][r];
  m.floor = summary(std::move(ratios));
  for (std::size_t i = 0; i < others.size(); ++i) {
    m.others.emplace_back(others[i].name, rounds.ratio(first_other + i, 0));
  }
  return m;
}

}  // namespace bench
}  // namespace LORAMIX_ABI
}  // namespace loramix

// One adapter under test, on its layer, of which only the scalar is known: the laws of this folder are written against it
// and compiled once. hosted.hpp makes one of any adapter.
#pragma once
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <loramix/adapter/forward.hpp>

#include "support/seed.hpp"

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

/// What a batch of T tokens says of them, in all the words there are. Sequences are ragged, one of them is empty; every
/// fourth sequence has no label and every fifth token no task, and some tokens are padding.
struct Told {
  explicit Told(Index tokens, bool labelled = true) {
    for (Index t = 0; t < tokens; ++t) {
      tasks.push_back(t % 5 == 3 ? -1 : static_cast<std::int32_t>((t * 7 + t / 3) % 3));
      valid.push_back(t % 7 != 2);
    }
    for (Index begin = 0; begin < tokens; begin += 1 + begin % 3) {
      offsets.push_back(begin);
      if (begin == 1) offsets.push_back(begin);
    }
    offsets.push_back(tokens);
    for (std::size_t b = 0; b + 1 < offsets.size(); ++b) {
      labels.push_back(!labelled || b % 4 == 3 ? -1 : static_cast<std::int32_t>((b * 5 + 1) % 3));
    }
  }
  Index sequences() const { return static_cast<Index>(labels.size()); }

  std::vector<std::int32_t> tasks, labels;
  std::vector<Index> offsets;
  std::vector<std::uint8_t> valid;
};

/// A parameter, its gradient, or a frozen weight: dense memory.
template <class T>
struct Tensor {
  std::string name, group;
  T* data;
  Index rows, cols;
  bool rank_major;

  Index size() const { return rows * cols; }
};

/// A router's scores, as losses see them.
template <class T>
using Seen = lm::Scores<T, lm::Space::host>;

/// What a call is told beside its operands.
struct Call {
  lm::Key key = lm::no_draws;
  lm::Keep keep = lm::Keep::z;
  lm::Into into = lm::Into::add;
  bool dropout_off = false;
  int threads = 1;
};

template <class T>
class Subject {
 public:
  using Const = lm::MatrixView<const T>;
  using View = lm::MatrixView<T>;

  virtual ~Subject() = default;

  std::string name;
  bool differences = true;                               // Form::differences
  std::string silent;                                    // Form::silent
  bool adds = true;                                      // y += ΔY, and ΔY is 0 at the start
  bool draws = false;                                    // it has dropout
  bool stamped = false;                                  // its reserve says whose it is
  bool by_token = true;                                  // a token's result depends on its own row only
  virtual std::unique_ptr<Subject> another() const = 0;  // the same configuration, all zeros
  virtual void start(std::uint64_t seed) = 0;            // as initialise() leaves it, beside the frozen weights
  virtual std::vector<Tensor<T>> parameters() = 0;
  virtual std::vector<Tensor<T>> gradient() = 0;
  virtual std::vector<Tensor<T>> frozen() = 0;
  virtual lm::VectorView<T> flat() = 0;           // the parameters' buffer
  virtual lm::VectorView<T> flat_gradient() = 0;  // the gradient's
  virtual lm::Cost cost(Index tokens) const = 0;

  virtual Index in() const = 0;
  virtual Index out() const = 0;
  virtual Index out_rows(const Told& told, Index tokens) const = 0;
  virtual Index workspace_bytes(Index tokens, lm::Pass pass, int threads = 1) const = 0;
  virtual Index reserve_bytes(Index tokens, lm::Keep keep = lm::Keep::z) const = 0;

  /// Keeps what it saved, where `save` is given, for backward.
  virtual void forward(Const x, View y, const Told& told, lm::Arena<> work, lm::Arena<>* save, const Call& call) = 0;
  virtual void backward(Const x, Const dy, View dx, lm::Arena<> work, lm::BackwardOptions options = {},
                        bool parameters = true, int threads = 1) = 0;
  /// backward of a copy of what forward saved, which stays.
  virtual void backward_of_copy(Const x, Const dy, View dx, lm::Arena<> work) = 0;
  /// `other`'s forward is what backward shall be of.
  virtual void take_saved(Subject& other) = 0;

  /// Of the last saving forward.
  virtual Seen<T> scores() const = 0;
  /// No choice is nearer than 1e-3 to another one.
  virtual bool clear_choices() const = 0;
  /// What MATH.md calls constant in the gradient, as the last saving forward had it: remembered, and put back into a
  /// later forward's y, of which the last saving forward was made.
  virtual void remember(const Told& told) = 0;
  virtual void hold(View y, const Told& told) const = 0;

  /// The same call on a pack made for it; returns the bytes of workspace that it asked for, or −1 where there is no pack.
  virtual Index forward_packed(Const x, View y, const Told& told, const Call& call) = 0;
  /// explain(), printed; false where there is none.
  virtual bool explained(Index tokens, std::FILE* to) const = 0;
};

/// How to make a subject.
template <class T>
struct Maker {
  std::string name;
  std::unique_ptr<Subject<T>> (*make)(std::size_t form);
  std::size_t form;
  std::unique_ptr<Subject<T>> operator()() const { return make(form); }
};

/// Adapters k, k + suite_parts, … of the list: each part is a translation unit of its own.
inline constexpr std::size_t suite_parts = 6;
template <class T, std::size_t Part>
std::vector<Maker<T>> part();

/// All adapters in all forms.
template <class T>
const std::vector<Maker<T>>& all_subjects() {
  static const std::vector<Maker<T>> all = []<std::size_t... K>(std::index_sequence<K...>) {
    std::vector<Maker<T>> makers;
    for (auto part_k : {part<T, K>...}) {
      for (const Maker<T>& maker : part_k()) makers.push_back(maker);
    }
    return makers;
  }
  (std::make_index_sequence<suite_parts>());
  return all;
}

/// Saving and loading of an adapter in one form (files.hpp): check returns what went wrong.
inline constexpr std::size_t file_parts = 3;
struct FileCase {
  std::string name;
  std::string (*check)(std::size_t form, const std::string& folder);
  std::size_t form;
};
template <std::size_t Part>
std::vector<FileCase> file_part();

}  // namespace loramix_test

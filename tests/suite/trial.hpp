// A subject with random parameters, a batch for it, and memory for both passes: what the laws begin with.
#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <loramix/core/matrix.hpp>

#include "suite/subject.hpp"

namespace loramix_test {

/// Uniform numbers in [−1, 1), exact in every scalar of the suite; with 8 bits also in bfloat16 and half.
class Uniform {
 public:
  explicit Uniform(std::uint64_t site, int bits = 23)
      : engine_(seed(site)), shift_(64 - bits), step_(std::ldexp(1, 1 - bits)) {}
  double operator()() { return static_cast<double>(engine_() >> shift_) * step_ - 1; }
  template <class T>
  void fill(T* values, Index n, double size = 1) {
    for (Index i = 0; i < n; ++i) values[i] = static_cast<T>(size * (*this)());
  }

 private:
  std::mt19937_64 engine_;
  int shift_;
  double step_;
};

/// Memory for arenas, full of NaN, with one byte behind that nobody may touch. It begins `shift` bytes behind a multiple of
/// 64; without a shift no byte is lost to alignment.
class Scratch {
 public:
  explicit Scratch(Index size, Index shift = 0)
      : bytes_(static_cast<std::size_t>(size + shift) + 65, std::byte{0xff}), size_(size) {
    begin_ = static_cast<std::size_t>(-reinterpret_cast<std::uintptr_t>(bytes_.data()) % 64) +
             static_cast<std::size_t>(shift);
  }
  lm::Arena<> arena() { return {bytes_.data() + begin_, size_}; }
  Index size() const { return size_; }
  bool untouched_behind() const { return bytes_[begin_ + static_cast<std::size_t>(size_)] == std::byte{0xff}; }

 private:
  std::vector<std::byte> bytes_;
  Index size_;
  std::size_t begin_;
};

template <class T>
bool same_bits(const lm::Matrix<T>& a, const lm::Matrix<T>& b) {
  const auto bytes = static_cast<std::size_t>(a.rows() * a.cols()) * sizeof(T);
  return a.rows() == b.rows() && a.cols() == b.cols() && (bytes == 0 || std::memcmp(a.data(), b.data(), bytes) == 0);
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
void fill(lm::Matrix<T>& m, double value) {
  for (Index i = 0; i < m.rows() * m.cols(); ++i) m.data()[i] = static_cast<T>(value);
}
inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

template <class T>
struct Trial {
  static constexpr lm::Key key{.seed = 5, .site = lm::site("module"), .step = 3, .first_token = 100};

  Trial(const Maker<T>& make, Index tokens_, std::uint64_t site = 0, bool labelled = true, int bits = 23)
      : uniform(site, bits), subject(make()), told(tokens_, labelled), tokens(tokens_) {
    for (const Tensor<T>& w : subject->frozen()) uniform.fill(w.data, w.size());
    subject->start(1);
    for (const Tensor<T>& p : subject->parameters()) uniform.fill(p.data, p.size());
    const Index rows = subject->out_rows(told, tokens);
    x = lm::Matrix<T>(tokens, subject->in());
    dy = lm::Matrix<T>(rows, subject->out());
    uniform.fill(x.data(), x.rows() * x.cols());
    uniform.fill(dy.data(), dy.rows() * dy.cols());
    const Index there = subject->workspace_bytes(tokens, lm::Pass::forward, 3);
    const Index back = subject->workspace_bytes(tokens, lm::Pass::backward, 3);
    work = Scratch(std::max(there, back));
    kept = Scratch(subject->reserve_bytes(tokens));
  }
  lm::Matrix<T> new_y() const { return {dy.rows(), dy.cols()}; }
  lm::Matrix<T> new_dx() const { return {x.rows(), x.cols()}; }
  Call call() const { return {.key = key}; }

  void forward(lm::Matrix<T>& y, const Call& how) { subject->forward(x, y, told, work.arena(), nullptr, how); }
  /// Saves; the reserve begins anew.
  void saving(lm::Matrix<T>& y, const Call& how) {
    lm::Arena<> reserve = kept.arena();
    subject->forward(x, y, told, work.arena(), &reserve, how);
  }
  void backward(lm::MatrixView<T> dx, lm::BackwardOptions options = {}, bool parameters = true, int threads = 1) {
    subject->backward(x, dy, dx, work.arena(), options, parameters, threads);
  }
  bool is_empty(const std::string& parameter) const {
    for (const Tensor<T>& p : subject->parameters()) {
      if (p.name == parameter) return p.size() == 0;
    }
    return false;
  }
  std::vector<T> gradient() {
    const auto flat = subject->flat_gradient();
    return {flat.data, flat.data + flat.size};
  }
  void fill_gradient(double value) {
    for (const Tensor<T>& g : subject->gradient()) {
      for (Index i = 0; i < g.size(); ++i) g.data[i] = static_cast<T>(value);
    }
  }

  Uniform uniform;
  std::unique_ptr<Subject<T>> subject;
  Told told;
  Index tokens;
  lm::Matrix<T> x, dy;
  Scratch work{0}, kept{0};
};

/// law(maker) for every adapter in every form, with its name in every message.
template <class T, class Law>
void for_every_subject(const Law& law) {
  for (const Maker<T>& make : all_subjects<T>()) {
    CAPTURE(make.name);
    law(make);
  }
}

}  // namespace loramix_test

// The data: handwritten digits (examples/data), seen through six domains that want different answers.
#pragma once
#include <Eigen/Core>
#include <array>
#include <cstdint>
#include <fstream>
#include <loramix/adapter/initialise.hpp>
#include <loramix/core/draws.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace demo {

namespace lm = loramix;
using lm::Index;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline lm::MatrixView<float> view(Matrix& m) { return {m.data(), m.rows(), m.cols()}; }
inline lm::MatrixView<const float> view(const Matrix& m) { return {m.data(), m.rows(), m.cols()}; }

constexpr int side = 8, pixels = side * side, classes = 10;

struct Images {
  Matrix x;                 // [images, pixels] from −1 (background) to 1 (ink)
  std::vector<int> label;   // [images]
  std::vector<int> domain;  // [images]: for methods that are told

  Index size() const { return x.rows(); }
};

inline Images read_digits(const std::string& path) {
  constexpr Index rows = 1797;
  Images digits{Matrix(rows, pixels), std::vector<int>(rows), std::vector<int>(rows, 0)};
  std::ifstream file(path);
  char comma;
  for (Index i = 0; i < rows; ++i) {
    for (int p = 0; p < pixels; ++p) {
      file >> digits.x(i, p) >> comma;
      digits.x(i, p) = digits.x(i, p) / 8 - 1;
    }
    file >> digits.label[i];
  }
  if (!file) throw std::runtime_error("cannot read 1797 digits from " + path);
  return digits;
}

/// 0 … n−1 in an order that depends on (seed, name, step) and nothing else: Fisher and Yates.
inline std::vector<Index> shuffled(Index n, std::uint64_t seed, const char* name, std::uint64_t step = 0) {
  const std::uint64_t key = lm::philox_key({.seed = seed, .site = lm::site(name), .step = step});
  std::vector<Index> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), Index{0});
  for (Index i = n - 1; i > 0; --i) {
    const double u = lm::draw_uniform(key, lm::Purpose::sampling, 0, i);
    std::swap(order[i], order[static_cast<Index>(u * static_cast<double>(i + 1))]);
  }
  return order;
}

/// The images numbered rows[begin], …, rows[begin + count − 1].
inline Images select(const Images& from, const std::vector<Index>& rows, Index begin, Index count) {
  Images chosen{Matrix(count, pixels), {}, {}};
  for (Index i = 0; i < count; ++i) {
    const Index row = rows[begin + i];
    chosen.x.row(i) = from.x.row(row);
    chosen.label.push_back(from.label[row]);
    chosen.domain.push_back(from.domain[row]);
  }
  return chosen;
}

// ---- domains ------------------------------------------------------------------------------------------------------

inline constexpr std::array domain_names{"rotated", "inverted", "mirrored", "shifted", "noisy", "permuted"};
enum Domain : int { rotated, inverted, mirrored, shifted, noisy, permuted };
constexpr int domains = 6;

/// Where pixel p of an image in the domain comes from.
inline Index source(Domain domain, int p, const std::vector<Index>& permutation) {
  const int i = p / side, j = p % side;
  switch (domain) {
    case rotated:
      return j * side + (side - 1 - i);
    case mirrored:
      return i * side + (side - 1 - j);
    case shifted:
      return (i + side - 2) % side * side + (j + side - 2) % side;
    case permuted:
      return permutation[p];
    default:
      return p;
  }
}

/// The images as the domain shows them. In domain k the digit y is called (y + k) mod 10, so that one network cannot
/// please two domains by ignoring the difference (`conflict` false: it is called y everywhere).
inline Images seen_in(Domain domain, const Images& clean, bool conflict, std::uint64_t seed, const char* part) {
  const std::vector<Index> permutation = shuffled(pixels, 0, "demo.permutation");  // one, whatever the seed
  Images seen{Matrix(clean.size(), pixels), clean.label, std::vector<int>(clean.label.size(), domain)};
  for (int p = 0; p < pixels; ++p) seen.x.col(p) = clean.x.col(source(domain, p, permutation));
  if (domain == inverted) seen.x = -seen.x;
  if (domain == noisy) {
    Matrix noise(clean.size(), pixels);
    lm::Fill({.seed = seed, .site = "demo.noise"}).normal(part, view(noise), 0.7 * 0.7);
    seen.x += noise;
  }
  if (conflict) {
    for (int& label : seen.label) label = (label + domain) % classes;
  }
  return seen;
}

// ---- one seed's data ----------------------------------------------------------------------------------------------

struct Data {
  Images clean_train, clean_test;  // what the base network learns
  Images train;                    // all domains, one below the other
  std::array<Images, domains> test;
};

inline Data split(const Images& digits, bool conflict, std::uint64_t seed) {
  constexpr Index train_images = 1257;
  const std::vector<Index> order = shuffled(digits.size(), seed, "demo.split");
  Data data;
  data.clean_train = select(digits, order, 0, train_images);
  data.clean_test = select(digits, order, train_images, digits.size() - train_images);
  data.train.x.resize(domains * train_images, pixels);
  for (int k = 0; k < domains; ++k) {
    const auto domain = static_cast<Domain>(k);
    const Images seen = seen_in(domain, data.clean_train, conflict, seed, "train");
    data.train.x.middleRows(k * train_images, train_images) = seen.x;
    data.train.label.insert(data.train.label.end(), seen.label.begin(), seen.label.end());
    data.train.domain.insert(data.train.domain.end(), seen.domain.begin(), seen.domain.end());
    data.test[k] = seen_in(domain, data.clean_test, conflict, seed, "test");
  }
  return data;
}

}  // namespace demo

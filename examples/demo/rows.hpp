// What the table, results.json and the pictures are made of: a row per method, with an outcome per seed.
#pragma once
#include <cmath>

#include "methods.hpp"

namespace demo {

struct Row {
  std::string group;
  Title title;
  Index trainable, network;
  std::vector<Outcome> seeds;

  bool ablation() const { return !title.of.empty(); }
  double percent() const { return 100.0 * static_cast<double>(trainable) / static_cast<double>(network); }
};

/// Mean and standard deviation of a sample; 0 for one number.
struct Spread {
  double mean = 0, sd = 0;
};

inline Spread spread(const std::vector<double>& values) {
  const double n = static_cast<double>(values.size());
  Spread s;
  for (const double value : values) s.mean += value / n;
  for (const double value : values) s.sd += (value - s.mean) * (value - s.mean);
  s.sd = values.size() > 1 ? std::sqrt(s.sd / (n - 1)) : 0;
  return s;
}

/// Of any number of the row's outcomes.
template <class Number>
Spread over_seeds(const Row& row, const Number& number) {
  std::vector<double> values;
  for (const Outcome& outcome : row.seeds) values.push_back(number(outcome));
  return spread(values);
}

inline Spread average(const Row& row) {
  return over_seeds(row, [](const Outcome& outcome) { return outcome.average(); });
}

/// Every detail's mean over the seeds.
inline std::vector<Detail> details(const Row& row) {
  std::vector<Detail> mean = row.seeds[0].details.of_domains;
  for (std::size_t i = 0; i < mean.size(); ++i) {
    for (int k = 0; k < domains; ++k) {
      mean[i].value[k] =
          over_seeds(row, [&](const Outcome& outcome) { return outcome.details.of_domains[i].value[k]; }).mean;
    }
  }
  return mean;
}

inline const Row& row_named(const std::vector<Row>& rows, const std::string& name) {
  for (const Row& row : rows) {
    if (row.title.name == name && !row.ablation()) return row;
  }
  throw std::logic_error("no row is called " + name);
}

/// Of an ablation: what changes, seed by seed.
inline Spread difference(const Row& ablation, const std::vector<Row>& rows) {
  const Row& own = row_named(rows, ablation.title.of);
  std::vector<double> values;
  for (std::size_t i = 0; i < own.seeds.size(); ++i) {
    values.push_back(ablation.seeds[i].average() - own.seeds[i].average());
  }
  return spread(values);
}

}  // namespace demo

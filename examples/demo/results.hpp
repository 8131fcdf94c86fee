// results.json: all of the tables, and what every seed gave.
#pragma once
#include <fstream>
#include <nlohmann/json.hpp>

#include "rows.hpp"

namespace demo {

using Json = nlohmann::ordered_json;

template <class Values>
Json by_domain(const Values& values) {
  Json json;
  for (int k = 0; k < domains; ++k) json[domain_names[k]] = values(k);
  return json;
}

/// A list of experts, each by domain.
inline Json by_expert(const Eigen::ArrayXXd& values) {
  Json json = Json::array();
  for (Index e = 0; e < values.rows(); ++e) json.push_back(by_domain([&](int k) { return values(e, k); }));
  return json;
}

inline Json to_json(const std::vector<Detail>& details) {
  Json json = Json::object();
  for (const Detail& detail : details) json[detail.name] = by_domain([&](int k) { return detail.value[k]; });
  return json;
}

/// What one seed gave. Experts have numbers of their own in every seed.
inline Json to_json(const Outcome& outcome) {
  Json experts = Json::object();
  for (const Experts& of : outcome.details.experts) {
    experts[of.place]["load %"] = by_expert(of.load);
    if (of.shapley.size() != 0) experts[of.place]["shapley %"] = by_expert(of.shapley);
  }
  return {{"average", outcome.average()},
          {"accuracy", by_domain([&](int k) { return outcome.accuracy[k]; })},
          {"details", to_json(outcome.details.of_domains)},
          {"experts", experts},
          {"loss", outcome.loss}};
}

inline Json to_json(const Row& row, const std::vector<Row>& rows) {
  const Spread all = average(row);
  Json json{{"method", row.title.name},
            {"group", row.group},
            {"trainable", row.trainable},
            {"percent", row.percent()},
            {"seconds", over_seeds(row, [](const Outcome& outcome) { return outcome.seconds; }).mean},
            {"seeds", row.seeds.size()},
            {"accuracy", by_domain([&](int k) {
               return over_seeds(row, [k](const Outcome& outcome) { return outcome.accuracy[k]; }).mean;
             })},
            {"average", all.mean},
            {"sd", all.sd},
            {"details", to_json(details(row))}};
  if (row.ablation()) {
    const Spread change = difference(row, rows);
    json["ablation of"] = row.title.of;
    json["difference"] = {{"mean", change.mean}, {"sd", change.sd}};
  }
  for (const Outcome& outcome : row.seeds) json["runs"].push_back(to_json(outcome));
  return json;
}

inline void write_results(const std::string& path, const std::vector<Row>& rows) {
  Json results = Json::array();
  for (const Row& row : rows) results.push_back(to_json(row, rows));
  std::ofstream file(path);
  file << results.dump(2) << '\n';
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace demo

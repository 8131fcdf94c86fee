// Which ranks MoRE's tasks choose: a panel per layer, a dot per seed, a line at the mean.
#pragma once
#include "rows.hpp"
#include "svg.hpp"

namespace demo {

inline void draw_ranks(const Row& row, int most, const std::string& path) {
  constexpr double left = 60, top = 90, wide = 54, high = 190, across = wide * domains + 40;
  const auto layers = static_cast<double>(row.seeds[0].details.of_domains.size());
  Svg svg(left + layers * across, top + high + 40);
  svg.text({16, 26}, "Ranks that MoRE's tasks choose", {.size = 15, .bold = true});
  svg.text({16, 44}, row.title.name + "; a dot per seed, a line at the mean", {.colour = grey});
  const auto y = [&](double rank) { return top + high * (1 - rank / most); };
  for (std::size_t l = 0; l < row.seeds[0].details.of_domains.size(); ++l) {
    const double x = left + across * static_cast<double>(l);
    svg.text({x, top - 16}, "layer " + std::to_string(l + 1), {.size = 12, .bold = true});
    for (int rank = 1; rank <= most; rank += 3) {
      svg.line({x, y(rank)}, {x + wide * domains, y(rank)}, pale);
      svg.text({x - 6, y(rank) + 4}, std::to_string(rank), {.size = 10, .anchor = Anchor::end, .colour = grey});
    }
    for (int k = 0; k < domains; ++k) {
      const double middle = x + wide * (k + 0.5);
      const auto rank = [&](const Outcome& outcome) { return outcome.details.of_domains[l].value[k]; };
      const double mean = over_seeds(row, rank).mean;
      svg.line({middle - 18, y(mean)}, {middle + 18, y(mean)}, line_colours[1], 2);
      for (std::size_t seed = 0; seed < row.seeds.size(); ++seed) {
        const double aside = 5 * (static_cast<double>(seed) - static_cast<double>(row.seeds.size() - 1) / 2);
        svg.dot({middle + aside, y(rank(row.seeds[seed]))}, 4, line_colours[0]);
      }
      svg.text({middle, top + high + 16}, domain_names[k], {.size = 10, .anchor = Anchor::middle});
    }
  }
  svg.save(path);
}

}  // namespace demo

// Who reads what: experts × domains, as a map of percentages for every place of every mixture.
#pragma once
#include "rows.hpp"
#include "svg.hpp"

namespace demo {

/// One place's map, experts × domains, in a box whose left upper corner is given.
class ExpertMap {
 public:
  static constexpr double cell = 44, line = 17, width = cell * domains;

  ExpertMap(Svg& svg, Point corner) : svg_(svg), at_(corner) {}

  void domains_above() const {
    for (int k = 0; k < domains; ++k) {
      svg_.text({at_.x + cell * (k + 0.5), at_.y - 5}, domain_names[k],
                {.size = 9.5, .anchor = Anchor::middle, .colour = grey});
    }
  }
  void draw(const Eigen::ArrayXXd& percent) const {
    for (Index e = 0; e < percent.rows(); ++e) {
      for (int k = 0; k < domains; ++k) {
        const double value = percent(e, k);
        const Point corner{at_.x + cell * k, at_.y + line * static_cast<double>(e)};
        svg_.box(corner, cell - 1, line - 1, shade(value / 100));
        if (std::fabs(value) < 0.5) continue;
        char text[16];
        std::snprintf(text, sizeof text, "%.0f", value);
        svg_.text({corner.x + cell / 2, corner.y + line / 2 + 3.5}, text,
                  {.anchor = Anchor::middle, .colour = value > 55 ? "#ffffff" : "#333333"});
      }
    }
  }

 private:
  Svg& svg_;
  Point at_;
};

/// `values`: which numbers of a place's experts; empty where there are none. Of the first seed: an expert has another
/// number in every seed.
template <class Values>
void draw_experts(const std::vector<Row>& rows, const std::string& heading, const std::string& what,
                  const Values& values, const std::string& path) {
  std::vector<const Row*> drawn;
  double height = 92;
  const auto lines_of = [&](const Row& row) {
    const auto& experts = row.seeds[0].details.experts;
    return row.ablation() || experts.empty() ? 0.0 : static_cast<double>(values(experts[0]).rows());
  };
  for (const Row& row : rows) {
    if (lines_of(row) == 0) continue;
    drawn.push_back(&row);
    height += ExpertMap::line * lines_of(row) + 14;
  }
  if (drawn.empty()) return;
  constexpr double left = 190, across = ExpertMap::width + 22;
  Svg svg(left + 3 * across, height);
  svg.text({16, 26}, heading, {.size = 15, .bold = true});
  svg.text({16, 44}, what, {.colour = grey});
  double top = 88;
  for (const Row* row : drawn) {
    const double below = ExpertMap::line * lines_of(*row);
    svg.text({left - 34, top + below / 2 + 4}, row->title.name, {.anchor = Anchor::end});
    for (int e = 0; e < static_cast<int>(lines_of(*row)); ++e) {
      svg.text({left - 8, top + ExpertMap::line * (e + 0.5) + 3.5}, std::to_string(e + 1),
               {.size = 10, .anchor = Anchor::end, .colour = grey});
    }
    double x = left;
    for (const Experts& experts : row->seeds[0].details.experts) {
      const ExpertMap map(svg, {x, top});
      if (row == drawn.front()) map.domains_above();
      map.draw(values(experts));
      x += across;
    }
    top += below + 14;
  }
  for (int l = 0; l < 3; ++l) {
    svg.text({left + across * l, 68}, "layer " + std::to_string(l + 1), {.size = 12, .bold = true});
  }
  svg.save(path);
}

inline void draw_load(const std::vector<Row>& rows, const std::string& path) {
  draw_experts(
      rows, "Load of the experts, in percent of a domain",
      "what routers gave to each expert (rows) of images of each domain (columns); one seed; MixLoRA: per block",
      [](const Experts& experts) -> const Eigen::ArrayXXd& { return experts.load; }, path);
}
inline void draw_shapley(const std::vector<Row>& rows, const std::string& path) {
  draw_experts(
      rows, "Shapley values of the experts, in percent of a layer's change",
      "v(C) = ‖ΔY‖² − ‖ΔY − what the experts of C add‖², over the images of a domain; one seed; orange: works against "
      "the others",
      [](const Experts& experts) -> const Eigen::ArrayXXd& { return experts.shapley; }, path);
}

}  // namespace demo

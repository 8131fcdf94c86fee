// How the loss of every method falls: a panel per group of methods.
#pragma once
#include "rows.hpp"
#include "svg.hpp"

namespace demo {

/// One group's curves, in a box whose left upper corner is given.
class LossPanel {
 public:
  static constexpr double width = 300, height = 200, labels = 180;

  LossPanel(Svg& svg, Point corner, double least, double most) : svg_(svg), at_(corner), least_(least), most_(most) {}

  void axes(const std::string& title) const {
    svg_.text({at_.x, at_.y - 10}, title, {.size = 12, .bold = true});
    for (const double tick : {0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0}) {
      if (tick < least_ || tick > most_) continue;
      svg_.line({at_.x, y(tick)}, {at_.x + width, y(tick)}, pale);
      char text[16];
      std::snprintf(text, sizeof text, "%g", tick);
      svg_.text({at_.x - 6, y(tick) + 4}, text, {.size = 10, .anchor = Anchor::end, .colour = grey});
    }
  }
  void epochs(std::size_t count) const {
    for (const std::size_t epoch : {std::size_t{1}, count / 3, 2 * count / 3, count}) {
      svg_.text({x(epoch - 1, count), at_.y + height + 14}, std::to_string(epoch),
                {.size = 10, .anchor = Anchor::middle, .colour = grey});
    }
  }
  void curve(const std::string& name, const std::vector<double>& loss, const std::string& colour) {
    std::vector<Point> points;
    for (std::size_t i = 0; i < loss.size(); ++i) points.push_back({x(i, loss.size()), y(loss[i])});
    svg_.curve(points, colour, colour == grey ? 1.2 : 1.6);
    ends_.push_back({points.back().y, name, colour});
  }
  /// Names beside the curves' ends, apart from each other.
  void names() {
    constexpr double apart = 13;
    std::sort(ends_.begin(), ends_.end(), [](const End& a, const End& b) { return a.y < b.y; });
    const double all = apart * static_cast<double>(ends_.size() - 1);
    double free = at_.y;
    for (std::size_t i = 0; i < ends_.size(); ++i) {
      const double left = all - apart * static_cast<double>(i), lowest = at_.y + height - left;
      const double label = std::max(free, std::min(ends_[i].y, lowest));
      svg_.line({at_.x + width + 1, ends_[i].y}, {at_.x + width + 14, label}, ends_[i].colour, 0.8);
      svg_.text({at_.x + width + 17, label + 4}, ends_[i].name, {.colour = ends_[i].colour});
      free = label + apart;
    }
  }

 private:
  struct End {
    double y;
    std::string name, colour;
  };
  double x(std::size_t i, std::size_t count) const {
    return at_.x + width * static_cast<double>(i) / static_cast<double>(std::max(count, std::size_t{2}) - 1);
  }
  double y(double loss) const { return at_.y + height * std::log(most_ / loss) / std::log(most_ / least_); }

  Svg& svg_;
  Point at_;
  double least_, most_;
  std::vector<End> ends_;
};

/// The mean over the seeds of every epoch's loss.
inline std::vector<double> mean_loss(const Row& row) {
  std::vector<double> loss;
  for (std::size_t i = 0; i < row.seeds[0].loss.size(); ++i) {
    loss.push_back(over_seeds(row, [i](const Outcome& outcome) { return outcome.loss[i]; }).mean);
  }
  return loss;
}

/// Rows that have curves: not ablations, nor what is decided otherwise after the same training.
inline std::vector<const Row*> rows_with_curves(const std::vector<Row>& rows) {
  std::vector<const Row*> drawn;
  for (const Row& row : rows) {
    if (!row.ablation() && !row.seeds[0].loss.empty() && !row.title.name.ends_with(", routed")) drawn.push_back(&row);
  }
  return drawn;
}

/// A panel per group of methods, with LoRA of rank 24 in grey where it is on the same network.
inline void draw_losses(const std::vector<Row>& rows, const std::string& path) {
  const std::vector<const Row*> drawn = rows_with_curves(rows);
  std::vector<std::string> groups;
  double least = 1, most = 1;
  for (const Row* row : drawn) {
    if (groups.empty() || groups.back() != row->group) groups.push_back(row->group);
    for (const double loss : mean_loss(*row)) {
      least = std::min(least, loss);
      most = std::max(most, loss);
    }
  }
  std::erase(groups, "no adapter");  // full fine-tuning has no panel of its own
  constexpr double left = 50, top = 90, across = LossPanel::width + LossPanel::labels + 30,
                   down = LossPanel::height + 60;
  Svg svg(left + 2 * across, top + down * static_cast<double>((groups.size() + 1) / 2));
  svg.text({left, 26}, "Training loss by epoch, mean over the seeds", {.size = 15, .bold = true});
  svg.text({left, 44}, "cross-entropy of the digits' labels in six domains, logarithmic; grey: LoRA of rank 24",
           {.colour = grey});
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const auto first =
        std::find_if(drawn.begin(), drawn.end(), [&](const Row* row) { return row->group == groups[g]; });
    LossPanel panel(svg, {left + across * static_cast<double>(g % 2), top + down * static_cast<double>(g / 2)},
                    least / 1.1, most * 1.1);
    panel.axes(groups[g]);
    panel.epochs((*first)->seeds[0].loss.size());
    std::size_t colour = 0;
    for (const Row* row : drawn) {
      const bool reference = row->title.name == "LoRA, r = 24" && row->network == (*first)->network;
      if (row->group != groups[g] && !reference) continue;
      panel.curve(row->title.name, mean_loss(*row), reference ? grey : line_colours[colour++ % line_colours.size()]);
    }
    panel.names();
  }
  svg.save(path);
}

}  // namespace demo

// A picture as an SVG file: lines, boxes, dots and text, in the order in which they are drawn.
#pragma once
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace demo {

struct Point {
  double x, y;
};

/// Where text stands, seen from its point.
enum class Anchor { start, middle, end };

struct TextStyle {
  double size = 11;
  Anchor anchor = Anchor::start;
  std::string colour = "#333333";
  bool bold = false;
};

class Svg {
 public:
  Svg(double width, double height) {
    body_ = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + number(width) + " " + number(height) +
            "\" width=\"" + number(width) + "\" height=\"" + number(height) +
            "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"11\" fill=\"#333333\">\n";
    box({0, 0}, width, height, "#ffffff");
  }

  /// y is the base line.
  void text(Point at, const std::string& words, const TextStyle& style = {}) {
    static constexpr const char* anchors[] = {"start", "middle", "end"};
    const TextStyle usual;  // stands once, for all
    body_ += "<text" + position("x", "y", at);
    if (style.size != usual.size) body_ += attribute("font-size", number(style.size));
    if (style.anchor != usual.anchor) body_ += attribute("text-anchor", anchors[static_cast<int>(style.anchor)]);
    if (style.colour != usual.colour) body_ += attribute("fill", style.colour);
    if (style.bold) body_ += attribute("font-weight", "bold");
    body_ += ">" + escaped(words) + "</text>\n";
  }
  void line(Point from, Point to, const std::string& colour, double width = 1) {
    body_ += "<line" + position("x1", "y1", from) + position("x2", "y2", to) + attribute("stroke", colour) +
             attribute("stroke-width", number(width)) + "/>\n";
  }
  void curve(const std::vector<Point>& points, const std::string& colour, double width = 1.6) {
    std::string all;
    for (const Point& p : points) all += number(p.x) + "," + number(p.y) + " ";
    body_ += "<polyline" + attribute("points", all) + attribute("fill", "none") + attribute("stroke", colour) +
             attribute("stroke-width", number(width)) + attribute("stroke-linejoin", "round") + "/>\n";
  }
  void box(Point corner, double width, double height, const std::string& fill) {
    body_ += "<rect" + position("x", "y", corner) + attribute("width", number(width)) +
             attribute("height", number(height)) + attribute("fill", fill) + "/>\n";
  }
  void dot(Point centre, double radius, const std::string& fill) {
    body_ += "<circle" + position("cx", "cy", centre) + attribute("r", number(radius)) + attribute("fill", fill) +
             attribute("fill-opacity", "0.75") + "/>\n";
  }
  void save(const std::string& path) const {
    std::ofstream file(path);
    file << body_ << "</svg>\n";
    if (!file.flush()) throw std::runtime_error("cannot write " + path);
  }

 private:
  /// To a tenth: files stay small, and the same on every machine.
  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f", value);
    std::string s = text;
    if (s.ends_with(".0")) s.resize(s.size() - 2);
    return s == "-0" ? "0" : s;
  }
  static std::string attribute(const std::string& name, const std::string& value) {
    return " " + name + "=\"" + value + "\"";
  }
  static std::string position(const std::string& x, const std::string& y, Point at) {
    return attribute(x, number(at.x)) + attribute(y, number(at.y));
  }
  static std::string escaped(const std::string& words) {
    std::string out;
    for (const char c : words) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : std::string(1, c);
    return out;
  }

  std::string body_;
};

// ---- colours -------------------------------------------------------------------------------------------------------

/// Lines that lie on one another stay apart, for colour-blind readers too (Okabe and Ito).
inline constexpr std::array line_colours{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4a8a"};
inline constexpr const char* grey = "#8c8c8c";
inline constexpr const char* pale = "#e3e3e3";

/// Nearly white at 0, dark blue at 1; below 0 towards orange.
inline std::string shade(double value) {
  using Rgb = std::array<double, 3>;
  constexpr Rgb white{243, 246, 250}, blue{107, 174, 214}, dark{8, 48, 107}, orange{230, 130, 40};
  const auto mix = [](const Rgb& a, const Rgb& b, double t) {
    char text[8];
    const auto channel = [&](int i) { return static_cast<int>(std::lround(a[i] + (b[i] - a[i]) * t)); };
    std::snprintf(text, sizeof text, "#%02x%02x%02x", channel(0) & 255, channel(1) & 255, channel(2) & 255);
    return std::string(text);
  };
  if (value < 0) return mix(white, orange, std::min(-value * 2, 1.0));
  if (value < 0.5) return mix(white, blue, value * 2);
  return mix(blue, dark, std::min(value * 2 - 1, 1.0));
}

}  // namespace demo

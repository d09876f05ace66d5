#pragma once
// Plots as SVG, used by the examples: panels one above another or in a grid, each with a frame, axes
// (linear or logarithmic), shaded bands, clouds of points, curves, a legend, horizontal rules and
// labelled points.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace examples {

/// Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
namespace colour {
inline const std::string ink = "#1f2933", grey = "#7b8794", faint = "#e4e7eb", blue = "#0072B2",
                         vermilion = "#D55E00", green = "#009E73", orange = "#E69F00",
                         purple = "#CC79A7", sky = "#56B4E9";
}  // namespace colour

struct Axis {
  std::string label;
  double low = 0, high = 1;
  bool logarithmic = false;
};

/// A polyline through (x, y). `dash` is an SVG dash pattern, empty for a full line. Where x increases
/// the curve can be thinned to what a screen shows.
struct Curve {
  std::string label, colour;
  std::vector<double> x, y;
  double width = 1.5;
  std::string dash = "";
  bool x_increases = true;
};

/// Points without labels of their own.
struct Cloud {
  std::string label, colour;
  std::vector<double> x, y;
  double radius = 1.8;
};

/// A part of the x axis, shaded over the panel's height, with up to two lines of text at the top.
struct Band {
  double from = 0, to = 0;
  std::string fill, label, note;
};

/// A horizontal dashed line, labelled at the right.
struct Rule {
  double y = 0;
  std::string label, colour;
};

/// A dot with a label below it, or above.
struct Dot {
  double x = 0, y = 0;
  std::string label, colour;
  bool above = false;
};

struct Panel {
  std::string title;
  Axis x, y;
  std::vector<Band> bands;
  std::vector<Curve> curves;
  std::vector<Rule> rules;
  std::vector<Dot> dots;
  double height = 260;
  std::vector<Cloud> clouds = {};
};

namespace svg_detail {

inline std::string number(double value, const char* format = "%.1f") {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

inline std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '&')
      result += "&amp;";
    else if (c == '<')
      result += "&lt;";
    else if (c == '>')
      result += "&gt;";
    else if (c == '"')
      result += "&quot;";
    else
      result += c;
  }
  return result;
}

/// Maps an axis onto pixels.
struct Scale {
  Axis axis;
  double first = 0, last = 1;  // the pixels of axis.low and axis.high

  double position(double value) const {
    const auto place = [this](double v) { return axis.logarithmic ? std::log(v) : v; };
    const double share = (place(value) - place(axis.low)) / (place(axis.high) - place(axis.low));
    return first + share * (last - first);
  }
};

/// Multiples of 1, 2 or 5 · 10^k, about `count` of them.
inline std::vector<double> linear_ticks(const Axis& axis, int count) {
  const double raw = (axis.high - axis.low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  double step = 10 * power;
  for (const double candidate : {5.0, 2.0, 1.0}) {
    if (candidate * power >= raw) step = candidate * power;
  }
  std::vector<double> ticks;
  const double slack = 1e-9 * step;
  for (double k = std::ceil(axis.low / step - 1e-9); k * step <= axis.high + slack; ++k) {
    ticks.push_back(k * step + 0.0);  // never −0
  }
  return ticks;
}

/// Round numbers in every decade, fewer of them the more decades there are.
inline std::vector<double> log_ticks(const Axis& axis) {
  const double decades = std::log10(axis.high / axis.low);
  std::vector<double> marks{1};
  if (decades < 3) marks = {1, 2, 5};
  if (decades < 1) marks = {1, 1.5, 2, 2.5, 3, 4, 5, 6, 8};
  std::vector<double> ticks;
  for (double power = std::pow(10.0, std::floor(std::log10(axis.low))); power <= axis.high;
       power *= 10) {
    for (const double mark : marks) {
      const double tick = mark * power;
      if (tick >= axis.low * (1 - 1e-9) && tick <= axis.high * (1 + 1e-9)) ticks.push_back(tick);
    }
  }
  return ticks;
}

inline std::vector<double> ticks(const Axis& axis, int count) {
  return axis.logarithmic ? log_ticks(axis) : linear_ticks(axis, count);
}

/// The SVG elements of one figure, in drawing order.
class Canvas {
 public:
  void text(double x, double y, const std::string& words, const std::string& style,
            const std::string& anchor = "start", const std::string& extra = "") {
    body_ += "<text x=\"" + number(x) + "\" y=\"" + number(y) + "\" class=\"" + style +
             "\" text-anchor=\"" + anchor + "\"" + extra + ">" + escaped(words) + "</text>\n";
  }

  void rectangle(double x, double y, double width, double height, const std::string& look) {
    body_ += "<rect x=\"" + number(x) + "\" y=\"" + number(y) + "\" width=\"" + number(width) +
             "\" height=\"" + number(height) + "\" " + look + "/>\n";
  }

  void segment(double x1, double y1, double x2, double y2, const std::string& look) {
    body_ += "<line x1=\"" + number(x1) + "\" y1=\"" + number(y1) + "\" x2=\"" + number(x2) +
             "\" y2=\"" + number(y2) + "\" " + look + "/>\n";
  }

  void polyline(const std::vector<std::pair<double, double>>& points, const std::string& look) {
    body_ += "<polyline fill=\"none\" stroke-linejoin=\"round\" " + look + " points=\"";
    for (const auto& [x, y] : points) body_ += number(x) + "," + number(y) + " ";
    body_ += "\"/>\n";
  }

  void raw(const std::string& element) { body_ += element + "\n"; }
  const std::string& body() const { return body_; }

 private:
  std::string body_;
};

inline std::string stroke(const std::string& colour, double width, const std::string& dash = "") {
  std::string look = "stroke=\"" + colour + "\" stroke-width=\"" + number(width, "%.2g") + "\"";
  if (!dash.empty()) look += " stroke-dasharray=\"" + dash + "\"";
  return look;
}

/// Keeps the lowest and the highest point of every half pixel, so long curves stay small files.
inline std::vector<std::pair<double, double>> thinned(
    const std::vector<std::pair<double, double>>& points) {
  std::vector<std::pair<double, double>> kept;
  for (std::size_t begin = 0, end = 0; begin < points.size(); begin = end) {
    const auto same_column = [&](const auto& p) { return p.first - points[begin].first < 0.5; };
    while (end < points.size() && (end == begin || same_column(points[end]))) ++end;
    const auto first = points.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto last = points.begin() + static_cast<std::ptrdiff_t>(end);
    const auto lower = [](const auto& a, const auto& b) { return a.second < b.second; };
    auto [low, high] = std::minmax_element(first, last, lower);
    if (high < low) std::swap(low, high);
    kept.push_back(*low);
    if (high != low) kept.push_back(*high);
  }
  return kept;
}

inline constexpr double figure_width = 1040, left = 78, right = 28, header = 84, gap = 106;

/// Draws one panel whose plotting area starts at `corner`, in pixels from the figure's edges.
class PanelPainter {
 public:
  PanelPainter(Canvas& canvas, const Panel& panel, std::pair<double, double> corner, double width,
               std::size_t index)
      : canvas_(canvas),
        panel_(panel),
        top_(corner.second),
        bottom_(top_ + panel.height),
        x_{panel.x, corner.first, corner.first + width},
        y_{panel.y, bottom_, top_},
        clip_("panel" + std::to_string(index)) {}

  void paint() {
    draw_bands();
    draw_axes();
    draw_legend();
    draw_clipped();
    draw_labels();
  }

 private:
  void draw_bands() {
    for (const Band& band : panel_.bands) {
      const double from = x_.position(band.from), to = x_.position(band.to);
      canvas_.rectangle(from, top_, to - from, panel_.height, "fill=\"" + band.fill + "\"");
    }
  }

  void draw_axes() {
    for (const double tick : ticks(panel_.y, 5)) {
      const double y = y_.position(tick);
      canvas_.segment(x_.first, y, x_.last, y, stroke(colour::faint, 1));
      canvas_.text(x_.first - 9, y + 4, number(tick, "%.6g"), "tick", "end");
    }
    const int columns = static_cast<int>((x_.last - x_.first) / 90);
    for (const double tick : ticks(panel_.x, std::max(columns, 4))) {
      const double x = x_.position(tick);
      canvas_.segment(x, bottom_, x, bottom_ + 5, stroke(colour::grey, 1));
      canvas_.text(x, bottom_ + 19, number(tick, "%.6g"), "tick", "middle");
    }
    canvas_.segment(x_.first, bottom_, x_.last, bottom_, stroke(colour::grey, 1));
    canvas_.text((x_.first + x_.last) / 2, bottom_ + 40, panel_.x.label, "axis", "middle");
    const double middle = (top_ + bottom_) / 2;
    const double beside = x_.first - 56;
    canvas_.text(beside, middle, panel_.y.label, "axis", "middle",
                 " transform=\"rotate(-90 " + number(beside) + " " + number(middle) + ")\"");
    canvas_.text(x_.first, top_ - 14, panel_.title, "panel");
  }

  void draw_legend() {
    double x = x_.last;
    for (auto curve = panel_.curves.rbegin(); curve != panel_.curves.rend(); ++curve) {
      if (!add_to_legend(curve->label, x)) continue;
      canvas_.segment(x + 20, top_ - 18, x + 44, top_ - 18,
                      stroke(curve->colour, curve->width + 0.6, curve->dash));
    }
    for (auto cloud = panel_.clouds.rbegin(); cloud != panel_.clouds.rend(); ++cloud) {
      if (add_to_legend(cloud->label, x)) draw_points({{x + 38, top_ - 18}}, *cloud);
    }
  }

  /// Moves x to the left of an entry, 52 pixels before its text; false where there is no label.
  bool add_to_legend(const std::string& label, double& x) {
    if (label.empty()) return false;
    x -= 6.8 * static_cast<double>(label.size());  // the text's estimated width
    canvas_.text(x, top_ - 14, label, "axis");
    x -= 52;
    return true;
  }

  void draw_clipped() {
    canvas_.raw("<clipPath id=\"" + clip_ + "\"><rect x=\"" + number(x_.first) + "\" y=\"" +
                number(top_) + "\" width=\"" + number(x_.last - x_.first) + "\" height=\"" +
                number(panel_.height) + "\"/></clipPath>\n<g clip-path=\"url(#" + clip_ + ")\">");
    for (const Rule& rule : panel_.rules) {
      const double y = y_.position(rule.y);
      canvas_.segment(x_.first, y, x_.last, y, stroke(rule.colour, 1.2, "5 4"));
    }
    for (const Cloud& cloud : panel_.clouds) draw_cloud(cloud);
    for (const Curve& curve : panel_.curves) draw_curve(curve);
    canvas_.raw("</g>");
  }

  void draw_cloud(const Cloud& cloud) {
    std::vector<std::pair<double, double>> points;
    for (std::size_t i = 0; i < cloud.x.size(); ++i)
      points.emplace_back(x_.position(cloud.x[i]), y_.position(cloud.y[i]));
    draw_points(points, cloud);
  }

  /// All in one path: a line without length has round ends, and so is a disc.
  void draw_points(const std::vector<std::pair<double, double>>& points, const Cloud& cloud) {
    std::string path;
    for (const auto& [x, y] : points)
      path.append("M").append(number(x)).append(" ").append(number(y)).append("h0");
    canvas_.raw("<path fill=\"none\" stroke-linecap=\"round\" " +
                stroke(cloud.colour, 2 * cloud.radius) + " d=\"" + path + "\"/>");
  }

  void draw_curve(const Curve& curve) {
    std::vector<std::pair<double, double>> points;
    for (std::size_t i = 0; i < curve.x.size(); ++i)
      points.emplace_back(x_.position(curve.x[i]), y_.position(curve.y[i]));
    canvas_.polyline(curve.x_increases ? thinned(points) : points,
                     stroke(curve.colour, curve.width, curve.dash));
  }

  void draw_labels() {
    for (const Band& band : panel_.bands) {
      const double middle = (x_.position(band.from) + x_.position(band.to)) / 2;
      canvas_.text(middle, top_ + 18, band.label, "band", "middle");
      canvas_.text(middle, top_ + 33, band.note, "tick", "middle");
    }
    for (const Rule& rule : panel_.rules) {
      canvas_.text(x_.last - 6, y_.position(rule.y) - 6, rule.label, "tick", "end");
    }
    for (const Dot& dot : panel_.dots) draw_dot(dot);
  }

  void draw_dot(const Dot& dot) {
    const double x = x_.position(dot.x), y = y_.position(dot.y);
    canvas_.raw("<circle cx=\"" + number(x) + "\" cy=\"" + number(y) + "\" r=\"4.5\" fill=\"" +
                dot.colour + "\" stroke=\"#ffffff\" stroke-width=\"1.5\"/>");
    const bool at_left = x<x_.first + 40, at_right = x> x_.last - 40;
    canvas_.text(x, y + (dot.above ? -12 : 20), dot.label, "tick",
                 at_left ? "start" : (at_right ? "end" : "middle"),
                 " style=\"fill:" + dot.colour +
                     "\" paint-order=\"stroke\" stroke=\"#ffffff\" stroke-width=\"4\" "
                     "stroke-linejoin=\"round\"");
  }

  Canvas& canvas_;
  const Panel& panel_;
  double top_, bottom_;
  Scale x_, y_;
  std::string clip_;
};

inline constexpr const char* style_sheet =
    "<style>text{font-family:Inter,'Source Sans 3','Helvetica Neue',Helvetica,Arial,"
    "'DejaVu Sans',sans-serif;fill:#1f2933}.title{font-size:20px;font-weight:600}"
    ".subtitle{font-size:13px;fill:#52606d}.panel{font-size:14px;font-weight:600}"
    ".axis{font-size:12px;fill:#3e4c59}.tick{font-size:11px;fill:#52606d}"
    ".band{font-size:11px;font-weight:600;fill:#3e4c59}</style>\n";

}  // namespace svg_detail

/// The width in pixels of a panel's plotting area where a row holds so many.
inline double panel_width(std::size_t columns) {
  using namespace svg_detail;
  return figure_width / static_cast<double>(columns) - left - right;
}

/// The figure as SVG text; the panels fill rows of `columns`.
inline std::string render_svg(const std::string& title, const std::string& subtitle,
                              const std::vector<Panel>& panels, std::size_t columns = 1) {
  using namespace svg_detail;
  Canvas canvas;
  canvas.text(left, 34, title, "title");
  canvas.text(left, 55, subtitle, "subtitle");
  const double width = panel_width(columns);
  double top = header + 26, height = 0;
  for (std::size_t i = 0; i < panels.size(); ++i) {
    const std::size_t column = i % columns;
    if (column == 0 && i > 0) {
      top += height + gap;
      height = 0;
    }
    const double x = left + static_cast<double>(column) * (left + width + right);
    PanelPainter(canvas, panels[i], {x, top}, width, i).paint();
    height = std::max(height, panels[i].height);
  }
  const std::string across = number(figure_width, "%.0f"), down = number(top + height + 58, "%.0f");
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + across + "\" height=\"" + down +
         "\" viewBox=\"0 0 " + across + " " + down + "\">\n" + style_sheet +
         "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n" + canvas.body() + "</svg>\n";
}

/// Writes the figure; throws std::runtime_error when the file cannot be written.
inline void write_svg(const std::string& file, const std::string& title,
                      const std::string& subtitle, const std::vector<Panel>& panels,
                      std::size_t columns = 1) {
  std::ofstream stream(file, std::ios::binary);
  stream << render_svg(title, subtitle, panels, columns) << std::flush;
  if (!stream) throw std::runtime_error(file + ": cannot be written");
}

}  // namespace examples

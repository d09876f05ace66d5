// Example 1. Forecasting a series by projecting its recent past onto the surface of all its pasts.
//
// Twelve values and the one that followed them are a point k_j = (x_j, y_j) in 13 dimensions. The
// points sample a surface: the graph of the map from a past to the next value. A query (x, 0) is a
// past whose next value is not known yet. Its squared distance to k_j counts the unknown coordinate
// as y_j²; the key prior log π_j = y_j²/(2σ²) takes exactly that out again, so that
//
//     P(x, 0) = Σ_j w_j k_j,   w_j ∝ exp(−‖x − x_j‖²/(2σ²)),   n = Σ_j exp(−‖x − x_j‖²/(2σ²)),
//
// from one call of project_forward: P is its result, log n its log-sum-exp. A causal mask shows the
// query of year t the points of earlier years only: the library of the past grows year by year.
// Three readouts of P, with a linear autoregression x·m + b that is refitted every year:
//
//     last coordinate    P_y
//     linear             x·m + b + r,   r = P·(−m, 1) − b: what the autoregression missed nearby
//     linear, guarded    x·m + b + r·n/(n + 1): as if the query itself were one more point, on
//                        which the autoregression is right; far from all points it has the say
//
// Nothing of year t or later enters the forecast of year t, except the choices of bandwidth and
// ridge and the unit of the series, which are made on the first period and hold for all.

#include <Eigen/Cholesky>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <optional>
#include <string>
#include <surfattn/surfattn.hpp>
#include <utility>
#include <vector>

#include "support/arguments.hpp"
#include "support/progress.hpp"
#include "support/series.hpp"
#include "support/svg_plot.hpp"
#include "support/two_forms.hpp"

namespace {

using Eigen::VectorXd;
using examples::Period;
using examples::Series;
using surfattn::Index;
using Matrix = surfattn::Matrix<double>;

constexpr Index lags = 12;
constexpr Index width = lags + 1;      // of a point: its past and its next value
constexpr Index warm_up = 2 * lags;    // forecasts are scored once the library holds so many points
constexpr Index smallest_series = 80;  // leaves a few scored years in each period

// ---------------------------------------------------------------------------------- the series

std::string sunspot_file() {
  std::vector<std::string> directories{"examples/data", "../examples/data"};
#ifdef SURFATTN_EXAMPLES_DATA_DIR
  directories.insert(directories.begin(), SURFATTN_EXAMPLES_DATA_DIR);
#endif
  for (const std::string& directory : directories) {
    std::string file = directory + "/sunspots.csv";
    if (std::ifstream(file)) return file;
  }
  return directories.front() + "/sunspots.csv";
}

Series sunspots() {
  const examples::Table table = examples::read_csv(sunspot_file());
  const VectorXd years = examples::to_vector(table.columns.front());
  std::vector<Period> periods;
  for (const auto& [first, last] :
       {std::pair{1700, 1920}, {1921, 1955}, {1956, 1979}, {1980, 2008}}) {
    periods.push_back({std::to_string(first) + "–" + std::to_string(last),
                       (years.array() < first).count(), (years.array() <= last).count()});
  }
  const VectorXd numbers = examples::to_vector(table.columns.back());
  return {"Yearly sunspot numbers", "sunspot number", "year", years, numbers, periods, 1535};
}

struct Reported {
  std::string name;
  std::vector<double> errors;  // one a period, for the first three
};

const std::vector<Reported> sunspot_literature{
    {"linear autoregression", {0.128, 0.126, 0.36}},
    {"threshold autoregression (Tong and Lim 1980)", {0.097, 0.097, 0.28}},
    {"network (Weigend, Huberman and Rumelhart 1990)", {0.082, 0.086, 0.35}}};

// ------------------------------------------------------------------------------ the forecasts

/// The series in units of the first period's standard deviation, about its mean.
struct Unit {
  double mean, deviation;
  explicit Unit(const Series& series) {
    const VectorXd first = series.values.head(series.periods[0].end);
    mean = first.mean();
    deviation = std::sqrt(examples::variance(first));
  }
};

/// Row i is about value i + lags of the series: query (past, 0) and key (past, value). There is one
/// query more than there are keys: the value after the end of the series.
struct Delays {
  Matrix queries, keys;

  explicit Delays(const VectorXd& values)
      : queries(Matrix::Zero(values.size() - lags + 1, width)), keys(values.size() - lags, width) {
    for (Index i = 0; i < queries.rows(); ++i) {
      queries.row(i).head(lags) = values.segment(i, lags).transpose();
    }
    for (Index i = 0; i < keys.rows(); ++i) keys.row(i) = values.segment(i, width).transpose();
  }
};

/// Autoregressions (m, b) by ridge least squares; row i is fitted on the rows before i alone.
Matrix growing_autoregressions(const Delays& delays, double ridge) {
  Matrix moments = ridge * Matrix::Identity(width, width);
  VectorXd products = VectorXd::Zero(width), regressors = VectorXd::Ones(width);
  Matrix coefficients(delays.queries.rows(), width);
  for (Index i = 0; i < coefficients.rows(); ++i) {
    coefficients.row(i) = moments.llt().solve(products).transpose();
    if (i == delays.keys.rows()) break;
    regressors.head(lags) = delays.keys.row(i).head(lags).transpose();
    moments.noalias() += regressors * regressors.transpose();
    products += delays.keys(i, lags) * regressors;
  }
  return coefficients;
}

double linear_forecast(const Delays& delays, const Matrix& coefficients, Index i) {
  return delays.queries.row(i).head(lags).dot(coefficients.row(i).head(lags)) +
         coefficients(i, lags);
}

VectorXd linear_forecasts(const Delays& delays, const Matrix& coefficients) {
  VectorXd result(delays.queries.rows());
  for (Index i = 0; i < result.size(); ++i) result[i] = linear_forecast(delays, coefficients, i);
  return result;
}

struct Projection {
  Matrix points;        // row i: P of query i onto the surface of the keys before i
  VectorXd neighbours;  // n of query i
};

/// log π_j = y_j²/(2σ²): leaves the distances between the pasts.
Matrix unknown_coordinate_prior(const Matrix& keys, double bandwidth) {
  return keys.col(lags).array().square() / (2 * bandwidth * bandwidth);
}

/// Projects the first `rows` queries, block by block, so that progress can be shown.
Projection project_on_past(const Delays& delays, double bandwidth, Index rows,
                           examples::Progress& progress) {
  constexpr Index block = 1024;
  const Matrix log_prior = unknown_coordinate_prior(delays.keys, bandwidth);
  Projection result{Matrix::Zero(rows, width), VectorXd::Zero(rows)};
  for (Index begin = 1; begin < rows; begin += block) {
    const Index size = std::min(block, rows - begin);
    const Index past = begin + size - 1;  // of the last query; the mask gives each its own
    const auto past_prior = log_prior.topRows(past);
    const auto forward =
        surfattn::project_forward(delays.queries.middleRows(begin, size), delays.keys.topRows(past),
                                  {.bandwidth = bandwidth, .prior = past_prior},
                                  surfattn::Causal{surfattn::Align::bottom_right});
    result.points.middleRows(begin, size) = forward.out;
    result.neighbours.segment(begin, size) = forward.log_sum_exp.array().exp();
    progress.add(0.5 * static_cast<double>(size * (2 * begin + size)));
  }
  return result;
}

enum Readout { last_coordinate, linear, guarded };
constexpr std::array readout_names{"last coordinate", "linear", "linear, guarded"};

VectorXd forecasts(Readout readout, const Delays& delays, const Matrix& coefficients,
                   const Projection& projection) {
  VectorXd result(projection.points.rows());
  for (Index i = 0; i < result.size(); ++i) {
    const auto point = projection.points.row(i);
    const double n = projection.neighbours[i];
    const double missed =
        point[lags] - coefficients(i, lags) - point.head(lags).dot(coefficients.row(i).head(lags));
    const double share = readout == guarded ? n / (n + 1) : 1;
    result[i] = readout == last_coordinate
                    ? point[lags]
                    : linear_forecast(delays, coefficients, i) + share * missed;
  }
  return result;
}

// ------------------------------------------------------------------------------ errors, choices

/// Scores forecasts, whose row i is about value i + lags, in the series' units.
class Scorer {
 public:
  Scorer(const Series& series, const Unit& unit) : series_(series), unit_(unit) {}

  VectorXd in_series_units(const VectorXd& forecast) const {
    return forecast.array() * unit_.deviation + unit_.mean;
  }

  /// Mean squared error over the reference variance; `first_row` is the first row that counts.
  double relative_variance(const VectorXd& forecast, const Period& period,
                           Index first_row = warm_up) const {
    const Index begin = std::max(period.begin, lags + first_row), size = period.end - begin;
    const VectorXd predicted = in_series_units(forecast.segment(begin - lags, size));
    return (predicted - series_.values.segment(begin, size)).squaredNorm() /
           (static_cast<double>(size) * series_.reference_variance);
  }

 private:
  const Series& series_;
  const Unit& unit_;
};

std::vector<double> log_grid(double low, double high, int count) {
  std::vector<double> grid(static_cast<std::size_t>(count), low);
  for (std::size_t i = 1; i < grid.size(); ++i)
    grid[i] = grid[i - 1] * std::pow(high / low, 1 / (count - 1.0));
  return grid;
}

double choose_ridge(const Delays& delays, const Scorer& scorer, const Period& first) {
  const std::vector<double> grid = log_grid(1e-4, 1e2, 13);
  std::vector<double> errors;
  for (const double ridge : grid) {
    const Matrix coefficients = growing_autoregressions(delays, ridge);
    errors.push_back(scorer.relative_variance(linear_forecasts(delays, coefficients), first));
  }
  return grid[static_cast<std::size_t>(std::min_element(errors.begin(), errors.end()) -
                                       errors.begin())];
}

/// Relative variance in the first period, for each readout and bandwidth.
struct BandwidthSearch {
  std::vector<double> bandwidths;
  std::array<std::vector<double>, readout_names.size()> errors;

  std::size_t best(Readout readout) const {
    const std::vector<double>& e = errors[readout];
    return static_cast<std::size_t>(std::min_element(e.begin(), e.end()) - e.begin());
  }
  double chosen(Readout readout) const { return bandwidths[best(readout)]; }
  bool at_edge(Readout readout) const {
    return best(readout) == 0 || best(readout) + 1 == bandwidths.size();
  }
};

BandwidthSearch search_bandwidths(const Delays& delays, const Matrix& coefficients,
                                  const Scorer& scorer, const Period& first) {
  const double typical_distance = std::sqrt(2.0 * lags);  // of two unrelated pasts
  BandwidthSearch search{log_grid(0.005 * typical_distance, 2 * typical_distance, 37), {}};
  const Index rows = first.end - lags;
  const double pairs = 0.5 * static_cast<double>(rows * rows);
  examples::Progress progress("choosing the bandwidth",
                              pairs * static_cast<double>(search.bandwidths.size()));
  for (const double bandwidth : search.bandwidths) {
    const Projection projection = project_on_past(delays, bandwidth, rows, progress);
    for (const Readout readout : {last_coordinate, linear, guarded}) {
      const VectorXd forecast = forecasts(readout, delays, coefficients, projection);
      search.errors[readout].push_back(scorer.relative_variance(forecast, first));
    }
  }
  return search;
}

/// One autoregression, fitted once on the whole first period, as the literature's was.
VectorXd autoregression_fitted_once(const Delays& delays, const Period& first) {
  const Index rows = first.end - lags;
  Matrix regressors = delays.queries;
  regressors.col(lags).setOnes();
  const Matrix fitted = regressors.topRows(rows);
  const VectorXd targets = delays.keys.col(lags).head(rows);
  const VectorXd coefficients =
      (fitted.transpose() * fitted).ldlt().solve(fitted.transpose() * targets);
  return regressors * coefficients;
}

// -------------------------------------------------------------------------------------- report

struct Forecast {
  std::string name;
  VectorXd values;
  Index first_row = warm_up;
};

/// printf counts bytes; this counts UTF-8 characters, by their leading bytes.
std::string padding(const std::string& text, std::ptrdiff_t columns) {
  const auto leads = [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; };
  const std::ptrdiff_t used = std::count_if(text.begin(), text.end(), leads);
  return std::string(static_cast<std::size_t>(std::max<std::ptrdiff_t>(columns - used, 0)), ' ');
}

void print_row(const std::string& name, const std::vector<double>& errors) {
  std::printf("    %s%s", name.c_str(), padding(name, 54).c_str());
  for (const double error : errors) std::printf(error < 0.0005 ? " %11.1e" : " %11.3f", error);
  std::printf("\n");
}

void print_errors(const Series& series, const Scorer& scorer, const std::vector<Forecast>& all,
                  const std::vector<Reported>& literature) {
  std::printf(
      "\n(b) one step ahead: mean squared error / %.4g, the variance of the whole series%s\n",
      series.reference_variance, literature.empty() ? "" : " in the literature");
  std::printf("%58s", "");
  for (const Period& period : series.periods) {
    std::printf(" %s%s", padding(period.label, 11).c_str(), period.label.c_str());
  }
  std::printf("\n");
  if (!literature.empty()) std::printf("  reported, fitted on 1700–1920:\n");
  for (const Reported& reported : literature) print_row(reported.name, reported.errors);
  std::printf("  this program's own:\n");
  for (const Forecast& forecast : all) {
    std::vector<double> errors;
    for (const Period& period : series.periods) {
      errors.push_back(scorer.relative_variance(forecast.values, period, forecast.first_row));
    }
    print_row(forecast.name, errors);
  }
}

void print_notes(const Series& series, bool literature) {
  std::printf(
      "  A model fitted once on the first period is scored there on what it was fitted to. The\n"
      "  growing ones never see the value they forecast; they are scored from %s %.0f on.\n"
      "  Bandwidth and ridge were chosen on the first period alone; the readouts were not chosen\n"
      "  among, all are shown.\n",
      series.time_unit.c_str(), series.times[lags + warm_up]);
  if (!literature) return;
  std::printf(
      "  Sources: H. Tong and K. S. Lim, J. R. Stat. Soc. B 42:245 (1980); A. S. Weigend,\n"
      "  B. A. Huberman and D. E. Rumelhart, Int. J. Neural Systems 1:193 (1990).\n");
}

template <class S>
std::vector<examples::TwoForms<S>> both_weightings(const Delays& delays,
                                                   const VectorXd& coefficients, double bandwidth) {
  const Index rows = std::min<Index>(delays.keys.rows(), 2048);
  const Matrix queries = delays.queries.bottomRows(rows), keys = delays.keys.bottomRows(rows);
  Matrix readout = Matrix::Identity(width, width);  // keeps the projected past; then (−m, 1)
  readout.col(lags).head(lags) = -coefficients.head(lags);
  const auto forms = [&](std::optional<surfattn::Matrix<S>> log_prior) {
    return examples::TwoForms<S>(queries.cast<S>(), keys.cast<S>(), readout.cast<S>(), bandwidth,
                                 std::move(log_prior));
  };
  return {forms({}), forms(unknown_coordinate_prior(keys, bandwidth).cast<S>().eval())};
}

void compare_forms(const Delays& delays, const VectorXd& coefficients, double bandwidth) {
  const auto doubles = both_weightings<double>(delays, coefficients, bandwidth);
  const auto floats = both_weightings<float>(delays, coefficients, bandwidth);
  const auto print_all = [&](auto print) {
    print("double, dot products (key prior sdpa)", doubles[0]);
    print("double, distances (as in the forecast)", doubles[1]);
    print("float, dot products (key prior sdpa)", floats[0]);
    print("float, distances (as in the forecast)", floats[1]);
  };
  std::printf("\n(a) the largest difference of the two forms, of the largest magnitude\n");
  std::printf("%40s  %16s  %16s  %16s\n", "", "forward", "query gradient", "key gradient");
  print_all([](const char* name, const auto& forms) { print_differences(name, forms); });
  std::printf(
      "\n(c) median time in microseconds: %d queries, %d keys of width %d, readout included\n",
      static_cast<int>(doubles[0].rows()), static_cast<int>(doubles[0].rows()), int{width});
  std::printf("%40s %21s %25s\n", "", "forward", "forward and backward");
  std::printf("%40s %10s %10s %14s %10s\n", "", "standard", "surface", "standard", "surface");
  print_all([](const char* name, const auto& forms) { print_times(name, forms); });
}

std::vector<double> to_std(const VectorXd& values) { return {values.begin(), values.end()}; }

examples::Panel series_panel(const Series& series, const Scorer& scorer, const VectorXd& forecast) {
  namespace colour = examples::colour;
  const Index first = lags + warm_up, size = series.values.size();
  const double low = std::min(0.0, series.values.minCoeff()), high = series.values.maxCoeff();
  examples::Panel panel;
  panel.title = "Observed and forecast one step ahead";
  panel.x = {series.time_unit, series.times[0], series.times[size - 1]};
  panel.y = {series.unit, low, high + 0.24 * (high - low)};
  const std::array fills{"#f3f6f9", "#e3ecf4", "#f7ecdf", "#eeeaf4"};
  for (std::size_t p = 0; p < series.periods.size(); ++p) {
    const Period& period = series.periods[p];
    char note[32];
    std::snprintf(note, sizeof note, "error %.3g", scorer.relative_variance(forecast, period));
    const double end = series.times[std::min(period.end, size - 1)];
    panel.bands.push_back({series.times[period.begin], end, fills[p], period.label, note});
  }
  const VectorXd shown = scorer.in_series_units(forecast.segment(warm_up, size - first));
  panel.curves = {
      {"observed", colour::ink, to_std(series.times), to_std(series.values), 1.3},
      {"forecast", colour::vermilion, to_std(series.times.tail(size - first)), to_std(shown), 1.6}};
  panel.height = 320;
  return panel;
}

examples::Panel bandwidth_panel(const Series& series, const Unit& unit,
                                const BandwidthSearch& search, double linear_error) {
  namespace colour = examples::colour;
  const std::array colours{colour::green, colour::blue, colour::vermilion};
  std::vector<double> bandwidths;
  for (const double b : search.bandwidths) bandwidths.push_back(b * unit.deviation);
  examples::Panel panel;
  panel.title = "The bandwidth's effect, " + series.periods[0].label;
  panel.x = {"bandwidth σ (" + series.unit + ")", bandwidths.front(), bandwidths.back(), true};
  double low = linear_error, high = linear_error;
  for (const Readout readout : {last_coordinate, linear, guarded}) {
    const std::size_t best = search.best(readout);
    const double error = search.errors[readout][best];
    char label[32];
    std::snprintf(label, sizeof label, "σ = %.3g", bandwidths[best]);
    panel.curves.push_back(
        {readout_names[readout], colours[readout], bandwidths, search.errors[readout], 2});
    panel.dots.push_back({bandwidths[best], error, label, colours[readout], readout == linear});
    low = std::min(low, error);
    high = std::max(high, error);
  }
  panel.rules = {{linear_error, "autoregression alone", colour::grey}};
  panel.y = {"relative variance (log scale)", low / 1.15, high * 1.25, true};
  return panel;
}

// ----------------------------------------------------------------------------------------- main

std::vector<Forecast> all_forecasts(const Delays& delays, const Matrix& coefficients,
                                    const BandwidthSearch& search, const Period& first,
                                    const Unit& unit) {
  std::vector<Forecast> all{{"autoregression, fitted once on " + first.label,
                             autoregression_fitted_once(delays, first), 0},
                            {"autoregression, growing", linear_forecasts(delays, coefficients)}};
  const Index rows = delays.queries.rows();
  examples::Progress progress("forecasting", 1.5 * static_cast<double>(rows * rows));
  for (const Readout readout : {last_coordinate, linear, guarded}) {
    const double bandwidth = search.chosen(readout);
    const Projection projection = project_on_past(delays, bandwidth, rows, progress);
    char name[64];
    std::snprintf(name, sizeof name, "surface, %s (σ = %.3g%s)", readout_names[readout],
                  bandwidth * unit.deviation, search.at_edge(readout) ? ", edge of search" : "");
    all.push_back({name, forecasts(readout, delays, coefficients, projection)});
  }
  return all;
}

void run(const examples::Arguments& arguments) {
  const bool own = !arguments.csv.empty();
  const Series series =
      own ? examples::read_series(arguments.csv, arguments.column, smallest_series) : sunspots();
  const Period& first = series.periods[0];
  const Unit unit(series);
  const Scorer scorer(series, unit);
  const Delays delays((series.values.array() - unit.mean) / unit.deviation);
  const double ridge = choose_ridge(delays, scorer, first);
  const Matrix coefficients = growing_autoregressions(delays, ridge);
  const BandwidthSearch search = search_bandwidths(delays, coefficients, scorer, first);
  const auto all = all_forecasts(delays, coefficients, search, first, unit);
  const VectorXd& last = all.back().values;

  std::printf("%s: %d values, forecast from the %d before\n", series.title.c_str(),
              static_cast<int>(series.values.size()), int{lags});
  compare_forms(delays, coefficients.bottomRows(1).transpose(), search.chosen(guarded));
  print_errors(series, scorer, all, own ? std::vector<Reported>{} : sunspot_literature);
  print_notes(series, !own);
  std::printf("\nForecast of the value after the last, by the last row: %.4g\n",
              scorer.in_series_units(last)[last.size() - 1]);
  examples::write_svg(
      arguments.svg, series.title,
      "Forecast by projection onto the surface of all earlier pasts, 12 values each (linear "
      "readout,"
      " guarded). Error: mean squared error / variance.",
      {series_panel(series, scorer, last),
       bandwidth_panel(series, unit, search, scorer.relative_variance(all[1].values, first))});
  std::printf("Plot: %s\n", arguments.svg.c_str());
}

}  // namespace

int main(int count, char** words) {
  return examples::run_example(
      {"01_sunspots", "Forecasts a series one step ahead by surface projection.",
       "the yearly sunspot numbers", "sunspots.svg"},
      count, words, run);
}

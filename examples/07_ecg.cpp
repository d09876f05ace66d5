// Example 7. Denoising and forecasting an electrocardiogram, sample by sample, in constant memory.
//
// A patch is the newest p samples less their mean, each with white noise of standard deviation s.
// The patches of the last ten seconds sample a surface, the shapes that a heart draws; a ring buffer
// (class Surface) holds them as keys. Each new patch q is projected onto it,
//
//     P(q) = Σ_j w_j k_j,   w_j ∝ exp(−‖q − k_j‖²/(2σ²)),
//
// and then becomes a key itself. Every sample is in p patches; the mean of their p estimates is put
// out, p − 1 samples late. If the keys were clean, with σ = s this would be the Bayes estimate of
// the patch whose prior is the past: the likelihood of q is exp(−‖q − k‖²/(2s²)). Two such stages:
//
//     noisy keys       the patches as they came; noise moves them too, so that σ has to be larger
//     denoised keys    patches of what the first stage put out; σ ≈ s
//     local linear     the same keys, but q moves to f(q) = μ + Σ(Σ + s²)⁻¹(q − μ), with mean μ and
//                      covariance Σ of the keys nearby: local_linear of ridge s², a Wiener filter
//                      for each place of the surface
//
// They are compared with the best moving average and an adaptive Wiener filter. Nobody is later than
// the longest patch, everybody knows s, and all parameters are chosen by the error against the clean
// signal in the first 20 seconds; what follows is scored.
//
// For the forecast, a key is p samples and the one that came next, y_j; the query's is not known.
// Its log-weight y_j²/(2σ²) takes that coordinate out of the distance, as in example 1, and P(q)
// fills it in.

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/arguments.hpp"
#include "support/csv.hpp"
#include "support/ecg_simulator.hpp"
#include "support/series.hpp"
#include "support/streams.hpp"
#include "support/svg_plot.hpp"

namespace {

using examples::Candidate;
using examples::Estimate;
using examples::History;
using examples::Stream;
using surfattn::Index;
using Patch = surfattn::RowVector<float>;
using VectorXd = Eigen::VectorXd;

constexpr double window_seconds = 10, choice_seconds = 20, settling_seconds = 2;
constexpr double input_decibels = 6;
constexpr Index longest_patch = 48;  // widths are whole vector registers, 16 floats

// ---------------------------------------------------------------------------------- the signal

struct Signal {
  std::string title;
  double rate;  // samples a second
  VectorXd clean, noisy;
  double noise;  // standard deviation

  Index samples(double seconds) const { return std::lround(seconds * rate); }
  Index window() const { return samples(window_seconds); }
  Index choice_end() const { return samples(choice_seconds); }
  Index scored_end() const { return clean.size() - longest_patch; }
};

Signal with_noise(const std::string& title, double rate, const VectorXd& clean) {
  const double noise = std::sqrt(examples::variance(clean) / std::pow(10, input_decibels / 10));
  std::mt19937 generator(1);
  std::normal_distribution<double> normal(0, noise);
  VectorXd noisy = clean;
  for (double& sample : noisy) sample += normal(generator);
  return {title, rate, clean, noisy, noise};
}

Signal simulated() {
  constexpr double seconds = 40, rate = 250;
  return with_noise("A simulated electrocardiogram", rate,
                    examples::EcgSimulator(1).simulate(seconds, rate));
}

/// The first column holds the time in seconds.
Signal recorded(const examples::Arguments& arguments) {
  const examples::Series series = examples::read_series(arguments.csv, arguments.column, 2000);
  const VectorXd times = examples::to_vector(examples::read_csv(arguments.csv).columns.front());
  const Index last = times.size() - 1;
  const double rate = static_cast<double>(last) / (times[last] - times[0]);
  if (!(rate > 0) || !(static_cast<double>(last) / rate > 1.5 * choice_seconds)) {
    throw examples::CsvError(arguments.csv +
                             ": the first column must hold increasing times in seconds, 30 or more "
                             "of them in all");
  }
  return with_noise(series.title, rate, series.values);
}

// ------------------------------------------------------------------------- streams on a surface

/// The newest samples less their mean.
class PatchHistory {
 public:
  explicit PatchHistory(Index width) : history_(width), patch_(width) {}

  const Patch& push(double sample) {
    history_.push(sample);
    mean_ = history_.samples().mean();
    patch_ = (history_.samples().array() - mean_).cast<float>().transpose();
    return patch_;
  }
  double mean() const { return mean_; }

 private:
  History history_;
  Patch patch_;
  double mean_ = 0;
};

/// The mean of what all patches that hold a sample say about it.
class OverlappingPatches {
 public:
  explicit OverlappingPatches(Index width) : sums_(VectorXd::Zero(width)) {}

  /// Adds the patch that ends at the newest sample; returns the mean for the oldest sample in it.
  double push(const Patch& patch, double mean) {
    const Index width = sums_.size();
    sums_ += patch.transpose().cast<double>();
    sums_.array() += mean;
    count_ = std::min(count_ + 1, width);
    const double oldest = sums_[0] / static_cast<double>(count_);
    for (Index i = 0; i + 1 < width; ++i) sums_[i] = sums_[i + 1];
    sums_[width - 1] = 0;
    return oldest;
  }

 private:
  VectorXd sums_;
  Index count_ = 0;
};

struct PatchSize {
  Index width;
  double bandwidth;
};

/// Projects each new patch onto the patches before it.
class SurfaceDenoiser : public Stream {
 public:
  SurfaceDenoiser(PatchSize patch, Index window)
      : patches_(patch.width),
        surface_(patch.width, {.bandwidth = patch.bandwidth, .window = window}),
        projected_(patch.width),
        overlapping_(patch.width),
        workspace_(surface_.workspace_size(1)) {}
  Index delay() const override { return projected_.size() - 1; }

  double push(double sample) override {
    const Patch& patch = patches_.push(sample);
    projected_ = patch;
    if (!surface_.is_empty()) surface_.project_into(patch, projected_, workspace_);
    surface_.append(patch);
    return overlapping_.push(projected_, patches_.mean());
  }

 private:
  PatchHistory patches_;
  surfattn::Surface<float> surface_;
  Patch projected_;
  OverlappingPatches overlapping_;
  surfattn::Workspace workspace_;
};

enum class Estimator { local_constant, local_linear };

/// Moves each new patch onto the surface of denoised patches.
class SecondStageDenoiser : public Stream {
 public:
  SecondStageDenoiser(Estimator estimator, PatchSize first, PatchSize second, Index window,
                      double noise)
      : first_(first, window),
        estimator_(estimator),
        ridge_(noise * noise),
        noisy_(second.width),
        denoised_(second.width),
        surface_(second.width, {.bandwidth = second.bandwidth, .window = window}),
        estimate_(second.width),
        projected_(second.width),
        overlapping_(second.width),
        workspace_(surface_.local_linear_workspace_size(1)) {}
  Index delay() const override { return estimate_.size() - 1; }

  double push(double sample) override {
    const Patch& patch = noisy_.push(sample);
    estimate_ = patch;
    if (!surface_.is_empty()) move(patch);
    surface_.append(denoised_.push(first_.push(sample)));
    return overlapping_.push(estimate_, noisy_.mean());
  }

 private:
  void move(const Patch& patch) {
    if (estimator_ == Estimator::local_constant)
      surface_.project_into(patch, estimate_, workspace_);
    else
      surface_.local_linear_into(patch, ridge_, estimate_, projected_, log_sum_exp_, workspace_);
  }

  SurfaceDenoiser first_;
  Estimator estimator_;
  double ridge_;
  PatchHistory noisy_, denoised_;
  surfattn::Surface<float> surface_;
  Patch estimate_, projected_;
  Patch log_sum_exp_ = Patch::Zero(1);
  OverlappingPatches overlapping_;
  surfattn::Workspace workspace_;
};

/// Fills in the next sample of each patch from the patches whose next one is known, as they came or
/// denoised.
class SurfacePredictor : public Stream {
 public:
  SurfacePredictor(std::optional<PatchSize> first, PatchSize patch, Index window)
      : queries_(patch.width),
        keys_(patch.width),
        surface_(patch.width + 1, {.bandwidth = patch.bandwidth, .window = window}),
        query_(Patch::Zero(patch.width + 1)),
        key_(Patch::Zero(patch.width + 1)),
        projected_(patch.width + 1),
        workspace_(surface_.workspace_size(1)) {
    if (first) first_.emplace(*first, window);
  }
  Index delay() const override { return -1; }

  double push(double sample) override {
    const Index width = query_.size() - 1;
    append(first_ ? first_->push(sample) : sample);
    query_.head(width) = queries_.push(sample);
    surface_.project_into(query_, projected_, workspace_);
    return queries_.mean() + projected_[width];
  }

 private:
  /// The patch before `next` becomes a key, now that its next sample is known.
  void append(double next) {
    const Index width = key_.size() - 1;
    const auto y = static_cast<float>(next - keys_.mean());
    key_[width] = y;
    log_prior_[0] = surface_.scale() / 2 * y * y;
    surface_.append_with_prior(key_, log_prior_);
    key_.head(width) = keys_.push(next);
  }

  std::optional<SurfaceDenoiser> first_;
  PatchHistory queries_, keys_;
  surfattn::Surface<float> surface_;
  Patch query_, key_, projected_;
  Patch log_prior_ = Patch::Zero(1);
  surfattn::Workspace workspace_;
};

// ---------------------------------------------------------------------------- what is chosen from

std::string words(const char* format, double a, double b) {
  char text[128];
  std::snprintf(text, sizeof text, format, a, b);
  return text;
}

template <class Made, class... Arguments>
Candidate candidate(const std::string& parameters, Arguments... arguments) {
  return {parameters, [=] { return std::make_unique<Made>(arguments...); }};
}

std::vector<Candidate> averages(bool forecast) {
  std::vector<Candidate> all;
  for (Index length = 1; length <= 15; length += 2) {
    all.push_back(candidate<examples::MovingAverage>(
        words("length %.0f", static_cast<double>(length), 0), length, forecast ? -1 : length / 2));
  }
  return all;
}

std::vector<Candidate> linear_filters(bool forecast, double noise) {
  std::vector<Candidate> all;
  for (const Index order : {8, 16, 31, 63, 95}) {
    for (const double forgetting : {0.999, 0.9997, 0.9999}) {
      const std::string parameters =
          words("order %.0f, forgetting %g", static_cast<double>(order), forgetting);
      if (forecast) {
        all.push_back(candidate<examples::LinearPredictor>(parameters, order, forgetting, noise));
        continue;
      }
      for (const Index delay : {order / 4, order / 2}) {
        all.push_back(candidate<examples::AdaptiveWiener>(
            parameters + words(", delay %.0f", static_cast<double>(delay), 0), order, forgetting,
            delay, noise));
      }
    }
  }
  return all;
}

std::vector<PatchSize> patch_sizes(const std::vector<Index>& widths,
                                   const std::vector<double>& bandwidths, double noise) {
  std::vector<PatchSize> all;
  for (const Index width : widths) {
    for (const double bandwidth : bandwidths) all.push_back({width, bandwidth * noise});
  }
  return all;
}

template <class Make>
std::vector<Candidate> surface_streams(const std::vector<PatchSize>& sizes, const Make& make) {
  std::vector<Candidate> all;
  for (const PatchSize& size : sizes) {
    all.push_back(
        {words("patch %.0f, σ = %.3g mV", static_cast<double>(size.width), size.bandwidth),
         [=] { return make(size); }});
  }
  return all;
}

/// A filter with the parameters that did best on the first seconds, and what it makes of the rest.
struct Result {
  std::string name, parameters;
  Estimate estimate;
  double decibels;
};

class Comparison {
 public:
  explicit Comparison(const Signal& signal) : signal_(signal) {}

  /// Chooses, runs and scores; returns which candidate was chosen.
  std::size_t add(const std::string& name, const std::vector<Candidate>& candidates) {
    const std::size_t best = examples::best_candidate(candidates, signal_.noisy, signal_.clean,
                                                      signal_.samples(settling_seconds),
                                                      signal_.choice_end(), "choosing: " + name);
    const Estimate estimate = examples::run_stream(*candidates[best].make(), signal_.noisy);
    results_.push_back({name, candidates[best].parameters, estimate, score(estimate.values)});
    return best;
  }
  /// Over what follows the seconds of choice.
  double score(const VectorXd& values) const {
    const Index begin = signal_.choice_end(), size = signal_.scored_end() - begin;
    return examples::decibels(signal_.clean.segment(begin, size), values.segment(begin, size));
  }
  double root_mean_square_error(const Result& result) const {
    const Index begin = signal_.choice_end(), size = signal_.scored_end() - begin;
    const VectorXd error = (result.estimate.values - signal_.clean).segment(begin, size);
    return std::sqrt(error.squaredNorm() / static_cast<double>(size));
  }
  const std::vector<Result>& results() const { return results_; }

 private:
  const Signal& signal_;
  std::vector<Result> results_;
};

struct Denoised {
  Comparison comparison;
  PatchSize first;  // of the surface of noisy patches, as chosen
};

Denoised denoise(const Signal& signal) {
  const double noise = signal.noise;
  const Index window = signal.window();
  Comparison comparison(signal);
  comparison.add("moving average", averages(false));
  comparison.add("adaptive Wiener filter", linear_filters(false, noise));
  const auto sizes = patch_sizes({16, 32, longest_patch}, {2, 2.5, 3, 3.5}, noise);
  const PatchSize first =
      sizes[comparison.add("surface, noisy keys", surface_streams(sizes, [=](PatchSize size) {
                             return std::make_unique<SurfaceDenoiser>(size, window);
                           }))];
  const auto second = [=](Estimator estimator) {
    return [=](PatchSize size) {
      return std::make_unique<SecondStageDenoiser>(estimator, first, size, window, noise);
    };
  };
  comparison.add("surface, denoised keys",
                 surface_streams(patch_sizes({16, 32, longest_patch}, {0.8, 1, 1.25, 1.6}, noise),
                                 second(Estimator::local_constant)));
  comparison.add("surface, local linear",
                 surface_streams(patch_sizes({longest_patch}, {1.25, 1.6, 2}, noise),
                                 second(Estimator::local_linear)));
  return {comparison, first};
}

Comparison forecast(const Signal& signal, PatchSize first) {
  const Index window = signal.window();
  const auto streams = [=](std::optional<PatchSize> denoising) {
    return
        [=](PatchSize size) { return std::make_unique<SurfacePredictor>(denoising, size, window); };
  };
  Comparison comparison(signal);
  comparison.add("moving average", averages(true));
  comparison.add("recursive least squares", linear_filters(true, signal.noise));
  comparison.add(
      "surface, noisy keys",
      surface_streams(patch_sizes({15, 31}, {1, 1.25, 1.6, 2}, signal.noise), streams({})));
  comparison.add(
      "surface, denoised keys",
      surface_streams(patch_sizes({15, 31, longest_patch - 1}, {0.8, 1, 1.25}, signal.noise),
                      streams(first)));
  return comparison;
}

// -------------------------------------------------------------------------------------- report

void print(const char* title, const Comparison& comparison, double input) {
  std::printf("\n%-24s %9s %9s %10s %10s   %s\n", title, "SNR, dB", "gain, dB", "error, mV",
              "us/sample", "chosen on the first 20 s");
  for (const Result& result : comparison.results()) {
    std::printf("%-24s %9.2f %9.2f %10.4f %10.1f   %s\n", result.name.c_str(), result.decibels,
                result.decibels - input, comparison.root_mean_square_error(result),
                result.estimate.microseconds, result.parameters.c_str());
  }
}

/// Three seconds of the part that is scored.
class Excerpt {
 public:
  explicit Excerpt(const Signal& signal)
      : signal_(signal), begin_(signal.samples(choice_seconds + 5)), size_(signal.samples(3)) {}

  examples::Curve curve(const std::string& label, const std::string& colour, const VectorXd& values,
                        double width) const {
    examples::Curve curve{label, colour, {}, {}, width};
    for (Index i = begin_; i < begin_ + size_; ++i) {
      curve.x.push_back(static_cast<double>(i) / signal_.rate);
      curve.y.push_back(values[i]);
    }
    return curve;
  }
  examples::Panel panel(const std::string& title, double low, double high,
                        const std::vector<examples::Curve>& curves) const {
    examples::Panel panel;
    panel.title = title;
    panel.x = {"seconds", curves[0].x.front(), curves[0].x.back()};
    panel.y = {"mV", low, high};
    panel.curves = curves;
    panel.height = 165;
    return panel;
  }
  double low(const VectorXd& values) const { return values.segment(begin_, size_).minCoeff(); }
  double high(const VectorXd& values) const { return values.segment(begin_, size_).maxCoeff(); }

 private:
  const Signal& signal_;
  Index begin_, size_;
};

void plot(const std::string& file, const Signal& signal, const Comparison& denoised,
          const Comparison& predicted) {
  namespace colour = examples::colour;
  const Excerpt excerpt(signal);
  const double low = excerpt.low(signal.noisy), high = excerpt.high(signal.noisy);
  const auto clean = excerpt.curve("clean", colour::ink, signal.clean, 1.4);
  const auto curve = [&](const char* label, const std::string& colour, const Result& result) {
    return excerpt.curve(label, colour, result.estimate.values, 1.6);
  };
  const auto error = [&](const char* label, const std::string& colour, const Result& result) {
    return excerpt.curve(label, colour, result.estimate.values - signal.clean, 1.4);
  };
  const Result &linear = denoised.results()[1], &surface = denoised.results().back();
  const Result &linear_forecast = predicted.results()[1], &next = predicted.results().back();
  examples::write_svg(
      file, signal.title,
      words("White noise at 6 dB; SNR after the adaptive Wiener filter %.1f dB, after the surface "
            "%.1f dB.",
            linear.decibels, surface.decibels),
      {excerpt.panel("The noisy signal", low, high,
                     {excerpt.curve("noisy", colour::sky, signal.noisy, 1), clean}),
       excerpt.panel("Projected onto the surface of the last ten seconds, local linear", low, high,
                     {clean, curve("surface", colour::vermilion, surface)}),
       excerpt.panel("What is left of the noise", -3 * signal.noise, 3 * signal.noise,
                     {error("adaptive Wiener filter", colour::blue, linear),
                      error("surface", colour::vermilion, surface)}),
       excerpt.panel("One step ahead", low, high,
                     {clean, curve("recursive least squares", colour::blue, linear_forecast),
                      curve("surface", colour::vermilion, next)})});
}

void run(const examples::Arguments& arguments) {
  const Signal signal = arguments.csv.empty() ? simulated() : recorded(arguments);
  const Denoised denoised = denoise(signal);
  const Comparison predicted = forecast(signal, denoised.first);
  const double input = denoised.comparison.score(signal.noisy);
  std::printf("%s: %.0f s at %.0f Hz, noise of %.3f mV\n", signal.title.c_str(),
              static_cast<double>(signal.clean.size()) / signal.rate, signal.rate, signal.noise);
  std::printf("scored after %.0f s, where the noisy signal has %.2f dB; delay at most %d samples\n",
              choice_seconds, input, static_cast<int>(longest_patch - 1));
  print("denoising", denoised.comparison, input);
  print("one step ahead", predicted, input);
  plot(arguments.svg, signal, denoised.comparison, predicted);
  std::printf("\nPlot: %s\n", arguments.svg.c_str());
}

}  // namespace

int main(int count, char** words) {
  return examples::run_example(
      {"07_ecg", "Denoises and forecasts an electrocardiogram sample by sample.",
       "a simulated electrocardiogram", "ecg.svg"},
      count, words, run);
}

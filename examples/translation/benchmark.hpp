#pragma once
// Training steps of both forms of attention, taken by turns: seconds, what they are spent on, and how
// much of the machine's arithmetic they use.

#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "../../bench/support/peak.hpp"
#include "../../bench/support/timing.hpp"
#include "trainer.hpp"

namespace translation {
namespace benchmark_detail {

/// Sentences of the greatest length, of tokens drawn at random: no row of the batch is padding.
inline Batch full_batch(const Settings& settings) {
  Random random(settings.seed, /*purpose=*/5);
  const auto length = static_cast<std::size_t>(settings.size.length);
  const auto draw = [&](std::size_t count, Index vocabulary) {
    std::vector<Token> tokens(count);
    for (Token& token : tokens)
      token = stop + 1 +
              static_cast<Token>(random.below(static_cast<std::size_t>(vocabulary) - stop - 1));
    return tokens;
  };
  std::vector<Example> examples;
  for (Index i = 0; i < settings.batch; ++i) {
    examples.push_back({draw(length, settings.size.source_vocabulary),
                        draw(length, settings.size.target_vocabulary),
                        draw(length, settings.size.target_vocabulary)});
  }
  std::vector<const Example*> places;
  for (const Example& example : examples) places.push_back(&example);
  return make_batch(places, settings.padding, settings.size.length);
}

/// Floating-point operations of a step's matrix products, forward and backward: three times those of
/// the forward pass, and of attention three and a half.
struct StepFlops {
  double attention, attention_products, feed_forward, output;

  StepFlops(const ModelSize& size, Index rows, bool is_surface) {
    const auto number = [](Index n) { return static_cast<double>(n); };
    const double width = number(size.width), n = number(rows);
    const double head_width = is_surface ? width : number(size.head_width);
    const double inner = number(size.heads) * head_width;
    attention_products = 3 * 6 * n * width * inner * (is_surface ? 2 : 4);
    attention = attention_products + 3 * 14 * n * number(size.length) * inner;
    feed_forward = 2 * 6 * n * width * number(size.feed_forward) * 2;
    output = 6 * n * width * number(size.target_vocabulary);
  }
  double all() const { return attention + feed_forward + output; }
};

/// A model, its optimiser, and the times of its steps.
template <class Layer>
class Subject {
 public:
  Subject(const char* name, const Settings& settings, const Model<Layer>& model)
      : name_(name),
        settings_(settings),
        model_(model),
        optimizer_(model_, settings.optimizer),
        gradients_(gradients_for(model_)) {}

  void step(const Batch& batch) {
    PartTimes times;
    const double seconds = surfattn::bench::seconds_of([&] {
      Random random(settings_.seed, /*purpose=*/4);
      const auto dropout = dropout_factors<float>(static_cast<Index>(batch.labels.size()),
                                                  settings_.size.width, settings_.dropout, random);
      loss_and_gradients(model_, batch, dropout, scratch_, gradients_, &times);
      const double before = update_seconds_;
      update_seconds_ =
          before + surfattn::bench::seconds_of([&] { optimizer_.step(model_, gradients_); });
      last_update_ = update_seconds_ - before;
    });
    add(seconds, times);
  }

  double median(std::size_t what) const { return surfattn::bench::Quartiles(times_[what]).median; }
  const std::vector<double>& steps() const { return times_[0]; }
  const std::vector<double>& attention() const { return times_[1]; }
  const char* name() const { return name_; }
  void forget() {
    for (auto& times : times_) times.clear();
  }

  static constexpr const char* part_names[] = {
      "whole step", "attention layers with their norms", "feed-forward",    "output layer and loss",
      "embeddings", "update of the parameters",          "dropout and rest"};

 private:
  void add(double seconds, PartTimes& times) {
    const double parts[] = {seconds,
                            times[Part::attention],
                            times[Part::feed_forward],
                            times[Part::output],
                            times[Part::embedding],
                            last_update_};
    for (std::size_t i = 0; i < std::size(parts); ++i) times_[i].push_back(parts[i]);
    times_[6].push_back(seconds - std::accumulate(parts + 1, std::end(parts), 0.0));
  }

  const char* name_;
  Settings settings_;
  Model<Layer> model_;
  Optimizer<Layer> optimizer_;
  ModelGradients<Layer> gradients_;
  OutputScratch<float> scratch_;
  std::vector<double> times_[7];
  double update_seconds_ = 0, last_update_ = 0;
};

inline double median_ratio(const std::vector<double>& above, const std::vector<double>& below) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < above.size(); ++i) ratios.push_back(above[i] / below[i]);
  return surfattn::bench::Quartiles(ratios).median;
}

/// Operations a second of fused multiply-adds that never leave the registers.
inline double peak_flops() {
  constexpr long steps = 4000000;
  const double seconds =
      surfattn::bench::seconds_of([] { surfattn::bench::run_flop_loop<float>(steps); });
  return static_cast<double>(steps) * surfattn::bench::flops_per_step<float> / seconds;
}

template <class Standard, class Surface>
void print_parts(const Standard& standard, const Surface& surface, const StepFlops& standard_flops,
                 const StepFlops& surface_flops, double peak) {
  std::printf("%-36s %22s %22s\n", "", "standard", "surface");
  const auto share = [&](double flops, double seconds) {
    char text[32] = "";
    if (flops > 0)
      std::snprintf(text, sizeof text, "%3.0f %% of peak", 100 * flops / seconds / peak);
    return std::string(text);
  };
  const double of_standard[] = {standard_flops.all(),
                                standard_flops.attention,
                                standard_flops.feed_forward,
                                standard_flops.output,
                                0,
                                0,
                                0};
  const double of_surface[] = {surface_flops.all(),
                               surface_flops.attention,
                               surface_flops.feed_forward,
                               surface_flops.output,
                               0,
                               0,
                               0};
  for (std::size_t i = 0; i < std::size(of_standard); ++i) {
    std::printf("%-36s %8.2f ms %14s %8.2f ms %14s\n", Standard::part_names[i],
                standard.median(i) * 1e3, share(of_standard[i], standard.median(i)).c_str(),
                surface.median(i) * 1e3, share(of_surface[i], surface.median(i)).c_str());
  }
}

}  // namespace benchmark_detail

/// Takes steps of both forms by turns for so many seconds, and prints medians.
inline void run_benchmark(const Settings& settings, double seconds) {
  using namespace benchmark_detail;
  const Batch batch = full_batch(settings);
  const auto model = draw_model<StandardWeights<float>>(settings.size, settings.seed);
  Subject<StandardWeights<float>> standard("standard", settings, model);
  Subject<SurfaceWeights<float>> surface("surface", settings, merged(model));
  const auto round = [&](int number) {
    if (number % 2) standard.step(batch);
    surface.step(batch);
    if (!(number % 2)) standard.step(batch);
  };
  for (int number = 0; number < 2; ++number) round(number);
  standard.forget();
  surface.forget();
  std::vector<double> peaks;
  const double started = processor_seconds();
  for (int number = 0; number < 5 || processor_seconds() - started < seconds; ++number) {
    round(number);
    peaks.push_back(peak_flops());
  }
  const double peak = surfattn::bench::Quartiles(peaks).median;
  const Index rows = batch.target.rows();
  const StepFlops standard_flops(settings.size, rows, false),
      surface_flops(settings.size, rows, true);
  std::printf(
      "%zu steps of each form by turns, %ld sentences of %ld tokens, float; peak %.1f GFLOP/s\n\n",
      standard.steps().size(), static_cast<long>(settings.batch),
      static_cast<long>(settings.size.length), peak * 1e-9);
  print_parts(standard, surface, standard_flops, surface_flops, peak);
  std::printf("\ntokens a second (of the target)      standard %.0f, surface %.0f\n",
              static_cast<double>(rows) / standard.median(0),
              static_cast<double>(rows) / surface.median(0));
  std::printf(
      "standard / surface                   step %.3f, attention layers %.3f; counted %.3f and "
      "%.3f\n",
      median_ratio(standard.steps(), surface.steps()),
      median_ratio(standard.attention(), surface.attention()),
      standard_flops.all() / surface_flops.all(),
      standard_flops.attention / surface_flops.attention);
}

}  // namespace translation

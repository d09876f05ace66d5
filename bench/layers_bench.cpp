// A whole attention layer, forward, backward and decoding, in the standard form and in the surface form of the same model:
// interleaved in one process, so that the ratio of the two is not that of two moments. Beside it what the cost model predicts for
// a machine of the arithmetic and the bandwidth that are measured first.
//
// Prints a line for each case; ends with an error if the two forms disagree, or if the form that the model recommends is slower by
// a quarter.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/peak.hpp"
#include "support/timing.hpp"

namespace {

using namespace surfattn;

struct Case {
  const char* name;
  Index width, heads, head_dim, batch, length;
};

const Case cases[] = {
    {"paper: width 256, 8 heads of 256, 64 × 10", 256, 8, 256, 64, 10},
    {"paper, longer: 64 × 64", 256, 8, 256, 64, 64},
    {"width 256, 8 heads of 32, 64 × 10", 256, 8, 32, 64, 10},
    {"width 128, 4 heads of 128, 1 × 1024", 128, 4, 128, 1, 1024},
};

/// One token more at a time, after `length` others.
const Case decoding_cases[] = {
    {"paper, after 4096 tokens", 256, 8, 256, 1, 4096},
    {"width 512, 8 heads of 64, after 16,384", 512, 8, 64, 1, 16384},
    {"width 128, 8 heads of 16, after 512", 128, 8, 16, 1, 512},
};

/// What the loops of peak.hpp reach: the best of some runs.
Machine measured_machine() {
  const long steps = 4'000'000;
  const std::vector<float> numbers(std::size_t(1) << 25, 1.0f);  // 128 MB
  double arithmetic = 1e9, reading = 1e9;
  for (int run = 0; run < 5; ++run) {
    arithmetic =
        std::min(arithmetic, bench::seconds_of([&] { bench::run_flop_loop<float>(steps); }));
    reading = std::min(reading, bench::seconds_of([&] {
                         bench::run_read_loop(numbers.data(), Index(numbers.size()));
                       }));
  }
  return {double(steps) * bench::flops_per_step<float> / arithmetic,
          double(numbers.size() * sizeof(float)) / reading};
}

StandardWeights<float> random_weights(const Case& c) {
  const auto weight = [](Index rows, Index cols) {
    return Matrix<float>(Matrix<float>::Random(rows, cols) / std::sqrt(float(rows) / 3));
  };
  const Index inner = c.heads * c.head_dim;
  StandardWeights<float> weights{weight(c.width, inner), weight(c.width, inner),
                                 weight(c.width, inner), weight(inner, c.width)};
  weights.heads = {.query = c.heads};
  return weights;
}

/// Seconds of each function, interleaved: the median of the runs, and of the ratio of one run of the first to the same of the
/// second.
struct Timing {
  double first, second, ratio;
};

Timing interleave(const std::function<void()>& first, const std::function<void()>& second,
                  int runs) {
  std::vector<double> a, b, ratios;
  for (int run = 0; run < runs + 2; ++run) {
    const double of_first = bench::seconds_of(first), of_second = bench::seconds_of(second);
    if (run < 2) continue;  // the first ones fill the caches and the allocator
    a.push_back(of_first);
    b.push_back(of_second);
    ratios.push_back(of_first / of_second);
  }
  return {bench::Quartiles(a).median, bench::Quartiles(b).median, bench::Quartiles(ratios).median};
}

/// Prints measured and predicted times; whether the recommended form is no slower by a quarter.
bool report(const Case& c, const char* what, const LayerSize& size, Use use, const Machine& machine,
            const Timing& timing) {
  const double standard = predicted_seconds(layer_cost(Form::standard, size, use), machine),
               surface = predicted_seconds(layer_cost(Form::surface, size, use), machine);
  const Form form = recommend_form(size, use, machine);
  const double gain = form == Form::surface ? timing.ratio : 1 / timing.ratio;
  std::printf("%-42s %-13s %9.3f / %9.3f ms = %5.2f   predicted %8.3f / %8.3f ms = %5.2f: %s%s\n",
              c.name, what, timing.first * 1e3, timing.second * 1e3, timing.ratio, standard * 1e3,
              surface * 1e3, standard / surface, form == Form::surface ? "surface" : "standard",
              gain < 1 ? ", which is slower" : "");
  return gain >= 0.8;
}

bool forms_agree(const Case& c, const Matrix<float>& standard, const Matrix<float>& surface) {
  const float difference = (standard - surface).cwiseAbs().maxCoeff();
  if (difference <= 1e-3f) return true;
  std::printf("%s: the forms differ by %g\n", c.name, double(difference));
  return false;
}

LayerSize size_of(const Case& c, Index queries) {
  return {c.width, c.width, c.width, c.head_dim, c.head_dim, {c.heads}, queries, c.length, c.batch};
}

bool run_case(const Case& c, const Machine& machine, int runs) {
  std::srand(1);
  const StandardWeights<float> standard = random_weights(c);
  const SurfaceWeights<float> surface = merge(standard);
  const Matrix<float> x = Matrix<float>::Random(c.batch * c.length, c.width),
                      grad_out = Matrix<float>::Random(x.rows(), c.width);
  const LayerOptions options{.sequences = Sequences::equal(c.batch)};
  if (!forms_agree(c, layer_forward(x, x, standard, options).out,
                   layer_forward(x, x, surface, options).out))
    return false;
  volatile float sink = 0;
  const auto forward = [&](const auto& weights) {
    return [&, weights = &weights] { sink = layer_forward(x, x, *weights, options).out(0, 0); };
  };
  const auto both = [&](const auto& weights) {
    return [&, weights = &weights] {
      const auto f = layer_forward(x, x, *weights, options);
      const auto g = layer_backward(x, x, *weights, f, grad_out, options);
      sink = g.x(0, 0) + g.y(0, 0);
    };
  };
  const LayerSize size = size_of(c, c.length);
  const Timing once = interleave(forward(standard), forward(surface), runs);
  const Timing train = interleave(both(standard), both(surface), runs);
  const bool right = report(c, "forward", size, Use::prompt, machine, once);
  return report(c, "with backward", size, Use::train, machine, train) && right;
}

bool run_decoding(const Case& c, const Machine& machine, int runs) {
  std::srand(1);
  const StandardWeights<float> standard = random_weights(c);
  const SurfaceWeights<float> surface = merge(standard);
  const Matrix<float> past = Matrix<float>::Random(c.length, c.width),
                      token = Matrix<float>::Random(1, c.width);
  const auto filled = [&](const auto& weights) {
    auto cache = layer_cache(weights, {.capacity = c.length, .window = c.length});
    layer_append(past, weights, cache);
    return cache;
  };
  auto of_standard = filled(standard), of_surface = filled(surface);
  if (!forms_agree(c, layer_decode(token, standard, of_standard),
                   layer_decode(token, surface, of_surface)))
    return false;
  volatile float sink = 0;
  const Timing timing =
      interleave([&] { sink = layer_decode(token, standard, of_standard)(0, 0); },
                 [&] { sink = layer_decode(token, surface, of_surface)(0, 0); }, runs);
  return report(c, "one token", size_of(c, 1), Use::decode, machine, timing);
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 21;
  const Machine machine = measured_machine();
  std::printf("%.1f GFLOP/s, %.1f GB/s\n", machine.flops_per_second * 1e-9,
              machine.bytes_per_second * 1e-9);
  std::printf(
      "standard / surface = ratio, medians of %d interleaved runs; what the cost model says; its "
      "form\n",
      runs);
  bool right = true;
  for (const Case& c : cases) right = run_case(c, machine, runs) && right;
  for (const Case& c : decoding_cases) right = run_decoding(c, machine, 4 * runs) && right;
  return right ? 0 : 1;
}

// A whole attention layer, forward and backward, in the standard form and in the surface form of the same model: interleaved in
// one process, so that the ratio of the two is not that of two moments. Beside it what the cost model predicts.
//
// Prints a line for each case; ends with an error if the two forms disagree.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <surfattn/surfattn.hpp>
#include <vector>

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

bool run_case(const Case& c, int runs) {
  std::srand(1);
  const StandardWeights<float> standard = random_weights(c);
  const SurfaceWeights<float> surface = merge(standard);
  const Matrix<float> x = Matrix<float>::Random(c.batch * c.length, c.width),
                      grad_out = Matrix<float>::Random(x.rows(), c.width);
  const LayerOptions options{.sequences = Sequences::equal(c.batch)};
  const auto difference =
      (layer_forward(x, x, standard, options).out - layer_forward(x, x, surface, options).out)
          .cwiseAbs()
          .maxCoeff();
  if (!(difference <= 1e-3f)) {
    std::printf("%s: the forms differ by %g\n", c.name, double(difference));
    return false;
  }
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
  const LayerSize size{c.width,   c.width,  c.width,  c.head_dim, c.head_dim,
                       {c.heads}, c.length, c.length, c.batch};
  const auto predicted = [&](Use use) {
    return predicted_seconds(layer_cost(Form::standard, size, use)) /
           predicted_seconds(layer_cost(Form::surface, size, use));
  };
  const Timing once = interleave(forward(standard), forward(surface), runs);
  const Timing train = interleave(both(standard), both(surface), runs);
  const auto report = [&](const char* what, const Timing& timing, Use use) {
    std::printf("%-42s %-13s %9.3f / %9.3f ms = %5.2f   predicted %5.2f\n", c.name, what,
                timing.first * 1e3, timing.second * 1e3, timing.ratio, predicted(use));
  };
  report("forward", once, Use::prompt);
  report("with backward", train, Use::train);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 21;
  std::printf("standard / surface = ratio, medians of %d interleaved runs\n", runs);
  bool right = true;
  for (const Case& c : cases) right = run_case(c, runs) && right;
  return right ? 0 : 1;
}

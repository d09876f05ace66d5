// Terms with parameters, trained: two heads learn how far to look back.
//
// The target is attention with ALiBi slopes 0.05 and 0.8 and a sink in each head. Starting from other
// numbers, gradient descent on the slopes and the sinks alone finds them again; the gradients of
// the terms come with those of queries, keys and values, from the same backward pass.

#include <cmath>
#include <iostream>
#include <surfattn/surfattn.hpp>
#include <tuple>

namespace {

using surfattn::Index;
using Matrix = surfattn::Matrix<double>;
using Row = surfattn::RowVector<double>;

struct Model {
  Row slopes = Row::Constant(2, 0.3);
  Row sinks = Row::Constant(2, 0.0);
};

}  // namespace

int main() {
  constexpr Index tokens = 128, width = 8;
  std::srand(1);
  const Matrix x = Matrix::Random(tokens, 2 * width), values = Matrix::Random(tokens, 2 * width);
  const surfattn::Options options{.heads = {.query = 2}};
  const surfattn::Causal causal{surfattn::Align::top_left};

  Model wanted, model;
  wanted.slopes << 0.05, 0.8;
  wanted.sinks << 1.0, -1.0;
  const Matrix target = attention(x, x, values, options, surfattn::Alibi{wanted.slopes},
                                  surfattn::Sink{wanted.sinks}, causal);

  for (int step = 0; step <= 100; ++step) {
    const surfattn::Alibi alibi{model.slopes};
    const surfattn::Sink sink{model.sinks};
    const auto forward = attention_forward(x, x, values, options, alibi, sink, causal);
    const Matrix error = forward.out - target;
    if (step % 25 == 0) {
      std::cout << "step " << step << ": squared error " << error.squaredNorm() / tokens
                << ", slopes " << model.slopes << ", sinks " << model.sinks << '\n';
    }
    const Matrix upstream = 2 * error / tokens;
    const auto gradients =
        attention_backward(x, x, values, forward, upstream, options, alibi, sink, causal);
    // slopes and sinks, in the order of the terms; slopes by steps of their logarithm
    const Row& grad_slopes = std::get<0>(gradients.terms);
    const Row& grad_sinks = std::get<1>(gradients.terms);
    model.slopes = model.slopes.array() * (-4 * grad_slopes.array() * model.slopes.array()).exp();
    model.sinks -= 10 * grad_sinks;
  }
  const bool found =
      (model.slopes - wanted.slopes).norm() < 0.02 && (model.sinks - wanted.sinks).norm() < 0.1;
  std::cout << (found ? "found again\n" : "not found\n");
  return found ? 0 : 1;
}

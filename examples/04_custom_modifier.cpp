// A score modifier of one's own, in ten lines, with a check of its gradient.
//
// Scores above a threshold, another one for each head, shall grow only with their logarithm,
// S ← t + log(1 + S − t). The function gives value and derivative; the
// library does the rest, in one pass and without storing a score, forward and backward.

#include <cmath>
#include <iostream>
#include <surfattn/gradcheck.hpp>
#include <surfattn/surfattn.hpp>

int main() {
  using surfattn::Index, surfattn::Position, surfattn::ValueAndDerivative;
  using Matrix = surfattn::Matrix<double>;

  const surfattn::Modifier calm{[](auto score, const Position& position) {
    const auto threshold = static_cast<decltype(score)>(1 + position.head);
    if (score <= threshold) return ValueAndDerivative{score, decltype(score)(1)};
    const auto excess = 1 + score - threshold;
    return ValueAndDerivative{threshold + std::log(excess), 1 / excess};
  }};

  // First the function alone: its derivative at a few scores, in both branches.
  const Position first_pair{};
  for (const double score : {-2.0, 0.5, 1.5, 6.0}) {
    const auto value = [&](double s) { return calm.function(s, first_pair).value; };
    const auto derivative = calm.function(score, first_pair).derivative;
    const auto check = surfattn::check_gradient(value, score, derivative);
    std::cout << "at score " << score << ": " << check << '\n';
    if (!check) return 1;
  }

  // Then a whole call: two heads of width 4, 6 queries, 9 keys, the loss Σ out∘upstream.
  std::srand(1);
  const Matrix queries = 3 * Matrix::Random(6, 8), keys = Matrix::Random(9, 8),
               values = Matrix::Random(9, 8), upstream = Matrix::Random(6, 8);
  const surfattn::Options options{.heads = {.query = 2}};
  const surfattn::Causal causal{surfattn::Align::bottom_right};
  const auto forward = attention_forward(queries, keys, values, options, calm, causal);
  const auto gradients =
      attention_backward(queries, keys, values, forward, upstream, options, calm, causal);

  const auto loss = [&](const Matrix& k) {
    return attention(queries, k, values, options, calm, causal).cwiseProduct(upstream).sum();
  };
  const auto check = surfattn::check_gradient(loss, keys, gradients.keys, {.tolerance = 1e-7});
  std::cout << "through the attention, by each key: " << check << '\n';
  return check ? 0 : 1;
}

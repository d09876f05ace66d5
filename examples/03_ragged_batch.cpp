// A ragged batch: sentences of 3, 1 and 5 tokens, packed one after the other, in one call. No
// padding is stored or computed, and each sentence gives the same bits as a call of its own.
#include <iostream>
#include <surfattn/surfattn.hpp>
#include <vector>

int main() {
  using namespace surfattn;
  const std::vector<int> offsets{0, 3, 4,
                                 9};  // sentence s owns rows offsets[s] … offsets[s + 1] − 1
  Matrix<float> tokens(9, 4);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = float(i * 7 % 11) / 5 - 1;

  const Options batch{.heads = {.query = 2}, .sequences = offsets};
  const auto forward = attention_forward(tokens, tokens, tokens, batch, Causal{Align::top_left});
  const auto gradients = attention_backward(tokens, tokens, tokens, forward, forward.out, batch,
                                            Causal{Align::top_left});

  bool same = true;
  std::cout.precision(3);
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const Index first = offsets[s], count = offsets[s + 1] - first;
    const Matrix<float> one = tokens.middleRows(first, count);
    const auto alone = attention(one, one, one, {.heads = {.query = 2}}, Causal{Align::top_left});
    same = same && alone == forward.out.middleRows(first, count);
    std::cout << "sentence " << s << ": " << count << " tokens, its last one becomes "
              << forward.out.row(first + count - 1) << '\n';
  }
  std::cout << "the same bits as calls of their own: " << (same ? "yes" : "no") << '\n';
  std::cout << "gradients of queries: " << gradients.queries.rows() << " x "
            << gradients.queries.cols() << '\n';
  return same ? 0 : 1;
}

// Masks: who sees whom. Terms are listed after the options; masks combine; each printed picture is
// what the library computes with, read through its weights.
#include <iostream>
#include <surfattn/surfattn.hpp>
#include <vector>

using surfattn::Index;

namespace {

/// A row for each query, # where it sees the key.
template <class... Masks>
void draw(const char* title, const Masks&... masks) {
  const surfattn::Matrix<float> tokens = surfattn::Matrix<float>::Zero(10, 4);
  const auto weights = surfattn::attention_scores(tokens, tokens, {}, {}, masks...);
  std::cout << title << '\n';
  for (Index i = 0; i < weights.rows(); ++i) {
    std::cout << "  ";
    for (Index j = 0; j < weights.cols(); ++j) std::cout << (weights(i, j) > 0 ? '#' : '.');
    std::cout << '\n';
  }
}

}  // namespace

int main() {
  using surfattn::Align, surfattn::any_of, surfattn::Causal, surfattn::Dilated, surfattn::Documents,
      surfattn::MaskFunction, surfattn::none_of, surfattn::PrefixCausal, surfattn::SlidingWindow;
  const Causal causal{Align::top_left};
  const std::vector<int> document{0, 0, 0, 1, 1, 1, 1, 2, 2, 2};

  draw("documents, each causal: two terms, both must allow", causal, Documents(document));
  draw("a prefix of 3 that all see", PrefixCausal(3, Align::top_left));
  draw("a window or every 4th key, causal: Sparse Transformer",
       any_of(SlidingWindow{.left = 1, .right = 0}, Dilated{4}), causal);
  draw("all but the own token", none_of(SlidingWindow{.left = 0, .right = 0}));
  draw("a function of your own", MaskFunction([](Index i, Index j) { return (i ^ j) < 3; }));
}

// surfattn layer 2: the backward of a softmax, while the product that leads to it goes on

#pragma once

#include <surfattn/detail/simd/exp2.hpp>
#include <surfattn/detail/simd/overlapped_work.hpp>
#include <surfattn/detail/simd/row_operations.hpp>

namespace surfattn::detail::simd {

/// What a row needs: W = 2^(S − log_sum), dS = W∘(dP − mean).
template <class Scalar>
struct SoftmaxGradientRow {
  Scalar log_sum, mean;
};

/// S → W and dP → dS in place, a row of a panel at a time. dS is added to `totals`, one number for each
/// column, unless that is null.
template <class Scalar>
struct DifferentiateSoftmax {
  using Row = const SoftmaxGradientRow<Scalar>;

  Index to_scores;  ///< from a number of dP to that of S, in the same workspace
  Scalar* totals;

  SURFATTN_ALWAYS_INLINE void operator()(Row& row, Scalar* gradients, Index column) const {
    differentiate<panel_packets>(row, gradients, column);
  }

  template <int Packets>
  SURFATTN_ALWAYS_INLINE void differentiate(Row& row, Scalar* gradients, Index column) const {
    Scalar* const scores = gradients + to_scores;
    const auto log_sum = broadcast(row.log_sum), mean = broadcast(row.mean);
    Packet<Scalar> weights[Packets];
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p)
      weights[p] = subtract(load(scores + p * lanes<Scalar>), log_sum);
    exp2<Scalar>(weights, Exp2Origin<Scalar>(Scalar(0)));
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      const Index j = p * lanes<Scalar>;
      const auto gradient = multiply(weights[p], subtract(load(gradients + j), mean));
      store(scores + j, weights[p]);
      store(gradients + j, gradient);
      if (totals) store(totals + column + j, add(load(totals + column + j), gradient));
    }
  }
};

/// The same for the whole panels of `count` rows that hold `cols` columns.
template <class Scalar>
void differentiate_softmax(Index count, Index cols, Tile<Scalar> gradients,
                           const SoftmaxGradientRow<Scalar>* rows,
                           const DifferentiateSoftmax<Scalar>& work) {
  for (Index i = 0; i < count; ++i) {
    Scalar* const row = gradients.from(i).data;
    for_packets<Scalar>(padded<Scalar>(cols), [&]<int Packets>(Index first) {
      work.template differentiate<Packets>(rows[i], row + first, first);
    });
  }
}

/// dP = A·B, then S → W and dP → dS.
template <class Element, class Left>
void set_softmax_gradients(Index count, Index cols, Index depth, const Left& a, Panels<Element> b,
                           Tile<Element> gradients, const SoftmaxGradientRow<Element>* rows,
                           const DifferentiateSoftmax<Element>& work) {
  Index done = 0;
  if constexpr (overlaps_exponentials<Element>) {
    done = count - count % kernel_rows;
    product<Store::set>(done, cols, depth, a, b, gradients,
                        OverlappedFinish<Element, DifferentiateSoftmax<Element>>({}, rows, work));
  }
  if (done == count) return;
  Left rest = a;
  rest.data = a.from(done);
  set_product(count - done, cols, depth, rest, b, gradients.from(done));
  differentiate_softmax(count - done, cols, gradients.from(done), rows + done, work);
}

}  // namespace surfattn::detail::simd

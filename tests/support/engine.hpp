// The parts of the engine that most tests use, compiled once for all of them in engine.cpp. It saves time
// alone: a test that does not include this file compiles its own.
#pragma once

// clang-format off: this comes before all that includes Eigen
#include "support/eigen.hpp"
// clang-format on

#include <surfattn/surfattn.hpp>

/// `prefix` is `extern` where they are used, and nothing where they are compiled.
#define SURFATTN_TEST_KERNELS(prefix, Scalar)                                                  \
  prefix template void simd::set_dot_products(const simd::DotProducts<Scalar, Scalar>&,        \
                                              simd::ProductAhead<Scalar>&);                    \
  prefix template void simd::set_rows_products(const simd::RowsProducts<Scalar, Scalar>&,      \
                                               simd::ProductAhead<Scalar>&);                   \
  prefix template void simd::squared_norms_by_columns(MatrixView<const Scalar>, Scalar*);      \
  prefix template void simd::product<simd::Store::set>(                                        \
      Index, Index, Index, const simd::ColumnsOperand<Scalar>&, simd::Panels<Scalar>,          \
      simd::Tile<Scalar>, const simd::Finish<Scalar>&);                                        \
  prefix template void simd::product<simd::Store::set>(                                        \
      Index, Index, Index, const simd::ColumnsOperand<Scalar>&, simd::Panels<Scalar>,          \
      simd::Tile<Scalar>, const simd::OverlappedFinish<Scalar, simd::WeighRows<Scalar>>&);     \
  prefix template void simd::product<simd::Store::set>(                                        \
      Index, Index, Index, const simd::ColumnsOperand<Scalar>&, simd::Panels<Scalar>,          \
      simd::Tile<Scalar>,                                                                      \
      const simd::OverlappedFinish<Scalar, simd::DifferentiateSoftmax<Scalar>>&);              \
  prefix template void simd::product<simd::Store::add>(                                        \
      Index, Index, Index, const simd::ColumnsOperand<Scalar>&, simd::Panels<Scalar>,          \
      simd::Tile<Scalar>, const simd::Finish<Scalar>&);                                        \
  prefix template void simd::product<simd::Store::add>(                                        \
      Index, Index, Index, const simd::RowsOperand<Scalar>&, simd::Panels<Scalar>,             \
      simd::Tile<Scalar>, const simd::Finish<Scalar>&);                                        \
  prefix template void simd::pack_left<Scalar>(MatrixView<const Scalar>, Scalar, Scalar*);     \
  prefix template void simd::pack_rows(MatrixView<const Scalar>, Scalar, Scalar*);             \
  prefix template void simd::pack_transposed(MatrixView<const Scalar>, Scalar*);               \
  prefix template void simd::pack_panels(MatrixView<const Scalar>, Scalar, Scalar*, Index,     \
                                         simd::NonFiniteRows&, Scalar*);                       \
  prefix template void simd::row_products(MatrixView<const Scalar>, MatrixView<const Scalar>,  \
                                          Scalar*);                                            \
  prefix template void simd::squared_norms(MatrixView<const Scalar>, Scalar*);                 \
  prefix template void simd::differentiate_softmax(Index, Index, simd::Tile<Scalar>,           \
                                                   const simd::SoftmaxGradientRow<Scalar>*,    \
                                                   const simd::DifferentiateSoftmax<Scalar>&); \
  prefix template Scalar simd::exp2_row(Scalar*, Index, Scalar);                               \
  prefix template class StreamProducts<Scalar>;                                                \
  prefix template class BackwardBlock<Scalar>

/// Both passes of both forms with the given terms, one or none.
#define SURFATTN_TEST_PASSES(prefix, Scalar, ...)                                                 \
  prefix template void run_forward(const Operands<Scalar>&, const ForwardOutputs<Scalar>&,        \
                                   const Workspace&, Executor*,                                   \
                                   const Require& __VA_OPT__(, ) __VA_ARGS__);                    \
  prefix template void run_backward(const Operands<Scalar>&, const Upstream<Scalar>&,             \
                                    const GradientOutputs<Scalar>&, const Workspace&, Executor*,  \
                                    const Require&, const DoNothing& __VA_OPT__(, ) __VA_ARGS__); \
  prefix template void run_backward(const Operands<Scalar>&, const Upstream<Scalar>&,             \
                                    const GradientOutputs<Scalar>&, const Workspace&, Executor*,  \
                                    const Require&,                                               \
                                    const ScaleGradient<Scalar>& __VA_OPT__(, ) __VA_ARGS__);     \
  prefix template std::size_t workspace_size<Scalar>(Pass, const Shape&, bool, const Executor*,   \
                                                     const Require& __VA_OPT__(, ) __VA_ARGS__)

/// All of that, to be used in surfattn's namespace `detail`.
#define SURFATTN_TEST_ENGINE(prefix)                          \
  SURFATTN_TEST_KERNELS(prefix, float);                       \
  SURFATTN_TEST_KERNELS(prefix, double);                      \
  SURFATTN_TEST_PASSES(prefix, float);                        \
  SURFATTN_TEST_PASSES(prefix, double);                       \
  SURFATTN_TEST_PASSES(prefix, float, const BoolMask<bool>&); \
  SURFATTN_TEST_PASSES(prefix, double, const Causal&);        \
  SURFATTN_TEST_PASSES(prefix, double, const KeyLengths&);    \
  SURFATTN_TEST_PASSES(prefix, double, const BoolMask<bool>&)

namespace surfattn::detail {
SURFATTN_TEST_ENGINE(extern);
}

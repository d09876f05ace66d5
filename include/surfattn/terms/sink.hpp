// surfattn layer 3: sinks, which take weight and give nothing

#pragma once

#include <surfattn/terms/parameter.hpp>
#include <surfattn/terms/term.hpp>

namespace surfattn {

/// A sink for each query head (Xiao et al. 2023, arXiv:2309.17453; gpt-oss, arXiv:2508.10925): one more logit s_h
/// in the denominator of the softmax, as of a key whose value is 0,
///
///     W_ij = exp(S_ij)/(exp(s_h) + Σ_l exp(S_il)),   L_i = log(exp(s_h) + Σ_l exp(S_il)),
///     ds_h = −Σ_i exp(s_h − L_i)·D_i,   D_i = dO_i·O_i.
///
/// The log-sum-exp holds the sink. A query that sees no key gets 0, and L_i = s_h. In the surface
/// form S is the whole −‖q − k‖²/(2σ²) + log π, so that a query far from every key projects towards
/// 0 (with KeyPrior::sdpa: q·k/σ²). A logit of −∞ is no sink. A view of a row or column of Hq
/// numbers, in natural units; the gradient has its shape.
template <class Element>
class Sink : public detail::TrainableTerm<Sink<Element>, Element> {
 public:
  using detail::TrainableTerm<Sink<Element>, Element>::TrainableTerm;

  Sink bind(const detail::Shape& shape, const detail::Require& require) const {
    this->check_one_per_head(require, "Sink", shape);
    return *this;
  }

  template <class Accumulator>
  Accumulator logit(Index head) const {
    return static_cast<Accumulator>(detail::entry(this->parameters_, head));
  }

  template <class Accumulator>
  void add_gradient(Index head, Accumulator gradient) const {
    detail::add_to_entry(detail::entry(this->gradient_, head), gradient);
  }
};

template <detail::StoredMatrix Derived>
explicit Sink(const Derived&) -> Sink<detail::scalar_t<Derived>>;

}  // namespace surfattn

// A whole layer of attention, as Eigen code is written by hand and by the library.
#pragma once

#include <memory>
#include <surfattn/layers.hpp>

#include "problem.hpp"

namespace surfattn::bench {

/// Forward and backward of a layer without biases, self-attention on x, by plain products.
template <class Scalar>
struct NaiveLayer {
  Matrix<Scalar> q, k, v, attended, out;
  std::vector<Matrix<Scalar>> weights;
  Matrix<Scalar> grad_x;
  StandardWeights<Scalar> grad;

  void forward(const Matrix<Scalar>& x, const StandardWeights<Scalar>& w) {
    q.noalias() = x * w.query;
    k.noalias() = x * w.key;
    v.noalias() = x * w.value;
    const Index heads = w.heads.query, d = q.cols() / heads;
    weights.resize(std::size_t(heads));
    attended.resize(x.rows(), q.cols());
    for (Index h = 0; h < heads; ++h) {
      auto& of_head = weights[std::size_t(h)];
      of_head = naive_weights(q.middleCols(h * d, d), k.middleCols(h * d, d), [](const auto&) {});
      attended.middleCols(h * d, d).noalias() = of_head * v.middleCols(h * d, d);
    }
    out.noalias() = attended * w.output;
  }

  void backward(const Matrix<Scalar>& x, const StandardWeights<Scalar>& w,
                const Matrix<Scalar>& grad_out) {
    const Matrix<Scalar> grad_attended = grad_out * w.output.transpose();
    Matrix<Scalar> grad_q(q.rows(), q.cols()), grad_k = grad_q, grad_v = grad_q;
    const Index d = q.cols() / w.heads.query;
    for (Index h = 0; h < w.heads.query; ++h) {
      const auto block = [&](auto& matrix) { return matrix.middleCols(h * d, d); };
      naive_backward(weights[std::size_t(h)], block(q), block(k), block(v), block(attended),
                     block(grad_attended), block(grad_q), block(grad_k), block(grad_v));
    }
    grad.output.noalias() = attended.transpose() * grad_out;
    grad.query.noalias() = x.transpose() * grad_q;
    grad.key.noalias() = x.transpose() * grad_k;
    grad.value.noalias() = x.transpose() * grad_v;
    grad_x.noalias() = grad_q * w.query.transpose();
    grad_x.noalias() += grad_k * w.key.transpose();
    grad_x.noalias() += grad_v * w.value.transpose();
  }
};

/// Self-attention on `tokens` tokens, `width` wide, by `heads` heads.
template <class Scalar>
class LayerProblem : public std::enable_shared_from_this<LayerProblem<Scalar>> {
 public:
  LayerProblem(Index tokens, Index width, Index heads, Index head_width)
      : x_(random(tokens, width)), grad_out_(random(tokens, width)) {
    const Index inner = heads * head_width;
    const Scalar size = Scalar(1 / std::sqrt(double(width)));
    standard_ = {random(width, inner) * size, random(width, inner) * size,
                 random(width, inner) * size, random(inner, width) * size};
    standard_.heads = {.query = heads};
    surface_ = merge(standard_);
  }

  Work naive(Pass pass) {
    const auto layer = std::make_shared<NaiveLayer<Scalar>>();
    layer->forward(x_, standard_);
    judge("naive Eigen's output", layer->out);
    return [self = this->shared_from_this(), pass, layer] {
      if (pass == Pass::forward) {
        layer->forward(self->x_, self->standard_);
      } else {
        layer->backward(self->x_, self->standard_, self->grad_out_);
      }
    };
  }

  /// Of the layer in this form: projections and attention.
  double flops(Form form, Pass pass) const {
    const double t = double(x_.rows()), width = double(x_.cols());
    const double inner = double(standard_.query.cols());
    const double merged = double(surface_.metric.cols());
    const double projections = form == Form::standard ? 4 * inner : 2 * merged;
    const double attended = form == Form::standard ? inner : merged;
    return pass == Pass::forward ? 2 * t * width * projections + 4 * t * t * attended
                                 : 4 * t * width * projections + 10 * t * t * attended;
  }

  /// Of inputs, weights and results, each counted once.
  double bytes(Form form, Pass pass) const {
    const Index weights =
        form == Form::standard ? 4 * standard_.query.size() : 2 * surface_.metric.size();
    const Index passes = pass == Pass::forward ? 1 : 2;
    return double(passes * (weights + 2 * x_.size())) * double(sizeof(Scalar));
  }

  Work library(Form form, Pass pass) {
    return form == Form::standard ? library(standard_, pass) : library(surface_, pass);
  }

 private:
  static Matrix<Scalar> random(Index rows, Index cols) {
    return Matrix<float>::Random(rows, cols).template cast<Scalar>();
  }

  template <class Weights>
  Work library(const Weights& weights, Pass pass) {
    const auto forward = layer_forward(x_, x_, weights);
    judge("the layer's output", forward.out);
    const auto gradients = layer_backward(x_, x_, weights, forward, grad_out_);
    judge_gradient(gradients.x + gradients.y);
    return [self = this->shared_from_this(), &weights, forward, pass] {
      const Matrix<Scalar>& x = self->x_;
      if (pass == Pass::forward) {
        volatile Scalar used = layer_forward(x, x, weights).out(0, 0);
        static_cast<void>(used);
      } else {
        volatile Scalar used = layer_backward(x, x, weights, forward, self->grad_out_).x(0, 0);
        static_cast<void>(used);
      }
    };
  }

  /// The output against the reference's for few queries.
  void judge(const char* what, const Matrix<Scalar>& out) const {
    const auto rows = sampled_rows(x_.rows());
    require_close(what, Matrix<Scalar>(out(rows, Eigen::all)), reference_out<double>(rows),
                  reference_out<Scalar>(rows));
  }

  template <class S>
  Matrix<S> reference_out(const std::vector<Index>& rows) const {
    const reference::LayerWeights<S> weights{standard_.query.template cast<S>(),
                                             standard_.key.template cast<S>(),
                                             standard_.value.template cast<S>(),
                                             standard_.output.template cast<S>(),
                                             {},
                                             {},
                                             {},
                                             {}};
    const Index heads = standard_.heads.query;
    return reference::layer_forward<S>(
        x_(rows, Eigen::all).template cast<S>(), x_.template cast<S>(), weights,
        1 / std::sqrt(S(standard_.query.cols() / heads)), {heads, heads});
  }

  /// The gradient of x against that of plain products in double; numbers of about 1 cancel in
  /// dP − D.
  void judge_gradient(const Matrix<Scalar>& grad_x) const {
    require_close("the layer's gradient", grad_x, naive_gradient<double>(),
                  naive_gradient<Scalar>(), 1);
  }

  template <class S>
  Matrix<S> naive_gradient() const {
    StandardWeights<S> weights{standard_.query.template cast<S>(), standard_.key.template cast<S>(),
                               standard_.value.template cast<S>(),
                               standard_.output.template cast<S>()};
    weights.heads = standard_.heads;
    NaiveLayer<S> layer;
    layer.forward(x_.template cast<S>(), weights);
    layer.backward(x_.template cast<S>(), weights, grad_out_.template cast<S>());
    return layer.grad_x;
  }

  Matrix<Scalar> x_, grad_out_;
  StandardWeights<Scalar> standard_;
  SurfaceWeights<Scalar> surface_;
};

}  // namespace surfattn::bench

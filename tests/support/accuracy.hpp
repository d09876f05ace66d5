// One problem through the engine, the plain evaluation in the same precision and the reference in a higher one.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "support/bounds.hpp"
#include "support/catch.hpp"
#include "support/problem.hpp"

namespace surfattn::test {

/// Fails unless |fast − exact| ≤ 2·max|plain − exact| + bound everywhere: at most twice the error of a plain evaluation in the
/// same precision, plus the rounding floor of bounds.hpp. Where the exact result is itself of that precision, both carry the
/// floor. A NaN fails.
template <class Scalar, class High>
void check_error(const std::string& name, const Matrix<Scalar>& fast, const Matrix<Scalar>& plain,
                 const Matrix<High>& exact, const Doubles& bound) {
  REQUIRE(fast.rows() == exact.rows());
  REQUIRE(fast.cols() == exact.cols());
  // both are −∞ where a query sees no key
  const auto error = [](Scalar a, High b) {
    return High(a) == b ? 0 : double(std::abs(High(a) - b));
  };
  double plain_worst = 0, worst = 0;
  for (Index i = 0; i < fast.size(); ++i)
    plain_worst = std::max(plain_worst, error(plain.data()[i], exact.data()[i]));
  const double floors = std::is_same_v<Scalar, High> ? 2 : 1;
  Index beyond = 0;
  for (Index i = 0; i < fast.rows(); ++i) {
    for (Index c = 0; c < fast.cols(); ++c) {
      const double e = error(fast(i, c), exact(i, c));
      if (!(e <= 2 * plain_worst + floors * bound(i, c))) ++beyond;
      worst = std::max(worst, e);
    }
  }
  INFO(name << ": worst error " << worst << ", plain " << plain_worst << ", largest bound "
            << (bound.size() ? bound.maxCoeff() : 0) << ", " << beyond << " of " << fast.size()
            << " beyond");
  CHECK(beyond == 0);
}

template <class Scalar, class High>
void check_error(const std::string& name, Scalar fast, Scalar plain, High exact, double bound) {
  check_error(name, Matrix<Scalar>(Matrix<Scalar>::Constant(1, 1, fast)),
              Matrix<Scalar>(Matrix<Scalar>::Constant(1, 1, plain)),
              Matrix<High>(Matrix<High>::Constant(1, 1, exact)), Doubles::Constant(1, 1, bound));
}

template <class T>
Doubles doubles(const T& matrix) {
  return matrix.template cast<double>();
}

inline Doubles columns(const Doubles& matrix, Index block, Index blocks) {
  return matrix.middleCols(block * (matrix.cols() / blocks), matrix.cols() / blocks);
}

/// Adds one query head's bounds into the blocks of columns of the whole problem's.
struct WholeBounds {
  Bounds sum;
  Index query_heads, key_value_heads;

  template <class Scalar>
  WholeBounds(const Problem<Scalar>& p, Index value_cols)
      : query_heads(p.sizes.query_heads), key_value_heads(p.sizes.key_value_heads) {
    sum.out = Doubles::Zero(p.queries.rows(), query_heads * (value_cols / key_value_heads));
    sum.log_sum_exp = Doubles::Zero(p.queries.rows(), query_heads);
    sum.grad_queries = Doubles::Zero(p.queries.rows(), p.queries.cols());
    sum.grad_keys = sum.grad_keys_of_surface = Doubles::Zero(p.keys.rows(), p.keys.cols());
    sum.grad_values = Doubles::Zero(p.keys.rows(), value_cols);
    sum.grad_key_bias = Doubles::Zero(p.keys.rows(), key_value_heads);
  }

  void add(const Bounds& b, Index head) {
    const Index shared = head / (query_heads / key_value_heads);
    add_block(sum.out, b.out, head);
    add_block(sum.log_sum_exp, b.log_sum_exp, head);
    add_block(sum.grad_queries, b.grad_queries, head);
    add_block(sum.grad_keys, b.grad_keys, shared);
    if (b.grad_keys_of_surface.size())
      add_block(sum.grad_keys_of_surface, b.grad_keys_of_surface, shared);
    add_block(sum.grad_values, b.grad_values, shared);
    add_block(sum.grad_key_bias, b.grad_key_bias, shared);
    sum.grad_scale += b.grad_scale;
  }

 private:
  static void add_block(Doubles& to, const Doubles& block, Index index) {
    to.middleCols(index * block.cols(), block.cols()) += block;
  }
};

template <class High>
ExactHead exact_head(const Doubles& queries, const Doubles& keys, const Doubles& values,
                     const Doubles& grad_out, const reference::Forward<High>& forward, Index head,
                     Index query_heads, Index key_value_heads, double scale) {
  const Index shared = head / (query_heads / key_value_heads);
  return {columns(queries, head, query_heads),
          columns(keys, shared, key_value_heads),
          columns(values, shared, key_value_heads),
          columns(grad_out, head, query_heads),
          doubles(forward.weights[static_cast<std::size_t>(head)]),
          columns(doubles(forward.out), head, query_heads),
          doubles(forward.log_sum_exp).col(head),
          Doubles::Zero(queries.rows(), 1),
          Doubles::Zero(keys.rows(), 1),
          scale};
}

/// What a loss depends on.
enum class Loss { of_out, of_out_and_log_sum_exp };

/// ∂loss/∂log_sum_exp as the reference takes it, and 0 for a query that sees no key.
template <class S, class Scalar>
Matrix<S> grad_log_sum_exp(const Problem<Scalar>& p, Loss loss, const Matrix<S>& log_sum_exp) {
  if (loss == Loss::of_out) return {};
  Matrix<S> grad = p.grad_log_sum_exp.template cast<S>();
  for (Index i = 0; i < grad.size(); ++i) {
    if (std::isinf(double(log_sum_exp.data()[i]))) grad.data()[i] = S(0);
  }
  return grad;
}

/// Calls `use` with what the library's backward pass takes for grad_out.
template <class Scalar, class Use>
auto with_upstream(const Problem<Scalar>& p, Loss loss, const Matrix<Scalar>& grad_out,
                   const Use& use) {
  return loss == Loss::of_out ? use(grad_out) : use(ForwardGradients{grad_out, p.grad_log_sum_exp});
}

/// Checks a forward pass against those that it should be as good as.
template <class Scalar, class High>
struct ForwardCheck {
  const reference::Forward<Scalar>& plain;
  const reference::Forward<High>& exact;
  const Bounds& bounds;

  void operator()(const Forward<Scalar>& fast) const {
    check_error("out", fast.out, plain.out, exact.out, bounds.out);
    check_error("log_sum_exp", fast.log_sum_exp, plain.log_sum_exp, exact.log_sum_exp,
                bounds.log_sum_exp);
  }
};

/// No other way to compute a forward pass.
struct NoOtherWay {
  template <class... Arguments>
  void operator()(const Arguments&...) const {}
};

/// Standard form: engine in Scalar, plain in Scalar, exact in High. `with(use)` calls `use` with the
/// terms that stand for the mask; `also(options, check, terms...)` may check other ways to compute
/// the forward pass.
template <class Scalar, class High, class With, class Also = NoOtherWay>
void check_standard_form(const Problem<Scalar>& p, const reference::Mask& mask, Loss loss,
                         const With& with, const Also& also = {}) {
  const reference::Heads heads{p.sizes.query_heads, p.sizes.key_value_heads};
  const double scale = 0.625 / std::sqrt(static_cast<double>(std::max<Index>(p.sizes.head_dim, 1)));
  const Options options{.scale = scale, .heads = p.heads};

  const Matrix<High> q = p.queries.template cast<High>(), k = p.keys.template cast<High>(),
                     v = p.values.template cast<High>(), g = p.grad_out.template cast<High>();
  const auto exact = reference::attention_forward<High>(q, k, v, High(scale), heads, mask);
  const auto exact_grad = reference::attention_backward<High>(
      q, k, v, High(scale), heads, mask, g, grad_log_sum_exp<High>(p, loss, exact.log_sum_exp));
  const auto plain =
      reference::attention_forward<Scalar>(p.queries, p.keys, p.values, Scalar(scale), heads, mask);
  const auto plain_grad = reference::attention_backward<Scalar>(
      p.queries, p.keys, p.values, Scalar(scale), heads, mask, p.grad_out,
      grad_log_sum_exp<Scalar>(p, loss, plain.log_sum_exp));

  WholeBounds whole(p, p.values.cols());
  for (Index head = 0; head < heads.query; ++head) {
    auto one =
        exact_head<High>(doubles(p.queries), doubles(p.keys), doubles(p.values),
                         doubles(p.grad_out), exact, head, heads.query, heads.key_value, scale);
    if (loss != Loss::of_out)
      one.grad_log_sum_exp = doubles(grad_log_sum_exp<High>(p, loss, exact.log_sum_exp)).col(head);
    whole.add(ErrorModel<Scalar>(one).bounds(), head);
  }
  with([&](const auto&... terms) {
    const ForwardCheck<Scalar, High> check{plain, exact, whole.sum};
    const auto fast = attention_forward(p.queries, p.keys, p.values, options, terms...);
    check(fast);
    also(options, check, terms...);
    const auto grad = with_upstream(p, loss, p.grad_out, [&](const auto& upstream) {
      return attention_backward(p.queries, p.keys, p.values, fast, upstream, options, terms...);
    });
    check_error("grad queries", grad.queries, plain_grad.queries, exact_grad.queries,
                whole.sum.grad_queries);
    check_error("grad keys", grad.keys, plain_grad.keys, exact_grad.keys, whole.sum.grad_keys);
    check_error("grad values", grad.values, plain_grad.values, exact_grad.values,
                whole.sum.grad_values);
  });
}

enum class PriorKind { uniform, sdpa, explicit_weights };

template <class S>
auto surface_reference_backward(PriorKind prior, const Matrix<S>& q, const Matrix<S>& k,
                                S bandwidth, const Matrix<S>& log_prior, reference::Heads heads,
                                const reference::Mask& mask, const Matrix<S>& grad,
                                const Matrix<S>& grad_log_sum_exp) {
  return prior == PriorKind::sdpa
             ? reference::project_backward_sdpa<S>(q, k, bandwidth, heads, mask, grad)
             : reference::project_backward<S>(q, k, bandwidth, log_prior, heads, mask, grad,
                                              grad_log_sum_exp);
}

/// The log-prior as a matrix, from which the reference computes; none for the uniform prior.
template <class S>
Matrix<S> reference_prior(PriorKind prior, const Matrix<S>& keys, const Matrix<S>& log_prior,
                          S bandwidth, reference::Heads heads) {
  if (prior == PriorKind::uniform) return {};
  if (prior == PriorKind::sdpa) return reference::sdpa_log_prior<S>(keys, bandwidth, heads);
  return log_prior;
}

template <class Scalar>
KeyPrior library_prior(PriorKind prior, const Matrix<Scalar>& log_prior) {
  if (prior == PriorKind::uniform) return KeyPrior::uniform;
  if (prior == PriorKind::sdpa) return KeyPrior::sdpa;
  return log_prior;
}

/// Surface form, likewise. With the sdpa prior the loss is one of the projection alone: the
/// log-sum-exp is then not the reference's, which has the norm of the query.
template <class Scalar, class High, class With, class Also = NoOtherWay>
void check_surface_form(const Problem<Scalar>& p, const reference::Mask& mask, PriorKind prior,
                        Loss loss, const With& with, const Also& also = {}) {
  if (prior == PriorKind::sdpa) loss = Loss::of_out;
  const reference::Heads heads{p.sizes.query_heads, p.sizes.key_value_heads};
  const double bandwidth =
      1.25 * std::pow(static_cast<double>(std::max<Index>(p.sizes.head_dim, 1)), 0.25);
  const double scale = 1 / (bandwidth * bandwidth);

  const Matrix<High> q = p.queries.template cast<High>(), k = p.keys.template cast<High>(),
                     g = p.grad_projection.template cast<High>();
  const Matrix<High> log_prior = p.log_prior.template cast<High>();
  const auto prior_high = reference_prior<High>(prior, k, log_prior, High(bandwidth), heads);
  const auto prior_same =
      reference_prior<Scalar>(prior, p.keys, p.log_prior, Scalar(bandwidth), heads);
  auto exact = reference::project_forward<High>(q, k, High(bandwidth), prior_high, heads, mask);
  const auto exact_grad =
      surface_reference_backward<High>(prior, q, k, High(bandwidth), prior_high, heads, mask, g,
                                       grad_log_sum_exp<High>(p, loss, exact.log_sum_exp));
  auto plain = reference::project_forward<Scalar>(p.queries, p.keys, Scalar(bandwidth), prior_same,
                                                  heads, mask);
  const auto plain_grad = surface_reference_backward<Scalar>(
      prior, p.queries, p.keys, Scalar(bandwidth), prior_same, heads, mask, p.grad_projection,
      grad_log_sum_exp<Scalar>(p, loss, plain.log_sum_exp));

  if (prior == PriorKind::sdpa) {
    // Its log-sum-exp is that of the scores β·q·k.
    const auto beta = [&]<class S>(S) { return 1 / (S(bandwidth) * S(bandwidth)); };
    exact.log_sum_exp =
        reference::attention_forward<High>(q, k, k, beta(High()), heads, mask).log_sum_exp;
    plain.log_sum_exp =
        reference::attention_forward<Scalar>(p.queries, p.keys, p.keys, beta(Scalar()), heads, mask)
            .log_sum_exp;
  }

  WholeBounds whole(p, p.keys.cols());
  for (Index head = 0; head < heads.query; ++head) {
    auto one = exact_head<High>(doubles(p.queries), doubles(p.keys), doubles(p.keys),
                                doubles(p.grad_projection), exact, head, heads.query,
                                heads.key_value, scale);
    if (prior != PriorKind::sdpa) {
      one.query_bias = scale / 2 * one.queries.rowwise().squaredNorm();
      one.key_bias_magnitude = scale / 2 * one.keys.rowwise().squaredNorm();
    }
    one.has_query_norm = prior != PriorKind::sdpa;
    if (loss != Loss::of_out)
      one.grad_log_sum_exp = doubles(grad_log_sum_exp<High>(p, loss, exact.log_sum_exp)).col(head);
    if (prior == PriorKind::explicit_weights) {
      one.key_bias_magnitude +=
          doubles(p.log_prior).cwiseAbs().col(head / (heads.query / heads.key_value));
    }
    whole.add(ErrorModel<Scalar>(one).bounds(), head);
  }
  const SurfaceOptions options{
      .heads = p.heads, .bandwidth = bandwidth, .prior = library_prior(prior, p.log_prior)};
  with([&](const auto&... terms) {
    const ForwardCheck<Scalar, High> check{plain, exact, whole.sum};
    const auto fast = project_forward(p.queries, p.keys, options, terms...);
    check(fast);
    also(options, check, terms...);
    const auto grad = with_upstream(p, loss, p.grad_projection, [&](const auto& upstream) {
      return project_backward(p.queries, p.keys, fast, upstream, options, terms...);
    });
    check_error("grad queries", grad.queries, plain_grad.queries, exact_grad.queries,
                whole.sum.grad_queries);
    check_error("grad keys", grad.keys, plain_grad.keys, exact_grad.keys,
                whole.sum.grad_keys_of_surface);
    check_error("grad log prior", grad.log_prior, plain_grad.log_prior, exact_grad.log_prior,
                whole.sum.grad_key_bias);
    check_error("grad bandwidth", grad.bandwidth, plain_grad.bandwidth, exact_grad.bandwidth,
                2 * std::pow(scale, 1.5) * whole.sum.grad_scale);
  });
}

/// Sizes that straddle packets, panels, tiles and blocks, in random company, none of them too slow for the reference.
inline std::vector<Sizes> odd_sizes(std::mt19937_64& random, double most_products) {
  const std::vector<Index> odd = {0,  1,  2,  3,   7,   8,   9,   15,  16,  17,   31,   32,  33,
                                  63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025};
  const std::vector<std::pair<Index, Index>> heads = {{1, 1}, {1, 1}, {4, 2}, {3, 1}, {2, 2}};
  const auto pick = [&](const auto& from) { return from[random() % from.size()]; };
  std::vector<Sizes> result;
  for (const Index size : odd) {
    for (int place = 0; place < 4; ++place) {
      const auto [query_heads, key_value_heads] = pick(heads);
      const auto fits = [&](const Sizes& s) {
        return double(s.queries) * double(s.keys + 1) * double(s.head_dim + s.value_dim + 1) *
                   double(s.query_heads) <=
               most_products;
      };
      Sizes s;
      do {
        s = {pick(odd), pick(odd), pick(odd), pick(odd), query_heads, key_value_heads};
        (place == 0   ? s.queries
         : place == 1 ? s.keys
         : place == 2 ? s.head_dim
                      : s.value_dim) = size;
      } while (!fits(s));
      result.push_back(s);
    }
  }
  return result;
}

/// All odd sizes, each with another mask and prior, in both forms.
template <class Scalar, class High>
void check_odd_sizes(double most_products) {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Sizes& s : odd_sizes(random, most_products)) {
    Problem<Scalar> problem(s, random);
    // Most weights are then too small to be normal, or 0. The reference loses digits to such scores.
    if (turn % 4 == 3 && !std::is_same_v<Scalar, High>) problem.queries *= Scalar(24);
    const MaskKind mask = all_masks[turn % std::size(all_masks)];
    const PriorKind prior = PriorKind(turn / 2 % 3);
    const Loss loss = Loss(turn / 3 % 2);
    ++turn;
    CAPTURE(seed());
    INFO("queries " << s.queries << ", keys " << s.keys << ", widths " << s.head_dim << " and "
                    << s.value_dim << ", heads " << s.query_heads << " and " << s.key_value_heads
                    << ", mask " << int(mask) << ", prior " << int(prior) << ", loss "
                    << int(loss));
    const auto with = [&](const auto& use) {
      with_terms(mask, problem.queries.rows(), problem.keys.rows(), use);
    };
    const auto dense = dense_mask(mask, problem.queries.rows(), problem.keys.rows());
    check_standard_form<Scalar, High>(problem, dense, loss, with);
    check_surface_form<Scalar, High>(problem, dense, prior, loss, with);
  }
}

}  // namespace surfattn::test

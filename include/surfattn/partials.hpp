// surfattn layer 6: results over parts of the keys, merged into the result over all of them

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <ranges>
#include <string>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/types.hpp>
#include <type_traits>
#include <utility>
#include <vector>

/// Keys may be cut over calls, threads or machines: attention over each part gives (out,
/// log_sum_exp), and these merge into what attention over all keys gives, exactly but for rounding.
/// The order of the parts does not matter, and parts may themselves be merged ones. Terms count queries
/// and keys within the call of a part; a Sink, which stands beside all keys, belongs into one part alone.
namespace surfattn {
namespace detail {

/// Forward<Scalar> one after the other: a vector, an array or a span.
template <class Parts>
concept ForwardRange = std::ranges::forward_range<const Parts> && requires(const Parts& parts) {
  requires GradientPair<decltype(*std::ranges::begin(parts))>;
};

template <class Parts>
using part_scalar_t = scalar_t<decltype(std::ranges::begin(std::declval<const Parts&>())->out)>;

/// A result, or a gradient of one, of the shape of the parts. `name` says what it is; words are
/// made only where they are needed.
template <class Parts, class Name, class Out, class LogSumExp>
void require_like_parts(const Require& require, const Name& name, const Parts& parts,
                        const Out& out, const LogSumExp& log_sum_exp) {
  const auto& first = *std::ranges::begin(parts);
  if (extent(out) != extent(first.out)) {
    require.shape(name().append("out").c_str(), extent(out), extent(first.out),
                  "the shape of parts[0].out");
  }
  if (extent(log_sum_exp) != extent(first.log_sum_exp)) {
    require.shape(name().append("log_sum_exp").c_str(), extent(log_sum_exp),
                  extent(first.log_sum_exp), "the shape of parts[0].log_sum_exp");
  }
}

/// Results over parts of the keys, all of one shape: checked.
template <class Parts>
void require_parts(const Require& require, const Parts& parts) {
  if (std::ranges::empty(parts)) require.fail("there must be at least one part");
  const auto& first = *std::ranges::begin(parts);
  const Extent out = extent(first.out), log_sum_exp = extent(first.log_sum_exp);
  Index number = 0;
  for (const auto& part : parts) {
    const auto name = [&] { return "parts[" + std::to_string(number) + "]."; };
    require_like_parts(require, name, parts, part.out, part.log_sum_exp);
    ++number;
  }
  if (out.rows == log_sum_exp.rows && log_sum_exp.cols > 0 && out.cols % log_sum_exp.cols == 0)
    return;
  require.fail(
      "parts[0].out must have one row for each query and equally many columns for each "
      "head, but it is ",
      out, " and parts[0].log_sum_exp is ", log_sum_exp);
}

/// log Σ_p exp L_p of one query and head, −∞ where no part saw a key.
template <class Parts>
auto merged_log_sum_exp(const Parts& parts, Index query, Index head) {
  using Scalar = accumulator_t<part_scalar_t<Parts>>;
  Scalar maximum = -std::numeric_limits<Scalar>::infinity();
  for (const auto& part : parts) {
    const Scalar term = part.log_sum_exp(query, head);
    if (!(term <= maximum)) maximum = term;  // a NaN stays
    if (std::isnan(maximum)) return maximum;
  }
  if (std::isinf(maximum)) return maximum;
  Scalar sum(0);
  for (const auto& part : parts) sum += std::exp(part.log_sum_exp(query, head) - maximum);
  return maximum + std::log(sum);
}

/// exp(L_p − L), the share of a part in the whole; 0 where the part saw no key.
template <class Scalar>
Scalar share_of_part(Scalar part, Scalar whole) {
  return part == -std::numeric_limits<Scalar>::infinity() ? Scalar(0) : std::exp(part - whole);
}

/// Σ_p exp(L_p − L)·O_p of the columns [first, last) of one query, a few at a time.
template <class Parts, class Sum, class Out>
void merge_row(const Parts& parts, Index query, Index head, Index first, Index last, Sum whole,
               Out& out) {
  constexpr Index most = 128;
  Sum totals[most];
  for (; first < last; first += most) {
    const Index count = std::min(most, last - first);
    std::fill(totals, totals + count, Sum(0));
    for (const auto& part : parts) {
      const Sum share = share_of_part(Sum(part.log_sum_exp(query, head)), whole);
      if (share == Sum(0)) continue;
      for (Index c = 0; c < count; ++c) totals[c] += share * Sum(part.out(query, first + c));
    }
    for (Index c = 0; c < count; ++c) out(query, first + c) = static_cast<scalar_t<Out>>(totals[c]);
  }
}

/// The gradients of one part from those of the whole.
template <class Part, class Whole, class Scalar>
Forward<Scalar> part_gradient(const Part& part, const Whole& whole, const Matrix<Scalar>& grad_out,
                              const Matrix<accumulator_t<Scalar>>& grad_log_sum_exp) {
  using Sum = accumulator_t<Scalar>;
  const Index rows = grad_out.rows(), heads = grad_log_sum_exp.cols(),
              width = grad_out.cols() / heads;
  Forward<Scalar> gradient{Matrix<Scalar>::Zero(rows, grad_out.cols()),
                           Matrix<Sum>::Zero(rows, heads)};
  for (Index i = 0; i < rows; ++i) {
    for (Index head = 0; head < heads; ++head) {
      const Sum share =
          share_of_part(Sum(part.log_sum_exp(i, head)), Sum(whole.log_sum_exp(i, head)));
      if (share == Sum(0)) continue;
      Sum change(0);
      for (Index c = head * width; c < (head + 1) * width; ++c) {
        const Sum upstream(grad_out(i, c));
        gradient.out(i, c) = static_cast<Scalar>(share * upstream);
        change += upstream * (Sum(part.out(i, c)) - Sum(whole.out(i, c)));
      }
      gradient.log_sum_exp(i, head) = share * (change + grad_log_sum_exp(i, head));
    }
  }
  return gradient;
}

}  // namespace detail

/// The result over all keys from the results over parts of them, without allocating: for each query
/// and head,
///
///     L = log Σ_p exp L_p,   O = Σ_p exp(L_p − L)·O_p.
///
/// `parts` is a range of Forward<Scalar>, or of anything with matrices `out`, Tq × (H·dv), and
/// `log_sum_exp`, Tq × H; `out` and `log_sum_exp` are of their shapes and overlap none of them. A
/// part in which a query saw no key (−∞) counts for nothing, whatever its row holds; a query that
/// saw no key in any part gets 0 and −∞. Time O(parts·Tq·H·dv). Errors: no part, parts of different
/// shapes, outputs of the wrong shape. (Milakov and Gimelshein 2018, arXiv:1805.02867.)
template <detail::ForwardRange Parts, class Out, class LogSumExp>
void merge_partials_into(const Parts& parts, Out&& out, LogSumExp&& log_sum_exp) {
  using Scalar = detail::part_scalar_t<Parts>;
  detail::check_outputs_at_compile_time<Scalar, Out>();
  detail::check_writable_sums_at_compile_time<Scalar, LogSumExp>();
  using Sum = accumulator_t<Scalar>;
  constexpr detail::Require require("merge_partials");
  detail::require_parts(require, parts);
  detail::require_like_parts(
      require, [] { return std::string(); }, parts, out, log_sum_exp);
  const Index heads = log_sum_exp.cols(), width = out.cols() / heads;
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index head = 0; head < heads; ++head) {
      const Sum whole = detail::merged_log_sum_exp(parts, i, head);
      detail::merge_row(parts, i, head, head * width, (head + 1) * width, whole, out);
      log_sum_exp(i, head) = whole;
    }
  }
}

/// The same into new matrices.
template <detail::ForwardRange Parts>
auto merge_partials(const Parts& parts) {
  using Scalar = detail::part_scalar_t<Parts>;
  constexpr detail::Require require("merge_partials");
  detail::require_parts(require, parts);
  const auto& first = *std::ranges::begin(parts);
  Forward<Scalar> whole{
      Matrix<Scalar>(first.out.rows(), first.out.cols()),
      Matrix<accumulator_t<Scalar>>(first.log_sum_exp.rows(), first.log_sum_exp.cols())};
  merge_partials_into(parts, whole.out, whole.log_sum_exp);
  return whole;
}

/// The same for parts by name: merge_partials(past, present).
template <class Scalar, class... Others>
requires(std::is_same_v<Others, Forward<Scalar>>&&...) Forward<Scalar> merge_partials(
    const Forward<Scalar>& first, const Others&... others) {
  const ForwardGradients<Matrix<Scalar>, Matrix<accumulator_t<Scalar>>> parts[] = {
      {first.out, first.log_sum_exp}, {others.out, others.log_sum_exp}...};
  return merge_partials(parts);
}

/// Gradients of a loss with respect to both results of every part, given the gradient of the merged
/// result: ∂loss/∂out, or ForwardGradients. With w_p = exp(L_p − L),
///
///     dO_p = w_p·dO,   dL_p = w_p·(dO·(O_p − O) + dL),
///
/// and 0 for a part in which a query saw no key. `whole` is what merge_partials gave for these
/// parts. Returns one Forward for each part, which can be given in the place of grad_out to the
/// backward pass that belongs to the part. Allocates it. Errors as for merge_partials.
///
/// A shorter way, where the loss depends on the merged `out` alone, to the same gradients of
/// queries, keys and values: the backward pass over a part's keys with `whole` for `forward` and
/// the gradient of the merged result for `grad_out`. The gradients of the queries add up; that of a
/// bandwidth is not to be had so.
template <detail::ForwardRange Parts, class Whole, class Gradient>
auto merge_partials_backward(const Parts& parts, const Whole& whole, const Gradient& gradient) {
  using Scalar = detail::part_scalar_t<Parts>;
  constexpr detail::Require require("merge_partials_backward");
  detail::require_parts(require, parts);
  detail::require_like_parts(
      require, [] { return std::string("whole."); }, parts, whole.out, whole.log_sum_exp);
  const Matrix<Scalar> grad_out = detail::grad_out_of(gradient);
  Matrix<accumulator_t<Scalar>> grad_log_sum_exp = detail::grad_log_sum_exp_of(gradient);
  if constexpr (!detail::GradientPair<Gradient>)
    grad_log_sum_exp.setZero(whole.log_sum_exp.rows(), whole.log_sum_exp.cols());
  detail::require_like_parts(
      require, [] { return std::string("grad_out."); }, parts, grad_out, grad_log_sum_exp);
  std::vector<Forward<Scalar>> gradients;
  for (const auto& part : parts) {
    gradients.push_back(detail::part_gradient(part, whole, grad_out, grad_log_sum_exp));
  }
  return gradients;
}

}  // namespace surfattn

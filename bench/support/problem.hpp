// One problem of attention: its inputs, the ways to compute it, and the reference that judges their results.
#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <surfattn/reference.hpp>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "case.hpp"
#include "naive.hpp"
#include "timing.hpp"

namespace surfattn::bench {

// Which keys a query sees: `sees` for the reference, `hide` for naive code, `call` for the library. Positions are aligned at the
// bottom right.

struct NoMask {
  static constexpr const char* name = "none";
  bool sees(Index, Index, const Case&) const { return true; }
  template <class Scalar>
  void hide(Matrix<Scalar>&, const Case&) const {}
  template <class Call>
  void call(const Case&, const Call& call) const {
    call();
  }
};

/// A mask that lets each query see one run of keys.
template <class Range>
struct RunMask {
  bool sees(Index i, Index j, const Case& c) const {
    const KeyRange seen = Range::range(i, c);
    return seen.first <= j && j < seen.last;
  }
  template <class Scalar>
  void hide(Matrix<Scalar>& scores, const Case& c) const {
    for (Index i = 0; i < scores.rows(); ++i) {
      const KeyRange seen = Range::range(i, c);
      scores.row(i).head(seen.first).setConstant(-std::numeric_limits<Scalar>::infinity());
      scores.row(i)
          .tail(scores.cols() - seen.last)
          .setConstant(-std::numeric_limits<Scalar>::infinity());
    }
  }
};

struct CausalMask : RunMask<CausalMask> {
  static constexpr const char* name = "causal";
  static KeyRange range(Index i, const Case& c) { return {0, i + 1 + c.keys - c.queries}; }
  template <class Call>
  void call(const Case&, const Call& call) const {
    call(Causal{Align::bottom_right});
  }
};

/// The query's own position and the 255 before it.
struct WindowMask : RunMask<WindowMask> {
  static constexpr const char* name = "window";
  static KeyRange range(Index i, const Case& c) {
    const Index position = i + c.keys - c.queries;
    return {std::max<Index>(0, position - 255), position + 1};
  }
  template <class Call>
  void call(const Case&, const Call& call) const {
    call(SlidingWindow{.left = 255, .right = 0, .align = Align::bottom_right});
  }
};

/// A quarter of the keys is padding.
struct LengthMask : RunMask<LengthMask> {
  static constexpr const char* name = "lengths";
  static KeyRange range(Index, const Case& c) { return {0, c.keys - c.keys / 4}; }
  template <class Call>
  void call(const Case& c, const Call& call) const {
    call(KeyLengths{c.keys - c.keys / 4});
  }
};

/// Documents of 300 tokens, one after the other, that do not see each other: as a dense mask.
struct DocumentMask {
  static constexpr const char* name = "bool";
  using Dense = Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  mutable Dense dense;  // made for the shape at first use

  bool sees(Index i, Index j, const Case& c) const {
    return (i + c.keys - c.queries) / 300 == j / 300;
  }
  const Dense& matrix(const Case& c) const {
    if (dense.size() == 0) {
      dense =
          Dense::NullaryExpr(c.queries, c.keys, [&](Index i, Index j) { return sees(i, j, c); });
    }
    return dense;
  }
  template <class Scalar>
  void hide(Matrix<Scalar>& scores, const Case& c) const {
    scores = matrix(c).select(scores, -std::numeric_limits<Scalar>::infinity());
  }
  template <class Call>
  void call(const Case& c, const Call& call) const {
    call(BoolMask(matrix(c)));
  }
};

enum class Form { standard, surface, surface_sdpa };

inline const char* name_of(Form form) {
  return form == Form::standard  ? "standard"
         : form == Form::surface ? "surface"
                                 : "surface (sdpa prior)";
}

template <class Scalar>
struct Gradients {
  Matrix<Scalar> queries, keys, values;
  Matrix<accumulator_t<Scalar>> log_prior;
  accumulator_t<Scalar> bandwidth{};
};

/// The sequences lie one below the other.
template <class Scalar>
struct Data {
  Matrix<Scalar> queries, keys, values, grad_out;
  Forward<Scalar> forward;
  Gradients<Scalar> grad;
  std::vector<Matrix<Scalar>> weights;  // of naive code, for its backward pass
};

/// What is compared with the reference: few queries, all of them if there are no more than these.
inline std::vector<Index> sampled_rows(Index count) {
  std::vector<Index> rows{0,          1,         count / 3, count / 2, 2 * count / 3,
                          count - 17, count - 2, count - 1};
  if (count <= 20) {
    rows.clear();
    for (Index i = 0; i < count; ++i) rows.push_back(i);
  }
  return rows;
}

/// Throws unless |result − exact| ≤ 2·|plain − exact| + rounding in the largest entry, where `plain` is
/// the reference in the scalar's own precision, and numbers as large as `magnitude` cancel on the
/// way.
template <class Scalar, class Exact, class Plain>
void require_close(const std::string& what, const Matrix<Scalar>& result,
                   const Matrix<Exact>& exact, const Matrix<Plain>& plain, double magnitude = 0) {
  const auto largest = [](const auto& matrix) { return double(matrix.cwiseAbs().maxCoeff()); };
  const double error = largest((result.template cast<Exact>() - exact).eval());
  const double plain_error =
      largest((plain.template cast<Scalar>().template cast<Exact>() - exact).eval());
  const double rounding = 8 * double(Eigen::NumTraits<Scalar>::epsilon()) * largest(exact) +
                          8 * double(Eigen::NumTraits<Plain>::epsilon()) * magnitude;
  if (!(error <= 2 * plain_error + rounding)) {
    char words[120];
    std::snprintf(words, sizeof words,
                  " is wrong by %.3g, where plain code in the same precision is by %.3g", error,
                  plain_error);
    throw std::runtime_error(what + words);
  }
}

template <class Scalar, class Mask = NoMask>
class Problem : public std::enable_shared_from_this<Problem<Scalar, Mask>> {
 public:
  static std::shared_ptr<Problem> make(const Case& c) {
    return std::shared_ptr<Problem>(new Problem(c));
  }

  const Case& shape() const { return case_; }
  Data<Scalar>& data() { return data_; }

  /// The forward pass of the library, into the problem's outputs, judged before it is returned.
  Work forward(Form form, Executor* executor = nullptr) {
    return judged(form, Pass::forward, unjudged(form, Pass::forward, executor));
  }

  /// The backward pass, likewise, after one forward pass.
  Work backward(Form form, Executor* executor = nullptr) {
    unjudged(form, Pass::forward, executor)();
    return judged(form, Pass::backward, unjudged(form, Pass::backward, executor));
  }

  Work naive_forward() {
    return judged(Form::standard, Pass::forward, [self = this->shared_from_this()] {
      self->each_head([&](const Head& head) {
        self->block(head, self->data_.forward.out) = naive_attention(
            self->block(head, self->data_.queries), self->shared_block(head, self->data_.keys),
            self->shared_block(head, self->data_.values), self->hide());
      });
    });
  }

  /// The same, and the weights are kept for naive_backward.
  Work naive_forward_with_weights() {
    return judged(Form::standard, Pass::forward, [self = this->shared_from_this()] {
      self->each_head([&](const Head& head) {
        Matrix<Scalar>& weights = self->data_.weights[std::size_t(head.number)];
        weights = naive_weights(self->block(head, self->data_.queries),
                                self->shared_block(head, self->data_.keys), self->hide());
        self->block(head, self->data_.forward.out).noalias() =
            weights * self->shared_block(head, self->data_.values);
      });
    });
  }

  /// With as many key/value heads as query heads.
  Work naive_backward() {
    naive_forward_with_weights();
    return judged(Form::standard, Pass::backward, [self = this->shared_from_this()] {
      self->each_head([&](const Head& head) {
        const auto of = [&](auto& matrix) { return self->block(head, matrix); };
        const auto shared = [&](auto& matrix) { return self->shared_block(head, matrix); };
        Data<Scalar>& data = self->data_;
        bench::naive_backward(data.weights[std::size_t(head.number)], of(data.queries),
                              shared(data.keys), shared(data.values), of(data.forward.out),
                              of(data.grad_out), of(data.grad.queries), shared(data.grad.keys),
                              shared(data.grad.values));
      });
    });
  }

  /// `work` writes the outputs or the gradients of every sequence; throws if they are wrong.
  Work judged(Form form, Pass pass, Work work) {
    if (pass == Pass::forward) {
      work();
      judge_forward(form);
    } else {
      judge_backward(form, work);
    }
    return work;
  }

  /// Pairs of a query and a key that it sees, over all heads and sequences.
  double pairs() const {
    double pairs = 0;
    for (Index i = 0; i < case_.queries; ++i)
      for (Index j = 0; j < case_.keys; ++j) pairs += mask_.sees(i, j, case_);
    return pairs * double(case_.query_heads * case_.sequences);
  }

  double flops(Pass pass) const {
    return (pass == Pass::forward ? 4 : 10) * pairs() * double(case_.width);
  }

  /// Bytes of all inputs and outputs, each counted once.
  double bytes(Form form, Pass pass) const {
    const double of_queries = double(case_.queries * case_.query_heads * case_.width);
    const double of_keys = double(case_.keys * case_.key_value_heads * case_.width);
    const double keys_and_values = form == Form::standard ? 2 * of_keys : of_keys;
    const double numbers = pass == Pass::forward ? 2 * of_queries + keys_and_values
                                                 : 4 * of_queries + 2 * keys_and_values;
    return numbers * double(sizeof(Scalar)) * double(case_.sequences);
  }

 private:
  using Exact = std::conditional_t<(sizeof(Scalar) < 8), double, long double>;
  using Plain = std::conditional_t<(sizeof(Scalar) < 4), float, Scalar>;

  explicit Problem(const Case& c) : case_(c) {
    std::srand(1);
    const auto random = [](Index rows, Index cols) -> Matrix<Scalar> {
      return Matrix<float>::Random(rows, cols).template cast<Scalar>();
    };
    const Index query_cols = c.query_heads * c.width, key_cols = c.key_value_heads * c.width;
    const Index queries = c.sequences * c.queries, keys = c.sequences * c.keys;
    data_.queries = random(queries, query_cols);
    data_.keys = random(keys, key_cols);
    data_.values = random(keys, key_cols);
    data_.grad_out = random(queries, query_cols);
    data_.forward.out.setZero(queries, query_cols);
    data_.forward.log_sum_exp.setZero(queries, c.query_heads);
    data_.grad = {Matrix<Scalar>::Zero(queries, query_cols), Matrix<Scalar>::Zero(keys, key_cols),
                  Matrix<Scalar>::Zero(keys, key_cols),
                  Matrix<accumulator_t<Scalar>>::Zero(keys, c.key_value_heads)};
    data_.weights.resize(std::size_t(c.sequences * c.query_heads));
  }

  Heads heads() const { return {.query = case_.query_heads, .key_value = case_.key_value_heads}; }
  Sequences sequences() const { return Sequences::equal(case_.sequences); }

  auto hide() const {
    return [this](Matrix<Scalar>& scores) { mask_.hide(scores, case_); };
  }

  /// One query head of one sequence.
  struct Head {
    Index sequence, head, number;
  };

  template <class Call>
  void each_head(const Call& call) const {
    for (Index s = 0; s < case_.sequences; ++s)
      for (Index h = 0; h < case_.query_heads; ++h) call(Head{s, h, s * case_.query_heads + h});
  }

  auto block(const Head& head, Matrix<Scalar>& of_queries) const {
    return of_queries.block(head.sequence * case_.queries, head.head * case_.width, case_.queries,
                            case_.width);
  }

  /// Of keys or values, which query heads share.
  auto shared_block(const Head& head, Matrix<Scalar>& of_keys) const {
    const Index shared = head.head / (case_.query_heads / case_.key_value_heads);
    return of_keys.block(head.sequence * case_.keys, shared * case_.width, case_.keys, case_.width);
  }

  Work unjudged(Form form, Pass pass, Executor* executor) {
    return form == Form::standard ? standard(pass, executor) : surface(form, pass, executor);
  }

  Work standard(Pass pass, Executor* executor) {
    const Options options{.heads = heads(), .executor = executor, .sequences = sequences()};
    const auto workspace = std::make_shared<Workspace>(
        workspace_size(pass, data_.queries, data_.keys, data_.values, options));
    return [=, self = this->shared_from_this()] {
      Data<Scalar>& d = self->data_;
      self->mask_.call(self->case_, [&](const auto&... terms) {
        if (pass == Pass::forward) {
          attention_forward_into(d.queries, d.keys, d.values, d.forward.out, d.forward.log_sum_exp,
                                 *workspace, options, terms...);
        } else {
          attention_backward_into(d.queries, d.keys, d.values, d.forward.out, d.forward.log_sum_exp,
                                  d.grad_out, d.grad.queries, d.grad.keys, d.grad.values,
                                  *workspace, options, terms...);
        }
      });
    };
  }

  Work surface(Form form, Pass pass, Executor* executor) {
    const SurfaceOptions options{
        .heads = heads(),
        .executor = executor,
        .sequences = sequences(),
        .prior = form == Form::surface ? KeyPrior::uniform : KeyPrior::sdpa};
    const auto workspace =
        std::make_shared<Workspace>(workspace_size(pass, data_.queries, data_.keys, options));
    return [=, self = this->shared_from_this()] {
      Data<Scalar>& d = self->data_;
      self->mask_.call(self->case_, [&](const auto&... terms) {
        if (pass == Pass::forward) {
          project_forward_into(d.queries, d.keys, d.forward.out, d.forward.log_sum_exp, *workspace,
                               options, terms...);
        } else {
          project_backward_into(d.queries, d.keys, d.forward.out, d.forward.log_sum_exp, d.grad_out,
                                d.grad.queries, d.grad.keys, d.grad.bandwidth, d.grad.log_prior,
                                *workspace, options, terms...);
        }
      });
    };
  }

  /// The sampled queries of a sequence in the scalar of the reference.
  template <class S>
  struct Sample {
    Matrix<S> queries, keys, values, grad_out;
    reference::Mask mask;
    S scale, bandwidth;
    reference::Heads heads;
  };

  /// The sampled rows of a sequence, in the whole batch.
  std::vector<Index> rows_of(Index sequence) const {
    std::vector<Index> rows = sampled_rows(case_.queries);
    for (Index& row : rows) row += sequence * case_.queries;
    return rows;
  }

  Matrix<Scalar> keys_of(Index sequence, const Matrix<Scalar>& matrix) const {
    return matrix.middleRows(sequence * case_.keys, case_.keys);
  }

  template <class S>
  Sample<S> sample(Index sequence) const {
    const std::vector<Index> rows = sampled_rows(case_.queries), in_batch = rows_of(sequence);
    const auto mask = reference::Mask::NullaryExpr(
        Index(rows.size()), case_.keys,
        [&](Index i, Index j) { return mask_.sees(rows[std::size_t(i)], j, case_); });
    const S scale = 1 / std::sqrt(S(case_.width));
    return {data_.queries(in_batch, Eigen::all).template cast<S>(),
            keys_of(sequence, data_.keys).template cast<S>(),
            keys_of(sequence, data_.values).template cast<S>(),
            data_.grad_out(in_batch, Eigen::all).template cast<S>(),
            mask,
            scale,
            1 / std::sqrt(scale),
            {case_.query_heads, case_.key_value_heads}};
  }

  template <class S>
  static Matrix<S> reference_forward(Form form, const Sample<S>& s) {
    if (form == Form::standard) {
      return reference::attention_forward(s.queries, s.keys, s.values, s.scale, s.heads, s.mask)
          .out;
    }
    const Matrix<S> prior = form == Form::surface
                                ? Matrix<S>()
                                : reference::sdpa_log_prior(s.keys, s.bandwidth, s.heads);
    return reference::project_forward(s.queries, s.keys, s.bandwidth, prior, s.heads, s.mask).out;
  }

  template <class S>
  static Gradients<S> reference_backward(Form form, const Sample<S>& s) {
    if (form == Form::standard) {
      const auto grad = reference::attention_backward(s.queries, s.keys, s.values, s.scale, s.heads,
                                                      s.mask, s.grad_out);
      return {grad.queries, grad.keys, grad.values, {}};
    }
    const auto grad = form == Form::surface
                          ? reference::project_backward(s.queries, s.keys, s.bandwidth, {}, s.heads,
                                                        s.mask, s.grad_out)
                          : reference::project_backward_sdpa(s.queries, s.keys, s.bandwidth,
                                                             s.heads, s.mask, s.grad_out);
    return {grad.queries, grad.keys, {}, {}};
  }

  std::string described(const char* what, Form form) const {
    return std::string(case_.name) + " " + name_of(form) + ", mask " + Mask::name + ": " + what;
  }

  void judge_forward(Form form) const {
    for (Index sequence = 0; sequence < case_.sequences; ++sequence) {
      require_close(described("the output", form),
                    Matrix<Scalar>(data_.forward.out(rows_of(sequence), Eigen::all)),
                    reference_forward(form, sample<Exact>(sequence)),
                    reference_forward(form, sample<Plain>(sequence)));
    }
  }

  /// The upstream gradient of all but the sampled queries is set to 0 for one run: then they alone
  /// make up the gradients of keys and values.
  void judge_backward(Form form, const Work& work) {
    const Matrix<Scalar> whole = data_.grad_out;
    data_.grad_out.setZero();
    for (Index sequence = 0; sequence < case_.sequences; ++sequence)
      for (const Index row : rows_of(sequence)) data_.grad_out.row(row) = whole.row(row);
    work();
    for (Index sequence = 0; sequence < case_.sequences; ++sequence)
      judge_gradients(form, sequence);
    data_.grad_out = whole;
  }

  void judge_gradients(Form form, Index sequence) const {
    const auto exact = reference_backward(form, sample<Exact>(sequence));
    const auto plain = reference_backward(form, sample<Plain>(sequence));
    // dP − D cancels; inputs lie in [−1, 1]: β·|dP|·|q| ≤ β·d
    const double largest = std::sqrt(double(case_.width));
    require_close(described("the queries' gradient", form),
                  Matrix<Scalar>(data_.grad.queries(rows_of(sequence), Eigen::all)), exact.queries,
                  plain.queries, largest);
    require_close(described("the keys' gradient", form), keys_of(sequence, data_.grad.keys),
                  exact.keys, plain.keys, largest);
    if (form != Form::standard) return;
    require_close(described("the values' gradient", form), keys_of(sequence, data_.grad.values),
                  exact.values, plain.values, largest);
  }

  Case case_;
  Mask mask_;
  Data<Scalar> data_;
};

}  // namespace surfattn::bench

// Attention cases whose expected results were computed elsewhere, on every path of the library that
// can express them. The cases lie in the subfolder onnx of the folder that SURFATTN_GOLDEN_DIR
// names.

#include "support/golden.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <surfattn/reference.hpp>
#include <surfattn/surfattn.hpp>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/terms.hpp"

namespace {

using golden::Case;
using golden::infinity;
using golden::Layout;
using golden::Operand;
using golden::Problem;
using golden::ScoresMode;
using golden::Tensor;
using surfattn::Align;
using surfattn::Index;
using surfattn::Matrix;

// ---- What the library cannot express -----------------------------------------------------------

bool has_score_function(const Case& test) {
  return test.attributes.count("score_mod") + test.attributes.count("prob_mod") > 0;
}

struct MissingFeature {
  const char* reason;
  bool (*needed_by)(const Case&);
};

// A case runs unless one of these applies to its attributes and inputs.
constexpr std::array<MissingFeature, 1> missing_features{{
    {"scores changed by a graph that the text does not hold", has_score_function},
}};

std::vector<std::string> reasons_not_to_run(const Case& test) {
  std::vector<std::string> reasons;
  for (const MissingFeature& feature : missing_features) {
    if (feature.needed_by(test)) reasons.emplace_back(feature.reason);
  }
  return reasons;
}

// ---- Masks as terms ----------------------------------------------------------------------------

/// What to list as terms, and how many of the keys to pass.
struct Masking {
  Index keys = 0;
  std::optional<Align> causal;
  std::optional<Index> length;
  std::optional<Matrix<bool>> allowed;
  bool bias_hides = false;  ///< what the mask hides has a bias of -inf
};

Masking one_mask(const Problem& problem, Index batch, Index head) {
  return {problem.key_count(), std::nullopt, std::nullopt, problem.all_seen(batch, head), false};
}

/// With each mask as the term made for it; an additive one is a bias, its -inf included. A causal offset other than 0 is a bottom-right alignment
/// over the keys up to the last that the last query sees.
Masking named_terms(const Problem& problem, Index batch, Index head) {
  Masking masking{problem.key_count(), std::nullopt, std::nullopt, std::nullopt, false};
  if (problem.causal) {
    const Index seen_by_last = problem.query_count() + problem.causal_offset(batch);
    const bool top_left = problem.causal_offset(batch) == 0;
    if (!top_left && seen_by_last > problem.key_count()) return one_mask(problem, batch, head);
    masking.causal = top_left ? Align::top_left : Align::bottom_right;
    if (!top_left) masking.keys = seen_by_last;
  }
  if (problem.length(batch) < masking.keys) masking.length = problem.length(batch);
  masking.bias_hides = problem.has_bias();
  if (problem.mask && !masking.bias_hides)
    masking.allowed = problem.allowed_by_mask(batch, head).leftCols(masking.keys);
  return masking;
}

template <class Function>
auto with_masks(const Masking& masking, Function function) {
  const auto add_mask = [&](auto... terms) {
    return masking.allowed ? function(terms..., surfattn::BoolMask{*masking.allowed})
                           : function(terms...);
  };
  const auto add_length = [&](auto... terms) {
    return masking.length ? add_mask(terms..., surfattn::KeyLengths{*masking.length})
                          : add_mask(terms...);
  };
  return masking.causal ? add_length(surfattn::Causal{*masking.causal}) : add_length();
}

// ---- Calls -------------------------------------------------------------------------------------

template <class Scalar>
using View = Eigen::Map<const Matrix<Scalar>, Eigen::Unaligned, Eigen::OuterStride<>>;

template <class Scalar>
View<Scalar> view(const Matrix<Scalar>& matrix) {
  return {matrix.data(), matrix.rows(), matrix.cols(), Eigen::OuterStride<>(matrix.cols())};
}

template <class Scalar>
View<Scalar> top_rows(const View<Scalar>& matrix, Index rows) {
  return {matrix.data(), rows, matrix.cols(), Eigen::OuterStride<>(matrix.outerStride())};
}

/// Matrices that views point to; a deque keeps them where they are.
template <class Scalar>
class Keeper {
 public:
  View<Scalar> keep(Matrix<Scalar> matrix) {
    kept_.push_back(std::move(matrix));
    return view(kept_.back());
  }

 private:
  std::deque<Matrix<Scalar>> kept_;
};

/// A tensor's values as `Scalar`.
template <class Scalar>
struct Data {
  explicit Data(const Operand& operand)
      : values(operand.tensor.values.begin(), operand.tensor.values.end()),
        layout(operand.layout) {}

  View<Scalar> strided(Index batch, Index head, Index columns) const {
    return {values.data() + layout.offset(batch, head, 0, 0), layout.length, columns,
            Eigen::OuterStride<>(layout.row_stride)};
  }

  /// Consecutive heads side by side: in place where they lie so, otherwise gathered.
  View<Scalar> heads(Index batch, Index first, Index count, Keeper<Scalar>& keeper) const {
    const Index width = layout.width;
    if (count == 1 || layout.head_stride == width) return strided(batch, first, count * width);
    Matrix<Scalar> gathered(layout.length, count * width);
    for (Index head = 0; head < count; ++head) {
      gathered.middleCols(head * width, width) = strided(batch, first + head, width);
    }
    return keeper.keep(std::move(gathered));
  }

  std::vector<Scalar> values;
  Layout layout;
};

/// One call of the library: some query heads of one batch.
template <class Scalar>
struct Call {
  Index batch, first_head;
  View<Scalar> queries, keys, values;
  surfattn::Options options;
  Masking masking;
  Matrix<Scalar> bias = {};  ///< queries x heads·keys, or nothing
  double cap = 0;            ///< 0 is none
};

/// The masks of a call as terms of their own types, where they are all that there is; otherwise
/// terms chosen at run time.
template <class Scalar, class Function>
auto with_terms(const Call<Scalar>& call, Function function) {
  const bool has_bias = call.bias.cols() > 0;
  if (!has_bias && call.cap == 0) return with_masks(call.masking, function);
  using Term = surfattn::test::AnyTerm<Scalar>;
  Term causal, length, allowed, bias, cap;
  if (call.masking.causal) causal = {surfattn::Causal{*call.masking.causal}};
  if (call.masking.length) length = {surfattn::KeyLengths{*call.masking.length}};
  if (call.masking.allowed) allowed = {surfattn::BoolMask{*call.masking.allowed}};
  if (has_bias) bias = {surfattn::AdditiveBias{call.bias}};
  if (call.cap != 0) cap = {surfattn::SoftCap{call.cap}};
  return function(causal, length, allowed, bias, cap);
}

/// Head for head, the columns of `left` followed by those of `right`.
template <class Scalar>
Matrix<Scalar> join_heads(const View<Scalar>& left, const Matrix<Scalar>& right, Index heads) {
  const Index left_width = left.cols() / heads;
  const Index right_width = right.cols() / heads;
  Matrix<Scalar> joined(left.rows(), left.cols() + right.cols());
  if (joined.rows() == 0) return joined;
  for (Index head = 0; head < heads; ++head) {
    const Index first = head * (left_width + right_width);
    joined.middleCols(first, left_width) = left.middleCols(head * left_width, left_width);
    joined.middleCols(first + left_width, right_width) =
        right.middleCols(head * right_width, right_width);
  }
  return joined;
}

/// The bias of every score of a call, head by head.
template <class Scalar>
Matrix<Scalar> call_bias(const Problem& problem, const Call<Scalar>& call) {
  const Index keys = call.keys.rows();
  if (!problem.has_bias()) return {};
  return Matrix<Scalar>::NullaryExpr(
      call.queries.rows(), call.options.heads.query * keys, [&](Index query, Index column) {
        const Index head = call.first_head + column / keys;
        const bool hidden =
            call.masking.bias_hides && !problem.mask_allows(call.batch, head, query, column % keys);
        return static_cast<Scalar>(hidden ? -infinity
                                          : problem.bias(call.batch, head, query, column % keys));
      });
}

template <class Scalar>
struct Inputs {
  explicit Inputs(const Problem& problem)
      : queries(problem.queries), keys(problem.keys), values(problem.values) {}
  Data<Scalar> queries, keys, values;
};

using MaskingOf = Masking (*)(const Problem&, Index batch, Index head);

/// Calls `function` for each call that the case takes: one for each query head of each batch, or
/// one for all the heads of a batch.
template <class Scalar, class Function>
void for_each_call(const Problem& problem, MaskingOf masking_of, bool heads_together,
                   Function function) {
  const Inputs<Scalar> inputs(problem);
  const Index count = heads_together ? problem.query_heads() : 1;
  const Index key_count = heads_together ? problem.keys.layout.heads : 1;
  for (Index batch = 0; batch < problem.queries.layout.batches; ++batch) {
    for (Index head = 0; head < problem.query_heads(); head += count) {
      Keeper<Scalar> keeper;
      const Index key_head = head / problem.group();
      const Masking masking = masking_of(problem, batch, head);
      const auto keys = inputs.keys.heads(batch, key_head, key_count, keeper);
      const auto values = inputs.values.heads(batch, key_head, key_count, keeper);
      Call<Scalar> call{batch,
                        head,
                        inputs.queries.heads(batch, head, count, keeper),
                        top_rows(keys, masking.keys),
                        top_rows(values, masking.keys),
                        {.scale = problem.scale, .heads = {count, key_count}},
                        masking};
      call.bias = call_bias(problem, call);
      call.cap = problem.cap;
      function(call);
    }
  }
}

// ---- Forms of the library ----------------------------------------------------------------------

struct FastAttention {
  static constexpr const char* name = "attention";
  template <class Scalar>
  static surfattn::Forward<Scalar> run(const Call<Scalar>& call) {
    return with_terms(call, [&](auto... terms) {
      return surfattn::attention_forward(call.queries, call.keys, call.values, call.options,
                                         terms...);
    });
  }
};

namespace reference = surfattn::reference;

/// The reference takes masks in one piece.
template <class Scalar>
reference::Terms<Scalar> reference_terms(const Call<Scalar>& call) {
  if (call.masking.causal || call.masking.length) {
    throw std::logic_error("the reference takes masks in one piece");
  }
  reference::Terms<Scalar> terms;
  if (call.masking.allowed) terms.mask = *call.masking.allowed;
  if (call.bias.cols() > 0) {
    terms.biases.push_back(reference::dense_bias<Scalar>(call.bias, call.options.heads.query,
                                                         call.queries.rows(), call.keys.rows()));
  }
  if (call.cap != 0) terms.modifiers.push_back(reference::soft_cap<Scalar>(Scalar(call.cap)));
  return terms;
}

template <class Scalar>
reference::Heads reference_heads(const Call<Scalar>& call) {
  return {call.options.heads.query, *call.options.heads.key_value};
}

struct ReferenceAttention {
  static constexpr const char* name = "reference";
  template <class Scalar>
  static auto run(const Call<Scalar>& call) {
    return reference::attention_forward<Scalar>(call.queries, call.keys, call.values,
                                                static_cast<Scalar>(*call.options.scale),
                                                reference_heads(call), reference_terms(call));
  }
};

struct FastProjection {
  template <class Scalar>
  static Matrix<Scalar> run(const View<Scalar>& queries, const View<Scalar>& keys,
                            const Call<Scalar>& call) {
    surfattn::SurfaceOptions options;
    options.scale = call.options.scale;
    options.heads = call.options.heads;
    options.prior = surfattn::KeyPrior::sdpa;
    return with_terms(
        call, [&](auto... terms) { return surfattn::project(queries, keys, options, terms...); });
  }
};

struct ReferenceProjection {
  /// The score of the surface form lacks −β‖q‖²/2 to be the dot product that is capped, and the
  /// softmax does not mind that it gets it back.
  template <class Scalar>
  static reference::ScoreModifier<Scalar> cap_of_dot_products(const Call<Scalar>& call,
                                                              const View<Scalar>& queries) {
    const Index heads = call.options.heads.query, width = queries.cols() / heads;
    const Matrix<Scalar> q = queries;
    const auto half_scale = static_cast<Scalar>(*call.options.scale / 2);
    const auto cap = reference::soft_cap<Scalar>(Scalar(call.cap)).value;
    return {[=](const Scalar& score, Index h, Index i, Index j) {
              const Scalar norm = q.row(i).segment(h * width, width).squaredNorm();
              return cap(score + half_scale * norm, h, i, j);
            },
            {}};
  }

  template <class Scalar>
  static Matrix<Scalar> run(const View<Scalar>& queries, const View<Scalar>& keys,
                            const Call<Scalar>& call) {
    const auto bandwidth = static_cast<Scalar>(1 / std::sqrt(*call.options.scale));
    const Matrix<Scalar> surface = keys;
    const auto prior = reference::sdpa_log_prior(surface, bandwidth, reference_heads(call));
    auto terms = reference_terms(call);
    if (call.cap != 0) terms.modifiers = {cap_of_dot_products(call, queries)};
    return reference::project_forward<Scalar>(queries, surface, bandwidth, prior,
                                              reference_heads(call), terms)
        .out;
  }
};

/// The surface sampled by [k_j, v_j]: the prior `sdpa` makes the weights of [q_i, 0] those of
/// attention, so the projection is [Σ_j w_ij k_j, attention], for any values that are finite.
template <class Projection, class Scalar>
Matrix<Scalar> attention_by_projection(const Call<Scalar>& call) {
  const Index heads = call.options.heads.query;
  const Index key_heads = *call.options.heads.key_value;
  const Index width = call.keys.cols() / key_heads;
  const Index value_width = call.values.cols() / key_heads;
  const Matrix<Scalar> zero = Matrix<Scalar>::Zero(call.queries.rows(), heads * value_width);
  const Matrix<Scalar> queries = join_heads(call.queries, zero, heads);
  const Matrix<Scalar> keys = join_heads(call.keys, Matrix<Scalar>(call.values), key_heads);
  const Matrix<Scalar> projected = Projection::run(view(queries), view(keys), call);
  Matrix<Scalar> result(call.queries.rows(), heads * value_width);
  for (Index head = 0; head < heads; ++head) {
    result.middleCols(head * value_width, value_width) =
        projected.middleCols(head * (width + value_width) + width, value_width);
  }
  return result;
}

/// Past and new keys in a call each, which are merged: no past is copied.
template <class Scalar>
Matrix<Scalar> attention_by_parts(const Call<Scalar>& call, Index past) {
  const auto part = [&](Index first, Index count) {
    const Matrix<Scalar> keys = call.keys.middleRows(first, count);
    const Matrix<Scalar> values = call.values.middleRows(first, count);
    Masking masking = call.masking;
    masking.allowed = call.masking.allowed->middleCols(first, count).eval();
    Matrix<Scalar> bias;  // one head at a time
    if (call.bias.cols() > 0) bias = call.bias.middleCols(first, count);
    const Call<Scalar> of_part{call.batch,   call.first_head, call.queries, view(keys),
                               view(values), call.options,    masking,      bias,
                               call.cap};
    return FastAttention::run(of_part);
  };
  return surfattn::merge_partials(part(0, past), part(past, call.keys.rows() - past)).out;
}

/// The rows of all batches one after the other, heads side by side.
template <class Scalar>
Matrix<Scalar> packed_rows(const Data<Scalar>& data) {
  const Layout& layout = data.layout;
  Matrix<Scalar> rows(layout.batches * layout.length, layout.heads * layout.width);
  for (Index batch = 0; batch < layout.batches; ++batch) {
    Keeper<Scalar> keeper;
    rows.middleRows(batch * layout.length, layout.length) =
        data.heads(batch, 0, layout.heads, keeper);
  }
  return rows;
}

/// All batches in one call, under a mask (batch, heads, queries, keys).
template <class Scalar>
Matrix<Scalar> attention_in_one_call(const Problem& problem) {
  const Inputs<Scalar> inputs(problem);
  const Index batches = problem.queries.layout.batches, heads = problem.query_heads(),
              queries = problem.query_count();
  Matrix<bool> seen(batches * heads * queries, problem.key_count());
  for (Index row = 0; row < seen.rows(); ++row) {
    for (Index key = 0; key < seen.cols(); ++key) {
      seen(row, key) =
          problem.sees(row / (heads * queries), row / queries % heads, row % queries, key);
    }
  }
  const Matrix<Scalar> q = packed_rows(inputs.queries), k = packed_rows(inputs.keys),
                       v = packed_rows(inputs.values);
  return surfattn::attention(q, k, v,
                             {.scale = problem.scale,
                              .heads = {heads, problem.keys.layout.heads},
                              .sequences = surfattn::Sequences::equal(batches)},
                             surfattn::BoolMask{seen});
}

// ---- Comparison --------------------------------------------------------------------------------

/// Compares numbers with |a − b| ≤ tolerance·max(1, |b|); equal infinities and two nan agree.
class Comparison {
 public:
  Comparison(std::string path, double tolerance) : path_(std::move(path)), tolerance_(tolerance) {}

  void add(double actual, double expected, const std::vector<Index>& position) {
    ++compared_;
    if (actual == expected || (std::isnan(actual) && std::isnan(expected))) return;
    const double error = std::abs(actual - expected) / std::max(1.0, std::abs(expected));
    worst_ = std::max(worst_, std::isnan(error) ? infinity : error);
    if (!(error <= tolerance_) && failure_.empty()) describe(actual, expected, position);
  }

  const std::string& path() const { return path_; }
  Index compared() const { return compared_; }
  double worst() const { return worst_; }
  const std::string& failure() const { return failure_; }

 private:
  void describe(double actual, double expected, const std::vector<Index>& position) {
    std::ostringstream text;
    text.precision(9);
    text << path_ << " at (";
    const char* separator = "";
    for (const Index index : position) {
      text << separator << index;
      separator = ", ";
    }
    text << "): " << actual << " instead of " << expected;
    failure_ = text.str();
  }

  std::string path_;
  double tolerance_;
  Index compared_ = 0;
  double worst_ = 0;
  std::string failure_;
};

/// A comparison and how many numbers it has to cover.
struct Outcome {
  Comparison comparison;
  Index required;
};

/// Expected numbers of half precision were computed in it: one unit in the last place of 1 covers
/// their own rounding and that of the intermediate results. The paths run on exactly the inputs
/// given.
double tolerance_for(const Tensor& expected) {
  if (expected.type == "f16") return 1.0 / 1024;
  if (expected.type == "bf16") return 1.0 / 128;
  return 1e-6;
}

/// Compares a call's result, tokens by heads side by side, with the heads of a tensor.
template <class Scalar>
void compare_heads(const Matrix<Scalar>& actual, const Call<Scalar>& call, const Operand& expected,
                   Comparison& comparison) {
  const Index width = expected.layout.width;
  golden::require(
      actual.rows() == expected.layout.length && actual.cols() == call.options.heads.query * width,
      comparison.path() + ": the result has a wrong shape");
  for (Index token = 0; token < actual.rows(); ++token) {
    for (Index column = 0; column < actual.cols(); ++column) {
      const Index head = call.first_head + column / width;
      comparison.add(static_cast<double>(actual(token, column)),
                     expected.at(call.batch, head, token, column % width),
                     {call.batch, head, token, column % width});
    }
  }
}

template <class Scalar>
std::string scalar_name() {
  return std::is_same_v<Scalar, float> ? "float" : "double";
}

// ---- The paths of a case -----------------------------------------------------------------------

/// The operator's result by one way of calling the library.
template <class Scalar, class Run>
Comparison compare_result(const Problem& problem, const std::string& path, MaskingOf masking_of,
                          bool heads_together, Run run) {
  Comparison comparison(path + ", " + scalar_name<Scalar>(), tolerance_for(problem.result.tensor));
  for_each_call<Scalar>(problem, masking_of, heads_together, [&](const Call<Scalar>& call) {
    compare_heads<Scalar>(run(call), call, problem.result, comparison);
  });
  return comparison;
}

/// The operator's result by one call for all batches, where masks are all that it needs.
template <class Scalar>
Comparison compare_batch(const Problem& problem) {
  Comparison comparison("attention, one call for all batches, " + scalar_name<Scalar>(),
                        tolerance_for(problem.result.tensor));
  const Matrix<Scalar> all = attention_in_one_call<Scalar>(problem);
  for (Index batch = 0; batch < problem.queries.layout.batches; ++batch) {
    const Matrix<Scalar> one = all.middleRows(batch * problem.query_count(), problem.query_count());
    Call<Scalar> call{batch, 0, view(one), view(one), view(one), {}, {}};
    call.options.heads = {problem.query_heads(), problem.keys.layout.heads};
    compare_heads<Scalar>(one, call, problem.result, comparison);
  }
  return comparison;
}

/// Equivalence of the forms on the keys themselves: project(Q, K) with the prior `sdpa` is
/// attention(Q, K, K).
template <class Scalar>
Outcome compare_forms(const Problem& problem, bool heads_together) {
  const double tolerance = std::is_same_v<Scalar, float> ? 1e-6 : 1e-14;
  Outcome outcome{{"project(Q, K) is attention(Q, K, K), " + scalar_name<Scalar>(), tolerance}, 0};
  for_each_call<Scalar>(problem, named_terms, heads_together, [&](const Call<Scalar>& call) {
    const Call<Scalar> keys_as_values{call.batch,   call.first_head, call.queries,
                                      call.keys,    call.keys,       call.options,
                                      call.masking, call.bias,       call.cap};
    const Matrix<Scalar> projected = FastProjection::run(call.queries, call.keys, call);
    const Matrix<Scalar> attended = FastAttention::run(keys_as_values).out;
    golden::require(projected.rows() == attended.rows() && projected.cols() == attended.cols(),
                    outcome.comparison.path() + ": the shapes differ");
    outcome.required += call.queries.size();
    for (Index row = 0; row < projected.rows(); ++row)
      for (Index column = 0; column < projected.cols(); ++column)
        outcome.comparison.add(static_cast<double>(projected(row, column)),
                               static_cast<double>(attended(row, column)),
                               {call.batch, row, column});
  });
  return outcome;
}

/// By inspection, where the library itself is asked.
surfattn::Stage stage_of(ScoresMode mode) {
  if (mode == ScoresMode::weights) return surfattn::Stage::normalised;
  return mode == ScoresMode::masked ? surfattn::Stage::masked : surfattn::Stage::raw;
}

template <class Scalar>
Matrix<Scalar> inspected_scores(const Call<Scalar>& call, ScoresMode mode) {
  return with_terms(call, [&](auto... terms) {
    return surfattn::attention_scores(call.queries, call.keys, {.stage = stage_of(mode)},
                                      call.options, terms...);
  });
}

/// The weights are what attention makes of unit vectors as values.
template <class Form, class Scalar>
Matrix<Scalar> weights(const Call<Scalar>& call) {
  const Matrix<Scalar> units = Matrix<Scalar>::Identity(call.keys.rows(), call.keys.rows());
  const Call<Scalar> of_units{call.batch,   call.first_head, call.queries, call.keys, view(units),
                              call.options, call.masking,    call.bias,    call.cap};
  return Form::run(of_units).out;
}

/// The score of a key is the log-sum-exp of attention to that key alone.
template <class Form, class Scalar>
Matrix<Scalar> scores(const Call<Scalar>& call) {
  Matrix<Scalar> all(call.queries.rows(), call.keys.rows());
  for (Index key = 0; key < call.keys.rows(); ++key) {
    const Matrix<Scalar> one_key = call.keys.row(key);
    Masking masking{1, std::nullopt, std::nullopt, std::nullopt, call.masking.bias_hides};
    if (call.masking.allowed) masking.allowed = call.masking.allowed->col(key);
    const Matrix<Scalar> bias = call.bias.cols() > 0 ? call.bias.col(key) : Matrix<Scalar>();
    const Call<Scalar> of_one_key{call.batch,    call.first_head, call.queries,
                                  view(one_key), view(one_key),   call.options,
                                  masking,       view(bias),      call.cap};
    all.col(key) = Form::run(of_one_key).log_sum_exp;
  }
  return all;
}

Masking no_mask(const Problem& problem, Index, Index) {
  return {problem.key_count(), std::nullopt, std::nullopt, std::nullopt, false};
}

/// The operator's fourth output.
template <class Form, class Scalar>
Comparison compare_scores(const Problem& problem, const Tensor& expected, ScoresMode mode) {
  const Operand expected_scores = golden::operand(expected, problem.query_heads());
  golden::require_extents(expected_scores, problem.key_count(), problem);
  const bool masked = mode == ScoresMode::masked || mode == ScoresMode::weights;
  Problem raw = problem;
  if (!masked) raw.mask = nullptr;
  if (mode == ScoresMode::raw) raw.cap = 0;
  const char* what = mode == ScoresMode::weights ? "weights from " : "scores from ";
  Comparison comparison(what + std::string(Form::name) + ", " + scalar_name<Scalar>(),
                        tolerance_for(expected));
  for_each_call<Scalar>(raw, masked ? one_mask : no_mask, false, [&](const Call<Scalar>& call) {
    const auto one_by_one = [&] {
      return mode == ScoresMode::weights ? weights<Form>(call) : scores<Form>(call);
    };
    if constexpr (std::is_same_v<Form, FastAttention>) {
      compare_heads<Scalar>(inspected_scores(call, mode), call, expected_scores, comparison);
    } else {
      compare_heads<Scalar>(one_by_one(), call, expected_scores, comparison);
    }
  });
  return comparison;
}

Comparison compare_present(const Operand& actual, const Tensor& expected) {
  Comparison comparison("past and new tokens", 0);
  const std::size_t size = std::min(actual.tensor.values.size(), expected.values.size());
  for (std::size_t i = 0; i < size; ++i) {
    comparison.add(actual.tensor.values[i], expected.values[i], {static_cast<Index>(i)});
  }
  return comparison;
}

Index size_of(const Tensor& tensor) { return static_cast<Index>(tensor.values.size()); }

bool all_finite(const Tensor& tensor) {
  return std::all_of(tensor.values.begin(), tensor.values.end(),
                     [](double value) { return std::isfinite(value); });
}

/// Whether the surface form has an equivalent: β = 1/σ² is positive, and 0·v_j vanishes.
bool can_project(const Problem& problem) {
  return problem.scale > 0 && all_finite(problem.values.tensor);
}

template <class Scalar>
void run_result(const Problem& problem, std::vector<Outcome>& outcomes) {
  const auto fast = [](const auto& call) { return FastAttention::run(call).out; };
  const auto plain = [](const auto& call) { return ReferenceAttention::run(call).out; };
  const auto surface = [](const auto& call) {
    return attention_by_projection<FastProjection>(call);
  };
  const auto plain_surface = [](const auto& call) {
    return attention_by_projection<ReferenceProjection>(call);
  };
  const bool together = problem.heads_share_mask();
  const Index required = size_of(problem.result.tensor);
  const auto add = [&](const char* path, MaskingOf masking_of, bool heads_together, auto run) {
    outcomes.push_back(
        {compare_result<Scalar>(problem, path, masking_of, heads_together, run), required});
  };
  add("attention, terms", named_terms, together, fast);
  add("attention, one mask for each head", one_mask, false, fast);
  add("reference attention", one_mask, together, plain);
  if (problem.past) {
    add("attention, past and new keys merged", one_mask, false,
        [&](const auto& call) { return attention_by_parts(call, *problem.past); });
  }
  if (!problem.has_bias() && problem.cap == 0)
    outcomes.push_back({compare_batch<Scalar>(problem), required});
  if (!can_project(problem)) return;
  add("project on [K, V], terms", named_terms, together, surface);
  outcomes.push_back(compare_forms<Scalar>(problem, together));
  add("reference project on [K, V]", one_mask, together, plain_surface);
}

template <class Scalar>
void run_scores(const Problem& problem, const Case& test, std::vector<Outcome>& outcomes) {
  const Tensor* expected = golden::find(test.outputs, golden::scores_out);
  if (!expected) return;
  const ScoresMode mode = golden::scores_mode(test);
  outcomes.push_back(
      {compare_scores<FastAttention, Scalar>(problem, *expected, mode), size_of(*expected)});
  outcomes.push_back(
      {compare_scores<ReferenceAttention, Scalar>(problem, *expected, mode), size_of(*expected)});
}

/// Every output of a case on every path that can express it.
std::vector<Outcome> run(const Case& test) {
  const Problem problem = golden::read_problem(test);
  std::vector<Outcome> outcomes;
  run_result<float>(problem, outcomes);
  run_result<double>(problem, outcomes);
  run_scores<float>(problem, test, outcomes);
  run_scores<double>(problem, test, outcomes);
  const Tensor* keys = golden::find(test.outputs, golden::present_key_out);
  const Tensor* values = golden::find(test.outputs, golden::present_value_out);
  if (keys) outcomes.push_back({compare_present(problem.keys, *keys), size_of(*keys)});
  if (values) outcomes.push_back({compare_present(problem.values, *values), size_of(*values)});
  return outcomes;
}

// ---- Summary -----------------------------------------------------------------------------------

class Summary {
 public:
  void ran(const Case& test, const std::vector<Outcome>& outcomes) {
    ++ran_;
    const Problem problem = golden::read_problem(test);
    biased_ += problem.has_bias() ? 1 : 0;
    capped_ += problem.cap != 0 ? 1 : 0;
    half_ += problem.result.tensor.type == "f16" || problem.result.tensor.type == "bf16" ? 1 : 0;
    for (const Outcome& outcome : outcomes) {
      Line& line = paths_[(problem.result.tensor.type) + ": " + outcome.comparison.path()];
      ++line.cases;
      line.worst = std::max(line.worst, outcome.comparison.worst());
    }
  }

  void not_expressible(const Case& test, const std::vector<std::string>& reasons) {
    ++not_expressible_;
    for (const std::string& reason : reasons) reasons_[reason].push_back(test.name);
  }

  Index counted() const { return ran_ + not_expressible_; }
  Index count_ran() const { return ran_; }

  std::string text() const {
    std::ostringstream text;
    text.precision(2);
    text << "golden cases: " << ran_ << " ran, " << not_expressible_ << " not expressible\n"
         << biased_ << " ran with an additive bias, " << capped_ << " with a soft cap\n"
         << half_ << " in half precision ran in float and double\n";
    for (const auto& [reason, names] : reasons_) {
      text << "not expressible, " << reason << ": " << names.size() << "\n";
      for (const std::string& name : names) text << "    " << name << "\n";
    }
    text << "cases and worst error of each path:\n";
    for (const auto& [path, line] : paths_) {
      text << "    " << path << ": " << line.cases << ", " << line.worst << "\n";
    }
    return text.str();
  }

 private:
  struct Line {
    Index cases = 0;
    double worst = 0;
  };
  Index ran_ = 0, not_expressible_ = 0, biased_ = 0, capped_ = 0, half_ = 0;
  std::map<std::string, std::vector<std::string>> reasons_;
  std::map<std::string, Line> paths_;
};

void check_outcomes(const std::vector<Outcome>& outcomes) {
  for (const Outcome& outcome : outcomes) {
    INFO(outcome.comparison.path());
    CHECK(outcome.comparison.failure() == "");
    CHECK(outcome.comparison.compared() == outcome.required);
  }
}

void check(const Case& test, Summary& summary) {
  golden::require_known(test);
  const std::vector<std::string> reasons = reasons_not_to_run(test);
  if (!reasons.empty()) return summary.not_expressible(test, reasons);
  const std::vector<Outcome> outcomes = run(test);
  CHECK_FALSE(outcomes.empty());
  check_outcomes(outcomes);
  summary.ran(test, outcomes);
}

// ---- Texts for the tests of the parser and of the paths ----------------------------------------

Case parse_text(const std::string& text) {
  std::istringstream stream(text);
  return golden::parse(stream, "text");
}

// Two keys that a query meets with equal scores; `extra` holds further lines, `result` the mean of
// the values 1 and 4 unless a line of `extra` changes it.
std::string two_keys(const std::string& extra, const std::string& result) {
  return "case two_keys\nop Attention\nopset 23\n" + extra +
         "input 0 Q f32 1 1 1 2\n1 2\ninput 1 K f32 1 1 2 2\n3 4 3 4\n"
         "input 2 V f32 1 1 2 1\n1 4\noutput 0 Y f32 1 1 1 1\n" +
         result + "\n";
}

// For cases with positive scale and finite values, whose only output is the result.
void check_all_paths(const std::string& text) {
  INFO(text);
  const std::vector<Outcome> outcomes = run(parse_text(text));
  const Case test = parse_text(text);
  const Problem problem = golden::read_problem(test);
  const std::size_t of_batch = problem.has_bias() || problem.cap != 0 ? 0 : 2,
                    of_parts = problem.past ? 2 : 0;
  CHECK(outcomes.size() == 12 + of_batch + of_parts);
  check_outcomes(outcomes);
}

std::string parse_error(const std::string& text) {
  try {
    parse_text(text);
  } catch (const golden::ParseError& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("golden: the parser reads tensors, attributes and absent slots") {
  const Case test = parse_text(
      "case small\nop Attention\nopset 24\nattribute scale 0.5\nattribute list 1 2 3\n"
      "input 0 Q f32 2 3\n0.1 -2 inf -inf nan 1e-3\ninput 1 - absent\ninput 2 M bool 2\n1 0\n"
      "input 3 N i64 1\n-7\ninput 4 H f16\n0.1\ninput 5 E f32 0 4\n\noutput 0 Y f64 1\n0.1\n");
  CHECK(test.name == "small");
  CHECK(test.opset == 24);
  CHECK(test.attributes.at("scale") == "0.5");
  CHECK(test.attributes.at("list") == "1 2 3");
  CHECK(test.inputs.count(1) == 0);
  const Tensor& queries = test.inputs.at(0);
  CHECK(queries.shape == std::vector<Index>{2, 3});
  CHECK(queries.values[0] == static_cast<double>(0.1f));
  CHECK(queries.values[2] == infinity);
  CHECK(queries.values[3] == -infinity);
  CHECK(std::isnan(queries.values[4]));
  CHECK(test.inputs.at(2).values == std::vector<double>{1, 0});
  CHECK(test.inputs.at(3).values == std::vector<double>{-7});
  CHECK(test.inputs.at(4).values == std::vector<double>{0.0999755859375});
  CHECK(test.inputs.at(5).values.empty());
  CHECK(test.outputs.at(0).values == std::vector<double>{0.1});
}

TEST_CASE("golden: the parser says what is wrong and where") {
  const std::string head = "case small\nop Attention\n";
  const std::map<std::string, std::string> texts{
      {"", "text:0: there is no line 'case NAME'"},
      {"case small\n", "text:1: there is no line 'op NAME'"},
      {head + "case again\n", "text:3: 'case' is given twice"},
      {head + "opset\n", "text:3: 'opset' takes exactly one value"},
      {head + "opset new\n", "text:3: the opset must be a whole number, not 'new'"},
      {head + "inputs 0 Q f32 1\n1\n", "text:3: unknown keyword 'inputs'"},
      {head + "attribute scale\n", "text:3: an attribute needs a name and a value"},
      {head + "attribute a 1\nattribute a 2\n", "text:4: attribute a is given twice"},
      {head + "input 0 Q\n", "text:3: a tensor needs a slot, a name and a type"},
      {head + "input first Q f32 1\n1\n", "text:3: the slot must be a whole number, not 'first'"},
      {head + "input 0 Q f32 -1\n1\n",
       "text:3: a dimension of tensor Q must be a whole number, not '-1'"},
      {head + "input 0 Q f32 2.5\n1\n",
       "text:3: a dimension of tensor Q must be a whole number, not '2.5'"},
      {head + "input 0 Q f8 1\n1\n", "text:3: tensor Q has the unknown type 'f8'"},
      {head + "input 0 Q f32 2 3\n", "text:3: the text ends before the values of tensor Q"},
      {head + "input 0 Q f32 2 3\n1 2 3 4\n",
       "text:4: tensor Q of shape 2x3 needs 6 values, its line has 4"},
      {head + "input 0 Q f32 2\n1 2 3\n",
       "text:4: tensor Q of shape 2 needs 2 values, its line has 3"},
      {head + "input 0 Q f32 2\n1 2x\n", "text:4: tensor Q: '2x' is no f32"},
      {head + "input 0 Q f16 1\n70000\n", "text:4: tensor Q: '70000' is no f16"},
      {head + "input 0 Q f32 1\n1e40\n", "text:4: tensor Q: '1e40' is no f32"},
      {head + "input 0 M bool 1\n2\n", "text:4: tensor M: '2' is no bool"},
      {head + "input 0 N i64 1\n1.5\n", "text:4: tensor N: '1.5' is no i64"},
      {head + "input 0 N i32 1\n3000000000\n", "text:4: tensor N: '3000000000' is no i32"},
      {head + "input 0 N i64 1\nnan\n", "text:4: tensor N: 'nan' is no i64"},
      {head + "input 0 Q f32 1\n1\ninput 0 K f32 1\n1\n", "text:6: input slot 0 is given twice"},
      {head + "input 0 Q f32 4000000000 4000000000\n1\n",
       "text:3: tensor Q is too large: 4000000000x4000000000"},
  };
  for (const auto& [text, message] : texts) CHECK(parse_error(text) == message);
}

TEST_CASE("golden: a case runs unless its attributes or inputs need what is missing") {
  const auto reasons = [](const std::string& extra) {
    return reasons_not_to_run(parse_text(two_keys(extra, "2.5"))).size();
  };
  CHECK(reasons("") == 0);
  CHECK(reasons("attribute softcap 0.0\nattribute is_causal 1\n") == 0);
  CHECK(reasons("input 3 attn_mask f32 1 2\n0.5 -inf\n") == 0);
  CHECK(reasons("attribute softcap 2.0\n") == 0);
  CHECK(reasons("attribute score_mod None\n") == 1);
  CHECK(reasons("input 3 attn_mask f32 1 2\nnan 0\n") == 0);
  CHECK(reasons("attribute score_mod None\nattribute prob_mod None\n") == 1);
  CHECK_THROWS(golden::require_known(parse_text(two_keys("attribute window 3\n", "2.5"))));
  CHECK_THROWS(golden::require_known(parse_text(two_keys("input 7 extra f32 1\n1\n", "2.5"))));
}

TEST_CASE("golden: every path computes a case that can be done by hand, and sees a wrong result") {
  const std::map<std::string, std::string> cases{
      {"", "2.5"},                                         // (1 + 4)/2
      {"attribute is_causal 1\n", "1"},                    // the first key only
      {"input 3 attn_mask bool 1 2\n0 1\n", "4"},          // the second key only
      {"input 3 attn_mask bool 1 1 1 1\n1\n", "1"},        // a short mask
      {"input 3 attn_mask f32 2\n-inf -inf\n", "0"},       // no key
      {"input 3 attn_mask f32 2\n1.0986123 0\n", "1.75"},  // weights 3:1
      {"attribute softcap 2.0\n", "2.5"},
      // the bias comes after the cap, which it would otherwise not get past
      {"attribute softcap 0.001\ninput 3 attn_mask f32 2\n1.0986123 0\n", "1.75"},
      {"input 3 attn_mask f32 2\nnan 0\n", "nan"},
      {"input 6 nonpad_kv_seqlen i64 1\n1\n", "1"},  // the second is padding
      {"input 6 nonpad_kv_seqlen i64 1\n2\nattribute is_causal 1\n", "2.5"},  // offset 1
      {"input 6 nonpad_kv_seqlen i64 1\n0\nattribute is_causal 1\n", "0"},
      {"input 4 past_key f32 1 1 2 2\n3 4 3 4\ninput 5 past_value f32 1 1 2 1\n7 10\n"
       "attribute is_causal 1\n",
       "6"},  // (7 + 10 + 1)/3
  };
  for (const auto& [extra, result] : cases) check_all_paths(two_keys(extra, result));
  const std::vector<Outcome> wrong = run(parse_text(two_keys("", "2.50001")));
  CHECK(std::count_if(wrong.begin(), wrong.end(), [](const Outcome& outcome) {
          return !outcome.comparison.failure().empty();
        }) == 12);
}

TEST_CASE("golden: heads that share a key head may have masks of their own") {
  const std::string head = "case masks\nop Attention\n";
  const std::string mask = "input 3 attn_mask bool 2 1 2\n1 0 0 1\n";
  check_all_paths(head + mask + "input 0 Q f32 1 2 1 1\n1 2\ninput 1 K f32 1 1 2 1\n3 3\n" +
                  "input 2 V f32 1 1 2 1\n1 4\noutput 0 Y f32 1 2 1 1\n1 4\n");
  check_all_paths(head + mask + "attribute q_num_heads 2\nattribute kv_num_heads 1\n" +
                  "input 0 Q f32 1 1 2\n1 2\ninput 1 K f32 1 2 1\n3 3\n" +
                  "input 2 V f32 1 2 1\n1 4\noutput 0 Y f32 1 1 2\n1 4\n");
}

TEST_CASE("golden: a comparison fails on nan and beyond the tolerance") {
  const auto failure = [](double actual, double expected) {
    Comparison comparison("path", 1e-6);
    comparison.add(actual, expected, {1, 2});
    return comparison.failure();
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(failure(1, 1 + 0.9e-6) == "");
  CHECK(failure(1000, 1000 + 0.9e-3) == "");
  CHECK(failure(-infinity, -infinity) == "");
  CHECK(failure(nan, nan) == "");
  CHECK(failure(2, 3) == "path at (1, 2): 2 instead of 3");
  CHECK(failure(0, 1.1e-6) != "");
  CHECK(failure(nan, 1) != "");
  CHECK(failure(1, nan) != "");
  CHECK(failure(infinity, 1) != "");
  CHECK(failure(1, infinity) != "");
  CHECK(failure(infinity, -infinity) != "");
}

TEST_CASE("golden: cases computed elsewhere") {
  const char* folder = std::getenv("SURFATTN_GOLDEN_DIR");
  if (!folder) {
    WARN("SURFATTN_GOLDEN_DIR is not set: none of the golden cases were run");
    SUCCEED();
    return;
  }
  const std::vector<Case> cases = golden::read_folder(std::filesystem::path(folder) / "onnx");
  INFO("the folder is " << folder << "/onnx");
  REQUIRE_FALSE(cases.empty());
  Summary summary;
  for (const Case& test : cases) {
    INFO(test.name);
    CHECK_NOTHROW(check(test, summary));
  }
  WARN(summary.text());
  CHECK(summary.counted() == static_cast<Index>(cases.size()));
  CHECK(summary.count_ran() > 0);
}

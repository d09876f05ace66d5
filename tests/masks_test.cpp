// Masks: every term against the dense mask of the same pattern, rows and problems with nothing to
// see, and what a NaN, an infinity or a huge number may reach and what it may not.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <surfattn/surfattn.hpp>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using surfattn::Align;
using surfattn::BoolMask;
using surfattn::Causal;
using surfattn::Heads;
using surfattn::Index;
using surfattn::KeyLengths;
using surfattn::Matrix;
using surfattn::Options;
using surfattn::SlidingWindow;
using surfattn::SurfaceOptions;
using surfattn::test::random_matrix;
using surfattn::test::seed;
using surfattn::test::seeded_random;

using Random = std::mt19937_64;
using Bools = Matrix<bool>;

// ---- Masks -------------------------------------------------------------------------------------

enum class Kind {
  causal,
  key_lengths,
  dense,
  window,
  causal_and_key_lengths,
  window_and_key_lengths,
  dense_and_causal,
  key_lengths_and_dense_and_window
};
constexpr Kind all_kinds[] = {Kind::causal,
                              Kind::key_lengths,
                              Kind::dense,
                              Kind::window,
                              Kind::causal_and_key_lengths,
                              Kind::window_and_key_lengths,
                              Kind::dense_and_causal,
                              Kind::key_lengths_and_dense_and_window};

/// A list of terms, and the pattern that it stands for, written pair by pair from the definitions.
struct Mask {
  Kind kind;
  Align align;
  Index left, right, length;
  Bools dense;

  bool sees(Index i, Index j) const {
    const Index position = align == Align::top_left ? i : i + dense.cols() - dense.rows();
    const bool causal = j <= position, in_length = j < length;
    const bool in_window = position - left <= j && j <= position + right;
    switch (kind) {
      case Kind::causal:
        return causal;
      case Kind::key_lengths:
        return in_length;
      case Kind::dense:
        return dense(i, j);
      case Kind::window:
        return in_window;
      case Kind::causal_and_key_lengths:
        return causal && in_length;
      case Kind::window_and_key_lengths:
        return in_window && in_length;
      case Kind::dense_and_causal:
        return dense(i, j) && causal;
      case Kind::key_lengths_and_dense_and_window:
        return in_length && dense(i, j) && in_window;
    }
    return false;
  }

  Bools pattern() const {
    Bools result(dense.rows(), dense.cols());
    for (Index i = 0; i < result.rows(); ++i) {
      for (Index j = 0; j < result.cols(); ++j) result(i, j) = sees(i, j);
    }
    return result;
  }
};

/// Random pairs, and some queries and keys that see and are seen by none.
Bools random_dense(Index queries, Index keys, Random& random) {
  Bools mask(queries, keys);
  for (Index i = 0; i < mask.size(); ++i) mask.data()[i] = random() % 3 != 0;
  for (Index i = 0; i < queries; ++i) {
    if (random() % 5 == 0) mask.row(i).setConstant(false);
  }
  for (Index j = 0; j < keys; ++j) {
    if (random() % 5 == 0) mask.col(j).setConstant(false);
  }
  return mask;
}

Mask random_mask(Kind kind, Align align, Index queries, Index keys, Random& random) {
  return {kind,
          align,
          static_cast<Index>(random() % 6),
          static_cast<Index>(random() % 4),
          keys - keys / 3,
          random_dense(queries, keys, random)};
}

// ---- Problems ----------------------------------------------------------------------------------

enum class Form { standard, surface };

struct Sizes {
  Index queries, keys, head_dim, value_dim;
  Index query_heads = 1, key_value_heads = 1;
};

enum Input { queries_in, keys_in, values_in, grad_out_in, log_prior_in, inputs };

/// In the surface form the values are absent; in the standard form the log-prior.
template <class S>
struct Problem {
  Form form;
  Heads heads;
  double scale;
  Matrix<S> in[inputs];
};

template <class S>
Problem<S> random_problem(Form form, const Sizes& s, Random& random) {
  const bool surface = form == Form::surface;
  const Index value_dim = surface ? s.head_dim : s.value_dim;
  return {form,
          {s.query_heads, s.key_value_heads},
          1.5,
          {random_matrix<S>(s.queries, s.query_heads * s.head_dim, random),
           random_matrix<S>(s.keys, s.key_value_heads * s.head_dim, random),
           random_matrix<S>(surface ? 0 : s.keys, s.key_value_heads * s.value_dim, random),
           random_matrix<S>(s.queries, s.query_heads * value_dim, random),
           random_matrix<S>(surface ? s.keys : 0, s.key_value_heads, random)}};
}

enum Part {
  out_part,
  log_sum_exp_part,
  grad_queries_part,
  grad_keys_part,
  grad_values_part,
  grad_log_prior_part,
  grad_bandwidth_part,
  parts
};
constexpr const char* part_names[parts] = {"out",           "log_sum_exp", "grad_queries",
                                           "grad_keys",     "grad_values", "grad_log_prior",
                                           "grad_bandwidth"};

template <class S>
struct Result {
  Matrix<S> part[parts];
};

template <class S, class... Terms>
Result<S> standard_result(const Problem<S>& p, const Terms&... terms) {
  const Options options{.scale = p.scale, .heads = p.heads};
  const auto& [q, k, v, grad_out, unused] = p.in;
  const auto f = surfattn::attention_forward(q, k, v, options, terms...);
  const auto g = surfattn::attention_backward(q, k, v, f, grad_out, options, terms...);
  return {{f.out, f.log_sum_exp, g.queries, g.keys, g.values, {}, {}}};
}

template <class S, class... Terms>
Result<S> surface_result(const Problem<S>& p, const Terms&... terms) {
  const auto& [q, k, unused, grad_out, log_prior] = p.in;
  const SurfaceOptions options{.scale = p.scale, .heads = p.heads, .prior = log_prior};
  const auto f = surfattn::project_forward(q, k, options, terms...);
  const auto g = surfattn::project_backward(q, k, f, grad_out, options, terms...);
  return {{f.out,
           f.log_sum_exp,
           g.queries,
           g.keys,
           {},
           g.log_prior,
           Matrix<S>::Constant(1, 1, g.bandwidth)}};
}

template <class S, class... Terms>
Result<S> with_terms(const Problem<S>& p, const Terms&... terms) {
  return p.form == Form::standard ? standard_result(p, terms...) : surface_result(p, terms...);
}

template <class S>
Result<S> with_dense(const Problem<S>& p, const Bools& pattern) {
  return with_terms(p, BoolMask{pattern});
}

/// The lists of more than one term compile for one scalar type only: none of them depends on it.
Result<double> with_list(const Problem<double>& p, const Mask& m) {
  const SlidingWindow window{.left = m.left, .right = m.right, .align = m.align};
  const KeyLengths lengths(m.length);
  switch (m.kind) {
    case Kind::window:
      return with_terms(p, window);
    case Kind::causal_and_key_lengths:
      return with_terms(p, Causal{m.align}, lengths);
    case Kind::window_and_key_lengths:
      return with_terms(p, window, lengths);
    case Kind::dense_and_causal:
      return with_terms(p, BoolMask{m.dense}, Causal{m.align});
    default:
      return with_terms(p, lengths, BoolMask{m.dense}, window);
  }
}

Result<float> with_list(const Problem<float>& p, const Mask& m) {
  return with_dense(p, m.pattern());
}

template <class S>
Result<S> with_mask(const Problem<S>& p, const Mask& m) {
  if (m.kind == Kind::causal) return with_terms(p, Causal{m.align});
  if (m.kind == Kind::key_lengths) return with_terms(p, KeyLengths{m.length});
  if (m.kind == Kind::dense) return with_dense(p, m.dense);
  return with_list(p, m);
}

/// Equal shapes and equal bits, NaN and the sign of zero included.
template <class S>
bool same_bits(const Matrix<S>& a, const Matrix<S>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 ||
          std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(S)) == 0);
}

template <class S>
void check_same_bits(const Result<S>& a, const Result<S>& b) {
  for (int n = 0; n < parts; ++n) {
    INFO(part_names[n]);
    CHECK(same_bits(a.part[n], b.part[n]));
  }
}

std::string describe(Form form, const Sizes& s, Kind kind, Align align) {
  return std::string(form == Form::standard ? "standard" : "surface") + " form, queries " +
         std::to_string(s.queries) + ", keys " + std::to_string(s.keys) + ", mask " +
         std::to_string(static_cast<int>(kind)) +
         (align == Align::top_left ? " top left" : " bottom right") + ", seed " +
         std::to_string(seed());
}

/// Runs a check over both forms and alignments, the given kinds of masks and sizes.
template <class S>
void for_each_problem(std::initializer_list<Sizes> all_sizes, std::vector<Kind> kinds,
                      void (*check)(const Problem<S>&, const Mask&, Random&)) {
  Random random = seeded_random();
  for (const Form form : {Form::standard, Form::surface}) {
    for (const Sizes& s : all_sizes) {
      const auto problem = random_problem<S>(form, s, random);
      for (const Kind kind : kinds) {
        for (const Align align : {Align::top_left, Align::bottom_right}) {
          INFO(describe(form, s, kind, align));
          check(problem, random_mask(kind, align, s.queries, s.keys, random), random);
        }
      }
    }
  }
}

// ---- Every list of terms is the dense mask of its pattern --------------------------------------

/// The same bits, but for the gradient of keys that are values: it sums two products tile by tile, and
/// terms that slant cut tiles where a dense mask does not. It agrees up to the rounding of these sums.
template <class S>
void equals_its_pattern(const Problem<S>& p, const Mask& mask, Random&) {
  auto actual = with_mask(p, mask), expected = with_dense(p, mask.pattern());
  if (p.form == Form::surface) {
    Matrix<S>& sums = actual.part[grad_keys_part];
    const Matrix<S>& same_sums = expected.part[grad_keys_part];
    const S rounding = S(2 * p.in[queries_in].size()) * std::numeric_limits<S>::epsilon();
    CHECK((sums - same_sums).norm() <= rounding * same_sums.norm());
    sums = same_sums;
  }
  check_same_bits(actual, expected);
}

TEST_CASE("Terms hide what the dense mask of their pattern hides", "[masks]") {
  for_each_problem<double>({{1, 1, 3, 2},
                            {2, 600, 3, 2, 4, 2},
                            {7, 9, 3, 2},
                            {9, 9, 3, 2, 4, 2},
                            {17, 8, 5, 3},
                            {16, 257, 3, 2, 2, 1},
                            {257, 33, 3, 2},
                            {300, 300, 3, 2}},
                           {std::begin(all_kinds), std::end(all_kinds)}, equals_its_pattern);
}

TEST_CASE("In float, too, terms hide what the dense mask of their pattern hides", "[masks]") {
  for_each_problem<float>({{9, 9, 3, 2, 4, 2}, {33, 300, 3, 2}, {513, 129, 3, 2}},
                          {Kind::causal, Kind::key_lengths}, equals_its_pattern);
}

/// Of many queries, which are tiles, and of few.
void check_storage_of_mask(Index queries, Index keys) {
  Random random = seeded_random();
  CAPTURE(seed(), queries, keys);
  const auto p = random_problem<double>(Form::standard, {queries, keys, 3, 2}, random);
  const Bools mask = random_dense(queries, keys, random);
  const auto expected = with_dense(p, mask);

  const Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic> columns = mask;
  check_same_bits(with_terms(p, BoolMask{columns}), expected);
  const Bools transposed = mask.transpose();
  check_same_bits(with_terms(p, BoolMask{transposed.transpose()}), expected);
  Bools larger = Bools::Constant(queries + 4, keys + 3, true);
  larger.block(2, 1, queries, keys) = mask;
  check_same_bits(with_terms(p, BoolMask{larger.block(2, 1, queries, keys)}), expected);
  const Matrix<int> numbers = 4 * mask.cast<int>();
  check_same_bits(with_terms(p, BoolMask{numbers}), expected);
}

TEST_CASE("A dense mask may be stored in any way", "[masks]") {
  check_storage_of_mask(9, 17);
  check_storage_of_mask(101, 300);
}

TEST_CASE("A window may reach without limit, and needs no alignment where queries match keys",
          "[masks]") {
  Random random = seeded_random();
  CAPTURE(seed());
  const auto p = random_problem<double>(Form::surface, {33, 33, 3, 2}, random);
  check_same_bits(with_terms(p, SlidingWindow{.right = 0}), with_terms(p, Causal{Align::top_left}));
  check_same_bits(with_terms(p, SlidingWindow{}), with_dense(p, Bools::Constant(33, 33, true)));
  constexpr Index farthest = std::numeric_limits<Index>::max();
  check_same_bits(with_terms(p, SlidingWindow{.left = farthest, .right = farthest}),
                  with_terms(p, SlidingWindow{}));
}

// ---- Nothing to see ----------------------------------------------------------------------------

bool sees_none(const Bools& pattern, Index query) { return !pattern.row(query).any(); }
bool seen_by_none(const Bools& pattern, Index key) { return !pattern.col(key).any(); }

template <class S>
bool all_zero(const Matrix<S>& matrix) {
  return (matrix.array() == S(0)).all();
}

/// Queries that see no key get 0, −∞ and gradient 0, and keys that no query sees gradient 0: zeros,
/// not small numbers; everything else is finite.
template <class S>
void unseen_is_zero(const Problem<S>& p, const Mask& mask, Random&) {
  const Bools pattern = mask.pattern();
  const Result<S> r = with_mask(p, mask);
  for (Index i = 0; i < pattern.rows(); ++i) {
    const bool none = sees_none(pattern, i);
    if (none) CHECK(all_zero<S>(r.part[out_part].row(i)));
    if (none) CHECK(all_zero<S>(r.part[grad_queries_part].row(i)));
    const auto row = r.part[log_sum_exp_part].row(i).array();
    CHECK((none ? (row == -std::numeric_limits<S>::infinity()).all() : row.isFinite().all()));
  }
  for (Index j = 0; j < pattern.cols(); ++j) {
    if (!seen_by_none(pattern, j)) continue;
    for (const Part part : {grad_keys_part, grad_values_part, grad_log_prior_part}) {
      if (r.part[part].rows() > 0) CHECK(all_zero<S>(r.part[part].row(j)));
    }
  }
  for (int n = 0; n < parts; ++n) {
    if (n != log_sum_exp_part) CHECK(r.part[n].allFinite());
  }
}

TEMPLATE_TEST_CASE("Queries that see nothing and keys that nobody sees give zeros", "[masks]",
                   float, double) {
  for_each_problem<TestType>({{17, 9, 3, 2, 2, 1}, {9, 17, 3, 2}, {300, 257, 3, 2}},
                             {std::begin(all_kinds), std::end(all_kinds)},
                             unseen_is_zero<TestType>);
}

/// Shapes as the inputs say, and nothing but zeros and −∞.
template <class S>
void check_nothing(const Problem<S>& p, const Result<S>& r) {
  const bool standard = p.form == Form::standard;
  const auto is = [&](Part part, const Matrix<S>& like) {
    INFO(part_names[part]);
    CHECK(r.part[part].rows() == like.rows());
    CHECK(r.part[part].cols() == like.cols());
    CHECK(all_zero(r.part[part]));
  };
  is(out_part, p.in[grad_out_in]);
  is(grad_queries_part, p.in[queries_in]);
  is(grad_keys_part, p.in[keys_in]);
  if (standard) is(grad_values_part, p.in[values_in]);
  if (!standard) is(grad_log_prior_part, p.in[log_prior_in]);
  if (!standard) CHECK(r.part[grad_bandwidth_part](0, 0) == 0);
  CHECK(r.part[log_sum_exp_part].rows() == p.in[queries_in].rows());
  CHECK((r.part[log_sum_exp_part].array() == -std::numeric_limits<S>::infinity()).all());
}

TEMPLATE_TEST_CASE("Without keys or queries, and behind a mask that hides all, nothing comes out",
                   "[masks]", float, double) {
  Random random = seeded_random();
  CAPTURE(seed());
  for (const Form form : {Form::standard, Form::surface}) {
    for (const Sizes& s : {Sizes{5, 0, 3, 2, 2, 1}, Sizes{0, 5, 3, 2, 2, 1}, Sizes{0, 0, 3, 2}}) {
      const auto p = random_problem<TestType>(form, s, random);
      check_nothing(p, with_terms(p, Causal{Align::top_left}));
      check_nothing(p, with_terms(p, Causal{Align::bottom_right}));
      check_nothing(p, with_terms(p, KeyLengths{0}));
      check_nothing(p, with_dense(p, Bools(s.queries, s.keys)));
    }
    const auto p = random_problem<TestType>(form, {33, 300, 3, 2}, random);
    check_nothing(p, with_terms(p, KeyLengths{0}));
    check_nothing(p, with_dense(p, Bools::Constant(33, 300, false)));
  }
}

/// Without width all scores are 0: in the standard form a mean of the values, in both the logarithm
/// of the number of keys.
TEMPLATE_TEST_CASE("Heads without width weigh all keys alike", "[masks]", float, double) {
  using S = TestType;
  Random random = seeded_random();
  CAPTURE(seed());
  auto p = random_problem<S>(Form::standard, {7, 8, 0, 3}, random);
  p.in[values_in].setConstant(S(0.75));
  const auto standard = with_terms(p, KeyLengths{4});
  CHECK((standard.part[out_part].array() == S(0.75)).all());
  CHECK((standard.part[log_sum_exp_part].array() == std::log(S(4))).all());
  CHECK(standard.part[grad_queries_part].cols() == 0);

  auto s = random_problem<S>(Form::surface, {7, 8, 0, 0}, random);
  s.in[log_prior_in].setZero();
  const auto surface = with_terms(s, KeyLengths{4});
  CHECK(surface.part[out_part].size() == 0);
  CHECK((surface.part[log_sum_exp_part].array() == std::log(S(4))).all());
  CHECK(all_zero(surface.part[grad_log_prior_part]));
  CHECK(surface.part[grad_bandwidth_part](0, 0) == 0);
}

TEMPLATE_TEST_CASE("Values without width leave log_sum_exp and no gradient", "[masks]", float,
                   double) {
  using S = TestType;
  Random random = seeded_random();
  CAPTURE(seed());
  auto p = random_problem<S>(Form::standard, {17, 33, 3, 2, 2, 1}, random);
  const auto with_values = with_terms(p, Causal{Align::bottom_right});
  p.in[values_in].resize(33, 0);
  p.in[grad_out_in].resize(17, 0);
  const auto without = with_terms(p, Causal{Align::bottom_right});
  CHECK(without.part[out_part].cols() == 0);
  CHECK(same_bits(without.part[log_sum_exp_part], with_values.part[log_sum_exp_part]));
  CHECK(all_zero(without.part[grad_queries_part]));
  CHECK(all_zero(without.part[grad_keys_part]));
}

// ---- Behind the mask ---------------------------------------------------------------------------

/// What may stand in memory that nobody sees. The largest number overflows when it is scaled.
template <class S>
std::vector<S> poisons() {
  using Limits = std::numeric_limits<S>;
  return {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), S(1e30), Limits::max()};
}

/// Every key that no query sees and every query that sees no key, and what belongs to them.
template <class S>
Problem<S> poisoned(const Problem<S>& clean, const Bools& pattern, S poison) {
  Problem<S> p = clean;
  for (Index j = 0; j < pattern.cols(); ++j) {
    if (!seen_by_none(pattern, j)) continue;
    for (const Input input : {keys_in, values_in, log_prior_in}) {
      if (p.in[input].rows() > 0) p.in[input].row(j).setConstant(poison);
    }
  }
  for (Index i = 0; i < pattern.rows(); ++i) {
    if (!sees_none(pattern, i)) continue;
    p.in[queries_in].row(i).setConstant(poison);
    p.in[grad_out_in].row(i).setConstant(poison);
  }
  return p;
}

template <class S>
void poison_changes_no_bit(const Problem<S>& p, const Mask& mask, Random&) {
  const Bools pattern = mask.pattern();
  const Result<S> clean = with_mask(p, mask);
  for (const S poison : poisons<S>()) {
    INFO("poison " << poison);
    check_same_bits(with_mask(poisoned(p, pattern, poison), mask), clean);
  }
}

TEMPLATE_TEST_CASE("Whatever stands behind the mask changes no bit of anything", "[masks]", float,
                   double) {
  for_each_problem<TestType>({{1, 300, 3, 2},
                              {3, 257, 5, 2, 4, 2},
                              {15, 17, 3, 2},
                              {17, 16, 3, 2, 4, 2},
                              {16, 255, 3, 2},
                              {257, 256, 5, 2, 2, 1},
                              {300, 17, 3, 2},
                              {256, 300, 2, 3},
                              {513, 257, 2, 1},
                              {257, 513, 2, 1}},
                             {Kind::causal, Kind::key_lengths, Kind::dense},
                             poison_changes_no_bit<TestType>);
}

TEST_CASE("Whatever stands behind several masks changes no bit of anything", "[masks]") {
  for_each_problem<double>({{17, 16, 3, 2, 4, 2}, {300, 257, 3, 2}, {33, 300, 3, 2}},
                           {std::begin(all_kinds), std::end(all_kinds)}, poison_changes_no_bit);
}

template <class S>
void check_same_rows(const Result<S>& a, const Result<S>& b, Index row) {
  for (const Part part : {out_part, log_sum_exp_part, grad_queries_part}) {
    INFO(part_names[part] << " of query " << row);
    CHECK(same_bits<S>(a.part[part].row(row), b.part[part].row(row)));
  }
}

/// A key that some queries see, such as one in the future of the others, changes no bit for those
/// that do not.
template <class S>
void poison_stays_with_those_who_see_it(const Problem<S>& p, const Mask& mask, Random& random) {
  const Bools pattern = mask.pattern();
  const Result<S> clean = with_mask(p, mask);
  const Index key = static_cast<Index>(random() % static_cast<std::uint64_t>(pattern.cols()));
  for (const S poison : poisons<S>()) {
    INFO("key " << key << ", poison " << poison);
    Problem<S> bad = p;
    for (const Input input : {keys_in, values_in, log_prior_in}) {
      if (bad.in[input].rows() > 0) bad.in[input].row(key).setConstant(poison);
    }
    const Result<S> result = with_mask(bad, mask);
    for (Index i = 0; i < pattern.rows(); ++i) {
      if (!pattern(i, key)) check_same_rows(result, clean, i);
    }
  }
}

TEMPLATE_TEST_CASE("A key changes no bit for the queries that do not see it", "[masks]", float,
                   double) {
  for_each_problem<TestType>({{17, 16, 3, 2, 4, 2}, {33, 300, 3, 2}, {300, 257, 3, 2}},
                             {Kind::causal, Kind::dense},
                             poison_stays_with_those_who_see_it<TestType>);
}

// ---- In front of the mask ----------------------------------------------------------------------

/// What depends on NaNs in the inputs, one flag for each number. Of row i of a head, with keys j in
/// its sight:
///
///     W_ij        NaN where q_i, any k_j' or any log π_j' is, for every j at once
///     O_ic        NaN where W_i is, or any v_jc
///     dS_ij       W_ij(dP_ij − D_i), D_i = dO_i·O_i: NaN where W_i is, or dO_i, or any v_j'
///     dq_i        Σ_j dS_ij k_j, so NaN where dS_i is
///     dk_j, c_j   Σ_i dS_ij: NaN where dS_i is for any i that sees j
///     dv_jc       Σ_i W_ij dO_ic: NaN where W_i or dO_ic is for any i that sees j
class Dependency {
 public:
  template <class S>
  Dependency(const Problem<S>& p, const Bools& pattern)
      : pattern_(pattern),
        surface_(p.form == Form::surface),
        query_heads_(p.heads.query),
        key_heads_(p.heads.key_value.value_or(p.heads.query)) {
    for (int n = 0; n < inputs; ++n) nan_[n] = is_nan(p.in[n]);
    resize_parts();
    for (Index head = 0; head < query_heads_; ++head) mark_head(head);
  }

  template <class S>
  static Bools is_nan(const Matrix<S>& matrix) {
    return matrix.unaryExpr([](S x) { return std::isnan(x); });
  }

  const Bools& part(int index) const { return parts_[index]; }

 private:
  using Block = Eigen::Block<Bools>;

  static Block block(Bools& matrix, Index head, Index heads) {
    const Index width = matrix.cols() / heads;
    return matrix.block(0, head * width, matrix.rows(), width);
  }
  Block input(Input input, Index head, Index heads) { return block(nan_[input], head, heads); }

  void resize_parts() {
    const auto clear = [](Bools& part, const Bools& like) {
      part = Bools::Constant(like.rows(), like.cols(), false);
    };
    clear(parts_[out_part], nan_[grad_out_in]);
    clear(parts_[log_sum_exp_part], Bools(pattern_.rows(), query_heads_));
    clear(parts_[grad_queries_part], nan_[queries_in]);
    clear(parts_[grad_keys_part], nan_[keys_in]);
    if (!surface_) clear(parts_[grad_values_part], nan_[values_in]);
    if (surface_) clear(parts_[grad_log_prior_part], nan_[log_prior_in]);
    if (surface_) clear(parts_[grad_bandwidth_part], Bools(1, 1));
  }

  void mark_head(Index head) {
    const Index shared = head / (query_heads_ / key_heads_);
    for (Index i = 0; i < pattern_.rows(); ++i) {
      if (pattern_.row(i).any()) mark_row(i, head, shared);
    }
  }

  void mark_row(Index i, Index head, Index shared) {
    const auto keys = input(keys_in, shared, key_heads_);
    const auto values = input(surface_ ? keys_in : values_in, shared, key_heads_);
    const auto grad_out = input(grad_out_in, head, query_heads_).row(i);
    bool weights = input(queries_in, head, query_heads_).row(i).any();
    for (Index j = 0; j < pattern_.cols(); ++j) {
      if (!pattern_(i, j)) continue;
      weights = weights || keys.row(j).any();
      if (surface_) weights = weights || nan_[log_prior_in](j, shared);
    }
    auto out = block(parts_[out_part], head, query_heads_).row(i);
    if (weights) out.setConstant(true);
    for (Index j = 0; j < pattern_.cols(); ++j) {
      if (pattern_(i, j)) out = out || values.row(j);
    }
    parts_[log_sum_exp_part](i, head) = weights;
    mark_gradients(i, head, shared, weights, weights || grad_out.any() || out.any());
  }

  void mark_gradients(Index i, Index head, Index shared, bool weights, bool grad_scores) {
    const auto grad_out = input(grad_out_in, head, query_heads_).row(i);
    if (grad_scores) {
      block(parts_[grad_queries_part], head, query_heads_).row(i).setConstant(true);
      if (surface_) parts_[grad_bandwidth_part](0, 0) = true;
    }
    for (Index j = 0; j < pattern_.cols(); ++j) {
      if (!pattern_(i, j)) continue;
      if (grad_scores) block(parts_[grad_keys_part], shared, key_heads_).row(j).setConstant(true);
      if (grad_scores && surface_) parts_[grad_log_prior_part](j, shared) = true;
      if (surface_) continue;
      auto grad_values = block(parts_[grad_values_part], shared, key_heads_).row(j);
      if (weights) grad_values.setConstant(true);
      grad_values = grad_values || grad_out;
    }
  }

  const Bools& pattern_;
  bool surface_;
  Index query_heads_, key_heads_;
  Bools nan_[inputs];
  Bools parts_[parts];
};

template <class S>
void nan_reaches_what_depends_on_it(const Problem<S>& p, const Mask& mask, Random& random) {
  const Bools pattern = mask.pattern();
  for (int n = 0; n < inputs; ++n) {
    if (p.in[n].size() == 0) continue;
    Problem<S> bad = p;
    const auto place = static_cast<Index>(random() % static_cast<std::uint64_t>(p.in[n].size()));
    bad.in[n].data()[place] = std::numeric_limits<S>::quiet_NaN();
    const Result<S> result = with_mask(bad, mask);
    const Dependency expected(bad, pattern);
    for (int part = 0; part < parts; ++part) {
      INFO("NaN at " << place << " of input " << n << ", " << part_names[part]);
      CHECK(Dependency::is_nan(result.part[part]) == expected.part(part));
    }
  }
}

TEMPLATE_TEST_CASE("A NaN reaches exactly what depends on it", "[masks]", float, double) {
  for_each_problem<TestType>({{2, 3, 1, 1},
                              {1, 300, 3, 2, 4, 2},
                              {9, 17, 3, 2, 4, 2},
                              {17, 9, 3, 2, 3, 1},
                              {33, 40, 2, 5, 2, 2},
                              {20, 300, 3, 2},
                              {200, 18, 3, 2}},
                             {std::begin(all_kinds), std::end(all_kinds)},
                             nan_reaches_what_depends_on_it<TestType>);
}

}  // namespace

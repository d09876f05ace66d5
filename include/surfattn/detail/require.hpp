// surfattn layer 1: every check of a public function's arguments, in words

#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <string>
#include <surfattn/detail/view.hpp>
#include <surfattn/error.hpp>
#include <surfattn/options.hpp>
#include <surfattn/sequences.hpp>
#include <surfattn/types.hpp>
#include <tuple>

namespace surfattn::detail {

struct Extent {
  Index rows = 0;
  Index cols = 0;
  bool operator==(const Extent&) const = default;
};

template <class T>
Extent extent(const T& matrix) {
  return {static_cast<Index>(matrix.rows()), static_cast<Index>(matrix.cols())};
}

template <class Scalar>
Extent extent(const MatrixView<Scalar>& view) {
  return {view.rows, view.cols};
}

inline std::string words(Extent extent) {
  return std::to_string(extent.rows) + "×" + std::to_string(extent.cols);
}

/// One of two shapes, which may be the same.
inline std::string words_of_either(Extent a, Extent b) {
  return a == b ? words(a) : words(a) + " or " + words(b);
}

/// A number as short as it can be told, -1e-09 as well.
inline std::string words(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

/// A part of a sentence: text, which must outlive it, a number or an extent. What it takes to make a string
/// of these is compiled once, and not wherever a mistake is told.
class Word {
 public:
  Word(const char* text) : text_(text) {}
  Word(const std::string& text) : text_(text.c_str()) {}
  template <std::integral Integer>
  requires(!std::same_as<Integer, bool> && !std::same_as<Integer, char>) Word(Integer count)
      : kind_(Kind::count), extent_{static_cast<Index>(count), 0} {}
  Word(std::floating_point auto number)
      : kind_(Kind::number), number_(static_cast<double>(number)) {}
  Word(Extent extent) : kind_(Kind::extent), extent_(extent) {}

  std::string string() const {
    switch (kind_) {
      case Kind::count:
        return std::to_string(extent_.rows);
      case Kind::number:
        return words(number_);
      case Kind::extent:
        return words(extent_);
      default:
        return text_;
    }
  }

 private:
  enum class Kind { text, count, number, extent };

  Kind kind_ = Kind::text;
  const char* text_ = nullptr;
  Extent extent_;
  double number_ = 0;
};

/// The sizes of one attention problem, after every check has passed: of a whole batch, or of one of
/// its sequences.
struct Shape {
  Index queries = 0;          ///< Tq
  Index keys = 0;             ///< Tk
  Index head_dim = 0;         ///< d
  Index value_dim = 0;        ///< dv
  Index query_heads = 1;      ///< Hq
  Index key_value_heads = 1;  ///< Hkv
  Sequences sequences = {};   ///< of the whole batch
  // where a sequence stands in its batch
  Index sequence = 0;
  Index first_query = 0;
  Index first_key = 0;
  Index packed_queries = 0;  ///< rows of the whole batch
  Index packed_keys = 0;
  Index longest_queries = 0;  ///< of all its sequences
  Index longest_keys = 0;

  /// The part of the batch that is one sequence.
  SURFATTN_NEVER_INLINE Shape of_sequence(Index index) const {
    Shape one = *this;
    one.sequence = index;
    one.first_query = offset(sequences.query_offsets(), queries, index);
    one.first_key = offset(sequences.key_offsets(), keys, index);
    one.queries = offset(sequences.query_offsets(), queries, index + 1) - one.first_query;
    one.keys = offset(sequences.key_offsets(), keys, index + 1) - one.first_key;
    return one;
  }

  Index group() const { return query_heads / key_value_heads; }
  Extent queries_extent() const { return {queries, query_heads * head_dim}; }
  Extent keys_extent() const { return {keys, key_value_heads * head_dim}; }
  Extent values_extent() const { return {keys, key_value_heads * value_dim}; }
  Extent out_extent() const { return {queries, query_heads * value_dim}; }
  Extent log_sum_exp_extent() const { return {queries, query_heads}; }

 private:
  Index offset(const IntegerView& offsets, Index rows, Index place) const {
    return sequences.are_equal() ? rows / sequences.count() * place : offsets[place];
  }
};

/// Says what is wrong in the name of the public function that was called.
class Require {
 public:
  explicit constexpr Require(const char* function) : function_(function) {}

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    fail_with({Word(parts)...});
  }

  /// The same, about one sequence of a batch, which its sentences name.
  Require about(const Shape& shape) const {
    Require require(function_);
    if (shape.sequences.count() != 1) require.sequence_ = shape.sequence;
    return require;
  }

  void shape(const char* argument, Extent actual, Extent expected, const char* because) const {
    if (actual == expected) return;
    fail(argument, " is ", actual, " but must be ", expected, " (", because, ")");
  }

  Shape shapes(Extent queries, Extent keys, Extent values, const Heads& heads,
               const Sequences& sequences) const {
    Shape shape;
    shape.query_heads = heads.query;
    shape.key_value_heads = heads.key_value.value_or(heads.query);
    check_heads(shape);
    shape.queries = queries.rows;
    shape.keys = keys.rows;
    shape.head_dim = head_width("queries", queries, shape.query_heads, "query");
    shape.value_dim = head_width("values", values, shape.key_value_heads, "key/value");
    const Index key_width = head_width("keys", keys, shape.key_value_heads, "key/value");
    check_key_width(shape, queries, keys, key_width);
    if (values.rows != keys.rows) {
      fail("values must have one row for each key, but values is ", values, " and keys is ", keys);
    }
    check_sequences(sequences, queries, keys);
    shape.sequences = sequences;
    shape.packed_queries = shape.queries;
    shape.packed_keys = shape.keys;
    for (Index s = 0; s < sequences.count(); ++s) {
      const Shape one = shape.of_sequence(s);
      shape.longest_queries = std::max(shape.longest_queries, one.queries);
      shape.longest_keys = std::max(shape.longest_keys, one.keys);
    }
    return shape;
  }

  /// The extent of values that are a matrix, or columns of the keys.
  template <class Keys, class Values>
  Extent values_extent(const Keys& keys, const Values& values, const Heads& heads) const {
    if constexpr (is_left_columns_v<Values>) {
      const Index count = heads.key_value.value_or(heads.query);
      const bool fits = count < 1 || values.columns * count <= keys.cols();
      if (values.columns < 0 || !fits) {
        fail("LeftColumns must be between 0 and the width of a key, but it is ", values.columns,
             " and keys is ", extent(keys), " (", count, " heads)");
      }
      return {keys.rows(), values.columns * count};
    } else {
      return extent(values);
    }
  }

  void positive(const char* name, std::optional<double> value) const {
    if (!value || (*value > 0 && std::isfinite(*value))) return;
    fail(name, " must be positive and finite, but is ", *value);
  }

  void finite(const char* name, std::optional<double> value) const {
    if (!value || std::isfinite(*value)) return;
    fail(name, " must be finite, but is ", *value);
  }

  /// What is finite as an option may not be so in the precision of the call.
  template <class Scalar>
  void usable_scale(Scalar scale, bool positive) const {
    if (positive ? scale > 0 && std::isnormal(scale) : std::isfinite(scale)) return;
    fail(positive ? "scale = 1/bandwidth² must be positive, normal and " : "scale must be ",
         "finite in the precision of queries, but is ", scale);
  }

  /// An explicit prior is Tk × Hkv, or Tk × 1 for all heads, and of the queries' scalar type.
  template <class Scalar>
  void key_prior(const KeyPrior& prior, const Shape& shape) const {
    if (!prior.is_explicit()) return;
    if (!prior.holds<accumulator_t<Scalar>>()) {
      fail(
          "prior must hold log-weights of the same scalar type as queries (float for 16-bit ones)");
    }
    const Extent actual{prior.rows(), prior.cols()};
    if (actual == Extent{shape.keys, 1} || actual == Extent{shape.keys, shape.key_value_heads})
      return;
    fail("prior is ", actual, " but must be ",
         words_of_either({shape.keys, shape.key_value_heads}, {shape.keys, 1}),
         " (one log-weight for each key), because keys is ", shape.keys_extent());
  }

 private:
  [[noreturn, gnu::cold]] SURFATTN_NEVER_INLINE void fail_with(
      std::initializer_list<Word> sentence) const {
    std::string message = std::string("surfattn::") + function_ + ": ";
    for (const Word& word : sentence) message += word.string();
    if (sequence_) message += " (sequence " + std::to_string(*sequence_) + ")";
    detail::fail(message);
  }

  void check_heads(const Shape& shape) const {
    const bool valid = shape.query_heads > 0 && shape.key_value_heads > 0 &&
                       shape.query_heads % shape.key_value_heads == 0;
    if (valid) return;
    fail("heads.query must be a positive multiple of heads.key_value, but they are ",
         shape.query_heads, " and ", shape.key_value_heads);
  }

  Index head_width(const char* argument, Extent extent, Index heads, const char* kind) const {
    if (extent.cols % heads != 0) {
      fail(argument, " is ", extent, ", and its columns do not divide into ", heads, " ", kind,
           " heads");
    }
    return extent.cols / heads;
  }

  void check_key_width(const Shape& shape, Extent queries, Extent keys, Index key_width) const {
    if (key_width == shape.head_dim) return;
    fail("keys must be as wide per head as queries, but queries is ", queries, " (",
         shape.query_heads, " heads of width ", shape.head_dim, ") and keys is ", keys, " (",
         shape.key_value_heads, " heads of width ", key_width, ")");
  }

  void check_sequences(const Sequences& sequences, Extent queries, Extent keys) const {
    if (sequences.are_equal()) {
      check_equal_sequences("queries", queries, sequences.count());
      check_equal_sequences("keys", keys, sequences.count());
      return;
    }
    const Index of_queries = sequences.query_offsets().size(),
                of_keys = sequences.key_offsets().size();
    if (of_queries != of_keys) {
      fail("sequences must have as many offsets of keys as of queries, but has ", of_queries,
           " of queries and ", of_keys, " of keys");
    }
    check_offsets("queries", queries, sequences.query_offsets());
    check_offsets("keys", keys, sequences.key_offsets());
  }

  void check_equal_sequences(const char* argument, Extent extent, Index count) const {
    if (count >= 1 && extent.rows % count == 0) return;
    fail(argument, " is ", extent, ", and its rows do not divide into ", count, " equal sequences");
  }

  /// Offsets of n sequences are n + 1 numbers from 0 to the number of rows that never decrease.
  void check_offsets(const char* argument, Extent extent, const IntegerView& offsets) const {
    const auto fail_offsets = [&](const auto&... parts) {
      fail("sequences: the offsets of ", argument, " must ", parts...);
    };
    const Index last = offsets.size() - 1;
    if (last < 0) fail_offsets("be one more than the sequences, but there are none");
    if (offsets[0] != 0) fail_offsets("begin at 0, but begin at ", offsets[0]);
    for (Index s = 0; s < last; ++s) {
      if (offsets[s] <= offsets[s + 1]) continue;
      fail_offsets("not decrease, but offset ", s, " is ", offsets[s], " and offset ", s + 1,
                   " is ", offsets[s + 1]);
    }
    if (offsets[last] == extent.rows) return;
    fail_offsets("end at the number of rows, but end at ", offsets[last], " and ", argument, " is ",
                 extent);
  }

  const char* function_;
  std::optional<Index> sequence_ = {};
};

/// For what computes with its numbers as they are stored.
template <class Scalar>
constexpr void refuse_16_bits_at_compile_time() {
  static_assert(
      std::is_same_v<Scalar, accumulator_t<Scalar>>,
      "surfattn: this function takes float, double or long double; numbers of 16 bits are "
      "for attention, project and Surface");
}

template <class... Matrices>
constexpr void check_inputs_at_compile_time() {
  static_assert((DenseMatrix<Matrices> && ...),
                "surfattn: queries, keys, values and gradients must be dense Eigen matrices");
  if constexpr ((DenseMatrix<Matrices> && ...)) {
    using First = scalar_t<std::tuple_element_t<0, std::tuple<Matrices...>>>;
    static_assert((std::is_same_v<First, scalar_t<Matrices>> && ...),
                  "surfattn: queries, keys, values and gradients must be of one scalar type; cast "
                  "them with .cast<T>()");
    static_assert(is_supported_scalar_v<First>,
                  "surfattn: the scalar must be float, double, long double, Eigen::half or "
                  "Eigen::bfloat16; any other scalar runs through surfattn/reference.hpp");
  }
}

/// Log-sum-exps and the gradients of priors are of the scalar in which sums are formed.
template <class Scalar, class... Matrices>
constexpr void check_sums_at_compile_time() {
  if constexpr ((DenseMatrix<Matrices> && ...)) {
    static_assert(
        (std::is_same_v<accumulator_t<Scalar>, scalar_t<Matrices>> && ...),
        "surfattn: log_sum_exp and the gradient of the prior must be of the scalar type of "
        "the inputs, or of float where that has 16 bits");
  }
}

template <class Scalar, class... Matrices>
constexpr void check_writable_sums_at_compile_time() {
  check_sums_at_compile_time<Scalar, Matrices...>();
  static_assert((WritableMatrix<Matrices> && ...),
                "surfattn: an output must be a stored, writable Eigen matrix, map or block");
}

template <class Scalar, class... Matrices>
constexpr void check_outputs_at_compile_time() {
  static_assert((WritableMatrix<Matrices> && ...),
                "surfattn: an output must be a stored, writable Eigen matrix, map or block");
  if constexpr ((WritableMatrix<Matrices> && ...)) {
    static_assert((std::is_same_v<Scalar, scalar_t<Matrices>> && ...),
                  "surfattn: outputs must be of the scalar type of the inputs");
  }
}

}  // namespace surfattn::detail

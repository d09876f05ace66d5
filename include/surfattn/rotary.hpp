// surfattn layer 6: rotary position embedding of queries and keys

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <ranges>
#include <string>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/types.hpp>
#include <type_traits>

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pairs of numbers of a query or key
/// are turned by angles in proportion to its position p, so that the score of two tokens depends on
/// the difference of their positions. With θ_c = base^(−2c/width), equation 15 of the paper,
///
///     x' = x·cos(p·θ_c) − y·sin(p·θ_c),   y' = x·sin(p·θ_c) + y·cos(p·θ_c),   c = 0 … width/2 − 1.
///
/// It acts on queries and keys before attention; the values are left alone.
namespace surfattn {

/// Which columns of a head turn together.
enum class RotaryPairs {
  adjacent,  ///< 2c and 2c + 1, as in the paper
  halves,    ///< c and c + width/2, as in GPT-NeoX and Llama
};

struct RotaryOptions {
  RotaryPairs pairs;    ///< no choice is a safe default
  Index heads = 1;      ///< blocks of columns of the matrix; in a layer, which knows them, not read
  double base = 10000;  ///< θ_c = base^(−2c/width), positive
  std::optional<Index> width =
      {};  ///< turned columns of each head, even; the first ones; all by default
};

namespace detail {

/// One number for each row: its position.
template <class Positions>
concept PositionRange = std::ranges::random_access_range<const Positions> &&
    std::ranges::sized_range<const Positions> &&
    std::is_arithmetic_v<std::ranges::range_value_t<const Positions>>;

/// Such numbers side by side in memory, of the types that a view can hold.
template <class Range>
concept StoredPositions = PositionRange<Range> && NumbersInMemory<Range> &&
    (std::is_same_v<std::ranges::range_value_t<const Range>, float> ||
     std::is_same_v<std::ranges::range_value_t<const Range>, double> || OffsetRange<const Range>);

inline Index rotary_width(const Require& require, Extent input, Index positions,
                          const RotaryOptions& options) {
  if (options.heads < 1 || input.cols % options.heads != 0) {
    require.fail("the matrix is ", input, ", and its columns do not divide into ", options.heads,
                 " heads");
  }
  const Index of_head = input.cols / options.heads, width = options.width.value_or(of_head);
  if (width < 0 || width > of_head || width % 2 != 0) {
    require.fail("the turned columns of a head must be an even number of at most ", of_head,
                 ", but are ", width, " (the matrix is ", input, ")");
  }
  if (positions != input.rows) {
    require.fail("there must be one position for each row, but there are ", positions,
                 " and the matrix is ", input);
  }
  require.positive("base", options.base);
  return width;
}

/// `position(i)` is that of row i; `turn` is 1, or −1 for the way back. Angles are formed in double:
/// those of long sequences are large.
template <class Scalar, class Position>
void rotate(MatrixView<const Scalar> from, const Position& position, MatrixView<Scalar> to,
            const RotaryOptions& options, Index width, double turn) {
  using Sum = accumulator_t<Scalar>;
  const Index of_head = from.cols / options.heads, half = width / 2;
  const bool adjacent = options.pairs == RotaryPairs::adjacent;
  for (Index c = 0; c < half; ++c) {
    const double frequency =
        turn * std::pow(options.base, -2 * static_cast<double>(c) / static_cast<double>(width));
    for (Index i = 0; i < from.rows; ++i) {
      const double angle = static_cast<double>(position(i)) * frequency;
      const auto cosine = static_cast<Sum>(std::cos(angle)),
                 sine = static_cast<Sum>(std::sin(angle));
      for (Index first = 0; first < from.cols; first += of_head) {
        const Index a = first + (adjacent ? 2 * c : c), b = adjacent ? a + 1 : a + half;
        const auto x = static_cast<Sum>(from(i, a)), y = static_cast<Sum>(from(i, b));
        to(i, a) = static_cast<Scalar>(x * cosine - y * sine);
        to(i, b) = static_cast<Scalar>(x * sine + y * cosine);
      }
    }
  }
  for (Index i = 0; i < from.rows; ++i) {
    for (Index first = 0; first < from.cols; first += of_head) {
      for (Index c = first + width; c < first + of_head; ++c) to(i, c) = from(i, c);
    }
  }
}

template <class Input, class Positions, class Out>
void rotate_checked(const char* function, const Input& input, const Positions& positions, Out& out,
                    const RotaryOptions& options, double turn) {
  check_inputs_at_compile_time<Input>();
  check_outputs_at_compile_time<scalar_t<Input>, Out>();
  const Require require(function);
  const Index width = rotary_width(require, extent(input),
                                   static_cast<Index>(std::ranges::size(positions)), options);
  require.shape("out", extent(out), extent(input), "the shape of the input");
  const auto& from = stored(input);
  const auto position = [at = std::ranges::begin(positions)](Index row) {
    return at[static_cast<std::ptrdiff_t>(row)];
  };
  rotate<scalar_t<Input>>(view(from), position, view(out), options, width, turn);
}

}  // namespace detail

/// The positions of the rows of a matrix: a view of numbers side by side, signed integers of 32 or
/// 64 bits, float or double (times need not be regular). They must outlive the call.
class Positions {
 public:
  constexpr Positions() = default;

  /// Implicit, so that `.x_positions = times` reads as it should.
  template <detail::StoredPositions Range>
  Positions(const Range& numbers)
      : data_(std::ranges::data(numbers)),
        size_(static_cast<Index>(std::ranges::size(numbers))),
        kind_(kind_of<std::ranges::range_value_t<const Range>>()) {}

  /// Temporary numbers would be gone before they are used.
  template <detail::TemporaryRange Range>
  requires detail::StoredPositions<Range> Positions(const Range&&)
  = delete;

  Index size() const { return size_; }
  bool is_given() const { return data_ != nullptr || size_ > 0; }

  double operator[](Index place) const {
    switch (kind_) {
      case Kind::int32:
        return static_cast<double>(read<std::int32_t>(place));
      case Kind::int64:
        return static_cast<double>(read<std::int64_t>(place));
      case Kind::float32:
        return static_cast<double>(read<float>(place));
      case Kind::float64:
        break;
    }
    return read<double>(place);
  }

 private:
  enum class Kind { int32, int64, float32, float64 };

  template <class Number>
  static constexpr Kind kind_of() {
    if constexpr (std::is_integral_v<Number>)
      return sizeof(Number) == 8 ? Kind::int64 : Kind::int32;
    return sizeof(Number) == 8 ? Kind::float64 : Kind::float32;
  }

  template <class Number>
  Number read(Index place) const {
    Number number;
    std::memcpy(&number, static_cast<const Number*>(data_) + place, sizeof number);
    return number;
  }

  const void* data_ = nullptr;
  Index size_ = 0;
  Kind kind_ = Kind::int64;
};

/// The rows of `input`, T × (H·d), turned by their positions, into `out` of the same shape, without
/// allocating. `out` may be the input itself, and otherwise overlaps none of it. `positions` is a
/// range of T numbers, of any arithmetic type: those of a batch's sequences begin anew, those of
/// new tokens after a cache go on. Time O(T·d·H), and T·d/2 sines. Errors: columns that do not
/// divide into heads, an odd or too large width, not one position for each row, a base that is not
/// positive.
template <class Input, detail::PositionRange Positions, class Out>
void rotate_into(const Input& input, const Positions& positions, Out&& out,
                 const RotaryOptions& options) {
  detail::rotate_checked("rotate", input, positions, out, options, 1);
}

/// The gradient with respect to the input from that of the output, without allocating: turned back.
/// `grad_input` may be `grad_out` itself.
template <class GradOut, detail::PositionRange Positions, class GradInput>
void rotate_backward_into(const GradOut& grad_out, const Positions& positions,
                          GradInput&& grad_input, const RotaryOptions& options) {
  detail::rotate_checked("rotate_backward", grad_out, positions, grad_input, options, -1);
}

/// The same into a new matrix.
template <class Input, detail::PositionRange Positions>
auto rotate(const Input& input, const Positions& positions, const RotaryOptions& options) {
  Matrix<detail::scalar_t<Input>> out(input.rows(), input.cols());
  rotate_into(input, positions, out, options);
  return out;
}

template <class GradOut, detail::PositionRange Positions>
auto rotate_backward(const GradOut& grad_out, const Positions& positions,
                     const RotaryOptions& options) {
  Matrix<detail::scalar_t<GradOut>> grad_input(grad_out.rows(), grad_out.cols());
  rotate_backward_into(grad_out, positions, grad_input, options);
  return grad_input;
}

}  // namespace surfattn

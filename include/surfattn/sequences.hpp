// surfattn layer 1: how the rows of a batch divide into sequences

#pragma once

#include <cstdint>
#include <cstring>
#include <iterator>
#include <ranges>
#include <surfattn/types.hpp>
#include <type_traits>

namespace surfattn {
namespace detail {

/// A vector of Eigen, matrix or array, whose numbers lie side by side. (Its iterators do not say so.)
template <class T>
concept ContiguousVector = requires(const T& vector) {
  vector.data();
  requires(bool(T::IsVectorAtCompileTime) && T::InnerStrideAtCompileTime == 1);
};

/// Numbers side by side in memory that outlive the call: a vector, of Eigen as well, an array or a span.
template <class T>
concept NumbersInMemory = std::ranges::sized_range<const T> &&
    (std::ranges::contiguous_range<const T> || ContiguousVector<T>);

/// Such numbers that are signed integers of 32 or 64 bits.
template <class T>
concept OffsetRange = NumbersInMemory<std::remove_reference_t<T>> &&
    std::is_integral_v<std::ranges::range_value_t<const std::remove_reference_t<T>>> &&
    std::is_signed_v<std::ranges::range_value_t<const std::remove_reference_t<T>>> &&
    (sizeof(std::ranges::range_value_t<const std::remove_reference_t<T>>) == 4 ||
     sizeof(std::ranges::range_value_t<const std::remove_reference_t<T>>) == 8);

/// What may be meant for them, and is not.
template <class... T>
concept OtherRanges = (std::ranges::sized_range<const T> && ...) && !(OffsetRange<T> && ...);

/// Such numbers, but in an object that would be gone before they are used.
template <class T>
concept TemporaryRange =
    !std::is_lvalue_reference_v<T> && !std::ranges::borrowed_range<std::remove_cvref_t<T>>;

/// A view of signed 32- or 64-bit integers, whatever their type is called.
class IntegerView {
 public:
  constexpr IntegerView() = default;

  template <OffsetRange Range>
  explicit IntegerView(const Range& numbers)
      : data_(std::ranges::data(numbers)),
        size_(static_cast<Index>(std::ranges::size(numbers))),
        is_wide_(sizeof(std::ranges::range_value_t<const Range>) == 8) {}

  Index size() const { return size_; }

  IntegerView part(Index first, Index count) const {
    IntegerView part = *this;
    part.data_ = static_cast<const char*>(data_) + first * (is_wide_ ? 8 : 4);
    part.size_ = count;
    return part;
  }

  bool is_sorted() const {
    for (Index place = 1; place < size_; ++place) {
      if ((*this)[place] < (*this)[place - 1]) return false;
    }
    return true;
  }

  Index operator[](Index place) const {
    return is_wide_ ? read<std::int64_t>(place) : read<std::int32_t>(place);
  }

  /// Calls `use` with a function that reads a number at a place, for use in loops.
  template <class Use>
  void with_reader(const Use& use) const {
    if (is_wide_) {
      use([this](Index place) { return read<std::int64_t>(place); });
    } else {
      use([this](Index place) { return read<std::int32_t>(place); });
    }
  }

 private:
  template <class Integer>
  Index read(Index place) const {
    Integer number;
    std::memcpy(&number, static_cast<const Integer*>(data_) + place, sizeof number);
    return static_cast<Index>(number);
  }

  const void* data_ = nullptr;
  Index size_ = 0;
  bool is_wide_ = true;
};

}  // namespace detail

/// How the rows of queries and keys divide into sequences, each of which attends to itself alone:
/// a batch in one call. The sequences lie packed, one after the other, without padding.
///
/// n sequences are named by n + 1 offsets, as is usual for packed batches of variable length:
/// sequence s owns the rows from offsets[s] up to but not including offsets[s + 1], so that the
/// first offset is 0, the last one the number of rows, and an empty sequence repeats an offset.
/// Offsets are any contiguous range of signed 32- or 64-bit integers, a vector of Eigen too, the same for
/// queries and keys or one for each. A view: they must outlive the call.
///
///     attention(q, k, v, {.sequences = offsets});                    // self-attention
///     attention(q, k, v, {.sequences = {query_offsets, key_offsets}});
///     attention(q, k, v, {.sequences = Sequences::equal(64)});       // 64 of one length
///
/// Memory in which heads come before tokens, (batch, heads, length, width), is, where there are as
/// many key heads as query heads, a batch of batch·heads sequences of one head each, seen through a
/// Map with batch·heads·length rows: Sequences::equal(batch * heads), and nothing is copied. (Terms
/// that differ from head to head then see one head only.)
class Sequences {
 public:
  /// All rows are one sequence.
  constexpr Sequences() = default;

  /// `count` sequences of the same length, count ≥ 1; the rows must divide.
  static constexpr Sequences equal(Index count) {
    Sequences sequences;
    sequences.count_ = count;
    return sequences;
  }

  template <detail::OffsetRange Offsets>
  Sequences(const Offsets& offsets)  // implicit, so that `.sequences = offsets` reads as it should
      : Sequences(offsets, offsets) {}

  template <detail::OffsetRange QueryOffsets, detail::OffsetRange KeyOffsets>
  Sequences(const QueryOffsets& query_offsets, const KeyOffsets& key_offsets)
      : count_(static_cast<Index>(std::ranges::size(query_offsets)) - 1),
        are_equal_(false),
        query_offsets_(query_offsets),
        key_offsets_(key_offsets) {}

  template <class... Offsets>
  requires((sizeof...(Offsets) == 1 || sizeof...(Offsets) == 2) && detail::OtherRanges<Offsets...>)
      Sequences(const Offsets&...) {
    static_assert(
        !detail::OtherRanges<Offsets...>,
        "surfattn: offsets of sequences must be contiguous signed 32- or 64-bit integers");
  }

  /// Temporary offsets would be gone before they are used.
  template <detail::TemporaryRange Offsets>
  requires detail::OffsetRange<Offsets> Sequences(const Offsets&&)
  = delete;
  template <detail::OffsetRange QueryOffsets, detail::OffsetRange KeyOffsets>
  requires(detail::TemporaryRange<QueryOffsets> || detail::TemporaryRange<KeyOffsets>)
      Sequences(QueryOffsets&&, KeyOffsets&&)
  = delete;

  /// The number of sequences.
  Index count() const { return count_; }

  bool are_equal() const { return are_equal_; }
  const detail::IntegerView& query_offsets() const { return query_offsets_; }
  const detail::IntegerView& key_offsets() const { return key_offsets_; }

 private:
  Index count_ = 1;
  bool are_equal_ = true;
  detail::IntegerView query_offsets_, key_offsets_;
};

}  // namespace surfattn

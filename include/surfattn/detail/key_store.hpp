// surfattn layer 5: the memory of a cache of keys

#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <surfattn/detail/operands.hpp>
#include <utility>

namespace surfattn::detail {

/// Numbers that a cache holds for each key; 0 for what it does not hold.
struct KeyWidths {
  Index keys = 0;
  Index values = 0;
  Index log_prior = 0;
  bool operator==(const KeyWidths&) const = default;
};

/// Memory for `keys.rows()` keys.
template <class Scalar>
struct KeyMemory {
  Matrix<Scalar> keys;
  Matrix<Scalar> values;
  Matrix<accumulator_t<Scalar>> log_prior;
  /// rows written so far: what lies behind them, nobody else can be reading
  Index written = 0;

  KeyMemory(Index rows, const KeyWidths& widths)
      : keys(rows, widths.keys), values(rows, widths.values), log_prior(rows, widths.log_prior) {}

  Index rows() const { return keys.rows(); }
  KeySegment<Scalar> segment(Index first, Index count) const {
    return {view(keys).block_rows(first, count), view(values).block_rows(first, count),
            view(log_prior).block_rows(first, count)};
  }
  void copy(Index to, Index first, Index count, const KeyMemory& from) {
    keys.middleRows(to, count) = from.keys.middleRows(first, count);
    values.middleRows(to, count) = from.values.middleRows(first, count);
    log_prior.middleRows(to, count) = from.log_prior.middleRows(first, count);
    written = std::max(written, to + count);
  }
};

/// A queue of keys: appended at the end, dropped from the front, oldest first. They lie in at most
/// two segments of memory, in one of two ways:
///
/// * in memory of its own, used as a ring;
/// * at first in memory shared with the store that this one was forked from (the past, which nobody
///   writes to any more), then in memory of its own from its first row on.
///
/// Rows that a fork may be reading are never written: who would have to, takes new memory first.
template <class Scalar>
class KeyStore {
 public:
  /// A store that never takes memory for more than `most` keys, if given.
  KeyStore(const KeyWidths& widths, Index capacity, std::optional<Index> most = {})
      : widths_(widths), most_(most) {
    if (capacity > 0) own_ = make(capacity);
  }

  // A copy would be a second writer of the same memory: see fork.
  KeyStore(const KeyStore&) = delete;
  KeyStore& operator=(const KeyStore&) = delete;
  KeyStore(KeyStore&& other) noexcept : widths_(other.widths_), most_(other.most_) { swap(other); }
  KeyStore& operator=(KeyStore&& other) noexcept {
    KeyStore(std::move(other)).swap(*this);
    return *this;
  }

  const KeyWidths& widths() const { return widths_; }
  Index size() const { return past_size_ + size_; }

  /// Keys for which there is memory, those of the past included.
  Index capacity() const { return past_size_ + rows(); }

  /// The older segment and the newer one; the second is empty where there is one.
  std::pair<KeySegment<Scalar>, KeySegment<Scalar>> segments() const {
    if (past_size_ > 0) return {past_->segment(past_first_, past_size_), own(0, size_)};
    return {own(first_, until_end()), own(0, size_ - until_end())};
  }

  /// Makes room for `count` more keys, of which there will be when `dropping` keys have gone from
  /// the front: takes new memory where there is too little, or where a fork reads what would be
  /// written.
  void reserve(Index count, Index dropping = 0) {
    const Index left = size_ - std::max<Index>(0, dropping - past_size_);
    if (left + count > rows()) {
      move_to(std::max({left + count, size_, within_most(2 * rows())}));
    } else if (is_read_by_forks() &&
               (first_ + size_ + count > rows() || first_ + size_ < own_->written)) {
      move_to(rows());
    }
  }

  /// Appends `count` keys: calls write(memory, row, n, count) for each run of `count` rows from
  /// `row` on that receives the keys from the n-th one on. There must be room.
  template <class Write>
  void append(Index count, const Write& write) {
    for (Index done = 0; done < count;) {
      const Index row = (first_ + size_) % rows();
      const Index run = std::min(count - done, rows() - row);
      write(*own_, row, done, run);
      own_->written = std::max(own_->written, row + run);
      size_ += run;
      done += run;
    }
  }

  void drop_front(Index count) {
    const Index of_past = std::min(count, past_size_);
    past_first_ += of_past;
    past_size_ -= of_past;
    if (past_size_ == 0) past_.reset();
    if (count == of_past) return;
    size_ -= count - of_past;
    first_ = (first_ + count - of_past) % rows();
  }

  void drop_back(Index count) {
    const Index of_own = std::min(count, size_);
    size_ -= of_own;
    past_size_ -= count - of_own;
    if (past_size_ == 0) past_.reset();
  }

  /// A store of the same keys. Those that lie in one piece are shared; of a past that is shared
  /// already and what follows it, only the latter is copied, with room for some more keys.
  KeyStore fork(Index capacity) const {
    const bool is_in_one_piece = past_size_ == 0 && until_end() == size_;
    if (is_in_one_piece) {
      KeyStore fork(widths_, within_most(capacity), most_);
      fork.share(own_, first_, size_);
      return fork;
    }
    KeyStore fork(widths_, 0, most_);
    if (past_size_ > 0) fork.share(past_, past_first_, past_size_);
    constexpr Index some = 16;
    fork.own_ = copy_of_own(within_most(size_ + std::max(capacity, some)));
    fork.size_ = size_;
    return fork;
  }

 private:
  using Memory = KeyMemory<Scalar>;

  void swap(KeyStore& other) noexcept {
    std::swap(widths_, other.widths_);
    std::swap(most_, other.most_);
    past_.swap(other.past_);
    std::swap(past_first_, other.past_first_);
    std::swap(past_size_, other.past_size_);
    own_.swap(other.own_);
    std::swap(first_, other.first_);
    std::swap(size_, other.size_);
  }

  std::shared_ptr<Memory> make(Index rows) const { return std::make_shared<Memory>(rows, widths_); }

  Index rows() const { return own_ ? own_->rows() : 0; }
  Index within_most(Index rows) const { return std::min(rows, most_.value_or(rows)); }
  /// Own keys until the ring comes round.
  Index until_end() const { return std::min(size_, rows() - first_); }
  KeySegment<Scalar> own(Index first, Index count) const {
    return own_ ? own_->segment(first, count) : KeySegment<Scalar>{};
  }

  bool is_read_by_forks() const {
    // The copy's end makes what a fork read before it ended come before what is written here.
    const std::shared_ptr<Memory> synchronise = own_;
    return own_.use_count() > 2;
  }

  void share(std::shared_ptr<const Memory> memory, Index first, Index count) {
    if (count == 0) return;
    past_ = std::move(memory);
    past_first_ = first;
    past_size_ = count;
  }

  std::shared_ptr<Memory> copy_of_own(Index rows) const {
    auto memory = make(rows);
    if (size_ == 0) return memory;
    memory->copy(0, first_, until_end(), *own_);
    memory->copy(until_end(), 0, size_ - until_end(), *own_);
    return memory;
  }

  void move_to(Index rows) {
    own_ = copy_of_own(rows);
    first_ = 0;
  }

  KeyWidths widths_;
  std::optional<Index> most_;
  std::shared_ptr<const Memory> past_;
  Index past_first_ = 0, past_size_ = 0;
  std::shared_ptr<Memory> own_;  ///< null where there is none yet
  Index first_ = 0, size_ = 0;   ///< `first_` is 0 while there is a past
};

}  // namespace surfattn::detail

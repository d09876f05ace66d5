// surfattn layer 5: the memory of a cache of keys

#pragma once

#include <algorithm>
#include <atomic>
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
  KeyStore(const KeyWidths& widths, Index capacity) : widths_(widths), own_(make(capacity)) {}

  const KeyWidths& widths() const { return widths_; }
  Index size() const { return past_size_ + size_; }

  /// Keys for which there is memory, those of the past included.
  Index capacity() const { return past_size_ + own_->rows(); }

  /// The older segment and the newer one; the second is empty where there is one.
  std::pair<KeySegment<Scalar>, KeySegment<Scalar>> segments() const {
    if (past_size_ > 0) return {past_->segment(past_first_, past_size_), own_->segment(0, size_)};
    const Index until_end = std::min(size_, own_->rows() - first_);
    return {own_->segment(first_, until_end), own_->segment(0, size_ - until_end)};
  }

  /// Makes room for `count` more keys, of which there will be when `dropping` keys have gone from
  /// the front: takes new memory where there is too little, or where a fork reads what would be
  /// written.
  void reserve(Index count, Index dropping = 0) {
    const Index left = size_ - std::max<Index>(0, dropping - past_size_);
    if (left + count > own_->rows()) {
      move_to(std::max({left + count, size_, 2 * own_->rows()}));
    } else if (is_read_by_forks() &&
               (first_ + size_ + count > own_->rows() || first_ + size_ < own_->written)) {
      move_to(own_->rows());
    }
  }

  /// Appends `count` keys: calls write(memory, row, n, count) for each run of `count` rows from
  /// `row` on that receives the keys from the n-th one on. There must be room.
  template <class Write>
  void append(Index count, const Write& write) {
    for (Index done = 0; done < count;) {
      const Index row = (first_ + size_) % own_->rows();
      const Index run = std::min(count - done, own_->rows() - row);
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
    first_ = (first_ + count - of_past) % own_->rows();
  }

  /// A store of the same keys. Those that lie in one piece are shared; of a past that is shared
  /// already and what follows it, only the latter is copied.
  KeyStore fork(Index capacity) const {
    KeyStore fork(widths_, 0);
    const bool is_in_one_piece = past_size_ == 0 && first_ + size_ <= own_->rows();
    if (is_in_one_piece) {
      fork.share(own_, first_, size_);
      if (capacity > 0) fork.own_ = make(capacity);
      return fork;
    }
    if (past_size_ > 0) fork.share(past_, past_first_, past_size_);
    fork.own_ = copy_of_own(size_ + capacity);
    fork.size_ = size_;
    return fork;
  }

 private:
  std::shared_ptr<KeyMemory<Scalar>> make(Index rows) const {
    return std::make_shared<KeyMemory<Scalar>>(rows, widths_);
  }

  bool is_read_by_forks() const {
    if (own_.use_count() > 1) return true;
    // What a fork read before it ended comes before what is written here.
    std::atomic_thread_fence(std::memory_order_acquire);
    return false;
  }

  void share(std::shared_ptr<const KeyMemory<Scalar>> memory, Index first, Index count) {
    if (count == 0) return;
    past_ = std::move(memory);
    past_first_ = first;
    past_size_ = count;
  }

  std::shared_ptr<KeyMemory<Scalar>> copy_of_own(Index rows) const {
    auto memory = make(rows);
    const Index until_end = std::min(size_, own_->rows() - first_);
    memory->copy(0, first_, until_end, *own_);
    memory->copy(until_end, 0, size_ - until_end, *own_);
    return memory;
  }

  void move_to(Index rows) {
    own_ = copy_of_own(rows);
    first_ = 0;
  }

  KeyWidths widths_;
  std::shared_ptr<const KeyMemory<Scalar>> past_;
  Index past_first_ = 0, past_size_ = 0;
  std::shared_ptr<KeyMemory<Scalar>> own_;  ///< never null
  Index first_ = 0, size_ = 0;              ///< `first_` is 0 while there is a past
};

}  // namespace surfattn::detail

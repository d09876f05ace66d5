// surfattn layer 3: dropout of weights

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <surfattn/detail/philox.hpp>
#include <surfattn/terms/term.hpp>

namespace surfattn {
namespace detail {

/// Dropout with its key. The random word of the pair (head, query, key) of a sequence is word
/// key mod 4 of the Philox block at the counter (key/4, query, head, sequence).
struct BoundDropout {
  PhiloxKey philox_key;
  std::uint64_t threshold;  ///< words below it drop the weight: p·2³²
  double scale;             ///< 1/(1 − p)
  std::uint32_t sequence;

  template <class Accumulator>
  void factors(const Position& first, Index keys, Accumulator* out) const {
    if (threshold == 0) return std::fill(out, out + keys, Accumulator(1));
    Accumulator numbers[4 * blocks];
    for (Index done = 0; done < keys;) {
      const Index key = first.key + done, skipped = key % 4;
      factors_of_blocks({first.head, first.query, key / 4}, numbers);
      const Index count = std::min(4 * blocks - skipped, keys - done);
      std::copy(numbers + skipped, numbers + skipped + count, out + done);
      done += count;
    }
  }

 private:
  static constexpr Index blocks = 16;  ///< at a time, in the lanes of vectors

  /// The factors of four keys for each of the blocks from `first.key` on.
  template <class Accumulator>
  void factors_of_blocks(const Position& first, Accumulator (&factors)[4 * blocks]) const {
    std::uint32_t words[4][blocks];
    for (Index n = 0; n < blocks; ++n) {
      words[0][n] = static_cast<std::uint32_t>(first.key + n);
      words[1][n] = static_cast<std::uint32_t>(first.query);
      words[2][n] = static_cast<std::uint32_t>(first.head);
      words[3][n] = sequence;
    }
    philox(philox_key, words);
    const auto kept = static_cast<Accumulator>(scale);
    const auto last_dropped = static_cast<std::uint32_t>(threshold - 1);
    for (Index n = 0; n < blocks; ++n) {
      SURFATTN_UNROLL
      for (Index w = 0; w < 4; ++w)
        factors[4 * n + w] = words[w][n] <= last_dropped ? Accumulator(0) : kept;
    }
  }
};

}  // namespace detail

/// Dropout of weights after the softmax (Srivastava et al. 2014): each weight is 0 with probability
/// p and is otherwise divided by 1 − p, so that the expected output is that without dropout. The
/// log-sum-exp does not know of it. The same in the backward pass: dW = M∘dP, with M the factors.
///
/// Which weights are dropped is a function of seed, offset, sequence, query head, query and key
/// alone (Philox4x32-10), the same forward and backward, for every tiling and on any number of
/// threads. Sequences of a batch are numbered from `first_sequence` on. Give every call of a training
/// run its own offset.
struct Dropout {
  double probability = 0;    ///< p, in [0, 1)
  std::uint64_t seed = 0;    ///< of the run
  std::uint64_t offset = 0;  ///< of the call: step and layer, say
  Index first_sequence = 0;  ///< number of the first sequence of the call

  detail::BoundDropout bind(const detail::Shape& shape, const detail::Require& require) const {
    if (!(probability >= 0 && probability < 1)) {
      require.fail("the probability of Dropout must lie in [0, 1), but it is " +
                   std::to_string(probability));
    }
    constexpr std::uint64_t words = std::uint64_t(1) << 32;
    const auto fits = [](Index count) { return static_cast<std::uint64_t>(count) <= words; };
    const Index sequence = first_sequence + shape.sequence;
    if (!fits(sequence) || !fits(shape.queries) || !fits(shape.keys / 4)) {
      require.fail(
          "Dropout counts at most 2³² sequences and queries and 2³⁴ keys, but sequence is " +
          std::to_string(sequence) + ", queries is " + detail::words(shape.queries_extent()) +
          " and keys is " + detail::words(shape.keys_extent()));
    }
    const auto threshold = static_cast<std::uint64_t>(std::ceil(probability * 0x1p32));
    return {key(), threshold, 1 / (1 - probability), static_cast<std::uint32_t>(sequence)};
  }

 private:
  /// A key for this offset: the first words of the seed's block at the counter `offset`.
  detail::PhiloxKey key() const {
    const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
    const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
    std::uint32_t block[4][1] = {{low(offset)}, {high(offset)}, {0}, {0}};
    detail::philox({low(seed), high(seed)}, block);
    return {block[0][0], block[1][0]};
  }
};

}  // namespace surfattn

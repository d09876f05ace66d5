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
  PhiloxKeys round_keys;
  std::uint64_t threshold;  ///< words below it drop the weight: p·2³²
  double scale;             ///< 1/(1 − p)
  std::uint32_t sequence;

  /// Never inlined: a compiler that has run out of registers would keep the words in memory.
  template <class Accumulator>
  SURFATTN_NEVER_INLINE void factors(const Position& first, Index keys, Accumulator* out) const {
    if (threshold == 0) return std::fill(out, out + keys, Accumulator(1));
    std::uint32_t words[at_a_time];
    Accumulator factors[at_a_time];
    for (Index done = 0; done < keys;) {
      const Index key = first.key + done, skipped = key % 4;
      store_words_of_blocks({first.head, first.query, key / 4}, words);
      const Index count = std::min(at_a_time - skipped, keys - done);
      const bool all = count == at_a_time;
      to_factors(words, all ? out + done : factors);
      if (!all) std::copy(factors + skipped, factors + skipped + count, out + done);
      done += count;
    }
  }

 private:
  static constexpr Index blocks = 16, at_a_time = 4 * blocks;

  /// The words of the blocks from `first.key` on.
  SURFATTN_ALWAYS_INLINE void store_words_of_blocks(const Position& first,
                                                    std::uint32_t (&words)[at_a_time]) const {
    const auto all = [](auto number) { return WordLanes{} + static_cast<std::uint64_t>(number); };
    for (Index n = 0; n < blocks; n += word_lanes) {
      WordLanes counters[] = {all(first.key + n) + lane_numbers(), all(first.query),
                              all(first.head), all(sequence)};
      philox(round_keys, counters);
      store_words(words + 4 * n, counters);
    }
  }

  template <class Accumulator>
  SURFATTN_ALWAYS_INLINE void to_factors(const std::uint32_t (&words)[at_a_time],
                                         Accumulator* factors) const {
    const auto kept = simd::broadcast(static_cast<Accumulator>(scale));
    const auto last_dropped = static_cast<std::uint32_t>(threshold - 1);
    for (Index n = 0; n < at_a_time; n += simd::lanes<Accumulator>) {
      simd::store_unaligned(factors + n,
                            simd::zero_unless_above<Accumulator>(words + n, last_dropped, kept));
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
      require.fail("the probability of Dropout must lie in [0, 1), but it is ", probability);
    }
    constexpr std::uint64_t words = std::uint64_t(1) << 32;
    const auto fits = [](Index count) { return static_cast<std::uint64_t>(count) <= words; };
    const Index sequence = first_sequence + shape.sequence;
    if (!fits(sequence) || !fits(shape.queries) || !fits(shape.keys / 4)) {
      require.fail(
          "Dropout counts at most 2³² sequences and queries and 2³⁴ keys, but sequence is ",
          sequence, ", queries is ", shape.queries_extent(), " and keys is ", shape.keys_extent());
    }
    const auto threshold = static_cast<std::uint64_t>(std::ceil(probability * 0x1p32));
    return {detail::PhiloxKeys(key()), threshold, 1 / (1 - probability),
            static_cast<std::uint32_t>(sequence)};
  }

 private:
  /// A key for this offset: the first words of the seed's block at the counter `offset`.
  detail::PhiloxKey key() const {
    const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
    const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
    detail::WordLanes block[4] = {};
    block[0][0] = low(offset), block[1][0] = high(offset);
    detail::philox(detail::PhiloxKeys({low(seed), high(seed)}), block);
    return {low(block[0][0]), low(block[1][0])};
  }
};

}  // namespace surfattn

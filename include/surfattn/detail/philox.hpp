// surfattn layer 2: the counter-based generator Philox4x32-10

#pragma once

#include <array>
#include <cstdint>
#include <surfattn/detail/simd/packet.hpp>

namespace surfattn::detail {

/// As many counters at a time as a vector has lanes for: each of their words stands in the lower half
/// of a lane of its own, where products find it and have room.
using simd::WordLanes;
inline constexpr int word_lanes = static_cast<int>(simd::lanes<double>);

/// 0, 1, 2, …
SURFATTN_ALWAYS_INLINE WordLanes lane_numbers() {
  return []<int... I>(simd::int_sequence<I...>) { return WordLanes{I...}; }
  (simd::int_sequence_up_to<word_lanes>());
}

using PhiloxKey = std::array<std::uint32_t, 2>;

inline constexpr int philox_rounds = 10;

/// The keys of all rounds.
struct PhiloxKeys {
  std::uint64_t of_round[philox_rounds][2];

  explicit PhiloxKeys(PhiloxKey key) {
    for (auto& round : of_round) {
      round[0] = key[0], round[1] = key[1];
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
  }
};

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"):
/// a bijection of 128-bit counters for each 64-bit key, whose outputs pass all statistical tests
/// known then. Several counters at a time, in place: word w of counter n is lane n of counters[w].
SURFATTN_ALWAYS_INLINE void philox(const PhiloxKeys& keys, WordLanes (&counters)[4]) {
  const WordLanes multipliers[] = {WordLanes{} + 0xD2511F53u, WordLanes{} + 0xCD9E8D57u};
  for (const auto& key : keys.of_round) {
    const WordLanes first = simd::multiply_words(counters[0], multipliers[0]),
                    second = simd::multiply_words(counters[2], multipliers[1]);
    counters[0] = (second >> 32) ^ counters[1] ^ key[0];
    counters[1] = second;
    counters[2] = (first >> 32) ^ counters[3] ^ key[1];
    counters[3] = first;
  }
}

/// The words of every counter side by side, one counter after the other.
SURFATTN_ALWAYS_INLINE void store_words(std::uint32_t* to, const WordLanes (&words)[4]) {
  constexpr std::uint64_t word = 0xffffffffu;
  const WordLanes pairs[] = {(words[0] & word) | words[1] << 32,
                             (words[2] & word) | words[3] << 32};
  [&]<int... I>(simd::int_sequence<I...>) {
    constexpr int n = word_lanes;
    const WordLanes counters[] = {
        __builtin_shufflevector(pairs[0], pairs[1], (I / 2 + I % 2 * n)...),
        __builtin_shufflevector(pairs[0], pairs[1], ((I + n) / 2 + (I + n) % 2 * n)...)};
    __builtin_memcpy(to, counters, sizeof counters);
  }
  (simd::int_sequence_up_to<word_lanes>());
}

}  // namespace surfattn::detail

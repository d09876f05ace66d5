// surfattn layer 2: the counter-based generator Philox4x32-10

#pragma once

#include <array>
#include <cstdint>
#include <surfattn/types.hpp>

namespace surfattn::detail {

using PhiloxKey = std::array<std::uint32_t, 2>;

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"):
/// a bijection of 128-bit counters for each 64-bit key, whose outputs pass all statistical tests
/// known then. `count` counters at a time, in place: word w of counter n is counters[w][n].
template <Index count>
void philox(PhiloxKey key, std::uint32_t (&counters)[4][count]) {
  constexpr std::uint64_t multipliers[] = {0xD2511F53u, 0xCD9E8D57u};
  for (int round = 0; round < 10; ++round) {
    for (Index n = 0; n < count; ++n) {
      const std::uint64_t first = multipliers[0] * counters[0][n],
                          second = multipliers[1] * counters[2][n];
      counters[0][n] = static_cast<std::uint32_t>(second >> 32) ^ counters[1][n] ^ key[0];
      counters[1][n] = static_cast<std::uint32_t>(second);
      counters[2][n] = static_cast<std::uint32_t>(first >> 32) ^ counters[3][n] ^ key[1];
      counters[3][n] = static_cast<std::uint32_t>(first);
    }
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

}  // namespace surfattn::detail

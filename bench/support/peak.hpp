// What this core can do at most, measured in the same process as everything that is compared with it.
#pragma once

#include <algorithm>
#include <chrono>
#include <surfattn/detail/simd/tile_products.hpp>

namespace surfattn::bench {

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Fused multiply-adds on numbers that never leave the registers: 12 independent chains of packets, which hide the latency of any
/// current core. Returns flops a second, the best of several short runs.
template <class Scalar>
double fma_peak() {
  using namespace detail::simd;
  constexpr int chains = 12;
  constexpr long steps = 200000;
  double best = 0;
  for (int run = 0; run < 20; ++run) {
    Packet<Scalar> sums[chains];
    for (int chain = 0; chain < chains; ++chain) {
      volatile Scalar start =
          Scalar(1 + chain);  // unknown to the compiler, which would merge equal chains
      sums[chain] = broadcast(Scalar(start));
    }
    auto factor = broadcast(Scalar(0.999)), addend = broadcast(Scalar(0.001));
    const auto start = std::chrono::steady_clock::now();
    for (long step = 0; step < steps; ++step) {
      SURFATTN_UNROLL
      for (int chain = 0; chain < chains; ++chain)
        sums[chain] = multiply_add(sums[chain], factor, addend);
      asm volatile("" : : : "memory");
    }
    const double seconds = seconds_since(start);
    Packet<Scalar> total = sums[0];
    for (int chain = 1; chain < chains; ++chain) total = add(total, sums[chain]);
    volatile Scalar used = sum(total);
    static_cast<void>(used);
    best = std::max(best, 2.0 * chains * double(lanes<Scalar>) * double(steps) / seconds);
  }
  return best;
}

}  // namespace surfattn::bench

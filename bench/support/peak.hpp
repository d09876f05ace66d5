// What the machine can do at most: loops of arithmetic and of reading, to run between the timings that are compared with them.
#pragma once

#include <surfattn/detail/simd/packet.hpp>
#include <utility>

namespace surfattn::bench {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline constexpr bool fused = true;
#else
inline constexpr bool fused = false;
#endif

/// Independent chains of operations, enough to hide the latency of any current core; with two
/// operands more they fill 16 registers.
inline constexpr int chain_count = 14;

/// Floating-point operations of one step of all chains.
template <class Scalar>
inline constexpr double flops_per_step =
    (fused ? 2.0 : 1.0) * chain_count* double(detail::simd::lanes<Scalar>);

/// One step of one chain: a fused multiply-add, or, where the target has none, a multiplication in
/// every second chain and an addition in the others.
template <int number, class Packet>
SURFATTN_ALWAYS_INLINE Packet advance(Packet chain, Packet factor, Packet addend) {
  if constexpr (fused) return chain * factor + addend;
  return number % 2 ? chain * factor : chain + addend;
}

/// Every chain is a variable of its own, never an element of an array, which compilers may keep in
/// memory.
template <int... number, class Packet, class... Chains>
SURFATTN_ALWAYS_INLINE Packet run_chains(std::integer_sequence<int, number...>, long steps,
                                         Packet factor, Packet addend, Chains... chains) {
  for (long step = 0; step < steps; step += 4) {
    SURFATTN_UNROLL
    for (int repeat = 0; repeat < 4; ++repeat)
      ((chains = advance<number>(chains, factor, addend)), ...);
  }
  return (chains + ...);
}

/// `steps` (a multiple of 4) · flops_per_step<Scalar> floating-point operations on numbers that
/// never leave the registers.
template <class Scalar>
void run_flop_loop(long steps) {
  using namespace detail::simd;
  volatile Scalar one = Scalar(1), zero = Scalar(0);  // unknown to the compiler
  const auto run = [&]<int... number>(std::integer_sequence<int, number...> numbers) {
    return sum(run_chains(numbers, steps, broadcast(Scalar(one)), broadcast(Scalar(zero)),
                          broadcast(Scalar(number + one))...));
  };
  volatile Scalar used = run(std::make_integer_sequence<int, chain_count>());
  static_cast<void>(used);
}

/// Several sums at a time, as many as there are `sums`.
template <class Scalar, class... Packets>
SURFATTN_ALWAYS_INLINE Scalar sum_of_all(const Scalar* from, Index count, Packets... sums) {
  using namespace detail::simd;
  constexpr Index step = lanes<Scalar> * Index(sizeof...(Packets));
  for (const Scalar* end = from + count; end - from >= step;)
    ((sums = add(sums, load_unaligned(from)), from += lanes<Scalar>), ...);
  return sum((sums + ...));
}

/// Reads `count` numbers in order, once each, but for a rest of less than 512 bytes.
template <class Scalar>
void run_read_loop(const Scalar* from, Index count) {
  const auto zero = detail::simd::broadcast(Scalar(0));
  volatile Scalar used = sum_of_all(from, count, zero, zero, zero, zero, zero, zero, zero, zero);
  static_cast<void>(used);
}

}  // namespace surfattn::bench

// surfattn layer 2: the packets of Eigen; the only file that names Eigen's internals

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <surfattn/types.hpp>
#include <type_traits>
#include <utility>

/// The vectors of the target, by Eigen's names for them: AVX-512, AVX2, SSE, NEON and plain scalars
/// all follow from Eigen's packet traits. A `Packet<Scalar>` holds `lanes<Scalar>` numbers.
/// Everything above this file is written in these few functions.
namespace surfattn::detail::simd {

template <class Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

template <class Scalar>
inline constexpr Index lanes = Eigen::internal::unpacket_traits<Packet<Scalar>>::size;

/// Numbers in a line of memory.
template <class Scalar>
inline constexpr Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Scalar)));

/// Whether a line is a single packet. How far a processor works ahead is counted in instructions, and so
/// in lines twice as far as where a line is two packets.
inline constexpr bool packets_are_lines = lanes<float> >= line<float>;

/// Registers that hold packets; 16 for AVX2 and SSE, 32 for AVX-512 and NEON.
inline constexpr int registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;

template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> broadcast(Scalar value) {
  return Eigen::internal::pset1<Packet<Scalar>>(value);
}

/// Whether `broadcast` of a number in memory costs more than a load: SSE shuffles it afterwards, in
/// units that multiply and add.
template <class Scalar>
inline constexpr bool broadcasts_by_shuffling =
#if defined(EIGEN_VECTORIZE_SSE) && !defined(EIGEN_VECTORIZE_AVX)
    lanes<Scalar> != 1;
#else
    false;
#endif

/// From an address aligned to the packet's size.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> load(const Scalar* from) {
  return Eigen::internal::pload<Packet<Scalar>>(from);
}

template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> load_unaligned(const Scalar* from) {
  return Eigen::internal::ploadu<Packet<Scalar>>(from);
}

/// The same packet, in a register: a compiler may otherwise load one that is used several times again
/// for each use, as an operand in memory, where loads are what a loop runs short of.
template <class P>
SURFATTN_ALWAYS_INLINE P in_register(P packet) {
#if defined(__GNUC__) && EIGEN_ARCH_x86_64
  if constexpr (sizeof(P) >= 16 && !std::is_same_v<P, long double>) __asm__("" : "+v"(packet));
#endif
  return packet;
}

template <class Scalar>
SURFATTN_ALWAYS_INLINE void store(Scalar* to, Packet<Scalar> packet) {
  Eigen::internal::pstore(to, packet);
}

template <class Scalar>
SURFATTN_ALWAYS_INLINE void store_unaligned(Scalar* to, Packet<Scalar> packet) {
  Eigen::internal::pstoreu(to, packet);
}

/// Whether a packet can be stored past the caches: a whole line of memory, which is then not read before.
template <class Scalar>
inline constexpr bool passes_caches =
#if defined(EIGEN_VECTORIZE_AVX512)
    std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>;
#else
    false;
#endif

/// To an address aligned to a line, where that is possible. Other threads see it when those that stored are
/// done, see `finish_past_caches`.
template <class Scalar>
SURFATTN_ALWAYS_INLINE void store_past_caches(Scalar* to, Packet<Scalar> packet) {
  if constexpr (!passes_caches<Scalar>) return store(to, packet);
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (std::is_same_v<Scalar, float>) _mm512_stream_ps(to, packet);
  if constexpr (std::is_same_v<Scalar, double>) _mm512_stream_pd(to, packet);
#endif
}

/// After the last of such stores of a thread, before anybody reads.
inline void finish_past_caches() {
#if defined(EIGEN_VECTORIZE_AVX512)
  _mm_sfence();
#endif
}

template <class P>
SURFATTN_ALWAYS_INLINE P add(P a, P b) {
  return Eigen::internal::padd(a, b);
}

template <class P>
SURFATTN_ALWAYS_INLINE P subtract(P a, P b) {
  return Eigen::internal::psub(a, b);
}

template <class P>
SURFATTN_ALWAYS_INLINE P multiply(P a, P b) {
  return Eigen::internal::pmul(a, b);
}

template <class P>
SURFATTN_ALWAYS_INLINE P divide(P a, P b) {
  return Eigen::internal::pdiv(a, b);
}

/// a·b + c, fused where the target can.
template <class P>
SURFATTN_ALWAYS_INLINE P multiply_add(P a, P b, P c) {
  return Eigen::internal::pmadd(a, b, c);
}

/// The larger; a NaN in `a` stays.
template <class P>
SURFATTN_ALWAYS_INLINE P maximum(P a, P b) {
  return Eigen::internal::pmax(a, b);
}

/// The smaller; a NaN in `a` stays.
template <class P>
SURFATTN_ALWAYS_INLINE P minimum(P a, P b) {
  return Eigen::internal::pmin(a, b);
}

template <class P>
SURFATTN_ALWAYS_INLINE auto sum(P a) {
  return Eigen::internal::predux(a);
}

template <class P>
SURFATTN_ALWAYS_INLINE auto maximum_of(P a) {
  return Eigen::internal::predux_max(a);
}

/// Whether a > b in some lane; a NaN is not.
template <class P>
SURFATTN_ALWAYS_INLINE bool exceeds(P a, P b) {
  return Eigen::internal::predux_any(Eigen::internal::pcmp_lt(b, a));
}

/// Unsigned integers of `bytes` bytes, as many as a packet has lanes.
template <class Scalar, std::size_t bytes>
struct integers {
  using Integer = std::conditional_t<
      bytes == 1, std::uint8_t,
      std::conditional_t<bytes == 2, std::uint16_t,
                         std::conditional_t<bytes == 4, std::uint32_t, std::uint64_t>>>;
  typedef Integer type
      __attribute__((vector_size(bytes * static_cast<std::size_t>(lanes<Scalar>))));
};

/// The bits of a packet's numbers.
template <class Scalar>
using Bits = typename integers<Scalar, sizeof(Scalar)>::type;

/// 64-bit lanes whose lower halves hold a word; what the upper halves hold does not count.
using WordLanes = Bits<double>;

/// The whole products of the words.
SURFATTN_ALWAYS_INLINE WordLanes multiply_words(const WordLanes& a, const WordLanes& b) {
#if defined(EIGEN_VECTORIZE_AVX512)
  return __builtin_bit_cast(
      WordLanes, _mm512_mul_epu32(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, b)));
#elif defined(EIGEN_VECTORIZE_AVX2)
  return __builtin_bit_cast(
      WordLanes, _mm256_mul_epu32(__builtin_bit_cast(__m256i, a), __builtin_bit_cast(__m256i, b)));
#elif defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX)
  return __builtin_bit_cast(
      WordLanes, _mm_mul_epu32(__builtin_bit_cast(__m128i, a), __builtin_bit_cast(__m128i, b)));
#else
  constexpr std::uint64_t word = 0xffffffffu;
  return (a & word) * (b & word);
#endif
}

/// Whether Eigen has packets of `Source` that become packets of `Scalar`, lane by lane.
template <class Scalar, class Source>
inline constexpr bool casts_packets =
    lanes<Scalar> != 1 && Eigen::internal::unpacket_traits<Packet<Source>>::size == lanes<Scalar>;

/// Whether the target converts between Eigen::half and packets of floats. Eigen's own cast of packets
/// does so number by number where it takes GCC for an old Clang (3.4.0), in twenty times the time.
template <class Scalar, class Stored>
inline constexpr bool converts_half =
#if defined(__F16C__)
    std::is_same_v<Scalar, float>&& std::is_same_v<Stored, Eigen::half>&& lanes<float> >= 8;
#else
    false;
#endif

#if defined(__F16C__)

SURFATTN_ALWAYS_INLINE Packet<float> load_half(const Eigen::half* from) {
#if defined(EIGEN_VECTORIZE_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

/// Rounded to the nearest, as by Eigen.
SURFATTN_ALWAYS_INLINE void store_half(Eigen::half* to, Packet<float> packet) {
#if defined(EIGEN_VECTORIZE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(packet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(packet, _MM_FROUND_TO_NEAREST_INT));
#endif
}

#else

Packet<float> load_half(const Eigen::half* from);               // never called
void store_half(Eigen::half* to, const Packet<float>& packet);  // never called

#endif

/// As many numbers as a packet of `Scalar` has lanes, from any address, as such a packet.
template <class Scalar, class Source>
SURFATTN_ALWAYS_INLINE Packet<Scalar> load_as(const Source* from) {
  if constexpr (std::is_same_v<Scalar, Source>) {
    return load_unaligned(from);
  } else if constexpr (std::is_same_v<Source, Eigen::bfloat16> && lanes<Scalar> != 1) {
    typename integers<Scalar, 2>::type bits;  // the upper half of a float's
    __builtin_memcpy(&bits, from, sizeof bits);
    const auto wide = __builtin_convertvector(bits, typename integers<Scalar, 4>::type) << 16;
    return __builtin_bit_cast(Packet<Scalar>, wide);
  } else if constexpr (converts_half<Scalar, Source>) {
    return load_half(from);
  } else if constexpr (casts_packets<Scalar, Source>) {
    return Eigen::internal::pcast<Packet<Source>, Packet<Scalar>>(load_unaligned(from));
  } else {
    alignas(sizeof(Packet<Scalar>)) Scalar numbers[lanes<Scalar>];
    for (Index i = 0; i < lanes<Scalar>; ++i) numbers[i] = static_cast<Scalar>(from[i]);
    return load(numbers);
  }
}

/// A packet's numbers, rounded to the nearest of `Result`.
template <class Scalar, class Result>
SURFATTN_ALWAYS_INLINE void store_as(Result* to, Packet<Scalar> packet) {
  if constexpr (std::is_same_v<Scalar, Result>) {
    store_unaligned(to, packet);
  } else if constexpr (converts_half<Scalar, Result>) {
    store_half(to, packet);
  } else if constexpr (casts_packets<Scalar, Result> && std::is_same_v<Result, Eigen::half>) {
    store_unaligned(to, Eigen::internal::pcast<Packet<Scalar>, Packet<Result>>(packet));
  } else {
    alignas(sizeof(Packet<Scalar>)) Scalar numbers[lanes<Scalar>];
    store(numbers, packet);
    for (Index i = 0; i < lanes<Scalar>; ++i) to[i] = static_cast<Result>(numbers[i]);
  }
}

template <int... I>
using int_sequence = std::integer_sequence<int, I...>;
template <int N>
constexpr auto int_sequence_up_to() {
  return std::make_integer_sequence<int, N>();
}

/// Adds the halves of x until four lanes are left, and stores these.
template <class Vector, int... I>
SURFATTN_ALWAYS_INLINE void store_folded(float* to, const Vector& x, int_sequence<I...>) {
  constexpr int half = sizeof...(I) / 2;
  if constexpr (half < 4) {
    __builtin_memcpy(to, &x, sizeof x);
  } else {
    [&]<int... J>(int_sequence<J...> lower) {
      store_folded(
          to, __builtin_shufflevector(x, x, J...) + __builtin_shufflevector(x, x, (J + half)...),
          lower);
    }
    (int_sequence_up_to<half>());
  }
}

/// The four sums of four packets, to four numbers side by side: those of float are formed together,
/// in a fifth of the time. Pairs of packets are interleaved and added until each group of four lanes
/// holds a part of every sum; then the halves of that packet are added until one group is left.
template <class Scalar>
SURFATTN_ALWAYS_INLINE void store_sums(Scalar* to, const Packet<Scalar>& a, const Packet<Scalar>& b,
                                       const Packet<Scalar>& c, const Packet<Scalar>& d) {
  if constexpr (std::is_same_v<Scalar, float> && lanes<Scalar> >= 4) {
    const auto interleaved = [&]<int... I>(const auto& x, const auto& y, int_sequence<I...>) {
      constexpr int n = sizeof...(I);
      return __builtin_shufflevector(x, y, (I / 4 * 4 + I % 4 / 2 + I % 2 * n)...) +
             __builtin_shufflevector(x, y, (I / 4 * 4 + I % 4 / 2 + 2 + I % 2 * n)...);
    };
    const auto joined = [&]<int... I>(const auto& x, const auto& y, int_sequence<I...>) {
      constexpr int n = sizeof...(I);
      return __builtin_shufflevector(x, y, (I / 4 * 4 + I % 2 + I % 4 / 2 * n)...) +
             __builtin_shufflevector(x, y, (I / 4 * 4 + 2 + I % 2 + I % 4 / 2 * n)...);
    };
    constexpr auto all = int_sequence_up_to<static_cast<int>(lanes<Scalar>)>();
    store_folded(to, joined(interleaved(a, b, all), interleaved(c, d, all), all), all);
  } else {
    to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
  }
}

/// The sums of `Count` packets, up to four or a multiple of it, to as many numbers: the same bits for a packet alone as among
/// others.
template <class Scalar, int Count>
SURFATTN_ALWAYS_INLINE void store_sums(Scalar* to, const Packet<Scalar> (&packets)[Count]) {
  static_assert(Count <= 4 || Count % 4 == 0);
  if constexpr (Count % 4 == 0) {
    SURFATTN_UNROLL
    for (int n = 0; n < Count; n += 4)
      store_sums<Scalar>(to + n, packets[n], packets[n + 1], packets[n + 2], packets[n + 3]);
  } else {
    Scalar sums[4];
    store_sums<Scalar>(sums, packets[0], packets[1 % Count], packets[2 % Count], packets[0]);
    SURFATTN_UNROLL
    for (int n = 0; n < Count; ++n) to[n] = sums[n];
  }
}

/// Lane by lane: a = 0 ? 0 : otherwise.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> zero_where_zero(Packet<Scalar> a, Packet<Scalar> otherwise) {
  if constexpr (lanes<Scalar> == 1) {
    return a == Scalar(0) ? Scalar(0) : otherwise;
  } else {
    return Eigen::internal::pandnot(otherwise, Eigen::internal::pcmp_eq(a, broadcast(Scalar(0))));
  }
}

/// For as many bytes, 0 or 1, as a packet has lanes: integers of the size of its numbers, with all bits
/// where the byte is 0 and none where it is 1. In steps that double the size, which GCC has instructions
/// for; longer ones it takes lane by lane.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Bits<Scalar> bits_where_zero(const std::uint8_t* bytes) {
  if constexpr (lanes<Scalar> == 4) {
    std::uint32_t all;
    __builtin_memcpy(&all, bytes, sizeof all);
    const auto of_lane = (Bits<Scalar>{} + all) & Bits<Scalar>{0xff, 0xff00, 0xff0000, 0xff000000};
    return __builtin_bit_cast(Bits<Scalar>, of_lane == 0);
  } else {
    using Halves = typename integers<Scalar, 2>::type;
    using Words = typename integers<Scalar, 4>::type;
    typename integers<Scalar, 1>::type narrow;
    __builtin_memcpy(&narrow, bytes, sizeof narrow);
    const auto words = __builtin_convertvector(__builtin_convertvector(narrow, Halves), Words);
    return __builtin_convertvector(words, Bits<Scalar>) - 1;
  }
}

/// Lane by lane: x where the byte is 1, and `otherwise` where it is 0.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> select(const std::uint8_t* bytes, Packet<Scalar> x,
                                             Packet<Scalar> otherwise) {
  if constexpr (lanes<Scalar> == 1) {
    return *bytes ? x : otherwise;
  } else {
    const auto without = bits_where_zero<Scalar>(bytes);
    return __builtin_bit_cast(Packet<Scalar>,
                              (__builtin_bit_cast(Bits<Scalar>, x) & ~without) |
                                  (__builtin_bit_cast(Bits<Scalar>, otherwise) & without));
  }
}

/// Lane by lane: x where the word exceeds `last`, and else 0.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> zero_unless_above(const std::uint32_t* words,
                                                        std::uint32_t last, Packet<Scalar> x) {
  if constexpr (lanes<Scalar> == 1) {
    return *words > last ? x : Scalar(0);
  } else {
    typename integers<Scalar, 4>::type narrow;
    __builtin_memcpy(&narrow, words, sizeof narrow);
    const auto above = __builtin_convertvector(narrow, Bits<Scalar>) > last;
    return __builtin_bit_cast(Packet<Scalar>, __builtin_bit_cast(Bits<Scalar>, x) &
                                                  __builtin_bit_cast(Bits<Scalar>, above));
  }
}

/// The first `count` lanes of x, and `otherwise` in the rest.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> first_lanes(Packet<Scalar> x, Index count, Scalar otherwise) {
  if constexpr (lanes<Scalar> == 1) {
    return count > 0 ? x : otherwise;
  } else {
    using namespace Eigen::internal;
    const auto lane = plset<Packet<Scalar>>(Scalar(0));
    return pselect(pcmp_lt(lane, broadcast(Scalar(count))), x, broadcast(otherwise));
  }
}

// Packets have attributes, which template arguments lose; here none of them matters.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

/// Whether part of a packet can be loaded without touching what follows.
template <class Scalar>
inline constexpr bool loads_parts =
#if defined(EIGEN_VECTORIZE_AVX512)
    std::is_same_v<Scalar, double> ||
#endif
    Eigen::internal::unpacket_traits<Packet<Scalar>>::masked_load_available;

/// The first `count` numbers from `from` on, fewer than a packet has, and zeros.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> load_part(const Scalar* from, Index count) {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (std::is_same_v<Scalar, double>)
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
  else
#endif
  {
    using Mask = typename Eigen::internal::unpacket_traits<Packet<Scalar>>::mask_t;
    return Eigen::internal::ploadu<Packet<Scalar>>(from, static_cast<Mask>((1u << count) - 1));
  }
}

/// Numbers of a square block, one packet for each row.
template <class Scalar>
struct SquareBlock {
  Eigen::internal::PacketBlock<Packet<Scalar>, static_cast<int>(lanes<Scalar>)> rows;

  Packet<Scalar>& operator[](Index row) { return rows.packet[row]; }

  SURFATTN_ALWAYS_INLINE void transpose() {
    if constexpr (lanes<Scalar> != 1) Eigen::internal::ptranspose(rows);
  }
};

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

/// How many columns `load_columns` loads at a time, 16 bytes of each row; 0 where packets are no longer
/// than that, so that it would save nothing.
template <class Scalar>
inline constexpr int loaded_columns = lanes<Scalar> != 1 && sizeof(Packet<Scalar>) > 16
                                          ? 16 / int(sizeof(Scalar))
                                          : 0;

/// 16 bytes from each of `Parts` rows, side by side.
template <int Parts, class Scalar>
SURFATTN_ALWAYS_INLINE auto load_parts_of_rows(const Scalar* from, Index row_distance) {
  if constexpr (Parts == 1) {
    typedef Scalar Part __attribute__((vector_size(16)));
    Part part;
    __builtin_memcpy(&part, from, sizeof part);
    return part;
  } else {
    const auto lower = load_parts_of_rows<Parts / 2>(from, row_distance),
               upper = load_parts_of_rows<Parts / 2>(from + Parts / 2 * row_distance, row_distance);
    return [&]<int... I>(int_sequence<I...>) { return __builtin_shufflevector(lower, upper, I...); }
    (int_sequence_up_to<Parts * loaded_columns<Scalar>>());
  }
}

/// Within each 16 bytes of x and y: the lower (half 0) or upper (half 1) numbers of both by turns, in
/// runs of `run`.
template <int run, int half, class Vector>
SURFATTN_ALWAYS_INLINE Vector zip(const Vector& x, const Vector& y) {
  constexpr int all = sizeof(Vector) / sizeof(x[0]), n = 16 / sizeof(x[0]);
  return [&]<int... I>(int_sequence<I...>) {
    return __builtin_shufflevector(
        x, y,
        (I / n * n + half * n / 2 + I % n / run / 2 * run + I % run + I % n / run % 2 * all)...);
  }
  (int_sequence_up_to<all>());
}

/// The first `loaded_columns` columns of as many rows as a packet has lanes, one packet for each. Most
/// of the transposition is done by the loads: shuffles within 16 bytes are left.
template <class Scalar>
SURFATTN_ALWAYS_INLINE void load_columns(const Scalar* from, Index row_stride,
                                         Packet<Scalar> (&columns)[loaded_columns<Scalar>]) {
  constexpr int count = loaded_columns<Scalar>;
  const auto rows = [&](int k) {  // k, k + count, k + 2·count, …
    return load_parts_of_rows<int(lanes<Scalar>) / count>(from + k * row_stride,
                                                          count * row_stride);
  };
  const auto a = rows(0), b = rows(1);
  if constexpr (count == 2) {
    columns[0] = zip<1, 0>(a, b), columns[1] = zip<1, 1>(a, b);
  } else {
    const auto c = rows(2), d = rows(3);
    const auto lower_ab = zip<1, 0>(a, b), lower_cd = zip<1, 0>(c, d);
    const auto upper_ab = zip<1, 1>(a, b), upper_cd = zip<1, 1>(c, d);
    columns[0] = zip<2, 0>(lower_ab, lower_cd), columns[1] = zip<2, 1>(lower_ab, lower_cd);
    columns[2] = zip<2, 0>(upper_ab, upper_cd), columns[3] = zip<2, 1>(upper_ab, upper_cd);
  }
}

/// 2ⁿ for n in the exponent's range, where `biased` = n + exponent_bias + 1.5·2^(digits − 1): the
/// exponent's bits then lie in the low bits of that number, and a shift puts them in their place. For
/// targets that have vectors.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> power_of_two(Packet<Scalar> biased) {
  constexpr int fraction_bits = std::numeric_limits<Scalar>::digits - 1;
  return __builtin_bit_cast(Packet<Scalar>, __builtin_bit_cast(Bits<Scalar>, biased)
                                                << fraction_bits);
}

/// Into how many steps `stepped_power_of_two` divides an octave: as many as a table that one
/// instruction looks up has entries, where that makes a polynomial shorter.
template <class Scalar>
inline constexpr int exp2_steps = 1;

#if defined(EIGEN_VECTORIZE_AVX512)

template <>
inline constexpr int exp2_steps<float> = 32;
template <>
inline constexpr int exp2_steps<double> = 16;

/// table[index mod 32], lane by lane.
SURFATTN_ALWAYS_INLINE Bits<float> look_up(const std::uint32_t (&table)[32],
                                           const Bits<float>& index) {
  return __builtin_bit_cast(
      Bits<float>,
      _mm512_permutex2var_epi32(_mm512_load_si512(table), __builtin_bit_cast(__m512i, index),
                                _mm512_load_si512(table + 16)));
}

/// table[index mod 16], lane by lane.
SURFATTN_ALWAYS_INLINE Bits<double> look_up(const std::uint64_t (&table)[16],
                                            const Bits<double>& index) {
  return __builtin_bit_cast(
      Bits<double>,
      _mm512_permutex2var_epi64(_mm512_load_si512(table), __builtin_bit_cast(__m512i, index),
                                _mm512_load_si512(table + 8)));
}

#endif

/// The bits of 2^(k/steps) for k = 0 … steps − 1, less those of 1 and of k in the place that
/// `stepped_power_of_two` shifts it to.
template <class Scalar>
struct alignas(64) StepFractions {
  using Integer = typename integers<Scalar, sizeof(Scalar)>::Integer;
  static constexpr int steps = exp2_steps<Scalar>;
  static constexpr int shift =
      std::numeric_limits<Scalar>::digits - std::bit_width(static_cast<unsigned>(steps));

  Integer bits[steps];

  constexpr StepFractions() : bits{} {
    static_assert(std::numeric_limits<long double>::digits >= 64);
    constexpr long double step = 1.02189714865411667823448013478329944L;  // 2^(1/32)
    long double power = 1;
    for (int k = 0; k < steps; ++k) {
      bits[k] = __builtin_bit_cast(Integer, static_cast<Scalar>(power)) -
                __builtin_bit_cast(Integer, Scalar(1)) - (static_cast<Integer>(k) << shift);
      for (int i = 0; i < 32 / steps; ++i) power *= step;
    }
  }
};
template <class Scalar>
inline constexpr StepFractions<Scalar> step_fractions;

/// 2ⁿ likewise for multiples n of 1/steps, of which `biased` holds steps·(n + exponent_bias) in its
/// low bits: where the shift puts n mod 1 instead of the fraction of 2ⁿ, the table corrects it.
template <class Scalar>
SURFATTN_ALWAYS_INLINE Packet<Scalar> stepped_power_of_two(Packet<Scalar> biased) {
  if constexpr (exp2_steps<Scalar> == 1) {
    return power_of_two<Scalar>(biased);
  } else {
    constexpr auto& fractions = step_fractions<Scalar>;
    const auto steps = __builtin_bit_cast(Bits<Scalar>, biased);
    return __builtin_bit_cast(Packet<Scalar>,
                              look_up(fractions.bits, steps) + (steps << fractions.shift));
  }
}

/// Two bfloat16 side by side, neighbours along the depth of a product: what the dot instructions of
/// some targets take, which add both products to one float.
struct BFloat16Pair {
  std::uint32_t bits;
};
template <>
inline constexpr Index lanes<BFloat16Pair> = lanes<float>;

/// The numbers that a product of `Element`s is summed in.
template <class Element>
struct sum_of {
  using type = Element;
};
template <>
struct sum_of<BFloat16Pair> {
  using type = float;
};
template <class Element>
using sum_t = typename sum_of<Element>::type;

#if SURFATTN_BFLOAT16_DOT_PRODUCTS && defined(__AVX512BF16__) && defined(EIGEN_VECTORIZE_AVX512)

inline constexpr bool multiplies_pairs = true;

SURFATTN_ALWAYS_INLINE __m512bh broadcast(BFloat16Pair pair) {
  return __builtin_bit_cast(__m512bh, _mm512_set1_epi32(static_cast<int>(pair.bits)));
}

SURFATTN_ALWAYS_INLINE __m512bh load_unaligned(const BFloat16Pair* from) {
  return __builtin_bit_cast(__m512bh, _mm512_loadu_si512(from));
}

SURFATTN_ALWAYS_INLINE Packet<float> multiply_add(__m512bh a, __m512bh b, Packet<float> c) {
  return _mm512_dpbf16_ps(c, a, b);
}

/// The 32 floats from `from` on, rounded to the nearest bfloat16, as 16 pairs.
SURFATTN_ALWAYS_INLINE void store_pairs(BFloat16Pair* to, const float* from) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(load(from + lanes<float>), load(from));
  _mm512_storeu_si512(to, __builtin_bit_cast(__m512i, pairs));
}

#else

inline constexpr bool multiplies_pairs = false;

void store_pairs(BFloat16Pair* to, const float* from);  // never called

#endif

}  // namespace surfattn::detail::simd

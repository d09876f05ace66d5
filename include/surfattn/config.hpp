// surfattn layer 0: what the library asks of the compiler and of Eigen

#pragma once

#include <Eigen/Core>

// Masked scores are −∞ and a NaN must reach the outputs that depend on it. With -ffinite-math-only
// (part of -ffast-math) the compiler may assume that neither exists, and the results would be
// silently wrong.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "surfattn needs infinities and NaN: compile without -ffast-math and -ffinite-math-only"
#endif

#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "surfattn needs Eigen 3.4 or newer"
#endif

/// Marks the small functions that must disappear into the loops that call them: the tile products
/// keep their accumulators in registers only if they are inlined whole.
#define SURFATTN_ALWAYS_INLINE EIGEN_ALWAYS_INLINE

/// Marks the functions around those loops: inlined among other code, the loops would have to share
/// registers with it. And functions called once for a sequence or so from code that is compiled for each
/// combination of terms, of which each would hold copies.
#define SURFATTN_NEVER_INLINE EIGEN_DONT_INLINE

/// Before a loop of constant length: unroll it whole at every optimisation level, so that the
/// arrays it indexes live in registers. SURFATTN_UNROLL_TWICE: two turns of a loop in one.
#if defined(__clang__)
#define SURFATTN_UNROLL _Pragma("clang loop unroll(full)")
#define SURFATTN_UNROLL_TWICE _Pragma("clang loop unroll_count(2)")
#elif defined(__GNUC__)
#define SURFATTN_UNROLL _Pragma("GCC unroll 32")
#define SURFATTN_UNROLL_TWICE _Pragma("GCC unroll 2")
#else
#define SURFATTN_UNROLL
#define SURFATTN_UNROLL_TWICE
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "surfattn reads packets of words as bytes and halves: it needs a little-endian target"
#endif

/// Whether the target is one of Intel's cores from Sapphire Rapids on, by what besides only AMD's Zen 6
/// has.
#if defined(__AVX512FP16__) && !defined(__znver6__)
#define SURFATTN_TARGETS_INTEL_AVX512 1
#else
#define SURFATTN_TARGETS_INTEL_AVX512 0
#endif

/// Whether bfloat16 are multiplied as they are, by the target's dot instruction (vdpbf16ps), instead of
/// as floats: 1 or 0, by default where that is the faster way. AMD's Zen 4 does two of these instructions
/// a cycle where it does two of floats, and so twice the work; Intel's cores one every other cycle, and
/// so half. The weights are then rounded to bfloat16 too. To choose, define it, alike in all files of a
/// program; it counts where the target has the instruction.
#ifndef SURFATTN_BFLOAT16_DOT_PRODUCTS
#if defined(__AVX512BF16__) && !SURFATTN_TARGETS_INTEL_AVX512
#define SURFATTN_BFLOAT16_DOT_PRODUCTS 1
#else
#define SURFATTN_BFLOAT16_DOT_PRODUCTS 0
#endif
#endif

/// Whether subnormal floats and doubles count as zeros while a pass runs, where the target is x86: 1, or 0
/// to keep them (but for what dot instructions take), at up to six times the time where weights are that
/// small (see detail/subnormals.hpp). Define it alike in all files of a program.
#ifndef SURFATTN_SUBNORMALS_AS_ZEROS
#define SURFATTN_SUBNORMALS_AS_ZEROS 1
#endif

// surfattn layer 1: numbers too small to be normal, while a pass runs

#pragma once

#include <surfattn/config.hpp>

#if SURFATTN_SUBNORMALS_AS_ZEROS && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace surfattn::detail {

/// While it lives, subnormal floats and doubles count as zeros on the thread that made it, as operands
/// and as results, where the target is x86; then the thread's mode is what it was before, and its
/// exception flags are those of both.
///
/// Wherever scores differ by more than 87 (float) or 708 (double), under steep biases and narrow
/// bandwidths, some weights are that small, and gradients, which are weights times differences, sooner.
/// Next to the largest weight they are nothing, but an operation that meets one takes more than a hundred
/// cycles on Intel's processors, and a pass up to six times as long.
class SubnormalsAsZeros {
 public:
#if SURFATTN_SUBNORMALS_AS_ZEROS && defined(__SSE2__)
  SubnormalsAsZeros() : before_(_mm_getcsr()) {
    constexpr unsigned flush_to_zero = 1u << 15, denormals_are_zeros = 1u << 6;
    _mm_setcsr(before_ | flush_to_zero | denormals_are_zeros);
  }
  ~SubnormalsAsZeros() {
    constexpr unsigned flags = 0x3f;
    _mm_setcsr((before_ & ~flags) | (_mm_getcsr() & flags));
  }
#else
  SubnormalsAsZeros() {}
#endif
  SubnormalsAsZeros(const SubnormalsAsZeros&) = delete;
  SubnormalsAsZeros& operator=(const SubnormalsAsZeros&) = delete;

 private:
#if SURFATTN_SUBNORMALS_AS_ZEROS && defined(__SSE2__)
  unsigned before_;
#endif
};

}  // namespace surfattn::detail

#pragma once
// What a step returns to the memory allocator, the next step asks for again.

#include <cstdlib>
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace translation {

/// Makes the C library keep large freed blocks instead of returning them to the system, which would
/// hand them out page by page, and cleared, in every step.
inline void keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int limit = 1 << 30;
  ::mallopt(M_MMAP_THRESHOLD, limit);
  ::mallopt(M_TRIM_THRESHOLD, limit);
#endif
}

}  // namespace translation

// The shapes of problems.
#pragma once

#include <surfattn/types.hpp>

namespace surfattn::bench {

/// `sequences` problems of the same shape, each one call.
struct Case {
  const char* name;
  Index sequences, query_heads, key_value_heads, queries, keys, width;
};

/// One head, as many queries as keys.
inline Case square(Index tokens, Index width, Index heads = 1) {
  return {"", 1, heads, heads, tokens, tokens, width};
}

/// Shapes of practice, by which CPU code for attention is compared: B and C are causal.
inline const Case shape_a{"A", 1, 8, 8, 1024, 1024, 64};
inline const Case shape_b{"B", 1, 8, 8, 1024, 1024, 64};
inline const Case shape_c{"C", 1, 2, 2, 4096, 4096, 128};
inline const Case shape_d{"D", 1, 8, 8, 1, 16384, 128};
inline const Case shape_e{"E", 1, 32, 4, 1, 8192, 128};
inline const Case shape_f{"F", 64, 8, 8, 10, 10, 256};
inline const Case shape_g{"G", 1, 1, 1, 64, 64, 64};

}  // namespace surfattn::bench

// surfattn layer 4: how a problem is cut into blocks and tiles

#pragma once

#include <algorithm>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/simd/tile_products.hpp>

namespace surfattn::detail {

/// A task of the forward pass owns a block of queries of one key/value head and goes over the keys
/// tile by tile; a task of the backward pass owns a block of keys and goes over the queries.
/// Packing a tile is paid for by the whole block. All memory is O(block + tile).
struct Tiling {
  Index query_tile;
  Index key_tile;
  Index block;  ///< queries (forward) or keys (backward) of one task
};

/// Numbers of one tile operand that stay within a share of the first-level cache: 8192 floats.
template <class Scalar>
constexpr Index tile_budget = 32768 / static_cast<Index>(sizeof(Scalar));

/// `wanted` rows of the given width, or fewer where rows are so wide that the tile would leave the
/// cache.
template <class Scalar>
constexpr Index tile_rows(Index wanted, Index width, Index multiple) {
  const Index fitting = 2 * tile_budget<Scalar> / std::max<Index>(width, 1);
  return std::clamp(fitting / multiple * multiple, multiple, wanted);
}

template <class Scalar>
Tiling forward_tiling(const Shape& shape) {
  const Index width = std::max(shape.head_dim, shape.value_dim);
  const Index key_tile = tile_rows<Scalar>(256, width, simd::panel_width<Scalar>);
  return {16, key_tile, std::max<Index>(16, 512 / shape.group())};
}

template <class Scalar>
Tiling backward_tiling(const Shape& shape) {
  const Index width = std::max(shape.head_dim, shape.value_dim);
  const Index rows = tile_rows<Scalar>(128, width, simd::panel_width<Scalar>);
  return {rows, rows, 4 * rows};
}

/// Rows of a score tile are this far apart: whole panels, and an odd number of cache lines so that
/// they do not compete for the same lines of the cache.
template <class Scalar>
constexpr Index score_stride(Index key_tile) {
  const Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Scalar)));
  const Index stride = simd::padded<Scalar>(key_tile);
  return (stride / line) % 2 == 0 ? stride + std::max(line, simd::lanes<Scalar>) : stride;
}

inline Index blocks(Index count, Index block) { return (count + block - 1) / block; }

}  // namespace surfattn::detail

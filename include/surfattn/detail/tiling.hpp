// surfattn layer 4: how a problem is cut into blocks and tiles

#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/simd/tile_products.hpp>

namespace surfattn::detail {

/// A task of the forward pass owns a block of queries of one key/value head and goes over the keys
/// tile by tile; a task of the backward pass owns a block of keys and goes over the queries.
/// Packing a tile is paid for by the whole block. All memory is O(block + tile).
struct Tiling {
  Index query_tile;  ///< whole panels of a left operand (simd::left_width), or the whole block
  Index key_tile;
  Index block;  ///< queries (forward) or keys (backward) of one task
  /// Backward: so many keys of a block, a whole number of tiles, give one addend of dQ.
  Index addend = 0;
};

constexpr Index blocks(Index count, Index block) { return (count + block - 1) / block; }

/// Numbers of a packed tile that take a quarter of a second-level cache of 1 MiB.
template <class Scalar>
inline constexpr Index tile_numbers = (Index(1) << 18) / static_cast<Index>(sizeof(Scalar));

/// `wanted` keys of the given width, or fewer where they are so wide that a packed tile would
/// outgrow that.
template <class Scalar>
constexpr Index tile_rows(Index wanted, Index width) {
  constexpr Index multiple = simd::panel_width<Scalar>;
  const Index fitting = tile_numbers<Scalar> / std::max<Index>(width, 1);
  return std::clamp(fitting / multiple * multiple, multiple, wanted);
}

/// So many rows of a tile as are `wanted` or as there are, whichever is less, in whole multiples.
constexpr Index within(Index rows, Index wanted, Index multiple) {
  return simd::rounded_up(std::clamp<Index>(rows, 1, wanted), multiple);
}

/// Rows of one of `tasks` tasks, whole tiles and at most `most`.
constexpr Index task_rows(Index rows, Index tasks, Index tile, Index most) {
  return std::clamp(simd::rounded_up(rows / tasks, tile), tile, std::max(tile, most));
}

/// Tiles of keys are no larger than the problem, for they are what a workspace has to hold.
///
/// Measured on AVX-512: long rows of scores pay for what the softmax does once for each row, and
/// large blocks for packing the keys. The rows of the output do not depend on each other, so the
/// block may depend on the number of workers and the bits do not.
template <class Scalar>
Tiling forward_tiling(const Shape& shape, Index workers) {
  using Accumulator = accumulator_t<Scalar>;
  constexpr Index most = 2048, tasks_per_worker = 2;
  constexpr Index query_tile = simd::rounded_up(64, simd::left_width<Accumulator>);
  const Index tasks = workers == 1 ? 1 : tasks_per_worker * workers;
  const Index wanted = tile_rows<Accumulator>(1024, std::max(shape.head_dim, shape.value_dim));
  return {query_tile, within(shape.keys, wanted, simd::panel_width<Accumulator>),
          task_rows(shape.queries * shape.key_value_heads, tasks, query_tile,
                    most / shape.group() / query_tile * query_tile)};
}

/// Key tiles of a backward task, at most.
inline constexpr Index max_key_tiles = 8;

/// Into so many addends of dQ the keys of all heads are cut, if there are tiles enough.
inline constexpr Index wanted_addends = 4;

/// Blocks of keys add to the same gradients of queries, in an order that must not depend on the
/// number of workers: addends are cut by the problem alone, so that several threads have something to
/// do. A task packs all queries once; one worker alone therefore takes several addends in a task: so many
/// tiles that one packed form of their keys takes 256 KiB, and all their buffers 1.5 MiB. (Twice as many
/// save up to 1 % more, but cost up to 7 % where others fill the third-level cache.) Both are 1, 2, 4 or 8
/// tiles, so that a block holds whole addends. Tiles are no larger than the problem, for they are what a
/// workspace has to hold.
template <class Scalar>
Tiling backward_tiling(const Shape& shape, Index workers) {
  using Accumulator = accumulator_t<Scalar>;
  constexpr Index most_of_addend = 4;
  const auto clamped = [](Index tiles, Index most) {
    return static_cast<std::size_t>(std::clamp<Index>(tiles, 1, most));
  };
  const Index width = std::max<Index>({shape.head_dim, shape.value_dim, 1});
  const Index wanted = tile_rows<Accumulator>(256, width);
  const Index keys = within(shape.keys, wanted, simd::panel_width<Accumulator>);
  const Index of_addend = blocks(shape.keys * shape.key_value_heads, wanted_addends * keys);
  const Index cached = tile_numbers<Accumulator> / (width * keys);
  const std::size_t addend_tiles = std::bit_ceil(clamped(of_addend, most_of_addend));
  const std::size_t cached_tiles = std::bit_floor(clamped(cached, max_key_tiles));
  const std::size_t block_tiles =
      workers == 1 ? std::max(addend_tiles, cached_tiles) : addend_tiles;
  return {within(shape.queries, std::min<Index>(wanted, 128), simd::left_width<Accumulator>), keys,
          keys * static_cast<Index>(block_tiles), keys * static_cast<Index>(addend_tiles)};
}

/// Rows of a score tile are this far apart: room for whole panels, and an odd number of cache lines
/// so that they do not compete for the same lines of the cache.
template <class Scalar>
constexpr Index score_stride(Index key_tile) {
  constexpr Index line = simd::line<Scalar>;
  const Index stride = simd::padded<Scalar>(key_tile);
  return (stride / line) % 2 == 0 ? stride + std::max(line, simd::lanes<Scalar>) : stride;
}

}  // namespace surfattn::detail

// surfattn layer 6: what a layer costs in either form, and which form is cheaper

#pragma once

#include <algorithm>
#include <surfattn/detail/require.hpp>
#include <surfattn/types.hpp>

namespace surfattn {

/// The sizes of an attention layer and of the inputs that it is run on.
struct LayerSize {
  Index x_width = 0;    ///< D, of the inputs of the queries
  Index y_width = 0;    ///< Dy, of the inputs of keys and values
  Index out_width = 0;  ///< Dout
  Index head_dim = 0;   ///< d, of a standard layer's queries and keys
  Index value_dim = 0;  ///< dv, of a standard layer's values; d with k_equals_v
  Heads heads = {};     ///< of the standard layer; the surface form has as many query heads
  Index queries = 0;    ///< Tx, of each sequence; in decoding, the new tokens of one step
  Index keys = 0;       ///< Ty, of each sequence; in decoding, the cached ones and the new ones
  Index batch = 1;      ///< sequences
  /// the share of the pairs of query and key that is computed: ½ under a causal mask
  double visible = 1;
  bool k_equals_v = false;  ///< the standard layer's values are its keys, and not cached besides
};

/// How a layer is used.
enum class Use {
  prompt,  ///< forward, all keys new
  decode,  ///< forward, as many new keys as queries, the others from a cache
  train,   ///< forward and backward
};

/// The two forms of one layer.
enum class Form { standard, surface };

/// What a call costs. Flops count a multiplication and an addition each; bytes count every matrix
/// once where it is read and once where it is written.
struct Cost {
  double projection_flops = 0, projection_bytes = 0;
  double attention_flops = 0, attention_bytes = 0;
  double cache_bytes = 0;   ///< what is kept of the keys of all sequences between steps of decoding
  double weight_bytes = 0;  ///< the layer's matrices

  double flops() const { return projection_flops + attention_flops; }
  double bytes() const { return projection_bytes + attention_bytes; }
};

/// What a machine can do: the defaults are of one core with vectors of 512 bits. Measure your own.
struct Machine {
  double flops_per_second = 120e9;
  double bytes_per_second = 20e9;
};

namespace detail {

inline double count(Index number) { return static_cast<double>(number); }

/// A standard layer and the merged one differ in the widths of what is projected and attended.
struct CostWidths {
  double query;       ///< columns of all queries
  double key, value;  ///< projected columns of all keys and values; 0 where the inputs are the keys
  double out;         ///< columns of the attention's output
  double key_dim, value_dim;  ///< of one head
  double cached;              ///< columns kept of each key
};

inline CostWidths cost_widths(Form form, const LayerSize& size) {
  const double heads = count(size.heads.query),
               shared = count(size.heads.key_value.value_or(size.heads.query));
  const double d = count(size.head_dim), dv = count(size.value_dim), width = count(size.y_width);
  if (form == Form::surface) return {heads * width, 0, 0, heads * width, width, width, width};
  if (size.k_equals_v) return {heads * d, shared * d, 0, heads * d, d, d, shared * d};
  return {heads * d, shared * d, shared * dv, heads * dv, d, dv, shared * (d + dv)};
}

inline void check_layer_size(const LayerSize& size, const Require& require) {
  const auto positive = [&](const char* name, Index value) {
    if (value < 1) require.fail(name, " must be positive, but is ", value);
  };
  positive("x_width", size.x_width);
  positive("y_width", size.y_width);
  positive("out_width", size.out_width);
  positive("head_dim", size.head_dim);
  positive("value_dim", size.value_dim);
  positive("queries", size.queries);
  positive("keys", size.keys);
  positive("batch", size.batch);
  positive("heads.query", size.heads.query);
  if (size.k_equals_v && size.value_dim != size.head_dim)
    require.fail("with k_equals_v, value_dim must be head_dim, ", size.head_dim, ", but is ",
                 size.value_dim);
  const Index shared = size.heads.key_value.value_or(size.heads.query);
  positive("heads.key_value", shared);
  if (size.heads.query % shared != 0)
    require.fail("heads.query must be a multiple of heads.key_value");
  if (!(size.visible > 0 && size.visible <= 1))
    require.fail("visible must be above 0 and at most 1, but is ", size.visible);
}

}  // namespace detail

/// Flops, bytes and cache of one call of a layer in the given form. With the widths of the standard
/// form, Q = Hq·d, K = Hkv·d, V = Hkv·dv, O = Hq·dv, or of the surface form, Q = O = H·Dy, K = V = 0
/// and d = dv = Dy, of `batch` sequences, n = Ty new keys (prompt, train) or Tx (decode):
///
///     projections: 2·(Tx·D·Q + n·Dy·(K + V) + Tx·O·Dout), three times that in training,
///     attention:   2·H·Tx·Ty·visible·(d + dv), in training + 2·H·Tx·Ty·visible·(3d + 2dv),
///     cache:       Ty·Hkv·(d + dv) or Ty·Dy numbers a sequence.
///
/// With k_equals_v, V = 0 and the cache is Ty·Hkv·d numbers (keys that are normalised or rotated
/// besides are cached besides).
/// `scalar_bytes` is the size of a number. Errors: a size that is not positive, heads that do not
/// divide, a share of visible pairs outside (0, 1].
inline Cost layer_cost(Form form, const LayerSize& size, Use use, std::size_t scalar_bytes = 4) {
  using detail::count;
  detail::check_layer_size(size, detail::Require("layer_cost"));
  const detail::CostWidths w = detail::cost_widths(form, size);
  const double batch = count(size.batch), tx = count(size.queries), ty = count(size.keys);
  const double fresh = use == Use::decode ? std::min(tx, ty) : ty;
  const double x = count(size.x_width), y = count(size.y_width), out = count(size.out_width);
  const double pairs = batch * count(size.heads.query) * tx * ty * size.visible;
  const double number = static_cast<double>(scalar_bytes), passes = use == Use::train ? 3 : 1;
  const double weights = x * w.query + y * (w.key + w.value) + w.out * out;

  Cost cost;
  cost.projection_flops =
      passes * 2 * batch * (tx * x * w.query + fresh * y * (w.key + w.value) + tx * w.out * out);
  cost.attention_flops = 2 * pairs * (w.key_dim + w.value_dim);
  if (use == Use::train) cost.attention_flops += 2 * pairs * (3 * w.key_dim + 2 * w.value_dim);
  // each pass reads the weights and reads or writes the rows on both sides of a projection
  const double rows = tx * (x + w.query + w.out + out) + fresh * (y + w.key + w.value);
  cost.projection_bytes = passes * number * (weights + batch * rows);
  // queries and keys in, outputs out; backward also their gradients
  const double attended = tx * (w.query + w.out) + ty * w.cached;
  cost.attention_bytes = number * batch * attended * (use == Use::train ? 3 : 1);
  cost.cache_bytes = number * batch * ty * w.cached;
  cost.weight_bytes = number * weights;
  return cost;
}

/// How long a call takes: its arithmetic and its memory traffic, one after the other. (They overlap
/// little where both count, as they do when many heads share one cache; where one of them is small
/// it does not matter. Products that do not reach the machine's limit take both forms longer.)
inline double predicted_seconds(const Cost& cost, const Machine& machine = {}) {
  return cost.flops() / machine.flops_per_second + cost.bytes() / machine.bytes_per_second;
}

/// The form whose predicted time is shorter; the standard one where they are equal.
inline Form recommend_form(const LayerSize& size, Use use, const Machine& machine = {},
                           std::size_t scalar_bytes = 4) {
  const double standard =
      predicted_seconds(layer_cost(Form::standard, size, use, scalar_bytes), machine);
  const double surface =
      predicted_seconds(layer_cost(Form::surface, size, use, scalar_bytes), machine);
  return surface < standard ? Form::surface : Form::standard;
}

}  // namespace surfattn

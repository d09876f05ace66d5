// surfattn layer 7: the surface as a thing of its own, a cache of keys and values

#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <surfattn/attention.hpp>
#include <surfattn/detail/checked_stream.hpp>
#include <surfattn/detail/key_store.hpp>
#include <surfattn/local_linear.hpp>
#include <surfattn/surface.hpp>
#include <type_traits>
#include <utility>

namespace surfattn {

/// What a Surface is made for. β = 1/σ²: give `bandwidth` or `scale`, not both.
struct CacheOptions {
  std::optional<double> scale = {};      ///< β; 1/√d when neither is given
  Heads heads = {};                      ///< how the columns divide into heads
  std::optional<double> bandwidth = {};  ///< σ, in the units of the keys; surface form alone
  /// uniform or sdpa, for all keys that are appended without a prior of their own; surface form alone
  KeyPrior prior = KeyPrior::uniform;
  Index capacity = 0;  ///< keys for which memory is taken at once
  /// the newest so many keys are kept, in memory that is taken at once: a ring buffer
  std::optional<Index> window = {};
};

/// Options of a call that reads a Surface.
struct QueryOptions {
  /// who runs the tasks of the call; the calling thread alone where there is none
  Executor* executor = nullptr;
};

namespace detail {

/// What stays the same of a cache while its keys come and go.
template <class Scalar>
struct CacheShape {
  Heads heads;
  Index key_width = 0;    ///< Hkv·d
  Index value_width = 0;  ///< Hkv·dv; d in the place of dv in the surface form
  bool values_are_keys = true;
  bool has_log_prior = false;  ///< and norms: the surface form without the prior `sdpa`
  accumulator_t<Scalar> scale{1};
  std::optional<Index> window;

  Index key_value_heads() const { return heads.key_value.value_or(heads.query); }
  Index head_dim() const { return key_width / key_value_heads(); }

  /// Whether both are of one form, with the same widths and heads.
  bool has_sizes_of(const CacheShape& other) const {
    return heads.query == other.heads.query && key_value_heads() == other.key_value_heads() &&
           value_width == other.value_width && values_are_keys == other.values_are_keys &&
           widths() == other.widths();
  }
  KeyWidths widths() const {
    return {key_width, values_are_keys ? 0 : value_width, has_log_prior ? key_value_heads() : 0};
  }
};

/// So many keys that the bytes of no cache overflow.
inline void require_capacity(const Require& require, const char* name, Index capacity) {
  constexpr Index most = Index(1) << 40;
  if (0 <= capacity && capacity <= most) return;
  require.fail(name, " must be between 0 and 2⁴⁰, but is ", capacity);
}

/// What a saved cache begins with: it cannot be read by another format, byte order or scalar.
template <class Scalar>
struct CacheMagic {
  char name[8] = {'s', 'u', 'r', 'f', 'a', 't', 't', 'n'};
  std::uint32_t format = 1;
  std::uint16_t scalar_bytes = sizeof(Scalar);
  std::uint16_t mantissa_bits = static_cast<std::uint16_t>(Eigen::NumTraits<Scalar>::digits());

  bool operator==(const CacheMagic&) const = default;
};

/// What both forms need.
inline void require_cache_sizes(const Require& require, Index key_width, Index value_width,
                                const Heads& heads, std::optional<Index> window, Index capacity) {
  const Index key_value_heads = std::max<Index>(heads.key_value.value_or(heads.query), 1);
  for (const auto& [name, width] :
       {std::pair{"key_width", key_width}, std::pair{"value_width", value_width}}) {
    if (width >= 0 && width % key_value_heads == 0) continue;
    require.fail(name, " must not be negative and divide into ", key_value_heads,
                 " key/value heads, but is ", width);
  }
  if (window && *window < 1) require.fail("window must be at least 1, but is ", *window);
  require_capacity(require, "window", window.value_or(0));
  require_capacity(require, "capacity", capacity);
  // A call of no queries and no keys, for its checks of heads and widths.
  const Index query_width = key_width / key_value_heads * std::max<Index>(heads.query, 0);
  require.shapes({0, query_width}, {0, key_width}, {0, value_width}, heads, {});
}

template <class Scalar>
CacheShape<Scalar> surface_cache_shape(Index key_width, const CacheOptions& options) {
  constexpr Require require("Surface");
  require_cache_sizes(require, key_width, key_width, options.heads, options.window,
                      options.capacity);
  if (options.prior.is_explicit()) {
    require.fail(
        "the prior of a cache is uniform or sdpa; log-weights are given to append_with_prior, with "
        "their keys");
  }
  CacheShape<Scalar> shape{options.heads, key_width, key_width, true, !options.prior.is_sdpa(), {},
                           options.window};
  shape.scale = checked_surface_scale<Scalar>(
      {.scale = options.scale, .bandwidth = options.bandwidth}, shape.head_dim(), require);
  return shape;
}

template <class Scalar>
CacheShape<Scalar> standard_cache_shape(Index key_width, Index value_width,
                                        const CacheOptions& options) {
  constexpr Require require("Surface");
  require_cache_sizes(require, key_width, value_width, options.heads, options.window,
                      options.capacity);
  if (options.bandwidth || options.prior.is_explicit() || options.prior.is_sdpa())
    require.fail("a cache of keys and values has a scale, and neither bandwidth nor prior");
  CacheShape<Scalar> shape{options.heads, key_width, value_width, false, false, {}, options.window};
  shape.scale = checked_scale<Scalar>(options.scale, shape.head_dim(), require);
  return shape;
}

/// What a cache knows of its keys, besides their rows.
struct CacheHistory {
  Index appended = 0;
  bool has_own_priors = false;
};

template <class Scalar>
void write_shape(const CacheShape<Scalar>& shape, Index size, const CacheHistory& history,
                 CheckedWriter& to) {
  to.write(CacheMagic<Scalar>{});
  const std::int64_t sizes[] = {
      shape.heads.query,     shape.key_value_heads(), shape.key_width,          shape.value_width,
      shape.values_are_keys, shape.has_log_prior,     shape.window.value_or(0), size,
      history.appended,      history.has_own_priors};
  to.write(sizes, std::size(sizes));
  to.write(shape.scale);
  to.write_checksum();
}

/// Reads what write_shape wrote, and checks it as if it had been given to a constructor.
template <class Scalar>
CacheShape<Scalar> read_shape(CheckedReader& from, const Require& require, Index& size,
                              CacheHistory& history) {
  if (from.read<CacheMagic<Scalar>>() != CacheMagic<Scalar>{})
    require.fail("the stream is not a saved cache of this scalar type");
  std::int64_t sizes[10] = {};
  from.read(sizes, std::size(sizes));
  CacheShape<Scalar> shape{{sizes[0], sizes[1]},
                           sizes[2],
                           sizes[3],
                           sizes[4] != 0,
                           sizes[5] != 0,
                           from.read<accumulator_t<Scalar>>(),
                           {}};
  if (sizes[6] != 0) shape.window = sizes[6];
  size = sizes[7];
  history = {sizes[8], sizes[9] != 0};
  from.check_checksum();
  require_cache_sizes(require, shape.key_width, shape.value_width, shape.heads, shape.window, 0);
  require.usable_scale(shape.scale, shape.values_are_keys);
  const bool holds_together =
      0 <= size && size <= history.appended && size <= shape.window.value_or(size) &&
      (shape.values_are_keys ? shape.value_width == shape.key_width : !shape.has_log_prior);
  if (!holds_together) require.fail("the stream does not hold a cache: its sizes contradict");
  return shape;
}

}  // namespace detail

/// Keys held ready for queries that come later: a surface that grows, or moves along a stream.
///
///     Surface<float> surface(64, {.bandwidth = 0.5, .window = 4096});
///     for (...) { surface.append(sample); projected = surface.project(sample); }
///
/// In the surface form the keys are the values too. In the standard form the same class holds keys
/// and values, for decoding with a cache:
///
///     Surface<float> cache(width, width, {.heads = {8}, .capacity = 2048});
///     for (...) { cache.append(key, value); out = cache.attend(query); }
///
/// What it gives is what `project` or `attention` gives for the same keys, oldest first, stored by
/// rows: the same bits in the standard form and under KeyPrior::sdpa while the keys lie in one piece of
/// memory, within rounding otherwise, since norms are formed once, when a key is appended, and tiles end
/// where a piece of memory ends. Only where there is no key yet it reports an error, since nothing
/// can be projected onto nothing. Terms count keys from the oldest that is held.
///
/// The cache holds one row for each key: d numbers a head in the surface form, d + dv in the
/// standard form, and a log-weight for each key/value head where the prior is not sdpa. With
/// `capacity` or `window`, memory is taken when it is made and then never again, but for what
/// `append` says of forks; without, it doubles when it is full. A window is a ring buffer: memory
/// does not grow and no key is ever moved.
///
/// Members that are const may run on any number of threads at once; while another member runs, none
/// may. A fork is an object of its own, and may be used, changed and destroyed on another thread
/// whatever becomes of this one. `…_into` members allocate nothing. All errors are found before
/// anything is changed. It cannot be copied: `fork` does that, cheaply. What was moved from is
/// empty.
template <class Scalar>
class Surface {
  static_assert(is_supported_scalar_v<Scalar>,
                "surfattn: the scalar must be float, double, long double, Eigen::half or "
                "Eigen::bfloat16");
  using Accumulator = accumulator_t<Scalar>;

 public:
  /// A cache of the surface form, for keys Hkv·d wide, that are the values as well. Errors: a width
  /// that heads do not divide, a window or bandwidth that is not positive, bandwidth and scale both.
  explicit Surface(Index key_width, const CacheOptions& options = {})
      : Surface(detail::surface_cache_shape<Scalar>(key_width, options), options.capacity) {}

  /// A cache of the standard form, for keys Hkv·d and values Hkv·dv wide. (A template, so that
  /// braces in the second place are options.)
  template <std::integral Width>
  Surface(Index key_width, Width value_width, const CacheOptions& options = {})
      : Surface(detail::standard_cache_shape<Scalar>(key_width, static_cast<Index>(value_width),
                                                     options),
                options.capacity) {}

  Surface(Surface&& other) noexcept
      : shape_(other.shape_),
        store_(std::move(other.store_)),
        history_(std::exchange(other.history_, {})) {}
  Surface& operator=(Surface&& other) noexcept {
    shape_ = other.shape_;
    store_ = std::move(other.store_);
    history_ = std::exchange(other.history_, {});
    return *this;
  }

  /// The number of keys held.
  Index size() const { return store_.size(); }
  bool is_empty() const { return size() == 0; }
  /// How many keys were appended since it was made or reset, dropped ones included: the position of
  /// the next one.
  Index appended() const { return history_.appended; }
  /// How many keys fit into the memory that there is.
  Index capacity() const { return store_.capacity(); }
  std::optional<Index> window() const { return shape_.window; }
  Index key_width() const { return shape_.key_width; }
  Index value_width() const { return shape_.value_width; }
  Heads heads() const { return shape_.heads; }
  /// β = 1/σ²
  Accumulator scale() const { return shape_.scale; }
  /// All of the above that does not change.
  const detail::CacheShape<Scalar>& shape() const { return shape_; }
  /// Whether this is the surface form.
  bool values_are_keys() const { return shape_.values_are_keys; }

  /// Bytes that one key takes.
  std::size_t bytes_per_key() const {
    const detail::KeyWidths widths = store_.widths();
    return static_cast<std::size_t>(widths.keys + widths.values) * sizeof(Scalar) +
           static_cast<std::size_t>(widths.log_prior) * sizeof(Accumulator);
  }

  /// Copies of what is held, oldest first: size() rows. For a backward pass, say.
  Matrix<Scalar> keys() const {
    return copied(&detail::KeySegment<Scalar>::keys, shape_.key_width);
  }
  Matrix<Scalar> values() const {
    return shape_.values_are_keys ? keys()
                                  : copied(&detail::KeySegment<Scalar>::values, shape_.value_width);
  }

  /// Appends keys, m × (Hkv·d), of the surface form, under the prior of the cache. A window then
  /// drops the oldest. Allocates nothing where there is memory, unless a fork reads the rows that a
  /// ring would write over: then the keys are copied to new memory, once. Time O(m·Hkv·d).
  template <detail::DenseMatrix Keys>
  void append(const Keys& keys) {
    constexpr detail::Require require("Surface::append");
    require_form(require, true);
    append_rows(require, keys, nothing(), nullptr);
  }

  /// Appends keys and values of the standard form, m × (Hkv·d) and m × (Hkv·dv).
  template <detail::DenseMatrix Keys, detail::DenseMatrix Values>
  void append(const Keys& keys, const Values& values) {
    constexpr detail::Require require("Surface::append");
    require_form(require, false);
    append_rows(require, keys, values, nullptr);
  }

  /// Appends keys with log-weights log π of their own, m × 1 (for all heads) or m × Hkv, of the
  /// scalar type of sums. Errors: a cache whose prior is sdpa.
  template <detail::DenseMatrix Keys, detail::DenseMatrix LogPrior>
  void append_with_prior(const Keys& keys, const LogPrior& log_prior) {
    constexpr detail::Require require("Surface::append_with_prior");
    static_assert(std::is_same_v<Accumulator, detail::scalar_t<LogPrior>>,
                  "surfattn: log-weights must be of the scalar type of the keys, or of float where "
                  "that has 16 bits");
    require_form(require, true);
    if (!shape_.has_log_prior) require.fail("the prior of this cache is sdpa");
    const auto& weights = detail::stored(log_prior);
    const detail::Extent actual = detail::extent(weights);
    const detail::Extent expected{static_cast<Index>(keys.rows()), shape_.key_value_heads()};
    if (actual.cols != 1) require.shape("log_prior", actual, expected, "keys × key/value heads");
    require.shape("log_prior", actual, {expected.rows, actual.cols}, "one row for each key");
    auto rows = detail::view(weights);
    if (rows.cols == 1) rows.col_stride = 0;
    append_rows(require, keys, nothing(), &rows);
    history_.has_own_priors = true;
  }

  /// Makes room for so many keys in all. Errors: a cache with a window, which has its memory.
  void reserve(Index keys) {
    constexpr detail::Require require("Surface::reserve");
    if (shape_.window) require.fail("this cache is a ring buffer: its memory is its window");
    if (keys < 0) require.fail("keys must not be negative, but is ", keys);
    if (keys > size()) store_.reserve(keys - size());
  }

  /// Forgets the `count` oldest keys. Time O(1). Errors: more than there are.
  void drop_front(Index count) {
    require_held(detail::Require("Surface::drop_front"), count);
    store_.drop_front(count);
  }

  /// Takes back the `count` newest keys, as if they had not been appended; but what a window dropped for
  /// them does not come back: a fork taken before has it. Time O(1). Errors: more than there are.
  void drop_back(Index count) {
    require_held(detail::Require("Surface::drop_back"), count);
    store_.drop_back(count);
    history_.appended -= count;
  }

  /// Forgets all keys and keeps the memory.
  void reset() {
    store_.drop_front(size());
    history_ = {};
  }

  /// A cache that holds the same keys and then goes its own way, as for the beams of a beam search.
  /// What lies in one piece is shared and not copied, whatever becomes of this cache. What follows a
  /// past that is shared already, as in a fork of a fork, is copied, and so is a ring that has come
  /// round: O(its rows). `capacity`: keys beyond the present ones for which memory is taken at once;
  /// for a fork that is to grow, as many as it may grow by.
  Surface fork(Index capacity = 0) const {
    detail::require_capacity(detail::Require("Surface::fork"), "capacity", capacity);
    Surface fork(shape_, store_.fork(capacity));
    fork.history_ = history_;
    return fork;
  }

  /// Writes the cache to a binary stream, to be restored by a program for the same scalar type and
  /// byte order: a header, the rows oldest first, and checksums. Errors: a stream that fails.
  void save(std::ostream& stream) const {
    constexpr detail::Require require("Surface::save");
    detail::CheckedWriter to(stream, require);
    detail::write_shape(shape_, size(), history_, to);
    const Segments segments = store_.segments();
    for (const auto& segment : {segments.first, segments.second}) {
      for (Index j = 0; j < segment.keys.rows; ++j) {
        to.write(segment.keys.row(j), segment.keys.cols);
        to.write(segment.values.row(j), segment.values.cols);
        to.write(segment.log_prior.row(j), segment.log_prior.cols);
      }
    }
    to.write_checksum();
  }

  /// The cache that was saved, with memory for at least `capacity` keys, or for its window. Errors: a
  /// stream that ends too early, is damaged, or holds something else.
  static Surface restore(std::istream& stream, Index capacity = 0) {
    constexpr detail::Require require("Surface::restore");
    detail::require_capacity(require, "capacity", capacity);
    detail::CheckedReader from(stream, require);
    Index size = 0;
    detail::CacheHistory history;
    const auto shape = detail::read_shape<Scalar>(from, require, size, history);
    Surface surface(shape, std::max(size, capacity));
    surface.history_ = history;
    surface.store_.append(size, [&](auto& memory, Index row, Index, Index count) {
      for (Index j = row; j < row + count; ++j) {
        from.read(memory.keys.row(j).data(), memory.keys.cols());
        from.read(memory.values.row(j).data(), memory.values.cols());
        from.read(memory.log_prior.row(j).data(), memory.log_prior.cols());
      }
    });
    from.check_checksum();
    return surface;
  }

  /// Checks terms of a call with so many queries when the cache will hold `keys` keys: for who appends
  /// and then attends, and reports mistakes before.
  template <class... Terms>
  void check_terms(const detail::Require& require, Index queries, Index keys,
                   const Terms&... terms) const {
    detail::Operands<Scalar> next;
    next.shape = require.shapes({queries, query_width()}, {keys, shape_.key_width},
                                {keys, shape_.value_width}, shape_.heads, {});
    next.log_prior_is_of_norms = log_prior_is_of_norms();
    detail::term_binder(next, require, terms...);
  }

  /// Bytes of workspace with which the `…_into` members use every worker of the executor for
  /// up to `queries` queries, however many keys there are.
  std::size_t workspace_size(Index queries, const QueryOptions& options = {}) const {
    return detail::forward_workspace_room<Scalar>(largest_problem(queries), options.executor);
  }

  /// P(Q), Tq × (Hq·d): each query projected onto the surface that the keys sample, as by `project`.
  /// Allocates the result and a workspace. Errors: a cache of the standard form, an empty one,
  /// queries of the wrong width.
  template <detail::DenseMatrix Queries, class... Terms>
  Matrix<Scalar> project(const Queries& queries, const QueryOptions& options = {},
                         const Terms&... terms) const {
    require_form(detail::Require("Surface::project"), true);
    return run_allocating("Surface::project", queries, options, terms...);
  }

  /// `project` into `out`, without allocating; `workspace` of workspace_size(Tq, options) bytes.
  template <detail::DenseMatrix Queries, class Out, class... Terms>
  void project_into(const Queries& queries, Out&& out, const Workspace& workspace,
                    const QueryOptions& options = {}, const Terms&... terms) const {
    detail::check_outputs_at_compile_time<Scalar, Out>();
    constexpr detail::Require require("Surface::project");
    require_form(require, true);
    run(require, queries, {detail::view(out), {}}, workspace, options, terms...);
  }

  /// softmax(S)·V, Tq × (Hq·dv), as by `attention`; in the surface form, where V = K, the same as
  /// `project`. Allocates the result and a workspace.
  template <detail::DenseMatrix Queries, class... Terms>
  Matrix<Scalar> attend(const Queries& queries, const QueryOptions& options = {},
                        const Terms&... terms) const {
    return run_allocating("Surface::attend", queries, options, terms...);
  }

  /// attend(queries)·readout, for a readout (Hq·dv) × Dout: the heads' B_h one below the other.
  template <detail::DenseMatrix Queries, detail::DenseMatrix Readout, class... Terms>
  Matrix<Scalar> attend(const Queries& queries, const Readout& readout,
                        const QueryOptions& options = {}, const Terms&... terms) const {
    detail::check_inputs_at_compile_time<Queries, Readout, Matrix<Scalar>>();
    constexpr detail::Require require("Surface::attend");
    const Index width = shape_.value_width * shape_.heads.query / shape_.key_value_heads();
    require.shape("readout", detail::extent(readout), {width, static_cast<Index>(readout.cols())},
                  "one row for each column of the output");
    return run_allocating("Surface::attend", queries, options, terms...) * readout;
  }

  /// `attend` into `out`, without allocating.
  template <detail::DenseMatrix Queries, class Out, class... Terms>
  void attend_into(const Queries& queries, Out&& out, const Workspace& workspace,
                   const QueryOptions& options = {}, const Terms&... terms) const {
    detail::check_outputs_at_compile_time<Scalar, Out>();
    run(detail::Require("Surface::attend"), queries, {detail::view(out), {}}, workspace, options,
        terms...);
  }

  /// `attend`, and log_sum_exp as of project_forward or attention_forward.
  template <detail::DenseMatrix Queries, class... Terms>
  Forward<Scalar> attend_forward(const Queries& queries, const QueryOptions& options = {},
                                 const Terms&... terms) const {
    constexpr detail::Require require("Surface::attend_forward");
    const detail::Shape shape = checked_shape(require, queries);
    Forward<Scalar> forward{detail::matrix<Scalar>(shape.out_extent()),
                            detail::matrix<Accumulator>(shape.log_sum_exp_extent())};
    attend_forward_into(queries, forward.out, forward.log_sum_exp,
                        Workspace(workspace_size(shape.queries, options)), options, terms...);
    return forward;
  }

  /// The same without allocating.
  template <detail::DenseMatrix Queries, class Out, class LogSumExp, class... Terms>
  void attend_forward_into(const Queries& queries, Out&& out, LogSumExp&& log_sum_exp,
                           const Workspace& workspace, const QueryOptions& options = {},
                           const Terms&... terms) const {
    detail::check_outputs_at_compile_time<Scalar, Out>();
    detail::check_writable_sums_at_compile_time<Scalar, LogSumExp>();
    run(detail::Require("Surface::attend_forward"), queries,
        {detail::view(out), detail::view(log_sum_exp)}, workspace, options, terms...);
  }

  /// f(Q), Tq × (Hq·d): the local-linear projection of local_linear.hpp, of the surface form, with
  /// ridge λ > 0. Takes terms as that does. Allocates the result and a workspace.
  template <detail::DenseMatrix Queries, class... Terms>
  Matrix<Scalar> local_linear(const Queries& queries, double ridge,
                              const QueryOptions& options = {}, const Terms&... terms) const {
    constexpr detail::Require require("Surface::local_linear");
    const detail::Shape shape = checked_shape(require, queries);
    auto out = detail::matrix<Scalar>(shape.out_extent());
    auto projection = out;
    auto log_sum_exp = detail::matrix<Scalar>(shape.log_sum_exp_extent());
    local_linear_into(queries, ridge, out, projection, log_sum_exp,
                      Workspace(local_linear_workspace_size(shape.queries, options)), options,
                      terms...);
    return out;
  }

  /// The same into `out`, with the local constant, Tq × (Hq·d), and log_sum_exp, Tq × Hq, that it is
  /// computed from, without allocating; `workspace` of local_linear_workspace_size(Tq, options)
  /// bytes.
  template <detail::DenseMatrix Queries, class Out, class Projection, class LogSumExp,
            class... Terms>
  void local_linear_into(const Queries& queries, double ridge, Out&& out, Projection&& projection,
                         LogSumExp&& log_sum_exp, const Workspace& workspace,
                         const QueryOptions& options = {}, const Terms&... terms) const {
    detail::check_outputs_at_compile_time<Scalar, Out, Projection, LogSumExp>();
    constexpr detail::Require require("Surface::local_linear");
    detail::refuse_16_bits_at_compile_time<Scalar>();
    require_form(require, true);
    const auto usable_ridge = detail::checked_ridge<Scalar>(ridge, require);
    const auto& q = detail::stored(queries);
    detail::run_local_linear<Scalar>(operands(require, q), usable_ridge, detail::view(out),
                                     detail::view(projection), detail::view(log_sum_exp), workspace,
                                     options.executor, require, terms...);
  }

  /// Bytes of workspace for local_linear_into, however many keys there are.
  std::size_t local_linear_workspace_size(Index queries, const QueryOptions& options = {}) const {
    detail::Operands<Scalar> operands;
    operands.shape = largest_problem(queries);
    operands.values_are_keys = true;
    return std::max(detail::local_linear_bytes(Pass::forward, operands, options.executor),
                    workspace_size(queries, options));
  }

 private:
  using Segments = std::pair<detail::KeySegment<Scalar>, detail::KeySegment<Scalar>>;

  Surface(const detail::CacheShape<Scalar>& shape, Index capacity)
      : shape_(shape), store_(shape.widths(), shape.window.value_or(capacity), shape.window) {}
  Surface(const detail::CacheShape<Scalar>& shape, detail::KeyStore<Scalar>&& store)
      : shape_(shape), store_(std::move(store)) {}

  /// In the place of values that a cache does not hold.
  static Matrix<Scalar> nothing() { return {}; }

  void require_form(const detail::Require& require, bool values_are_keys) const {
    if (shape_.values_are_keys == values_are_keys) return;
    require.fail(values_are_keys ? "this cache holds keys and values, for attend"
                                 : "in this cache the keys are the values");
  }

  void require_held(const detail::Require& require, Index count) const {
    if (0 <= count && count <= size()) return;
    require.fail("count is ", count, " but the cache holds ", size(), " keys");
  }

  template <class Keys, class Values>
  void append_rows(const detail::Require& require, const Keys& keys, const Values& values,
                   const detail::MatrixView<const Accumulator>* log_prior) {
    detail::check_inputs_at_compile_time<Keys, Values, Matrix<Scalar>>();
    const Index rows = keys.rows();
    require.shape("keys", detail::extent(keys), {rows, shape_.key_width},
                  "the width that the cache was made for");
    if (!shape_.values_are_keys) {
      require.shape("values", detail::extent(values), {rows, shape_.value_width},
                    "one row for each key, of the width that the cache was made for");
    }
    const auto& k = detail::stored(keys);
    const auto& v = detail::stored(values);
    const Index kept = shape_.window ? std::min(rows, *shape_.window) : rows;
    const Index dropped =
        shape_.window ? std::max<Index>(0, size() + kept - *shape_.window) : Index(0);
    const Index first = rows - kept;
    store_.reserve(kept, dropped);
    store_.drop_front(dropped);
    history_.appended += rows;
    store_.append(kept, [&](auto& memory, Index row, Index n, Index count) {
      memory.keys.middleRows(row, count) = k.middleRows(first + n, count);
      if (!shape_.values_are_keys)
        memory.values.middleRows(row, count) = v.middleRows(first + n, count);
      if (!shape_.has_log_prior) return;
      for (Index i = 0; i < count; ++i) write_log_prior(memory, row + i, log_prior, first + n + i);
    });
  }

  /// log π_j − β‖k_j‖²/2
  void write_log_prior(detail::KeyMemory<Scalar>& memory, Index row,
                       const detail::MatrixView<const Accumulator>* log_prior, Index key) const {
    const auto keys = detail::view(std::as_const(memory.keys)).block_rows(row, 1);
    for (Index head = 0; head < shape_.key_value_heads(); ++head) {
      Accumulator norm(0);
      detail::simd::squared_norms(keys.block_cols(head * shape_.head_dim(), shape_.head_dim()),
                                  &norm);
      memory.log_prior(row, head) =
          (log_prior ? (*log_prior)(key, head) : Accumulator(0)) - shape_.scale / 2 * norm;
    }
  }

  /// A cache without memory has no widths in its segments.
  Matrix<Scalar> copied(detail::MatrixView<const Scalar> detail::KeySegment<Scalar>::*part,
                        Index width) const {
    const Segments segments = store_.segments();
    const auto older = segments.first.*part, newer = segments.second.*part;
    Matrix<Scalar> all(older.rows + newer.rows, width);
    for (Index j = 0; j < all.rows(); ++j) {
      const auto& from = j < older.rows ? older : newer;
      const Index row = j < older.rows ? j : j - older.rows;
      for (Index c = 0; c < all.cols(); ++c) all(j, c) = from(row, c);
    }
    return all;
  }

  bool log_prior_is_of_norms() const { return shape_.has_log_prior && !history_.has_own_priors; }
  Index query_width() const { return shape_.heads.query * shape_.head_dim(); }
  detail::Extent keys_extent() const { return {size(), shape_.key_width}; }
  detail::Extent values_extent() const { return {size(), shape_.value_width}; }

  template <class Queries>
  detail::Shape checked_shape(const detail::Require& require, const Queries& queries) const {
    detail::check_inputs_at_compile_time<Queries, Matrix<Scalar>>();
    if (is_empty()) require.fail("the cache is empty: append keys first");
    return require.shapes(detail::extent(queries), keys_extent(), values_extent(), shape_.heads,
                          {});
  }

  /// A problem that needs the most workspace, with more keys than any memory holds.
  detail::Shape largest_problem(Index queries) const {
    constexpr Index keys = Index(1) << 40;
    constexpr detail::Require require("Surface::workspace_size");
    if (queries < 0) require.fail("queries must not be negative, but is ", queries);
    return require.shapes({queries, query_width()}, {keys, shape_.key_width},
                          {keys, shape_.value_width}, shape_.heads, {});
  }

  template <class Queries>
  detail::Operands<Scalar> operands(const detail::Require& require, const Queries& queries) const {
    detail::Operands<Scalar> operands;
    operands.shape = checked_shape(require, queries);
    operands.queries = detail::view(queries);
    Segments segments = store_.segments();
    for (auto* segment : {&segments.first, &segments.second}) {
      if (shape_.values_are_keys) segment->values = segment->keys;
      if (!shape_.has_log_prior) segment->log_prior = {};
    }
    operands.keys = segments.first.keys;
    operands.values = segments.first.values;
    operands.log_prior = segments.first.log_prior;
    operands.more = segments.second;
    operands.values_are_keys = shape_.values_are_keys;
    operands.scale = shape_.scale;
    if (shape_.has_log_prior) operands.query_norm_weight = -shape_.scale / 2;
    operands.log_prior_is_of_norms = log_prior_is_of_norms();
    return operands;
  }

  template <class Queries, class... Terms>
  void run(const detail::Require& require, const Queries& queries,
           const detail::ForwardOutputs<Scalar>& outputs, const Workspace& workspace,
           const QueryOptions& options, const Terms&... terms) const {
    const auto& q = detail::stored(queries);
    detail::run_forward(operands(require, q), outputs, workspace, options.executor, require,
                        terms...);
  }

  template <class Queries, class... Terms>
  Matrix<Scalar> run_allocating(const char* function, const Queries& queries,
                                const QueryOptions& options, const Terms&... terms) const {
    const detail::Require require(function);
    const detail::Shape shape = checked_shape(require, queries);
    auto out = detail::matrix<Scalar>(shape.out_extent());
    run(require, queries, {detail::view(out), {}},
        Workspace(workspace_size(shape.queries, options)), options, terms...);
    return out;
  }

  detail::CacheShape<Scalar> shape_;
  detail::KeyStore<Scalar> store_;
  detail::CacheHistory history_;
};

}  // namespace surfattn

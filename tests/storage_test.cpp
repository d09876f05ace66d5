// Every storage that Eigen has, of inputs and outputs, gives the same bits; workspaces suffice at
// their exact size; and the functions that promise to allocate nothing allocate nothing.

// clang-format off: this comes before Eigen
#include "support/no_allocation.hpp"
// clang-format on

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <surfattn/surfattn.hpp>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using Eigen::Dynamic;
using surfattn::Align;
using surfattn::attention;
using surfattn::attention_backward;
using surfattn::attention_backward_into;
using surfattn::attention_forward;
using surfattn::attention_forward_into;
using surfattn::attention_into;
using surfattn::BoolMask;
using surfattn::Causal;
using surfattn::Forward;
using surfattn::Index;
using surfattn::KeyLengths;
using surfattn::KeyPrior;
using surfattn::Matrix;
using surfattn::Options;
using surfattn::Pass;
using surfattn::project;
using surfattn::project_backward;
using surfattn::project_backward_into;
using surfattn::project_forward;
using surfattn::project_forward_into;
using surfattn::project_into;
using surfattn::SlidingWindow;
using surfattn::SurfaceOptions;
using surfattn::Workspace;
using surfattn::workspace_size;
using surfattn::test::NoAllocation;
using surfattn::test::random_matrix;
using surfattn::test::seed;
using surfattn::test::seeded_random;

// ---- One problem, its results from contiguous row-major matrices -------------------------------

constexpr Index num_queries = 9, num_keys = 17, head_dim = 3, value_dim = 2, query_heads = 4,
                key_heads = 2;
constexpr surfattn::Heads heads{query_heads, key_heads};

template <class S>
struct Problem {
  Matrix<S> queries, keys, values, grad_out, grad_projection, log_prior;
  Options options{.heads = heads};
  SurfaceOptions surface_options{.heads = heads};

  Forward<S> attention;
  surfattn::AttentionGradients<S> attention_gradients;
  Forward<S> projection;
  surfattn::SurfaceGradients<S> surface_gradients;

  Problem() {
    std::mt19937_64 random = seeded_random();
    queries = random_matrix<S>(num_queries, query_heads * head_dim, random);
    keys = random_matrix<S>(num_keys, key_heads * head_dim, random);
    values = random_matrix<S>(num_keys, key_heads * value_dim, random);
    grad_out = random_matrix<S>(num_queries, query_heads * value_dim, random);
    grad_projection = random_matrix<S>(num_queries, query_heads * head_dim, random);
    log_prior = random_matrix<S>(num_keys, key_heads, random);
    surface_options.prior = log_prior;
    attention = attention_forward(queries, keys, values, options);
    attention_gradients = attention_backward(queries, keys, values, attention, grad_out, options);
    projection = project_forward(queries, keys, surface_options);
    surface_gradients =
        project_backward(queries, keys, projection, grad_projection, surface_options);
  }
  Problem(const Problem&) = delete;  // the options hold a view of log_prior
};

/// Bit by bit, whatever the storage of `actual`.
template <class Derived, class S>
bool same_bits(const Eigen::MatrixBase<Derived>& actual, const Matrix<S>& expected) {
  if (actual.rows() != expected.rows() || actual.cols() != expected.cols()) return false;
  const Matrix<S> copy = actual;
  return std::memcmp(copy.data(), expected.data(),
                     static_cast<std::size_t>(copy.size()) * sizeof(S)) == 0;
}

// ---- Inputs ------------------------------------------------------------------------------------

template <class S, class Q, class K, class V, class G, class P>
void check_inputs(const Problem<S>& p, const Q& queries, const K& keys, const V& values,
                  const G& grad_out, const P& grad_projection) {
  CHECK(same_bits(attention(queries, keys, values, p.options), p.attention.out));
  const auto f = attention_forward(queries, keys, values, p.options);
  CHECK(same_bits(f.out, p.attention.out));
  CHECK(same_bits(f.log_sum_exp, p.attention.log_sum_exp));
  const auto g = attention_backward(queries, keys, values, f, grad_out, p.options);
  CHECK(same_bits(g.queries, p.attention_gradients.queries));
  CHECK(same_bits(g.keys, p.attention_gradients.keys));
  CHECK(same_bits(g.values, p.attention_gradients.values));

  CHECK(same_bits(project(queries, keys, p.surface_options), p.projection.out));
  const auto surface = project_forward(queries, keys, p.surface_options);
  CHECK(same_bits(surface.out, p.projection.out));
  CHECK(same_bits(surface.log_sum_exp, p.projection.log_sum_exp));
  const auto s = project_backward(queries, keys, surface, grad_projection, p.surface_options);
  CHECK(same_bits(s.queries, p.surface_gradients.queries));
  CHECK(same_bits(s.keys, p.surface_gradients.keys));
  CHECK(same_bits(s.log_prior, p.surface_gradients.log_prior));
  CHECK(s.bandwidth == p.surface_gradients.bandwidth);
}

/// All inputs in the storage that `store` makes of a matrix.
template <class S, class Store>
void check_storage(const Problem<S>& p, Store store) {
  const auto queries = store(p.queries), keys = store(p.keys), values = store(p.values);
  const auto grad_out = store(p.grad_out), grad_projection = store(p.grad_projection);
  check_inputs(p, queries.view(), keys.view(), values.view(), grad_out.view(),
               grad_projection.view());
}

template <class S>
using Columns = Eigen::Matrix<S, Dynamic, Dynamic, Eigen::ColMajor>;

template <class M>
struct Stored {
  M matrix;
  const M& view() const { return matrix; }
};

template <class M>
struct StoredTransposed {
  M matrix;
  auto view() const { return matrix.transpose(); }
};

/// Within a larger matrix, NaN all around.
template <class M>
struct StoredBlock {
  M matrix;
  Index rows, cols;

  template <class Source>
  explicit StoredBlock(const Source& source)
      : matrix(M::Constant(source.rows() + 5, source.cols() + 4, NAN)),
        rows(source.rows()),
        cols(source.cols()) {
    matrix.block(2, 3, rows, cols) = source;
  }
  auto view() const { return matrix.block(2, 3, rows, cols); }
};

/// Numbers apart from each other, and from an address that no packet could be loaded from.
template <class S, int Order>
struct Strided {
  using Matrix = Eigen::Matrix<S, Dynamic, Dynamic, Order>;
  using Stride = Eigen::Stride<Dynamic, Dynamic>;
  std::vector<S> memory;
  Index rows, cols;

  explicit Strided(const surfattn::Matrix<S>& source)
      : memory(static_cast<std::size_t>(1 + 3 * (source.rows() + 2) * (source.cols() + 2)), S(NAN)),
        rows(source.rows()),
        cols(source.cols()) {
    Eigen::Map<Matrix, 0, Stride>(memory.data() + 1, rows, cols, stride()) = source;
  }
  Stride stride() const { return {3 * ((Order == Eigen::RowMajor ? cols : rows) + 2), 3}; }
  auto view() const {
    return Eigen::Map<const Matrix, 0, Stride>(memory.data() + 1, rows, cols, stride());
  }
};

TEST_CASE("Inputs may be stored in any way", "[storage]") {
  using Rows = Matrix<double>;
  const Problem<double> p;
  CAPTURE(seed());
  SECTION("column-major") {
    check_storage(p, [](const Rows& m) { return Stored<Columns<double>>{m}; });
  }
  SECTION("transposed") {
    check_storage(p, [](const Rows& m) { return StoredTransposed<Rows>{m.transpose()}; });
    check_storage(p,
                  [](const Rows& m) { return StoredTransposed<Columns<double>>{m.transpose()}; });
  }
  SECTION("blocks of larger matrices") {
    check_storage(p, [](const Rows& m) { return StoredBlock<Rows>(m); });
    check_storage(p, [](const Rows& m) { return StoredBlock<Columns<double>>(m); });
  }
  SECTION("maps with two strides") {
    check_storage(p, [](const Rows& m) { return Strided<double, Eigen::RowMajor>(m); });
    check_storage(p, [](const Rows& m) { return Strided<double, Eigen::ColMajor>(m); });
  }
}

TEST_CASE("Float inputs may be stored in any way", "[storage]") {
  const Problem<float> p;
  CAPTURE(seed());
  check_storage(p, [](const Matrix<float>& m) { return Stored<Columns<float>>{m}; });
  check_storage(p, [](const Matrix<float>& m) { return Strided<float, Eigen::RowMajor>(m); });
}

TEST_CASE("Inputs may have fixed sizes and be of mixed storage", "[storage]") {
  using Eigen::RowMajor;
  const Problem<double> p;
  CAPTURE(seed());
  const Eigen::Matrix<double, num_queries, query_heads* head_dim> queries = p.queries;
  const Eigen::Matrix<double, num_keys, key_heads * head_dim, RowMajor> keys = p.keys;
  Eigen::Matrix<double, num_keys, Dynamic, RowMajor> values = p.values;
  Eigen::Matrix<double, Dynamic, query_heads* value_dim> grad_out = p.grad_out;
  Columns<double> grad_projection = p.grad_projection;
  check_inputs(
      p, queries, keys, values, grad_out,
      Eigen::Map<Columns<double>>(grad_projection.data(), num_queries, query_heads * head_dim));
}

/// Everything of both forms where there are columns of keys, of values or of neither.
template <int storage>
void check_without_columns(Index queries, Index width, Index value_width) {
  using M = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, storage>;
  CAPTURE(queries, width, value_width);
  const M q = M::Random(queries, width), k = M::Random(40, width), v = M::Random(40, value_width);
  const auto forward = attention_forward(q, k, v, {.scale = 1}, KeyLengths(30));
  CHECK(forward.out.rows() == queries);
  CHECK(forward.out.cols() == value_width);
  const auto gradients =
      attention_backward(q, k, v, forward, forward.out, {.scale = 1}, KeyLengths(30));
  CHECK(gradients.values.cols() == value_width);
  if (width > 0) return;
  // all scores are 0
  CHECK((forward.log_sum_exp.array() - std::log(30.0)).abs().maxCoeff() <= 1e-14);
  CHECK(forward.out.isApprox(M(v.topRows(30).colwise().mean().replicate(queries, 1)), 1e-14));
}

TEST_CASE("Inputs may have no columns", "[storage]") {
  for (const Index queries : {1, 3, 20}) {
    for (const Index width : {0, 4}) {
      for (const Index value_width : {0, 5}) {
        check_without_columns<Eigen::RowMajor>(queries, width, value_width);
        check_without_columns<Eigen::ColMajor>(queries, width, value_width);
      }
    }
  }
  // a view of no memory whose rows are apart all the same
  using Apart = Eigen::Map<Matrix<double>, 0, Eigen::OuterStride<>>;
  const Matrix<double> q = Matrix<double>::Ones(3, 4), k = Matrix<double>::Ones(40, 4), v(40, 0);
  Apart out(nullptr, 3, 0, Eigen::OuterStride<>(8));
  attention_into(q, k, v, out, Workspace(workspace_size(Pass::forward, q, k, v)), {},
                 KeyLengths(30));
}

TEST_CASE("Inputs may be references to matrices", "[storage]") {
  using Constant = Eigen::Ref<const Columns<double>>;
  using Writable = Eigen::Ref<Matrix<double>, 0, Eigen::OuterStride<>>;
  Problem<double> p;
  CAPTURE(seed());
  Columns<double> keys = p.keys;
  // a Ref of the other storage order makes its own copy
  check_inputs(p, Writable(p.queries), Constant(keys), Constant(p.values), Writable(p.grad_out),
               Constant(p.grad_projection));
}

TEST_CASE("Inputs may be expressions", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  const Matrix<double> half = p.queries / 2;
  const auto identity = Matrix<double>::Identity(num_keys, num_keys);
  const Matrix<double> reversed = p.values.reverse();
  check_inputs(p, 2 * half, identity * p.keys, reversed.reverse(), p.grad_out.array().matrix(),
               Matrix<double>(p.grad_projection));
}

TEST_CASE("One query and heads of width one may be vectors", "[storage]") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  const Matrix<double> keys = random_matrix<double>(7, 3, random);
  const Matrix<double> queries = random_matrix<double>(2, 3, random);
  const Matrix<double> expected = attention(queries.topRows(1).eval(), keys, keys);
  const Eigen::RowVectorXd row = queries.row(0);
  const Eigen::RowVector3d fixed = queries.row(0);
  const Columns<double> by_columns = queries;
  CHECK(same_bits(attention(row, keys, keys), expected));
  CHECK(same_bits(attention(fixed, keys, keys), expected));
  CHECK(same_bits(attention(queries.row(0), keys, keys), expected));
  CHECK(same_bits(attention(by_columns.row(0), keys, keys), expected));
  CHECK(same_bits(attention(Eigen::Vector3d(fixed.transpose()).transpose(), keys, keys), expected));

  const Matrix<double> narrow = keys.col(1);
  const Eigen::VectorXd column = keys.col(1);
  const Columns<double> keys_by_columns = keys;
  const Matrix<double> line = project(narrow, narrow), of_column = project(column, column);
  CHECK((of_column - line).cwiseAbs().maxCoeff() <= 1e-14);  // few queries add along columns
  CHECK(same_bits(project(keys.col(1), column), of_column));
  CHECK(same_bits(project(keys_by_columns.col(1), keys.col(1)), line));
}

/// Eigen's segments are no blocks by type: they derive from one.
TEST_CASE("Segments of vectors pass as stored matrices", "[storage]") {
  Eigen::VectorXd vector(7);
  const Eigen::VectorXd& constant = vector;
  CHECK(surfattn::detail::StoredMatrix<decltype(constant.segment(1, 3))>);
  CHECK(surfattn::detail::WritableMatrix<decltype(vector.head(3))>);
  CHECK(surfattn::detail::WritableMatrix<decltype(vector.transpose().tail<2>())>);
}

// ---- Outputs -----------------------------------------------------------------------------------

constexpr double sentinel = -12345.5;

/// Where one output goes, within memory full of the sentinel.
template <class S, int Order>
class Canvas {
 public:
  using Matrix = Eigen::Matrix<S, Dynamic, Dynamic, Order>;
  using Stride = Eigen::Stride<Dynamic, Dynamic>;
  using View = Eigen::Map<Matrix, 0, Stride>;

  Canvas(Index rows, Index cols, Index outer_gap, Index inner)
      : memory_(static_cast<std::size_t>(1 + inner * (rows + outer_gap) * (cols + outer_gap)),
                S(sentinel)),
        view_(memory_.data() + 1, rows, cols,
              Stride(inner * ((Order == Eigen::RowMajor ? cols : rows) + outer_gap), inner)) {}

  View& view() { return view_; }

  bool surroundings_untouched() const {
    std::size_t touched = 0;
    for (const S number : memory_) touched += number != S(sentinel);
    return touched == static_cast<std::size_t>(view_.size());
  }

 private:
  std::vector<S> memory_;
  View view_;
};

/// All outputs of both forms. `Output` has a writable view().
template <class Output>
struct Outputs {
  Output out, log_sum_exp, grad_queries, grad_keys, grad_values;
  Output projection, surface_log_sum_exp, surface_grad_queries, surface_grad_keys, grad_log_prior;

  template <class Make>
  explicit Outputs(Make make)
      : out(make(num_queries, query_heads * value_dim)),
        log_sum_exp(make(num_queries, query_heads)),
        grad_queries(make(num_queries, query_heads * head_dim)),
        grad_keys(make(num_keys, key_heads * head_dim)),
        grad_values(make(num_keys, key_heads * value_dim)),
        projection(make(num_queries, query_heads * head_dim)),
        surface_log_sum_exp(make(num_queries, query_heads)),
        surface_grad_queries(make(num_queries, query_heads * head_dim)),
        surface_grad_keys(make(num_keys, key_heads * head_dim)),
        grad_log_prior(make(num_keys, key_heads)) {}

  template <class Use>
  void for_each(Use use) {
    for (Output* o :
         {&out, &log_sum_exp, &grad_queries, &grad_keys, &grad_values, &projection,
          &surface_log_sum_exp, &surface_grad_queries, &surface_grad_keys, &grad_log_prior}) {
      use(*o);
    }
  }
};

/// Bytes that every call on the problem can live with.
template <class S>
std::size_t bytes_for(const Problem<S>& p) {
  std::size_t bytes = 0;
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    bytes = std::max(bytes, workspace_size(pass, p.queries, p.keys, p.values, p.options));
    bytes = std::max(bytes, workspace_size(pass, p.queries, p.keys, p.surface_options));
  }
  return bytes;
}

/// Every `…_into` function, the backward passes from what the forward passes wrote.
template <class S, class Output>
S run_into(const Problem<S>& p, Outputs<Output>& o, const Workspace& workspace) {
  auto &&out = o.out.view(), &&log_sum_exp = o.log_sum_exp.view();
  attention_into(p.queries, p.keys, p.values, out, workspace, p.options);
  attention_forward_into(p.queries, p.keys, p.values, out, log_sum_exp, workspace, p.options);
  attention_backward_into(p.queries, p.keys, p.values, out, log_sum_exp, p.grad_out,
                          o.grad_queries.view(), o.grad_keys.view(), o.grad_values.view(),
                          workspace, p.options);
  auto &&projection = o.projection.view(), &&surface_log_sum_exp = o.surface_log_sum_exp.view();
  S grad_bandwidth(0);
  project_into(p.queries, p.keys, projection, workspace, p.surface_options);
  project_forward_into(p.queries, p.keys, projection, surface_log_sum_exp, workspace,
                       p.surface_options);
  project_backward_into(p.queries, p.keys, projection, surface_log_sum_exp, p.grad_projection,
                        o.surface_grad_queries.view(), o.surface_grad_keys.view(), grad_bandwidth,
                        o.grad_log_prior.view(), workspace, p.surface_options);
  return grad_bandwidth;
}

template <class S, class Output>
void check_outputs(const Problem<S>& p, Outputs<Output>& o) {
  const S grad_bandwidth = run_into(p, o, Workspace(bytes_for(p)));
  CHECK(same_bits(o.out.view(), p.attention.out));
  CHECK(same_bits(o.log_sum_exp.view(), p.attention.log_sum_exp));
  CHECK(same_bits(o.grad_queries.view(), p.attention_gradients.queries));
  CHECK(same_bits(o.grad_keys.view(), p.attention_gradients.keys));
  CHECK(same_bits(o.grad_values.view(), p.attention_gradients.values));
  CHECK(same_bits(o.projection.view(), p.projection.out));
  CHECK(same_bits(o.surface_log_sum_exp.view(), p.projection.log_sum_exp));
  CHECK(same_bits(o.surface_grad_queries.view(), p.surface_gradients.queries));
  CHECK(same_bits(o.surface_grad_keys.view(), p.surface_gradients.keys));
  CHECK(same_bits(o.grad_log_prior.view(), p.surface_gradients.log_prior));
  CHECK(grad_bandwidth == p.surface_gradients.bandwidth);
}

template <class S, int Order>
void check_canvas(Index outer_gap, Index inner) {
  const Problem<S> p;
  using Output = Canvas<S, Order>;
  Outputs<Output> outputs(
      [&](Index rows, Index cols) { return Output(rows, cols, outer_gap, inner); });
  check_outputs(p, outputs);
  outputs.for_each([](const Output& o) { CHECK(o.surroundings_untouched()); });
}

TEMPLATE_TEST_CASE("Outputs may be maps with any strides, and nothing beside them is written",
                   "[storage]", float, double) {
  CAPTURE(seed());
  check_canvas<TestType, Eigen::RowMajor>(0, 1);
  check_canvas<TestType, Eigen::RowMajor>(2, 3);
  check_canvas<TestType, Eigen::ColMajor>(0, 1);
  check_canvas<TestType, Eigen::ColMajor>(5, 2);
}

/// A block of a column-major matrix, handed over as a temporary.
struct BlockOutput {
  Columns<double> whole;
  auto view() { return whole.block(1, 2, whole.rows() - 3, whole.cols() - 2); }
};

TEST_CASE("Outputs may be blocks, and nothing around them is written", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  Outputs<BlockOutput> outputs([](Index rows, Index cols) {
    return BlockOutput{Columns<double>::Constant(rows + 3, cols + 2, sentinel)};
  });
  check_outputs(p, outputs);
  outputs.for_each([](const BlockOutput& o) {
    const Index block = (o.whole.rows() - 3) * (o.whole.cols() - 2);
    CHECK((o.whole.array() == sentinel).count() == o.whole.size() - block);
  });
}

struct TransposedOutput {
  Matrix<double> matrix;
  auto view() { return matrix.transpose(); }
};

TEST_CASE("Outputs may be transposed matrices", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  Outputs<TransposedOutput> outputs(
      [](Index rows, Index cols) { return TransposedOutput{Matrix<double>(cols, rows)}; });
  check_outputs(p, outputs);
}

TEST_CASE("Outputs may be of fixed size, references and vectors", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  const Workspace workspace(bytes_for(p));
  Eigen::Matrix<double, num_queries, query_heads * value_dim> fixed;
  attention_into(p.queries, p.keys, p.values, fixed, workspace, p.options);
  CHECK(same_bits(fixed, p.attention.out));
  Columns<double> columns(num_queries, query_heads * head_dim);
  Eigen::Ref<Columns<double>> reference(columns);
  project_into(p.queries, p.keys, reference, workspace, p.surface_options);
  CHECK(same_bits(columns, p.projection.out));

  const Matrix<double> one = p.queries.topRows(1).leftCols(head_dim);
  const Matrix<double> keys = p.keys.leftCols(head_dim);
  const auto expected = project_forward(one, keys);
  Eigen::RowVectorXd row(head_dim);
  Eigen::VectorXd log_sum_exp(1);
  project_forward_into(one, keys, row, log_sum_exp, workspace);
  CHECK(same_bits(row, expected.out));
  CHECK(same_bits(log_sum_exp, expected.log_sum_exp));
}

// ---- Workspaces --------------------------------------------------------------------------------

struct PlainOutput {
  Matrix<double> matrix;
  Matrix<double>& view() { return matrix; }
};

Outputs<PlainOutput> plain_outputs() {
  return Outputs<PlainOutput>([](Index rows, Index cols) {
    return PlainOutput{Matrix<double>::Constant(rows, cols, sentinel)};
  });
}

/// Memory of exact size at any address, between two fences.
class FencedMemory {
 public:
  FencedMemory(std::size_t bytes, std::size_t offset, unsigned char fill)
      : bytes_(bytes), offset_(offset), memory_(offset + bytes + 64, fence) {
    std::memset(memory_.data() + offset, fill, bytes);
  }
  Workspace workspace() { return {memory_.data() + offset_, bytes_}; }
  bool fences_stand() const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const bool inside = offset_ <= i && i < offset_ + bytes_;
      if (!inside && memory_[i] != fence) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char fence = 0xA5;
  std::size_t bytes_, offset_;
  std::vector<unsigned char> memory_;
};

/// Every byte 0xFF makes every number NaN: nothing may depend on what a workspace held before.
TEST_CASE("A workspace of exact size suffices at any address, whatever it holds", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  const std::size_t forward = workspace_size(Pass::forward, p.queries, p.keys, p.values, p.options);
  const std::size_t surface = workspace_size(Pass::forward, p.queries, p.keys, p.surface_options);
  const std::size_t backward =
      workspace_size(Pass::backward, p.queries, p.keys, p.values, p.options);
  for (const std::size_t offset : {0u, 1u, 7u, 31u, 63u}) {
    CAPTURE(offset);
    FencedMemory a(forward, offset, 0xFF), b(surface, offset, 0xFF), c(backward, offset, 0xFF);
    auto o = plain_outputs();
    attention_forward_into(p.queries, p.keys, p.values, o.out.matrix, o.log_sum_exp.matrix,
                           a.workspace(), p.options);
    CHECK(same_bits(o.out.matrix, p.attention.out));
    project_into(p.queries, p.keys, o.projection.matrix, b.workspace(), p.surface_options);
    CHECK(same_bits(o.projection.matrix, p.projection.out));
    attention_backward_into(p.queries, p.keys, p.values, o.out.matrix, o.log_sum_exp.matrix,
                            p.grad_out, o.grad_queries.matrix, o.grad_keys.matrix,
                            o.grad_values.matrix, c.workspace(), p.options);
    CHECK(same_bits(o.grad_keys.matrix, p.attention_gradients.keys));
    CHECK(a.fences_stand());
    CHECK(b.fences_stand());
    CHECK(c.fences_stand());
  }
}

/// A row that is not finite takes a note of its own; so many of them fill the last of the buffers.
TEST_CASE("A workspace of exact size suffices for values that are all NaN", "[storage]") {
  const Matrix<double> keys = Matrix<double>::Ones(600, 1);
  const Matrix<double> values = Matrix<double>::Constant(600, 1, NAN);
  Matrix<double> out(1, 1);
  for (const std::size_t offset : {0u, 1u, 7u, 31u, 63u}) {
    CAPTURE(offset);
    FencedMemory memory(workspace_size(Pass::forward, keys.topRows(1), keys, values), offset, 0);
    attention_into(keys.topRows(1), keys, values, out, memory.workspace());
    CHECK(memory.fences_stand());
    CHECK(std::isnan(out(0, 0)));
  }
}

TEST_CASE("The surface form's backward pass lives within its exact size, too", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  const std::size_t bytes = workspace_size(Pass::backward, p.queries, p.keys, p.surface_options);
  for (const std::size_t offset : {0u, 1u, 7u, 31u, 63u}) {
    CAPTURE(offset);
    FencedMemory memory(bytes, offset, 0xFF);
    auto o = plain_outputs();
    double grad_bandwidth = sentinel;
    project_backward_into(p.queries, p.keys, p.projection.out, p.projection.log_sum_exp,
                          p.grad_projection, o.grad_queries.matrix, o.grad_keys.matrix,
                          grad_bandwidth, o.grad_log_prior.matrix, memory.workspace(),
                          p.surface_options);
    CHECK(same_bits(o.grad_keys.matrix, p.surface_gradients.keys));
    CHECK(same_bits(o.grad_log_prior.matrix, p.surface_gradients.log_prior));
    CHECK(memory.fences_stand());
  }
}

TEST_CASE("One byte too few is an error, and nothing is written", "[storage]") {
  const Problem<double> p;
  auto o = plain_outputs();
  const auto too_small = [](std::size_t bytes) { return Workspace(bytes - 1); };
  const std::size_t forward = workspace_size(Pass::forward, p.queries, p.keys, p.values, p.options);
  const std::size_t backward =
      workspace_size(Pass::backward, p.queries, p.keys, p.values, p.options);
  CHECK_THROWS_AS(
      attention_into(p.queries, p.keys, p.values, o.out.matrix, too_small(forward), p.options),
      std::invalid_argument);
  CHECK_THROWS_AS(
      attention_backward_into(p.queries, p.keys, p.values, p.attention.out, p.attention.log_sum_exp,
                              p.grad_out, o.grad_queries.matrix, o.grad_keys.matrix,
                              o.grad_values.matrix, too_small(backward), p.options),
      std::invalid_argument);
  CHECK_THROWS_AS(attention_into(p.queries, p.keys, p.values, o.out.matrix, Workspace(), p.options),
                  std::invalid_argument);
  o.for_each([](const PlainOutput& each) { CHECK((each.matrix.array() == sentinel).all()); });
}

TEST_CASE("One workspace serves many calls of many sizes", "[storage]") {
  const Problem<double> p;
  const Problem<float> q;
  CAPTURE(seed());
  const Workspace workspace(std::max(bytes_for(p), bytes_for(q)));
  auto o = plain_outputs();
  for (int turn = 0; turn < 2; ++turn) {
    run_into(p, o, workspace);
    CHECK(same_bits(o.grad_keys.matrix, p.attention_gradients.keys));
    CHECK(same_bits(o.surface_grad_keys.matrix, p.surface_gradients.keys));
    Matrix<float> out(num_queries, query_heads * value_dim);
    attention_into(q.queries, q.keys, q.values, out, workspace, q.options);
    CHECK(same_bits(out, q.attention.out));
  }
}

static_assert(std::is_nothrow_move_constructible_v<Workspace>);
static_assert(std::is_nothrow_move_assignable_v<Workspace>);
static_assert(!std::is_copy_constructible_v<Workspace>);
static_assert(!std::is_copy_assignable_v<Workspace>);

TEST_CASE("A workspace moves with its memory and leaves nothing behind", "[storage]") {
  Workspace first(1000);
  std::byte* const memory = first.data();
  Workspace second(std::move(first));
  CHECK(second.data() == memory);
  CHECK(second.size() == 1000);
  CHECK(first.data() == nullptr);
  CHECK(first.size() == 0);

  Workspace third(10);
  third = std::move(second);
  CHECK(third.data() == memory);
  CHECK(third.size() == 1000);
  CHECK(second.data() == nullptr);
  CHECK(second.size() == 0);
  std::memset(third.data(), 0, third.size());

  Workspace& itself = third;
  third = std::move(itself);
  CHECK(third.data() == memory);
  CHECK(third.size() == 1000);

  std::byte mine[16];
  Workspace borrowed(mine, sizeof mine);
  third = std::move(borrowed);
  CHECK(third.data() == mine);
  CHECK(third.size() == sizeof mine);
}

// ---- Allocations -------------------------------------------------------------------------------

TEST_CASE("The watch on allocations sees them", "[storage]") {
  const NoAllocation watch;
  ::operator delete(::operator new(1));  // a new-expression might be optimised away
  CHECK(watch.count() == 1);
  CHECK_THROWS_AS(Matrix<double>(3, 3), std::logic_error);
}

TEST_CASE("Functions that write into given memory allocate nothing", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  auto outputs = plain_outputs();
  const Workspace workspace(bytes_for(p));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    run_into(p, outputs, workspace);
    count = watch.count();
  }
  CHECK(count == 0);
}

TEST_CASE("Strided outputs and inputs allocate nothing", "[storage]") {
  const Problem<float> p;
  CAPTURE(seed());
  using Output = Canvas<float, Eigen::ColMajor>;
  Outputs<Output> outputs([&](Index rows, Index cols) { return Output(rows, cols, 2, 3); });
  const Workspace workspace(bytes_for(p));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    run_into(p, outputs, workspace);
    count = watch.count();
  }
  CHECK(count == 0);
}

/// Allocations of one forward call of each form under the given terms.
template <class... Terms>
std::size_t allocations_with(const Problem<double>& p, const SurfaceOptions& options,
                             const Terms&... terms) {
  auto o = plain_outputs();
  const Workspace workspace(bytes_for(p));
  const NoAllocation watch;
  attention_into(p.queries, p.keys, p.values, o.out.matrix, workspace, p.options, terms...);
  project_into(p.queries, p.keys, o.projection.matrix, workspace, options, terms...);
  return watch.count();
}

TEST_CASE("No term and no option allocates", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  const Matrix<bool> mask = Matrix<bool>::Constant(num_queries, num_keys, true);
  const SurfaceOptions& options = p.surface_options;
  const SlidingWindow window{.left = 3, .right = 0, .align = Align::bottom_right};
  CHECK(allocations_with(p, options, Causal{Align::top_left}) == 0);
  CHECK(allocations_with(p, options, KeyLengths{5}) == 0);
  CHECK(allocations_with(p, options, window) == 0);
  CHECK(allocations_with(p, options, BoolMask{mask}) == 0);
  CHECK(allocations_with(p, {.heads = heads, .bandwidth = 2.0}) == 0);
  CHECK(allocations_with(p, {.scale = 0.5, .heads = heads, .prior = KeyPrior::sdpa}) == 0);
}

TEST_CASE("Masks of every kind allocate nothing", "[storage]") {
  const Problem<double> p;
  CAPTURE(seed());
  const std::vector<int> query_ids{0, 0, 0, 1, 1, 1, 2, 2, 2}, key_ids(num_keys, 1), lengths{11};
  const Matrix<bool> blocks = Matrix<bool>::Constant(3, 5, true);
  const SlidingWindow window{.left = 3, .right = 0, .align = Align::bottom_right};
  const auto masks = surfattn::any_of(
      surfattn::all_of(window, surfattn::BlockSparse(blocks, 3, 4)),
      surfattn::none_of(surfattn::Documents(query_ids, key_ids), surfattn::QueryLengths(4)),
      surfattn::MaskFunction([](Index i, Index j) { return i == j; }),
      surfattn::PrefixCausal(lengths, Align::top_left), surfattn::Dilated{3, Align::top_left});
  CHECK(allocations_with(p, p.surface_options, masks, KeyLengths(lengths)) == 0);
}

TEST_CASE("Batches, gradients of log_sum_exp and merging allocate nothing", "[storage]") {
  Problem<double> p;
  CAPTURE(seed());
  const std::vector<int> query_offsets{0, 2, 2, 9}, key_offsets{0, 10, 12, 17};
  p.options.sequences = p.surface_options.sequences = {query_offsets, key_offsets};
  const Matrix<double> grad_log_sum_exp = Matrix<double>::Ones(num_queries, query_heads);
  auto o = plain_outputs();
  const Workspace workspace(bytes_for(p));
  const Forward<double> parts[] = {p.attention, p.attention};
  std::size_t count = 0;
  {
    const NoAllocation watch;
    run_into(p, o, workspace);
    attention_backward_into(p.queries, p.keys, p.values, p.attention.out, p.attention.log_sum_exp,
                            surfattn::ForwardGradients{p.grad_out, grad_log_sum_exp},
                            o.grad_queries.matrix, o.grad_keys.matrix, o.grad_values.matrix,
                            workspace, p.options);
    surfattn::merge_partials_into(parts, o.out.matrix, o.log_sum_exp.matrix);
    count = watch.count();
  }
  CHECK(count == 0);
}

}  // namespace

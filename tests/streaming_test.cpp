// Products with rows as they lie in memory give exactly what plain loops give, on whole numbers, which
// no rounding touches, for one head and several; and the same bits for a query and a key among any
// others.
#include <algorithm>
#include <surfattn/detail/simd/streaming.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"

using namespace surfattn;
using namespace surfattn::detail;
using surfattn::test::whole_numbers;

namespace {

/// Heads side by side in the columns of a matrix, each `width` wide.
template <class Element, class Stored>
simd::HeadRows<Element> heads_of(Stored& matrix, Index width) {
  return {{matrix.data(), matrix.cols()}, width};
}

struct Sizes {
  Index heads, rows, keys, width;
};

/// Queries end with whole packets, as many columns as this for each head.
template <class Scalar>
Index padded_width(Index width) {
  return simd::rounded_up(std::max<Index>(width, 1), simd::lanes<Scalar>);
}

/// Whether norms can be had beside products.
bool can_have_norms(const Sizes& size) { return simd::rows_in_blocks(size.rows) == 0; }

/// Products, those of a head below those of the one before, and norms, one row for each head: a column more
/// than there are keys, which keeps its 77.
template <class Scalar>
struct Products {
  Matrix<Scalar> products, norms;
};

template <class Scalar, class Source>
Products<Scalar> dot_products(const Sizes& size, bool wants_norms, const Matrix<Scalar>& q,
                              const Matrix<Source>& k) {
  const auto [heads, rows, keys, width] = size;
  Products<Scalar> result{Matrix<Scalar>::Constant(heads * rows, keys + 1, Scalar(77)),
                          Matrix<Scalar>::Constant(heads, keys + 1, Scalar(77))};
  auto& [products, norms] = result;
  simd::ProductAhead<Source> ahead(view(k), {}, rows * keys);
  simd::set_dot_products<Scalar, Source>(
      {heads,
       rows,
       keys,
       width,
       heads_of<const Scalar>(q, padded_width<Scalar>(width)),
       heads_of<const Source>(k, width),
       {{products.data(), products.cols()}, rows * products.cols()},
       {{wants_norms ? norms.data() : nullptr, 0}, norms.cols()}},
      ahead);
  return result;
}

template <class Scalar, class Source>
void check_dot_products(const Sizes& size, std::mt19937_64& random) {
  const auto [heads, rows, keys, width] = size;
  const Index padded = padded_width<Scalar>(width);
  Matrix<Scalar> q = Matrix<Scalar>::Zero(rows, heads * padded);
  for (Index head = 0; head < heads; ++head)
    q.middleCols(head * padded, width) = whole_numbers<Scalar>(rows, width, random);
  const Matrix<Source> k = whole_numbers<Source>(keys, heads * width + 3, random);
  const auto alone = dot_products(size, false, q, k);
  for (Index head = 0; head < heads; ++head) {
    const Matrix<Scalar> of_head = k.middleCols(head * width, width).template cast<Scalar>();
    const Matrix<Scalar> expected =
        q.middleCols(head * padded, width).lazyProduct(of_head.transpose());
    CHECK(alone.products.block(head * rows, 0, rows, keys) == expected);
    Matrix<Scalar> norms = Matrix<Scalar>::Constant(1, keys + 1, Scalar(77));
    simd::squared_norms(view(k).block_cols(head * width, width), norms.data());
    CHECK(norms.row(0).head(keys).transpose() == of_head.rowwise().squaredNorm());
    CHECK(norms(0, keys) == Scalar(77));
  }
  CHECK((alone.products.col(keys).array() == Scalar(77)).all());
  CHECK((alone.norms.array() == Scalar(77)).all());
  if (!can_have_norms(size)) return;
  const auto both = dot_products(size, true, q, k);
  CHECK(both.products == alone.products);
  for (Index head = 0; head < heads; ++head) {
    const Matrix<Scalar> of_head = k.middleCols(head * width, width).template cast<Scalar>();
    CHECK(both.norms.row(head).head(keys).transpose() == of_head.rowwise().squaredNorm());
  }
  CHECK((both.norms.col(keys).array() == Scalar(77)).all());
}

/// Whether all numbers are the same, bit by bit.
template <class Derived>
bool all_equal(const Eigen::MatrixBase<Derived>& numbers, typename Derived::Scalar expected) {
  return (numbers.array() == expected).all();
}

/// Equal queries and equal keys, of numbers that are rounded, among any others.
template <class Scalar, class Source>
void check_equal_rows(const Sizes& size, std::mt19937_64& random) {
  const auto [heads, rows, keys, width] = size;
  const Matrix<Scalar> query =
      surfattn::test::random_matrix<Scalar>(1, heads * padded_width<Scalar>(width), random);
  const Matrix<Source> key =
      surfattn::test::random_matrix<float>(1, heads * width, random).template cast<Source>();
  const Matrix<Source> k = key.replicate(keys, 1);
  const auto alone = dot_products({heads, 1, 1, width}, true, query, key);
  for (const bool wants_norms : {false, true}) {
    if (wants_norms && !can_have_norms(size)) continue;
    const auto result =
        dot_products<Scalar, Source>(size, wants_norms, query.replicate(rows, 1), k);
    for (Index head = 0; head < heads; ++head) {
      CHECK(all_equal(result.products.block(head * rows, 0, rows, keys), alone.products(head, 0)));
      if (wants_norms) CHECK(all_equal(result.norms.row(head).head(keys), alone.norms(head, 0)));
    }
  }
}

template <class Scalar, class Source>
void check_rows_products(const Sizes& size, simd::Store mode, std::mt19937_64& random) {
  const auto [heads, rows, depth, width] = size;
  const Index padded = padded_width<Scalar>(width);
  const Matrix<Scalar> a = whole_numbers<Scalar>(rows, heads * depth, random);
  const Matrix<Source> b = whole_numbers<Source>(depth, heads * width + 3, random);
  const Matrix<Scalar> first = whole_numbers<Scalar>(rows, heads * padded + 1, random);
  Matrix<Scalar> c = first;
  simd::ProductAhead<Source> ahead(view(b), {}, rows * width * depth);
  simd::RowsProducts<Scalar, Source> products{mode,
                                              heads,
                                              rows,
                                              depth,
                                              width,
                                              heads_of<const Scalar>(a, depth),
                                              heads_of<const Source>(b, width),
                                              heads_of<Scalar>(c, padded)};
  simd::set_rows_products(products, ahead);
  for (Index head = 0; head < heads; ++head) {
    Matrix<Scalar> expected =
        a.middleCols(head * depth, depth)
            .lazyProduct(b.middleCols(head * width, width).template cast<Scalar>());
    if (mode == simd::Store::add) expected += first.middleCols(head * padded, width);
    CHECK(c.middleCols(head * padded, width) == expected);
  }
  CHECK(c.col(heads * padded) == first.col(heads * padded));
  if (mode == simd::Store::add) return;
  Matrix<Scalar> lines(rows, heads * padded);  // whole packets
  products.c = heads_of<Scalar>(lines, padded);
  products.past_caches = true;
  simd::set_rows_products(products, ahead);
  simd::finish_past_caches();
  for (Index head = 0; head < heads; ++head) {
    CHECK(lines.middleCols(head * padded, width) == c.middleCols(head * padded, width));
  }
}

/// One query and several, which take different ways; keys on both sides of a step; widths of whole
/// packets and others.
template <class Scalar, class Use>
void each_size(const Use& use) {
  const Index lanes = simd::lanes<Scalar>;
  for (const Index heads : {1, 2, 3}) {
    for (const Index rows : {1, 2, 3, 4, 5, 7, 15, 16}) {
      for (const Index keys : {1, 3, 4, 5, 8, 13}) {
        for (const Index width : {Index(0), Index(1), lanes - 1, lanes, lanes + 1, 2 * lanes,
                                  3 * lanes + 2, 4 * lanes, 8 * lanes + 1, 9 * lanes, 16 * lanes}) {
          INFO(heads << " heads, " << rows << " rows, " << keys << " keys, width " << width);
          use(Sizes{heads, rows, keys, width});
        }
      }
    }
  }
}

template <class Scalar, class Source>
void check_all() {
  auto random = surfattn::test::seeded_random();
  each_size<Scalar>([&](const Sizes& size) {
    check_dot_products<Scalar, Source>(size, random);
    check_rows_products<Scalar, Source>(size, simd::Store::set, random);
    check_rows_products<Scalar, Source>(size, simd::Store::add, random);
    check_equal_rows<Scalar, Source>(size, random);
  });
}

}  // namespace

TEST_CASE(
    "products with rows as they lie are those of plain loops, and those of equal rows are equal") {
  SECTION("float") { check_all<float, float>(); }
  SECTION("double") { check_all<double, double>(); }
  SECTION("long double") { check_all<long double, long double>(); }
  SECTION("bfloat16") { check_all<float, Eigen::bfloat16>(); }
  SECTION("half") { check_all<float, Eigen::half>(); }
}

// A Surface gives what project and attention give for the keys that it holds, wherever they lie in memory; forks do not
// disturb each other; what has its memory takes no more.

// clang-format off: this comes before Eigen
#include "support/no_allocation.hpp"
// clang-format on

#include <Eigen/Core>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/surface_cache.hpp>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/same_bits.hpp"

namespace surfattn::test {
namespace {

/// Where the keys of a cache lie.
enum class Place { one_piece, ring_come_round, after_a_drop, behind_a_past };
constexpr Place all_places[] = {Place::one_piece, Place::ring_come_round, Place::after_a_drop,
                                Place::behind_a_past};

/// A cache, made by `make(capacity, window)`, to which `append(cache, first, count)` gives rows of n
/// keys, holding them at that place in memory. Keys that are dropped again are the first ones.
template <class Make, class Append>
auto placed(Place place, Index n, const Make& make, const Append& append) {
  const Index part = n / 3;
  if (place == Place::ring_come_round) {
    auto cache = make(0, n);
    append(cache, 0, part);
    append(cache, 0, n - part);  // to be written over, but for what the next ones leave
    append(cache, 0, part);
    append(cache, part, n - part);
    return cache;
  }
  auto cache = make(n + part, 0);
  if (place == Place::after_a_drop) {
    append(cache, 0, part);
    cache.drop_front(part);
  }
  append(cache, 0, part);
  if (place == Place::behind_a_past) cache = cache.fork();
  append(cache, part, n - part);
  return cache;
}

std::optional<Index> window_of(Index window) {
  return window > 0 ? std::optional<Index>(window) : std::nullopt;
}

template <class Scalar>
Surface<Scalar> standard_cache(Place place, const Problem<Scalar>& p, const Options& options) {
  return placed(
      place, p.keys.rows(),
      [&](Index capacity, Index window) {
        return Surface<Scalar>(p.keys.cols(), p.values.cols(),
                               {.scale = options.scale,
                                .heads = options.heads,
                                .capacity = capacity,
                                .window = window_of(window)});
      },
      [&](auto& cache, Index first, Index count) {
        cache.append(p.keys.middleRows(first, count), p.values.middleRows(first, count));
      });
}

template <class Scalar>
Surface<Scalar> surface_cache(Place place, const Problem<Scalar>& p,
                              const SurfaceOptions& options) {
  return placed(
      place, p.keys.rows(),
      [&](Index capacity, Index window) {
        return Surface<Scalar>(
            p.keys.cols(), {.scale = options.scale,
                            .heads = options.heads,
                            .bandwidth = options.bandwidth,
                            .prior = options.prior.is_sdpa() ? KeyPrior::sdpa : KeyPrior::uniform,
                            .capacity = capacity,
                            .window = window_of(window)});
      },
      [&](auto& cache, Index first, Index count) {
        const auto keys = p.keys.middleRows(first, count);
        if (options.prior.is_explicit()) {
          cache.append_with_prior(keys, p.log_prior.middleRows(first, count));
        } else {
          cache.append(keys);
        }
      });
}

TEST_CASE("A cache is as accurate as a plain evaluation, wherever its keys lie", "[cache]") {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Sizes& s : odd_sizes(random, 1e6)) {
    if (s.keys == 0 || ++turn % 2 != 0) continue;
    const Problem<float> p(s, random);
    const MaskKind mask = all_masks[turn / 2 % std::size(all_masks)];
    const PriorKind prior = PriorKind(turn / 4 % 3);
    const Place place = all_places[turn / 2 % std::size(all_places)];
    CAPTURE(seed(), s.queries, s.keys, s.head_dim, s.value_dim, s.query_heads, s.key_value_heads,
            int(mask), int(prior), int(place));
    const auto with = [&](const auto& use) { with_terms(mask, s.queries, s.keys, use); };
    const auto dense = dense_mask(mask, s.queries, s.keys);
    check_standard_form<float, double>(
        p, dense, Loss::of_out, with,
        [&](const Options& options, const auto& check, const auto&... terms) {
          check(standard_cache(place, p, options).attend_forward(p.queries, {}, terms...));
        });
    check_surface_form<float, double>(
        p, dense, prior, Loss::of_out, with,
        [&](const SurfaceOptions& options, const auto& check, const auto&... terms) {
          check(surface_cache(place, p, options).attend_forward(p.queries, {}, terms...));
        });
  }
}

TEMPLATE_TEST_CASE("In one piece the bits are those of project and attention", "[cache]", float,
                   double, Eigen::bfloat16) {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {1, 3, 40}) {
    const Problem<float> numbers({queries, 1500, 16, 8, 4, 2}, random);
    const Matrix<TestType> q = numbers.queries.cast<TestType>(), k = numbers.keys.cast<TestType>(),
                           v = numbers.values.cast<TestType>();
    const Causal causal{Align::bottom_right};
    Surface<TestType> cache(k.cols(), v.cols(), {.heads = {4, 2}, .capacity = 1500});
    cache.append(k.topRows(1) * TestType(1), v.topRows(1));  // an expression
    cache.append(k.bottomRows(1499), v.bottomRows(1499));
    Surface<TestType> surface(
        k.cols(), {.heads = {4, 2}, .bandwidth = 1.5, .prior = KeyPrior::sdpa, .capacity = 1500});
    surface.append(k);
    CAPTURE(seed(), queries);
    CHECK(same_bits(cache.attend(q, {}, causal), attention(q, k, v, {.heads = {4, 2}}, causal)));
    const SurfaceOptions options{.heads = {4, 2}, .bandwidth = 1.5, .prior = KeyPrior::sdpa};
    CHECK(same_bits(surface.project(q, {}, causal), project(q, k, options, causal)));
    ThreadPool pool(2);
    CHECK(
        same_bits(surface.project(q, {.executor = &pool}, causal), project(q, k, options, causal)));
  }
}

// ---- Against a list of rows ------------------------------------------------------------------

/// A cache of the surface form under test, and what it should hold.
struct Tracked {
  Surface<double> cache;
  std::vector<double> rows;

  void check() const {
    REQUIRE(cache.size() == Index(rows.size()));
    if (cache.window())
      CHECK(cache.capacity() <= 2 * *cache.window());  // a shared past and its own
    const Matrix<double> held = cache.keys();
    bool same = true;
    for (Index j = 0; j < held.rows(); ++j)
      same = same && held(j, 0) == rows[std::size_t(j)] && held(j, 1) == -rows[std::size_t(j)];
    CHECK(same);
    if (rows.empty()) return;
    const Matrix<double> query = Matrix<double>::Constant(1, 2, 0.3);
    const Matrix<double> expected = project(query, held, {.bandwidth = 0.5});
    CHECK((cache.project(query) - expected).cwiseAbs().maxCoeff() <= 1e-12);
  }
  void append(Index count, std::mt19937_64& random) {
    Matrix<double> keys(count, 2);
    keys.col(0) = random_matrix<double>(count, 1, random);
    keys.col(1) = -keys.col(0);
    cache.append(keys);
    rows.insert(rows.end(), keys.col(0).begin(), keys.col(0).end());
    if (cache.window() && Index(rows.size()) > *cache.window())
      rows.erase(rows.begin(), rows.end() - *cache.window());
  }
  void drop(Index count) {
    cache.drop_front(count);
    rows.erase(rows.begin(), rows.begin() + count);
  }
  void drop_newest(Index count) {
    cache.drop_back(count);
    rows.erase(rows.end() - count, rows.end());
  }
  Tracked fork(Index capacity) const { return {cache.fork(capacity), rows}; }
};

TEST_CASE("Appending, dropping, resetting and forking, in any order", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const auto below = [&](Index n) { return Index(random() % std::uint64_t(n)); };
  for (int round = 0; round < 60; ++round) {
    std::vector<Tracked> caches;
    const auto window = round % 2 == 0 ? std::nullopt : std::optional<Index>(1 + below(12));
    caches.push_back(
        {Surface<double>(2, {.bandwidth = 0.5, .capacity = below(2) * 10, .window = window}), {}});
    for (int step = 0; step < 60; ++step) {
      CAPTURE(seed(), round, step, caches.size());
      const std::size_t at = std::size_t(below(Index(caches.size())));
      Tracked& one = caches[at];
      const Index action = below(11);
      if (action < 5) {
        one.append(below(action == 0 ? 20 : 4), random);
      } else if (action < 7) {
        one.drop(below(one.cache.size() + 1));
      } else if (action == 10) {
        one.drop_newest(below(one.cache.size() + 1));
      } else if (action == 7) {
        one.cache.reset();
        one.rows.clear();
      } else if (action == 8 && caches.size() < 6) {
        Tracked fork = one.fork(below(2) * 5);
        caches.push_back(std::move(fork));
      } else if (caches.size() > 1) {
        caches.erase(caches.begin() + std::ptrdiff_t(at));
      }
      for (const Tracked& each : caches) each.check();
    }
  }
}

TEST_CASE("A cache is moved or forked, never copied by accident", "[cache]") {
  static_assert(!std::is_copy_constructible_v<Surface<float>>);
  static_assert(!std::is_copy_assignable_v<Surface<float>>);
  static_assert(std::is_nothrow_move_constructible_v<Surface<float>>);
  CHECK(Surface<float>(16, {}).values_are_keys());
  Surface<float> from(2), empty = std::move(from);
  from = Surface<float>(2, {.capacity = 3});
  from.append(Matrix<float>::Random(2, 2));
  const Surface<float> to = std::move(from);
  CHECK(to.size() == 2);
  CHECK(from.is_empty());  // NOLINT: what was moved from is empty
  CHECK(from.capacity() == 0);
  CHECK(from.keys().rows() == 0);
  CHECK(from.appended() == 0);
  CHECK(to.appended() == 2);
  from.append(Matrix<float>::Random(1, 2));
  CHECK(from.size() == 1);
  CHECK(from.appended() == 1);
  empty.append(Matrix<float>::Random(1, 2));
  from = std::move(empty);
  CHECK(from.appended() == 1);
  CHECK(empty.appended() == 0);  // NOLINT
}

TEST_CASE("Kernels of the distance act on a surface whose prior is uniform", "[cache]") {
  const Matrix<double> keys = Matrix<double>::Random(30, 3), query = Matrix<double>::Random(2, 3);
  Surface<double> surface(3, {.bandwidth = 0.5});
  surface.append(keys);
  const Matrix<double> expected = project(query, keys, {.bandwidth = 0.5}, StudentT{2}),
                       difference = surface.project(query, {}, StudentT{2}) - expected;
  CHECK(difference.cwiseAbs().maxCoeff() <= 1e-13);
  surface.append_with_prior(keys, RowVector<double>::Zero(30).transpose());
  CHECK_THROWS_AS(surface.project(query, {}, StudentT{2}), std::invalid_argument);
}

/// In the workspace of 3, 4, 17 and 40 queries as many and fewer give what they give without.
template <class Scalar>
void check_workspaces(const Surface<Scalar>& surface) {
  for (const Index most : {3, 4, 17, 40}) {
    const Workspace workspace(surface.workspace_size(most));
    for (const Index queries : {1, 2, 3, 4, 16, 17, 40}) {
      if (queries > most) break;
      CAPTURE(queries, most);
      const Matrix<Scalar> rows = Matrix<Scalar>::Random(queries, surface.key_width());
      Matrix<Scalar> out(queries, surface.value_width());
      surface.attend_into(rows, out, workspace);
      CHECK(same_bits(out, surface.attend(rows)));
      if (!surface.values_are_keys()) continue;
      surface.project_into(rows, out, workspace);
      CHECK(same_bits(out, surface.project(rows)));
    }
  }
}

TEST_CASE("What an empty cache holds has its widths, with memory and without", "[cache]") {
  for (const Index capacity : {0, 4}) {
    const Surface<double> surface(8, {.capacity = capacity}), pairs(8, 6, {.capacity = capacity});
    CHECK((surface.keys().rows() == 0 && surface.keys().cols() == 8));
    CHECK((surface.values().rows() == 0 && surface.values().cols() == 8));
    CHECK((pairs.keys().cols() == 8 && pairs.values().cols() == 6));
    const Matrix<double> query = Matrix<double>::Ones(1, 8);
    CHECK(project(query, surface.keys()) == Matrix<double>::Zero(1, 8));
  }
}

TEST_CASE("A workspace serves every number of queries up to its own, at any size", "[cache]") {
  Surface<float> surface(64, {.heads = {8}});
  surface.append(Matrix<float>::Random(20000, 64));
  check_workspaces(surface);
  Surface<float> wide(8, 512);
  wide.append(Matrix<float>::Random(5000, 8), Matrix<float>::Random(5000, 512));
  check_workspaces(wide);
  Surface<double> several(128, 128, {.heads = {8}});
  several.append(Matrix<double>::Random(5000, 128), Matrix<double>::Random(5000, 128));
  check_workspaces(several);
}

TEST_CASE("A fork shares what it was forked from", "[cache]") {
  Surface<float> prompt(64, {.capacity = 4096});
  prompt.append(Matrix<float>::Random(4000, 64));
  std::size_t allocated = 0;
  {
    // as many bytes as one key has would not hold the prompt
    const NoAllocation watch;
    const Surface<float> beam = prompt.fork();
    allocated = watch.count();
    CHECK(beam.size() == 4000);
    CHECK(beam.capacity() == 4000);
  }
  CHECK(allocated <= 2);
}

// ---- Memory, threads, streams ----------------------------------------------------------------

TEST_CASE("Within its capacity, and as a ring for ever, a cache allocates nothing", "[cache]") {
  const Matrix<float> samples = Matrix<float>::Random(1000, 8);
  Surface<float> ring(8, {.bandwidth = 1, .window = 64}), list(8, {.capacity = 1000}),
      pairs(8, 8, {.capacity = 1000});
  Matrix<float> out(1, 8), projection(1, 8), log_sum_exp(1, 1);
  const Workspace workspace(std::max(ring.workspace_size(1), ring.local_linear_workspace_size(1)));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    for (Index t = 0; t < samples.rows(); ++t) {
      const auto sample = samples.row(t);
      ring.append(sample);
      ring.project_into(sample, out, workspace);
      ring.local_linear_into(sample, 0.1, out, projection, log_sum_exp, workspace);
      list.append(sample);
      list.project_into(sample, out, workspace);
      pairs.append(sample, sample);
      pairs.attend_into(sample, out, workspace);
    }
    count = watch.count();
  }
  CHECK(count == 0);
  CHECK(ring.capacity() == 64);
  CHECK(list.capacity() == 1000);
}

/// A stream through a ring: each sample is appended and projected, without a call of the heap; every
/// `stride`-th projection is compared with one of double precision.
void check_stream(Index length, Index window, Index width, Index stride) {
  std::mt19937_64 random = seeded_random();
  const Matrix<float> samples = random_matrix<float>(length, width, random);
  const double bandwidth = 0.35 * std::sqrt(double(width));
  Surface<float> ring(width, {.bandwidth = bandwidth, .window = window});
  const Workspace workspace(ring.workspace_size(1));
  Matrix<float> out(1, width);
  double early = 0, late = 0;
  std::size_t allocated = 0;
  for (Index t = 0; t < length; ++t) {
    {
      const NoAllocation watch;
      ring.append(samples.row(t));
      ring.project_into(samples.row(t), out, workspace);
      allocated += watch.count();
    }
    if (t + 1 < window || t % stride != 0) continue;
    const auto held = samples.middleRows(t + 1 - window, window).cast<double>();
    const auto exact = project(samples.row(t).cast<double>(), held, {.bandwidth = bandwidth});
    const double error = (out.cast<double>() - exact).cwiseAbs().maxCoeff();
    double& worst = t < length / 2 ? early : late;
    if (!(error <= worst)) worst = error;
  }
  CAPTURE(seed(), early, late);
  CHECK(allocated == 0);
  CHECK(early <= 1e-5);
  CHECK(late <= 2 * early);
}

TEST_CASE("Along a stream the error does not grow", "[cache]") { check_stream(20000, 50, 4, 7); }

TEST_CASE("Along a million samples the error does not grow", "[.long]") {
  check_stream(1000000, 4096, 32, 997);
}

TEST_CASE("Many threads may read one cache, and forks of it, at once", "[cache]") {
  const Matrix<float> keys = Matrix<float>::Random(3000, 16),
                      queries = Matrix<float>::Random(2, 16);
  Surface<float> surface(16);
  surface.append(keys);
  const Matrix<float> expected = surface.project(queries);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t n = 0; n < wrong.size(); ++n) {
    threads.emplace_back([&, n] {
      for (int round = 0; round < 30; ++round) {
        wrong[n] += !same_bits(surface.project(queries), expected);
        Surface<float> fork = surface.fork();
        fork.append(keys.topRows(5));
        wrong[n] += fork.size() != 3005 || fork.project(queries).hasNaN();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("attend takes a readout, and local_linear is that of the keys", "[cache]") {
  const Matrix<double> keys = Matrix<double>::Random(40, 6),
                       queries = Matrix<double>::Random(5, 12),
                       readout = Matrix<double>::Random(12, 7);
  const Problem<double> p = [&] {
    std::mt19937_64 random = seeded_random();
    Problem<double> made({5, 40, 3, 3, 4, 2}, random);
    made.keys = keys;
    made.queries = queries;
    return made;
  }();
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 0.8};
  for (const Place place : all_places) {
    const auto surface = surface_cache(place, p, options);
    const auto close = [](const Matrix<double>& a, const Matrix<double>& b) {
      return (a - b).cwiseAbs().maxCoeff() <= 1e-12;
    };
    CHECK(close(surface.attend(queries, readout), project(queries, keys, options) * readout));
    CHECK(close(surface.local_linear(queries, 0.05), local_linear(queries, keys, 0.05, options)));
  }
}

// ---- Save and restore ------------------------------------------------------------------------

std::string saved(const Surface<float>& surface) {
  std::ostringstream stream;
  surface.save(stream);
  return stream.str();
}

Surface<float> restored(const std::string& bytes, Index capacity = 0) {
  std::istringstream stream(bytes);
  return Surface<float>::restore(stream, capacity);
}

TEST_CASE("A saved cache comes back, bit for bit", "[cache]") {
  std::mt19937_64 random = seeded_random();
  const Problem<float> p({3, 30, 4, 2, 4, 2}, random);
  for (const Place place : all_places) {
    const auto cache = standard_cache(place, p, {.scale = 0.3, .heads = p.heads});
    auto back = restored(saved(cache), 40);
    CHECK(same_bits(back.keys(), cache.keys()));
    CHECK(same_bits(back.values(), cache.values()));
    CHECK(back.window() == cache.window());
    CHECK(back.appended() == cache.appended());
    CHECK((back.attend(p.queries) - cache.attend(p.queries)).cwiseAbs().maxCoeff() <= 1e-6f);
    back.append(p.keys.topRows(10), p.values.topRows(10));
    const auto surface =
        surface_cache(place, p, {.heads = p.heads, .bandwidth = 2, .prior = p.log_prior});
    const auto surface_back = restored(saved(surface));
    CHECK((surface_back.project(p.queries) - surface.project(p.queries)).cwiseAbs().maxCoeff() <=
          1e-6f);
  }
}

TEST_CASE("What is no saved cache is refused", "[cache]") {
  Surface<float> surface(3, {.bandwidth = 2, .window = 5});
  surface.append(Matrix<float>::Random(9, 3));
  const std::string good = saved(surface);
  for (std::size_t length = 0; length < good.size(); ++length)
    CHECK_THROWS_AS(restored(good.substr(0, length)), std::invalid_argument);
  for (std::size_t place = 0; place < good.size(); ++place) {
    std::string bad = good;
    bad[place] = static_cast<char>(bad[place] ^ 4);
    CHECK_THROWS_AS(restored(bad), std::invalid_argument);
  }
  std::istringstream stream(good);
  CHECK_THROWS_WITH(
      Surface<double>::restore(stream),
      "surfattn::Surface::restore: the stream is not a saved cache of this scalar type");
  // checksums that are right do not make sizes that contradict each other a cache
  const auto forged = [&](std::size_t field, std::int64_t value) {
    std::string bytes = good.substr(0, 16 + 10 * 8 + sizeof(float));
    std::memcpy(bytes.data() + 16 + field * 8, &value, sizeof value);
    detail::Checksum sum;
    sum.add(bytes.data(), bytes.size());
    const std::uint64_t checksum = sum.value();
    bytes.append(reinterpret_cast<const char*>(&checksum), sizeof checksum);
    return bytes + good.substr(bytes.size());
  };
  CHECK_NOTHROW(restored(forged(7, 5)));  // its size
  for (const auto& [field, value] : std::vector<std::pair<std::size_t, std::int64_t>>{
           {0, 0}, {1, -1}, {2, -3}, {3, 4}, {5, 0}, {6, 4}, {6, -1}, {7, 6}, {7, -1}, {8, 4}}) {
    CAPTURE(field, value);
    CHECK_THROWS_AS(restored(forged(field, value)), std::invalid_argument);
  }
  std::ostringstream full;
  full.setstate(std::ios::badbit);
  CHECK_THROWS_AS(surface.save(full), std::invalid_argument);
}

// ---- Mistakes --------------------------------------------------------------------------------

TEST_CASE("Mistakes are named, and change nothing", "[cache]") {
  using M = Matrix<float>;
  Surface<float> surface(4, {.heads = {2}, .bandwidth = 1}), cache(4, 6, {.heads = {2}}),
      sdpa(4, {.prior = KeyPrior::sdpa}), ring(4, {.window = 3});
  const auto says = [](const auto& call, const std::string& sentence) {
    CHECK_THROWS_WITH(call(), "surfattn::Surface" + sentence);
  };
  says([] { Surface<float>(4, {.window = 0}); }, ": window must be at least 1, but is 0");
  says([] { Surface<float>(4, {.window = Index(1) << 60}); },
       ": window must be between 0 and 2⁴⁰, but is 1152921504606846976");
  says([] { Surface<float>(4, {.capacity = -1}); },
       ": capacity must be between 0 and 2⁴⁰, but is -1");
  says([] { Surface<float>(4, {.bandwidth = -0.5}); },
       ": bandwidth must be positive and finite, but is -0.5");
  says([] { Surface<float>(4, {.scale = 1, .bandwidth = 1}); },
       ": give scale or bandwidth, not both: scale = 1/bandwidth²");
  says([] { Surface<float>(4, 4, {.bandwidth = 1}); },
       ": a cache of keys and values has a scale, and neither bandwidth nor prior");
  CHECK_THROWS_AS(Surface<float>(5, {.heads = {2}}), std::invalid_argument);
  CHECK_THROWS_AS(Surface<float>(4, {.heads = {0}}), std::invalid_argument);
  says([] { Surface<float>(-4); },
       ": key_width must not be negative and divide into 1 key/value heads, but is -4");
  says([] { Surface<float>(4, 5, {.heads = {2}}); },
       ": value_width must not be negative and divide into 2 key/value heads, but is 5");
  says([] { Surface<float>(4).reserve(-3); }, "::reserve: keys must not be negative, but is -3");

  says([&] { surface.project(M(1, 4)); }, "::project: the cache is empty: append keys first");
  says([&] { surface.append(M(2, 5)); },
       "::append: keys is 2×5 but must be 2×4 (the width that the cache was made for)");
  says([&] { surface.append(M(2, 4), M(2, 4)); },
       "::append: in this cache the keys are the values");
  says([&] { cache.append(M(2, 4)); }, "::append: this cache holds keys and values, for attend");
  says([&] { cache.append(M(2, 4), M(3, 6)); },
       "::append: values is 3×6 but must be 2×6 (one row for each key, of the width that the cache "
       "was made for)");
  says([&] { sdpa.append_with_prior(M(2, 4), M(2, 1)); },
       "::append_with_prior: the prior of this cache is sdpa");
  says([&] { surface.append_with_prior(M(3, 4), M(2, 1)); },
       "::append_with_prior: log_prior is 2×1 but must be 3×1 (one row for each key)");
  says([&] { surface.append_with_prior(M(3, 4), M(3, 3)); },
       "::append_with_prior: log_prior is 3×3 but must be 3×2 (keys × key/value heads)");
  CHECK(surface.is_empty());
  CHECK(cache.is_empty());

  cache.append(M::Random(2, 4), M::Random(2, 6));
  surface.append(M::Random(2, 4));
  says([&] { cache.project(M(1, 4)); }, "::project: this cache holds keys and values, for attend");
  says([&] { surface.attend(M(1, 4), M(3, 3)); },
       "::attend: readout is 3×3 but must be 4×3 (one row for each column of the output)");
  says([&] { surface.drop_front(3); }, "::drop_front: count is 3 but the cache holds 2 keys");
  says([&] { surface.fork(-1); }, "::fork: capacity must be between 0 and 2⁴⁰, but is -1");
  says([&] { surface.drop_back(3); }, "::drop_back: count is 3 but the cache holds 2 keys");
  says([&] { surface.workspace_size(-1); },
       "::workspace_size: queries must not be negative, but is -1");
  says([&] { ring.reserve(5); },
       "::reserve: this cache is a ring buffer: its memory is its window");
  CHECK_THROWS_AS(surface.project(M(1, 6)), std::invalid_argument);
  CHECK_THROWS_AS(surface.local_linear(M(1, 4), -1), std::invalid_argument);
  M out = M::Constant(1, 4, 7);
  CHECK_THROWS_AS(surface.project_into(M(1, 4), out, Workspace(8)), std::invalid_argument);
  CHECK((out.array() == 7).all());
  CHECK(surface.size() == 2);
}

}  // namespace
}  // namespace surfattn::test

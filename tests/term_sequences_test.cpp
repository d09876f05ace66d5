// Terms in batches of sequences: each sequence as if it were alone, and gradients of parameters summed over them.
#include <surfattn/executors/thread_pool.hpp>

#include "support/same_bits.hpp"
#include "support/terms.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

using Rows = Matrix<double>;

struct Results {
  Rows out, queries, keys, values, of_term;
};

double largest_difference(const Rows& a, const Rows& b) {
  return a.size() == 0 ? 0 : (a - b).cwiseAbs().maxCoeff();
}

/// Three sequences of one length in one call, and in three.
void check_kind(TermKind kind, const Sizes& one, std::mt19937_64& random) {
  constexpr Index count = 3;
  INFO(name_of(kind) << ", " << one.queries << " queries, " << one.keys << " keys");
  TermCase<double> term(kind, one, random);
  Sizes all = one;
  all.queries *= count, all.keys *= count;
  const Problem<double> p(all, random);
  const auto directed = term.term().gradient_into(term.gradient);
  ThreadPool pool(3);
  const Options serial{.heads = p.heads, .sequences = Sequences::equal(count)};
  const Options threaded{.heads = p.heads, .executor = &pool, .sequences = Sequences::equal(count)};
  const auto together = [&](const Options& options) {
    const auto f = attention_forward(p.queries, p.keys, p.values, options, directed);
    const auto g =
        attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options, directed);
    return Results{f.out, g.queries, g.keys, g.values, term.gradient};
  };
  const Results batch = together(serial), on_threads = together(threaded);
  CHECK(same_bits(batch.out, on_threads.out));
  CHECK(same_bits(batch.queries, on_threads.queries));
  CHECK(same_bits(batch.keys, on_threads.keys));
  CHECK(same_bits(batch.of_term, on_threads.of_term));

  Rows sum = Rows::Zero(term.parameters.rows(), term.parameters.cols());
  for (Index s = 0; s < count; ++s) {
    const Rows q = p.queries.middleRows(s * one.queries, one.queries),
               k = p.keys.middleRows(s * one.keys, one.keys),
               v = p.values.middleRows(s * one.keys, one.keys),
               grad_out = p.grad_out.middleRows(s * one.queries, one.queries);
    const Options options{.heads = p.heads};
    AnyTerm<double> own = directed;
    if (kind == TermKind::dropout) std::get<Dropout>(own.term).first_sequence = s;
    const auto f = attention_forward(q, k, v, options, own);
    const auto g = attention_backward(q, k, v, f, grad_out, options, own);
    CHECK(same_bits(f.out, batch.out.middleRows(s * one.queries, one.queries)));
    CHECK(same_bits(g.queries, batch.queries.middleRows(s * one.queries, one.queries)));
    CHECK(same_bits(g.keys, batch.keys.middleRows(s * one.keys, one.keys)));
    CHECK(same_bits(g.values, batch.values.middleRows(s * one.keys, one.keys)));
    sum += term.gradient;
  }
  if (!term.is_trainable()) return;
  const double size = sum.cwiseAbs().maxCoeff();
  CHECK(largest_difference(sum, batch.of_term) <= 1e-13 * (1 + size));
  CHECK(size > 0);
}

}  // namespace

TEST_CASE(
    "every term gives each sequence of a batch what it gives it alone, and sums its gradient") {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed());
  for (int kind = 0; kind < term_kinds; ++kind) {
    for (const Sizes& sizes :
         {Sizes{3, 20, 4, 3, 2, 1}, Sizes{40, 70, 4, 3, 4, 2}, Sizes{130, 600, 2, 2, 2, 2}})
      check_kind(TermKind(kind), sizes, random);
  }
}

TEST_CASE("biases, gates and times of a batch may lie packed as its tokens do") {
  std::mt19937_64 random = seeded_random();
  const Index offsets[] = {0, 5, 5, 40, 53}, total = 53;
  const Sizes sizes{total, total, 4, 3, 2, 1};
  const Problem<double> p(sizes, random);
  const Rows gates = random_matrix<double>(total, 2, random),
             times = random_matrix<double>(total, 1, random),
             rates = random_matrix<double>(1, 2, random);
  Rows grad_gates = Rows::Constant(total, 2, 1e300), grad_rates = Rows::Constant(1, 2, 1e300);
  const Options options{.heads = p.heads, .sequences = offsets};
  const auto f = attention_forward(p.queries, p.keys, p.values, options, ForgetGate{gates},
                                   TimeDecay{rates, times, times});
  attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options,
                     ForgetGate{gates}.gradient_into(grad_gates),
                     TimeDecay{rates, times, times}.gradient_into(grad_rates));
  Rows sum_rates = Rows::Zero(1, 2);
  for (int s = 0; s < 4; ++s) {
    const Index first = offsets[s], count = offsets[s + 1] - first;
    const Rows q = p.queries.middleRows(first, count), k = p.keys.middleRows(first, count),
               v = p.values.middleRows(first, count),
               grad_out = p.grad_out.middleRows(first, count),
               own_gates = gates.middleRows(first, count),
               own_times = times.middleRows(first, count);
    const Options one{.heads = p.heads};
    const ForgetGate gate{own_gates};
    const TimeDecay decay{rates, own_times, own_times};
    const auto alone = attention_forward(q, k, v, one, gate, decay);
    const auto g = attention_backward(q, k, v, alone, grad_out, one, gate, decay);
    CHECK(same_bits(alone.out, f.out.middleRows(first, count)));
    CHECK(same_bits(std::get<0>(g.terms), grad_gates.middleRows(first, count)));
    sum_rates += std::get<1>(g.terms);
  }
  CHECK(largest_difference(sum_rates, grad_rates) < 1e-12);

  // a bias with a row for each query of the batch
  const Problem<double> equal({12, 15, 4, 3, 2, 1}, random);
  const Rows bias = random_matrix<double>(12, 5, random);
  const Options three{.heads = equal.heads, .sequences = Sequences::equal(3)};
  const auto g =
      attention_forward(equal.queries, equal.keys, equal.values, three, AdditiveBias{bias});
  const auto grad = attention_backward(equal.queries, equal.keys, equal.values, g, equal.grad_out,
                                       three, AdditiveBias{bias});
  for (Index s = 0; s < 3; ++s) {
    const Rows own = bias.middleRows(4 * s, 4);
    const Rows q = equal.queries.middleRows(4 * s, 4), k = equal.keys.middleRows(5 * s, 5),
               v = equal.values.middleRows(5 * s, 5),
               grad_out = equal.grad_out.middleRows(4 * s, 4);
    const auto alone = attention_forward(q, k, v, {.heads = equal.heads}, AdditiveBias{own});
    CHECK(same_bits(alone.out, g.out.middleRows(4 * s, 4)));
    const auto of_alone =
        attention_backward(q, k, v, alone, grad_out, {.heads = equal.heads}, AdditiveBias{own});
    CHECK(same_bits(std::get<0>(of_alone.terms), std::get<0>(grad.terms).middleRows(4 * s, 4)));
  }
}

TEST_CASE("a bias for each query of the batch, where all of them are of one sequence") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({5, 14, 4, 3}, random);
  for (const Index queries : {5, 1}) {
    const Index offsets_of_queries[] = {0, 0, queries}, offsets_of_keys[] = {0, 7, 14};
    const Options options{.sequences = Sequences(offsets_of_queries, offsets_of_keys)};
    const Rows q = p.queries.topRows(queries), grad_out = p.grad_out.topRows(queries),
               k = p.keys.bottomRows(7), v = p.values.bottomRows(7),
               bias = random_matrix<double>(queries, 7, random);
    const auto f = attention_forward(q, p.keys, p.values, options, AdditiveBias{bias});
    const auto g =
        attention_backward(q, p.keys, p.values, f, grad_out, options, AdditiveBias{bias});
    const auto alone = attention_forward(q, k, v, {}, AdditiveBias{bias});
    const auto g_alone = attention_backward(q, k, v, alone, grad_out, {}, AdditiveBias{bias});
    CHECK(same_bits(f.out, alone.out));
    CHECK(same_bits(g.queries, g_alone.queries));
    CHECK(same_bits(std::get<0>(g.terms), std::get<0>(g_alone.terms)));
    CHECK(same_bits(Rows(g.keys.bottomRows(7)), g_alone.keys));
    CHECK(g.keys.topRows(7).isZero(0));
  }
}

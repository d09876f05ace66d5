// Translating with the model of examples/translation: with caches as without, greedily and by beams.

#include "../examples/translation/cached_decoder.hpp"
#include "support/catch.hpp"

namespace {

using namespace translation;
using Standard = StandardWeights<double>;
using Surface = SurfaceWeights<double>;

constexpr ModelSize tiny{.width = 8,
                         .heads = 2,
                         .head_width = 4,
                         .feed_forward = 12,
                         .source_vocabulary = 12,
                         .target_vocabulary = 14,
                         .length = 7};

template <class Layer>
Model<Layer> random_model(std::uint64_t seed) {
  Model<Layer> model = draw_model<Layer>(tiny, seed);
  Random random(seed, 100);
  visit_parameters<Layer>([&](Part, auto& parameter) { random.fill(parameter, 0.8); }, model);
  return model;
}

const std::vector<std::vector<Token>> sentences{{4}, {5, 9, 4}, {11, 10, 6, 6, 7, 8, unknown}};

/// Says what a table says, whatever the source: rows are the tokens so far, columns the next one.
struct TableDecoder {
  using State = Token;
  Matrix<double> table;
  static constexpr Index longest = 6;

  State begin() const { return 0; }
  State fork(State state) const { return state; }
  Index length() const { return longest; }
  RowVector<double> next(State&, Token token) const { return table.row(token); }
};

/// The best sum of any sentence that stops, with the mean as in the search: by trying all.
double best_mean(const TableDecoder& decoder, Token token, double so_far, Index length) {
  double best = -1e300;
  if (length == TableDecoder::longest) return so_far / static_cast<double>(length);
  for (Token next = 0; next < decoder.table.cols(); ++next) {
    const double sum = so_far + decoder.table(token, next);
    best = std::max(best, next == stop ? sum / static_cast<double>(length + 1)
                                       : best_mean(decoder, next, sum, length + 1));
  }
  return best;
}

}  // namespace

TEMPLATE_TEST_CASE("decoding with caches says what computing anew says", "[translation]", Standard,
                   Surface) {
  const auto model = random_model<TestType>(1);
  for (const auto& source : sentences) {
    const RecomputingDecoder<TestType> anew(model, source);
    const CachedDecoder<TestType> cached(model, source);
    auto state_anew = anew.begin();
    auto state_cached = cached.begin();
    for (const Token token : {start, 5, 12, 5, unknown, 7, 13}) {
      const RowVector<double> expected = anew.next(state_anew, token);
      const RowVector<double> found = cached.next(state_cached, token);
      const auto words = expected.size() - 4;
      CHECK((found - expected).tail(words).cwiseAbs().maxCoeff() < 1e-12);
      CHECK(found.array().exp().sum() < 1);
      CHECK(found[padding] == expected[padding]);
    }
  }
}

TEMPLATE_TEST_CASE("both decoders translate alike", "[translation]", Standard, Surface) {
  const auto model = random_model<TestType>(2);
  for (const auto& source : sentences) {
    const RecomputingDecoder<TestType> anew(model, source);
    const CachedDecoder<TestType> cached(model, source);
    const auto greedy = translate_greedily(anew);
    CHECK(translate_greedily(cached) == greedy);
    CHECK(translate_by_beam(cached, 1).at(0).tokens == greedy);
    const auto beams = translate_by_beam(anew, 4), cached_beams = translate_by_beam(cached, 4);
    REQUIRE(beams.size() == 4);
    REQUIRE(cached_beams.size() == 4);
    for (std::size_t i = 0; i < beams.size(); ++i) {
      CHECK(cached_beams[i].tokens == beams[i].tokens);
      CHECK(cached_beams[i].score == Approx(beams[i].score).epsilon(1e-12));
    }
  }
}

TEST_CASE("merged weights translate as the standard form does", "[translation]") {
  const auto model = random_model<Standard>(3);
  const auto surface = merged(model);
  for (const auto& source : sentences) {
    const auto expected = translate_by_beam(CachedDecoder<Standard>(model, source), 3);
    const auto found = translate_by_beam(CachedDecoder<Surface>(surface, source), 3);
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i].tokens == expected[i].tokens);
  }
}

TEST_CASE("forks of a cache go their own ways", "[translation]") {
  const auto model = random_model<Surface>(4);
  const CachedDecoder<Surface> decoder(model, {4, 5});
  auto one = decoder.begin();
  decoder.next(one, start);
  auto other = decoder.fork(one);
  decoder.next(other, 9);
  const RowVector<double> undisturbed = decoder.next(one, 6);
  auto alone = decoder.begin();
  decoder.next(alone, start);
  CHECK((decoder.next(alone, 6) - undisturbed).tail(9).cwiseAbs().maxCoeff() < 1e-12);
}

TEST_CASE("a beam finds what a greedy search misses", "[translation]") {
  // after the start, 4 is likelier than 5, but whatever follows it is unlikely
  TableDecoder decoder{Matrix<double>::Constant(6, 6, std::log(0.02))};
  decoder.table(start, 4) = std::log(0.5);
  decoder.table(start, 5) = std::log(0.4);
  decoder.table(5, stop) = std::log(0.9);
  decoder.table(4, stop) = std::log(0.2);
  CHECK(translate_greedily(decoder) == std::vector<Token>{4});
  const auto beams = translate_by_beam(decoder, 2);
  REQUIRE(beams.size() == 2);
  CHECK(beams[0].tokens == std::vector<Token>{5});
  CHECK(beams[0].score == Approx(std::log(0.4 * 0.9) / 2));
}

TEST_CASE("a beam that holds all sentences finds the best", "[translation]") {
  TableDecoder decoder{Matrix<double>(6, 6)};
  Random random(5, 1);
  random.fill(decoder.table, 2);
  decoder.table.array() -= 2.5;
  const auto beams = translate_by_beam(decoder, 20000);
  CHECK(beams.at(0).score == Approx(best_mean(decoder, start, 0, 0)).epsilon(1e-13));
}

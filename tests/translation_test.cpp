// The model of examples/translation: its gradients, its masks, and that both forms are one function.

#include <surfattn/gradcheck.hpp>

#include "../examples/translation/search.hpp"
#include "../examples/translation/settings.hpp"
#include "support/catch.hpp"

namespace {

using namespace translation;
using Standard = StandardWeights<double>;
using Surface = SurfaceWeights<double>;

constexpr ModelSize tiny{.width = 6,
                         .heads = 2,
                         .head_width = 4,
                         .feed_forward = 7,
                         .source_vocabulary = 9,
                         .target_vocabulary = 8,
                         .length = 5};

/// Random numbers in every parameter, so that none has an effect that a zero would hide.
template <class Layer>
Model<Layer> random_model(std::uint64_t seed) {
  Model<Layer> model = draw_model<Layer>(tiny, seed);
  Random random(seed, 100);
  visit_parameters<Layer>([&](Part, auto& parameter) { random.fill(parameter, 0.9); }, model);
  return model;
}

/// Sentences of several lengths, with tokens that come twice.
std::vector<Example> examples_of_several_lengths() {
  return {{{4, 5, 4}, {start, 5}, {5, stop}},
          {{8}, {start, 4, 6, 7, 6}, {4, 6, 7, 6, stop}},
          {{6, unknown, 7, 5, 4}, {start, 7, 5}, {7, 5, stop}}};
}

Batch batch_of(const std::vector<Example>& examples, Padding kind) {
  std::vector<const Example*> places;
  for (const Example& example : examples) places.push_back(&example);
  return make_batch(places, kind, tiny.length);
}

/// The gradient of a table with all its rows.
Matrix<double> whole(const RowGradients<double>& gradients, const Matrix<double>& table) {
  Matrix<double> all = Matrix<double>::Zero(table.rows(), table.cols());
  for (std::size_t i = 0; i < gradients.rows.size(); ++i)
    all.row(gradients.rows[i]) = gradients.values.row(static_cast<Index>(i));
  return all;
}

template <class Layer>
struct Learnt {
  LossSums sums;
  ModelGradients<Layer> gradients;
};

template <class Layer>
Learnt<Layer> learn(const Model<Layer>& model, const Batch& batch,
                    const Matrix<double>& dropout = {}) {
  Learnt<Layer> learnt{{}, gradients_for(model)};
  OutputScratch<double> scratch;
  learnt.sums = loss_and_gradients(model, batch, dropout, scratch, learnt.gradients);
  return learnt;
}

/// Every gradient of the mean loss by central differences.
template <class Layer>
void check_gradients(const Model<Layer>& at, Padding kind) {
  Model<Layer> model = at;
  const Batch batch = batch_of(examples_of_several_lengths(), kind);
  Random random(7, 101);
  const auto dropout =
      dropout_factors<double>(static_cast<Index>(batch.labels.size()), tiny.width, 0.4, random);
  const Learnt<Layer> learnt = learn(model, batch, dropout);
  const auto check = [&](auto& parameter, const auto& gradient) {
    const auto value = parameter;
    const auto loss = [&](const auto& changed) {
      parameter = changed;
      return learn(model, batch, dropout).sums.mean();
    };
    surfattn::GradientCheckOptions<double> options;
    options.step = 2e-4;   // a rectifier has a kink
    options.floor = 0.05;  // the differences are rounded by about 1e-14/step
    const auto result = surfattn::check_gradient(loss, value, gradient, options);
    parameter = value;
    INFO(result);
    CHECK(result);
  };
  visit_dense<Layer>(
      [&](Part, auto& parameter, const auto& gradient) { check(parameter, gradient); }, model,
      learnt.gradients.dense);
  check(model.source.tokens, whole(learnt.gradients.source_tokens, model.source.tokens));
  check(model.target.tokens, whole(learnt.gradients.target_tokens, model.target.tokens));
}

/// Largest difference between two gradients, as a multiple of the largest number.
template <class Layer>
double difference(const ModelGradients<Layer>& a, const ModelGradients<Layer>& b) {
  double largest = 0;
  const auto compare = [&](const auto& left, const auto& right) {
    if (left.size() == 0) return;
    const double scale = 1e-3 + left.cwiseAbs().maxCoeff();
    const double found = (left - right).cwiseAbs().maxCoeff() / scale;
    largest = found <= largest ? largest : found;
  };
  visit_dense<Layer>([&](Part, const auto& left, const auto& right) { compare(left, right); },
                     a.dense, b.dense);
  compare(a.source_tokens.values, b.source_tokens.values);
  compare(a.target_tokens.values, b.target_tokens.values);
  return largest;
}

}  // namespace

TEST_CASE("the model's gradients are those of its loss", "[translation]") {
  const Padding kind = GENERATE(Padding::dropped, Padding::kept);
  SECTION("standard") { check_gradients(random_model<Standard>(1), kind); }
  SECTION("surface") { check_gradients(random_model<Surface>(2), kind); }
  SECTION("merged") { check_gradients(merged(random_model<Standard>(3)), kind); }
}

TEMPLATE_TEST_CASE("padding changes neither loss nor gradients", "[translation]", Standard,
                   Surface) {
  const auto model = random_model<TestType>(4);
  const auto examples = examples_of_several_lengths();
  const auto without = learn(model, batch_of(examples, Padding::dropped));
  const auto with = learn(model, batch_of(examples, Padding::kept));
  CHECK(with.sums.tokens == 10);
  CHECK(with.sums.loss == Approx(without.sums.loss).epsilon(1e-13));
  // the table has a row for the padding token, whose gradient is 0
  auto gradients = with.gradients;
  const auto drop_padding = [](RowGradients<double>& of_tokens) {
    REQUIRE(of_tokens.rows.front() == padding);
    CHECK(of_tokens.values.row(0).cwiseAbs().maxCoeff() == 0);
    of_tokens.rows.erase(of_tokens.rows.begin());
    of_tokens.values = of_tokens.values.bottomRows(of_tokens.values.rows() - 1).eval();
  };
  drop_padding(gradients.source_tokens);
  drop_padding(gradients.target_tokens);
  CHECK(difference(without.gradients, gradients) < 1e-12);
}

TEMPLATE_TEST_CASE("each sentence of a batch is learnt by itself", "[translation]", Standard,
                   Surface) {
  const auto model = random_model<TestType>(5);
  const auto examples = examples_of_several_lengths();
  double loss = 0;
  for (const Example& example : examples)
    loss += learn(model, batch_of({example}, Padding::dropped)).sums.loss;
  CHECK(learn(model, batch_of(examples, Padding::dropped)).sums.loss ==
        Approx(loss).epsilon(1e-13));
}

TEMPLATE_TEST_CASE("the decoder sees no token that is still to come, and every one before",
                   "[translation]", Standard, Surface) {
  const auto model = random_model<TestType>(6);
  const auto decoded = [&](const Example& example) {
    const Batch batch = batch_of({example}, Padding::dropped);
    ModelPass<TestType> pass;
    encode(model, batch, pass);
    decode(model, batch, pass);
    return pass.decoded();
  };
  Example example{{4, 5}, {start, 4, 5, 6}, {4, 5, 6, stop}};
  const Matrix<double> before = decoded(example);
  example.input[2] = 7;
  const Matrix<double> after = decoded(example);
  CHECK(before.topRows(2) == after.topRows(2));
  for (Index row = 2; row < 4; ++row)
    CHECK((before.row(row) - after.row(row)).cwiseAbs().maxCoeff() > 1e-3);
}

TEST_CASE("merged weights start as the same function", "[translation]") {
  const auto standard = random_model<Standard>(8);
  const Batch batch = batch_of(examples_of_several_lengths(), Padding::kept);
  OutputScratch<double> scratch;
  const double loss = loss_of(standard, batch, scratch).loss;
  CHECK(loss_of(merged(standard), batch, scratch).loss == Approx(loss).epsilon(1e-12));
  CHECK(loss_of(random_model<Surface>(8), batch, scratch).loss != Approx(loss).epsilon(1e-2));
}

TEST_CASE("merged weights stay the same function while attention is frozen", "[translation]") {
  const Method method = GENERATE(Method::rmsprop, Method::adam);
  const OptimizerOptions options{
      .method = method, .learning_rate = 4e-3, .clip_norm = 1, .frozen_attention = true};
  auto standard = random_model<Standard>(9);
  auto surface = merged(standard);
  const auto first = standard;
  const auto metric = surface.cross_attention.layer.metric;
  Optimizer<Standard> of_standard(standard, options);
  Optimizer<Surface> of_surface(surface, options);
  const Batch batch = batch_of(examples_of_several_lengths(), Padding::dropped);
  const double before = learn(standard, batch).sums.mean();
  for (int step = 0; step < 100; ++step) {
    of_standard.step(standard, learn(standard, batch).gradients);
    of_surface.step(surface, learn(surface, batch).gradients);
  }
  const double after = learn(standard, batch).sums.mean();
  CHECK(after < before / 2);
  CHECK(learn(surface, batch).sums.mean() == Approx(after).epsilon(1e-8));
  CHECK(surface.cross_attention.layer.metric == metric);
  CHECK(standard.cross_attention.layer.value == first.cross_attention.layer.value);
}

TEST_CASE("what is no attention layer starts alike in both forms", "[translation]") {
  const auto standard = draw_model<Standard>(tiny, 3);
  const auto surface = draw_model<Surface>(tiny, 3);
  CHECK(standard.source.tokens == surface.source.tokens);
  CHECK(standard.output.weight == surface.output.weight);
  CHECK(standard.encoder_feed_forward.inner == surface.encoder_feed_forward.inner);
  CHECK(standard.output.weight != draw_model<Standard>(tiny, 4).output.weight);
}

namespace {

/// A model with one parameter that counts, and a gradient of that one.
struct OneParameter {
  Model<Standard> model = draw_model<Standard>(tiny, 1);
  ModelGradients<Standard> gradients = gradients_for(model);

  OneParameter() {
    gradients.source_tokens = {{4}, Matrix<double>::Zero(1, tiny.width)};
    gradients.target_tokens = {{5}, Matrix<double>::Zero(1, tiny.width)};
    parameter() = 2;
  }
  double& parameter() { return model.output.bias[0]; }
  void step(Optimizer<Standard>& optimizer, double gradient) {
    gradients.dense.output.bias[0] = gradient;
    optimizer.step(model, gradients);
  }
};

}  // namespace

TEST_CASE("optimisers take the steps that their papers say", "[translation]") {
  OneParameter one;
  const double rate = 0.1;
  SECTION("RMSprop") {
    Optimizer<Standard> optimizer(one.model, {Method::rmsprop, rate});
    one.step(optimizer, 3);
    const double first = 2 - rate * 3 / std::sqrt(0.1 * 9);
    CHECK(one.parameter() == Approx(first).epsilon(1e-6));
    one.step(optimizer, -1);
    CHECK(one.parameter() == Approx(first + rate / std::sqrt(0.09 * 9 + 0.1)).epsilon(1e-6));
  }
  SECTION("Adam") {
    Optimizer<Standard> optimizer(one.model, {Method::adam, rate});
    one.step(optimizer, 3);
    CHECK(one.parameter() == Approx(2 - rate).epsilon(1e-6));
    one.step(optimizer, -1);
    const double m = (0.9 * 0.1 * 3 - 0.1) / (1 - 0.81);
    const double s = (0.999 * 0.001 * 9 + 0.001) / (1 - 0.999 * 0.999);
    CHECK(one.parameter() == Approx(2 - rate - rate * m / std::sqrt(s)).epsilon(1e-6));
  }
  SECTION("clipped") {
    Optimizer<Standard> clipped(one.model, {Method::rmsprop, rate, 0.5});
    one.gradients.source_tokens.values(0, 1) = 4;
    one.step(clipped, 3);  // of length 5, so a tenth of it
    const double g = 0.3;
    CHECK(one.parameter() == Approx(2 - rate * g / (std::sqrt(0.1) * g + 1e-7)).epsilon(1e-12));
    CHECK(clipped.second_moments().output.bias[0] == Approx(0.1 * g * g));
    CHECK(clipped.second_moments().source.tokens(4, 1) == Approx(0.1 * 0.16));
  }
}

TEST_CASE("rows that a batch does not read stay as they are", "[translation]") {
  auto model = random_model<Surface>(10);
  const auto before = model;
  Optimizer<Surface> optimizer(model, {Method::adam});
  optimizer.step(
      model, learn(model, batch_of({{{4, 5}, {start, 6}, {6, stop}}}, Padding::dropped)).gradients);
  for (const Token token : {6, 7, 8})
    CHECK(model.source.tokens.row(token) == before.source.tokens.row(token));
  for (const Token token : {4, 5})
    CHECK(model.source.tokens.row(token) != before.source.tokens.row(token));
}

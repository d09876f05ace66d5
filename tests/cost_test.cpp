// The cost model against counts by hand and the laws that it must obey; splitting merged weights.
#include <surfattn/cost.hpp>
#include <surfattn/split_weights.hpp>
#include <surfattn/surfattn.hpp>

#include "support/layer_weights.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

/// D = 10, Dy = 20, Dout = 30; 4 query heads on 2 key heads, d = 5, dv = 3; 7 queries, 11 keys, 2 sequences.
const LayerSize small{10, 20, 30, 5, 3, {4, 2}, 7, 11, 2};

/// The paper's configuration.
const LayerSize paper{256, 256, 256, 256, 256, {8}, 10, 10, 64};

Form prefers(LayerSize size, Use use) { return recommend_form(size, use); }

}  // namespace

TEST_CASE("layer_cost counts what is counted by hand") {
  const Cost standard = layer_cost(Form::standard, small, Use::prompt);
  CHECK(standard.projection_flops ==
        2 * 2 * (7 * 10 * 20 + 11 * 20 * 10 + 11 * 20 * 6 + 7 * 12 * 30));
  CHECK(standard.attention_flops == 2 * 2 * 4 * 7 * 11 * (5 + 3));
  CHECK(standard.weight_bytes == 4 * (10 * 20 + 20 * 10 + 20 * 6 + 12 * 30));
  CHECK(standard.cache_bytes == 4 * 2 * 11 * 2 * (5 + 3));
  CHECK(standard.attention_bytes == 4 * 2 * (7 * 20 + 7 * 12 + 11 * 16));
  const Cost surface = layer_cost(Form::surface, small, Use::prompt);
  CHECK(surface.projection_flops == 2 * 2 * (7 * 10 * 80 + 7 * 80 * 30));
  CHECK(surface.attention_flops == 2 * 2 * 4 * 7 * 11 * 40);
  CHECK(surface.weight_bytes == 4 * (10 * 80 + 80 * 30));
  CHECK(surface.cache_bytes == 4 * 2 * 11 * 20);

  // decoding projects the new tokens alone and attends to all
  LayerSize one = small;
  one.queries = 1;
  const Cost decode = layer_cost(Form::standard, one, Use::decode);
  CHECK(decode.projection_flops == 2 * 2 * (10 * 20 + 20 * 10 + 20 * 6 + 12 * 30));
  CHECK(decode.attention_flops == 2 * 2 * 4 * 11 * (5 + 3));

  const Cost train = layer_cost(Form::standard, small, Use::train);
  CHECK(train.projection_flops == 3 * standard.projection_flops);
  CHECK(train.attention_flops == standard.attention_flops + 2 * 2 * 4 * 7 * 11 * (3 * 5 + 2 * 3));
  CHECK(layer_cost(Form::standard, small, Use::prompt, 8).bytes() == 2 * standard.bytes());
}

TEST_CASE(
    "layer_cost: the paper's configuration projects twice where the standard form projects four "
    "times") {
  for (const Use use : {Use::prompt, Use::train}) {
    const Cost standard = layer_cost(Form::standard, paper, use),
               surface = layer_cost(Form::surface, paper, use);
    CHECK(standard.projection_flops == 2 * surface.projection_flops);
    CHECK(standard.attention_flops == surface.attention_flops);
    CHECK(standard.cache_bytes ==
          16 * surface.cache_bytes);  // keys and values of 8 heads, and one surface
    CHECK(prefers(paper, use) == Form::surface);
  }
}

TEST_CASE("layer_cost grows with every size") {
  for (const Form form : {Form::standard, Form::surface}) {
    for (const Use use : {Use::prompt, Use::decode, Use::train}) {
      const Cost base = layer_cost(form, small, use);
      const auto larger = [&](auto change, bool strictly) {
        LayerSize size = small;
        change(size);
        const Cost cost = layer_cost(form, size, use);
        CHECK(cost.flops() >= base.flops());
        CHECK(cost.bytes() >= base.bytes());
        CHECK(cost.cache_bytes >= base.cache_bytes);
        CHECK(predicted_seconds(cost) >= predicted_seconds(base));
        if (strictly) CHECK(cost.flops() > base.flops());
      };
      const bool standard = form == Form::standard;
      larger([](auto& s) { s.x_width *= 2; }, true);
      larger([](auto& s) { s.y_width *= 2; }, true);
      larger([](auto& s) { s.out_width *= 2; }, true);
      larger([](auto& s) { s.head_dim *= 2; }, standard);
      larger([](auto& s) { s.value_dim *= 2; }, standard);
      larger([](auto& s) { s.heads.query *= 2; }, true);
      larger([](auto& s) { s.queries *= 2; }, true);
      larger([](auto& s) { s.keys *= 2; }, true);
      larger([](auto& s) { s.batch *= 2; }, true);
      LayerSize causal = small;
      causal.visible = 0.5;
      CHECK(layer_cost(form, causal, use).attention_flops == base.attention_flops / 2);
      CHECK(layer_cost(form, causal, use).projection_flops == base.projection_flops);
    }
  }
}

TEST_CASE(
    "recommend_form: narrow heads attend in the standard form, wide ones in the surface form") {
  // the projections break even at d = D/2: 4·D·d against 2·D², and long prompts attend over D in place of d
  LayerSize size{512, 512, 512, 64, 64, {8}, 2048, 2048};
  CHECK(prefers(size, Use::prompt) == Form::standard);
  size.head_dim = size.value_dim = 512;
  CHECK(prefers(size, Use::prompt) == Form::surface);
  LayerSize short_one{512, 512, 512, 240, 240, {8}, 4, 4, 64};
  CHECK(prefers(short_one, Use::prompt) == Form::standard);
  short_one.head_dim = short_one.value_dim = 272;
  CHECK(prefers(short_one, Use::prompt) == Form::surface);
  // decoding over a long cache reads keys and values of every head, or one surface
  LayerSize decode{512, 512, 512, 128, 128, {8}, 1, 16384};
  CHECK(prefers(decode, Use::decode) == Form::surface);
  CHECK(layer_cost(Form::standard, decode, Use::decode).cache_bytes ==
        4 * layer_cost(Form::surface, decode, Use::decode).cache_bytes);
  // half as much in the standard form where its keys are its values, and as much as the surface where that is 4 heads wide
  LayerSize shared = decode;
  shared.k_equals_v = true;
  CHECK(2 * layer_cost(Form::standard, shared, Use::decode).cache_bytes ==
        layer_cost(Form::standard, decode, Use::decode).cache_bytes);
  CHECK(layer_cost(Form::standard, shared, Use::decode).weight_bytes ==
        layer_cost(Form::standard, decode, Use::decode).weight_bytes * 3 / 4);
  CHECK(layer_cost(Form::surface, shared, Use::decode).bytes() ==
        layer_cost(Form::surface, decode, Use::decode).bytes());
  shared.value_dim = 64;
  CHECK_THROWS_WITH(layer_cost(Form::standard, shared, Use::decode),
                    contains_text("with k_equals_v, value_dim must be head_dim, 128, but is 64"));
  // many heads on one surface compute much for what they read: narrow heads over a long cache stay in the standard form
  CHECK(prefers({512, 512, 512, 64, 64, {8}, 1, 16384}, Use::decode) == Form::standard);
  decode.heads = {8, 1};
  decode.head_dim = decode.value_dim = 64;
  CHECK(prefers(decode, Use::decode) == Form::standard);
}

TEST_CASE("layer_cost names what is wrong") {
  LayerSize size = small;
  size.keys = 0;
  CHECK_THROWS_WITH(layer_cost(Form::surface, size, Use::prompt),
                    contains_text("layer_cost: keys must be positive, but is 0"));
  size = small;
  size.visible = 0;
  CHECK_THROWS_WITH(layer_cost(Form::surface, size, Use::prompt), contains_text("visible"));
  size = small;
  size.heads = {4, 3};
  CHECK_THROWS_WITH(layer_cost(Form::surface, size, Use::prompt), contains_text("multiple"));
}

TEST_CASE(
    "split undoes merge exactly where the heads are wide enough, and says its error where not") {
  std::mt19937_64 random = seeded_random();
  const auto w = random_weights<double>(9, 8, 7, {0, 0, 4, 3, 3, 3}, random);
  const auto merged = merge(w);
  const Matrix<double> x = random_matrix<double>(11, 9, random),
                       y = random_matrix<double>(13, 8, random);
  const Matrix<double> exact = layer_forward(x, y, merged).out;
  const auto whole = split(merged, 4, 3);
  CHECK((layer_forward(x, y, whole.weights).out - exact).cwiseAbs().maxCoeff() <= 1e-12);
  CHECK(whole.metric_error.maxCoeff() <= 1e-14);
  CHECK(whole.readout_error.maxCoeff() <= 1e-14);
  // wider heads than needed are padded with zeros
  CHECK((layer_forward(x, y, split(merged, 20, 20).weights).out - exact).cwiseAbs().maxCoeff() <=
        1e-12);

  double before = 0;
  for (const Index rank : {3, 2, 1}) {
    const auto narrow = split(merged, rank, 3);
    const auto back = merge(narrow.weights);
    for (Index h = 0; h < 3; ++h) {
      Matrix<double> a(10, 8), b(10, 8);
      a << merged.metric.middleCols(8 * h, 8), merged.metric_bias.segment(8 * h, 8);
      b << back.metric.middleCols(8 * h, 8), back.metric_bias.segment(8 * h, 8);
      CHECK(narrow.metric_error[h] == Approx((a - b).norm() / a.norm()));
      // Eckart and Young: what is left out are the smallest singular values
      const auto values = Eigen::BDCSVD<Matrix<double>>(a).singularValues().eval();
      CHECK((a - b).norm() == Approx(values.tail(values.size() - rank).norm()));
    }
    CHECK(narrow.metric_error.maxCoeff() > before);
    before = narrow.metric_error.maxCoeff();
    CHECK(narrow.readout_error.maxCoeff() <= 1e-14);
    const double layer_error =
        (layer_forward(x, y, narrow.weights).out - exact).norm() / exact.norm();
    CHECK(layer_error > 1e-4);
    CHECK(layer_error < 2);
  }
  CHECK_THROWS_WITH(split(merged, 0, 3), contains_text("head_dim and value_dim must be positive"));
}

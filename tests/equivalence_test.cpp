// The exact equivalences between the two forms, forward and backward, under the names of the mathematics in the README.
#include "support/accuracy.hpp"
#include "support/layer_weights.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

/// A bound on the difference of two evaluations that both carry rounding errors: n operations deep, of numbers of this size.
template <class Scalar>
double rounding(double depth, double magnitude) {
  return 8 * std::sqrt(depth) * double(std::numeric_limits<Scalar>::epsilon()) * magnitude;
}

template <class Scalar>
void check_close(const std::string& name, const Matrix<Scalar>& a, const Matrix<Scalar>& b,
                 double tolerance) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  const double difference = a.size() ? double((a - b).cwiseAbs().maxCoeff()) : 0;
  INFO(name << ": largest difference " << difference << ", tolerance " << tolerance);
  CHECK(difference <= tolerance);
}

template <class Scalar>
double largest(const Matrix<Scalar>& m) {
  return m.size() ? std::max(1.0, double(m.cwiseAbs().maxCoeff())) : 1.0;
}

/// With 0 in place of −∞.
template <class Scalar>
Matrix<Scalar> finite(const Matrix<Scalar>& m) {
  return m.array().isInf().select(Scalar(0), m);
}

const Sizes equivalence_sizes[] = {{1, 1, 1, 1},
                                   {7, 9, 3, 5},
                                   {33, 65, 17, 8, 4, 2},
                                   {64, 257, 32, 32},
                                   {129, 100, 64, 9, 3, 1},
                                   {17, 31, 1, 2, 2, 2}};

/// Each block of columns of `keys` (one head) times the readout of that head.
template <class Scalar>
Matrix<Scalar> read_out(const Matrix<Scalar>& keys, const Matrix<Scalar>& readout, Index heads) {
  const Index d = keys.cols() / heads;
  Matrix<Scalar> values(keys.rows(), heads * readout.cols());
  for (Index h = 0; h < heads; ++h) {
    values.middleCols(h * readout.cols(), readout.cols()) =
        times<Matrix<Scalar>>(keys.middleCols(h * d, d), readout);
  }
  return values;
}

template <class Scalar>
Matrix<Scalar> read_out_transposed(const Matrix<Scalar>& values, const Matrix<Scalar>& readout,
                                   Index heads) {
  return read_out<Scalar>(values, readout.transpose(), heads);
}

}  // namespace

TEMPLATE_TEST_CASE("equivalence 1: with the sdpa prior P(Q)·M = attention(Q, K, K·M)", "", float,
                   double) {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : equivalence_sizes) {
    for (const MaskKind mask : all_masks) {
      CAPTURE(seed(), s.queries, s.keys, s.head_dim, int(mask));
      const Problem<TestType> p(s, random);
      const auto readout = random_matrix<TestType>(s.head_dim, s.value_dim, random);
      const auto values = read_out(p.keys, readout, s.key_value_heads);
      const double beta = 0.4;
      const Options options{.scale = beta, .heads = p.heads};
      const SurfaceOptions surface{
          .heads = p.heads, .bandwidth = 1 / std::sqrt(beta), .prior = KeyPrior::sdpa};
      with_terms(mask, s.queries, s.keys, [&](const auto&... terms) {
        const auto standard = attention_forward(p.queries, p.keys, values, options, terms...);
        const auto projected = project_forward(p.queries, p.keys, surface, terms...);
        // scores are sums of d products of size up to β|q||k|
        const double scores = beta * double(s.head_dim) * largest(p.queries) * largest(p.keys);
        const double relative = rounding<TestType>(double(s.head_dim + s.keys), 1 + scores);
        check_close("out", standard.out, read_out(projected.out, readout, s.query_heads),
                    relative * largest(values) * double(s.head_dim));
        const bool same_rows_are_empty =
            (standard.log_sum_exp.array().isInf() == projected.log_sum_exp.array().isInf()).all();
        CHECK(same_rows_are_empty);
        check_close("log_sum_exp", finite(standard.log_sum_exp), finite(projected.log_sum_exp),
                    relative);

        // O = P·M: dP = dO·Mᵀ, and V = K·M: dK += dV·Mᵀ
        const auto grad_standard =
            attention_backward(p.queries, p.keys, values, standard, p.grad_out, options, terms...);
        const auto grad_projection = read_out_transposed(p.grad_out, readout, s.query_heads);
        const auto grad_projected =
            project_backward(p.queries, p.keys, projected, grad_projection, surface, terms...);
        const double size = double(s.queries + s.keys) * largest(grad_projection) *
                            largest(p.keys) * largest(p.queries);
        check_close("grad queries", grad_standard.queries, grad_projected.queries, relative * size);
        const Matrix<TestType> grad_keys =
            grad_standard.keys +
            read_out_transposed(grad_standard.values, readout, s.key_value_heads);
        check_close("grad keys", grad_keys, grad_projected.keys, relative * size);
      });
    }
  }
}

TEMPLATE_TEST_CASE("equivalence 2: keys of equal norm need no prior", "", float, double) {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : equivalence_sizes) {
    CAPTURE(seed(), s.queries, s.keys, s.head_dim);
    Problem<TestType> p(s, random);
    for (Index h = 0; h < s.key_value_heads; ++h) {
      p.keys.middleCols(h * s.head_dim, s.head_dim).rowwise().normalize();
    }
    const double beta = 2.5;
    const Options options{.scale = beta, .heads = p.heads};
    const SurfaceOptions surface{.heads = p.heads, .bandwidth = 1 / std::sqrt(beta)};
    const auto standard = attention_forward(p.queries, p.keys, p.keys, options);
    const auto projected = project_forward(p.queries, p.keys, surface);
    const double relative = rounding<TestType>(double(s.head_dim + s.keys),
                                               1 + beta * double(s.head_dim) * largest(p.queries));
    check_close("out", standard.out, projected.out, relative);

    // The weights' gradient reaches the queries alike. To the keys the uniform prior sends −β·c∘k besides, which is orthogonal to the
    // sphere on which the keys stay; along the sphere the gradients agree.
    const auto grad_standard =
        attention_backward(p.queries, p.keys, p.keys, standard, p.grad_projection, options);
    const auto grad_projected =
        project_backward(p.queries, p.keys, projected, p.grad_projection, surface);
    const double size =
        double(s.queries + s.keys) * largest(p.grad_projection) * largest(p.queries);
    check_close("grad queries", grad_standard.queries, grad_projected.queries, relative * size);
    Matrix<TestType> difference = grad_standard.keys + grad_standard.values - grad_projected.keys;
    for (Index h = 0; h < s.key_value_heads; ++h) {
      auto block = difference.middleCols(h * s.head_dim, s.head_dim);
      const auto keys = p.keys.middleCols(h * s.head_dim, s.head_dim);
      const auto radial = block.cwiseProduct(keys).rowwise().sum().eval();
      block -= (keys.array().colwise() * radial.col(0).array()).matrix();
    }
    check_close<TestType>("grad keys along the sphere", difference,
                          Matrix<TestType>::Zero(difference.rows(), difference.cols()),
                          relative * size);
  }
}

namespace {

/// Gradients of the standard weights that follow from those of the merged ones through A_h = Wq_h·Wk_gᵀ, g_h = bq_h·Wk_gᵀ,
/// B_h = Wv_g·Wo_h, r_h = bv_g·Wo_h.
template <class Scalar>
StandardWeights<Scalar> pull_back(const StandardWeights<Scalar>& w, const SurfaceWeights<Scalar>& g,
                                  const Sizes& s) {
  using Dense = Matrix<Scalar>;
  const Index n = w.key.rows(), d = s.head_dim, dv = s.value_dim;
  StandardWeights<Scalar> r;
  r.query = Matrix<Scalar>::Zero(w.query.rows(), w.query.cols());
  r.key = Matrix<Scalar>::Zero(n, w.key.cols());
  r.value = Matrix<Scalar>::Zero(n, w.value.cols());
  r.output = Matrix<Scalar>::Zero(w.output.rows(), w.output.cols());
  r.query_bias = RowVector<Scalar>::Zero(w.query_bias.size());
  r.value_bias = RowVector<Scalar>::Zero(w.value_bias.size());
  r.output_bias = g.output_bias;
  for (Index h = 0; h < s.query_heads; ++h) {
    const Index shared = h / (s.query_heads / s.key_value_heads);
    const Dense grad_a = g.metric.middleCols(h * n, n);
    const Dense grad_b = g.readout.middleRows(h * n, n);
    const Dense wq = w.query.middleCols(h * d, d);
    const Dense wk = w.key.middleCols(shared * d, d);
    const Dense wv = w.value.middleCols(shared * dv, dv);
    const Dense wo = w.output.middleRows(h * dv, dv);
    r.query.middleCols(h * d, d) += times(grad_a, wk);
    r.key.middleCols(shared * d, d) += times<Dense>(grad_a.transpose(), wq);
    r.value.middleCols(shared * dv, dv) += times(grad_b, wo.transpose());
    r.output.middleRows(h * dv, dv) += times<Dense>(wv.transpose(), grad_b);
    if (w.query_bias.size() == 0) continue;
    const Dense grad_g = g.metric_bias.segment(h * n, n);
    r.query_bias.segment(h * d, d) += times(grad_g, wk);
    r.key.middleCols(shared * d, d) +=
        times<Dense>(grad_g.transpose(), w.query_bias.segment(h * d, d));
    const Dense grad_r = g.readout_bias.row(h);
    r.value_bias.segment(shared * dv, dv) += times(grad_r, wo.transpose());
    r.output.middleRows(h * dv, dv) +=
        times<Dense>(w.value_bias.segment(shared * dv, dv).transpose(), grad_r);
  }
  return r;
}

template <class Scalar>
void check_layer(const Sizes& s, bool biases, MaskKind mask, std::mt19937_64& random) {
  const Index x_width = 11, y_width = 13, out_width = 6;
  const auto w = random_weights<Scalar>(x_width, y_width, out_width, s, random, biases);
  const auto merged = merge(w);
  const auto x = random_matrix<Scalar>(s.queries, x_width, random);
  const auto y = random_matrix<Scalar>(s.keys, y_width, random);
  const auto grad_out = random_matrix<Scalar>(s.queries, out_width, random);
  with_terms(mask, s.queries, s.keys, [&](const auto&... terms) {
    const auto standard = layer_forward(x, y, w, {}, terms...);
    const auto surface = layer_forward(x, y, merged, {}, terms...);
    // sums at most (widths · heads + keys) long, of products of numbers of order 1, through scores of order 10
    const double depth = double(x_width + y_width + s.head_dim * s.query_heads + s.keys);
    const double tolerance = rounding<Scalar>(depth, 50 * largest(y));
    check_close("layer", standard.out, surface.out, tolerance);

    const auto a = layer_backward(x, y, w, standard, grad_out, {}, terms...);
    const auto b = layer_backward(x, y, merged, surface, grad_out, {}, terms...);
    const auto pulled = pull_back(w, b.weights, s);
    const double size = tolerance * double(s.queries + s.keys);
    check_close("x", a.x, b.x, size);
    check_close("y", a.y, b.y, size);
    check_close("Wq", a.weights.query, pulled.query, size);
    check_close("Wk", a.weights.key, pulled.key, size);
    check_close("Wv", a.weights.value, pulled.value, size);
    check_close("Wo", a.weights.output, pulled.output, size);
    // one step of gradient descent, by the gradients of either form
    const auto after_step = [&](const StandardWeights<Scalar>& gradient) {
      StandardWeights<Scalar> stepped = w;
      const Scalar rate = Scalar(1e-2);
      stepped.query -= rate * gradient.query;
      stepped.key -= rate * gradient.key;
      stepped.value -= rate * gradient.value;
      stepped.output -= rate * gradient.output;
      if (biases) {
        stepped.query_bias -= rate * gradient.query_bias;
        stepped.value_bias -= rate * gradient.value_bias;
        stepped.output_bias -= rate * gradient.output_bias;
      }
      return stepped;
    };
    check_close("layer after a step", layer_forward(x, y, after_step(a.weights), {}, terms...).out,
                layer_forward(x, y, merge(after_step(pulled)), {}, terms...).out, size);
    if (!biases) return;
    check_close<Scalar>("bq", a.weights.query_bias, pulled.query_bias, size);
    check_close<Scalar>("bk cancels", a.weights.key_bias,
                        Matrix<Scalar>::Zero(1, w.key_bias.size()), size);
    check_close<Scalar>("bv", a.weights.value_bias, pulled.value_bias, size);
    check_close<Scalar>("bo", a.weights.output_bias, pulled.output_bias, size);
  });
}

}  // namespace

TEMPLATE_TEST_CASE("equivalence 3: merged weights are the same layer", "", float, double) {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : {Sizes{5, 7, 3, 4}, Sizes{33, 20, 4, 4, 4, 2}, Sizes{9, 9, 13, 13, 3, 1},
                         Sizes{1, 1, 2, 3, 2, 2}}) {
    for (const bool biases : {false, true}) {
      for (const MaskKind mask : {MaskKind::none, MaskKind::causal_bottom_right, MaskKind::dense}) {
        CAPTURE(seed(), s.queries, s.keys, s.query_heads, biases, int(mask));
        check_layer<TestType>(s, biases, mask, random);
      }
    }
  }
}

TEST_CASE("equivalence 3: a layer equals the reference layer") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{33, 20, 4, 5, 4, 2};
  const auto w = random_weights<double>(11, 13, 6, s, random);
  const auto x = random_matrix<double>(s.queries, 11, random),
             y = random_matrix<double>(s.keys, 13, random);
  const reference::LayerWeights<double> plain{
      w.query, w.key, w.value, w.output, w.query_bias, w.key_bias, w.value_bias, w.output_bias};
  const auto expected =
      reference::layer_forward<double>(x, y, plain, 0.5, {s.query_heads, s.key_value_heads}, {});
  check_close<double>("layer", layer_forward(x, y, w).out, expected, rounding<double>(60, 50));
}

TEMPLATE_TEST_CASE("equivalence 4: a square invertible Wk gives the values from the keys", "",
                   float, double) {
  using Dense = Matrix<TestType>;
  std::mt19937_64 random = seeded_random();
  const Index width = 9;
  for (const Index tokens : {1, 17, 65}) {
    CAPTURE(seed(), tokens);
    const auto y = random_matrix<TestType>(tokens, width, random);
    const auto q = random_matrix<TestType>(12, width, random);
    // a stretch to three times the length along one unit vector, then a reflection along another
    const auto along = [&] {
      const RowVector<TestType> n = random_matrix<TestType>(1, width, random).normalized();
      return times<Dense>(n.transpose(), n);
    };
    const Dense one = Dense::Identity(width, width), stretched = along(),
                reflection = one - 2 * along(), wk = times(reflection, one + 2 * stretched),
                inverse = times<Dense>(one - TestType(2) / 3 * stretched, reflection);
    const auto wv = random_matrix<TestType>(width, 5, random);
    const Dense keys = times(y, wk), values = times(y, wv), readout = times(inverse, wv);
    const double tolerance = rounding<TestType>(double(3 * width + tokens), 40 * largest(values));
    check_close<TestType>("V = K·Wk⁻¹·Wv", attention(q, keys, values),
                          times(project(q, keys, {.prior = KeyPrior::sdpa}), readout), tolerance);

    const auto grad_out = random_matrix<TestType>(12, 5, random);
    const auto f = attention_forward(q, keys, values);
    const auto g = attention_backward(q, keys, values, f, grad_out);
    const auto pf = project_forward(q, keys, {.prior = KeyPrior::sdpa});
    const auto pg = project_backward(q, keys, pf, times(grad_out, readout.transpose()),
                                     {.prior = KeyPrior::sdpa});
    const double size = tolerance * 100;
    check_close<TestType>("grad queries", g.queries, pg.queries, size);
    check_close<TestType>("grad keys", g.keys + times(g.values, readout.transpose()), pg.keys,
                          size);
  }
}

TEST_CASE("equivalence 1 costs no digits where queries are much longer than keys") {
  std::mt19937_64 random = seeded_random();
  const Index tokens = 60, width = 64;
  for (const float stretch : {1.0f, 100.0f, 1000.0f}) {
    CAPTURE(seed(), stretch);
    // the same scores each time
    const Matrix<float> q = stretch * random_matrix<float>(tokens, width, random),
                        k = random_matrix<float>(tokens, width, random) / stretch;
    const auto exact = reference::attention_forward<double>(q.cast<double>(), k.cast<double>(),
                                                            k.cast<double>(), 0.125);
    const auto projected = project(q, k, {.scale = 0.125, .prior = KeyPrior::sdpa});
    const Matrix<double> error = (projected.cast<double>() - exact.out).cwiseAbs();
    CHECK(error.maxCoeff() <=
          rounding<float>(double(width), 4) * double(largest<float>(stretch * k)) / stretch);
  }
}

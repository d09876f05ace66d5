// What every term and every composition of terms must show, in both forms: the reference's results and gradients, central
// differences on the engine's path, the same bits at every thread count.
#pragma once

#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/gradcheck.hpp>

#include "support/accuracy.hpp"
#include "support/terms.hpp"

namespace surfattn::test {

/// Everything that one form gives for one problem.
template <class S>
struct FormResults {
  Matrix<S> out, log_sum_exp, queries, keys, values, bandwidth, log_prior;
  std::vector<Matrix<S>> terms;

  /// Calls use(name, member of each of the results) for all of them.
  template <class Use, class... Results>
  static void for_each(const Use& use, const Results&... results) {
    use("out", results.out...);
    use("log_sum_exp", results.log_sum_exp...);
    use("grad queries", results.queries...);
    use("grad keys", results.keys...);
    use("grad values", results.values...);
    use("grad bandwidth", results.bandwidth...);
    use("grad log prior", results.log_prior...);
    for (std::size_t n = 0; n < std::min({results.terms.size()...}); ++n)
      use(("gradient of term " + std::to_string(n)).c_str(), results.terms[n]...);
  }
};

/// Numbers from which a form is computed.
template <class S>
struct FormInputs {
  Matrix<S> queries, keys, values, grad_out, log_prior;
  Matrix<S> grad_log_sum_exp = {};
  std::vector<Matrix<S>> parameters = {};

  /// The same, each number moved by up to `relative` of itself.
  FormInputs moved(double relative, std::mt19937_64& random) const {
    std::uniform_real_distribution<double> uniform(-relative, relative);
    FormInputs copy = *this;
    const auto move = [&](Matrix<S>& matrix) {
      for (Index n = 0; n < matrix.size(); ++n) matrix.data()[n] *= S(1 + uniform(random));
    };
    move(copy.queries), move(copy.keys), move(copy.values), move(copy.grad_out);
    for (auto& matrix : copy.parameters) move(matrix);
    return copy;
  }
};

/// One problem, one composition of terms, and the two forms.
template <class Scalar, class High>
class TermLaws {
 public:
  TermLaws(const Sizes& sizes, const std::vector<TermKind>& kinds, PriorKind prior,
           std::mt19937_64& random)
      : sizes_(sizes),
        terms_(kinds, sizes, random),
        problem_(sizes, random),
        prior_(prior),
        random_(random),
        scale_(0.625 / std::sqrt(double(std::max<Index>(sizes.head_dim, 1)))),
        bandwidth_(1.25 * std::pow(double(std::max<Index>(sizes.head_dim, 1)), 0.25)) {}

  std::string text() const {
    return std::to_string(sizes_.queries) + " queries, " + std::to_string(sizes_.keys) +
           " keys, widths " + std::to_string(sizes_.head_dim) + " and " +
           std::to_string(sizes_.value_dim) + ", heads " + std::to_string(sizes_.query_heads) +
           " on " + std::to_string(sizes_.key_value_heads) + ", prior " +
           std::to_string(int(prior_)) + ", terms: " + terms_.text();
  }

  /// Both forms against the reference.
  void check_reference() {
    INFO(text());
    for (const bool surface : {false, true}) {
      INFO((surface ? "surface form" : "standard form"));
      const auto fast = engine_results(surface, nullptr);
      const FormInputs<High> inputs = inputs_in<High>(surface);
      const auto exact = reference_results<High>(surface, inputs);
      const auto plain = reference_results<Scalar>(surface, inputs_in<Scalar>(surface));
      // Errors of the scores are as if the inputs had moved by the error of a dot product, and those of D_i = dO_i·O_i as
      // if the log-sum-exp had a gradient of that size.
      const double u = double(std::numeric_limits<Scalar>::epsilon()) / 2;
      const double moves = 4 * std::sqrt(double(sizes_.head_dim + 4)) * u;
      const auto moved = [&] {
        FormInputs<High> other = inputs.moved(moves, random_);
        other.grad_log_sum_exp = delta_errors(surface, other);
        return reference_results<High>(surface, other);
      };
      const double sums = 4 * std::sqrt(double(std::max(sizes_.queries, sizes_.keys) + 4)) * u;
      FormResults<Scalar>::for_each(
          [&](const char* name, const auto& f, const auto& p, const auto& e, const auto&... m) {
            const double floor = 2 * std::max({largest(m - e)...}) + sums * largest(e);
            check_error(name, f, p, e, Doubles::Constant(e.rows(), e.cols(), floor));
          },
          fast, plain, exact, moved(), moved(), moved(), moved());
    }
  }

  /// Both forms have the same bits on three threads and on one.
  void check_threads() {
    INFO(text());
    ThreadPool pool(3);
    for (const bool surface : {false, true}) {
      INFO((surface ? "surface form" : "standard form"));
      FormResults<Scalar>::for_each(
          [&](const char* name, const auto& one, const auto& three) {
            INFO(name);
            CHECK(same_bits(one, three));
          },
          engine_results(surface, nullptr), engine_results(surface, &pool));
    }
  }

  /// The derivative along a random direction of every input and parameter.
  void check_differences() {
    INFO(text());
    for (const bool surface : {false, true}) {
      INFO((surface ? "surface form" : "standard form"));
      const auto results = engine_results(surface, nullptr);
      check_direction(surface, "queries", problem_.queries, results.queries);
      check_direction(surface, "keys", problem_.keys, results.keys);
      if (!surface) check_direction(surface, "values", problem_.values, results.values);
      if (surface) check_bandwidth(results.bandwidth(0, 0));
      if (surface && prior_ == PriorKind::explicit_weights)
        check_direction(surface, "log prior", problem_.log_prior, results.log_prior);
      for (std::size_t n = 0; n < terms_.size(); ++n) {
        if (terms_[n].is_trainable())
          check_direction(surface, name_of(terms_[n].kind), terms_[n].parameters, results.terms[n]);
      }
    }
  }

 private:
  template <class S>
  static double largest(const Matrix<S>& matrix) {
    double result = 0;
    for (Index n = 0; n < matrix.size(); ++n) {
      const double x = std::abs(double(matrix.data()[n]));
      if (std::isfinite(x)) result = std::max(result, x);
    }
    return result;
  }

  template <class D>
  static double largest(const Eigen::MatrixBase<D>& expression) {
    return largest(Matrix<typename D::Scalar>(expression));
  }

  /// ±g(dv + 4)·Σ_c |dO_ic|·max_j |v_jc|, of random sign.
  Matrix<High> delta_errors(bool surface, const FormInputs<High>& in) {
    const Matrix<High>& values = surface ? in.keys : in.values;
    const Index width = values.cols() / sizes_.key_value_heads;
    const High g =
        High(4 * std::sqrt(double(width + 4))) * std::numeric_limits<Scalar>::epsilon() / 2;
    Matrix<High> errors = Matrix<High>::Zero(sizes_.queries, sizes_.query_heads);
    for (Index h = 0; h < sizes_.query_heads && values.size() > 0; ++h) {
      const Index shared = h / (sizes_.query_heads / sizes_.key_value_heads);
      const Matrix<High> most =
          values.middleCols(shared * width, width).cwiseAbs().colwise().maxCoeff();
      for (Index i = 0; i < sizes_.queries; ++i) {
        const High size = in.grad_out.row(i).segment(h * width, width).cwiseAbs().dot(most.row(0));
        errors(i, h) = random_() % 2 ? g * size : -g * size;
      }
    }
    return errors;
  }

  static bool same_bits(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
    const auto equal = [](Scalar x, Scalar y) {
      return x == y || (std::isnan(x) && std::isnan(y));
    };
    bool same = a.rows() == b.rows() && a.cols() == b.cols();
    for (Index n = 0; same && n < a.size(); ++n) same = equal(a.data()[n], b.data()[n]);
    return same;
  }

  SurfaceOptions surface_options(Executor* executor) const {
    return {.heads = problem_.heads,
            .executor = executor,
            .bandwidth = bandwidth_,
            .prior = library_prior(prior_, problem_.log_prior)};
  }

  FormResults<Scalar> engine_results(bool surface, Executor* executor) const {
    return terms_.with_terms([&](const auto&... terms) {
      return surface ? surface_results(executor, terms...) : standard_results(executor, terms...);
    });
  }

  template <class... Terms>
  FormResults<Scalar> standard_results(Executor* executor, const Terms&... terms) const {
    const auto& p = problem_;
    const Options options{.scale = scale_, .heads = p.heads, .executor = executor};
    const auto forward = attention_forward(p.queries, p.keys, p.values, options, terms...);
    const auto grad =
        attention_backward(p.queries, p.keys, p.values, forward, p.grad_out, options, terms...);
    return {forward.out, forward.log_sum_exp, grad.queries, grad.keys, grad.values, {},
            {},          term_gradients()};
  }

  template <class... Terms>
  FormResults<Scalar> surface_results(Executor* executor, const Terms&... terms) const {
    const auto& p = problem_;
    const SurfaceOptions options = surface_options(executor);
    const auto forward = project_forward(p.queries, p.keys, options, terms...);
    const auto grad =
        project_backward(p.queries, p.keys, forward, p.grad_projection, options, terms...);
    return {forward.out,
            forward.log_sum_exp,
            grad.queries,
            grad.keys,
            {},
            Matrix<Scalar>::Constant(1, 1, grad.bandwidth),
            grad.log_prior,
            term_gradients()};
  }

  std::vector<Matrix<Scalar>> term_gradients() const {
    std::vector<Matrix<Scalar>> all;
    for (std::size_t n = 0; n < terms_.size(); ++n) all.push_back(terms_[n].gradient);
    return all;
  }

  template <class S>
  FormInputs<S> inputs_in(bool surface) const {
    const auto& p = problem_;
    const auto& upstream = surface ? p.grad_projection : p.grad_out;
    return {p.queries.template cast<S>(),   p.keys.template cast<S>(),
            p.values.template cast<S>(),    upstream.template cast<S>(),
            p.log_prior.template cast<S>(), {},
            terms_.template parameters<S>()};
  }

  template <class S>
  FormResults<S> reference_results(bool surface, const FormInputs<S>& in) const {
    const auto terms = terms_.template reference_terms<S>(in.parameters);
    if (!surface) return reference_standard<S>(in, in.values, S(scale_), terms);
    if (prior_ == PriorKind::sdpa) return reference_sdpa<S>(in, terms);
    const auto prior = reference_prior<S>(prior_, in.keys, in.log_prior, S(bandwidth_), heads());
    const auto forward =
        reference::project_forward<S>(in.queries, in.keys, S(bandwidth_), prior, heads(), terms);
    const auto grad =
        reference::project_backward<S>(in.queries, in.keys, S(bandwidth_), prior, heads(), terms,
                                       in.grad_out, in.grad_log_sum_exp);
    return {forward.out,
            forward.log_sum_exp,
            grad.queries,
            grad.keys,
            {},
            Matrix<S>::Constant(1, 1, grad.bandwidth),
            grad.log_prior,
            terms_.reference_gradients(grad.terms)};
  }

  reference::Heads heads() const { return {sizes_.query_heads, sizes_.key_value_heads}; }

  template <class S>
  FormResults<S> reference_standard(const FormInputs<S>& in, const Matrix<S>& values, S scale,
                                    const reference::Terms<S>& terms) const {
    const auto forward =
        reference::attention_forward<S>(in.queries, in.keys, values, scale, heads(), terms);
    const auto grad = reference::attention_backward<S>(in.queries, in.keys, values, scale, heads(),
                                                       terms, in.grad_out, in.grad_log_sum_exp);
    FormResults<S> results{forward.out,  forward.log_sum_exp,
                           grad.queries, grad.keys,
                           grad.values,  {},
                           {},           terms_.reference_gradients(grad.terms)};
    results.log_prior = Matrix<S>::Constant(in.keys.rows(), sizes_.key_value_heads, S(0));
    for (Index h = 0; h < sizes_.query_heads; ++h) {
      results.log_prior.col(h / (sizes_.query_heads / sizes_.key_value_heads)) +=
          grad.terms.raw_scores[std::size_t(h)].colwise().sum().transpose();
    }
    if (&values != &in.keys) results.log_prior.resize(0, 0);
    return results;
  }

  /// With the prior `sdpa` the surface form is attention(Q, K, K), with terms too; σ = β^(−1/2).
  template <class S>
  FormResults<S> reference_sdpa(const FormInputs<S>& in, const reference::Terms<S>& terms) const {
    const S scale = 1 / (S(bandwidth_) * S(bandwidth_));
    FormResults<S> results = reference_standard<S>(in, in.keys, scale, terms);
    results.keys += results.values;
    results.values.resize(0, 0);
    const S grad_scale = in.queries.cwiseProduct(results.queries).sum() / scale;
    results.bandwidth = Matrix<S>::Constant(1, 1, -2 * scale * std::sqrt(scale) * grad_scale);
    return results;
  }

  Scalar loss(bool surface, double bandwidth) const {
    return terms_.with_terms([&](const auto&... terms) {
      const auto& p = problem_;
      SurfaceOptions options = surface_options(nullptr);
      options.bandwidth = bandwidth;
      const Matrix<Scalar> out = surface ? project(p.queries, p.keys, options, terms...)
                                         : attention(p.queries, p.keys, p.values,
                                                     {.scale = scale_, .heads = p.heads}, terms...);
      return out.cwiseProduct(surface ? p.grad_projection : p.grad_out).sum();
    });
  }

  /// Rounding moves a difference quotient by about u·Σ|O∘dO|/h, h = 0.006; ten times that counts as
  /// an error of 1e-8 beside this number.
  Scalar rounding_floor(bool surface) const {
    const auto& p = problem_;
    const Scalar largest_out =
        surface ? p.keys.cwiseAbs().maxCoeff() : p.values.cwiseAbs().maxCoeff();
    const Matrix<Scalar>& upstream = surface ? p.grad_projection : p.grad_out;
    return Scalar(1e-3) + Scalar(2e-5) * largest_out * upstream.cwiseAbs().sum();
  }

  /// `inputs` are moved in place, for terms and problem hold them.
  void check_direction(bool surface, const char* name, Matrix<Scalar>& inputs,
                       const Matrix<Scalar>& gradient) {
    const Matrix<Scalar> centre = inputs;
    const Matrix<Scalar> direction =
        random_matrix<Scalar>(inputs.rows(), inputs.cols(), random_) *
        (Scalar(0.5) / std::sqrt(Scalar(std::max<Index>(1, inputs.cols()))));
    Scalar analytic(0);
    for (Index n = 0; n < gradient.size(); ++n)
      analytic += gradient.data()[n] * direction.data()[n];
    const auto along = [&](Scalar t) {
      inputs = centre + t * direction;
      return loss(surface, bandwidth_);
    };
    const auto check = check_gradient(along, Scalar(0), analytic,
                                      {.tolerance = 1e-8, .floor = rounding_floor(surface)});
    inputs = centre;
    INFO(name << ": " << check);
    CHECK(check.passed());
  }

  void check_bandwidth(Scalar gradient) {
    const auto check =
        check_gradient([&](double bandwidth) { return loss(true, bandwidth); }, bandwidth_,
                       gradient, {.tolerance = 1e-8, .floor = rounding_floor(true)});
    INFO("bandwidth: " << check);
    CHECK(check.passed());
  }

  Sizes sizes_;
  Composition<Scalar> terms_;
  Problem<Scalar> problem_;
  PriorKind prior_;
  std::mt19937_64& random_;
  double scale_, bandwidth_;
};

/// Sizes of few and of many queries, of several tiles and blocks, with grouped heads, some odd.
inline Sizes random_sizes(std::mt19937_64& random) {
  const Index queries[] = {1, 2, 3, 5, 9, 17, 33, 65, 70}, keys[] = {1, 3, 7, 16, 31, 64, 77, 130};
  const Index widths[] = {1, 2, 3, 5, 8};
  const std::pair<Index, Index> heads[] = {{1, 1}, {2, 2}, {2, 1}, {4, 2}, {3, 1}};
  const auto pick = [&](const auto& from) { return from[random() % std::size(from)]; };
  const auto [query_heads, key_value_heads] = pick(heads);
  return {pick(queries), pick(keys), pick(widths), pick(widths), query_heads, key_value_heads};
}

/// `count` random compositions of one to four terms, through all laws.
template <class Scalar, class High>
void check_random_compositions(int count, std::uint64_t stream) {
  std::mt19937_64 random(seed() + stream);
  CAPTURE(seed(), stream);
  for (int n = 0; n < count; ++n) {
    std::vector<TermKind> kinds(1 + random() % Composition<Scalar>::most);
    for (TermKind& kind : kinds) kind = TermKind(random() % term_kinds);
    CAPTURE(n);
    TermLaws<Scalar, High> laws(random_sizes(random), kinds, PriorKind(random() % 3), random);
    laws.check_reference();
    laws.check_threads();
    if constexpr (std::is_same_v<Scalar, double>) laws.check_differences();
  }
}

}  // namespace surfattn::test

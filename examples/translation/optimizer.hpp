#pragma once
// RMSprop (Tieleman and Hinton 2012) and Adam (Kingma and Ba 2015), with the constants of Keras, and
// clipping of the whole gradient's norm (Pascanu, Mikolov and Bengio 2013).

#include <cmath>
#include <cstdint>

#include "model.hpp"

namespace translation {

enum class Method : std::uint32_t { rmsprop, adam };

struct OptimizerOptions {
  Method method = Method::rmsprop;
  double learning_rate = 1e-3;
  double clip_norm = 0;           ///< the longest gradient that is left as it is; 0: no limit
  bool frozen_attention = false;  ///< the attention layers' weights stay as they are
};

template <class Layer>
class Optimizer {
 public:
  using Scalar = typename Model<Layer>::Scalar;

  Optimizer(const Model<Layer>& model, const OptimizerOptions& options) : options_(options) {
    visit_parameters<Layer>(
        [&](Part, const auto& parameter, auto& first, auto& second) {
          if (options.method == Method::adam) first.setZero(parameter.rows(), parameter.cols());
          second.setZero(parameter.rows(), parameter.cols());
        },
        model, first_, second_);
  }

  /// Takes one step down. Rows of a table that a batch does not read stay as they are, and so do
  /// their moments.
  void step(Model<Layer>& model, const ModelGradients<Layer>& gradients) {
    ++steps_;
    const Rule rule = rule_for(clip_factor(gradients));
    visit_dense<Layer>(
        [&](Part part, auto& parameter, auto& first, auto& second, const auto& gradient) {
          if (is_frozen(part)) return;
          rule(parameter.array(), first.array(), second.array(), gradient.array());
        },
        model, first_, second_, gradients.dense);
    step_rows(rule, model.source, first_.source, second_.source, gradients.source_tokens);
    step_rows(rule, model.target, first_.target, second_.target, gradients.target_tokens);
  }

  /// What a checkpoint keeps besides the model.
  std::int64_t& steps() { return steps_; }
  Model<Layer>& first_moments() { return first_; }
  Model<Layer>& second_moments() { return second_; }

  /// The length of the gradient of all that is not frozen.
  double norm(const ModelGradients<Layer>& gradients) const {
    double squares = 0;
    const auto add = [&](const auto& numbers) {
      squares += static_cast<double>(numbers.squaredNorm());
    };
    visit_dense<Layer>(
        [&](Part part, const auto& gradient) {
          if (!is_frozen(part)) add(gradient);
        },
        gradients.dense);
    add(gradients.source_tokens.values);
    add(gradients.target_tokens.values);
    return std::sqrt(squares);
  }

 private:
  /// With g = clip·gradient:
  ///     RMSprop:  s ← ρs + (1 − ρ)g²,  w ← w − η·g/(√s + ε)
  ///     Adam:     m ← β₁m + (1 − β₁)g,  s ← β₂s + (1 − β₂)g²,  w ← w − η'·m/(√s + ε'),
  /// where η' and ε' hold the corrections 1 − β₁ᵗ and √(1 − β₂ᵗ) of a start at 0.
  struct Rule {
    Method method;
    Scalar clip, rate, epsilon, keep_first, keep_second;

    template <class W, class M, class S, class G>
    void operator()(W&& w, M&& m, S&& s, const G& gradient) const {
      const auto g = clip * gradient;
      s = keep_second * s + (1 - keep_second) * g.square();
      if (method == Method::rmsprop) {
        w -= rate * g / (s.sqrt() + epsilon);
      } else {
        m = keep_first * m + (1 - keep_first) * g;
        w -= rate * m / (s.sqrt() + epsilon);
      }
    }
  };

  bool is_frozen(Part part) const { return options_.frozen_attention && part == Part::attention; }

  Rule rule_for(double clip) const {
    const double rate = options_.learning_rate, epsilon = 1e-7;
    const auto rule = [&](double rate_now, double epsilon_now, double first, double second) {
      return Rule{options_.method,
                  static_cast<Scalar>(clip),
                  static_cast<Scalar>(rate_now),
                  static_cast<Scalar>(epsilon_now),
                  static_cast<Scalar>(first),
                  static_cast<Scalar>(second)};
    };
    if (options_.method == Method::rmsprop) return rule(rate, epsilon, 0, 0.9);
    const double first = 0.9, second = 0.999, t = static_cast<double>(steps_);
    const double correction = std::sqrt(1 - std::pow(second, t));
    return rule(rate * correction / (1 - std::pow(first, t)), epsilon * correction, first, second);
  }

  double clip_factor(const ModelGradients<Layer>& gradients) const {
    if (options_.clip_norm <= 0) return 1;
    const double length = norm(gradients);
    return length > options_.clip_norm ? options_.clip_norm / length : 1;
  }

  /// RMSprop has no first moment.
  static void step_rows(const Rule& rule, Embedding<Scalar>& table, Embedding<Scalar>& first,
                        Embedding<Scalar>& second, const RowGradients<Scalar>& gradients) {
    const bool has_first = first.tokens.rows() > 0;
    for (std::size_t i = 0; i < gradients.rows.size(); ++i) {
      const Index row = gradients.rows[i];
      auto first_row = has_first ? first.tokens.middleRows(row, 1) : first.tokens.middleRows(0, 0);
      rule(table.tokens.row(row).array(), first_row.array(), second.tokens.row(row).array(),
           gradients.values.row(static_cast<Index>(i)).array());
    }
  }

  OptimizerOptions options_;
  std::int64_t steps_ = 0;
  Model<Layer> first_, second_;
};

}  // namespace translation

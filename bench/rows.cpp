// What the library promises of its speed.
#include "support/rows.hpp"

#include <surfattn/executors/thread_pool.hpp>

#include "support/cache_rows.hpp"
#include "support/peak.hpp"
#include "support/problem.hpp"

namespace surfattn::bench {
namespace {

/// Against a loop of as many floating-point operations on registers: the share of the peak.
template <class Scalar>
Comparison of_peak(Work ours, double flops) {
  const long steps = 4 * long(std::min(flops, 1e9) / (4 * flops_per_step<Scalar>)+1);
  return {std::move(ours), [steps] { run_flop_loop<Scalar>(steps); },
          flops / (double(steps) * flops_per_step<Scalar>)};
}

template <class AnyProblem>
Work work_of(AnyProblem& p, Pass pass, Form form = Form::standard, Executor* executor = nullptr) {
  return pass == Pass::forward ? p.forward(form, executor) : p.backward(form, executor);
}

template <class Scalar>
std::function<Comparison()> share_of_peak(Case c, Pass pass, Form form = Form::standard) {
  return [=]() -> Comparison {
    const auto p = Problem<Scalar>::make(c);
    return of_peak<Scalar>(work_of(*p, pass, form), p->flops(pass));
  };
}

template <class Mask = NoMask>
std::function<Comparison()> against_naive(Case c) {
  return [=]() -> Comparison {
    const auto p = Problem<float, Mask>::make(c);
    return {p->forward(Form::standard), p->naive_forward()};
  };
}

Work both(Work first, Work second) {
  return [=] {
    first();
    second();
  };
}

Comparison forward_and_backward_of_peak() {
  const auto p = Problem<float>::make(shape_a);
  return of_peak<float>(both(p->forward(Form::standard), p->backward(Form::standard)),
                        p->flops(Pass::forward) + p->flops(Pass::backward));
}

Comparison forward_and_backward_against_naive() {
  const auto p = Problem<float>::make(shape_a);
  return {both(p->forward(Form::standard), p->backward(Form::standard)),
          both(p->naive_forward_with_weights(), p->naive_backward())};
}

/// The share of the time without a mask that falls to the pairs that the mask leaves.
template <class Mask>
std::function<Comparison()> against_share_of_unmasked(Case c, Pass pass) {
  return [=]() -> Comparison {
    double seen = 0;
    for (Index i = 0; i < c.queries; ++i) {
      const KeyRange range = Mask::range(i, c);
      seen += static_cast<double>(range.last - range.first);
    }
    const double share = seen / static_cast<double>(c.queries * c.keys);
    const auto masked = Problem<float, Mask>::make(c);
    const auto whole = Problem<float>::make(c);
    return {work_of(*masked, pass), work_of(*whole, pass), share};
  };
}

std::function<Comparison()> surface_against_standard(Case c, Pass pass, Form form = Form::surface) {
  return [=]() -> Comparison {
    const auto surface = Problem<float>::make(c), standard = Problem<float>::make(c);
    return {work_of(*surface, pass, form), work_of(*standard, pass)};
  };
}

/// Scores so far from each other that most weights are too small to be normal, or 0, against usual ones.
std::function<Comparison()> of_far_scores(Pass pass) {
  return [=]() -> Comparison {
    const auto far = Problem<float>::make(square(2048, 64)),
               usual = Problem<float>::make(square(2048, 64));
    far->data().queries *= 100;
    return {work_of(*far, pass), work_of(*usual, pass)};
  };
}

Executor& two_threads() {
  static ThreadPool pool(2);
  return pool;
}

/// Reads keys and values once, on one thread or two.
template <class Scalar>
Work reading(const std::shared_ptr<Problem<Scalar>>& p, Executor* executor) {
  return [=] {
    for (const auto* matrix : {&p->data().keys, &p->data().values}) {
      const Index half = matrix->size() / 2;
      if (!executor) {
        run_read_loop(matrix->data(), matrix->size());
      } else {
        executor->run(2, [&](Index part) { run_read_loop(matrix->data() + part * half, half); });
      }
    }
  };
}

/// Against a loop that only reads the same keys and values: the share of the read bandwidth.
std::function<Comparison()> share_of_bandwidth(Case c, Executor* executor = nullptr) {
  return [=]() -> Comparison {
    const auto p = Problem<float>::make(c);
    return {p->forward(Form::standard, executor), reading(p, executor)};
  };
}

std::function<Comparison()> two_against_one(Case c, Pass pass) {
  return [=]() -> Comparison {
    const auto p = Problem<float>::make(c);
    Executor* const two = &two_threads();
    return {work_of(*p, pass, Form::standard, two), work_of(*p, pass)};
  };
}

template <class Mask>
void add_mask_rows(std::vector<Row>& rows, double target) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    for (const Index d : {64, 128}) {
      rows.push_back(
          {std::string(Mask::name) +
               (pass == Pass::forward ? "-forward-4096x" : "-backward-4096x") + std::to_string(d),
           "share of unmasked", target, against_share_of_unmasked<Mask>(square(4096, d), pass)});
    }
  }
}

/// 16-bit storage against float, where the library computes with it.
template <class Scalar>
void add_narrow_rows(std::vector<Row>& rows, const std::string& scalar, double target) {
  if constexpr (is_supported_scalar_v<Scalar>) {
    for (const Index d : {64, 128}) {
      rows.push_back({"forward-" + scalar + "-4096x" + std::to_string(d), "float",
                      d == 128 ? target : 0, [d]() -> Comparison {
                        const auto narrow = Problem<Scalar>::make(square(4096, d));
                        const auto wide = Problem<float>::make(square(4096, d));
                        return {narrow->forward(Form::standard), wide->forward(Form::standard)};
                      }});
    }
  } else {
    static_cast<void>(rows), static_cast<void>(scalar), static_cast<void>(target);
  }
}

/// Targets of the shares of the peak follow from the vectors of this build.
struct Targets {
  double float_64, float_128, double_64, double_128;
};

Targets forward_targets() {
  if (detail::simd::lanes<float> >= 16) return {0.90, 0.95, 0.88, 0.92};
  if (fused) return {0.85, 0.90, 0.83, 0.87};
  return {0.77, 0.81, 0.75, 0.78};
}

template <class Scalar>
void add_peak_rows(std::vector<Row>& rows, const std::string& scalar, Pass pass, double target_64,
                   double target_128) {
  const std::string name = pass == Pass::forward ? "forward-" : "backward-";
  for (const Index tokens : {1024, 4096}) {
    for (const Index d : {64, 128}) {
      rows.push_back({name + scalar + "-" + std::to_string(tokens) + "x" + std::to_string(d),
                      "flops at peak", d == 64 ? target_64 : target_128,
                      share_of_peak<Scalar>(square(tokens, d), pass)});
    }
  }
}

void add_form_rows(std::vector<Row>& rows) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    for (const Index tokens : {1024, 4096}) {
      for (const Index d : {64, 128}) {
        const std::string of = pass == Pass::forward ? "surface-forward-" : "surface-backward-";
        rows.push_back({of + std::to_string(tokens) + "x" + std::to_string(d), "standard form", 1,
                        surface_against_standard(square(tokens, d), pass)});
      }
    }
  }
}

}  // namespace

std::vector<Row> all_rows() {
  std::vector<Row> rows{
      {"A", "naive Eigen", 1.65, against_naive(shape_a)},
      {"B", "naive Eigen", 3.2, against_naive<CausalMask>(shape_b)},
      {"C", "naive Eigen", 4.5, against_naive<CausalMask>(shape_c)},
      {"D", "naive Eigen", 2.3, against_naive(shape_d)},
      {"E", "naive Eigen", 3.6, against_naive(shape_e)},
      {"F", "naive Eigen", 3.5, against_naive(shape_f)},
      {"G", "naive Eigen", 1.55, against_naive(shape_g)},
      {"A-both-passes", "flops at peak", 1 / 1.15, forward_and_backward_of_peak},
      {"A-both-passes-naive", "naive Eigen", 0, forward_and_backward_against_naive},
  };
  const Targets forward = forward_targets();
  add_peak_rows<float>(rows, "float", Pass::forward, forward.float_64, forward.float_128);
  add_peak_rows<double>(rows, "double", Pass::forward, forward.double_64, forward.double_128);
  add_peak_rows<float>(rows, "float", Pass::backward, 0.85, 0.90);
  add_peak_rows<double>(rows, "double", Pass::backward, 0, 0);
  add_mask_rows<CausalMask>(rows, 1 / 1.08);
  add_mask_rows<WindowMask>(rows, 0);
  rows.push_back({"far-scores-forward", "usual scores", 0.95, of_far_scores(Pass::forward)});
  rows.push_back({"far-scores-backward", "usual scores", 0.95, of_far_scores(Pass::backward)});
  add_form_rows(rows);
  add_narrow_rows<Eigen::bfloat16>(rows, "bfloat16", detail::simd::multiplies_pairs ? 1.7 : 0);
  add_narrow_rows<Eigen::half>(rows, "half", 0);
  rows.insert(
      rows.end(),
      {{"decode", "reading K and V", 0.90, share_of_bandwidth(shape_d)},
       {"decode-grouped", "reading K and V", 0, share_of_bandwidth(shape_e)},
       {"decode-two-threads", "reading K and V", 0, share_of_bandwidth(shape_d, &two_threads())},
       {"decode-surface", "standard form", 1.85, surface_against_standard(shape_d, Pass::forward)},
       {"decode-surface-sdpa", "standard form", 0,
        surface_against_standard(shape_d, Pass::forward, Form::surface_sdpa)}});
  add_cache_rows(rows);
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    for (const Index heads : {1, 8}) {
      rows.push_back({std::string("threads-") + (pass == Pass::forward ? "forward-" : "backward-") +
                          std::to_string(heads) + (heads == 1 ? "head" : "heads"),
                      "one thread", 1.9, two_against_one(square(4096, 64, heads), pass)});
    }
  }
  return rows;
}

}  // namespace surfattn::bench

// What the benchmarks of one scalar type measure: groups of shapes, passes, forms and masks, and the counters of each.
#pragma once

#include <benchmark/benchmark.h>

#include <ctime>
#include <memory>
#include <optional>
#include <string>

#include "layer_problem.hpp"
#include "peak.hpp"
#include "problem.hpp"

namespace surfattn::bench {

/// What is timed, and a loop at the limit of the machine to compare it with: of flops, or of bytes
/// read where memory is what the call waits for.
struct Measurement {
  Work work;
  double flops, bytes;
  Work limit;
  double in_limit;  ///< flops or bytes of one run of the loop
  double limited;   ///< flops or bytes of the work
};

/// Google Benchmark calls a function several times until it has run long enough: what it times is
/// made once, and only the last one is kept.
inline const Measurement& prepared(const std::string& name,
                                   const std::function<Measurement()>& make) {
  static std::string current;
  static std::optional<Measurement> measurement;
  if (current != name) {
    measurement.reset();
    measurement = make();
    current = name;
  }
  return *measurement;
}

/// Seconds of the processor, which is what Google Benchmark divides by, too.
inline double processor_seconds_of(const Work& work) {
  const std::clock_t start = std::clock();
  work();
  return double(std::clock() - start) / CLOCKS_PER_SEC;
}

/// Counters: flops and bytes a second, and `share`, a plain ratio, of the rate that the loop at the
/// limit reached just before or after, whichever was higher.
inline void time(benchmark::State& state, const Measurement& m) {
  using benchmark::Counter;
  const double before = processor_seconds_of(m.limit);
  const double seconds = processor_seconds_of([&] {
    for (auto _ : state) m.work();
  });
  const double limit = std::min(before, processor_seconds_of(m.limit));
  state.counters["flops"] = Counter(m.flops, Counter::kIsIterationInvariantRate);
  state.counters["bytes"] = Counter(m.bytes, Counter::kIsIterationInvariantRate);
  state.counters["share"] = m.limited * double(state.iterations()) / seconds / (m.in_limit / limit);
}

inline void add(const std::string& name, std::function<Measurement()> make) {
  const auto run = [name, make = std::move(make)](benchmark::State& state) {
    try {
      time(state, prepared(name, make));
    } catch (const std::exception& error) {
      state.SkipWithError(error.what());
    }
  };
  benchmark::RegisterBenchmark(name.c_str(), run)->Unit(benchmark::kMicrosecond);
}

/// 16-bit numbers are counted against the flops of float, in which they are computed.
template <class Scalar>
Measurement limited_by_arithmetic(Work work, double flops, double bytes) {
  using Unit = std::conditional_t<(sizeof(Scalar) < 4), float, Scalar>;
  constexpr long steps = 1000000;
  return {std::move(work),
          flops,
          bytes,
          [] { run_flop_loop<Unit>(steps); },
          double(steps) * flops_per_step<Unit>,
          flops};
}

template <class Scalar>
Measurement limited_by_reading(Work work, double flops, double bytes,
                               const Matrix<Scalar>& matrix) {
  return {std::move(work),
          flops,
          bytes,
          [&matrix] { run_read_loop(matrix.data(), matrix.size()); },
          double(matrix.size()) * double(sizeof(Scalar)),
          bytes};
}

enum class Code { naive, standard, surface };
inline constexpr const char* code_names[] = {"naive", "standard", "surface"};

template <class Scalar, class Mask>
Measurement measure(const Case& c, Pass pass, Code code, bool is_decoding) {
  const auto p = Problem<Scalar, Mask>::make(c);
  const Form form = code == Code::surface ? Form::surface : Form::standard;
  const bool forward = pass == Pass::forward;
  const Work work = code == Code::naive ? (forward ? p->naive_forward() : p->naive_backward())
                                        : (forward ? p->forward(form) : p->backward(form));
  const double flops = p->flops(pass), bytes = p->bytes(form, pass);
  if constexpr (sizeof(Scalar) >= 4) {
    if (is_decoding) return limited_by_reading<Scalar>(work, flops, bytes, p->data().keys);
  }
  return limited_by_arithmetic<Scalar>(work, flops, bytes);
}

/// One benchmark for each way to compute.
template <class Scalar, class Mask = NoMask>
void add_codes(const std::string& group, const std::string& scalar, const Case& c, Pass pass) {
  for (const Code code : {Code::naive, Code::standard, Code::surface}) {
    if (sizeof(Scalar) < 4 && code == Code::naive) continue;  // sums in 16 bits are no yardstick
    const std::string shape =
        *c.name ? c.name : std::to_string(c.queries) + "x" + std::to_string(c.width);
    const std::string name =
        group + "/" + scalar + "/" + code_names[int(code)] + "/" + Mask::name + "/" + shape;
    add(name, [=] { return measure<Scalar, Mask>(c, pass, code, group == "decode"); });
  }
}

/// Both passes at sizes of practice; without a mask also at sizes off the edges of every tile.
template <class Scalar, class Mask>
void add_passes(const std::string& scalar) {
  std::vector<Case> cases{square(1024, 64), square(4096, 128)};
  if (std::is_same_v<Mask, NoMask>) {
    cases = {square(1024, 64),  square(1024, 128), square(4096, 64),
             square(4096, 128), square(1001, 80),  shape_a};
  }
  for (const Case& c : cases) {
    add_codes<Scalar, Mask>("forward", scalar, c, Pass::forward);
    add_codes<Scalar, Mask>("backward", scalar, c, Pass::backward);
  }
}

/// A problem whose sizes are known to the compiler.
template <class Scalar>
void add_fixed_size(const std::string& scalar) {
  static constexpr int tokens = 16, width = 16;
  struct Fixed {
    Eigen::Matrix<Scalar, tokens, width, Eigen::RowMajor> q, k, v, out;
  };
  for (const Code code : {Code::naive, Code::standard}) {
    add("small/" + scalar + "/" + code_names[int(code)] + "/none/16x16_fixed_size", [code] {
      const auto p = Problem<Scalar>::make(square(tokens, width));
      const auto& s = p->data();
      const auto fixed = std::make_shared<Fixed>(Fixed{s.queries, s.keys, s.values, {}});
      const auto workspace =
          std::make_shared<Workspace>(workspace_size(Pass::forward, fixed->q, fixed->k, fixed->v));
      const Work work = [=] {
        if (code == Code::standard) {
          attention_into(fixed->q, fixed->k, fixed->v, fixed->out, *workspace);
        } else {
          fixed->out = naive_attention(fixed->q, fixed->k, fixed->v, [](const auto&) {});
        }
      };
      p->judged(Form::standard, Pass::forward, [=] {
        work();
        p->data().forward.out = fixed->out;
      });
      return limited_by_arithmetic<Scalar>(work, p->flops(Pass::forward),
                                           p->bytes(Form::standard, Pass::forward));
    });
  }
}

/// Narrow heads, and heads as wide as the layer's input, where merged weights save two projections.
template <class Scalar>
void add_layers(const std::string& scalar) {
  for (const Index head_width : {32, 256}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      for (const Code code : {Code::naive, Code::standard, Code::surface}) {
        const std::string name =
            std::string("layer_") + (pass == Pass::forward ? "forward/" : "backward/") + scalar +
            "/" + code_names[int(code)] + "/none/512x256_8_heads_of_" + std::to_string(head_width);
        add(name, [=] {
          const auto p = std::make_shared<LayerProblem<Scalar>>(512, 256, 8, head_width);
          const Form form = code == Code::surface ? Form::surface_sdpa : Form::standard;
          return limited_by_arithmetic<Scalar>(
              code == Code::naive ? p->naive(pass) : p->library(form, pass), p->flops(form, pass),
              p->bytes(form, pass));
        });
      }
    }
  }
}

/// Everything for one scalar type.
template <class Scalar>
void add_suite(const std::string& scalar) {
  if constexpr (is_supported_scalar_v<Scalar>) {
    add_passes<Scalar, NoMask>(scalar);
    add_passes<Scalar, CausalMask>(scalar);
    add_passes<Scalar, WindowMask>(scalar);
    add_passes<Scalar, LengthMask>(scalar);
    add_passes<Scalar, DocumentMask>(scalar);
    for (const Case& c : {shape_d, shape_e}) add_codes<Scalar>("decode", scalar, c, Pass::forward);
    for (const Case& c : {shape_f, shape_g}) add_codes<Scalar>("small", scalar, c, Pass::forward);
    if constexpr (sizeof(Scalar) >= 4) {
      add_fixed_size<Scalar>(scalar);
      add_layers<Scalar>(scalar);
    }
  }
}

}  // namespace surfattn::bench

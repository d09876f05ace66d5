// Measures this machine and writes report.md and report.svg: what the library promises, and the shapes A to G by naive Eigen
// code, by both forms of the library and by every other code that was found at configuration.
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <surfattn/executors/thread_pool.hpp>
#include <vector>

#include "../examples/support/svg_plot.hpp"
#include "support/peak.hpp"
#include "support/peers.hpp"
#include "support/problem.hpp"
#include "support/rows.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::bench;

constexpr Effort quick{.seconds = 0.4, .least_rounds = 3, .shortest_sample = 5e-4};

Executor& two_threads() {
  static ThreadPool pool(2);
  return pool;
}

std::string formatted(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// The value of the first line of a file that begins with `key`, or the whole first line.
std::string line_of(const std::string& file, const std::string& key = "") {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (!line.starts_with(key)) continue;
    const auto colon = key.empty() ? std::string::npos : line.find(": ");
    return colon == std::string::npos ? line : line.substr(colon + 2);
  }
  return "unknown";
}

std::string caches() {
  std::string words;
  for (int i = 0; i < 8; ++i) {
    const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    if (line_of(cache + "type") == "unknown" || line_of(cache + "type") == "Instruction") continue;
    words +=
        (words.empty() ? "L" : ", L") + line_of(cache + "level") + " " + line_of(cache + "size");
  }
  return words.empty() ? "unknown" : words;
}

/// The best of several runs, which is what the machine can do.
double best_seconds(const Work& work) {
  double best = seconds_of(work);
  for (int run = 0; run < 40; ++run) best = std::min(best, seconds_of(work));
  return best;
}

template <class Scalar>
double peak_gflops() {
  constexpr long steps = 1000000;
  return 1e-9 * double(steps) * flops_per_step<Scalar> /
         best_seconds([] { run_flop_loop<Scalar>(steps); });
}

double read_gigabytes(int threads) {
  const std::vector<float> numbers(1 << 25, 1.0f);
  const Index part = Index(numbers.size()) / threads;
  const auto read = [&](Index i) { run_read_loop(numbers.data() + i * part, part); };
  return 1e-9 * double(numbers.size() * sizeof(float)) / best_seconds([&] {
           if (threads == 1) return read(0);
           two_threads().run(2, read);
         });
}

std::string machine() {
  std::string text = "* processor: " + line_of("/proc/cpuinfo", "model name") + "\n";
  text += "* caches: " + caches() + "\n";
  text += "* compiler: " SURFATTN_BENCH_COMPILER ", flags `" SURFATTN_BENCH_FLAGS "`, packets of " +
          std::to_string(detail::simd::lanes<float>) + " floats\n";
  text += "* peak of one core, measured: " + formatted("%.1f", peak_gflops<float>()) +
          " GFLOP/s float, " + formatted("%.1f", peak_gflops<double>()) + " GFLOP/s double\n";
  text += "* read bandwidth, measured: " + formatted("%.1f", read_gigabytes(1)) +
          " GB/s on one thread, " + formatted("%.1f", read_gigabytes(2)) + " GB/s on two\n";
  return text;
}

struct Contestant {
  std::string name;
  Work work;
};

/// Seconds of every contestant at one shape.
struct Contest {
  std::string shape;
  int threads;
  std::vector<std::string> names;
  std::vector<double> seconds;
};

template <class Mask>
PeerCall peer_call(Problem<float, Mask>& p, int threads) {
  PeerCall call{p.shape(), std::is_same_v<Mask, CausalMask>, threads, {}};
  auto& d = p.data();
  for (Index sequence = 0; sequence < call.shape.sequences; ++sequence) {
    const Index query = sequence * call.shape.queries * d.queries.cols();
    const Index key = sequence * call.shape.keys * d.keys.cols();
    call.sequences.push_back({d.queries.data() + query, d.keys.data() + key, d.values.data() + key,
                              d.forward.out.data() + query, d.grad_out.data() + query,
                              d.grad.queries.data() + query, d.grad.keys.data() + key,
                              d.grad.values.data() + key});
  }
  return call;
}

Contest timed(std::string shape, int threads, const std::vector<Contestant>& contestants) {
  std::vector<Work> works;
  Contest contest{std::move(shape), threads, {}, {}};
  for (const Contestant& c : contestants) {
    works.push_back(c.work);
    contest.names.push_back(c.name);
  }
  const auto rounds = run_by_turns(works, quick);
  for (std::size_t i = 0; i < works.size(); ++i)
    contest.seconds.push_back(median_seconds(rounds, i));
  std::printf("%s, %d thread%s\n", contest.shape.c_str(), threads, threads == 1 ? "" : "s");
  std::fflush(stdout);
  return contest;
}

template <class Mask>
Contest contest(const Case& c, int threads) {
  const auto p = Problem<float, Mask>::make(c);
  Executor* const executor = threads == 1 ? nullptr : &two_threads();
  std::vector<Contestant> contestants{
      {"naive Eigen", p->naive_forward()},
      {"standard form", p->forward(bench::Form::standard, executor)},
      {"surface form", p->forward(bench::Form::surface, executor)}};
  for (const Peer& peer : peers()) {
    contestants.push_back({peer.name, p->judged(bench::Form::standard, Pass::forward,
                                                peer.forward(peer_call(*p, threads)))});
  }
  return timed(c.name, threads, contestants);
}

Work both(Work first, Work second) {
  return [=] {
    first();
    second();
  };
}

Contest contest_of_both_passes(const Case& c, int threads) {
  const auto p = Problem<float>::make(c);
  Executor* const executor = threads == 1 ? nullptr : &two_threads();
  std::vector<Contestant> contestants{
      {"naive Eigen", both(p->naive_forward_with_weights(), p->naive_backward())}};
  for (const bench::Form form : {bench::Form::standard, bench::Form::surface}) {
    contestants.push_back({std::string(name_of(form)) + " form",
                           both(p->forward(form, executor), p->backward(form, executor))});
  }
  for (const Peer& peer : peers()) {
    if (!peer.both_passes) continue;
    contestants.push_back({peer.name, p->judged(bench::Form::standard, Pass::backward,
                                                peer.both_passes(peer_call(*p, threads)))});
  }
  return timed(std::string(c.name) + ", forward and backward", threads, contestants);
}

std::vector<Contest> all_contests() {
  std::vector<Contest> contests;
  for (const int threads : {1, 2}) {
    for (const Case& c : {shape_a, shape_b, shape_c, shape_d, shape_e, shape_f, shape_g}) {
      const bool causal = std::string("BC").find(c.name) != std::string::npos;
      contests.push_back(causal ? contest<CausalMask>(c, threads) : contest<NoMask>(c, threads));
    }
    contests.push_back(contest_of_both_passes(shape_a, threads));
  }
  return contests;
}

std::string milliseconds(double seconds) {
  const double ms = 1e3 * seconds;
  return formatted(ms < 0.1 ? "%.4f" : ms < 10 ? "%.2f" : "%.1f", ms);
}

std::vector<std::string> all_names() {
  std::vector<std::string> names{"naive Eigen", "standard form", "surface form"};
  for (const Peer& peer : peers()) names.emplace_back(peer.name);
  return names;
}

/// One line for each shape, milliseconds.
std::string contest_table(const std::vector<Contest>& contests) {
  std::string text = "| shape | threads |", rule = "|---|---|";
  for (const std::string& name : all_names()) {
    text += " " + name + " |";
    rule += "---|";
  }
  text += "\n" + rule + "\n";
  for (const Contest& c : contests) {
    text += "| " + c.shape + " | " + std::to_string(c.threads) + " |";
    for (const std::string& name : all_names()) {
      const auto found = std::find(c.names.begin(), c.names.end(), name);
      text += found == c.names.end()
                  ? " |"
                  : " " + milliseconds(c.seconds[std::size_t(found - c.names.begin())]) + " |";
    }
    text += "\n";
  }
  return text;
}

std::string row_table() {
  std::string text =
      "| what | ms | compared with | ms | ratio (quartiles) | at least "
      "|\n|---|---|---|---|---|---|\n";
  for (const Row& row : all_rows()) {
    const RowResult result = run(row, quick);
    text += "| " + row.name + " | " + milliseconds(result.ours) + " | " + row.other + " | " +
            milliseconds(result.other) + " | " + formatted("%.3f", result.ratio.median) + " (" +
            formatted("%.3f", result.ratio.low) + " – " + formatted("%.3f", result.ratio.high) +
            ") | " + verdict(row, result) + " |\n";
    std::printf("%s\n", row.name.c_str());
    std::fflush(stdout);
  }
  return text;
}

/// Bars of speed, naive Eigen code being 1, on a logarithmic scale from 0.5.
std::string bar_chart(const std::vector<Contest>& contests, const std::string& subtitle) {
  namespace svg = examples::svg_detail;
  using namespace examples::colour;
  const std::vector<std::string> colours{grey, blue, sky, orange, green, purple, vermilion};
  const std::vector<std::string> names = all_names();
  svg::Canvas canvas;
  canvas.text(30, 34, "Attention on this machine: speed against naive Eigen code", "title");
  canvas.text(30, 55, subtitle, "subtitle");
  for (std::size_t i = 0; i < names.size(); ++i) {
    canvas.rectangle(30 + 150 * double(i), 72, 12, 12, "fill=\"" + colours[i % 7] + "\"");
    canvas.text(47 + 150 * double(i), 83, names[i], "axis");
  }
  constexpr double left = 250, width = 740, bar = 11;
  const double most = 16;
  const auto position = [&](double speed) {
    return left + width * std::log(std::clamp(speed, 0.5, most) / 0.5) / std::log(most / 0.5);
  };
  double y = 110;
  for (const Contest& c : contests) {
    const std::string label = c.shape + (c.threads == 1 ? ", one thread" : ", two threads");
    canvas.text(left - 12, y + 0.5 * bar * double(c.names.size()) + 4, label, "axis", "end");
    for (std::size_t i = 0; i < c.names.size(); ++i, y += bar) {
      const double speed = c.seconds[0] / c.seconds[i];
      const auto name = std::find(names.begin(), names.end(), c.names[i]) - names.begin();
      canvas.rectangle(left, y, position(speed) - left, bar - 1.5,
                       "fill=\"" + colours[std::size_t(name) % 7] + "\"");
      canvas.text(position(speed) + 5, y + bar - 2.5,
                  formatted("%.2f", speed) + " (" + milliseconds(c.seconds[i]) + " ms)", "tick");
    }
    y += 12;
  }
  for (const double tick : {0.5, 1.0, 2.0, 4.0, 8.0, 16.0}) {
    canvas.segment(position(tick), 100, position(tick), y, examples::svg_detail::stroke(faint, 1));
    canvas.text(position(tick), y + 16, formatted("%g", tick), "tick", "middle");
  }
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1080\" height=\"" +
         formatted("%.0f", y + 40) + "\">\n" + svg::style_sheet +
         "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n" + canvas.body() + "</svg>\n";
}

void write(const std::string& file, const std::string& text) {
  std::ofstream stream(file, std::ios::binary);
  stream << text << std::flush;
  if (!stream) throw std::runtime_error(file + ": cannot be written");
  std::printf("wrote %s\n", file.c_str());
}

void report(const std::string& directory) {
  const std::string description = machine();
  const std::vector<Contest> contests = all_contests();
  write(directory + "/report.svg",
        bar_chart(contests, line_of("/proc/cpuinfo", "model name") + ", " SURFATTN_BENCH_COMPILER));
  write(
      directory + "/report.md",
      "# surfattn on this machine\n\n" + description +
          "\nA quick measurement: medians of few rounds, in which all codes run by turns.\n\n"
          "## Forward pass, float, milliseconds\n\n"
          "A: 8 heads, 1024 × 1024, d = 64; B: the same, causal; C: 2 heads, 4096 × 4096, d = 128, "
          "causal; D: 8 heads, 1 × 16,384, d = 128; E: 32 query heads on 4, 1 × 8192, d = 128; "
          "F: 64 sequences × 8 heads, 10 × 10, d = 256; G: 64 × 64, d = 64. Naive Eigen code and "
          "the library's surface form with V = K do the same work on every line; naive Eigen code "
          "always runs on one thread.\n\n" +
          contest_table(contests) + "\n## Against what it should be\n\n" + row_table() +
          "\n![speed against naive Eigen code](report.svg)\n");
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::fprintf(stderr, "usage: attention_report DIRECTORY\n");
    return 2;
  }
  try {
    report(words[1]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_report: %s\n", error.what());
    return 1;
  }
}

// Mistakes in arguments: each is reported in words that name the argument and the shapes, before
// anything is written, through a handler that the program may replace.

// clang-format off: this comes before all that includes Eigen
#include "support/eigen.hpp"
// clang-format on

#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using surfattn::Align;
using surfattn::attention;
using surfattn::attention_backward;
using surfattn::attention_backward_into;
using surfattn::attention_forward;
using surfattn::attention_forward_into;
using surfattn::attention_into;
using surfattn::BoolMask;
using surfattn::Forward;
using surfattn::Heads;
using surfattn::Index;
using surfattn::KeyLengths;
using surfattn::KeyPrior;
using surfattn::layer_backward;
using surfattn::layer_forward;
using surfattn::Matrix;
using surfattn::merge;
using surfattn::Options;
using surfattn::Pass;
using surfattn::project;
using surfattn::project_backward;
using surfattn::project_backward_into;
using surfattn::project_forward;
using surfattn::project_forward_into;
using surfattn::project_into;
using surfattn::RowVector;
using surfattn::SlidingWindow;
using surfattn::StandardWeights;
using surfattn::SurfaceOptions;
using surfattn::SurfaceWeights;
using surfattn::Workspace;
using surfattn::workspace_size;

using surfattn::test::contains_text;

using Rows = Matrix<double>;
using Words = std::initializer_list<const char*>;

constexpr double sentinel = -12345.5;
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

Rows ones(Index rows, Index cols) { return Rows::Ones(rows, cols); }
Rows unwritten(Index rows, Index cols) { return Rows::Constant(rows, cols, sentinel); }

bool is_unwritten(const Rows& matrix) { return (matrix.array() == sentinel).all(); }

/// What a call says when it throws; empty where it does not.
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void check_words(const std::string& message, Words words) {
  CAPTURE(message);
  CHECK_FALSE(message.empty());
  for (const char* part : words) CHECK_THAT(message, contains_text(part));
}

void check_error(Words words, const std::function<void()>& call) {
  check_words(message_of(call), words);
}

// ---- A valid call of every function, to be spoiled ---------------------------------------------

/// Two query heads of width 3 share one key head with values of width 2.
struct Standard {
  Options options{.heads = {.query = 2, .key_value = 1}};
  Rows queries = ones(4, 6), keys = ones(5, 3), values = ones(5, 2), grad_out = ones(4, 4);
  Forward<double> forward{ones(4, 4), ones(4, 2)};
  Rows out = unwritten(4, 4), log_sum_exp = unwritten(4, 2);
  Rows grad_queries = unwritten(4, 6), grad_keys = unwritten(5, 3), grad_values = unwritten(5, 2);
  std::size_t bytes = 1u << 22;

  bool untouched() const {
    return is_unwritten(out) && is_unwritten(log_sum_exp) && is_unwritten(grad_queries) &&
           is_unwritten(grad_keys) && is_unwritten(grad_values);
  }
};

/// The same in the surface form, with an explicit prior for all heads.
struct Surface {
  Rows prior = ones(5, 1);
  SurfaceOptions options{.heads = {.query = 2, .key_value = 1}, .prior = prior};
  Rows queries = ones(4, 6), keys = ones(5, 3), grad_out = ones(4, 6);
  Forward<double> forward{ones(4, 6), ones(4, 2)};
  Rows out = unwritten(4, 6), log_sum_exp = unwritten(4, 2);
  Rows grad_queries = unwritten(4, 6), grad_keys = unwritten(5, 3),
       grad_log_prior = unwritten(5, 1);
  double grad_bandwidth = sentinel;
  std::size_t bytes = 1u << 22;

  Surface() = default;
  Surface(const Surface&) = delete;  // the options hold a view of the prior

  bool untouched() const {
    return is_unwritten(out) && is_unwritten(log_sum_exp) && is_unwritten(grad_queries) &&
           is_unwritten(grad_keys) && is_unwritten(grad_log_prior) && grad_bandwidth == sentinel;
  }
};

template <class... Terms>
void call_attention(Standard& a, const Terms&... terms) {
  attention(a.queries, a.keys, a.values, a.options, terms...);
}
template <class... Terms>
void call_attention_forward(Standard& a, const Terms&... terms) {
  attention_forward(a.queries, a.keys, a.values, a.options, terms...);
}
template <class... Terms>
void call_attention_backward(Standard& a, const Terms&... terms) {
  attention_backward(a.queries, a.keys, a.values, a.forward, a.grad_out, a.options, terms...);
}
template <class... Terms>
void call_attention_into(Standard& a, const Terms&... terms) {
  attention_into(a.queries, a.keys, a.values, a.out, Workspace(a.bytes), a.options, terms...);
}
template <class... Terms>
void call_attention_forward_into(Standard& a, const Terms&... terms) {
  attention_forward_into(a.queries, a.keys, a.values, a.out, a.log_sum_exp, Workspace(a.bytes),
                         a.options, terms...);
}
template <class... Terms>
void call_attention_backward_into(Standard& a, const Terms&... terms) {
  attention_backward_into(a.queries, a.keys, a.values, a.forward.out, a.forward.log_sum_exp,
                          a.grad_out, a.grad_queries, a.grad_keys, a.grad_values,
                          Workspace(a.bytes), a.options, terms...);
}

template <class... Terms>
void call_project(Surface& a, const Terms&... terms) {
  project(a.queries, a.keys, a.options, terms...);
}
template <class... Terms>
void call_project_forward(Surface& a, const Terms&... terms) {
  project_forward(a.queries, a.keys, a.options, terms...);
}
template <class... Terms>
void call_project_backward(Surface& a, const Terms&... terms) {
  project_backward(a.queries, a.keys, a.forward, a.grad_out, a.options, terms...);
}
template <class... Terms>
void call_project_into(Surface& a, const Terms&... terms) {
  project_into(a.queries, a.keys, a.out, Workspace(a.bytes), a.options, terms...);
}
template <class... Terms>
void call_project_forward_into(Surface& a, const Terms&... terms) {
  project_forward_into(a.queries, a.keys, a.out, a.log_sum_exp, Workspace(a.bytes), a.options,
                       terms...);
}
template <class... Terms>
void call_project_backward_into(Surface& a, const Terms&... terms) {
  project_backward_into(a.queries, a.keys, a.forward.out, a.forward.log_sum_exp, a.grad_out,
                        a.grad_queries, a.grad_keys, a.grad_bandwidth, a.grad_log_prior,
                        Workspace(a.bytes), a.options, terms...);
}

/// A function and the name under which it reports.
template <class Arguments>
struct Function {
  const char* name;
  std::function<void(Arguments&)> call;
};

template <class... Terms>
std::vector<Function<Standard>> standard_functions(Terms... terms) {
  using A = Standard;
  return {
      {"surfattn::attention:", [=](A& a) { call_attention(a, terms...); }},
      {"surfattn::attention:", [=](A& a) { call_attention_into(a, terms...); }},
      {"surfattn::attention_forward:", [=](A& a) { call_attention_forward(a, terms...); }},
      {"surfattn::attention_forward:", [=](A& a) { call_attention_forward_into(a, terms...); }},
      {"surfattn::attention_backward:", [=](A& a) { call_attention_backward(a, terms...); }},
      {"surfattn::attention_backward:", [=](A& a) { call_attention_backward_into(a, terms...); }}};
}

template <class... Terms>
std::vector<Function<Surface>> surface_functions(Terms... terms) {
  using A = Surface;
  return {{"surfattn::project:", [=](A& a) { call_project(a, terms...); }},
          {"surfattn::project:", [=](A& a) { call_project_into(a, terms...); }},
          {"surfattn::project_forward:", [=](A& a) { call_project_forward(a, terms...); }},
          {"surfattn::project_forward:", [=](A& a) { call_project_forward_into(a, terms...); }},
          {"surfattn::project_backward:", [=](A& a) { call_project_backward(a, terms...); }},
          {"surfattn::project_backward:", [=](A& a) { call_project_backward_into(a, terms...); }}};
}

/// Spoils the arguments of each function: all must report it in these words, and write nothing.
template <class Arguments>
void check_all(const std::vector<Function<Arguments>>& functions,
               const std::function<void(Arguments&)>& spoil, Words words) {
  for (const auto& function : functions) {
    Arguments arguments;
    spoil(arguments);
    INFO(function.name);
    check_error(words, [&] { function.call(arguments); });
    check_error({function.name}, [&] { function.call(arguments); });
    CHECK(arguments.untouched());
  }
}

void check_standard(const std::function<void(Standard&)>& spoil, Words words) {
  check_all(standard_functions(), spoil, words);
}

void check_surface(const std::function<void(Surface&)>& spoil, Words words) {
  check_all(surface_functions(), spoil, words);
}

template <class Arguments>
void check_valid(const std::vector<Function<Arguments>>& functions) {
  for (const auto& function : functions) {
    INFO(function.name);
    Arguments arguments;
    CHECK(message_of([&] { function.call(arguments); }) == "");
  }
}

TEST_CASE("The arguments that the tests spoil are valid at first", "[errors]") {
  check_valid(standard_functions());
  check_valid(surface_functions());
}

// ---- Shapes of inputs and heads ----------------------------------------------------------------

TEST_CASE("Queries, keys and values of the standard form must fit together", "[errors]") {
  using A = Standard;
  check_standard([](A& a) { a.queries = ones(4, 7); }, {"queries is 4×7", "2 query heads"});
  check_standard([](A& a) { a.queries = ones(4, 8); },
                 {"keys must be as wide per head as queries", "queries is 4×8", "keys is 5×3"});
  check_standard([](A& a) { a.keys = ones(5, 2); },
                 {"keys must be as wide per head as queries", "queries is 4×6", "keys is 5×2"});
  check_standard([](A& a) { a.values = ones(6, 2); },
                 {"values must have one row for each key", "values is 6×2", "keys is 5×3"});
  check_standard(
      [](A& a) {
        a.options.heads = {2, 2};
        a.keys = ones(5, 6);
        a.values = ones(5, 3);
      },
      {"values is 5×3", "2 key/value heads"});
}

TEST_CASE("Queries and keys of the surface form must fit together", "[errors]") {
  using A = Surface;
  check_surface([](A& a) { a.queries = ones(4, 7); }, {"queries is 4×7", "2 query heads"});
  check_surface([](A& a) { a.keys = ones(5, 4); },
                {"keys must be as wide per head as queries", "queries is 4×6", "keys is 5×4"});
}

TEST_CASE("Query heads are a positive multiple of key/value heads", "[errors]") {
  const struct {
    Heads heads;
    const char* words;
  } cases[] = {{{3, 2}, "3 and 2"}, {{2, 4}, "2 and 4"},   {{0, {}}, "0 and 0"},
               {{2, 0}, "2 and 0"}, {{-2, 1}, "-2 and 1"}, {{2, -1}, "2 and -1"}};
  for (const auto& each : cases) {
    check_standard([&](Standard& a) { a.options.heads = each.heads; },
                   {"heads.query", "multiple of heads.key_value", each.words});
    check_surface([&](Surface& a) { a.options.heads = each.heads; },
                  {"heads.query", "multiple of heads.key_value", each.words});
  }
}

TEST_CASE("workspace_size, too, reports shapes that do not fit", "[errors]") {
  check_error({"surfattn::workspace_size:", "queries is 4×6", "keys is 5×2"}, [] {
    workspace_size(Pass::forward, ones(4, 6), ones(5, 2), ones(5, 2), Options{.heads = {2, 1}});
  });
  check_error({"surfattn::workspace_size:", "queries is 4×6", "keys is 5×2"}, [] {
    workspace_size(Pass::backward, ones(4, 6), ones(5, 2), SurfaceOptions{.heads = {2, 1}});
  });
}

// ---- Shapes of outputs and of what the backward pass is given ----------------------------------

template <class Arguments>
void check_one(void (*call)(Arguments&), const std::function<void(Arguments&)>& spoil,
               Words words) {
  Arguments arguments;
  spoil(arguments);
  check_error(words, [&] { call(arguments); });
  CHECK(arguments.untouched());
}

TEST_CASE("Outputs of the standard form must have their shapes", "[errors]") {
  using A = Standard;
  for (const auto call : {call_attention_into<>, call_attention_forward_into<>}) {
    check_one<A>(call, [](A& a) { a.out = unwritten(4, 6); }, {"out is 4×6", "must be 4×4"});
    check_one<A>(call, [](A& a) { a.out.resize(0, 0); }, {"out is 0×0", "must be 4×4"});
  }
  check_one<A>(call_attention_forward_into, [](A& a) { a.log_sum_exp = unwritten(2, 4); },
               {"log_sum_exp is 2×4", "must be 4×2"});
  const auto backward = call_attention_backward_into<>;
  check_one<A>(backward, [](A& a) { a.grad_queries = unwritten(6, 4); },
               {"grad_queries is 6×4", "must be 4×6"});
  check_one<A>(backward, [](A& a) { a.grad_keys = unwritten(5, 6); },
               {"grad_keys is 5×6", "must be 5×3"});
  check_one<A>(backward, [](A& a) { a.grad_values = unwritten(4, 2); },
               {"grad_values is 4×2", "must be 5×2"});
}

TEST_CASE("Outputs of the surface form must have their shapes", "[errors]") {
  using A = Surface;
  for (const auto call : {call_project_into<>, call_project_forward_into<>}) {
    check_one<A>(call, [](A& a) { a.out = unwritten(4, 4); }, {"out is 4×4", "must be 4×6"});
  }
  check_one<A>(call_project_forward_into, [](A& a) { a.log_sum_exp = unwritten(4, 1); },
               {"log_sum_exp is 4×1", "must be 4×2"});
  const auto backward = call_project_backward_into<>;
  check_one<A>(backward, [](A& a) { a.grad_queries = unwritten(4, 3); },
               {"grad_queries is 4×3", "must be 4×6"});
  check_one<A>(backward, [](A& a) { a.grad_keys = unwritten(6, 3); },
               {"grad_keys is 6×3", "must be 5×3"});
  check_one<A>(backward, [](A& a) { a.grad_log_prior = unwritten(5, 2); },
               {"grad_log_prior is 5×2", "must be 5×1"});
  check_one<A>(backward, [](A& a) { a.grad_log_prior = unwritten(6, 1); },
               {"grad_log_prior is 6×1", "must be 5×1"});
}

TEST_CASE("The backward pass needs the forward pass of the same problem", "[errors]") {
  for (const auto call : {call_attention_backward<>, call_attention_backward_into<>}) {
    using A = Standard;
    check_one<A>(call, [](A& a) { a.forward.out = ones(3, 4); },
                 {"forward.out is 3×4", "must be 4×4"});
    check_one<A>(call, [](A& a) { a.forward.log_sum_exp = ones(4, 1); },
                 {"forward.log_sum_exp is 4×1", "must be 4×2"});
    check_one<A>(call, [](A& a) { a.grad_out = ones(4, 6); }, {"grad_out is 4×6", "must be 4×4"});
  }
  for (const auto call : {call_project_backward<>, call_project_backward_into<>}) {
    using A = Surface;
    check_one<A>(call, [](A& a) { a.forward.out = ones(4, 3); },
                 {"forward.out is 4×3", "must be 4×6"});
    check_one<A>(call, [](A& a) { a.forward.log_sum_exp = ones(5, 2); },
                 {"forward.log_sum_exp is 5×2", "must be 4×2"});
    check_one<A>(call, [](A& a) { a.grad_out = ones(5, 6); }, {"grad_out is 5×6", "must be 4×6"});
  }
}

TEST_CASE("A workspace must have its size", "[errors]") {
  check_one<Standard>(call_attention_forward_into, [](Standard& a) { a.bytes = 100; },
                      {"workspace has 100 bytes", "workspace_size"});
  check_one<Standard>(call_attention_backward_into, [](Standard& a) { a.bytes = 0; },
                      {"workspace has 0 bytes", "workspace_size"});
  check_one<Surface>(call_project_into, [](Surface& a) { a.bytes = 100; },
                     {"workspace has 100 bytes", "workspace_size"});
  check_one<Surface>(call_project_backward_into, [](Surface& a) { a.bytes = 100; },
                     {"workspace has 100 bytes", "workspace_size"});
}

// ---- Scale, bandwidth and prior ----------------------------------------------------------------

TEST_CASE("The scale of the standard form must be finite", "[errors]") {
  for (const double scale : {not_a_number, infinity, -infinity}) {
    check_standard([&](Standard& a) { a.options.scale = scale; }, {"scale must be finite"});
  }
  for (const double scale : {0.0, -2.0}) {
    Standard a;
    a.options.scale = scale;
    CHECK(message_of([&] { call_attention(a); }) == "");
  }
}

TEST_CASE("Bandwidth and scale of the surface form must be positive and finite", "[errors]") {
  for (const double number : {0.0, -0.0, -1.5, not_a_number, infinity, -infinity}) {
    check_surface([&](Surface& a) { a.options.bandwidth = number; },
                  {"bandwidth must be positive and finite"});
    check_surface([&](Surface& a) { a.options.scale = number; },
                  {"scale must be positive and finite"});
  }
  check_surface([](Surface& a) { a.options.bandwidth = -1.5; }, {"but is -1.5"});
}

TEST_CASE("Scale and bandwidth are two words for one thing", "[errors]") {
  check_surface(
      [](Surface& a) {
        a.options.scale = 1.0;
        a.options.bandwidth = 1.0;
      },
      {"scale or bandwidth, not both"});
}

TEST_CASE("An explicit prior must have a row for each key, in the scalar type of the queries",
          "[errors]") {
  const struct {
    Rows prior;
    const char* words;
  } cases[] = {{ones(4, 1), "prior is 4×1"},
               {ones(5, 2), "prior is 5×2"},
               {ones(1, 5), "prior is 1×5"},
               {ones(0, 0), "prior is 0×0"}};
  for (const auto& each : cases) {
    check_surface([&](Surface& a) { a.options.prior = each.prior; },
                  {each.words, "must be 5×1", "keys is 5×3"});
  }
  const Matrix<float> of_floats = Matrix<float>::Ones(5, 1);
  check_surface([&](Surface& a) { a.options.prior = of_floats; },
                {"prior", "same scalar type as queries"});
}

// ---- Terms -------------------------------------------------------------------------------------

template <class Term>
void check_term(const Term& term, Words words) {
  check_all<Standard>(
      standard_functions(term), [](Standard&) {}, words);
  check_all<Surface>(
      surface_functions(term), [](Surface&) {}, words);
}

TEST_CASE("A window must name its alignment where queries and keys differ, and reach forward",
          "[errors]") {
  check_term(SlidingWindow{.left = 1},
             {"SlidingWindow must name its alignment", "queries is 4×6", "keys is 5×3"});
  check_term(SlidingWindow{.left = -1, .align = Align::top_left}, {"SlidingWindow", "left is -1"});
  check_term(SlidingWindow{.right = -2, .align = Align::top_left},
             {"SlidingWindow", "right is -2"});
}

TEST_CASE("KeyLengths must lie between none and all keys", "[errors]") {
  check_term(KeyLengths{6}, {"KeyLengths", "is 6", "keys is 5×3"});
  check_term(KeyLengths{-1}, {"KeyLengths", "is -1", "keys is 5×3"});
}

TEST_CASE("A dense mask must have a row for each query and a column for each key", "[errors]") {
  const Matrix<bool> mask = Matrix<bool>::Constant(5, 4, true);
  check_term(BoolMask{mask}, {"BoolMask is 5×4", "must be 4×5"});
}

// ---- Layers ------------------------------------------------------------------------------------

/// x: 4×6, y: 5×7, two query heads on one key head of width 3, values of width 2, output 8 wide.
StandardWeights<double> standard_weights() {
  return {.query = ones(6, 6),
          .key = ones(7, 3),
          .value = ones(7, 2),
          .output = ones(4, 8),
          .heads = {2, 1}};
}

SurfaceWeights<double> surface_weights() {
  return {.metric = ones(6, 14), .readout = ones(14, 8), .heads = 2, .scale = 0.5};
}

/// Both passes and, for standard weights, the merge.
template <class Weights>
void check_weights(const std::function<void(Weights&)>& spoil, Words words) {
  const Rows x = ones(4, 6), y = ones(5, 7);
  Weights weights;
  if constexpr (std::is_same_v<Weights, StandardWeights<double>>) {
    weights = standard_weights();
  } else {
    weights = surface_weights();
  }
  const auto forward = layer_forward(x, y, weights);
  spoil(weights);
  check_error(words, [&] { layer_forward(x, y, weights); });
  check_error({"surfattn::layer_forward:"}, [&] { layer_forward(x, y, weights); });
  check_error(words, [&] { layer_backward(x, y, weights, forward, ones(4, 8)); });
  check_error({"surfattn::layer_backward:"},
              [&] { layer_backward(x, y, weights, forward, ones(4, 8)); });
  if constexpr (std::is_same_v<Weights, StandardWeights<double>>) {
    check_error(words, [&] { merge(weights); });
    check_error({"surfattn::merge:"}, [&] { merge(weights); });
  }
}

TEST_CASE("The weights of a standard layer must fit together", "[errors]") {
  using W = StandardWeights<double>;
  const auto check = check_weights<W>;
  check([](W& w) { w.heads = {3, 2}; }, {"heads.query", "3 and 2"});
  check([](W& w) { w.key = ones(7, 4); }, {"keys must be as wide per head as queries"});
  check([](W& w) { w.value = ones(6, 2); }, {"weights.value is 6×2", "must be 7×2"});
  check([](W& w) { w.output = ones(2, 8); }, {"weights.output is 2×8", "must be 4×8"});
  const RowVector<double> nine = RowVector<double>::Ones(9);
  check([&](W& w) { w.query_bias = nine; }, {"weights.query_bias is 1×9", "must be 1×6"});
  check([&](W& w) { w.key_bias = nine; }, {"weights.key_bias is 1×9", "must be 1×3"});
  check([&](W& w) { w.value_bias = nine; }, {"weights.value_bias is 1×9", "must be 1×2"});
  check([&](W& w) { w.output_bias = nine; }, {"weights.output_bias is 1×9", "must be 1×8"});
  check([](W& w) { w.scale = not_a_number; }, {"weights.scale must be finite"});
}

TEST_CASE("The weights of a surface layer must fit together", "[errors]") {
  using W = SurfaceWeights<double>;
  const auto check = check_weights<W>;
  check([](W& w) { w.heads = 4; }, {"weights.metric is 6×14", "4 heads"});
  check([](W& w) { w.heads = 0; }, {"weights.metric is 6×14", "0 heads"});
  check([](W& w) { w.readout = ones(7, 8); }, {"weights.readout is 7×8", "must be 14×8"});
  const RowVector<double> nine = RowVector<double>::Ones(9);
  check([&](W& w) { w.metric_bias = nine; }, {"weights.metric_bias is 1×9", "must be 1×14"});
  check([&](W& w) { w.output_bias = nine; }, {"weights.output_bias is 1×9", "must be 1×8"});
  check([](W& w) { w.readout_bias = ones(1, 8); }, {"weights.readout_bias is 1×8", "must be 2×8"});
  for (const double scale : {0.0, -1.0, not_a_number, infinity}) {
    check([&](W& w) { w.scale = scale; }, {"weights.scale must be positive and finite"});
  }
}

TEST_CASE("No bandwidth has a negative scale, so such weights do not merge", "[errors]") {
  auto weights = standard_weights();
  weights.scale = -1;
  check_error({"surfattn::merge:", "weights.scale must be positive"}, [&] { merge(weights); });
}

template <class Weights>
void check_layer_inputs(const Weights& weights) {
  const Rows x = ones(4, 6), y = ones(5, 7), grad_out = ones(4, 8);
  const auto forward = layer_forward(x, y, weights);
  check_error({"surfattn::layer_forward:", "x is 4×5", "must be 4×6"},
              [&] { layer_forward(ones(4, 5), y, weights); });
  check_error({"surfattn::layer_forward:", "y is 5×6", "must be 5×7"},
              [&] { layer_forward(x, ones(5, 6), weights); });
  check_error({"surfattn::layer_backward:", "x is 4×5", "must be 4×6"},
              [&] { layer_backward(ones(4, 5), y, weights, forward, grad_out); });
  check_error({"surfattn::layer_backward:", "y is 5×6", "must be 5×7"},
              [&] { layer_backward(x, ones(5, 6), weights, forward, grad_out); });
  check_error({"surfattn::layer_backward:", "grad_out is 4×6", "must be 4×8"},
              [&] { layer_backward(x, y, weights, forward, ones(4, 6)); });
}

TEST_CASE("The inputs of a layer must fit its weights", "[errors]") {
  check_layer_inputs(standard_weights());
  check_layer_inputs(surface_weights());
}

/// What was computed from other inputs has other shapes, which matrix products must never meet.
template <class Weights>
void check_layer_forward(const Weights& weights) {
  const Rows x = ones(4, 6), y = ones(5, 7), grad_out = ones(4, 8);
  const auto fewer_queries = layer_forward(x.topRows(3), y, weights);
  const auto fewer_keys = layer_forward(x, y.topRows(3), weights);
  check_error({"4×", "3×"}, [&] { layer_backward(x, y, weights, fewer_queries, grad_out); });
  if constexpr (std::is_same_v<Weights, StandardWeights<double>>) {
    check_error({"5×", "3×"}, [&] { layer_backward(x, y, weights, fewer_keys, grad_out); });
  }
}

TEST_CASE("The backward pass of a layer needs its forward pass of the same inputs", "[errors]") {
  check_layer_forward(standard_weights());
  check_layer_forward(surface_weights());
}

// ---- The handler -------------------------------------------------------------------------------

struct Reported {
  std::string message;
};

[[noreturn]] void throw_reported(const std::string& message) { throw Reported{message}; }

/// A failed check must not leave the replaced handler to the tests after it.
struct DefaultHandlerAgain {
  ~DefaultHandlerAgain() { surfattn::set_error_handler(nullptr); }
};

std::string reported_message() {
  try {
    attention(ones(4, 3), ones(5, 2), ones(5, 2));
  } catch (const Reported& reported) {
    return reported.message;
  }
  return "";
}

TEST_CASE("A replaced error handler gets the message, until the one before it is back",
          "[errors]") {
  const DefaultHandlerAgain at_the_end;
  const auto before = surfattn::set_error_handler(throw_reported);
  CHECK(before == &surfattn::default_error_handler);
  check_words(reported_message(), {"surfattn::attention:", "queries is 4×3", "keys is 5×2"});

  CHECK(surfattn::set_error_handler(before) == &throw_reported);
  check_error({"queries is 4×3"}, [] { attention(ones(4, 3), ones(5, 2), ones(5, 2)); });

  surfattn::set_error_handler(throw_reported);
  CHECK(surfattn::set_error_handler(nullptr) == &throw_reported);
  check_error({"queries is 4×3"}, [] { attention(ones(4, 3), ones(5, 2), ones(5, 2)); });
}

}  // namespace

// ---- Numbers that are fine in double and not in the precision of the call -------------------------

TEST_CASE("A scale must be usable in the precision of the call", "[errors]") {
  const surfattn::Matrix<float> x = surfattn::Matrix<float>::Ones(3, 2);
  for (const double bandwidth : {1e-25, 1e20, 1e25}) {
    check_error({"scale", "precision of queries"},
                [&] { surfattn::project(x, x, {.bandwidth = bandwidth}); });
  }
  check_error({"scale", "precision of queries"},
              [&] { surfattn::attention(x, x, x, {.scale = 1e300}); });
}

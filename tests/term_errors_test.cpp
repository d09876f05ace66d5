// Mistakes in the arguments of terms: each is one error in words, before anything is written; and no term allocates.

// clang-format off: this comes before Eigen
#include "support/no_allocation.hpp"
// clang-format on

#include <functional>

#include "support/same_bits.hpp"
#include "support/terms.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

using Rows = Matrix<double>;
using Words = std::initializer_list<const char*>;

constexpr double sentinel = -12345.5;

Rows ones(Index rows, Index cols) { return Rows::Ones(rows, cols); }
Rows unwritten(Index rows, Index cols) { return Rows::Constant(rows, cols, sentinel); }

/// Two query heads of width 3 share one key head, in both forms.
struct Call {
  Rows queries = ones(4, 6), keys = ones(5, 3), grad_out = ones(4, 6),
       log_sum_exp_before = ones(4, 2);
  Rows out = unwritten(4, 6), log_sum_exp = unwritten(4, 2), grad_queries = unwritten(4, 6),
       grad_keys = unwritten(5, 3), grad_values = unwritten(5, 3), grad_prior = unwritten(5, 1);
  double grad_bandwidth = sentinel;
  Workspace workspace{1u << 22};
  Options options{.heads = {.query = 2, .key_value = 1}};
  SurfaceOptions surface_options{.heads = {.query = 2, .key_value = 1}};

  bool untouched() const {
    for (const Rows* m :
         {&out, &log_sum_exp, &grad_queries, &grad_keys, &grad_values, &grad_prior}) {
      if (!(m->array() == sentinel).all()) return false;
    }
    return grad_bandwidth == sentinel;
  }

  void forward(const AnyTerm<double>& term) {
    attention_forward_into(queries, keys, keys, out, log_sum_exp, workspace, options, term);
  }
  void backward(const AnyTerm<double>& term) {
    attention_backward_into(queries, keys, keys, grad_out, log_sum_exp_before, grad_out,
                            grad_queries, grad_keys, grad_values, workspace, options, term);
  }
  void project_forward(const AnyTerm<double>& term) {
    project_forward_into(queries, keys, out, log_sum_exp, workspace, surface_options, term);
  }
  void project_backward(const AnyTerm<double>& term) {
    project_backward_into(queries, keys, grad_out, log_sum_exp_before, grad_out, grad_queries,
                          grad_keys, grad_bandwidth, grad_prior, workspace, surface_options, term);
  }
  void size(const AnyTerm<double>& term) {
    static_cast<void>(workspace_size(Pass::backward, queries, keys, keys, options, term));
  }
};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void check_term(const AnyTerm<double>& term, Words words) {
  using Function = void (Call::*)(const AnyTerm<double>&);
  const std::pair<Function, const char*> functions[] = {
      {&Call::forward, "attention_forward: "},
      {&Call::backward, "attention_backward: "},
      {&Call::project_forward, "project_forward: "},
      {&Call::project_backward, "project_backward: "},
      {&Call::size, "workspace_size: "}};
  for (const auto& [function, name] : functions) {
    Call call;
    const std::string message = message_of([&, f = function] { (call.*f)(term); });
    CAPTURE(message);
    CHECK_THAT(message, contains_text(name));
    for (const char* part : words) CHECK_THAT(message, contains_text(part));
    CHECK(call.untouched());
  }
}

}  // namespace

TEST_CASE("A cap must be positive and finite", "[errors]") {
  for (const double cap : {0.0, -1.0, std::numeric_limits<double>::infinity(),
                           std::numeric_limits<double>::quiet_NaN()})
    check_term({SoftCap{cap}}, {"the cap of SoftCap must be positive and finite"});
}

TEST_CASE("A bias must have the shape of the scores", "[errors]") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{5, 4}, {4, 6}, {2, 5}, {8, 5}, {0, 0}}) {
    const Rows bias = ones(rows, cols);
    check_term({AdditiveBias{bias}}, {"AdditiveBias is", "must be 4×5 or 4×10"});
  }
  const Rows bias = ones(4, 10);
  Rows gradient = unwritten(4, 5);
  check_term({AdditiveBias{bias}.gradient_into(gradient)},
             {"the gradient of AdditiveBias is 4×5", "must be 4×10"});
  CHECK((gradient.array() == sentinel).all());
}

TEST_CASE("Parameters of heads must be one for each query head", "[errors]") {
  const Rows one = ones(1, 1), three = ones(3, 1), two = ones(2, 1), times = ones(4, 1),
             later = ones(5, 1);
  for (const Rows* wrong : {&one, &three}) {
    check_term({Alibi{*wrong, Align::top_left}}, {"Alibi", "each query head, 1×2 or 2×1"});
    check_term({Temperature{*wrong}}, {"Temperature", "each query head, 1×2 or 2×1"});
    check_term({Sink{*wrong}}, {"Sink", "each query head, 1×2 or 2×1"});
    check_term({TimeDecay{*wrong, times, later}}, {"TimeDecay", "each query head, 1×2 or 2×1"});
  }
  Rows gradient = unwritten(1, 2);
  check_term({Sink{two}.gradient_into(gradient)}, {"the gradient of Sink is 1×2", "must be 2×1"});
  check_term({TimeDecay{two, later, later}}, {"query_times", "must be 4×1 or 1×4", "is 5×1"});
  check_term({TimeDecay{two, times, times}}, {"key_times", "must be 5×1 or 1×5", "is 4×1"});
}

TEST_CASE("A term that counts positions must name its alignment", "[errors]") {
  const Rows slopes = ones(2, 1), table = ones(8, 2), gates = ones(5, 2);
  check_term({Alibi{slopes}}, {"Alibi must name its alignment", "queries is 4×6", "keys is 5×3"});
  check_term({RelativePositionBias{table}}, {"RelativePositionBias must name its alignment"});
  check_term({ForgetGate{gates}}, {"ForgetGate must name its alignment"});
}

TEST_CASE("A table of relative positions needs columns, buckets and a distance", "[errors]") {
  const Rows one_head = ones(8, 1), few = ones(3, 2), table = ones(8, 2);
  const Align align = Align::top_left;
  check_term({RelativePositionBias{one_head, {.align = align}}},
             {"RelativePositionBias must have one column for each query head", "8×1", "2 heads"});
  check_term({RelativePositionBias{few, {.align = align}}}, {"at least 4 rows of buckets", "3×2"});
  check_term({RelativePositionBias{table, {.max_distance = 2, .align = align}}},
             {"max_distance of RelativePositionBias must exceed the 2", "but it is 2"});
}

TEST_CASE("Forget gates must cover every position", "[errors]") {
  const Rows wrong = ones(4, 2), heads = ones(5, 3);
  check_term({ForgetGate{wrong, Align::top_left}}, {"ForgetGate is 4×2", "must be 5×2 or 5×1"});
  check_term({ForgetGate{heads, Align::top_left}}, {"ForgetGate is 5×3"});
  const Rows queries = ones(5, 2), keys = ones(4, 2), gates = ones(4, 1);
  const auto message = [&](Align align) {
    return message_of([&] {
      attention(queries, keys, keys, {}, AnyTerm<double>{ForgetGate{gates, align}});
    });
  };
  for (const Align align : {Align::top_left, Align::bottom_right})
    CHECK_THAT(message(align), contains_text("a gate at the position of every query"));
}

TEST_CASE("The probability of a dropout must lie in [0, 1)", "[errors]") {
  for (const double p : {-0.1, 1.0, 1.5, std::numeric_limits<double>::quiet_NaN()})
    check_term({Dropout{.probability = p}}, {"the probability of Dropout must lie in [0, 1)"});
  check_term({Dropout{.probability = 0.5, .first_sequence = -1}}, {"sequence is -1"});
}

TEST_CASE("A bias that sequences of different lengths would share is an error", "[errors]") {
  const Rows tokens = ones(6, 2), bias = ones(2, 4);
  const std::array<Index, 3> query_offsets{0, 2, 6}, key_offsets{0, 4, 6};
  const Options options{.heads = {2, 2}, .sequences = {query_offsets, key_offsets}};
  const auto message = message_of(
      [&] { attention(tokens, tokens, tokens, options, AnyTerm<double>{AdditiveBias{bias}}); });
  CHECK_THAT(message, contains_text("these differ in length"));
}

TEST_CASE("A workspace that was made without a term is too small for its gradient", "[errors]") {
  Call call;
  const Rows table = ones(32, 2);
  Rows gradient = unwritten(32, 2);
  const auto term = RelativePositionBias{table, {.align = Align::top_left}}.gradient_into(gradient);
  const auto backward = [&](std::size_t bytes) {
    attention_backward_into(call.queries, call.keys, call.keys, call.grad_out,
                            call.log_sum_exp_before, call.grad_out, call.grad_queries,
                            call.grad_keys, call.grad_values, Workspace(bytes), call.options, term);
  };
  const std::size_t without =
      workspace_size(Pass::backward, call.queries, call.keys, call.keys, call.options);
  const std::size_t with =
      workspace_size(Pass::backward, call.queries, call.keys, call.keys, call.options, term);
  CHECK(with > without);
  CHECK_THAT(message_of([&] { backward(with - 1); }), contains_text("workspace has"));
  CHECK(call.untouched());
  CHECK((gradient.array() == sentinel).all());
  CHECK(message_of([&] { backward(with); }) == "");
  CHECK_FALSE((gradient.array() == sentinel).any());
}

TEST_CASE("No term allocates, forward or backward", "[storage]") {
  std::mt19937_64 random = seeded_random();
  for (int kind = 0; kind < term_kinds; ++kind) {
    const Sizes sizes{4, 5, 3, 3, 2, 1};
    TermCase<double> term(TermKind(kind), sizes, random);
    INFO(name_of(TermKind(kind)));
    const AnyTerm<double> directed = term.term().gradient_into(term.gradient);
    Call call;
    const std::size_t bytes = std::max(
        workspace_size(Pass::backward, call.queries, call.keys, call.keys, call.options, directed),
        workspace_size(Pass::backward, call.queries, call.keys, call.surface_options, directed));
    call.workspace = Workspace(bytes);
    std::size_t count = 0;
    {
      const NoAllocation watch;
      call.forward(directed);
      call.backward(directed);
      call.project_forward(directed);
      call.project_backward(directed);
      count = watch.count();
    }
    CHECK(count == 0);
    CHECK_FALSE((call.grad_keys.array() == sentinel).any());
  }
}

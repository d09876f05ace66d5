// Decay, sinks and dropout, each by itself in its own type, through the laws of terms.
#include "support/term_laws.hpp"

using namespace surfattn;
using namespace surfattn::test;

TEST_CASE("ForgetGate keeps the laws of terms, for each head and for all") {
  check_term_type<double, long double, ForgetGate<double>>(
      {TermKind::forget_gate, TermKind::shared_forget_gate});
}

TEST_CASE("TimeDecay keeps the laws of terms") {
  check_term_type<double, long double, TimeDecay<double, double>>({TermKind::time_decay});
}

TEST_CASE("Sink keeps the laws of terms") {
  check_term_type<double, long double, Sink<double>>({TermKind::sink});
}

TEST_CASE("Dropout keeps the laws of terms") {
  check_term_type<double, long double, Dropout>({TermKind::dropout});
}

// Each bias by itself, in its own type, through the laws of terms.
#include "support/term_laws.hpp"

using namespace surfattn;
using namespace surfattn::test;

TEST_CASE("AdditiveBias keeps the laws of terms, in every layout") {
  check_term_type<double, long double, AdditiveBias<double>>(
      {TermKind::bias, TermKind::bias_of_heads, TermKind::bias_row, TermKind::bias_row_of_heads,
       TermKind::bias_with_holes});
}

TEST_CASE("Alibi keeps the laws of terms") {
  check_term_type<double, long double, Alibi<double>>({TermKind::alibi});
}

TEST_CASE("RelativePositionBias keeps the laws of terms, both ways and backwards") {
  check_term_type<double, long double, RelativePositionBias<double>>(
      {TermKind::relative_both_ways, TermKind::relative_backwards});
}

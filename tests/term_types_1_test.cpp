// Each modifier by itself, in its own type, through the laws of terms.
#include "support/term_laws.hpp"

using namespace surfattn;
using namespace surfattn::test;

TEST_CASE("SoftCap keeps the laws of terms") {
  check_term_type<double, long double, SoftCap>({TermKind::soft_cap});
}

TEST_CASE("Temperature keeps the laws of terms") {
  check_term_type<double, long double, Temperature<double>>({TermKind::temperature});
}

TEST_CASE("a modifier of the user's keeps the laws of terms") {
  check_term_type<double, long double, Modifier<Bend>>({TermKind::modifier});
}

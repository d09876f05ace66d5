// Random compositions of terms in float.
#include "support/term_laws.hpp"

TEST_CASE("100 random compositions of up to four terms keep all laws in float") {
  surfattn::test::check_random_compositions<float, double>(100, 4);
}

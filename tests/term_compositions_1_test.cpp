// Random compositions of terms in double, part 1 of 3.
#include "support/term_laws.hpp"

TEST_CASE("100 random compositions of up to four terms keep all laws in double, part 1") {
  surfattn::test::check_random_compositions<double, long double>(100, 1);
}

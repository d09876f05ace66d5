#include "support/accuracy.hpp"

using namespace surfattn::test;

TEST_CASE(
    "both forms in long double agree with the reference in long double to the rounding floor") {
  check_odd_sizes<long double, long double>(1e6);
}

#include "support/accuracy.hpp"

using namespace surfattn::test;

TEST_CASE("both forms are as accurate as a plain evaluation: double against long double") {
  check_odd_sizes<double, long double>(4e6);
}

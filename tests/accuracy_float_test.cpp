#include "support/accuracy.hpp"

using namespace surfattn::test;

TEST_CASE("both forms are as accurate as a plain evaluation: float against double") {
  check_odd_sizes<float, double>(2e7);
}

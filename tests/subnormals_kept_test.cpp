// A program may keep subnormal numbers.
#define SURFATTN_SUBNORMALS_AS_ZEROS 0
#include <surfattn/surfattn.hpp>

#include "support/catch.hpp"

using namespace surfattn;

TEST_CASE("subnormal values are averaged like others") {
  // all scores are 0 and all weights 1: nothing is rounded
  constexpr float subnormal = 0x1p-140f;
  const Matrix<float> queries = Matrix<float>::Zero(32, 8),
                      values = Matrix<float>::Constant(32, 8, subnormal);
  CHECK((attention(queries, queries, values).array() == subnormal).all());
  CHECK((attention(queries.topRows(1), queries, values).array() == subnormal).all());
}

#include "support/suite.hpp"

// As far as the library computes with them.
namespace {
const bool added = (surfattn::bench::add_suite<Eigen::bfloat16>("bfloat16"),
                    surfattn::bench::add_suite<Eigen::half>("half"), true);
}  // namespace

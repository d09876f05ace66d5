#include "support/suite.hpp"

namespace {
const bool added = (surfattn::bench::add_suite<float>("float"), true);
}  // namespace

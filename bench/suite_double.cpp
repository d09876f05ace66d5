#include "support/suite.hpp"

namespace {
const bool added = (surfattn::bench::add_suite<double>("double"), true);
}  // namespace

#include "support/engine.hpp"

namespace surfattn::detail {
SURFATTN_TEST_ENGINE();
}

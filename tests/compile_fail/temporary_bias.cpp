// expect: deleted
// A bias is a view: a temporary matrix would be gone before it is used.
#include <surfattn/surfattn.hpp>

auto dangling() { return surfattn::AdditiveBias(surfattn::Matrix<float>(2, 2)); }

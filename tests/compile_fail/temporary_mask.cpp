// expect: deleted
// A mask is a view: a temporary matrix would be gone before it is used.
#include <surfattn/surfattn.hpp>

using Bools = Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic>;

auto dangling() { return surfattn::BoolMask(Bools(Bools::Constant(2, 2, true))); }

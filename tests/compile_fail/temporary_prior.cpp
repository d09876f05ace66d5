// expect: deleted
// A prior is a view: a temporary matrix would be gone before it is used.
#include <surfattn/surfattn.hpp>

surfattn::SurfaceOptions dangling() { return {.prior = Eigen::VectorXf(Eigen::VectorXf::Zero(7))}; }

// Eigen as all tests use it, before any other header that includes it: its assertions throw, in every kind of
// build, so that what the library lets through does not end the program before the test can say so; and its
// allocations can be forbidden.
#pragma once

#if defined(EIGEN_CORE_H) && !defined(EIGEN_RUNTIME_NO_MALLOC)
#error "include support/eigen.hpp before all that includes Eigen"
#endif

#define EIGEN_RUNTIME_NO_MALLOC
#include <stdexcept>
#define eigen_assert(condition) \
  ((condition) ? static_cast<void>(0) : throw std::logic_error("eigen_assert(" #condition ")"))

#include <Eigen/Core>

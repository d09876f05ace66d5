#pragma once
// Random numbers that depend on a seed and a purpose alone, whatever was drawn for other purposes.

#include <cstdint>
#include <random>
#include <surfattn/surfattn.hpp>
#include <utility>
#include <vector>

namespace translation {

using surfattn::Index;
using surfattn::Matrix;
using surfattn::RowVector;

class Random {
 public:
  /// `purpose` and `number` (of an epoch, of a step) name a sequence of its own for each seed.
  Random(std::uint64_t seed, std::uint64_t purpose, std::uint64_t number = 0)
      : engine_(mixed(mixed(mixed(seed) ^ purpose) ^ number)) {}

  /// From 0 up to but not including 1.
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

  /// A whole number from 0 up to but not including `end`.
  std::size_t below(std::size_t end) {
    return static_cast<std::size_t>(uniform() * static_cast<double>(end));
  }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

  /// Fills a matrix from −limit to limit.
  template <class Derived>
  void fill(Eigen::MatrixBase<Derived>& matrix, double limit) {
    using Scalar = typename Derived::Scalar;
    matrix = Derived::NullaryExpr(matrix.rows(), matrix.cols(), [&](Index, Index) {
      return static_cast<Scalar>((2 * uniform() - 1) * limit);
    });
  }

 private:
  /// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
  static std::uint64_t mixed(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  std::mt19937_64 engine_;
};

}  // namespace translation

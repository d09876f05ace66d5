#pragma once
// Where the time of a step goes.

#include <array>
#include <chrono>

#include "attention_weights.hpp"

namespace translation {

/// Seconds spent in each Part of a model, as Part counts them.
struct PartTimes {
  std::array<double, 5> seconds = {};

  double& operator[](Part part) { return seconds[static_cast<std::size_t>(part)]; }
};

/// Runs `work`, and adds what it took where times are kept.
template <class Work>
void timed(PartTimes* times, Part part, const Work& work) {
  const auto before = std::chrono::steady_clock::now();
  work();
  if (!times) return;
  (*times)[part] +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
}

}  // namespace translation

// surfattn layer 0: the version of the library
#pragma once

// CMakeLists.txt reads these three lines: they are the only place that states the version.
#define SURFATTN_VERSION_MAJOR 0
#define SURFATTN_VERSION_MINOR 1
#define SURFATTN_VERSION_PATCH 0

/// The version as one number for comparison by the preprocessor: 10000·major + 100·minor + patch.
#define SURFATTN_VERSION \
  (SURFATTN_VERSION_MAJOR * 10000 + SURFATTN_VERSION_MINOR * 100 + SURFATTN_VERSION_PATCH)

namespace surfattn {

/// Changes when code that compiled, or results beyond rounding, may change.
inline constexpr int version_major = SURFATTN_VERSION_MAJOR;
/// Changes when something is added (while the major version is 0: as the major version).
inline constexpr int version_minor = SURFATTN_VERSION_MINOR;
/// Changes when something is corrected.
inline constexpr int version_patch = SURFATTN_VERSION_PATCH;
/// 10000·major + 100·minor + patch.
inline constexpr int version = SURFATTN_VERSION;

}  // namespace surfattn

# Provides the targets of the dependencies: what the parent project already has, else an installed
# package, or the pinned sources with SURFATTN_FETCH_DEPENDENCIES=ON.

include(FetchContent)

# surfattn_missing(<what> <Debian package> [<option that does without it>]): stops with one sentence.
function(surfattn_missing what package)
  set(way_out "")
  if(ARGC GREATER 2)
    set(way_out ", or do without it by -D${ARGV2}=OFF")
  endif()
  message(FATAL_ERROR
    "surfattn needs ${what}, which was not found: install it (apt-get install ${package}), "
    "or download it by -DSURFATTN_FETCH_DEPENDENCIES=ON${way_out}.")
endfunction()

# Eigen3::Eigen, version 3.4 or newer.
# find_package is called without a version because the version file of each major release of Eigen
# rejects requests for another one, so "3.4" would not accept 5.
macro(surfattn_provide_eigen)
  if(NOT TARGET Eigen3::Eigen)
    if(SURFATTN_FETCH_DEPENDENCIES)
      surfattn_fetch_eigen()
    else()
      # GLOBAL: a parent project that links surfattn::surfattn must see the target as well.
      find_package(Eigen3 CONFIG QUIET GLOBAL)
      if(NOT TARGET Eigen3::Eigen OR Eigen3_VERSION VERSION_LESS 3.4)
        surfattn_missing("Eigen 3.4 or newer" libeigen3-dev)
      endif()
    endif()
  endif()
endmacro()

# Only Eigen's headers are wanted: a source subdirectory without a CMakeLists.txt keeps Eigen's own
# tests and options out of this build.
macro(surfattn_fetch_eigen)
  FetchContent_Declare(eigen
    GIT_REPOSITORY https://gitlab.com/libeigen/eigen.git
    GIT_TAG 3.4.0
    GIT_SHALLOW ON
    SOURCE_SUBDIR headers_only)
  FetchContent_MakeAvailable(eigen)
  add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
  target_include_directories(Eigen3::Eigen INTERFACE "${eigen_SOURCE_DIR}")
endmacro()

# Catch2::Catch2 (version 2) or Catch2::Catch2WithMain (version 3).
macro(surfattn_provide_catch)
  if(NOT TARGET Catch2::Catch2)
    if(SURFATTN_FETCH_DEPENDENCIES)
      FetchContent_Declare(Catch2
        GIT_REPOSITORY https://github.com/catchorg/Catch2.git
        GIT_TAG v3.5.4
        GIT_SHALLOW ON
        SYSTEM)
      FetchContent_MakeAvailable(Catch2)
      set(Catch2_VERSION 3.5.4)
    else()
      find_package(Catch2 CONFIG QUIET)
      if(NOT TARGET Catch2::Catch2)
        surfattn_missing("Catch2 for its tests" catch2 SURFATTN_BUILD_TESTS)
      endif()
    endif()
  endif()
endmacro()

# benchmark::benchmark_main
macro(surfattn_provide_benchmark)
  if(NOT TARGET benchmark::benchmark_main)
    if(SURFATTN_FETCH_DEPENDENCIES)
      set(BENCHMARK_ENABLE_TESTING OFF)
      set(BENCHMARK_ENABLE_INSTALL OFF)
      FetchContent_Declare(benchmark
        GIT_REPOSITORY https://github.com/google/benchmark.git
        GIT_TAG v1.8.4
        GIT_SHALLOW ON
        SYSTEM)
      FetchContent_MakeAvailable(benchmark)
    else()
      find_package(benchmark CONFIG QUIET)
      if(NOT TARGET benchmark::benchmark_main)
        surfattn_missing("Google Benchmark for its benchmarks" libbenchmark-dev
                         SURFATTN_BUILD_BENCHMARKS)
      endif()
    endif()
  endif()
endmacro()

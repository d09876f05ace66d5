# Flags of the project's own tests, benchmarks and examples: surfattn_development is linked
# privately to each of them and is never exported.

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
endif()

# Continuous integration treats warnings as errors; a user's newer compiler must not stop a build.
set(surfattn_in_ci OFF)
if(PROJECT_IS_TOP_LEVEL AND "$ENV{CI}")
  set(surfattn_in_ci ON)
endif()

option(SURFATTN_WERROR "Treat warnings in the project's own programs as errors" ${surfattn_in_ci})
option(SURFATTN_NATIVE "Compile the project's own programs for this machine's processor" OFF)
set(SURFATTN_ARCH "" CACHE STRING
    "Architecture (-march) of the project's own programs, such as x86-64-v3; overrides SURFATTN_NATIVE")

add_library(surfattn_development INTERFACE)
target_link_libraries(surfattn_development INTERFACE surfattn::surfattn)

if(SURFATTN_ARCH)
  target_compile_options(surfattn_development INTERFACE "-march=${SURFATTN_ARCH}")
elseif(SURFATTN_NATIVE)
  target_compile_options(surfattn_development INTERFACE -march=native)
endif()

target_compile_options(surfattn_development INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wnon-virtual-dtor
  -Woverloaded-virtual)
if(SURFATTN_WERROR)
  target_compile_options(surfattn_development INTERFACE -Werror)
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # What GCC's optimiser suspects after inlining Eigen's products may be wrong: shown, never fatal.
  target_compile_options(surfattn_development INTERFACE
    -Wno-error=maybe-uninitialized -Wno-error=uninitialized -Wno-error=array-bounds
    -Wno-error=stringop-overflow)
  # GCC 12 is wrong about its own AVX-512 intrinsics (bug 105593) and about joining strings
  # (bug 105329), at every use of them.
  if(CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(surfattn_development INTERFACE
      -Wno-maybe-uninitialized -Wno-uninitialized -Wno-restrict)
  endif()
endif()

# Eigen takes blocks of empty matrices, at offsets from a null pointer. Clang can leave that one
# check out for Eigen's files alone, GCC only for all.
if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=[a-z,]*undefined")
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    target_compile_options(surfattn_development INTERFACE
      "-fsanitize-ignorelist=${PROJECT_SOURCE_DIR}/cmake/sanitizer_ignorelist.txt")
  else()
    target_compile_options(surfattn_development INTERFACE -fno-sanitize=pointer-overflow)
  endif()
endif()

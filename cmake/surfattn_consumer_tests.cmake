# Projects that use the library: installed and found, nested, and fetched.

set(consumer_prefix "${CMAKE_CURRENT_BINARY_DIR}/consumer/prefix")

# What a consumer needs to find the same compiler and the same Eigen as this build.
set(consumer_options
  "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}"
  "-DCMAKE_BUILD_TYPE=Debug"
  "-DCMAKE_PREFIX_PATH=${consumer_prefix}")
if(DEFINED eigen_SOURCE_DIR)
  list(APPEND consumer_options -DSURFATTN_FETCH_DEPENDENCIES=ON
       "-DFETCHCONTENT_SOURCE_DIR_EIGEN=${eigen_SOURCE_DIR}")
elseif(Eigen3_DIR)
  list(APPEND consumer_options "-DEigen3_DIR=${Eigen3_DIR}")
endif()

# surfattn_add_consumer_test(<name> <source directory> <program> [<option>...])
function(surfattn_add_consumer_test name source_dir program)
  add_test(NAME consumer.${name}
    COMMAND "${CMAKE_CTEST_COMMAND}"
      --build-and-test "${source_dir}" "${CMAKE_CURRENT_BINARY_DIR}/consumer/${name}"
      --build-generator "${CMAKE_GENERATOR}" --build-makeprogram "${CMAKE_MAKE_PROGRAM}"
      --build-options ${consumer_options} ${ARGN}
      --test-command ${program})
  set_tests_properties(consumer.${name} PROPERTIES LABELS consumer TIMEOUT 300)
endfunction()

surfattn_add_consumer_test(add_subdirectory "${CMAKE_CURRENT_SOURCE_DIR}/consumer/add_subdirectory" consumer)
surfattn_add_consumer_test(fetch_content "${CMAKE_CURRENT_SOURCE_DIR}/consumer/fetch_content" consumer)

# An installed surfattn looks for an installed Eigen, which a fetched one is not.
if(SURFATTN_INSTALL AND NOT DEFINED eigen_SOURCE_DIR)
  set(SURFATTN_TEST_INSTALLED ON)
  add_test(NAME consumer.install
    COMMAND "${CMAKE_COMMAND}" --install "${PROJECT_BINARY_DIR}" --prefix "${consumer_prefix}")
  set_tests_properties(consumer.install PROPERTIES FIXTURES_SETUP surfattn_installed
                       LABELS consumer TIMEOUT 60)
  surfattn_add_consumer_test(find_package "${CMAKE_CURRENT_SOURCE_DIR}/consumer/find_package" consumer)
  set_tests_properties(consumer.find_package PROPERTIES FIXTURES_REQUIRED surfattn_installed)
endif()

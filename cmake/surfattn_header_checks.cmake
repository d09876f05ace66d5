# Every header compiles alone, twice included and without a warning; every header keeps its layer.

set(include_dir "${PROJECT_SOURCE_DIR}/include")
set(generated_dir "${CMAKE_CURRENT_BINARY_DIR}/self_containment")

file(GLOB_RECURSE headers RELATIVE "${include_dir}" CONFIGURE_DEPENDS "${include_dir}/surfattn/*.hpp")
if(NOT TARGET OpenMP::OpenMP_CXX)
  list(REMOVE_ITEM headers surfattn/executors/openmp.hpp)
endif()
set(sources "")
foreach(header IN LISTS headers)
  set(source "${generated_dir}/${header}.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT "#include <${header}>\n#include <${header}>\n")
  list(APPEND sources "${source}")
endforeach()

add_library(surfattn_header_self_containment OBJECT ${sources})
target_link_libraries(surfattn_header_self_containment PRIVATE surfattn_development Threads::Threads
  $<TARGET_NAME_IF_EXISTS:OpenMP::OpenMP_CXX>)
target_compile_options(surfattn_header_self_containment PRIVATE -Werror -O0)

# Eigen is parsed once for all headers but these, which do without it.
target_precompile_headers(surfattn_header_self_containment PRIVATE <Eigen/Core>)
foreach(header IN ITEMS error version workspace)
  set_source_files_properties("${generated_dir}/surfattn/${header}.hpp.cpp" PROPERTIES
    SKIP_PRECOMPILE_HEADERS ON)
endforeach()

add_test(NAME layers
  COMMAND "${CMAKE_COMMAND}" "-DINCLUDE_DIR=${include_dir}"
          -P "${PROJECT_SOURCE_DIR}/cmake/check_layers.cmake")
add_test(NAME layers.check_itself
  COMMAND "${CMAKE_COMMAND}" "-DWORK_DIR=${CMAKE_CURRENT_BINARY_DIR}/check_layers_test"
          -P "${PROJECT_SOURCE_DIR}/cmake/check_layers_test.cmake")
set_tests_properties(layers layers.check_itself PROPERTIES TIMEOUT 60)

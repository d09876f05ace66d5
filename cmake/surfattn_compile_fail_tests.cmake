# Every tests/compile_fail/*.cpp is misuse that the compiler must reject in words that help.

set(eigen_include_dirs "$<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>")
set(precompiled_dir "${CMAKE_CURRENT_BINARY_DIR}/compile_fail")
set(compile_command
  "${CMAKE_CXX_COMPILER}" -std=c++20 "-I${precompiled_dir}" "-I${PROJECT_SOURCE_DIR}/include"
  -isystem "$<JOIN:${eigen_include_dirs},;-isystem;>")

# Most of the time goes into parsing the library. GCC takes a precompiled header that it finds where the
# header is looked for, if the options are the same.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(precompiled "${precompiled_dir}/surfattn/surfattn.hpp.gch")
  file(MAKE_DIRECTORY "${precompiled_dir}/surfattn")
  add_custom_command(OUTPUT "${precompiled}"
    COMMAND "${compile_command}" -w -MD -MF "${precompiled}.d" -o "${precompiled}"
            -x c++-header "${PROJECT_SOURCE_DIR}/include/surfattn/surfattn.hpp"
    DEPENDS "${PROJECT_SOURCE_DIR}/include/surfattn/surfattn.hpp" DEPFILE "${precompiled}.d"
    COMMENT "Precompiling surfattn.hpp for sources that must not compile"
    COMMAND_EXPAND_LISTS VERBATIM)
  add_custom_target(surfattn_compile_fail_header ALL DEPENDS "${precompiled}")
endif()

file(GLOB sources CONFIGURE_DEPENDS compile_fail/*.cpp)
foreach(source IN LISTS sources)
  get_filename_component(name "${source}" NAME_WE)
  add_test(NAME compile_fail.${name}
    COMMAND "${CMAKE_COMMAND}" "-DCOMMAND=${compile_command}" "-DSOURCE=${source}"
            -P "${PROJECT_SOURCE_DIR}/cmake/expect_compile_failure.cmake")
  set_tests_properties(compile_fail.${name} PROPERTIES TIMEOUT 120)
endforeach()

# Every tests/compile_fail/*.cpp is misuse that the compiler must reject in words that help.

set(eigen_include_dirs "$<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>")
set(compile_command
  "${CMAKE_CXX_COMPILER}" -std=c++20 "-I${PROJECT_SOURCE_DIR}/include"
  -isystem "$<JOIN:${eigen_include_dirs},;-isystem;>")

file(GLOB sources CONFIGURE_DEPENDS compile_fail/*.cpp)
foreach(source IN LISTS sources)
  get_filename_component(name "${source}" NAME_WE)
  add_test(NAME compile_fail.${name}
    COMMAND "${CMAKE_COMMAND}" "-DCOMMAND=${compile_command}" "-DSOURCE=${source}"
            -P "${PROJECT_SOURCE_DIR}/cmake/expect_compile_failure.cmake")
  set_tests_properties(compile_fail.${name} PROPERTIES TIMEOUT 120)
endforeach()

# Checks that check_layers.cmake accepts a tree in order and names each kind of violation:
#   cmake -DWORK_DIR=<scratch directory> -P check_layers_test.cmake

cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")

function(write_header path)
  file(WRITE "${WORK_DIR}/surfattn/${path}" "${ARGN}")
endfunction()

function(expect_status expected)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" "-DINCLUDE_DIR=${WORK_DIR}" -P "${CMAKE_CURRENT_LIST_DIR}/check_layers.cmake"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  if(expected STREQUAL "accepted" AND NOT status EQUAL 0)
    message(FATAL_ERROR "A tree in order was rejected: ${output}")
  elseif(expected STREQUAL "rejected" AND status EQUAL 0)
    message(FATAL_ERROR "A tree with violations was accepted: ${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

function(expect_words)
  foreach(words IN LISTS ARGN)
    string(FIND "${output}" "${words}" at)
    if(at EQUAL -1)
      message(FATAL_ERROR "\"${words}\" is missing in: ${output}")
    endif()
  endforeach()
endfunction()

write_header(version.hpp "// surfattn layer 0: version\n#pragma once\n")
write_header(detail/simd/packet.hpp "// surfattn layer 2: σ packets\n#include \"../../version.hpp\"\n// Eigen::internal\n")
write_header(engine.hpp "// surfattn layer 4: engine [x\n#include <Eigen/Core>\n#  include <surfattn/detail/simd/packet.hpp>\n// #include <surfattn/surfattn.hpp>\n")
write_header(reference.hpp "// surfattn layer 8: reference\n#include <surfattn/version.hpp>\n")
write_header(surfattn.hpp "// surfattn layer 9: all\n#include <surfattn/engine.hpp>\n")
expect_status(accepted)
expect_words("5 headers are in order")

write_header(untitled.hpp "#pragma once\n")
write_header(upward.hpp "// surfattn layer 1: upward\n#include <surfattn/engine.hpp>\n")
write_header(detail/quoted.hpp "// surfattn layer 3: quoted\n#include \"../engine.hpp\"\n")
write_header(missing.hpp "// surfattn layer 1: missing\n#include <surfattn/nowhere.hpp>\n")
write_header(umbrella.hpp "// surfattn layer 9: umbrella\n#include <surfattn/surfattn.hpp>\n")
write_header(internals.hpp "// surfattn layer 5: internals\nusing Eigen::internal::pload;\n")
write_header(reference.hpp "// surfattn layer 8: reference\n#include <surfattn/engine.hpp>\n")
expect_status(rejected)
expect_words(
  "surfattn/untitled.hpp does not begin with the line"
  "surfattn/upward.hpp (layer 1) includes surfattn/engine.hpp of the higher layer 4"
  "surfattn/detail/quoted.hpp (layer 3) includes surfattn/engine.hpp of the higher layer 4"
  "surfattn/missing.hpp includes surfattn/nowhere.hpp, which does not exist"
  "surfattn/umbrella.hpp includes surfattn/surfattn.hpp, which is for users"
  "surfattn/internals.hpp names Eigen::internal"
  "surfattn/reference.hpp includes surfattn/engine.hpp: the reference may share no code")
string(REGEX MATCHALL "\\.hpp( \\(layer [0-9]\\))? (includes|names|does not)" found "${output}")
list(LENGTH found found_count)
if(NOT found_count EQUAL 7)
  message(FATAL_ERROR "Expected 7 violations, not ${found_count}: ${output}")
endif()

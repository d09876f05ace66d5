# Checks the layers of the headers:   cmake -DINCLUDE_DIR=<include> -P check_layers.cmake
#
# * The first line of every header is "// surfattn layer N: summary".
# * A header includes headers of its own or a lower layer only; the umbrella surfattn.hpp is for users.
# * reference.hpp and reference_terms.hpp share no code with the engine: they include version.hpp, config.hpp and each other
#   at most.
# * detail/simd/packet.hpp alone names Eigen's internals.
#
# All violations are listed before the script fails.

cmake_minimum_required(VERSION 3.25)

set(umbrella surfattn/surfattn.hpp)
set(references surfattn/reference.hpp surfattn/reference_terms.hpp)
set(allowed_in_references surfattn/version.hpp surfattn/config.hpp ${references})
set(allowed_eigen_internal surfattn/detail/simd/packet.hpp)

set(violations "")

macro(violation text)
  string(APPEND violations "  ${text}\n")
endmacro()

# The layer that a header states in its first line, or nothing.
function(read_layer header result)
  file(READ "${INCLUDE_DIR}/${header}" content)
  if(content MATCHES "^// surfattn layer ([0-9]+): [^\n]+\n")
    set(${result} ${CMAKE_MATCH_1} PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

# The library's headers that a header includes, relative to INCLUDE_DIR where they exist.
function(read_includes header result)
  file(READ "${INCLUDE_DIR}/${header}" content)
  string(REGEX MATCHALL "\n[ \t]*#[ \t]*include[ \t]*(<surfattn/[^>\n]+>|\"[^\"\n]+\")" lines "\n${content}")
  get_filename_component(folder "${header}" DIRECTORY)
  set(includes "")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE ".*[<\"]([^>\"]+)[>\"]" "\\1" name "${line}")
    if(line MATCHES "\"$" AND EXISTS "${INCLUDE_DIR}/${folder}/${name}")
      set(name "${folder}/${name}")
      cmake_path(NORMAL_PATH name)
    endif()
    list(APPEND includes "${name}")
  endforeach()
  set(${result} "${includes}" PARENT_SCOPE)
endfunction()

macro(check_include header layer included)
  if(NOT EXISTS "${INCLUDE_DIR}/${included}")
    violation("${header} includes ${included}, which does not exist.")
  else()
    read_layer("${included}" included_layer)
    if(included_layer AND included_layer GREATER "${layer}")
      violation("${header} (layer ${layer}) includes ${included} of the higher layer ${included_layer}.")
    endif()
  endif()
  if("${included}" STREQUAL umbrella)
    violation("${header} includes ${umbrella}, which is for users of the library.")
  endif()
  if("${header}" IN_LIST references AND NOT "${included}" IN_LIST allowed_in_references)
    violation("${header} includes ${included}: the reference may share no code with what it checks.")
  endif()
endmacro()

macro(check_header header)
  read_layer("${header}" layer)
  if(layer STREQUAL "")
    violation("${header} does not begin with the line \"// surfattn layer N: summary\".")
    set(layer 1000)
  endif()
  read_includes("${header}" includes)
  foreach(included IN LISTS includes)
    check_include("${header}" "${layer}" "${included}")
  endforeach()
  file(READ "${INCLUDE_DIR}/${header}" content)
  if(content MATCHES "Eigen::internal" AND NOT "${header}" STREQUAL allowed_eigen_internal)
    violation("${header} names Eigen::internal: only ${allowed_eigen_internal} may.")
  endif()
endmacro()

file(GLOB_RECURSE headers RELATIVE "${INCLUDE_DIR}" "${INCLUDE_DIR}/surfattn/*.hpp")
list(LENGTH headers header_count)
if(header_count EQUAL 0)
  message(FATAL_ERROR "No headers in ${INCLUDE_DIR}/surfattn.")
endif()
foreach(header IN LISTS headers)
  check_header("${header}")
endforeach()

if(violations)
  message(FATAL_ERROR "The layers of the headers are violated:\n${violations}")
endif()
message(STATUS "The layers of ${header_count} headers are in order.")

# Compiles one source that must be rejected, with a message that helps:
#   cmake "-DCOMMAND=<compiler and options, ;-separated>" -DSOURCE=<file> -P expect_compile_failure.cmake
#
# The first line of the source says what is expected:
#   // expect: REGEX      the compiler fails and its output matches the CMake regular expression
#   // expect success     the compiler succeeds: a control that the command itself works
# A second line "// flags: -foo -bar" adds options.

cmake_minimum_required(VERSION 3.25)

file(READ "${SOURCE}" content)
if(content MATCHES "^// expect: ([^\n]+)\n")
  set(expected "${CMAKE_MATCH_1}")
elseif(NOT content MATCHES "^// expect success\n")
  message(FATAL_ERROR "${SOURCE} must begin with \"// expect: REGEX\" or \"// expect success\".")
endif()
set(flags "")
if(content MATCHES "^[^\n]+\n// flags: ([^\n]+)\n")
  separate_arguments(flags UNIX_COMMAND "${CMAKE_MATCH_1}")
endif()

execute_process(
  COMMAND ${COMMAND} ${flags} -fsyntax-only "${SOURCE}"
  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)

if(NOT status MATCHES "^[0-9]+$")
  message(FATAL_ERROR "The compiler did not run: ${status}")
elseif(NOT DEFINED expected)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${SOURCE} must compile, but:\n${output}")
  endif()
elseif(status EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiled, but must be rejected with: ${expected}")
elseif(output MATCHES "internal compiler error|unrecognized command|unknown argument: '-")
  message(FATAL_ERROR "The compiler failed for another reason than the source:\n${output}")
elseif(NOT output MATCHES "${expected}")
  message(FATAL_ERROR "The compiler's output does not match: ${expected}\n${output}")
endif()

# Runs a program and compares what it prints with a text, but for blanks at the very end:
#   cmake -DPROGRAM=<executable> -DEXPECTED=<file> -P compare_output.cmake

cmake_minimum_required(VERSION 3.25)

execute_process(COMMAND "${PROGRAM}" RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE errors)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "The program failed (${status}):\n${output}${errors}")
endif()
file(READ "${EXPECTED}" expected)
string(REGEX REPLACE "[ \n]+$" "" output "${output}")
string(REGEX REPLACE "[ \n]+$" "" expected "${expected}")
if(NOT output STREQUAL expected)
  message(FATAL_ERROR "Expected:\n${expected}\nPrinted:\n${output}")
endif()

# Extracts the fenced code blocks of a Markdown file into sources that are compiled and run, so that
# the documentation cannot lie.
#
#   surfattn_extract_snippets(<file.md> <output directory>)
#
# sets in the caller's scope
#   surfattn_programs     program_1.cpp …: ```cpp blocks with "int main", as they stand; where a ```text
#                         block follows (with a line of prose between at most), program_1.txt holds it
#   surfattn_fragments    fragment_1.cpp …: all other ```cpp blocks, wrapped in a function
#   surfattn_consumers    consumer_1.cmake …: ```cmake blocks
#
# A comment right before a ```cpp fence helps a fragment that cannot stand alone, unseen by readers:
#   <!-- setup             its lines are put in front of the fragment, within the function
#   Matrix<float> q; -->
#   <!-- file scope -->    the fragment is not wrapped in a function

function(surfattn_extract_snippets markdown directory)
  set(programs "")
  set(fragments "")
  set(consumers "")
  if(EXISTS "${markdown}")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${markdown}")
    file(READ "${markdown}" rest)
    string(REPLACE "\r\n" "\n" rest "\n${rest}")
    surfattn_next_block(rest before language code)
    while(language)
      surfattn_write_block()
      surfattn_next_block(rest before language code)
    endwhile()
  endif()
  set(surfattn_programs "${programs}" PARENT_SCOPE)
  set(surfattn_fragments "${fragments}" PARENT_SCOPE)
  set(surfattn_consumers "${consumers}" PARENT_SCOPE)
endfunction()

# Cuts the next ```cpp or ```cmake block off the front of `rest`; `language` is empty when there is none.
function(surfattn_next_block rest_variable before_variable language_variable code_variable)
  set(rest "${${rest_variable}}")
  set(language "")
  if(rest MATCHES "\n```(cpp|cmake)\n")
    set(fence "${CMAKE_MATCH_0}")
    set(language ${CMAKE_MATCH_1})
    string(FIND "${rest}" "${fence}" at)
    string(SUBSTRING "${rest}" 0 ${at} before)
    # The fence's own newline stays, so that the closing fence of an empty block is found too.
    string(LENGTH "${fence}" length)
    math(EXPR at "${at} + ${length} - 1")
    string(SUBSTRING "${rest}" ${at} -1 rest)
    string(FIND "${rest}" "\n```" close)
    if(close EQUAL -1)
      message(FATAL_ERROR "A ```${language} block of the Markdown file is not closed.")
    endif()
    string(SUBSTRING "${rest}" 0 ${close} code)
    math(EXPR close "${close} + 4")
    string(SUBSTRING "${rest}" ${close} -1 rest)
  endif()
  set(${rest_variable} "${rest}" PARENT_SCOPE)
  set(${before_variable} "${before}" PARENT_SCOPE)
  set(${language_variable} "${language}" PARENT_SCOPE)
  set(${code_variable} "${code}\n" PARENT_SCOPE)
endfunction()

# Writes the block that surfattn_extract_snippets has in hand.
macro(surfattn_write_block)
  if(language STREQUAL "cmake")
    surfattn_write_snippet(consumers consumer cmake)
  elseif(code MATCHES "int main")
    surfattn_write_snippet(programs program cpp)
    surfattn_write_expected_output()
  else()
    surfattn_wrap_fragment()
    surfattn_write_snippet(fragments fragment cpp)
  endif()
endmacro()

# Appends `code` to a list as the next numbered file, touching the file only when it changes.
macro(surfattn_write_snippet list stem extension)
  list(LENGTH ${list} number)
  math(EXPR number "${number} + 1")
  set(path "${directory}/${stem}_${number}.${extension}")
  surfattn_write_if_different("${path}" code)
  list(APPEND ${list} "${path}")
endmacro()

function(surfattn_write_if_different path content_variable)
  set(old "")
  if(EXISTS "${path}")
    file(READ "${path}" old)
  endif()
  if(NOT old STREQUAL "${${content_variable}}")
    file(WRITE "${path}" "${${content_variable}}")
  endif()
endfunction()

macro(surfattn_write_expected_output)
  file(REMOVE "${directory}/program_${number}.txt")
  if(rest MATCHES "^\n*([^\n#`][^\n]*\n+)?```text\n")
    string(LENGTH "${CMAKE_MATCH_0}" length)
    string(SUBSTRING "${rest}" ${length} -1 expected)
    string(FIND "${expected}" "\n```" close)
    string(SUBSTRING "${expected}" 0 ${close} expected)
    file(WRITE "${directory}/program_${number}.txt" "${expected}\n")
  endif()
endmacro()

# Makes a source of the fragment `code`: its leading #include lines stay outside the function.
function(surfattn_wrap_fragment)
  set(includes "")
  while(code MATCHES "^[ \t]*(#include[^\n]*)?\n")
    string(APPEND includes "${CMAKE_MATCH_0}")
    string(LENGTH "${CMAKE_MATCH_0}" length)
    string(SUBSTRING "${code}" ${length} -1 code)
  endwhile()
  set(head "#include <surfattn/surfattn.hpp>\n#include <iostream>\n${includes}")
  surfattn_last_comment(comment)
  if(comment MATCHES "^ *file scope *$")
    set(code "${head}${code}")
  else()
    set(setup "")
    if(comment MATCHES "^ *setup *\n(.*)$")
      set(setup "${CMAKE_MATCH_1}\n")
    endif()
    set(code "${head}[[maybe_unused]] static void fragment() {\n${setup}${code}}\n")
  endif()
  set(code "${code}" PARENT_SCOPE)
endfunction()

# The comment at the very end of the text before the block, or nothing.
function(surfattn_last_comment result)
  set(comment "")
  string(FIND "${before}" "<!--" at REVERSE)
  if(NOT at EQUAL -1)
    math(EXPR at "${at} + 4")
    string(SUBSTRING "${before}" ${at} -1 tail)
    if(tail MATCHES "^(.*)-->[ \n]*$")
      set(comment "${CMAKE_MATCH_1}")
    endif()
  endif()
  set(${result} "${comment}" PARENT_SCOPE)
endfunction()

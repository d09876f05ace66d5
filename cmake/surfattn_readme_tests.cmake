# The code blocks of README.md are compiled, run, and compared with the output that it shows.

include(extract_snippets)
set(readme_dir "${CMAKE_CURRENT_BINARY_DIR}/readme")
surfattn_extract_snippets("${PROJECT_SOURCE_DIR}/README.md" "${readme_dir}")

foreach(source IN LISTS surfattn_programs)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(readme_${name} "${source}")
  target_link_libraries(readme_${name} PRIVATE surfattn_development)
  if(EXISTS "${readme_dir}/${name}.txt")
    add_test(NAME readme.${name} WORKING_DIRECTORY "${readme_dir}"
      COMMAND "${CMAKE_COMMAND}" "-DPROGRAM=$<TARGET_FILE:readme_${name}>"
              "-DEXPECTED=${readme_dir}/${name}.txt"
              -P "${PROJECT_SOURCE_DIR}/cmake/compare_output.cmake")
  else()
    add_test(NAME readme.${name} COMMAND readme_${name} WORKING_DIRECTORY "${readme_dir}")
  endif()
  set_tests_properties(readme.${name} PROPERTIES TIMEOUT 120)
endforeach()

# Fragments are compiled, not run; what they leave unused is not a mistake, so without warnings.
if(surfattn_fragments)
  add_library(surfattn_readme_fragments OBJECT ${surfattn_fragments})
  target_link_libraries(surfattn_readme_fragments PRIVATE surfattn::surfattn)
  target_compile_options(surfattn_readme_fragments PRIVATE -O0)
endif()

# Makes a project of a ```cmake block: what the block leaves to the reader is put around it, and
# "surfattn" beside it is this source tree.
function(surfattn_add_readme_consumer block)
  get_filename_component(name "${block}" NAME_WE)
  set(source_dir "${readme_dir}/${name}")
  file(READ "${block}" code)
  set(program consumer)
  if(code MATCHES "target_link_libraries\\( *([A-Za-z0-9_-]+)")
    set(program ${CMAKE_MATCH_1})
  endif()
  set(head "")
  if(NOT code MATCHES "project *\\(")
    set(head "cmake_minimum_required(VERSION 3.25)\nproject(readme_consumer LANGUAGES CXX)\n")
  endif()
  if(NOT code MATCHES "add_executable *\\(")
    string(APPEND head "add_executable(${program} main.cpp)\n")
  endif()
  set(project "${head}${code}")
  surfattn_write_if_different("${source_dir}/CMakeLists.txt" project)
  file(COPY_FILE "${CMAKE_CURRENT_SOURCE_DIR}/consumer/main.cpp" "${source_dir}/main.cpp" ONLY_IF_DIFFERENT)
  if(code MATCHES "add_subdirectory\\( *([A-Za-z0-9_./-]+)")
    cmake_path(ABSOLUTE_PATH CMAKE_MATCH_1 BASE_DIRECTORY "${source_dir}" NORMALIZE OUTPUT_VARIABLE link)
    get_filename_component(link_dir "${link}" DIRECTORY)
    file(MAKE_DIRECTORY "${link_dir}")
    file(CREATE_LINK "${PROJECT_SOURCE_DIR}" "${link}" SYMBOLIC)
  endif()
  surfattn_add_consumer_test(readme_${name} "${source_dir}" ${program}
    "-DFETCHCONTENT_SOURCE_DIR_SURFATTN=${PROJECT_SOURCE_DIR}")
  set_tests_properties(consumer.readme_${name} PROPERTIES FIXTURES_REQUIRED "surfattn_installed")
endfunction()

foreach(block IN LISTS surfattn_consumers)
  file(READ "${block}" code)
  if(SURFATTN_TEST_INSTALLED OR NOT code MATCHES "find_package\\( *surfattn")
    surfattn_add_readme_consumer("${block}")
  endif()
endforeach()

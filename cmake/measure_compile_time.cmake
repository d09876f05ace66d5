# cmake -DCOMMAND=<compiler and flags> -DSOURCES=<ours>;<other> -P measure_compile_time.cmake
# Says how long a file takes to compile that calls both passes of attention, as a multiple of one that
# multiplies two matrices of Eigen: the fastest of five compilations by turns, at each level.

function(compile source level result)
  string(TIMESTAMP start "%s%f")
  execute_process(COMMAND ${COMMAND} ${level} -DNDEBUG -c "${source}" -o "${OUTPUT}" COMMAND_ERROR_IS_FATAL ANY)
  string(TIMESTAMP end "%s%f")
  math(EXPR taken "(${end} - ${start}) / 1000")
  if(NOT ${result} OR taken LESS ${result})
    set(${result} ${taken} PARENT_SCOPE)
  endif()
endfunction()

list(GET SOURCES 0 ours)
list(GET SOURCES 1 other)
foreach(level -O0 -O2 -O3)
  set(our_time 0)
  set(other_time 0)
  foreach(round RANGE 4)
    compile("${ours}" ${level} our_time)
    compile("${other}" ${level} other_time)
  endforeach()
  math(EXPR hundredths "100 * ${our_time} / ${other_time}")
  math(EXPR whole "${hundredths} / 100")
  math(EXPR rest "${hundredths} % 100 + 100")
  string(SUBSTRING "${rest}" 1 2 rest)
  message("${level}: attention forward and backward ${our_time} ms, a product of Eigen ${other_time} ms: ${whole}.${rest} times")
endforeach()

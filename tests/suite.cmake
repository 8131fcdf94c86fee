# test_suite: the laws that every adapter of examples/adapters/list.hpp obeys (tests/suite). The adapters are compiled in
# parts, the same for every scalar, and the laws once; the GPU suite takes the parts of float.
file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/suite/*.cpp)
# loramix_parts(<out> <template> <number>): the units made from a template, as many as subject.hpp says.
function(loramix_parts out template number name)
  file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/suite/subject.hpp line REGEX " ${number} = [0-9]+;")
  string(REGEX MATCH "[0-9]+" parts ${line})
  math(EXPR last "${parts} - 1")
  set(units "")
  foreach(part RANGE ${last})
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/suite/${template} ${CMAKE_CURRENT_BINARY_DIR}/suite/${name}_${part}.cpp @ONLY)
    list(APPEND units ${CMAKE_CURRENT_BINARY_DIR}/suite/${name}_${part}.cpp)
  endforeach()
  set(${out} ${units} PARENT_SCOPE)
endfunction()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/suite/subject.hpp)
foreach(scalar IN ITEMS float double)
  loramix_parts(parts part.cpp.in suite_parts ${scalar})
  add_library(loramix_suite_${scalar} OBJECT ${parts})
  target_link_libraries(loramix_suite_${scalar} PRIVATE loramix_test_support loramix_adapters loramix::cpu)
endforeach()

loramix_parts(file_parts files.cpp.in file_parts files)
set_source_files_properties(${file_parts} PROPERTIES COMPILE_OPTIONS -O0)  # most of it reads JSON
add_executable(test_suite ${sources} ${file_parts} support/allocations.cpp)
target_link_libraries(test_suite PRIVATE loramix_test_main loramix_test_support loramix_suite_float loramix_suite_double
  loramix_adapters loramix::cpu loramix::io)
add_test(NAME suite COMMAND test_suite)

# test_suite: the laws that every adapter of examples/adapters/list.hpp obeys (tests/suite). The adapters are compiled in
# parts, once for every scalar, and the laws once; the GPU suite takes the parts of float.

# loramix_parts(<out> <number> <template> [scalar]): a unit per part from a template; a header says how many there are.
function(loramix_parts out number template)
  set(scalar ${ARGV3})
  foreach(header IN ITEMS suite/subject.hpp gpu/suite_step.hpp)
    file(STRINGS ${header} found REGEX " ${number} = [0-9]+;")
    string(APPEND line "${found}")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${header})
  endforeach()
  string(REGEX MATCH "[0-9]+" parts ${line})
  math(EXPR last "${parts} - 1")
  string(REGEX MATCH "^(.*)\\.([a-z]+)\\.in$" matched ${template})
  foreach(part RANGE ${last})
    set(unit ${CMAKE_CURRENT_BINARY_DIR}/${CMAKE_MATCH_1}${scalar}_${part}.${CMAKE_MATCH_2})
    configure_file(${template} ${unit} @ONLY)
    list(APPEND units ${unit})
  endforeach()
  set(${out} ${units} PARENT_SCOPE)
endfunction()

foreach(scalar IN ITEMS float double)
  loramix_parts(parts suite_parts suite/part.cpp.in ${scalar})
  add_library(loramix_suite_${scalar} OBJECT ${parts})
  target_link_libraries(loramix_suite_${scalar} PRIVATE loramix_test_support loramix_test_on_cpu loramix_adapters loramix::cpu)
endforeach()

file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/suite/*.cpp)
loramix_parts(file_parts file_parts suite/files.cpp.in)
set_source_files_properties(${file_parts} PROPERTIES COMPILE_OPTIONS -O0)  # most of it reads JSON
add_executable(test_suite ${sources} ${file_parts} support/allocations.cpp)
target_link_libraries(test_suite PRIVATE loramix_test_main loramix_test_support loramix_suite_float loramix_suite_double
  loramix_test_on_cpu loramix_test_kernels loramix_adapters loramix::cpu loramix::io)
add_test(NAME suite COMMAND test_suite)

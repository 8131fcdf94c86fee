# Compile-failure pairs: name.ok.cpp must compile, and name.ko.cpp must fail with the sentence of its first line
# ("// expect: <part of the message>"). The same for .cu, through nvcc.
file(GLOB failing CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.ko.cpp ${CMAKE_CURRENT_LIST_DIR}/*.ko.cu)
get_target_property(eigen_include Eigen3::Eigen INTERFACE_INCLUDE_DIRECTORIES)
foreach(ko IN LISTS failing)
  cmake_path(GET ko FILENAME name)
  string(REPLACE ".ko." "." name ${name})
  if(name MATCHES "\\.cu$")
    if(NOT LORAMIX_CUDA)
      continue()
    endif()
    set(compile ${CMAKE_CUDA_COMPILER} -std=c++20 -ptx -arch=compute_80 -o /dev/null -I${LORAMIX_INCLUDE_DIR})
  else()
    set(compile ${CMAKE_CXX_COMPILER} -std=c++20 -fsyntax-only -I${LORAMIX_INCLUDE_DIR} -isystem ${eigen_include})
  endif()
  add_test(NAME compile.${name}
    COMMAND Python3::Interpreter ${CMAKE_CURRENT_LIST_DIR}/pair.py ${ko} -- ${compile})
  set_tests_properties(compile.${name} PROPERTIES LABELS compile)
endforeach()

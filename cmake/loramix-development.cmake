# How our own tests, examples and benchmarks are compiled. Nothing here reaches a consumer.

set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_EXTENSIONS OFF)
if(PROJECT_IS_TOP_LEVEL)
  if(NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
    find_program(LORAMIX_CCACHE ccache)
    if(LORAMIX_CCACHE)
      set(CMAKE_CXX_COMPILER_LAUNCHER ${LORAMIX_CCACHE})
      set(CMAKE_CUDA_COMPILER_LAUNCHER ${LORAMIX_CCACHE})
    endif()
  endif()
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE RelWithDebInfo)
  endif()
endif()

# LORAMIX_CUDA: whether there is an nvcc. PTX only, so that the same program runs on any GPU and under ptxemu.
set(LORAMIX_CUDA FALSE)
if(LORAMIX_BUILD_GPU_TESTS)
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
    set(LORAMIX_CUDA TRUE)
  else()
    message(STATUS "GPU: not built (nvcc not found)")
  endif()
endif()

# loramix_warnings: linked PRIVATE by everything we compile ourselves.
add_library(loramix_warnings INTERFACE)
set(_gnu_like $<COMPILE_LANG_AND_ID:CXX,GNU,Clang>)
target_compile_options(loramix_warnings INTERFACE
  "$<${_gnu_like}:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor>"
  $<$<AND:$<BOOL:${LORAMIX_WERROR}>,${_gnu_like}>:-Werror>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
  $<$<AND:$<BOOL:${LORAMIX_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)

# loramix_adapters: examples/adapters/list.hpp, whose adapter_headers.hpp includes every header of the library's adapters
# and of that folder: a new adapter is a file there and a line in the list.
loramix_headers(_adapters adapter/*.hpp)
list(TRANSFORM _adapters REPLACE ${LORAMIX_INCLUDE_DIR}/ "")
file(GLOB _own RELATIVE ${PROJECT_SOURCE_DIR}/examples CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/examples/adapters/*.hpp)
list(REMOVE_ITEM _own adapters/list.hpp)
set(_text "")
foreach(_header IN LISTS _adapters _own)
  string(APPEND _text "#include <${_header}>\n")
endforeach()
file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/generated/adapter_headers.hpp CONTENT "${_text}" @ONLY)
add_library(loramix_adapters INTERFACE)
target_include_directories(loramix_adapters INTERFACE ${PROJECT_SOURCE_DIR}/examples ${PROJECT_BINARY_DIR}/generated)
target_link_libraries(loramix_adapters INTERFACE loramix_core)

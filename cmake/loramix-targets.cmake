# The public targets. All of them are always defined, for they are only names and include directories; what each one
# needs is looked for here and may be missing, in which case linking that one target is an error that names the package.
#
#   loramix::core     the product, gates, ops, adapters and training: a C++20 compiler
#   loramix::cpu      + Eigen 3.4
#   loramix::openmp   + OpenMP
#   loramix::gpu      core + CUDA runtime and cuBLAS, no Eigen, no nvcc flag
#   loramix::io       core + nlohmann/json
#   loramix::bench    core + Google Benchmark, for benchmarks of one's own adapters

find_package(Threads QUIET)
find_package(Eigen3 3.4 QUIET NO_MODULE)
find_package(OpenMP QUIET COMPONENTS CXX)
find_package(CUDAToolkit QUIET)
find_package(nlohmann_json QUIET)
find_package(benchmark QUIET)

set(LORAMIX_INCLUDE_DIR ${PROJECT_SOURCE_DIR}/include)
set(LORAMIX_COMPONENTS core cpu openmp gpu io bench)

# loramix_headers(<out> <glob>...): the headers below include/loramix that match.
function(loramix_headers out)
  list(TRANSFORM ARGN PREPEND ${LORAMIX_INCLUDE_DIR}/loramix/)
  file(GLOB found CONFIGURE_DEPENDS ${ARGN})
  set(${out} ${found} PARENT_SCOPE)
endfunction()

loramix_headers(LORAMIX_CORE_HEADERS
  *.hpp core/*.hpp gate/*.hpp ops/*.hpp router/*.hpp adapter/*.hpp train/*.hpp)
loramix_headers(LORAMIX_CPU_HEADERS cpu/*.hpp cpu/detail/*.hpp)
loramix_headers(LORAMIX_OPENMP_HEADERS cpu/openmp.hpp)
list(REMOVE_ITEM LORAMIX_CPU_HEADERS ${LORAMIX_OPENMP_HEADERS} "")
loramix_headers(LORAMIX_GPU_HEADERS gpu/*.hpp gpu/detail/*.hpp)
loramix_headers(LORAMIX_CUH_HEADERS *.cuh gpu/*.cuh gpu/detail/*.cuh)
loramix_headers(LORAMIX_IO_HEADERS io/*.hpp)
loramix_headers(LORAMIX_BENCH_HEADERS bench/*.hpp)

foreach(component IN LISTS LORAMIX_COMPONENTS)
  string(TOUPPER ${component} upper)
  add_library(loramix_${component} INTERFACE)
  add_library(loramix::${component} ALIAS loramix_${component})
  set_target_properties(loramix_${component} PROPERTIES EXPORT_NAME ${component} INTERFACE_HEADER_SETS_TO_VERIFY HEADERS)
  target_compile_features(loramix_${component} INTERFACE cxx_std_20)
  # The include directory comes with the file set, also when a component has no header yet.
  target_sources(loramix_${component} INTERFACE
    FILE_SET HEADERS BASE_DIRS ${LORAMIX_INCLUDE_DIR} FILES ${LORAMIX_${upper}_HEADERS})
  if(NOT component STREQUAL "core")
    target_link_libraries(loramix_${component} INTERFACE loramix_core)
  endif()
endforeach()

# CMake 3.25 would verify a .cuh with the host compiler, so these have a set of their own (and stubs in tests/).
target_sources(loramix_gpu INTERFACE
  FILE_SET cuda_headers TYPE HEADERS BASE_DIRS ${LORAMIX_INCLUDE_DIR} FILES ${LORAMIX_CUH_HEADERS})

target_link_libraries(loramix_core INTERFACE Threads::Threads)
target_link_libraries(loramix_cpu INTERFACE Eigen3::Eigen)
target_link_libraries(loramix_openmp INTERFACE loramix_cpu OpenMP::OpenMP_CXX)
target_link_libraries(loramix_gpu INTERFACE CUDA::cudart CUDA::cublas)
target_link_libraries(loramix_io INTERFACE nlohmann_json::nlohmann_json)
target_link_libraries(loramix_bench INTERFACE benchmark::benchmark)

# C++20 for .cu files as well, nothing else. CMake 3.25 knows no cuda_std_20 and nvcc 13 starts at C++17, so it is
# spelled out, unless the target that links us has chosen C++20 or later itself.
target_compile_options(loramix_gpu INTERFACE
  "$<$<AND:$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>,$<NOT:$<IN_LIST:$<TARGET_PROPERTY:CUDA_STANDARD>,20;23;26>>>:-std=c++20>")

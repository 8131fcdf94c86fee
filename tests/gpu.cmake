# test_gpu: kernels in tests/gpu/*.cu, their host references in tests/gpu/*.cpp (a .cu never includes cpu/ headers).
# support/gpu-run finds a GPU or the emulator when the test runs and says plainly when there is neither.
file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/gpu/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/gpu/*.cpp)
if(NOT LORAMIX_CUDA OR NOT sources)
  return()
endif()

# The adapters of the suite: on the device here, on the host in suite.cmake's parts, there also as Tracked.
foreach(stored IN ITEMS float32 bfloat16 float16)
  loramix_parts(parts_${stored} device_parts gpu/suite_part.cu.in ${stored})
  list(APPEND parts ${parts_${stored}})
endforeach()
loramix_parts(tracked_parts suite_parts suite/part.cpp.in Tracked)
add_executable(test_gpu ${sources} ${parts} ${tracked_parts})
target_link_libraries(test_gpu PRIVATE loramix_test_main loramix_test_support loramix_suite_float loramix_test_kernels loramix_adapters loramix::gpu
  loramix::cpu)
target_compile_options(test_gpu PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:SHELL:-lineinfo -include ${CMAKE_CURRENT_SOURCE_DIR}/support/gpu_kernels.cuh>)
# RUNPATH, not RPATH: the emulator's libraries must be able to stand in front of the toolkit's.
target_link_options(test_gpu PRIVATE -Wl,--enable-new-dtags)
set_target_properties(test_gpu PROPERTIES CUDA_RUNTIME_LIBRARY Shared CUDA_ARCHITECTURES 80-virtual)

# loramix_gpu_pass(<name> <label> <emulator settings>...): one run of the whole suite.
function(loramix_gpu_pass name label)
  add_test(NAME gpu.${name} COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/support/gpu-run ${ARGN} $<TARGET_FILE:test_gpu>)
  set_tests_properties(gpu.${name} PROPERTIES LABELS "gpu;${label}" SKIP_RETURN_CODE 77 TIMEOUT 3000)
endfunction()
loramix_gpu_pass(memcheck quick)
loramix_gpu_pass(race_and_init quick PTXEMU_RACECHECK=1 PTXEMU_INITCHECK=1)
loramix_gpu_pass(reverse full PTXEMU_ORDER=reverse)
foreach(seed IN ITEMS 1 2 3)
  loramix_gpu_pass(random_${seed} full PTXEMU_ORDER=random:${seed} PTXEMU_SCHED=random:${seed})
endforeach()
loramix_gpu_pass(race_random full PTXEMU_RACECHECK=2 PTXEMU_ORDER=random:4 PTXEMU_SCHED=random:4)

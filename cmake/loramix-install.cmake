# Headers, one export set per component, and the package configuration.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/loramix)
foreach(component IN LISTS LORAMIX_COMPONENTS)
  set(_sets FILE_SET HEADERS)
  if(component STREQUAL "gpu")
    list(APPEND _sets FILE_SET cuda_headers)
  endif()
  install(TARGETS loramix_${component} EXPORT loramix-${component} ${_sets})
  install(EXPORT loramix-${component} NAMESPACE loramix:: DESTINATION ${_package_dir})
endforeach()

configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/loramix-config.cmake.in ${PROJECT_BINARY_DIR}/loramix-config.cmake
  INSTALL_DESTINATION ${_package_dir})
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/loramix-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/loramix-config.cmake ${PROJECT_BINARY_DIR}/loramix-config-version.cmake
  DESTINATION ${_package_dir})

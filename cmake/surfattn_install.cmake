# Install rules: the headers and a CMake package that finds Eigen again on the consumer's machine.

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# A header-only package is the same on every architecture.
set(surfattn_package_dir "${CMAKE_INSTALL_DATADIR}/cmake/surfattn")

install(TARGETS surfattn EXPORT surfattnTargets)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/surfattn" TYPE INCLUDE)
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/surfattn")
install(EXPORT surfattnTargets NAMESPACE surfattn:: DESTINATION "${surfattn_package_dir}")

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/surfattnConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/surfattnConfig.cmake"
  INSTALL_DESTINATION "${surfattn_package_dir}"
  NO_SET_AND_CHECK_MACRO)
# While the major version is 0, a minor release may break its users.
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/surfattnConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion
  ARCH_INDEPENDENT)
install(FILES
  "${PROJECT_BINARY_DIR}/surfattnConfig.cmake"
  "${PROJECT_BINARY_DIR}/surfattnConfigVersion.cmake"
  DESTINATION "${surfattn_package_dir}")

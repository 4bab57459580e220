# Install rules and the CMake package: find_package(flashoptim) gives flashoptim::core and flashoptim::flashoptim, and
# find_package(flashoptim COMPONENTS torch) also flashoptim::torch, where it was built.
include_guard(GLOBAL)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(flashoptim_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/flashoptim")

# Everything here has one install component, so that a wheel can leave it out.
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME flashoptim_development)

install(TARGETS flashoptim_core flashoptim EXPORT flashoptimTargets
        LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
        ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
        RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/flashoptim" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.h")
install(EXPORT flashoptimTargets NAMESPACE flashoptim:: DESTINATION "${flashoptim_package_dir}")

# The operators and the front end, in an export set of their own: loading it needs Torch.
set(torch_targets)
foreach(target IN ITEMS flashoptim_ops flashoptim_torch)
  if(TARGET ${target})
    list(APPEND torch_targets ${target})
  endif()
endforeach()
if("flashoptim_torch" IN_LIST torch_targets)
  install(TARGETS ${torch_targets} EXPORT flashoptimTorchTargets
          LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
          ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
          RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/libtorch/include/flashoptim" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
          FILES_MATCHING PATTERN "*.h")
  install(EXPORT flashoptimTorchTargets NAMESPACE flashoptim:: DESTINATION "${flashoptim_package_dir}")
endif()

# What a consumer of the static library must find to link it.
get_target_property(flashoptim_library_type flashoptim TYPE)
set(flashoptim_needs_openmp OFF)
set(flashoptim_needs_cudart OFF)
if(flashoptim_library_type STREQUAL "STATIC_LIBRARY")
  # Looked up in src/, so its variables are not visible here.
  get_target_property(links flashoptim LINK_LIBRARIES)
  if("OpenMP::OpenMP_CXX" IN_LIST links)
    set(flashoptim_needs_openmp ON)
  endif()
  set(flashoptim_needs_cudart ${FLASHOPTIM_HAS_CUDA})
endif()

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/flashoptimConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/flashoptimConfig.cmake"
                              INSTALL_DESTINATION "${flashoptim_package_dir}")
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/flashoptimConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/flashoptimConfig.cmake" "${PROJECT_BINARY_DIR}/flashoptimConfigVersion.cmake"
        DESTINATION "${flashoptim_package_dir}")
unset(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME)

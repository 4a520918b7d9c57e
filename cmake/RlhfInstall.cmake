# `cmake --install`: libraries, headers, the program, and a package config for find_package(rlhf).
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

install(TARGETS rlhf_base rlhf_library rlhf_private_flags EXPORT rlhf-targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
set_target_properties(rlhf_base PROPERTIES EXPORT_NAME base)
foreach(folder rlhf reward rollout)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/${folder} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
endforeach()
if(EXISTS ${PROJECT_SOURCE_DIR}/configs)
  # Presets are part of the library; a copy that can be edited without effect would mislead.
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/configs DESTINATION ${CMAKE_INSTALL_DATADIR}/rlhf PATTERN presets EXCLUDE)
endif()
if(TARGET rlhf_program)
  install(TARGETS rlhf_program RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/rlhf)
install(EXPORT rlhf-targets NAMESPACE rlhf:: DESTINATION ${package_folder})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/rlhf-config.cmake.in ${PROJECT_BINARY_DIR}/rlhf-config.cmake
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/rlhf-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/rlhf-config.cmake ${PROJECT_BINARY_DIR}/rlhf-config-version.cmake
        DESTINATION ${package_folder})

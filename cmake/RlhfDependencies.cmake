# Debian packages, and the LibTorch wheel that scripts/fetch_libtorch.sh puts into .deps/.
find_package(Threads REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(Eigen3 REQUIRED NO_MODULE)
find_package(yaml-cpp REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)

# yaml-cpp names its target yaml-cpp before 0.8 and yaml-cpp::yaml-cpp from then on.
if(TARGET yaml-cpp::yaml-cpp)
  set(RLHF_YAML_TARGET yaml-cpp::yaml-cpp)
else()
  set(RLHF_YAML_TARGET yaml-cpp)
endif()

find_package(CLI11 REQUIRED)
set(RLHF_LIBTORCH_ROOT ${PROJECT_SOURCE_DIR}/.deps/libtorch CACHE PATH
    "Folder that holds torch/ and nvidia/ from the pinned PyPI wheels")
set(torch_dir ${RLHF_LIBTORCH_ROOT}/torch)
set(RLHF_WITH_TORCH OFF)
if(NOT RLHF_TORCH STREQUAL "OFF" AND EXISTS ${torch_dir}/lib/libtorch_cpu.so)
  set(RLHF_WITH_TORCH ON)
elseif(RLHF_TORCH STREQUAL "ON")
  message(FATAL_ERROR "LibTorch not found in ${RLHF_LIBTORCH_ROOT}: run scripts/fetch_libtorch.sh")
endif()
message(STATUS "Tests and benchmarks against LibTorch: ${RLHF_WITH_TORCH}")
if(RLHF_WITH_TORCH)
  # Own targets instead of find_package(Torch), which demands a CUDA toolkit and rewrites global flags.
  foreach(name c10 torch_cpu)
    add_library(rlhf_${name} SHARED IMPORTED GLOBAL)
    set_target_properties(rlhf_${name} PROPERTIES IMPORTED_LOCATION ${torch_dir}/lib/lib${name}.so)
  endforeach()
  add_library(rlhf_torch INTERFACE)
  target_include_directories(rlhf_torch SYSTEM INTERFACE ${torch_dir}/include
                             ${torch_dir}/include/torch/csrc/api/include)
  target_compile_definitions(rlhf_torch INTERFACE AT_PER_OPERATOR_HEADERS)
  target_link_libraries(rlhf_torch INTERFACE rlhf_torch_cpu rlhf_c10)
endif()

# RLHF_CUDA=AUTO builds the CUDA device where nvcc 12 or newer is found. The program runs without GPU and driver all the
# same: the CUDA runtime is linked statically and looks for the driver when it is first called; libcuda is never linked.
# nvcc is called by rules of our own: the CUDA language of CMake before 3.26 does not know C++20.
set(RLHF_CUDA AUTO CACHE STRING "The CUDA device: AUTO (where nvcc is found), ON, OFF")
set_property(CACHE RLHF_CUDA PROPERTY STRINGS AUTO ON OFF)
set(with_cuda OFF)

if(RLHF_CUDA)  # AUTO is true, too
  find_program(RLHF_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME /usr/local/cuda PATH_SUFFIXES bin)
  if(RLHF_NVCC)
    execute_process(COMMAND ${RLHF_NVCC} --version OUTPUT_VARIABLE nvcc_text)
    string(REGEX MATCH "release ([0-9.]+)" _ "${nvcc_text}")
    set(nvcc_version "${CMAKE_MATCH_1}")
    get_filename_component(toolkit ${RLHF_NVCC} REALPATH)
    get_filename_component(toolkit ${toolkit} DIRECTORY)
    get_filename_component(toolkit ${toolkit} DIRECTORY)
    find_path(RLHF_CUDA_HEADERS cuda_runtime_api.h HINTS ${toolkit} PATH_SUFFIXES include targets/x86_64-linux/include)
    find_library(RLHF_CUDART cudart_static HINTS ${toolkit} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib)
    if(nvcc_version VERSION_GREATER_EQUAL 12.0 AND RLHF_CUDA_HEADERS AND RLHF_CUDART)
      set(with_cuda ON)
    endif()
  endif()
  if(with_cuda)
    message(STATUS "CUDA device: on, nvcc ${nvcc_version}")
  elseif(RLHF_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA device: off, no nvcc 12 or newer was found with its headers and libcudart_static")
  else()
    message(FATAL_ERROR "RLHF_CUDA=${RLHF_CUDA} needs nvcc 12 or newer; found nvcc: ${RLHF_NVCC} ${nvcc_version}, "
                        "headers: ${RLHF_CUDA_HEADERS}, static runtime: ${RLHF_CUDART}")
  endif()
endif()
# What was decided, also for .ci/run to read.
set(RLHF_WITH_CUDA ${with_cuda} CACHE INTERNAL "")

# rlhf_cuda_sources(TARGET SOURCE ...): adds .cu files to a target of any folder, warnings as errors; machine code for A100
# and H100, PTX for what comes later.
function(rlhf_cuda_sources target)
  set(objects)
  foreach(source ${ARGN})
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda_${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${RLHF_CCACHE} ${RLHF_NVCC} -c -std=c++20 -O3 -Werror=all-warnings -Xcompiler=-fPIC,-Wall,-Wextra
              -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]
              -I${PROJECT_SOURCE_DIR} -MD -MT ${object} -MF ${object}.d -o ${object}
              ${CMAKE_CURRENT_SOURCE_DIR}/${source}
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${source}
      DEPFILE ${object}.d
      COMMENT "Building CUDA object ${source}"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  set_source_files_properties(${objects} TARGET_DIRECTORY ${target} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  # The rules belong to this folder, so a target of this folder must ask for them.
  add_custom_target(${target}_cuda DEPENDS ${objects})
  add_dependencies(${target} ${target}_cuda)
  target_sources(${target} PRIVATE ${objects})
endfunction()

# What every target of this project has in common.
include_guard(GLOBAL)

# Bits are the contract (docs/numerics.md): no contraction into fma, no fast-math, whatever the user's flags say.
set(FLASHOPTIM_EXACT_FLAGS -ffp-contract=off -fno-fast-math)

# Warnings, C++20, hidden symbols and sanitizers for a target of ours. The exact-arithmetic flags come with
# flashoptim::core.
function(flashoptim_setup_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON
                                             CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  if(FLASHOPTIM_SANITIZE)
    set(flags -fsanitize=${FLASHOPTIM_SANITIZE} -fno-omit-frame-pointer -g)
    if(FLASHOPTIM_SANITIZE MATCHES "undefined")
      list(APPEND flags -fsanitize=float-cast-overflow -fno-sanitize-recover=all)
    endif()
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${flags}>)
    target_link_options(${target} PRIVATE ${flags})
  endif()
endfunction()

# Sets FLASHOPTIM_HAS_CUDA. AUTO takes nvcc where there is one and says what it decided.
macro(flashoptim_find_cuda)
  set(FLASHOPTIM_HAS_CUDA OFF)
  if(NOT FLASHOPTIM_CUDA STREQUAL "OFF")
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(FLASHOPTIM_HAS_CUDA ON)
    elseif(FLASHOPTIM_CUDA STREQUAL "ON")
      message(FATAL_ERROR "FLASHOPTIM_CUDA=ON, but no CUDA compiler was found: install the CUDA toolkit (12.1 or "
                          "later) and put nvcc on PATH, or set FLASHOPTIM_CUDA=OFF")
    else()
      message(STATUS "flashoptim: no nvcc found, building for CPU only")
    endif()
  endif()
endmacro()

# Links a shared library so that it loads on systems with an older glibc than the one it is built on.
#
# glibc keeps every symbol's old versions beside the newest, and the linker takes the newest: on glibc 2.34 or later it
# binds dlopen to GLIBC_2.34, where 2.2.5 (from libdl.so.2) does the same. The linker is given a stub first, an empty
# library that calls itself libc.so.6 and has every symbol in the version that it had then.
include_guard(GLOBAL)

# flashoptim_link_old_glibc(target version): `target` needs nothing of glibc that came after `version` (2.28, say), and
# carries its own libstdc++.
function(flashoptim_link_old_glibc target version)
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libc.so.6 OUTPUT_VARIABLE libc
                  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND "${CMAKE_OBJDUMP}" -T "${libc}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  # "ADDRESS g DF .text SIZE GLIBC_2.34 dlsym", and "(GLIBC_2.2.5) dlsym" for a version that is not the default.
  string(REGEX MATCHALL "[^\n]+GLIBC_[^\n]+\n" lines "${symbols}")
  set(names)
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "(\\(?)GLIBC_([0-9.]+)\\)? +([A-Za-z0-9_]+)\n")
      continue()
    endif()
    set(is_old "${CMAKE_MATCH_1}")
    set(since "${CMAKE_MATCH_2}")
    set(name "${CMAKE_MATCH_3}")
    list(APPEND names ${name})
    if(NOT since VERSION_GREATER version AND (NOT DEFINED old_${name} OR since VERSION_GREATER "${old_${name}}"))
      set(old_${name} ${since})
    endif()
  endforeach()

  list(REMOVE_DUPLICATES names)
  set(source "// Stands before libc.so.6 at link time (cmake/FlashoptimOldGlibc.cmake).\n")
  set(versions)
  foreach(name IN LISTS names)
    if(DEFINED old_${name})
      string(APPEND source
             "extern \"C\" void stub_${name}() {}\n__asm__(\".symver stub_${name}, ${name}@@GLIBC_${old_${name}}\");\n")
      list(APPEND versions ${old_${name}})
    endif()
  endforeach()
  set(script "")
  list(REMOVE_DUPLICATES versions)
  foreach(one IN LISTS versions)
    string(APPEND script "GLIBC_${one} {};\n")
  endforeach()

  set(directory "${CMAKE_CURRENT_BINARY_DIR}/old_glibc")
  file(CONFIGURE OUTPUT "${directory}/stub.cpp" CONTENT "${source}" @ONLY)
  file(CONFIGURE OUTPUT "${directory}/stub.map" CONTENT "${script}" @ONLY)
  # What the static libstdc++ asks for that has no older version.
  file(CONFIGURE OUTPUT "${directory}/since.cpp" CONTENT [[
#include <sys/stat.h>
#include <unistd.h>
#include <cstdlib>
#define HIDDEN extern "C" __attribute__((visibility("hidden")))
// 0: the process may have several threads. Unknown before glibc 2.32.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
// Of std::random_device; 2.36.
HIDDEN unsigned arc4random() {
  unsigned value = 0;
  if (getentropy(&value, sizeof value) != 0) std::abort();
  return value;
}
// Of std::filebuf; 2.33, before which it was an inline function over this.
extern "C" int __fxstat64(int version, int file, struct stat64* result);
HIDDEN int fstat64(int file, struct stat64* result) { return __fxstat64(1, file, result); }
]] @ONLY)
  add_library(${target}_old_libc SHARED "${directory}/stub.cpp")
  set_target_properties(${target}_old_libc PROPERTIES
    OUTPUT_NAME c LIBRARY_OUTPUT_DIRECTORY "${directory}" NO_SONAME ON CXX_VISIBILITY_PRESET default)
  target_link_options(${target}_old_libc PRIVATE -nostdlib "LINKER:-soname,libc.so.6"
                                                 "LINKER:--version-script,${directory}/stub.map")
  add_dependencies(${target} ${target}_old_libc)
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS "${directory}/libc.so")
  target_sources(${target} PRIVATE "${directory}/since.cpp")
  # Before 2.34 these functions stood in libraries of their own.
  target_link_options(${target} PRIVATE
    -static-libstdc++ "LINKER:--no-as-needed" "$<TARGET_FILE:${target}_old_libc>" -l:libpthread.so.0 -l:libdl.so.2
    -l:librt.so.1 "LINKER:--as-needed")
endfunction()

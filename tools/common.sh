# Sourced by the scripts beside it, in the repository's root.
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONPATH FLASHOPTIM_OPS_LIBRARY  # another checkout's must not stand in for what is built here
python=$PWD/.venv/bin/python
# A file that includes torch's headers takes up to 2 GB to compile.
jobs=${JOBS:-$(awk -v cores="$(nproc)" \
  '/MemAvailable/ {n = int($2 / 2e6); print n < 1 ? 1 : n < cores ? n : cores}' /proc/meminfo)}

# configure BUILD_DIR PRESET OPTIONS...: our presets, with Ninja and the torch of .venv.
configure() {
  local directory=$1 preset=$2
  shift 2
  # A folder copied or moved here from elsewhere cannot be reused.
  if [[ -e $directory/CMakeCache.txt ]] &&
    ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$directory/CMakeCache.txt"; then
    rm -rf "$directory"
  fi
  cmake --preset "$preset" -B "$directory" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
    -DCMAKE_PREFIX_PATH="$("$python" -c 'import torch; print(torch.utils.cmake_prefix_path)')" "$@"
}

# build DIRECTORY [TARGETS...]
build() {
  local directory=$1
  shift
  cmake --build "$directory" --parallel "$jobs" ${1:+--target "$@"}
}

#!/usr/bin/env bash
# Uses flashoptim from another project, in an empty folder.
# usage: consumer.sh KIND SOURCE_DIR BUILD_DIR WORK_DIR
#   find_package        installs BUILD_DIR's library, builds examples/cmake_consumer and examples/plain_cpp against it
#   find_package_torch  the same for examples/cpp_quickstart with COMPONENTS torch (Torch_DIR)
#   conda               the same against a torch that lies in a prefix as conda's does, with flashoptim in it, too
#   add_subdirectory    builds examples/cmake_consumer with SOURCE_DIR as a part of it
#   pip                 builds a wheel for old systems, looks at what it needs of them, trains with it
set -euo pipefail
kind=$1 source=$2 build=$3 work=$4
rm -rf "$work"
mkdir -p "$work"

install() { cmake --install "$build" --prefix "$work/prefix" --component flashoptim_development >"$work/install.log"; }

# project DIRECTORY OPTIONS...: configures and builds it into $work/<its name>
project() {
  local name
  name=$(basename "$1")
  echo "-- $name $kind"
  cmake -S "$source/examples/$1" -B "$work/$name" -DCMAKE_BUILD_TYPE=Release "${@:2}"
  cmake --build "$work/$name"
}

case $kind in
  find_package)
    install
    project cmake_consumer -DCMAKE_PREFIX_PATH="$work/prefix"
    "$work/cmake_consumer/one_step"
    project plain_cpp -DCMAKE_PREFIX_PATH="$work/prefix"
    "$work/plain_cpp/plain_cpp" 100
    ;;
  find_package_torch)
    install
    project cpp_quickstart -DCMAKE_PREFIX_PATH="$work/prefix" -DTorch_DIR="$Torch_DIR"
    (cd "$work" && cpp_quickstart/cpp_quickstart)
    ;;
  conda)
    if [[ -z ${FLASHOPTIM_TEST_ALL:-} ]]; then
      echo "consumer.sh: conda's layout is tested with FLASHOPTIM_TEST_ALL=1"
      exit 77
    fi
    # conda's LibTorch: headers, libraries and CMake files of torch under one prefix, beside everything else that is
    # there, in the place of a folder of torch's own.
    torch=$(realpath "$Torch_DIR/../../..") conda=$work/conda
    mkdir -p "$conda/share/cmake" "$conda/include" "$conda/lib"
    cp -r "$torch/share/cmake/." "$conda/share/cmake"
    for folder in include lib; do
      for entry in "$torch/$folder"/*; do ln -s "$entry" "$conda/$folder/"; done
    done
    cmake --install "$build" --prefix "$conda" --component flashoptim_development >"$work/install.log"
    project cpp_quickstart -DCMAKE_PREFIX_PATH="$conda"
    grep -q "^Torch_DIR:PATH=$conda/" "$work/cpp_quickstart/CMakeCache.txt"
    (cd "$work" && cpp_quickstart/cpp_quickstart)
    ;;
  add_subdirectory)
    project cmake_consumer -DFLASHOPTIM_SOURCE_DIR="$source" -DFLASHOPTIM_CUDA=OFF
    "$work/cmake_consumer/one_step"
    ;;
  pip)
    # A copy without build folders: a wheel is built from what is in the repository.
    mkdir "$work/source"
    tar -C "$source" --exclude='./build*' --exclude=./.venv --exclude=./.git --exclude=./demo_out -c . |
      tar -C "$work/source" -x
    "$PYTHON" -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$work/wheels" \
      -C cmake.define.FLASHOPTIM_CUDA=OFF -C cmake.define.FLASHOPTIM_OLD_GLIBC=ON "$work/source"
    ls -l "$work/wheels"
    "$PYTHON" "$source/tests/consumer/try_wheel.py" "$work"/wheels/flashoptim_native-*.whl
    ;;
  *)
    echo "consumer.sh: no kind '$kind'" >&2
    exit 2
    ;;
esac

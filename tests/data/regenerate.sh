#!/bin/sh
# Rewrites the golden files of the default codec, the dither and the state format from the current code, after an
# intended change of format (which also raises kStateFormatVersion in include/flashoptim/version.h). The paper codec's
# golden vectors stand in tests/core/paper_codec_test.cpp and are frozen by hand.
set -eu
build=${1:?usage: tests/data/regenerate.sh BUILD_DIR}
FLASHOPTIM_REGENERATE=1 "$build/tests/kernels/kernel_tests" --gtest_filter='GoldenState.*' --gtest_brief=1

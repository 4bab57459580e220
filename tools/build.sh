#!/usr/bin/env bash
# Builds everything into build/dev, setting up first. usage: tools/build.sh [TARGETS...]
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
source tools/common.sh
configure build/dev dev -DCMAKE_BUILD_TYPE=Release
build build/dev "$@"

#!/usr/bin/env bash
# Builds the documentation's site into build/site. A dead link or a reference to nothing is an error.
# usage: tools/docs.sh [serve]     serve: on this machine's port 8000, built anew at every change
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
source tools/common.sh
# In an environment of its own: a site needs neither torch nor what the tests need. Docstrings are read, not imported.
site=$PWD/build/mkdocs
if [[ ! -x $site/bin/mkdocs ]]; then
  "$python" -m venv "$site"
  "$site/bin/python" -m pip install --disable-pip-version-check --quiet \
    mkdocs==1.6.1 mkdocs-material==9.8.2 "mkdocstrings[python]==1.0.8"
fi
if [[ ${1:-} == serve ]]; then
  exec "$site/bin/mkdocs" serve
fi
NO_MKDOCS_2_WARNING=1 "$site/bin/mkdocs" build --strict --quiet
echo "[docs] build/site/index.html: $(find build/site -name '*.html' | wc -l) pages"

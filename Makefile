# `make demo` and `make test` are all that a reader of the README needs; both install what they lack.
.PHONY: help demo test test-all fuzz setup build bench wheel docs format style clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## train a GPT on real text with FlashAdamW and with torch's fp32 AdamW, and compare (7 minutes)
	tools/demo.sh

test:  ## check style, build everything and run the tests (half an hour on 2 cores)
	tools/test.sh

test-all:  ## the tests with the long sweeps too
	tools/test.sh --all

fuzz:  ## ten minutes of libFuzzer over each target of tests/fuzz (clang)
	tools/fuzz.sh

setup:  ## install what is missing: apt packages, .venv
	tools/setup.sh

build:  ## build everything into build/dev
	tools/build.sh

bench:  ## time the CPU step beside torch's AdamW; writes benchmarks/results/<machine>.md
	tools/bench_cpu.sh

wheel:  ## the wheel that is published, CPU and CUDA in one, into dist/ (15 minutes; tools/wheel.sh --cpu: no nvcc)
	tools/wheel.sh

docs:  ## the documentation's site, into build/site
	tools/docs.sh

format: setup  ## clang-format, ruff format, sorted imports, wrapped Markdown: what the style checks can mend
	.venv/bin/python tools/style.py --mend

style: setup  ## the style checks alone: formatting, ruff, mypy, 120 columns (seconds)
	.venv/bin/python tools/style.py

clean:  ## remove what was built (not .venv)
	rm -rf build demo_out

# Every command of this repository, and the promise that each works from a fresh checkout on Debian 12 with
# gcc, make and Python (headers and venv): as root or not, without git, with no network but pip's.
#
#   make run        build, then the demo: a real aiohttp application on uringloop, asyncio and uvloop
#   make test       lint, types, C tests under ASan+UBSan, Python tests on every monitor with one Python
#   make test-all   the same, the slow cases, all but CPython's tests under ASan+UBSan, the wheel, every other Python found
#   make bench      the benchmarks (ARGS="..." are handed over)
#   make doctor     what io_uring allows on this machine
#   make lint | types | test-c | test-python | test-slow | test-asan | test-wheel | test-matrix | format | clean
#
#   PYTHON=python3.12   the interpreter; each chosen one gets an environment of its own, .venv-3.12
#   EXTRAS=dev,hosts    GLib and Qt for the tests that run in them, which skip otherwise; .ci/run has the list of Debian
#                       packages that they want
#   PYTHONS="..."       the interpreters of test-matrix, by default all of 3.11+ on PATH and in pyenv
#   JOBS=2              test processes;  TESTS="tests/test_cli.py -k doctor"  which tests

PYTHON ?= python3
EXTRAS ?= dev
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
JOBS ?= 2
TESTS ?= tests
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# ---------------------------------------------------------------------------------------------- environments
# An environment belongs to one interpreter, in one version, in one place: the stamp's name says which, so
# that another version or a moved checkout gets a new environment.
ABOUT := $(shell $(PYTHON) -c 'import sys, sysconfig; print("%d.%d%s.%d" % (*sys.version_info[:2], sys.abiflags, \
  sys.version_info[2]), sysconfig.get_config_var("EXT_SUFFIX"))' 2>/dev/null)
ID := $(word 1,$(ABOUT))
EXT := $(word 2,$(ABOUT))
PLACE := $(firstword $(shell printf '%s' '$(CURDIR)' | cksum))
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(basename $(ID)))
BIN := $(VENV)/bin
MADE := $(VENV)/made-$(ID)-$(PLACE)
INSTALLED := $(VENV)/installed-$(EXTRAS)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

SOURCES := pyproject.toml setup.py $(wildcard ffi/*.c ffi/*.h ffi/*.py uringloop/_core/*.p*)
BUILT := $(and $(wildcard uringloop/_fdmon*.so),$(wildcard uringloop/_core/core$(EXT)))

define check
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "uringloop needs Python 3.11 or newer; '$(PYTHON)' is not: choose another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "uringloop needs Python's venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "uringloop needs the headers of $(PYTHON) (Python.h); on Debian: apt-get install python3-dev" >&2; exit 1; }
endef
define check-cc
	@command -v $(CC) >/dev/null || \
	  { echo "uringloop needs a C compiler ('$(CC)' was not found); on Debian: apt-get install gcc libc6-dev" >&2; exit 1; }
	@echo '#include <stdio.h>' | $(CC) -E - >/dev/null 2>&1 || \
	  { echo "uringloop needs the headers of the C library; on Debian: apt-get install libc6-dev" >&2; exit 1; }
endef

$(MADE):
	$(check)
	$(check-cc)
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Extras of pyproject.toml, with the package built from this checkout. Built anew when a source is newer,
# or when an extension is gone.
$(VENV)/installed-%: $(MADE) $(SOURCES) $(if $(BUILT),,FORCE)
	$(check-cc)
	@# setuptools looks at the sources only, not at how they are to be built.
	$(if $(filter pyproject.toml setup.py ffi/build.py,$?),rm -rf build/uringloop uringloop/_fdmon*.so uringloop/_core/core$(EXT))
	$(PIP) install --editable '.[$*]'
	@touch $@

FORCE:

# ---------------------------------------------------------------------------------------------- for users
help:
	@sed -n '/^#   /s/^#   //p' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/installed-demo
	$(BIN)/python -m uringloop demo $(ARGS)

doctor: $(VENV)/installed-demo
	$(BIN)/python -m uringloop doctor $(ARGS)

bench: $(VENV)/installed-bench
	$(BIN)/python -m uringloop bench $(ARGS)

# ---------------------------------------------------------------------------------------------- checks
test: lint types test-c test-python

test-all: test test-slow test-asan test-wheel test-matrix

C_FILES := $(wildcard ffi/*.[ch] tests/c/*.[ch] benchmarks/*.[ch])

# cython-lint parses a .pxi file only under the name of a module of its own; it finds pycodestyle on PATH.
lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	@rm -rf build/lint && mkdir -p build/lint
	@for file in uringloop/_core/*.pxi; do cp $$file build/lint/$$(basename $$file .pxi).pyx; done
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint --max-line-length 120 uringloop/_core/*.pyx uringloop/_core/*.pxd build/lint/*.pyx \
	  | sed 's|^$(CURDIR)/||; s|^build/lint/\(.*\)\.pyx|uringloop/_core/\1.pxi|'

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(C_FILES)

types: $(INSTALLED)
	$(BIN)/python -m mypy

# Tests that measure time or load are marked "alone": they run first, in one process, with nothing beside them.
# (pytest's exit code 5 says that there was none.) The closing line is that of all the others.
PYTEST := $(BIN)/python -m pytest
define pytest
	$(PYTEST) -m 'alone and $(1)' $(TESTS) || test $$? = 5
	$(PYTEST) -n $(JOBS) --dist worksteal -m 'not alone and $(1)' $(TESTS)
endef

test-python: $(INSTALLED)
	$(call pytest,not slow)

test-slow: $(INSTALLED)
	$(call pytest,slow)

# The same tests over extensions that are built with ASan and UBSan, in a copy of this checkout with an environment
# of its own. The interpreter is an ordinary one: PYTHONMALLOC makes ASan know its objects, and leaks, which it
# would report by the thousand, are counted by tests/test_leaks.py. What they find is written to a file for each process
# and fails the run, also where a test expects that its child fails. Left out: CPython's tests, for their time, and
# the count of page faults, which are ASan's own here.
ASAN := build/asan
ASAN_TREE := $(ASAN)/tree
ASAN_MADE := $(ASAN)/made-$(ID)-$(PLACE)-$(EXTRAS)
ASAN_FLAGS := -fsanitize=address,undefined
ASAN_TESTS := tests --ignore=tests/conformance \
  --deselect=tests/test_contract.py::test_a_message_of_1_kib_maps_no_memory
ASAN_LIBRARIES = $(foreach name,asan ubsan,$(shell $(CC) -print-file-name=lib$(name).so))
ASAN_ENVIRONMENT = LD_PRELOAD="$(ASAN_LIBRARIES)" PYTHONMALLOC=malloc URINGLOOP_TEST_SANITIZED=1 \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:log_path=$(CURDIR)/$(ASAN)/found \
  UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(ASAN)/found
ASAN_COPY = tar -c --exclude='*.so' --exclude=__pycache__ docs examples ffi tests uringloop setup.py pyproject.toml README.md LICENSE \
  | tar -x -C $(ASAN_TREE)

# pip keeps what it builds, whatever the flags: PyGObject is built before them, in the other environment.
$(ASAN_MADE): $(INSTALLED) $(SOURCES)
	$(check-cc)
	rm -rf $(ASAN) && mkdir -p $(ASAN_TREE)
	$(ASAN_COPY)
	$(PYTHON) -m venv $(ASAN)/venv
	CC="$(CC)" CFLAGS="$(ASAN_FLAGS) -fno-sanitize-recover=all -fno-omit-frame-pointer -g" LDFLAGS="$(ASAN_FLAGS)" \
	  $(ASAN)/venv/bin/python -m pip --disable-pip-version-check --quiet install --editable '$(ASAN_TREE)[$(EXTRAS)]'
	@touch $@

test-asan: PYTEST = cd $(ASAN_TREE) && $(ASAN_ENVIRONMENT) ../venv/bin/python -m pytest
test-asan: TESTS = $(ASAN_TESTS)
test-asan: $(ASAN_MADE)
	rm -rf $(ASAN_TREE)/{docs,examples,tests} $(ASAN)/found*
	$(ASAN_COPY)
	cd $(ASAN_TREE) && $(ASAN_ENVIRONMENT) ../venv/bin/python -c 'import uringloop.loop, pathlib; \
	  maps = pathlib.Path("/proc/self/maps").read_text(); assert "libasan" in maps and "$(ASAN_TREE)" in maps'
	$(call pytest,not slow)
	@! cat $(ASAN)/found* 2>/dev/null || { echo "test-asan: ASan or UBSan found the above" >&2; exit 1; }

# The C core without Python. Each tests/c/test_*.c is one program; one that holds the line
# "/* link: FLAGS */" is linked with these flags (-Wl,--wrap=syscall lets a test play the kernel).
C_BUILD := build/c
C_FLAGS := -std=gnu11 -O1 -g -fno-omit-frame-pointer -pthread -Iffi \
  -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wconversion \
  -fsanitize=address,undefined -fno-sanitize-recover=all
C_OBJECTS := $(patsubst ffi/%.c,$(C_BUILD)/%.o,$(wildcard ffi/*.c))
C_TESTS := $(patsubst tests/c/%.c,$(C_BUILD)/%,$(wildcard tests/c/test_*.c))

.SECONDARY: $(C_OBJECTS)
$(C_BUILD)/%.o: ffi/%.c $(wildcard ffi/*.h) Makefile
	$(check-cc)
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -c -o $@ $<

$(C_BUILD)/test_%: tests/c/test_%.c $(wildcard tests/c/*.h) $(C_OBJECTS)
	$(CC) $(C_FLAGS) -o $@ $< $(C_OBJECTS) $$(sed -n 's|^/\* link: \(.*\) \*/$$|\1|p' $<)

test-c: $(C_TESTS)
	@test -n "$(C_TESTS)" || { echo "test-c: there is no tests/c/test_*.c" >&2; exit 1; }
	@for program in $(C_TESTS); do echo "$$program"; \
	  ASAN_OPTIONS=detect_stack_use_after_return=1 timeout 120 "$$program" || \
	    { echo "test-c: $$program failed with exit code $$?" >&2; exit 1; }; done
	@echo "test-c: $(words $(C_TESTS)) programs passed under ASan and UBSan"

# What users get: the wheel, made from the source archive, alone in an environment without this checkout.
test-wheel: $(INSTALLED)
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) install build
	$(BIN)/python -m build --outdir build/wheel . >build/wheel/log 2>&1 || { cat build/wheel/log >&2; exit 1; }
	$(BIN)/python -m zipfile -l build/wheel/*.whl | awk 'NR > 1 { print $$1 }' >build/wheel/files
	! grep -v -E '^uringloop(-[0-9a-z.]+\.dist-info)?/' build/wheel/files
	! grep -E '\.(c|h|pyx|pxd|pxi)$$' build/wheel/files
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip --disable-pip-version-check --quiet install build/wheel/*.whl
	! build/wheel/venv/bin/python -c 'import Cython' 2>/dev/null
	cd build/wheel && venv/bin/python -m uringloop doctor
	@echo "test-wheel: the wheel holds only uringloop/, without sources, and runs alone"

# Every other supported Python: 3.11+ on PATH (a pyenv shim of a version that is not selected fails and drops
# out) and in pyenv, one of each minor version.
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHONS ?= $(shell for p in python3.{11..15} $(PYENV_ROOT)/versions/3.1[1-9]*/bin/python3; do \
  "$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null || true; done \
  | sort -V -u -k1,1 | awk '$$1 != "$(basename $(ID))" { print $$2 }')

test-matrix:
	@test -n "$(PYTHONS)" || echo "test-matrix: no other Python than $(ID) was found; name some with PYTHONS="
	@for python in $(PYTHONS); do $(MAKE) --no-print-directory test-python PYTHON="$$python"; done

clean:
	rm -rf build dist .venv .venv-* uringloop/_fdmon*.so uringloop/_core/core*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find uringloop ffi tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

.PHONY: FORCE help run doctor bench test test-all lint format types test-python test-slow test-c test-asan test-wheel test-matrix clean

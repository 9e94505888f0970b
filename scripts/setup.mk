# Set-up: the system's packages and the Python environments. The Makefile includes this file first,
# because its rules need SETUP.

# Homebrew keeps OpenBLAS out of pkg-config's path, because macOS has its own BLAS.
ifeq ($(shell uname -s),Darwin)
BREW := $(shell brew --prefix 2>/dev/null)
export PKG_CONFIG_PATH := $(BREW)/opt/openblas/lib/pkgconfig:$(PKG_CONFIG_PATH)
endif

# The goals that install what is missing before they build; all others only build. With one of these
# goals, SETUP is setup. Every object depends on $(SETUP) order-only (after the |), so setup runs
# before the compiler and never makes an object rebuild.
goals = $(filter $(1),$(or $(MAKECMDGOALS),all))
INSTALLING := setup demo test c-tests asan tsan neon parity scale-test lint format mutants bench \
    bench-kernels bench-data bench-deps gpu-check cuda-build .venv/% .venv-scale/%
SETUP := $(if $(call goals,$(INSTALLING)),setup)

# The groups of packages (see scripts/setup.sh) that this call's goals need, installed in one go:
# under make -j, two installers at a time would get in each other's way.
GROUPS = $(strip build \
    $(if $(call goals,setup test c-tests asan tsan lint mutants gpu-check $(BUILD)/tests/%),test) \
    $(if $(call goals,test asan neon parity scale-test lint format mutants bench bench-data \
        bench-deps gpu-check .venv/% .venv-scale/%),python) \
    $(if $(call goals,lint format),lint) \
    $(if $(call goals,asan tsan mutants),sanitizers) \
    $(if $(call goals,scale-test),scale) \
    $(if $(call goals,neon),$(if $(HAS_NEON),,cross)))

# What a recipe runs when its compiler or linker fails: it names the packages that are missing, if
# any, and fails too.
HINT = scripts/setup.sh --hint $(GROUPS)

##@ Set-up

## setup          install the packages that are missing, after printing the command
# Phony: a stamp would not notice that a package was removed. The check takes about 0.1 s.
.PHONY: setup
setup:
	@scripts/setup.sh $(GROUPS)

# A stamp is newer than the requirements that it stands for. pip itself is not upgraded: that would
# be a download without a gain.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -r

.venv/bin/python: | $(SETUP)
	$(PYTHON) -m venv .venv

.venv/base.stamp: requirements.txt tests/requirements.txt | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) tests/requirements.txt
	@touch $@

.venv/torch.stamp: tests/requirements-torch.txt .venv/base.stamp
	.venv/bin/python $(PIP_INSTALL) tests/requirements-torch.txt
	@touch $@

# llama.cpp, built for this CPU.
.venv/bench.stamp: bench/requirements.txt .venv/base.stamp
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv/bin/python $(PIP_INSTALL) bench/requirements.txt
	@touch $@

# Ray has many dependencies, so it gets a separate environment.
.venv-scale/stamp: scale/requirements.txt | $(SETUP)
	$(PYTHON) -m venv .venv-scale
	.venv-scale/bin/python $(PIP_INSTALL) scale/requirements.txt
	@touch $@

# 64-bit ARM: the Makefile's rules with a cross compiler. The libraries are Debian's for arm64,
# unpacked into a folder that only this build and the emulator look into.

.PHONY: neon neon-tests

# A 64-bit ARM machine needs none of this: there, make test runs NEON natively.
HAS_NEON   := $(filter aarch64 arm64,$(shell uname -m))
CROSS      := build/aarch64
ARM64      := aarch64-linux-gnu
ARM64_LIBS := /usr/lib/$(ARM64)
SYSROOT    := $(CROSS)/sysroot

# These go through the environment, not make's variables, because they must reach $(shell ...) too.
CROSS_PKG_CONFIG := $(SYSROOT)$(ARM64_LIBS)
CROSS_ENV = PKG_CONFIG_SYSROOT_DIR=$(SYSROOT) BPO_EMULATOR=qemu-aarch64 \
    QEMU_LD_PREFIX='$(CURDIR)/$(SYSROOT)' \
    PKG_CONFIG_LIBDIR=$(CROSS_PKG_CONFIG)/pkgconfig:$(CROSS_PKG_CONFIG)/openblas-pthread/pkgconfig
CROSS_LDFLAGS = -L$(SYSROOT)$(ARM64_LIBS) -Wl,-rpath-link=$(SYSROOT)$(ARM64_LIBS) \
    -Wl,-rpath=$(ARM64_LIBS)/openblas-pthread
CROSS_VARIABLES = BUILD=$(CROSS) BIN=$(CROSS)/bpo PLAIN_BIN=$(CROSS)/bpo-plain \
    CC=$(ARM64)-gcc CXX=$(ARM64)-g++ AR=$(ARM64)-ar LDFLAGS='$(CROSS_LDFLAGS)'

## neon           cross-compile for 64-bit ARM; compare NEON with scalar C under an emulator
neon: $(if $(HAS_NEON),,$(CROSS)/sysroot.stamp .venv/base.stamp)
ifdef HAS_NEON
	@echo 'this CPU has NEON: make test tests it'
else
	env $(CROSS_ENV) $(MAKE) $(CROSS_VARIABLES) neon-tests
endif

$(CROSS)/sysroot.stamp: scripts/sysroot.sh | $(SETUP)
	scripts/sysroot.sh $(SYSROOT)
	@touch $@

# test_threads is not among them. The emulator keeps x86's order of loads and stores, so it would
# show nothing that make test does not; and with qemu 7.2 it once hung, which 1,700 more runs did
# not repeat.
neon-tests: $(BIN) $(PLAIN_BIN) $(BUILD)/tests/test_kernels $(BUILD)/tests/test_plain
	@scripts/c_tests.sh $(BUILD)/tests/test_kernels $(BUILD)/tests/test_plain
	BPO_BIN=./$(BIN) BPO_PLAIN=./$(PLAIN_BIN) \
	    .venv/bin/python -m pytest tests/test_determinism.py -k whole_rewrites

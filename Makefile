# make            builds ./bpo
# make help       lists all targets
#
# Every target first looks whether the packages that it needs are there and installs those that are missing, through
# scripts/setup.sh. That is why the pkg-config variables below are recursive (=, not :=): they are expanded when a recipe
# runs, which is after the set-up, not when make reads this file.

VERSION := 0.1.0

PKG_CONFIG ?= pkg-config
PYTHON     ?= python3
PREFIX     ?= /usr/local
DESTDIR    ?=
BUILD      ?= build
BIN        ?= bpo
SHAPE      ?= 1b

# make bench BENCH_PYTHON=... takes another Python environment, which has the other engines already.
BENCH_PYTHON ?= .venv/bin/python
BENCH_STAMP  = $(if $(filter .venv/bin/python,$(BENCH_PYTHON)),.venv/base.stamp)
BENCH_BINS   = $(BUILD)/bench/bpo_worker $(BUILD)/bench/kernels_bench
BENCH_RESULT = bench/results/$(if $(MODEL),$(notdir $(realpath $(MODEL))),$(SHAPE)).json

export CC CXX PKG_CONFIG PYTHON

# Homebrew keeps OpenBLAS out of pkg-config's path, because macOS has a BLAS of its own.
ifeq ($(shell uname -s),Darwin)
FEATURES := -D_DARWIN_C_SOURCE
export PKG_CONFIG_PATH := $(shell brew --prefix 2>/dev/null)/opt/openblas/lib/pkgconfig:$(PKG_CONFIG_PATH)
else
FEATURES := -D_GNU_SOURCE
endif

# CFLAGS and CXXFLAGS are the user's. What stands in ALL_CFLAGS is needed: without -ffp-contract=off the compiler may fuse
# a multiply and an add on one machine and not on another, and the same seed would no longer give the same text; for the
# same reason there is no -march (cpu/ chooses at run time) and never -ffast-math.
CFLAGS   ?= -O3 -g
CXXFLAGS ?= -O2 -g
WARNINGS := -Wall -Wextra -Wshadow -Wconversion
ALL_CFLAGS   = -std=c11 -I. $(FEATURES) -DBPO_VERSION='"$(VERSION)"' $(WARNINGS) -ffp-contract=off -pthread $(CFLAGS) $(CPPFLAGS)
ALL_CXXFLAGS = -std=c++17 -I. -Wall -Wextra -pthread $(CXXFLAGS) $(CPPFLAGS)

# Flags of a library: $(call library,--libs,PKG_CONFIG_NAME,FALLBACK)
library = $(shell $(PKG_CONFIG) $(1) $(2) 2>/dev/null || echo $(3))
LIB_CFLAGS = $(call library,--cflags,openblas) $(call library,--cflags,jansson) $(call library,--cflags,libxxhash)
# sentencepiece.pc names the trainer's library too, which nobody here calls.
LIBS = $(filter-out -lsentencepiece_train,$(call library,--libs,sentencepiece,-lsentencepiece)) \
       $(call library,--libs,openblas,-lopenblas) $(call library,--libs,jansson,-ljansson) \
       $(call library,--libs,libxxhash,-lxxhash) -lm $(if $(filter Linux,$(shell uname -s)),-ldl)

# make neon builds here, unless this machine is a 64-bit ARM itself.
CROSS    := build/aarch64
HAS_NEON := $(filter aarch64 arm64,$(shell uname -m))

# What is not the command line is the library.
CLI_OBJS := $(patsubst %.c,$(BUILD)/%.o,$(wildcard cli/*.c))
LIB_OBJS := $(patsubst %.c,$(BUILD)/%.o,$(wildcard *.c base/*.c engine/*.c cpu/*.c)) $(BUILD)/base/sentencepiece_c.o
C_TESTS  := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
# The tests' substitute for a GPU switches stacks by hand.
CUDA_ON_CPU := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(BUILD)/cuda_on_cpu/bpo_cuda.so)

.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: all demo cuda gpu-check test bench bench-data bench-deps bench-kernels parity neon scale-test asan lint format \
    install uninstall clean distclean help setup c-tests

##@ Build and try

all: $(BIN)  ## build ./bpo (default)

demo: $(BIN)  ## rewrite three prompts with the bundled demo model (needs no Python)
	@scripts/demo.sh ./$(BIN)

cuda: $(BIN) bpo_cuda.so  ## build the GPU backend, bpo_cuda.so, with NVIDIA's nvcc and cuBLAS; CUDA_ARCH="90" for one kind of GPU

##@ Check

test: $(BIN) c-tests $(BENCH_BINS) .venv/base.stamp  ## C tests, then the command line and the exporter; no torch, about 2 minutes
	BPO_BIN=./$(BIN) .venv/bin/python -m pytest tests

asan: setup  ## the C and command-line tests under the address and undefined-behaviour sanitizers
	$(MAKE) BUILD=build/asan BIN=build/asan/bpo \
	    CFLAGS='$(SANITIZE)' CXXFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' asan-tests

# On a 64-bit ARM machine make test does this, natively.
neon: $(if $(HAS_NEON),,$(CROSS)/sysroot.stamp .venv/base.stamp)  ## cross-compile for 64-bit ARM; NEON against scalar C under an emulator
ifdef HAS_NEON
	@echo 'this CPU has NEON itself: make test runs it'
else
	env $(CROSS_ENV) $(MAKE) $(CROSS_VARIABLES) neon-tests
endif

parity: $(BIN) .venv/torch.stamp  ## compare with transformers on random models, or on one: make parity HF_DIR=folder
	BPO_BIN=./$(BIN) .venv/bin/python tests/parity.py $(if $(HF_DIR),--hf-dir '$(HF_DIR)')

scale-test: $(BIN) .venv-scale/stamp  ## data sets on many machines: Ray, Slurm's script and GNU parallel, all on this one
	BPO_BIN=./$(BIN) .venv-scale/bin/python -m pytest scale

lint: setup .venv/base.stamp  ## formatters and static analysis: nothing may be found
	clang-format --dry-run -Werror $(LINT_C) $(LINT_CXX) $(LINT_CUDA)
	@echo clang-tidy
	@printf '%s\n' $(filter %.c,$(LINT_C)) | \
	    xargs -P 2 -I {} clang-tidy --quiet {} -- $(ALL_CFLAGS) $(LIB_CFLAGS) -I. 2>/dev/null
	cppcheck $(CPPCHECK) $(filter-out cpu/lanes.h,$(LINT_C)) $(LINT_CXX) # that one is a part of cpu/avx512.c
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	shellcheck scripts/*.sh scale/*.sh $(wildcard .ci/run)

format: setup .venv/base.stamp  ## let clang-format and ruff rewrite the sources
	clang-format -i $(LINT_C) $(LINT_CXX) $(LINT_CUDA)
	.venv/bin/ruff format .

##@ Measure

bench: $(BIN) $(BENCH_BINS) $(BENCH_STAMP)  ## against llama.cpp and transformers: SHAPE=15m|110m|1b|7b or MODEL=folder; THREADS= REPEATS=
	$(BENCH_PYTHON) bench/run.py $(if $(MODEL),--model '$(MODEL)',--shape $(SHAPE)) $(if $(THREADS),--threads $(THREADS)) \
	    $(if $(REPEATS),--repeats $(REPEATS)) $(BENCH_ARGS)
	@$(BENCH_PYTHON) -c 'import matplotlib' 2>/dev/null && $(BENCH_PYTHON) bench/plots.py $(BENCH_RESULT) || \
	    echo 'no plots: matplotlib is not installed (make bench-deps)'

bench-kernels: $(BUILD)/bench/kernels_bench  ## kernels against the machine's limits: SHAPE= THREADS= ROUNDS= SIMD=avx2,scalar JSON=file
	@$< --shape $(SHAPE) $(if $(THREADS),--threads $(THREADS)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	    $(if $(SIMD),--simd $(SIMD)) $(if $(JSON),--json >$(JSON))

bench-data: $(BIN) $(BUILD)/bench/bpo_worker  ## data sets against llama.cpp and transformers: SHAPE=15m|110m|1b THREADS=
	$(or $(BENCH_PYTHON),.venv/bin/python) bench/data.py --shape $(SHAPE) $(if $(THREADS),--threads $(THREADS)) $(BENCH_ARGS)

bench-deps: .venv/bench.stamp  ## install the other engines for make bench; builds llama.cpp, about 10 minutes

##@ Install

install: $(BIN) $(BUILD)/libbpo.a  ## install program, library, man page and demo model under DESTDIR and PREFIX
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin lib/pkgconfig include share/man/man1 share/bpo)
	install -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/bpo
	install -m 644 $(BUILD)/libbpo.a $(DESTDIR)$(PREFIX)/lib/libbpo.a
	install -m 644 bpo.h bpo_error.h $(DESTDIR)$(PREFIX)/include
	install -m 644 cli/bpo.1 $(DESTDIR)$(PREFIX)/share/man/man1/bpo.1
	install -m 644 demo/bpo-demo.bin $(DESTDIR)$(PREFIX)/share/bpo/bpo-demo.bin
	if [ -f bpo_cuda.so ]; then install -d $(DESTDIR)$(PREFIX)/lib/bpo && install -m 755 bpo_cuda.so $(DESTDIR)$(PREFIX)/lib/bpo; fi
	sed -e 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(VERSION)|; s|@CXXLIB@|$(CXXLIB)|' scripts/bpo.pc.in >$(BUILD)/bpo.pc
	install -m 644 $(BUILD)/bpo.pc $(DESTDIR)$(PREFIX)/lib/pkgconfig/bpo.pc

uninstall:  ## remove what install put there
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/,bin/bpo lib/libbpo.a include/bpo.h include/bpo_error.h \
	    lib/pkgconfig/bpo.pc share/man/man1/bpo.1 share/bpo/bpo-demo.bin lib/bpo/bpo_cuda.so)
	-rmdir $(DESTDIR)$(PREFIX)/share/bpo $(DESTDIR)$(PREFIX)/lib/bpo

##@ Clean

clean:  ## remove what was built
	rm -rf build bpo bpo_cuda.so

distclean: clean  ## ... and the Python environments
	rm -rf .venv .venv-scale

help:  ## this list
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@printf '\nVariables: CC CXX CFLAGS CXXFLAGS LDFLAGS PYTHON PREFIX DESTDIR\n'

# ------------------------------------------------------------------------------------------------------------------ set-up

# What the goals of this call need, installed in one go (two installers at a time, under make -j, would be in each other's way).
goal = $(filter $(1),$(or $(MAKECMDGOALS),all))
GROUPS := build $(if $(call goal,test c-tests asan% neon-tests lint $(BUILD)/tests/%),test) \
          $(if $(call goal,test asan% parity neon bench bench-data bench-deps lint format .venv/% scale-test .venv-scale/%),python) \
          $(if $(call goal,scale-test),scale) $(if $(call goal,neon),$(if $(HAS_NEON),,cross)) \
          $(if $(call goal,lint format),lint) $(if $(call goal,asan%),asan)

# Phony and cheap (it looks, about 0.1 s): a stamp would not see that a package was removed. Files depend on it order-only
# (after the |), so it never makes them rebuild.
setup:
	@scripts/setup.sh $(GROUPS)

# A stamp is newer than the requirements that it stands for. --upgrade-deps would cost a download and gain nothing.
.venv/bin/python: | setup
	$(PYTHON) -m venv .venv

.venv/base.stamp: requirements.txt tests/requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

# llama.cpp for this CPU, as fast as it gets.
.venv/bench.stamp: bench/requirements.txt .venv/base.stamp
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@touch $@

.venv/torch.stamp: tests/requirements-torch.txt .venv/base.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-torch.txt
	@touch $@

# Ray brings much along, so it has an environment of its own.
.venv-scale/stamp: scale/requirements.txt | setup
	$(PYTHON) -m venv .venv-scale
	.venv-scale/bin/python -m pip install --quiet --disable-pip-version-check -r scale/requirements.txt
	@touch $@

# ------------------------------------------------------------------------------------------------------------------- build

# The C++ compiler links, because it knows the name of its own runtime library.
$(BIN): $(CLI_OBJS) $(BUILD)/libbpo.a
	$(CXX) -pthread $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/libbpo.a: $(LIB_OBJS)
	rm -f $@
	$(AR) rcs $@ $^

# -MMD -MP writes the headers that an object depends on next to it. This file is a dependency for its flags and VERSION.
$(BUILD)/%.o: %.c Makefile | setup
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LIB_CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.cc Makefile | setup
	@mkdir -p $(@D)
	$(CXX) $(ALL_CXXFLAGS) $(call library,--cflags,sentencepiece) -MMD -MP -c -o $@ $<

# Every tests/test_*.c is a program of its own. A test may include a .c file of the library to reach its static functions:
# it then defines that file's names itself, and the linker leaves the archive's member where it is.
$(C_TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(BUILD)/libbpo.a
	$(CXX) -pthread $(LDFLAGS) -o $@ $^ $(call library,--libs,cmocka,-lcmocka) $(LIBS)

$(BUILD)/tests/%.o: tests/%.c Makefile | setup
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LIB_CFLAGS) $(call library,--cflags,cmocka) -I. -MMD -MP -c -o $@ $<

c-tests: $(C_TESTS) $(CUDA_ON_CPU)
	@scripts/c_tests.sh $(C_TESTS)

-include $(wildcard $(BUILD)/*.d $(BUILD)/base/*.d $(BUILD)/engine/*.d $(BUILD)/cpu/*.d $(BUILD)/cli/*.d $(BUILD)/tests/*.d $(BUILD)/bench/*.d $(BUILD)/cuda_on_cpu/*.d)

# What bench/ has in C. No object of it is part of the library.
$(BUILD)/bench/%: $(BUILD)/bench/%.o $(BUILD)/bench/peaks.o $(BUILD)/libbpo.a
	$(CXX) -pthread $(LDFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/bench/%.o: bench/%.c Makefile | setup
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(LIB_CFLAGS) -I. -MMD -MP -c -o $@ $<

.SECONDARY: $(patsubst %.c,$(BUILD)/%.o,$(wildcard bench/*.c))

# --------------------------------------------------------------------------------------------------------------------- GPU

$(BUILD)/engine/cuda_library.o: ALL_CFLAGS += -DBPO_LIBDIR='"$(PREFIX)/lib/bpo"'

# CUDA 13 knows 75 to 120; an older nvcc fewer, and what it does not know is left out. The last one is built as PTX too, which
# the driver of a newer GPU translates.
CUDA_HOME ?= /usr/local/cuda
NVCC      ?= $(or $(shell command -v nvcc 2>/dev/null),$(CUDA_HOME)/bin/nvcc)
CUDA_ARCH ?= $(filter 75 80 86 89 90 100 120,$(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null)))
NVCCFLAGS ?= -O3 -lineinfo
GENCODE    = $(foreach arch,$(CUDA_ARCH),-gencode arch=compute_$(arch),code=sm_$(arch)) \
             -gencode arch=compute_$(lastword $(CUDA_ARCH)),code=compute_$(lastword $(CUDA_ARCH))

# The driver's library is opened by CUDA's runtime, which is linked in: the file can be opened, and says what is missing, on
# a machine without a driver. cuBLAS is found where it was when this was built, or where the system looks.
bpo_cuda.so $(BUILD)/cuda/bpo_cuda.so: kernels.cu kernels.h base/error.h base/numbers.h bpo.h bpo_error.h Makefile
	@$(NVCC) --version >/dev/null 2>&1 || { echo "make cuda needs nvcc, of NVIDIA's CUDA toolkit (11.8 or newer): name it" \
	    "with NVCC=... or CUDA_HOME=...; bpo itself does not need it"; exit 1; }
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -I. $(NVCCFLAGS) $(GENCODE) --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -shared -cudart static \
	    -o $@ kernels.cu -lcublas -Xlinker -rpath,$(abspath $(dir $(NVCC))../lib64)

gpu-check: $(BIN) cuda $(BUILD)/tests/test_cuda $(BUILD)/tests/test_cuda_engine $(BUILD)/bench/gpu_bench .venv/base.stamp  ## test and measure the GPU backend on this machine's GPU
	@scripts/gpu_check.sh $(BUILD)

# The real thing, without a GPU: it is compiled for all architectures and linked, and says that there is none.
.PHONY: cuda-build ci-full mutants
cuda-build: $(BIN) $(BUILD)/cuda/bpo_cuda.so  ## the real GPU backend for all architectures, opened without a GPU
	@scripts/cuda_build.sh ./$(BIN) $(BUILD)/cuda/bpo_cuda.so

# Every mistake of tests/mutants/mutants.py, one at a time: some 20 minutes.
mutants: c-tests .venv/base.stamp
	$(MAKE) BUILD=build/asan CFLAGS='$(SANITIZE)' CXXFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' \
	    build/asan/tests/test_cuda build/asan/tests/test_cuda_engine
	$(MAKE) BUILD=build/tsan CFLAGS='$(TSAN)' CXXFLAGS='$(TSAN)' LDFLAGS='$(TSAN)' \
	    build/tsan/tests/test_cuda build/tsan/tests/test_cuda_engine
	.venv/bin/python tests/mutants/mutants.py

ci-full: setup  ## .ci/run, then the GPU kernels' mutants: some 40 minutes
	.ci/run
	$(MAKE) mutants

# kernels.cu as the tests execute it without a GPU: compiled by the C++ compiler, with tests/cuda_on_cpu in place of CUDA.
SHIM_FLAGS = -std=c++17 -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off -fPIC -fvisibility=hidden \
             -Itests/cuda_on_cpu -I. -MMD -MP

$(BUILD)/cuda_on_cpu/bpo_cuda.so: $(BUILD)/cuda_on_cpu/kernels.o $(BUILD)/cuda_on_cpu/cuda_on_cpu.o
	$(CXX) -shared $(LDFLAGS) -o $@ $^

KERNELS ?= kernels.cu
$(BUILD)/cuda_on_cpu/kernels.o: $(KERNELS) Makefile | setup
	@mkdir -p $(@D)
	$(CXX) -x c++ $(SHIM_FLAGS) $(CXXFLAGS) $(CPPFLAGS) -c -o $@ $<

# The thread sanitizer is to judge the kernels, not what executes them.
$(BUILD)/cuda_on_cpu/cuda_on_cpu.o: tests/cuda_on_cpu/cuda_on_cpu.cc Makefile | setup
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) $(if $(findstring -fsanitize=thread,$(CXXFLAGS)),-DCUDA_ON_CPU_TSAN) \
	    $(filter-out -fsanitize=thread,$(CXXFLAGS)) $(CPPFLAGS) -c -o $@ $<

# --------------------------------------------------------------------------------------------------------------- 64-bit ARM

# The rules above with a cross compiler. The libraries are Debian's for arm64, unpacked into a folder that only this build and
# the emulator look into. The environment, not make's variables, because it must reach $(shell ...) too.
ARM64      := aarch64-linux-gnu
ARM64_LIBS := /usr/lib/$(ARM64)
SYSROOT    := $(CROSS)/sysroot
CROSS_ENV  = PKG_CONFIG_SYSROOT_DIR=$(SYSROOT) QEMU_LD_PREFIX='$(CURDIR)/$(SYSROOT)' BPO_EMULATOR=qemu-aarch64 \
             PKG_CONFIG_LIBDIR=$(SYSROOT)$(ARM64_LIBS)/pkgconfig:$(SYSROOT)$(ARM64_LIBS)/openblas-pthread/pkgconfig
CROSS_VARIABLES = BUILD=$(CROSS) BIN=$(CROSS)/bpo CC=$(ARM64)-gcc CXX=$(ARM64)-g++ AR=$(ARM64)-ar \
                  LDFLAGS='-L$(SYSROOT)$(ARM64_LIBS) -Wl,-rpath-link=$(SYSROOT)$(ARM64_LIBS) -Wl,-rpath=$(ARM64_LIBS)/openblas-pthread'

$(CROSS)/sysroot.stamp: scripts/sysroot.sh | setup
	scripts/sysroot.sh $(SYSROOT)
	@touch $@

# Not test_threads: the emulator keeps x86's order of loads and stores, so it would show nothing that make test doesn't; and with
# qemu 7.2 it once did not end, which 1,700 further runs did not repeat.
.PHONY: neon-tests
neon-tests: $(BIN) $(BUILD)/tests/test_kernels .venv/base.stamp
	@scripts/c_tests.sh $(BUILD)/tests/test_kernels
	BPO_BIN=./$(BIN) .venv/bin/python -m pytest tests/test_determinism.py -k whole_rewrites

# ------------------------------------------------------------------------------------------------- sanitizers, lint, library

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g

# The program under test stands in build/asan: a link to the demo model beside it makes it the default there too.
.PHONY: asan-tests
asan-tests: $(BIN) c-tests .venv/base.stamp
	ln -sfn ../../demo $(BUILD)/demo
	BPO_BIN=./$(BIN) .venv/bin/python -m pytest $(ASAN_PYTESTS)

tsan: setup  ## the GPU's kernels under the thread sanitizer: races in shared memory
	$(MAKE) BUILD=build/tsan BIN=build/tsan/bpo CFLAGS='$(TSAN)' CXXFLAGS='$(TSAN)' LDFLAGS='$(TSAN)' tsan-tests

TSAN := -fsanitize=thread -fno-omit-frame-pointer -O1 -g

.PHONY: tsan tsan-tests
tsan-tests: $(BUILD)/tests/test_cuda $(BUILD)/tests/test_cuda_engine $(CUDA_ON_CPU)
	@TSAN_OPTIONS=halt_on_error=1 scripts/c_tests.sh $(BUILD)/tests/test_cuda
	@TSAN_OPTIONS=halt_on_error=1 BPO_TEST_FILTER='test_draws*' scripts/c_tests.sh $(BUILD)/tests/test_cuda_engine

# What runs the program; the exporter's tests are Python alone, the benchmark has programs of its own, and a killed program tells
# no sanitizer anything.
ASAN_PYTESTS := $(filter-out tests/test_export.py tests/test_bench.py tests/test_durability.py,$(wildcard tests/test_*.py))

LINT_C   := $(wildcard *.c *.h base/*.[ch] engine/*.[ch] cpu/*.[ch] cli/*.[ch] tests/*.[ch] bench/*.[ch])
LINT_CXX := $(wildcard base/*.cc)
LINT_CUDA := kernels.cu $(wildcard tests/cuda_on_cpu/*)
CPPCHECK := --quiet --std=c11 --enable=warning,performance,portability --inline-suppr --error-exitcode=1 \
            --suppress=missingIncludeSystem $(FEATURES) -I.

# libbpo.a holds C++ (the SentencePiece shim), so a C program that links it needs that runtime.
CXXLIB := $(if $(filter Darwin,$(shell uname -s)),-lc++,-lstdc++)

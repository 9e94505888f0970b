# Checks: the C tests, sanitizers, the comparison with transformers, static analysis.

##@ Check

.PHONY: c-tests asan asan-tests tsan tsan-tests parity scale-test lint format mutants ci-full

C_TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
# kernels.cu for the tests, without a GPU (scripts/gpu.mk). It switches stacks itself, which is
# written for Linux on x86-64.
CUDA_ON_CPU := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),\
    $(BUILD)/cuda_on_cpu/bpo_cuda.so)

## c-tests        run the C tests alone
c-tests: $(C_TESTS) $(CUDA_ON_CPU)
	@scripts/c_tests.sh $(C_TESTS)

# Every tests/test_*.c is a program. A test may include a .c file of the library to reach its static
# functions: it then defines that file's names itself, and the linker leaves the archive's member
# out.
$(C_TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(BUILD)/libbpo.a
	$(LINK) $(call library,--libs,cmocka,-lcmocka) $(LIBS) || $(HINT)

$(BUILD)/tests/%.o: LIB_CFLAGS += $(call library,--cflags,cmocka)

# --------------------------------------------------------------------------------------- sanitizers

# Builds everything once more with a sanitizer, in a folder: $(call variant,FOLDER,FLAGS)
variant = BUILD=build/$(1) BIN=build/$(1)/bpo PLAIN_BIN=build/$(1)/bpo-plain \
          CFLAGS='$(2)' CXXFLAGS='$(2)' LDFLAGS='$(2)'
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g
TSAN := -fsanitize=thread -fno-omit-frame-pointer -O1 -g

## asan           run the tests under the address and undefined-behaviour sanitizers
asan: setup .venv/base.stamp
	$(MAKE) $(call variant,asan,$(ASAN)) asan-tests

# The Python tests that run the program. Left out: the exporter's, which are Python alone; the
# benchmark's, which has its own programs; and those that kill the program before a sanitizer can
# report.
ASAN_PYTESTS := $(filter-out tests/test_export.py tests/test_bench.py tests/test_durability.py,\
    $(wildcard tests/test_*.py))

# The link makes the demo model the default of the program in build/asan too.
asan-tests: $(BIN) $(PLAIN_BIN) c-tests
	ln -sfn ../../demo $(BUILD)/demo
	BPO_BIN=./$(BIN) BPO_PLAIN=./$(PLAIN_BIN) .venv/bin/python -m pytest $(ASAN_PYTESTS)

## tsan           run the GPU kernels' tests under the thread sanitizer: races in shared memory
tsan: setup
	$(MAKE) $(call variant,tsan,$(TSAN)) tsan-tests

tsan-tests: $(BUILD)/tests/test_cuda $(BUILD)/tests/test_cuda_engine $(CUDA_ON_CPU)
	@TSAN_OPTIONS=halt_on_error=1 scripts/c_tests.sh $(BUILD)/tests/test_cuda
	@TSAN_OPTIONS=halt_on_error=1 BPO_TEST_FILTER='test_draws*' \
	    scripts/c_tests.sh $(BUILD)/tests/test_cuda_engine

# ------------------------------------------------------------------------------- against the others

## parity         compare with transformers on random models, or on one: HF_DIR=folder
parity: $(BIN) .venv/torch.stamp
	BPO_BIN=./$(BIN) .venv/bin/python tests/parity.py $(if $(HF_DIR),--hf-dir '$(HF_DIR)')

## scale-test     run data sets by Ray, Slurm's script and GNU parallel, all on this machine
scale-test: $(BIN) .venv-scale/stamp
	BPO_BIN=./$(BIN) .venv-scale/bin/python -m pytest scale

# ---------------------------------------------------------------------------------- static analysis

LINT_C    := $(wildcard *.[ch] $(addsuffix /*.[ch],base engine cpu cli tests bench))
LINT_CXX  := $(wildcard base/*.cc)
LINT_CUDA := kernels.cu $(wildcard tests/cuda_on_cpu/*)
CPPCHECK  := cppcheck --quiet --std=c11 --enable=warning,performance,portability --inline-suppr \
             --error-exitcode=1 --suppress=missingIncludeSystem $(FEATURES) -I.

## lint           run the formatters and static analysis; any finding is an error
# bpo.c is analysed twice: as a part of the library, and with the main() of bpo-plain. cppcheck sees
# cpu/lanes.h only inside the files that include it, because it is not complete by itself.
lint: setup .venv/base.stamp
	clang-format --dry-run -Werror $(LINT_C) $(LINT_CXX) $(LINT_CUDA)
	@echo clang-tidy
	@printf '%s\n' $(filter %.c,$(LINT_C)) | \
	    xargs -P 2 -I {} clang-tidy --quiet {} -- $(ALL_CFLAGS) $(LIB_CFLAGS) 2>/dev/null
	@clang-tidy --quiet bpo.c -- $(ALL_CFLAGS) $(LIB_CFLAGS) -DBPO_PLAIN 2>/dev/null
	$(CPPCHECK) $(filter-out cpu/lanes.h,$(LINT_C)) $(LINT_CXX)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	shellcheck scripts/*.sh scale/*.sh $(wildcard .ci/run)

## format         let clang-format and ruff rewrite the sources
format: setup .venv/base.stamp
	clang-format -i $(LINT_C) $(LINT_CXX) $(LINT_CUDA)
	.venv/bin/ruff format .

# --------------------------------------------------------------------------------------- everything

## mutants        break kernels.cu on purpose, one mistake at a time; about 20 minutes
mutants: c-tests .venv/base.stamp
	$(MAKE) $(call variant,asan,$(ASAN)) build/asan/tests/test_cuda build/asan/tests/test_cuda_engine
	$(MAKE) $(call variant,tsan,$(TSAN)) build/tsan/tests/test_cuda build/tsan/tests/test_cuda_engine
	.venv/bin/python tests/mutants/mutants.py

## ci-full        run .ci/run, which is all of the checks, then the mutants; about 40 minutes
ci-full:
	.ci/run
	$(MAKE) mutants

# Benchmarks; bench/README.md explains what they measure.

##@ Measure

.PHONY: bench bench-kernels bench-data bench-deps bench-programs

SHAPE ?= 1b

# make bench BENCH_PYTHON=... uses another Python environment, one that has the other engines.
BENCH_PYTHON ?= .venv/bin/python
BENCH_STAMP  := $(if $(filter .venv/bin/python,$(BENCH_PYTHON)),.venv/base.stamp)
BENCH_RESULT  = bench/results/$(if $(MODEL),$(notdir $(realpath $(MODEL))),$(SHAPE)).json
BENCH_THREADS = $(if $(THREADS),--threads $(THREADS))

## bench          compare with llama.cpp and transformers: SHAPE=15m|110m|1b|7b or MODEL=folder;
##                THREADS= REPEATS=
bench: $(BIN) bench-programs $(BENCH_STAMP)
	$(BENCH_PYTHON) bench/run.py $(if $(MODEL),--model '$(MODEL)',--shape $(SHAPE)) \
	    $(BENCH_THREADS) $(if $(REPEATS),--repeats $(REPEATS)) $(BENCH_ARGS)
	@$(BENCH_PYTHON) -c 'import matplotlib' 2>/dev/null && \
	    $(BENCH_PYTHON) bench/plots.py $(BENCH_RESULT) || \
	    echo 'no plots: matplotlib is not installed (make bench-deps)'

## bench-kernels  measure the kernels against the machine's limits: SHAPE= THREADS= ROUNDS=
##                SIMD=avx2,scalar JSON=file
bench-kernels: $(BUILD)/bench/kernels_bench
	@$< --shape $(SHAPE) $(BENCH_THREADS) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	    $(if $(SIMD),--simd $(SIMD)) $(if $(JSON),--json >$(JSON))

## bench-data     data sets, compared with llama.cpp and transformers: SHAPE=15m|110m|1b THREADS=
bench-data: $(BIN) bench-programs $(BENCH_STAMP)
	$(BENCH_PYTHON) bench/data.py --shape $(SHAPE) $(BENCH_THREADS) $(BENCH_ARGS)

## bench-deps     install the other engines for make bench; builds llama.cpp, about 10 minutes
bench-deps: .venv/bench.stamp

# The benchmark's programs in C; make test runs them too. None of their objects is in the library.
bench-programs: $(BUILD)/bench/bpo_worker $(BUILD)/bench/kernels_bench

$(BUILD)/bench/%: $(BUILD)/bench/%.o $(BUILD)/bench/peaks.o $(BUILD)/libbpo.a
	$(LINK) $(LIBS) || $(HINT)

.SECONDARY: $(call objects,bench/*.c)

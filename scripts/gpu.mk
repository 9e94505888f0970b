# The GPU backend: kernels.cu as the library bpo_cuda.so, which bpo opens at run time; and the same
# file as the tests execute it without a GPU.

##@ GPU

.PHONY: cuda gpu-check cuda-build

CUDA_HOME ?= /usr/local/cuda
NVCC      ?= $(or $(shell command -v nvcc 2>/dev/null),$(CUDA_HOME)/bin/nvcc)
NVCCFLAGS ?= -O3 -lineinfo

# CUDA 13 knows the architectures 75 to 120. An older nvcc knows fewer; those that it does not know
# are left out. The last one is also built as PTX, which the driver of a newer GPU translates.
NVCC_ARCH  = $(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null))
CUDA_ARCH ?= $(filter 75 80 86 89 90 100 120,$(NVCC_ARCH))
PTX_ARCH   = compute_$(lastword $(CUDA_ARCH))
GENCODE    = $(foreach arch,$(CUDA_ARCH),-gencode arch=compute_$(arch),code=sm_$(arch)) \
             -gencode arch=$(PTX_ARCH),code=$(PTX_ARCH)

## cuda           build the GPU backend, bpo_cuda.so, with NVIDIA's nvcc and cuBLAS;
##                CUDA_ARCH="90" for one kind of GPU
cuda: $(BIN) bpo_cuda.so

# CUDA's runtime is linked in, and it opens the driver's library itself: so bpo_cuda.so can be
# opened on a machine without a driver, and reports what is missing. cuBLAS is found where it was at
# build time, or on the system's path.
bpo_cuda.so $(BUILD)/cuda/bpo_cuda.so: kernels.cu kernels.h bpo.h bpo_error.h base/error.h \
    base/numbers.h scripts/gpu.mk
	@$(NVCC) --version >/dev/null 2>&1 || { \
	    echo "make cuda needs nvcc from NVIDIA's CUDA toolkit, 11.8 or newer: give its path with" \
	    "NVCC=... or CUDA_HOME=... (bpo itself does not need it)"; exit 1; }
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -I. $(NVCCFLAGS) $(GENCODE) --threads 2 \
	    -Xcompiler -fPIC,-fvisibility=hidden,-Wall -shared -cudart static -o $@ kernels.cu \
	    -lcublas -Xlinker -rpath,$(abspath $(dir $(NVCC))../lib64)

# Where an installed bpo finds it.
$(BUILD)/engine/cuda_library.o: ALL_CFLAGS += -DBPO_LIBDIR='"$(PREFIX)/lib/bpo"'

## gpu-check      test and measure the GPU backend on this machine's GPU
gpu-check: $(BIN) cuda $(BUILD)/tests/test_cuda $(BUILD)/tests/test_cuda_engine \
    $(BUILD)/bench/gpu_bench .venv/base.stamp
	@scripts/gpu_check.sh $(BUILD)

## cuda-build     compile the GPU backend for all architectures and open it; needs no GPU
cuda-build: $(BIN) $(BUILD)/cuda/bpo_cuda.so
	@scripts/cuda_build.sh ./$(BIN) $(BUILD)/cuda/bpo_cuda.so

# ------------------------------------------------------------------------------------ without a GPU

# kernels.cu compiled by the C++ compiler, with tests/cuda_on_cpu in place of CUDA.
KERNELS ?= kernels.cu
SHIM_FLAGS = -std=c++17 -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off \
             -fPIC -fvisibility=hidden -Itests/cuda_on_cpu -I. -MMD -MP

$(BUILD)/cuda_on_cpu/bpo_cuda.so: $(BUILD)/cuda_on_cpu/kernels.o $(BUILD)/cuda_on_cpu/cuda_on_cpu.o
	$(CXX) -shared $(LDFLAGS) -o $@ $^

$(BUILD)/cuda_on_cpu/kernels.o: $(KERNELS) scripts/gpu.mk | $(SETUP)
	@mkdir -p $(@D)
	$(CXX) -x c++ $(SHIM_FLAGS) $(CXXFLAGS) $(CPPFLAGS) -c -o $@ $< || $(HINT)

# The thread sanitizer judges the kernels, not the code that executes them.
$(BUILD)/cuda_on_cpu/cuda_on_cpu.o: tests/cuda_on_cpu/cuda_on_cpu.cc scripts/gpu.mk | $(SETUP)
	@mkdir -p $(@D)
	$(CXX) $(SHIM_FLAGS) $(if $(findstring -fsanitize=thread,$(CXXFLAGS)),-DCUDA_ON_CPU_TSAN) \
	    $(filter-out -fsanitize=thread,$(CXXFLAGS)) $(CPPFLAGS) -c -o $@ $< || $(HINT)

#!/bin/sh
# gpu_check.sh BUILD - make gpu-check: tests the GPU backend on this machine's GPU, and measures it.
# Without a GPU it says so, and its exit code is 1. In this order: every op against the CPU's, and
# ten runs that must give the same hash; the engine; the program; the ops under compute-sanitizer;
# the speed of decode and prefill with a model of Llama-2-7b's shape, and that of transformers and
# llama.cpp where they are installed.
set -u
build=$1 library=$PWD/bpo_cuda.so
results=bench/results
export BPO_CUDA_SO="$library"

say() {
    printf '\n==== %s\n' "$1"
}

if ! message=$(./bpo -m tests/data/golden/mha.bin --tokens 1,2,3 --greedy --max-new-tokens 1 \
    --context 64 --device cuda -q 2>&1 >/dev/null); then
    printf '%s\n' "$message" >&2
    echo "gpu-check: nothing was tested: this machine has no GPU." \
        "Without one, make test runs the same kernels on the CPU." >&2
    exit 1
fi

failed=0
say "ops, and the same bits in ten runs"
"$build/tests/test_cuda" || failed=1
say "engine"
"$build/tests/test_cuda_engine" || failed=1
say "program"
BPO_BIN=./bpo BPO_TEST_CUDA_SO="$library" .venv/bin/python -m pytest -q tests/test_cuda.py ||
    failed=1

PATH=$PATH:/usr/local/cuda/bin
if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck initcheck synccheck; do
        say "compute-sanitizer $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/tests/test_cuda" || failed=1
    done
else
    echo "skipped: compute-sanitizer is not installed"
fi

mkdir -p "$results"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' /' '--')
out=$results/gpu-${gpu:-unknown}-$(date +%Y-%m-%d).json
say "decode and prefill of a random model of Llama-2-7b's shape: $out"
if "$build/bench/gpu_bench" >"$out.part"; then
    mv "$out.part" "$out"
    cat "$out"
else
    rm -f "$out.part"
    failed=1
fi
if .venv/bin/python -c 'import torch, transformers; assert torch.cuda.is_available()' \
    2>/dev/null; then
    say "transformers, fp16: ${out%.json}-transformers.json"
    .venv/bin/python bench/gpu_transformers.py | tee "${out%.json}-transformers.json" || failed=1
else
    echo "skipped: .venv has no transformers with CUDA"
fi
if command -v llama-bench >/dev/null 2>&1 && [ -n "${LLAMA_GGUF:-}" ]; then
    say "llama.cpp: ${out%.json}-llamacpp.json"
    llama-bench -m "$LLAMA_GGUF" -p 512 -n 128 -ngl 99 -o json |
        tee "${out%.json}-llamacpp.json" || failed=1
else
    echo "skipped: llama.cpp needs llama-bench, and LLAMA_GGUF=FILE, an F16 model of this shape"
fi
[ $failed = 0 ] && echo "gpu-check: all passed" || echo "gpu-check: FAILED"
exit $failed

"""Deliberate mistakes in kernels.cu, one at a time: each must turn the tests red.

Each mutant is built against tests/cuda_on_cpu and runs test_cuda and test_cuda_engine: in a plain
build first; if they stay green, under the address and undefined-behaviour sanitizers; then under
the thread sanitizer. The log says which of them noticed, and how.

    mutants.py [--only NAME] [--log FILE] [FIRST LAST]
    mutants.py --check      only checks that each mutant still applies to kernels.cu
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASAN = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
TSAN = "-fsanitize=thread -fno-omit-frame-pointer -O1 -g"
# The first line of a failed test's output that says what was noticed.
NOTICES = re.compile(
    r"cuda_on_cpu: .*|ERROR: AddressSanitizer: [\w-]+|runtime error: .*"
    r"|WARNING: ThreadSanitizer: [\w ]+|exception: .*|ERROR: .*|error: .*"
)
BUILDS = {"plain": ("build", "-O1 -g"), "asan": ("build/asan", ASAN), "tsan": ("build/tsan", TSAN)}

# name, the mistake in words, the text that is replaced (it must be in kernels.cu exactly once, with
# any white space), what replaces it
MUTANTS = [
    (
        "no-barrier-sum",
        "block_sum: no barrier before the warps' sums are read",
        "sums[warp] = v; } __syncthreads();",
        "sums[warp] = v; }",
    ),
    (
        "wrong-lane",
        "warp_sum: half of the lanes are left out",
        "for (int step = WARP / 2; step > 0; step /= 2) { v +=",
        "for (int step = WARP / 4; step > 0; step /= 2) { v +=",
    ),
    (
        "sum-of-nothing",
        "block_sum: shared memory that no warp wrote is read",
        "lane < n_warps ? sums[lane] : 0.0f",
        "sums[lane]",
    ),
    (
        "max-of-half",
        "warp_max: neighbours are not compared",
        "for (int step = WARP / 2; step > 0; step /= 2) { v = fmaxf",
        "for (int step = WARP / 2; step > 1; step /= 2) { v = fmaxf",
    ),
    (
        "no-barrier-scores",
        "attention_split: the softmax begins before all scores are written",
        "__syncthreads(); /* the scores are complete */",
        "",
    ),
    (
        "no-barrier-softmax",
        "attention_split: values are weighted before the softmax is done",
        "__syncthreads(); /* the softmax is complete */",
        "",
    ),
    (
        "no-barrier-next-scores",
        "attention_split: the next scores overwrite those that others still read",
        "__syncthreads(); /* the next scores overwrite e */",
        "",
    ),
    (
        "no-barrier-query",
        "attention_split: the query is used before it is staged",
        "n_h, hd); __syncthreads(); const size_t stride",
        "n_h, hd); const size_t stride",
    ),
    (
        "no-warp-barrier-softmax",
        "split_softmax: lane 0 writes the state that others may still read",
        "__syncwarp(); /* every lane has read the state */",
        "",
    ),
    (
        "no-barrier-stage",
        "attention_tile: K and V are used before they are staged",
        "__syncthreads(); /* K and V are complete */",
        "",
    ),
    (
        "no-barrier-tile",
        "attention_tile: positions are overwritten while they are being read",
        "__syncthreads(); /* the last positions have been read, and q has been written */",
        "",
    ),
    (
        "no-warp-barrier-weights",
        "attention_tile: weights are read before the half warp wrote them",
        "__syncwarp(); /* a row of p is written and read by the same half of a warp */",
        "",
    ),
    (
        "tile-off-by-one",
        "attention_tile: the last positions are left out if there is only one",
        "at < n_p; at += TILE_POSITIONS",
        "at < n_p - 1; at += TILE_POSITIONS",
    ),
    (
        "causal-off-by-one",
        "attention_tile: a row does not see itself",
        "<= state.pos[i]",
        "< state.pos[i]",
    ),
    (
        "no-zeros",
        "stage_positions: what follows the last position is not zeroed",
        "pairs[0] = p < n ? *(const uint32_t *)(from + p * stride + d) : 0;",
        "pairs[0] = *(const uint32_t *)(from + p * stride + d);",
    ),
    (
        "columns-left-out",
        "matmul_rows: the last columns are left out",
        "for (int k = lane * 8; k < cols; k += WARP * 8)",
        "for (int k = lane * 8; k + 8 <= cols; k += WARP * 8)",
    ),
    (
        "rows-too-many",
        "matmul_rows: rows past the end of the matrix are read",
        "int row = first + i < n_w ? first + i : n_w - 1;",
        "int row = first + i;",
    ),
    (
        "misaligned-weights",
        "matmul: 128-bit loads whatever the alignment",
        "bool vector = w->cols % 8 == 0 &&",
        "bool vector = true || w->cols % 8 == 0 &&",
    ),
    (
        "misaligned-keys",
        "attention: 128-bit loads whatever the alignment",
        "const bool vector = hd % 8 == 0 &&",
        "const bool vector = true || hd % 8 == 0 &&",
    ),
    (
        "add-forgotten",
        "matmul_rows: the residual is not added",
        "*to = add ? *to + sum : sum;",
        "*to = sum;",
    ),
    (
        "leading-dimension",
        "cuBLAS: rows of weights taken as dense",
        "(int)(w->row_bytes / sizeof(__half))",
        "(int)w->cols",
    ),
    (
        "stale-half-copy",
        "a result's half copy is that of the one before",
        "half_copy ? y : NULL; return half_copy;",
        "half_copy ? y : NULL; return b->recording || n != 33 ? half_copy : NULL;",
    ),
    (
        "parts-unwritten",
        "attention_join: parts that no block wrote are read",
        "slot[blockIdx.y] < 0 ? 0 : pos[blockIdx.y] / split.n_positions + 1;",
        "slot[blockIdx.y] < 0 ? 0 : split.n_splits;",
    ),
    (
        "parts-unweighted",
        "attention_join: the parts' sums are not rescaled to one maximum",
        "sum += weight * part[s * stride + PART_SUM];",
        "sum += part[s * stride + PART_SUM];",
    ),
    (
        "shared-too-small",
        "attention_split: too little shared memory",
        "((size_t)hd + SPLIT_POSITIONS + sizeof(struct softmax_state) / 4 +",
        "((size_t)hd + SPLIT_POSITIONS +",
    ),
    (
        "inert-rows-write",
        "rope_kv: an inert row is written to slot -1",
        "if (slot[r] < 0 && head >= n_heads) { return; /* an inert row */ }",
        "",
    ),
    (
        "inert-rows-read",
        "attention_split: an inert row reads slot -1",
        "if (slot[r] < 0 || n <= 0) {",
        "if (n <= 0) {",
    ),
    (
        "rope-pairing",
        "rope: neighbours are paired",
        "float a = x[i], b = x[i + n_pairs];",
        "float a = x[2 * i], b = x[2 * i + 1];",
    ),
    (
        "values-rotated",
        "rope: values are rotated too",
        "if (plane == 0) {",
        "if (plane >= 0) {",
    ),
    (
        "heads-shared-wrongly",
        "attention_tile: the wrong key/value head",
        "kv_head = head / (n_heads / kv.n_kv_heads);",
        "kv_head = head % kv.n_kv_heads;",
    ),
    (
        "host-reads-device",
        "first_nonfinite: device memory is read by the host",
        "failed = failed ? failed : gpu_download(b, found, b->found, sizeof *found, err);",
        'failed = failed ? failed : synchronize(b, "", err); *found = *b->found;',
    ),
    (
        "no-synchronisation",
        "download: the result is read before the copy is done",
        'if (int failed = synchronize(b, "running a step", err)) { return failed; }',
        "",
    ),
    (
        "stage-overwritten",
        "upload: pinned memory is filled again before the GPU has read it",
        'return check(cudaEventSynchronize(b->stage_read[b->filling]), "uploading", err);',
        "return 0;",
    ),
    (
        "stage-not-moved",
        "upload: two uploads share their pinned memory",
        "b->n_staged += n;",
        "",
    ),
    (
        "launch-unchecked",
        "a launch's error is dropped",
        "check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), op, &b->error);",
        "cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);",
    ),
    (
        "copy-unchecked",
        "kv_copy: an error is dropped",
        'if (int failed = check(status, "copying the KV cache", err)) { return failed; }',
        "(void)status;",
    ),
    (
        "graph-leaks",
        "a recorded graph is never destroyed",
        "if (graph) { (void)cudaGraphDestroy(graph); }",
        "",
    ),
    (
        "replays-leak",
        "what was recorded outlives the backend",
        "forget_recorded(b); if (b->blas) {",
        "if (b->blas) {",
    ),
    (
        "recording-unended",
        "an error leaves the stream recording",
        "b->recording = false; cudaError_t status",
        "b->recording = false; if (b->error.code) { return; } cudaError_t status",
    ),
    (
        "stale-graphs",
        "graphs keep pointing to scratch memory that moved",
        "forget_recorded(b); device_free(s->data);",
        "device_free(s->data);",
    ),
    (
        "no-workspace",
        "cuBLAS would allocate while a step is recorded",
        "cublasStatus_t status = cublasSetWorkspace(b->blas, b->workspace, WORKSPACE_BYTES);",
        "cublasStatus_t status = CUBLAS_STATUS_SUCCESS;",
    ),
    (
        "signed-zeros",
        "sampler: -0 ranks below 0",
        "scaled_logit(logits, id, draw) + 0.0f;",
        "scaled_logit(logits, id, draw);",
    ),
    (
        "ties-by-higher-id",
        "sampler: equal logits by higher id",
        "return (unsigned long long)key << 32 | (0xffffffffU - (uint32_t)id);",
        "return (unsigned long long)key << 32 | (0xffffffffU - (uint32_t)(id ^ 1));",
    ),
    (
        "ties-left-out",
        "sampler: ties with the k-th are not kept",
        "s->n_above = draw.top_k - s->rest + s->histogram[digit];",
        "s->n_above = draw.top_k;",
    ),
    (
        "digit-off-by-one",
        "sampler: the k-th key's digit is one too low",
        "for (; s->histogram[digit] < s->rest; digit--)",
        "for (; s->histogram[digit] <= s->rest && digit > 0; digit--)",
    ),
    (
        "no-barrier-histogram",
        "sampler: counting begins before the counts are zero",
        "s->histogram[i] = 0; } __syncthreads();",
        "s->histogram[i] = 0; }",
    ),
    (
        "no-barrier-sort",
        "sampler: the steps of the sort overlap",
        "x[high] = other; } } __syncthreads();",
        "x[high] = other; } }",
    ),
    (
        "count-reused",
        "sampler: a count is reset while others still read it",
        "__syncthreads(); /* the total is known",
        "if (threadIdx.x == 0) { s->n_above = 0; } __syncthreads(); /* the total is known",
    ),
    (
        "mass-in-parallel",
        "sampler: the mass of all is added by every thread",
        "for (int id = 0; id < vocab && threadIdx.x == 0; id++)",
        "for (int id = threadIdx.x; id < vocab; id += 32)",
    ),
    (
        "found-not-first",
        "first_nonfinite: any bad row instead of the first",
        "atomicMin(found, (int32_t)blockIdx.x);",
        "*found = (int32_t)blockIdx.x;",
    ),
]


def found_in(source: str, text: str) -> list[re.Match]:
    """Where a mutant's text is in the source; the white space between tokens may differ."""
    tokens = re.findall(r"\w+|\S", text)
    return list(re.finditer(r"\s*".join(map(re.escape, tokens)), source))


def mutate(source: str, name: str, old: str, new: str) -> str:
    """The source with one mistake."""
    found = found_in(source, old)
    if len(found) != 1:
        sys.exit(f"mutants.py: {name}: {len(found)} places in kernels.cu instead of one:\n{old}")
    return source[: found[0].start()] + new + source[found[0].end() :]


def build(kind: str, source: str) -> Path:
    """The mutant's library."""
    flags = BUILDS[kind][1]
    work = ROOT / "build" / "mutants" / kind
    work.mkdir(parents=True, exist_ok=True)
    (work / "kernels.cu").write_text(source, "utf-8")
    library = work / "cuda_on_cpu" / "bpo_cuda.so"
    make = [
        "make",
        f"BUILD={work.relative_to(ROOT)}",
        f"KERNELS={(work / 'kernels.cu').relative_to(ROOT)}",
        f"CXXFLAGS={flags}",
    ]
    make += [f"LDFLAGS={flags if kind != 'plain' else ''}", str(library.relative_to(ROOT))]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"mutants.py: it does not compile:\n{done.stderr}")
    return library


def notice(kind: str, library: Path) -> str:
    """What the tests say of a library: "" when they are green."""
    folder = ROOT / BUILDS[kind][0] / "tests"
    env = os.environ | {
        "BPO_CUDA_SO": str(library),
        "CMOCKA_TEST_ABORT": "1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    for test in ("test_cuda", "test_cuda_engine"):
        if kind == "tsan" and test == "test_cuda_engine":
            env["BPO_TEST_FILTER"] = "test_draws*"
        try:
            done = subprocess.run(
                [folder / test],
                cwd=ROOT,
                env=env,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{test}: ran for more than 240 s"
        if done.returncode != 0:
            running = re.findall(r"\[ RUN      \] (\w+)", done.stdout)
            found = NOTICES.search(done.stderr + "\n" + done.stdout)
            words = found.group(0).strip()[:110] if found else f"exit code {done.returncode}"
            return f"{running[-1] if running else test}: {words}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check that each mutant applies")
    parser.add_argument("--only", help="one mutant, by its name")
    parser.add_argument("--log", type=Path, help="append to this file")
    parser.add_argument("first", nargs="?", type=int, default=1)
    parser.add_argument("last", nargs="?", type=int, default=len(MUTANTS))
    options = parser.parse_args()
    kernels = (ROOT / "kernels.cu").read_text("utf-8")
    mutants = [mutate(kernels, name, old, new) for name, _, old, new in MUTANTS]
    if options.check:
        print(f"{len(mutants)} mutants apply")
        return
    lines = []
    for number, (name, words, _, _) in enumerate(MUTANTS, 1):
        if name != (options.only or name) or not options.first <= number <= options.last:
            continue
        begun, line = time.monotonic(), ""
        for kind in BUILDS:
            said = notice(kind, build(kind, mutants[number - 1]))
            if said:
                line = f"{kind:6} {said}"
                break
        seconds = time.monotonic() - begun
        lines.append(f"{number:2} {name:24} {line or 'MISSED'}   [{words}; {seconds:.0f} s]")
        print(lines[-1], flush=True)
        if options.log:
            with options.log.open("a", encoding="utf-8") as log:
                log.write(lines[-1] + "\n")
    missed = sum("MISSED" in line for line in lines)
    print(f"{len(lines) - missed} passed, {missed} failed: mutants that were noticed, and missed")
    sys.exit(missed > max(0, len(lines) // 25))


if __name__ == "__main__":
    main()

"""The program on the GPU backend.

The library is the one that BPO_TEST_CUDA_SO names (make gpu-check), or kernels.cu as
tests/cuda_on_cpu executes it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import NMSE_BOUND, ROOT, WORST_BOUND, nmse, worst
from program import BPO, GOLDEN, bpo, csv, dump_logits, environment, fails, works
from test_golden import MODELS, golden_logits

BUILT = BPO.parent / "cuda_on_cpu" if BPO.parent != ROOT else ROOT / "build" / "cuda_on_cpu"
LIBRARY = Path(os.environ.get("BPO_TEST_CUDA_SO", BUILT / "bpo_cuda.so"))
CUDA = ("--device", "cuda", "--context", 256)
ON_CPU = "BPO_TEST_CUDA_SO" not in os.environ
DEMO = ("-m", ROOT / "demo" / "bpo-demo.bin")
MHA = ("-m", GOLDEN / "mha.bin")
TWO_IDS = (*MHA, "--tokens", "1,5,9", "--max-new-tokens", 2)  # a run that is soon done

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="tests/cuda_on_cpu is built on Linux and x86-64 only"
)
needs_knobs = pytest.mark.skipif(not ON_CPU, reason="a real GPU cannot be made to fail")


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Makes every run of the program use this library."""
    monkeypatch.setattr(
        "program.environment",
        lambda **changes: environment(**({"BPO_CUDA_SO": str(LIBRARY)} | changes)),
    )


@pytest.mark.parametrize("n", [1, 8, 65, 200])
@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path, name, n):
    """The CPU's bounds hold although prompts' activations are rounded to fp16.

    Few rows are not rounded, and are much closer.
    """
    rows, plain, rounded = golden_logits(name, n)
    logits = dump_logits(tmp_path, GOLDEN / f"{name}.bin", MODELS[name]["ids"][:n], *CUDA)[rows]
    assert nmse(logits, plain) <= NMSE_BOUND
    assert worst(logits, plain) <= WORST_BOUND
    if n <= 8:
        assert worst(logits, rounded) <= 5e-3


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("name", ["gqa", "odd"])
def test_logits_do_not_depend_on_the_order_of_threads(tmp_path, name, order):
    file, ids = GOLDEN / f"{name}.bin", MODELS[name]["ids"][:70]
    first = dump_logits(tmp_path, file, ids, *CUDA)
    assert (
        dump_logits(tmp_path, file, ids, *CUDA, CUDA_ON_CPU_ORDER=order).tobytes()
        == first.tobytes()
    )


@pytest.mark.parametrize("lookup", [0, 4])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text(name, lookup):
    golden = MODELS[name]["greedy"][1]
    ids = MODELS[name]["ids"][: golden["n"]]
    args = ("--greedy", "--json", "--max-new-tokens", 24, "--lookup", lookup, *CUDA)
    (line,) = works("-m", GOLDEN / f"{name}.bin", "--tokens", csv(ids), *args).lines
    assert line["tokens"] == golden["tokens"][:24]


@pytest.mark.parametrize("mode", ["stable", "aggressive"])
def test_samples_and_repetition(mode):
    args = (
        *MHA,
        "-p",
        "Tell me about water",
        "--json",
        "--max-new-tokens",
        12,
        "--seed",
        7,
        "--mode",
        mode,
        "-n",
        3,
    )
    first = works(*args, *CUDA).samples
    assert len({csv(line["tokens"]) for line in first}) == 3
    assert works(*args, *CUDA).samples == first
    assert works(*args, *CUDA, CUDA_ON_CPU_ORDER="random").samples == first


def test_the_demo_models_rewrite():
    args = (*DEMO, "-p", "Tell me about Harry Potter", "--greedy", "--max-new-tokens", 14)
    on_gpu = works(*args, *CUDA, "--stats")
    assert on_gpu.out == works(*args, "--device", "cpu").out != b""
    assert "on       cuda sm_" in on_gpu.err and "cuBLAS" in on_gpu.err


def test_auto_takes_the_gpu_and_cpu_does_not():
    args = (*TWO_IDS, "--stats", "--context", 64)
    assert "on       cuda" in works(*args).err
    assert "on       cpu" in works(*args, "--device", "cpu").err
    assert "on       cpu" in works(*args, BPO_CUDA_SO="none").err


@needs_knobs
def test_no_device():
    args = (*TWO_IDS, "--stats", "--context", 64, "--seed", 1)
    result = works(*args, CUDA_ON_CPU_DEVICES="0")
    assert "on       cpu" in result.err and "bpo: " not in result.err
    fails(
        5,
        *args,
        "--device",
        "cuda",
        CUDA_ON_CPU_DEVICES="0",
        says="no CUDA-capable device is detected",
    )


@needs_knobs
def test_what_fits_is_reported():
    args = (*MHA, "-p", "a", "-n", 8, "--max-new-tokens", 2)
    room = {"CUDA_ON_CPU_MEMORY": str(104 << 20)}
    fails(5, *args, "--device", "cuda", says="room for 6 such sequences", **room)
    assert "using the CPU: the GPU has no room" in works(*args, **room).err
    works(*args, "--device", "cuda", "--context", 256, **room)


@needs_knobs
def test_a_kernel_that_crashes():
    result = bpo(*MHA, "--tokens", "1,5,9", *CUDA, CUDA_ON_CPU_FAULT="20")
    assert result.code == 1
    assert "an illegal memory access was encountered" in result.err and "--device cpu" in result.err


def test_invalid_libraries(tmp_path):
    args = (*TWO_IDS, "--device", "cuda")
    fails(5, *args, BPO_CUDA_SO="none", says="bpo_cuda.so, is not there")
    fails(5, *args, BPO_CUDA_SO=str(tmp_path / "missing.so"), says="cannot be opened")
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "static int table[64] = {999}; const int *kernels_cuda(void) { return table; }", "utf-8"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", other, source], check=True)
    fails(5, *args, BPO_CUDA_SO=str(other), says="another version: ABI 999")
    result = works(*TWO_IDS, BPO_CUDA_SO=str(other))
    assert "using the CPU: " in result.err and "ABI 999" in result.err


def test_where_the_library_is_looked_for(tmp_path):
    """Beside the program and in ../lib/bpo, but never in the working directory."""
    args = (*TWO_IDS, "--device", "cuda", "--context", 64)
    for folder in ("bin", "lib/bpo", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    program = tmp_path / "bin" / "bpo"
    shutil.copy(BPO, program)
    shutil.copy(LIBRARY, tmp_path / "elsewhere" / "bpo_cuda.so")
    fails(
        5, *args, program=program, cwd=tmp_path / "elsewhere", BPO_CUDA_SO="", says="is not there"
    )
    for folder in ("bin", "lib/bpo"):
        shutil.copy(LIBRARY, tmp_path / folder / "bpo_cuda.so")
        works(*args, program=program, cwd=tmp_path / "elsewhere", BPO_CUDA_SO="")
        (tmp_path / folder / "bpo_cuda.so").unlink()


def test_both_devices_generate_the_same_ids(tmp_path):
    """Greedy decoding gives the same ids as on the CPU: these prompts have no near ties."""
    prompts = [
        json.loads(line)["prompt"]
        for line in (ROOT / "demo" / "heldout.jsonl").read_text("utf-8").splitlines()[:2]
    ]
    for prompt in prompts:
        args = (*DEMO, "-p", prompt[:40], "--greedy", "--json", "--max-new-tokens", 8)
        assert (
            works(*args, *CUDA).samples[0]["tokens"]
            == works(*args, "--device", "cpu").samples[0]["tokens"]
        )


def test_data_set(tmp_path):
    """Records are decoded together: the same bytes in a second run, and from each one alone."""
    prompts = ["a b", "c d e", "f", "g h"]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts) + "no object\n",
        "utf-8",
    )
    options = (*MHA, "--max-new-tokens", 4, "--greedy", *CUDA)
    outputs = []
    for name in ("first", "second"):
        output = tmp_path / name
        works(*options, "-i", source, "-o", output, "--parallel", 3, "--allow-errors")
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    records = [json.loads(line) for line in outputs[0].splitlines()]
    assert [record.get("prompt") for record in records] == [*prompts, None] and records[-1][
        "line"
    ] == 5
    for record in records[:-1]:
        alone = works(*options, "-p", record["prompt"])
        assert alone.out.decode() == record["optimized_prompt"] + "\n"

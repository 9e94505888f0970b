"""./bpo gives the bytes of ./bpo-plain: bpo.c alone, in plain scalar C, one prompt on one thread.

So what makes ./bpo fast (threads, SIMD levels, drafts, batches, cached prefixes) changes no byte.
"""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import ROOT, cached_prefix_model, edit_metadata
from program import BPO, DEMO, EMULATOR, GOLDEN, bpo, simd_levels, works

PLAIN = Path(os.environ.get("BPO_PLAIN", BPO.with_name("bpo-plain"))).resolve()
PROMPTS = [
    "how do vaccines work",
    "Tell me about Harry Potter",
    "Write a short poem about the sea for my grandmother",
    "What's the capital of France?",
    "Translate 'good morning' into Spanish, French and German",
    "def add(a, b): return a - b  # why is this wrong?",
    "plan a picnic for 12 people",
    "Summarise: [INST] ignore this [/INST] and that </s>",
    "naïve café 🙂 日本語",
    "x",
    "  two  spaces and a\ttab ",
    "Explain the difference between a list and a tuple in Python to somebody who knows neither",
    "[PROTECT] me [KEEP",
]
# beyond a chunk and a block of attention
LONG = "Tell me about the history of the city of Paris, its people and its bridges. " * 5
# Under a sanitizer or an emulator, a run of the demo model takes seconds: only every 20th is made,
# and every 5th of tiny models.
STEP = 20 if EMULATOR or "asan" in PLAIN.parent.name else 1
# Options and environments that must not matter; the runs take them in turn.
VARIANTS = [
    ((), {}),
    (("-t", 1), {}),
    (("-t", 3), {}),
    (("--lookup", 0), {}),
    (("--lookup", 15), {}),
    *(((), {"BPO_SIMD": level}) for level in simd_levels()[1:]),
]
SCALAR = ((), {"BPO_SIMD": "scalar"})  # slower than bpo-plain, which the compiler may vectorise


def plain(*args, code: int = 0, **env: str) -> bytes:
    """What bpo-plain prints."""
    result = bpo(*args, program=PLAIN, **env)
    assert result.code == code, result.err
    return result.out


def differences(
    model: Path,
    runs: list[tuple],
    variants: list[tuple] = VARIANTS,
    plain_model: Path | None = None,
) -> list[tuple]:
    """The runs (prompt, seed, mode, options) for which the two programs print different texts."""

    def differs(numbered: tuple) -> bool:
        number, (prompt, seed, mode, options) = numbered
        args = ("-p", prompt, "--seed", seed, "--mode", mode, "-q", *options)
        more, env = variants[number % len(variants)]
        expected = plain("-m", plain_model or model, *args)
        return (
            works("-m", model, *args, "--matmul", "own", "--no-cache", *more, **env).out != expected
        )

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(differs, enumerate(runs)))
    return [run for run, differs in zip(runs, found, strict=True) if differs]


def test_300_rewrites_of_the_demo_model():
    """Aggressive mode with two samples, of which the second begins from a copy of the prompt's keys
    and values."""
    short, longer = ("--max-new-tokens", 8), ("--max-new-tokens", 60)
    stable = [
        (p, seed, "stable", short if seed else longer)
        for p, seed in itertools.product(PROMPTS, range(13))
    ]
    aggressive = [
        (p, seed, "aggressive", ("-n", 2, *(short if seed else longer)))
        for p, seed in itertools.product(PROMPTS, range(11))
    ]
    runs = stable + aggressive
    assert len(runs) >= 300
    assert differences(DEMO, runs[::STEP]) == []


def test_long_prompts_of_the_demo_model():
    runs = list(
        itertools.product([LONG], range(2), ("stable", "aggressive"), [("--max-new-tokens", 8)])
    )
    assert differences(DEMO, runs[::STEP], [VARIANTS[1], SCALAR]) == []


def test_they_would_differ(tmp_path):
    """The comparison can fail: another RoPE base for bpo-plain is seen, and so is another seed."""
    mutant = edit_metadata(DEMO, tmp_path / "mutant.bin", rope_theta="100.0")
    runs = [(PROMPTS[1], seed, "stable", ("--max-new-tokens", 20)) for seed in range(2)]
    assert differences(DEMO, runs, plain_model=mutant) == runs
    args = ("-m", DEMO, "-p", PROMPTS[1], "--max-new-tokens", 20, "-q")
    assert plain(*args, "--seed", 1) != works(*args, "--seed", 2).out


@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("*.bin"))])
def test_tiny_models(name):
    """Models of all shapes, whose logits are sharp; sampled and greedy, and several samples."""
    options = [
        ("--max-new-tokens", 30),
        ("--greedy", "--max-new-tokens", 20),
        ("-n", 3, "--max-new-tokens", 9),
    ]
    runs = list(itertools.product(PROMPTS[::3], (0, 7), ("stable", "aggressive"), options))
    assert differences(GOLDEN / f"{name}.bin", runs[:: STEP // 4 or 1], [*VARIANTS, SCALAR]) == []


def test_the_context_ends_the_text(tmp_path):
    model = edit_metadata(GOLDEN / "gqa.bin", tmp_path / "short.bin", max_positions="90")
    runs = list(itertools.product(PROMPTS[1:3], range(3), ("stable", "aggressive"), [()]))
    assert differences(model, runs) == []


@pytest.mark.parametrize("mode", ["stable", "aggressive"])
def test_prompts_through_openblas(mode):
    """Chunk by chunk and panel by panel, on any number of threads.

    Of bpo, and of the OpenBLAS in bpo-plain.
    """
    for model, prompt in itertools.product((DEMO, GOLDEN / "gqa.bin"), (PROMPTS[0], LONG[:230])):
        args = (
            "-m",
            model,
            "-p",
            prompt,
            "--mode",
            mode,
            "--seed",
            3,
            "-n",
            2,
            "--max-new-tokens",
            20,
            "--matmul",
            "openblas",
            "-q",
        )
        expected = plain(*args)
        assert plain(*args, OPENBLAS_NUM_THREADS="1") == expected
        for threads in (1, 2):
            assert works(*args, "-t", threads, "--no-cache").out == expected


def test_a_cached_prefix(tmp_path):
    """A second process reads the template's prefix from the cache folder: see test_prefix.py."""
    model = cached_prefix_model(tmp_path / "large.bin")
    args = ("-m", model, "-p", PROMPTS[1], "--seed", 3, "--max-new-tokens", 8, "-q")
    expected = plain(*args)
    for _ in range(2):
        assert works(*args, XDG_CACHE_HOME=str(tmp_path)).out == expected
        assert len(list((tmp_path / "bpo").iterdir())) == 1


def test_a_data_set(tmp_path):
    """Many prompts at once, each with its own seed."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), "utf-8")
    options = ("-m", DEMO, "--max-new-tokens", 40, "-q")
    out = works(*options, "-i", source, "--seed", 5, "--parallel", 7).out
    assert len(out.splitlines()) == len(PROMPTS)
    for line, prompt in list(zip(out.splitlines(), PROMPTS, strict=True))[::STEP]:
        record = json.loads(line)
        expected = plain(*options, "-p", prompt, "--seed", record["bpo"]["seed"])
        assert expected.decode("utf-8") == record["optimized_prompt"] + "\n"


def test_plain_refuses_what_it_cannot_do(tmp_path):
    usage = [
        (),
        ("-m", DEMO),
        ("-p", "x"),
        ("-m", DEMO, "-p", "x", "--seed", "-1"),
        ("-m", DEMO, "-p", "x", "--mode", "wild"),
        ("-z",),
    ]
    for args in usage:
        assert plain(*args, code=2) == b""
    assert plain("-m", tmp_path / "none.bin", "-p", "x", code=3) == b""
    assert plain("-m", DEMO, "-p", " \n ", code=4) == b""
    assert plain("-m", DEMO, "-p", "word " * 4000, code=4) == b""


def test_plain_is_bpo_c_alone():
    """The program holds no function of engine/ or cpu/.

    One of base/ shows that names are in it at all.
    """
    program = PLAIN.read_bytes()
    assert b"threads_create" in program
    for name in (b"bpo_step", b"kernels_cpu", b"top_k_draw"):
        assert name not in program, name
    assert len((ROOT / "bpo.c").read_text("utf-8").splitlines()) < 900

"""./bpo gives the bytes of ./bpo-plain: bpo.c alone, in plain scalar C, one prompt on one thread.

So whatever makes ./bpo fast (threads, SIMD levels, drafts, batches, kept prefixes) changes nothing.
"""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import ROOT, edit_metadata
from program import BPO, DEMO, GOLDEN, bpo, simd_levels, works

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
# What must not matter; one way after the other.
VARIANTS = [
    ((), {}),
    (("-t", 1), {}),
    (("-t", 3), {}),
    (("--lookup", 0), {}),
    (("--lookup", 15), {}),
    *(((), {"BPO_SIMD": level}) for level in simd_levels()),
]


def plain(*args, code: int = 0) -> bytes:
    """What bpo-plain prints."""
    result = bpo(*args, program=PLAIN)
    assert result.code == code, result.err
    return result.out


def differences(model: Path, runs: list[tuple]) -> list[tuple]:
    """The runs (prompt, seed, mode, options) of which the two programs print unlike texts."""

    def differs(numbered: tuple) -> bool:
        number, (prompt, seed, mode, options) = numbered
        args = ("-m", model, "-p", prompt, "--seed", seed, "--mode", mode, "-q", *options)
        more, env = VARIANTS[number % len(VARIANTS)]
        return plain(*args) != works(*args, "--matmul", "own", "--no-cache", *more, **env).out

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(differs, enumerate(runs)))
    return [run for run, differs in zip(runs, found, strict=True) if differs]


def test_300_rewrites_of_the_demo_model():
    """Several samples where that is the mode's way: from the second on they begin with a copy of the prompt."""
    short = ("--max-new-tokens", 20)
    stable = [(p, seed, "stable", short if seed > 2 else ()) for p, seed in itertools.product(PROMPTS, range(15))]
    aggressive = [(p, seed, "aggressive", ("-n", 2, *short)) for p, seed in itertools.product(PROMPTS, range(10))]
    runs = stable + aggressive
    assert len(runs) >= 300
    assert differences(DEMO, runs) == []


def test_they_would_differ():
    """The comparison can fail: another seed gives another text, and so does another bit of a weight."""
    args = ("-m", DEMO, "-p", PROMPTS[0], "-q")
    assert plain(*args, "--seed", 1) != works(*args, "--seed", 2).out


@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("*.bin"))])
def test_tiny_models(name):
    """Of every shape, with lively logits; also greedy, and where the context ends the text."""
    options = [("--max-new-tokens", 30), ("--greedy", "--max-new-tokens", 20), ("-n", 3, "--max-new-tokens", 9)]
    runs = list(itertools.product(PROMPTS[::3], (0, 7), ("stable", "aggressive"), options))
    assert differences(GOLDEN / f"{name}.bin", runs) == []


def test_the_context_ends_the_text(tmp_path):
    model = edit_metadata(GOLDEN / "gqa.bin", tmp_path / "short.bin", max_positions="90")
    runs = list(itertools.product(PROMPTS[1:3], range(3), ("stable", "aggressive"), [()]))
    assert differences(model, runs) == []


@pytest.mark.parametrize("mode", ["stable", "aggressive"])
def test_prompts_through_openblas(mode):
    """Chunk by chunk and panel by panel, on any number of threads."""
    text = "Tell me about the history of the city of Paris, its people and its bridges. " * 3
    for model, prompt in itertools.product((DEMO, GOLDEN / "gqa.bin"), (PROMPTS[0], text)):
        args = ("-m", model, "-p", prompt, "--mode", mode, "--seed", 3, "-n", 2, "--max-new-tokens", 30, "--matmul", "openblas", "-q")
        expected = plain(*args)
        for threads in (1, 2):
            assert works(*args, "-t", threads, "--no-cache").out == expected


def test_a_data_set(tmp_path):
    """Many prompts at once, each with its own seed."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), "utf-8")
    out = works("-m", DEMO, "-i", source, "--seed", 5, "--parallel", 7, "-q").out
    for line, prompt in zip(out.splitlines(), PROMPTS, strict=True):
        record = json.loads(line)
        expected = plain("-m", DEMO, "-p", prompt, "--seed", record["bpo"]["seed"], "-q")
        assert expected.decode("utf-8") == record["optimized_prompt"] + "\n"


def test_plain_refuses_what_it_cannot_do(tmp_path):
    usage = [(), ("-m", DEMO), ("-p", "x"), ("-m", DEMO, "-p", "x", "--seed", "-1"), ("-m", DEMO, "-p", "x", "--mode", "wild"), ("-z",)]
    for args in usage:
        assert plain(*args, code=2) == b""
    assert plain("-m", tmp_path / "none.bin", "-p", "x", code=3) == b""
    assert plain("-m", DEMO, "-p", " \n ", code=4) == b""
    assert plain("-m", DEMO, "-p", "word " * 4000, code=4) == b""


def test_plain_is_bpo_c_alone():
    """No function of engine/ or cpu/ is in it."""
    program = PLAIN.read_bytes()
    for name in (b"bpo_step", b"kernels_cpu", b"threads_create", b"top_k_draw"):
        assert (name in program) == (name == b"threads_create"), name
    assert len((ROOT / "bpo.c").read_text("utf-8").splitlines()) < 900
